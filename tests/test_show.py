"show: sliders are the same bytes every time and light; the explorer draws only what was asked for last, and says in one line what went wrong."
import base64, io, json, re, subprocess, sys, threading, time
from pathlib import Path
import numpy as np, pytest, torch
from disdiff_tutorial import show
from disdiff_tutorial.run import reading_order

ROOT = Path(__file__).resolve().parents[1]

def frames(*shape): return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

def opened(content):
    from PIL import Image
    return np.array(Image.open(io.BytesIO(content)).convert("RGBA"))

# ---- sliders

def test_same_bytes_in_another_process():
    code = "import torch; from disdiff_tutorial import show; print(show.slider(torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1).html)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    assert other == show.slider(frames(2, 3, 3, 8, 8)).html

def test_the_still_is_the_table():
    f = show.to_uint8(frames(2 * 3 * 2, 1, 8, 8)).unflatten(0, (2, 3, 2))
    sheet = opened(show.slider(f).still)
    for code in range(2):
        for step in range(3):
            for n in range(2):
                y, x = (code * 2 + n) * 10, step * 10
                assert (sheet[y:y + 8, x:x + 8, 0] == f[code, step, n, 0].numpy()).all()

def test_what_a_notebook_gets():
    s = show.slider(frames(2, 3, 1, 8, 8))
    bundle = s._repr_mimebundle_()
    assert bundle["text/html"] == s.html and base64.b64decode(bundle["image/png"]) == s.still and bundle["text/plain"].startswith("slider of z0, z1, 3 steps")

@pytest.mark.parametrize("values, found", [(torch.linspace(-2, 2, 3), ["-2.00", "0.00", "2.00"]), ([-1., -1e-9, 1.], ["-1.00", "0.00", "1.00"]), (["a", "b", "c"], ["a", "b", "c"]), ([1, 2, 3], ["1", "2", "3"]), (None, ["0", "1", "2"])])
def test_values_are_written(values, found):
    assert json.dumps(found)[1:-1] in show.slider(frames(2, 3, 1, 8, 8), values).html

def test_values_of_each_code():
    html = show.slider(frames(2, 3, 1, 8, 8), torch.tensor([[0., 1, 2], [3., 4, 5]])).html
    assert '"0.00", "1.00", "2.00"' in html and '"3.00", "4.00", "5.00"' in html

def test_labels_are_text(tmp_path):
    page = show.slider({"</title></script><b>": frames(3, 1, 8, 8)[:, None]}).save(tmp_path / "a.html").read_text()
    assert "<b>" not in page and page.count("</script>") == 1

def stored():
    "Every slider stored in the book: (notebook, html)."
    for path in reading_order(ROOT / "nbs"):
        for cell in json.loads(path.read_text())["cells"]:
            for out in cell.get("outputs", []):
                html = "".join(out.get("data", {}).get("text/html", ""))
                if "disdiff-slider" in html: yield path.name, html

def test_stored_sliders_are_light_and_need_nothing():
    found = list(stored())
    assert len(found) >= 2
    for name, html in found:
        assert len(html) < 3e5, f"{name}: a slider of {len(html) / 1000:.0f} kB"
        assert not re.search(r"(src|href)=.?https?:|import\(|fetch\(", html)

# ---- the newest request alone

def test_latest_wins():
    done, gate = [], threading.Event()
    latest = show.Latest(lambda i: (gate.wait(5), done.append(i)))
    for i in range(100): latest.ask(i)
    assert not latest.wait(.05)
    gate.set()
    assert latest.wait(5) and done in ([0, 99], [99])                           # the first, if its thread was quick enough, and the last
    latest.ask("again"); assert latest.wait(5) and done[-1] == "again"          # a new thread after the old one ended

def test_latest_never_runs_two_at_once():
    running, most = [], []
    def work(i): running.append(i); most.append(len(running)); time.sleep(.002); running.remove(i)
    latest = show.Latest(work)
    hands = [threading.Thread(target=lambda k=k: [latest.ask((k, i)) for i in range(50)]) for k in range(4)]
    for h in hands: h.start()
    for h in hands: h.join()
    assert latest.wait(5) and max(most) == 1

# ---- the explorer

@pytest.fixture
def codes():
    pytest.importorskip("ipywidgets")
    return torch.tensor([[0., 0.], [1., -1.], [2., 1.]])

def flat(z, **settings): return (z.tanh()[:, :1, None, None] + settings.get("seed", 0) / 100).expand(-1, 3, 4, 4)

def test_a_slow_model_is_asked_for_little(codes):
    calls, gate = [], threading.Event()
    def slow(z, steps): calls.append((z.tolist(), steps)); gate.wait(5); return flat(z)
    e = show.explorer(slow, codes, steps=10)
    for v in torch.linspace(0, 2, 100).tolist(): e.knobs[0].value = v           # a hand on a slider
    e.settings["steps"].value = 3
    gate.set()
    assert e.latest.wait(5) and len(calls) <= 2 and calls[-1] == ([[2., 0.]], 3)

def test_draw_is_called_without_gradients(codes):
    seen = []
    net = torch.nn.Linear(2, 48)
    def draw(z): out = net(z); seen.append(out.requires_grad); return out.view(-1, 3, 4, 4)
    assert show.explorer(draw, codes).latest.wait(5) and seen == [False]

def test_an_error_is_one_line_and_the_next_picture_comes(codes):
    def draw(z):
        if z[0, 0] > 1: raise RuntimeError("too far\nand a second line")
        return flat(z)
    e = show.explorer(draw, codes); e.latest.wait(5); before = e.still
    e.knobs[0].value = 1.5; e.latest.wait(5)
    assert e.says.value == "RuntimeError: too far" and e.still == before
    e.knobs[0].value = .5; e.latest.wait(5)
    assert e.says.value.startswith("A, drawn in") and e.still != before

def test_compare_reset_randomise_save(codes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    e = show.explorer(flat, codes, seed=0); wait = lambda: e.latest.wait(5) and e.still
    first = wait()
    e.side.value = 1; e.knobs[0].value = 2.; both = wait()
    assert e.says.value.startswith("A | B") and opened(both).shape[1] > opened(first).shape[1] and e.codes[:, 0].tolist() == [0, 2]
    e.side.value = 0; wait(); assert e.knobs[0].value == 0                      # the sliders are A's again
    e.settings["seed"].value = 9; assert wait() != both
    e.buttons["reset"].click(); assert wait() == first
    for _ in range(2): e.buttons["save"].click()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["picture-1.png", "picture-2.png"] and (tmp_path / "picture-1.png").read_bytes() == first
    for _ in range(20): e.buttons["randomise"].click(); assert [k.value for k in e.knobs] in codes.tolist()

def test_own_picture(codes):
    e = show.explorer(flat, codes, encode=lambda x: torch.tensor([[x.float().mean() / 10, 0.]])); e.latest.wait(5)
    e.tried(e.take_in, dict(name="a.png", content=show.png(np.full((9, 7, 4), 200, np.uint8)))); e.latest.wait(5)
    assert e.codes[0].tolist() == [20, 0] and e.knobs[0].max == 20 and e.says.value.startswith("own picture | A,")
    e.tried(e.take_in, dict(name="b.png", content=b"")); assert "b.png" in e.says.value and "choose another file" in e.says.value

def test_live_only_where_a_page_is(codes, monkeypatch):
    for name in show.LIVE: monkeypatch.delenv(name, raising=False)
    e = show.explorer(flat, codes)
    assert set(e._repr_mimebundle_()) == {"image/png", "text/plain"}
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    assert "application/vnd.jupyter.widget-view+json" in e._repr_mimebundle_()

# ---- pictures that would mislead

def test_whole_codes_take_values_between():
    assert show.traversal(lambda z: z[:, :1, None, None], torch.zeros(3).long(), [0., .5, 1.])[0].flatten().tolist() == [0, .5, 1]

@pytest.mark.parametrize("call, part", [
    (lambda: show.hist(torch.tensor([1., float("nan")])), "1 of 2 that are not"), (lambda: show.hist({"a": torch.tensor([float("inf")])}), "finite values in 'a'"),
    (lambda: show.grid(torch.full((1, 1, 4, 4), float("nan"))), "NaN in 1 of 1"), (lambda: show.grid(torch.zeros(4, 1, 4, 4), cols=2, rows=["a", "b", "c"]), "no more labels than rows, found 3"),
    (lambda: show.slider(frames(2, 3, 1, 4, 4), start=3), "start below 3, 3"), (lambda: show.slider(frames(2, 3, 1, 4, 4), start=-1), "start below 3, 3"), (lambda: show.slider(frames(2, 3, 1, 4, 4), joint=True, start=(0, 3)), "start below 2, 3"),
])
def test_misleading_pictures_are_refused(call, part):
    with pytest.raises(ValueError) as err: call()
    assert part in str(err.value) and "\n" not in str(err.value)
