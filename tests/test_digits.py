"Digits end to end: the experiment stops, resumes and loads; the shipped record keeps what the chapter claims; nothing is needed from the network."
import socket
import pytest, torch
from disdiff_tutorial import digits as module
from disdiff_tutorial.core import Config, Record, checkout, load_tensors, to_float
from disdiff_tutorial.data import files
from disdiff_tutorial.run import execute, records, run

SHIPPED = [Record.load(p) for p in sorted((checkout() / "data" / "records").glob("diffusion-digits-*.json"))]

@pytest.fixture
def offline(monkeypatch, tmp_path):
    "No MNIST on this machine, and no network."
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path / "none"))
    def refuse(*args, **kw): raise OSError("Network is unreachable")
    monkeypatch.setattr(socket, "create_connection", refuse); monkeypatch.setattr(socket.socket, "connect", refuse)

def test_spoiled_digits_are_in_range_and_changed():
    torch.manual_seed(0)
    x = to_float(files.digits("test").images[:50])
    bad = module.spoil(x)
    assert bad.shape == x.shape and bad.abs().max() <= 1 and (bad != x).flatten(1).any(1).all()

def test_offline_it_goes_on_with_smaller_digits_in_one_line(offline, capsys):
    assert files.mnist_or_digits("test").name == "digits"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "digits" in said

def test_splits_are_of_one_source_and_say_so_once(offline, capsys, monkeypatch):
    assert [x.name for x in module.splits()] == ["digits", "digits"] and capsys.readouterr().out.count("\n") == 1
    small = files.digits("train")._replace(name="mnist")
    monkeypatch.setattr(files, "load", lambda name, split: small if split == "train" else (_ for _ in ()).throw(files.Unavailable("gone")))
    assert [x.name for x in module.splits()] == ["digits", "digits"] and capsys.readouterr().out.count("\n") == 1       # the network went half-way

def test_chapter_runs_offline_with_the_shipped_record(monkeypatch, tmp_path):
    for name, value in (("SCALE", "smoke"), ("DATA", str(tmp_path / "none")), ("MNIST_MIRROR", "http://127.0.0.1:9")): monkeypatch.setenv(f"DISDIFF_{name}", value)
    nb, _ = execute(checkout() / "nbs" / "diffusion" / "26_digits.ipynb", lambda done, all: None)
    said = "".join(o.get("text", "") for c in nb.cells for o in c.get("outputs", []))
    assert said.count("MNIST is neither") == 1 and "loaded diffusion/digits: scale cpu" in said
    assert said.count("trained on mnist, while digits stand in here: no comparison") == 1 and "class mean:" not in said

def test_all_goes_to_the_device_of_the_net():
    net, reader = module.build(16).to("meta").eval(), module.Reader().to("meta").eval()          # stands in for a GPU
    for w in (0., 1., 2.): assert module.draw(net, torch.arange(4), w, evaluations=2).device.type == "meta"
    assert module.read(reader, torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).device.type == "meta"

def test_experiment_runs_offline_at_smoke(offline, tmp_path):
    record = run("diffusion/digits", "smoke", out=tmp_path)
    assert record.config["data"] == "digits" and record.config["steps"] == module.SIZES["smoke"]["steps"]
    assert sorted(p.name for p in tmp_path.glob("*.*")) == [f"diffusion-digits-smoke-s0.{end}" for end in ("json", "png", "safetensors")]   # no checkpoint left
    net, reader = module.load(record)
    assert module.draw(net, torch.arange(4), evaluations=3).shape == (4, 1, 28, 28) and not net.training
    assert module.read(reader, to_float(files.digits("test").images[:3])).shape == (3, 11)

def test_stopped_by_the_clock_it_goes_on(offline, tmp_path):
    assert run("diffusion/digits", "smoke", minutes=1e-4, out=tmp_path) is None
    assert not (tmp_path / "diffusion-digits-smoke-s0.json").exists() and list(tmp_path.glob("*.resume.safetensors"))
    late, straight = run("diffusion/digits", "smoke", out=tmp_path), run("diffusion/digits", "smoke", out=tmp_path / "straight")
    assert late.images == module.SIZES["smoke"]["steps"] * module.SIZES["smoke"]["batch"] and not list(tmp_path.glob("*resume*"))
    (a, _), (b, _) = (load_tensors(r.file(".safetensors")) for r in (late, straight))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)                  # net and reader, bitwise
    assert {k: late.metrics[k] for k in ("reader accuracy", "legible, class, w = 1")} == {k: straight.metrics[k] for k in ("reader accuracy", "legible, class, w = 1")}

def test_a_record_is_shipped(): assert SHIPPED

@pytest.mark.parametrize("record", SHIPPED, ids=lambda r: r.stem)
def test_shipped_record_reaches_the_goal(record):
    value = lambda name: record.metrics[name]["value"]
    assert record.config["data"] == "mnist" and value("reader accuracy") >= 0.98
    goal = 0.9 if record.scale in ("gpu", "paper") else 0.6
    assert value("legible, class, w = 1") >= goal and value("digits seen, class, w = 1") == 10
    assert record.file(".safetensors").stat().st_size < 12e6

@pytest.mark.parametrize("record", SHIPPED, ids=lambda r: r.stem)
def test_shipped_weights_give_the_recorded_legibility(record):
    net, reader = module.load(record)
    torch.manual_seed(0)
    sure, _ = module.legible(reader, module.draw(net, torch.arange(100) % 10))
    assert abs(sure.float().mean() - record.metrics["legible, class, w = 1"]["value"]) < 0.17        # 3.5 standard errors of 100 samples

def test_best_record_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("DISDIFF_RUNS", str(tmp_path))
    assert records("diffusion/digits")[0].stem == SHIPPED[0].stem if len(SHIPPED) == 1 else records("diffusion/digits")
