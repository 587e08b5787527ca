"The network: shapes, conditions, the seam, equal parameters for both outputs, and errors in one line."
import inspect
import math
import pytest, torch
from disdiff_tutorial.diffusion import unet
from disdiff_tutorial.diffusion.sde import SubVPSDE, VESDE, VPSDE, like
from disdiff_tutorial.diffusion.unet import AdaGN, Attention, ResBlock, Stage, TimeEmbedding, UNet, norm

def awake(net):
    "Random weights everywhere: a fresh net answers 0."
    torch.manual_seed(0)
    for p in net.parameters(): torch.nn.init.normal_(p, std=0.1)
    return net.eval()

def test_under_two_hundred_lines(): assert len(inspect.getsource(unet).splitlines()) < 200

@pytest.mark.parametrize("kw,cond", [({}, None), (dict(cond_dim=5), (4, 5)), (dict(cond_dim=5, tokens=True), (4, 3, 5)), (dict(attend=(0, 1), mults=(1, 2)), None),
                                     (dict(stem=2, mults=(1, 1, 2)), None), (dict(channels=3, blocks=1, sde=VPSDE()), None), (dict(sde=VESDE()), None)])
def test_shapes(kw, cond):
    net = awake(UNet(**{"width": 16, **kw}))
    x, t = torch.randn(4, net.channels, 16, 24), torch.rand(4)
    with torch.no_grad(): out = net(x, t, None if cond is None else torch.randn(cond))
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 0

def test_fresh_net_answers_zero(): assert UNet(width=16)(torch.randn(2, 1, 8, 8), torch.rand(2)).abs().max() == 0

@pytest.mark.parametrize("tokens", [False, True])
def test_null_is_a_condition(tokens):
    net = awake(UNet(width=16, cond_dim=5, tokens=tokens)); x, t = torch.randn(4, 1, 8, 8), torch.rand(4)
    null = net.null.expand(4, 1, -1) if tokens else net.null.expand(4, -1)
    with torch.no_grad(): assert torch.equal(net(x, t), net(x, t, null)) and not torch.allclose(net(x, t), net(x, t, torch.zeros_like(null)))

def test_learned_null_is_what_none_means():
    net = awake(UNet(width=16, cond_dim=5)); x, t = torch.randn(4, 1, 8, 8), torch.rand(4)
    with torch.no_grad():
        before = net(x, t); net.null.mul_(2)
        assert not torch.allclose(net(x, t), before)

@pytest.mark.parametrize("coded", [False, True])
def test_adagn_is_the_formula(coded):
    "Score components (14), with t_s and zeta_s counted from 1."
    layer = awake(AdaGN(16, 12, 5 if coded else None)); h, temb, z = torch.randn(3, 16, 5, 7), torch.randn(3, 12), torch.randn(3, 5)
    t_s, t_b = (x[:, :, None, None] for x in layer.time(temb).chunk(2, 1))
    zeta = 1 + layer.code(z)[:, :, None, None] if coded else 1.
    wanted = zeta * ((1 + t_s) * layer.norm(h) + t_b)
    for h in (h, h.to(memory_format=torch.channels_last)): assert torch.allclose(layer(h, temb, z if coded else None), wanted, atol=1e-5)

def test_fresh_parts_change_nothing():
    h, temb, z = torch.randn(3, 16, 4, 4), torch.randn(3, 12), torch.randn(3, 5); layer = AdaGN(16, 12, 5)
    assert torch.allclose(layer(h, temb, z), layer.norm(h), atol=1e-6)
    assert torch.equal(ResBlock(16, 16, 12, 5)(h, temb, z), h) and torch.equal(Stage(16, 16, 12, None, True, 5)(h, temb, z[:, None]), h)

def test_groups(): assert [norm(c).num_groups for c in (4, 8, 36, 64, 128, 512)] == [1, 2, 1, 16, 32, 32]

def test_time_as_clocks():
    embed = TimeEmbedding(8); embed.mlp = torch.nn.Identity(); t = torch.tensor([0., .3, 1.])
    angles = 1000 * t[:, None] * torch.tensor([10_000 ** -(k / 4) for k in range(4)])
    assert torch.allclose(embed(t), torch.cat([angles.sin(), angles.cos()], 1), atol=1e-4)

def test_middle_attends_if_any_level_does():
    told = lambda **kw: UNet(width=16, mults=(1, 2), **kw).middle.attend is not None
    assert told(attend=(0,)) and told(attend=(1,)) and not told()
    assert [s[0].attend is not None for s in UNet(width=16, mults=(1, 2), attend=(0,)).down] == [True, False]

@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()], ids=["vp", "subvp", "ve"])
@pytest.mark.parametrize("target", ["v", "x0"])
def test_target_becomes_eps_outside(sde, target):
    "The layers see xt at the scale of the data, and what they answer, taken as `target`, gives the eps that the net hands out."
    net, t = awake(UNet(width=16, sde=sde, target=target)), torch.tensor([.1, .5, .9]); xt = like(sde.sigma(t), torch.randn(3, 1, 8, 8)) * torch.randn(3, 1, 8, 8)
    a, s = (like(f(t), xt) for f in (sde.alpha, sde.sigma))
    with torch.no_grad():
        answer = net.layers(xt / (a**2 + s**2).sqrt(), t, None)
        wanted = (s * xt + a * answer) / (a**2 + s**2) if target == "v" else (xt - a * answer) / s
        assert torch.allclose(net(xt, t), wanted, atol=1e-5, rtol=1e-4)

def test_unpacking_puts_pixels_back():
    net = awake(UNet(width=16, stem=2)); x = torch.arange(64.).view(1, 1, 8, 8)
    assert torch.equal(net.unpack(net.pack(x)), x) and net.pack(x).shape == (1, 4, 4, 4)

@pytest.mark.parametrize("channels,heads", [(16, 1), (48, 1), (64, 2), (100, 2), (112, 2), (200, 5), (224, 7)])
def test_heads_divide_the_channels(channels, heads):
    layer = Attention(channels); assert layer.heads == heads and layer(torch.randn(2, channels, 3, 3)).shape == (2, channels, 3, 3)

@pytest.mark.parametrize("kw,part", [(dict(width=0), "a width divisible by 4, found 0"), (dict(width=30), "a width divisible by 4"), (dict(mults=()), "each of mults at least 1"), (dict(blocks=0), "at least 1"),
                                     (dict(mults=(1, 0)), "at least 1"), (dict(stem=0), "at least 1"), (dict(channels=0), "at least 1"), (dict(attend=(2,)), "attention at levels from 0 to 1, found (2,)"),
                                     (dict(attend=[-1]), "attention at levels from 0 to 1"), (dict(tokens=[2], cond_dim=3), "tokens at levels from 0 to 1"), (dict(cond_dim=0), "cond_dim None or at least 1"),
                                     (dict(tokens=True), "cond_dim with tokens"), (dict(target="eps"), "target 'v' or 'x0'")])
def test_bad_sizes(kw, part):
    with pytest.raises(ValueError) as err: UNet(**kw)
    assert part in str(err.value) and "\n" not in str(err.value)

def test_no_token_at_all():
    with pytest.raises(ValueError, match="expected cond of shape .*, found \\(2, 0, 5\\)"): UNet(width=16, cond_dim=5, tokens=True)(torch.randn(2, 1, 8, 8), torch.rand(2), torch.zeros(2, 0, 5))

def test_images_do_not_mix():
    net = awake(UNet(width=16, attend=(1,), cond_dim=5)); x, t, z = torch.randn(4, 1, 8, 8), torch.rand(4), torch.randn(4, 5)
    with torch.no_grad(): assert torch.allclose(net(x, t, z)[1:2], net(x[1:2], t[1:2], z[1:2]), atol=1e-5)

def test_every_parameter_gets_a_gradient():
    net = awake(UNet(width=16, attend=(1,), cond_dim=5)).train()
    (net(torch.randn(4, 1, 8, 8), torch.rand(4), torch.randn(4, 5)).square().mean() + net(torch.randn(4, 1, 8, 8), torch.rand(4)).square().mean()).backward()
    assert not [k for k, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]

def test_each_skip_passes_its_own_seam():
    net = awake(UNet(width=16, mults=(1, 2, 2), blocks=2)); seen = []
    for i, skip in enumerate(net.skips): skip.register_forward_hook(lambda m, a, out, i=i: seen.append((i, out.shape[-1])))
    with torch.no_grad(): net(torch.randn(1, 1, 16, 16), torch.rand(1))
    assert [i for i, _ in seen] == list(reversed(range(len(net.skips)))) and [s for _, s in seen] == [4] * 3 + [8] * 3 + [16] * 3

def test_attention_is_the_formula():
    torch.manual_seed(0)
    layer = Attention(64, head=16); torch.nn.init.normal_(layer.out.weight, std=0.2); x = torch.randn(2, 64, 4, 4)
    pixels = layer.norm(x).flatten(2).transpose(1, 2)
    q, (k, v) = layer.q(pixels), layer.kv(pixels).chunk(2, -1)
    heads = [((q[..., i:i + 16] @ k[..., i:i + 16].mT) / 4).softmax(-1) @ v[..., i:i + 16] for i in range(0, 64, 16)]
    assert torch.allclose(layer(x), x + layer.out(torch.cat(heads, -1)).mT.reshape(2, 64, 4, 4), atol=1e-5)

@pytest.mark.parametrize("x,t,cond,part", [((2, 1, 8, 8), 2, (2, 4), "cond of shape (2, 5)"), ((2, 1, 7, 8), 2, None, "multiples of 2"), ((2, 3, 8, 8), 2, None, "xt (n, 1, H, W)"),
                                           ((2, 1, 8, 8), 3, None, "one time per image"), ((2, 8, 8), 2, None, "xt (n, 1, H, W)"), ((2, 1, 8, 8), 2, (2, 3, 5), "cond of shape (2, 5)")])
def test_bad_input(x, t, cond, part):
    net = UNet(width=16, cond_dim=5)
    with pytest.raises(ValueError) as err: net(torch.randn(x), torch.rand(t), None if cond is None else torch.randn(cond))
    assert part in str(err.value) and "\n" not in str(err.value)

@pytest.mark.parametrize("t", [[-.1, .5], [.5, 1.1], [3., 250.], [float("nan"), .5]])
def test_times_outside(t):
    with pytest.raises(ValueError, match="expected times t in \\[0, 1\\], found .*: divide steps by their number") as err: UNet(width=16)(torch.randn(2, 1, 8, 8), torch.tensor(t))
    assert "\n" not in str(err.value)

def test_cond_for_an_unconditional_net():
    with pytest.raises(ValueError, match="build the net with cond_dim"): UNet(width=16)(torch.randn(2, 1, 8, 8), torch.rand(2), torch.randn(2, 5))
