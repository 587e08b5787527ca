"The variance posterior and the iVAE from outside: densities against draws, notes that say nothing but a variance, odd input, and what must not move."
import math
import pytest
import torch
from torch import nn
from torch.distributions import Normal, OneHotCategorical, kl_divergence
from disdiff_tutorial import run as runner
from disdiff_tutorial.core import Config, load_tensors
from disdiff_tutorial.data.factors import Rotated
from disdiff_tutorial.ivae import ivae
from disdiff_tutorial.ivae.ivae import CategoricalIVAE, IVAE, categorical_kl, cnn, gaussian_kl, kl_balanced, kl_split, layers, mixed, notes, rotated_score, straight_through
from disdiff_tutorial.ivae.ivae_ddpm import ROOMS, SCORES, SHARES, balance_experiment, load_rooms, rooms_experiment, swings
from disdiff_tutorial.ivae.variance_posterior import (MAX_VARIANCE, check_factors, exact_draw, grid_draw, half_width, least_variance, likelihood, marginal, posterior, posterior_cdf,
                                                      random_segment, sample_pair, sample_variance)
from disdiff_tutorial.metrics.disentanglement import mcc

def gen(seed=0): return torch.Generator().manual_seed(seed)
def uniform(*shape, seed=0): return torch.rand(*shape, generator=gen(seed), dtype=torch.float64) - .5
def kolmogorov(u):
    "Largest distance of the distribution of u (n,) to the uniform on [0, 1], in units of its value at probability 0.001."
    u, n = u.sort().values, len(u); rank = torch.arange(n)
    return torch.maximum(u - rank / n, (rank + 1) / n - u).max().item() * n ** .5 / 1.95
def small(aux=0, **kind): return IVAE(layers(3, 6), layers(3, 3), 3, aux, **kind)

x, u, nan = torch.rand(20, 3, generator=gen()), torch.rand(20, 2, generator=gen(1)), math.nan

# The variance posterior

@pytest.mark.parametrize("z, eps", [(0., .01), (.3, .01), (-.45, .01), (.1, 0.), (0., 0.), (.2, .05)])
def test_posterior_is_bayes_theorem(z, eps):
    "(7): likelihood times prior, normalised by a sum; its integral is the distribution function; and nothing lies outside the support."
    z, s = torch.tensor(z, dtype=torch.float64), (torch.arange(1_000_000, dtype=torch.float64) + .5) / 1e7
    product = likelihood(z, s) * ((s >= eps) & (s <= MAX_VARIANCE)); product = product / product.sum() * 1e7
    p = posterior(s, z, eps)
    assert ((product - p).abs() < .01 * p + .02).all()
    assert (p.cumsum(0) / 1e7 - posterior_cdf(s, z, eps)).abs().max() < 1e-3

def test_outside_the_support_densities_are_zero():
    s = torch.tensor([-.1, 0., .2, math.inf])
    assert posterior(s, torch.tensor(.1)).tolist() == [0., 0., 0., 0.] and posterior_cdf(s, torch.tensor(.1)).tolist() == [0., 0., 1., 1.]
    assert posterior(torch.tensor([.05, .2]), torch.tensor(.5)).tolist() == [0., 0.]
    assert likelihood(torch.tensor([math.inf, .4, .1]), torch.tensor(.03)).tolist() == pytest.approx([0., 0., 1 / .6])
    assert marginal(torch.tensor([-.6, .5, .9])).tolist() == [0., 0., 0.]

def test_nan_is_not_hidden():
    assert likelihood(torch.tensor(nan), torch.tensor(.05)).isnan() and posterior(torch.tensor(nan), torch.tensor(.1)).isnan() and marginal(torch.tensor(nan)).isnan()
    for f in (posterior, posterior_cdf):
        with pytest.raises(ValueError, match="expected z in"): f(torch.tensor(.05), torch.tensor(nan))

@pytest.mark.parametrize("bins", [2, 100])
def test_the_grid_draws_its_middles_by_their_weights(bins):
    "Values and counts of the grid, recomputed from (7): a grid with its ends, or with other weights, is another one."
    z, n = torch.tensor(.25, dtype=torch.float64), 200_000
    s = sample_variance(z.expand(n), .01, "grid", bins, gen())
    low = max(.01, .25 ** 2 / 3); middles = low + (1 / 12 - low) * (torch.arange(bins, dtype=torch.float64) + .5) / bins
    where = ((s - low) / (1 / 12 - low) * bins).long()
    assert torch.allclose(s, middles[where], rtol=1e-12)
    share = middles ** -.5 / (middles ** -.5).sum(); count = torch.bincount(where, minlength=bins)
    assert ((count - n * share) ** 2 / (n * share)).sum() < bins - 1 + 5 * (2 * (bins - 1)) ** .5
    assert torch.equal(s, grid_draw(least_variance(z.expand(n)), bins, gen()))

@pytest.mark.parametrize("eps", [0., .01, .08])
def test_exact_draws_follow_the_distribution_function(eps):
    z = uniform(200_000); s = sample_variance(z, eps, generator=gen(1))
    assert kolmogorov(posterior_cdf(s, z, eps)) < 1 and torch.equal(s, exact_draw(least_variance(z, eps), gen(1)))
    assert abs(torch.corrcoef(torch.stack([posterior_cdf(s, z, eps), z]))[0, 1]) < 4 / len(z) ** .5

def test_a_pair_follows_the_model():
    for eps in (0., .01, .07):
        z, s = sample_pair(200_000, eps=eps, generator=gen())
        assert kolmogorov(((s - eps) / (MAX_VARIANCE - eps)).double()) < 1 and kolmogorov(((z / half_width(s)) + 1).double() / 2) < 1
        grid = (torch.arange(100_000, dtype=torch.float64) + .5) / 100_000 - .5; p = marginal(grid, eps)
        assert p.mean() == pytest.approx(1, abs=1e-6) and (p * grid ** 2).mean() == pytest.approx((eps + MAX_VARIANCE) / 2, rel=1e-6)      # E z^2 = E s
        assert (torch.histc(z, 20, -.5, .5) / len(z) - p.view(20, -1).mean(1) / 20).abs().max() < 5 * (.1 / len(z)) ** .5
    assert sample_pair(2, 3).z.shape == (2, 3)

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cuts", [1, 4])
def test_a_factor_lies_in_its_segment(dtype, cuts):
    "In half precision the cuts would be rounded, some to the wrong side of z."
    z = uniform(100_000).to(dtype); piece = random_segment(z, cuts, gen(1))
    inside = (z - piece.mean) / (12 * piece.variance).sqrt() + .5
    assert piece.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and inside.min() > -1e-3 and inside.max() < 1 + 1e-3
    if dtype in (torch.float64, torch.float32): assert kolmogorov(inside) < 1
    if cuts == 1: assert kolmogorov(12 * piece.variance.double()) < 1 and (piece.mean.abs() + half_width(piece.variance) - .5).abs().max() < 1e-5

# Notes and the toy

@pytest.mark.parametrize("kind", ["exact", "grid"])
def test_the_noise_of_a_note_does_not_know_its_factor(kind, monkeypatch):
    "Factors and notes of the experiment come from different random numbers: P(s <= note | z) must not go with z."
    caught = []
    monkeypatch.setattr(IVAE, "fit", lambda self, x, u, **how: caught.append((x, u)) or type("Done", (), dict(seconds=0.)))
    for seed in range(3):
        rotated_score(seed, 1, 20_000, 3, kind); seen, told = caught[-1]
        z = seen.double() @ Rotated(3, seed, low=-.5, device="cpu").rotation.double()
        noise = posterior_cdf(told.double(), z.clamp(-.5, .5))
        assert torch.corrcoef(torch.cat([noise, z], 1).T)[:3, 3:].abs().max() < 4.5 / 20_000 ** .5 and abs(told.mean() - .0533) < .0008

def test_kinds_of_notes():
    z = uniform(5000, 3).float()
    for kind in ("exact", "grid", "shuffled"):
        torch.manual_seed(1); told, same = notes(z, kind)
        assert same is z and told.shape == z.shape and (told >= least_variance(z) - 1e-7).all() == (kind != "shuffled")
    torch.manual_seed(1); told, normal = notes(z, "normal")
    assert normal.abs().max() == .5 and .01 <= told.min() and told.max() <= MAX_VARIANCE and not torch.equal(normal, z)
    assert (normal ** 2 / told)[told < .02].mean() == pytest.approx(1, abs=.1)

def test_notes_find_the_axes_and_those_of_others_do_not():
    assert rotated_score(0, 1200, 20_000, 3)[0] > .99 and rotated_score(0, 1200, 20_000, 3, "shuffled")[0] < .9

# The two divergences

@pytest.mark.parametrize("spread", [1., 30., 120.])
def test_kl_of_normals(spread):
    "Against torch in double precision; logvars up to 120 either way overflow single precision one by one."
    q, p = [(torch.randn(50, 3, generator=gen(k)), spread * (2 * torch.rand(50, 3, generator=gen(k + 2)) - 1)) for k in (0, 1)]
    q = (q[0], p[1] + .1 * torch.randn(50, 3, generator=gen(9)))
    normal = lambda mv: Normal(mv[0].double(), (mv[1].double() / 2).exp())
    assert torch.allclose(gaussian_kl(q, p).double(), kl_divergence(normal(q), normal(p)).sum(1).clamp(max=3.4e38), rtol=1e-3) or spread > 30
    assert torch.equal(gaussian_kl(q, q), torch.zeros(50)) and gaussian_kl(q, p).isnan().sum() == 0
    assert torch.equal(kl_balanced(q, p, 2., 3.), 2 * gaussian_kl(q, p) + 3 * gaussian_kl(p, q)) and torch.equal(kl_balanced(q, p), gaussian_kl(q, p))

def test_kl_of_classes():
    q, p = [torch.randn(8, 4, 5, generator=gen(k)).softmax(-1) for k in (0, 1)]; sure = nn.functional.one_hot(torch.arange(5), 5).float()[:, None]
    assert torch.allclose(categorical_kl(q, p), kl_divergence(OneHotCategorical(probs=q), OneHotCategorical(probs=p)).sum(1), atol=1e-5)
    assert torch.allclose(categorical_kl(sure, torch.full((5, 1, 5), .2)), torch.full((5,), math.log(5)))
    assert torch.equal(categorical_kl(sure, sure), torch.zeros(5)) and categorical_kl(p[:1, :1], sure[:1]).isinf().all()

@pytest.mark.parametrize("alpha", [0., .3, .8, 1.])
def test_split_gradient(alpha):
    q, p = [(torch.randn(4, 2, generator=gen(k)).requires_grad_(), torch.randn(4, 2, generator=gen(k + 5)).requires_grad_()) for k in (0, 1)]
    for side, share in ((q, 1 - alpha), (p, alpha)):
        split, whole = (torch.autograd.grad(f.sum(), side) for f in (kl_split(q, p, alpha), gaussian_kl(q, p)))
        for a, b in zip(split, whole): assert torch.allclose(a, share * b, atol=1e-6)
    assert torch.allclose(kl_split(q, p, alpha), gaussian_kl(q, p))

def test_the_loss_is_the_evidence_bound():
    "Mean over 4,000 draws of rec x squared error + KL, against its closed form for a linear decoder: the spread of a code adds its own error."
    torch.manual_seed(0); model = small(2, rec=3., kl=.5, back=.2); model.standardise(u)
    with torch.no_grad():
        q, p = model.posterior(x), model.conditional_prior(u, 20); W = model.decoder[0].weight
        error = (model.decoder(q[0]) - x).square().sum(1) + (q[1].exp() @ W.square().T).sum(1)
        draws = torch.stack([model.terms(x, u)[1] for _ in range(4000)])
    assert ((draws.mean(0) - 3 * error - .5 * gaussian_kl(q, p) - .2 * gaussian_kl(p, q)).abs() < 5 * draws.std(0) / 4000 ** .5).all()

# Codes that are classes

def test_straight_through_is_exactly_one_hot():
    "Listing 1 adds a zero. One rounded to 0.99999994 or 6e-8 would not be a class."
    probs = mixed(torch.randn(2000, 10, generator=gen())).requires_grad_(); torch.manual_seed(0)
    y = straight_through(probs)
    assert set(y.detach().unique().tolist()) == {0., 1.} and (y.detach().sum(-1) == 1).all()
    w = torch.randn(2000, 10, generator=gen(1)); assert torch.equal(torch.autograd.grad((y * w).sum(), probs)[0], w)
    torch.manual_seed(0); counts = straight_through(probs.detach()[:1].expand(50_000, -1)).mean(0)
    assert (counts - probs.detach()[0]).abs().max() < 5 * (.25 / 50_000) ** .5

def test_mixing_leaves_no_class_out():
    p = mixed(torch.tensor([[0., 1000.], [-1e9, 1e9]])); assert torch.allclose(p, torch.tensor([[.005, .995], [.005, .995]])) and p.log().isfinite().all()

@pytest.mark.parametrize("aux", [0, 2])
def test_categorical_model(aux):
    model = CategoricalIVAE(layers(3, 20), layers(20, 3), 2, aux); model.fit(x, u, steps=3, size=8, progress=False)
    assert model.encode(x).shape == (20, 2, 10) and torch.allclose(model.encode(x).sum(-1), torch.ones(20, 2), atol=1e-5)
    z, loss = model.terms(x, u); assert z.shape == (20, 20) and loss.shape == (20,) and loss.isfinite().all()

# Odd input

@pytest.mark.parametrize("told", [torch.randint(5, (20, 2), generator=gen()), u.double(), u > .5, torch.full((20, 2), .1), 1e-9 * u, torch.tensor([[1e6, -1e6]]).expand(20, 2)])
def test_notes_of_any_numbers(told):
    "Whole, double, true or false, constant, tiny: the prior encoder sees numbers around 0 of spread 1, or 0 where a note never changes."
    model = small(2); model.fit(x, told, steps=2, size=8, progress=False); seen = model.noted(told, 20)
    assert seen.dtype == torch.float32 and seen.mean(0).abs().max() < .1 and all(abs(s - 1) < .01 or s < 1e-3 for s in seen.std(0, correction=0).tolist())
    assert model.noted(told * 2, 20).abs().max() < 10 or told.max() > 1e5                         # another value of a constant note is not blown up

def test_one_row_trains():
    model = small(2); model.fit(x[:1], u[:1], steps=2, progress=False); assert all(p.isfinite().all() for p in model.state_dict().values())

def test_data_of_any_numbers():
    whole = torch.randint(3, (20, 3), generator=gen())
    for data in (x.double(), whole, x.half()): small().fit(data, steps=2, size=8, progress=False)
    model = small(); assert torch.equal(model.encode(whole), model.encode(whole.float()))
    picture, net = torch.randint(256, (4, 1, 16, 16), dtype=torch.uint8, generator=gen()), IVAE(*cnn((1, 16, 16), 6, 3, 8), 3)
    assert torch.allclose(net.encode(picture), net.encode(picture.float() / 127.5 - 1))

def test_encode_leaves_the_model_as_it_was():
    "Batch norm: the same code alone or in a batch, averages and modes stay, frozen parts stay frozen."
    encoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.5), nn.Linear(8, 6)); model = IVAE(encoder, layers(3, 3), 3); encoder[1].eval()
    modes, before = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    whole, state = model.encode(x), torch.get_rng_state()
    assert torch.allclose(whole, torch.cat([model.encode(row) for row in x.split(1)]), atol=1e-6) and torch.equal(whole, model.encode(x)) and torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()] and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

@pytest.mark.parametrize("aux, mean, kind", [(0, False, IVAE), (2, False, IVAE), (2, True, IVAE), (2, False, CategoricalIVAE)])
def test_weights_go_round(aux, mean, kind):
    def build(): return IVAE(layers(3, 6), layers(3, 3), 3, aux, mean) if kind is IVAE else CategoricalIVAE(layers(3, 30), layers(30, 3), 3, aux)
    model, other = build(), build(); model.fit(x, u, steps=2, size=8, progress=False); other.load_state_dict(model.state_dict())
    assert torch.equal(model.encode(x), other.encode(x))
    a, b = (m.conditional_prior(u, 20) for m in (model, other)); assert all(torch.equal(v, w) for v, w in zip(a, b))
    assert (not aux) or kind is not IVAE or (a[0] != 0).any() == mean

@pytest.mark.parametrize("call, message", [
    (lambda: half_width(torch.tensor(-1.)), "expected variances s of at least 0"), (lambda: half_width(.1), "expected variances s of at least 0, a tensor, found float"), (lambda: likelihood(x, torch.zeros(1)), "expected variances s above 0"),
    (lambda: check_factors(x / 2, nan), "expected eps from 0 to 1/12, found nan"), (lambda: least_variance(.3), "expected z as a tensor of floats, found float"), (lambda: posterior(x, torch.tensor(.7)), "expected z in [-1/2, 1/2]"),
    (lambda: posterior_cdf(x, torch.tensor(.1), -1.), "expected eps from 0 to 1/12"), (lambda: marginal(x, .2), "expected eps from 0 to below 1/12"), (lambda: sample_pair((2, 3)), "expected sizes, one whole number each, found (2, 3)"),
    (lambda: sample_pair(-1), "expected sizes"), (lambda: sample_pair(2, eps=nan), "expected eps"), (lambda: sample_variance(torch.zeros(2), method="grid", bins=2.5), "expected at least one bin, found 2.5"),
    (lambda: random_segment(torch.zeros(2), 1.5), "expected at least one cut, found 1.5"), (lambda: notes(x, "Grid"), "expected notes 'exact', 'grid', 'shuffled' or 'normal', found 'Grid'"), (lambda: layers(3), "expected two sizes or more"),
    (lambda: small(2).fit(x, steps=1), "expected notes u (n, 2), found NoneType"), (lambda: small(3).fit(x, u, steps=1), "expected notes u (n, 3), found (20, 2)"), (lambda: small(1).fit(x, u[:, 0], steps=1), "expected notes u (n, 1), found (20,)"),
    (lambda: small(2).fit(x, u * nan, steps=1), "expected finite notes u, found 40 that are not"), (lambda: small(2).fit(x, u[:7], steps=1), "expected tensors of one length"),
    (lambda: IVAE(layers(3, 6), layers(3, 1), 3).loss(x), "expected (20, 3) from the decoder, the shape of x, found (20, 1)"), (lambda: IVAE(layers(3, 6), layers(3, 3), 1.5), "expected at least one code, found 1.5"),
    (lambda: CategoricalIVAE(layers(3, 3), layers(3, 3), 3, 2, 1), "expected at least two classes, found 1"), (lambda: straight_through(torch.ones(2, 3)), "expected class probabilities"), (lambda: straight_through(x * nan), "expected class probabilities"),
    (lambda: cnn((3, 0, 0), 4, 2), "expected sides that can be halved four times, found 0 x 0"), (lambda: ivae.resnet((3, 48, 48), 4, 2), "expected sides that can be halved five times"), (lambda: ivae.resnet((3, 64, 64), 4, 2, 34), "expected a depth of 18 or 50, found 34")])
def test_one_line(call, message):
    with pytest.raises(ValueError) as err: call()
    assert message in str(err.value) and "\n" not in str(err.value)

@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 32)])
def test_networks_for_images(shape):
    for build in (cnn, ivae.resnet):
        encoder, decoder = build(shape, 8, 4)
        with torch.no_grad(): assert encoder(torch.zeros(2, *shape)).shape == (2, 8) and decoder(torch.zeros(2, 4)).shape == (2, *shape)
    assert ivae.Up(64, 32)(torch.zeros(1, 64, 3, 5)).shape == (1, 32, 6, 10)

# The experiments on pictures

def test_swings_move_one_number_at_a_time():
    "The loudest numbers first; each row keeps the rest at their means; a factor that nobody knows adds nothing."
    f = torch.stack([torch.arange(600) % 10, torch.arange(600) // 60], 1); codes = torch.stack([torch.rand(600, generator=gen()), f[:, 0] + .01 * torch.rand(600, generator=gen(1)), -f[:, 1].float()], 1)
    loud, lines = swings(codes, f, n=5, most=2)
    assert set(loud) == {1, 2} and lines.shape == (10, 3)
    for part, j in zip(lines.split(5), loud):
        rest = [k for k in range(3) if k != j]
        assert torch.allclose(part[:, rest], codes.mean(0)[rest].expand(5, -1)) and (part[:, j].diff() > 0).all()
        assert part[0, j] == pytest.approx(codes[:, j].quantile(.02).item(), abs=1e-5) and part[-1, j] == pytest.approx(codes[:, j].quantile(.98).item(), abs=1e-5)

def test_a_pair_of_weights_for_each_cell_of_table_7(tmp_path):
    "The summary that the record keeps is that of its cells; without a backward weight the loss is the plain one."
    record = balance_experiment(Config("ivae/rooms-balance", "smoke", 0, None, tmp_path)); weights = SHARES[::record.config["every"]]
    assert len(record.metrics) == len(SCORES) * len(weights) * (len(weights) + 3)
    for key in SCORES:
        for kl in weights:
            cells = [record.metrics[f"{key}, {kl:g} and {back:g}"]["value"] for back in weights]
            assert record.metrics[f"{key}, {kl:g}, mean"]["value"] == pytest.approx(sum(cells) / len(cells)) and record.metrics[f"{key}, {kl:g}, max"]["value"] == max(cells)

def test_what_is_kept_of_a_resnet(tmp_path):
    "Codes of drawn pictures, what the decoders draw, no weights; half the steps."
    record = rooms_experiment(Config("ivae/sprites-resnet18", "smoke", 0, None, tmp_path), model="iVAE + DDPM, ResNet-18", world="sprites")
    tensors, facts = load_tensors(tmp_path / f"{record.stem}.safetensors")
    n = record.config["points"]
    assert tensors["codes"].shape == tensors["drawn"].shape == (n, 10) and tensors["factors"].shape == (n, 4) and record.config["steps"] == ROOMS["smoke"]["steps"] // 2
    assert tensors["swings/decoder"].shape == tensors["swings/diffusion"].shape == (28, 1, 32, 32) and not any("weight" in k for k in tensors) and facts["model"] == "iVAE + DDPM, ResNet-18"

def test_a_held_ivae_does_not_learn(tmp_path, monkeypatch):
    monkeypatch.setenv("DISDIFF_RUNS", str(tmp_path))
    with pytest.raises(ValueError, match="expected a record of ivae/rooms at scale smoke, seed 0, found none: run it first: disdiff run ivae/rooms --scale smoke --seed 0"): runner.run("ivae/rooms-held", "smoke", out=tmp_path)
    first, second = (load_rooms(runner.run(name, "smoke", out=tmp_path)).state_dict() for name in ("ivae/rooms", "ivae/rooms-held"))
    assert all(torch.equal(first[k], second[k]) for k in first if k.startswith("ivae."))
    assert any(not torch.equal(first[k], second[k]) for k in first if k.startswith("net."))
