"""Answers with a form: masks against brute force and against our own automaton, every draw valid,
no control id, one-line refusals."""
import json
import random
import re
import sys

import jsonschema
import pytest
import torch
from hypothesis import given, settings, strategies as st

from bantam import BantamConfig
from bantam.chat.calculator import calculator
from bantam.chat.spans import CallConstraint
from bantam.chat.tools import call_schema, parse_call, tool
from bantam.core import BantamError
from bantam.decode.forms import (EMPTY, NOTHING, after, chain, either, may_end, read, repeat, signs,
                                 word)
from bantam.decode.constrain import Constraint, GrammarConstraint, JsonConstraint, RegularConstraint
from bantam.decode.generate import complete, generate, stream
from bantam.model.lm import BantamForCausalLM
from bantam.text.special import CONTROL_TOKENS, control
from bantam.text.tokenizer import BantamTokenizer

needs_library = pytest.mark.usefixtures("library")


@pytest.fixture
def library(): pytest.importorskip("llguidance", reason="needs llguidance (bantam-lm[tools])")


TOK = BantamTokenizer.default()
BYTES = BantamTokenizer.byte_level()
torch.manual_seed(0)
NOISE = BantamForCausalLM(BantamConfig(vocab_size=TOK.vocab_size, hidden_size=32,
                                       intermediate_size=64, num_hidden_layers=1,
                                       num_attention_heads=2, num_key_value_heads=2,
                                       initializer_range=.3, max_position_embeddings=256)).eval()
WILD = dict(repetition_penalty=1., no_repeat_ngram_size=0, temperature=1., top_p=1.)


def drawn(held, seed, most=400):
    "Ids that are drawn with equal chances from every mask, until the form has ended."
    rng, ids = random.Random(seed), []
    while not held.over:
        assert len(ids) < most
        ids.append(rng.choice(held.mask(ids).nonzero()[:, 0].tolist()))
        held.advance(ids[-1])
    return ids[:-1]


def text_of(ids, tok=TOK):  # strict: half a character is an error
    return b"".join(map(tok.token_bytes, ids)).decode()


# --- the automaton --------------------------------------------------------------------------------

def expressions():
    "An expression of ours beside the pattern that Python's `re` reads."
    leaf = st.sampled_from("abc").map(lambda c: (word(c), c)) | st.sampled_from(
        ["ab", "bc", "abc"]).map(lambda s: (signs(s), f"[{s}]")) | st.just((EMPTY, ""))
    def grow(x):
        return st.lists(x, min_size=1, max_size=3).map(
            lambda p: (chain(*(a for a, _ in p)), "".join(f"(?:{b})" for _, b in p))) | \
               st.lists(x, min_size=1, max_size=3).map(
                   lambda p: (either(*(a for a, _ in p)),
                              "|".join(f"(?:{b})" for _, b in p))) | x.map(
                                  lambda p: (repeat(p[0]), f"(?:{p[1]})*"))
    return st.recursive(leaf, grow, max_leaves=6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(expressions(), st.lists(st.text("abc", max_size=6), max_size=8))
def test_derivatives_agree_with_re(pair, texts):
    form, pattern = pair
    for t in texts: assert may_end(read(form, t.encode())) == (re.fullmatch(pattern, t) is not None)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(expressions(), st.text("abc", max_size=4))
def test_what_is_left_can_always_be_finished(pair, begun):
    "A state that is not NOTHING has a text, so a mask never leads into a dead end."
    state = read(pair[0], begun.encode())
    seen, todo = set(), [state] * (state != NOTHING)
    while todo and not any(map(may_end, todo)):
        seen |= set(todo)
        todo = list({t for s in todo for b in b"abc" if (t := after(s, b)) != NOTHING} - seen)
    assert state == NOTHING or todo


@settings(max_examples=60, deadline=None, derandomize=True)
@given(expressions())
def test_the_automaton_is_finite(pair):
    states = [pair[0]]
    for s in states:
        states += [t for t in dict.fromkeys(after(s, b) for b in b"abc") if t not in states]
        assert len(states) < 300


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=5), st.data())
def test_masks_by_brute_force(words, data):
    """A token is allowed when some word goes on with it: asked of every token, in words of any
    script."""
    words = [w.encode("utf-8", "ignore").decode() for w in words]
    held, said, target = (RegularConstraint(either(*map(word, words)), TOK), b"",
                          data.draw(st.sampled_from(words)))
    for id in [*TOK.encode(target), TOK.eos_id]:
        allowed = set(held.mask([]).nonzero()[:, 0].tolist())
        slow = {i for w in words if w.encode().startswith(said)
                for i in starts(w.encode()[len(said):])}
        assert (allowed - {TOK.eos_id} == slow
                and (TOK.eos_id in allowed) == (said.decode("utf-8", "replace") in words))
        held.advance(id)
        said += TOK.token_bytes(id) if id != TOK.eos_id else b""


IDS = {}
for _i in range(TOK.vocab_size): IDS.setdefault(TOK.token_bytes(_i), []).append(_i)


def starts(rest): return [i for n in range(1, len(rest) + 1) for i in IDS.get(rest[:n], [])]


# --- JSON -----------------------------------------------------------------------------------------

def weather(city: str,  # Where
            days: int = 1,  # How long
            tags: list[str] = []  # Words
            ):
    "The weather."


TREE = {"$ref": "#/$defs/n", "$defs": {
    "n": {"type": "object", "properties": {"v": {"type": "number"},
                                           "k": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
          "required": ["v", "k"], "additionalProperties": False}}}
SCHEMAS = {
    "anything": {}, "object": {"type": "object"}, "string": {"type": "string"},
    "short": {"type": "string", "minLength": 2, "maxLength": 5},
    "integer": {"type": "integer", "minimum": -3, "maximum": 1200}, "number": {"type": "number"},
    "between": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    "enum": {"enum": ["\u4f60\u597d", "a\"b\\c\n", "<|EOS|>", 1.5, None, True, [1], {"x": "y"}]},
    "const": {"const": {"\u00e9": ["\U0001F600", "\u0000"]}},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"type": "string"}],
              "items": False, "minItems": 2}, "tree": TREE,
    "optional": {"type": "object", "properties": {"a": {"type": "integer"},
                                                  "\u00fc b": {"type": "string", "maxLength": 3},
                                                  "c": {"type": "null"}}, "required": ["c"],
                 "additionalProperties": False},
    "more": {"type": "object", "properties": {"a": {"type": "integer"}},
             "additionalProperties": {"type": "boolean"}},
           "keys": {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "integer"}},
                    "additionalProperties": False},
    "any of": {"anyOf": [{"type": "string", "pattern": "^[\u00e9-\u00fc]{2,4}$"},
                         {"type": "integer"}, {"type": "array", "items": {"type": "null"}}]},
           "one of": {"oneOf": [{"type": "string"}, {"type": "boolean"}]},
           "all of": {"allOf": [{"type": "integer"}, {"minimum": 5}]},
    "date": {"type": "string", "format": "date"}, "uuid": {"type": "string", "format": "uuid"},
    "call": call_schema([calculator]), "calls": call_schema([calculator, tool(weather)])}


@needs_library
@pytest.mark.parametrize("tok", [TOK, BYTES], ids=["bpe", "bytes"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_draw_is_valid(name, tok):
    check = jsonschema.Draft202012Validator(SCHEMAS[name]).validate
    for seed in range(8):
        ids = drawn(JsonConstraint(SCHEMAS[name], tok, free=15), seed)
        assert min(ids) >= len(CONTROL_TOKENS)
        value = json.loads(text_of(ids, tok))
        check(value)
        if "call" in name: parse_call(text_of(ids, tok))


@needs_library
def test_a_model_of_noise_makes_valid_calls_in_a_batch():
    "Each row has its own constraint; streamed and not, alone and in a batch say the same."
    make = lambda: JsonConstraint(SCHEMAS["calls"], TOK, free=30)
    answers = complete(NOISE, TOK, ["a", "some more", "b"], constraint=[make(), None, make()],
                       seed=4, max_new_tokens=120, **WILD)
    for done in (answers[0], answers[2]):
        assert done.ended
        jsonschema.validate(parse_call(done.text), SCHEMAS["calls"])
    assert generate(NOISE, TOK, "a", constraint=make(), seed=4, max_new_tokens=120,
                    **WILD) == answers[0].text
    assert ("".join(stream(NOISE, TOK, "a", constraint=make(), seed=4, max_new_tokens=120, **WILD))
            == answers[0].text)
    assert generate(NOISE, TOK, "some more", seed=5, max_new_tokens=120, **WILD) == answers[1].text
    several = complete(NOISE, TOK, ["a"], constraint=[make() for _ in range(4)], num_samples=4,
                       seed=4, max_new_tokens=120, **WILD)
    assert len({d.text for d in several}) > 1 and all(d.ended for d in several)
    with pytest.raises(BantamError, match="each row needs its own"):
        complete(NOISE, TOK, ["a"], constraint=make(), num_samples=2)


@needs_library
def test_rules_against_repetition_bend_but_never_break_a_form():
    for seed in range(4):
        json.loads(generate(NOISE, TOK, "x", constraint=JsonConstraint(TREE, TOK, free=40),
                            seed=seed, max_new_tokens=120))


@needs_library
def test_an_end_is_allowed_exactly_where_the_form_is_complete():
    for name in ("integer", "enum", "optional", "any of"):
        held, ids = JsonConstraint(SCHEMAS[name], TOK, ends=[control("AGENT_END"), TOK.eos_id]), []
        rng = random.Random(1)
        while not held.over and len(ids) < 60:
            allowed = held.mask(ids)
            try:
                whole = jsonschema.Draft202012Validator(SCHEMAS[name]).is_valid(
                    json.loads(text_of(ids)))
            except ValueError: whole = False
            assert allowed[control("AGENT_END")] == allowed[TOK.eos_id] == whole
            assert not allowed[:len(CONTROL_TOKENS)].index_fill(0, torch.tensor(held.ends),
                                                                False).any()
            ids.append(rng.choice(allowed.nonzero()[:, 0].tolist())); held.advance(ids[-1])
        assert held.over is False or held.mask([]).nonzero()[:, 0].tolist() == held.ends


@needs_library
def test_a_call_constraint_closes_the_call_and_nothing_else():
    for seed in range(6):
        held, rng, ids = CallConstraint(lambda: JsonConstraint(SCHEMAS["calls"], TOK, free=20),
                                        TOK), random.Random(seed), []
        assert held.mask([]) is None
        held.advance(control("TOOL_CALL_START"))
        while (allowed := held.mask(ids)) is not None:
            ids.append(rng.choice(allowed.nonzero()[:, 0].tolist())); held.advance(ids[-1])
        assert ids[-1] == control("TOOL_CALL_END") and min(ids[:-1]) >= len(CONTROL_TOKENS)
        jsonschema.validate(parse_call(text_of(ids[:-1])), SCHEMAS["calls"])


@needs_library
def test_a_limit_is_seen_and_free_leads_to_an_end():
    done, = complete(NOISE, TOK, ["x"], constraint=JsonConstraint(TREE, TOK), seed=1,
                     max_new_tokens=6, **WILD)
    assert not done.ended
    for n in (1, 2, 5, 20):
        held = JsonConstraint(TREE, TOK, free=n)
        ids = drawn(held, n)
        jsonschema.validate(json.loads(text_of(ids)), TREE)
        assert len(ids) <= n + 80
    assert drawn(JsonConstraint(SCHEMAS["short"], TOK, free=10**6),
                 3) == drawn(JsonConstraint(SCHEMAS["short"], TOK), 3)
    endless = {"$ref": "#/$defs/a", "$defs": {
        "a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}}}
    held = JsonConstraint(endless, TOK)
    with pytest.raises(BantamError, match="cannot be followed: .*Too many items"):
        held.advance(int(held.mask([]).nonzero()[0]))


# --- injection ------------------------------------------------------------------------------------

@needs_library
def test_nothing_that_a_schema_spells_becomes_control():
    looks = [str, lambda t: t.replace("<", "\uff1c"), lambda t: t[:2] + "\u200b" + t[2:],
             lambda t: t + t]
    for token in CONTROL_TOKENS:
        for look in looks:
            ids = drawn(
                JsonConstraint(
                    {"type": "object", "properties": {look(token): {"const": look(token)}},
                     "required": [look(token)], "additionalProperties": False}, TOK), 0)
            assert (min(ids) >= len(CONTROL_TOKENS)
                    and json.loads(text_of(ids)) == {look(token): look(token)})


@needs_library
def test_no_grammar_gets_a_control_token():
    for i, token in enumerate(CONTROL_TOKENS):
        for grammar in (f"start: <[{i}]>", f'start: "a" <[{i}]>', f'start: <[0-{i}]> "a"') + (
            (f"start: {token}",) if token.startswith("<|") else ()):
            with pytest.raises(BantamError, match="cannot go on"):
                drawn(GrammarConstraint(grammar, TOK), 0)
    held = GrammarConstraint('start: <[0-8000]>*', TOK)
    assert (held.mask([]).nonzero()[:, 0].min() == TOK.eos_id
            and held.mask([])[:len(CONTROL_TOKENS)].sum() == 1)
    for id in (control("AGENT_END"), control("TOOL_CALL_END")):
        with pytest.raises(BantamError, match="does not belong"):
            GrammarConstraint("start: <[0-8000]>*", TOK).advance(id)


@needs_library
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.text(min_size=1, max_size=12))
def test_any_text_can_be_asked_for_and_comes_back(text):
    ids = drawn(JsonConstraint({"enum": [text]}, TOK), 0)
    assert json.loads(text_of(ids)) == text and min(ids) >= len(CONTROL_TOKENS)


# --- other vocabularies, bad input ----------------------------------------------------------------

class Poor:
    "A vocabulary of a few signs, as a foreign one may be."
    def __init__(self, *texts):
        self.bytes_of, self.vocab_size, self.eos_id, self.bos_id, self.control = [
            b"", *texts], len(texts) + 1, 0, None, {"</s>": 0}
    def token_bytes(self, id): return self.bytes_of[id]
    def encode(self, text):
        return [self.bytes_of.index(c.encode()) if c.encode() in self.bytes_of else 0 for c in text]


class Bare(Poor):
    "Begins every text with a blank, as those made by SentencePiece do."
    def encode(self, text): return Poor.encode(self, " " + text)


@needs_library
def test_a_vocabulary_that_lacks_signs_is_refused():
    with pytest.raises(BantamError, match="JSON needs tokens for single signs that this vocabulary "
                                          "lacks: .*'!'"):
        JsonConstraint({}, Poor(b"a", b"b", b"1"))
    with pytest.raises(BantamError, match="cannot go on after 0"):
        GrammarConstraint("c", Poor(b"a", b"b"))
    held = GrammarConstraint("a(b|cd)", Poor(b"a", b"c"))
    with pytest.raises(BantamError, match="cannot go on after"): drawn(held, 0)
    with pytest.raises(BantamError, match="cannot go on after 0"):
        RegularConstraint(word("c"), Poor(b"a")).mask([])
    assert drawn(RegularConstraint(word("aba"), Poor(b"a", b"b", b"ab")), 0)[-1] == 1


@needs_library
def test_a_vocabulary_that_begins_with_a_blank_or_has_a_token_twice():
    bare = Bare(*[bytes([b]) for b in range(32, 127)], b'{"', b'": ', b" {", b"tr", b"true", b"tr",
                b" 1", b"}", b"}")
    schema = {"type": "object", "properties": {"name": {"type": "boolean"},
                                               "n": {"enum": [1, "x y", "true"]}},
              "required": ["name", "n"], "additionalProperties": False}
    for seed in range(30):
        jsonschema.validate(json.loads(text_of(drawn(JsonConstraint(schema, bare), seed), bare)),
                            schema)
    held = JsonConstraint({"type": "string"}, bare)
    held.advance(bare.encode('"')[1])
    # each of equal tokens may come
    assert [bare.token_bytes(i) for i in held.mask([]).nonzero()[:, 0].tolist()].count(b"}") == 3


BAD = [(None, "is an object"), ("{}", "is an object"), ({"type": "strin"}, "no JSON Schema"),
       ({"properties": []}, "no JSON Schema"), ({"exclusiveMinimum": True}, "no JSON Schema"),
       ({"uniqueItems": True}, "uniqueItems"), ({"not": {}}, "not"),
       ({"if": {}, "then": {}}, "if"), ({"contains": {}}, "contains"),
       ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
       ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
       ({"type": "string", "pattern": "(?<=a)b"}, "look-around"),
       ({"type": "string", "pattern": "(a"}, "no JSON Schema|unclosed|regex"),
       ({"type": "string", "format": "wurst"}, "wurst"),
       ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
       ({"enum": []}, "Unsatisfiable"), ({"$ref": "#/$defs/x"}, "does not exist"),
       ({"$ref": "http://127.0.0.1:9/x.json"}, "not present"),
       ({"$ref": "file:///etc/passwd"}, "not present"), ({"const": "\ud83d"}, "cannot be written"),
       ({"const": float("nan")}, "cannot be written"),
       ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "uniqueItems")]


@needs_library
@pytest.mark.parametrize("schema, message", BAD,
                         ids=[str(m) + str(i) for i, (_, m) in enumerate(BAD)])
def test_a_bad_schema_is_one_line(schema, message):
    with pytest.raises(BantamError, match=message) as e: JsonConstraint(schema, TOK)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@needs_library
def test_a_schema_that_is_too_deep_or_too_wide_ends_with_a_sentence():
    deep = {"type": "integer"}
    for _ in range(3000): deep = {"type": "array", "items": deep}
    with pytest.raises(BantamError, match="nested too deeply"): JsonConstraint(deep, TOK)
    JsonConstraint({"type": "string", "maxLength": 10**9}, TOK).mask([])


@needs_library
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=30) | st.text("start:/()[]{}|*+?\"<>ab01-\\\n ",
                                      max_size=40).map(lambda t: "start: " + t))
def test_any_text_as_a_grammar_is_a_form_or_a_sentence(text):
    try: held = GrammarConstraint(text, TOK)
    except BantamError as e: assert "\n" not in str(e); return
    assert isinstance(held, Constraint) and not held.mask([])[:3].any()


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (lambda: JsonConstraint({}, TOK), lambda: GrammarConstraint("a", TOK)):
        with pytest.raises(BantamError, match=r"pip install 'bantam-lm\[tools\]'"): make()
    assert text_of(drawn(RegularConstraint(word("yes"), TOK), 0)) == "yes"  # ours needs nothing


def test_ends_and_free_are_checked():
    for bad in (dict(ends=[]), dict(ends=[None]), dict(free=0)):
        with pytest.raises(BantamError, match="ends|free"): RegularConstraint(word("a"), TOK, **bad)
