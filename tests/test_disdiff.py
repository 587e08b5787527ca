"DisDiff: two ways make a U-Net, fields start silent, the game's loss in closed form, gradients where they belong, plugs that plug, and the experiment at smoke."
import math
import pytest, torch
from torch import nn
from torch.nn import functional as F
from disdiff_tutorial.core import Config, load_tensors, to_float
from disdiff_tutorial.data.scenes import rooms
from disdiff_tutorial.diffusion.sde import VPSDE
from disdiff_tutorial.diffusion.unet import UNet
from disdiff_tutorial.dyga.disdiff import DISDIFF, DisDiff, Fields, build, disdiff_experiment, game_loss, load_disdiff, small_unet, tells, way_down, way_up, won
from disdiff_tutorial.dyga.latent_diffusion import FeatureExtractor
from disdiff_tutorial.dyga.skip_dropout import SkipDropout, joints

SIZES = dict(width=16, extractor=8, units=4, dim=8)

def awake(net):
    "Random weights everywhere: a fresh net answers 0."
    for p in net.parameters(): nn.init.normal_(p, std=.1)
    return net

@pytest.fixture
def x(): return rooms("cpu").sample(8, torch.Generator().manual_seed(0))[0]

@pytest.fixture
def model():
    torch.manual_seed(0); m = build(**SIZES)
    awake(m.net.net); m.net.begin(); nn.init.normal_(m.net.decoder.last[-1].weight, std=.05)
    return m

def slope(part): return sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None)

@pytest.mark.parametrize("kw", [dict(mults=(1, 2), blocks=1, attend=[1], stem=4), dict(mults=(1, 2, 2), blocks=2), dict(mults=(1,), blocks=1)])
def test_two_ways_make_a_net(kw):
    torch.manual_seed(0)
    net, xt, t = awake(UNet(3, 16, **kw)), torch.randn(3, 3, 32, 32), torch.rand(3)
    h, temb, kept = way_down(net, xt, t)
    assert len(kept) == len(net.skips) and torch.equal(way_up(net, h, temb, kept), net.layers(xt, t, None)) and len(kept) == len(net.skips)

def test_a_fresh_decoder_is_silent_but_awake():
    "It starts as the frozen net, and yet the first step has a slope for the units: no two zeros in a row."
    torch.manual_seed(0)
    fields = Fields(awake(small_unet(16, attend=[1], sde=VPSDE(), target="x0")), 16, 4, 8).begin()
    xt, t, units = torch.randn(3, 3, 32, 32), torch.rand(3) * .8 + .1, torch.randn(3, 4, 8, requires_grad=True)
    assert torch.allclose(fields(xt, t, units), fields(xt, t), atol=1e-4)
    nn.init.normal_(fields.decoder.last[-1].weight, std=.01)
    fields.parts(xt, t, units)[1].square().sum().backward()
    assert (units.grad.abs().amax((0, 2)) > 0).all()

def test_a_net_of_another_kind_is_refused():
    "A decoder that starts from a net that predicts v would not start as that net."
    with pytest.raises(ValueError, match="expected a net that predicts x0, with its sde, found target 'v'"): Fields(small_unet(16, attend=[1], sde=VPSDE()), 16, 4, 8)
    with pytest.raises(ValueError, match="expected a net that predicts x0, with its sde"): Fields(small_unet(16, attend=[1], target="x0"), 16, 4, 8)
    with pytest.raises(ValueError, match="expected an extractor of colour images"): DisDiff(FeatureExtractor((1, 32, 32), 4, 8, 8, hidden=64, lift=None))

def test_fields_are_a_correction(model):
    xt, t, units = torch.randn(3, 3, 32, 32), torch.tensor([.2, .5, .9]), torch.randn(3, 4, 8)
    plain, change = model.net.parts(xt, t, units)
    a, s = (f(t)[:, None, None, None] for f in (model.sde.alpha, model.sde.sigma))
    g = a / s**2 * change.sum(1)
    with torch.no_grad(): assert torch.allclose(model.net(xt, t, units), model.net(xt, t) - s * g, atol=1e-4) and torch.allclose(model.sde.convert(model.net(xt, t), xt, t, "eps", "x0"), plain, atol=2e-3)

def test_each_unit_has_a_field_of_its_own(model):
    xt, t, units = torch.randn(3, 3, 32, 32), torch.rand(3), torch.randn(3, 4, 8)
    with torch.no_grad():
        _, change = model.net.parts(xt, t, units)
        for k in range(4):
            other = units.clone(); other[:, k] += 1
            moved = (model.net.parts(xt, t, other)[1] - change).flatten(2).abs().amax(2)
            assert (moved[:, k] > 1e-4).all() and (moved[:, [j for j in range(4) if j != k]] < 1e-5).all()
        same = model.net.parts(xt, t, units[:, :1].expand(-1, 4, -1))[1]
        assert (same[:, 0] - same[:, 1]).abs().max() > 1e-4                                        # units are told apart by their names
    with pytest.raises(ValueError, match="expected 4 units, found 5"): model.net.parts(xt, t, torch.randn(3, 5, 8))

@pytest.mark.parametrize("m", [0., .5, 2., 8.])
def test_loss_of_perfect_units(m):
    g = torch.Generator().manual_seed(0)
    target, way, which = torch.randn(20, 5, 7, generator=g), F.normalize(torch.randn(20, 5, 7, generator=g), dim=-1), torch.randint(5, (20,), generator=g)
    before = target - m * F.one_hot(which, 5)[..., None] * way
    loss = game_loss(before, target, target, which, torch.full((20,), 3.))
    assert abs(loss.item() - 3 * 2 * math.log(1 + 4 * math.exp(-m))) < 1e-4
    moved, nearer = tells(before, target, target)
    assert torch.allclose(moved, m * F.one_hot(which, 5).float(), atol=1e-5) and torch.allclose(nearer, moved, atol=1e-5)

def test_loss_asks_for_both():
    "Worse when others move too, and when the unit moves away from its target."
    g = torch.Generator().manual_seed(1); target, way, which, one = torch.randn(9, 4, 6, generator=g), F.normalize(torch.randn(9, 4, 6, generator=g), dim=-1), torch.arange(9) % 4, torch.ones(9)
    mine = F.one_hot(which, 4)[..., None]
    good = game_loss(target - 2 * mine * way, target, target, which, one)
    assert good < game_loss(target - 2 * mine * way, target + (1 - mine) * way, target, which, one) and good < game_loss(target, target - 2 * mine * way, target, which, one)

def test_a_still_round_has_a_finite_slope():
    z = torch.randn(4, 3, 5, requires_grad=True)
    game_loss(z.detach(), z, z.detach(), torch.zeros(4, dtype=torch.long), torch.ones(4)).backward()
    assert z.grad.isfinite().all()

def test_gradients_go_where_they_belong(model, x):
    model.train(); model.loss(x).backward()
    assert slope(model.net.net) == 0 < min(slope(model.net.decoder), slope(model.extractor))
    model.zero_grad(); game_loss(*model.game(x)[1:]).backward()
    assert slope(model.net.net) == 0 < min(slope(model.net.decoder), slope(model.extractor))
    assert model.extractor.trunk[0].weight.grad.abs().sum() > 0                                    # of the first reading, that of the true picture

def test_rereading_leaves_no_trace(model, x):
    model.train(); before = {k: v.clone() for k, v in model.extractor.state_dict().items()}
    pictures = to_float(x).requires_grad_()
    model.reread(pictures).sum().backward()
    assert pictures.grad.abs().sum() > 0 and slope(model.extractor) == 0 and model.extractor.training
    assert all(torch.equal(v, before[k]) for k, v in model.extractor.state_dict().items())
    assert torch.allclose(model.reread(to_float(x)), model.extractor.eval()(x), atol=1e-5)

def test_the_game_plays_the_unit_it_is_told(model, x):
    model.eval(); which = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    torch.manual_seed(0); *_, used, weight = model.game(x, which)
    assert torch.equal(used, which) and weight.shape == (8,) and (weight > 0).all()
    assert [0 <= v <= 1 for v in won(model, x)[:2]] == [True, True] and won(model, x) == won(model, x)

def test_without_the_game_only_the_noise_counts(model, x):
    model.eval(); model.weight = 0.
    torch.manual_seed(0); loss = model.loss(x)
    torch.manual_seed(0); assert torch.allclose(loss, model.game(x)[0].mean())

def test_skip_dropout_acts_on_the_decoder_alone(model, x):
    xt, t, units = torch.randn(8, 3, 32, 32), torch.rand(8), model.eval().encode(x)
    quiet = model.net.parts(xt, t, units)
    with SkipDropout(.5).attach(model.net.decoder):
        model.train(); loud = model.net.parts(xt, t, units)
        assert torch.equal(loud[0], quiet[0]) and not torch.equal(loud[1], quiet[1])
        assert torch.equal(model.eval().net.parts(xt, t, units)[1], quiet[1])
    assert not any(j.stage._forward_pre_hooks for j in joints(model.net.decoder))

def test_anchors_align_what_the_decoder_hears(x):
    torch.manual_seed(0); model = build(**SIZES, anchors="bounded", every=2).eval()
    data = rooms("cpu"); raw = model.extractor(data.sample(200, torch.Generator().manual_seed(1))[0]).detach()
    model.tidy.select(raw)
    assert not torch.equal(model.encode(x), model.encode(x, tidy=False))
    assert torch.equal(model.game(x)[3], model.extractor(x).detach())                              # the target is not aligned

def test_experiment(tmp_path):
    "All rows at smoke: a record, weights that load to the same units, one frozen net for all rows, stopped and gone on to the same weights."
    run = lambda folder, minutes=None, **kw: disdiff_experiment(Config("dyga/disdiff", "smoke", 0, minutes, tmp_path / folder), **kw)
    frozen, data = [], rooms("cpu")
    x = data.sample(8, torch.Generator().manual_seed(0))[0]
    for folder, kw in {"plain": {}, "both": dict(anchors="bounded", skip=.2)}.items():
        record = run(folder, **kw); record.save(tmp_path / folder)
        assert {"FactorVAE score", "DCI disentanglement, hist", "MIG", "rounds won by what moved"} <= set(record.metrics) and record.config["anchors"] == kw.get("anchors") and len(record.curves) == 2
        model = load_disdiff(record)
        assert model.encode(x).shape == (8, *(DISDIFF["smoke"][k] for k in ("units", "dim"))) and model.sample(model.encode(x), steps=2).shape == (8, 3, 32, 32)
        assert (model.tidy is not None and (model.tidy.counts > 0).all()) if kw else model.tidy is None
        frozen.append(torch.cat([p.flatten() for p in model.net.net.parameters()]))
    assert torch.equal(*frozen)
    from disdiff_tutorial.core import Unfinished
    with pytest.raises(Unfinished): run("pieces", 1e-6)
    run("pieces")
    a, b = (load_tensors(next((tmp_path / k).glob("*s0.safetensors")))[0] for k in ("pieces", "plain"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
