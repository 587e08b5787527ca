"The site, without Quarto: formulas parse, references and links resolve, pages are light and need no other site, colours can be told apart, chapters have their parts."
import itertools, json, re, shutil, subprocess, sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, yaml
from browser.npm import package
from disdiff_tutorial import show
from disdiff_tutorial.results.coverage import sections
from disdiff_tutorial.run import keep, reading_order

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
BOOK = reading_order(NBS)
CHAPTERS = [p for p in BOOK if p.stem != "index"]
stem = lambda p: p.stem
each, each_chapter = pytest.mark.parametrize("path", BOOK, ids=stem), pytest.mark.parametrize("path", CHAPTERS, ids=stem)

@lru_cache(maxsize=None)
def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])

def written(path):
    "What a person wrote: the markdown cells."
    return [source(c) for c in cells(path) if c["cell_type"] == "markdown"]

def told(path):
    "What the page shows as prose: the markdown cells, and outputs that are markdown."
    return [t for c in cells(path) for t in ([source(c)] if c["cell_type"] == "markdown" else ["".join(o["data"]["text/markdown"]) for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})])]

def prose(text):
    "Markdown without code and comments."
    text = re.sub(r"^([ >]*)(```+|~~~+).*?^[ >]*\2[ ]*$", "", text, flags=re.S | re.M)
    return re.sub(r"<!--.*?-->|(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.S)

# Maths. A formula is what Pandoc takes for one; JupyterLab takes no other in this book.
FORMULA = re.compile(r"(?<!\\)\$\$((?:(?!\n\s*\n).)+?)\$\$|(?<![\\$])\$(?![\s$])((?:\\.|(?!\n\s*\n)[^$\\])*?(?:\\.|[^\s$\\]))\$(?![\d$])", re.S)

def formulas(text):
    "The formulas of a markdown text, in order: a list of (TeX, stands on a line of its own)."
    return [(m[1] or m[2], m[1] is not None) for m in FORMULA.finditer(prose(text))]

def test_formulas_are_found():
    text = "A $x$ and $$y\n= 1 \\tag{LCG-DM 3}$$, `$no$` nor \\$5, nor $ 5 and $ 6.\n\n```sh\necho $HOME $PATH\n```\n| $a$ | $|b|$ |\n<div>\n$c\\$$ **$d$**</div> $20 and $30"
    assert formulas(text) == [("x", False), ("y\n= 1 \\tag{LCG-DM 3}", True), ("a", False), ("|b|", False), ("c\\$", False), ("d", False)]

@pytest.mark.skipif(not shutil.which("pandoc"), reason="pandoc is not installed")
@each
def test_formulas_are_those_of_pandoc(path):
    def walk(node): return [m for v in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else []) for m in ([(v["c"][1], v["c"][0]["t"] == "DisplayMath")] if isinstance(v, dict) and v.get("t") == "Math" else walk(v))]
    tree = subprocess.run(["pandoc", "-f", "markdown", "-t", "json"], input="\n\n".join(told(path)), capture_output=True, text=True, check=True).stdout
    words = lambda found: [(" ".join(tex.split()), display) for tex, display in found]
    assert words(formulas("\n\n".join(told(path)))) == words(walk(json.loads(tree)["blocks"]))

@each
def test_no_dollar_is_left_over(path):
    "A sign that opens no formula means one that was meant to."
    left = [line for text in told(path) for line in FORMULA.sub("", prose(text)).split("\n") if re.search(r"(?<!\\)\$", line)]
    assert not left

def test_a_lonely_dollar_is_noticed(): assert re.search(r"(?<!\\)\$", FORMULA.sub("", prose("The norm $\\|x\\| is small, $y$ is not.")))

ENGINES = {"katex": """const katex = require(process.argv[1]);
    const parse = (tex, display) => katex.renderToString(tex, {displayMode: display, throwOnError: true, strict: "ignore"});""",
    "mathjax": """const page = require(process.argv[1] + "/es5/node-main.js").init({loader: {load: ["input/tex"]}, tex: {packages: {"[-]": ["noundefined", "noerrors"]}}});
    const parse = async (tex, display) => { const out = await (await page).tex2mmlPromise(tex, {display}); if (out.includes("<merror")) throw Error(out.match(/title="([^"]*)/)?.[1] ?? out) };"""}
LOOP = """(async () => { const wrong = [];
    for (const [tex, display] of JSON.parse(require("fs").readFileSync(0))) try { await parse(tex, display); wrong.push("") } catch (e) { wrong.push(e.message) }
    console.log(JSON.stringify(wrong)) })()"""

def complaints(engine, found):
    "What an engine says about each (TeX, display): '' if it can set it. KaTeX is the stricter one; MathJax sets the site's and JupyterLab's pages."
    if not shutil.which("node"): pytest.skip("node is not installed: apt install nodejs npm")
    done = subprocess.run(["node", "-e", ENGINES[engine] + LOOP, str(package(engine))], input=json.dumps(found), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

@pytest.mark.parametrize("engine", ENGINES)
def test_maths_parses(engine):
    found = [(path.stem, f) for path in BOOK for text in told(path) for f in formulas(text)]
    assert len(found) > 1000
    wrong = [f"{name}: ${tex}$: {error}" for (name, (tex, _)), error in zip(found, complaints(engine, [f for _, f in found]), strict=True) if error]
    assert not wrong, "\n".join(wrong)

@pytest.mark.parametrize("engine", ENGINES)
def test_wrong_maths_is_noticed(engine):
    tried = {r"\frac12 \tag{iVAE 7}": True, r"\frac1{": True, r"\nosuchmacro x": False, r"\left( x": True, r"x^1^2": False, r"\begin{aligned} a \end{align}": True, r"\mathbb{E}\|s\|^2": False}
    assert [not error for error in complaints(engine, list(tried.items()))] == [True, False, False, False, False, False, True]

# References and links. Quarto only warns of a dead one.
def ids(path):
    "Ids that a page defines by hand: `{#...}` in its prose, `#| label:` in its code."
    return [i for c in cells(path) for i in (re.findall(r"\{#([\w.:-]+)[^}\n]*\}", prose(source(c))) if c["cell_type"] == "markdown" else re.findall(r"^#\| *label: *(\S+)", source(c), re.M))]

def exported(path):
    "Anchors of what a notebook exports: nbdev puts a heading before each function's and class's documentation."
    return {name.lower() for c in cells(path) if re.match(r"#\| *exports?\b", source(c)) for name in re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", source(c), re.M)}

@lru_cache(maxsize=None)
def anchors(path): return set(ids(path)) | {s.anchor for s in sections(path).values()} | exported(path) | {i for t in told(path) for i in re.findall(r'\bid="([^"]+)"', t)}

def references(text):
    "Cross-references `@sec-...` and citations `@key`, in that order."
    keys = re.findall(r"(?<![\w@/.\\])-?@\{?([A-Za-z]\w*(?:[:.+/-]\w+)*)", FORMULA.sub("", prose(text)))
    cross = [k for k in keys if re.match(r"(sec|fig|eq|tbl|lst|thm|lem|cor|exr|exm)-", k)]
    return cross, [k for k in keys if k not in cross]

def links(text):
    "Addresses of links and pictures on this site: Markdown's and HTML's."
    text = FORMULA.sub("", prose(text))
    return [a for a in re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:href|src)="([^"]+)"', text) if not re.match(r"https?:|mailto:|data:", a)]

def dead(path, text):
    "Links of a page that lead nowhere: no file, no heading or id of that name, or out of the site, which is all that is published."
    for address in links(text):
        file, _, anchor = address.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or NBS not in target.parents or anchor and (target.suffix != ".ipynb" or anchor not in anchors(target)): yield address

BIB = re.findall(r"^@\w+\{\s*([^,\s]+)\s*,", (NBS / "references.bib").read_text(encoding="utf-8") if (NBS / "references.bib").exists() else "", re.M)

def test_ids_are_unique():
    count = Counter(i for path in BOOK for i in ids(path))
    assert not {i: [p.stem for p in BOOK if i in ids(p)] for i, n in count.items() if n > 1}

@each
def test_links_and_references_resolve(path):
    assert not [a for text in told(path) for a in dead(path, text)]
    assert not [r for text in told(path) for r in references(text)[0] if r not in ids(path)]      # in a website, Quarto resolves them within a page

@pytest.mark.parametrize("path", sorted(NBS.glob("*.qmd")), ids=stem)
def test_links_of_other_pages_resolve(path): assert not list(dead(path, path.read_text()))

def test_citations_are_in_the_bibliography():
    cited = {k for path in BOOK for text in told(path) for k in references(text)[1]}
    assert not [k for k, n in Counter(BIB).items() if n > 1]
    unknown, idle = sorted(cited - set(BIB)), sorted(set(BIB) - cited)
    assert not unknown and not idle, f"not in nbs/references.bib: {unknown}; there, but cited nowhere: {idle}"
    assert not cited or "bibliography" in QUARTO

@each
def test_pictures_are_described(path):
    "Pictures in prose carry words for those who cannot see them."
    assert not [a for t in told(path) for a in re.findall(r"!\[\s*\]\([^)]*\)|<img(?![^>]*alt=\"[^\"]+\")[^>]*>", prose(t))]

@each
def test_solutions_are_rendered(path):
    "In JupyterLab, what follows <summary> without an empty line is HTML: Markdown in it stays as typed."
    raw = [b for t in written(path) for b in re.findall(r"<details>.*?(?=\n\s*\n|</details>)", t, re.S)]
    assert not [b for b in raw if re.search(r"`|\*\*|\]\(", FORMULA.sub("", b))]

def test_dead_links_and_references_are_noticed():
    page = NBS / "dyga" / "61_hddc.ipynb"
    text = "[a](62_anchoring.ipynb) [b](62_anchoring.ipynb#no) [c](#no) [d](64_interpretation.ipynb#four-rows) [e](../../README.md) ![f](no.png) `[g](no)` [h](https://x.org) $[0](1)$ <a href=\"no.html\">i</a>"
    assert list(dead(page, text)) == ["62_anchoring.ipynb#no", "#no", "../../README.md", "no.png", "no.html"]
    assert references("As @sec-one and [@kim2022lcgdm; -@two.b, p. 3] say, a@b.org, `@no`, \\@no, $a@b$.") == (["sec-one"], ["kim2022lcgdm", "two.b"])

# _quarto.yml. Quarto only warns of an unknown key of a format, and stops at one of a website. Documented at https://quarto.org/docs/reference/formats/html.html and .../reference/projects/websites.html
QUARTO = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
KNOWN = {"": "project format lang bibliography csl link-citations execute crossref website metadata-files number-sections",
         "project": "title type render output-dir lib-dir resources pre-render post-render preview",
         "format.html": "theme css toc toc-depth toc-expand toc-location toc-title number-sections number-depth anchor-sections smooth-scroll code-copy code-fold code-link code-overflow code-line-numbers code-summary code-tools "
                        "fig-align fig-width fig-height fig-dpi fig-cap-location tbl-cap-location html-math-method lightbox link-external-newwindow link-external-icon citations-hover crossrefs-hover footnotes-hover grid highlight-style "
                        "respect-user-color-scheme include-in-header include-before-body include-after-body max-width mainfont monofont fontsize page-layout embed-resources df-print notebook-links reference-location axe",
         "website": "title description favicon site-url site-path repo-url repo-link-target repo-link-rel repo-subdir repo-branch issue-url repo-actions reader-mode llms-txt google-analytics cookie-consent search navbar sidebar body-header body-footer "
                    "margin-header margin-footer page-navigation back-to-top-navigation bread-crumbs page-footer image image-alt comments open-graph twitter-card other-links code-links announcement drafts draft-mode",
         "website.sidebar": "id title subtitle logo logo-alt logo-href search tools contents style background foreground border alignment collapse-level pinned header footer",
         "website.page-footer": "left right center border background foreground"}

def unknown(config):
    "Keys of a _quarto.yml that Quarto does not document, each with its place."
    def at(place):
        node = config
        for key in filter(None, place.split(".")): node = node.get(key, {})
        return node if isinstance(node, dict) else {}
    return [f"{place}.{key}".lstrip(".") for place, known in KNOWN.items() for key in at(place) if key not in known.split()]

def strings(node): return [node] if isinstance(node, str) else [s for v in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else []) for s in strings(v)]

def test_quarto_settings():
    assert unknown(QUARTO) == [] and QUARTO["project"]["type"] == "website"
    assert all(QUARTO["format"]["html"]["theme"][k] for k in ("light", "dark"))
    named = [s for k, v in QUARTO.items() if k != "metadata-files" for s in strings(v)]                # those nbdev writes
    files = [s for s in named if re.fullmatch(r"[\w./-]+\.(ipynb|qmd|md|png|svg|ico|jpg|bib|csl|css|scss|html|js)", s)]
    assert len(files) > 30 and not [f for f in files if not (NBS / f).is_file()]
    assert not [a for s in named for a in dead(NBS / "index.ipynb", s)]

def test_wrong_settings_are_noticed():
    assert unknown({"projekt": {}, "format": {"html": {"code_copy": True}}, "website": {"sidebar": {"styl": 1}, "page-footer": "one line"}}) == ["projekt", "format.html.code_copy", "website.sidebar.styl"]

# The parts of a chapter.
NO_PICTURE = {"00_core", "02_run"}                           # of records and of the command line there is nothing to picture
REFERENCE = [p for p in CHAPTERS if p.stem[0] == "9"]        # pages to look something up in: no picture, summary or exercises

def lacks(path):
    "What a chapter should have and has not."
    texts, last = written(path), "\n".join(written(path))
    exercises = re.split(r"^(?:\*\*Exercises\*\*|## Exercises.*)$", last, maxsplit=1, flags=re.M)[1:]
    count = len(re.findall(r"^(?:\*\*)?\d+\. ", exercises[0], re.M)) if exercises else 0
    third = cells(path)[:len(cells(path)) // 3 + 1]
    has = {"a title and a summary as a quote": re.match(r"# \S.*\n\n?> \S", texts[0]), "'You will be able to'": "You will be able to" in texts[0], "'Running time'": "Running time" in texts[0],
           "a picture in the first third": path.stem in NO_PICTURE or any(re.search(r'^#\| *fig-alt: *"?\w', source(c), re.M) for c in third if c["cell_type"] == "code"),
           "a box of common mistakes": path.stem[0] not in "1234567" or any('title="Common mistakes"' in t for t in texts),
           "a summary": re.search(r"^## Summary", last, re.M), f"3 to 5 exercises, not {count}": 3 <= count <= 5}
    return [part for part, there in list(has.items())[:3 if path in REFERENCE else None] if not there]

@each_chapter
def test_chapter_has_its_parts(path): assert lacks(path) == []

def test_a_missing_part_is_noticed(tmp_path):
    page = tmp_path / "page.ipynb"
    write = lambda *texts: page.write_text(json.dumps({"cells": [dict(cell_type="markdown" if i % 2 == 0 else "code", source=[t], outputs=[]) for i, t in enumerate(texts)]})) and cells.cache_clear()
    write("# T\n\n> In short.\n\n**You will be able to** see. **Running time**: none.", '#| fig-alt: "A line."', "## Summary\n\n**Exercises**\n\n1. a\n2. b\n3. c"); assert lacks(page) == []
    write("# T\n\nIn short.", "x = 1", "## End\n\n**Exercises**\n\n1. a\n2. b"); assert len(lacks(page)) == 6

# Pages as `make tutorial` writes them.
def outside(page):
    "Scripts and styles that a page fetches from other sites."
    return re.findall(r'<(?:script|link)\b[^>]*(?:src|href)="(https?:[^"]*)"', page) + re.findall(r"@import\s+(?:url\()?[\"']?(https?:[^\"')]*)", page)

@each
def test_page_is_light_and_stands_alone(path, tmp_path, monkeypatch):
    "Under 3 MB. Nothing comes from other sites but MathJax: without it, formulas are read as TeX."
    nbformat, bleach = pytest.importorskip("nbformat"), pytest.importorskip("bleach")
    monkeypatch.setattr(bleach, "clean", lambda text, **kw: text)                                    # takes half of the time to leave our code as it is
    keep(nbformat.read(path, 4), tmp_path / path.name, path.parent)
    page = (tmp_path / path.name).with_suffix(".html").read_text()
    assert len(page.encode()) < 3e6
    assert [a for a in outside(page) if "mathjax" not in a] == []
    assert "html-manager" not in page, "a widget, which other sites would have to bring to life"

def test_scripts_of_others_are_noticed():
    assert outside('<script src="https://x.org/a.js"></script><script>b()</script><link rel="stylesheet" href="http://x.org/c.css"><style>@import url("https://x.org/d")</style><a href="https://x.org">') == ["https://x.org/a.js", "http://x.org/c.css", "https://x.org/d"]

# Colours: contrast by WCAG 2, colour blindness after Machado, Oliveira and Fernandes 2009 (severity 1, on linear RGB).
PAGES = {"white": "#ffffff", "dark": "#222222"}
SIGHT = {"full": np.eye(3), "protanopia": np.array([[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]]),
         "deuteranopia": np.array([[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]]),
         "tritanopia": np.array([[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]])}
TO_XYZ = np.array([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750], [.0193339, .1191920, .9503041]])

def linear(colour):
    "#rrggbb as linear RGB in [0, 1], (3,)."
    c = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055) ** 2.4)

def contrast(a, b):
    "WCAG contrast of two colours, 1 to 21."
    low, high = sorted(TO_XYZ[1] @ linear(c) for c in (a, b))
    return (high + .05) / (low + .05)

def lab(rgb):
    "CIELAB of linear RGB: a distance of 2.3 can just be seen."
    x = TO_XYZ @ rgb / TO_XYZ.sum(1)
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

def apart(a, b, sight):
    "Distance of two colours in CIELAB, as seen by `sight`."
    return float(np.linalg.norm(np.subtract(*(lab(np.clip(SIGHT[sight] @ linear(c), 0, 1)) for c in (a, b)))))

def test_colour_formulas():
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=.01)        # WCAG's own examples
    assert lab(linear("#ffffff")) == pytest.approx([100, 0, 0], abs=.01) and lab(linear("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=.02)
    assert apart("#ff0000", "#008000", "full") > 100 and apart("#b06000", "#708000", "deuteranopia") < 15 < apart("#b06000", "#708000", "full")

@pytest.mark.parametrize("page", PAGES)
def test_colours_contrast_with_the_page(page): assert not {c: round(v, 2) for c in (show.INK, *show.COLOURS) if (v := contrast(c, PAGES[page])) < 3}

def test_no_grey_does_better():
    """A figure has no background, so its ink must do on both pages. Text of a figure's size should reach 4.5, and no grey can: the best reaches 3.97. INK is within 0.1 of it."""
    both = lambda c: min(contrast(c, page) for page in PAGES.values())
    best = max(both(f"#{v:02x}{v:02x}{v:02x}") for v in range(256))
    assert 3.9 < best < 4.5 and both(show.INK) > best - .1

@pytest.mark.parametrize("sight", SIGHT)
def test_colours_can_be_told_apart(sight):
    "Four times what can just be seen, for every pair."
    near = {f"{a} {b}": round(d, 1) for a, b in itertools.combinations(show.COLOURS, 2) if (d := apart(a, b, sight)) < 10}
    assert not near

# Badges, and a way into Colab.
def test_badges_are_in_step(): assert subprocess.run([sys.executable, ROOT / ".ci" / "badges.py", "--check"]).returncode == 0

@each_chapter
def test_first_cell_fetches_the_book_in_colab_and_only_there(path, monkeypatch):
    first, ran = cells(path)[0], []
    monkeypatch.setattr(sys, "path", list(sys.path))
    here = dict(get_ipython=lambda: SimpleNamespace(system=ran.append))
    exec(source(first), here); assert not ran and "book" not in sys.path
    monkeypatch.setitem(sys.modules, "google.colab", object())
    exec(source(first), here)
    assert len(ran) == 1 and "git clone -q --depth 1 https://github.com/" in ran[0] and sys.path[0] == "book"
    assert re.match(r"#\| (hide|default_exp)\b", source(first))                        # no page shows it
