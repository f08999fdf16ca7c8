"Same tokens whichever way they are asked for."
import random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from bantam import BantamConfig
from bantam.core import BantamError
from bantam.decode.generate import complete, generate, left_pad, stream
from bantam.decode.speech import StopText
from bantam.model.lm import BantamForCausalLM
from bantam.text.tokenizer import BantamTokenizer

TOK = BantamTokenizer.default()
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=.3, max_position_embeddings=48)
VARIANTS = dict(plain={}, window=dict(window=9), qk_norm=dict(qk_norm=True),
                eager=dict(attn_impl="eager"), untied=dict(tie_word_embeddings=False))


def model_of(**changes):
    torch.manual_seed(0)
    return BantamForCausalLM(BantamConfig(**{"vocab_size": 101} | SHAPE | changes)).eval()


MODELS = {name: model_of(**changes) for name, changes in VARIANTS.items()}
BIG = model_of(vocab_size=TOK.vocab_size)
PLAIN = dict(temperature=0, repetition_penalty=1., no_repeat_ngram_size=0)
HOW = [dict(temperature=0), PLAIN, dict(),
       dict(temperature=1.3, top_k=20, top_p=1., min_p=.02, no_repeat_ngram_size=2)]


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), how=st.sampled_from(HOW),
       seed=st.integers(0, 99), new=st.sampled_from([1, 12, 60]))
def test_every_way_gives_the_same_tokens(name, lengths, how, seed, new):
    "Cached or not, batched or alone, streamed or not; past the context of 48 too."
    model, r = MODELS[name], random.Random(seed)
    rows = [[r.randrange(4, 101) for _ in range(n)] for n in lengths]
    ids, mask = left_pad(rows, model.config.pad_token_id)
    how = how | dict(max_new_tokens=new, stop_ids=[3, 50, 51, 52])
    whole = model.generate(ids, attention_mask=mask, seed=seed, **how)
    assert torch.equal(whole[:, :ids.shape[1]], ids)
    uncached = model.generate(ids, attention_mask=mask, seed=seed, use_cache=False, **how)
    assert torch.equal(whole, uncached)
    steps = torch.stack(list(model.stream(ids, attention_mask=mask, seed=seed, **how)), 1)
    assert torch.equal(whole[:, ids.shape[1]:], steps)
    for b, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), seed=seed+b, **how)[0, len(row):]
        assert torch.equal(steps[b, :len(alone)], alone)
        assert (steps[b, len(alone):] == model.config.pad_token_id).all()


def test_greedy_is_the_argmax_of_a_plain_forward():
    model, ids = MODELS["plain"], torch.randint(4, 101, (1, 10))
    for _ in range(30):
        with torch.no_grad(): best = model(ids, return_logits=True).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], 1)
    assert torch.equal(model.generate(ids[:, :10], stop_ids=[], max_new_tokens=30, **PLAIN), ids)


def test_num_samples_are_the_seeds_that_follow():
    model, ids = MODELS["plain"], torch.randint(4, 101, (2, 7))
    how = dict(max_new_tokens=8, stop_ids=[])
    many = model.generate(ids, num_samples=3, seed=10, **how)
    assert many.shape == (6, 15) and torch.equal(many[:, :7], ids.repeat_interleave(3, 0))
    for b in range(6):
        assert torch.equal(many[b:b+1], model.generate(ids[b//3][None], seed=10+b, **how))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(text=st.text(max_size=12), seed=st.integers(0, 99),
       stop=st.lists(st.sampled_from(["e", " th", "\n", "q"]), max_size=2))
def test_streamed_text_is_the_text(text, seed, stop):
    how = dict(seed=seed, max_new_tokens=24, temperature=1.5, top_p=1., stop=stop)
    pieces = list(stream(BIG, TOK, text, **how))
    whole = generate(BIG, TOK, text, **how)
    assert "".join(pieces) == whole and all(pieces)
    assert not any(s in whole for s in stop)
    done, = complete(BIG, TOK, [text], **how)
    assert done.text == whole and TOK.decode(done.ids, skip_special=True).startswith(whole)
    assert done.ended or len(done.ids) == 24


def test_an_emoji_is_never_half_shown():
    ids = TOK.encode("a \U0001F600\U0001F468\u200D\U0001F469\u200D\U0001F467 \u4f60\u597d")
    script = iter(ids)
    class Says(torch.nn.Module):
        config, head_weight = BIG.config, BIG.head_weight
        def stream(self, *args, **kw): return (torch.tensor([i]) for i in script)
        stops = BantamForCausalLM.stops
    pieces = list(stream(Says(), TOK, "x"))
    assert "".join(pieces) == TOK.decode(ids) and not any("\ufffd" in p for p in pieces)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text("abc", max_size=14), cuts=st.sets(st.integers(0, 14)),
       stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_do_not_care_how_text_is_cut(text, stop, cuts):
    def run(pieces):
        watch = StopText(stop)
        return "".join([watch.push(p) for p in pieces] + [watch.flush()]), watch.done
    marks = [0, *sorted(cuts), 99]
    assert run([text]) == run([text[a:b] for a, b in zip(marks, marks[1:])]) == run(list(text))


@pytest.mark.parametrize("bad,message", [
    (dict(temperature=-1), "temperature"), (dict(top_k=-2), "top_k"), (dict(top_p=0.), "top_p"),
    (dict(min_p=1.5), "min_p"), (dict(max_new_tokens=0), "max_new_tokens"), (dict(topk=3), "top_k"),
    (dict(repetition_penalty=0), "repetition_penalty"), (dict(no_repeat_ngram_size=-1), "ngram"),
    (dict(stop=[""]), "stop"), (dict(stop=[3]), "stop"), (dict(stop_ids=["a"]), "stop_ids"),
    (dict(seed=-1), "seed"), (dict(seed="a"), "seed")])
def test_bad_settings_are_refused_by_name(bad, message):
    for call in (generate, stream):
        with pytest.raises(BantamError, match=message): call(BIG, TOK, "x", **bad)
