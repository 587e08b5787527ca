"data.factors: the grid's arithmetic, splits by chance and by pairs, batches, and the rotation toy with its random rotations."
import math, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from disdiff_tutorial.data.factors import FactorData, FactorGrid, Reduced, Rotated, rotation

SPRITES = FactorGrid(("color", "shape", "scale", "orientation", "posX", "posY"), (1, 3, 6, 40, 32, 32))
seeded = lambda seed=0: torch.Generator().manual_seed(seed)


class Lamps(FactorData):
    "One row of pixels per factor; the lit one is its value."
    def __init__(self, *sizes):
        self.grid, self.device = FactorGrid([f"f{k}" for k in range(len(sizes))], sizes), torch.device("cpu")
        self.shape = (1, len(sizes), max(sizes))
    def render(self, factors): return (255 * torch.nn.functional.one_hot(factors, self.shape[2]))[:, None].to(torch.uint8)


lamps = Lamps(5, 7, 3)


def one_line(error, *words):
    text = str(error.value)
    assert text.startswith("expected ") and ", found " in text and ": " in text and "\n" not in text, text
    for word in words: assert word in text, text


def test_nothing_goes_there_and_back():
    "An empty batch: numbers, factors, images, and the nearest pictures."
    grid, none = lamps.grid, torch.zeros(0, dtype=torch.long)
    assert grid.factors(none).shape == (0, 3) and torch.equal(grid.index(grid.factors(none)), none)
    few = Reduced(lamps, f0=[1, 2])
    factors, distance = few.nearest(few.images(few.grid.factors(none)))
    assert factors.shape == (0, 3) and distance.shape == (0,)


def test_whole_numbers_of_every_type():
    "Lists to draw among, sizes and steps from numpy or torch."
    grid = FactorGrid("ab", torch.tensor([3, 4]))
    assert grid.sizes == (3, 4) and set(grid.index(grid.sample(np.int64(50), seeded(), among=[0, 5])).tolist()) == {0, 5}
    assert torch.equal(lamps.batches(np.int32(3))(torch.tensor(7))[1], lamps.batches(3)(7)[1])


# --- grid ---------------------------------------------------------------------------------------------------------------

sizes_ = st.lists(st.integers(1, 9), min_size=1, max_size=6)
named = lambda sizes: FactorGrid([f"f{k}" for k in range(len(sizes))], sizes)


@given(sizes_)
@settings(max_examples=50, deadline=None)
def test_index_and_factors_are_inverse(sizes):
    grid = named(sizes)
    every = torch.arange(len(grid))
    if len(every) > 5000: every = every[torch.randperm(len(every), generator=seeded())[:5000]]
    factors = grid.factors(every)
    assert torch.equal(grid.index(factors), every) and factors.dtype == torch.int64
    assert factors.T.tolist() == [a.tolist() for a in np.unravel_index(every.numpy(), sizes)]


@given(sizes_, st.data())
@settings(max_examples=50, deadline=None)
def test_factors_and_index_are_inverse(sizes, more):
    f = torch.tensor([[more.draw(st.integers(0, s - 1)) for s in sizes] for _ in range(5)])
    assert torch.equal(named(sizes).factors(named(sizes).index(f)), f)


def test_every_number_of_dsprites_comes_back():
    "All 737,280; the factors are those that counting in nested loops gives."
    every = torch.arange(len(SPRITES))
    f = SPRITES.factors(every)
    assert torch.equal(SPRITES.index(f), every)
    assert torch.equal(f, torch.cartesian_prod(*(torch.arange(s) for s in SPRITES.sizes)))


@given(sizes_, st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=50, deadline=None)
def test_samples_stay_on_the_grid_and_keep_what_is_held(sizes, seed, more):
    grid = named(sizes)
    k = more.draw(st.integers(0, len(sizes) - 1)); value = more.draw(st.integers(0, sizes[k] - 1))
    f = grid.sample(20, seeded(seed), {f"f{k}": value})
    assert torch.equal(grid.check(f), f) and (f[:, k] == value).all()
    assert torch.equal(f, grid.sample(20, seeded(seed), {f"f{k}": value}))


def test_samples_are_uniform_and_independent():
    grid, n = FactorGrid(("a", "b"), (3, 4)), 60_000
    counts = grid.index(grid.sample(n, seeded())).bincount(minlength=12).double()
    chi2 = ((counts - n / 12) ** 2 / (n / 12)).sum()
    assert chi2 < 31.3  # 0.1% point of chi-square with 11 degrees of freedom


def test_samples_among_are_uniform_there():
    grid, n, some = FactorGrid(("a", "b"), (3, 4)), 60_000, torch.tensor([0, 3, 5, 11])
    counts = grid.index(grid.sample(n, seeded(), among=some)).bincount(minlength=12).double()
    assert counts.nonzero()[:, 0].tolist() == some.tolist()
    assert ((counts[some] - n / 4) ** 2 / (n / 4)).sum() < 16.3  # the same with 3 degrees


def test_one_held_value_per_row():
    grid = FactorGrid(("a", "b"), (3, 4))
    assert grid.sample(3, fixed={"a": torch.tensor([2, 0, 1])})[:, 0].tolist() == [2, 0, 1]


def test_the_others_vary_when_one_is_held():
    f = SPRITES.sample(2000, seeded(), {"posX": 7})
    assert [len(f[:, k].unique()) for k in range(6)] == [1, 3, 6, 40, 1, 32]


@pytest.mark.parametrize("call, words", [
    (lambda g: FactorGrid(("a", "a"), (2, 2)), ["different names"]),
    (lambda g: FactorGrid(("a", "b"), (2,)), ["one size for each"]),
    (lambda g: FactorGrid(("a",), (0,)), ["at least 1"]),
    (lambda g: FactorGrid("ab", (2.7, 3)), ["whole sizes of at least 1", "2.7"]),
    (lambda g: FactorGrid("ab", (True, 3)), ["whole sizes of at least 1", "True"]),
    (lambda g: g.index([["x", "y"]]), ["whole factors"]),
    (lambda g: g.sample(2.5), ["at least one sample", "2.5"]),
    (lambda g: g.sample(True), ["at least one sample", "True"]),
    (lambda g: g.sample(2, among=g.split()), ["whole numbers to draw among"]),
    (lambda g: g.sample(2, among=[False, True]), ["whole numbers to draw among", "bool"]),
    (lambda g: g.split(math.nan), ["a share of the combinations", "nan"]),
    (lambda g: g.split(math.inf), ["a share of the combinations", "inf"]),
    (lambda g: g.split("0.1"), ["a share of the combinations", "'0.1'"]),
    (lambda g: g.split_pairs("a", "b", math.nan), ["a share of the pairs", "nan"]),
    (lambda g: lamps.batches(2)(-1), ["a whole step", "-1"]),
    (lambda g: lamps.batches(2)(1.5), ["a whole step", "1.5"]),
    (lambda g: lamps.batches(2.5), ["batch of at least one", "2.5"]),
    (lambda g: lamps.batches(2, 1.5), ["a whole seed", "1.5"]),
    (lambda g: lamps.batches(2, fixed={"zz": 0}), ["among f0, f1, f2", "'zz'"]),
    (lambda g: lamps.batches(2, among=[999]), ["numbers from 0 to 104"]),
    (lambda g: Reduced(lamps, f0=4), ["values of f0 from 0 to 4", "found 4"]),
    (lambda g: Reduced(lamps, f0=[1.5]), ["whole values of f0"]),
    (lambda g: Reduced(lamps, shrink=1.5), ["a whole shrink", "1.5"]),
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
    (lambda g: g.sample(2, fixed={"a": 0}, among=torch.tensor([1])), ["nothing fixed", "leave one"]),
    (lambda g: g.sample(2, among=torch.tensor([], dtype=torch.long)), ["numbers to draw among", "0 numbers"]),
    (lambda g: g.sample(2, among=torch.tensor([12])), ["0 to 11"]),
    (lambda g: g.split(0.), ["1 to 11 combinations", "which is 0"]),
    (lambda g: g.split(1.), ["which is 12"]),
    (lambda g: g.split_pairs("a", "c"), ["among a, b", "'c'"]),
    (lambda g: g.split_pairs("a", "a"), ["two different factors"]),
    (lambda g: g.split_pairs("a", "b", test=.9), ["1 to 8 of 12 pairs", "each value is seen", "which is 11"]),
    (lambda g: g.split_pairs("a", "b", test=.01), ["which is 0"]),
    (lambda g: g.split_pairs("a", "b", pattern="stripes"), ["'random' or 'diagonal'", "'stripes'"]),
    (lambda g: lamps.batches(0), ["batch of at least one"]),
    (lambda g: lamps.batches(4, seed=-1), ["seed"]),
    (lambda g: lamps.images(torch.zeros(2, 5, dtype=torch.long)), ["shape (n, 3)"]),
    (lambda g: rotation(0), ["at least one dimension"]),
    (lambda g: Rotated(0), ["at least one dimension"]),
    (lambda g: Rotated().sample(0), ["at least one sample"]),
    (lambda g: Rotated().batches(0), ["batch of at least one"]),
])
def test_bad_input_gives_one_line(call, words):
    with pytest.raises(ValueError) as error: call(FactorGrid(("a", "b"), (3, 4)))
    one_line(error, *words)


# --- splits -------------------------------------------------------------------------------------------------------------

def covers(grid, train, test):
    both = torch.cat([train, test])
    return len(both) == len(grid) and torch.equal(both.sort().values, torch.arange(len(grid)))


@given(sizes_, st.floats(.01, .99), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_a_split_is_a_split(sizes, share, seed):
    grid = named(sizes)
    if not 0 < round(share * len(grid)) < len(grid): return
    train, test = grid.split(share, seed)
    assert covers(grid, train, test) and len(test) == round(share * len(grid))
    assert torch.equal(test, test.sort().values) and torch.equal(grid.split(share, seed).test, test)


def test_a_split_takes_all_parts_of_the_grid_alike():
    "Held-out counts of each posX are hypergeometric around the share."
    counts = SPRITES.factors(SPRITES.split(.1).test)[:, 4].bincount(minlength=32).double()
    mean, n = 73_728 / 32, len(SPRITES) / 32
    assert (counts - mean).abs().max() < 4.5 * math.sqrt(n * .1 * .9 * (31 / 32))
    assert not torch.equal(SPRITES.split(.1, 1).test, SPRITES.split(.1, 2).test)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.sampled_from(["random", "diagonal"]), st.integers(0, 50), st.data())
@settings(max_examples=80, deadline=None)
def test_pairs_are_held_out_whole_and_every_value_stays(a, b, other, pattern, seed, more):
    grid = FactorGrid(("x", "other", "y"), (a, other, b))
    n = more.draw(st.integers(1, a * b - max(a, b)))
    train, test = grid.split_pairs("x", "y", n / (a * b), seed, pattern)
    assert covers(grid, train, test) and len(test) == n * other
    seen, held = grid.factors(train), grid.factors(test)
    pairs = [{tuple(p) for p in f[:, [0, 2]].tolist()} for f in (seen, held)]
    assert not pairs[0] & pairs[1] and len(pairs[1]) == n
    assert [len(seen[:, k].unique()) for k in range(3)] == [a, other, b]
    assert torch.equal(grid.split_pairs("x", "y", n / (a * b), seed, pattern).test, test)


@pytest.mark.parametrize("pattern", ["random", "diagonal"])
def test_the_seed_moves_the_pairs(pattern):
    one, two = (SPRITES.split_pairs("shape", "posX", .25, seed, pattern).test for seed in (0, 1))
    assert len(one) == len(two) == len(SPRITES) // 4 and not torch.equal(one, two)


def test_the_diagonal_takes_an_even_share_of_each_value():
    grid = FactorGrid(("x", "y"), (6, 32))
    held = torch.zeros(6, 32); held.view(-1)[grid.split_pairs("x", "y", .25, pattern="diagonal").test] = 1
    assert held.sum(1).tolist() == [8] * 6 and held.sum(0).unique().tolist() == [1, 2]
    jumps = (held != held.roll(1, 1)).sum(1)
    assert (jumps == 2).all()                                    # one band per row, round the corner


# --- batches ------------------------------------------------------------------------------------------------------------

def test_a_subclass_without_render_says_so():
    class Empty(FactorData): grid, shape, device = FactorGrid(("a",), (2,)), (1, 1, 1), torch.device("cpu")
    with pytest.raises(NotImplementedError) as error: Empty().images(torch.tensor([[0]]))
    one_line(error, "render")


def test_batches_depend_on_seed_and_step_alone():
    one, two, other = lamps.batches(32, seed=5), lamps.batches(32, seed=5), lamps.batches(32, seed=6)
    for step in (7, 0, 3):
        (x, f), (y, g) = one(step), two(step)
        assert torch.equal(x, y) and torch.equal(f, g) and torch.equal(x, lamps.images(f))
    assert not torch.equal(one(3)[1], other(3)[1]) and not torch.equal(one(3)[1], one(4)[1]) and not torch.equal(one(1)[1], other(0)[1])


def test_batches_in_another_process():
    code = "from disdiff_tutorial.data.factors import Rotated; print(Rotated(2, device='cpu').batches(3, seed=1)(1000)[1].tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out.splitlines()[-1] == str(Rotated(2, device="cpu").batches(3, seed=1)(1000)[1].tolist())


def test_batches_stay_on_their_side_of_a_split():
    train, test = lamps.grid.split_pairs("f0", "f1", .3)
    seen = torch.cat([lamps.grid.index(lamps.batches(64, among=train)(step)[1]) for step in range(50)])
    assert set(seen.tolist()) == set(train.tolist())             # 3,200 draws from 72


def test_batches_train_a_net():
    "They fit `fit` as they are."
    from disdiff_tutorial.diffusion.training import fit
    torch.manual_seed(0)
    net = torch.nn.Linear(21, 5)
    loss = lambda images, factors: torch.nn.functional.cross_entropy(net(images.flatten(1) / 255.), factors[:, 0])
    done = fit(loss, net, lamps.batches(64, seed=1), steps=200, lr=.03, progress=False)
    assert done.images == 200 * 64
    with torch.no_grad(): assert loss(*lamps.sample(100, seeded())) < .2 < math.log(5)


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(0); expected = torch.rand(1)
    torch.manual_seed(0)
    lamps.batches(4)(0); lamps.sample(4, seeded(1)); lamps.grid.split(); lamps.grid.split_pairs("f0", "f1"); Rotated().batches(4)(0)
    assert torch.equal(torch.rand(1), expected)


# --- rotations ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 10, 64])
def test_rotations_are_rotations(n):
    R = rotation(n, seeded(n))
    assert R.dtype == torch.float64 and torch.allclose(R @ R.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.linalg.det(R).item() == pytest.approx(1, abs=1e-9) and torch.equal(R, rotation(n, seeded(n)))


@pytest.mark.parametrize("n", [3, 4, 7])
def test_rotations_have_the_moments_of_haar(n):
    "Entries: mean 0, square 1/n, fourth power 3/(n(n+2)); two of a row: squares' product 1/(n(n+2)); trace: 0 and 1. Within five standard errors or so."
    g, k = seeded(0), 5000
    R = torch.stack([rotation(n, g) for _ in range(k)])
    trace = R.diagonal(dim1=1, dim2=2).sum(1)
    assert R.mean(0).abs().max() < 5 / math.sqrt(k * n) and (n * R.square().mean(0) - 1).abs().max() < .12
    assert (R ** 4).mean() * n * (n + 2) == pytest.approx(3, abs=.06)
    assert (R[:, 0, 0] * R[:, 0, 1]).square().mean() * n * (n + 2) == pytest.approx(1, abs=.15)
    assert abs(trace.mean()) < 5 / math.sqrt(k) and trace.square().mean() == pytest.approx(1, abs=.1)


def test_turning_by_a_fixed_rotation_changes_nothing():
    "The angle of R and of QR for a fixed Q: the same distribution, (t - sin t) / pi. Kolmogorov-Smirnov at 0.1%."
    g, n, Q = seeded(1), 4000, rotation(3, seeded(7))
    R = torch.stack([rotation(3, g) for _ in range(n)])
    for some in (R, Q @ R, R @ Q):
        t = ((some.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).arccos().sort().values
        gap = ((t - t.sin()) / math.pi - torch.arange(n) / n).abs().max()
        assert gap < 1.95 / math.sqrt(n) + 1 / n


# --- the toy ------------------------------------------------------------------------------------------------------------

def test_the_toy_is_a_turned_cube():
    toy = Rotated(3, seed=2, device="cpu")
    x, z = toy.sample(50_000, seeded())
    assert x.shape == z.shape == (50_000, 3) and x.dtype == torch.float32
    assert torch.allclose(x @ toy.rotation, z, atol=1e-5) and torch.allclose(x.norm(dim=1), z.norm(dim=1), atol=1e-5)
    assert 0 <= z.min() < .001 and .999 < z.max() < 1 and torch.allclose(z.var(0), torch.full((3,), 1 / 12), atol=.002)
    assert torch.allclose(torch.corrcoef(torch.cat([x, z], 1).T)[:3, 3:], toy.rotation, atol=5 / math.sqrt(50_000))


def test_the_toy_in_more_dimensions_and_centred():
    x, z = Rotated(8, low=-.5, device="cpu").sample(20_000, seeded())
    assert x.shape == (20_000, 8) and z.mean(0).abs().max() < 5 * math.sqrt(1 / 12 / 20_000) and -.5 <= z.min() and z.max() <= .5


def test_the_toy_keeps_its_rotation_and_repeats_its_batches():
    one, two, other = Rotated(3, seed=4), Rotated(3, seed=4), Rotated(3, seed=5)
    assert torch.equal(one.rotation, two.rotation) and not torch.equal(one.rotation, other.rotation)
    (x, z), (y, w) = one.batches(16, seed=1)(9), two.batches(16, seed=1)(9)
    assert torch.equal(x, y) and torch.equal(z, w) and not torch.equal(z, one.batches(16, seed=1)(10)[1])
