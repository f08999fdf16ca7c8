"""Experts of every kind: the formula over all tokens and all experts at once, counts to the last
token, and the blocks of real models."""
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from bantam import BantamConfig
from bantam.core import BantamError
from bantam.model.ffn import FFN_TYPES, FeedForward, inner
import bantam.model.moe as moe_room
from bantam.model.moe import MoE, in_blocks, make_ffn
from bantam.model.router import capacity, choose_experts, router_scores, within_capacity

MANY = settings(max_examples=120, deadline=None, derandomize=True, database=None)
SHAPE = dict(vocab_size=8, hidden_size=24, intermediate_size=16, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=2)


def build(seed=0, **kw):
    "A layer's experts with every parameter away from its default."
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moe = MoE(BantamConfig(**SHAPE | dict(expert_type="topk", num_experts=4) | kw))
    for p in moe.parameters(): torch.nn.init.normal_(p, std=.3)
    if moe.choice_bias is not None: moe.choice_bias.normal_(std=.1)
    return moe


@st.composite
def layers(draw):
    "Any valid layer with experts."
    pick = lambda *xs: draw(st.sampled_from(xs))
    kind, groups = (pick("dense_moe", "switch", "topk", "sparse", "expert_choice", "shared"),
                    pick(1, 1, 2, 3))
    routed = kind in ("switch", "topk", "sparse", "shared")
    E = pick(1, 2, 3, 4) * groups
    top_groups = draw(st.integers(1, groups)) if routed else 1
    return dict(expert_type=kind, num_experts=E, moe_groups=groups if routed else 1,
                moe_top_groups=top_groups,
                moe_top_k=draw(st.integers(1, E // groups * top_groups if routed else E)),
                moe_num_shared=pick(1, 2) if kind == "shared" else 0,
                moe_intermediate_size=pick(None, 8, 13),
                moe_capacity_factor=pick(None, .3, 1., 1.7), moe_router_bias=pick(False, True),
                moe_score=pick("softmax", "sigmoid"),
                moe_renormalize=pick(False, True), moe_routed_scale=pick(1., 2.5),
                moe_bias_balancing=routed and pick(False, True), ffn_type=pick(*FFN_TYPES),
                mlp_bias=pick(False, True))


def all_experts(moe, x):
    "What every expert says to every token: (B,T,E,D)."
    ex, bias = (moe.experts,
                lambda n: 0 if getattr(ex, f"{n}_bias") is None else getattr(ex, f"{n}_bias"))
    up, gate = (torch.einsum("btd,efd->btef", x, getattr(ex, f"{n}_proj")) + bias(n)
                if n in ex.names else None for n in ("up", "gate"))
    return torch.einsum("btef,edf->bted", inner(ex.kind, up, gate), ex.down_proj) + bias("down")


def weights(moe, x):
    "How much each expert counts for each token, from masks over all pairs: (B,T,E)."
    c, (B, T, _), E = moe.config, x.shape, moe.config.num_experts
    z = F.linear(x, moe.router.weight, moe.router.bias)
    s = z.softmax(-1) if c.moe_score == "softmax" else z.sigmoid()
    k = dict(switch=1, dense_moe=E).get(c.expert_type, c.moe_top_k)
    if c.expert_type == "expert_choice":
        room = min(T, k * math.ceil((c.moe_capacity_factor or 1) * T / E))
        rank = (s[:, None] > s[:, :, None]).sum(2) # how many tokens of the row score higher there
        return s * (rank < room) * c.moe_routed_scale
    worth = s if moe.choice_bias is None else s + moe.choice_bias
    per = worth.unflatten(-1, (c.moe_groups, -1))
    best = per.sort(-1, descending=True).values[..., :1 if c.moe_score == "softmax" else 2].sum(-1)
    closed = (best[..., None, :] > best[..., None]).sum(-1) >= c.moe_top_groups
    worth = per.masked_fill(closed[..., None], -math.inf).flatten(-2)
    rank = (worth[..., None, :] > worth[..., None]).sum(-1) # 0 for a token's first choice
    w = s * (rank < k)
    if c.moe_renormalize and c.expert_type != "switch": w = w / w.sum(-1, keepdim=True)
    if moe.training and c.moe_capacity_factor and c.expert_type != "dense_moe":
        wish = rank.flatten(0, 1)[:, None] == torch.arange(k)[:, None]
        w = w * ((wish.cumsum(0) <= math.ceil(c.moe_capacity_factor * B*T / E)) & wish).any(
            1).view(B, T, E)
    return w * c.moe_routed_scale


@MANY
@given(layers(), st.integers(1, 3), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_equals_the_formula(kw, B, T, training, seed):
    moe = build(seed, **kw).train(training)
    x = torch.randn(B, T, 24, requires_grad=True)
    y, stats = moe(x)
    want = torch.einsum("bte,bted->btd", weights(moe, x), all_experts(moe, x))
    if kw["moe_num_shared"]: want = want + moe.shared(x)
    d, leaves = torch.randn_like(x), [x, *moe.parameters()]
    ours, theirs = (torch.autograd.grad(o, leaves, d, allow_unused=True, materialize_grads=True)
                    for o in (y, want))
    assert_close([y, *ours], [want, *theirs], atol=2e-5, rtol=1e-4)
    assert_close([stats.load_E.sum(), stats.importance_E.sum()], [torch.tensor(1.)]*2)
    assert training or stats.dropped == 0


@MANY
@given(st.integers(1, 80), st.integers(1, 6), st.data())
def test_capacity_keeps_its_counts(N, E, data):
    k, room = data.draw(st.integers(1, E)), data.draw(st.integers(1, N))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    chosen = choose_experts(torch.rand(N, E, generator=gen)**3 + torch.rand(E, generator=gen), k)
    for policy in ("first", "random"):
        fits = within_capacity(chosen, E, room, policy)
        for slot in range(k):
            wished = chosen[:, slot].bincount(minlength=E)
            assert (chosen[fits[:, slot], slot].bincount(minlength=E).tolist()
                    == wished.clamp(max=room).tolist())
            if policy == "first": # nobody who came later got in before
                for e in range(E):
                    assert fits[chosen[:, slot] == e,
                                slot].tolist() == [i < room for i in range(wished[e])]


def test_random_drops_draw_lots():
    chosen = torch.zeros(40, 1, dtype=torch.long)
    times = sum(within_capacity(chosen, 1, 10, "random").float() for _ in range(400)).flatten()
    assert abs(times.mean() - 100) < 1e-3 and 50 < times.min() and times.max() < 150


def test_dropped_tokens_get_nothing_and_are_counted():
    moe = build(num_experts=2, moe_top_k=1, expert_type="switch")
    with torch.no_grad(): moe.router.weight.zero_()
    x = torch.randn(1, 10, 24)
    # all scores are equal, so everybody goes to one expert, which has room for five
    y, stats = moe(x)
    assert (stats.dropped == .5 and stats.load_E.max() == 1
            and (y.abs().sum(-1) > 0).tolist() == [[True]*5 + [False]*5])
    assert (moe.eval()(x)[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("T,E,factor,k", [(16, 4, 1., 2), (17, 4, 1., 2), (16, 4, .5, 3),
                                          (3, 8, 1., 1), (5, 2, 2., 2), (10, 5, None, 2)])
def test_expert_choice_keeps_its_counts(T, E, factor, k):
    moe = build(expert_type="expert_choice", num_experts=E, moe_capacity_factor=factor, moe_top_k=k)
    x = torch.randn(3, T, 24)
    for training in (True, False):
        w, want = weights(moe.train(training), x), min(T, k*capacity(T, E, factor or 1.))
        assert (w > 0).sum(1).unique().tolist() == [want]
        assert_close(moe(x)[0], torch.einsum("bte,bted->btd", w, all_experts(moe, x)),
                     atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kw", [{}, dict(ffn_type="gelu"), dict(mlp_bias=True),
                                dict(expert_type="switch"), dict(expert_type="dense_moe"),
                                dict(expert_type="expert_choice"),
                                dict(moe_capacity_factor=1.), dict(moe_bias_balancing=True)])
def test_filled_blocks_change_nothing(kw, monkeypatch):
    moe = build(moe_intermediate_size=16, **dict(moe_capacity_factor=None) | kw)
    if moe.choice_bias is not None: moe.choice_bias[2] = -9. # nobody goes there
    torch.manual_seed(1)
    x, d, sizes = torch.randn(2, 333, 24, requires_grad=True), torch.randn(2, 333, 24), []
    plain = in_blocks
    monkeypatch.setattr(moe_room, "in_blocks", lambda *a: sizes.append(
        (out := plain(*a))[1].diff(prepend=torch.zeros(1, dtype=torch.long))) or out)
    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16): y, stats = moe(x)
        return y.float(), *torch.autograd.grad(y, [x, *moe.parameters()], d.to(y.dtype),
                                               allow_unused=True, materialize_grads=True)
    filled = run()
    monkeypatch.setattr(moe_room, "ROWS", 1)
    assert_close(filled, run(), atol=2e-2, rtol=2e-2)
    # each block, and none where nobody goes
    assert (sizes[0] % 32 == 0).all() and sizes[0].tolist() == [
        -(-n // 32)*32 for n in sizes[1].tolist()]
    monkeypatch.setattr(moe_room, "ROWS", 32)
    moe(x)
    assert sizes[2].tolist() == sizes[1].tolist() # products in 32 bits take blocks as they come


@pytest.mark.parametrize("kind", ["dense_moe", "switch", "topk", "expert_choice"])
@pytest.mark.parametrize("E", [2, 7, 64])
def test_balance_loss_is_one_when_uniform(kind, E):
    moe = build(expert_type=kind, num_experts=E, moe_top_k=2)
    with torch.no_grad(): moe.router.weight.zero_()
    assert_close(moe(torch.randn(2, 9, 24))[1].balance_loss.item(), 1., atol=1e-6, rtol=0)


def test_losses_reach_the_router_and_nothing_else():
    moe = build()
    for loss in moe(torch.randn(2, 9, 24))[1][2:4]:
        grads = torch.autograd.grad(loss, list(moe.parameters()), allow_unused=True,
                                    retain_graph=True)
        assert [g is not None and g.abs().sum() > 0 for g in grads] == [
            n.startswith("router") for n, _ in moe.named_parameters()]


OPTIONS = [dict(moe_top_k=1), dict(moe_intermediate_size=8), dict(moe_capacity_factor=.5),
           dict(moe_drop_policy="random"), dict(moe_router_jitter=.2), dict(moe_router_bias=True),
           dict(moe_score="sigmoid"), dict(moe_renormalize=False), dict(moe_groups=2),
           dict(moe_routed_scale=2.), dict(moe_bias_balancing=True), dict(num_experts=8),
           dict(mlp_bias=True),
           dict(mlp_dropout=.5), dict(expert_type="shared", moe_num_shared=1),
           *(dict(expert_type=k) for k in ("dense_moe", "switch", "expert_choice")),
           *(dict(ffn_type=k) for k in FFN_TYPES[1:])]


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_every_option_acts(change):
    plain, changed = build(), build(**change)
    for n, p in changed.named_parameters():
        if n in (own := dict(plain.named_parameters())) and own[n].shape == p.shape:
            p.data.copy_(own[n])
    x, out = torch.randn(2, 20, 24), []
    for m in (plain, changed): torch.manual_seed(5); out.append(m(x)[0])
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_groups_follow_the_score():
    "V2 takes the best expert of a group, V3 its two best."
    logits = torch.tensor([2., -9, 1.5, 1.4])
    for score, chosen in (("softmax", [0, 1]), ("sigmoid", [2, 3])):
        moe = build(moe_score=score, moe_groups=2, moe_top_groups=1)
        with torch.no_grad():
            moe.router.weight.copy_(torch.zeros(4, 24)); moe.router.weight[:, 0] = logits
        x = torch.zeros(1, 1, 24); x[..., 0] = 1
        assert moe.eval()(x)[1].load_E.nonzero().flatten().tolist() == chosen


def test_bias_balancing_counts_in_training_and_is_saved():
    moe = build(moe_bias_balancing=True, moe_bias_update_rate=.25)
    moe.choice_bias.zero_()
    x, before = torch.randn(2, 30, 24), moe.router.weight.clone()
    loads = moe(x)[1].load_E + moe(x[:1])[1].load_E
    moe.eval(); moe(x); moe.train(); moe.update_bias()
    assert (torch.equal(moe.choice_bias, .25*torch.sign(loads.mean() - loads))
            and torch.equal(moe.router.weight, before))
    once = moe.choice_bias.clone(); moe.update_bias()
    assert torch.equal(moe.choice_bias, once), "nothing was counted since"
    assert ("choice_bias" in moe.state_dict() and "loads" not in moe.state_dict()
            and "choice_bias" not in build().state_dict())
    build().update_bias() # does nothing, and does not mind


def test_neighbours_do_not_matter_after_training():
    for kw in (dict(), dict(expert_type="switch"), dict(expert_type="dense_moe"),
               dict(expert_type="expert_choice")):
        moe, x = build(**kw).eval(), torch.randn(3, 14, 24)
        assert_close(torch.cat([moe(r[None])[0] for r in x]), moe(x)[0], atol=1e-5, rtol=1e-5)
        if kw.get("expert_type") != "expert_choice":
            assert_close(torch.cat([moe(x[:, t:t+1])[0] for t in range(14)], 1), moe(x)[0],
                         atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("E", [4, 64])
def test_half_precision(E):
    """bf16 by autocast and as the type of the weights; gradients come back in the type of the
    weights; both ways through the products (64: fewer visits than experts)."""
    moe, x = build(num_experts=E).eval(), torch.randn(1, 9, 24)
    want, wide = moe(x)[0], {n: torch.autograd.grad(moe(x)[0].square().mean(), p)[0]
                             for n, p in moe.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16): y = moe(x)[0]
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16 and (y - want).norm() < .02*want.norm()
    for n, p in moe.named_parameters():
        assert (p.grad.dtype == torch.float32 and (p.grad - wide[n]).norm()
                < .05*wide[n].norm() + 1e-6), n
    half = build(num_experts=E).eval().bfloat16()
    y = half(x.bfloat16())[0]; y.sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad.dtype == torch.bfloat16
                                             and p.grad.isfinite().all() for p in half.parameters())


def test_gradient_checkpointing_repeats_the_draw():
    from torch.utils.checkpoint import checkpoint
    moe, x, grads = build(moe_drop_policy="random", moe_router_jitter=.3, mlp_dropout=.2,
                          moe_capacity_factor=.5), torch.randn(2, 9, 24, requires_grad=True), []
    for run in (moe, lambda x: checkpoint(moe, x, use_reentrant=False)):
        torch.manual_seed(3)
        y, stats = run(x)
        grads.append(torch.autograd.grad(y.square().sum() + stats.balance_loss,
                                         [x, *moe.parameters()]))
    assert_close(*grads, atol=1e-6, rtol=1e-5)


def test_expert_choice_warns_by_name():
    with pytest.warns(UserWarning, match="expert_choice looks across the sequence"):
        MoE(BantamConfig(**SHAPE, expert_type="expert_choice"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (type(make_ffn(BantamConfig(**SHAPE))) is FeedForward
                and type(make_ffn(BantamConfig(**SHAPE, expert_type="topk"))) is MoE)


@pytest.mark.parametrize("kw,says", [(dict(moe_top_k=9), "moe_top_k 9 is above num_experts"),
                                     (dict(moe_num_shared=1), "moe_num_shared"),
                                     (dict(moe_groups=3), "does not divide by moe_groups"),
                                     (dict(moe_capacity_factor=0.), "moe_capacity_factor"),
                                     (dict(moe_router_jitter=1.5), "moe_router_jitter"),
                                     (dict(ffn_type="swigul"), "ffn_type"),
                                     (dict(moe_drop_policy="last"), "moe_drop_policy"),
                                     (dict(expert_type="expert_choice", moe_bias_balancing=True),
                                      "moe_bias_balancing")])
def test_refused_by_name(kw, says):
    with pytest.raises(BantamError, match=says):
        BantamConfig(**SHAPE | dict(expert_type="topk") | kw)


# --- the blocks of real models --------------------------------------------------------------------

PEERS = dict(
    mixtral=("MixtralConfig", "MixtralSparseMoeBlock",
             dict(num_local_experts=8, intermediate_size=16), {}),
    qwen3_moe=("Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock",
               dict(num_experts=8, moe_intermediate_size=16, norm_topk_prob=False),
               dict(moe_renormalize=False)),
    deepseek_v2=("DeepseekV2Config", "DeepseekV2Moe",
                 dict(n_routed_experts=8, moe_intermediate_size=16, n_shared_experts=2, n_group=4,
                      topk_group=2, topk_method="group_limited_greedy",
                 routed_scaling_factor=1.5), dict(expert_type="shared", moe_num_shared=2,
                                                  moe_groups=4, moe_top_groups=2,
                                                  moe_routed_scale=1.5, moe_renormalize=False)),
    deepseek_v3=("DeepseekV3Config", "DeepseekV3MoE",
                 dict(n_routed_experts=8, moe_intermediate_size=16, n_shared_experts=1, n_group=4,
                      topk_group=2, routed_scaling_factor=2.5),
                 dict(expert_type="shared", moe_num_shared=1, moe_groups=4, moe_top_groups=2,
                      moe_routed_scale=2.5, moe_score="sigmoid", moe_bias_balancing=True)),
    gpt_oss=("GptOssConfig", "GptOssMLP", dict(num_local_experts=8, intermediate_size=16),
             dict(ffn_type="clipped_swiglu", mlp_bias=True, moe_router_bias=True)))


@pytest.mark.parametrize("family", PEERS)
def test_equals_a_real_model(family):
    import importlib
    config, block, theirs, ours = PEERS[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(importlib.import_module("transformers"),
                     config)(hidden_size=24, num_attention_heads=2, num_key_value_heads=2,
                             num_experts_per_tok=3, **theirs)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    peer, moe = (getattr(module, block)(config).eval(),
                 build(num_experts=8, moe_top_k=3, **ours).eval())
    for p in [*peer.parameters(), *(b for n, b in peer.named_buffers() if "correction" in n)]:
        torch.nn.init.normal_(p, std=.4)
    state = peer.state_dict()
    oss = family == "gpt_oss"
    gate_up = state["experts.gate_up_proj"]
    gate, up = (gate_up.mT[:, i::2] for i in (0, 1)) if oss else gate_up.chunk(2, 1)
    mine = {"router.weight": state.get("gate.weight", state.get("router.weight")),
            "experts.gate_proj": gate, "experts.up_proj": up,
            "experts.down_proj": state["experts.down_proj"].mT if oss
            else state["experts.down_proj"]}
    if oss:
        mine |= {"router.bias": state["router.bias"],
                 "experts.gate_bias": state["experts.gate_up_proj_bias"][:, ::2],
                 "experts.up_bias": state["experts.gate_up_proj_bias"][:, 1::2],
                     "experts.down_bias": state["experts.down_proj_bias"]}
    if family == "deepseek_v3": mine["choice_bias"] = state["gate.e_score_correction_bias"]
    mine |= {k.replace("shared_experts", "shared"): v
             for k, v in state.items() if k.startswith("shared_experts")}
    moe.load_state_dict(mine)
    x = torch.randn(2, 50, 24)
    want = peer(x)
    assert_close(moe(x)[0], want[0] if oss else want, atol=1e-5, rtol=1e-5)
