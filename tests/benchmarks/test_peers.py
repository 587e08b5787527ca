"""Our U-Net beside those of diffusers and denoising-diffusion-pytorch: equal width, depth, batch and process.

`make test` runs each once, untimed; `make bench` times them in turns, prints the ratios, and leaves a record. Arithmetic is counted, since no two of these networks
do exactly the same: a rate is images/s times operations per image."""
import os, subprocess, sys, time
from pathlib import Path
import denoising_diffusion_pytorch as lucidrains, diffusers          # of the extra `peers`; without it this file fails
import pytest, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from disdiff_tutorial.core import Record, runs_dir
from disdiff_tutorial.diffusion.unet import Attention, UNet
from disdiff_tutorial.run import PEAK

WIDTH, SIZE, BATCH = 64, 32, 16

def ours(): return UNet(width=WIDTH, mults=(1, 2), blocks=2)
def ours_attending():
    "Self-attention after each of the five blocks of the coarse level, as diffusers has it; not in the middle."
    net = UNet(width=WIDTH, mults=(1, 2), blocks=2, attend=(1,))
    net.middle.attend = None
    return net

class Diffusers(torch.nn.Module):
    "diffusers' UNet2DConditionModel: two residual blocks a level and one in the middle; with `attend`, self-attention after each block of the coarse level."
    def __init__(self, attend=False):
        super().__init__()
        kind = "Attn" if attend else ""
        self.net = diffusers.UNet2DConditionModel(
            sample_size=SIZE, in_channels=1, out_channels=1, block_out_channels=(WIDTH, 2 * WIDTH), layers_per_block=2, attention_head_dim=32,
            down_block_types=("DownBlock2D", f"{kind}DownBlock2D"), up_block_types=(f"{kind}UpBlock2D", "UpBlock2D"), mid_block_type="UNetMidBlock2D", cross_attention_dim=16)
    def forward(self, x, t): return self.net(x, 1000 * t, torch.zeros(len(x), 1, 16)).sample

class Lucidrains(torch.nn.Module):
    "lucidrains' Unet: two residual blocks a level, linear attention at the first level, full attention at the last and in the middle."
    def __init__(self):
        super().__init__()
        self.net = lucidrains.Unet(dim=WIDTH, dim_mults=(1, 2), channels=1)
    def forward(self, x, t): return self.net(x, 1000 * t)

NETS = {"ours": ours, "diffusers": Diffusers, "ours, attending": ours_attending, "diffusers, attending": lambda: Diffusers(True), "lucidrains, attending": Lucidrains}

@pytest.fixture(scope="module")
def nets(): torch.manual_seed(0); return {name: make() for name, make in NETS.items()}

def batch(): torch.manual_seed(0); return torch.randn(BATCH, 1, SIZE, SIZE), torch.rand(BATCH)

def operations(net):
    "Floating-point operations of one evaluation, per image. Attention is spelled out for it: the fused kernel of CPUs is not counted."
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count: net(*batch())
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

def kept(net):
    "Megabytes that one image keeps for the backward pass, weights left out: what training memory grows by."
    seen, weights = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}
    def note(x):
        if x.untyped_storage().data_ptr() not in weights: seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): out = net(*batch())
    return sum(seen.values()) / 2**20 / len(out)

def peaks(name):
    "Peak megabytes of a process of its own, with the network built and after one training step."
    child = f"import test_peers; net = test_peers.NETS[{name!r}]()\n{PEAK}\ntest_peers.train(net)\n{PEAK}"
    done = subprocess.run([sys.executable, "-c", child], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()[-2:]]

def shares(net):
    "Where the time of a training step goes: share of each kind of operator."
    kinds = {"convolution": "convolutions", "norm": "normalisation", "silu": "activations", "mm": "linear layers", "attention": "attention", "softmax": "attention", "bmm": "attention"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile: train(net)
    total, found = 0, dict.fromkeys([*kinds.values(), "the rest"], 0)
    for event in profile.key_averages():
        kind = next((kinds[k] for k in kinds if k in event.key.lower()), "the rest")
        found[kind] += event.self_cpu_time_total; total += event.self_cpu_time_total
    return {kind: t / total for kind, t in found.items()}

def best_of(rounds, nets, work):
    "Seconds per batch of each network, the best of several rounds in turns, so that a busy moment hits none alone."
    best = dict.fromkeys(nets, float("inf"))
    for _ in range(rounds):
        for name, net in nets.items():
            began = time.perf_counter(); work(net); best[name] = min(best[name], time.perf_counter() - began)
    return best

def test_attention_is_equal_and_counted(nets):
    plain, mine, theirs = (operations(nets[name]) for name in ("ours", "ours, attending", "diffusers, attending"))
    n, c = (SIZE // 2)**2, 2 * WIDTH                                          # pixels and channels of the coarse level
    assert sum(isinstance(m, Attention) for m in nets["ours, attending"].modules()) == 5
    assert mine - plain == 5 * (8 * n * c**2 + 4 * n**2 * c)                  # q, k, v, out; and the two products of attention
    assert mine == pytest.approx(theirs, rel=0.01)

@pytest.mark.timeout(3600)
def test_ratios(nets, request):
    timed = not request.config.getoption("benchmark_disable")
    record = Record("benchmark/unet", "cpu", 0, config=dict(width=WIDTH, size=SIZE, batch=BATCH))
    flops, rounds, began = {name: operations(net) for name, net in nets.items()}, 8 if timed else 1, time.perf_counter()
    for work in (train, infer):
        seconds = best_of(rounds, nets, work)
        rate = {name: BATCH / seconds[name] for name in nets}
        for name in nets: record.add(f"{work.__name__} images/s, {name}", rate[name], rounds, "best of rounds")
        for mine, peers in (("ours", ["diffusers"]), ("ours, attending", ["diffusers, attending", "lucidrains, attending"])):
            ratio = rate[mine] * flops[mine] / max(rate[p] * flops[p] for p in peers)
            record.add(f"{work.__name__} ratio at equal arithmetic, {mine}", ratio, rounds, "best of rounds")
            assert ratio > (0.98 if timed else 0)                             # 1, less two percent of noise
    for name, net in nets.items():
        record.add(f"GFLOP per image, {name}", flops[name] / 1e9, 1, "counted")
        record.add(f"MB kept per image, {name}", kept(net), BATCH, "counted")
    for name in nets if timed else ["ours"]:
        built, trained = peaks(name)
        record.add(f"peak MB before a training step, {name}", built, 1, "counted"); record.add(f"peak MB after it, {name}", trained, 1, "counted")
        assert trained >= built > 0
    for kind, share in shares(nets["ours, attending"]).items(): record.add(f"share of time, ours, {kind}", share, 1, "profiled")
    record.seconds = time.perf_counter() - began
    if timed: print("\n" + "\n".join(f"{k:55s} {m['value']:9.3f}" for k, m in record.metrics.items()), "\n", record.save(os.environ.get("BENCH_OUT") or runs_dir()))
