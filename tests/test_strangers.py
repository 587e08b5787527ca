"What a stranger met who used single pieces on tensors of their own: each of these went wrong without a word, or with a traceback."
import numpy as np
import pytest
import torch
from torch import nn
from disdiff_tutorial.components.decomposition import ComponentScore, blend
from disdiff_tutorial.core import load_tensors, save_tensors
from disdiff_tutorial.data.factors import Reduced
from disdiff_tutorial.data.files import load
from disdiff_tutorial.data.sprites import Sprites
from disdiff_tutorial.diffusion.sampling import guided
from disdiff_tutorial.diffusion.training import fit
from disdiff_tutorial.diffusion.unet import UNet
from disdiff_tutorial.dyga.hddc import kmeans
from disdiff_tutorial.dyga.latent_diffusion import VQGAN
from disdiff_tutorial.dyga.skip_dropout import SkipDropout
from disdiff_tutorial.ivae.ivae import IVAE
from disdiff_tutorial.lcgdm.factorvae import VAE
from disdiff_tutorial.lcgdm.latent_guidance import LCGDM
from disdiff_tutorial.metrics.disentanglement import bootstrap, evaluate, factorvae_score
from disdiff_tutorial.metrics.quality import features

IMAGES = torch.randint(0, 256, (12, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FEW = dict(steps=3, size=4, progress=False)

class Normed(nn.Module):
    "An encoder whose answer depends on its batch while it trains."
    shape = (1, 16, 16)
    def __init__(self, k=2, dim=4):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, k * dim), nn.Unflatten(1, (k, dim)))
    def forward(self, x): return self.net(x)

class Judge(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, a, b): return (self.net(a) - self.net(b)).square().flatten(1).mean(1)

def components(): return ComponentScore(UNet(1, width=8, mults=(1,), blocks=1, cond_dim=4), Normed(), 2)

def test_training_is_in_training_mode_and_the_mode_comes_back():
    seen, net = [], nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)).eval()
    fit(lambda x: seen.append(net.training) or net(x).square().mean(), net, lambda step: (torch.randn(4, 2),), steps=2, progress=False)
    assert seen == [True, True] and not any(m.training for m in net.modules())
    net.train(); net[1].eval(); fit(lambda x: net(x).square().mean(), net, lambda step: (torch.randn(4, 2),), steps=1, progress=False)
    assert net.training and not net[1].training                                   # frozen by hand, and left so

def test_a_perceptual_judge_neither_learns_nor_is_kept():
    judge = nn.Conv2d(1, 1, 3); before = judge.weight.clone()
    model = VQGAN(1, width=4, mults=(1, 2), size=16, dim=2, perceptual=Judge(judge)); model.fit(IMAGES, **FEW)
    assert torch.equal(judge.weight, before) and not [k for k in model.state_dict() if "perceptual" in k]
    VQGAN.from_tensors(model.tensors(), model.facts)

def test_looking_leaves_the_codebook_alone():
    model = VQGAN(1, width=4, mults=(1, 2), size=16, dim=2); old = model.book.entries.clone()
    with torch.no_grad():
        for _ in range(110): model.rebuild(IMAGES[:2])
    assert torch.equal(model.book.entries, old)

def test_components_are_encoded_in_evaluation_mode():
    model = components().train()
    assert torch.allclose(model.encode(IMAGES)[:2], model.encode(IMAGES[:2]), atol=1e-6) and model.training
    model.encoder.eval(); model.sample(model.encode(IMAGES[:2]), steps=2)
    assert model.training and not model.encoder.training
    model.fit(IMAGES, ema=.5, clip=2., **FEW)                                     # options of `fit` pass through

def test_guidance_refuses_whole_numbers_beside_a_null_of_floats():
    with pytest.raises(ValueError, match="expected conditions of floats"): guided(lambda xt, t, c: xt, torch.eye(3)[:2].long(), 2., torch.full((3,), .4))
    net = guided(lambda xt, t, c: c[:, None].float().expand_as(xt), torch.tensor([1, 2]), 2., torch.tensor(10))          # labels, and a label for none
    assert net(torch.zeros(2, 1), torch.full((2,), .5)).flatten().tolist() == [-8., -6.]

def test_codes_of_an_autoencoder():
    vae = VAE((1, 16, 16), np.int64(3), hidden=(8,))
    assert not vae.encode(IMAGES).requires_grad and vae.encode(IMAGES.double() / 127.5 - 1).dtype == torch.float32
    assert vae.decode(vae.encode(IMAGES).numpy().astype(float)).shape == IMAGES.shape

def test_traversals_repeat():
    model = LCGDM(VAE((1, 16, 16), 3, hidden=(8,)), (1, 16, 16), 3, width=8); model.fit(IMAGES, ema=.5, **FEW)
    draw = lambda: model.traverse(0, [0., 1.], generator=torch.Generator().manual_seed(0), method="em", steps=3)
    assert torch.equal(draw(), draw())

def test_small_ones(tmp_path):
    with pytest.raises(ValueError, match="give their numbers, not a mask"): blend(3, only=torch.tensor([False, False, True]))
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, width=np.int64(3), shape=np.array([1, 2]))
    assert load_tensors(tmp_path / "a.safetensors")[1] == {"width": 3, "shape": [1, 2]}
    x = torch.zeros(1, 10, 3); x[:, 5:] = 1
    assert len(kmeans(x, 3)[0].unique()) == 2

def test_numbers_and_modules_of_other_libraries():
    data, few = Reduced(Sprites(16, "cpu"), orientation=[0]), dict(votes=(20, 10), progress=False)
    encode = lambda x: x.float().flatten(1)[:, 40:200:40]
    assert factorvae_score(encode, data, points=50, seed=np.int64(3), **few) and evaluate(encode, data, np.int64(1), 60, 30, **few) and bootstrap([1., 2.], seed=np.int64(1))
    pooled = features(IMAGES, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), show=False)
    assert pooled.shape == (12, 12) and torch.allclose(pooled[:, 0], IMAGES[:, 0, :8, :8].float().mean((1, 2)))
    model, x, u = IVAE(nn.Linear(3, 4), nn.Linear(2, 3), 2, aux=1), np.random.rand(40, 3), np.random.rand(40, 1)
    model.fit(x, u, **FEW); assert model.encode(x).shape == (40, 2)
    net = UNet(1, width=8, mults=(1, 2), blocks=1)
    for levels in (np.array([0]), torch.tensor([0]), range(1)): assert len(SkipDropout(levels=levels).choose(net)) == len(SkipDropout(levels=[0]).choose(net))

def test_hidden_folders_hold_no_pictures(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for place in ("cat", "dog", "cat/.ipynb_checkpoints", "__MACOSX"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True); Image.new("RGB", (16, 16)).save(tmp_path / place / "1.png")
    found = load("folder", root=tmp_path, size=16)
    assert found.names == ("cat", "dog") and len(found.images) == 2
