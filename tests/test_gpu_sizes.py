"The networks, data and files of scale `gpu`, on a GPU that is pretended: five steps on batches of two, then everything that follows training; and the plans of data/plans."
import json
import pytest
import torch
from pretend_gpu import pretend_gpu
from disdiff_tutorial import core, run as runner
from disdiff_tutorial.core import Record, checkout
from disdiff_tutorial.dyga import skip_dropout
from disdiff_tutorial.dyga.latent_diffusion import VQGAN
from disdiff_tutorial.lcgdm import latent_guidance

FEW = dict(batch=2, size=2, frozen=2, steps=5, vae_steps=5, prior_steps=2, reader_steps=2, before=2, every=2, pool=64, pictures=64, images=4, points=120, held=20, times=3, samples=12, judged=0, bounds=0, evaluations=2)
NAMES = ["diffusion/digits", "lcgdm/sprites", "lcgdm/dsprites-truncated", "lcgdm/autoencoders", "lcgdm/digits", "lcgdm/faces", "ivae/scenes", "ivae/scenes-vae", "ivae/dsprites-resnet18", "dyga/vqgan-scenes", "dyga/scenes-both", "dyga/scenes-latent", "dyga/scenes-fsq", "dyga/scenes-backbone", "dyga/skips",
         "dyga/disdiff-both", "components/scenes", "components/scenes-5", "components/faces", "components/cifar", "components/digits"]
SIZES = {}                                                             # what was asked for at gpu, before it was cut

@pytest.fixture
def small(monkeypatch, tmp_path):
    "Sizes of `gpu` with networks whole and all counts small; no data sets on disk; scores that need scikit-learn wait."
    whole = core.Config.sizes
    def sizes(self, **values):
        sizes = whole(self, **values)
        SIZES.update(sizes)
        few = {k: FEW[k] for k in sizes if k in FEW and not (k == "size" and "images" in sizes)} | ({"points": 8} if "encoder" in sizes else {}) | ({"batch": 4} if "bounds" in sizes else {})
        return sizes | few | ({"few": True} if "hidden" in sizes else {})                 # not the codes of 480,000 pictures, nor 1,024 batches to measure codes
    monkeypatch.setattr(core.Config, "sizes", sizes)
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path / "data")); monkeypatch.setenv("DISDIFF_LATER", "1")
    monkeypatch.setenv("DISDIFF_GRAPHS", ",".join(runner.FAMILIES))        # the fourth step is recorded
    monkeypatch.setattr(latent_guidance, "made_before", lambda *a: (None, None))      # an encoder of five steps has no code alive; to vote on that of a record takes minutes
    monkeypatch.setattr(skip_dropout, "VARIANTS", {k: v for k, v in skip_dropout.VARIANTS.items() if k in skip_dropout.PROBED})        # three of eight
    SIZES.clear()

@pytest.mark.parametrize("name", NAMES)
def test_networks_and_data_of_gpu_fit(name, small, tmp_path, monkeypatch):
    vq, autoencoder = Record("dyga/vqgan-scenes", "gpu", 0), VQGAN()                  # whose latents one of them works on
    if "latent" in name: vq.save(tmp_path); core.save_tensors(tmp_path / f"{vq.stem}.safetensors", core.halved(autoencoder.tensors()), **autoencoder.facts)
    with pretend_gpu(monkeypatch): record = runner.run(name, "gpu", out=tmp_path)
    assert SIZES and (record.metrics or record.waiting) and record.scale == "gpu"
    for path in tmp_path.glob("*.safetensors"):
        if ".codes." not in path.name: assert path.stat().st_size < 13e6, path.stat().st_size      # to ship, and to come back from a lent machine
    assert name in ("lcgdm/autoencoders", "lcgdm/faces", "dyga/skips") or (tmp_path / f"{record.stem}.png").read_bytes().startswith(b"\x89PNG")

def test_codes_wait_and_are_judged_alike(tmp_path, monkeypatch):
    "Scores that waited are those that are taken at once."
    for name in ("dyga/rooms-dyga", "ivae/rooms-ivae"):
        now = runner.run(name, "smoke", out=tmp_path / "now")
        monkeypatch.setenv("DISDIFF_LATER", "1"); later = runner.run(name, "smoke", out=tmp_path / "later"); monkeypatch.delenv("DISDIFF_LATER")
        assert len(later.metrics) < len(now.metrics) and (tmp_path / "later" / f"{now.stem}.codes.safetensors").exists()
    runner.judge(tmp_path / "later")
    for path in (tmp_path / "now").glob("*.json"): assert Record.load(path).metrics == Record.load(tmp_path / "later" / path.name).metrics
    assert not list((tmp_path / "later").glob("*.codes.*"))

@pytest.mark.parametrize("path", sorted((checkout() / "data" / "plans").glob("*.toml")), ids=lambda p: p.stem)
def test_plans_are_plans(path):
    entries = runner.read_plan(path)
    assert all(e["scale"] == "gpu" and e["within"] for e in entries)
    stems = [Record(e["name"], "gpu", e.get("seed", 0)).stem for e in entries]
    assert len(set(stems)) == len(stems) and (path.stem != "first" or sum(map(runner.planned, entries)) <= 8.2)
    parts = {"lcgdm/dsprites": {"net"}, "lcgdm/faces": {"vae", "net", "prior"}, "lcgdm/digits": {"vae", "net"}, "dyga/disdiff-both": {"frozen", "units"}}
    assert all(set(e["within"]) == parts[e["name"].removesuffix("-10").removesuffix("-0").removesuffix("-truncated")] for e in entries if isinstance(e["within"], dict))

def test_first_plan_runs_at_smoke_and_comes_home(tmp_path):
    plan = (checkout() / "data" / "plans" / "first.toml").read_text().replace('scale = "gpu"', 'scale = "smoke"').replace("judged = 10000", "judged = 4")
    (tmp_path / "plan.toml").write_text(plan)
    runner.main(["run", "--plan", str(tmp_path / "plan.toml"), "--minutes", "9", "--out", str(tmp_path / "there"), "--pack", str(tmp_path / "home")])
    pieces = list((tmp_path / "home").iterdir())
    assert len(pieces) <= 8 and all(p.stat().st_size < 16e6 for p in pieces)
    runner.main(["unpack", str(tmp_path / "home"), "--out", str(tmp_path / "here")])
    stems = {p.stem for p in (tmp_path / "here").glob("*.json")}
    assert len(stems) == plan.count("[[run]]") and all((tmp_path / "here" / f"{s}.safetensors").exists() for s in stems)

def test_recorded_steps_train_alike(monkeypatch):
    "FactorVAE with a schedule, its steps recorded or not (a CPU records nothing, so replays are pretended): the same weights."
    from disdiff_tutorial.diffusion import training
    from disdiff_tutorial.lcgdm import factorvae
    x, weights = torch.randint(0, 2, (64, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) * 255, []
    for recorded in (False, True):
        for module in (training, factorvae): monkeypatch.setattr(module, "recordable", lambda *a: recorded)
        monkeypatch.setattr(training, "aside", lambda step: step()); monkeypatch.setattr(training, "captured", lambda step: step)
        core.seed_everything(0); model = factorvae.FactorVAE((1, 16, 16), hidden=(32,), width=32, depth=2)
        factorvae.learn(model, x, 30, size=16, schedule=factorvae.dear_first, progress=False)
        weights.append(torch.cat([p.flatten() for p in model.parameters()])); assert (model.kl_weight, model.tc_weight) == pytest.approx((1., 1.), abs=.3)
    assert torch.allclose(*weights, atol=1e-5)

def test_compiled_layers_train_alike(monkeypatch):
    "A U-Net with its layers compiled from the second step on, or not (traced alone: no program is written for the CPU): the same weights, also where a training goes on, and nothing compiled is left in use."
    from disdiff_tutorial.diffusion import dsm, sde, training, unet
    traced, x, weights, made = torch.compile, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), [], []
    monkeypatch.setattr(torch, "compile", lambda f, **kind: made.append(kind) or traced(f, backend="aot_eager", **kind))
    for asked in (False, True):
        monkeypatch.setattr(training, "recordable", lambda family, device, names="DISDIFF_GRAPHS": asked and names == "DISDIFF_COMPILE" and family == "some")
        core.seed_everything(0); net = unet.UNet(width=8, mults=(1, 2), blocks=1, attend=(1,))
        for _ in range(2): training.fit(lambda x: dsm.dsm_loss(net, x, sde.VPSDE()), net, lambda step: (x,), steps=4, graph="some", progress=False)
        assert ("compiled" in vars(net)) == asked and "layers" not in vars(net)
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert len(made) == 1 and torch.allclose(*weights, atol=1e-5)

def test_compiled_extractor_trains_alike(monkeypatch):
    "So does the trunk of a feature extractor, running means of its batch norms included."
    from disdiff_tutorial.diffusion import training
    from disdiff_tutorial.dyga.latent_diffusion import FeatureExtractor
    traced, x, found = torch.compile, torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), []
    monkeypatch.setattr(torch, "compile", lambda f, **kind: traced(f, backend="aot_eager", **kind))
    for asked in (False, True):
        monkeypatch.setattr(training, "recordable", lambda family, device, names="DISDIFF_GRAPHS": asked and names == "DISDIFF_COMPILE")
        core.seed_everything(0); net = FeatureExtractor((3, 16, 16), 4, 6, 8, hidden=16)
        training.fit(lambda x: net(x).square().mean(), net, lambda step: (x,), steps=4, graph="some", progress=False)
        assert ("compiled" in vars(net)) == asked and "numbers" not in vars(net)
        found.append(torch.cat([v.flatten().float() for v in net.state_dict().values()]))
    assert torch.allclose(*found, atol=1e-5)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_families_are_rehearsed():
    assert set(runner.rehearse()) == set(runner.WAYS["both"])

def test_a_record_with_weights_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("DISDIFF_RUNS", str(tmp_path)); monkeypatch.setattr(runner, "checkout", lambda: None)
    for at in ("cpu", "gpu"): Record("components/digits", at, 0).save(tmp_path)
    assert runner.run("components/digits").scale == "gpu"                       # none has weights: the best
    (tmp_path / "components-digits-cpu-s0.safetensors").touch()
    assert runner.run("components/digits").scale == "cpu"
