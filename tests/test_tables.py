"Published and own numbers side by side: the map between them holds, own numbers are those of the records, and no cell is empty without a reason."
import functools, inspect, json, math, re, shutil, statistics
from pathlib import Path
import pytest, torch
from disdiff_tutorial.core import Config, Record, Unfinished, load_tensors, seed_everything
from disdiff_tutorial.results import tables as T
from disdiff_tutorial.run import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = [(r["paper"], r["number"]) for r in T.rows("items") if r["kind"] == "table"]
GOOD = dict(paper="dyga", table="4", row="+DyGA", column="DCI", experiment="dyga/rooms-dyga", metric="DCI disentanglement, hist", like="yes", note="")

@pytest.fixture(autouse=True)
def shipped_only(tmp_path, monkeypatch): monkeypatch.setenv("DISDIFF_RUNS", str(tmp_path / "runs"))

@pytest.fixture
def found(): return T.at_hand()

def made_by(name):
    "Module and function of an experiment."
    inside = inspect.getclosurevars(EXPERIMENTS[name]).nonlocals
    return inside["module"], inside["function"]

# ---- the map

def test_every_row_of_the_map_is_good(found):
    listed = T.ways(found=found)
    assert len(listed) == len(T.rows("own")) and {w.like for w in listed} <= {"", "yes"}

def test_metrics_of_experiments_without_a_record_are_those_of_their_siblings(found):
    "An experiment that nobody has trained yet must note what another call of the same function has noted."
    for way in T.ways(found=found):
        if way.experiment and way.experiment not in found:
            siblings = [r for name, rs in found.items() if name in EXPERIMENTS and made_by(name) == made_by(way.experiment) for r in rs]
            assert not siblings or any(T.reading(r, way.metric) for r in siblings), way

@pytest.mark.parametrize("wrong, says", [
    (dict(row="+ DyGA"), "expected a published cell, found dyga 4, \\+ DyGA, DCI: compare own.csv"), (dict(column="MIG"), "expected a published cell"), (dict(table="13"), "expected a table among"),
    (dict(experiment="dyga/romos"), "expected an experiment that run knows, found 'dyga/romos' for dyga 4"), (dict(metric="DCI"), "expected a metric of dyga/rooms-dyga, found 'DCI' for dyga 4"),
    (dict(experiment=""), "expected an experiment and a metric, or a note"), (dict(experiment="", metric=""), "expected an experiment and a metric, or a note")])
def test_a_wrong_row_gives_one_line(wrong, says, found):
    assert T.ways([GOOD], found)
    with pytest.raises(ValueError, match=says) as err: T.ways([GOOD | wrong], found)
    assert "\n" not in str(err.value)

def test_compared_scores_lie_between_0_and_1(found):
    "A difference is coloured only where both sides are scores of one kind: no FID, no setting."
    for w in T.ways(found=found):
        if w.like: assert not w.metric.startswith(("FID", "config.")) and all(-1 <= float(p.value) <= 1 for (r, c), p in T.published(w.paper, w.table).items() if w.row in (r, "*") and w.column in (c, "*"))

# ---- own numbers

def test_own_numbers_are_those_of_the_records(found):
    listed, seen = T.ways(found=found), 0
    raw = [json.loads(p.read_text()) for p in (ROOT / "data/records").glob("*.json")]
    for t in NUMBERS:
        for (row, column), o in T.table(*t, listed, found).owned().items():
            if o.way.metric.startswith("config."): values = [functools.reduce(dict.__getitem__, o.way.metric.split("."), r) for r in raw if (r["name"], r["scale"]) == (o.way.experiment, o.scale)]
            else: values = [r["metrics"][o.way.metric]["value"] for r in raw if (r["name"], r["scale"]) == (o.way.experiment, o.scale) and o.way.metric in r["metrics"]]
            assert math.isclose(o.value, max(values) if column.endswith("/ max") else sum(values) / len(values), rel_tol=1e-9, abs_tol=1e-12)
            assert len(o.seeds) == len(values) == len(o.links) and o.scale != "smoke"
            if o.spread is not None: assert math.isclose(o.spread, statistics.stdev(values), abs_tol=1e-12)
            seen += 1
    assert seen > 80

def record(name, scale, seed, **metrics):
    r = Record(name, scale, seed)
    for k, v in metrics.items(): r.add(k, v, 10, "held out")
    return r

def test_scales_are_never_mixed(tmp_path, found):
    "The larger scale wins, with its own seeds alone; smoke never counts."
    cell = "dyga", 3, "DisDiff", "Shapes3D / DCI"                                  # answered by dyga/disdiff alone, which has no record of a GPU
    assert T.own(*cell, found=found).scale == "cpu"
    for scale, seed, value in (("smoke", 7, .9), ("gpu", 5, .2), ("gpu", 6, .4)): record("dyga/disdiff", scale, seed, **{"DCI disentanglement, hist": value, "FactorVAE score": value}).save(tmp_path / "runs")
    o = T.own(*cell)
    assert (o.scale, o.seeds, round(o.value, 9), round(o.spread, 9)) == ("gpu", [5, 6], .3, round(statistics.stdev([.2, .4]), 9))
    smoke = T.at_hand()
    assert all(r.scale != "smoke" for rs in smoke.values() for r in rs)

def test_a_record_made_here_replaces_the_shipped_one_of_its_seed(tmp_path, found):
    old = {r.seed: r for r in found["dyga/rooms-dyga"]}
    record("dyga/rooms-dyga", "cpu", 0, **{"DCI disentanglement, hist": .123}).save(tmp_path / "runs")
    new = {r.seed: r for r in T.at_hand()["dyga/rooms-dyga"]}
    assert set(new) == set(old) and T.reading(new[0], "DCI disentanglement, hist")[0] == .123

def test_the_first_answer_with_a_record_counts(tmp_path, found):
    "LCG-DM's row is answered by all of dSprites where there is a record of it, by the squares where not; a note says how a training was shortened."
    small = {k: v for k, v in found.items() if k != "lcgdm/dsprites"}
    assert T.own("lcgdm", 1, "LCG-DM / encoded", "MIG", found=small).way.experiment == "lcgdm/sprites"
    large = record("lcgdm/dsprites", "gpu", 0, **{"MIG": .3, "FactorVAE score": .8})
    for cut, says in ((None, "dSprites"), ({"net": [300, 20_000]}, "dSprites; shortened: net, 300 of 20,000 steps")):
        if cut: large.config["cut"] = cut
        o = T.own("lcgdm", 1, "LCG-DM / encoded", "MIG", found=small | {"lcgdm/dsprites": [large]})
        assert (o.value, o.scale, o.spread) == (.3, "gpu", None) and o.way.note.endswith(says)
    assert T.own("lcgdm", 1, "LCG-DM / encoded", "FID", found=small | {"lcgdm/dsprites": [large]}).way.experiment != "lcgdm/dsprites"       # it has none

def test_reasons_stand_where_no_number_does(found):
    assert T.own("lcgdm", 1, "ID-GAN", "MIG", found=found) == "not built: a GAN" and T.own("lcgdm", 1, "beta-VAE", "FID", found=found) == "no record: the autoencoders of Table 1 were scored by their codes alone"
    assert T.own("dyga", 4, "+DyGA", "DCI", found={}) == "no record"

# ---- what is shown

@pytest.mark.parametrize("paper, number", NUMBERS)
def test_table_shows_every_number_and_no_empty_cell(paper, number, found):
    t = T.table(paper, number, T.ways(found=found), found)
    shown = t._repr_html_()
    assert not re.search(r"<t[dh][^>]*>(\s|<[^>]*>)*</t[dh]>", shown)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown)
    for p in T.published(paper, number).values(): assert any(c.startswith(p.value) for c in cells)
    assert sum("<b>" in c for c in cells) == len(t.owned())
    for c in cells:
        if "<b>" in c: assert re.search(r"(cpu|long|gpu|paper) · seeds? <a href", c)
        else: assert re.search(r"<small>[^<]+(<sup>[\d ]+</sup>)?</small>$", c)                                    # a reason
    for link in re.findall(r'href="([^"]+)"', shown): assert (ROOT / link.split("/blob/main/")[1]).is_file()
    assert len(re.findall("background", shown)) == sum(t.difference(*k) is not None for k in t.cells) == len(re.findall(r">[+-]\d\.\d\d</span>", shown))

def test_the_chapter_shows_all_tables_in_order():
    cells = json.loads((ROOT / "nbs/results/80_tables.ipynb").read_text())["cells"]
    shown = [m.groups() for c in cells if (m := re.fullmatch(r'every\["(\w+)", "(\d+)"\]', "".join(c["source"])))]
    assert shown == NUMBERS and len(shown) == 25

# ---- one budget for all

@pytest.fixture(scope="module")
def sprites(): return T.upright("cpu")

def test_every_pair_has_an_experiment():
    pairs = sorted(tuple(inspect.getclosurevars(e).nonlocals["options"][k] for k in ("method", "world")) for n, e in EXPERIMENTS.items() if n.startswith("results/"))
    assert pairs == sorted((m, w) for m in T.METHODS for w in T.WORLDS)
    assert all(n.split("/")[1].startswith(inspect.getclosurevars(e).nonlocals["options"]["world"] + "-") for n, e in EXPERIMENTS.items() if n.startswith("results/"))

@pytest.mark.parametrize("method", T.METHODS)
def test_budget_is_kept_and_a_seed_repeats(method, sprites, tmp_path):
    sizes, codes = T.BUDGET["smoke"] | dict(images=160, every=2, pool=64), []
    for i in range(2):
        seed_everything(3)
        done = T.METHODS[method](sprites, sizes, 3, Config(f"tiny-{i}", "smoke", 3, None, tmp_path).train)
        x = sprites.table[::3000]
        with torch.no_grad(): codes.append(done.encode(x)); y = done.decode(codes[-1], steps=2, generator=torch.Generator().manual_seed(0))
        assert y.shape == x.shape and torch.isfinite(y).all()
        assert done.images == {"PCA": len(sprites), "untrained": 0}.get(method, 160)
        if method == "PCA": break
    assert (codes[0] - codes[-1]).abs().max() == 0

def test_pca_is_the_best_linear_code(sprites):
    x = sprites.table[::40]
    model = T.PCA(x, 5)
    flat = x.flatten(1).double() / 127.5 - 1
    _, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    assert math.isclose((model.decode(model.encode(x)).flatten(1) - flat).square().sum().item(), s[5:].square().sum().item(), rel_tol=1e-3)

def test_lcgdm_spends_half_on_its_code(sprites, tmp_path):
    config, spent = Config("tiny", "smoke", 0, None, tmp_path), {}
    def train(part, fit, steps):
        done = config.train(part, fit, steps)
        spent[part] = sum(f.images for f in (done if type(done) is tuple else (done,)))
        return done
    assert T.lcgdm(sprites, T.BUDGET["smoke"] | dict(images=256), 0, train).images == 256 and spent == {"code": 128, "net": 128}

def test_an_experiment_that_was_stopped_goes_on(tmp_path, monkeypatch):
    "Stopped in its second training, it goes on there, ends with the same numbers, and counts all of its seconds."
    monkeypatch.setitem(T.BUDGET, "smoke", T.BUDGET["smoke"] | dict(images=256, points=120, drawn=4, evaluations=2))
    monkeypatch.setattr(T, "note_scores", lambda *_: None)
    go = lambda folder, minutes=None: T.comparison_experiment(Config("results/rooms-lcgdm", "smoke", 0, minutes, tmp_path / folder), "LCG-DM", "rooms")
    whole = go("whole")
    real, calls = T.LCGDM.fit, []
    def cut(self, data, steps, minutes=None, **kw): calls.append(steps); return real(self, data, steps, minutes=1e-9, **kw)
    monkeypatch.setattr(T.LCGDM, "fit", cut)
    with pytest.raises(Unfinished, match="time is up in 'net'"): go("parts")
    monkeypatch.setattr(T.LCGDM, "fit", real)
    parts = go("parts")
    value = lambda r, k: r.metrics[k]["value"]
    assert calls == [4] and value(parts, "reconstruction, rms error") == value(whole, "reconstruction, rms error") and parts.images == whole.images
    before = load_tensors(Config("results/rooms-lcgdm", "smoke", 0, None, tmp_path / "parts").resume("clock"))[0]["seconds"].item()
    assert value(parts, "seconds of one thread") > before > 0

def test_experiment_notes_everything(tmp_path, monkeypatch):
    monkeypatch.setitem(T.BUDGET, "smoke", T.BUDGET["smoke"] | dict(images=64))
    r = T.comparison_experiment(Config("results/rooms-untrained", "smoke", 0, None, tmp_path), "untrained", "rooms")
    assert set(T.SCORES) | set(T.COSTS) <= set(r.metrics) and (r.images, r.metrics["code size"]["value"]) == (0, 10)
    assert (tmp_path / "results-rooms-untrained-smoke-s0.safetensors").is_file()
    with pytest.raises(ValueError, match="expected a method among PCA"): T.comparison_experiment(r, "GAN", "rooms")

# ---- sentences

def run_of(method, seed, value, scale="cpu", world="rooms"):
    r = record(f"results/{world}-{method.lower()}", scale, seed, **{k: value for k in (*T.SCORES, *T.COSTS, "standard deviation of the data")})
    r.config = dict(method=method, world=world, images=64_000)
    return r

def made(scale="cpu", **values): return T.comparison("rooms", found=[run_of(m, i, v, scale) for m, vs in values.items() for i, v in enumerate(vs)])

@pytest.mark.parametrize("values, says", [
    (dict(VAE=[.5, .52], PCA=[.1, .12]), "VAE (0.51 ± 0.01), apart from PCA (0.11 ± 0.01); two trainings each, a lead and no ranking."), (dict(VAE=[.5, .52, .51], PCA=[.1, .12, .11]), "VAE (0.51 ± 0.01), apart from PCA (0.11 ± 0.01)."),
    (dict(VAE=[.5, .52, .51], PCA=[.1, .12], EncDiff=[.2, .21, .22]), "VAE (0.51 ± 0.01), apart from EncDiff (0.21 ± 0.01) and all others; two trainings of PCA, a lead and no ranking."), (dict(VAE=[.9], PCA=[.1]), "VAE (0.90), then PCA (0.10); one training each, so this is no ranking."),
    (dict(VAE=[.5, .6], PCA=[.45, .55]), "VAE (0.55 ± 0.07), not apart from PCA (0.50 ± 0.07)."),
    (dict(VAE=[.9], PCA=[.1, .1]), "VAE (0.90), then PCA (0.10 ± 0.00); one training of VAE, so this is no ranking."), (dict(VAE=[.9, .8], PCA=[.1], EncDiff=[.2]), "VAE (0.85 ± 0.07), then EncDiff (0.20); one training of PCA, EncDiff, so this is no ranking."), (dict(VAE=[.9]), "fewer than two methods have a record.")])
def test_no_sentence_says_more_than_its_seeds(values, says):
    assert T.answer(made(**values), "MIG") == says

def test_equal_methods_seldom_look_apart():
    "The rates that the sentences and the chapter state, for two methods drawn from one distribution: one case of five with two trainings each, one of twelve with three. With two no sentence names a winner and stops there."
    g = torch.Generator().manual_seed(0)
    draws = {n: [tuple(v.tolist() for v in .5 + .1 * torch.randn(2, n, generator=g)) for _ in range(4000)] for n in (2, 3)}
    rate = {n: statistics.mean(T.apart(a, b) for a, b in pairs) for n, pairs in draws.items()}
    assert abs(rate[2] - 1 / 5) < .03 and abs(rate[3] - 1 / 12) < .015
    for a, b in draws[2][:200]: assert (said := T.answer(made(VAE=a, PCA=b), "MIG")).endswith("no ranking.") or "not apart" in said

def test_low_is_best_where_asked(): assert T.answer(made(VAE=[.5, .5], PCA=[.1, .1]), "MIG", high=False).startswith("PCA (0.10")

def test_comparison_says_what_is_missing():
    shown = made(VAE=[.5, .52])._repr_html_()
    assert shown.count("no record") == (len(T.METHODS) - 1) * (len(T.SCORES) + len(T.COSTS)) and "iVAE *" in shown and "seeds 0, 1 of each" in shown
    assert T.comparison("rooms", found=[]).about() == "No record of this world at hand."
    assert "seeds: PCA 0; VAE 0, 1." in made(VAE=[.5, .5], PCA=[.1]).about()

def test_a_comparison_has_one_scale():
    "The scale that most methods have; of two the larger."
    cpu, gpu = [run_of(m, 0, .1) for m in ("VAE", "PCA")], [run_of("VAE", 0, .9, "gpu"), run_of("PCA", 0, .9, "smoke")]
    c = T.comparison("rooms", found=gpu + cpu)
    assert c.values("VAE", "MIG") == [.1] and {r.scale for rs in c.records.values() for r in rs} == {"cpu"}
    assert T.comparison("rooms", found=gpu + cpu[:1]).values("VAE", "MIG") == [.9] and T.comparison("rooms", at="gpu", found=gpu + cpu).values("PCA", "MIG") == []
    assert T.comparison("rooms", found=[run_of("VAE", 0, .2), run_of("VAE", 1, .3), run_of("VAE", 0, .4)]).values("VAE", "MIG") == [.2, .3]

def test_headline():
    text = T.headline()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(T.FRONT) <= 10 and len({line.count("|") for line in lines}) == 1
    for method in T.FRONT:
        for world in T.WORLDS:
            c = T.comparison(world)
            if c.records[method]: assert c.text(method, "DCI disentanglement, hist") in next(line for line in lines if line.startswith(f"| {method} |"))
