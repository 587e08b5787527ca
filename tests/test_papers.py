"The published values and the list of equations, figures and tables: files that parse, without doubles."
import csv
from collections import Counter
from pathlib import Path
import pytest

folder = Path(__file__).resolve().parents[1] / "data/papers"
rows = lambda name: list(csv.DictReader((folder / name).open()))

def test_values_are_numbers():
    for r in rows("tables.csv"):
        float(r["value"])
        if r["spread"]: assert float(r["spread"]) >= 0

@pytest.mark.parametrize("name, key", [("tables.csv", ("paper", "table", "row", "column")), ("items.csv", ("paper", "kind", "number"))])
def test_keys_are_unique(name, key):
    assert not [k for k, n in Counter(tuple(r[c] for c in key) for r in rows(name)).items() if n > 1]

@pytest.mark.parametrize("paper, equations", [("lcgdm", 13), ("ivae", 17), ("dyga", 7), ("components", 16)])
def test_every_equation_is_listed(paper, equations):
    numbers = {int(r["number"]) for r in rows("items.csv") if (r["paper"], r["kind"]) == (paper, "equation")}
    assert numbers == set(range(1, equations + 1))
