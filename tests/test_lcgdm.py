"LCG-DM, chapters 40 to 42: known answers, what may not change silently, and one line for each mistake."
import math
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from disdiff_tutorial.diffusion.dsm import dsm_loss
from disdiff_tutorial.diffusion.sde import SubVPSDE, VESDE, VPSDE
from disdiff_tutorial.lcgdm import latent_guidance as guidance, scaling
from disdiff_tutorial.lcgdm.factorvae import (VAE, BetaTCVAE, BetaVAE, FactorVAE, batch_tc, contenders, critic_loss, dear_first, gaussian_tc, held, judge, kl_to_prior, learn, log_weights,
                                              mixture_tc, mlp, pack, permuted, printed, squares, unpack)
from disdiff_tutorial.lcgdm.latent_guidance import LCGDM, best_overlap, draw_all, inside, law, nll_bound, overlap, slopes, squares32
from disdiff_tutorial.lcgdm.scaling import ASKED, CodePrior, cell, code_sources, faces, loudest, moment_gap, readings, spread

x = torch.randint(256, (24, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SHAPE, SMALL = (1, 16, 16), dict(shape=(1, 16, 16), codes=3, hidden=(16,))

def factor(**kw): return FactorVAE(**SMALL, width=8, depth=1, **kw)

def lcgdm(encoder=None, **kw): return LCGDM(encoder or factor(), SHAPE, 3, width=16, attend=[], **kw)

def alive(model):
    "A net whose layers of zeros are filled, so that it answers to its code."
    torch.manual_seed(0)
    for p in model.net.parameters():
        if not p.any(): nn.init.normal_(p, 0, .1)
    return model

class Corner(nn.Module):
    "An encoder without a posterior: three pixels, times `size`."
    def __init__(self, size=1., wrap=lambda z: z): super().__init__(); self.size, self.wrap = size, wrap
    def forward(self, x): return self.wrap(self.size * x.flatten(1)[:, :3])

# ------------------------------------------------------------------------------------------------ 40: total correlation

@pytest.mark.parametrize("rho", [0., .5, .95])
def test_total_correlation_of_a_normal(rho):
    "-1/2 log det R in 4 numbers against the determinant by hand, whatever the scale; and the estimate from a mixture of one wide cloud of means."
    cov = (1 - rho) * torch.eye(4, dtype=torch.float64) + rho
    size = torch.tensor([1., 1e-6, 1e6, 3.], dtype=torch.float64)
    assert gaussian_tc(size[:, None] * cov * size).item() == pytest.approx(-math.log((1 - rho) ** 3 * (1 + 3 * rho)) / 2, rel=1e-6, abs=1e-9)

def test_mixture_tc_of_a_cloud_with_correlation():
    "Means with correlation 0.8 and a small spread of each: near the normal's -1/2 log(1 - r^2)."
    torch.manual_seed(0); cov = torch.tensor([[1., .8], [.8, 1.]])
    mean = MultivariateNormal(torch.zeros(2), cov).sample((4000,))
    found, error = mixture_tc(mean, torch.full((4000, 2), math.log(.04)), 4000, torch.Generator().manual_seed(0))
    assert abs(found - gaussian_tc(cov + .04 * torch.eye(2)).item()) < 4 * error + .03

def test_batch_estimates_on_the_whole_set():
    "With all n pictures in the batch, weighted sampling is the even mixture but for (d - 1) log n, and stratified sampling near that mixture."
    torch.manual_seed(0); mean, logvar = torch.randn(30, 3, dtype=torch.float64), -torch.rand(30, 3, dtype=torch.float64)
    z = mean + (logvar / 2).exp() * torch.randn_like(mean)
    one = torch.distributions.Normal(mean, (logvar / 2).exp()).log_prob(z[:, None]); even = lambda l: l.logsumexp(1) - math.log(30)
    truth = (even(one.sum(2)) - even(one).sum(1)).mean().item()
    assert batch_tc(z, mean, logvar, 30).item() == pytest.approx(truth + 2 * math.log(30), abs=1e-6)
    assert batch_tc(z, mean, logvar, 30, True).item() == pytest.approx(truth, abs=.1)
    for m in (2, 7): assert torch.allclose(log_weights(m, 50, True).exp().sum(1), torch.ones(m))

def test_one_code_for_each_picture_of_the_posterior():
    "The codes of `draw` have the mean and the spread that `posterior` says."
    torch.manual_seed(0); model = VAE(**SMALL)
    with torch.no_grad():
        model.encoder[1][-1].bias[3:] = torch.tensor([-4., 0., 3.])
        z, mean, logvar = model.draw(x[:1].expand(20_000, -1, -1, -1))
    assert torch.allclose(z.std(0), (logvar[0] / 2).exp(), rtol=.03) and torch.allclose(z.mean(0), mean[0], atol=.15)

def test_reconstruction_is_the_bernoulli_likelihood():
    torch.manual_seed(0); model = VAE(**SMALL)
    t = model.terms(x); p = (model.decode(t.z) + 1) / 2; white = x.float() / 255
    by_hand = -(white * p.log() + (1 - white) * (1 - p).log()).sum((1, 2, 3)).mean()
    assert torch.allclose(t.reconstruction, by_hand, rtol=1e-4) and torch.allclose(t.kl, kl_to_prior(t.mean, t.logvar).sum(1).mean())

def test_losses_in_their_weights():
    "Each loss at other weights than 1, and with a schedule's weights, from its terms."
    torch.manual_seed(0); beta, tc, f = BetaVAE(**SMALL, beta=3.), BetaTCVAE(**SMALL, beta=5., n=100), factor(gamma=7.)
    for model in (beta, tc, f): model.kl_weight, model.tc_weight = 2., .5
    def same(model, rest, seen=x):
        torch.manual_seed(1); found = model.loss(x)
        torch.manual_seed(1); t = model.terms(seen)
        assert torch.allclose(found, t.reconstruction + rest(t), rtol=1e-5)
    def game(t):
        z = f.draw(x[12:])[0]
        return 2 * t.kl + .5 * 7 * f.critic(t.z).mean() + critic_loss(f.critic, z, permuted(z))
    same(beta, lambda t: 2 * 3 * t.kl)
    same(tc, lambda t: 2 * t.kl + .5 * 4 * batch_tc(t.z, t.mean, t.logvar, 100))
    same(f, game, x[:12])

def test_critic_feels_its_own_loss_alone():
    torch.manual_seed(0); critic = mlp([2, 4, 1]); z = torch.randn(5, 2, requires_grad=True)
    held(critic)(z).sum().backward()
    assert z.grad.any() and all(p.grad is None for p in critic.parameters())

def test_critic_is_right_when_it_says_one_to_real_codes():
    "By hand: -log of the probability given to the right side, averaged over both."
    real, shuffled, critic = torch.tensor([[2.], [1.]]), torch.tensor([[-3.]]), lambda z: z
    right = torch.sigmoid(torch.tensor([2., 1., 3.])).log()
    assert torch.allclose(critic_loss(critic, real, shuffled), -(right[:2].mean() + right[2]) / 2)

def test_schedule():
    assert [dear_first(u) for u in (0., .5, .8, 1.)] == [(6., 0.), (6., 0.), (1., 1.), (1., 1.)] and dear_first(.65) == pytest.approx((3.5, .5))

def test_table_1_is_trained_with_its_coefficient():
    "LCG-DM A.3: ten for every autoencoder; FactorVAE also at 20, as in Table 2."
    models = {name: build() for name, (build, schedule) in printed((1, 64, 64), 737_280).items()}
    assert models["beta-VAE"].beta == models["beta-TCVAE"].beta == models["FactorVAE, gamma 10"].gamma == 10 and models["FactorVAE"].gamma == 20
    assert models["beta-TCVAE"].n == 737_280 and all(m.codes == 10 and m.hidden is None for m in models.values())

@pytest.mark.parametrize("build", [lambda: VAE(**SMALL), lambda: BetaVAE(**SMALL, beta=3.5), lambda: BetaTCVAE(**SMALL, beta=2.5, n=777), lambda: factor(gamma=3., share=.25), lambda: VAE(SHAPE, 4)])
def test_a_file_brings_back_the_same_autoencoder(build):
    torch.manual_seed(0); model = build().eval(); back = unpack(*pack(model, half=False))
    assert type(back) is type(model) and all(getattr(back, k) == getattr(model, k) for k in (*model.facts, "shape", "codes", "hidden"))
    assert torch.equal(back.encode(x), model.encode(x)) and torch.equal(back.decode(model.encode(x)), model.decode(model.encode(x)))
    assert not any(p.requires_grad for p in back.parameters())

def test_a_file_may_hold_the_critic():
    "Files written before critics stayed behind still open."
    model = factor(); tensors, facts = pack(model, half=False)
    assert torch.equal(unpack(tensors | {k: v for k, v in model.state_dict().items() if k.startswith("critic.")}, facts).critic[0].weight, model.critic[0].weight)

def test_training_lowers_the_loss_and_judging_leaves_the_model():
    torch.manual_seed(0); data = squares("cpu"); build, schedule = contenders(data.shape)["FactorVAE, dear first"]; model = build()
    done = learn(model, data, 300, size=32, schedule=schedule, progress=False)
    assert done.curve[-1][1] < .6 * done.curve[0][1]
    before = {k: v.clone() for k, v in model.state_dict().items()}; scores = judge(model.eval(), data, 200)
    assert set(scores) == {"MIG", "FactorVAE score", "reconstruction", "KL", "TC"} and all(math.isfinite(v) for v in scores.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

# ------------------------------------------------------------------------------------------------ 41: latent code guidance

def test_loss_does_not_hear_a_code_that_is_dropped():
    "With drop = 1 the loss is that of the null for every code; with drop = 0 it is that of the code in units of its spread."
    model = alive(lcgdm(Corner())); model.mean.fill_(.5); model.std.fill_(2.); z = model.encode(x)
    def against(drop, cond):
        torch.manual_seed(3); found = model.loss(x, drop)
        torch.manual_seed(3); torch.randn(24, 3); torch.rand(24)                            # the codes drawn, and who is dropped
        return found, dsm_loss(model.net, x.float() / 127.5 - 1, model.sde, cond, guidance.v_weight, guidance.middle_time)
    assert torch.allclose(*against(0., (z - .5) / 2)) and torch.allclose(*against(1., model.net.null.expand(24, 3)))

def test_fit_learns_the_codes_in_units_of_their_spread():
    torch.manual_seed(0); model = lcgdm(Corner(1000.)); model.fit(x, steps=2, size=8, progress=False)
    c = model.cond(model.encode(x))
    assert c.mean(0).abs().max() < .1 and (c.std(0) - 1).abs().max() < .1
    p = model.prior(4000, torch.Generator().manual_seed(0))                                 # without a posterior the prior has the codes' own mean and spread
    assert torch.allclose(p.std(0), model.std, rtol=.1) and torch.allclose(p.mean(0), model.mean, atol=40.)
    assert abs(lcgdm().prior(4000, torch.Generator().manual_seed(0)).std() - 1) < .05

def test_at_least_one_step_hears_the_code():
    assert [f.steps for f in lcgdm().fit(x, steps=2, pretrain=.99, size=8, progress=False)] == [1, 1]

def test_a_killed_stage_goes_on_in_another_process(tmp_path, monkeypatch):
    "Killed in stage 2 and called again with another state of torch's generator: the same units of the codes, the same weights as in one go."
    def build(): torch.manual_seed(0); return lcgdm(factor())
    whole = build(); whole.fit(x, steps=8, size=8, progress=False, checkpoint=tmp_path / "whole")
    killed, left = build(), [5]
    real = LCGDM.loss
    def loss(*a, **k):
        if not left[0]: raise KeyboardInterrupt
        left[0] -= 1
        return real(*a, **k)
    monkeypatch.setattr(LCGDM, "loss", loss)
    with pytest.raises(KeyboardInterrupt): killed.fit(x, steps=8, size=8, progress=False, checkpoint=tmp_path / "killed")
    monkeypatch.setattr(LCGDM, "loss", real)
    again = build(); torch.manual_seed(99); again.fit(x, steps=8, size=8, progress=False, checkpoint=tmp_path / "killed")
    assert torch.equal(again.mean, whole.mean) and torch.equal(again.std, whole.std)
    assert all(torch.equal(a, b) for a, b in zip(again.net.parameters(), whole.net.parameters()))

def test_encoder_stays_frozen():
    "An encoder with batch statistics: neither weights nor statistics move, whatever mode the rest is in."
    class Normed(nn.Module):
        def __init__(self): super().__init__(); self.norm, self.out = nn.BatchNorm2d(1), nn.Linear(256, 3)
        def forward(self, x): return self.out(self.norm(x).flatten(1))
    model = lcgdm(Normed()); model.train(); before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    model.fit(x, steps=3, size=8, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())

@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("sde", [VPSDE(.2, 15.), SubVPSDE(), VESDE()])
def test_a_file_brings_back_the_same_model(tmp_path, sde, half):
    "Options, codes larger than half precision holds, and the noising process; another process than the one it was trained with is refused."
    model = alive(LCGDM(Corner(1e5), SHAPE, 3, width=16, attend=[], sde=sde, shrink=2)); model.fit(x, steps=2, size=8, progress=False)
    model.save(tmp_path / "m", half=half); back = LCGDM.load(tmp_path / "m", encoder=Corner(1e5), sde=sde)
    assert (back.shrink, back.shape, back.codes, back.unet) == (model.shrink, model.shape, model.codes, model.unet) and law(back.sde) == law(sde)
    assert torch.equal(back.mean, model.mean) and torch.equal(back.std, model.std)
    noise = torch.randn(2, *SHAPE); a, b = (m.sample(2, model.encode(x[:2]), x=noise, steps=2) for m in (model, back))
    assert torch.equal(a, b) if not half else torch.allclose(a, b, atol=.05 * a.abs().max())
    with pytest.raises(ValueError, match="pass it as sde="): LCGDM.load(tmp_path / "m", encoder=Corner())

def test_files_of_before_had_the_default_noise(tmp_path):
    "A file without the fact `sde` is one of the default process."
    model = lcgdm(); model.save(tmp_path / "m"); tensors, facts = guidance.load_tensors(tmp_path / "m"); facts.pop("sde")
    guidance.save_tensors(tmp_path / "m", tensors, **facts)
    assert law(LCGDM.load(tmp_path / "m").sde) == law(VPSDE())

def test_traversal_moves_one_number_from_one_noise():
    "Row by row what `sample` draws of the same codes and noise; the caller's code stays; lists will do."
    torch.manual_seed(0); model = alive(lcgdm()); code, noise = torch.tensor([.3, -.2, .1]), torch.randn(1, *SHAPE)
    rows = model.traverse(1, [-1., 2.], code, noise, steps=3)
    for row, v in zip(rows, (-1., 2.)): assert torch.allclose(row, model.sample(1, [.3, v, .1], x=noise, steps=3)[0], atol=1e-4)
    assert torch.equal(code, torch.tensor([.3, -.2, .1])) and torch.equal(rows, model.traverse(1, [-1., 2.], code.tolist(), noise, steps=3))

def test_traversal_starts_at_the_mean_of_the_prior():
    "0 with a posterior; the codes' own mean with an encoder of one's own."
    noise = torch.randn(1, *SHAPE)
    for encoder, mean in ((factor(), 0.), (Corner(), 7.)):
        model = alive(lcgdm(encoder)); model.mean.fill_(mean)
        assert torch.equal(model.traverse(1, [2.], x=noise, steps=2), model.traverse(1, [2.], [mean] * 3, noise, steps=2))

def test_samples_do_not_depend_on_the_split_of_the_batch():
    model = alive(lcgdm()); z, noise = torch.randn(6, 3), torch.randn(6, *SHAPE)
    whole = model.sample(6, z, x=noise, guidance=2., steps=3)
    assert torch.allclose(whole, torch.cat([model.sample(len(a), a, x=b, guidance=2., steps=3) for a, b in zip(z.split(4), noise.split(4))]), atol=1e-5)

def test_looking_moves_neither_mode_nor_chance():
    model = lcgdm().train(); g = torch.Generator(); before = torch.random.get_rng_state()
    model.encode(x); model.draw_codes(x, g); model.sample(2, steps=1, generator=g); model.traverse(0, [0.], steps=1, generator=g)
    assert torch.equal(before, torch.random.get_rng_state()) and model.net.training and not model.encoder.training

def test_overlaps():
    a = torch.zeros(3, 1, 4, 4, dtype=torch.uint8); a[0, 0, :2] = 255; a[1, 0, 1:3] = 255; a[2, 0, 3] = 128
    assert overlap(inside(a[:2]), inside(a[1:])).tolist() == pytest.approx([1 / 3, 0]) and inside(a).sum(1).tolist() == [8, 8, 4]
    value, who = best_overlap(a[[1, 0]], a); assert value.tolist() == [1., 1.] and who.tolist() == [1, 0]

class Perfect:
    "A stand-in for a model that draws true squares: number 1 is posX, half its range for one unit; number 0 is nothing."
    shape, codes, data = (1, 32, 32), 2, squares32("cpu")
    def prior(self, n, generator=None): return torch.zeros(n, 2)
    def traverse(self, j, values, code, x, **kind):
        f = torch.tensor([[0, 0, 3, 0, 16, 16]]).repeat(len(values), 1)
        if j == 1: f[:, 4] = (15.5 + 15.5 * values / 1.5).round().long()
        return self.data.images(f)

def test_slopes_of_a_perfect_model():
    slope, explained = slopes(Perfect(), Perfect.data, 1, n=3, values=5)
    assert slope.tolist() == pytest.approx([0, 0, 0, 0, 1 / 3, 0], abs=.01) and explained[4] > .99 and explained[5].isnan()
    assert slopes(Perfect(), Perfect.data, 0, n=3, values=5)[0].abs().max() == 0

def test_bound_is_its_two_parts():
    "LCG-DM (8): conditional part at the code in units of its spread, KL in closed form, and their sum in bits."
    model = alive(lcgdm()); model.mean.fill_(.5); model.std.fill_(2.)
    seen = []; real = model.net.forward
    model.net.forward = lambda xt, t, cond: (seen.append(cond), real(xt, t, cond))[1]
    given, kl, bits = nll_bound(model, x[:3], tol=1e-1, generator=torch.Generator().manual_seed(0))
    mean, logvar = model.posterior(x[:3]); z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(seen[0], (z - .5) / 2, atol=1e-5) and torch.allclose(kl, kl_to_prior(mean, logvar).sum(1))
    assert torch.allclose(bits, 7 + (given + kl) / (256 * math.log(2)), rtol=1e-5)

def test_without_a_code_is_the_null():
    "`draw_all`: its five names; no code is the net's null, whatever the codes are."
    model = alive(lcgdm()); model.net.null.data.fill_(3.); z, p = torch.randn(4, 3), torch.randn(4, 3)
    a, b = (draw_all(model, c, p, torch.Generator().manual_seed(0), 2) for c in (z, z + 1))
    assert set(a) == {"encoded", "prior", "no code", "FactorVAE, encoded", "FactorVAE, prior"} and all(y.dtype == torch.uint8 and y.shape == (4, *SHAPE) for y in a.values())
    assert torch.equal(a["no code"], b["no code"]) and not torch.equal(a["encoded"], b["encoded"])

# ------------------------------------------------------------------------------------------------ 42: scaling

def test_lambda_is_guidance_less_one():
    "LCG-DM (7): a cell at lambda is a sample with w = 1 + lambda, its number j at the value asked for."
    model = alive(lcgdm()); g = lambda: torch.Generator().manual_seed(0)
    z = model.prior(5, gen := g()); z[:, 2] = 1.5
    assert torch.equal(cell(model, 2, 1.5, 5, 3., g(), steps=2), model.sample(5, z, guidance=4., steps=2, generator=gen))

def test_readings_and_their_diversity():
    class Draws:
        "Draws a constant picture of brightness z[0] / 4, and reads it exactly."
        def prior(self, n, generator=None): return torch.zeros(n, 2)
        def sample(self, n, z, guidance, generator=None, **kind): return (z[:, :1, None, None] / 4).expand(n, 1, 2, 2)
        def encode(self, y): return 4 * y.flatten(1)[:, :2]
    read, varied = readings(Draws(), 0, 1., 3)
    assert torch.equal(read, torch.tensor(ASKED)[:, None].expand(5, 3)) and varied == [0.] * 5
    assert spread(torch.tensor([0., 3.]).view(2, 1)) == spread(torch.tensor([0, 3], dtype=torch.uint8).view(2, 1)) == 3.

def test_loudest_number():
    model = factor()
    with torch.no_grad(): model.encoder[1][-1].weight.zero_(); model.encoder[1][-1].bias.copy_(torch.tensor([.1, 2., 1., 0., 0., 0.]))
    js, kl = loudest(lcgdm(model), x, 2)
    assert js == [1, 2] and torch.allclose(kl, torch.tensor([.005, 2., .5]))

def test_moment_gap():
    "Of a cloud that is a known normal: KL(N(1, 4) || N(0, 1)) twice, and a correlation's total correlation."
    z = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    assert moment_gap(2 * z + 1) == pytest.approx(2 * (4 + 1 - 1 - math.log(4)) / 2, abs=.03)
    assert moment_gap(torch.stack([z[:, 0], .8 * z[:, 0] + .6 * z[:, 1]], 1)) == pytest.approx(-math.log(1 - .64) / 2, abs=.01)

def test_code_prior():
    "Learns a normal far from N(0, I), from a tensor or from a function; its file is in `load_prior`'s form."
    torch.manual_seed(0); cloud = torch.randn(2000, 2) * torch.tensor([.3, 1.]) + torch.tensor([1., 0.])
    for source in (cloud, lambda n: cloud[torch.randint(2000, (n,))]):
        prior = CodePrior(2, 32); prior.learn(source, 400, size=256, progress=False)
        z = prior.draw(2000, generator=torch.Generator().manual_seed(0), steps=20)
        assert (z.mean(0) - cloud.mean(0)).abs().max() < .15 and (z.std(0) - cloud.std(0)).abs().max() < .15
    model = lcgdm(); sources, again = (code_sources(model, CodePrior(3, 16), x, 5) for _ in range(2))
    assert set(sources) == {"encoded", "prior", "learned prior"} and all(z.shape == (5, 3) for z in sources.values())
    assert torch.equal(sources["prior"], again["prior"]) and not torch.equal(sources["encoded"], again["encoded"])       # drawn from q(z | x), not its means

def test_faces_of_either_set(monkeypatch):
    "LFW or CelebA, whichever is asked for, averaged to the side; scenes where it is not on disk."
    class Set: images = torch.arange(5 * 3 * 64 * 64).view(5, 3, 64, 64).remainder(256).to(torch.uint8)
    def load(name):
        if name == "celeba": return Set
        raise scaling.files.Unavailable("no")
    monkeypatch.setattr(scaling.files, "load", load)
    images, name = faces(16, "celeba"); assert name == "celeba" and images.shape == (5, 3, 16, 16) and images.dtype == torch.uint8
    assert images[0, 0, 0, 0] == Set.images[0, 0, :4, :4].float().mean().round()
    assert faces()[1] == "scenes"

# ------------------------------------------------------------------------------------------------ one line for each mistake

model = lcgdm()
@pytest.mark.parametrize("call, message", [
    (lambda: gaussian_tc(torch.tensor([[1., 2.], [2., 1.]])), "expected a covariance"), (lambda: gaussian_tc(torch.zeros(2, 2)), "expected a covariance"),
    (lambda: factor().loss(x[:2]), "at least two for the critic"), (lambda: batch_tc(*[torch.zeros(4, 2)] * 3, 3), "expected a data set of n pictures"),
    (lambda: mixture_tc(torch.zeros(3, 2), torch.zeros(3, 2), 1), "at least two draws"), (lambda: unpack({}, pack(factor())[1]), "expected the tensors of this FactorVAE"),
    (lambda: unpack(pack(factor())[0], pack(factor())[1] | {"codes": 5}), "expected the tensors of this FactorVAE"), (lambda: VAE(SHAPE, 2.5), "expected at least one code"),
    (lambda: VAE((16, 16)), "expected a shape (C, H, W)"), (lambda: factor().decode(torch.zeros(2, 5)), "expected codes (n, 3)"),
    (lambda: LCGDM(factor(), SHAPE, 5, width=16, attend=[]).fit(x, steps=2, progress=False), "expected codes (n, 5)"), (lambda: LCGDM(factor(), SHAPE, 5, width=16, attend=[]).encode(x), "expected codes (n, 5)"),
    (lambda: lcgdm(Corner(wrap=lambda z: (z, z))).encode(x), "found tuple"), (lambda: model.fit(x, steps=0), "expected at least one step"),
    (lambda: model.sample(2, [1.], steps=1), "expected a code (3,)"), (lambda: model.sample(3, torch.zeros(2, 3), steps=1), "or codes (3, 3)"), (lambda: model.sample(0), "expected at least one image"),
    (lambda: model.sample(2, x=torch.zeros(2, 1, 8, 8), steps=1), "(2, 1, 8, 8)"), (lambda: model.traverse(0, [0.], torch.zeros(2, 3)), "expected one code of 3 numbers"),
    (lambda: nll_bound(lcgdm(Corner()), x), "expected an encoder with a posterior"), (lambda: loudest(lcgdm(Corner()), x), "expected an encoder with a posterior"),
    (lambda: spread(torch.zeros(1, 1, 2, 2)), "expected at least two images"), (lambda: moment_gap(torch.zeros(3, 5)), "expected codes (n, d) with n > d"),
    (lambda: CodePrior(3, 16).learn(torch.zeros(9, 4), 2), "expected codes (n, 3)"), (lambda: faces(48), "expected a side of 16, 32 or 64"),
    (lambda: lcgdm(lambda x: x), "expected an encoder that is a module, found function"), (lambda: guidance.cleaned(torch.zeros(1, 1, 2, 2)), "expected uint8 images, found torch.float32"),
    (lambda: model.fit(x.float(), steps=2, progress=False), "expected floats in [-1, 1]"), (lambda: learn(VAE(**SMALL), x.float(), 2, progress=False), "expected floats in [-1, 1]"),
    (lambda: VAE((1, 4, 4)), "expected pictures with even sides of at least 8, found 4 x 4"), (lambda: CodePrior(3, 16).draw(2, 5), "expected codes of 3 numbers, found 5")])
def test_one_line(call, message):
    with pytest.raises((ValueError, TypeError)) as err: call()
    assert message in str(err.value) and "\n" not in str(err.value)

def test_codes_of_any_type_of_number():
    "An encoder that gives whole or double numbers: its codes arrive as floats of the net."
    for wrap in (lambda z: (z > 0).long(), lambda z: z.double()):
        model = lcgdm(Corner(wrap=wrap)); model.fit(x, steps=2, size=8, progress=False)
        assert model.encode(x).dtype == torch.float32 and model.sample(2, model.encode(x[:2]), steps=1).isfinite().all()

def test_a_record_of_all_of_dsprites(tmp_path):
    "Its encoder is that of the record of Table 1, of the same scale and seed; without codes only pictures without a code are drawn."
    from disdiff_tutorial.lcgdm import latent_guidance
    from disdiff_tutorial.lcgdm.factorvae import load_autoencoders
    from disdiff_tutorial.run import run
    table = run("lcgdm/autoencoders", "smoke", out=tmp_path)
    free = run("lcgdm/dsprites-free", "smoke", out=tmp_path)
    assert free.config["encoder"] == "lcgdm/autoencoders, seed 0" and free.config["vae_steps"] == 2 and set(free.trainings) == {"net"}
    assert "fit, no code" in free.metrics and not [k for k in free.metrics if "prior" in k or "encoded" in k]
    mine, theirs = latent_guidance.load_lcgdm(free).encoder.state_dict(), load_autoencoders(table)["FactorVAE"].state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine if not k.startswith("critic."))
    other = run("lcgdm/dsprites", "smoke", seed=1, out=tmp_path)
    assert "encoder" not in other.config and set(other.trainings) == {"vae", "net"}

def test_likelihoods_are_noted():
    from disdiff_tutorial.core import Record
    from disdiff_tutorial.lcgdm.factorvae import FactorVAE, squares
    from disdiff_tutorial.lcgdm.latent_guidance import cleaned, measure
    data, record = squares(), Record("toy/all", "smoke", 0, config={"drop": .1})
    torch.manual_seed(0); model = LCGDM(FactorVAE(data.shape, hidden=(16,), width=16, depth=2), data.shape, 10, width=8).eval()
    measure(record, model, data, dict(points=60, samples=4, evaluations=2, judged=0, bounds=2))
    bound, free = (record.metrics[k] for k in ("NLL bound, nats", "NLL without a code, nats"))
    assert bound["n"] == 2 and math.isfinite(bound["value"]) and math.isfinite(free["value"]) and "fit, prior" in record.metrics and record.metrics["NLL bound less without a code, standard error, nats"]["value"] > 0
    grey = torch.arange(256, dtype=torch.uint8); assert cleaned(grey).unique().tolist() == [0, *range(16, 240), 255]
