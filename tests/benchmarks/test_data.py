"""Images per second: `Sprites` and `Scenes` drawn on one core, beside reading the same images, in shuffled batches of 64, from the files that people use.

The peers get the best of what they do: the compressed npz (as dSprites ships) is unpacked into memory once, and the HDF5 file (gzip, as 3dshapes.h5 ships) has one image per chunk,
which suits random access best; h5py's own choice of chunks, as in the HDF5 version of dSprites, is shown too. Both go through a DataLoader with two workers that keep running, or
with none where that is faster. Each way runs in a process of its own, which measures its peak of resident memory, children included.

Ours comes in two ways: drawn on the fly, and drawn once and kept, sprites as bits (`Packed`), scenes as they are, which takes the memory of the unpacked npz.

`make test` takes a few batches of each, untimed; `make bench` times them on BENCH_IMAGES images (default 40,960) and leaves a record. Loading an npz takes time and memory in proportion to
the images; the record has both numbers for the whole data set too, scaled from what was measured. Two claims are kept apart: what was drawn once and kept is asserted to be 5 times faster than
either file through two workers; drawing afresh is only recorded.

A second record, benchmark/memory, has the resident memory of a process that opens files of the true size of MPI3D and 3D Shapes and reads random batches:
`pytest tests/benchmarks/test_data.py -k memory`, a minute."""
import importlib, json, os, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from disdiff_tutorial.core import Record, runs_dir
from disdiff_tutorial.data.sprites import Packed
from disdiff_tutorial.diffusion.training import Batches

h5py = pytest.importorskip("h5py", reason="h5py is not installed")
BATCH, WHOLE = 64, {"Sprites": 737_280, "Scenes": 480_000}

def renderer(name):
    "The data set on the CPU; None while there is no such module."
    module = f"disdiff_tutorial.data.{name.lower()}"
    return getattr(importlib.import_module(module), name)(size=64, device="cpu") if importlib.util.find_spec(module) else None

def write(name, n, folder):
    "`n` random images of the data set, as they ship: (n, 64, 64) or (n, 64, 64, 3) uint8, in one npz and two HDF5 files."
    data, images = renderer(name), []
    for part in data.grid.sample(n, torch.Generator().manual_seed(0)).split(4096):
        x = data.images(part).permute(0, 2, 3, 1).numpy()
        images.append(x[..., 0] // 255 if x.shape[-1] == 1 else x)               # dSprites ships 0 and 1
    images = np.concatenate(images)
    np.savez_compressed(folder / "images.npz", imgs=images)
    for kind, chunks in (("per-image", (1, *images.shape[1:])), ("automatic", True)):
        with h5py.File(folder / f"{kind}.h5", "w") as f: f.create_dataset("images", data=images, chunks=chunks, compression="gzip", compression_opts=4)

# --- the ways, each run in a fresh process ------------------------------------------------------------------------------

class InMemory(torch.utils.data.Dataset):
    def __init__(self, path): self.images = np.load(path)["imgs"]                # unpacked once; np.load(path)["imgs"][i] would unpack all for each image
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return torch.from_numpy(self.images[i])

class InFile(torch.utils.data.Dataset):
    "Opened by each worker for itself, as h5py wants."
    def __init__(self, path):
        self.path, self.images = path, None
        with h5py.File(path) as f: self.n = len(f["images"])
    def __len__(self): return self.n
    def __getitem__(self, i):
        if self.images is None: self.images = h5py.File(self.path)["images"]
        return torch.from_numpy(self.images[i])

def megabytes(file, *fields): return sum(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(fields)) / 1024

def peak(workers=()):
    "Resident megabytes at the peak of this process, and what its workers have for themselves alone (Linux)."
    return megabytes("/proc/self/status", "VmHWM:") + sum(megabytes(f"/proc/{pid}/smaps_rollup", "Private_") for pid in workers)

def rate(batches, rounds=4):
    "Images per second, the best round over all batches of `batches()`; the first round warms up."
    best = 0.
    for i in range(rounds):
        began, count = time.perf_counter(), 0
        for batch in batches(): count += len(batch)
        if i or rounds == 1: best = max(best, count / (time.perf_counter() - began))
    return best

def measure(way, name, folder, images):
    "What one way gives, as a dict; runs in the fresh process."
    torch.set_num_threads(1)
    base, began = peak(), time.perf_counter()
    if way.startswith("ours"):
        data = Packed(renderer(name)) if "packed" in way else renderer(name)
        get = Batches(data.sample(images, torch.Generator().manual_seed(0))[0], size=BATCH, seed=1) if "kept" in way else data.batches(BATCH, seed=1)
        ready = time.perf_counter() - began
        speed = rate(lambda: (get(step)[0] for step in range(images // BATCH)))
        return dict(ready=ready, rate=speed, memory=peak() - base)
    kind, workers = way.rsplit(", ", 1)
    every = InMemory(folder / "images.npz") if kind == "npz" else InFile(folder / f"{kind.removeprefix('hdf5 ')}.h5")
    ready, workers = time.perf_counter() - began, int(workers.split()[0])
    automatic = "automatic" in kind                                              # a few images a second: two batches, once
    chosen = torch.utils.data.Subset(every, torch.randperm(len(every))[:2 * BATCH].tolist()) if automatic else every
    loader = torch.utils.data.DataLoader(chosen, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    speed = rate(lambda: loader, rounds=1 if automatic else 4)
    return dict(ready=ready, rate=speed, memory=peak([w.pid for w in loader._iterator._workers] if workers else []) - base)

WAYS = ("ours", "ours, packed", "ours, kept", "npz, 2 workers", "npz, 0 workers", "hdf5 per-image, 2 workers", "hdf5 per-image, 0 workers", "hdf5 automatic, 2 workers")
PEERS = tuple(way for way in WAYS if way.endswith("2 workers"))                # what the goal of 5 times is about

def apart(way, name, folder, images):
    "`measure` in a fresh process with one thread."
    code = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_data as t; from pathlib import Path; " \
           f"print(json.dumps(t.measure({way!r}, {name!r}, Path({str(folder)!r}), {images})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HDF5_USE_FILE_LOCKING": "FALSE"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

# --- tests --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def record(): return Record("benchmark/data", "cpu", 0, config=dict(batch=BATCH))   # one for all data sets

@pytest.fixture(scope="module", params=list(WHOLE))
def files(request, tmp_path_factory):
    if renderer(request.param) is None: pytest.skip(f"there is no {request.param} yet")
    timed = not request.config.getoption("benchmark_disable")
    n = int(os.environ.get("BENCH_IMAGES", 40_960)) if timed else 512
    folder = tmp_path_factory.mktemp(request.param)
    write(request.param, n, folder)
    return request.param, folder, n, timed

def test_the_files_hold_the_images(files):
    name, folder, n, _ = files
    data = renderer(name)
    x = data.images(data.grid.sample(n, torch.Generator().manual_seed(0))[:64]).permute(0, 2, 3, 1).squeeze(-1).numpy()
    if name == "Sprites": x = x // 255
    for kind in ("per-image", "automatic"):
        with h5py.File(folder / f"{kind}.h5") as f: assert (f["images"][:64] == x).all() and f["images"].compression == "gzip" and len(f["images"]) == n
    assert (np.load(folder / "images.npz")["imgs"][:64] == x).all()

@pytest.mark.timeout(3600)
def test_rates(files, record):
    name, folder, n, timed = files
    def add(what, value, n, split): record.add(f"{name}: {what}", value, n, split)
    record.config[name] = dict(images=n, npz_megabytes=(folder / "images.npz").stat().st_size / 1e6)
    began, found = time.perf_counter(), {}
    for way in WAYS:
        if way == "ours, packed" and (name != "Sprites" or not timed): continue   # packed are all images of a black-and-white set: ten seconds
        if not timed and name == "Sprites" and way not in ("ours", "npz, 0 workers"): continue      # each way starts a process: one world tries them all
        if way == "ours, kept" and name == "Sprites": continue                     # that is what packing does, in an eighth of the memory
        found[way] = apart(way, name, folder, n if timed else BATCH)
        add(f"images/s, {way}", found[way]["rate"], n, "best of rounds")
        add(f"seconds until the first batch, {way}", found[way]["ready"], 1, "once")
        add(f"peak MB over an idle process, {way}", found[way]["memory"], 1, "once")
    if "ours, kept" in found: add("seconds to draw the whole set, scaled", found["ours, kept"]["ready"] * WHOLE[name] / n, n, "scaled")
    add("seconds to load the whole npz, scaled", found["npz, 0 workers"]["ready"] * WHOLE[name] / n, n, "scaled")
    add("MB of the whole npz in memory, scaled", np.load(folder / "images.npz")["imgs"].nbytes / 2**20 * WHOLE[name] / n, n, "scaled")
    for ours in [way for way in found if way.startswith("ours")]:
        for peer in [way for way in found if not way.startswith("ours")]:
            add(f"{ours}, beside {peer}", found[ours]["rate"] / found[peer]["rate"], n, "ratio")
    record.seconds += time.perf_counter() - began
    print("\n" + "\n".join(f"{k:70s} {m['value']:12.2f}" for k, m in record.metrics.items() if k.startswith(name)))
    if not timed: return
    print(record.save(os.environ.get("BENCH_OUT") or runs_dir()))
    kept = "ours, packed" if name == "Sprites" else "ours, kept"
    times = {ours: {peer: found[ours]["rate"] / found[peer]["rate"] for peer in PEERS} for ours in ("ours", kept)}
    for ours, claim in (("ours", "drawn afresh, no claim"), (kept, "drawn once and kept, at least 5")):
        print(f"{name}, {claim}: " + ", ".join(f"{v:.1f} times {peer}" for peer, v in times[ours].items()))
    assert min(times[kept].values()) >= 5, times[kept]

# --- memory -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def memory_record(): return Record("benchmark/memory", "cpu", 0)

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure memory with")
@pytest.mark.parametrize("layout", ["npz", "h5 plain", "h5, an image a chunk", "h5, automatic chunks"])
def test_memory(layout, tmp_path, memory_record, request):
    "One random batch. Above the idle process we stay under 200 MB; what the libraries take by themselves is recorded beside it."
    from test_files import memory, true_size
    began, (path, numbers, pictures) = time.perf_counter(), true_size(layout, tmp_path)
    if path.stat().st_blocks * 512 > 2e9: pytest.skip("this file system has no holes")
    memory_record.config[layout] = dict(file_megabytes=path.stat().st_size / 1e6, pictures_written=len(numbers))
    for who, plain in (("ours, with torch", False), ("numpy and h5py alone", True)):
        idle, opened, end, total = memory(layout, tmp_path, plain, times=1)
        assert total == pictures[[0, -1]].sum()
        for what, value in (("idle", idle), ("at the peak", end), ("at the peak over idle", end - idle)): memory_record.add(f"{layout}: MB {what}, {who}", value, 1, "once")
        print(f"{layout}, {who}: idle {idle:.0f} MB, at the peak {end:.0f} MB, {end - idle:.0f} MB more")
        assert end - idle < 200
    memory_record.seconds += time.perf_counter() - began
    if not request.config.getoption("benchmark_disable"): print(memory_record.save(os.environ.get("BENCH_OUT") or runs_dir()))
