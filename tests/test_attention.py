"""Attention in every way and any shape: the same numbers, no look ahead, no trace of the pieces, the neighbours or the padding."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from bantam.config import BantamConfig
from bantam.model.attention import Attention, eager_attention, sdpa_attention, tiled_attention
from bantam.model.cache import KVCache
from bantam.model.mask import build_mask, build_positions
from bantam.model.rope import rope_table

MANY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def rows(draw, longest=150):
    "A batch of rows, perhaps with a window, documents and padding on the left."
    B, S = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    marks = {}
    if draw(st.booleans()): marks["document_ids"] = (torch.rand(B, S, generator=gen) < draw(st.sampled_from([.02, .2]))).long().cumsum(-1)
    if draw(st.booleans()): marks["attention_mask"] = (torch.arange(S)[None] >= torch.randint(0, S, (B, 1), generator=gen)).long()
    return B, S, draw(st.none() | st.integers(1, S + 5)), marks, gen


def layer_of(draw_heads, impl="auto", **kw):
    G, R, K = draw_heads
    config = BantamConfig(vocab_size=8, hidden_size=G*R*K, intermediate_size=8, num_hidden_layers=1, num_attention_heads=G*R, num_key_value_heads=G, attn_impl=impl, **kw)
    return Attention(config)


HEADS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 8, 16]))


@MANY
@given(rows(), HEADS, st.data())
def test_three_ways_one_result(row, heads, data):
    (B, S, window, marks, gen), (G, R, K) = row, heads
    T = data.draw(st.integers(1, S))
    mask = build_mask(T, S, window, **marks)
    qkv = [torch.randn(B, n, t, K, generator=gen) for n, t in ((G*R, T), (G, S), (G, S))]
    grad, results = torch.randn(B, G*R, T, K, generator=gen), []
    for way in (eager_attention, sdpa_attention, tiled_attention):
        leaves = [t.clone().requires_grad_() for t in qkv]
        out = way(*leaves, mask)
        out.backward(grad)
        results.append([out.detach()] + [t.grad for t in leaves])
    for r in results[1:]: assert_close(r, results[0], atol=1e-5, rtol=1e-5)
    assert all(t.isfinite().all() for r in results for t in r)


@MANY
@given(rows(60), HEADS, st.booleans(), st.data())
@torch.no_grad()
def test_pieces_say_what_the_whole_says(row, heads, qk_norm, data):
    B, S, window, marks, gen = row
    layer, K = layer_of(heads, data.draw(st.sampled_from(["auto", "sdpa", "eager"])), qk_norm=qk_norm), heads[2]
    x = torch.randn(B, S, layer.qkv_proj.in_features, generator=gen)
    run = lambda x, T, upto, cache: layer(x, rope_table(build_positions(T, upto, **(m := {k: v[:, :upto] for k, v in marks.items()})), K), build_mask(T, upto, window, **m), cache)
    whole, cache, at, out = run(x, S, S, None), KVCache(1, reserve=data.draw(st.sampled_from([0, S]))), 0, []
    while at < S:
        T = data.draw(st.integers(1, S - at))
        out.append(run(x[:, at:at+T], T, at + T, cache))
        at += T
    assert_close(torch.cat(out, 1), whole, atol=1e-5, rtol=1e-5)


@MANY
@given(rows(100), HEADS, st.sampled_from(["auto", "sdpa", "eager"]), st.data())
@torch.no_grad()
def test_the_future_changes_nothing(row, heads, impl, data):
    B, S, window, marks, gen = row
    layer = layer_of(heads, impl)
    x, at = torch.randn(B, S, layer.qkv_proj.in_features, generator=gen), data.draw(st.integers(0, S - 1))
    rope, mask = rope_table(build_positions(S, **marks), heads[2]), build_mask(S, window=window, **marks)
    other = x.clone()
    other[:, at:] = torch.randn(B, S - at, x.shape[-1], generator=gen)
    assert_close(layer(x, rope, mask)[:, :at], layer(other, rope, mask)[:, :at], atol=1e-6, rtol=1e-6)


@MANY
@given(rows(100), HEADS)
@torch.no_grad()
def test_documents_and_rows_do_not_meet(row, heads):
    B, S, window, marks, gen = row
    layer = layer_of(heads)
    x = torch.randn(B, S, layer.qkv_proj.in_features, generator=gen)
    together = layer(x, rope_table(build_positions(S, **marks), heads[2]), build_mask(S, window=window, **marks))
    ids, real = marks.get("document_ids", torch.zeros(B, S).long()), marks.get("attention_mask", torch.ones(B, S)).bool()
    for b in range(B):
        for d in ids[b].unique():
            here = (ids[b] == d) & real[b]
            if not (T := int(here.sum())): continue
            alone = layer(x[b:b+1, here], rope_table(torch.arange(T), heads[2]), build_mask(T, window=window))
            assert_close(together[b:b+1, here], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiler_traces_it_whole(packed):
    layer, x = layer_of((2, 2, 8), qk_norm=True), torch.randn(2, 40, 32)
    marks = {"document_ids": (torch.arange(40)[None] > 20).long().expand(2, 40)} if packed else {}
    def run(x): return layer(x, rope_table(build_positions(40, **marks), 8), build_mask(40, **marks))
    results = []
    for f in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        y = f(x)
        y.square().mean().backward()
        results.append([y.detach()] + [p.grad.clone() for p in layer.parameters()])
    assert_close(*results, atol=1e-5, rtol=1e-5)


def test_backward_inside_autocast_is_the_same():
    layer, x, grads = layer_of((2, 2, 8), qk_norm=True), torch.randn(2, 40, 32), []
    for inside in (True, False):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x, rope_table(torch.arange(40), 8)).float().square().mean()
            if inside: loss.backward()
        if not inside: loss.backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert_close(*grads, atol=1e-6, rtol=1e-3)
