"""Flex beside the dense definition, for any mask and any rule; what it keeps, what it refuses, and
what a compiler sees of it."""
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from bantam.core import BantamError
from bantam.model.attention import attend
from bantam.model.flex import KEPT, block_mask, flex_attention, keep_block_masks
from bantam.model.mask import Marks
from bantam.model.scores import ScoreRule, alibi_slopes

MANY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def clean():
    "No test sees what another has kept."
    before = KEPT.cap, KEPT.device
    KEPT.made.clear()
    yield
    keep_block_masks(*before)
    KEPT.made.clear()


@MANY
@given(st.data())
def test_flex_is_the_definition(data):
    one = lambda *xs: data.draw(st.sampled_from(xs))
    number = lambda a, b: data.draw(st.integers(a, b))
    B, S, G, R, K, V = number(1, 3), number(1, 40), one(1, 2), one(1, 2, 3), one(4, 8), one(4, 6)
    T, H, gen = number(1, S), G*R, torch.Generator().manual_seed(number(0, 9999))
    said = {}
    rand = torch.rand(B, S, generator=gen)
    if one(False, True): said["document_ids"] = (rand < .1).long().cumsum(-1)
    first = (rand[:, :1] * S).long()
    if one(False, True): said["attention_mask"] = (torch.arange(S) >= first).long()
    score = ScoreRule(one(K**-.5, .1), one(None, alibi_slopes(H)), one(0., -2., 3.), one(None, 1.5))
    mask = Marks(T, S - T, **said).mask(one(None, 1, 5, 60), one(0, 1, 4), alone=score.asks)
    shapes = (H, T, K), (G, S, K), (G, S, V)
    q, k, v = (torch.randn(B, *shape, generator=gen) for shape in shapes)
    sinks = torch.randn(H, generator=gen) if one(False, True) else None
    want = attend(q, k, v, mask, score, sinks, impl="eager")
    assert_close(flex_attention(q, k, v, mask, score, sinks), want, atol=1e-5, rtol=1e-5)
    assert_close(attend(q, k, v, mask, score, sinks, impl="flex"), want, atol=1e-5, rtol=1e-5)


def test_a_block_mask_is_built_once(monkeypatch):
    from torch.nn.attention import flex_attention as module
    made, real = [], module.create_block_mask
    counted = lambda *a, **kw: made.append(a[3:5]) or real(*a, **kw)
    monkeypatch.setattr(module, "create_block_mask", counted)
    window = lambda T: Marks(T).mask(5, 1) # each forward pass makes its own `Mask`
    for _ in range(3):
        for T in (16, 24): block_mask(window(T), T, T, CPU)
    assert made == [(16, 16), (24, 24)]
    padded = Marks(16, 0, None, (torch.arange(16) > 2).long()[None]).mask(5, 1)
    for _ in range(3): block_mask(padded, 16, 16, CPU) # the layers of one pass
    assert len(made) == 3 and len(KEPT.made) == 2


def test_cap_and_device_act():
    keep_block_masks(3, "meta")
    for T in range(8, 14):
        with pytest.raises(NotImplementedError): block_mask(None, T, T, CPU) # kept without numbers
    assert [key[0] for key in KEPT.made] == [11, 12, 13]
    assert {str(m.kv_indices.device) for m in KEPT.made.values()} == {"meta"}
    with pytest.raises(BantamError, match="block_mask_cache_cap"): keep_block_masks(0)


def test_no_backward_on_a_cpu():
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    with pytest.raises(BantamError, match="no backward pass on a CPU"):
        flex_attention(q, k, v.requires_grad_())
    with torch.no_grad(): flex_attention(q, k, v)


def test_one_trace_serves_every_pass():
    "Each pass makes new functions; a compiler that saw more than their code would work again."
    from torch.nn.attention.flex_attention import flex_attention as kernel
    from bantam.model.flex import mask_mod, score_mod
    traced, rule = [], ScoreRule(.5, alibi_slopes(2), .5, 2.)
    def backend(graph, inputs):
        traced.append(graph)
        return graph
    torch._dynamo.reset()
    run = torch.compile(kernel, backend=backend, fullgraph=True)
    for step in range(4):
        at = torch.arange(16)[None]
        mask = Marks(16, 0, (at > 3 + step).long(), (at > step).long()).mask(5, 1, alone=True)
        q, k, v = torch.randn(3, 1, 2, 16, 4)
        how = dict(score_mod=score_mod(rule, mask, 0, CPU))
        how["block_mask"] = block_mask(mask, 16, 16, CPU)
        with torch.no_grad(): got = run(q, k, v, scale=.5, **how)
        assert_close(got, attend(q, k, v, mask, rule, impl="eager"), atol=1e-5, rtol=1e-5)
    assert len(traced) == 1
    torch._dynamo.reset()


def test_import_is_light():
    "The room is imported with the model; PyTorch's flex and its compiler only when it is used."
    prog = ("import torch, sys\nbefore = set(sys.modules)\nimport bantam.model.flex\n"
            "new = set(sys.modules) - before\n"
            "print(*sorted(m for m in new if 'flex_attention' in m or 'dynamo' in m))")
    done = subprocess.run([sys.executable, "-c", prog], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr
