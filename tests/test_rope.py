"""Rotary positions: every scaling equals `transformers`' own, parts of a head turn alike in every
way, and a text's angles are its own."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from bantam import BantamConfig
from bantam.core import BantamError
from bantam.model.rope import plain_heads, rope_table, rotary_heads
from bantam.model.scaling import Angles, length_dependent, rope_inv_freq

MANY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LLAMA3 = dict(low_freq_factor=1., high_freq_factor=4.)


def theirs(dim, theta, s, length, most):
    """Speeds and attention factor by `transformers`, which counts `dynamic` from the model's
    maximum."""
    rope = pytest.importorskip("transformers.modeling_rope_utils",
                               reason="transformers, a development dependency, is not installed")
    from transformers import LlamaConfig
    trained = s.get("original_max_position_embeddings", most)
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1,
                         max_position_embeddings=trained if s["type"] == "dynamic" else most)
    config.rope_parameters = (dict(rope_theta=theta, original_max_position_embeddings=trained)
                              | {"rope_type" if k == "type" else k: v for k, v in s.items()})
    return rope.ROPE_INIT_FUNCTIONS[s["type"]](config, seq_len=length)


@pytest.mark.parametrize("most", [512, 4096, 131072])
@pytest.mark.parametrize("dim,theta", [(4, 100.), (32, 10000.), (64, 5e5), (128, 1e6),
                                       (96, 10000.)])
@pytest.mark.parametrize("s", [
    dict(type="linear", factor=1.), dict(type="linear", factor=8.), dict(type="dynamic", factor=1.),
    dict(type="dynamic", factor=2.), dict(type="dynamic", factor=4.,
                                          original_max_position_embeddings=256),
    dict(type="yarn", factor=4.), dict(type="yarn", factor=1.),
    dict(type="yarn", factor=40., original_max_position_embeddings=256),
    dict(type="yarn", factor=8., attention_factor=1.25),
    dict(type="yarn", factor=32., beta_fast=64., beta_slow=2., truncate=False,
         original_max_position_embeddings=256), dict(type="yarn", factor=4., truncate=True),
    dict(type="llama3", factor=8., **LLAMA3),
    dict(type="llama3", factor=32., low_freq_factor=.5, high_freq_factor=9.,
         original_max_position_embeddings=256),
    dict(type="longrope", original_max_position_embeddings=256),
    dict(type="longrope", factor=16., original_max_position_embeddings=256),
    dict(type="longrope", attention_factor=1.1, original_max_position_embeddings=256),
    dict(type="longrope", original_max_position_embeddings=512)],
                         ids=lambda s: "-".join(map(str, s.values())))
def test_scaling_is_theirs(s, dim, theta, most):
    if s["type"] == "longrope":
        s = s | dict(short_factor=[1 + i/100 for i in range(dim//2)],
                     long_factor=[1 + 30*i/dim for i in range(dim//2)])
    for length in (1, 255, 256, 257, 512, 513, 4097, 200000):
        freq, factor = rope_inv_freq(dim, theta, s, length, most)
        assert freq.dtype == torch.float32 and freq.shape == (dim//2,)
        assert_close((freq, factor), theirs(dim, theta, s, length, most), rtol=1e-6, atol=1e-6)


def test_a_wrong_rule_is_seen():
    "The comparison notices a factor that is off by a thousandth."
    s = dict(type="yarn", factor=4.)
    with pytest.raises(AssertionError):
        assert_close(rope_inv_freq(64, 1e4, s, 1, 4096),
                     theirs(64, 1e4, s | dict(factor=4.004), 1, 4096), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [2, 4, 64])
def test_ntk_slows_each_hand_by_its_own_power(dim):
    freq, factor = rope_inv_freq(dim, 10000., dict(type="ntk", factor=6.), 1, 4096)
    want = [10000**(-2*i/dim) * 6**(-2*i/max(dim-2, 1)) for i in range(dim//2)]
    assert_close(freq, torch.tensor(want), rtol=1e-5, atol=1e-9)
    assert factor == 1 and freq[0] == 1


def test_nothing_means_nothing():
    assert_close(rope_inv_freq(64, 500., None, 9, 9)[0],
                 torch.tensor([500**(-2*i/64) for i in range(32)]))
    with pytest.raises(BantamError, match="needs factor"):
        rope_inv_freq(64, 500., dict(type="linear"), 9, 9)
    with pytest.raises(BantamError, match="not read by type ntk"):
        rope_inv_freq(64, 500., dict(type="ntk", factor=2., beta_fast=3.), 9, 9)


@MANY
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3),
       st.sampled_from([(2, 2), (8, 8), (8, 2), (8, 6), (10, 4)]), st.booleans(),
       st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_fused_is_plain(B, T, G, R, widths, batched, dtype, seed):
    (K, turned), gen = widths, torch.Generator().manual_seed(seed)
    cos, sin = rope_table(torch.randint(0, 3000, (B, T) if batched else (T,), generator=gen),
                          turned)
    cos, sin = cos*1.2, sin*1.2 # as an attention factor does
    qkv = torch.randn(B, T, G*R + 2*G, K, generator=gen).to(dtype)
    results = []
    for f in (rotary_heads, plain_heads):
        leaf = qkv.clone().requires_grad_()
        out = f(leaf, cos, sin, G*R, G)
        torch.autograd.backward(
            out, [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
                  for i, t in enumerate(out)])
        results.append([*out, leaf.grad])
    assert_close(*results, atol=1e-5 if dtype == torch.float32 else 3e-2,
                 rtol=1e-5 if dtype == torch.float32 else 3e-2)


def config_of(s=None, **kw):
    return BantamConfig(vocab_size=8, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
                        num_hidden_layers=1, max_position_embeddings=24, rope_scaling=s, **kw)


GROW = [dict(type="dynamic", factor=3.), dict(type="dynamic", factor=2.,
                                              original_max_position_embeddings=8),
        dict(type="longrope", short_factor=[1.]*8, long_factor=[2. + i for i in range(8)],
             original_max_position_embeddings=8)]
STAY = [None, dict(type="linear", factor=2.), dict(type="ntk", factor=2.),
        dict(type="yarn", factor=2.), dict(type="llama3", factor=2., **LLAMA3)]


@pytest.mark.parametrize("s", GROW + STAY, ids=lambda s: s["type"] if s else "none")
def test_a_text_reads_the_same_in_any_company(s):
    """Packed in a row, or in a batch of rows, every text gets the angles that it gets alone; all
    keys too, and any selection of them."""
    config, lengths = config_of(s), (5, 30, 24, 41)
    alone = [torch.stack(Angles(torch.arange(n)).of(16, config)) for n in lengths]
    row = torch.cat([torch.arange(n) for n in lengths])
    want = torch.cat(alone, 1)
    assert_close(torch.stack(Angles(row).of(16, config)), want)
    rows = torch.stack([row, torch.arange(100)])
    both = Angles(rows[:, -3:], rows)
    assert_close(torch.stack(both.of_keys(16, config))[:, 0], want)
    assert_close(torch.stack(both.of(16, config))[:, 0], want[:, -3:])
    kept = torch.tensor([0, 1, 2, 60, 97, 99])
    assert_close(torch.stack(both.of_keys(16, config, kept))[:, 0], want[:, kept])
    assert length_dependent(config) == (s in GROW)


@pytest.mark.parametrize("s", GROW, ids=lambda s: s["type"])
def test_steps_are_fresh_prefixes(s):
    """A cached step turns all keys as a fresh pass over the prefix does, and old keys do change
    past the trained length."""
    config = config_of(s)
    for n in (1, 8, 9, 24, 25, 60):
        step, fresh = (Angles(torch.tensor([n-1]), torch.arange(n)),
                       Angles(torch.arange(n)).of(16, config))
        assert_close(step.of_keys(16, config), fresh)
        assert_close(step.of(16, config)[0], fresh[0][-1:])
    early, late = (Angles(torch.arange(n)).of(16, config)[0][:8] for n in (8, 60))
    assert (early - late).abs().max() > .01


def test_tables_are_made_once_and_only_where_they_turn():
    config, at = config_of(), torch.arange(6)
    angles = Angles(at)
    same = dict(rope_scaling=dict(type="yarn", factor=2.))
    a, b = (angles.of(16, config.replace(**same)) for _ in range(2))
    assert a is b and len(angles.made) == 1
    for other in (dict(rope_theta=7.), dict(partial_rotary_factor=.5),
                  dict(rope_scaling=dict(type="yarn", factor=3.)),
                  same | dict(max_position_embeddings=99)):
        assert not torch.equal(angles.of(16, config.replace(**other))[0].sum(), a[0].sum()), other
    assert angles.of(16, config.replace(partial_rotary_factor=.5))[0].shape == (6, 4)
    for kind in ("alibi", "learned", "sinusoidal", "none"):
        assert angles.of(16, config.replace(pos_encoding=kind)) is None
    assert math.isclose((a[0]**2 + a[1]**2).mean().sqrt(), .1*math.log(2) + 1, rel_tol=1e-6)


@pytest.mark.parametrize("s", STAY, ids=lambda s: s["type"] if s else "none")
def test_a_compiler_sees_one_graph(s):
    """Rules that do not look at the length are traced whole, and give what they give without a
    compiler."""
    config = config_of(s)
    def f(positions): return torch.stack(Angles(positions).of(16, config))
    torch._dynamo.reset()
    assert_close(torch.compile(f, backend="eager", fullgraph=True)(torch.arange(30)),
                 f(torch.arange(30)))
