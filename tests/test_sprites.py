"data.factors and data.sprites: the grid's arithmetic, batches, the renderer against an independent one, and against true frames of dSprites."
import math, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from disdiff_tutorial.data.factors import FactorData, FactorGrid
from disdiff_tutorial.data.sprites import Sprites, ellipse, heart, outlines, square, tables

FRAMES = Path(__file__).parents[1] / "data" / "reference" / "dsprites-frames.npz"
data = Sprites(device="cpu")
draw = lambda *factors: data.images(torch.tensor([factors]))


def one_line(error, *words):
    text = str(error.value)
    assert text.startswith("expected ") and ", found " in text and ": " in text and "\n" not in text, text
    for word in words: assert word in text, text


# --- grid ---------------------------------------------------------------------------------------------------------------

sizes_ = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(sizes_)
@settings(max_examples=50, deadline=None)
def test_index_and_factors_are_inverse(sizes):
    grid = FactorGrid([f"f{k}" for k in range(len(sizes))], sizes)
    every = torch.arange(len(grid))
    if len(every) > 5000: every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:5000]]
    factors = grid.factors(every)
    assert torch.equal(grid.index(factors), every) and factors.dtype == torch.int64
    assert factors.T.tolist() == [a.tolist() for a in np.unravel_index(every.numpy(), sizes)]


@given(sizes_, st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=50, deadline=None)
def test_samples_stay_on_the_grid_and_keep_what_is_held(sizes, seed, more):
    grid = FactorGrid([f"f{k}" for k in range(len(sizes))], sizes)
    k = more.draw(st.integers(0, len(sizes) - 1)); value = more.draw(st.integers(0, sizes[k] - 1))
    f = grid.sample(20, torch.Generator().manual_seed(seed), {f"f{k}": value})
    assert torch.equal(grid.check(f), f) and (f[:, k] == value).all()
    assert torch.equal(f, grid.sample(20, torch.Generator().manual_seed(seed), {f"f{k}": value}))


def test_samples_are_uniform_and_independent():
    grid, n = FactorGrid(("a", "b"), (3, 4)), 60_000
    counts = grid.index(grid.sample(n, torch.Generator().manual_seed(0))).bincount(minlength=12).double()
    chi2 = ((counts - n / 12) ** 2 / (n / 12)).sum()
    assert chi2 < 31.3  # 0.1% point of chi-square with 11 degrees of freedom


def test_one_held_value_per_row():
    grid = FactorGrid(("a", "b"), (3, 4))
    assert grid.sample(3, fixed={"a": torch.tensor([2, 0, 1])})[:, 0].tolist() == [2, 0, 1]


@pytest.mark.parametrize("call, words", [
    (lambda g: FactorGrid(("a", "a"), (2, 2)), ["different names"]),
    (lambda g: FactorGrid(("a", "b"), (2,)), ["one size for each"]),
    (lambda g: FactorGrid(("a",), (0,)), ["at least 1"]),
    (lambda g: g.index(torch.tensor([[0, 4]])), ["b from 0 to 3", "found 4 in row 0"]),
    (lambda g: g.index(torch.tensor([[0, 1], [-1, 0]])), ["a from 0 to 2", "found -1 in row 1"]),
    (lambda g: g.index(torch.tensor([[0.0, 1.0]])), ["whole factors", "float32"]),
    (lambda g: g.index(torch.tensor([0, 1])), ["shape (n, 2)", "(2,)"]),
    (lambda g: g.factors(torch.tensor([12])), ["0 to 11", "12"]),
    (lambda g: g.factors(torch.tensor([[1]])), ["shape (n,)"]),
    (lambda g: g.sample(0), ["at least one sample"]),
    (lambda g: g.sample(2, fixed={"c": 0}), ["among a, b", "'c'"]),
    (lambda g: g.sample(2, fixed={"a": 3}), ["a from 0 to 2"]),
    (lambda g: g.sample(2, fixed={"a": 0.5}), ["whole values of a"]),
    (lambda g: g.sample(2, fixed={"a": torch.tensor([0, 1, 2])}), ["one value of a or 2"]),
    (lambda g: data.batches(0), ["batch of at least one"]),
    (lambda g: data.batches(4, seed=-1), ["seed"]),
    (lambda g: data.images(torch.zeros(2, 5, dtype=torch.long)), ["shape (n, 6)"]),
    (lambda g: data.images(torch.tensor([[0, 0, 0, 40, 0, 0]])), ["orientation from 0 to 39", "found 40"]),
    (lambda g: Sprites(8), ["at least 16 pixels", "8"]),
    (lambda g: Sprites(64.0), ["at least 16 pixels", "64.0"]),
    (lambda g: Sprites(shapes={"big": 2 * square()}), ["within 0.242", "0.424"]),
    (lambda g: Sprites(shapes={}), ["at least one outline"]),
    (lambda g: Sprites(shapes={"flat": torch.zeros(4, 3)}), ["corners (V, 2)", "(4, 3)"]),
])
def test_bad_input_gives_one_line(call, words):
    with pytest.raises(ValueError) as error: call(FactorGrid(("a", "b"), (3, 4)))
    one_line(error, *words)


def test_a_subclass_without_render_says_so():
    class Empty(FactorData): grid, shape, device = FactorGrid(("a",), (2,)), (1, 1, 1), torch.device("cpu")
    with pytest.raises(NotImplementedError) as error: Empty().images(torch.tensor([[0]]))
    one_line(error, "render")


# --- batches ------------------------------------------------------------------------------------------------------------

def test_batches_depend_on_seed_and_step_alone():
    one, two, other = data.batches(32, seed=5), data.batches(32, seed=5), data.batches(32, seed=6)
    for step in (7, 0, 3):
        (x, f), (y, g) = one(step), two(step)
        assert torch.equal(x, y) and torch.equal(f, g) and torch.equal(x, data.images(f))
    assert not torch.equal(one(3)[1], other(3)[1]) and not torch.equal(one(3)[1], one(4)[1]) and not torch.equal(one(1)[1], other(0)[1])


def test_batches_in_another_process():
    code = "from disdiff_tutorial.data.sprites import Sprites; print(Sprites(device='cpu').batches(3, seed=1)(1000)[1].tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out.splitlines()[-1] == str(data.batches(3, seed=1)(1000)[1].tolist())


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(0); expected = torch.rand(1)
    torch.manual_seed(0); data.batches(4)(0); data.sample(4, torch.Generator().manual_seed(1))
    assert torch.equal(torch.rand(1), expected)


# --- sprites ------------------------------------------------------------------------------------------------------------

def test_published_tables():
    assert len(data) == 737_280 and data.grid.sizes == (1, 3, 6, 40, 32, 32)
    assert data.grid.names == ("color", "shape", "scale", "orientation", "posX", "posY") == tuple(tables())
    assert data.grid.index(torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]])).tolist() == [1, 32, 1024, 245_760]
    v = data.values(data.grid.factors(torch.tensor([0, 737_279])))
    assert v.dtype == torch.float64 and torch.allclose(v, torch.tensor([[1, 1, .5, 0, 0, 0], [1, 3, 1, 2 * math.pi, 1, 1]]).double())


def test_images_are_uint8_black_and_white():
    x, f = data.sample(300, torch.Generator().manual_seed(0))
    assert x.shape == (300, 1, 64, 64) and x.dtype == torch.uint8 and x.unique().tolist() == [0, 255] and torch.equal(x, data.images(f))
    assert (x > 0).flatten(1).any(1).all() and not (x[..., [0, 63]].any() or x[:, :, [0, 63]].any())


def test_position_moves_and_nothing_else():
    f = data.grid.sample(200, torch.Generator().manual_seed(1), {"posX": 0, "posY": 0})
    g = f.clone(); g[:, 4:] = 31
    assert torch.equal(data.images(g), data.images(f).roll((32, 32), (-2, -1)))
    columns = torch.arange(64.) + .5
    centre = lambda x: (x[:, 0].float().sum(1) * columns).sum(1) / x.float().sum((1, 2, 3))
    g = f.clone(); g[:, 4] = 10
    assert (centre(data.images(g)) - centre(data.images(f)) - 320 / 31).abs().max() < .35


def test_directions():
    rows = lambda x: (x[0, 0] > 0).nonzero().double().mean(0)
    assert rows(draw(0, 2, 5, 0, 0, 31))[0] > 45 and rows(draw(0, 2, 5, 0, 31, 0))[1] > 45        # posY down, posX right
    up, quarter = rows(draw(0, 2, 5, 0, 0, 0)) - 15.5, rows(draw(0, 2, 5, 10, 0, 0)) - 15.5
    assert up[0] < -1.5 and abs(up[1]) < .1 and quarter[1] < -1.5                                   # lobes: up, then left; tip to the right


def test_known_sizes():
    "The axis-aligned squares of the true data have these sides in pixels."
    for scale, side in enumerate((10, 12, 14, 16, 18, 20)):
        assert (draw(0, 0, scale, 0, 0, 0) > 0).sum() == side ** 2


def test_orientations_0_and_39_are_one():
    f = data.grid.sample(100, torch.Generator().manual_seed(2), {"orientation": 0})
    g = f.clone(); g[:, 3] = 39
    assert torch.equal(data.images(f), data.images(g))


def oracle(outline, scale, angle, cx, cy, size):
    "Even-odd fill with Python integers and fractions, pixel by pixel; nothing shared with the library."
    from fractions import Fraction as Q
    c, s = math.cos(angle), math.sin(angle)
    p = [(round((cx + size * scale * (c * x + s * y)) * 256), round((cy + size * scale * (-s * x + c * y)) * 256)) for x, y in outline.tolist()]
    out = np.zeros((size, size), bool)
    for j in range(size):
        y = 256 * j + 128
        for (ax, ay), (bx, by) in zip(p, p[1:] + p[:1]):
            if min(ay, by) <= y < max(ay, by):
                x = ax + Q((y - ay) * (bx - ax), by - ay)
                out[j] ^= np.array([256 * i + 128 >= x for i in range(size)])
    return out


@pytest.mark.parametrize("size, n", [(16, 6), (32, 6), (64, 6), (96, 2)])
def test_against_an_independent_renderer(size, n):
    small = Sprites(size, device="cpu")
    x, f = small.sample(n, torch.Generator().manual_seed(size))
    for image, (_, shape, scale, angle, px, py) in zip(x, small.values(f).tolist()):
        truth = oracle(list(outlines().values())[int(shape) - 1], scale, angle, (.25 + .5 * px) * size, (.25 + .5 * py) * size, size)
        assert (truth == (image[0].numpy() > 0)).all()


def test_chunks_do_not_matter():
    f = data.grid.sample(700, torch.Generator().manual_seed(3))
    assert torch.equal(data.images(f), torch.cat([data.images(part) for part in f.split(77)]))


def test_other_outlines():
    more = Sprites(device="cpu", shapes={**outlines(), "kite": torch.tensor([[0, -.2], [.1, 0], [0, .2], [-.1, 0]])})
    assert more.grid.sizes[1] == 4 and len(more) == 983_040
    f = data.grid.sample(50, torch.Generator().manual_seed(4))
    assert torch.equal(more.images(f), data.images(f))
    assert abs((more.sample(500, torch.Generator().manual_seed(0), {"shape": 3, "scale": 5})[0] > 0).float().sum((1, 2, 3)).mean() - .04 * 64 ** 2) < 1


def test_outlines_have_the_corners_of_the_original():
    assert [len(p) for p in outlines().values()] == [4, 100, 150] and ellipse().amax(0)[0] == pytest.approx(.15 * 1.33) and heart().dtype == torch.float64


def test_true_frames():
    "Each true frame is pixel-identical to an image of the grid. The sweeps of the animation leave two factors at their ends, so a part of the grid is enough."
    frames = torch.from_numpy(np.load(FRAMES, allow_pickle=False)["frames"] > 0)
    k = torch.arange
    turn, slide = torch.cartesian_prod(k(3), k(6), k(40), k(1), k(1)), torch.cat([
        torch.cartesian_prod(k(2, 3), k(5, 6), k(1), k(32), torch.tensor([0, 31])), torch.cartesian_prod(k(2, 3), k(5, 6), k(1), torch.tensor([0, 31]), k(32))])
    factors = torch.cat([turn, slide]); factors = torch.cat([torch.zeros_like(factors[:, :1]), factors], 1)
    drawn, truth = (data.images(factors).flatten(1) > 0).float(), frames.flatten(1).float()
    both = truth @ drawn.T
    iou = (both / (truth.sum(1, keepdim=True) + drawn.sum(1) - both)).amax(1)
    assert iou.mean() >= .98, f"mean IoU {iou.mean():.4f}"
    assert (iou == 1).sum() == len(frames), f"{int((iou == 1).sum())} of {len(frames)} frames are pixel-identical"


def test_speed_on_one_core():
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        f, best = data.grid.sample(2048, torch.Generator().manual_seed(0)), math.inf
        for _ in range(4):
            start = time.perf_counter(); data.render(f); best = min(best, time.perf_counter() - start)
    finally: torch.set_num_threads(threads)
    assert len(f) / best > 3000  # measured above 50,000; loose, since machines are busy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cpu_and_gpu_agree():
    f = data.grid.sample(5000, torch.Generator().manual_seed(0))
    gpu = Sprites(device="cuda")
    assert torch.equal(gpu.images(f).cpu(), data.images(f)) and gpu.sample(4, torch.Generator(device="cuda").manual_seed(0))[0].is_cuda
