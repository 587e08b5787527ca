"Score components from outside: folded passes, weights, the two-term loss, errors in one line, files, and the antisymmetric share."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from disdiff_tutorial.components.decomposition import (ComponentScore, Encoder, OnePass, Pictures, antisymmetric, blend, build, carried, compose, digits_experiment, held_out, judged, load_model, measure, photographs_experiment, picture_weight, rooms_experiment)
from disdiff_tutorial.core import Config, Record, to_uint8
from disdiff_tutorial.data.scenes import rooms
from disdiff_tutorial.diffusion.dsm import middle_time, uniform_time, unit
from disdiff_tutorial.diffusion.sampling import sample
from disdiff_tutorial.diffusion.sde import SubVPSDE, VPSDE
from disdiff_tutorial.diffusion.unet import UNet

x = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

def made(k=3, dim=10, seed=0, **kw):
    "A small model with random weights everywhere: a fresh net answers 0."
    torch.manual_seed(seed)
    net = UNet(3, 16, [1, 2], 1, attend=[1], cond_dim=dim, stem=2, sde=SubVPSDE())
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=.2)
    return ComponentScore(net, Encoder((3, 16, 16), k, dim, 8), k, **kw)

def batch(n=5, k=3, dim=10):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 16, 16, generator=g), torch.rand(n, generator=g) * .9 + .05, torch.randn(n, k, dim, generator=g)

@pytest.mark.parametrize("k", [1, 2, 5])
def test_folded_is_a_loop(k):
    model, (xt, t, zeta) = made(k).eval(), batch(k=k)
    with torch.no_grad():
        loop = torch.stack([model.net(xt, t, zeta[:, i]) for i in range(k)], 1)
        assert torch.allclose(model.components(xt, t, zeta), loop, atol=1e-4) and torch.allclose(model(xt, t, zeta), loop.mean(1), atol=1e-4)

def test_order_of_components_does_not_matter():
    model, (xt, t, zeta) = made().eval(), batch()
    with torch.no_grad(): assert torch.allclose(model(xt, t, zeta), model(xt, t, zeta[:, [2, 0, 1]]), atol=1e-5)

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.data())
def test_weights_sum_to_one_and_dilution_moves_them(k, data):
    some = data.draw(st.sets(st.integers(0, k - 1), max_size=k)); alpha = data.draw(st.floats(0, 1))
    w, plain = blend(k, dilute=tuple(some), alpha=alpha), blend(k)
    assert w.shape == (k + 1,) and torch.isclose(w.sum(), torch.tensor(1.)) and torch.isclose(w[k], torch.tensor(len(some) * (1 - alpha) / k), atol=1e-6)
    for i in range(k): assert torch.isclose(w[i], plain[i] * (alpha if i in some else 1.), atol=1e-6)

def test_mixed_is_the_weighted_sum_and_skips_zeros():
    model, (xt, t, zeta) = made().eval(), batch(); calls = []
    model.net.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    with torch.no_grad():
        every = torch.cat([model.components(xt, t, zeta), model(xt, t)[:, None]], 1); calls.clear()
        w = torch.tensor([.5, 0., -.2, .7]); mixed = model.mixed(xt, t, zeta, w)
        assert calls == [15] and torch.allclose(mixed, (every * w.view(1, 4, 1, 1, 1)).sum(1), atol=1e-4)

def test_unconditional_ignores_the_encoder_and_is_ones():
    model, (xt, t, _) = made().eval(), batch()
    with torch.no_grad(): assert torch.equal(model(xt, t), model.net(xt, t, torch.ones(5, 10)))
    model.zero_grad(); model.term(torch.zeros(5, 3, 16, 16), t, torch.ones(5), None).backward()
    assert all(p.grad is None for p in model.encoder.parameters())

@pytest.mark.parametrize("how", [{}, {"drop": .3}])
def test_loss_teaches_encoder_and_net(how):
    model = made(); model.loss(x, **how).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters()) and model.encoder.each[0][-1].weight.grad.abs().max() > 0
    assert all(p.grad is not None for n, p in model.net.named_parameters() if n != "null")

@pytest.mark.parametrize("method", ["em", "pc", "ddim", "dpm++"])
def test_every_sampler_and_the_old_mode(method):
    model = made().train(); zeta = model.encode(x[:2])
    y = model.sample(zeta, steps=3, method=method); assert y.shape == (2, 3, 16, 16) and y.abs().max() <= 1 and model.training
    noise = torch.randn(2, 3, 16, 16)
    if method in ("ddim", "dpm++"): assert torch.allclose(model.sample(zeta, steps=3, method=method, x=noise), sample(model, model.sde, noise.shape, zeta, method, 3, x=noise).clamp(-1, 1), atol=1e-3)

def test_loss_is_two_denoising_terms_with_their_weights():
    "By hand: noise, times and weights of both terms, with `net` recording what it was told."
    model = made().eval(); told = []
    model.net.register_forward_pre_hook(lambda m, args: told.append(args))
    for weighting in (unit, picture_weight):
        told.clear(); torch.manual_seed(5); found = model.loss(x, weighting=weighting)
        torch.manual_seed(5); t = told[0][1][::3]; _ = torch.rand(12); x0 = x.float() / 127.5 - 1
        w = torch.ones(12) if weighting is unit else (model.sde.sigma(t) / model.sde.alpha(t)) ** 2
        terms = []
        for cond in (model.latents(x), None):
            eps = torch.randn_like(x0); xt = model.sde.alpha(t).view(-1, 1, 1, 1) * x0 + model.sde.sigma(t).view(-1, 1, 1, 1) * eps
            terms.append((w * (model(xt, t, cond) - eps).square().mean((1, 2, 3))).mean())
        assert len(told) == 4 and torch.isclose(found, sum(terms), rtol=1e-4) and told[1][2].eq(1).all()

def test_pictures_turn_a_clean_picture_into_its_noise():
    x0, eps, t, sde = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8), torch.linspace(.05, .95, 6), SubVPSDE(); seen = []
    class Knows(nn.Module):
        cond_dim = 4
        def forward(self, xt, t, cond): seen.append(xt); return x0
    assert torch.allclose(Pictures(Knows(), sde)(sde.perturb(x0, t, eps), t), eps, atol=1e-3)
    assert torch.allclose(seen[0].square().mean((1, 2, 3)), torch.ones(6), atol=.4)                      # the net sees pictures of one size

def test_one_pass_hears_all_and_weighs_its_fields():
    torch.manual_seed(0); net = UNet(9, 16, [1, 2], 1, cond_dim=30, stem=2, sde=SubVPSDE())
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=.2)
    model, (xt, t, zeta) = OnePass(net, Encoder((3, 16, 16), 3, 10, 8), 3, dim=10).eval(), batch(); calls = []
    net.register_forward_pre_hook(lambda m, args: calls.append(args))
    with torch.no_grad():
        fields = model.components(xt, t, zeta)
        assert len(calls) == 1 and torch.equal(calls[0][0], torch.cat([xt] * 3, 1)) and torch.equal(calls[0][2], zeta.flatten(1))
        nobody = net(torch.cat([xt] * 3, 1), t, torch.ones(5, 30)).unflatten(1, (3, 3)).mean(1)
        assert torch.allclose(model(xt, t), nobody, atol=1e-5) and torch.allclose(model(xt, t, zeta), fields.mean(1), atol=1e-5)
        w = torch.tensor([.5, 0., -.2, .7]); assert torch.allclose(model.mixed(xt, t, zeta, w), .5 * fields[:, 0] - .2 * fields[:, 2] + .7 * nobody, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected latents \(5, 3, 10\)"): model(xt, t, zeta[:, :2])

def test_components_may_come_as_any_list():
    for which in (1, [1], (1,), {1}, torch.tensor(1), torch.tensor([1]), np.int64(1), np.array([1])):
        assert torch.equal(blend(3, only=which), torch.tensor([0., 1, 0, 0])) and torch.equal(blend(3, dilute=which, alpha=0.), torch.tensor([1., 0, 1, 1]) / 3)

def test_compose_copies():
    a, b = torch.zeros(2, 3, 4), torch.ones(2, 3, 4); c = compose(a, b, [0, 2])
    assert c[:, [0, 2]].eq(1).all() and c[:, 1].eq(0).all() and a.eq(0).all() and b.eq(1).all() and torch.equal(c, compose(a, b[:1], [0, 2]))

def test_a_resumed_training_ends_the_same(tmp_path):
    def weights(parts):
        model = made()
        for steps in parts: torch.manual_seed(1) if steps == parts[0] else None; model.fit(x, steps=steps, size=4, checkpoint=tmp_path / f"{len(parts)}", progress=False)
        return torch.cat([p.flatten() for p in model.parameters()])
    assert torch.equal(weights([6]), weights([6, 6]))

def test_an_encoder_without_a_shape_draws_from_a_start():
    model = made().eval(); zeta, start, whole = model.encode(x[:2]), torch.randn(2, 3, 16, 16), model.encoder
    model.encoder = nn.Sequential(whole)
    assert torch.equal(model.encode(x[:2]), zeta)
    with pytest.raises(ValueError, match="expected an encoder with `shape`"): model.sample(zeta, steps=2)
    found = model.sample(zeta, steps=2, x=start)
    model.encoder = whole
    assert torch.equal(found, model.sample(zeta, steps=2, x=start))

@pytest.mark.parametrize("call, message", [
    (lambda: Encoder((3, 20, 16)), "expected images with sides that 8 divides"), (lambda: made().encode(x[..., :8]), "expected images (n, 3, 16, 16)"),
    (lambda: ComponentScore(made().net, Encoder((3, 16, 16), 2, 10), 3).encode(x), "expected an encoder that returns (n, 3, 10)"), (lambda: ComponentScore(made().net, Encoder((3, 16, 16), 3, 10), 3, dim=7).encode(x), "expected an encoder that returns (n, 3, 7)"),
    (lambda: Encoder((3, 16, 16), 0), "expected a shape (C, H, W), and k, dim and width"), (lambda: ComponentScore(made().net, nn.Identity(), 0), "expected one or more components"),
    (lambda: made()(*batch()[:2], batch()[2][:, 0]), "expected latents (5, m, 10)"), (lambda: made()(*batch()[:2], batch()[2][:1]), "expected latents (5, m, 10)"), (lambda: made().mixed(*batch(), torch.ones(3) / 3), "expected 4 weights"),
    (lambda: made().sample(torch.zeros(2, 3, 10), [0., 0, 0, 0]), "expected 4 weights"), (lambda: made().sample(torch.zeros(2, 3, 10), torch.tensor([1., float("nan"), 0, 0])), "expected 4 weights"),
    (lambda: blend(0), "expected one or more components"), (lambda: blend(3, only=0, weights=[1, 2, 3]), "expected `only` or `weights`, found both"), (lambda: blend(3, weights=[float("inf"), 1, 1]), "expected 3 weights"),
    (lambda: blend(3, dilute=0, alpha=float("nan")), "expected a finite alpha"), (lambda: blend(3, only=[]), "expected 3 weights"), (lambda: blend(3, dilute=-1), "expected components from 0 to 2"),
    (lambda: compose(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1), 0), "expected other latents (2, 3, 4)"), (lambda: compose(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), 3), "expected components from 0 to 2"),
    (lambda: antisymmetric(lambda v: v, torch.zeros(2, 3), 0), "expected one or more probes"), (lambda: antisymmetric(lambda v: v, torch.full((2, 3), float("nan"))), "expected finite floats x"),
    (lambda: antisymmetric(lambda v: torch.ones(2, 3), torch.zeros(2, 3)), "expected a field (2, 3) -> the same, with a gradient"), (lambda: antisymmetric(lambda v: v * float("nan"), torch.zeros(2, 3)), "expected a field with a finite Jacobian"),
    (lambda: carried(torch.zeros(9, 2, 3), torch.arange(9)[:, None] % 2, torch.zeros(4, 2, 3), torch.arange(4)[:, None]), "expected test factors whose values occur in the fit, found 2"),
    (lambda: carried(torch.full((9, 2, 3), float("nan")), torch.arange(9)[:, None] % 2, torch.zeros(4, 2, 3), torch.arange(4)[:, None] % 2), "expected finite codes"),
    (lambda: carried(torch.zeros(9, 2, 3), torch.arange(9)[:, None] % 2, torch.zeros(4, 1, 3), torch.arange(4)[:, None] % 2), "expected latents (n, k, dim), and test latents like them"),
    (lambda: ComponentScore(nn.Identity(), nn.Identity(), 3), "expected dim, or a net with cond_dim"), (lambda: made().sample(torch.zeros(2, 10)), "expected latents (n, 3, dim)"),
    (lambda: made().sample(torch.zeros(2, 3, 10), blend(2)), "expected 4 weights"), (lambda: blend(3, only=3), "expected components from 0 to 2"),
    (lambda: blend(3, weights=[1, 2]), "expected 3 weights"), (lambda: blend(2, weights=[1, -1]), "expected 2 weights with a sum above 0"), (lambda: made().loss(x, drop=2.), "expected a probability")])
def test_one_line(call, message):
    with pytest.raises(ValueError) as err: call()
    assert message in str(err.value) and "\n" not in str(err.value)

def test_antisymmetric_share():
    g = torch.Generator().manual_seed(0); A = torch.randn(8, 8, generator=g).double(); pts = torch.randn(30, 8, generator=g).double()
    assert antisymmetric(lambda v: v @ (A + A.T), pts) < 1e-12 and abs(antisymmetric(lambda v: v @ (A - A.T), pts) - 1) < 1e-9
    energy = lambda v: (v @ A).tanh().square().sum(1)                    # the gradient of any energy
    def gradient(v): return torch.autograd.grad(energy(v).sum(), v, create_graph=True)[0]
    assert antisymmetric(gradient, pts) < 1e-10
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda v: (v @ A).tanh(), p) for p in pts])
    exact = ((jacobian - jacobian.mT) / 2).square().sum() / jacobian.square().sum()
    assert abs(antisymmetric(lambda v: (v @ A).tanh(), pts, 400) - exact.sqrt().item()) < .03
    assert antisymmetric(lambda v: v * 0 + 1, pts) == 0                  # a constant field is the gradient of a slope
    assert abs(antisymmetric(lambda v: v @ (1e25 * A.float()), pts.float(), 100) - ((A - A.T) / 2).norm() / A.norm()) < .1

def test_antisymmetric_goes_through_attention():
    model, (xt, t, zeta) = made().eval(), batch(2)
    assert 0 < antisymmetric(lambda v: model(v, t[:2], zeta[:2]), xt[:2], 2) <= 1

def test_fit_weighs_pictures_at_middle_times_unless_told():
    def after(**how):
        model = made(); torch.manual_seed(2); model.fit(x, steps=2, size=4, progress=False, **how)
        return torch.cat([p.flatten() for p in model.parameters()])
    plain = after()
    assert torch.equal(plain, after(weighting=picture_weight, time=middle_time)) and not torch.equal(plain, after(weighting=unit)) and not torch.equal(plain, after(time=uniform_time))

def test_measures_are_by_hand():
    model, record, x0 = made().eval(), Record("t", "smoke", 3), x.float() / 127.5 - 1; measure(record, model, x, 2)
    rebuilt = model.sample(model.encode(x), steps=2, x=torch.randn(x0.shape, generator=torch.Generator().manual_seed(3)))
    error, std = (rebuilt - x0).square().mean().sqrt().item(), (x0 - x0.mean(0)).square().mean().sqrt().item()
    value = {k: m["value"] for k, m in record.metrics.items()}
    assert value["reconstruction, rms error"] == pytest.approx(error) and value["standard deviation of the data"] == pytest.approx(std) and value["standard deviation over error"] == pytest.approx(std / error)
    drawn, g, zeta = judged(model, x[:4], 2, 7), torch.Generator().manual_seed(7), model.encode(x[:4])
    other = zeta.clone(); other[:, 0] = zeta[[3, 0, 1, 2], 0]                                           # the first component of the picture before
    for name, latents, w in (("rebuilt", zeta, [1 / 3, 1 / 3, 1 / 3, 0]), ("composed", other, [1 / 3, 1 / 3, 1 / 3, 0]), ("one component", zeta, [1., 0, 0, 0]), ("no code", zeta, [0., 0, 0, 1])):
        assert torch.equal(drawn[name], to_uint8(model.sample(latents, w, steps=2, x=torch.randn(4, 3, 16, 16, generator=g)))), name

def test_carried_knows_who_knows():
    pytest.importorskip("sklearn")
    g = torch.Generator().manual_seed(0); f = torch.randint(3, (400, 2), generator=g); z = torch.randn(400, 2, 3, generator=g)
    for j in range(2): z[:, j] += 8 * nn.functional.one_hot(f[:, j], 3)
    info, right, H = carried(z[:300], f[:300], z[300:], f[300:])
    assert info.shape == right.shape == (3, 2) and (info <= H + 1e-9).all() and (info.diagonal() > .8 * H).all() and info[0, 1] == info[1, 0] == 0 and (right[2] > .95).all()

def test_world_is_split_and_read_back():
    data = rooms("cpu"); x_new, f_new, x_old, f_old = held_out(data)
    assert len(x_new) == 400 and len(x_old) == 3600 and torch.equal(data.nearest(x_new)[0][:, torch.tensor(data.grid.sizes) > 1], f_new)
    both = torch.cat([f_new, f_old]); assert len(both.unique(dim=0)) == 4000

@pytest.mark.parametrize("experiment, how", [(rooms_experiment, dict(k=2)), (rooms_experiment, dict(k=3, apart=False)), (rooms_experiment, dict(k=3, once=True)), (rooms_experiment, dict(k=3, drop=.2)), (digits_experiment, dict(k=3))])
def test_experiments_leave_a_model_that_loads(experiment, how, tmp_path):
    record = experiment(Config("components/test", "smoke", 0, None, tmp_path), **how); record.save(tmp_path); model = load_model(record)
    assert model.k == how["k"] and isinstance(model, OnePass) == how.get("once", False) and len(model.encoder.each) == (how["k"] if how.get("apart", True) else 1) and record.config.get("drop") == how.get("drop")
    assert not model.training and not any(p.requires_grad for p in model.parameters()) and {"reconstruction, rms error", "picture loss", "picture loss, unconditional"} <= set(record.metrics) and record.curves["loss"]

def test_shipped_weights_are_small():
    model = build((3, 32, 32), 5, 32, 32, 128)
    assert 2 * sum(v.numel() for v in model.state_dict().values()) < 12e6

def test_another_process_and_net():
    class Plain(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(10, 3)
        def forward(self, xt, t, cond): return xt * self.a(cond)[:, :, None, None]
    model = ComponentScore(Plain(), Encoder((3, 16, 16), 2, 10, 8), 2, VPSDE(), dim=10)
    model.fit(x, steps=2, size=4, progress=False); assert model.sample(model.encode(x[:3]), steps=2).shape == (3, 3, 16, 16)

def test_cifar_where_it_is_on_disk(tmp_path, monkeypatch, capsys):
    "Files of the true format, with fewer pictures: the experiment takes them, and holds out every tenth."
    from test_files import cifar_bytes, shrink, unsized
    pictures, folder = np.random.default_rng(0).integers(0, 256, (6, 20, 32, 32, 3), np.uint8), tmp_path / "cifar10/cifar-10-batches-bin"; folder.mkdir(parents=True)
    for name, batch in zip((*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"), pictures): (folder / f"{name}.bin").write_bytes(cifar_bytes(batch, [3] * 20))
    shrink(monkeypatch, "cifar10", splits={"train": 100, "test": 20}, files=unsized("cifar10")); monkeypatch.setenv("DISDIFF_DATA", str(tmp_path))
    record = photographs_experiment(Config("components/cifar", "smoke", 0, None, tmp_path), name="cifar10", size=32)
    held = torch.from_numpy(pictures[:2].reshape(40, 32, 32, 3)[:32:10]).permute(0, 3, 1, 2)
    assert "not on disk" not in capsys.readouterr().out and sorted(record.looks["true"].flatten(1).sum(1).tolist()) == sorted(held.flatten(1).sum(1).tolist())
