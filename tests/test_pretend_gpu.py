"What goes wrong only on a GPU (tensors of two devices, generators, types under autocast), tried without one: see `pretend_gpu`. The experiments run on it in `test_gpu_sizes`."
import time
import pytest
import torch
from pretend_gpu import pretend_gpu
from disdiff_tutorial import core
from disdiff_tutorial.data.scenes import rooms
from disdiff_tutorial.data.sprites import Packed, Sprites
from disdiff_tutorial.diffusion.likelihood import log_likelihood
from disdiff_tutorial.diffusion.sampling import METHODS, energy_test, sample
from disdiff_tutorial.diffusion.sde import VESDE, VPSDE
from disdiff_tutorial.diffusion.unet import UNet
from disdiff_tutorial.dyga.interpretation import TIDY
from disdiff_tutorial.dyga.latent_diffusion import FeatureExtractor, LatentDiffusion
from disdiff_tutorial.lcgdm.factorvae import FactorVAE
from disdiff_tutorial.lcgdm.latent_guidance import LCGDM, nll_bound
from disdiff_tutorial.metrics import disentanglement as metrics
from disdiff_tutorial.metrics.quality import Network, fid, kid, note_quality

@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with pretend_gpu(monkeypatch): yield

def test_what_a_gpu_forbids():
    a, b = torch.ones(3, device="cuda"), torch.ones(3)
    for wrong in (lambda: a + b, lambda: torch.cat([a, b]), lambda: b[a.long() * 0], lambda: torch.randn(3, generator=torch.Generator(), device="cuda"), lambda: a.numpy(),
                  lambda: torch.nn.Linear(3, 3)(a), lambda: torch.stack([a.sum(), b.sum()]), lambda: a.double() @ a):
        with pytest.raises(RuntimeError): wrong()

def test_what_a_gpu_allows():
    a = torch.arange(3., device="cuda")
    a[torch.tensor([0])] = 5.; a[1:] = torch.ones(2)
    assert a.is_cuda and (a * torch.tensor(2.)).tolist() == [10., 2., 2.] and not a.cpu().is_cuda and a.cpu().numpy().sum() == 7 and torch.zeros(2).to(a).is_cuda
    net = torch.nn.Linear(3, 1).to("cuda")
    with torch.autocast("cuda", torch.bfloat16): y = net(a)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and net.weight.grad.is_cuda and net.weight.grad.cpu().flatten().tolist() == [5., 1., 1.]

@pytest.fixture
def encode():
    net = torch.nn.Linear(3072, 6).to(core.device())
    return lambda x: net(core.to_float(x).flatten(1)).detach()

def test_metrics(encode):
    "The whole suite, on data and codes of the GPU, and the same numbers as on the CPU."
    data, g = rooms(), torch.Generator().manual_seed(0)
    assert data.device.type == "cuda"
    there = metrics.evaluate(encode, data, 0, 600, 300, votes=(200, 100), progress=False)
    factors = [data.grid.sample(n, g) for n in (600, 300)]
    codes = [encode(data.images(f)).cpu() for f in factors]
    here = metrics.evaluate_codes(codes[0], factors[0].cpu(), codes[1], factors[1].cpu(), 0, votes=(200, 100), progress=False)
    assert [r.metric for r in there] == [r.metric for r in here] and len(here) > 10
    assert [r.held_out for r in there] == pytest.approx([r.held_out for r in here], abs=1e-4)

def test_metrics_of_two_tables():
    "Those that `evaluate` leaves out."
    g, cuda = torch.Generator().manual_seed(0), core.device()
    factors = torch.randint(4, (300, 3), generator=g).to(cuda)
    codes = factors.float() + .1 * torch.randn(300, 3, generator=g).to(cuda)
    assert metrics.infomec(codes.round(), factors, discrete=True).compactness > .9
    assert metrics.udr([codes, -codes.flip(1)]).scores.cpu().min() > .8
    assert metrics.tad(codes, (factors > 1).long()).score >= 0
    assert metrics.unit_codes(codes[:, :, None].expand(-1, -1, 2)).shape == (300, 3)

@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
def test_samplers(sde):
    net = UNet(1, 8, (1, 2), 1, sde=sde, cond_dim=3).to(core.device())
    cond = torch.zeros(2, 3, device=core.device())
    for method in METHODS:
        x = sample(net, sde, (2, 1, 8, 8), cond, method, steps=3, guidance=2., generator=torch.Generator().manual_seed(0))
        assert x.is_cuda and x.isfinite().all()
    assert log_likelihood(net, sde, x, cond, tol=1e-1).nats.is_cuda

def test_guidance_and_its_bound(tmp_path):
    model = LCGDM(FactorVAE((1, 16, 16), hidden=(16,), width=16, depth=2), (1, 16, 16), 10, width=8).to(core.device())
    x = torch.randint(0, 2, (8, 1, 16, 16), dtype=torch.uint8, device=core.device()) * 255
    model.fit(x, steps=2, size=4, progress=False)
    assert model.traverse(0, [-1., 1.], x=torch.randn(1, 1, 16, 16, device=core.device()), steps=2).is_cuda and model.sample(2, steps=2).is_cuda
    assert all(part.is_cuda for part in nll_bound(model, x[:2], tol=1e-1))
    model.save(tmp_path / "m.safetensors")
    again = LCGDM.load(tmp_path / "m.safetensors").to(core.device())
    assert torch.allclose(again.encode(x).cpu(), model.encode(x).cpu(), atol=1e-2)

def test_packed_sprites():
    x, factors = Packed(Sprites(16)).batches(8, seed=0)(0)
    assert x.is_cuda and factors.is_cuda and (Sprites(16).images(factors) == x).all()

def test_distances():
    x, y = torch.randn(200, 8, device=core.device()), torch.randn(200, 8, device=core.device()) + 1
    assert fid(x, y).value > 1 and kid(x, y, subsets=3, size=50, show=False).value > 0 and energy_test(x[:50], y[:50])[1] < .05

def test_quality_of_a_record():
    "On the device, not on the CPU beside it."
    seen = []
    class Small(torch.nn.Module):
        def forward(self, x): seen.append(x.is_cuda); return x.flatten(2).mean(2)
    net = Network(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), Small()), "small", 16).to(core.device())
    record, x = core.Record("toy/noted", "smoke", 0), torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, device=core.device())
    note_quality(record, {"the same": x}, x, net)
    assert all(seen) and abs(record.metrics["FID, the same"]["value"]) < 1e-3 and record.metrics["KID x 1000, the same"]["n"] == 60

def test_checkpoints_take_a_small_part_of_the_time(tmp_path, monkeypatch):
    "One that takes long is written seldom on a GPU, and as asked for on the CPU; the last one always."
    from disdiff_tutorial.diffusion import training
    saved, save = [], training.State.save
    def slowly(state, path): time.sleep(.1); saved.append(state.step); save(state, path)
    monkeypatch.setattr(training.State, "save", slowly)
    for where, most in (("cuda", 5), ("cpu", 22)):
        saved.clear(); net = torch.nn.Linear(3, 1).to(where)
        training.fit(lambda x: net(x).square().mean(), net, lambda step: torch.ones(4, 3, device=where), steps=20, checkpoint=tmp_path / f"{where}.safetensors", every=1, progress=False)
        assert saved[0] == 0 and saved[-1] == 20 and len(saved) <= most and (where == "cuda" or len(saved) == 22)

@pytest.mark.parametrize("anchors", ["bounded", "paper", "released", "fsq"])
def test_anchored_steps_are_recorded(anchors, monkeypatch):
    "Before and after the first selection, which falls between steps."
    monkeypatch.setenv("DISDIFF_GRAPHS", "units")
    torch.manual_seed(0); model = LatentDiffusion(FeatureExtractor((3, 32, 32), 4, 6, 8, hidden=32), width=16, tidy=TIDY[anchors](4, 6), every=5).to(core.device())
    done = model.fit(torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, device=core.device()), steps=8, size=16, pool=64, progress=False)
    assert done.steps == int(model.steps) == 8 and (anchors == "fsq" or (model.tidy.counts > 0).all())

@pytest.mark.slow
def test_a_whole_notebook(root):
    "The first one of the book; `python tests/rehearse_gpu.py` does the others."
    from rehearse_gpu import in_a_process
    assert in_a_process(root / "nbs" / "00_begin.ipynb") == ""
