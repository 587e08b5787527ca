"""A newcomer's path, timed: clone, install, open JupyterLab, run "Start here", move a slider. On an idle machine: `pytest -s --benchmark-enable tests/browser/test_newcomer.py`. Wanted: under ten minutes on two cores, most of it installing."""
import os, subprocess, time
from pathlib import Path
import pytest
import lab

ROOT = Path(__file__).resolve().parents[2]

def test_newcomer(request, page, screen, tmp_path):
    if request.config.getoption("benchmark_disable"): pytest.skip("timed only with --benchmark-enable, on an idle machine")
    book, home, took = tmp_path / "book", tmp_path / "home", {}
    home.mkdir(); page.set_default_timeout(300_000)
    def lap(name, since=[time.perf_counter()]): now = time.perf_counter(); took[name] = now - since[0]; since[0] = now
    subprocess.run(["git", "clone", "--quiet", f"file://{ROOT}", book], check=True); lap("git clone")
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "DISDIFF_SCALE", "DISDIFF_RUNS")}
    subprocess.run(["make", "--silent", "-C", book, ".venv/notebooks"], check=True, env=clean); lap("install")
    with lab.serve(book / "nbs", home, book / ".venv/bin/python") as address:
        lab.open_notebook(page, address("00_begin.ipynb")); lap("JupyterLab")
        page.locator(".disdiff-slider canvas").first.wait_for(state="detached")                      # stored outputs are of another machine: not trusted, so no script runs
        lab.run_all(page)
        slider, canvas = page.locator(".disdiff-slider input[type=range]").first, page.locator(".disdiff-slider canvas").first
        canvas.wait_for(); lap("first cells")
        before = canvas.evaluate("c => c.toDataURL()")
        slider.press("ArrowRight")
        assert canvas.evaluate("c => c.toDataURL()") != before
        lap("move a slider")
        screen(page, "newcomer")
    print("  ".join(f"{name} {s:.0f} s" for name, s in took.items()), f"  all {sum(took.values()):.0f} s on {os.cpu_count()} cores")
    assert sum(took.values()) < 600
