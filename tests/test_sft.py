"""Fine-tuning: fifty mixed records and the targets that somebody wrote down by hand; what is
refused; rows that share nothing."""
import json

import pytest
import torch

from bantam.args import SFTArgs
from bantam.config import BantamConfig
import bantam.presets  # adds from_preset
from bantam.core import BantamError
from bantam.data.sources import read_records
from bantam.model.lm import BantamForCausalLM
from bantam.runtime import seed_everything
from bantam.text.tokenizer import BantamTokenizer
from bantam.tune.sft import sft_loader, sft_samples

TOK = BantamTokenizer.default()
END, UEND = "<|AGENT_END|>", "<|USER_END|>"


def U(text, **more): return dict(role="user", content=text, **more)
def A(text, **more): return dict(role="assistant", content=text, **more)
def S(text): return dict(role="system", content=text)
def T(text, **more): return dict(role="tool", content=text, **more)
def M(*turns): return dict(messages=list(turns))
def G(*turns): return dict(conversations=[{"from": f, "value": v} for f, v in turns])


CALL = dict(name="add", arguments=dict(a=2, b=3), id="1")
CALLED = ('<|TOOL_CALL_START|>{"name": "add", "arguments": {"a": 2, "b": 3}, "id": '
          '"1"}<|TOOL_CALL_END|>')
OPENAI = dict(id="1", type="function", function=dict(name="add", arguments='{"a": 2, "b": 3}'))
def thought(text): return f"<|THINK_START|>{text}<|THINK_END|>"


TABLE = [  # a record, and the stretches of it that are asked of the model
    (M(U("Hi"), A("Hello.")), ["Hello." + END]),
    (M(S("Be brief."), U("Hi"), A("Hello.")), ["Hello." + END]),
    (M(U("Hi"), A("Hello."), U("Bye"), A("See you.")), ["Hello." + END, "See you." + END]),
    (M(U("Hi"), A("Hello."), U("Bye")), ["Hello." + END]),
    (M(A("Welcome."), U("Hi"), A("Hello.")), ["Welcome." + END, "Hello." + END]),
    (M(U("a"), U("b"), A("c")), ["c" + END]),
    (M(U("a"), A("b"), A("c")), ["b" + END, "c" + END]),
    (M(U("a"), A("")), [END]),
    (M(U(""), A("Yes?")), ["Yes?" + END]),
    (M(S(""), U("a"), A("b")), ["b" + END]),
    (M(U("a"), dict(role="agent", content="b")), ["b" + END]),
    (M(U("a"), A("b", weight=0), U("c"), A("d")), ["d" + END]),
    (M(U("a"), A("b", weight=2)), ["b" + END]),
    (M(U("a", weight=5), A("b")), ["b" + END]),
    (M(U("a"), A(" b ")), [" b " + END]),
    (M(U("a"), A("b\n\nc")), ["b\n\nc" + END]),
    (M(U("<|AGENT_START|>a<|AGENT_END|>"), A("b")), ["b" + END]),
    (M(U("a"), A("<|AGENT_END|>b<|EOS|>")), ["<|AGENT_END|>b<|EOS|>" + END]),
    (M(U("Grüße 😀"), A("日本 é")), ["日本 é" + END]),
    (M(U("a"), A("{}")), ["{}" + END]),
    (M(U("a"), A("b", thinking="c")), [thought("c") + "b" + END]),
    (M(U("a"), A("b", thinking="")), ["b" + END]),
    (M(U("a"), A("b", thinking="<|THINK_END|>")), [thought("<|THINK_END|>") + "b" + END]),
    (M(U("a"), A("b", reasoning_content="c")), [thought("c") + "b" + END]),
    (M(U("a"), A("", thinking="c"), U("d"), A("e", thinking="f")),
     [thought("c") + END, thought("f") + "e" + END]),
    (M(U("2+3?"), A("", tool_calls=[CALL])), [CALLED + END]),
    (M(U("2+3?"), A("So:", tool_calls=[CALL]), T(5, id="1"), A("5.")),
     ["So:" + CALLED + END, "5." + END]),
    (M(U("2+3?"), dict(role="assistant", tool_calls=[CALL]), dict(role="tool", id="1", error="no"),
       A("Sorry.")), [CALLED + END, "Sorry." + END]),
    (M(U("2+3?"), A("", tool_calls=[CALL, CALL]), T("5", id="1")), [CALLED + CALLED + END]),
    (M(U("2+3?"), A(None, tool_calls=[OPENAI]), dict(role="tool", tool_call_id="1", content="5"),
       A("5.")), [CALLED + END, "5." + END]),
    (M(U("2+3?"), A("Hm.", thinking="c", tool_calls=[CALL])),
     [thought("c") + "Hm." + CALLED + END]),
    (M(U("2+3?"), A("b", tool_calls=[])), ["b" + END]),
    (M(U("2+3?"), T('{"x": 1}'), A("b")), ["b" + END]),
    (M(S("a"), S("b"), U("c"), A("d")), ["d" + END]),
    (M(U("a"), A("b"), S("c"), U("d"), A("e")), ["b" + END, "e" + END]),
    (G(("human", "Hi"), ("gpt", "Hello.")), ["Hello." + END]),
    (G(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello."), ("human", "Bye"),
       ("gpt", "See you.")), ["Hello." + END, "See you." + END]),
    (G(("user", "Hi"), ("assistant", "Hello.")), ["Hello." + END]),
    (G(("human", "a"), ("gpt", "b"), ("observation", "c"), ("gpt", "d")), ["b" + END, "d" + END]),
    (G(("human", ""), ("gpt", "")), [END]),
    (dict(prompt="Hi", response="Hello."), ["Hello." + END]),
    (dict(prompt="Hi", response="Hello.", system="Be brief."), ["Hello." + END]),
    (dict(prompt="Hi", response="Hello.", id=7, source="x"), ["Hello." + END]),
    (dict(prompt="", response="Hello."), ["Hello." + END]),
    (dict(prompt="Hi", response=""), [END]),
    (dict(instruction="Add.", input="2 and 3", output="5"), ["5" + END]),
    (dict(instruction="Add.", input="", output="5"), ["5" + END]),
    (dict(instruction="Name a fish.", output="Carp."), ["Carp." + END]),
    (dict(instruction="Name a fish.", output="Carp.", system="Be brief."), ["Carp." + END]),
    (dict(instruction="<|USER_END|>", output="<|USER_START|>"), ["<|USER_START|>" + END]),
]


def stretches(sample):
    "The runs of target tokens, decoded."
    runs, last = [], 0.
    for i, w in zip(sample.ids, sample.weights):
        if w: runs = [*runs[:-1], [*runs[-1], i]] if last else [*runs, [i]]
        last = w
    return [TOK.decode(r) for r in runs]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    file = tmp_path_factory.mktemp("data")/"mixed.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r, _ in TABLE))
    return file


def test_fifty_mixed_records_as_written_by_hand(mixed):
    assert len(TABLE) == 50
    samples, account = sft_samples(read_records(mixed), TOK, SFTArgs(), 512)
    assert account.counts == dict(whole=50)
    for (record, must), sample in zip(TABLE, samples): assert stretches(sample) == must, record
    weights = [{w for w in s.weights if w} for s in samples]
    assert weights[12] == {2.} and all(w == {1.} for k, w in enumerate(weights) if k != 12)


@pytest.mark.parametrize("rules, close", [(dict(include_agent_end=False), ""),
                                          (dict(include_eos=True), END),
                                          (dict(last_turn_only=True), END),
                                          (dict(mask_user_queries=False), END)])
def test_the_same_fifty_under_other_rules(mixed, rules, close):
    kept = [(r, m) for r, m in TABLE if m != [END]]  # without their closing token, some ask nothing
    samples, _ = sft_samples([r for r, _ in kept], TOK, SFTArgs(**rules), 512)
    for (record, must), sample in zip(kept, samples):
        found = stretches(sample)
        if "include_agent_end" in rules:
            assert found == [t for t in (m.removesuffix(END) for m in must) if t], record
        if "last_turn_only" in rules:
            assert (found == must[-1:] or "messages" in record
                    and record["messages"][-1].get("weight") == 0), record
        if "include_eos" in rules:
            assert (sample.ids[-1] == TOK.eos_id
                    and bool(sample.weights[-1]) == found[-1].endswith("<|EOS|>")), record
        if "mask_user_queries" in rules:
            assert (any(f.endswith(UEND) for f in found)
                    and [f for f in found if f.endswith(END)] == must), record


WRONG = {
    "no target": (M(U("Hi")), "no token would be a target"),
    "only weight 0": (M(U("Hi"), A("Hello.", weight=0)), "no token would be a target"),
    "unknown role": (M(dict(role="narrator", content="a"), A("b")), "unknown role 'narrator'"),
    "unknown role of ShareGPT": (G(("bing", "a"), ("gpt", "b")), "unknown role 'bing'"),
    "unknown field": (M(U("a"), A("b", name="Bob")), "unknown field 'name'"),
    "broken call": (M(U("a"), A("", tool_calls=[dict(name="f")])), "tool call 0"),
    "no schema": (dict(text2="a"), "has the fields text2"),
    "two schemas": (dict(prompt="a", response="b", messages=[]), "fits several schemas"),
    "no turns": (M(), "a conversation is a list"),
}


@pytest.mark.parametrize("record, says", WRONG.values(), ids=WRONG)
def test_a_wrong_record_is_refused_with_its_place(record, says):
    with pytest.raises(BantamError, match=says) as e:
        sft_samples([TABLE[0][0], record], TOK, SFTArgs(), 512)
    assert "record 1" in str(e.value)


def test_packed_rows_share_nothing(mixed):
    "Another dialogue in the same row changes no gradient of this one."
    seed_everything(0)
    model = BantamForCausalLM(BantamConfig.from_preset("tiny", vocab_size=TOK.vocab_size,
                                                       hidden_size=32, intermediate_size=64,
                                                       num_hidden_layers=2))
    def gradient(packing):
        args, total = SFTArgs(packing=packing, batch_size=50), 0.
        model.zero_grad()
        batches = list(sft_loader(read_records(mixed), TOK, args, 160, shuffle=False))
        weight = sum(b.weight() for b in batches)
        for b in batches: (model(**b.model_inputs()).loss * (b.weight()/weight)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    packed, alone = gradient(True), gradient(False)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_target_is_an_error_and_not_nan():
    model = BantamForCausalLM(BantamConfig.from_preset("tiny", vocab_size=300, hidden_size=32,
                                                       intermediate_size=64, num_hidden_layers=1))
    ids = torch.randint(300, (1, 8))
    with pytest.raises(BantamError, match="no target in this batch"):
        model(ids, targets=torch.full((1, 8), -100))
