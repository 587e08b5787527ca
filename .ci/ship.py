"Weights that are shipped, in less room: each file of data/models over 3 MB is rounded by `core.rounded`, in place and once. Run it after a record's weights have come home."
from pathlib import Path
from disdiff_tutorial.core import load_tensors, rounded, safe_open, save_tensors

def bytes_inside(path):
    "Are there rounded tensors in the file?"
    with safe_open(path, framework="pt") as f: return any(f.get_slice(k).get_dtype() == "I8" for k in f.keys())

for path in sorted(Path("data/models").glob("*.safetensors")):
    before = path.stat().st_size
    if before < 3e6 or bytes_inside(path): continue
    tensors, facts = load_tensors(path)
    save_tensors(path, rounded(tensors), **facts)
    print(f"{path.name}: {before:,} -> {path.stat().st_size:,} bytes")
