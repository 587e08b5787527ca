"Packages from npm that the tests use, each at one version, kept in _run/npm. Where npm is missing or fetches nothing, the tests that ask for them are skipped, and say so."
import shutil, subprocess, tempfile
from functools import lru_cache
from pathlib import Path
import pytest

CACHE = Path(__file__).resolve().parents[2] / "_run" / "npm"
VERSIONS = {"katex": "0.19.1", "mathjax": "3.2.2", "axe-core": "4.14.1"}

@lru_cache(maxsize=None)
def fetch(name, home):
    "Fetch a package into `home`, whole or not at all: several workers may ask at once. Returns why not, '' if it is there."
    if home.is_dir(): return ""
    if not shutil.which("npm"): return "npm is not installed: apt install npm"
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, ignore_cleanup_errors=True) as folder:
        words = ["npm", "install", "--prefix", folder, "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", f"{name}@{VERSIONS[name]}"]
        if subprocess.run(words, capture_output=True, timeout=180).returncode: return f"npm could not fetch {name} {VERSIONS[name]}: is its registry in reach?"
        try: (Path(folder) / "node_modules").rename(home)
        except OSError: assert home.is_dir()                         # another worker was first
    return ""

def package(name):
    "The folder of a package; skips the test that asks where there is none."
    home = CACHE / f"{name}-{VERSIONS[name]}"
    if reason := fetch(name, home): pytest.skip(reason)
    return home / name
