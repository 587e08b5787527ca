"""Samplers: equal to Hugging Face diffusers step by step, to the exact flow, and to the truth in distribution; guidance bit for bit; bad inputs."""
import math

import diffusers          # of the extra `peers`; without it these tests fail
import pytest
import torch

from disdiff_tutorial.core import seed_everything
from disdiff_tutorial.diffusion.dsm import T_MIN
from disdiff_tutorial.diffusion.sampling import METHODS, ddim_step, dpmpp_step, em_step, energy_test, flow, guided, langevin_step, place, sample, time_grid
from disdiff_tutorial.diffusion.sde import DDPM, VESDE, VPSDE, GaussianMixture, SubVPSDE

COIN = GaussianMixture([0.3, 0.7], [[-1.0], [1.0]], [0.2, 0.2])
ANGLE = torch.arange(6) * math.pi / 3
RING = GaussianMixture(torch.ones(6), torch.stack([ANGLE.cos(), ANGLE.sin()], 1), torch.full((6,), 0.1))
BLOBS = GaussianMixture([0.2, 0.3, 0.5], 0.6 * torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), [0.1, 0.2, 0.3])


def model(xt, t, cond=None):
    "A fixed nonlinear function of x and t with the size of noise, so that x0 stays tame where alpha is small."
    t = t.reshape(-1, *[1] * (xt.ndim - 1))
    return xt * torch.tanh(4 * t) + 0.3 * (1 - t) * torch.sin(2 * xt + 3 * t)


def theirs(scheduler, x, model, **more):
    "The path of a diffusers scheduler, and our times: its step i is our t = (i + 1) / 1000, and its end our 0."
    path = [x]
    for i in scheduler.timesteps:
        eps = model(path[-1], torch.full((len(x),), (float(i) + 1) / 1000))
        path.append(scheduler.step(eps, i, path[-1], **more).prev_sample)
    return torch.stack(path), torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1)])


def ours(method, x, times, model, **more):
    return torch.stack([sample(model, DDPM(), x.shape, x=x, method=method, times=times[: k + 1], **more) for k in range(len(times))])


def test_noise_levels_equal_diffusers():
    bar = diffusers.DDIMScheduler().alphas_cumprod.double()
    t, sde = torch.arange(1, 1001).double() / 1000, DDPM()
    assert (sde.alpha(t) - bar.sqrt()).abs().max() < 1e-6 and (sde.sigma(t) - (1 - bar).sqrt()).abs().max() < 1e-5


@pytest.mark.parametrize("net", [model, COIN.net(DDPM())], ids=["nonlinear", "ideal"])
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("method", ["ddim", "dpm++"])
def test_whole_paths_equal_diffusers(method, steps, net):
    seed_everything(0)
    x = torch.randn(64, 1)
    if method == "ddim": scheduler = diffusers.DDIMScheduler(clip_sample=False)
    else: scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint")
    scheduler.set_timesteps(steps)
    path, times = theirs(scheduler, x, net)
    assert len(path) == steps + 1 and times[0] > times[-2] > times[-1] == 0
    torch.testing.assert_close(ours(method, x, times, net), path, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_ancestral_steps_equal_diffusers():
    seed_everything(0)
    x, noise = torch.randn(2, 64, 1)
    ddim, ddpm = diffusers.DDIMScheduler(clip_sample=False), diffusers.DDPMScheduler(clip_sample=False)
    ddim.set_timesteps(1000)
    ddpm.set_timesteps(1000)
    for i in (2, 20, 500, 999):
        s, t = torch.tensor((i + 1) / 1000, dtype=torch.float64), torch.tensor(i / 1000, dtype=torch.float64)
        eps = model(x, s.float())
        step = ddim_step(x, eps, DDPM(), s, t, noise, eta=1.0)
        torch.testing.assert_close(step, ddim.step(eps, i, x, eta=1.0, variance_noise=noise).prev_sample, atol=1e-5, rtol=1e-4, check_dtype=False)
        theirs = ddpm.step(eps, i, x, generator=torch.Generator().manual_seed(3)).prev_sample          # draws its own noise
        step = ddim_step(x, eps, DDPM(), s, t, torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), eta=1.0)
        torch.testing.assert_close(step, theirs, atol=1e-5, rtol=1e-4, check_dtype=False)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(), DDPM()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("method", METHODS)
def test_two_samples_in_2d(sde, method):
    g = seed_everything(0)
    made = sample(RING.net(sde), sde, (400, 2), method=method, steps={"em": 500, "pc": 250, "ddim": 100}.get(method, 30), generator=g)
    assert made.isfinite().all() and energy_test(made, RING.sample(400, g)[0], 4000, g)[1] > 0.01 / 20      # 20 tests: 1% for all of them; p can be as low as 1 / 4001


@pytest.mark.parametrize("data", [COIN, BLOBS], ids=["1d", "16d"])
@pytest.mark.parametrize("method", METHODS)
def test_two_samples_of_the_vp_sde(data, method):
    g, d = seed_everything(1), data.means.shape[1]
    made = sample(data.net(VPSDE()), VPSDE(), (400, d), method=method, steps={"em": 500, "pc": 250, "ddim": 100}.get(method, 30), generator=g)
    assert energy_test(made, data.sample(400, g)[0], 4000, g)[1] > 0.01 / 10


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(), DDPM()], ids=lambda s: type(s).__name__)
def test_default_grid_is_close_to_the_exact_flow(sde):
    seed_everything(2)
    net, start = RING.net(sde), sde.prior((200, 2)).double()
    exact = sample(net, sde, (200, 2), x=start, times=time_grid(600).double())
    error = {p: (sample(net, sde, (200, 2), x=start, steps=30, times=time_grid(30, power=p)) - exact).abs().median().item() for p in (1.0, 2.5)}
    assert error[2.5] < 0.01 and (isinstance(sde, VESDE) or error[2.5] < error[1.0] / 2)
    assert torch.equal(sample(net, sde, (200, 2), x=start, steps=30), sample(net, sde, (200, 2), x=start, times=time_grid(30)))


def test_orders():
    seed_everything(3)
    data, sde = GaussianMixture(*(torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [[-1.0], [1.0]], [0.2, 0.2]))), VPSDE()
    x = torch.randn(200, 1, dtype=torch.float64)
    exact = flow(data.net(sde), sde, x, 1.0, T_MIN, tol=1e-9)
    for method, order in (("ddim", 1), ("dpm++", 2)):
        far = [(sample(data.net(sde), sde, x.shape, x=x, method=method, times=time_grid(n + 1)[:-1].double()) - exact).abs().median() for n in (40, 160)]
        assert abs(math.log(far[0] / far[1], 4) - order) < 0.25


def test_em_is_the_reverse_sde_step():
    sde, s, t = VPSDE(), torch.tensor(0.5), torch.tensor(0.49)
    x, noise = torch.randn(2, 5, 1)
    beta, score = sde.beta(s), COIN.score(x, sde, s)
    torch.testing.assert_close(em_step(x, COIN.net(sde)(x, s), sde, s, t, noise), x + (beta * x / 2 + beta * score) * (s - t) + (beta * (s - t)).sqrt() * noise)


def test_langevin_rests_with_the_variance_we_state():
    seed_everything(4)
    data, sde, t = GaussianMixture([1.0], torch.zeros(1, 16), [1.0]), VPSDE(), torch.tensor(0.5)
    x = torch.randn(4000, 16)
    for _ in range(100): x = langevin_step(x, data.net(sde)(x, t), sde, t, torch.randn_like(x))
    assert abs(x.var() - 1 / (1 - 0.16**2)) < 0.015         # size = 2 snr^2, nearly: 1 / (1 - size / 2)


def test_pc_corrects_where_it_has_arrived():
    g, net, sde, times = torch.Generator(), COIN.net(VPSDE()), VPSDE(), time_grid(9, power=1.0)
    made = sample(net, sde, (20, 1), method="pc", steps=9, generator=g.manual_seed(1))
    x = torch.randn(20, 1, generator=g.manual_seed(1))
    for s, t in zip(times[:-2], times[1:-1]):
        x = em_step(x, net(x, s), sde, s, t, torch.randn(20, 1, generator=g))
        x = langevin_step(x, net(x, t), sde, t, torch.randn(20, 1, generator=g))
    torch.testing.assert_close(made, sde.convert(net(x, times[-2]), x, times[-2], "eps", "x0"))


@pytest.mark.parametrize("method", METHODS)
def test_starts_with_the_noise_of_the_process(method):
    seen = []
    sample(lambda xt, t, cond=None: seen.append(xt) or xt / 50, VESDE(), (2000, 1), method=method, steps=2, generator=torch.Generator().manual_seed(0))
    assert abs(seen[0].std() - 50) < 3


def test_ode_stops_where_times_end():
    start = torch.randn(50, 1, generator=seed_everything(7))
    for end in (0.5, 0.05):
        walk = sample(COIN.net(VPSDE()), VPSDE(), (50, 1), x=start, times=torch.linspace(1, end, 201))
        assert (sample(COIN.net(VPSDE()), VPSDE(), (50, 1), x=start, times=torch.tensor([1.0, end]), method="ode") - walk).abs().max() < 0.02         # the solver has a tolerance of its own
    assert torch.equal(sample(model, VPSDE(), (50, 1), x=start, times=torch.ones(1), method="ode"), start)
    assert sample(model, VPSDE(), (50, 1), x=start, times=torch.tensor([5e-4, 0.0]), method="ode").isfinite().all()         # from below T_MIN


def test_dpmpp_starts_and_ends_as_ddim():
    sde, s, t, zero = VPSDE(), torch.tensor(0.5), torch.tensor(0.4), torch.tensor(0.0)
    x, eps = torch.randn(2, 5, 1)
    x0 = sde.convert(eps, x, s, "eps", "x0")
    torch.testing.assert_close(dpmpp_step(x, x0, sde, s, t), ddim_step(x, eps, sde, s, t))
    torch.testing.assert_close(dpmpp_step(x, x0, sde, s, zero, (torch.tensor(0.6), x0 + 1)), x0)


def test_guidance_is_exact_at_one_and_zero():
    g = seed_everything(5)
    net, cond, start = COIN.net(VPSDE()), torch.eye(2)[torch.arange(50) % 2], torch.randn(50, 1, generator=g)
    run = lambda **kw: sample(net, VPSDE(), (50, 1), x=start, steps=20, **kw)
    assert torch.equal(run(cond=cond, guidance=1.0), run(cond=cond)) and torch.equal(run(cond=cond, guidance=0.0), run())
    xt, t = torch.randn(50, 1), torch.rand(50) * 0.9 + 0.1
    yes, no = net(xt, t, cond), net(xt, t)
    for w in (0.5, 4.0):
        eps = guided(net, cond, w)(xt, t)
        torch.testing.assert_close(eps, (1 + (w - 1)) * yes - (w - 1) * no)      # LCG-DM (7), lambda = w - 1
        torch.testing.assert_close(eps, (1 - w) * no + w * yes)                  # iVAE (8), gamma = w
    units = torch.randn(4, 3, 5)                                                 # (n, N, D) conditions, as cross-attention takes them
    seen = []
    for w in (2.0, 1.0, 0.0): guided(lambda x, t, c: seen.append(c) or x, units, w, null=torch.zeros(5))(torch.randn(4, 1), torch.rand(4))
    assert torch.equal(seen[0], torch.cat([units, torch.zeros_like(units)]))
    assert torch.equal(seen[1], units) and torch.equal(seen[2], torch.zeros_like(units))      # one pass of half the size each


def test_guidance_does_not_sample_the_tilted_density():
    pair, w = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [0.8, 0.8]), 4.0
    u = (torch.arange(2000) + 0.5) / 2000
    x = sample(pair.net(VPSDE()), VPSDE(), (2000, 1), torch.tensor([[0.0, 1.0]]).expand(2000, -1), x=torch.distributions.Normal(0.0, 1.0).icdf(u)[:, None], guidance=w)
    xs, now = torch.linspace(-6, 8, 1401)[:, None], torch.tensor(0.0)
    second = torch.tensor([[0.0, 1.0]]).expand(len(xs), -1)
    tilt = torch.softmax((1 - w) * pair.log_prob(xs, VPSDE(), now) + w * pair.log_prob(xs, VPSDE(), now, second), 0)
    assert x.mean() - (tilt @ xs).item() > 0.5 and x.std() < 0.8 * (tilt @ (xs - tilt @ xs) ** 2).sqrt().item()


def test_p_values_are_uniform_when_there_is_nothing_to_find():
    g = seed_everything(6)
    p = torch.tensor([energy_test(torch.randn(40, 2, generator=g), torch.randn(40, 2, generator=g), 99, g)[1] for _ in range(300)]).sort().values
    assert (p - torch.arange(1, 301) / 300).abs().max() < 1.63 / 300**0.5 + 0.01
    assert energy_test(torch.randn(100, 2, generator=g), torch.randn(100, 2, generator=g) + 1, 99, g)[1] == 0.01


def test_energy_counts_ties_and_sees_far_from_zero():
    a, b = torch.tensor([0.1] * 19 + [0.8] * 21)[:, None], torch.tensor([0.1] * 20 + [0.8] * 20)[:, None]
    assert energy_test(a, b, 500)[1] == 1                                        # one 0.8 too many is the least that can differ: every draw is at least as far
    x, y = (torch.randn(60, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    near, far = (energy_test(x + c, y + c, 200, torch.Generator().manual_seed(2)) for c in (0.0, 1e8))
    assert abs(near[0] - far[0]) < 1e-6 and near[1] == far[1]


def test_modes_devices_and_generators():
    net = torch.nn.Linear(1, 1).train()
    net.forward = lambda xt, t, cond=None: xt
    a, b = (sample(net, VPSDE(), (3, 1), steps=3, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert net.training and torch.equal(a, b) and not a.requires_grad
    assert place(lambda: 0, None, torch.zeros(1, device="meta")).type == "meta" and place(net, None).type == "cpu" and place(lambda: 0).type == "cpu"
    assert sample(model, VPSDE(), (2, 1, 4, 4), steps=1).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("kw, line", [
    (dict(method="euler"), "expected a method among em, pc, ode, ddim, dpm\\+\\+, found 'euler': choose one of them"),
    (dict(steps=0), "expected steps >= 1, a whole number, found 0: "),
    (dict(steps=2.5), "expected steps >= 1, a whole number, found 2.5: "),
    (dict(method="em", steps=-3), "expected steps >= 1, a whole number, found -3: "),
    (dict(eta=1.0), "expected eta from 0 to 1, and 0 unless the method is ddim, found 1.0 for dpm\\+\\+: "),
    (dict(method="ddim", eta=2.0), "found 2.0 for ddim: "),
    (dict(x=torch.randn(4, 1)), "expected floats of shape \\(3, 1\\) to start from, found torch.float32 \\(4, 1\\): "),
    (dict(x=torch.ones(3, 1).long()), "found torch.int64 \\(3, 1\\): "),
    (dict(cond=torch.ones(3, 2), guidance=2.0, null=torch.zeros(3)), "expected a null condition of the shape of one condition, \\(2,\\), found \\(3,\\): "),
    (dict(times=[1.0, 0.0]), "expected a tensor of times, found list: "),
    (dict(times=torch.empty(0)), "expected a tensor of times, found \\(0,\\): "),
    (dict(times=torch.tensor([0.0, 1.0])), "expected times that fall, found 0 to 1, with a step that does not: "),
    (dict(times=torch.tensor([1.0, 0.0, 0.0])), "expected times that fall, found 1 to 0, "),
    (dict(times=torch.tensor([1.0, float("nan")])), "expected times t in \\[0, 1\\], found nan"),
    (dict(cond=torch.eye(2)), "expected one condition per sample, 3, found 2: repeat the condition"),
    (dict(cond=torch.ones(3, 2), guidance=2.0), "expected a null condition, found none: "),
    (dict(guidance=2.0), "expected a condition to guide towards, found none with guidance 2.0: "),
    (dict(times=torch.linspace(1000, 0, 11)), "expected times t in \\[0, 1\\], found 0 to 1e\\+03: divide steps by their number"),
    (dict(times=torch.linspace(1, -0.1, 11)), "expected times t in \\[0, 1\\], found -0.1 to 1: "),
])
def test_bad_inputs_give_one_line(kw, line):
    with pytest.raises(ValueError, match=line) as err: sample(model, VPSDE(), (3, 1), **kw)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize("call, line", [
    (lambda: time_grid(0), "expected steps >= 1, a whole number, found 0: "),
    (lambda: time_grid(5, power=-1), "expected power above 0, found -1: "),
    (lambda: energy_test(torch.randn(5, 2), torch.randn(5, 3)), "expected two sets \\(n, d\\) and \\(m, d\\), none empty, found \\(5, 2\\) and \\(5, 3\\): "),
    (lambda: energy_test(torch.randn(0, 2), torch.randn(5, 2)), "none empty, found \\(0, 2\\)"),
    (lambda: energy_test(torch.randn(14, 1, 28, 28), torch.randn(14, 1, 28, 28)), "flatten each sample to one row"),
    (lambda: energy_test(torch.randn(5, 2), torch.full((5, 2), float("nan"))), "expected finite samples, found NaN or infinity: "),
    (lambda: energy_test(torch.randn(5, 2), torch.randn(5, 2), 0), "expected permutations >= 1, found 0: "),
])
def test_bad_grids_and_sets_give_one_line(call, line):
    with pytest.raises(ValueError, match=line) as err: call()
    assert "\n" not in str(err.value)
