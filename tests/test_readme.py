"The examples of the landing page run as they stand, with fewer steps."
import json, re
from pathlib import Path
import pytest
import torch
from disdiff_tutorial.data.scenes import rooms

TEXT = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)

def test_headline_table_is_that_of_the_records():
    from disdiff_tutorial.results.tables import headline
    assert headline().strip() in TEXT

def test_every_method_has_an_example(): assert all(any(name in b for b in BLOCKS) for name in ("fit(", "LCGDM(", "IVAEDDPM(", "LatentDiffusion(", "ComponentScore(", "mig("))

@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: re.findall(r"import (\w+)", b)[-1])
def test_example_runs(block, tmp_path, monkeypatch):
    assert len([line for line in block.splitlines() if line.strip() and "import" not in line]) <= 10
    monkeypatch.chdir(tmp_path)
    g, data = torch.Generator().manual_seed(0), rooms("cpu")
    (images, factors), (_, factors_test) = data.sample(200, g), data.sample(100, g)
    images, factors, factors_test = images.cpu(), factors[:, [0, 1]].cpu(), factors_test[:, [0, 1]].cpu()
    names = dict(images=images, u=torch.rand(200, 4, generator=g), factors=factors, factors_test=factors_test, codes=factors + .1 * torch.randn(200, 2, generator=g), codes_test=factors_test + .1 * torch.randn(100, 2, generator=g))
    exec(re.sub(r"steps=[\d_]+|minutes=\d+", "steps=2", block), names)
    for name in ("new", "row", "again", "one", "mixed"):
        if name in names: assert names[name].isfinite().all() and names[name].shape[1:] == images.shape[1:]
