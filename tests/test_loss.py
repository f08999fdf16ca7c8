"""The chunked loss is the plain one: any shape, any shaping, any chunk, both precisions, and never
all logits."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from bantam.core import BantamError
from bantam.model.loss import IGNORE, cross_entropy, linear_cross_entropy

MANY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
SHAPINGS = [{}, dict(label_smoothing=.1), dict(z_loss_weight=.02), dict(softcap=3.),
            dict(label_smoothing=.3, z_loss_weight=.01, softcap=5.)]


def formula(h, w, targets, weights=None, label_smoothing=0., z_loss_weight=0., softcap=None):
    "The definition in PyTorch's words; autograd makes its gradients."
    logits = F.linear(h, w).float() if h.dtype != torch.float64 else F.linear(h, w)
    if softcap is not None: logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, label_smoothing=label_smoothing,
                             reduction="none")
    here = (targets != IGNORE).float()
    losses = losses + z_loss_weight * torch.logsumexp(logits, -1).square() * here
    weights = here if weights is None else here * weights.nan_to_num()
    return (losses * weights).sum(), weights.sum()


def run(f, h, w, *rest, **kw):
    "Sum, weight, and the gradients of 1.7 times the sum."
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    total, weight = f(h, w, *rest, **kw)
    (1.7 * total).backward()
    return total.detach(), weight, h.grad, w.grad


def case(N, V, D, ignored, weighted, seed, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    h, w = (torch.randn(N, D, generator=gen, dtype=dtype),
            torch.randn(V, D, generator=gen, dtype=dtype))
    targets = torch.randint(V, (N,), generator=gen)
    targets[torch.rand(N, generator=gen) < ignored] = IGNORE
    weights = torch.rand(N, generator=gen) * 3 if weighted else None
    if weighted: weights[targets == IGNORE] = torch.nan # what no target weighs is not read
    return h, w, targets, weights


@MANY
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 9), st.sampled_from([0., .3, 1.]),
       st.booleans(), st.integers(1, 50), st.sampled_from([0., .1, 1.]), st.sampled_from([0., .05]),
       st.sampled_from([None, .7, 20.]), st.integers(0, 2**31))
def test_chunks_are_the_formula(N, V, D, ignored, weighted, chunk, smoothing, zeta, cap, seed):
    args, kw = (case(N, V, D, ignored, weighted, seed),
                dict(label_smoothing=smoothing, z_loss_weight=zeta, softcap=cap))
    want = run(formula, *args, **kw)
    assert_close(run(linear_cross_entropy, *args, chunk=chunk, **kw), want, atol=2e-4, rtol=1e-4)
    assert_close(run(lambda h, w, *a, **kw: cross_entropy(h @ w.T, *a, **kw), *args, **kw), want,
                 atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        assert_close(linear_cross_entropy(*args, chunk=chunk, **kw), want[:2], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kw", SHAPINGS, ids=lambda kw: "+".join(kw) or "plain")
def test_exact_in_double(kw):
    args = case(33, 50, 6, .2, True, 0, torch.float64)
    assert_close(run(linear_cross_entropy, *args, chunk=8, **kw)[2:], run(formula, *args, **kw)[2:],
                 atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kw", SHAPINGS, ids=lambda kw: "+".join(kw) or "plain")
def test_half_the_bits_err_no_more_than_usual(kw):
    """Against the exact gradients, the chunked loss under bf16 autocast is as close as the ordinary
    way under bf16 autocast."""
    args = case(200, 300, 64, .1, True, 1)
    args = args[0], args[1]/4, *args[2:]
    exact = run(formula, *args, **kw)
    with torch.autocast("cpu", torch.bfloat16):
        ours, usual = run(linear_cross_entropy, *args, chunk=64, **kw), run(formula, *args, **kw)
    error = lambda got: [((a - b).norm() / b.norm()).item() for a, b in zip(got, exact)]
    assert all(o < 1.3*u + 1e-3 for o, u in zip(error(ours),
                                                error(usual))), (error(ours), error(usual))
    assert max(error(ours)) < .02


@pytest.mark.parametrize("kw", SHAPINGS[1:4], ids=lambda kw: "+".join(kw))
def test_every_shaping_acts(kw):
    args = case(20, 30, 8, .2, False, 2)
    plain, shaped = run(linear_cross_entropy, *args), run(linear_cross_entropy, *args, **kw)
    assert ((plain[0] - shaped[0]).abs() > .01 and (plain[2] - shaped[2]).abs().max() > 1e-3
            and torch.equal(plain[1], shaped[1]))


@pytest.mark.parametrize("kw", SHAPINGS, ids=lambda kw: "+".join(kw) or "plain")
def test_what_has_no_target_adds_nothing(kw):
    """Neither loss nor gradient, smoothing and z-loss included; a weight of two is the position
    twice."""
    h, w, targets, _ = case(20, 30, 8, 0., False, 3)
    some = torch.cat([targets[:12], torch.full((8,), IGNORE)])
    got, want = (run(linear_cross_entropy, h, w, some, **kw),
                 run(linear_cross_entropy, h[:12], w, targets[:12], **kw))
    assert_close((got[0], got[1], got[2][:12], got[3]), want) and not got[2][12:].any()
    twice = run(linear_cross_entropy, h, w, targets, torch.full((20,), 2.), **kw)
    assert_close(twice[3], run(linear_cross_entropy, torch.cat([h, h]), w,
                               torch.cat([targets, targets]), **kw)[3], atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    "The most numbers that one tensor made by any operation has."
    def __init__(self): super().__init__(); self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.most = max(self.most, t.numel())
        return out


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kw", SHAPINGS, ids=lambda kw: "+".join(kw) or "plain")
def test_never_all_logits(kw, precision):
    args = case(512, 400, 8, .1, True, 4)
    for f, limit in ((lambda *a, **k: linear_cross_entropy(*a, chunk=32, **k), 32*400),
                     (formula, None)):
        with Largest() as seen, torch.autocast("cpu", torch.bfloat16,
                                               enabled=precision == torch.bfloat16):
            run(f, *args, **kw)
        # the measure notices who does hold them
        assert seen.most <= limit if limit else seen.most >= 512*400


def test_frozen_parts_get_no_gradient():
    h, w, targets, _ = case(20, 30, 8, .2, False, 5)
    want = run(linear_cross_entropy, h, w, targets, **SHAPINGS[-1])
    for at in (0, 1):
        parts = [h.clone(), w.clone()]
        parts[at].requires_grad_()
        (1.7 * linear_cross_entropy(*parts, targets, **SHAPINGS[-1])[0]).backward()
        assert_close(parts[at].grad, want[2 + at])
        assert parts[1 - at].grad is None


def test_extreme_scores_stay_finite():
    h, w = torch.tensor([[1.], [-1.]]) * 3e3, torch.tensor([[1.], [0.], [-1.]])
    for kw in SHAPINGS:
        got = run(linear_cross_entropy, h, w, torch.tensor([2, 0]), **kw)
        assert all(t.isfinite().all() for t in got), kw
    assert run(linear_cross_entropy, h, w, torch.tensor([2, 0]))[0] == 12000


def test_wrong_targets_are_named():
    h, w, targets, _ = case(20, 30, 8, 0., False, 6)
    targets[7] = 30
    with pytest.raises(BantamError, match="target 30 at flat position 7 is outside the vocabulary "
                                          "of 30"):
        linear_cross_entropy(h, w, targets)
