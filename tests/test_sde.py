"diffusion.sde: kernels against f and g, Fokker-Planck, the way back, DDPM against an independent implementation, mixtures against autograd, conversions, messages."
import math
import diffusers, pytest, torch          # diffusers: of the extra `peers`; without it this fails
from torch.distributions import Normal
from disdiff_tutorial.core import seed_everything
from disdiff_tutorial.diffusion.sde import DDPM, SDE, GaussianMixture, SubVPSDE, VESDE, VPSDE, check_time, like

torch.set_num_threads(1)
f64 = torch.float64
ALL = [VPSDE(), SubVPSDE(), VESDE(), DDPM(), VPSDE(1., 1.), VESDE(.1, 5.)]
names = [f"{type(s).__name__}{k}" for k, s in enumerate(ALL)]
each = pytest.mark.parametrize("sde", ALL, ids=names)
slope = lambda f, t, h=1e-6: (f(t + h) - f(t - h)) / (2 * h)
inner = (torch.arange(5, 995, 10, dtype=f64) + 0.5) / 1000          # in the middle of DDPM's cells


def mixture(d, seed=0):
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=gen, dtype=f64)
    return GaussianMixture(draw(4) + .2, (draw(4, d) * 4 - 2) / d**.25, draw(4, d) * .4 + .1)


def one_line(call, *words, error=ValueError):
    with pytest.raises(error) as caught: call()
    text = str(caught.value)
    assert text and "\n" not in text, text
    for word in words: assert word in text, text


# --- f, g and the kernel -------------------------------------------------------------------------------------------------

@each
def test_kernel_solves_its_equations(sde):
    f, g2 = sde.rate(inner), sde.diffusion(inner)**2
    var = lambda t: sde.sigma(t)**2
    assert ((slope(sde.log_alpha, inner) - f).abs() / g2).max() < 1e-6
    assert ((slope(var, inner) - 2 * f * var(inner) - g2).abs() / g2).max() < 1e-6


@each
def test_starts_clean_and_ends_in_the_prior(sde):
    ends = torch.tensor([0., 1.])
    assert sde.alpha(ends)[0] == 1 and sde.sigma(ends)[0] == 0
    assert sde.sigma(ends)[1] <= sde.prior_std
    if isinstance(sde, VESDE): torch.testing.assert_close(sde.sigma(ends)[1]**2 + sde.sigma_min**2, torch.tensor(float(sde.prior_std))**2)
    elif sde.beta_max >= 20: assert sde.sigma(ends)[1] / sde.prior_std > .99
    assert torch.isfinite(torch.stack([sde.diffusion(ends), sde.rate(ends), sde.log_alpha(ends)])).all()


@each
@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 4, 4)])
def test_perturb_broadcasts(sde, shape):
    x0, eps, t = torch.randn(shape), torch.randn(shape), torch.tensor([0., .4, 1.])
    xt = sde.perturb(x0, t, eps)
    for k in range(3): torch.testing.assert_close(xt[k], sde.alpha(t[k]) * x0[k] + sde.sigma(t[k]) * eps[k])
    torch.testing.assert_close(xt[0], x0[0])
    assert sde.drift(xt, t).shape == shape
    torch.testing.assert_close(sde.perturb(x0, t[1], eps)[1], xt[1])                   # a scalar time


def test_no_cancellation_near_zero():
    t = torch.tensor([1e-6, 1e-5, 1e-4])
    for sde in (VPSDE(), SubVPSDE(), VESDE()):
        assert (sde.sigma(t) / sde.sigma(t.double()) - 1).abs().max() < 1e-4


def test_simulation_of_the_forward_process():
    seed_everything(0); n, steps = 5_000, 500
    for sde in ALL[:3]:
        x = torch.full((n,), 1.5)
        for t in torch.arange(steps) / steps: x = x + sde.drift(x, t) / steps + sde.diffusion(t) * steps**-.5 * torch.randn(n)
        one = torch.ones(())
        assert abs(x.std() / sde.sigma(one) - 1) < 5 / (2 * n)**.5 + .02
        assert abs(x.mean() - 1.5 * sde.alpha(one)) < 5 * sde.sigma(one) / n**.5 + .02


@each
def test_prior(sde):
    x = sde.prior((4000, 2), torch.Generator().manual_seed(0))
    assert abs(x.std() / sde.prior_std - 1) < .05 and torch.equal(x, sde.prior((4000, 2), torch.Generator().manual_seed(0)))
    assert sde.prior((2, 3)).shape == (2, 3) and sde.prior((2, 1, 4, 4), device=torch.device("cpu")).shape == (2, 1, 4, 4)
    torch.testing.assert_close(sde.prior_log_prob(x), Normal(0., float(sde.prior_std)).log_prob(x).sum(1))


# --- DDPM ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps, start, end", [(1000, 1e-4, .02), (100, 1e-3, .2)])
def test_ddpm_equals_diffusers(steps, start, end):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=steps, beta_start=start, beta_end=end, beta_schedule="linear")
    sde, t = DDPM(steps, start, end), torch.arange(1, steps + 1) / steps
    assert (sde.alpha(t)**2 - scheduler.alphas_cumprod).abs().max() < 1e-6
    x0, eps, k = torch.randn(8, 3), torch.randn(8, 3), torch.randint(steps, (8,))
    torch.testing.assert_close(sde.perturb(x0, (k + 1) / steps, eps), scheduler.add_noise(x0, eps, k), atol=1e-5, rtol=1e-4)


def test_ddpm_converges_to_vp():
    t = torch.linspace(0, 1, 1001, dtype=f64)
    gap = torch.stack([(DDPM(N, .1 / N, 20 / N).alpha(t) - VPSDE().alpha(t)).abs().max() for N in (500, 1000, 2000)])
    assert ((gap[:-1] / gap[1:]).log2() - 1).abs().max() < .05 and gap[1] < 2e-3


def test_ddpm_in_single_precision():
    t = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    ddpm = DDPM()
    assert (ddpm.log_alpha(t) - ddpm.log_alpha(t.double())).abs().max() < 1e-5
    t = inner                                                                          # away from the cells' borders
    assert (ddpm.beta(t.float()) / ddpm.beta(t) - 1).abs().max() < 1e-5


# --- mixtures ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d", [1, 2, 16])
@each
def test_score_is_the_gradient(sde, d):
    seed_everything(1); law, t = mixture(d), torch.rand(50).double() * .99 + .01
    x0, k = law.sample(50); xt = sde.perturb(x0, t, torch.randn_like(x0)).requires_grad_()
    for cond in (None, torch.nn.functional.one_hot(k, 4).double(), torch.rand(50, 4).double()):
        (auto,) = torch.autograd.grad(law.log_prob(xt, sde, t, cond).sum(), xt)
        torch.testing.assert_close(law.score(xt, sde, t, cond), auto, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("d", [1, 2, 16])
def test_density_is_the_average_kernel(d):
    seed_everything(2); law, sde, t, m = mixture(d), VPSDE(), torch.tensor(.4).double(), 20_000
    x = sde.alpha(t) * law.sample(5)[0] + sde.sigma(t) * torch.randn(5, d).double()
    kernel = Normal(sde.alpha(t) * law.sample(m)[0][:, None], sde.sigma(t)).log_prob(x).sum(2).exp()
    assert ((kernel.mean(0) - law.log_prob(x, sde, t).exp()) / (kernel.std(0) / m**.5)).abs().max() < 5


def test_classes_average_to_the_whole_and_do_not_leak():
    seed_everything(3); law, sde, t, x = mixture(2), VPSDE(), torch.tensor(.2).double(), torch.randn(40, 2).double()
    rows = [c.expand(40, 4) for c in torch.eye(4).double()]
    joint = torch.stack([law.log_prob(x, sde, t, c) for c in rows], 1) + law.weights.log()
    score = torch.stack([law.score(x, sde, t, c) for c in rows], 1)
    torch.testing.assert_close((joint.softmax(1)[..., None] * score).sum(1), law.score(x, sde, t))
    torch.testing.assert_close(joint.logsumexp(1), law.log_prob(x, sde, t))
    far = GaussianMixture([.5, .5], [[-8.], [8.]], [.1, .1])                            # 25,600 nats apart: a leak of 1e-38 would show
    only = torch.tensor([[1., 0.]])
    torch.testing.assert_close(far.score(torch.tensor([[8.]]), sde, torch.tensor(0.), only), torch.tensor([[-1600.]]))
    torch.testing.assert_close(far.log_prob(torch.tensor([[8.]]), sde, torch.tensor(0.), only), Normal(-8., .1).log_prob(torch.tensor([8.])))


def test_whole_numbers_are_numbers():
    law = GaussianMixture([1, 3], [[0], [2]], [1, 1]); same = GaussianMixture([.25, .75], [[0.], [2.]], [1., 1.]); x, t = torch.randn(6, 1), torch.tensor(.3)
    assert torch.equal(law.score(x, VPSDE(), t), same.score(x, VPSDE(), t)) and law.sample(4)[0].is_floating_point()


def test_ideal_net_and_sampling():
    seed_everything(4); law, sde = mixture(2), VPSDE()
    x, t = torch.randn(30, 2).double(), torch.rand(30).double() * .9 + .05
    net = law.net(sde)
    torch.testing.assert_close(sde.convert(net(x, t), x, t, "eps", "score"), law.score(x, sde, t))
    torch.testing.assert_close(net(x, t, net.null.expand(30, 4)), net(x, t))
    x0, k = law.sample(20_000)
    for c in range(4): assert ((x0[k == c].mean(0) - law.means[c]).abs() < 6 * law.stds[c] / (k == c).sum()**.5).all()
    assert torch.equal(law.sample(5, torch.Generator().manual_seed(1))[0], law.sample(5, torch.Generator().manual_seed(1))[0])


# --- there and back ------------------------------------------------------------------------------------------------------

@each
def test_fokker_planck_and_its_reverse(sde):
    law = mixture(1); x = torch.linspace(-3, 3, 101, dtype=f64)[:, None].requires_grad_()
    t = torch.full((101,), .1005, dtype=f64).requires_grad_()
    grad = lambda y, x: torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    p = law.log_prob(x, sde, t).exp(); p_x = grad(p, x)
    f, g2 = sde.rate(t.detach()), sde.diffusion(t.detach())**2
    p_t, p_xx = grad(p, t), grad(p_x, x)[:, 0]
    scale = p_t.abs().max().item()
    forward = -f * (p + x[:, 0] * p_x[:, 0]) + g2 * p_xx / 2
    assert (p_t - forward).abs().max() < 1e-9 * scale
    for share in (1., .5):                                                             # the reverse SDE, the probability-flow ODE
        flux = (f * x[:, 0] - share * g2 * law.score(x, sde, t)[:, 0]) * p
        backward = -grad(flux, x)[:, 0] - (share - .5) * g2 * p_xx
        assert (p_t - backward).abs().max() < 1e-9 * scale


def test_reverse_lands_on_the_data():
    seed_everything(5); law, sde, n, steps = GaussianMixture([.2, .5, .3], [[-1.5], [0.], [1.2]], [.15, .3, .1]), VPSDE(), 4_000, 500
    times = torch.linspace(1, 1e-3, steps + 1)
    def land(strength):
        x = sde.prior((n, 1))
        for t, s in zip(times, times[1:]):
            g2 = sde.diffusion(t)**2
            x = x - (sde.drift(x, t) - strength * g2 * law.score(x, sde, t)) * (t - s) + (g2 * (t - s)).sqrt() * torch.randn_like(x)
        x = x.flatten().sort().values
        F = (law.weights * Normal(law.means[:, 0], law.stds[:, 0]).cdf(x[:, None])).sum(1)
        return (torch.arange(1, n + 1) / n - F).abs().max()
    assert land(1.) < 2 / n**.5 + .01 < land(.8)


# --- words ---------------------------------------------------------------------------------------------------------------

@each
def test_conversions(sde):
    seed_everything(6); t = torch.rand(8).double() * .9 + .05
    x0, eps = torch.randn(2, 8, 3, 2, 2).double(); xt = sde.perturb(x0, t, eps)
    a, s = like(sde.alpha(t), xt), like(sde.sigma(t), xt)
    exact = {"eps": eps, "score": -eps / s, "x0": x0, "v": a * eps - s * x0}
    for source, value in exact.items():
        for target, wanted in exact.items():
            torch.testing.assert_close(sde.convert(value, xt, t, source, target), wanted, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(sde.convert(eps[:1], xt[:1], t[0], "eps", "x0"), x0[:1])   # a scalar time


def test_v_stays_exact_at_the_noisy_end():
    t, x0, eps = torch.ones(1), torch.randn(1, 4), torch.randn(1, 4); sde = VPSDE()
    xt = sde.perturb(x0, t, eps); v = sde.convert(eps, xt, t, "eps", "v")
    assert (sde.convert(sde.alpha(t) * eps - sde.sigma(t) * x0, xt, t, "v", "x0") - x0).abs().max() < 1e-5
    assert torch.isfinite(v).all()


def test_tweedie():
    law, sde, t = GaussianMixture(torch.ones(1).double(), torch.tensor([[.7, -.2]]).double(), torch.tensor([[.5, .3]]).double()), VPSDE(), torch.tensor(.3).double()
    xt = torch.randn(10, 2).double(); a, v = sde.alpha(t), sde.alpha(t)**2 * law.stds**2 + sde.sigma(t)**2
    wanted = law.means + a * law.stds**2 / v * (xt - a * law.means)
    torch.testing.assert_close(sde.convert(law.score(xt, sde, t), xt, t, "score", "x0"), wanted)


# --- messages ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [[-.1, .5], [.5, 1.1], [float("nan"), .5], [3., 250.]])
def test_times_outside(bad):
    one_line(lambda: check_time(torch.tensor(bad)), "times t in [0, 1]", "divide steps")
    one_line(lambda: VPSDE().perturb(torch.zeros(2, 2), torch.tensor(bad), torch.zeros(2, 2)), "times t in [0, 1]")


def test_nothing_broadcasts():
    x, t, sde = torch.zeros(3, 2), torch.tensor([.1, .2, .3]), VPSDE()
    for call in (lambda: sde.perturb(x, t, torch.zeros(3, 1)), lambda: sde.perturb(x, t[:1], x), lambda: sde.perturb(x[:1], t, x[:1]), lambda: sde.perturb(x.byte(), t, x)):
        one_line(call, "floats x0 and eps of one shape (n, ...), times (n,)", "one time per image")
    one_line(lambda: sde.perturb(x, .5, x), "times as a tensor of floats, found float")
    one_line(lambda: sde.convert(torch.zeros(3, 1), x, t, "eps", "x0"), "shape of xt, (3, 2)", "found (3, 1)")
    assert sde.perturb(x[:0], t[:0], x[:0]).shape == (0, 2) and check_time(t[:0]) is None              # nothing is noised to nothing


def test_bad_words():
    x, t = torch.zeros(1, 2), torch.tensor([.5])
    for pair in (("eps", "noise"), ("x", "eps"), ("noise", "noise")): one_line(lambda: VPSDE().convert(x, x, t, *pair), "eps, score, x0 or v", "choose one")


@pytest.mark.parametrize("weights, means, stds, word", [
    ([.5, .5], [[0.], [1.], [2.]], [1., 1.], "means (k, d) for 2 weights"), ([.5, .5], [0., 1.], [1., 1.], "means (k, d)"),
    ([.5, .5], [[0.], [1.]], [1., 1., 1.], "stds (2,)"), ([.5, .5], [[0., 0.], [1., 1.]], [[1., 1., 1.], [1., 1., 1.]], "stds (2,) or (2, 2)"),
    ([.5, .5], [[0.], [math.nan]], [1., 1.], "finite means"), ([math.inf, .5], [[0.], [1.]], [1., 1.], "finite means"), ([.5, .5], [[0.], [1.]], [1., math.inf], "finite means"),
    ([.5, -.5], [[0.], [1.]], [1., 1.], "weights and stds >= 0"), ([.5, .5], [[0.], [1.]], [1., -1.], "weights and stds >= 0")])
def test_bad_mixtures(weights, means, stds, word):
    one_line(lambda: GaussianMixture(weights, means, stds), word)


def test_bad_points_and_rates():
    law, t = mixture(2), torch.tensor(.5)
    for x in (torch.zeros(5, 1), torch.zeros(5), torch.zeros(5, 3), torch.zeros(5, 2, 1)):
        one_line(lambda: law.score(x, VPSDE(), t), "points (n, 2)"); one_line(lambda: law.log_prob(x, VPSDE(), t), "points (n, 2)")
    x = torch.zeros(5, 2)
    for cond in (torch.ones(5, 3), torch.ones(3, 4), torch.ones(3)): one_line(lambda: law.score(x, VPSDE(), t, cond), "cond (5, 4)", "one-hot rows")
    one_line(lambda: law.score(x, VPSDE(), torch.rand(3)), "one time, or 5", "shape (3,)"); one_line(lambda: law.log_prob(x, VPSDE(), torch.tensor(5.)), "times t in [0, 1]")
    for steps in (0, -3, 2.5): one_line(lambda: DDPM(steps), "a whole number of steps")
    one_line(lambda: VPSDE(.1, math.inf), "beta_max < inf"); one_line(lambda: VESDE(.1, math.inf), "sigma_max < inf")
    one_line(lambda: VPSDE(20., .1), "beta_min <= beta_max"); one_line(lambda: VESDE(5., 1.), "sigma_min < sigma_max")
    one_line(lambda: DDPM(1000, .1, 20.), "beta_end < 1", "not a rate")
