"""Our U-Net beside those of diffusers and denoising-diffusion-pytorch: equal width, depth, batch and process.

`make test` runs each once, untimed; `make bench` times them in turns and prints the ratios. Arithmetic is counted, since no two of these networks do exactly the
same: a rate is images/s times operations per image."""
import time
import pytest, torch
from torch.utils.flop_counter import FlopCounterMode
from disdiff_tutorial.diffusion.unet import UNet

diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
lucidrains = pytest.importorskip("denoising_diffusion_pytorch", reason="the extra `peers` is not installed")
WIDTH, SIZE, BATCH = 64, 32, 16

def ours(): return UNet(width=WIDTH, mults=(1, 2), blocks=2)
def ours_attending(): return UNet(width=WIDTH, mults=(1, 2), blocks=2, attend=(1,))

class Diffusers(torch.nn.Module):
    "diffusers' UNet2DConditionModel with plain blocks: two residual blocks a level and one in the middle, no attention."
    def __init__(self):
        super().__init__()
        self.net = diffusers.UNet2DConditionModel(
            sample_size=SIZE, in_channels=1, out_channels=1, block_out_channels=(WIDTH, 2 * WIDTH), layers_per_block=2, down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2, mid_block_type="UNetMidBlock2D", cross_attention_dim=16)
    def forward(self, x, t): return self.net(x, 1000 * t, torch.zeros(len(x), 1, 16)).sample

class Lucidrains(torch.nn.Module):
    "lucidrains' Unet: two residual blocks a level, linear attention at the first level, full attention at the last and in the middle."
    def __init__(self):
        super().__init__()
        self.net = lucidrains.Unet(dim=WIDTH, dim_mults=(1, 2), channels=1)
    def forward(self, x, t): return self.net(x, 1000 * t)

NETS = {"ours": ours, "ours, attending": ours_attending, "diffusers": Diffusers, "lucidrains": Lucidrains}

@pytest.fixture(scope="module")
def nets(): torch.manual_seed(0); return {name: make() for name, make in NETS.items()}

def batch(): torch.manual_seed(0); return torch.randn(BATCH, 1, SIZE, SIZE), torch.rand(BATCH)

def operations(net):
    "Floating-point operations of one evaluation, per image."
    with torch.no_grad(), FlopCounterMode(display=False) as count: net(*batch())
    return count.get_total_flops() / BATCH

def train(net):
    net.zero_grad(); net(*batch()).square().mean().backward()

def infer(net):
    with torch.no_grad(): net(*batch())

@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("work", [train, infer], ids=lambda f: f.__name__)
def test_rate(benchmark, nets, name, work):
    net = nets[name]
    benchmark.extra_info["GFLOP per image"] = operations(net) / 1e9
    benchmark.pedantic(work, args=(net,), rounds=5, warmup_rounds=1)
    if benchmark.enabled: benchmark.extra_info["images/s"] = BATCH / benchmark.stats.stats.min

def best_of(rounds, nets, work):
    "Seconds per batch of each network, the best of several rounds in turns, so that a busy moment hits none alone."
    best = dict.fromkeys(nets, float("inf"))
    for _ in range(rounds):
        for name, net in nets.items():
            began = time.perf_counter(); work(net); best[name] = min(best[name], time.perf_counter() - began)
    return best

def test_ratios(nets, request):
    timed = not request.config.getoption("benchmark_disable")
    for work in (train, infer):
        seconds, flops = best_of(8 if timed else 1, nets, work), {name: operations(net) * BATCH for name, net in nets.items()}
        speed = {name: flops[name] / seconds[name] / 1e9 * (3 if work is train else 1) for name in nets}
        peer = max(speed["diffusers"], speed["lucidrains"])
        print(f"\n{work.__name__}: " + "; ".join(f"{n} {BATCH / seconds[n]:.1f} images/s, {speed[n]:.0f} GFLOP/s" for n in nets))
        print(f"{work.__name__}: ours {speed['ours'] / peer:.2f} times the better peer at equal arithmetic, attending {speed['ours, attending'] / peer:.2f}")
        assert all(s > 0 for s in speed.values())
        if timed: assert speed["ours"] >= 0.97 * peer                         # a few percent are this machine's noise
