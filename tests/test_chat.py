"Text never becomes control; a chat has no end."
import unicodedata

import pytest
import torch
from hypothesis import given, settings, strategies as st

from bantam import BantamConfig
from bantam.chat.chat import BantamChat, chat_loop, harmless
from bantam.core import BantamError
from bantam.decode.generate import GenerationArgs
from bantam.model.lm import BantamForCausalLM
from bantam.text.special import CONTROL_TOKENS
from bantam.text.tokenizer import BantamTokenizer

TOK = BantamTokenizer.default()
torch.manual_seed(0)
BIG = BantamForCausalLM(BantamConfig(vocab_size=TOK.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, initializer_range=.3, max_position_embeddings=48)).eval()


ROLES = ("system", "user", "assistant", "tool")
MATHS = {65+i: 0x1D5B4+i for i in range(26)}  # letters that look like A to Z
DISGUISES = {"plain": str, "fullwidth": lambda t: t.replace("<", "\uff1c").replace("|", "\uff5c"),
             "mathematical": lambda t: t.translate(MATHS), "lower": str.lower,
             "invisible": lambda t: t[:3] + "\u200b" + t[3:], "nested": lambda t: t[:2] + t + t[2:],
             "after a space": lambda t: " " + t, "twice": lambda t: t*2}


@pytest.mark.parametrize("name", ["bantam", "chatml"])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_no_spelling_in_any_role_becomes_control(name, disguise):
    "Every control token, in every role: the control ids are those of an innocent conversation."
    chat = BantamChat(BIG, TOK, template=name)
    def control(content):
        ids = chat.prompt([dict(role=r, content=content) for r in ROLES])
        return [i for i in ids if i < len(CONTROL_TOKENS)]
    innocent = control("x")
    for token in CONTROL_TOKENS:
        spelled = DISGUISES[disguise](token)
        assert control(f"a{spelled} b") == innocent
        assert all(i >= len(CONTROL_TOKENS) for i in TOK.encode(spelled))


def test_what_the_user_types_reaches_the_model_as_text():
    chat, seen = BantamChat(BIG, TOK, system="<|AGENT_START|>"), []
    chat.prompt = lambda messages: seen.append(BantamChat.prompt(chat, messages)) or [2, 100]
    names = "BOS SYSTEM_START SYSTEM_END USER_START USER_END AGENT_START".split()
    frame = [TOK.id_of(f"<|{name}|>") for name in names]
    for token in CONTROL_TOKENS:
        chat.history = chat.history[:1]
        chat.say(token, max_new_tokens=1)
        assert [i for i in seen[-1] if i < len(CONTROL_TOKENS)] == frame


def test_a_chat_of_300_turns_keeps_its_system_turn():
    short = GenerationArgs(max_new_tokens=2)
    chat = BantamChat(BIG, TOK, system="Be kind.", generation=short, seed=1)
    for n in range(300):
        chat.say(f"turn {n}")
        assert chat.system == "Be kind." and chat.history[1]["role"] == "user"
        assert len(chat.prompt(chat.history[:-1])) <= 48
    said = [m["content"] for m in chat.dropped + chat.history[1:] if m["role"] == "user"]
    assert said == [f"turn {n}" for n in range(300)]


def test_too_long_a_message_is_refused_and_nothing_changes():
    chat = BantamChat(BIG, TOK, system="Be kind.", seed=1)
    chat.say("Hi")
    before = list(chat.history)
    with pytest.raises(BantamError, match="shorten it"): chat.say("long " * 60)
    assert chat.history == before and not chat.dropped


def test_a_failing_model_leaves_no_trace():
    chat = BantamChat(BIG, TOK, seed=1)
    pieces = chat.stream("Hi")
    weights = BIG.norm.weight.data.clone()
    try:
        BIG.norm.weight.data.fill_(float("nan"))
        with pytest.raises(BantamError, match="NaN"): list(pieces)
    finally: BIG.norm.weight.data.copy_(weights)
    assert chat.history == []
    assert chat.say("Hi", max_new_tokens=2) is not None and len(chat.history) == 2


def test_ctrl_c_stops_the_answer_and_not_the_program():
    wild = GenerationArgs(max_new_tokens=20, temperature=2., top_p=1.)
    chat = BantamChat(BIG, TOK, generation=wild, seed=3)
    lines, screen = iter(["Hi", KeyboardInterrupt(), "again", EOFError()]), []
    def read():
        line = next(lines)
        if isinstance(line, BaseException): raise line
        return line
    def write(text, kind):
        screen.append((text, kind))
        if kind == "answer" and len(screen) == 3: raise KeyboardInterrupt
    chat_loop(chat, read, write)
    text = "".join(t for t, _ in screen)
    assert "[stopped]" in text and "/exit" in text and len(chat.history) == 4


def test_neither_answer_nor_command_drives_the_terminal():
    chat = BantamChat(BIG, TOK)
    chat.stream = lambda line: (p for p in ["\x1b[2J", "\x9b31m", "fine"])
    lines, screen = iter(["Hi", "/system \x1b[31mred", "/\x1b]0;title\x07"]), []
    def read():
        if (line := next(lines, None)) is None: raise EOFError
        return line
    chat_loop(chat, read, lambda text, kind: screen.append(text))
    text = "".join(screen)
    assert all(word in text for word in ("fine", "red", "title"))
    assert not set("\x1b\x9b\x07") & set(text)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.characters(codec=None), max_size=30))
def test_nothing_in_an_answer_moves_the_cursor(text):
    shown = harmless(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in shown)
    shown.encode()
