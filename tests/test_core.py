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

@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"name":"x","scale":"cpu","seed":0,"extra":1}', '{"name":"x","scale":"tiny","seed":0}'])
def test_broken_record(tmp_path, text):
    path = tmp_path / "r.json"; path.write_text(text)
    with pytest.raises(ValueError) as err: Record.load(path)
    one_line(err)

def test_images_there_and_back():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(core.to_uint8(core.to_float(x)), x)
    with pytest.raises(ValueError): core.to_float(torch.zeros(4, 4))

@pytest.mark.parametrize("images,part", [(torch.full((1, 1, 2, 2), 200), "found torch.int64"), (torch.ones(1, 1, 2, 2, dtype=torch.bool), "found torch.bool"), (torch.ones(1, 1, 2, 2).numpy(), "found ndarray")])
def test_images_of_other_types_are_refused(images, part):
    for f in (core.to_float, core.to_uint8):
        with pytest.raises(ValueError) as err: f(images)
        assert part in one_line(err)

def test_nan_does_not_turn_black():
    with pytest.raises(ValueError) as err: core.to_uint8(torch.tensor([0., float("nan")]).view(2, 1, 1, 1))
    assert "NaN in 1 of 2" in one_line(err)

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
    assert [runner.run("toy/answer", at).scale for at in (None, "smoke", "cpu", "gpu")] == ["cpu", "smoke", "cpu", "cpu"]       # the best at hand, or the best up to a scale
    monkeypatch.setenv("RETRAIN", "1")
    assert runner.run("toy/answer", "smoke").scale == "smoke"

@pytest.mark.parametrize("words,part", [(["run", "nothing/here"], "see `disdiff list`"), (["run"], "the name of an experiment or --plan FILE"), (["run", "--plan", "nowhere.toml"], "expected a plan file"), (["run", "toy/answer", "--minutes", "-1"], "minutes above 0"),
                                        (["data", "get", "nothing"], "a data set among"), (["data", "get"], "disdiff data list"), (["data", "list", "mnist"], "expected `list` alone"), (["judge", "--out", "/nowhere"], "expected a folder of records"),
                                        (["run", "--plan", "p.toml", "--seed", "5"], "scale and seed inside the plan"), (["run", "toy/answer", "--pack", "x"], "expected --plan with --pack")])
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

def test_a_stopped_run_is_no_record(toys, monkeypatch, capsys):
    def stopped(config): raise core.Unfinished("time is up")
    monkeypatch.setitem(runner.EXPERIMENTS, "toy/stopped", stopped)
    runner.run("toy/answer", "smoke"); assert runner.run("toy/stopped", "smoke") is None
    assert (core.runs_dir() / "toy-stopped-smoke-s0.resume.json").exists() and runner.records("toy/stopped") == []
    assert runner.run("toy/answer", "smoke").metrics["answer"]["value"] == 42        # others are still found
    runner.main(["list"]); assert "no record of toy/stopped yet" in capsys.readouterr().out

def test_other_sizes_need_a_folder(toys):
    with pytest.raises(ValueError) as err: runner.run("toy/answer", "smoke", change={"n": 3})
    assert "a folder of its own" in one_line(err)

@pytest.mark.parametrize("kind,part", [(dict(seed=-1), "a whole seed"), (dict(seed="0"), "a whole seed"), (dict(share=0), "a share of the steps"), (dict(share=2.), "a share of the steps"), (dict(within=0), "within: minutes above 0"), (dict(within={"net": "a"}), "within: minutes above 0")])
def test_config_errors(toys, tmp_path, kind, part):
    with pytest.raises(ValueError) as err: runner.run("toy/answer", "smoke", out=tmp_path / "new", **kind)
    assert part in one_line(err) and not (tmp_path / "new").exists()

def test_where_a_record_is_nothing_is_missing(monkeypatch, tmp_path):
    "A full disk while the sheet or the codes are written: no record, so that a plan does not call the run done."
    def looked(config):
        record = toy(config); record.looks["x"] = torch.zeros(1, 1, 2, 2); record.wait("units", {"codes": torch.zeros(2, 2)}, points=2)
        return record
    def full(*args): raise OSError("no space")
    monkeypatch.setitem(runner.EXPERIMENTS, "toy/looked", looked)
    for part in ("sheet", "leave"):
        with monkeypatch.context() as m, pytest.raises(OSError): m.setattr(runner, part, full); runner.run("toy/looked", "smoke", out=tmp_path)
        assert not (tmp_path / "toy-looked-smoke-s0.json").exists()
    runner.run("toy/looked", "smoke", out=tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".png", ".safetensors"}

def test_codes_without_a_record_stop_no_judge(tmp_path, capsys):
    core.save_tensors(tmp_path / "toy-a-smoke-s0.codes.safetensors", {"0/codes": torch.zeros(1)}, tasks=[])
    runner.judge(tmp_path)
    assert "has no record: run it again" in capsys.readouterr().out

@pytest.mark.parametrize("text,part", [("[run]\nname = 'toy/answer'", "at least one [[run]]"), ("run = [1]", "at least one [[run]]"), ("[[run]]\nname = 'toy/answer'\nseed = 'a'", "a whole seed"), ("[[run]]\nname = 'toy/answer'\nreserve = -5", "reserve in minutes"),
                                       ("[[run]]\nname = 'toy/answer'\nwithin = 0", "within: minutes above 0"), ("[[run]]\nname = 'toy/answer'\nshare = 7", "a share of the steps"), ("[[run]]\nname = 'toy/answer'\nscale = ''", "a scale among")])
def test_plans_are_checked_before_anything_runs(toys, tmp_path, text, part):
    (tmp_path / "plan.toml").write_text(f"[[run]]\nname = 'toy/answer'\nscale = 'smoke'\n{text}" if text.startswith("[[") else text)
    with pytest.raises(ValueError) as err: runner.run_plan(tmp_path / "plan.toml", 1, tmp_path / "out")
    assert part in one_line(err) and not (tmp_path / "out").exists()

def test_a_part_that_within_does_not_name_stops_in_time(monkeypatch, tmp_path, capsys):
    def endless(config):
        from disdiff_tutorial.diffusion.training import fit
        net = torch.nn.Linear(1, 1)
        config.train("net", lambda **kind: fit(lambda x: net(x).square().mean(), net, lambda step: torch.ones(1, 1), progress=False, **kind), 10 ** 9)
    monkeypatch.setitem(runner.EXPERIMENTS, "toy/endless", endless)
    (tmp_path / "plan.toml").write_text("[[run]]\nname = 'toy/endless'\nscale = 'smoke'\nreserve = 0\nwithin = {vae = 0.01}")
    runner.run_plan(tmp_path / "plan.toml", .02, tmp_path)                       # 1.2 seconds; without a limit it would never end
    assert "unfinished toy/endless" in capsys.readouterr().out and list(tmp_path.glob("*.resume.safetensors"))

def test_damaged_pieces_give_one_line(tmp_path):
    import random
    Record("toy/a", "gpu", 0).save(tmp_path / "runs"); (tmp_path / "runs" / "toy-a-gpu-s0.txt").write_text("hello " * 5000)
    runner.pack(tmp_path / "runs", tmp_path / "home")
    piece = tmp_path / "home" / "runs.zip.0"; whole, draw = piece.read_bytes(), random.Random(0)
    for _ in range(150):
        at = draw.randrange(len(whole)); piece.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1:])
        try: runner.unpack(tmp_path / "home", tmp_path / "back")                 # a byte that no reader needs may be wrong
        except ValueError as err: assert "expected whole pieces" in str(err) and "\n" not in str(err)

def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit) as err: runner.main(["sweep", "diffusion/digits", "--space", "width=16,32", "--metric", "x", "--out", "nowhere"])
    said = capsys.readouterr().err
    assert err.value.code == 2 and "optuna" in said and said.count("\n") == 1

def test_stopped_by_hand_is_one_line_and_its_seconds_count(monkeypatch, capsys, tmp_path):
    def stopped(config): raise KeyboardInterrupt
    monkeypatch.setitem(runner.EXPERIMENTS, "toy/stopped", stopped); words = ["run", "toy/stopped", "--scale", "smoke", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as err: runner.main(words)
    said = capsys.readouterr().err; clock = tmp_path / "toy-stopped-smoke-s0.resume.json"
    assert err.value.code == 130 and said.startswith("disdiff: stopped by hand") and said.count("\n") == 1 and json.loads(clock.read_text())["seconds"] > 0
    for damage in ("{", "{}", "[]"):
        clock.write_text(damage)
        with pytest.raises(SystemExit): runner.main(words)
        assert "is damaged" in capsys.readouterr().out and json.loads(clock.read_text())["seconds"] > 0

def test_the_nearest_names(capsys):
    with pytest.raises(ValueError) as err: runner.known("ivae/rotatoin")
    assert "such as ivae/rotation," in one_line(err) and len(str(err.value)) < 200

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

def test_a_kernel_that_dies_and_a_cell_with_a_rule(tmp_path, monkeypatch):
    monkeypatch.setenv("DISDIFF_SCALE", "smoke")
    for source, parts in (("import os\nos._exit(1)", ["00_a: its Python process died"]), (f"# {'-' * 40}\nthis_fails", ["# " + "-" * 40 + "\nthis_fails\n", "NameError"])):
        book(tmp_path, **{"00_a": source})
        with pytest.raises(SystemExit) as err: runner.run_notebooks(tmp_path, tmp_path / "out")
        for part in parts: assert part in str(err.value)

def test_only_lines_of_run_are_said():
    import nbformat
    text = "trained on mnist, while digits stand in here\nloaded toy/mean: scale cpu, seed 0, 2 s on a laptop; error 1 (n=1, test)\n"
    assert runner.said(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("stream", text=text)])])) == "loaded toy/mean: scale cpu, seed 0, 2 s"

# --- what a training took -----------------------------------------------------------------------------------------------

def test_operations_of_a_step_are_counted():
    "A linear layer of a x b on n rows: 2 n a b there, as much for the weights on the way back; nothing for data that need no gradient."
    from disdiff_tutorial.diffusion.training import fit
    net, x = torch.nn.Linear(30, 20), torch.randn(8, 30)
    done = fit(lambda x: net(x).square().mean(), net, lambda step: x, steps=3, progress=False)
    assert done.flop == 2 * 2 * 30 * 20
    both = core.effort((done, None, done._replace(flop=0.)))
    assert both == dict(steps=6, images=48, seconds=2 * done.seconds, gflop=pytest.approx(1200e-9)) and core.effort((None,)) == dict(steps=0, images=0, seconds=0., gflop=0.)

def test_rounded_weights_come_back_and_other_tensors_keep_their_names(tmp_path):
    mine = {"x": torch.ones(2), "x step": torch.ones(2), "small": torch.tensor([1, 2], dtype=torch.int8), "zeros": torch.zeros(128, 128, dtype=torch.float16), "w": torch.randn(128, 128).half()}
    core.save_tensors(tmp_path / "w", core.rounded(mine), of="a test")
    back, facts = core.load_tensors(tmp_path / "w")
    assert set(back) == set(mine) and facts == {"of": "a test"} and {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in mine.items()}
    assert all(torch.equal(back[k], mine[k]) for k in ("x", "x step", "small", "zeros"))
    step = mine["w"].float().abs().amax(1, keepdim=True) / 127
    assert ((back["w"] - mine["w"]).float().abs() <= step / 2 + 2e-3).all()
