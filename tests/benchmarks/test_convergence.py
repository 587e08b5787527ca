"""Seconds to an equal validation loss: our defaults beside the training loops that diffusers and denoising-diffusion-pytorch recommend.

Same data, batch, machine and noise schedule (DDPM's), the same measure for all: mean squared error of the predicted noise on held-out digits, current weights.
`make test` takes three steps of each; `make bench` races for BENCH_MINUTES (default 3) each and prints the curves' crossing."""
import os, time
import denoising_diffusion_pytorch as lucidrains, diffusers          # of the extra `peers`; without it this file fails
import pytest, torch
from torch.nn import functional as F
from disdiff_tutorial.core import Record, runs_dir, seed_everything, to_float
from disdiff_tutorial.data.files import mnist_or_digits
from disdiff_tutorial.diffusion.dsm import dsm_loss
from disdiff_tutorial.diffusion.sde import DDPM, like
from disdiff_tutorial.diffusion.training import Batches, fit
from disdiff_tutorial.diffusion.unet import UNet

SDE, WIDTH, BATCH, EVERY = DDPM(), 32, 64, 10

class Watch:
    "A stopwatch that stands still while it looks: seconds of training and held-out loss, every so many steps."
    def __init__(self, eps, held_out, seconds):
        self.eps, self.x, self.limit, self.seconds, self.step, self.curve, self.began = eps, held_out, seconds, 0., 0, [], time.perf_counter()
        g = torch.Generator().manual_seed(0)
        self.t, self.noise = torch.randint(1, 1001, (len(held_out),), generator=g) / 1000, torch.randn(held_out.shape, generator=g)
    def tick(self):
        "Count a step; look; True when the time is up."
        self.seconds, self.step = self.seconds + time.perf_counter() - self.began, self.step + 1
        if self.step % EVERY == 0 or self.limit == 0:
            with torch.no_grad(): loss = F.mse_loss(self.eps(SDE.perturb(self.x, self.t, self.noise), self.t), self.noise)
            self.curve.append((self.seconds, loss.item()))
        self.began = time.perf_counter()
        return self.seconds >= self.limit if self.limit else self.step >= 3

class Enough(Exception): pass

def race_ours(data, held_out, seconds, **kw):
    net = UNet(width=WIDTH, mults=(1, 2), blocks=2, sde=SDE, **kw)
    watch = Watch(net, held_out, seconds)
    def loss(x):
        if watch.step and watch.done: raise Enough
        value = dsm_loss(net, to_float(x), SDE)
        return value
    batches = Batches(data, size=BATCH)
    def get(step):
        watch.done = step > 0 and watch.tick()
        return batches(step)
    try: fit(loss, net, get, steps=10**6, progress=False)
    except Enough: pass
    return watch.curve

def race_diffusers(data, held_out, seconds):
    "The loop of diffusers' training tutorial: AdamW at 1e-4 with 500 steps of warm-up, clipping at 1, noise prediction."
    net = diffusers.UNet2DConditionModel(sample_size=28, in_channels=1, out_channels=1, block_out_channels=(WIDTH, 2 * WIDTH), layers_per_block=2, norm_num_groups=8, cross_attention_dim=16,
                                         down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type="UNetMidBlock2D")
    eps = lambda x, t: net(x, (1000 * t).round() - 1, torch.zeros(len(x), 1, 16)).sample
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1., step / 500))
    watch, batches, step = Watch(eps, held_out, seconds), Batches(data, size=BATCH), 0
    while True:
        x, t = to_float(batches(step)[0]), torch.randint(1, 1001, (BATCH,)) / 1000
        noise = torch.randn_like(x)
        F.mse_loss(eps(SDE.perturb(x, t, noise), t), noise).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.); optimiser.step(); schedule.step(); optimiser.zero_grad()
        step += 1
        if watch.tick(): return watch.curve

def race_lucidrains(data, held_out, seconds):
    "GaussianDiffusion with its defaults (v prediction) on the linear schedule, Adam at 1e-4 as in its Trainer."
    net = lucidrains.Unet(dim=WIDTH, dim_mults=(1, 2), channels=1)
    diffusion = lucidrains.GaussianDiffusion(net, image_size=28, beta_schedule="linear")
    def eps(x, t): return like(SDE.alpha(t), x) * net(x, (1000 * t).round() - 1) + like(SDE.sigma(t), x) * x       # v -> eps
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.99))
    watch, batches, step = Watch(eps, held_out, seconds), Batches(data, size=BATCH), 0
    while True:
        diffusion((to_float(batches(step)[0]) + 1) / 2).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.); optimiser.step(); optimiser.zero_grad()
        step += 1
        if watch.tick(): return watch.curve

def crossing(curve, level):
    "Seconds until the curve is at or below `level`, on a straight line between two looks; infinity if never."
    for (s, a), (t, b) in zip([(0., 1.)] + curve, curve):
        if b <= level: return t if a <= level else s + (t - s) * (a - level) / (a - b)
    return float("inf")

def note(record):
    "From the curves to the record: the loss at which the better peer ended, and how long each took to get there."
    level = min(record.curves[peer][-1][1] for peer in ("diffusers", "lucidrains"))
    record.add("loss of the better peer at the end", level, 500, "test")
    for name, curve in record.curves.items():
        if crossing(curve, level) < float("inf"): record.add(f"seconds to that loss, {name}", crossing(curve, level), 500, "test")
    return level

@pytest.mark.timeout(3600)
def test_race(request, monkeypatch):
    timed = not request.config.getoption("benchmark_disable")
    if not timed: monkeypatch.setitem(globals(), "BATCH", 8)
    seconds = 60 * float(os.environ.get("BENCH_MINUTES", 3)) if timed else 0
    train, held_out = mnist_or_digits("train"), to_float(mnist_or_digits("test").images[:500 if timed else 16])
    record = Record("benchmark/race", "cpu", 0, config=dict(width=WIDTH, batch=BATCH, data=train.name, seconds_each=seconds))
    for name, race in {"diffusers": race_diffusers, "lucidrains": race_lucidrains, "ours": race_ours, "ours, packed 2 x 2": lambda *a: race_ours(*a, stem=2)}.items():
        seed_everything(0)
        record.curves[name] = race(train.images, held_out, seconds)
        assert record.curves[name] and all(loss == loss for _, loss in record.curves[name])
        record.add(f"held-out loss at the end, {name}", record.curves[name][-1][1], len(held_out), "test")
    if not timed: return
    level = note(record)
    record.seconds = 4 * seconds
    print("\n" + "\n".join(f"{k:55s} {m['value']:9.4f}" for k, m in record.metrics.items()), "\n", record.save(os.environ.get("BENCH_OUT") or runs_dir()))
    assert crossing(record.curves["ours"], level) * 1.5 <= min(crossing(record.curves[peer], level) for peer in ("diffusers", "lucidrains"))

def test_crossing():
    assert crossing([(10., 0.5), (20., 0.25)], 0.375) == 15 and crossing([(10., 0.5)], 0.75) == 5 and crossing([(10., 0.5)], 0.1) == float("inf")
