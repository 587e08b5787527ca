"DyGA's model around the anchors: codebook, VQ-GAN, extractor, latent diffusion, saved and loaded anchors, and the tools that look at units."
import math
from pathlib import Path
from unittest import mock
import pytest, torch
from torch.nn import functional as F
from disdiff_tutorial.core import Config, halved, load_tensors, restore, save_tensors, to_float
from disdiff_tutorial.data.scenes import rooms
from disdiff_tutorial.diffusion.unet import UNet
from disdiff_tutorial.dyga.anchoring import DyGA
from disdiff_tutorial.dyga.disdiff import won, build as build_disdiff
from disdiff_tutorial.dyga.interpretation import Rounded, ablation_experiment, attention_maps, groups, interchange, listening, load_ablation, slerp, swapped
from disdiff_tutorial.dyga.latent_diffusion import (ROOMS, VQGAN, Codebook, Coded, FeatureExtractor, LatentDiffusion, Lift, adaptive_weight, build, codebook_use, hinge,
                                                    load_vqgan, patch_critic, rooms_experiment, vqgan_experiment)

@pytest.fixture(scope="module")
def data(): return rooms("cpu")

@pytest.fixture(scope="module")
def x(data): return data.sample(12, torch.Generator().manual_seed(0))[0]

def extractor(**kw): torch.manual_seed(0); return FeatureExtractor((3, 32, 32), **{"units": 4, "dim": 6, "width": 8, "hidden": 32, **kw})

def batch_only(batches):
    "Batches without their factors, as a data set that is not a grid gives them."
    class Drawn:
        def batches(self, size, seed): return lambda step: batches(step)[:1]
    return Drawn()

def anchored(data, variant="bounded", **kw):
    "A small model whose anchors are chosen."
    model = LatentDiffusion(extractor(), width=16, tidy=DyGA(4, 6, variant, start=3, most=8), every=2, **kw)
    model.reselect(data.batches(32, 0), 8)
    return model.eval()


# --- the codebook and the VQ-GAN ------------------------------------------------------------------------------------------------

def test_codebook_rounds_and_passes_gradients():
    torch.manual_seed(0); book, h = Codebook(20, 3).eval(), torch.randn(2, 3, 4, 5, requires_grad=True)
    torch.nn.init.normal_(book.entries); q, loss, who = book(h)
    flat = h.movedim(1, -1).reshape(-1, 3)
    assert torch.equal(who.flatten(), (flat[:, None] - book.entries).square().sum(2).argmin(1)) and torch.allclose(q, book.entries[who].movedim(-1, 1), atol=1e-6)
    w = torch.randn_like(q); assert torch.equal(torch.autograd.grad((w * q).sum(), h, retain_graph=True)[0], w)
    to_h, to_book = torch.autograd.grad(loss, (h, book.entries))
    step = 2 * (h - q).detach() / h.numel()
    assert torch.allclose(to_h, .25 * step, atol=1e-6)                                             # the commitment moves h,
    assert torch.allclose(to_book, torch.zeros(20, 3).index_add_(0, who.flatten(), -step.movedim(1, -1).reshape(-1, 3)), atol=1e-6)      # four times as strongly the entries

def test_idle_entries_come_back():
    torch.manual_seed(0); book, h = Codebook(64, 3, patience=3), 5 + torch.randn(2, 3, 8, 8)
    before = codebook_use(book.eval()(h)[2], 64)[0]; book.train()
    for _ in range(5): book(h)
    assert before < 8 and codebook_use(book.eval()(h)[2], 64)[0] > 40 and book.idle.max() <= 3
    kept = book.entries.clone(); book(h); assert torch.equal(book.entries, kept)                   # in evaluation mode nothing moves

def test_codebook_use():
    assert codebook_use(torch.tensor([0, 0, 1, 1]), 9) == (2, pytest.approx(2)) and codebook_use(torch.tensor([[3]]), 9) == (1, 1.)
    used, perplexity = codebook_use(torch.tensor([0] * 90 + list(range(1, 11))), 11); assert used == 11 and perplexity < 2.1

def test_hinge_and_weight():
    assert hinge(torch.tensor([1., 2]), torch.tensor([-1., -3])) == 0 and hinge(torch.zeros(3), torch.zeros(3)) == 1
    at = torch.ones(2, requires_grad=True)
    assert math.isclose(adaptive_weight(3 * at.sum(), at.sum(), at), 3, rel_tol=1e-3) and adaptive_weight(at.sum(), 0 * at.sum(), at) == pytest.approx(1e4)

def test_vqgan_survives_and_refuses(x):
    torch.manual_seed(0); model = VQGAN(width=8, size=64)
    model.fit(x, steps=2, size=4, progress=False); model.eval()
    back = VQGAN.from_tensors(model.tensors(), model.facts)
    assert model.spread != 1 and torch.equal(back.encode(x), model.encode(x)) and torch.equal(back.decode(back.encode(x)), model.decode(model.encode(x)))
    assert abs(back.encode(x).std() - 1) < .5 and not any(k.startswith("critic") for k in model.tensors())
    assert model.encode(x[..., :16, :]).shape == (12, 3, 4, 8)
    for bad in (x[..., :30], x[:, :1], x[0]):
        with pytest.raises(ValueError, match=r"expected images \(n, 3, H, W\) with sides that 4 divides, found") as err: model.encode(bad)
        assert "\n" not in str(err.value)
    with pytest.raises(ValueError, match="sides that 4 divides"): model.loss(x[..., :30, :30])

def test_each_player_hears_its_own_part(x):
    torch.manual_seed(0); model = VQGAN(width=8, size=64); model.book.patience = 10 ** 9
    slopes = lambda loss, part: torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(part.parameters()), retain_graph=True)])
    y, book, _ = model.rebuild(x); plain, fooled = (to_float(x) - y).abs().mean(), -model.critic(y).mean()
    picture, game = plain + book + .75 * adaptive_weight(plain, fooled, model.decoder[-1].weight) * fooled, hinge(model.critic(to_float(x)), model.critic(y.detach()))
    for part, own in ((model.decoder, picture), (model.encoder, picture), (model.critic, game)):
        assert torch.allclose(slopes(model.loss(x), part), slopes(own, part), atol=1e-5) and slopes(own, part).abs().max() > 1e-4

def test_vqgan_experiment(tmp_path, x):
    record = vqgan_experiment(Config("dyga/vqgan", "smoke", 0, None, tmp_path)); record.save(tmp_path)
    assert {"entries in use", "perplexity"} <= set(record.metrics) and load_vqgan(record).encode(x).shape == (12, 3, 8, 8)
    assert patch_critic()(torch.randn(1, 3, 32, 32)).shape == (1, 1, 6, 6)


# --- the extractor and the model ------------------------------------------------------------------------------------------------

def test_lift_is_one_network_a_unit():
    torch.manual_seed(0); lift, s = Lift(3, (1, 5, 4), last=False), torch.randn(6, 3)
    for u in range(3):
        h = F.relu(F.linear(s[:, u:u + 1], lift.weights[0][u].T, lift.biases[0][u, 0]))
        assert torch.allclose(lift(s)[:, u], F.linear(h, lift.weights[1][u].T, lift.biases[1][u, 0]), atol=1e-6)

@pytest.mark.parametrize("kw", [{}, dict(lift=None), dict(lift=(16,), act=torch.nn.ELU, last=False)])
def test_extractor(kw, x):
    net = extractor(**kw).eval(); units = net(x)
    assert units.shape == (12, 4, 6) and torch.allclose(net(to_float(x)), units, atol=1e-5) and (units.min() >= 0) == (not kw)     # table 9 ends in a ReLU
    for bad in (x[:, :1], x[0], x[..., :16]):
        with pytest.raises(ValueError, match=r"expected images \(n, 3, 32, 32\)"): net(bad)

@pytest.mark.parametrize("tidy", [True, False])
@pytest.mark.parametrize("variant", ["bounded", "paper"])
def test_the_same_picture_the_same_units(variant, tidy, data, x):
    model = anchored(data, variant); whole = model.encode(x, tidy)
    for size in (1, 5): assert torch.allclose(torch.cat([model.encode(part, tidy) for part in x.split(size)]), whole, atol=1e-5)
    assert torch.equal(model.encode(x, tidy), whole)
    assert torch.equal(model.encode(x), model.encode(x, tidy=False)) == (model.tidy.strength == 0)

def test_units_are_read_in_evaluation_mode(data, x):
    "While a model trains, too: alone or in company the same units, and neither mode nor batch statistics move."
    model = anchored(data, "paper"); whole = model.encode(x); assert not model.training
    model.train(); old = {k: v.clone() for k, v in model.state_dict().items()}; units = model.encode(x)
    assert torch.equal(units, whole) and torch.allclose(model.encode(x[:1]), whole[:1], atol=1e-5) and not units.requires_grad
    assert model.training and model.extractor.training and all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
    for p in model.net.parameters(): torch.nn.init.normal_(p, std=.1)
    model.loss(x).backward(); assert model.extractor.trunk[0].weight.grad.abs().max() > 0

def test_choosing_again_leaves_no_trace(data):
    "Neither mode nor torch's random state, of no device: a seed for all would restart a GPU's noise."
    model = anchored(data).train(); before, old = torch.get_rng_state(), {k: v.clone() for k, v in model.extractor.state_dict().items()}
    with mock.patch("torch.cuda.manual_seed_all") as all_devices, mock.patch("torch.cuda.manual_seed") as device: model.reselect(data.batches(32, 0), 8)
    assert torch.equal(torch.get_rng_state(), before) and model.extractor.training and not all_devices.called and not device.called
    assert all(torch.equal(v, old[k]) for k, v in model.extractor.state_dict().items())

def test_a_small_pool_is_one_batch(data):
    model = LatentDiffusion(extractor(), width=16, tidy=DyGA(4, 6, "bounded", start=3, most=8), every=2)
    model.fit(data, steps=3, size=16, pool=10, progress=False); assert (model.tidy.counts > 0).all()

@pytest.mark.parametrize("tidy,every", [(None, 3), (DyGA(4, 6), 0), (DyGA(4, 6), -1)])
def test_tidy_and_every(tidy, every):
    with pytest.raises(ValueError, match="expected tidy and every"): LatentDiffusion(extractor(), tidy=tidy, every=every)

def test_on_latents(x):
    torch.manual_seed(0); model = LatentDiffusion(extractor(), VQGAN(width=8, size=64), width=16).train()
    assert model.shape == (3, 8, 8) and not model.autoencoder.training and not any(p.requires_grad for p in model.autoencoder.parameters())
    model.loss(x).backward(); assert model.extractor.trunk[0].weight.grad is not None and model.eval().sample(model.encode(x), steps=2).shape == (12, 3, 32, 32)

def test_latents_are_made_once_and_train_alike(data):
    "A table of latents, in half precision, in place of the encoder at every step: the same weights but for its rounding; the encoder sees each picture of the grid once."
    weights, seen = [], []
    for asked in (True, False):
        torch.manual_seed(0); model = LatentDiffusion(extractor(), VQGAN(width=8, size=64), width=16); encode = model.autoencoder.encode
        model.autoencoder.encode = lambda y: seen.append(len(y)) or encode(y)
        batches = data.batches(16, 0)
        for _ in range(2): model.fit(data, steps=2, size=16, progress=False) if asked else model.fit(batch_only(batches), steps=2, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in model.net.parameters()]))
    assert seen[:4] == [1000] * 4 and seen[4:] == [16] * 4 and torch.allclose(*weights, atol=1e-3) and not torch.equal(*weights)

def test_an_experiment_on_latents_needs_a_vqgan(tmp_path, x, monkeypatch):
    "Its one line names the run that is missing; with it, the model comes back whole from a file without the autoencoder."
    monkeypatch.setenv("DISDIFF_RUNS", str(tmp_path)); config = Config("dyga/rooms-latent", "smoke", 0, None, tmp_path)
    with pytest.raises(ValueError, match="expected a record of dyga/vqgan at scale smoke, found none: run it first: disdiff run dyga/vqgan --scale smoke"): rooms_experiment(config, latent=True)
    vq = vqgan_experiment(Config("dyga/vqgan", "smoke", 0, None, tmp_path)); vq.save(tmp_path)
    record = rooms_experiment(config, latent=True); record.save(tmp_path); back = load_ablation(record)
    assert not any("autoencoder" in k for k in load_tensors(record.file(".safetensors"))[0]) and torch.equal(back.autoencoder.encode(x), load_vqgan(vq).encode(x))
    assert back.sample(back.encode(x), steps=2).shape == (12, 3, 32, 32)


# --- anchors on disk --------------------------------------------------------------------------------------------------------------

def test_saved_anchors_keep_their_width(data, x, tmp_path):
    "In half precision variances of 1e-8 are 0, a Gaussian answers nan, and features go to wrong anchors."
    model = anchored(data); save_tensors(tmp_path / "m.safetensors", halved(model.state_dict()))
    back = restore(LatentDiffusion(extractor(), width=16, tidy=DyGA(4, 6, "bounded", start=3, most=8), every=2), load_tensors(tmp_path / "m.safetensors")[0])
    assert all(torch.allclose(v, back.tidy.state_dict()[k], rtol=1e-6, atol=1e-12) and v.dtype == back.tidy.state_dict()[k].dtype for k, v in model.tidy.state_dict().items())
    assert load_tensors(tmp_path / "m.safetensors")[0]["extractor.trunk.0.weight"].dtype == torch.float16 and (back.encode(x) - model.encode(x)).abs().max() < .01
    assert torch.allclose(back.tidy.align(model.extractor(x)), model.tidy.align(model.extractor(x)), atol=1e-5)

def test_anchors_of_an_experiment(tmp_path, x):
    record = ablation_experiment(Config("dyga/rooms-both", "smoke", 0, None, tmp_path), anchors="bounded", skip=.2); record.save(tmp_path)
    tidy = load_ablation(record).tidy
    assert load_tensors(record.file(".safetensors"))[0]["tidy.values"].dtype == torch.float32 and tidy.values.min() >= .99e-8 and (tidy.counts > 0).all()
    assert load_ablation(record).encode(x).shape == (12, ROOMS["smoke"]["units"], ROOMS["smoke"]["dim"])

@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_a_cast_model_keeps_its_anchors(cast, data, x):
    model = anchored(data); units = model.extractor(x); there = model.tidy.align(units)
    getattr(model, cast)(); assert torch.equal(model.tidy.align(units), there) and model.tidy.values.dtype == torch.float64
    model.tidy.select(torch.randn(50, 4, 6), torch.Generator().manual_seed(0))


# --- looks ------------------------------------------------------------------------------------------------------------------------

def test_slerp():
    g = torch.Generator().manual_seed(0); a, b = torch.randn(7, 3, 5, generator=g), torch.randn(7, 3, 5, generator=g)
    for share in (0., .3, 1.):
        y = slerp(a, b, share); assert torch.allclose(y.norm(dim=-1), torch.lerp(a.norm(dim=-1), b.norm(dim=-1), share), atol=1e-5)
        turned = lambda u, v: F.cosine_similarity(u, v, dim=-1).clamp(-1, 1).acos()
        assert torch.allclose(turned(a, y), share * turned(a, b), atol=2e-3)
    assert torch.allclose(slerp(a, 2 * a, .5), 1.5 * a, atol=1e-5) and torch.allclose(slerp(0 * a, b, .25), .25 * b) and slerp(a, -a, .5).isfinite().all()

def test_groups_and_exchange():
    assert groups(torch.tensor([[.1, .9], [.8, .2], [.3, .4]])) == [[1], [0, 2]]
    a, b = torch.zeros(2, 3, 4), torch.ones(2, 3, 4); assert swapped(a, b, 1)[:, :, 0].tolist() == [[0, 1, 0]] * 2 and a.max() == 0 and torch.equal(swapped(a, b, []), a)

def test_interchange_reads_what_was_drawn(data):
    "A model whose one unit a factor is the factor itself, and which draws exactly what it is told."
    class Oracle:
        shape = (3, 32, 32)
        def encode(self, x): return data.nearest(x)[0][:, :, None].float()
        def sample(self, units, x=None): return to_float(data.images(units[:, :, 0].long()))
    vary = [k for k, s in enumerate(data.grid.sizes) if s > 1]; every = list(range(len(data.grid.sizes)))
    became, stayed = interchange(Oracle(), data, [[k] for k in vary] + [every, []], 60)
    one = torch.eye(len(vary)).double(); assert torch.equal(became, torch.cat([one, torch.ones(1, 4), torch.zeros(1, 4)])) and torch.equal(stayed, 1 - became)
    with pytest.raises(ValueError, match="expected at least one list of units"): interchange(Oracle(), data, [], 6)

def test_maps_are_shares(data):
    torch.manual_seed(0); model = build(8, 8, 4, 4).eval()
    for p in model.net.parameters(): torch.nn.init.normal_(p, std=.1)
    units = torch.randn(2, 4, 4); maps, pictures = attention_maps(model, units, steps=2, generator=torch.Generator().manual_seed(0))
    assert maps.shape == (2, 4, 32, 32) and pictures.shape == (2, 3, 32, 32) and torch.allclose(maps.sum(1), torch.ones(2, 32, 32), atol=1e-5) and maps.std() > 1e-3
    other, _ = attention_maps(model, units[:, [1, 0, 2, 3]], steps=2, generator=torch.Generator().manual_seed(0)); assert torch.allclose(other, maps[:, [1, 0, 2, 3]], atol=1e-4)
    assert not any(getattr(m, "cross", None) is not None and m.cross._forward_hooks for m in model.net.modules())
    with pytest.raises(ValueError, match="expected a net with cross-attention"), listening(UNet(3, 16)): pass

def test_coded_is_one_number_a_unit(data):
    model = build(8, 8, 4, 4).eval(); codes = Coded(model.encode, data); f = data.grid.sample(20, torch.Generator().manual_seed(0))
    assert codes.images(f).shape == (20, 4) and torch.equal(codes.images(f), codes.images(f))

def test_rounded_selects_nothing():
    torch.manual_seed(0); tidy, u = Rounded(6), torch.randn(5, 4, 6); before = {k: v.clone() for k, v in tidy.state_dict().items()}
    assert tidy.align(u).shape == u.shape and tidy.select(u) is tidy and all(torch.equal(v, before[k]) for k, v in tidy.state_dict().items())

def test_won_leaves_no_trace(x):
    torch.manual_seed(0); model = build_disdiff(16, 8, 4, 8).train(); model.net.begin(); before = torch.get_rng_state()
    first = won(model, x); assert torch.equal(torch.get_rng_state(), before) and model.training and won(model, x) == first

@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "data/models").glob("dyga-*.safetensors")), ids=lambda f: f.stem)
def test_shipped_anchors(file):
    "Variances of anchors that ship survive their file: fp16 once turned nine in ten of them into 0."
    tensors = load_tensors(file)[0]; values = tensors.get("tidy.values")
    assert values is None or values.dtype != torch.float16 and values.min() >= .99e-8 and tensors["tidy.axes"].shape == (tensors["tidy.dims"].sum(), values.shape[2])
