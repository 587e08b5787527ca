"The network: shapes, conditions, the seam, equal parameters for both outputs, and errors in one line."
import inspect
import pytest, torch
from disdiff_tutorial.diffusion import unet
from disdiff_tutorial.diffusion.sde import VESDE, VPSDE
from disdiff_tutorial.diffusion.unet import Attention, UNet

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
