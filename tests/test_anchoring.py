"DyGA from outside: what moves and how far, alone and in company; selection that repeats; degenerate units; errors; FSQ."
import copy, math
import pytest
import torch
from torch import nn
from disdiff_tutorial.core import load_tensors, save_tensors
from disdiff_tutorial.dyga.anchoring import FSQ, DyGA, bounded_delta, drop_small, gumbel, init_gaussians, paper_delta, snap, split, spread, with_room
from disdiff_tutorial.dyga.hddc import Gaussians, log_joint, m_step

VARIANTS = ("paper", "released", "bounded")

def features(n=300, units=3, dim=6, seed=0, dtype=torch.float64):
    "Features of units with 2, 3, ... hills, away from 0."
    g = torch.Generator().manual_seed(seed); out = []
    for u in range(units):
        hills = 2 * torch.randn(u + 2, dim, generator=g, dtype=dtype)
        out.append(5 + hills[torch.randint(u + 2, (n,), generator=g)] + .2 * torch.randn(n, dim, generator=g, dtype=dtype))
    return torch.stack(out, 1)

def made(variant="bounded", x=None, seed=0, **kw):
    x = features() if x is None else x
    return DyGA(*x.shape[1:], variant, **{"start": 3, "most": 8, **kw}).eval().select(x, torch.Generator().manual_seed(seed))

def test_spread_is_a_plain_sum():
    x = features(); g = torch.Generator().manual_seed(1); member = torch.rand(3, 300, 4, generator=g) > .7
    member[1, :, 2] = False
    found = spread(x.transpose(0, 1), member)
    for u in range(3):
        for k in range(4):
            mine = [x[i, u] for i in range(300) if member[u, i, k]]
            middle = sum(mine) / max(len(mine), 1)
            assert math.isclose(found[u, k], sum((p - middle).norm() for p in mine) / max(len(mine), 1), rel_tol=1e-9, abs_tol=1e-12)

@pytest.mark.parametrize("variant", ("paper", "bounded"))
def test_a_row_does_not_care_for_its_batch(variant):
    x = features(); m = made(variant); whole = m.align(x)
    for rows in (slice(0, 1), slice(7, 9), slice(200, 300)): assert torch.allclose(m.align(x[rows]), whole[rows], atol=1e-12)
    far = torch.cat([x[:1], x[1:] * 1e3]); assert torch.allclose(m.align(far)[:1], whole[:1], atol=1e-12)
    m.train(); noise = gumbel((300, 3, 8), torch.Generator().manual_seed(2)); whole = m.align(x, noise)
    assert torch.allclose(m.align(x[5:9], noise[5:9]), whole[5:9], atol=1e-12)

def test_released_cares():
    x = features(); m = made("released")
    assert (m.align(x[:4]) - m.align(x)[:4]).abs().max() > 1e-6

@pytest.mark.parametrize("variant", VARIANTS)
def test_selection_repeats(variant):
    a, b = made(variant), made(variant)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()) and torch.equal(a.align(features()), b.align(features()))
    assert a.report.keys() == b.report.keys() and all(torch.equal(a.report[k], b.report[k]) for k in a.report)
    assert any(not torch.equal(v, made(variant, seed=1).state_dict()[k]) for k, v in a.state_dict().items())

def test_selection_leaves_the_global_generator_alone():
    torch.manual_seed(0); before = torch.get_rng_state(); made(subset=100); assert torch.equal(before, torch.get_rng_state())

@pytest.mark.parametrize("variant", VARIANTS)
def test_state_survives(variant, tmp_path):
    m = made(variant); save_tensors(tmp_path / "m.safetensors", m.state_dict())
    back = DyGA(3, 6, variant, start=3, most=8).eval(); assert torch.equal(back.align(features()), features())
    back.load_state_dict(load_tensors(tmp_path / "m.safetensors")[0])
    assert torch.equal(back.align(features()), m.align(features())) and torch.equal(copy.deepcopy(m).align(features()), m.align(features()))

@pytest.mark.parametrize("variant", ("paper", "bounded"))
def test_moves_straight_to_the_anchor_and_not_too_far(variant):
    x = features(); m = made(variant); y = m.align(x)
    k = m.choose((x - m.low[:, None]) / m.size[:, None] - 1).argmax(-1)
    mu = torch.stack([m.anchors[u][k[:, u]] for u in range(3)], 1)
    share = ((y - x) * (mu - x)).sum(-1) / (mu - x).square().sum(-1)
    assert torch.allclose(y, x + share[..., None] * (mu - x), atol=1e-9) and share.min() >= 0 and share.max() <= .1 + 1e-12
    rule = paper_delta(x, mu) if variant == "paper" else bounded_delta(x, mu, m.scale)
    assert torch.allclose(share, rule, atol=1e-9)

def test_the_likeliest_anchor_by_the_formula():
    "DyGA (4) with full covariances, against the choice at inference."
    x = features(); m = made(); s = (x - m.low[:, None]) / m.size[:, None] - 1; k = m.choose(s).argmax(-1)
    for u in range(3):
        logs = [w.log() + torch.distributions.MultivariateNormal(mu, q @ v.diag() @ q.T).log_prob(s[:, u]) for w, mu, q, v in zip(m.weights[u], m.means[u], m.axes[u], m.values[u]) if w > 0]
        live = (m.weights[u] > 0).nonzero()[:, 0]
        assert torch.equal(live[torch.stack(logs).argmax(0)], k[:, u])

def test_bounded_follows_shift_and_scale():
    x = features(); a = made().align(x); y = 7 * x - 40
    assert torch.allclose(made(x=y).align(y), 7 * a - 40, atol=1e-6)

def test_gradients():
    x = features()[:4].requires_grad_(); m = made()
    assert torch.autograd.gradcheck(m.align, (x,))
    for variant in ("paper", "bounded"):
        m = made(variant).train(); (slope,) = torch.autograd.grad(m.align(x, gumbel((4, 3, 8), torch.Generator().manual_seed(0))).sum(), x)
        assert slope.isfinite().all() and slope.abs().max() > .5                                   # most of a feature passes unchanged

@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ("constant", "zeros", "few values", "a line", "relu"))
def test_degenerate_units(variant, kind):
    g = torch.Generator().manual_seed(0); x = features(200, 2, 6)
    x[:, 0] = {"constant": torch.full((200, 6), .3), "zeros": torch.zeros(200, 6), "few values": torch.randint(3, (200, 1), generator=g).expand(-1, 6),
               "a line": torch.rand(200, 1, generator=g) * torch.arange(6), "relu": (torch.randn(200, 1, generator=g) * torch.randn(6, generator=g)).relu()}[kind].double()
    m = made(variant, x).train(); leaf = x.clone().requires_grad_(); y = m.align(leaf)
    (slope,) = torch.autograd.grad(y.square().sum(), leaf)
    assert y.isfinite().all() and slope.isfinite().all() and (m.counts >= 1).all() and torch.allclose(m.weights.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-6)

def test_places_never_overflow():
    m = made(start=7, most=8, chance=1., least=0)
    assert all((c <= 8).all() for c in m.report.values()) and (m.report["split 3"] == 8).all()
    assert list(m.report) == ["start", "split 1", "split 2", "split 3", "filter", "refit"]

def test_splits_together_as_alone():
    x = features(240, 3, 4).transpose(0, 1).contiguous()
    one = lambda x: with_room(m_step(x, torch.ones(*x.shape[:2], 1, dtype=x.dtype)), 6)
    together = split(x, one(x), chance=0)
    for u in range(3):
        alone = split(x[u:u + 1], one(x[u:u + 1]), chance=0)
        assert torch.allclose(alone.means[0], together.means[u], atol=1e-6) and torch.allclose(alone.weights[0], together.weights[u], atol=1e-6)

@pytest.mark.parametrize("seed", range(3))
def test_the_whole_of_algorithm_2(seed):
    "Every stage as printed, one unit, plain loops that stop nowhere early, against `select`; without the coin, whose throws fall in another order."
    g = torch.Generator().manual_seed(seed); hills = torch.tensor([[0., 0], [2.2, 0], [0, 2.2], [2.6, 2.4], [5., 1.2]]).double().repeat_interleave(100, 0)
    c = torch.cat([hills + .3 * torch.randn(500, 2, generator=g, dtype=torch.float64), .05 * torch.randn(6, 2, generator=g, dtype=torch.float64) + torch.tensor([6.5, 4.])]); x = ((c - c.min()) / (c.max() - c.min()) - 1)[None]
    m = DyGA(1, 2, "bounded", start=3, most=12, psi=.07, chance=0).select(c[:, None], torch.Generator().manual_seed(seed))
    def steps(x, g):
        for _ in range(30): g = m_step(x, log_joint(x, g).softmax(-1))
        return g
    g = steps(x, init_gaussians(x, 3, torch.Generator().manual_seed(seed))).of([0]); found = [Gaussians(*(v[:, k:k + 1] for v in g)) for k in range(3)]
    join = lambda parts: Gaussians(*map(lambda *v: torch.cat(v, 1), *parts))
    for _ in range(3):
        r, now = log_joint(x, join(found)).softmax(-1)[0], []
        for k, one in enumerate(found):
            f = x[:, r[:, k] > .5]; wide = (f - f.mean(1)).norm(dim=-1).mean()
            if wide <= .07: now.append(one); continue
            side = ((f - one.means) @ one.axes[:, 0, :, :1])[0, :, 0] > 0
            two = steps(f, m_step(f, nn.functional.one_hot(side.long(), 2).double()[None]))
            now += [Gaussians(one.weights * two.weights[:, h:h + 1], *(v[:, h:h + 1] for v in two[1:])) for h in (0, 1)]
        found = now
    total = log_joint(x, join(found)).softmax(-1).sum(1)[0]
    kept = steps(x, join([one for one, t in zip(found, total) if t >= 10])); ours = m.gaussians.of(0)
    a, b = kept.means[0], ours.means[ours.weights > 0]; near = torch.cdist(a, b).argmin(1)
    assert len(a) == len(b) > 3 and near.sort().values.tolist() == list(range(len(b))) and (a - b[near]).abs().max() < 2e-3 and (kept.weights[0] - ours.weights[ours.weights > 0][near]).abs().max() < 2e-3

def test_the_filter():
    x = features(200, 1, 4).transpose(0, 1).contiguous(); x[0, :5] = 60 + .1 * torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = torch.zeros(1, 200, 2, dtype=torch.float64); r[0, :5, 0] = 1; r[0, 5:, 1] = 1
    g = drop_small(x, m_step(x, r)); assert g.weights[0, 0] == 0 and g.weights[0, 1] == 1
    assert (drop_small(x, m_step(x, r), least=4).weights > 0).all() and (drop_small(x, m_step(x, r), least=1000).weights > 0).sum() == 1

@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows(variant): assert made(variant).align(features()[:0]).shape == (0, 3, 6)

def test_types_pass_through():
    x = features(); m = made()
    for kind in (torch.float32, torch.float16): assert m.align(x.to(kind)).dtype == kind
    assert m.select(x.float(), torch.Generator().manual_seed(0)).low.dtype == torch.float64

def bad(value): x = features(); x[3, 1, 2] = value; return x

@pytest.mark.parametrize("call, message", [
    (lambda: made().align(features(dim=5)), "expected features (n, 3, 6) of floats, found (300, 3, 5)"), (lambda: made().align(features()[0]), "expected features (n, 3, 6)"),
    (lambda: made().align(features().long()), "torch.int64"), (lambda: made().align(features().numpy()), "found ndarray"), (lambda: with_room(made().gaussians, 4), "expected most >= 8"), (lambda: made(x=features(7)), "expected at least 8 rows, found 7"), (lambda: made(x=bad(math.nan)), "expected finite features, found 1 NaN"),
    (lambda: made(x=bad(math.inf)), "expected finite features"), (lambda: DyGA(3, 6, "best"), "expected variant"), (lambda: DyGA(3, 1), "lift it first"), (lambda: DyGA(0, 6), "expected at least one unit"),
    (lambda: DyGA(3, 6, start=0), "expected start from 1"), (lambda: DyGA(3, 6, strength=2.), "expected strength"), (lambda: DyGA(3, 6, tau=0.), "tau > 0"), (lambda: DyGA(3, 6, psi=math.nan), "expected psi >= 0"), (lambda: DyGA(3, 6, phi=1.), "phi between 0 and 1"), (lambda: DyGA(3, 6, least=-1), "least >= 0"),
    (lambda: DyGA(3, 6, rounds=-1), "expected rounds and iterations >= 0"), (lambda: DyGA(3, 6, iterations=-1), "expected rounds and iterations >= 0"), (lambda: DyGA(3, 6, subset=0), "subset None or >= most = 32"),
    (lambda: made(x=1e160 * features()), "beyond 1e+100"), (lambda: FSQ(6, 8), "found 8"), (lambda: FSQ(6, (8, 1)), "expected at least two levels"), (lambda: FSQ(6, (8.5, 5)), "whole numbers"), (lambda: FSQ(6, ()), "expected at least two levels")])
def test_errors_in_one_line(call, message):
    with pytest.raises(ValueError) as err: call()
    assert message in str(err.value) and "\n" not in str(err.value)

def test_the_lottery():
    "Gumbel noise on r chooses with probability softmax(r), on log r with probability r."
    g = torch.Generator().manual_seed(0); r = torch.tensor([.8, .15, .05], dtype=torch.float64); n = 200_000
    for score, p in ((r, r.softmax(0)), (r.log(), r)):
        share = torch.bincount((score + gumbel((n, 3), g)).argmax(1), minlength=3) / n
        assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()

def test_fsq():
    torch.manual_seed(0); f = FSQ(6, (4, 3)); assert f.size == 12
    y = f(features().float()); codes = f.codes(features().float())
    assert y.shape == (300, 3, 6) and codes.shape == (300, 3) and codes.min() >= 0 and codes.max() < 12
    assert len(torch.cat([y.flatten(0, 1), codes.flatten()[:, None].float()], 1).unique(dim=0)) == len(codes.unique())      # a code, a place
    b = torch.linspace(-1, 1, 101)[:, None].expand(-1, 2); q = snap(b, (4, 3)); assert torch.allclose(snap(q, (4, 3)), q) and [len(v.unique()) for v in q.T] == [4, 3]

def test_the_gradient_passes_through_the_choice():
    "Algorithm 3 with a high temperature, against finite differences."
    x = features()[:3]; m = made("paper", tau=1.).train(); noise = gumbel((3, 3, 8), torch.Generator().manual_seed(0))
    s = ((x - m.low[:, None]) / m.size[:, None] - 1).requires_grad_(); assert torch.autograd.gradcheck(lambda s: m.choose(s, noise), (s,))
