"diffusion.training: killed, resumed, shared between processes, out of disk, out of time, out of its mind."
import itertools, math, os, random, socket, subprocess, sys, time
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from disdiff_tutorial.core import load_tensors, save_tensors, seed_everything
from disdiff_tutorial.diffusion import training
from disdiff_tutorial.diffusion.dsm import dsm_loss
from disdiff_tutorial.diffusion.sde import VPSDE
from disdiff_tutorial.diffusion.training import Batches, as_function, fit
from disdiff_tutorial.diffusion.unet import UNet

# What the processes below have in common. `train` is the training that is killed, resumed and shared.
COMMON = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from disdiff_tutorial.core import load_tensors, save_tensors, seed_everything
from disdiff_tutorial.diffusion.dsm import dsm_loss
from disdiff_tutorial.diffusion.sde import VPSDE
from disdiff_tutorial.diffusion.training import Batches, fit
from disdiff_tutorial.diffusion.unet import UNet
torch.set_num_threads(1)
images = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
batches = Batches(images, size=16)

def train(seed, told=lambda step: None, **kw):
    seed_everything(seed); net, sde = UNet(width=8, blocks=1, stem=2), VPSDE()
    def get(step): told(step); return batches(step)
    return net, fit(lambda x: dsm_loss(net, x, sde), net, get, **{"progress": False, **kw})
"""
SHARED = """
def fixed(net, sde):
    "A loss without chance: noise and time come with the batch."
    return lambda x, eps, t: (net(sde.perturb(x, t, eps), t) - eps).square().mean()
def train_fixed(seed, **kw):
    seed_everything(seed); net = UNet(width=8, blocks=1, stem=2); g = torch.Generator().manual_seed(5)
    data = Batches(images, torch.randn(images.shape, generator=g), torch.rand(len(images), generator=g), size=16)
    return net, fit(fixed(net, VPSDE()), net, data, **{"progress": False, **kw})
"""
exec(COMMON + SHARED, own := {})
images, train, train_fixed = own["images"], own["train"], own["train_fixed"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def one_thread():
    "Bitwise equality holds for one number of threads."
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)


def python(code, *words, **kw): return subprocess.Popen([sys.executable, "-c", COMMON + code, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, **kw)


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def one_line(error, *words):
    text = str(error.value)
    assert text.startswith("expected ") and ", found " in text and ": " in text and "\n" not in text, text
    for word in words: assert word in text, text


class Line(nn.Module):
    "The smallest net: y = w x + b."
    def __init__(self, d=3):
        super().__init__(); self.lin = nn.Linear(d, 1)
    def loss(self, x): return (self.lin(x) - x.sum(1, keepdim=True)).square().mean()


def line(**kw):
    net = Line(); x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    return net, fit(net.loss, net, kw.pop("batches", Batches(x, size=8)), **{"progress": False, **kw})


# --- killed ---------------------------------------------------------------------------------------------------------------

def test_killed_at_random_steps_ends_with_the_same_weights(tmp_path):
    seed = random.SystemRandom().randrange(10**6); rng = random.Random(seed); print("seed of the kills", seed)
    steps, file = 90, tmp_path / "c.safetensors"
    code = "net, fitted = train(int(sys.argv[2]), lambda step: print(step, flush=True), steps=90, checkpoint=sys.argv[1], every=4)"
    for life, kill_at in enumerate(sorted(rng.sample(range(1, steps - 5), 2))):
        child = python(code, file, life)                                     # the second life has another seed: all comes from the file
        for said in child.stdout:
            if int(said) >= kill_at: break
        time.sleep(rng.random() * 0.02); child.kill(); child.communicate()
        assert child.returncode == -9
        step = load_tensors(file)[1]["step"]; print(f"killed at step {kill_at}, checkpoint of step {step}")
        assert step % 4 == 0 and kill_at - 8 < step < steps
    resumed, fitted = train(99, steps=steps, checkpoint=file, every=4)
    unbroken, whole = train(0, steps=steps)
    assert same(resumed, unbroken) and fitted.curve == whole.curve and fitted.images == whole.images and fitted.steps == steps and fitted.flop == whole.flop > 0


def test_killed_while_writing_leaves_a_whole_checkpoint(tmp_path):
    code = """
path, rng, seen, last = Path(sys.argv[1]), random.Random(int(sys.argv[2])), 0, 0
def forever():
    w = nn.Parameter(torch.zeros(1_000_000))
    fit(lambda x: (w - x).square().mean(), [w], lambda step: torch.tensor([float(step)]), steps=10**9, checkpoint=path, every=1, progress=False)
train(0, steps=1)                                                            # imports all that the children need
written = lambda: path.stat().st_mtime_ns if path.exists() else 0
for life in range(20):
    before, child = written(), os.fork()
    if child == 0: forever()
    while written() == before: time.sleep(0.001)
    time.sleep(rng.random() * 0.05)
    while life % 2 and not list(path.parent.glob(".*.tmp")): pass                # every other life ends while it writes
    time.sleep(rng.random() * 0.005)
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    left = list(path.parent.glob(".*.tmp")); seen += len(left)
    assert len(left) <= 1, left                                              # the next life clears up
    tensors, facts = load_tensors(path)
    assert facts["step"] >= last and tensors["model/0"].isfinite().all() and len(tensors["ema/0"]) == 1_000_000
    last = facts["step"]
print(seen, last)
"""
    seed = random.SystemRandom().randrange(10**6); print("seed of the kills", seed)
    child = python(code, tmp_path / "c.safetensors", seed); out, err = child.communicate()
    assert child.returncode == 0, err
    seen, last = map(int, out.split()); print(f"{seen} of 20 kills hit a write, {last} steps survived")
    assert seen > 0 and last > 0


# --- several processes ------------------------------------------------------------------------------------------------------

LAUNCHERS = {"accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"],
             "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]}

def launch(launcher, folder, code):
    "Run `code` in two processes; `rank` is known to it, its files go to the folder."
    script = folder / "script.py"; script.write_text(COMMON + "rank = int(os.environ['RANK'])\nfolder = Path(sys.argv[1])\n" + code)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    done = subprocess.run([sys.executable, "-m", *LAUNCHERS[launcher], str(port), str(script), str(folder)], capture_output=True, text=True, env=ENV, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]



def read(folder, name): return load_tensors(folder / f"{name}.safetensors")

def check_equal(folder, name):
    "Both ranks end with identical weights; returns the first's, and its facts."
    (a, facts), (b, _) = read(folder, f"{name}0"), read(folder, f"{name}1")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    return a, facts

FIXED = SHARED + """
net, fitted = train_fixed(rank, steps=30, warmup=5, checkpoint=folder / "shared.safetensors", every=10)
save_tensors(folder / f"fixed{rank}.safetensors", net.state_dict(), images=fitted.images)
"""


def check_as_one(folder):
    "The two processes' weights without chance are those of one process at the same global batch."
    weights, facts = check_equal(folder, "fixed")
    alone, fitted = train_fixed(0, steps=30, warmup=5)
    apart = max((weights[k] - x).abs().max().item() for k, x in alone.state_dict().items()); print("largest difference from one process", apart)
    assert apart < 1e-5 and facts["images"] == fitted.images


def test_two_processes_under_accelerate(tmp_path):
    launch("accelerate", tmp_path, FIXED); check_as_one(tmp_path)


def test_two_processes_under_torchrun(tmp_path):
    "Without chance, resumed, with noise, and with a batch that cannot be shared."
    launch("torchrun", tmp_path, FIXED + """
net, fitted = train_fixed(7, steps=30, checkpoint=folder / "shared.safetensors")                     # resumed in both: nothing left to do
save_tensors(folder / f"again{rank}.safetensors", net.state_dict(), steps=fitted.steps)
net, fitted = train(rank, steps=100, warmup=10, lr=3e-3)
save_tensors(folder / f"noisy{rank}.safetensors", net.state_dict(), curve=fitted.curve)
two = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])                                               # each process uses another part
fit(lambda x: two[rank](x).square().mean(), two, lambda step: torch.ones(4, 3), steps=5, progress=False)
save_tensors(folder / f"parts{rank}.safetensors", two.state_dict())
try: train(rank, steps=1, told=lambda step: setattr(batches, "size", 15))
except ValueError as err: save_tensors(folder / f"odd{rank}.safetensors", {}, error=str(err))
""")
    check_as_one(tmp_path)
    (fixed, _), (again, facts), (_, noisy) = (check_equal(tmp_path, name) for name in ("fixed", "again", "noisy"))
    check_equal(tmp_path, "parts")
    assert all(torch.equal(x, again[k]) for k, x in fixed.items()) and facts["steps"] == 30
    curve, theirs = train(0, steps=100, warmup=10, lr=3e-3)[1].curve, noisy["curve"]; print("loss of one process", curve, "of the first of two", theirs)
    assert curve != theirs and curve[-1][1] < 0.9 * curve[0][1]
    for (k, a), (_, b) in zip(curve, theirs, strict=True): assert abs(a - b) < 0.15 * a, k
    for rank in (0, 1): assert "expected batches of a multiple of 2 rows" in read(tmp_path, f"odd{rank}")[1]["error"]


def test_shares_are_disjoint_and_whole():
    "Two processes that both took the whole batch would end with the same weights too."
    class One: num_processes = 3
    parts = []
    for One.process_index in range(3): parts.append(training.share((torch.arange(6), torch.arange(6) * 10), One))
    assert sorted(torch.cat([x for x, _ in parts]).tolist()) == list(range(6)) and all(torch.equal(y, 10 * x) and len(x) == 2 for x, y in parts)


def test_a_launcher_that_starts_one_process_is_told(monkeypatch):
    "accelerate launch --cpu --num_processes 2 sets these and starts one process without a word."
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True"); monkeypatch.setenv("MASTER_PORT", "29500"); monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError) as error: line(steps=1)
    one_line(error, "several processes", "torchrun")


# --- not finite -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_not_finite_stops_and_names_the_step(tmp_path, bad):
    file, w = tmp_path / "c.safetensors", nn.Parameter(torch.ones(2))
    def loss(x):
        if bad == "loss" or not x.isnan(): return (w - 2).square().sum() + x.sum()
        return (w - w.detach()).sum().sqrt()                                  # 0, with an infinite slope
    batches = lambda step: torch.full((1,), math.nan if step == 46 else 0.)
    with pytest.raises(FloatingPointError) as error: fit(loss, [w], batches, steps=100, checkpoint=file, every=5, progress=False)
    one_line(error, "nan at step 47", "lower lr")
    tensors, facts = load_tensors(file)
    assert facts["step"] == 45 and all(x.isfinite().all() for x in tensors.values())
    again = nn.Parameter(torch.zeros(2))
    assert fit(lambda x: (again - 2).square().sum(), [again], lambda step: torch.zeros(1), steps=100, checkpoint=file, progress=False).steps == 100


# --- wrong arguments ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kw", [dict(), dict(steps=0), dict(steps=-3), dict(minutes=0), dict(minutes=-1.), dict(steps=5, minutes=0), dict(minutes=math.nan)])
def test_budget(kw):
    with pytest.raises(ValueError) as error: line(**kw)
    one_line(error, "budget")


@pytest.mark.parametrize("kw", [dict(lr=-.1), dict(lr=math.nan), dict(lr={"": .1, "lin.bias": -1.}), dict(warmup=-5), dict(clip=0.), dict(clip=-1.), dict(clip=math.nan), dict(ema=-.5), dict(ema=1.5), dict(ema=math.nan), dict(every=0)])
def test_settings_that_would_climb_or_stand_still(kw, tmp_path):
    with pytest.raises(ValueError) as error: line(steps=3, checkpoint=tmp_path / "c.safetensors", **kw)
    one_line(error, *(["learning rates of 0 or more"] if "lr" in kw else ["warmup >= 0, clip > 0, ema from 0 to 1, every >= 1"]))
    assert not list(tmp_path.iterdir())


def test_rates_by_name_and_clipping():
    "The first step of Adam moves every weight by its own rate; clipped at 1e-6, eps = 1e-8 hardly shows."
    def moved(**kw): torch.manual_seed(0); was = Line(); torch.manual_seed(0); net, _ = line(steps=1, warmup=0, ema=0, **kw); return [(a - b).abs() for a, b in zip(net.parameters(), was.parameters())]
    weight, bias = moved(lr={"": .1, "lin.bias": .02})
    assert torch.allclose(weight, torch.tensor(.1)) and torch.allclose(bias, torch.tensor(.02))
    assert max(x.max() for x in moved(lr=.1, clip=1e-9)) < .011                               # |g| / (|g| + 1e-8) with |g| at most 1e-9


@pytest.mark.parametrize("other", [.1, {"lin": .1, "": .2}, {"": .1, "lin.weight": .3}])
def test_resumed_at_other_rates_each_weight_keeps_its_moments(tmp_path, other):
    file, first = tmp_path / "c.safetensors", {"": .1, "lin.bias": .2}
    class Three(Line):
        def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(1))
        def loss(self, x): return (self.scale * self.lin(x) - x.sum(1, keepdim=True)).square().mean()
    net = Three(); x = torch.randn(64, 3); fit(net.loss, net, [x], steps=20, lr=first, checkpoint=file, progress=False)
    def moments(lr):
        state = training.State(Three(), lr); state.load(file)
        return {name: state.optimiser.state[p]["exp_avg"] for name, p in zip(state.names, state.trained)}
    was, now = moments(first), moments(other)
    assert all(torch.equal(was[k], now[k]) for k in was) and len({x.sum().item() for x in was.values()}) == 3


def test_checkpoint_that_is_a_folder(tmp_path):
    with pytest.raises(OSError) as error: line(steps=3, checkpoint=tmp_path)
    one_line(error, "to write", "directory")


def test_nothing_to_train():
    frozen = Line().requires_grad_(False)
    for params in ([], nn.ModuleList(), frozen, frozen.parameters()):
        with pytest.raises(ValueError) as error: fit(Line().loss, params, [torch.ones(2, 3)], steps=1)
        one_line(error, "parameters to train")
    with pytest.raises(ValueError) as error: fit(Line().loss, [torch.zeros(2, requires_grad=True)], [torch.ones(2, 3)], steps=1)
    one_line(error, "wrap tensors in nn.Parameter")
    for loss, word in ((Line().loss, "no gradient"), (lambda x: x.sum(), "requires_grad=False"), (lambda x: (Line().lin(x)), "shape (2, 1)"), (lambda x: x.sum().item(), "without .item()"), (lambda x: None, "found NoneType")):
        with pytest.raises(ValueError) as error: fit(loss, Line(), [torch.ones(2, 3)], steps=1, progress=False)
        one_line(error, word)


def test_checkpoint_of_another_model(tmp_path):
    file = tmp_path / "c.safetensors"
    fit((net := Line(4)).loss, net, [torch.ones(2, 4)], steps=3, checkpoint=file, progress=False)
    before = file.read_bytes()
    with pytest.raises(ValueError) as error: line(steps=5, checkpoint=file)
    one_line(error, "lin.weight (1, 4) for (1, 3)", "move it away")
    mine = Line(); mine.lin.bias.requires_grad_(False); was = mine.lin.weight.clone(); line(steps=3, checkpoint=tmp_path / "d.safetensors")
    with pytest.raises(ValueError) as error: fit(mine.loss, mine, [torch.ones(2, 3)], steps=5, checkpoint=tmp_path / "d.safetensors")
    one_line(error, "ema/lin.bias (1,) for missing")
    assert torch.equal(mine.lin.weight, was) and file.read_bytes() == before              # nothing was changed on the way to the error
    save_tensors(file, {"w": torch.zeros(2)})
    with pytest.raises(ValueError) as error: line(steps=5, checkpoint=file)
    one_line(error, "to fit this model", "missing")
    file.write_bytes(b"half a checkp")
    with pytest.raises(ValueError) as error: line(steps=5, checkpoint=file)
    one_line(error, "delete it and make it again")


def test_batches_that_do_not_work():
    x = torch.randn(20, 3)
    with pytest.raises(ValueError) as error: line(batches=(b for b in x.split(5)), steps=9)
    one_line(error, "batches that can be walked again", "none left")
    with pytest.raises(ValueError) as error: line(batches=[], steps=1)
    one_line(error, "none left")
    for tensors in ((x, x[:7]), (), (x[:0],)):
        with pytest.raises(ValueError) as error: Batches(*tensors)
        one_line(error, "tensors of one length")
    for size in (0, 2.5, math.nan):
        with pytest.raises(ValueError) as error: Batches(x, size=size)
        one_line(error, "at least one row")
    for batch, word in (({"x": x}, "dict"), ((x, None), "NoneType"), (torch.tensor(1.), "Tensor"), ((), "nothing")):
        with pytest.raises(ValueError) as error: line(batches=lambda step: batch, steps=1)
        one_line(error, "a batch of tensors (n, ...)", f"found {word}")


# --- disk ---------------------------------------------------------------------------------------------------------------------

def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    code = """
import resource
file = Path(sys.argv[1]); train(0, steps=10, checkpoint=file); before = file.read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for target in (file, file.with_name("new.safetensors")):
    try: train(0, steps=30, checkpoint=target, every=5)
    except OSError as err: print(err)
assert file.read_bytes() == before and load_tensors(file)[1]["step"] == 10
assert os.listdir(file.parent) == [file.name], os.listdir(file.parent)
"""
    child = python(code, tmp_path / "c.safetensors"); out, err = child.communicate()
    assert child.returncode == 0, err
    lines = out.splitlines(); print(lines)
    assert len(lines) == 2 and all(x.startswith("expected to write ") and "too large" in x and x.endswith("free space or choose a writable folder") for x in lines)


def test_unwritable_folder_fails_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("not a folder"); asked = []
    def batches(step): asked.append(step); return torch.ones(2, 3)
    with pytest.raises(OSError) as error: line(batches=batches, steps=5, checkpoint=tmp_path / "file" / "c.safetensors")
    one_line(error, "choose a writable folder")
    assert not asked and [p.name for p in tmp_path.iterdir()] == ["file"]


# --- time -----------------------------------------------------------------------------------------------------------------------

def test_minutes_as_a_budget(tmp_path):
    rates, file, began = [], tmp_path / "c.safetensors", time.perf_counter()
    net = Line(); x = torch.ones(2, 3)
    real = training.rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "rate", lambda step, done, warmup: rates.append(real(step, done, warmup)) or rates[-1])
        fitted = fit(net.loss, net, lambda step: time.sleep(0.001) or x, minutes=0.05, warmup=5, checkpoint=file, progress=False)
    took = time.perf_counter() - began; print(f"{fitted.steps} steps in {took:.2f} s")
    assert 3 <= took < 4 and fitted.steps > 50 and abs(fitted.seconds - 3) < 0.5
    assert rates[-1] < 0.1 and max(rates) == 1 and rates[0] < 0.2                        # the whole schedule, by the clock
    assert fit(net.loss, net, [x], minutes=0.05, checkpoint=file, progress=False).steps == fitted.steps   # spent


def test_minutes_as_a_limit_do_not_change_the_weights(tmp_path):
    file, sittings = tmp_path / "c.safetensors", []
    while not sittings or sittings[-1] < 60:
        began = time.perf_counter(); resumed, fitted = train(len(sittings), steps=60, minutes=0.003, checkpoint=file); sittings.append(fitted.steps)
        assert time.perf_counter() - began < 2
    print("sittings end at steps", sittings)
    unbroken, whole = train(0, steps=60)
    assert len(sittings) > 1 and sittings == sorted(set(sittings)) and same(resumed, unbroken) and fitted.curve == whole.curve


# --- batches ----------------------------------------------------------------------------------------------------------------------

LOADERS = {
    "list": lambda x: [(b,) for b in x.split(16)],
    "loader": lambda x: DataLoader(TensorDataset(x), 16),
    "shuffled loader": lambda x: DataLoader(TensorDataset(x), 16, shuffle=True, generator=torch.Generator().manual_seed(3)),
}

@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("stop", [14, 17, 23])                                # before, at and after the end of an epoch
def test_iterables_are_wound_forward(tmp_path, kind, stop):
    x, file = torch.rand(90, 3, generator=torch.Generator().manual_seed(0)), tmp_path / "c.safetensors"
    def run(seed, stop=None, **kw):
        seed_everything(seed); net = Line(); count = itertools.count()
        def loss(x):
            if next(count) == stop: raise InterruptedError
            return net.loss(x + torch.randn_like(x))                          # noise from the same random state that loaders draw from
        fit(loss, net, LOADERS[kind](x), steps=30, progress=False, **kw); return net
    with pytest.raises(InterruptedError): run(0, stop, checkpoint=file, every=1)
    assert same(run(1, checkpoint=file), run(0))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1), st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_batches_are_a_function_of_the_step(n, size, seed, step):
    x = torch.arange(n); batches, per_epoch = Batches(x, -x, size=size, seed=seed), n // min(size, n)
    rows, minus = batches(step)
    assert torch.equal(rows, -minus) and len(rows) == min(size, n)
    epoch = [batches(k)[0] for k in range(step // per_epoch * per_epoch, (step // per_epoch + 1) * per_epoch)]
    assert len(torch.cat(epoch).unique()) == per_epoch * len(rows)
    assert torch.equal(Batches(x, size=size, seed=seed)(step)[0], rows)       # whatever was asked before


def test_a_batch_may_be_a_bare_tensor():
    assert as_function(lambda step: torch.ones(2))(0)[0].shape == (2,) and as_function([torch.ones(2)])(0)[0].shape == (2,)


# --- the average --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ema", [0.5, 0.9, 0.999])
def test_average_is_the_closed_form(ema):
    start = torch.randn(5, dtype=torch.float64)
    def run(ema):
        "The weights before each step and at the end."
        w, path = nn.Parameter(start.clone()), []
        def loss(x): path.append(w.detach().clone()); return (w * x).sin().sum()
        fit(loss, [w], lambda step: torch.full((5,), 1. + step % 7, dtype=torch.float64), steps=60, lr=0.1, ema=ema, progress=False)
        return path + [w.detach()]
    path, averaged = run(0), run(ema)
    assert all(torch.equal(a, b) for a, b in zip(path[:-1], averaged[:-1]))                # averaging does not disturb the training
    decay = [min(ema, k / (k + 10)) for k in range(1, 61)]
    share = [math.prod(decay)] + [(1 - decay[k]) * math.prod(decay[k + 1:]) for k in range(60)]
    assert sum(share) == pytest.approx(1)
    assert torch.allclose(averaged[-1], sum(s * x for s, x in zip(share, path)), atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    sde, file, x = VPSDE(), tmp_path / "c.safetensors", images.cuda()
    def run(bad=None, **kw):
        net = UNet(width=32).cuda(); get = Batches(x, size=50)
        fitted = fit(lambda x: dsm_loss(net, x, sde), net, lambda step: get(step)[0] * (math.nan if step == bad else 1), progress=False, **kw)
        return net, fitted
    with pytest.raises(FloatingPointError) as error: run(bad=61, steps=100, checkpoint=file, every=10)
    one_line(error, "nan at step 62")
    assert load_tensors(file)[1]["step"] == 60 and all(x.isfinite().all() for x in load_tensors(file)[0].values())
    with pytest.raises(FloatingPointError) as error: run(bad=13, steps=20, checkpoint=tmp_path / "d.safetensors")
    one_line(error, "nan at step 14")                                        # found at the end, before the file is written
    assert load_tensors(tmp_path / "d.safetensors")[1]["step"] == 0
    net, fitted = run(steps=100, checkpoint=file)
    assert fitted.steps == 100 and [k for k, _ in fitted.curve] == [25, 50, 75, 100] and next(net.parameters()).is_cuda
