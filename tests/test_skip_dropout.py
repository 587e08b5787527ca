"Skip dropout: joints found in both kinds of network, (7) at the joint, clean hooks, errors in one line, and the experiment at smoke."
import copy
import pytest, torch
from disdiff_tutorial.core import Config
from disdiff_tutorial.data.scenes import rooms
from disdiff_tutorial.diffusion.sde import VPSDE
from disdiff_tutorial.diffusion.unet import UNet
from disdiff_tutorial.dyga.skip_dropout import VARIANTS, BackboneDropout, SkipDropout, at_joints, bernoulli, errors, joints, probe, skips_experiment, tokens

def awake(net):
    "Random weights everywhere: a fresh net answers 0."
    torch.manual_seed(0)
    for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
    return net.train()

def ours(**kw): return awake(UNet(3, 16, (1, 2, 2), 2, cond_dim=5, **{"tokens": [0, 1], **kw}))

def theirs(layers=1, middle="UNetMidBlock2DCrossAttn"):
    diffusers = pytest.importorskip("diffusers")
    return awake(diffusers.UNet2DConditionModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 24, 32), layers_per_block=layers, norm_num_groups=4, cross_attention_dim=5, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), mid_block_type=middle))

def call(net, n=3, seed=0):
    g = torch.Generator().manual_seed(seed); x, t, cond = torch.randn(n, 3, 16, 16, generator=g), torch.rand(n, generator=g), torch.randn(n, 4, 5, generator=g)
    with torch.no_grad(): return net(x, t, cond) if isinstance(net, UNet) else net(x, 1000 * t, cond).sample

NETS = pytest.mark.parametrize("make", [ours, lambda: ours(stem=2), theirs, lambda: theirs(2), lambda: theirs(1, None)], ids=["ours", "stem", "diffusers", "two layers", "no middle"])
DROPS = pytest.mark.parametrize("Dropout", [SkipDropout, BackboneDropout])

def listen(net, run):
    "What each joint receives during `run`, after all hooks hung so far."
    seen = {}
    hooks = [j.stage.register_forward_pre_hook(lambda m, a, i=i: seen.update({i: a[0].clone()})) for i, j in enumerate(joints(net))]
    run()
    for hook in hooks: hook.remove()
    return seen

@NETS
def test_joints_take_what_they_say(make):
    net = make().eval(); seen = listen(net, lambda: call(net)); found = joints(net)
    assert [seen[i].shape[1] for i in range(len(found))] == [j.backbone + j.skip for j in found]
    sides = [seen[i].shape[-1] for i in range(len(found))]
    assert sides == [sides[0] // 2 ** j.level for j in found] and [j.level for j in found] == sorted(j.level for j in found)

def test_joints_are_the_seams():
    net, seam = ours(), {}
    hooks = [s.register_forward_hook(lambda m, a, out, i=i: seam.update({i: out})) for i, s in enumerate(net.skips)]
    seen = listen(net, lambda: call(net))
    for hook in hooks: hook.remove()
    assert all(torch.equal(seen[i][:, j.backbone:], seam[i]) for i, j in enumerate(joints(net)))

def test_joints_of_diffusers_are_its_skips():
    net, kept = theirs(2), []
    hooks = [b.register_forward_pre_hook(lambda m, a, kw: kept.extend(reversed(kw["res_hidden_states_tuple"])), with_kwargs=True) for b in net.up_blocks]
    seen = listen(net, lambda: call(net))
    for hook in hooks: hook.remove()
    assert len(kept) == len(joints(net)) and all(torch.equal(seen[i][:, j.backbone:], kept[-1 - i]) for i, j in enumerate(joints(net)))

def test_crossed_is_read_off_the_net():
    assert [j.crossed for j in joints(ours())] == [True] * 6 + [False] * 3 and [j.crossed for j in joints(theirs())] == [True] * 4 + [False] * 2
    assert not any(j.crossed for j in joints(ours(tokens=False)))

@DROPS
@NETS
def test_clean(make, Dropout):
    "Acts in training mode alone, leaves the state_dict, and is bitwise gone after detach, also after an error inside `with`."
    net = make(); keys, plain = list(net.state_dict()), call(net)
    with pytest.raises(KeyError), Dropout(.5, "all").attach(net):
        assert not torch.equal(call(net), plain) and not torch.equal(call(net), call(net))
        assert list(net.state_dict()) == keys and torch.equal(call(net.eval()), plain)
        net.train(); raise KeyError
    assert torch.equal(call(net), plain) and not any(j.stage._forward_pre_hooks for j in joints(net))

@DROPS
@pytest.mark.parametrize("rescale", [True, False])
@NETS
def test_equation_7(make, Dropout, rescale):
    "At the first joint on the way up nothing was dropped before: one half is untouched, of the other whole channels of each image are gone."
    net = make(); last = len(joints(net)) - 1; j = joints(net)[last]; before = listen(net, lambda: call(net))[last]
    with Dropout(.4, "all", rescale).attach(net): after = listen(net, lambda: call(net))[last]
    cut = lambda x: x.split([j.backbone, j.skip], 1)[:: 1 if Dropout is SkipDropout else -1]
    (same, hit), (same2, hit2) = cut(before), cut(after)
    m = (hit2.flatten(2).abs().amax(2) > 0).float()[..., None, None]
    assert torch.equal(same, same2) and torch.allclose(hit2, hit * m / (.6 if rescale else 1)) and 0 < m.mean() < 1
    assert len(m.flatten(1).unique(dim=0)) == len(m)                                               # drawn for each image

def test_mask():
    torch.manual_seed(0); x = torch.randn(4000, 8, 3, 3)
    for rate in (.1, .5):
        m = bernoulli(x, rate, rescale=False); n = m.numel()
        assert m.shape == (4000, 8, 1, 1) and set(m.unique().tolist()) == {0., 1.} and abs(m.mean() - 1 + rate) < 4 * (rate * (1 - rate) / n) ** .5
        assert abs(bernoulli(x, rate).mean() - 1) < 4 * (rate / (1 - rate) / n) ** .5
    assert bernoulli(x, 1.).abs().max() == 0 and bernoulli(x, 0.).min() == 1 and bernoulli(x.double(), .2).dtype == torch.float64 and bernoulli(x.half(), .2).dtype == torch.float16

def test_rate_one_cuts_and_rate_zero_does_nothing():
    net = ours(); plain = call(net)
    with SkipDropout(0., "all").attach(net): assert torch.equal(call(net), plain)
    hooks = [s.register_forward_hook(lambda m, a, out: torch.zeros_like(out)) for s in net.skips]; cut = call(net)
    for hook in hooks: hook.remove()
    with SkipDropout(1., "all").attach(net): assert torch.allclose(call(net), cut, atol=1e-5)

@pytest.mark.parametrize("levels,chosen", [((0, 1), {0, 1}), ("all", {0, 1, 2}), ("free", {2}), ([2], {2})])
def test_levels(levels, chosen):
    for net in (ours(), theirs()): assert {j.level for j in SkipDropout(levels=levels).choose(net)} == chosen

def test_table_8():
    net = UNet(3, 64, (1, 2, 4, 4), 2, cond_dim=32, tokens=[0, 1, 2])
    share = lambda levels: sum(j.skip * 4 ** (4 - j.level) for j in SkipDropout(levels=levels).choose(net))
    assert (share("free"), share((0, 1)), share("all")) == (3072, 69_632, 82_944)

def test_gradients_follow_the_mask():
    net = ours()
    with SkipDropout(1., "all").attach(net): net(torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 4, 5)).square().mean().backward()
    j = joints(net)[0]; g = j.stage.block.short.weight.grad
    assert g[:, j.backbone:].abs().max() == 0 < g[:, :j.backbone].abs().max()

def test_under_gradient_checkpointing():
    net = theirs(); net.enable_gradient_checkpointing(); x, cond = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 5)
    grads = []
    for on in (True, False):
        (net.enable_gradient_checkpointing if on else net.disable_gradient_checkpointing)(); net.zero_grad(); torch.manual_seed(3)
        with SkipDropout(.5, "all").attach(net): net(x, 5, cond).sample.square().mean().backward()
        grads.append(net.conv_in.weight.grad.clone())
    assert torch.allclose(*grads, rtol=1e-4)                                                       # the same mask when a block is computed again

def test_copies():
    "A copy of a network with dropout has it, too; the copy stays in place when the original is freed."
    net = ours()
    with SkipDropout(.5, "all").attach(net): twin = copy.deepcopy(net)
    assert not torch.equal(call(twin), call(twin)) and torch.equal(call(net), call(net)) and torch.equal(call(twin.eval()), call(net))

def test_both_kinds_together():
    net = ours()
    with SkipDropout(.2).attach(net), BackboneDropout(.1).attach(net): assert not torch.equal(call(net), call(net))
    assert not any(j.stage._forward_pre_hooks for j in joints(net))

def test_attach_again_after_detach():
    net, dropout = ours(), SkipDropout(.2)
    for _ in range(2): assert dropout.attach(net) is dropout; dropout.detach()
    dropout.detach()

@pytest.mark.parametrize("do,part", [
    (lambda: SkipDropout(1.5), "expected a rate from 0 to 1, found 1.5"), (lambda: SkipDropout(-.1), "expected a rate from 0 to 1, found -0.1"), (lambda: SkipDropout(float("nan")), "found nan"),
    (lambda: SkipDropout(levels="coarse"), "found 'coarse'"), (lambda: SkipDropout(levels=[]), "found []"), (lambda: SkipDropout(levels=1), "expected levels as a list of numbers, 'all' or 'free', found 1"), (lambda: SkipDropout(levels=None), "found None"), (lambda: SkipDropout(levels=[0, 5]).attach(ours()), "expected levels from 0 to 2, found [0, 5]"),
    (lambda: SkipDropout(levels="free").attach(ours(tokens=True)), "cross-attention at all levels"), (lambda: SkipDropout().attach(torch.nn.Linear(2, 2)), "found Linear")])
def test_bad_arguments(do, part):
    with pytest.raises(ValueError) as err: do()
    assert part in str(err.value) and "\n" not in str(err.value)

def test_twice():
    net, dropout = ours(), SkipDropout(.2).attach(ours())
    with SkipDropout(.2, [0]).attach(net), pytest.raises(RuntimeError, match="expected a network without skip dropout, found one that has it: detach the first"): SkipDropout(.2, [1]).attach(net)
    with pytest.raises(RuntimeError, match="detach the first"): dropout.attach(net)                # one object, two networks
    assert not any(j.stage._forward_pre_hooks for j in joints(net))

def test_tokens():
    data = rooms("cpu"); f = data.grid.factors(torch.arange(len(data.grid))); notes = tokens(f, data.grid)
    assert notes.shape == (4000, 4, 14) and len(notes.flatten(1).unique(dim=0)) == 4000 and (notes.sum((1, 2)) == 8).all()

def test_probe():
    g = torch.Generator().manual_seed(0); y = torch.stack([torch.randint(10, (2400,), generator=g), torch.randint(4, (2400,), generator=g)], 1)
    x = torch.nn.functional.one_hot(y[:, 1], 4).float() @ torch.randn(4, 20, generator=g)
    first, second = probe(x[:2000], y[:2000], x[2000:], y[2000:]).tolist()
    assert second == 1 and abs(first) < .1

def test_errors_share_their_noise():
    net = UNet(3, 8, (1, 2), 1, cond_dim=14, tokens=True, sde=VPSDE())
    awake(net).eval(); x, cond = torch.randn(4, 3, 8, 8), torch.randn(4, 4, 14)
    (t, a, b), = errors(net, x, [cond, cond], (.3,)); assert a == b and abs(t - .3) < 1e-6
    assert errors(net, x, [cond], (.3,), seed=1)[0][1] != a

def test_at_joints_leaves_no_hooks():
    net = ours()
    with pytest.raises(ValueError): at_joints(net, torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 4, 6))
    assert not any(j.stage._forward_pre_hooks for j in joints(net))
    seen = at_joints(net, torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 4, 5), side=2)
    assert [(b.shape[1], s.shape[1]) for b, s in seen] == [(4 * j.backbone, 4 * j.skip) for j in joints(net)]

def test_experiment(tmp_path, monkeypatch):
    "At smoke: a whole record, no file left behind; killed half-way it goes on to the same numbers."
    run = lambda folder: skips_experiment(Config("dyga/skips", "smoke", 0, None, folder))
    record = run(tmp_path / "a")
    assert set(record.metrics) == {f"{v}{d}, {k}" for v in VARIANTS for d in ("", ", dropping") for k in ("right", "wrong", "null")} and not [p for p in (tmp_path / "a").rglob("*") if p.is_file()]
    from disdiff_tutorial.dyga import skip_dropout
    look = skip_dropout.look
    def killed(record, name, *rest): look(record, name, *rest); assert name != "skip 0.2"
    monkeypatch.setattr(skip_dropout, "look", killed)
    with pytest.raises(AssertionError): run(tmp_path / "b")
    monkeypatch.setattr(skip_dropout, "look", look)
    assert run(tmp_path / "b").metrics == record.metrics
