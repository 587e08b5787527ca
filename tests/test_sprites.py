"data.sprites: tables and order as published, what each factor changes, which images coincide, the renderer against an independent one and against true frames."
import math
from pathlib import Path
import numpy as np, pytest, torch
from disdiff_tutorial.data.factors import images_per_second
from disdiff_tutorial.data.files import SOURCES
from disdiff_tutorial.data.sprites import Packed, Sprites, ellipse, heart, outlines, square, tables

FRAMES = Path(__file__).parents[1] / "data" / "reference" / "dsprites-frames.npz"
data = Sprites(device="cpu")
draw = lambda *factors: data.images(torch.tensor([factors]))


def one_line(error, *words):
    text = str(error.value)
    assert text.startswith("expected ") and ", found " in text and ": " in text and "\n" not in text, text
    for word in words: assert word in text, text


@pytest.mark.parametrize("call, words", [
    (lambda: data.images(torch.zeros(2, 5, dtype=torch.long)), ["shape (n, 6)"]),
    (lambda: data.images(torch.tensor([[0, 0, 0, 40, 0, 0]])), ["orientation from 0 to 39", "found 40"]),
    (lambda: data.images(torch.tensor([[1, 0, 0, 0, 0, 0]])), ["color from 0 to 0", "found 1"]),
    (lambda: Sprites(8), ["at least 16 pixels", "8"]),
    (lambda: Sprites(True), ["at least 16 pixels", "True"]),
    (lambda: Sprites(shapes={"square": square(), "hole": square() * float("nan")}, device="cpu"), ["within 0.242", "nan"]),
    (lambda: Sprites(64.0), ["at least 16 pixels", "64.0"]),
    (lambda: Sprites(shapes={"big": 2 * square()}), ["within 0.242", "0.424"]),
    (lambda: Sprites(shapes={}), ["at least one outline"]),
    (lambda: Sprites(shapes={"flat": torch.zeros(4, 3)}), ["corners (V, 2)", "(4, 3)"]),
])
def test_bad_input_gives_one_line(call, words):
    with pytest.raises(ValueError) as error: call()
    one_line(error, *words)


# --- tables and order ---------------------------------------------------------------------------------------------------

# what the metadata of the published file prints as latents_possible_values
PUBLISHED = {
    "color": "1.", "shape": "1. 2. 3.", "scale": "0.5 0.6 0.7 0.8 0.9 1.",
    "orientation": """0. 0.16110732 0.32221463 0.48332195 0.64442926 0.80553658 0.96664389 1.12775121 1.28885852 1.44996584 1.61107316 1.77218047 1.93328779
        2.0943951 2.25550242 2.41660973 2.57771705 2.73882436 2.89993168 3.061039 3.22214631 3.38325363 3.54436094 3.70546826 3.86657557 4.02768289 4.1887902
        4.34989752 4.51100484 4.67211215 4.83321947 4.99432678 5.1554341 5.31654141 5.47764873 5.63875604 5.79986336 5.96097068 6.12207799 6.28318531""",
    "posX": """0. 0.03225806 0.06451613 0.09677419 0.12903226 0.16129032 0.19354839 0.22580645 0.25806452 0.29032258 0.32258065 0.35483871 0.38709677 0.41935484
        0.4516129 0.48387097 0.51612903 0.5483871 0.58064516 0.61290323 0.64516129 0.67741935 0.70967742 0.74193548 0.77419355 0.80645161 0.83870968 0.87096774
        0.90322581 0.93548387 0.96774194 1."""}
PUBLISHED["posY"] = PUBLISHED["posX"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_value(name):
    values = [float(v) for v in PUBLISHED[name].split()]
    assert len(values) == data.grid.sizes[data.grid.position(name)]
    assert data.tables[name].dtype == torch.float64 and data.tables[name].tolist() == pytest.approx(values, abs=6e-9)


def test_the_file_has_the_same_tables():
    "Those that the loader of the npz checks its labels against."
    theirs = SOURCES["dsprites"].tables
    assert list(theirs) == list(data.tables) and all(torch.equal(theirs[name], values) for name, values in data.tables.items())


def test_the_whole_grid_in_the_published_order():
    "737,280 rows of values, nested loops with posY innermost; and back to numbers and factors."
    every = torch.arange(len(data))
    f = data.grid.factors(every)
    assert torch.equal(data.grid.index(f), every)
    assert torch.equal(data.values(f), torch.cartesian_prod(*data.tables.values()))


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


def moments(x):
    "Row and column of the centre of the white pixels, and their number: (n,) each."
    white, middles = (x[:, 0] > 0).double(), torch.arange(64.).double() + .5
    count = white.sum((1, 2))
    return white.sum(2) @ middles / count, white.sum(1) @ middles / count, count


def off(f, m):
    "Row and column of the centre, less the place that the factors say: (2, n)."
    x, y = data.values(f)[:, 4:].T
    return torch.stack([m[0] - 16 - 32 * y, m[1] - 16 - 32 * x])


@pytest.mark.parametrize("name, along, across", [("posX", 1, 0), ("posY", 0, 1)])
def test_each_place_moves_along_its_own_axis(name, along, across):
    "By 32/31 of a pixel a step on average; pixels let the centre stray by half a pixel at most (a square with upright sides does)."
    k, base = data.grid.position(name), data.grid.sample(400, torch.Generator().manual_seed(5))
    base = base[base[:, 1] < 2]                                    # the heart turns about a point beside its centre of area
    for value in range(32):
        f = base.clone(); f[:, k] = value
        m = moments(data.images(f))
        if value == 0: start = m
        assert off(f, m).abs().max() <= .5 + 1e-9
        assert (m[along] - start[along]).mean() == pytest.approx(value * 32 / 31, abs=.04) and abs((m[across] - start[across]).mean()) < .02
        assert (m[2] / start[2]).mean() == pytest.approx(1, abs=.01)


def test_scale_changes_the_area_as_its_square_and_not_the_place():
    base = data.grid.sample(1500, torch.Generator().manual_seed(6), {"scale": 5})
    base = base[base[:, 1] < 2]
    full = moments(data.images(base))[2]
    for k, scale in enumerate((.5, .6, .7, .8, .9)):
        f = base.clone(); f[:, 2] = k
        m = moments(data.images(f))
        assert (m[2] / full).mean() == pytest.approx(scale ** 2, abs=.004)
        assert off(f, m).abs().max() <= .5 + 1e-9 and off(f, m).mean(1).abs().max() < .02


def test_orientation_and_shape_keep_the_place():
    base = data.grid.sample(600, torch.Generator().manual_seed(7), {"shape": 0, "orientation": 0})
    upright = data.images(base)
    for shape, orientation in ((0, 3), (0, 5), (0, 17), (1, 0), (1, 31)):
        f = base.clone(); f[:, 1] = shape; f[:, 3] = orientation
        x = data.images(f); m = moments(x)
        assert off(f, m).abs().max() <= .5 + 1e-9 and off(f, m).mean(1).abs().max() < .03
        assert not (x == upright).flatten(1).all(1).any()
        assert m[2].sum() / moments(upright)[2].sum() == pytest.approx((1, math.pi / 4)[shape], abs=.012)


def mask(outline, scale, angle, px, py, near=1 / 256):
    "Pixels (64, 64) within the outline by its winding number, in floats; and those whose centre is so near to it that rounding the corners to 1/256 may decide. Nothing shared with the library."
    c, s = np.cos(angle), np.sin(angle)
    a = 64 * (scale * outline.numpy() @ np.array([[c, -s], [s, c]]) + .25 + .5 * np.array([px, py]))
    middles = np.stack(np.meshgrid(np.arange(64) + .5, np.arange(64) + .5), -1)[:, :, None]              # (row, column, 1, xy)
    p, q = a - middles, np.roll(a, -1, 0) - middles
    turned = np.arctan2(p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0], (p * q).sum(-1)).sum(-1)
    edge = q - p
    along = np.clip(-(p * edge).sum(-1) / (edge ** 2).sum(-1), 0, 1)
    return np.abs(turned) > np.pi, np.hypot(*np.moveaxis(p + along[..., None] * edge, -1, 0)).min(-1) < near


@pytest.mark.parametrize("shape", range(3), ids=list(outlines()))
@pytest.mark.parametrize("name", ["shape", "scale", "orientation", "posX", "posY"])
def test_one_factor_changes_only_pixels_that_the_two_outlines_do_not_share(name, shape):
    "So all changes lie within the two masks together; where just one of them covers a pixel, it does change."
    k = data.grid.position(name)
    f = data.grid.sample(8, torch.Generator().manual_seed(10 * k + shape), {"shape": shape})
    g = f.clone(); g[:, k] = (f[:, k] + torch.randint(1, data.grid.sizes[k] - (name == "orientation"), (8,), generator=torch.Generator().manual_seed(k))) % data.grid.sizes[k]
    moved, doubtful = (data.images(f) != data.images(g))[:, 0].numpy(), 0
    assert moved.any((1, 2)).all()
    for where, a, b in zip(moved, data.values(f).tolist(), data.values(g).tolist()):
        (one, close), (two, close_too) = (mask(list(outlines().values())[int(v[1]) - 1], *v[2:]) for v in (a, b))
        unsure = close | close_too
        assert not (where & ~(one | two | unsure)).any() and (where == (one ^ two))[~unsure].all()
        doubtful += unsure.sum()
    assert doubtful < 8 * 10                                       # sides that run through centres, mostly


# --- what coincides -----------------------------------------------------------------------------------------------------

def test_orientations_never_return_to_the_grid_before_39():
    "A quarter is 9.75 labels: modulo 90, 180 and 360 degrees the first 39 angles all differ, evenly spaced."
    for fold in (1, 2, 4):
        folded = sorted(k * fold % 39 for k in range(39))
        assert folded == list(range(39))
        angle = (data.tables["orientation"][:39].rad2deg() % (360 / fold)).sort().values
        assert torch.allclose(angle, torch.arange(39).double() * 360 / fold / 39, atol=1e-9)


@pytest.mark.parametrize("shape, nearest, iou", [(0, {10, 29}, .962), (1, {19, 20}, .940), (2, {1, 38}, .85)])
def test_the_most_similar_other_orientation(shape, nearest, iou):
    "A square looks most like the one ten labels on, an ellipse like the one half a turn on: as geometry without pixels has it, 2.3 and 4.6 degrees off."
    f = torch.cartesian_prod(*(torch.tensor(v) for v in ([0], [shape], [5])), torch.arange(39), torch.tensor([3, 12, 22]), torch.tensor([5, 25]))
    white = (data.images(f) > 0).float().view(39, -1, 4096).transpose(0, 1)
    both = white @ white.mT; count = both.diagonal(dim1=1, dim2=2)
    overlap = (both / (count[:, :, None] + count[:, None, :] - both)).mean(0)
    k = torch.arange(39)
    lags = torch.stack([overlap[k, (k + d) % 39].mean() for d in range(39)])
    top = set(lags[1:].topk(2).indices.add(1).tolist())
    assert top == nearest and lags[list(top)].mean() == pytest.approx(iou, abs=.012)


def test_copies_differ_in_orientation_alone():
    "All scales and orientations at five places: equal pictures have equal shape, scale and place; hearts have 39 orientations."
    at = torch.tensor([[0, 0], [31, 31], [15, 16], [9, 20], [31, 5]])
    f = torch.cartesian_prod(torch.tensor([0]), torch.arange(3), torch.arange(6), torch.arange(40), torch.arange(5))
    f = torch.cat([f[:, :4], at[f[:, 4]]], 1)
    same = np.unique(np.packbits(data.images(f).flatten(1).numpy() > 0, axis=1), axis=0, return_inverse=True)[1].ravel()
    keys = torch.from_numpy(same)
    apart = torch.cat([f[:, :3], f[:, 4:]], 1)
    assert len(torch.cat([keys[:, None], apart], 1).unique(dim=0)) == len(keys.unique()) < 39 * 18 * 5
    assert len(keys[f[:, 1] == 2].unique()) == 39 * 6 * 5 and len(keys[(f[:, 4] == 0) & (f[:, 5] == 0)].unique()) == 672


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


def test_sizes_and_outlines_from_numpy():
    import numpy as np
    f = data.grid.sample(20, torch.Generator().manual_seed(0))
    same = Sprites(np.int64(64), "cpu", {k: v.numpy() for k, v in outlines().items()})
    assert torch.equal(same.images(f), Sprites(64, "cpu").images(f))


def test_other_outlines():
    more = Sprites(device="cpu", shapes={**outlines(), "kite": torch.tensor([[0, -.2], [.1, 0], [0, .2], [-.1, 0]])})
    assert more.grid.sizes[1] == 4 and len(more) == 983_040
    f = data.grid.sample(50, torch.Generator().manual_seed(4))
    assert torch.equal(more.images(f), data.images(f))
    assert abs((more.sample(500, torch.Generator().manual_seed(0), {"shape": 3, "scale": 5})[0] > 0).float().sum((1, 2, 3)).mean() - .04 * 64 ** 2) < 1


def test_outlines_have_the_corners_of_the_original():
    assert [len(p) for p in outlines().values()] == [4, 100, 150] and ellipse().amax(0)[0] == pytest.approx(.15 * 1.33) and heart().dtype == torch.float64


def test_packed_images_are_the_same():
    "A small grid, all of it; batches too."
    for shapes in ({"square": square()}, {"kite": torch.tensor([[0, -.2], [.1, 0], [0, .2], [-.1, 0]])}):
        drawn = Sprites(16, device="cpu", shapes=shapes); packed = Packed(drawn)
        every = torch.arange(0, len(drawn), 7)
        assert torch.equal(packed.images(drawn.grid.factors(every)), drawn.images(drawn.grid.factors(every))) and packed.bits.numel() == len(drawn) * 32
        assert all(torch.equal(a, b) for a, b in zip(packed.batches(64, seed=3)(5), drawn.batches(64, seed=3)(5)))
    grey = Sprites(16, device="cpu", shapes={"square": square()}); render = grey.render
    for lie in (1, 128, 254):
        grey.render = lambda factors: render(factors).clamp(max=lie)
        with pytest.raises(ValueError) as error: Packed(grey)
        one_line(error, "0 and 255 alone", "grey")
    with pytest.raises(ValueError) as error: Packed(Sprites(20, device="cpu"))
    one_line(error, "multiple of 8", "20")


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


def test_speed_on_one_core(): assert images_per_second(data, 2048) > 10_000      # best of four goes; measured above 50,000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cpu_and_gpu_agree():
    f = data.grid.sample(5000, torch.Generator().manual_seed(0))
    gpu = Sprites(device="cuda")
    assert torch.equal(gpu.images(f).cpu(), data.images(f)) and gpu.sample(4, torch.Generator(device="cuda").manual_seed(0))[0].is_cuda
    packed, plain = (make(Sprites(16, device="cuda", shapes={"square": square()})) for make in (Packed, lambda x: x))
    assert torch.equal(packed.batches(64)(1)[0], plain.batches(64)(1)[0])
