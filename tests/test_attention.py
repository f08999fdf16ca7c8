"""Attention in every way and any shape: the same numbers, no look ahead, no trace of the pieces,
the neighbours or the padding."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from bantam import BantamConfig
from bantam.model.attention import Attention, eager_attention, layer_mask, sdpa_attention
from bantam.model.cache import KVCache
from bantam.model.groups import GroupedAttention
from bantam.model.layout import causal_tiles
from bantam.model.mask import Marks
from bantam.model.scaling import Angles
from bantam.model.scores import ScoreRule, alibi_slopes
from bantam.model.tiles import TILE, tiled_attention

MANY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def rows(draw, longest=150):
    "A batch of rows, perhaps with documents and padding on the left; and a window with sinks."
    B, S = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    said = {}
    if draw(st.booleans()):
        said["document_ids"] = (
            torch.rand(B, S, generator=gen) < draw(st.sampled_from([.02, .2]))).long().cumsum(-1)
    if draw(st.booleans()):
        said["attention_mask"] = (
            torch.arange(S)[None] >= torch.randint(0, S, (B, 1), generator=gen)).long()
    return (B, S, draw(st.none() | st.integers(1, S + 5)),
            draw(st.sampled_from([0, 1, 4])), said, gen)


@st.composite
def layers(draw):
    "Settings of a layer, every option drawn; heads alone or in groups."
    one = lambda *xs: draw(st.sampled_from(xs))
    G, R, K = one(1, 2, 3), one(1, 2, 3), one(4, 8, 16)
    kw = dict(hidden_size=24, num_attention_heads=G*R, num_key_value_heads=G, head_dim=K,
              qk_norm=one(False, True, "full"), attention_bias=one(False, True),
              attn_temperature=one(1., 2.),
              attn_logit_softcapping=one(None, None, 2.), learned_sinks=one(False, True),
              pos_encoding=one("rope", "alibi", "none"))
    if kw["pos_encoding"] == "rope": kw["partial_rotary_factor"] = one(1., .5)
    if one(False, False, True):
        kw |= dict(num_attention_heads=G*R + 2, num_key_value_heads=G + 1, qk_norm=one(False, True),
                   attention_head_groups=[dict(query_heads=G*R, kv_heads=G, head_dim=K),
                                          dict(query_heads=2, kv_heads=1, head_dim=one(4, 12))])
    return kw


def layer_of(kw, window=None, sinks=0, impl="auto"):
    """A layer whose weights depend on nothing but their shapes; biases and sinks are not at their
    neutral start."""
    boost = kw.pop("sink_boost", 0.)
    if window is None: sinks = sinks if boost else 0
    config = BantamConfig(vocab_size=8, intermediate_size=8, num_hidden_layers=1, window=window,
                          num_attention_sinks=sinks, sink_boost=boost if sinks else 0.,
                          attn_impl=impl, **kw)
    torch.manual_seed(0)
    layer = (GroupedAttention if config.attention_head_groups else Attention)(config.layer(0))
    with torch.no_grad():
        for p in layer.parameters():
            if p.dim() == 1: p.add_(torch.rand_like(p))
    return layer.eval()


def run(layer, x, marks, cache=None):
    return layer(x, Angles(marks.positions(), marks.key_positions()),
                 layer_mask(layer.config, marks, cache), cache)


@settings(MANY, max_examples=150)
@given(rows(), st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 8, 16])),
       st.data())
def test_three_ways_one_result(row, heads, data):
    (B, S, window, sinks, said, gen), (G, R, K), one = (row, heads,
                                                        lambda *xs: data.draw(st.sampled_from(xs)))
    T, V, H = data.draw(st.integers(1, S)), one(K, 5), G*R
    score = ScoreRule(one(K**-.5, .1), one(None, alibi_slopes(H)), one(0., -2., 3.), one(None, 1.5))
    mask = Marks(T, S - T, **said).mask(window, sinks, alone=score.asks)
    leaves = [torch.randn(B, n, t, w, generator=gen)
              for n, t, w in ((H, T, K), (G, S, K), (G, S, V))]
    if one(False, True): leaves.append(torch.randn(H, generator=gen))
    grad, results = torch.randn(B, H, T, V, generator=gen), []
    for way in (eager_attention, sdpa_attention, tiled_attention):
        if way is sdpa_attention and score.softcap: continue
        made = [t.clone().requires_grad_() for t in leaves]
        out = way(*made[:3], mask, score, *made[3:])
        out.backward(grad)
        results.append([out.detach()] + [t.grad for t in made])
    for r in results[1:]: assert_close(r, results[0], atol=1e-5, rtol=1e-5)
    assert all(t.isfinite().all() for r in results for t in r)


@MANY
@given(rows(60), layers(), st.sampled_from([0., 1.5]), st.data())
@torch.no_grad()
def test_pieces_say_what_the_whole_says(row, kw, boost, data):
    B, S, window, sinks, said, gen = row
    layer = layer_of(kw | dict(sink_boost=boost), window, sinks,
                     data.draw(st.sampled_from(["auto", "eager"])))
    x, cache, at, out = (torch.randn(B, S, 24, generator=gen),
                         KVCache(1, reserve=data.draw(st.sampled_from([0, S]))), 0, [])
    whole = run(layer, x, Marks(S, **said))
    while at < S:
        T = data.draw(st.integers(1, S - at))
        out.append(run(
            layer, x[:, at:at+T], Marks(T, at, **{k: v[:, :at+T] for k, v in said.items()}), cache))
        at += T
    assert_close(torch.cat(out, 1), whole, atol=1e-5, rtol=1e-5)


@MANY
@given(rows(100), layers(), st.sampled_from(["auto", "eager"]), st.data())
@torch.no_grad()
def test_the_future_changes_nothing(row, kw, impl, data):
    B, S, window, sinks, said, gen = row
    layer = layer_of(kw, window, sinks, impl)
    x, at = torch.randn(B, S, 24, generator=gen), data.draw(st.integers(0, S - 1))
    other = x.clone()
    other[:, at:] = torch.randn(B, S - at, 24, generator=gen)
    marks = Marks(S, **said)
    assert_close(run(layer, x, marks)[:, :at], run(layer, other, marks)[:, :at],
                 atol=1e-6, rtol=1e-6)


@MANY
@given(rows(100), layers(), st.sampled_from([0., 1.5]))
@torch.no_grad()
def test_documents_and_rows_do_not_meet(row, kw, boost):
    B, S, window, sinks, said, gen = row
    layer = layer_of(kw | dict(sink_boost=boost), window, sinks)
    x = torch.randn(B, S, 24, generator=gen)
    together = run(layer, x, Marks(S, **said))
    ids, real = (said.get("document_ids", torch.zeros(B, S).long()),
                 said.get("attention_mask", torch.ones(B, S)).bool())
    for b in range(B):
        for d in ids[b].unique():
            here = (ids[b] == d) & real[b]
            if not (T := int(here.sum())): continue
            assert_close(together[b:b+1, here], run(layer, x[b:b+1, here], Marks(T)),
                         atol=1e-5, rtol=1e-5)


PLAIN = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
SHAPES = {"plain": {}, "normed": dict(qk_norm=True), "capped": dict(attn_logit_softcapping=2.),
          "learned sinks": dict(learned_sinks=True), "ALiBi": dict(pos_encoding="alibi")}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_compiler_traces_it_whole(packed, window, kind):
    layer, x = layer_of(PLAIN | SHAPES[kind], window, 2), torch.randn(2, 40, 32)
    said = {"document_ids": (torch.arange(40)[None] > 20).long().expand(2, 40)} if packed else {}
    def whole(x): return run(layer, x, Marks(40, **said))
    torch._dynamo.reset()
    results = []
    for f in (whole, torch.compile(whole, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        y = f(x)
        y.square().mean().backward()
        results.append([y.detach()] + [p.grad.clone() for p in layer.parameters()])
    assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_backward_inside_autocast_is_the_same(kind):
    layer, x, grads = layer_of(PLAIN | SHAPES[kind], 9, 2), torch.randn(2, 40, 32), []
    for inside in (True, False):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(layer, x, Marks(40)).float().square().mean()
            if inside: loss.backward()
        if not inside: loss.backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert_close(*grads, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", SHAPES)
def test_bf16_is_a_rounding_away(kind):
    exact, x, outs = layer_of(PLAIN | SHAPES[kind], 9, 2), torch.randn(2, 90, 32), []
    wanted = run(exact, x, Marks(90))
    for impl in ("auto", "eager"):
        with torch.autocast("cpu", torch.bfloat16):
            got = run(layer_of(PLAIN | SHAPES[kind], 9, 2, impl), x, Marks(90)).float()
        assert (got - wanted).norm() < .03 * wanted.norm()


def test_a_window_makes_nothing_square(monkeypatch):
    "No tensor on the way of a window with sinks is as large as the square, or a tenth of it."
    from torch.utils._python_dispatch import TorchDispatchMode
    T, sizes = 4096, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out])
                         if isinstance(t, torch.Tensor))
            return out

    qkv = [torch.randn(1, 1, T, 8, requires_grad=True) for _ in range(3)]
    with Watch(): tiled_attention(*qkv, Marks(T).mask(256, 4)).sum().backward()
    assert max(sizes) < T*T/100
    sizes.clear()
    with Watch(): Marks(T).mask(256, 4).dense()
    assert max(sizes) == T*T  # the watch does see one
    sizes.clear()
    with Watch(): tiled_attention(*qkv).sum().backward()
    assert max(sizes) <= TILE*T


def test_plain_causal_needs_no_mask(monkeypatch):
    layer = layer_of(PLAIN)
    for T, past in ((40, 0), (1, 39)): assert layer_mask(layer.config, Marks(T, past)) is None
    tiles = causal_tiles(200, 200, TILE, torch.float32)
    # one triangle for all
    assert len({b.untyped_storage().data_ptr() for t in tiles for _, b in t.hidden}) == 1
