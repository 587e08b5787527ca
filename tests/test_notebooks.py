"Every notebook runs from top to bottom at `smoke`, in a fresh kernel."
from pathlib import Path
import pytest
from disdiff_tutorial.run import execute, reading_order

NBS = Path(__file__).resolve().parents[1] / "nbs"

@pytest.mark.parametrize("path", reading_order(NBS), ids=lambda p: p.stem)
def test_runs_at_smoke(path, monkeypatch):
    monkeypatch.setenv("DISDIFF_SCALE", "smoke"); monkeypatch.setenv("RETRAIN", "1")
    execute(path, lambda done, all: None)
