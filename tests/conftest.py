"Every test works in folders of its own: no records or data of the machine are touched."
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture
def root(): return ROOT

@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    "Runs go to a temporary folder; no scale or retraining is set from outside."
    monkeypatch.setenv("DISDIFF_RUNS", str(tmp_path / "runs"))
    for name in ("DISDIFF_SCALE", "RETRAIN"): monkeypatch.delenv(name, raising=False)
