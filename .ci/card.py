"Makes nbs/images/card.png, the picture of the README and of shared links, and the site's icon, from the models that come with the book (scale cpu, seed 0)."
import os
os.environ["DISDIFF_SCALE"] = "cpu"
import matplotlib; matplotlib.use("Agg")
import torch
from disdiff_tutorial import show
from disdiff_tutorial.core import atomic, checkout, to_float, to_uint8
from disdiff_tutorial.data.scenes import rooms
from disdiff_tutorial.dyga.interpretation import groups, load_ablation, swapped
from disdiff_tutorial.lcgdm.latent_guidance import load_lcgdm, squares32
from disdiff_tutorial.metrics.disentanglement import mutual_information, unit_codes
from disdiff_tutorial.run import records

out, g = checkout() / "nbs" / "images", torch.Generator().manual_seed(0)
first = lambda name: next(r for r in records(name) if (r.scale, r.seed) == ("cpu", 0))
varying = lambda data: [k for k, s in enumerate(data.grid.sizes) if s > 1]
def told(model, data, n=3000):
    (x, f), k = data.sample(n, torch.Generator().manual_seed(0)), varying(data)
    z = model.encode(x); return mutual_information(unit_codes(z) if z.ndim == 3 else z, f[:, k]), [data.grid.names[i].replace("_", " ") for i in k]

sprites, model = squares32(), load_lcgdm(first("lcgdm/sprites"))
table, names = told(model, sprites)
noise = torch.randn(1, *model.shape, generator=g)
moved = [to_uint8(model.traverse(int(table[:, k].argmax()), torch.linspace(-1.5, 1.5, 7), torch.zeros(model.codes), noise, steps=20)) for k in range(len(names))]
world, units = rooms("cpu"), load_ablation(first("dyga/rooms-both"))
table, factors = told(units, world)
(x, _), (y, _) = (world.sample(7, g) for _ in range(2))
start = torch.randn(7, *units.shape, generator=g)
mixed = [to_uint8(units.sample(swapped(units.encode(x), units.encode(y), who), x=start, steps=20)) for who in groups(table)]

fig, axes = show.figure(10, 5.25, 1, 2)
fig.set_facecolor("white")
show.grid(torch.cat([m.expand(-1, 3, -1, -1) for m in moved]), cols=7, rows=[{"posX": "x", "posY": "y"}.get(n, n) for n in names], title="one number of the code moves", ax=axes[0])
show.grid(torch.cat([x, y, *mixed]), cols=7, rows=["A", "B"] + [f"B's {n}" for n in factors], title="A with some units of B", ax=axes[1])
fig.suptitle("disdiff_tutorial: disentangled representations by diffusion,\nderived, implemented, trained and measured", color="#444444")
with atomic(out / "card.png") as tmp: fig.savefig(tmp, dpi=120, format="png", facecolor="white", transparent=False)
from PIL import Image
with atomic(out / "favicon.png") as tmp: Image.fromarray(world.images(world.grid.factors(torch.tensor([2345])))[0].permute(1, 2, 0).numpy()).save(tmp, format="PNG")
