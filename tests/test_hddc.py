"dyga.hddc: against formulas worked plainly, against scikit-maad's port of HDDA, and in the places where numbers break."
import importlib.util, math, subprocess, sys, warnings
from importlib import metadata
from unittest import mock
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.distributions import MultivariateNormal
from disdiff_tutorial.dyga.hddc import Gaussians, HDDC, em, intrinsic_dims, kmeans, log_joint, m_step, one_hot, responsibilities

rand = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def planted(n, K=4, p=8, d=2, spread=.5, noise=.2, seed=0):
    means, frames, y = spread * rand(K, p, seed=seed), torch.linalg.qr(rand(K, p, d, seed=seed + 1)).Q, torch.arange(n) % K
    return means[y] + (frames[y] @ rand(n, d, 1, seed=seed + 2))[..., 0] + noise * rand(n, p, seed=seed + 3), y

def soft(n, K, U=1, seed=0): return torch.softmax(2 * rand(U, n, K, seed=seed), 2)

def plain_joint(x, g, u):
    "One unit by torch.distributions, with the full covariance."
    return torch.stack([g.weights[u, k].log() + MultivariateNormal(g.means[u, k], g.axes[u, k] @ torch.diag(g.values[u, k]) @ g.axes[u, k].T).log_prob(x)
                        for k in range(g.weights.shape[1])], 1)

def plain_m(x, r, threshold=.2):
    "One cluster (n, p) with weights (n,), as the model is written: weight sum, mean, d, a, b."
    n, p = x.shape; mass = sum(r[i] for i in range(n)); mu = sum(r[i] * x[i] for i in range(n)) / mass
    W = sum(r[i] * torch.outer(x[i] - mu, x[i] - mu) for i in range(n)) / mass
    l = torch.linalg.eigvalsh(W).flip(0); drops = [(l[j] - l[j + 1]).item() for j in range(p - 1)]
    d = max([j + 1 for j in range(p - 1) if drops[j] > threshold * max(drops)], default=1)
    return mass, mu, d, l[:d], ((W.trace() - l[:d].sum()) / (p - d)).clamp(min=1e-8)


# --- against formulas worked plainly -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("K", [1, 3, 6])                                   # all at once, and gathered
def test_m_step(K):
    x, _ = planted(120); x = torch.stack([x, x.flip(1) + 3]); r = soft(120, K, 2)
    g = m_step(x, r)
    for u in range(2):
        for k in range(K):
            mass, mu, d, a, b = plain_m(x[u], r[u, :, k])
            assert abs(g.weights[u, k] - mass / 120) < 1e-7 and (g.means[u, k] - mu).abs().max() < 1e-6 and g.dims[u, k] == d
            assert (g.values[u, k, :d] - a).abs().max() < 1e-6 and (g.values[u, k, d:] - b).abs().max() < 1e-6
            assert (g.axes[u, k].T @ g.axes[u, k] - torch.eye(8)).abs().max() < 1e-9

@pytest.mark.parametrize("K,n", [(1, 50), (3, 300), (7, 2000)])
def test_log_joint_and_responsibilities(K, n):
    x, _ = planted(n); x = torch.stack([x, 2 * x + 1]); g = m_step(x, soft(n, K, 2))
    r, total = responsibilities(x, g)
    for u in range(2):
        plain = plain_joint(x[u], g, u)
        assert (log_joint(x, g)[u] - plain).abs().max() < 1e-9
        assert (r[u] - torch.softmax(plain, 1)).abs().max() < 1e-10 and abs(total[u] - plain.logsumexp(1).sum()) < 1e-7      # DyGA (4)

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 10 ** 6), st.floats(-4, 3), st.floats(-3, 4))
def test_any_shape_and_size(p, K, seed, scale, offset):
    "Dimensions of all kinds, sizes and offsets over orders of magnitude: the same as the full covariance, as far as the size of the numbers allows."
    x = (rand(60, p, seed=seed) * 10 ** scale + 10 ** offset)[None]; g = m_step(x, soft(60, K, seed=seed), dims=torch.randint(1, p, (1, K), generator=torch.Generator().manual_seed(seed)), floor=1e-300)
    assert (log_joint(x, g)[0] - plain_joint(x[0], g, 0)).abs().max() < 1e-4

@pytest.mark.parametrize("seed", range(4))
def test_em_never_falls_while_dimensions_are_held(seed):
    x, _ = planted(200, seed=seed); curves = []
    em(torch.stack([x, x.flip(0)]), soft(200, 5, 2, seed), iterations=50, tol=0, hold=True, history=curves)
    assert all(np.diff(c).min() > -1e-6 for c in curves) and all(len(c) == 51 for c in curves)

def test_parts_belong_together():
    x, _ = planted(300); g, r, total = em(x[None], soft(300, 4), iterations=5, tol=0)
    again, logs = responsibilities(x[None], g)
    assert (again - r).abs().max() < 1e-12 and abs(logs - total) < 1e-9
    assert em(x[None], g, iterations=0, want_resp=False)[1] is None
    assert (em(x[None], g, iterations=3, tol=0)[0].means - em(x[None], soft(300, 4), iterations=8, tol=0)[0].means).abs().max() < 1e-9  # goes on where it was

def test_batched_as_one_at_a_time():
    "Units that stop at different rounds, in one batch and alone."
    xs = torch.stack([planted(400, seed=s, spread=s + .2)[0] for s in range(5)]); r = soft(400, 6, 5); curves, alone = [], []
    g, resp, total = em(xs, r, history=curves)
    for u in range(5):
        one, q, t = em(xs[u:u + 1], r[u:u + 1], history=alone)
        assert abs(t - total[u]) < 1e-8 and (q[0] - resp[u]).abs().max() < 1e-7 and all((a[0] - b[u]).abs().max() < 1e-7 for a, b in zip((one.means, one.values, one.dims.double()), (g.means, g.values, g.dims.double())))
    assert len({len(c) for c in curves}) > 1 and [len(c) for c in curves] == [len(c) for c in alone]

def test_large_units_go_one_by_one():
    x = planted(90_000)[0].float().expand(3, -1, -1); r = soft(90_000, 8, 3)                # more than fits one part
    g, _, total = em(x, r, iterations=1, tol=0); assert abs(total[2] - em(x[:1].double(), r[2:], iterations=1, tol=0)[2]) < 1e-6

def test_weights_count_points():
    x, _ = planted(200); r = soft(200, 3); w = torch.arange(200)[None] % 3
    twice = torch.repeat_interleave(x, w[0], 0), torch.repeat_interleave(r[0], w[0], 0)
    g, _, total = em(x[None], r, iterations=6, tol=0, weight=w); other, _, t = em(twice[0][None], twice[1][None], iterations=6, tol=0)
    assert abs(total - t) < 1e-6 and (g.means - other.means).abs().max() < 1e-9

def test_points_in_single_precision():
    "The same mixture, and what `em` returns fits the points that it got."
    x, y = planted(300, K=3, p=8, seed=1); x, start = x[None].float(), one_hot(y[None], 3)
    g, resp, total = em(x, start); r, t = responsibilities(x, g); assert torch.allclose(r, resp) and torch.allclose(t, total)
    assert all(torch.equal(a, b) for a, b in zip(m_step(x, start.float()), m_step(x.double(), start)))

def test_bic():
    x, _ = planted(300); m = HDDC(3, random_state=0).fit(x.numpy()); p, K = 8, 3
    free = K - 1 + K * p
    for d in m.dims_: free += sum(p - j for j in range(1, d + 1)) + d + 2                  # axes, a, b and d itself
    logs = plain_joint(x, m.gaussians_, 0).logsumexp(1).sum().item()
    assert m.parameters() == free and abs(m.bic(x.numpy()) - (-2 * logs + free * math.log(300))) < 1e-6 and abs(m.loglik_ - logs) < 1e-6

def test_scree():
    assert intrinsic_dims(torch.tensor([[9., 3, 2.9, 2.8], [9, 8, 1, .9], [4, 4, 4, 4], [9, 8, 7, 1]])).tolist() == [1, 2, 1, 3]
    assert intrinsic_dims(torch.tensor([9., 3, 1, 0]), .1) == 3 and intrinsic_dims(torch.tensor([2., 1])) == 1


# --- against scikit-maad's port of HDDA (Fauvel), which has been in the package up to 0.1.4 -------------------------------------

@pytest.fixture(scope="module")
def port():
    "Its HDDC from maad/cluster/hdda.py alone; SciPy once had NumPy's functions, which it uses."
    try: file = next(f for f in metadata.files("scikit-maad") or [] if str(f) == "maad/cluster/hdda.py").locate()
    except (metadata.PackageNotFoundError, StopIteration): pytest.skip("scikit-maad 0.1.4 is not installed: pip install --no-deps scikit-maad==0.1.4")
    import scipy
    spec = importlib.util.spec_from_file_location("hdda_port", file); module = importlib.util.module_from_spec(spec)
    names = "finfo float64 log pi ones zeros arange mean absolute diff sqrt dot newaxis any repeat sum exp errstate empty delete argmax eye".split()
    with mock.patch.multiple(scipy, create=True, **{n: getattr(np, n) for n in names}):
        spec.loader.exec_module(module); yield module

@pytest.mark.parametrize("seed,p,K", [(0, 8, 4), (1, 12, 3), (2, 32, 5)])
def test_port_of_hdda(port, seed, p, K):
    """From the same labels, after the first M-step and after several. It divides covariances by n_k - 1 (we by n_k: rescaled), takes d = 1 where n_k is small, and stops when the
    likelihood moves relatively; its noise is tied across classes in M3, so M1 is compared. BIC has our sign there, and counts d_k, as ours does."""
    x, y = planted(800, K, p, 3, seed=seed); x = x.numpy()
    for rounds in (0, 4):
        g = m_step(torch.from_numpy(x)[None], one_hot(y[None], K))
        port_model = port.HDDC(model="M1", th=.2, init="user", C=K); port_model.n, port_model.d, port_model.cst = 800, p, p * math.log(2 * math.pi)
        port_model.T = np.eye(K)[y.numpy()]; port_model.m_step(x)
        for _ in range(rounds):
            rescale(port_model, p); port_model.e_step(x); port_model.free(); port_model.m_step(x)
            g = m_step(torch.from_numpy(x)[None], responsibilities(torch.from_numpy(x)[None], g)[0])
        rescale(port_model, p)
        assert g.dims[0].tolist() == list(port_model.pi)
        for k in range(K):
            d = port_model.pi[k]
            np.testing.assert_allclose(port_model.prop[k], g.weights[0, k], rtol=1e-6); np.testing.assert_allclose(port_model.mean[k], g.means[0, k], atol=1e-6)
            np.testing.assert_allclose(port_model.a[k], g.values[0, k, :d], rtol=1e-5); np.testing.assert_allclose(port_model.b[k], g.values[0, k, -1], rtol=1e-5)
            np.testing.assert_allclose(port_model.Q[k] @ port_model.Q[k].T, g.axes[0, k, :, :d] @ g.axes[0, k, :, :d].T, atol=1e-5)
        joint = log_joint(torch.from_numpy(x)[None], g)
        np.testing.assert_allclose(port_model.score_samples(x) / 2, joint[0], rtol=1e-5, atol=1e-4)
        total = port_model.e_step(x); np.testing.assert_allclose(total, joint.logsumexp(2).sum(), rtol=1e-6); np.testing.assert_allclose(port_model.T, torch.softmax(joint, 2)[0], atol=1e-4)

def rescale(m, p):
    "Covariances divided by n_k in place of n_k - 1."
    share = [(n - 1) / n for n in m.ni]
    m.a, m.b = [a * s for a, s in zip(m.a, share)], [b * s for b, s in zip(m.b, share)]
    m.logdet = [np.log(a).sum() + (p - d) * np.log(b) for a, b, d in zip(m.a, m.b, m.pi)]

def test_ports_bic(port):
    x, y = planted(600, 3); x = x.numpy()
    theirs = port.HDDC(model="M1", th=.2, init="user", C=3, itermax=3, tol=0); theirs.fit(x, y.numpy() + 1)
    ours = HDDC(3, init=y.numpy(), max_iter=4, tol=0).fit(x)
    assert theirs.pi == ours.dims_.tolist() and theirs.q == ours.parameters()
    np.testing.assert_allclose(theirs.bic, ours.bic(x), rtol=2e-3)                                          # n_k - 1 against n_k


# --- where numbers break ------------------------------------------------------------------------------------------------------

LINE = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None] * rand(1, 6)
HARD = {"line": LINE, "far line": LINE + 1e3, "points": torch.cat([rand(1, 6, seed=1).repeat(20, 1), rand(1, 6, seed=2).repeat(20, 1)]),
        "dead numbers": torch.cat([rand(40, 3), torch.zeros(40, 3, dtype=torch.float64)], 1), "fewer than p": rand(4, 6), "two points": rand(2, 6), "all the same": torch.ones(30, 6, dtype=torch.float64),
        "rectified": rand(40, 6).clamp(min=0), "huge": 1e8 * rand(40, 6), "tiny": 1e-9 * rand(40, 6)}

@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("K", [1, 2, 6])
def test_hard_points(name, K):
    x = HARD[name][None]
    for start in (soft(x.shape[1], K), one_hot(kmeans(x, K, generator=torch.Generator().manual_seed(0)), K)):
        curves = []; g, r, total = em(x, start, iterations=20, history=curves)
        assert all(t.isfinite().all() for t in (*g, r, total)) and (r.sum(2) - 1).abs().max() < 1e-9 and g.values.min() >= 1e-8
        assert ((g.dims >= 1) & (g.dims <= 5)).all() and abs(g.weights.sum() - 1) < 1e-9

def test_exact_on_a_line_far_away():
    g = m_step((LINE + 1e3)[None], torch.ones(1, 40, 1, dtype=torch.float64)); e = LINE - LINE.mean(0); q = g.axes[0, 0, :, 0]
    exact = -.5 * ((e @ q) ** 2 / g.values[0, 0, 0] + g.values[0, 0].log().sum() + 6 * math.log(2 * math.pi))
    assert g.values[0, 0, -1] == 1e-8 and (log_joint((LINE + 1e3)[None], g)[0, :, 0] - exact).abs().max() < 1e-4

def test_very_large_numbers():
    "Squares beyond float64 are refused in one line, not answered by nan; below that scale does not matter."
    x, y = planted(300); x, y = x.numpy(), y.numpy(); m = HDDC(4, random_state=0).fit(x)
    assert (HDDC(4, random_state=0).fit(1e80 * x).labels_ == m.labels_).all() and np.isfinite(m.predict_proba(1e80 * x)).all()
    for do in (lambda: HDDC(4).fit(1e160 * x), lambda: m.predict_proba(1e200 * x), lambda: m.predict(1e200 * x), lambda: em(torch.from_numpy(1e160 * x)[None], soft(300, 4))):
        with pytest.raises(ValueError, match="beyond 1e\\+100"): do()

def test_kmeans_far_from_zero():
    x, _ = planted(300, spread=2.); near = lambda v: kmeans(v[None], 4, generator=torch.Generator().manual_seed(0))[0]
    pairs = lambda l: l[:, None] == l
    assert torch.equal(pairs(near(x + 1e9)), pairs(near(x))) and torch.equal(pairs(near((x + 1e4).float())), pairs(near(x)))

def test_two_clusters_on_repeated_points():
    x = HARD["points"]; g, r, _ = em(x[None], one_hot(torch.arange(40)[None] // 20, 2))
    assert (r[0, :20, 0] == 1).all() and (g.means[0] - x[[0, 20]]).abs().max() < 1e-12

def test_empty_places_stay_empty():
    x, _ = planted(100); r = torch.cat([soft(100, 2), torch.zeros(1, 100, 3, dtype=torch.float64)], 2)
    g, resp, total = em(x[None], r); two = em(x[None], r[..., :2])
    assert (g.weights[0, 2:] == 0).all() and (resp[..., 2:] == 0).all() and abs(total - two[2]) < 1e-5 and (log_joint(x[None], g)[..., 2:] == -math.inf).all()

def test_what_an_empty_place_holds_does_not_matter():
    x, _ = planted(100); g = m_step(x[None], soft(100, 3)); wide = Gaussians(*(torch.cat([t[:, :1], t], 1).clone() for t in g))
    wide.weights[:, 0], wide.dims[:, 0], wide.means[:, 0] = 0, 7, 50                           # more axes than any other
    assert (log_joint(x[None], wide)[..., 1:] - log_joint(x[None], g)).abs().max() < 1e-8 and (log_joint(x[None], wide)[..., 0] == -math.inf).all()

def test_a_pair_does_not_win():
    "A start in which a cluster holds two points has the highest likelihood and is not chosen."
    x, _ = planted(60, 2, 8); many = [HDDC(6, n_init=20, random_state=s).fit(x.numpy()) for s in range(3)]
    for m in many: assert min(np.bincount(m.labels_, minlength=6)) >= 3
    with pytest.warns(UserWarning, match="ask for fewer clusters"): HDDC(4, n_init=2, random_state=0).fit(x[:8].numpy())

def test_one_line_errors():
    x = planted(50)[0]
    for do, word in ((lambda: em(x, soft(50, 2)), "points"), (lambda: em(x[None] * math.nan, soft(50, 2)), "finite"), (lambda: HDDC(0).fit(x.numpy()), "n_clusters"), (lambda: HDDC(51).fit(x.numpy()), "n_clusters"),
                     (lambda: HDDC(2, init="x").fit(x.numpy()), "init"), (lambda: HDDC(2, init=np.ones(50, int) * 2).fit(x.numpy()), "labels"),
                     (lambda: HDDC(2, init=np.arange(50) % 2 + .5).fit(x.numpy()), "whole labels"), (lambda: HDDC(2, init=np.full(50, np.nan)).fit(x.numpy()), "labels"), (lambda: HDDC(2, init=None).fit(x.numpy()), "labels"),
                     (lambda: HDDC("3").fit(x.numpy()), "n_clusters"), (lambda: HDDC(2.5).fit(x.numpy()), "n_clusters"), (lambda: HDDC(2, n_init=0).fit(x.numpy()), "n_init"), (lambda: HDDC(2, max_iter=-1).fit(x.numpy()), "max_iter"),
                     (lambda: HDDC(2, floor=math.nan).fit(x.numpy()), "floor > 0"), (lambda: HDDC(2, floor=0).fit(x.numpy()), "floor > 0"), (lambda: em(x[None], soft(40, 2)), "a start for 1 units of 50"), (lambda: em(x[None], soft(50, 2, 3)), "a start"),
                     (lambda: em(x[None], soft(50, 2) * math.nan), "a start"), (lambda: em(x[None], -soft(50, 2)), "a start"), (lambda: em(x[None], 0 * soft(50, 2)), "a start"), (lambda: em(x[None], soft(50, 2), -1), "iterations"),
                     (lambda: em(x[None], soft(50, 2), weight=torch.ones(50)), "weights"), (lambda: em(x[None], soft(50, 2), weight=torch.arange(50.)[None] - 9), "weights"), (lambda: em(x[None, :0], soft(0, 2)), "points"),
                     (lambda: em(x[None], soft(50, 2), weight=torch.full((1, 50), 1e-9)), "add up to 1"), (lambda: m_step(x[None], 0 * soft(50, 2)), "mass"),
                     (lambda: HDDC(2, random_state=np.random.default_rng(0)).fit(x.numpy()), "RandomState"), (lambda: kmeans(x[None] * math.nan, 2), "finite"), (lambda: kmeans(x[None], 0), "k >= 1"), (lambda: kmeans(x, 2), "points")):
        with pytest.raises(ValueError, match="expected .*" + word) as err: do()
        assert "\n" not in str(err.value)


# --- the estimator ------------------------------------------------------------------------------------------------------------

def test_scikit_learns_checks():
    sk = pytest.importorskip("sklearn.utils.estimator_checks")
    with warnings.catch_warnings(): warnings.simplefilter("ignore"); done = sk.check_estimator(HDDC(n_clusters=2), on_fail=None)
    assert not [c["check_name"] for c in done if c["status"] == "failed"] and sum(c["status"] == "passed" for c in done) > 30

def test_planted_mixtures_against_a_full_covariance():
    sk = pytest.importorskip("sklearn.mixture"); from sklearn.metrics import adjusted_rand_score as ari
    ours, full = [], []
    for seed in range(3):
        x, y = planted(1000, 20, 32, 3, .3, seed=10 * seed); x = x.numpy()
        ours.append(ari(y, HDDC(20, random_state=seed).fit(x).labels_)); full.append(ari(y, sk.GaussianMixture(20, n_init=3, random_state=seed).fit(x).predict(x)))
    assert np.mean(ours) >= np.mean(full), (ours, full)

def test_the_same_seed_the_same_clusters():
    x = planted(200)[0].numpy(); a, b = HDDC(4, random_state=3).fit(x), HDDC(4, random_state=3).fit(x)
    assert (a.labels_ == b.labels_).all() and a.loglik_ == b.loglik_
    assert HDDC(4, init="random", n_init=5, random_state=0).fit(x).loglik_ > -1e9

def test_without_scikit_learn(root):
    code = "import sys; sys.modules['sklearn'] = sys.modules['sklearn.base'] = None\nimport numpy as np\nfrom disdiff_tutorial.dyga.hddc import HDDC\nx = np.random.RandomState(0).randn(100, 4)\nm = HDDC(2, random_state=0).fit(x); assert m.predict(x).shape == (100,) and m.predict_proba(x).shape == (100, 2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root); assert done.returncode == 0, done.stderr
