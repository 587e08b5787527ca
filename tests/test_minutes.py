"Every kind of experiment stops when its minutes are over, leaves no record, and goes on to the same weights."
import pytest
import torch
from disdiff_tutorial.core import load_tensors
from disdiff_tutorial.run import run

KINDS = ["lcgdm/squares", "lcgdm/sprites", "lcgdm/digits", "lcgdm/faces", "ivae/rotation", "ivae/rooms", "dyga/vqgan", "dyga/rooms-both", "dyga/skips", "dyga/disdiff-both", "components/rooms"]

@pytest.mark.parametrize("name", KINDS)
def test_stopped_by_the_clock_it_goes_on(name, tmp_path, capsys):
    early = run(name, "smoke", minutes=1e-6, out=tmp_path)
    assert early is None and "time is up in" in capsys.readouterr().out
    assert [p.name for p in tmp_path.glob("*.json")] == [f"{name.replace('/', '-')}-smoke-s0.resume.json"] and list(tmp_path.glob("*.resume*.safetensors"))
    record = run(name, "smoke", out=tmp_path)
    assert record.metrics and not list(tmp_path.glob("*resume*"))

@pytest.mark.parametrize("name", ["lcgdm/sprites", "dyga/rooms-both"])
def test_pieces_make_the_whole(name, tmp_path):
    "Two stages and anchors chosen on the way: weights after several calls are bitwise those of one."
    calls = 1
    while run(name, "smoke", minutes=.01 * max(1, calls / 10), out=tmp_path / "pieces") is None and calls < 200: calls += 1
    run(name, "smoke", out=tmp_path / "whole")
    a, b = (load_tensors(next((tmp_path / k).glob("*.safetensors")))[0] for k in ("pieces", "whole"))
    assert calls > 1 and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
