"The repository as a whole: notebooks and exported code in step, contracts of imports, links, outputs that can be shown."
import ast, json, re, shutil, subprocess, sys
from importlib import metadata
from pathlib import Path
import pytest
from disdiff_tutorial.run import reading_order

ROOT = Path(__file__).resolve().parents[1]
BOOK = reading_order(ROOT / "nbs")
PACKAGE = sorted((ROOT / "disdiff_tutorial").rglob("*.py"))
name = lambda p: p.relative_to(ROOT).as_posix()

def cells(path, kind): return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]
def tool(command, *words, **kw): return subprocess.run([Path(sys.executable).parent / command, *words], capture_output=True, text=True, **kw)

def test_there_are_notebooks(): assert len(BOOK) >= 14 and BOOK[0].stem == "index"

def test_export_is_in_step(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "_run", "data", "_proc", "_docs"), symlinks=True)
    for f in ("nbs/data", "disdiff_tutorial/data"): shutil.copytree(ROOT / f, copy / f, dirs_exist_ok=True)
    before = {p: (copy / name(p)).read_bytes() for p in PACKAGE}
    done = tool("nbdev_export", cwd=copy)
    assert done.returncode == 0, done.stderr
    changed = [name(p) for p, text in before.items() if (copy / name(p)).read_bytes() != text]
    new = {p.relative_to(copy).as_posix() for p in (copy / "disdiff_tutorial").rglob("*.py")} - {name(p) for p in PACKAGE}
    assert not changed and not new, f"run `make notebooks`: {changed} {new}"

def test_imports_keep_the_layers():
    done = tool("lint-imports", cwd=ROOT)
    assert done.returncode == 0, done.stdout

def closure(*names):
    "Names of the installed distributions that `pip install` of `names`, which may end in [extra,...], brings along."
    from packaging.requirements import Requirement
    seen, todo = set(), [Requirement(n) for n in names]
    while todo:
        r = todo.pop(); key = (r.name.lower().replace("_", "-"), frozenset(r.extras))
        if key in seen: continue
        seen.add(key)
        try: needs = metadata.requires(r.name) or []
        except metadata.PackageNotFoundError: continue
        todo += [n for n in map(Requirement, needs) if n.marker is None or any(n.marker.evaluate({"extra": e}) for e in ("", *r.extras))]
    return {name for name, _ in seen}

def unguarded(source):
    "Packages that a cell imports whether they are there or not: outside `if` and `try`."
    tree = ast.parse("\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))))
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import): yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split(".")[0]
        elif not isinstance(node, (ast.If, ast.Try, ast.FunctionDef, ast.ClassDef)): todo += ast.iter_child_nodes(node)

def test_notebooks_need_only_what_make_tutorial_installs():
    "What every cell imports comes with the extras `notebooks` and `fid`: a reader's chapter once stopped for want of diffusers."
    have, of = closure("disdiff-tutorial[notebooks,fid]"), metadata.packages_distributions()
    for path in BOOK:
        for cell in cells(path, "code"):
            for package in set(unguarded("".join(cell["source"]))) - set(sys.stdlib_module_names) - {"disdiff_tutorial"}:
                assert {d.lower().replace("_", "-") for d in of.get(package, [package])} & have, f"{name(path)} imports {package}"

def test_packages_are_listed():
    listed = set(re.findall(r'"(disdiff_tutorial[\w.]*)"', re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())[1]))
    assert listed == {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE}

def test_readme_is_in_step():
    assert subprocess.run([sys.executable, ROOT / ".ci" / "readme.py", "--check"]).returncode == 0

def test_lint():
    done = tool("ruff", "check", "--select", "F", "--ignore", "F401,F403,F405", "disdiff_tutorial", "tests", cwd=ROOT)
    assert done.returncode == 0, done.stdout

@pytest.mark.parametrize("path", BOOK + [ROOT / "README.md"], ids=name)
def test_links_resolve(path):
    text = path.read_text() if path.suffix == ".md" else "\n".join("".join(c["source"]) for c in cells(path, "markdown"))
    text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", "", text, flags=re.S)                                   # brackets of formulas are no links
    dead = [link for link in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text) if not (path.parent / link).exists()]
    assert not dead

@pytest.mark.parametrize("path", [p for p in BOOK if p.stem != "index"], ids=name)
def test_notebook_can_be_shown(path):
    code = [c for c in cells(path, "code") if "".join(c["source"]).strip()]
    outputs = [o for c in code for o in c["outputs"]]
    assert outputs, "no outputs: execute it before it is committed"
    assert not [o for o in outputs if o["output_type"] == "error"]
    counts = [c["execution_count"] for c in code if c["execution_count"]]
    assert not counts or counts == sorted(counts)
    assert path.stat().st_size < 3e6
    assert "widgets" not in json.loads(path.read_text())["metadata"], "state of widgets, which only scripts of other sites can show: remove it"
    words = [o | {"data": {k: v for k, v in o.get("data", {}).items() if k != "image/png"}} for o in outputs]      # the letters of a PNG spell anything
    shown = json.dumps(words)
    assert str(ROOT) not in shown and not re.search(r"(/root/|/home/|/Users/|/tmp/)[\w.]", shown), "a path of the machine that made it"
    assert "https://quarto" not in shown and "WARNING" not in shown

@pytest.mark.parametrize("path", [p for p in BOOK if p.stem != "index"], ids=name)
def test_figures_have_alt_text(path):
    bare = ["".join(c["source"])[:60] for c in cells(path, "code") if any("image/png" in o.get("data", {}) for o in c["outputs"]) and "#| fig-alt:" not in "".join(c["source"])]
    assert not bare

def test_every_chapter_is_in_the_sidebar():
    listed = re.findall(r"- ([\w/]+\.ipynb)", (ROOT / "_quarto.yml").read_text())
    assert listed == [p.relative_to(ROOT / "nbs").as_posix() for p in BOOK]
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink()

@pytest.mark.parametrize("path", sorted((ROOT / "data/models").glob("*.safetensors")), ids=lambda p: p.stem)
def test_weights_are_small(path): assert path.stat().st_size < 12e6

def test_repository_is_light():
    "What is tracked stays under 150 MB (design.md)."
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    assert sum((ROOT / f).stat().st_size for f in files if f and not (ROOT / f).is_symlink()) < 150e6
