"""What a GPU does: the three goals of the chapter on performance, in up to five ways; our training loop beside those of diffusers and lucidrains; pictures, scores, anchors and Inception's features on the device.

`PYTHONPATH=. python tests/benchmarks/test_gpu.py --out DIR` on a machine with a GPU that nobody else uses: each part in a process of its own, timed one after the other, written to the record `benchmark/gpu`; with names of parts, these alone.
`make test` goes through each part once with tiny sizes, untimed, to see that it runs."""
import argparse, contextlib, fcntl, json, os, subprocess, sys, tempfile, time
from pathlib import Path
from unittest import mock
import pytest, torch
from torch.nn import functional as F
from disdiff_tutorial.core import Record, arguments, device, to_uint8
from disdiff_tutorial.data.scenes import Scenes
from disdiff_tutorial.data.sprites import Sprites
from disdiff_tutorial.diffusion.dsm import dsm_loss
from disdiff_tutorial.diffusion.sde import VPSDE
from disdiff_tutorial.diffusion.training import counted, fit
from disdiff_tutorial.diffusion.unet import UNet
from disdiff_tutorial.dyga.anchoring import DyGA
from disdiff_tutorial.dyga.latent_diffusion import FeatureExtractor, LatentDiffusion, VQGAN
from disdiff_tutorial.lcgdm.factorvae import FactorVAE, learn_together, printed
from disdiff_tutorial.lcgdm.latent_guidance import LCGDM, draw_many
from disdiff_tutorial.metrics import disentanglement, quality

TINY = not torch.cuda.is_available()
VARIABLES = "DISDIFF_GRAPHS", "DISDIFF_COMPILE"
WAYS = {"float32": (), "bf16": (), "bf16, compiled": VARIABLES[1:], "bf16, recorded": VARIABLES[:1], "bf16, both": VARIABLES}
SDE = VPSDE()

@contextlib.contextmanager
def alone():
    "Inside, no other part of this benchmark is being timed."
    path = os.environ.get("BENCH_LOCK")
    with open(path, "w") if path else contextlib.nullcontext() as file:
        if file: fcntl.flock(file, fcntl.LOCK_EX)
        if not TINY: torch.cuda.synchronize()
        yield

def seconds(work, times=3):
    "Seconds of work(), the best of several times after one to warm up."
    work(); best = float("inf")
    with alone():
        for _ in range(1 if TINY else times):
            began = time.perf_counter(); work()
            if not TINY: torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    return best

def rate(train, few):
    "Steps a second of train(steps) -> `Fit`, the lower of two measurements between 2 few and 6 few steps; what a call needs to begin cancels."
    def once(): short, long = train(2 * few), train(6 * few); return (long.steps - short.steps) / max(long.seconds - short.seconds, 1e-9)
    with alone(): train(2 * few); return min(once(), once())

def told(variables):
    "Name this benchmark's family in these of the variables, and in no other."
    for v in VARIABLES: os.environ[v] = "bench" if v in variables else ""

def without_halves(way):
    "Inside, nothing runs in bf16, if the way is float32."
    return mock.patch("torch.autocast", lambda *a, **kw: contextlib.nullcontext()) if way == "float32" else contextlib.nullcontext()

def in_all_ways(name, train, few, images, ways=WAYS):
    "Steps a second of a training in each of `ways`, its GFLOP an image, and the memory it takes."
    out, sound = {}, []
    for way, variables in ways.items():                                # what takes long to compile is compiled before anything is timed
        told(variables)
        try:
            with without_halves(way): train(few)
            sound.append(way)
        except Exception as err: print(f"{name}, {way}: {err}", file=sys.stderr); break          # a recording that fails spoils its process
    for way in sound:
        told(ways[way])
        if not TINY: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        with without_halves(way): out[f"steps/s, {name}, {way}"] = rate(train, few)
        if not TINY: out[f"peak MB, {name}, {way}"] = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps(out), flush=True)
    return out | {f"images a step, {name}": images, f"GFLOP an image, {name}": train(1).flop / 1e9}

def pictures(n, c=3, side=64): return torch.randint(0, 256, (n, c, side, side), dtype=torch.uint8, device=device())

def latent():
    "The networks of DyGA's tables 7 to 9, batch 512; the untrained VQ-GAN costs what a trained one does."
    kind = dict(width=16, mults=[1, 2], blocks=1, attend=[1]) if TINY else dict(width=64, mults=[1, 2, 4, 4], blocks=2, attend=[0, 1, 2])
    model, x = LatentDiffusion(FeatureExtractor((3, 64, 64)), VQGAN(), **kind).to(device()), pictures(2 if TINY else 512)
    return in_all_ways("latent diffusion", lambda steps: fit(model.loss, model, lambda step: (x,), steps=steps, graph="bench", progress=False), 1 if TINY else 4, len(x))

def factorvae():
    "FactorVAE with its published networks, 64 + 64 pictures; alone, and five models of a table side by side."
    model, x = FactorVAE().to(device()), pictures(4 if TINY else 128, 1)
    found, few = in_all_ways("FactorVAE", lambda steps: fit(model.loss, model, lambda step: (x,), steps=steps, ema=0, graph="bench", progress=False), 1 if TINY else 50, len(x), {way: WAYS[way] for way in ("float32", "bf16", "bf16, recorded")}), 1 if TINY else 50
    data, models = Sprites(64), [build().to(device()) for build, _ in printed((1, 64, 64), 737_280).values()]
    os.environ["DISDIFF_GRAPHS"] = "together"
    return found | {"steps/s, five autoencoders side by side, bf16, recorded": rate(lambda steps: learn_together(models, data, steps, 4 if TINY else 64, progress=False), few)}

def ours(blocks=2): return UNet(3, width=16, mults=(1, 2), blocks=1) if TINY else UNet(3, width=64, mults=(1, 2, 2, 2), blocks=blocks, attend=(3,))

def unet():
    "A U-Net for 64 x 64 pixels, batch 256."
    net, x = ours().to(device()), pictures(2 if TINY else 256)
    return in_all_ways("U-Net 64 x 64", lambda steps: fit(lambda x: dsm_loss(net, x / 127.5 - 1, SDE), net, lambda step: (x,), steps=steps, graph="bench", progress=False), 1 if TINY else 4, len(x)) | {"million weights, U-Net 64 x 64": sum(p.numel() for p in net.parameters()) / 1e6}

class Theirs(torch.nn.Module):
    "Our U-Net as GaussianDiffusion of lucidrains wants it, times from 0 to 999."
    channels, self_condition, random_or_learned_sinusoidal_cond, out_dim = 3, False, False, 3
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x, t, *_): return self.net(x, t / 1000)

def diffusers_loop(net, x):
    "The loop of diffusers' example for unconditional training, in bf16: DDPM's scheduler, AdamW, clipping, warm-up, its EMA, the loss read at each step."
    import diffusers
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    acc, scheduler, optimiser = Accelerator(mixed_precision="no" if TINY else "bf16", cpu=TINY), diffusers.DDPMScheduler(), torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(.95, .999), weight_decay=1e-6)
    schedule, average = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1., step / 500)), EMAModel(net.parameters(), decay=.9999, use_ema_warmup=True)
    net, optimiser, schedule = acc.prepare(net, optimiser, schedule); average.to(x.device)
    def step():
        clean = x / 127.5 - 1
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (len(x),), device=x.device)
        loss = F.mse_loss(net(scheduler.add_noise(clean, noise, t), t).float(), noise)
        acc.backward(loss); acc.clip_grad_norm_(net.parameters(), 1.)
        optimiser.step(); schedule.step(); optimiser.zero_grad(); average.step(net.parameters())
        return loss.detach().item()
    return step

def lucidrains_loop(net, x):
    "The loop of lucidrains' Trainer, in bf16: GaussianDiffusion, Adam, clipping, its EMA every tenth step, the loss read at each step."
    import denoising_diffusion_pytorch as lucidrains
    from accelerate import Accelerator
    from ema_pytorch import EMA
    acc, diffusion = Accelerator(mixed_precision="no" if TINY else "bf16", cpu=TINY), lucidrains.GaussianDiffusion(net, image_size=x.shape[-1]).to(x.device)
    optimiser, average = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(.9, .99)), EMA(diffusion, beta=.995, update_every=10).to(x.device)
    diffusion, optimiser = acc.prepare(diffusion, optimiser)
    def step():
        with acc.autocast(): loss = diffusion(x / 255)
        value = loss.item()
        acc.backward(loss); acc.clip_grad_norm_(diffusion.parameters(), 1.)
        optimiser.step(); optimiser.zero_grad(); average.update()
        return value
    return step

class OfDiffusers(torch.nn.Module):
    "diffusers' UNet2DModel with the widths, depths and places of attention of `ours`."
    def __init__(self):
        import diffusers
        super().__init__()
        widths, kinds = ((16, 32), ["", ""]) if TINY else ((64, 128, 128, 128), ["", "", "", "Attn"])
        self.net = diffusers.UNet2DModel(sample_size=64, in_channels=3, out_channels=3, layers_per_block=1 if TINY else 2, block_out_channels=widths, attention_head_dim=32, norm_num_groups=8,
                                         down_block_types=[f"{k}DownBlock2D" for k in kinds], up_block_types=[f"{k}UpBlock2D" for k in kinds[::-1]])
    def forward(self, x, t): return self.net(x, t).sample

def peers():
    "Images a second of training loops: theirs around our network and around their own, ours around ours; batch 128."
    import denoising_diffusion_pytorch as lucidrains
    x = pictures(2 if TINY else 128)
    own = lambda: lucidrains.Unet(dim=16, dim_mults=(1, 2)) if TINY else lucidrains.Unet(dim=64, dim_mults=(1, 2, 2, 2))
    loops = {"diffusers' loop, our network": lambda: diffusers_loop(Theirs(ours()).to(x.device), x), "diffusers' loop, its network": lambda: diffusers_loop(OfDiffusers().to(x.device), x),
             "lucidrains' loop, our network": lambda: lucidrains_loop(Theirs(ours()), x), "lucidrains' loop, its network": lambda: lucidrains_loop(own(), x)}
    net, out = ours().to(device()), {}
    train = lambda steps: fit(lambda x: dsm_loss(net, x / 127.5 - 1, SDE), net, lambda step: (x,), steps=steps, graph="bench", progress=False)
    sound = []
    for way, variables in list(WAYS.items())[1:]:                                  # compiled before anything is timed
        told(variables)
        try: train(5); sound.append(way)
        except Exception as err: print(f"our loop, {way}: {err}", file=sys.stderr); break
    told(())
    for name, make in loops.items():
        step = make(); step()
        out[f"images/s, {name}"] = len(x) * (1 if TINY else 20) / seconds(lambda: [step() for _ in range(1 if TINY else 20)], 2); print(json.dumps(out), flush=True)
    t = torch.zeros(len(x), device=x.device)
    for name, other in (("ours", Theirs(ours())), ("diffusers'", OfDiffusers()), ("lucidrains'", own())):
        other = other.to(x.device); out[f"GFLOP an image, there, {name} network"] = counted(lambda: other(x / 127.5 - 1, t))[1] / len(x) / 1e9
    for way in sound:
        told(WAYS[way])
        out[f"images/s, our loop, our network, {way}"] = len(x) * rate(train, 1 if TINY else 5); print(json.dumps(out), flush=True)
    return out

def scoring():
    "Seconds of the scores that are tensor code, of 10 codes of 10,000 drawings of the scenes, on the processor and on the device; FactorVAE's score draws its pictures, here rows of a table."
    n, votes, out = (200, (40, 20), {}) if TINY else (10_000, (10_000, 5_000), {})
    for where in ("cpu", "cuda"):
        if where == "cuda" and TINY: continue
        data = Scenes(64, device=where); f = data.grid.sample(n, torch.Generator().manual_seed(0)).to(where); z = f.float() @ torch.randn(f.shape[1], 10, generator=torch.Generator().manual_seed(1)).to(where)
        for name, work in {"MIG": lambda: disentanglement.mig(z, f), "modularity": lambda: disentanglement.modularity(z, f), "Pearson MCC": lambda: disentanglement.mcc(z, f), "FactorVAE score, pooled": lambda: disentanglement.factorvae_pooled(z, f, z, f, votes)}.items():
            out[f"seconds, {name}, {'GPU' if where == 'cuda' else f'{torch.get_num_threads()} threads'}"] = seconds(work)
    return out

def anchors():
    "Seconds to select anchors of 20 units of 50,000 features, as in test_selection, after a selection to warm up."
    from test_selection import lifted
    x = torch.stack([lifted(200 if TINY else 50_000, seed) for seed in range(2 if TINY else 20)], 1).to(device())
    select = lambda seed: DyGA(x.shape[1], 32, "bounded").to(device()).select(x, torch.Generator().manual_seed(seed))
    return {"seconds, anchors of 20 units of 50,000 features": seconds(lambda: select(0), 1), "anchors of a unit, at most": float(select(0).counts.max())}

def drawing():
    "Pictures rendered a second, and looked at by Inception where it is at hand."
    out = {}
    for name, data in (("sprites", Sprites(64)), ("scenes", Scenes(64))):
        f = data.grid.sample(100 if TINY else 50_000, torch.Generator().manual_seed(0)).to(data.device); data.images(f[:10])
        out[f"pictures/s, {name} 64 x 64"] = len(f) / seconds(lambda: data.images(f))
    if not TINY and quality.at_hand():
        torch.set_float32_matmul_precision("high"); torch.backends.cudnn.benchmark = True
        net, x = quality.inception(device=device()), data.images(f[:5000])
        out["pictures/s, Inception's features"] = len(x) / seconds(lambda: quality.features(x, net, batch=250), 1)
    return out

def judging():
    "Seconds to draw 50,000 sprites by LCG-DM and to take their FID to as many true ones, where Inception is at hand. An untrained net takes as long as a trained one."
    n, data = 20 if TINY else 50_000, Sprites(64)
    model, size = LCGDM(FactorVAE(data.shape), data.shape, 10, width=16 if TINY else 64).to(device()).eval(), 10 if TINY else 500
    def draw(n): g = torch.Generator().manual_seed(0); return draw_many(model, model.prior(n, g), 1., g, 2 if TINY else 20, size)
    os.environ[VARIABLES[1]] = "guidance"
    if not TINY: torch.set_float32_matmul_precision("high"); torch.backends.cudnn.benchmark = True
    draw(size); out = {}
    with alone():
        began = time.perf_counter(); x = draw(n)
        if not TINY: torch.cuda.synchronize()
        out[f"seconds, {n:,} samples"] = time.perf_counter() - began
        if not TINY and quality.at_hand(): quality.note_quality(Record("benchmark/fid", "gpu", 0), {"prior": x}, data.sample(n, torch.Generator().manual_seed(0))[0]); out[f"seconds, {n:,} samples and their FID and KID"] = time.perf_counter() - began
    return out

def profile():
    "Where a recorded step of three trainings of the book spends its time, compiled and not: milliseconds of all kernels, how many there are, and those of the dearest, per step, on the screen."
    from disdiff_tutorial.dyga import latent_diffusion
    from disdiff_tutorial.lcgdm.factorvae import VAE
    vae, scene, guided = VAE().to(device()), latent_diffusion.build(**arguments(latent_diffusion.build, latent_diffusion.SCENES["smoke" if TINY else "gpu"])).to(device()), LCGDM(FactorVAE(), (1, 64, 64), 10, width=16 if TINY else 64).to(device())
    rows, steps, out = 2 if TINY else 256, 2 if TINY else 20, {}
    kinds = {("VAE", "bf16, recorded"): (vae, vae.loss, pictures(2 if TINY else 64, 1))} | {(name, way): what for way in ("bf16, recorded", "bf16, both") for name, what in {"guidance": (guided.net, lambda x: guided.loss(x, .1), pictures(rows, 1)), "units": (scene, scene.loss, pictures(2 * rows))}.items()}
    def train(kind, steps=steps): model, loss, x = kinds[kind]; told(WAYS[kind[1]]); return fit(loss, model, lambda step: (x,), steps=steps, graph="bench", progress=False)
    for kind in kinds: train(kind, 5)                                   # compiled before anything is timed
    for kind in kinds:
        name, pace = ", ".join(kind), rate(lambda steps: train(kind, steps), steps // 2)
        with alone():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU if TINY else torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen: train(kind)
        spent = lambda e: e.self_cpu_time_total if TINY else e.self_device_time_total
        table = sorted(seen.key_averages(), key=spent, reverse=True)
        out |= {f"ms a step, {name}": 1e3 / pace, f"ms of kernels a step, {name}": sum(map(spent, table)) / 1e3 / steps, f"kernels a step, {name}": sum(e.count for e in table) / steps}
        print("\n".join(f"{name}: {spent(e) / 1e3 / steps:8.3f} ms, {e.count / steps:6.1f} times, {e.key[:90]}" for e in table[:14]), file=sys.stderr); print(json.dumps(out), flush=True)
    return out

PARTS = {f.__name__: f for f in (latent, factorvae, unet, peers, scoring, anchors, drawing, judging, profile)}

@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", PARTS)
def test_part_runs(part, monkeypatch):
    for v in VARIABLES: monkeypatch.setenv(v, "")
    found = PARTS[part]()
    assert found and all(v > 0 for v in found.values())

def main():
    parser = argparse.ArgumentParser(); parser.add_argument("parts", nargs="*", default=list(PARTS)); parser.add_argument("--out", type=Path, required=True); parser.add_argument("--here", action="store_true"); parser.add_argument("--limit", type=float, default=150.)
    args = parser.parse_args()
    if args.here: print(json.dumps(PARTS[args.parts[0]]()), flush=True); return
    began, lock = time.monotonic(), tempfile.NamedTemporaryFile()
    children = {p: subprocess.Popen([sys.executable, __file__, p, "--here", "--out", str(args.out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"BENCH_LOCK": lock.name} | os.environ) for p in args.parts}
    record = Record("benchmark/gpu", "gpu", 0, config=dict(parts=args.parts, torch=torch.__version__))
    for part, child in children.items():
        try: said, complaint = child.communicate(timeout=max(args.limit - (time.monotonic() - began), 1))
        except subprocess.TimeoutExpired: child.kill(); said, complaint = child.communicate()
        for line in (l for l in said.splitlines() if l.startswith("{")):
            for name, value in json.loads(line).items(): record.add(name, value, 1, "measured")
        if complaint.strip(): print(f"{part}: rc {child.returncode}, {complaint[-4000:]}")
    record.seconds = time.monotonic() - began
    print("\n".join(f"{k:75s} {m['value']:12.3f}" for k, m in record.metrics.items())); record.save(args.out)

if __name__ == "__main__": main()
