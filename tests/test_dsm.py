"diffusion.dsm: three losses with one minimiser, LCG-DM's A.5 and its hidden assumption, weightings against KL, the likelihood bound, one image, messages."
import math
import pytest, torch
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional as F
from disdiff_tutorial.core import seed_everything
from disdiff_tutorial.diffusion.dsm import T_MIN, drop_cond, dsm_loss, likelihood, middle_time, soft_truncation, uniform_time, unit, v_weight
from disdiff_tutorial.diffusion.sde import DDPM, GaussianMixture, SubVPSDE, VESDE, VPSDE, like

torch.set_num_threads(1)
f64 = torch.float64
SDES = pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(.01, 5.), DDPM()], ids=["vp", "subvp", "ve", "ddpm"])
data = GaussianMixture(torch.tensor([.3, .45, .25], dtype=f64), torch.tensor([[-1.2], [.2], [1.4]], dtype=f64), torch.tensor([.3, .35, .25], dtype=f64))
x = torch.linspace(-6, 6, 2001, dtype=f64)[:, None]
dx = .006
vp, at = VPSDE(), torch.tensor(.1, dtype=f64)
fixed = lambda t: lambda n, device=None: torch.as_tensor(t, dtype=f64).expand(n)
ts = torch.logspace(-6, 0, 250, dtype=f64)
integral = lambda rate: torch.trapezoid(rate * ts, ts.log()).item()


def over(sde, t, values, law=data):
    "E over p_t of values on the grid."
    return (law.log_prob(x, sde, t).exp() * values).sum().item() * dx


def floor(sde, t, law=data): return 1 - (sde.sigma(t)**2 * over(sde, t, law.score(x, sde, t)[:, 0]**2, law)).item()


def one_line(call, *words, error=ValueError):
    with pytest.raises(error) as caught: call()
    text = str(caught.value)
    assert text and "\n" not in text, text
    for word in words: assert word in text, text


# --- the loss ------------------------------------------------------------------------------------------------------------

@SDES
def test_loss_is_the_papers(sde):
    x0 = torch.rand(16, 3, 4, 4) * 2 - 1
    net = lambda xt, t, cond=None: xt.tanh()
    for weighting, lam in ((unit, lambda t: sde.sigma(t)**2), (likelihood, lambda t: sde.diffusion(t)**2)):
        seed_everything(0); t, eps = uniform_time(16), torch.randn_like(x0)
        xt = sde.perturb(x0, t, eps); s = like(sde.sigma(t), xt)
        paper = (lam(t) * ((-net(xt, t) + eps) / s).square().flatten(1).sum(1)).mean() / 2           # LCG-DM (3)
        seed_everything(0)
        assert abs(dsm_loss(net, x0, sde, weighting=weighting) / (2 / 48 * paper) - 1) < 1e-4


def test_condition_reaches_the_net():
    cond, seen = torch.randn(5, 3), []
    def net(xt, t, cond): seen.append((t.shape, cond)); return xt
    dsm_loss(net, torch.randn(5, 1, 4, 4), vp, cond)
    assert seen[0][0] == (5,) and seen[0][1] is cond


@SDES
def test_ideal_net_reaches_the_floor_and_no_other_is_lower(sde):
    seed_everything(1); n = 40_000; t = torch.tensor(.2, dtype=f64)
    ideal = data.net(sde)
    got = dsm_loss(ideal, data.sample(n)[0], sde, time=fixed(.2)).item()
    assert abs(got - floor(sde, t)) < 5 * (2 / n)**.5
    for factor in (.7, 1.3):                                                             # the excess is known exactly
        seed_everything(2); more = dsm_loss(lambda *a: factor * ideal(*a), data.sample(n)[0], sde, time=fixed(.2)).item()
        excess = (factor - 1)**2 * (1 - floor(sde, t))
        assert abs(more - floor(sde, t) - excess) < 5 * (3 / n)**.5


def test_three_losses_differ_by_constants():
    a, sig = vp.alpha(at), vp.sigma(at); truth = lambda x: data.score(x, vp, at)
    g0, ge = torch.linspace(-4, 4, 401, dtype=f64), torch.linspace(-7, 7, 281, dtype=f64)
    mass = data.log_prob(g0[:, None], vp, torch.zeros((), dtype=f64)).exp()[:, None] * Normal(0., 1.).log_prob(ge).exp()
    mass, points = (mass / mass.sum()).reshape(-1), (a * g0[:, None] + sig * ge).reshape(-1, 1)
    fisher = over(vp, at, truth(x)[:, 0]**2)
    for s in (truth, lambda x: .7 * truth(x), lambda x: -x, lambda x: torch.sin(3 * x), lambda x: torch.tanh(2 * x + .3)):
        z = x.clone().requires_grad_(); (slope,) = torch.autograd.grad(s(z).sum(), z)
        explicit = over(vp, at, (s(x) - truth(x))[:, 0]**2) / 2
        implicit = over(vp, at, (s(x)**2 / 2 + slope)[:, 0])
        denoising = (mass * (s(points)[:, 0] + (ge / sig).expand(401, -1).reshape(-1))**2).sum() / 2
        assert abs(explicit - implicit - fisher / 2) < 1e-6
        assert abs(denoising - explicit - (1 / sig**2 - fisher) / 2) < 1e-6


three = GaussianMixture([.3, .45, .25], [[-1.2], [.2], [1.4]], [.3, .35, .25])
soft = GaussianMixture([.3, .3, .4], [[-.8, -.4], [.8, -.4], [0., .9]], [[.45, .6], [.6, .45], [.6, .4]])
four = GaussianMixture([.2, .3, .3, .2], [[-1.2], [-.3], [.5], [1.2]], [.4, .3, .3, .4])
plane = GaussianMixture([.2, .3, .3, .2], [[-.8, -.5], [.8, -.5], [-.6, .7], [.7, .7]], [[.45, .6], [.6, .45], [.6, .45], [.5, .6]])


@pytest.mark.parametrize("whole, row, step, n", [                                        # row: the components of the class
    (three, None, .5, 40_000), (four, [.5, 0., 0., .5], .4, 40_000), (four, [0., .5, .5, 0.], .4, 40_000),
    (soft, None, .85, 120_000), (plane, [.4, .6, 0., 0.], .85, 100_000), (plane, [0., 0., .6, .4], .85, 100_000)],
    ids=["1d", "1d-outer", "1d-inner", "2d", "2d-lower", "2d-upper"])
@pytest.mark.parametrize("t", [.1, .2, .3, .5, .8])
def test_least_squares_finds_the_score(whole, row, step, n, t):
    seed_everything(3); law, n, t = GaussianMixture(row or whole.weights, whole.means, whole.stds), int(n / t), torch.tensor(t)
    x0 = law.sample(10_000)[0]; test = vp.perturb(x0, t, torch.randn_like(x0))
    h = step * (vp.alpha(t)**2 * law.stds**2 + vp.sigma(t)**2).sqrt().min().item()
    grid = torch.cartesian_prod(*[torch.arange(-3.2, 3.3, h)] * x0.shape[1]).reshape(-1, x0.shape[1])
    grid = grid[torch.cdist(grid, test[:5000]).min(1).values < h]
    phi = lambda x: torch.cat([torch.ones_like(x[:, :1]), x, torch.exp(-torch.cdist(x, grid)**2 / (4 * h**2))], 1)
    A = B = 0
    for x0 in law.sample(n)[0].split(20_000):
        eps = torch.randn_like(x0)
        for e in (eps, -eps):
            f = phi(vp.perturb(x0, t, e)); A, B = A + (f.T @ f).double(), B + (f.T @ e).double()
    found = -(phi(test).double() @ torch.linalg.solve(A + 1e-6 * A.diagonal().mean() * torch.eye(len(A)), B)) / vp.sigma(t)
    truth = whole.score(test, vp, t, torch.tensor(row).expand(len(test), -1) if row else None)
    assert (found - truth).norm() < .02 * truth.norm()


# --- with a condition: LCG-DM (6), (10) to (13) ---------------------------------------------------------------------------

def test_conditional_theorem_line_by_line():
    a, sig, lam = vp.alpha(at), vp.sigma(at), .37
    g0, gx = torch.linspace(-4, 4, 401, dtype=f64)[:, None, None], torch.linspace(-6, 6, 481, dtype=f64)[None, :, None]
    p0 = data.log_prob(g0.reshape(-1, 1), vp, torch.zeros((), dtype=f64)).exp().reshape(-1, 1, 1) * .02
    q = torch.cat([torch.sigmoid(.5 - 3 * g0), torch.sigmoid(3 * g0 - .5)], 2)
    kernel = lambda x: Normal(a * g0, sig).log_prob(x).exp()
    joint = lambda x: (p0 * q * kernel(x)).sum(0, keepdim=True)
    E = lambda v: (p0 * q * kernel(gx) * v).sum().item() * .025
    d = lambda f, h=1e-4: (f(gx + h) - f(gx - h)) / (2 * h)
    pair, arrow = d(lambda x: joint(x).log()), -(gx - a * g0) / sig**2
    cond = d(lambda x: (joint(x) / joint(gx).sum(1, keepdim=True)).log())
    s = torch.sin(2 * gx) - gx * torch.tensor([1., 2.], dtype=f64)
    c1, c2, ten = lam * E(pair**2), lam * E(arrow**2), lam * E((s - cond)**2)
    assert abs(E(torch.ones(1)) - 1) < 1e-6
    for line in (lam * E((s - pair)**2), lam * E(s**2 - 2 * s * pair) + c1, lam * E(s**2 - 2 * s * arrow) + c1, lam * E((s - arrow)**2) - c2 + c1):
        assert abs(line - ten) < 1e-6
    assert abs((joint(gx) * s * pair).sum().item() * .025 - E(s * arrow)) < 1e-6         # (13)
    printed = lambda s: lam * E(s**2) - 2 * E(s * arrow)                                  # (11) as printed, lambda on the square only
    assert printed(cond / lam) < printed(cond) - .1


@pytest.mark.parametrize("reads", ["x0", "xt"])
def test_hidden_assumption(reads):
    seed_everything(4); n, rho, a, sig = 100_000, .5, vp.alpha(at), vp.sigma(at)
    x0, eps, eta = torch.randn(3, n, dtype=f64); xt = a * x0 + sig * eps
    z = (x0 if reads == "x0" else xt) + rho * eta
    found = torch.linalg.lstsq(torch.stack([xt, z], 1), (-eps / sig)[:, None]).solution[:, 0]
    var = a**2 * rho**2 / (1 + rho**2) + sig**2
    score = torch.stack([-1 / var, a / (1 + rho**2) / var]) if reads == "x0" else torch.tensor([-1 - 1 / rho**2, 1 / rho**2], dtype=f64)
    if reads == "x0": assert (found - score).abs().max() < .15
    else: assert (found - torch.tensor([-1., 0.])).abs().max() < .15 and (found - score).abs().max() > 3


def test_drop_cond():
    gen = torch.Generator().manual_seed(0); cond, null = torch.randn(10_000, 3), torch.full((3,), 7.)
    dropped = drop_cond(cond, null, .15, gen); gone = (dropped == 7).all(1)
    assert torch.equal(dropped[~gone], cond[~gone]) and abs(gone.float().mean() - .15) < 5 * (.15 * .85 / 10_000)**.5
    units = torch.randn(50, 5, 8); out = drop_cond(units, torch.zeros(5, 8), .5, gen)
    whole = (out == units).flatten(1).all(1) | (out == 0).flatten(1).all(1)               # a row goes whole or not at all
    assert whole.all() and out.dtype == units.dtype
    assert torch.equal(drop_cond(units, torch.zeros(8), 1.), torch.zeros(50, 5, 8)) and torch.equal(drop_cond(units, torch.zeros(8), 0), units)


def test_dropped_conditions_mix_the_floors():
    seed_everything(5); n = 60_000; x0, k = data.sample(n); ideal = data.net(vp)
    loss = dsm_loss(ideal, x0, vp, drop_cond(F.one_hot(k, 3).to(f64), ideal.null, .5), time=fixed(.1)).item()
    one = lambda c: GaussianMixture(torch.ones(1, dtype=f64), data.means[c:c + 1], data.stds[c:c + 1])
    given = sum(w.item() * floor(vp, at, one(c)) for c, w in enumerate(data.weights))
    assert given < floor(vp, at) and abs(loss - (floor(vp, at) + given) / 2) < 5 * (2 / n)**.5


# --- times and weightings ------------------------------------------------------------------------------------------------

def peaks(w, mu, s): return GaussianMixture(torch.tensor([w, 1 - w], dtype=f64), torch.tensor([[mu - 1.], [mu + 1.]], dtype=f64), torch.full((2,), s, dtype=f64))


@SDES
def test_likelihood_weighting_is_kl_and_sigma2_is_not(sde):
    law, zero, one = peaks(.5, 0., .2), torch.zeros((), dtype=f64), torch.ones((), dtype=f64)
    kl = lambda q, t: over(sde, t, law.log_prob(x, sde, t) - q.log_prob(x, sde, t), law)
    wide = torch.linspace(-40, 40, 4001, dtype=f64)[:, None]
    def kl_end(q): p = law.log_prob(wide, sde, one); return (p.exp() * (p - q.log_prob(wide, sde, one))).sum().item() * .02
    ratio = []
    for q in (peaks(.62, 0., .2), peaks(.5, 0., .23), peaks(.5, .05, .2)):
        def apart(t):
            g = x if sde.sigma(t) < 1.2 else wide
            return (law.log_prob(g, sde, t).exp() * (law.score(g, sde, t) - q.score(g, sde, t))[:, 0]**2).sum() * (g[1] - g[0]).item()
        D = torch.cat([apart(t).reshape(1) for t in ts]); true = kl(q, zero)
        assert abs((integral(sde.diffusion(ts)**2 * D) / 2 + kl_end(q)) / true - 1) < 3e-3
        ratio.append(integral(sde.sigma(ts)**2 * D) / 2 / true)
    if not isinstance(sde, VESDE): assert max(ratio) > 2 * min(ratio)                     # no constant factor would mend it


def test_geometric_ve_is_the_exception():
    t = torch.linspace(.3, 1, 50, dtype=f64); w = likelihood(VESDE(), t)
    assert w.max() / w.min() < 1.01
    t = torch.linspace(T_MIN, 1, 500, dtype=f64); w = likelihood(vp, t)
    assert w.max() / w.min() > 100


def test_uniform_time():
    seed_everything(6); t = uniform_time(50_000)
    assert t.min() >= T_MIN and t.max() <= 1 and abs(t.mean() - (1 + T_MIN) / 2) < 5 / (12 * 50_000)**.5


@SDES
def test_v_weight_counts_every_time_the_same_in_v(sde):
    seed_everything(9); t = torch.rand(50, dtype=f64) * .98 + .01; xt, eps, off = torch.randn(3, 50, 1, dtype=f64)
    in_v = sde.convert(eps + off, xt, t, "eps", "v") - sde.convert(eps, xt, t, "eps", "v")
    torch.testing.assert_close(v_weight(sde, t) * off[:, 0]**2, in_v[:, 0]**2)


def test_middle_time():
    seed_everything(6); n = 50_000; t = middle_time(n).double(); assert t.min() >= T_MIN and t.max() <= 1
    z = ((t - T_MIN) / (1 - T_MIN)).logit() + .4                                          # standard normal
    assert abs(z.mean()) < 5 / n**.5 and abs(z.std() - 1) < 5 / (2 * n)**.5


def test_soft_truncation_for_any_power():
    "Large powers overflow t_min^(1 - k), powers near 1 cancel in it."
    def draw(k): seed_everything(10); time = soft_truncation(1e-5, k); return torch.cat([time(4) for _ in range(500)])
    torch.testing.assert_close(draw(1 + 1e-7), draw(1.), atol=1e-5, rtol=1e-5); torch.testing.assert_close(draw(1 + 1e-5), draw(1.), atol=1e-3, rtol=1e-3)
    for k in (9., 60., -60.): t = draw(k); assert ((t > 0) & (t <= 1)).all(), k
    assert draw(60.).double().mean() == pytest.approx(.5, abs=.05) and draw(-60.).min() > .7


@pytest.mark.parametrize("k", [1., 2., 1.5, 0.])
def test_soft_truncation(k):
    seed_everything(7); calls, low = 4_000, 1e-2
    time = soft_truncation(low, k); t = torch.cat([time(5) for _ in range(calls)]).double()
    assert t.min() >= low * (1 - 1e-5) and t.max() <= 1
    grid = torch.logspace(math.log10(low), math.log10(1 - 1e-6), 20_001, dtype=f64)
    tau = grid**-k / torch.trapezoid(grid**-k, grid)
    p = F.pad(torch.cumulative_trapezoid(tau / (1 - grid), grid), (1, 0))                 # the marginal density of t
    cdf = F.pad(torch.cumulative_trapezoid(p, grid), (1, 0))
    worst = max(abs((t < c).double().mean() - cdf[(grid < c).sum() - 1]) for c in torch.linspace(.02, .98, 25, dtype=f64))
    assert worst < 2 / calls**.5 + 2e-3
    if k == 1: torch.testing.assert_close(p[5000], ((grid[5000] / (1 - grid[5000])).log() - math.log(low / (1 - low))) / math.log(1 / low), atol=1e-5, rtol=1e-4)


# --- likelihood: score components (8) to (11) ------------------------------------------------------------------------------

SIGMA, I = torch.tensor([[1., .6], [.6, .5]], dtype=f64), torch.eye(2, dtype=f64)
noised = lambda t: like(vp.alpha(t)**2, I[None]) * SIGMA + like(vp.sigma(t)**2, I[None]) * I
trace = lambda M: M.diagonal(dim1=-2, dim2=-1).sum(-1)


def vlb(x0, C):
    prior = noised(ts[-1:])[0]
    moment = like(vp.alpha(ts)**2, C) * torch.outer(x0, x0) + like(vp.sigma(ts)**2, C) * I
    rate = vp.diffusion(ts)**2 * (trace(C @ C @ moment) / 2 - trace(C)) - 2 * vp.rate(ts)
    return -(torch.linalg.slogdet(2 * torch.pi * prior)[1] + trace(torch.linalg.inv(prior) @ moment[-1])).item() / 2 - integral(rate)


def model(c, steps=400):
    V, grid = noised(ts[-1:])[0], torch.linspace(1, 0, steps + 1, dtype=f64)
    def rate(V, t):
        M = vp.rate(t) * I + vp.diffusion(t)**2 * c * torch.linalg.inv(noised(t[None])[0])
        return M @ V + V @ M.T - vp.diffusion(t)**2 * I
    for t, s in zip(grid, grid[1:]):
        k = rate(V, t); V = V + (s - t) * (k + rate(V + (s - t) * k, s)) / 2
    return MultivariateNormal(torch.zeros(2, dtype=f64), V)


@pytest.mark.parametrize("image", [[0., 0.], [1., .5], [-1.5, .4]])
def test_bound_is_tight_for_the_exact_score_only(image):
    image, C = torch.tensor(image, dtype=f64), torch.linalg.inv(noised(ts))
    assert abs(vlb(image, C) - MultivariateNormal(torch.zeros(2, dtype=f64), SIGMA).log_prob(image)) < 1e-3
    for c in (.7, .9, 1.1, 1.4): assert vlb(image, c * C) < model(c).log_prob(image) - 1e-3


def test_bound_and_loss_differ_by_a_constant_for_each_image():
    image, C, other = torch.tensor([1., .5], dtype=f64), torch.linalg.inv(noised(ts)), (1.2 * I).expand(len(ts), 2, 2)
    def loss(C):
        moment = like(vp.alpha(ts)**2, C) * torch.outer(image, image) + like(vp.sigma(ts)**2, C) * I
        return integral(vp.diffusion(ts)**2 * (trace(C @ C @ moment) - 2 * trace(C))) / 2
    assert abs(vlb(image, C) - vlb(image, other) - loss(other) + loss(C)) < 1e-8


def test_optimum_for_one_image_is_a_noised_dirac():
    seed_everything(8); a, sig, image = vp.alpha(at), vp.sigma(at), torch.rand(16, dtype=f64) * 2 - 1
    eps = torch.randn(500, 16, dtype=f64)
    fit = torch.linalg.lstsq(torch.cat([a * image + sig * eps, torch.ones(500, 1, dtype=f64)], 1), eps).solution
    torch.testing.assert_close(fit, torch.cat([torch.eye(16, dtype=f64) / sig, (-a * image / sig)[None]]), atol=1e-8, rtol=0)
    net = lambda xt, t, cond: (xt - like(vp.alpha(t), xt) * image) / like(vp.sigma(t), xt)
    assert dsm_loss(net, image.expand(100, 16), vp) < 1e-5                                # uniform_time draws in single precision


# --- messages ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p", [-.1, 1.5, 15, float("nan")])
def test_bad_probability(p): one_line(lambda: drop_cond(torch.zeros(3, 2), torch.zeros(2), p), "a probability p in [0, 1]", "use 0.1 to 0.2")


@pytest.mark.parametrize("low", [0., -1., 1., 2.])
def test_bad_truncation(low):
    for k in (math.nan, math.inf): one_line(lambda: soft_truncation(1e-5, k), "a finite power k")
    one_line(lambda: soft_truncation(low), "0 < t_min < 1")


@pytest.mark.parametrize("x0", [torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(3), torch.zeros(0, 2)])
def test_bad_images(x0): one_line(lambda: dsm_loss(lambda x, t, c: x, x0, vp), "floats x0 (n, ...), not empty", "to_float")


def test_loss_does_not_broadcast():
    x0, answer = torch.zeros(3, 2), lambda x, t, c: x
    for net in (lambda x, t, c: x[:, :1], lambda x, t, c: x[:1], lambda x, t, c: x[..., None]): one_line(lambda: dsm_loss(net, x0, vp), "a net that answers (3, 2)")
    one_line(lambda: dsm_loss(answer, x0, vp, weighting=lambda sde, t: t[:, None]), "weights of shape (3,), found (3, 1)")
    one_line(lambda: dsm_loss(answer, x0, vp, time=lambda n, device: torch.tensor([.5])), "one time per image")
    one_line(lambda: drop_cond(torch.eye(3, dtype=torch.long), torch.full((3,), .3), .5), "conditions of floats", "use .float()")


def test_bad_times(): one_line(lambda: dsm_loss(lambda x, t, c: x, torch.zeros(3, 2), vp, time=lambda n, d: torch.full((n,), 500.)), "times t in [0, 1]")

def test_sixteen_dimensions_to_two_percent():
    "The minimiser over mixtures of 99 free numbers is the true score at five noise levels, each component's too when the loss is told which."
    seed_everything(3)
    law = GaussianMixture([.2, .3, .5], .7 * torch.randn(3, 16), .3 + .4 * torch.rand(3, 16))
    free = [torch.zeros(3), torch.randn(3, 16), torch.zeros(3, 16)]
    for p in free: p.requires_grad_()
    found = lambda: GaussianMixture(free[0].softmax(0), free[1], free[2].exp())
    optimiser = torch.optim.Adam(free); plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-2, 800, pct_start=.1)
    for _ in range(800):
        x0, k = law.sample(2048)
        loss = dsm_loss(lambda xt, t, cond: found().net(vp)(xt, t, cond), x0, vp, drop_cond(torch.eye(3)[k], found().weights, .5))
        optimiser.zero_grad(); loss.backward(); optimiser.step(); plan.step()
    for t in torch.tensor([.1, .2, .3, .5, .8]):
        for cond in (None, *torch.eye(3)):
            xt = vp.perturb((law if cond is None else GaussianMixture(cond, law.means, law.stds)).sample(4000)[0], t.expand(4000), torch.randn(4000, 16))
            given = None if cond is None else cond.expand(4000, 3)
            truth = law.score(xt, vp, t, given)
            assert (found().score(xt, vp, t, given) - truth).norm() < 0.02 * truth.norm(), (t, cond)
