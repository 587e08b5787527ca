"""Log-likelihood: equal to the closed form, unbiased with random signs, in bits that mean bits; the bound of LCG-DM (8); bad inputs."""
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from disdiff_tutorial.core import seed_everything
from disdiff_tutorial.diffusion.dsm import T_MIN
from disdiff_tutorial.diffusion.likelihood import bits_per_dim, dequantise, divergence, log_likelihood
from disdiff_tutorial.diffusion.sde import DDPM, VESDE, VPSDE, GaussianMixture, SubVPSDE

f64 = lambda values: torch.tensor(values, dtype=torch.float64)
ANGLE = torch.arange(6).double() * math.pi / 3
COIN = GaussianMixture(f64([0.3, 0.7]), f64([[-1.0], [1.0]]), f64([0.2, 0.2]))
RING = GaussianMixture(torch.ones(6).double(), torch.stack([ANGLE.cos(), ANGLE.sin()], 1), torch.full((6,), 0.1).double())
BLOBS = GaussianMixture(f64([0.2, 0.3, 0.5]), 0.6 * torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).double(), f64([0.1, 0.2, 0.3]))
CASES = [(VPSDE(), COIN), (VPSDE(), RING), (VPSDE(), BLOBS), (SubVPSDE(), RING), (VESDE(), RING), (DDPM(), RING)]
NAMES = [f"{type(s).__name__}-{d.means.shape[1]}d" for s, d in CASES]


@pytest.mark.parametrize("sde, data", CASES, ids=NAMES)
def test_equals_the_closed_form(sde, data):
    x, _ = data.sample(200, seed_everything(0))
    out, exact = log_likelihood(data.net(sde), sde, x, probes=None), data.log_prob(x, sde, f64(0.0))
    assert abs((out.nats - exact).mean()) < 0.02 and (out.nats - exact).abs().max() < 0.1
    torch.testing.assert_close(out.bits_per_dim, 7 - out.nats / (x.shape[1] * math.log(2)))


@pytest.mark.parametrize("sde, data", CASES, ids=NAMES)
def test_random_signs_are_unbiased(sde, data):
    g = seed_everything(1)
    x, _ = data.sample(400, g)
    signs = log_likelihood(data.net(sde), sde, x, probes=4, generator=g, tol=1e-4).nats
    off = signs - log_likelihood(data.net(sde), sde, x, probes=None, tol=1e-4).nats
    assert off.mean().abs() < 0.01 + 4 * off.std() / 400**0.5
    assert data.means.shape[1] > 1 or off.abs().max() < 1e-6           # in 1-D a sign squared is one


def test_single_precision_images_and_a_generator():
    data = GaussianMixture([0.5, 0.5], torch.linspace(-0.5, 0.5, 32).reshape(2, 16), [0.2, 0.3])
    net = lambda xt, t, cond=None: data.net(VPSDE())(xt.flatten(1), t).reshape(xt.shape)
    x = data.sample(20, seed_everything(2))[0].reshape(20, 1, 4, 4)
    a, b = (log_likelihood(net, VPSDE(), x, generator=torch.Generator().manual_seed(0)).nats for _ in range(2))
    assert a.shape == (20,) and a.dtype == torch.float32 and torch.equal(a, b) and not a.requires_grad
    exact = data.log_prob(x.flatten(1), VPSDE(), torch.tensor(0.0))
    assert (log_likelihood(net, VPSDE(), x, probes=None, tol=1e-4).nats - exact).abs().max() < 0.1


def test_condition_and_mode():
    x, side = COIN.sample(50, seed_everything(3))
    z = torch.eye(2).double()[side]
    assert (log_likelihood(COIN.net(VPSDE()), VPSDE(), x, z).nats - COIN.log_prob(x, VPSDE(), f64(0.0), z)).abs().max() < 0.03
    net = torch.nn.Linear(1, 1).train()
    net.forward = lambda xt, t, cond=None: xt
    log_likelihood(net, VPSDE(), x)
    assert net.training


def test_narrow_peaks_need_an_early_start():
    cell = GaussianMixture(f64([0.5, 0.5]), f64([[-1.0], [1.0]]), f64([1 / 128 / 12**0.5] * 2))
    x, _ = cell.sample(100, seed_everything(4))
    off = {t: (log_likelihood(cell.net(VPSDE()), VPSDE(), x, t_min=t).nats - cell.log_prob(x, VPSDE(), f64(0.0))).mean() for t in (1e-5, T_MIN)}
    assert off[1e-5].abs() < 0.1 < off[T_MIN].abs()


def test_divergence_and_its_noise():
    seed_everything(5)
    J = torch.randn(6, 6).double() + torch.eye(6)
    S, x, n = (J + J.T) / 2, torch.randn(3, 6).double(), 20_000
    v, exact = divergence(lambda x: x @ J.T, x, None)
    assert torch.equal(v, x @ J.T) and not v.requires_grad
    torch.testing.assert_close(exact, J.trace().expand(3))
    signs = torch.randint(2, (1, n, 6)).double() * 2 - 1
    one = divergence(lambda x: x @ J.T, x[:1].expand(n, -1), signs)[1]
    var = 2 * (S.square().sum() - S.diag().square().sum())
    assert (one.mean() - J.trace()).abs() < 4 * (var / n).sqrt() and abs(one.var() / var - 1) < 0.05


def test_bits_mean_bits():
    assert abs(bits_per_dim(192 * math.log(0.5), 192) - 8) < 1e-9                    # knows nothing
    assert abs(bits_per_dim(192 * math.log(128), 192)) < 1e-9                        # knows all
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(50, -1, -1, -1)
    y = dequantise(grey, torch.Generator().manual_seed(0))
    assert torch.equal(((y + 1) * 128).floor().to(torch.uint8), grey) and y.min() >= -1 and y.max() < 1
    assert torch.equal(y, dequantise(grey, torch.Generator().manual_seed(0)))
    for level in (0, 200, 255):                                                      # no draw of ten million leaves its cell by rounding
        y = dequantise(torch.full((10, 1, 1000, 1000), level, dtype=torch.uint8), torch.Generator().manual_seed(0))
        assert (((y + 1) * 128).floor() == level).all() and y.max() < 1


def test_dequantisation_bounds_the_probability_of_a_level():
    k, u = torch.arange(16).double(), (torch.arange(2000).double() + 0.5) / 2000
    toy = GaussianMixture(f64([0.4, 0.6]), f64([[4.3], [10.8]]), f64([1.2, 2.0]))
    cdf = lambda x: (Normal(toy.means[:, 0], toy.stds[:, 0]).cdf(x[:, None]) * toy.weights).sum(1)
    density = toy.log_prob((k[:, None] + u).reshape(-1, 1), VPSDE(), f64(0.0)).view(16, -1)
    P = cdf(k + 1) - cdf(k)
    torch.testing.assert_close(density.exp().mean(1), P, rtol=1e-5, atol=1e-12)
    assert (density.mean(1) <= P.log()).all() and (P * (P.log() - density.mean(1))).sum() < 0.05


def test_the_latent_bound_and_its_gap():
    "LCG-DM (8), derived: -log p = -E_q log p(x|z) + KL(q || p(z)) - KL(q || p(z|x)), on a linear Gaussian model."
    seed_everything(6)
    W, s, I2 = torch.randn(3, 2).double(), 0.5, torch.eye(2).double()
    marginal, prior = MultivariateNormal(torch.zeros(3).double(), W @ W.T + s**2 * torch.eye(3)), MultivariateNormal(torch.zeros(2).double(), I2)
    cov = torch.linalg.inv(I2 + W.T @ W / s**2)
    x = marginal.sample((200,))
    mean = x @ W @ cov / s**2
    q = MultivariateNormal(0.8 * mean + 0.1, cov + 0.05 * I2)
    log_px = lambda z: Normal(z @ W.T, s).log_prob(x).sum(-1)
    expected = log_px(q.mean) - (W @ (cov + 0.05 * I2) @ W.T).trace() / (2 * s**2)
    bound, nll, gap = -expected + kl_divergence(q, prior), -marginal.log_prob(x), kl_divergence(q, MultivariateNormal(mean, cov))
    torch.testing.assert_close(nll, bound - gap)
    assert (gap > 0).all() and (nll <= bound).all()
    draws = log_px(q.sample((4000,)))
    assert ((draws.mean(0) - expected).abs() < 5 * draws.std(0) / 4000**0.5).all()
    assert (-log_px(q.mean) + kl_divergence(q, prior) < nll).any()                   # the mean code is no bound


@pytest.mark.parametrize("call, line", [
    (lambda: log_likelihood(COIN.net(VPSDE()), VPSDE(), torch.zeros(3, 1), probes=0), "expected probes >= 1, or None for the exact trace, found 0: "),
    (lambda: log_likelihood(COIN.net(VPSDE()), VPSDE(), torch.zeros(3, 1), t_min=1.5), "expected t_min between 0 and 1, found 1.5: start at 1e-5"),
    (lambda: log_likelihood(COIN.net(VPSDE()), VPSDE(), torch.zeros(3, 1), t_min=0.), "expected t_min between 0 and 1, found 0.0: "),
    (lambda: log_likelihood(COIN.net(VPSDE()), VPSDE(), torch.zeros(3, 1), cond=torch.eye(2)), "expected one condition per image, 3, found 2: "),
    (lambda: log_likelihood(COIN.net(VPSDE()), VPSDE(), torch.zeros(3, 1, dtype=torch.uint8)), "expected float32 or float64 around \\[-1, 1\\], found torch.uint8: pass dequantise"),
    (lambda: log_likelihood(COIN.net(VPSDE()), VPSDE(), torch.zeros(3, 1), probes=1.5), "expected probes >= 1, or None for the exact trace, found 1.5: "),
    (lambda: log_likelihood(COIN.net(VPSDE()), VPSDE(), torch.zeros(3, 1), tol=-1.0), "expected tol above 0, found -1.0: "),
    (lambda: log_likelihood(COIN.net(VPSDE()), VPSDE(), torch.zeros(0, 1)), "expected x0 \\(n, ...\\) with at least one row, found \\(0, 1\\): "),
    (lambda: log_likelihood(COIN.net(VPSDE()), VPSDE(), torch.zeros(3)), "expected x0 \\(n, ...\\) with at least one row, found \\(3,\\): "),
    (lambda: log_likelihood(COIN.net(VPSDE()), VPSDE(), torch.tensor([[0.0], [float("nan")]])), "expected finite x0, found NaN or infinity: "),
    (lambda: dequantise(torch.zeros(3, 1, 4, 4)), "expected uint8 images, found torch.float32: dequantise before scaling"),
    (lambda: dequantise(torch.zeros(3, 4, 4, dtype=torch.uint8)), "expected images \\(n, C, H, W\\)"),
])
def test_bad_inputs_give_one_line(call, line):
    with pytest.raises(ValueError, match=line) as err: call()
    assert "\n" not in str(err.value)
