"""Caches of every kind in layers of every shape: pieces, ring and padding leave no trace, and
memory stays what was promised."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from bantam import BantamConfig
from bantam.core import BantamError
from bantam.model.attention import Attention, layer_mask
from bantam.model.cache import KVCache
from bantam.model.caches import RollingCache, StaticCache, make_cache
from bantam.model.groups import GroupedAttention
from bantam.model.mask import Marks
from bantam.model.mla import MLA
from bantam.model.scaling import Angles

MANY = settings(deadline=None, derandomize=True, database=None)
GROUPS = [dict(query_heads=2, kv_heads=1, head_dim=8), dict(query_heads=1, kv_heads=1, head_dim=4)]
KINDS = dict(gqa=dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8),
             groups=dict(num_attention_heads=3, num_key_value_heads=2, head_dim=8,
                         attention_head_groups=GROUPS),
             mla=dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8, attn_type="mla",
                      kv_lora_rank=10, qk_rope_head_dim=4),
             wide=dict(num_attention_heads=2, num_key_value_heads=2, head_dim=4, attn_type="mla",
                       kv_lora_rank=12, q_lora_rank=5, qk_rope_head_dim=4))
GROWS = dict(type="dynamic", factor=2., original_max_position_embeddings=8)


def layer_of(kind, window, sinks, **kw):
    "A layer and its shape; what has one dimension is not at its neutral start."
    config = BantamConfig(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                          window=window, num_attention_sinks=sinks if window else 0,
                          **KINDS[kind], **kw)
    torch.manual_seed(0)
    made = dict(gqa=Attention, groups=GroupedAttention).get(kind, MLA)
    layer = made(config.layer(0), 0).eval().requires_grad_(False)
    for p in layer.parameters():
        if p.dim() == 1: p.add_(torch.rand_like(p))
    return layer, config


def real(S, start): return None if start is None else (torch.arange(S) >= start[:, None]).long()


def run(layer, x, T, start, cache=None, step=None):
    "The outputs of the last `T` tokens of `x`, the others are in the cache."
    S = x.shape[1]
    marks = Marks(T, S - T, None, real(S, start))
    if cache is not None: cache.see(real(S, start))
    angles = Angles(marks.positions(), marks.key_positions())
    mask = layer_mask(layer.config, marks, cache, 0)
    return (layer if step is None else step)(x[:, S - T:], angles, mask, cache)


@settings(MANY, max_examples=120)
@given(st.data())
def test_pieces_leave_no_trace(data):
    one = lambda *xs: data.draw(st.sampled_from(xs))
    number = lambda a, b: data.draw(st.integers(a, b))
    window, sinks, slack = one(None, 1, 3, 8), one(0, 1, 4), one(0, 1, 5)
    how = dict(learned_sinks=one(False, True), attn_logit_softcapping=one(None, 2.))
    layer, config = layer_of(one(*KINDS), window, sinks, rope_scaling=one(None, None, GROWS), **how)
    S, kind = number(1, 40), one("full", "static", "rolling") if window else one("full", "static")
    start = torch.tensor([0, number(0, S - 1)]) if one(False, True) else None
    rolls = kind == "rolling"
    capacity = 80 if kind == "static" else one(None, 80)
    cache = make_cache(config, kind, capacity, slack if rolls else 0)
    gen = torch.Generator().manual_seed(number(0, 9999))
    x, crops = torch.randn(2, S, 16, generator=gen), 0
    while cache.length < S:
        now = min(S, cache.length + one(1, 1, 2, 7, 30))
        T = now - cache.length
        got = run(layer, x[:, :now], T, start, cache)
        assert cache.length == now and got.isfinite().all()
        want = run(layer, x[:, :now], now, start)[:, now - T:]
        begin = torch.zeros(2, 1) if start is None else start[:, None]
        seen = torch.arange(now - T, now) >= begin
        assert_close(got[seen], want[seen], atol=1e-5, rtol=1e-4)
        if crops < 3 and now < S and one(False, False, True): # take back, go on with another text
            back = number(0, min(slack + 1, now) if rolls else now)
            cache.crop(now - back)
            x[:, now - back:] = torch.randn(x[:, now - back:].shape, generator=gen)
            crops += 1
    if rolls:
        most = window + slack + (sinks and sinks + (0 if start is None else int(start.max())))
        assert all(s.k.shape[2] <= most for s in cache.slots.values())


def test_twenty_thousand_tokens_in_a_ring():
    "What the ring returns is what the window sees, and no more; places go on."
    W, sinks, B, K = 50, 3, 1, 4
    cache, first, last = RollingCache([W, None], sinks), [], []
    gen = torch.Generator().manual_seed(0)
    for p in range(20_000):
        k = torch.randn(B, 1, 1, K, generator=gen)
        (first if p < sinks else last).append((p, k))
        del last[:-W]
        places = cache.places(0, 1)
        got, _ = cache.update(0, k, k)
        cache.update(1, k[..., :0], k[..., :0]) # a layer that keeps everything: of width nothing
        if p % 499 == 0 or p in (49, 50, 52, 53, 54):
            want = [x for x in first + last if x[0] < sinks or p - x[0] < W]
            order = torch.arange(got.shape[2]) if places is None else places
            assert sorted(order.tolist()) == [x[0] for x in want]
            assert torch.equal(got[:, :, order.argsort()], torch.cat([x[1] for x in want], 2))
    assert cache.length == 20_000 and cache.nbytes == 2 * (W + sinks) * K * 4


@pytest.mark.parametrize("kind", KINDS)
def test_static_cache_compiles_once(kind):
    "A step is traced for the first token, once more for a growing length, then never again."
    layer, config = layer_of(kind, None, 0)
    traced, x = [], torch.randn(1, 30, 16)
    def backend(graph, inputs):
        traced.append([tuple(t.shape) for t in inputs if isinstance(t, torch.Tensor)])
        return graph
    torch._dynamo.reset()
    step = torch.compile(layer, backend=backend)
    cache = StaticCache(1, 40)
    run(layer, x[:, :6], 6, None, cache)
    counts = []
    for S in range(7, 31):
        got = run(layer, x[:, :S], 1, None, cache, step)
        assert_close(got, run(layer, x[:, :S], S, None)[:, -1:], atol=1e-5, rtol=1e-4)
        counts.append(len(traced))
    assert counts[2] == counts[-1], counts
    torch._dynamo.reset()


def test_padding_may_come_in_pieces_but_not_afterwards():
    layer, config = layer_of("gqa", 4, 2)
    cache, late = make_cache(config, "rolling"), make_cache(config, "rolling")
    x, start = torch.randn(2, 40, 16), torch.tensor([0, 25])
    for S in range(1, 41): # the prefix grows as long as row 1 has not begun
        got = run(layer, x[:, :S], 1, start, cache)
        assert_close(got, run(layer, x[:, :S], S, start)[:, -1:], atol=1e-5, rtol=1e-4)
    assert cache.slots[0].k.shape[2] == 4 + 2 + 25
    for S in range(1, 20): run(layer, x[:, :S], 1, None, late)
    with pytest.raises(BantamError, match="from the first pass on"):
        run(layer, x[:, :20], 1, start, late)


def test_layers_in_groups_have_one_length():
    layer, config = layer_of("groups", None, 0)
    cache, x = KVCache(1), torch.randn(2, 9, 16)
    run(layer, x[:, :5], 5, None, cache)
    assert sorted(cache.slots) == [(0, 0), (0, 1)]
    assert cache.length == 5 and cache.places(0, 1) is None
    with pytest.raises(BantamError, match="no layer 1"): cache.places(1, 1)
