"In every chapter: a line of badges below its first paragraph (minutes to read, time to run, where to open it), and a first cell that fetches the book in Colab. `--check` only compares."
import configparser, json, math, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
facts = configparser.ConfigParser(); facts.read(ROOT / "settings.ini"); facts = facts["DEFAULT"]
WORDS = 200                                                                        # read in a minute
COLAB = f"""# In Colab: fetch the book and what it needs
import sys
if "google.colab" in sys.modules:
    get_ipython().system("git clone -q --depth 1 {facts['git_url']} book && pip install -q './book[notebooks,fid]'")
    sys.path.insert(0, "book")"""

def minutes(cells):
    "Minutes to read the prose of a chapter; formulas count as a word each, links as their text."
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown" and '<span class="badge' not in "".join(c["source"]))
    text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", " formula ", text, flags=re.S)
    return math.ceil(len(re.findall(r"\w[\w'-]*", re.sub(r"\]\([^)]*\)|<[^>]*>", " ", text))) / WORDS)

def duration(seconds): return "under a minute" if seconds < 60 else f"{round(seconds / 60)} min"

def badges(name, cells):
    "The line of a chapter: `name` is its path in nbs without ending."
    record = json.loads((ROOT / "data/records/book-cpu-s0.json").read_text())
    seconds = record["metrics"].get(f"seconds, {name}")
    runs = f' · <span class="badge bg-secondary">runs {duration(seconds["value"])} at cpu</span>' if seconds else ""
    link = f"https://colab.research.google.com/github/{facts['user']}/{facts['repo']}/blob/{facts['branch']}/nbs/{name}.ipynb"
    return f'<span class="badge bg-secondary">{minutes(cells)} min to read</span>{runs} · [open in Colab]({link}) · in JupyterLab: `make lab`'

def dressed(name, cells):
    "The cells of a chapter with both in place."
    first = cells[0]
    if first["cell_type"] != "code":
        cells = [first := {"cell_type": "code", "execution_count": None, "id": "c01ab000", "metadata": {}, "outputs": [], "source": ["#| hide"]}, *cells]
    head = "".join(first["source"]).split("\n")[0]
    first["source"] = f"{head}\n{COLAB}".splitlines(keepends=True)
    at = next(i for i, c in enumerate(cells) if c["cell_type"] == "markdown")
    if '<span class="badge' in "".join(cells[at + 1]["source"]): cells = cells[:at + 1] + cells[at + 2:]
    line = {"cell_type": "markdown", "id": "bad9e000", "metadata": {}, "source": [badges(name, cells)]}
    return cells[:at + 1] + [line] + cells[at + 1:]

def book():
    "Path and name of each chapter."
    paths = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if p.stem != "index" and not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts)]
    return [(p, p.relative_to(ROOT / "nbs").with_suffix("").as_posix()) for p in paths]

if __name__ == "__main__":
    stale = []
    for path, name in book():
        text = path.read_text(); nb = json.loads(text)
        nb["cells"] = dressed(name, nb["cells"])
        new = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if new == text: continue
        stale.append(name)
        if "--check" not in sys.argv: path.write_text(new)
    if "--check" in sys.argv and stale: sys.exit(f"badges are out of date in {', '.join(stale)}: run `make notebooks`")
