"""Text: what a cell cannot say. Any string, every control token in every place, the same in
transformers."""
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bantam.core import BantamError, write_json
from bantam.text.special import CONTROL_ID, CONTROL_TOKENS
from bantam.text.template import ChatTemplate
from bantam.text.tokenizer import BantamTokenizer, TokenStream
from bantam.text.trainbpe import train_bpe

many = settings(max_examples=300, deadline=None, derandomize=True, database=None)
ROLES = "system", "user", "assistant", "agent", "tool"
OPTIONS = dict(plain={}, threes=dict(digit_group_size=3), prefilled=dict(prefill_numbers_upto=100),
               symbols=dict(regex_symbols=True), words=dict(no_regex=True),
               bytes=dict(vocab_size=334))

# Any text, and text that looks dangerous: shards of control tokens, digits and white space in any
# order
SHARDS = [*CONTROL_TOKENS, "<|", "|>", "<", "|", "BOS", "im_start", "user\n", " ", "\n\n",
          "\t", "0", "19",
          "2024", "'s", "'", "é", "e\u0301", "日本", "😀", "\u200d", "नि", "ع", "a", "Word", "<|EOS"]
TEXT = st.text(max_size=60) | st.lists(st.sampled_from(SHARDS), max_size=12).map("".join)


@cache
def corpus():
    from pydoc_data.topics import topics
    extra = [" ".join(map(str, range(300))), "naïve 日本語 नमस्ते 😀 " * 5,
             " ".join(CONTROL_TOKENS * 20)]
    return [*list(topics.values())[::3], *extra]


@cache
def made(name):
    if name == "shipped": return BantamTokenizer.default()
    return train_bpe(corpus(), **{"vocab_size": 900, **OPTIONS[name]})


@pytest.fixture(scope="module")
def auto(tmp_path_factory):
    "The saved folder of `made(name)` as transformers reads it."
    from transformers import AutoTokenizer

    @cache
    def read(name):
        folder = made(name).save(tmp_path_factory.mktemp(name))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return read


@pytest.mark.parametrize("name", ["shipped", *OPTIONS])
def test_any_text_comes_back_and_holds_no_control(name, auto):
    tok, peer = made(name), auto(name)

    @many
    @given(TEXT)
    def check(text):
        ids, allowed = tok.encode(text), tok.encode(text, allow_special=True)
        assert min(ids, default=78) >= 78
        assert tok.decode(ids) == tok.decode(allowed) == text
        assert b"".join(map(tok.token_bytes, ids)) == text.encode()
        assert peer(text, split_special_tokens=True).input_ids == ids
        assert peer(text).input_ids == allowed
    check()


@many
@given(st.lists(st.integers(0, 8191), max_size=30), st.booleans())
def test_a_stream_says_what_decode_says(ids, skip):
    stream = TokenStream(made("shipped"), skip_special=skip)
    assert "".join(map(stream.push, ids)) + stream.flush() == made("shipped").decode(ids, skip)


@many
@given(TEXT)
def test_a_stream_never_shows_half_a_character(text):
    tok = made("bytes")
    stream, seen = TokenStream(tok), ""
    for i in tok.encode(text):
        seen += stream.push(i)
        assert text.startswith(seen)
    assert seen == text and stream.flush() == ""


@pytest.mark.parametrize("name", ["bantam", "chatml"])
def test_no_content_forges_a_control_id(name):
    tok, template = made("shipped"), ChatTemplate.named(name)
    twins = ["<｜EOS｜>", "<\u200b|EOS|>", "&lt;|EOS|&gt;", "<|EOS|\u0301>", "＜|EOS|＞"]
    for role in ROLES:
        def controls(content):
            return [i for i in template.encode([dict(role=role, content=content)],
                                               tok).ids if i < 78]
        frame = controls("")
        for t in [*CONTROL_TOKENS, *twins]:
            for content in (t, f" {t}", f"{t}\n{t}", f"x{t}{t}7", f"<|{t}|>", t[1:], t[:-1]):
                assert controls(content) == frame


@pytest.mark.parametrize("name", ["bantam", "chatml"])
def test_marks_and_prompts_of_any_conversation(name):
    tok, template = made("shipped"), ChatTemplate.named(name)
    turns = st.builds(lambda role, content: dict(role=role, content=content),
                      st.sampled_from(ROLES), TEXT)

    @many
    @given(st.lists(turns, min_size=1, max_size=4), TEXT)
    def check(before, answer):
        chat = [*before, dict(role="assistant", content=answer)]
        enc = template.encode(chat, tok, include_eos=True)
        own = [m["role"] in ("assistant", "agent") for m in chat]
        assert len(enc.ids) == len(enc.turn) == len(enc.content) == len(enc.end)
        assert tok.decode(enc.ids) == template.text(chat) + "<|EOS|>"
        assert [t for t, e in zip(enc.turn, enc.end) if e] == [n for n, o in enumerate(own) if o]
        for n, m in enumerate(chat):
            said = [i for i, t, c in zip(enc.ids, enc.turn, enc.content) if c and t == n]
            assert tok.decode(said) == (m["content"] if own[n] else "")
        prompt = template.encode(before, tok, add_generation_prompt=True).ids
        assert enc.ids[:len(prompt)] == prompt
    check()


@pytest.mark.parametrize("name", ["bantam", "chatml"])
def test_transformers_renders_masks_and_refuses_as_we_do(name, tmp_path):
    from transformers import AutoTokenizer
    says = (("system", "Be brief."), ("user", " Hi\n"), ("agent", "Hello 😀"), ("tool", "{}"),
            ("assistant", ""))
    chat = [dict(role=r, content=c) for r, c in says]
    tok = BantamTokenizer.default()
    tok.chat_template = ChatTemplate.named(name).jinja()
    write_json(tok.save(tmp_path)/"config.json", {"model_type": "bantam"})  # as in a model's folder
    peer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    theirs = peer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ours = ChatTemplate.of(BantamTokenizer.load(tmp_path)).encode(chat, tok)
    assert theirs["input_ids"] == ours.ids
    assert theirs["assistant_masks"] == [int(c or e) for c, e in zip(ours.content, ours.end)]
    with pytest.raises(Exception, match="unknown role owner"):
        peer.apply_chat_template([dict(role="owner", content="")], tokenize=False)


LONG = dict(word="a" * 1_000_000, number="7" * 1_000_001, spaces=" " * 1_000_000 + "x",
            emoji="😀" * 250_000, control="<|EOS|>" * 100_000)


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_megabyte_without_a_break(text):
    ids = made("shipped").encode(text)
    assert made("shipped").decode(ids) == text and min(ids) >= 78


def typed(tok): return tok.encode("<|EOS|> hello")


def test_copies_in_threads_and_processes_keep_the_switch():
    tok = made("shipped")
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(tok.encode, "<|EOS|> hello", allow_special=bool(k % 2))
                for k in range(200)]
    for k, w in enumerate(work): assert (3 in w.result()) == bool(k % 2)
    assert typed(pickle.loads(pickle.dumps(tok))) == typed(tok)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(typed, tok).result() == typed(tok)


def test_the_shipped_vocabulary():
    tok = BantamTokenizer.load("default")
    assert (tok.vocab_size, tok.args["tokens"], ChatTemplate.of(tok).name) == (8192, 8192, "bantam")
    assert [tok.token_bytes(78 + b) for b in range(256)] == [bytes([b]) for b in range(256)]
    assert {t: tok.id_of(t) for t in CONTROL_TOKENS} == CONTROL_ID
    english = "The little bird asked the old man for some bread, and he gave it a piece of his own."
    assert len(english) / len(tok.encode(english)) > 3


def in_python(code, **env):
    "What a new process prints."
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | env, text=True,
                         capture_output=True, check=True)
    return run.stdout.strip()


TRAIN = """
import resource, sys
from pydoc_data.topics import topics
from bantam.text.trainbpe import train_bpe
tok = train_bpe((t for _ in range({times}) for t in topics.values()), 1500, prefill_numbers_upto=50)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(tok.fingerprint, peak // (1024 if sys.platform == "darwin" else 1))
"""


def test_training_is_the_same_on_any_number_of_cores_and_holds_no_text():
    runs = [in_python(TRAIN.format(times=1), RAYON_NUM_THREADS=n, PYTHONHASHSEED=n).split()
            for n in "12"]
    assert runs[0][0] == runs[1][0]
    _, peak = in_python(TRAIN.format(times=40)).split()
    assert int(peak) < int(runs[1][1]) + 9_000  # KB; the text itself grew by 18,000


def test_progress_shows_in_a_terminal():
    pty = pytest.importorskip("pty")
    code = ("from bantam.text.trainbpe import train_bpe; train_bpe(['a bad cab'] * 99, 340, "
            "progress={})")
    shown = {}
    for progress in (True, False):
        read = []
        pty.spawn([sys.executable, "-W", "ignore", "-c", code.format(progress)],
                  lambda fd: read.append(os.read(fd, 4096)) or read[-1])
        shown[progress] = b"".join(read)
    assert b"Compute merges" in shown[True] and shown[False] == b""


def raw_bytes(spec):
    "No pattern: a whole text is one piece, and a piece that is in the vocabulary is one token."
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]
    spec["model"]["ignore_merges"] = True


DAMAGE = {
    "not special": (lambda s: s["added_tokens"][3].update(special=False),
                    "added to it without being special"),
    "merge": (lambda s: s["model"]["merges"].append(["<|EOS|", ">"]), "."),
    "whole pieces": (raw_bytes, r"text can spell <\|UNK"),
    "no pieces": (lambda s: s.update(pre_tokenizer=None), "does not cut text into its bytes"),
    "other model": (lambda s: s["model"].update(type="Unigram"), "cannot read"),
    "no space": (lambda s: s["model"]["vocab"].pop("Ġ"), "."),
    "no vocabulary": (lambda s: s["model"].pop("vocab"), "cannot read"),
    "gap": (lambda s: s["model"]["vocab"].update(extra=9999), "gaps"),
    "lost control": (lambda s: s["model"]["vocab"].pop("<|EXT1_END|>"), r"<\|EXT1_END\|> has id")}


@pytest.mark.parametrize("change, message", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_would_let_text_become_control_is_refused(change, message, tmp_path):
    path = made("shipped").save(tmp_path)/"tokenizer.json"
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))
    with pytest.raises(BantamError, match=message) as e: BantamTokenizer.load(tmp_path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
