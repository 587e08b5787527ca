"""Whole notebooks at smoke on the GPU that `pretend_gpu` pretends: `python tests/rehearse_gpu.py nbs/00_begin.ipynb ...`, or all of them without a name (half an hour). A line for each notebook; for one
that fails the cell and the error. `make test` does this with the first one alone."""
import json, os, re, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def code_cells(path):
    "Numbers and sources of the code cells of a notebook that are to be run."
    cells = enumerate(json.loads(Path(path).read_text())["cells"])
    sources = ((i, "".join(c["source"])) for i, c in cells if c["cell_type"] == "code")
    return [(i, s) for i, s in sources if not re.search(r"^#\|\s*eval:\s*false", s, re.M)]

def rehearse(path):
    "Run the cells of a notebook, in this process, whose devices and random state it changes; stops at the first error."
    import matplotlib.pyplot as plt, pytest
    from IPython.core.interactiveshell import InteractiveShell
    from pretend_gpu import pretend_gpu
    from disdiff_tutorial.metrics import quality
    patch, shell = pytest.MonkeyPatch(), InteractiveShell.instance()
    patch.setattr(quality, "at_hand", lambda: None)                                 # the compiled Inception network can't be dressed up
    os.chdir(Path(path).resolve().parent)
    with pretend_gpu(patch):
        for i, source in code_cells(path):
            ran = shell.run_cell(source, silent=True); plt.close("all")
            if error := ran.error_before_exec or ran.error_in_exec: raise SystemExit(f"cell {i}: {type(error).__name__}: {' '.join(str(error).split())}")

def in_a_process(path):
    "Rehearse a notebook in a process of its own: the error, or nothing."
    env = os.environ | dict(DISDIFF_SCALE="smoke", MPLBACKEND="Agg", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    ran = subprocess.run([sys.executable, __file__, "--here", str(path)], env=env, capture_output=True, text=True)
    return "" if ran.returncode == 0 else (ran.stderr.strip().splitlines() or ["ended without a word"])[-1]

def main(paths):
    if paths[:1] == ["--here"]: return rehearse(Path(paths[1]).resolve())
    failed = False
    for path in paths or sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT / "nbs").parts)):
        start = time.time(); error = in_a_process(path); failed |= bool(error)
        print(f"{Path(path).stem:24s} {time.time() - start:4.0f} s  {error or 'no error'}", flush=True)
    return failed

if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
