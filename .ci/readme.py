"README.md from the landing page nbs/index.ipynb: its markdown, with links that work from the root. `--check` only compares."
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def readme():
    cells = json.loads((root / "nbs/index.ipynb").read_text())["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text = re.sub(r"\]\((?!https?://|#)([^)]+)\)", lambda m: f"](nbs/{m[1]})".replace("nbs/../", ""), text)
    return f"<!-- Made from nbs/index.ipynb by `make notebooks`: edit that. -->\n\n{text}\n"

if __name__ == "__main__":
    if "--check" not in sys.argv: (root / "README.md").write_text(readme())
    elif (root / "README.md").read_text() != readme(): sys.exit("README.md differs from nbs/index.ipynb: run `make notebooks`")
