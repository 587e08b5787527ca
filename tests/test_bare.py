"Every module imports where only torch, numpy, scipy, tqdm and safetensors (and what they need) are installed."
import re, subprocess, sys
from importlib import metadata
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "disdiff_tutorial").rglob("[!_]*.py"))

def needs(name, seen):
    "`name` and all that it requires here, extras left out."
    if name in seen: return
    try: dist = metadata.distribution(name)
    except metadata.PackageNotFoundError: return                         # for another platform
    seen[name] = dist
    for line in dist.requires or []:
        if "extra ==" not in line: needs(re.match(r"[\w.-]+", line)[0].lower().replace("_", "-"), seen)

@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "A site-packages folder with links to just these distributions."
    site, found = tmp_path_factory.mktemp("bare"), {}
    for name in ("torch", "numpy", "scipy", "tqdm", "safetensors"): needs(name, found)
    for dist in found.values():
        for top in {Path(f).parts[0] for f in dist.files or [] if not str(f).startswith("..")}:
            if not (site / top).exists(): (site / top).symlink_to(dist.locate_file(top))
    return site

def python(bare, code):
    "Run `code` with the bare folder and this checkout as the only third-party code."
    return subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env={"PYTHONPATH": f"{bare}:{ROOT}", "PATH": "/usr/bin:/bin"}, cwd="/")

def test_it_is_bare(bare): assert "No module named" in python(bare, "import sklearn").stderr and "No module named" in python(bare, "import matplotlib").stderr

def test_modules_import(bare):
    done = python(bare, "import importlib\nfor m in %r: importlib.import_module(m)" % MODULES)
    assert done.returncode == 0, done.stderr

def test_training_and_sampling_run(bare):
    done = python(bare, """
import torch
from disdiff_tutorial.diffusion.dsm import dsm_loss
from disdiff_tutorial.diffusion.sampling import sample
from disdiff_tutorial.diffusion.sde import VPSDE
from disdiff_tutorial.diffusion.training import Batches, fit
from disdiff_tutorial.diffusion.unet import UNet
net, sde = UNet(width=16), VPSDE()
fit(lambda x: dsm_loss(net, x, sde), net, Batches(torch.randn(64, 1, 8, 8), size=8), steps=3)
assert sample(net, sde, (2, 1, 8, 8), steps=3).isfinite().all()
""")
    assert done.returncode == 0, done.stderr

def test_a_plan_runs_comes_home_and_is_judged_here(bare, tmp_path):
    "On the bare machine: records, sheets, weights and codes in one pack. Here, where scikit-learn is: the scores."
    from disdiff_tutorial import run
    (tmp_path / "plan.toml").write_text("".join(f"[[run]]\nname = '{name}'\nscale = 'smoke'\nwithin = 1\n" for name in ("ivae/rooms-ivae", "dyga/rooms-fsq", "components/rooms")))
    done = python(bare, f"import torch; torch.set_num_threads(1)\nfrom disdiff_tutorial.run import main; main({['run', '--plan', f'{tmp_path}/plan.toml', '--minutes', '9', '--out', f'{tmp_path}/there', '--pack', f'{tmp_path}/home']})")
    assert done.returncode == 0, done.stdout + done.stderr
    names = {p.name for p in run.unpack(tmp_path / "home", tmp_path / "here")}
    assert {"dyga-rooms-fsq-smoke-s0.codes.safetensors", "ivae-rooms-ivae-smoke-s0.png", "components-rooms-smoke-s0.safetensors"} <= names and len(names) == 11, names
    run.judge(tmp_path / "here")
    record = run.Record.load(tmp_path / "here" / "dyga-rooms-fsq-smoke-s0.json")
    assert "DCI disentanglement, hist" in record.metrics and "MIG" in record.metrics and "scikit-learn" not in record.libraries
    assert set(run.Record.load(tmp_path / "here" / "ivae-rooms-ivae-smoke-s0.json").metrics) == {"Discrete MIG", "Spearman MCC", "Disentanglement", "Modularity"}
