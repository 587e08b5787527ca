"Every item of the four papers has one row, every remark a proof; and the tests that say so can fail."
import json, re, shutil, subprocess
from collections import Counter
from pathlib import Path
import pytest
from disdiff_tutorial.results import coverage as cover
from disdiff_tutorial.results.coverage import STATUS, VERDICTS, check, coverage, errata, faults, link, read, sections, slug
from disdiff_tutorial.run import reading_order

ROOT = Path(__file__).resolve().parents[1]
ROWS, REMARKS, ITEMS = coverage(), errata(), read("items")

@pytest.mark.parametrize("heading, anchor", [
    ("Heading identifiers in HTML", "heading-identifiers-in-html"), ("Maître d'hôtel", "maître-dhôtel"), ("[HTML], [S5], or [RTF]?", "html-s5-or-rtf"), ("3. Applications", "applications"), ("33", "section"),      # the manual's own
    ("Guidance, (8) to (10)", "guidance-8-to-10"), ("What the model says about $z$", "what-the-model-says-about-z"), ("With or without 1/p?", "with-or-without-1p"), ("*One*  picture, **one** score", "one-picture-one-score"),
    ("A [link](x.html), `code_x` and _stress_", "a-link-code_x-and-stress"), ("2.4 Sampling", "sampling"), ("Only one prior would do {#sec-theorem}", "sec-theorem"), ("Training, or loading {#a.b-c .unnumbered}", "a.b-c")])
def test_slug(heading, anchor): assert slug(heading) == anchor

@pytest.mark.skipif(not shutil.which("pandoc"), reason="pandoc is not installed")
@pytest.mark.parametrize("path", reading_order(ROOT / "nbs"), ids=lambda p: p.stem)
def test_anchors_are_those_of_pandoc(path):
    text = "\n\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown")
    page = subprocess.run(["pandoc", "-f", "markdown", "-t", "html"], input=text, capture_output=True, text=True, check=True).stdout
    made = re.findall(r'<h[1-6][^>]* id="([^"]*)"', page)
    ours = [s.anchor for s in sections(path).values()]
    assert ours == [a for a in made if a in set(ours)]

def test_every_item_has_one_living_row(): assert faults(ROWS, ITEMS) == []

def test_every_equation_is_checked(): assert {r["status"] for r in ROWS if r["kind"] == "equation"} == {"checked"}

def test_counts_of_the_papers():
    assert Counter(r["kind"] for r in ROWS) == {"equation": 53, "table": 25, "figure": 40, "algorithm": 3, "listing": 1}

def test_every_remark_has_a_living_proof():
    assert faults(REMARKS) == []
    assert not [k for k, n in Counter((r["paper"], r["place"], r["printed"]) for r in REMARKS).items() if n > 1]
    assert all(r["printed"] and r["follows"] and r["paper"] in cover.PAPERS for r in REMARKS)

def test_every_box_on_a_paper_is_among_the_remarks():
    "A chapter that finds something to say about a paper must have a row on the errata page."
    boxes = {p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in reading_order(ROOT / "nbs") if p.parent.name != "results" and re.search(r'callout-note title=\\"Where (a|the) papers? ', p.read_text())}
    assert len(boxes) > 10 and not (left := boxes - {r["notebook"] for r in REMARKS}), left

# The same tests on tampered copies: each change must be heard of.
BEST = next(r for r in ROWS if (r["paper"], r["kind"], r["number"]) == ("lcgdm", "equation", "6"))

def test_a_row_left_out_or_doubled_is_noticed():
    assert faults(ROWS[1:], ITEMS) == ["lcgdm equation 1: expected one row, found 0"]
    assert faults(ROWS + ROWS[:1], ITEMS) == ["lcgdm equation 1: expected one row, found 2"]
    assert faults(ROWS + [ROWS[0] | {"number": "99"}], ITEMS) == ["lcgdm equation 99: expected an item of items.csv, found none"]

@pytest.mark.parametrize("change, complaint", [({"status": "done"}, "expected one of checked, shown, partial, missing, found 'done'"), ({"notebook": "lcgdm/99_none"}, "found no such file"), ({"notebook": ""}, "found no such file"), ({"heading": "No heading"}, "expected the heading"),
    ({"check": "no such code"}, "expected the code"), ({"check": ""}, "expected the code"), ({"heading": "Summary"}, "expected the code"), ({"check": "class LCGDM(Guide):"}, "expected an assertion"),
    ({"check": "lam = s ** 2 / a ** 2"}, "expected an assertion")])                        # one line above the assertion, in its cell
def test_a_dead_row_is_noticed(change, complaint):
    assert check(BEST) == "" and complaint in check(BEST | change)
    assert len(faults([BEST | change])) == 1

@pytest.mark.parametrize("change, complaint", [({"verdict": "true"}, "expected one of confirmed"), ({"notebook": "lcgdm/99_none"}, "found no such file"), ({"heading": "No heading"}, "expected the heading"), ({"check": "no such code"}, "expected the code")])
def test_a_dead_remark_is_noticed(change, complaint): assert check(REMARKS[0]) == "" and complaint in check(REMARKS[0] | change)

def test_a_missing_item_needs_a_reason():
    gone = next(r for r in ROWS if r["status"] == "missing")
    assert check(gone) == "" and check(gone | {"note": ""}) == "expected a reason, found none"

@pytest.mark.parametrize("old, new, complaint", [("## Two stages", "## Both stages", "heading"), ("test_close(value, (lam", "test_close(value, (lamb", "code"), ("## Two stages", "## Two stages\\n## Next", "code")])
def test_an_edited_chapter_is_noticed(tmp_path, old, new, complaint):
    copy = tmp_path / "nbs" / f"{BEST['notebook']}.ipynb"; copy.parent.mkdir(parents=True)
    text = (ROOT / "nbs" / f"{BEST['notebook']}.ipynb").read_text(); assert old in text
    copy.write_text(text); assert check(BEST, tmp_path) == ""
    copy.write_text(text.replace(old, new)); assert complaint in check(BEST, tmp_path)

def test_repeated_headings_are_numbered(tmp_path):
    page = tmp_path / "page.ipynb"
    page.write_text(json.dumps({"cells": [dict(cell_type="markdown", source=["# T\n\n## Look\n"]), dict(cell_type="code", source=["a = 1"]), dict(cell_type="markdown", source=["## Look?\n\n### Deep\n"]), dict(cell_type="code", source=["b = 2"]), dict(cell_type="markdown", source=["## End"])]}))
    found = sections(page)
    assert {k: s.anchor for k, s in found.items()} == {"T": "t", "Look": "look", "Look?": "look-1", "Deep": "deep", "End": "end"}
    assert found["T"].code == ["a = 1", "b = 2"] and found["Look"].code == ["a = 1"] and found["Look?"].code == found["Deep"].code == ["b = 2"] and found["End"].code == []

def test_an_installed_library_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(cover, "checkout", lambda: None)
    with pytest.raises(ValueError, match="expected a checkout of the project"): coverage()

# The pages as they are stored: in step with the files, and every link leads to a heading.
def outputs(name):
    cells = json.loads((ROOT / "nbs/results" / f"{name}.ipynb").read_text())["cells"]
    return ["".join(o["data"]["text/markdown"]) for c in cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]

@pytest.mark.parametrize("name, table, rows", [("81_coverage", cover.coverage_table, ROWS), ("83_errata", cover.errata_table, REMARKS)])
def test_stored_page_is_in_step(name, table, rows):
    shown = outputs(name)
    for paper in cover.PAPERS: assert table([r for r in rows if r["paper"] == paper]) in shown, f"execute nbs/results/{name}.ipynb again"

@pytest.mark.parametrize("name", ["81_coverage", "83_errata"])
def test_links_lead_to_headings(name):
    links = re.findall(r"\]\(([^)#\s]+)#([^)\s]+)\)", "\n".join(outputs(name)))
    assert len(links) > 80
    dead = [(file, anchor) for file, anchor in links if not (path := ROOT / "nbs/results" / file).exists() or anchor not in {s.anchor for s in sections(path).values()}]
    assert not dead

def test_words_of_the_tables():
    assert set(cover.MARKS) == set(STATUS) == {r["status"] for r in ROWS} and {r["verdict"] for r in REMARKS} == set(VERDICTS)
    assert link(BEST) == "[41, Two stages](../lcgdm/41_latent_guidance.ipynb#two-stages)"
