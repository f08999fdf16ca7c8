"""Random models over the whole space of options keep the promises of a causal model; and every
option acts."""
import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from bantam import BantamConfig, BantamForCausalLM
from bantam.core import BantamError
from bantam.model.caches import make_cache
from bantam.model.scaling import length_dependent

V, T, TRAINED = 50, 14, 8 # texts here are longer than the models' trained length
SAFE = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


# --- how a random config is drawn -----------------------------------------------------------------

def scaling(kind, pairs):
    "Valid numbers for a way of stretching `pairs` rotary angles."
    old = dict(original_max_position_embeddings=TRAINED)
    return dict(linear=dict(factor=2.), ntk=dict(factor=3.), dynamic=dict(factor=2.) | old,
                yarn=dict(factor=4., beta_fast=4., beta_slow=.5) | old,
                llama3=dict(factor=8., low_freq_factor=1., high_freq_factor=4.) | old,
                longrope=dict(short_factor=[1. + .1*i for i in range(pairs)],
                              long_factor=[2. + .5*i for i in range(pairs)],
                              factor=2.) | old)[kind] | dict(type=kind)


@st.composite
def configs(draw, causal=True):
    "Settings of a small valid model; `causal` leaves out experts that choose across the sequence."
    one = lambda *xs: draw(st.sampled_from(xs))
    H = one(2, 4)
    c = dict(vocab_size=V, hidden_size=32, intermediate_size=one(24, 40), num_hidden_layers=2,
             num_attention_heads=H, num_key_value_heads=one(*(g for g in (1, 2, 4) if H % g == 0)),
             head_dim=one(8, 16), max_position_embeddings=TRAINED,
             tie_word_embeddings=one(True, False), initializer_range=.2,
             norm_type=one("rmsnorm", "layernorm"),
             norm_placement=one("pre", "post", "both", "deepnorm"),
             pos_encoding=one("rope", "rope", "rope", "alibi", "learned", "sinusoidal", "none"),
             attention_bias=one(True, False),
             attn_temperature=one(1., 1.7), attn_logit_softcapping=one(None, None, 3.),
             window=one(None, 1, 3, 6), learned_sinks=one(False, True),
             qk_norm=one(False, True, "full"),
             ffn_type=one("swiglu", "geglu", "reglu", "glu", "gelu", "relu", "relu2",
                          "clipped_swiglu"), mlp_bias=one(True, False),
             scaled_embeddings=one(False, True),
             final_logit_softcapping=one(None, 5.), residual_init=one("scaled", "scaled", "zero"),
             partial_rotary_factor=1.)
    if c["pos_encoding"] == "learned": c["max_position_embeddings"] = 2*T
    if c["window"]: c["num_attention_sinks"] = one(0, 1, 3)
    if c.get("num_attention_sinks"): c["sink_boost"] = one(0., 1.5)
    shape = one("plain", "plain", "groups", "mla")
    if shape == "groups":
        c |= dict(num_attention_heads=3, num_key_value_heads=2, qk_norm=one(False, True),
                  attention_head_groups=[dict(query_heads=2, kv_heads=1, head_dim=c["head_dim"]),
                                         dict(query_heads=1, kv_heads=1, head_dim=c["head_dim"])])
    if shape == "mla":
        c |= dict(attn_type="mla", num_key_value_heads=H, qk_norm=False, pos_encoding="rope",
                  max_position_embeddings=TRAINED, kv_lora_rank=12, q_lora_rank=one(None, 20),
                  qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=one(8, 12))
    if c["pos_encoding"] == "rope":
        if shape != "mla": c["partial_rotary_factor"] = one(1., .5)
        rotated = 8 if shape == "mla" else int(c["head_dim"]*c["partial_rotary_factor"])
        kind = one(None, None, "linear", "ntk", "dynamic", "yarn", "llama3", "longrope")
        if kind: c["rope_scaling"] = scaling(kind, rotated//2)
    kinds = ("dense", "dense", "dense_moe", "switch", "topk",
             "shared") + (() if causal else ("expert_choice",))
    c["expert_type"] = one(*kinds)
    if c["expert_type"] != "dense":
        c |= dict(num_experts=4, moe_intermediate_size=one(None, 16),
                  moe_router_bias=one(False, True), moe_score=one("softmax", "sigmoid"),
                  moe_renormalize=one(True, False),
                  moe_routed_scale=one(1., 2.5), moe_capacity_factor=one(None, 1., 2.))
        if c["expert_type"] == "shared": c["moe_num_shared"] = one(1, 2)
        if c["expert_type"] in ("topk", "shared") and one(True, False):
            c |= dict(moe_groups=2, moe_top_groups=one(1, 2))
    if one(True, False):
        mine = [dict(window=None), dict(window=4), dict(intermediate_size=16),
                dict(attention_bias=True), dict(attn_temperature=.8), dict(expert_type="dense")]
        c["layer_configs"] = [{}, one(*mine)]
        if shape == "plain" and c["layer_configs"][1] == {} :
            c["layer_configs"][1] = dict(num_key_value_heads=1)
    return c


def build(values, **changes):
    "A model whose biases, norms and sinks are not at their neutral start."
    try: config = BantamConfig(**values | changes)
    except BantamError as e:
        if "no effect" in str(e):
            config = BantamConfig(**{k: v for k,v in (values | changes).items()
                                     if k not in ("num_attention_sinks", "sink_boost")})
        else: raise
    torch.manual_seed(0)
    model = BantamForCausalLM(config).eval()
    with torch.no_grad():
        for n,p in model.named_parameters():
            if p.dim() == 1 or n.endswith("bias") or not p.any():
                p.add_(torch.randn_like(p), alpha=.1)
    return model


def same(a, b, tol=1e-5):
    "Equal to `tol`, in units of the largest number when that is above one."
    assert torch.isfinite(a).all()
    assert (a - b).abs().max() <= tol*max(
        1., b.abs().max().item()), f"{(a - b).abs().max().item():.1e} of {b.abs().max().item():.1e}"


def ids(rows=2, length=T, start=0):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(start))


# --- the promises ---------------------------------------------------------------------------------

@seed(0)
@settings(max_examples=320, **SAFE)
@given(configs())
def test_random_models_keep_their_promises(values, ):
    model,x = build(values),ids()
    moving = any(length_dependent(c) for c in model.shapes)
    loss = lambda m: m(x, targets=x.roll(-1, 1), return_logits=True)
    plain = loss(model)
    plain.loss.backward()

    for impl in ("eager", "sdpa"): # three executions, outputs and gradients
        if impl == "sdpa" and values["attn_logit_softcapping"]: continue
        other = build(values, attn_impl=impl)
        out = loss(other)
        out.loss.backward()
        same(out.logits, plain.logits)
        for p,q in zip(other.parameters(), model.parameters()):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None: same(p.grad, q.grad)

    with torch.no_grad():
        prefix = lambda t: model(x[:,:t]).logits[:,-1]
        wanted = torch.stack([prefix(t) for t in range(3, T + 1)],
                             1) if moving else plain.logits[:,2:]
        # token by token, past the window and past the trained length
        cache = make_cache(model.config, "full")
        steps = [model(x[:,:3], cache=cache).logits[:,-1:],
                 *(model(x[:,t:t+1], cache=cache).logits for t in range(3, T))]
        same(torch.cat(steps, 1), wanted)
        future = x.clone(); future[:,9:] = (future[:,9:] + 1) % V # the future changes nothing
        if not moving: same(model(future).logits[:,:9], plain.logits[:,:9])
        a,b = x[:1,:8],x[1:,:5] # packed as alone
        if not moving:
            packed = model(torch.cat([a, b], 1), document_ids=torch.tensor([[7]*8 + [3]*5])).logits
            same(packed, torch.cat([model(a).logits, model(b).logits], 1))


@seed(1)
@settings(max_examples=40, **SAFE)
@given(configs())
@pytest.mark.parametrize("kind", ["rolling", "static"])
def test_other_caches_decode_the_same(kind, values):
    # a rolling cache needs a window in some layer
    model,x = build(values, window=values["window"] or 4),ids()
    with torch.no_grad():
        prefix = lambda t: model(x[:,:t]).logits[:,-1]
        wanted = torch.stack([prefix(t) for t in range(9, T + 1)], 1)
        cache = make_cache(model.config, kind, capacity=T)
        steps = [model(x[:,:9], cache=cache).logits[:,-1:],
                 *(model(x[:,t:t+1], cache=cache).logits for t in range(9, T))]
        same(torch.cat(steps, 1), wanted)


@seed(2)
@settings(max_examples=25, **SAFE)
@given(configs())
def test_flex_gives_the_same(values):
    model,x = build(values),ids(1)
    other = build(values, attn_impl="flex")
    with torch.no_grad(): same(other(x).logits, model(x).logits)


@seed(3)
@settings(max_examples=25, **SAFE)
@given(configs(causal=False))
def test_saved_is_loaded(tmp_path_factory, values):
    model,x,folder = build(values),ids(),tmp_path_factory.mktemp("model")/"m"
    model.save_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(BantamForCausalLM.from_pretrained(folder)(x).logits, model(x).logits)


# --- every option acts ----------------------------------------------------------------------------

BASE = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
            initializer_range=.2)
MOE = dict(expert_type="topk", num_experts=4, moe_intermediate_size=16)
SINKS = dict(window=3, num_attention_sinks=1)
MLA = dict(attn_type="mla", kv_lora_rank=12, num_key_value_heads=4)
YARN = dict(type="yarn", factor=4., beta_fast=8., beta_slow=.7, original_max_position_embeddings=64)
# field -> (settings around it, its other value); what acts in training only is looked at there
ACTS = dict(
    hidden_size=({}, 64), intermediate_size=({}, 24), num_hidden_layers=({}, 3),
    num_attention_heads=({}, 2), num_key_value_heads=({}, 4), head_dim=({}, 4),
    tie_word_embeddings=({}, False), rms_norm_eps=({}, .5), norm_type=({}, "layernorm"),
    norm_placement=({}, "post"), initializer_range=({}, .1), residual_init=({}, "zero"),
    vocab_size=({}, 60),
    attn_type=(dict(num_key_value_heads=4), MLA), attention_bias=({}, True),
    attention_head_groups=({}, [dict(query_heads=2, kv_heads=1, head_dim=8),
                                dict(query_heads=2, kv_heads=1, head_dim=4)]),
    qk_norm=({}, True), qk_norm_eps=(dict(qk_norm=True), .5), attn_temperature=({}, 2.),
    attn_logit_softcapping=({}, .5), window=({}, 3), num_attention_sinks=(dict(window=3), 2),
    sink_boost=(SINKS, 2.),
    learned_sinks=({}, True), q_lora_rank=(MLA, 8), kv_lora_rank=(MLA, 16),
    qk_nope_head_dim=(MLA, 4), qk_rope_head_dim=(MLA, 8), v_head_dim=(MLA, 4),
    pos_encoding=({}, "alibi"), rope_theta=({}, 50.),
    rope_scaling=({}, dict(type="linear", factor=2.)), partial_rotary_factor=({}, .5),
    ffn_type=({}, "geglu"), mlp_bias=({}, True), expert_type=({}, MOE), num_experts=(MOE, 6),
    moe_top_k=(MOE, 3),
    moe_num_shared=(MOE | dict(expert_type="shared", moe_num_shared=1), 2),
    moe_intermediate_size=(MOE, 24), moe_router_bias=(MOE, True), moe_score=(MOE, "sigmoid"),
    moe_renormalize=(MOE, False),
    moe_groups=(MOE, 2), moe_top_groups=(MOE | dict(moe_groups=2), 2), moe_routed_scale=(MOE, 2.),
    final_logit_softcapping=({}, 1.), scaled_embeddings=({}, True),
    layer_configs=({}, [dict(window=2)]))
IN_TRAINING = dict(
    residual_dropout=({}, .5), attention_dropout=({}, .5), mlp_dropout=({}, .5),
    stochastic_depth_rate=({}, .9), label_smoothing=({}, .2), z_loss_weight=({}, .1),
    moe_capacity_factor=(MOE, .5),
    moe_drop_policy=(MOE | dict(moe_capacity_factor=.5), "random"), moe_router_jitter=(MOE, .5),
    moe_aux_loss_weight=(MOE, 1.), moe_router_z_loss_weight=(MOE, 1.))
# fields whose effect is not in the numbers of a forward pass, and where it is shown
ELSEWHERE = dict(
    model_type="a name", max_position_embeddings="learned positions and scaling, below",
    pad_token_id="generation", bos_token_id="generation", eos_token_id="generation",
    unk_token_id="the tokenizer",
    attn_impl="equal by design, above", block_mask_cache_cap="tests/test_flex.py",
    block_mask_cache_device="tests/test_flex.py", moe_bias_balancing="below",
    moe_bias_update_rate="below")


def changed(name, value, around, train):
    "Logits and loss before and after one field changes, shared weights kept."
    value = value if isinstance(value, dict) and name != "rope_scaling" else {name: value}
    first,second = build(BASE | around),build(BASE | around | value)
    mine,theirs = first.state_dict(),second.state_dict()
    with torch.no_grad():
        for k in mine.keys() & theirs.keys():
            if (mine[k].shape == theirs[k].shape
                and name not in ("initializer_range", "residual_init")):
                theirs[k].copy_(mine[k])
    outs = []
    for m in (first.train(train), second.train(train)):
        torch.manual_seed(1)
        with torch.no_grad():
            outs.append(m(ids(length=12), targets=ids(length=12, start=1), return_logits=True))
    return outs


@pytest.mark.parametrize("name", [*ACTS, *IN_TRAINING])
def test_every_option_acts(name):
    around,value = (ACTS | IN_TRAINING)[name]
    a,b = changed(name, value, around, train=name in IN_TRAINING)
    assert (a.logits.shape != b.logits.shape or (a.logits - b.logits).abs().max() > 1e-3
            or abs(a.loss - b.loss) > 1e-3)
    if name in IN_TRAINING: # and in training only
        a,b = changed(name, value, around, train=False)
        assert (a.logits - b.logits).abs().max() < 1e-5 and abs(a.loss - b.loss) < 1e-5


def test_no_field_is_forgotten():
    fields = {f.name for f in dataclasses.fields(BantamConfig)}
    assert fields == {*ACTS, *IN_TRAINING, *ELSEWHERE}


@pytest.mark.parametrize("name, value, around", [
    ("factor", 2., YARN), ("original_max_position_embeddings", 24, YARN), ("beta_fast", 2., YARN),
    ("beta_slow", 3., YARN), ("attention_factor", 2., YARN), ("truncate", False, YARN),
    ("low_freq_factor", 3., scaling("llama3", 4)), ("high_freq_factor", 30., scaling("llama3", 4)),
    ("short_factor", [9.]*4, scaling("longrope", 4) | dict(original_max_position_embeddings=32)),
    ("long_factor", [9.]*4, scaling("longrope", 4)),
    ("type", "ntk", dict(type="linear", factor=2.))])
def test_every_number_of_a_scaling_acts(name, value, around):
    a,b = changed("rope_scaling", around | {name: value}, dict(rope_scaling=around, rope_theta=50.),
                  train=False)
    assert (a.logits - b.logits).abs().max() > 1e-4


def test_length_of_training_acts():
    with pytest.raises(BantamError, match="max_position_embeddings"):
        build(BASE | dict(pos_encoding="learned", max_position_embeddings=8))(ids(length=9))
    a,b = changed("max_position_embeddings", 8, dict(rope_scaling=dict(type="dynamic", factor=2.)),
                  train=False)
    assert (a.logits - b.logits).abs().max() > 1e-4


def test_bias_balancing_moves_the_choice():
    model = build(BASE | MOE | dict(moe_bias_balancing=True, moe_bias_update_rate=.5)).train()
    for _ in range(3):
        model(ids(), targets=ids()); model.update_router_bias()
    bias = torch.stack([b.ffn.choice_bias for b in model.layers])
    assert bias.abs().max() >= .5 and math.isclose(bias.abs().max().item() % .5, 0, abs_tol=1e-6)


def test_a_compiler_reads_the_model_as_one_program():
    torch.manual_seed(0)
    config = BantamConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=1, intermediate_size=24)
    plain = BantamForCausalLM(config)
    torch._dynamo.reset()
    fast = torch.compile(plain, backend="aot_eager", fullgraph=True) # a break would be an error
    ids, results = torch.randint(V, (2, 90)), []
    for model in (plain, fast):
        plain.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach()] + [p.grad.clone() for p in plain.parameters()])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    for model in (plain, fast):
        with pytest.raises(BantamError, match=f"ids from {V} to {V}"):
            model(torch.full_like(ids, V), labels=ids)
        with pytest.raises(BantamError, match=f"target {V} at flat position 0"):
            model(ids, targets=torch.full_like(ids, V))
        with pytest.raises(BantamError, match="all 180 are -100"):
            model(ids, targets=torch.full_like(ids, -100))
