"data.scenes: intersections against marching and autograd, the table against direct painting, what each factor may change, the cache, and the true pictures of 3D Shapes."
import dataclasses, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from disdiff_tutorial.data import scenes as S
from disdiff_tutorial.data.factors import images_per_second
from disdiff_tutorial.data.files import SOURCES
from disdiff_tutorial.data.scenes import Scenes, World

TRUE = Path(__file__).parents[1] / "data" / "reference" / "shapes3d.npz"
WORLD = World()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "The table of 64 pixels, built once for this file in a folder of its own."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Scenes(device="cpu")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


# --- the grid -----------------------------------------------------------------------------------------------------------

def test_published_tables(data):
    assert len(data) == 480_000 and data.grid.sizes == (10, 10, 10, 8, 4, 15)
    assert data.grid.names == ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation") == tuple(S.tables())
    assert data.grid.index(torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])).tolist() \
        == [1, 15, 60, 480, 4800, 48_000]
    v = data.values(data.grid.factors(torch.tensor([0, 479_999])))
    assert v.dtype == torch.float64 and torch.allclose(v, torch.tensor([[0, 0, 0, .75, 0, -30], [.9, .9, .9, 1.25, 3, 30]]).double())


# what the labels of the published file hold
PUBLISHED = {
    "floor_hue": "0. 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9", "scale": "0.75 0.82142857 0.89285714 0.96428571 1.03571429 1.10714286 1.17857143 1.25", "shape": "0. 1. 2. 3.",
    "orientation": "-30. -25.71428571 -21.42857143 -17.14285714 -12.85714286 -8.57142857 -4.28571429 0. 4.28571429 8.57142857 12.85714286 17.14285714 21.42857143 25.71428571 30."}
PUBLISHED["wall_hue"] = PUBLISHED["object_hue"] = PUBLISHED["floor_hue"]


@pytest.mark.parametrize("name", S.tables())
def test_every_published_value(data, name):
    values = [float(v) for v in PUBLISHED[name].split()]
    assert len(values) == data.grid.sizes[data.grid.position(name)]
    assert data.tables[name].dtype == torch.float64 and data.tables[name].tolist() == pytest.approx(values, abs=6e-9)


def test_the_file_has_the_same_tables():
    "Those that the loader of 3dshapes.h5 checks its labels against."
    theirs = SOURCES["shapes3d"].tables
    assert list(theirs) == list(S.tables())
    for name, values in S.tables().items(): assert theirs[name].dtype == values.dtype and torch.allclose(theirs[name], values, rtol=0, atol=1e-14)


def test_index_and_factors_are_inverse_everywhere(data):
    every = torch.arange(480_000)
    factors = data.grid.factors(every)
    assert torch.equal(data.grid.index(factors), every)
    assert factors.T.tolist() == [a.tolist() for a in np.unravel_index(every.numpy(), data.grid.sizes)]


def test_hues_are_fully_saturated_and_a_tenth_of_a_turn_apart():
    assert S.HUES.amax(1).eq(5).all() and S.HUES.amin(1).eq(0).all() and len(S.HUES.unique(dim=0)) == 10
    assert S.HUES[0].tolist() == [5, 0, 0] and S.HUES[5].tolist() == [0, 5, 5]
    assert [h.tolist() for h in S.HUES[[3, 6]]] == [[1, 5, 0], [0, 2, 5]]


# --- rays and surfaces --------------------------------------------------------------------------------------------------

OUTSIDE = {  # signed distance of a point to each solid at scale s, written down independently
    0: lambda p, s: box_distance(p - torch.tensor([0, 0, s * WORLD.cube]), s * WORLD.cube),
    1: lambda p, s: cylinder_distance(p, s * WORLD.cylinder),
    2: lambda p, s: (p - torch.tensor([0, 0, s * WORLD.sphere])).norm(dim=1) - s * WORLD.sphere,
    3: lambda p, s: (p - torch.stack([0 * p[:, 2], 0 * p[:, 2], p[:, 2].clamp(s * WORLD.capsule, 3 * s * WORLD.capsule)], 1)).norm(dim=1) - s * WORLD.capsule}

def box_distance(q, half): return (q.abs() - half).clamp_min(0).norm(dim=1) + (q.abs() - half).amax(1).clamp_max(0)

def cylinder_distance(p, r):
    q = torch.stack([p[:, :2].norm(dim=1) - r, (p[:, 2] - r).abs() - r], 1)
    return q.clamp_min(0).norm(dim=1) + q.amax(1).clamp_max(0)


@pytest.mark.parametrize("shape", range(4))
@pytest.mark.parametrize("scale, turn", [(.75, -30.), (1., 4.), (1.25, 30.)])
def test_solids_against_marching(shape, scale, turn):
    "Walk along each ray by the distance to the solid: where that ends, and what it misses, must be what the intersections say."
    o, look, d = S.rays(WORLD, turn, 48)
    t, normal = S.solid(WORLD, shape, scale, o, d)
    unit, way = F.normalize(d, dim=1), torch.full((len(d),), 3.)
    for _ in range(200): way = way + OUTSIDE[shape](o + way[:, None] * unit, scale).clamp(max=1)
    left = OUTSIDE[shape](o + way[:, None] * unit, scale)
    hit, clear = left.abs() < 1e-4, left > 1e-2
    assert hit.sum() > 80 and (t[hit] < S.FAR).float().mean() > .99 and (t[clear] == S.FAR).all() and (hit | clear).float().mean() > .98
    both = hit & (t < S.FAR)
    assert ((t * d.norm(dim=1) - way).abs()[both] < 5e-3).float().mean() > .99    # grazing rays stop early when marching


@pytest.mark.parametrize("shape", range(4))
def test_normals_are_gradients(shape):
    o, look, d = S.rays(WORLD, 11., 64)
    t, normal = S.solid(WORLD, shape, 1.1, o, d)
    p = (o + t[:, None] * d)[t < S.FAR].requires_grad_()
    value = OUTSIDE[shape](p, 1.1)
    (slope,) = torch.autograd.grad(value.sum(), p)
    assert value.abs().max() < 1e-4
    smooth = slope.norm(dim=1) > .99                                            # not on an edge of the cube
    assert smooth.float().mean() > .9 and ((F.normalize(slope, dim=1) * normal[t < S.FAR]).sum(1)[smooth] > .999).float().mean() > .98


@given(st.integers(0, 3), st.floats(.75, 1.25), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_random_rays_hit_on_the_surface_from_outside(shape, scale, seed):
    g = torch.Generator().manual_seed(seed)
    o = torch.randn(300, 3, generator=g); o = 8 * F.normalize(o.abs(), dim=1) * torch.tensor([1, -1, 1.])
    d = torch.rand(300, 3, generator=g) * torch.tensor([2, 2, 3.]) - torch.tensor([1, 1, 0.]) - o
    t, normal = S.solid(WORLD, shape, scale, o, d)
    hit = t < S.FAR
    assert hit.any() and (OUTSIDE[shape]((o + t[:, None] * d)[hit], scale).abs() < 1e-3).all()
    assert ((normal * d).sum(1)[hit] < 1e-3).all() and torch.allclose(normal[hit].norm(dim=1), torch.tensor(1.), atol=1e-4)


def test_the_room_is_closed_below_its_walls():
    for turn in S.tables()["orientation"].tolist():
        o, look, d = S.rays(WORLD, turn, 48)
        t, normal, region = S.room(WORLD, o, d)
        p = o + t[:, None] * d
        inside = (p[:, 0].abs() < WORLD.half + 1e-3) & ((p[:, 1] - WORLD.shift).abs() < WORLD.half + 1e-3) & (p[:, 2] > -1e-3)
        assert inside[region != S.SKY].all() and (region == S.SKY).view(48, 48)[:10].all() and (region == S.FLOOR).view(48, 48)[36:].all()


def test_shadow_lies_away_from_the_lamp():
    empty = S.backdrop(WORLD, 0., 192)
    region, shade, white = S.trace(WORLD, empty, 1., 2)
    dark = (region == S.FLOOR) & (shade < empty.steady + .5 * empty.beam)
    p = (empty.origin + empty.t[:, None] * empty.directions)[dark]
    assert len(p) > 300 and p[:, 0].mean() > .2 and (p[:, :2].norm(dim=1) < 2.5).all()
    assert torch.equal(shade[dark], empty.steady[dark])


def test_filter():
    for size in (16, 64, 96):
        w = S.lanczos(3 * size, size)
        assert torch.allclose(w.sum(1), torch.ones(size), atol=1e-6) and torch.allclose(w, w.flip(0, 1), atol=1e-6)
    ramp = S.lanczos(192, 64) @ ((torch.arange(192) + .5) / 3)
    assert torch.allclose(ramp[4:-4], torch.arange(64.)[4:-4] + .5, atol=1e-3)    # straight lines stay


# --- images -------------------------------------------------------------------------------------------------------------

def painted(factors, size=64, world=WORLD):
    "One image by the direct way: paint every sample, clip, shrink the colours."
    v = [table[k].item() for table, k in zip(S.tables().values(), factors)]
    region, shade, white = S.trace(world, S.backdrop(world, v[5], 3 * size), v[3], int(v[4]))
    colours = torch.cat([S.HUES[list(factors[:3])] / 5, torch.tensor(world.sky)[None] / 255])
    rgb = (colours[region] * torch.where(region == S.SKY, 1, shade)[:, None] + white[:, None]).clamp(0, 1) * 255
    w = S.lanczos(3 * size, size)
    return torch.einsum("ij,jkc,lk->cil", w, rgb.view(3 * size, 3 * size, 3), w).clamp(0, 255)


def test_images_are_painted_scenes(data):
    x, f = data.sample(20, torch.Generator().manual_seed(0))
    assert x.shape == (20, 3, 64, 64) and x.dtype == torch.uint8 and torch.equal(x, data.images(f))
    for image, factors in zip(x, f.tolist()): assert (image - painted(factors)).abs().max() < .8     # rounding to sixteenths, then to whole levels


def test_sky_is_the_skys_colour(data):
    x, _ = data.sample(300, torch.Generator().manual_seed(1))
    assert (x[:, :, :5] == torch.tensor(WORLD.sky)[:, None, None]).all()


def test_chunks_and_processes_do_not_matter(data):
    f = data.grid.sample(200, torch.Generator().manual_seed(3))
    assert torch.equal(data.images(f), torch.cat([data.images(part) for part in f.split(31)]))
    code = "import torch; from disdiff_tutorial.data.scenes import Scenes; print(Scenes(16, 'cpu').sample(50, torch.Generator().manual_seed(0))[0].long().sum().item())"
    one, two = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1] for _ in range(2))
    assert one == two


def surface(factors, kind):
    "Pixels (size, size) within the filter's reach of floor, wall or object, or of 3: object and shadow."
    v = [table[k].item() for table, k in zip(S.tables().values(), factors)]
    empty = S.backdrop(WORLD, v[5], 192)
    region, shade, _ = S.trace(WORLD, empty, v[3], int(v[4]))
    here = region == kind if kind < 3 else (region == S.OBJECT) | (shade != empty.steady + empty.beam)
    return F.max_pool2d(F.max_pool2d(here.view(1, 1, 192, 192).float(), 3), 7, 1, 3)[0, 0] > 0


@pytest.mark.parametrize("column", range(3))
def test_a_hue_changes_its_surface_and_nothing_else(data, column):
    f = data.grid.sample(40, torch.Generator().manual_seed(4 + column))
    g = f.clone(); g[:, column] = (g[:, column] + 5) % 10
    moved = (data.images(f) != data.images(g)).any(1)
    assert moved.flatten(1).any(1).all()
    for where, factors in zip(moved, f.tolist()): assert not (where & ~surface(factors, column)).any()


@pytest.mark.parametrize("column, size", [(3, 8), (4, 4)])
def test_scale_and_shape_change_the_object_and_its_shadow(data, column, size):
    f = data.grid.sample(40, torch.Generator().manual_seed(column))
    g = f.clone(); g[:, column] = (g[:, column] + 1) % size
    moved = (data.images(f) != data.images(g)).any(1)
    assert moved.flatten(1).any(1).all()
    for where, a, b in zip(moved, f.tolist(), g.tolist()): assert not (where & ~surface(a, 3) & ~surface(b, 3)).any()


def test_orientation_leaves_the_sky(data):
    f = data.grid.sample(100, torch.Generator().manual_seed(8))
    g = f.clone(); g[:, 5] = (g[:, 5] + 1) % 15
    moved = (data.images(f) != data.images(g)).any(1)
    assert moved.flatten(1).any(1).all() and not moved[:, :5].any()


def test_bigger_scale_bigger_object():
    v = S.tables()
    for shape in range(4):
        area = [(S.trace(WORLD, S.backdrop(WORLD, 0., 96), s, shape)[0] == S.OBJECT).sum().item() for s in v["scale"].tolist()]
        assert area == sorted(area) and area[-1] > 2 * area[0]


def test_all_cases_differ(data): assert len(data.rows.view(480, -1).unique(dim=0)) == 480


def test_a_size_from_numpy(data):
    import numpy as np
    f = data.grid.sample(3, torch.Generator().manual_seed(0))
    assert torch.equal(Scenes(np.int64(64), "cpu").images(f), Scenes(64, "cpu").images(f))


def test_other_sizes_show_the_same(data, cache):
    f = data.grid.sample(60, torch.Generator().manual_seed(5))
    small = Scenes(16, "cpu")
    assert small.shape == (3, 16, 16) and small.images(f).shape == (60, 3, 16, 16)
    assert (F.avg_pool2d(data.images(f).float(), 4) - small.images(f).float()).abs().mean() < 6


def test_another_world(data, cache):
    night = dataclasses.replace(WORLD, ambient=.1, sky=(0, 0, 40))
    f = data.grid.sample(30, torch.Generator().manual_seed(6))
    dark, day = Scenes(16, "cpu", night), Scenes(16, "cpu")
    assert len(list((cache / "disdiff_tutorial" / "scenes").glob("16-*"))) == 2
    assert dark.images(f).float().mean() < day.images(f).float().mean() - 20 and (dark.images(f)[:, :, 0] == torch.tensor([0, 0, 40])[:, None]).all()


# --- the true pictures --------------------------------------------------------------------------------------------------

def true_pictures():
    z = np.load(TRUE, allow_pickle=False)
    return [torch.from_numpy(z[name]).permute(0, 3, 1, 2) for name in ("frames", "samples")]

def hue_of(colour):
    colour = colour.float() / colour.max()
    return (colour - S.HUES / 5).abs().sum(1).argmin().item()

def error(picture, data, factors): return (data.images(factors).float() - picture.float()).abs().mean((1, 2, 3))


def test_frames_of_the_animation(data):
    steps = [(0, 0, k) for k in range(15)] + [(0, k, 14) for k in (1, 2, 3)] + [(k, 3, 14) for k in range(1, 7)]
    e = torch.cat([error(x, data, torch.tensor([[0, 6, 3, *s]])) for x, s in zip(true_pictures()[0], steps)])
    assert e.max() < 2.5 and e.mean() < 1.7, e


def test_samples_at_their_best_match(data):
    cases = torch.cartesian_prod(torch.arange(8), torch.arange(4), torch.arange(15))
    best = []
    for x in true_pictures()[1]:
        hues = torch.tensor([hue_of(x[:, row, column]) for row, column in ((62, 3), (28, 3), (46, 32))])
        e = error(x, data, torch.cat([hues.expand(480, 3), cases], 1))
        best.append(e.min())
    assert max(best) < 5 and sum(best) / 25 < 3.2, best


# --- cache and errors ---------------------------------------------------------------------------------------------------

def table_file(cache):
    (path,) = (cache / "disdiff_tutorial" / "scenes").glob("16-*.safetensors")
    return path

def test_a_damaged_table_is_built_again(cache, capsys):
    fresh = Scenes(16, "cpu").rows
    path = table_file(cache); whole = path.read_bytes()
    assert capsys.readouterr().out == ""
    for damaged in (whole[: len(whole) // 2], b"", whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]):
        path.write_bytes(damaged)
        assert torch.equal(Scenes(16, "cpu").rows, fresh)
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and "damaged" in out and path.name in out
        assert path.read_bytes() == whole and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_table_is_built_once(cache, monkeypatch):
    fresh = Scenes(16, "cpu").rows
    monkeypatch.setattr(S, "build", lambda *_: pytest.fail("built again"))
    assert torch.equal(Scenes(16, "cpu").rows, fresh)


def test_without_a_place_for_the_table(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Scenes(16, "cpu").rows.shape == (480 * 21, 256)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("expected to write")


@pytest.mark.parametrize("call, words", [
    (lambda d: Scenes(True), ["16 to 96", "True"]), (lambda d: Scenes(8), ["16 to 96", "8"]), (lambda d: Scenes(128), ["16 to 96", "128"]), (lambda d: Scenes(64.), ["16 to 96", "64.0"]),
    (lambda d: d.images(torch.tensor([[0, 0, 0, 0, 4, 0]])), ["shape from 0 to 3", "found 4 in row 0"]),
    (lambda d: d.images(torch.tensor([[0, 0, 0, 0, 0, 0], [10, 0, 0, 0, 0, 0]])), ["floor_hue from 0 to 9", "found 10 in row 1"]),
    (lambda d: d.images(torch.zeros(2, 5, dtype=torch.long)), ["shape (n, 6)"]),
    (lambda d: d.values(torch.zeros(1, 6)), ["whole factors"]),
    (lambda d: d.sample(3, fixed={"hue": 1}), ["among floor_hue", "'hue'"])])
def test_bad_input_gives_one_line(data, call, words):
    with pytest.raises(ValueError) as caught: call(data)
    text = str(caught.value)
    assert text.startswith("expected ") and ", found " in text and "\n" not in text
    for word in words: assert word in text, text


def test_speed_on_one_core(data): assert images_per_second(data, 1024) > 7500      # best of four goes; measured above 20,000


def test_the_table_takes_less_than_20_seconds():
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    start = time.perf_counter(); rows = S.build(WORLD, 64, show=False); seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    assert rows.shape == (480 * 21, 4096) and seconds < 20, seconds                # measured: 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cpu_and_gpu_agree(data):
    f = data.grid.sample(5000, torch.Generator().manual_seed(0))
    assert torch.equal(Scenes(device="cuda").images(f).cpu(), data.images(f))
