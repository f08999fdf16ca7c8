"Same tokens whichever way they are asked for."
import random
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st

import bantam.decode.reader
from bantam import BantamConfig
from bantam.core import BantamError
from bantam.decode.generate import complete, generate, left_pad, stream
from bantam.decode.reader import Reader, in_precision, kv_bytes
from bantam.decode.speculate import Draft
from bantam.decode.speech import StopText
from bantam.model.lm import BantamForCausalLM
from bantam.text.tokenizer import BantamTokenizer

TOK = BantamTokenizer.default()
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=.3, max_position_embeddings=48)
VARIANTS = dict(plain={}, window=dict(window=9), qk_norm=dict(qk_norm=True),
                eager=dict(attn_impl="eager"), untied=dict(tie_word_embeddings=False))
GROUPS = [dict(query_heads=3, kv_heads=1, head_dim=8), dict(query_heads=1, kv_heads=1, head_dim=16)]
MLA = dict(attn_type="mla", num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=8,
           qk_rope_head_dim=4, v_head_dim=8)
SCALED = dict(linear={}, ntk={}, dynamic={}, yarn={},
              llama3=dict(low_freq_factor=1., high_freq_factor=4.),
              longrope=dict(short_factor=[1., 1.1, 1.2, 1.3], long_factor=[2., 3., 4., 5.]))
SCALED = {name: dict(rope_scaling=dict(type=name, factor=2., **more) | (
    {} if name in ("linear", "ntk") else dict(original_max_position_embeddings=24)))
          for name, more in SCALED.items()}
EXPERTS = {f"experts: {kind}": dict(expert_type=kind, num_experts=4, moe_intermediate_size=32,
                                    moe_num_shared=1 if kind == "shared" else 0)
           for kind in ("dense_moe", "switch", "topk", "shared")}
# Everything that generation must not notice. Kinds of cache: rolling where every layer has a
# window, else full.
TABLE = SCALED | EXPERTS | dict(
    windows=dict(window=9), sinks=dict(window=9, num_attention_sinks=3, sink_boost=.5),
    mixed=dict(num_attention_sinks=2, layer_configs=[dict(window=7)]),
    latent=MLA, latent_windows=MLA | dict(window=9, num_attention_sinks=2),
    latent_dynamic=MLA | SCALED["dynamic"], sinks_yarn=dict(window=9, num_attention_sinks=3)
    | SCALED["yarn"],
    sinks_dynamic=dict(window=9, num_attention_sinks=3) | SCALED["dynamic"],
    learned_sinks=dict(learned_sinks=True), groups=dict(attention_head_groups=GROUPS,
                                                        num_key_value_heads=2),
    alibi=dict(pos_encoding="alibi", window=11), learned=dict(pos_encoding="learned", window=11),
    sinusoidal=dict(pos_encoding="sinusoidal"), none=dict(pos_encoding="none"))


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


def noisy(model, much=.05):
    "The same model, its weights a little off: a draft that is often right."
    other, gen = BantamForCausalLM(model.config).eval(), torch.Generator().manual_seed(1)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p += much * p.std(unbiased=False) * torch.randn(p.shape, generator=gen)
    return other


@pytest.mark.parametrize("name", TABLE)
def test_same_tokens_in_every_way(name):
    "Cached, uncached, batched, alone, streamed, guessed: one text, past the context of 48."
    model = model_of(**TABLE[name])
    if model.config.learned_sinks:
        with torch.no_grad():
            for block in model.layers: block.attn.sinks += torch.tensor([1., 0., 2., -1.])
    r = random.Random(name)
    rows = [[r.randrange(4, 101) for _ in range(n)] for n in (31, 2, 12)]
    ids, mask = left_pad(rows, model.config.pad_token_id)
    how, guess = PLAIN | dict(max_new_tokens=30, stop_ids=[]), noisy(model)
    whole = model.generate(ids, attention_mask=mask, **how)[:, ids.shape[1]:]
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False,
                                      **how)[:, ids.shape[1]:], whole)
    assert torch.equal(torch.stack(list(model.stream(ids, attention_mask=mask, **how)), 1), whole)
    for b, row in enumerate(rows):
        assert torch.equal(model.generate(torch.tensor([row]), **how)[0, len(row):], whole[b])
        draft = Draft(guess, ahead=4, sure=0.)
        assert torch.equal(model.generate(torch.tensor([row]), draft=draft, **how)[0, len(row):],
                           whole[b])
        # nothing can be guessed where all angles move with every token
        assert draft.guessed > 0 or "dynamic" in name
    steps = list(model.steps(ids, attention_mask=mask, logprobs=True, **how))
    if "dynamic" in name or "longrope" in name: return # their reference is each prefix by itself
    b, T = 2, len(rows[2])
    text = torch.cat([torch.tensor(rows[b]), whole[b]])[None]
    with torch.no_grad(): fresh = model(text, return_logits=True).logits[0].log_softmax(-1)
    told = torch.stack([s.logprobs_B[b] for s in steps])
    assert torch.allclose(told, fresh[T-1:-1].gather(1, whole[b][:, None])[:, 0], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "sinks", "latent", "experts: topk"])
def test_same_tokens_when_compiled(name):
    """A compiled step in a static cache says the same; where the compiler gives up, a warning says
    so."""
    torch._dynamo.reset()
    model = model_of(**({"plain": {}} | TABLE)[name])
    rows = [[(7*i) % 97 + 4 for i in range(n)] for n in (20, 3)]
    ids, mask = left_pad(rows, model.config.pad_token_id)
    how = PLAIN | dict(max_new_tokens=40, stop_ids=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("default", module="torch")
        compiled = model.generate(ids, attention_mask=mask, compile=True, **how)
    assert torch.equal(compiled, model.generate(ids, attention_mask=mask, **how))


def test_a_failing_compiler_says_why(monkeypatch):
    model, ids = model_of(), torch.tensor([[5, 6, 7]])
    def broken(*args, **kw): raise RuntimeError("no C++ compiler")
    monkeypatch.setattr(torch, "compile", lambda step: broken)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        got = model.generate(ids, compile=True, **PLAIN, max_new_tokens=20)
    assert torch.equal(got, model.generate(ids, **PLAIN, max_new_tokens=20))


@pytest.mark.parametrize("name", ["sinks", "alibi", "latent_windows"])
def test_a_text_without_an_end_in_constant_memory(name):
    "2,000 tokens past a context of 48: memory stays, and the text is that of a plain forward pass."
    model = model_of(**TABLE[name])
    reader = Reader(model, torch.zeros(1, dtype=torch.long))
    ids, sizes = torch.randint(4, 101, (1, 2000), generator=torch.Generator().manual_seed(0)), set()
    for t in range(60, 2001, 20):
        scores = reader(ids[:, :t])
        sizes.add(reader.cache.nbytes)
    assert sizes == {kv_bytes(model.config, 2000)} and reader.fed == 2000
    with torch.no_grad(): whole = model(ids, return_logits=True).logits[:, -1]
    torch.testing.assert_close(scores, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_twenty_thousand_tokens():
    model = model_of(window=16, num_attention_sinks=2)
    ids, sizes = (torch.randint(4, 101, (1, 20_000), generator=torch.Generator().manual_seed(0)),
                  set())
    reader = Reader(model, torch.zeros(1, dtype=torch.long))
    for t in range(100, 20_001):
        reader(ids[:, :t])
        if t % 1000 == 0: sizes.add(reader.cache.nbytes)
    assert sizes == {kv_bytes(model.config, 20_000)}


def test_long_prompts_are_read_in_pieces(monkeypatch):
    for name in ("sinks", "latent", "mixed", "dynamic"):
        model = model_of(**TABLE[name] | dict(max_position_embeddings=300))
        ids, start = torch.randint(4, 101, (1, 200)), torch.zeros(1, dtype=torch.long)
        whole = Reader(model, start)(ids)
        with monkeypatch.context() as m:
            m.setattr(bantam.decode.reader, "CHUNK", 33)
            passes, states = [], Reader.states
            m.setattr(Reader, "states", lambda self, *a: passes.append(a[1:]) or states(self, *a))
            torch.testing.assert_close(Reader(model, start)(ids), whole, rtol=1e-5, atol=2e-5)
        assert len(passes) == (1 if name == "dynamic" else 7) # angles that grow want the whole text


def test_beams_are_those_of_transformers():
    "Padded batches, several lengths, an id that ends; answers and scores."
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=64, tie_word_embeddings=True, initializer_range=.4)
    torch.manual_seed(3)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, bos_token_id=2, eos_token_id=3, pad_token_id=1)).eval()
    model, theirs, ours = BantamForCausalLM(BantamConfig(**shape)).eval(), llama.state_dict(), {}
    for n in model.state_dict():
        at = "model." + n.replace("attn_norm",
                                  "input_layernorm").replace("ffn_norm",
                                                             "post_attention_layernorm").replace(
                                                                 "ffn.", "mlp.").replace(
                                                                     ".attn.", ".self_attn.")
        ours[n] = (torch.cat([theirs[at.replace("qkv_proj", f"{p}_proj")] for p in "qkv"])
                   if "qkv" in n else theirs[at])
    model.load_state_dict(ours)
    rows = [[5, 9, 20], [7, 8, 9, 10, 11, 12, 13], [4]]
    ids, mask = left_pad(rows, 1)
    for width, penalty in ((1, 1.), (2, 0.), (4, 1.), (4, 2.)):
        how = dict(num_beams=width, length_penalty=penalty, repetition_penalty=1.,
                   no_repeat_ngram_size=0, max_new_tokens=14, stop_ids=[3])
        how |= dict(temperature=0) if width == 1 else {}
        mine = model.generate(ids, attention_mask=mask, num_samples=width,
                              **how)[:, ids.shape[1]:].view(3, width, -1)
        for b, row in enumerate(rows):
            real = llama.generate(torch.tensor([row]), num_beams=width, num_return_sequences=width,
                                  length_penalty=penalty, do_sample=False, max_new_tokens=14)
            for mine_, real_ in zip(mine[b].tolist(), real[:, len(row):].tolist(), strict=True):
                cut = lambda x: x[:x.index(3) + 1] if 3 in x else x[:14]
                assert cut(mine_) == cut(real_), (width, penalty, row)


def test_beams_stop_at_strings_and_are_pieces_too():
    how = dict(num_beams=3, max_new_tokens=12, stop="e")
    done, second = complete(BIG, TOK, ["x"], num_samples=2, logprobs=True, **how)
    assert "e" not in done.text and "".join(stream(BIG, TOK, "x", **how)) == done.text
    assert len(done.logprobs) == len(done.ids) and second.ids != done.ids


class Vowels:
    "Allows some ids only, and after three of them the end."
    def __init__(self, ids): self.ids, self.heard = ids, []
    def mask(self, said):
        assert said == self.heard
        may = torch.zeros(TOK.vocab_size, dtype=torch.bool)
        may[self.ids if len(said) < 3 else [TOK.eos_id]] = True
        return may
    def advance(self, id): self.heard.append(id)


def test_a_constraint_allows_what_it_allows_and_nothing_else():
    vowels = [TOK.encode(c)[0] for c in "aeiou"]
    for how in (dict(temperature=0), dict(temperature=2., top_p=.5, seed=3), dict(top_k=1)):
        watch = Vowels(vowels)
        done, = complete(BIG, TOK, ["x"], constraint=watch, **how)
        assert len(done.ids) == 3 and set(done.ids) <= set(vowels) and done.ended
        assert watch.heard == done.ids + [TOK.eos_id]
    rows = [Vowels(vowels), None]
    free, = complete(BIG, TOK, ["y"], seed=6, max_new_tokens=8)
    one, two = complete(BIG, TOK, ["x", "y"], constraint=rows, seed=5, max_new_tokens=8)
    assert set(one.ids) <= set(vowels) and two.ids == free.ids
    class Never(Vowels):
        def mask(self, said): return torch.zeros(TOK.vocab_size, dtype=torch.bool)
    with pytest.raises(BantamError, match="allows 0 of"):
        complete(BIG, TOK, ["x"], constraint=Never([]))


def test_weights_in_16_bits_say_nearly_the_same():
    small = in_precision(noisy(BIG, 0.), "bf16")
    assert (small.head_weight.dtype == torch.bfloat16
            and in_precision(small, "fp32").head_weight.dtype == torch.float32)
    a, = complete(in_precision(small, "bf16"), TOK, ["x"], logprobs=True, max_new_tokens=1, **PLAIN)
    b, = complete(BIG, TOK, ["x"], logprobs=True, max_new_tokens=1, **PLAIN)
    assert abs(a.logprobs[0] - b.logprobs[0]) < .1
    with pytest.raises(BantamError, match="precision"): in_precision(BIG, "int3")


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
        config, device = BIG.config, BIG.device
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
