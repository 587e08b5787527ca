"Pages as `make tutorial` writes them, in a browser that reaches no other site: axe-core finds nothing serious, they can be read, and a phone is wide enough."
import re
from pathlib import Path
import pytest
from browser.npm import package
from disdiff_tutorial.run import keep

NBS = Path(__file__).resolve().parents[2] / "nbs"
SHOWN = ["index", "01_show", "results/80_tables"]                    # the landing page; figures, a slider and an explorer; tables

@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "kept(name): the address of a notebook's page, made once."
    nbformat, folder, made = pytest.importorskip("nbformat"), tmp_path_factory.mktemp("pages"), {}
    def make(name):
        if name not in made:
            keep(nbformat.read(NBS / f"{name}.ipynb", 4), folder / name, (NBS / name).parent)
            made[name] = (folder / f"{name}.html").as_uri()
        return made[name]
    return make

def violations(page):
    "What axe-core finds serious or critical: a line for each rule, with the first nodes it names."
    page.add_script_tag(path=package("axe-core") / "axe.min.js")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{v['id']} ({v['impact']}, {len(v['nodes'])} times): {v['help']}; e.g. " + " | ".join(n["html"][:100] for n in v["nodes"][:3]) for v in found if v["impact"] in ("serious", "critical")]

@pytest.mark.parametrize("name", SHOWN)
def test_axe_finds_nothing_serious(page, screen, kept, name):
    page.goto(kept(name))
    screen(page, f"page-{Path(name).stem}")
    page.eval_on_selector_all(".highlight pre", "all => all.slice(15).forEach(e => e.textContent = e.textContent)")     # thousands of words, all in the same few colours
    found = violations(page)
    assert not found, "\n".join(found)

def test_a_poor_page_is_noticed(page, tmp_path):
    (tmp_path / "poor.html").write_text("<!doctype html><html><meta charset=utf-8><title>x</title><main><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='><p style='color:#999;background:#fff'>pale<input></main></html>")
    page.goto((tmp_path / "poor.html").as_uri())
    assert {v.split()[0] for v in violations(page)} == {"html-has-lang", "image-alt", "color-contrast", "label"}

@pytest.mark.parametrize("name", SHOWN)
def test_page_can_be_read_without_other_sites(page, kept, name):
    "All pictures are there and described, and nothing that only Quarto understands is left in the text."
    page.goto(kept(name))
    assert page.title() and page.locator("h1").count() == 1
    poor = page.eval_on_selector_all("img", "all => all.filter(i => !i.naturalWidth || !i.alt || /No description/.test(i.alt)).map(i => i.outerHTML.slice(0, 80))")
    assert not poor
    assert not re.findall(r"^:::.*|\{#[\w-]+\}|^#\|.*|\{\.callout.*", page.locator("main").inner_text(), re.M)

def test_a_chapter_with_named_headings_boxes_and_solutions(page, screen, kept):
    "Links within the page lead to their headings; a box frames its text; solutions are folded."
    page.goto(kept("data/11_sprites"))
    lost = page.eval_on_selector_all("main a[href^='#']", "all => all.map(a => a.getAttribute('href').slice(1)).filter(id => id && !document.getElementById(id) && !document.getElementById(decodeURIComponent(id)))")
    assert page.locator("main a[href='#sec-degeneracy']").count() and not lost
    box = page.locator("main .callout").first; box.scroll_into_view_if_needed(); screen(page, "page-box")
    title = re.search(r'::: \{\.callout-note title=\\"(.*?)\\"', (NBS / "data/11_sprites.ipynb").read_text())[1]
    assert box.inner_text().startswith(title) and len(box.inner_text()) > len(title) + 200
    folded = page.locator("main details")
    assert folded.count() and not folded.locator("p").first.is_visible()
    folded.locator("summary").first.click()
    assert folded.locator("p").first.is_visible()

@pytest.mark.parametrize("name", SHOWN)
def test_a_phone_is_wide_enough(page, screen, kept, name):
    "At 360 pixels nothing sticks out of the page, and nothing is cut off: wide code and tables scroll in their own boxes."
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(kept(name))
    screen(page, f"phone-{Path(name).stem}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    cut = page.eval_on_selector_all("main *", "all => all.filter(e => e.clientWidth > 1 && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX == 'hidden').map(e => e.outerHTML.slice(0, 120))")
    assert not cut, f"{len(cut)} boxes hide what does not fit, e.g. {cut[:3]}"
