"""A draft changes the speed and nothing else: same greedy text, same distribution, whatever the
cache."""
import random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from bantam import BantamConfig, BantamTokenizer
from bantam.core import BantamError
from bantam.decode.generate import complete, generate, stream
from bantam.decode.reader import Reader
from bantam.decode.speculate import Draft, distribution, keep_or_redraw
from bantam.model.lm import BantamForCausalLM

SHAPE = dict(vocab_size=29, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4,
             num_key_value_heads=2, initializer_range=.4, max_position_embeddings=40)
PLAIN = dict(temperature=0, repetition_penalty=1., no_repeat_ngram_size=0)
LATENT = dict(attn_type="mla", num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=8,
              qk_rope_head_dim=4, v_head_dim=8)
KINDS = dict(full={}, rolling=dict(window=7, num_attention_sinks=2),
             mixed=dict(layer_configs=[dict(window=5)]), latent=LATENT,
             latent_rolling=LATENT | dict(window=7, num_attention_sinks=1),
             dynamic=dict(rope_scaling=dict(type="dynamic", factor=2.,
                                            original_max_position_embeddings=16)))


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    return BantamForCausalLM(BantamConfig(**SHAPE | changes)).eval()


def noisy(model, much):
    other, gen = BantamForCausalLM(model.config).eval(), torch.Generator().manual_seed(1)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p += much * p.std(unbiased=False) * torch.randn(p.shape, generator=gen)
    return other


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(length=st.integers(1, 50), ahead=st.integers(1, 7), much=st.sampled_from([0., .05, .3, 2.]),
       new=st.sampled_from([1, 2, 30]),
       rules=st.sampled_from([PLAIN, dict(temperature=0),
                              dict(temperature=0, no_repeat_ngram_size=2, repetition_penalty=1.5)]),
       cached=st.booleans())
def test_greedy_text_is_the_target_alone(kind, length, ahead, much, new, rules, cached):
    model, r = model_of(**KINDS[kind]), random.Random(length)
    ids = torch.tensor([[r.randrange(4, 29) for _ in range(length)]])
    how = rules | dict(max_new_tokens=new, stop_ids=[7])
    alone = model.generate(ids, **how)
    draft = Draft(noisy(model, much), ahead=ahead, sure=0.)
    assert torch.equal(model.generate(ids, draft=draft, use_cache=cached, **how), alone)
    assert draft.tokens >= alone.shape[1] - length and draft.passes <= draft.tokens
    if not much and kind != "dynamic": assert draft.acceptance == 1 or draft.guessed == 0


@pytest.mark.parametrize("rules, much", [(dict(temperature=1.), 1.),
                                         (dict(temperature=.7, top_p=.8), .3),
                                         (dict(temperature=1.5, top_k=4, min_p=.05,
                                               repetition_penalty=1.4), 3.)])
def test_drawn_text_has_the_distribution_of_the_target(rules, much):
    """All triples of a small vocabulary behind a prompt: chi square against the target's own
    probabilities."""
    V, n = 4, 400
    target = model_of(vocab_size=V, bos_token_id=0, eos_token_id=1, pad_token_id=2, unk_token_id=3,
                      initializer_range=.3, num_hidden_layers=1)
    draft, prompt = Draft(noisy(target, much), ahead=2, sure=.2), torch.tensor([[2, 3]])
    expected = {(): 1.}
    for _ in range(3):
        texts = list(expected)
        ids = torch.tensor([[*prompt[0].tolist(), *t] for t in texts])
        with torch.no_grad():
            p = distribution(target(ids, return_logits=True).logits[:, -1], ids, rules)
        expected = {(*t, v): expected[t] * p[i, v].item() for i, t in enumerate(texts)
                    for v in range(V)}
    counts = dict.fromkeys(expected, 0)
    how = dict(top_p=1., repetition_penalty=1., no_repeat_ngram_size=0) | rules
    for seed in range(n):
        counts[tuple(target.generate(prompt, draft=draft, seed=seed, max_new_tokens=3, stop_ids=[],
                                     **how)[0, 2:].tolist())] += 1
    some = [t for t, p in expected.items() if p*n >= 5]
    chi = sum((counts[t] - expected[t]*n)**2 / (expected[t]*n) for t in some)
    assert chi < len(some) + 5*(2*len(some))**.5
    assert not any(counts[t] for t, p in expected.items() if p == 0)
    assert 0 < draft.acceptance < 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_a_guess_outside_the_target_is_never_kept(seed):
    gen = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(6, generator=gen) * (torch.rand(6, generator=gen) > .4) for _ in range(2))
    p[0], q[1] = p[0] + .1, q[1] + .1
    p, q = p/p.sum(), q/q.sum()
    for guess in q.nonzero().flatten().tolist():
        u, v = torch.rand(2, generator=gen).tolist()
        id, kept = keep_or_redraw(guess, p, q, u, v)
        assert p[id] > 0 and (not kept or id == guess)
        if not kept: assert p[id] > q[id]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_back_leaves_no_trace(kind):
    "Read ahead, forget, read something else: every kind of cache."
    model, gen = model_of(**KINDS[kind]), torch.Generator().manual_seed(0)
    ids = torch.randint(4, 29, (1, 38), generator=gen)
    zero = torch.zeros(1, dtype=torch.long)
    reader, t = Reader(model, zero, slack=6), 3
    while t < 34:
        torch.testing.assert_close(reader(ids[:, :t]), Reader(model, zero)(ids[:, :t]),
                                   rtol=1e-5, atol=2e-5)
        wrong = torch.randint(4, 29, (1, min(5, reader.ahead(t))), generator=gen)
        if wrong.numel(): reader(torch.cat([ids[:, :t], wrong], 1))
        reader.forget(t)
        t += 1 + t % 3


def test_what_it_tells_is_true():
    model = model_of()
    draft, ids = Draft(noisy(model, .1), sure=0.), torch.tensor([[4, 5, 6]])
    steps = list(model.steps(ids, draft=draft, logprobs=True, max_new_tokens=25,
                             stop_ids=[], seed=1))
    text = torch.cat([ids, torch.stack([s.ids_B for s in steps], 1)], 1)
    with torch.no_grad(): fresh = model(text, return_logits=True).logits[0, 2:-1].log_softmax(-1)
    told = torch.cat([s.logprobs_B for s in steps])
    torch.testing.assert_close(told, fresh.gather(1, text[0, 3:, None])[:, 0], rtol=1e-5, atol=2e-5)
    assert draft.tokens == 25 and 0 < draft.kept < draft.guessed and str(draft.kept) in draft.report


def test_same_seed_same_text_whatever_the_draft_has_seen():
    "Trust is learned anew in each answer, so an answer does not depend on those before it."
    model, ids = model_of(), torch.tensor([[4, 5, 6]])
    draft, how = Draft(noisy(model, .3)), dict(max_new_tokens=30, stop_ids=[])
    same = [model.generate(ids, draft=draft, seed=s, **how) for s in (3, 4, 3)]
    assert torch.equal(same[0], same[2]) and not torch.equal(same[0], same[1])
    assert 0 < draft.kept < draft.guessed


def test_experience_makes_a_draft_guess_on_or_stop():
    "By its own probabilities alone a flat draft stops at once; kept guesses change that."
    flat = dict(vocab_size=400, initializer_range=.02, tie_word_embeddings=False)
    model, ids = model_of(**flat), torch.tensor([[4, 5, 6]])
    how = PLAIN | dict(max_new_tokens=30, stop_ids=[])
    per_pass = []
    for other in (model, model_of(1, **flat)):
        draft = Draft(other, ahead=4)
        alone = model.generate(ids, **how)
        assert torch.equal(model.generate(ids, draft=draft, **how), alone)
        per_pass.append(draft.guessed / draft.passes)
    assert per_pass[0] > 2 > 1.3 > per_pass[1]


def test_text_stops_and_streams_as_ever():
    tok = BantamTokenizer.default()
    model = model_of(vocab_size=tok.vocab_size, initializer_range=.2)
    draft = Draft(noisy(model, .02), tok, tok)
    for how in (PLAIN, PLAIN | dict(stop=["e", "th"]), dict(temperature=1.2, seed=3, stop=["a"])):
        whole = generate(model, tok, "The", draft=draft, max_new_tokens=30, **how)
        assert "".join(stream(model, tok, "The", draft=draft, max_new_tokens=30, **how)) == whole
        if how.get("temperature") == 0:
            assert whole == generate(model, tok, "The", max_new_tokens=30, **how)
    model.train(); draft.model.train()
    next(stream(model, tok, "The", draft=draft))
    assert model.training and draft.model.training


def test_what_cannot_be_is_refused_by_name():
    tok, model = BantamTokenizer.default(), model_of()
    ids, draft = torch.tensor([[4, 5]]), Draft(model_of())
    for wrong, message in ((dict(num_samples=2), "one row"), (dict(num_beams=2), "num_beams"),
                           (dict(compile=True), "compile"),
                           (dict(constraint=object()), "constraint")):
        with pytest.raises(BantamError, match=message): model.generate(ids, draft=draft, **wrong)
    with pytest.raises(BantamError, match="fingerprints"):
        Draft(model, BantamTokenizer.byte_level(), tok)
    with pytest.raises(BantamError, match="share a tokenizer"):
        model.generate(ids, draft=Draft(model_of(vocab_size=31)))
    for bad in (dict(ahead=0), dict(sure=2.)):
        with pytest.raises(BantamError, match=next(iter(bad))): Draft(model, **bad)
