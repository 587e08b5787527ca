"LCG-DM and iVAE + DDPM from outside: shapes, files, errors, and what must not move."
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from disdiff_tutorial.ivae.ivae import CategoricalIVAE, IVAE, cnn, layers
from disdiff_tutorial.ivae.ivae_ddpm import IVAEDDPM
from disdiff_tutorial.ivae.variance_posterior import posterior_cdf, sample_variance
from disdiff_tutorial.lcgdm.factorvae import FactorVAE, dear_first, learn
from disdiff_tutorial.lcgdm.latent_guidance import LCGDM

x = torch.randint(256, (24, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

def lcgdm(**kw): return LCGDM(FactorVAE((1, 16, 16), codes=3, hidden=(16,), width=8, depth=1), (1, 16, 16), 3, width=16, attend=[], **kw)

def test_shipped_weights_are_small(tmp_path):
    "A model of the size that ships stays under 12 MB."
    model = LCGDM(FactorVAE((3, 64, 64)), (3, 64, 64), 10, width=64)
    model.save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < 12e6

def test_a_resumed_stage_ends_the_same(tmp_path):
    "Stage 2 stopped after its first part and called again, against one call."
    def weights(parts):
        torch.manual_seed(0); model = lcgdm()
        for steps in parts: model.fit(x, steps=steps, size=8, checkpoint=tmp_path / f"{len(parts)}", progress=False)
        return torch.cat([p.flatten() for p in model.net.parameters()])
    assert torch.equal(weights([6]), weights([6, 6]))

def test_guidance_one_is_the_conditional_net():
    model = lcgdm(); noise, code = torch.randn(2, 1, 16, 16), torch.randn(2, 3)
    a, b = (model.sample(2, code, guidance=w, steps=3, x=noise) for w in (1., 1. + 1e-9))
    assert torch.allclose(a, b, atol=1e-5)

@pytest.mark.parametrize("call, message", [
    (lambda: lcgdm().encode(x[..., :8]), "expected images"), (lambda: lcgdm().traverse(3, [0.]), "expected a number from 0 to 2"),
    (lambda: lcgdm().fit(x, steps=2, pretrain=1.), "expected a share pretrain"), (lambda: FactorVAE((1, 16, 16), share=1.), "expected a share between 0 and 1"),
    (lambda: LCGDM(nn.Flatten(), (1, 16, 16), 5).encode(x), "expected codes (n, 5)"),
    (lambda: IVAE(layers(3, 6), layers(3, 3), codes=3, aux=2).loss(torch.zeros(4, 3), torch.zeros(3, 2)), "expected notes u (4, 2)"),
    (lambda: CategoricalIVAE(layers(3, 5), layers(20, 3), codes=2).encode(torch.zeros(4, 3)), "expected (n, 20) logits"),
    (lambda: sample_variance(torch.tensor([.7])), "expected z in [-1/2, 1/2]"), (lambda: sample_variance(torch.tensor([1])), "expected z as a tensor of floats")])
def test_one_line(call, message):
    with pytest.raises((ValueError, TypeError)) as err: call()
    assert message in str(err.value) and "\n" not in str(err.value)

@settings(max_examples=50, deadline=None)
@given(st.floats(-.5, .5), st.floats(0, 1 / 12), st.sampled_from(["exact", "grid"]))
def test_variance_can_have_led_to_its_factor(z, eps, method):
    s = sample_variance(torch.full((20,), z, dtype=torch.float64), eps, method)
    assert (s >= max(eps, z ** 2 / 3) - 1e-12).all() and (s <= 1 / 12 + 1e-12).all()

def test_exact_and_grid_draw_the_same():
    "Kolmogorov distance of 100,000 draws to the exact distribution, against its value at probability 0.001 (1.95 / sqrt n) and the grid's own error."
    n, z = 100_000, torch.tensor(.25, dtype=torch.float64)
    for method, extra in (("exact", 0.), ("grid", .0075)):
        s = sample_variance(z.expand(n), method=method, generator=torch.Generator().manual_seed(1)).sort().values
        assert (posterior_cdf(s, z) - torch.arange(1, n + 1) / n).abs().max() < 1.95 / math.sqrt(n) + 2 * extra

def test_schedule_ends_in_the_published_loss():
    torch.manual_seed(0); model = FactorVAE((1, 16, 16), codes=3, hidden=(16,), width=8, depth=1)
    class Data:
        def batches(self, size, seed=0): return lambda step: (x[:size],)
    learn(model, Data(), 10, size=8, schedule=dear_first, progress=False)
    assert (model.kl_weight, model.tc_weight) == (1., 1.)

@pytest.mark.parametrize("aux", [0, 2])
def test_ivae_ddpm(aux):
    encoder, decoder = cnn((1, 16, 16), 6, 3, 8)
    model = IVAEDDPM(IVAE(encoder, decoder, 3, aux), (1, 16, 16), width=16, attend=[])
    model.fit(x, torch.rand(24, 2), steps=2, size=8, progress=False)
    assert model.sample(model.encode(x[:2]), steps=2).shape == (2, 1, 16, 16)
    assert model.net.null.abs().max() == 0                                  # the paper's null stays at zeros
