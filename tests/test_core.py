"core, show and run: errors in one line, files whole or absent, the best record found, a book that goes on where it stopped."
import json, os, resource, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from disdiff_tutorial import core, run as runner, show
from disdiff_tutorial.core import Record

def one_line(excinfo): assert "\n" not in str(excinfo.value) and "expected" in str(excinfo.value); return str(excinfo.value)

@pytest.mark.parametrize("name,ok", [("smoke", True), ("paper", True), ("tiny", False)])
def test_scale(monkeypatch, name, ok):
    monkeypatch.setenv("DISDIFF_SCALE", name)
    if ok: assert core.scale() == name
    else:
        with pytest.raises(ValueError) as err: core.scale()
        assert "smoke, cpu, long, gpu, paper" in one_line(err)

def test_seed_gives_the_same_draws():
    draws = []
    for _ in range(2): g = core.seed_everything(5); draws.append((torch.rand(3), torch.rand(3, generator=g)))
    assert all(torch.equal(a, b) for a, b in zip(*draws))
    with pytest.raises(ValueError): core.seed_everything(-1)

def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path))
    assert core.data_dir() == tmp_path
    monkeypatch.delenv("DISDIFF_DATA")
    assert core.data_dir() == core.checkout() / "data"
    monkeypatch.setattr(core, "checkout", lambda: None); monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert core.data_dir() == tmp_path / "disdiff_tutorial" / "data"

def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as err: core.save_tensors(tmp_path / "file" / "w.safetensors", {"w": torch.ones(2)})
    assert "choose a writable folder" in one_line(err)

FULL = """
import resource, signal, sys, torch
from disdiff_tutorial.core import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_tensors(sys.argv[1], {"w": torch.zeros(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try: save_tensors(sys.argv[1], {"w": torch.ones(10_000)})
except OSError as err: print(err)
"""

def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True)
    assert done.stdout.startswith("expected to write") and done.stdout.count("\n") == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"] and core.load_tensors(path)[0]["w"].numel() == 10

@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}"])
def test_broken_checkpoint(tmp_path, content):
    path = tmp_path / "w.safetensors"; path.write_bytes(content)
    with pytest.raises(ValueError) as err: core.load_tensors(path)
    one_line(err)

def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError) as err: core.load_tensors(tmp_path / "no.safetensors")
    one_line(err)

@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"name":"x","scale":"cpu","seed":0,"extra":1}'])
def test_broken_record(tmp_path, text):
    path = tmp_path / "r.json"; path.write_text(text)
    with pytest.raises(ValueError) as err: Record.load(path)
    one_line(err)

def test_images_there_and_back():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(core.to_uint8(core.to_float(x)), x)
    with pytest.raises(ValueError): core.to_float(torch.zeros(4, 4))

def test_mosaic_has_gaps_that_let_the_page_through():
    m = show.mosaic(torch.zeros(3, 3, 4, 4), cols=2)
    assert m.shape == (10, 10, 4) and m[:4, :4, 3].all() and not m[4:6].any() and not m[6:, 6:].any()
    with pytest.raises(ValueError): show.mosaic(torch.zeros(0, 1, 4, 4))

def toy(config):
    record = config.record()
    record.add("answer", 42, 1, "test")
    return record

@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(runner.EXPERIMENTS, "toy/answer", toy)

def test_run_trains_once_then_loads(toys, capsys, monkeypatch):
    a, b = runner.run("toy/answer", "smoke"), runner.run("toy/answer", "smoke")
    assert a == b and [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["trained", "loaded"]
    runner.run("toy/answer", "cpu", retrain=True)
    assert runner.run("toy/answer", "smoke").scale == "cpu"                 # the best at hand
    monkeypatch.setenv("RETRAIN", "1")
    assert runner.run("toy/answer", "smoke").scale == "smoke"

@pytest.mark.parametrize("words,part", [(["run", "nothing/here"], "see `disdiff list`"), (["run"], "the name of an experiment or --plan FILE"), (["run", "--plan", "nowhere.toml"], "expected a plan file"), (["run", "toy/answer", "--minutes", "-1"], "minutes above 0"),
                                        (["data", "get", "nothing"], "a data set among"), (["data", "get"], "disdiff data list")])
def test_command_line_errors(toys, capsys, words, part):
    with pytest.raises(SystemExit) as err: runner.main(words)
    said = capsys.readouterr().err
    assert err.value.code == 2 and part in said and said.count("\n") == 1

def test_command_line(toys, capsys, tmp_path):
    runner.main(["run", "toy/answer", "--scale", "smoke", "--seed", "3", "--out", str(tmp_path)])
    assert Record.load(tmp_path / "toy-answer-smoke-s3.json").seed == 3
    runner.main(["list"]); runner.main(["data", "list"])
    said = capsys.readouterr().out
    assert "diffusion/digits" in said and "mnist" in said and "toy/answer" in said

def test_run_into_an_unwritable_folder(toys, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit): runner.main(["run", "toy/answer", "--scale", "smoke", "--out", str(tmp_path / "file")])
    assert "choose a writable folder" in capsys.readouterr().err

def book(folder, **cells):
    import nbformat
    for name, source in cells.items(): nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), folder / f"{name}.ipynb")

def test_book_stops_at_a_failing_cell_and_goes_on_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DISDIFF_SCALE", "smoke")
    nbs, out = tmp_path / "nbs", tmp_path / "out"; nbs.mkdir()
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    book(nbs, **{"00_a": count, "01_b": "this_fails"})
    with pytest.raises(SystemExit) as err: runner.run_notebooks(nbs, out)
    assert "01_b failed in this cell" in str(err.value) and "this_fails" in str(err.value) and "NameError" in str(err.value)
    book(nbs, **{"01_b": "1"})
    runner.run_notebooks(nbs, out)
    assert (tmp_path / "count").read_text() == "x"                          # the first was not run again
    assert "00_a.html" in (out / "times.html").read_text() and "2 notebooks" in capsys.readouterr().out
    runner.run_notebooks(nbs, out)
    assert (tmp_path / "count").read_text() == "xx"                         # all done: it starts over

def test_finished_pass_leaves_a_record(monkeypatch):
    rows = [dict(name="00_a", seconds=2., peak=51, said="trained toy/mean"), dict(name="data/10_b", seconds=3., peak=60, said="")]
    monkeypatch.setattr(runner, "run_notebooks", lambda folder, out, at: rows)
    runner.main(["notebooks", "--scale", "smoke"])
    record = Record.load(core.runs_dir() / "book-smoke-s0.json")
    assert record.seconds == 5 and record.config == {"00_a": "trained toy/mean"} and record.metrics["seconds, 00_a"]["value"] == 2
    assert record.metrics["peak MB, data/10_b"]["value"] == 60 and len(record.metrics) == 4

PASS = core.checkout() / "data" / "records" / "book-cpu-s0.json"

@pytest.mark.skipif(not PASS.exists(), reason="no whole pass at cpu has been recorded")
def test_no_notebook_above_four_gigabytes():
    peaks = {k: m["value"] for k, m in Record.load(PASS).metrics.items() if k.startswith("peak MB")}
    assert peaks and max(peaks.values()) < 4096, peaks
