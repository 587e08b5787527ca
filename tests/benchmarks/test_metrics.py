"""The metrics beside disent's, on the same tables: 10,000 and 5,000 points, 6 factors (those of 3D Shapes), 10 and 20 codes.

`make test` runs each once on small tables, untimed; `make bench` times them in turns, prints the ratios, and leaves a record. The encoder is one linear map and pictures are a row of an
array in memory, so a ratio is of the metrics' own work. disent draws and reads pictures as its own data set does; a second line ("no pictures") spares it even that and hands it
the factors. disent's DCI takes minutes and is timed once; so is ours."""
import math, os, time, warnings
import numpy as np, pytest, torch
from disdiff_tutorial.core import Record, runs_dir
from disdiff_tutorial.data.factors import FactorGrid
from disdiff_tutorial.metrics import disentanglement as m

pytest.importorskip("sklearn"); pytest.importorskip("disent", reason="the extra `peers` is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from disent.dataset import DisentDataset
    from disent.dataset.data import ArrayGroundTruthData
    from disent.metrics import _dci, _factor_vae, _mig, _sap
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = (10, 10, 10, 8, 4, 15)

NAMES = [f"f{k}" for k in range(6)]

class Stored:
    "Images of six pixels that are their factors, all 480,000 in memory."
    def __init__(self):
        self.grid = FactorGrid(NAMES, SIZES)
        self.array = self.grid.factors(torch.arange(len(self.grid))).to(torch.uint8)[:, None, None]
    def images(self, factors): return self.array[self.grid.index(factors)]
    def disent(self): return DisentDataset(ArrayGroundTruthData(self.array.numpy(), NAMES, SIZES))

class Free:
    "What disent needs of a data set, at no cost: the factors are the pictures."
    num_factors = 6
    def __init__(self): self.gt_data = self
    def sample_factors(self, n): return np.stack([np.random.randint(s, size=n) for s in SIZES], 1)
    def dataset_batch_from_factors(self, factors, mode): return torch.from_numpy(factors)

@pytest.fixture(scope="module")
def data(): return Stored()

def tables(data, codes, n, n_test):
    "An encoder that mixes factors a little, and its four tables."
    g = torch.Generator().manual_seed(codes)
    mix = torch.eye(6, codes) + .2 * torch.randn(6, codes, generator=g)
    middle, width = torch.tensor(SIZES) / 2 - .5, torch.tensor(SIZES) / 3.4
    def encode(x): return ((x.flatten(1).float() - middle) / width) @ mix
    f = data.grid.sample(n + n_test, g); z = encode(f) + .3 * torch.randn(n + n_test, codes, generator=g)
    return encode, (z[:n], f[:n], z[n:], f[n:])

def ours(data, encode, four, votes, model, pooled):
    z, f, zt, ft = four
    return {"FactorVAE score": (lambda: m.factorvae_pooled(z, f, zt, ft, votes)) if pooled else (lambda: m.factorvae_score(encode, data, votes, progress=False)),
            "MIG": lambda: m.mig(z, f), "SAP": lambda: m.sap(*four), "DCI": lambda: m.dci(*four, model)}

def theirs(source, encode, four, votes):
    z, f, zt, ft = (v.numpy().T for v in four)
    def vote():
        v = four[0].var(0).numpy()
        for n in votes: _factor_vae._generate_training_batch(source, encode, 64, n, v, v > .05 ** 2)
    return {"FactorVAE score": vote, "MIG": lambda: _mig._compute_mig(z, f), "SAP": lambda: _sap._compute_sap(z, f, zt, ft, False), "DCI": lambda: _dci._compute_dci(z, f, zt, ft)}

def three(dci):
    "Disentanglement, completeness and informativeness, of ours or of disent."
    names = "disentanglement", "completeness", "informativeness"
    return dict(zip(names, dci if isinstance(dci, m.DCI) else (dci[f"dci.{k}"] for k in (*names[:2], "informativeness_test"))))

@pytest.mark.timeout(3600)
@pytest.mark.parametrize("codes", [10, 20])
def test_speed(data, codes, request):
    timed = not request.config.getoption("benchmark_disable")
    n, n_test, votes = (10_000, 5_000, (10_000, 5_000)) if timed else (150, 100, (40, 20))
    encode, four = tables(data, codes, n, n_test)
    ways = {"disent": theirs(data.disent(), encode, four, votes), "disent, no pictures": {"FactorVAE score": theirs(Free(), encode, four, votes)["FactorVAE score"]},
            "ours": ours(data, encode, four, votes, "hist", False), "ours, pooled votes, exact trees": ours(data, encode, four, votes, "boosted", True)}
    if not timed:                                                                  # exact trees of 57 classes take minutes even here
        for way in ("disent", "ours, pooled votes, exact trees"): del ways[way]["DCI"]
    seconds = {way: dict.fromkeys(jobs, math.inf) for way, jobs in ways.items()}
    record, began = Record(f"benchmark/metrics-{codes}-codes", "cpu", 0, config=dict(n=n, n_test=n_test, factors=6, codes=codes, votes=list(votes), threads=torch.get_num_threads(), cores=os.cpu_count())), time.perf_counter()
    found = {}
    for name in ("MIG", "SAP", "FactorVAE score", "DCI"):
        for _ in range(3 if timed and name in ("MIG", "SAP") else 1):              # in turns, so that a busy moment hits none alone
            for way, jobs in ((w, j) for w, j in ways.items() if name in j):
                start = time.perf_counter(); found[way, name] = jobs[name](); seconds[way][name] = min(seconds[way][name], time.perf_counter() - start)
    for way in ways:
        for name, s in seconds[way].items(): record.add(f"seconds, {name}, {way}", s, n, "test tables")
        if way.startswith("disent"): continue
        record.add(f"times faster than no pictures, FactorVAE score, {way}", seconds["disent, no pictures"]["FactorVAE score"] / seconds[way]["FactorVAE score"], n, "test tables")
        for name, s in seconds[way].items(): record.add(f"times faster, {name}, {way}", seconds["disent"].get(name, s) / s, n, "test tables")
        record.add(f"times faster, all four, {way}", sum(seconds["disent"].values()) / sum(seconds[way].values()), n, "test tables")
    for way in ways:
        if (way, "DCI") in found:
            for k, v in three(found[way, "DCI"]).items(): record.add(f"DCI {k}, {way}", v, n_test, "test tables")
    start = time.perf_counter(); scores = m.evaluate_codes(*four, votes=votes, sizes=(1000, 100) if timed else (50,), progress=False)
    record.add("seconds, evaluate_codes, all metrics, hist", time.perf_counter() - start, n, "test tables")
    assert all(math.isfinite(row.held_out) for row in scores)
    record.seconds = time.perf_counter() - began
    if timed:
        print("\n" + "\n".join(f"{k:62s} {v['value']:10.3f}" for k, v in record.metrics.items()), "\n", record.save(os.environ.get("BENCH_OUT") or runs_dir()))
        assert record.metrics["times faster, all four, ours"]["value"] >= 5
        assert record.metrics["times faster, FactorVAE score, ours"]["value"] >= 20

def test_both_give_one_number(data):
    "The tables of this benchmark are scored alike by both, so the times above compare like with like."
    encode, four = tables(data, 10, 300, 200)
    z, f, zt, ft = (v.numpy().T for v in four)
    assert m.mig(*four[:2]) == pytest.approx(_mig._compute_mig(z, f)["mig.discrete_score"], abs=1e-6)
    assert m.sap(*four) == pytest.approx(_sap._compute_sap(z, f, zt, ft, False)["sap.score"], abs=1e-3)
