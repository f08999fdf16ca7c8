"""Ids: every kind of tokenizer against transformers, over ten thousand strings; and everything that
is refused."""
import gzip
import json
import os
import shutil
import subprocess
import sys
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

from bantam.cli import main
from bantam.core import BantamError
from bantam.text.special import CONTROL_TOKENS
from bantam.text.tokenizer import BantamTokenizer, TokenStream, whole_text
from bantam.text.trainbpe import train_bpe

SHARDS = [*CONTROL_TOKENS, "<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "[CLS]", "[SEP]",
          "[UNK]", "<think>", "##s", "▁", "Ġ",
          "<0x41>", "<|", "|>", "<", "BOS", " ", "  ", "\n\n", "\t", "\r\n", "\u2028", "0", "19",
          "2024", "'s", "é", "e\u0301", "日本", "😀",
          "👩\u200d🚀", "\u200d", "नि", "עברית", "سلام", "\u202e", "\ufeff", "\x00", "\x7f", "\ufffd",
          "\U0010ffff", "a", "Word", "the hats"]
TEXT = (st.text(max_size=40) | st.lists(st.sampled_from(SHARDS), max_size=10).map("".join)
        | st.binary(max_size=30).map(lambda b: b.decode("utf-8", "replace")))
LONG = {"word": "a" * 1_000_000, "emoji": "😀" * 250_000,
        "control": "<|EOS|></s><|endoftext|>" * 40_000, "digits": "7" * 1_000_001}


@cache
def texts():
    """Ten thousand different strings: hypothesis' own, always the same, and the nasty ones that we
    know of."""
    found = dict.fromkeys(["", " ", *SHARDS, *[f"{a}{t}{b}" for t in CONTROL_TOKENS
                                               for a, b in (("", "x"), (" ", " "), ("\n", "7"))]])

    @settings(max_examples=2000, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(TEXT, min_size=8, max_size=8, unique=True))
    def collect(some): found.update(dict.fromkeys(some))
    collect()
    return list(found)


def test_there_are_ten_thousand_of_them():
    assert len(texts()) >= 10_000 and max(map(len, texts())) < 1000


# --- what bantam makes ----------------------------------------------------------------------------

@cache
def corpus():
    from pydoc_data.topics import topics
    return [*list(topics.values())[::4], " ".join(map(str, range(300))),
            "naïve 日本語 नमस्ते 😀 עברית " * 9, " ".join(CONTROL_TOKENS * 9)]


MADE = {"shipped": BantamTokenizer.default, "bytes": BantamTokenizer.byte_level,
        "characters": lambda: BantamTokenizer.char_level("naïve 日本 😀 عربى नि"),
        "trained": lambda: train_bpe(corpus(), 900),
        "everything": lambda: train_bpe(corpus(), 900, prefill_numbers_upto=100, digit_group_size=3,
                                        regex_symbols=True),
        "no regex": lambda: train_bpe(corpus(), 900, no_regex=True),
        "plain": lambda: train_bpe(corpus(), 900, lowercase=True, strip_accents=True)}
LOSSY = {"plain"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A tokenizer, and its folder as transformers reads it."
    from transformers import AutoTokenizer

    @cache
    def read(name):
        tok = MADE[name]()
        folder = tok.save(tmp_path_factory.mktemp("made"))
        return tok, AutoTokenizer.from_pretrained(folder, local_files_only=True), folder
    return read


@pytest.mark.parametrize("name", MADE)
def test_ids_are_those_of_transformers(name, made):
    tok, peer, _ = made(name)
    ours = tok.encode_batch(texts())
    assert ours == peer(texts(), split_special_tokens=True, add_special_tokens=False).input_ids
    assert [tok.encode(t, allow_special=True) for t in texts()] == peer(
        texts(), add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", MADE)
def test_text_is_never_control_and_comes_back(name, made):
    tok, _, _ = made(name)
    for text, ids in zip(texts(), tok.encode_batch(texts())):
        assert min(ids, default=78) >= 78, text
        if name not in LOSSY: assert tok.decode(ids) == text


@pytest.mark.parametrize("name", MADE)
def test_a_loaded_one_is_the_same(name, made):
    tok, _, folder = made(name)
    again = BantamTokenizer.load(folder)
    assert (again.fingerprint, again.vocab_size, again.roles) == (
        tok.fingerprint, tok.vocab_size, None)
    assert list(again.encode_iterable(iter(texts()))) == tok.encode_batch(texts())
    assert [again.encode(t) for t in SHARDS] == [tok.encode(t) for t in SHARDS]


@pytest.mark.parametrize("name", ["shipped", "bytes", "characters"])
@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_megabyte(name, text, made):
    tok, peer, _ = made(name)
    ids = tok.encode(text)
    assert min(ids) >= 78 and tok.decode(ids) == text
    assert peer(text, split_special_tokens=True, add_special_tokens=False).input_ids == ids


def test_bytes_and_characters_are_what_they_say():
    by_byte, by_char = MADE["bytes"](), MADE["characters"]()
    known = {c: 334 + k for k, c in enumerate(
        sorted(c for c in set("naïve 日本 😀 عربى नि") if ord(c) > 127))}
    assert (by_byte.vocab_size, by_char.vocab_size) == (334, 334 + len(known))
    for text in texts():
        assert by_byte.encode(text) == [78 + b for b in text.encode()]
        assert by_char.encode(text) == [
            i for c in text for i in ([known[c]] if c in known else [78 + b for b in c.encode()])]


@pytest.mark.parametrize("name", MADE)
def test_broken_text_shows(name, made):
    tok, _, _ = made(name)
    for text in ("\ud83d", "a\udc00b", "\ud83d\ude00", "x\udfff" * 9):
        assert tok.encode(text) == tok.encode(whole_text(text)) == tok.encode_batch([text])[0]
    ids = [i for i in tok.encode("日本")]
    assert "\ufffd" in tok.decode([78 + 0xe6]) and tok.decode([78 + 0xff]) == "\ufffd"
    if name not in LOSSY: assert tok.decode(ids) == "日本"


# --- what others made -----------------------------------------------------------------------------

def gpt():
    "Byte-level, one control token for everything, as GPT-2."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = (pre_tokenizers.ByteLevel(add_prefix_space=False),
                                      decoders.ByteLevel())
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok, dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                     unk_token="<|endoftext|>")


def qwen():
    "Byte-level, with tokens that only the template shows to be control, and ordinary added ones."
    tok, _ = gpt()
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tok.add_tokens([AddedToken("<think>", normalized=False), AddedToken("\n\n", normalized=False)])
    return tok, dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")


@cache
def t5_file():
    "What `t5` learned, as text: learning takes seconds."
    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.train_from_iterator(
        corpus()[::4], trainers.UnigramTrainer(vocab_size=300,
                                               special_tokens=["<pad>", "</s>", "<unk>"],
                                               unk_token="<unk>", initial_alphabet=list("</s>pad"),
                                               show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single="$A </s>",
                                                       special_tokens=[("</s>", 1)])
    return tok.to_str()


def t5():
    "SentencePiece by likelihood; control tokens are ordinary pieces of it."
    return Tokenizer.from_str(t5_file()), dict(eos_token="</s>", pad_token="<pad>",
                                               unk_token="<unk>")


def llama():
    "SentencePiece by pairs, with bytes for what it does not know."
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "h"), ("a", "t"), ("▁h", "at"), ("i", "n"),
             ("<", "/"), ("s", ">"), ("</", "s>")]
    names = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], "▁",
             *"abcdefghijklmnopqrstuvwxyz<>/|", *[a + b for a, b in pairs]]
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(dict.fromkeys(names))}, pairs,
                               unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tok, dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def bert():
    "WordPiece."
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer, tok.decoder = (normalizers.BertNormalizer(),
                                                      pre_tokenizers.BertPreTokenizer(),
                                                      decoders.WordPiece(cleanup=False))
    tok.train_from_iterator(corpus(), trainers.WordPieceTrainer(
        vocab_size=700, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False))
    return tok, dict(sep_token="[SEP]", cls_token="[CLS]", pad_token="[PAD]", unk_token="[UNK]")


FOREIGN = dict(gpt=gpt, qwen=qwen, t5=t5, llama=llama, bert=bert)
ROLES = dict(gpt=["<|endoftext|>"] * 4, qwen=["<|im_end|>", "<|im_end|>", "<|endoftext|>",
                                              "<|endoftext|>"],
             t5=["</s>", "</s>", "<pad>", "<unk>"],
             llama=["<s>", "</s>", "</s>", "<unk>"], bert=["[CLS]", "[SEP]", "[PAD]", "[UNK]"])
LEAKY = {"t5", "llama"}  # their control tokens can be built from text, whatever the switch says


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    "A foreign folder, written by transformers: as bantam reads it, and as transformers does."
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    @cache
    def read(name):
        tok, roles = FOREIGN[name]()
        folder = tmp_path_factory.mktemp(name)
        theirs = PreTrainedTokenizerFast(tokenizer_object=tok, **roles)
        if name == "qwen": theirs.chat_template = "{{ '<|im_start|>assistant\\n<think>' }}"
        theirs.save_pretrained(folder)
        return (BantamTokenizer.from_hf(folder),
                AutoTokenizer.from_pretrained(folder, local_files_only=True), folder)
    return read


@pytest.mark.filterwarnings("ignore:this vocabulary cannot write")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_vocabulary_keeps_its_ids_and_its_control(name, foreign):
    tok, peer, _ = foreign(name)
    ours, theirs = tok.encode_batch(texts()), peer(texts(), split_special_tokens=True,
                                                   add_special_tokens=False).input_ids
    bad, leaks, same = set(tok.control.values()) - (
        {tok.unk_id} if name in ("t5", "llama", "bert") else set()), 0, 0
    for text, a, b in zip(texts(), ours, theirs):
        assert bad.isdisjoint(a), text
        if bad.isdisjoint(b): assert a == b, text; same += 1
        else: leaks += 1
    assert same >= 10_000 and (leaks > 0) == (name in LEAKY or name == "qwen")
    assert [peer.convert_tokens_to_ids(t) for t in ROLES[name]] == [
        tok.bos_id, tok.eos_id, tok.pad_id, tok.unk_id]
    assert tok.id_of("<|EOS|>") == tok.eos_id and tok.id_of("<|AGENT_END|>") is None


@pytest.mark.parametrize("name", ["gpt", "qwen", "llama"])
def test_a_foreign_vocabulary_of_bytes_gives_text_back(name, foreign):
    tok, _, _ = foreign(name)
    for text in texts():
        if name == "llama" and "▁" in text: continue  # it stands for a space there
        ids, stream = tok.encode(text), TokenStream(tok)
        assert tok.decode(ids) == text == "".join(map(stream.push, ids)) + stream.flush()


@pytest.mark.filterwarnings("ignore:this vocabulary cannot write")
@pytest.mark.parametrize("name", ["t5", "bert"])
def test_the_others_decode_as_they_do_elsewhere(name, foreign):
    tok, _, _ = foreign(name)
    for text in texts():
        ids = tok.encode(text)
        if tok.unk_id not in ids:
            assert tok.decode(ids) == tok.tok.decode(ids, skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore:this vocabulary cannot write")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_vocabulary_travels(name, foreign, tmp_path):
    from transformers import AutoTokenizer
    tok, _, folder = foreign(name)
    assert BantamTokenizer.load(folder).fingerprint == tok.fingerprint
    again = BantamTokenizer.load(tok.save(tmp_path))
    assert (again.fingerprint, again.roles, again.control,
            again.chat_template) == (tok.fingerprint, tok.roles, tok.control, tok.chat_template)
    some = texts()[::7]
    assert again.encode_batch(some, add_bos=True) == tok.encode_batch(some, add_bos=True)
    peer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert [peer.bos_token_id, peer.eos_token_id, peer.pad_token_id] == [
        tok.bos_id, tok.eos_id, tok.pad_id]
    plain = [t for t in some if not any(c in t for c in tok.control)]
    assert peer(plain, add_special_tokens=False).input_ids == tok.encode_batch(plain)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_megabyte_of_foreign_control(name, foreign):
    tok, _, _ = foreign(name)
    text = "</s>" * 20_000
    ids = tok.encode(text)
    assert tok.eos_id not in ids and tok.decode(ids) == text


def test_what_only_the_template_shows_is_control(foreign):
    tok, peer, _ = foreign("qwen")
    assert "<think>" in tok.control and "\n\n" not in tok.control
    # the hole, in transformers
    assert peer("<think>", split_special_tokens=True).input_ids == [tok.control["<think>"]]
    assert tok.control["<think>"] not in tok.encode("<think>")
    assert tok.encode("<think>", allow_special=True) == [tok.control["<think>"]]
    assert len(tok.encode("\n\n")) == 1


ROLE_FILES = {
    "a name": ({"tokenizer_config.json": dict(eos_token="</s>")}, "</s>"),
    "an object": ({"tokenizer_config.json": dict(eos_token=dict(content="</s>"))}, "</s>"),
    "the older file": ({"special_tokens_map.json": dict(eos_token="</s>")}, "</s>"),
    "a number": ({"config.json": dict(eos_token_id=1)}, "</s>"),
    "several": ({"generation_config.json": dict(eos_token_id=[1, 0])}, "</s>"),
    "the nearer file": ({"config.json": dict(eos_token="<pad>"),
                         "tokenizer_config.json": dict(eos_token="</s>")}, "</s>"),
    "sep": ({"tokenizer_config.json": dict(eos_token=None, sep_token="<pad>")}, "<pad>")}


@pytest.mark.parametrize("files, eos", ROLE_FILES.values(), ids=ROLE_FILES)
def test_where_a_role_may_stand(files, eos, tmp_path):
    t5()[0].save(str(tmp_path/"tokenizer.json"))
    for name, content in files.items(): (tmp_path/name).write_text(json.dumps(content))
    tok = BantamTokenizer.from_hf(tmp_path)
    assert tok.decode([tok.eos_id]) == eos


# --- what is refused when it is loaded ------------------------------------------------------------

def edit(file, change):
    spec = json.loads(file.read_text())
    change(spec)
    file.write_text(json.dumps(spec))


def whole_tokens(spec):
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]
    spec["model"]["ignore_merges"] = True


UNLOADABLE = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "a file": (lambda d: (shutil.rmtree(d), d.write_text("x")), "there is no folder"),
    "empty folder": (lambda d: (d/"tokenizer.json").unlink(), "give a folder with a tokenizer"),
    "empty file": (lambda d: (d/"tokenizer.json").write_text(""), "is not JSON"),
    "binary": (lambda d: (d/"tokenizer.json").write_bytes(b"\x80\x00\xff"), "cannot read"),
    "cut off": (lambda d: (d/"tokenizer.json").write_bytes(
        (d/"tokenizer.json").read_bytes()[:9999]), "is not JSON"),
    "a list": (lambda d: (d/"tokenizer.json").write_text("[]"), "holds no JSON object"),
    "another object": (lambda d: (d/"tokenizer.json").write_text("{}"), "save it again"),
    "settings are no object": (lambda d: (d/"tokenizer_config.json").write_text("3"),
                               "holds no JSON object"),
              "settings are damaged": (lambda d: (d/"tokenizer_config.json").write_text("{"),
                                       "tokenizer_config.json line 1 is not JSON"),
    "report is damaged": (lambda d: (d/"bpe_training_args.json").write_text("nan nan"),
                          "is not JSON"),
    "lost control": (lambda d: edit(d/"tokenizer.json",
                                    lambda s: s["model"]["vocab"].pop("<|EXT1_END|>")), "EXT1_END"),
    "moved control": (lambda d: edit(d/"tokenizer.json",
                                     lambda s: s["model"]["vocab"].update(
                                         {"<|BOS|>": 3, "<|EOS|>": 2})), "BOS"),
    "a merge to control": (lambda d: edit(
        d/"tokenizer.json", lambda s: s["model"]["merges"].append(["<|EOS|", ">"])), "."),
    "control by whole pieces": (lambda d: edit(d/"tokenizer.json", whole_tokens), "text can spell"),
    "control that is not special": (lambda d: edit(d/"tokenizer.json",
                                                   lambda s: s["added_tokens"][3].update(
                                                       special=False)), "without being special"),
    "a word that is added": (lambda d: edit(d/"tokenizer.json",
                                            lambda s: s["added_tokens"].append(
                                                s["added_tokens"][0]
                                                | dict(content="hat", id=334, special=False))),
                             "without being special"),
    "lost byte": (lambda d: edit(d/"tokenizer.json", lambda s: s["model"]["vocab"].pop("Ġ")), "."),
    "gap": (lambda d: edit(d/"tokenizer.json", lambda s: s["model"]["vocab"].update(extra=9999)),
            "gaps"),
    "no cuts": (lambda d: edit(d/"tokenizer.json", lambda s: s.update(pre_tokenizer=None)),
                "does not cut"), "dropout": (lambda d: edit(
                    d/"tokenizer.json", lambda s: s["model"].update(dropout=.1)), "dropout"),
    "another model": (lambda d: edit(d/"tokenizer.json",
                                     lambda s: s["model"].update(type="Unigram")), "cannot read"),
              "no vocabulary": (lambda d: edit(d/"tokenizer.json",
                                               lambda s: s["model"].pop("vocab")), "cannot read")}


@pytest.mark.parametrize("change, message", UNLOADABLE.values(), ids=UNLOADABLE)
def test_a_damaged_folder_is_refused(change, message, tmp_path):
    folder = BantamTokenizer.byte_level().save(tmp_path/"tok")
    change(folder)
    with pytest.raises(BantamError, match=message) as e: BantamTokenizer.load(folder)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


FOREIGN_BAD = {
    "no end": (lambda d: (d/"tokenizer_config.json").write_text("{}"), {},
               "names no token that ends a document"),
    "an end that is not there": (lambda d: (d/"tokenizer_config.json").write_text(
        '{"eos_token": "<end>"}'), {}, "'<end>' is not in the vocabulary"),
    "an end of a wrong kind": (lambda d: (d/"tokenizer_config.json").write_text('{"eos_token": 5}'),
                               {}, "not in the vocabulary"),
    "a role of another name": (lambda d: None, dict(end="</s>"), "no role is called 'end'"),
    "a role of nothing": (lambda d: None, dict(bos="<begin>"), "the bos token '<begin>'"),
    "damaged": (lambda d: (d/"tokenizer.json").write_bytes(
        (d/"tokenizer.json").read_bytes()[:3000]), {}, "is not JSON"),
    "an old file that is none": (lambda d: ((d/"tokenizer.json").unlink(),
                                            (d/"tokenizer.model").write_bytes(b"x")), {},
                                 "save it as a fast tokenizer")}


@pytest.mark.parametrize("change, roles, message", FOREIGN_BAD.values(), ids=FOREIGN_BAD)
def test_a_foreign_folder_is_refused(change, roles, message, tmp_path):
    t5()[0].save(str(tmp_path/"tokenizer.json"))
    (tmp_path/"tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    change(tmp_path)
    with pytest.raises(BantamError, match=message): BantamTokenizer.from_hf(tmp_path, **roles)


# --- what trainbpe refuses ------------------------------------------------------------------------

def unreadable(path):
    "A file that nobody may read, root included."
    if os.getuid(): path.write_text("x"); path.chmod(0)
    else: path.symlink_to("/proc/self/mem")


def put(name, content):
    def write(d):
        (d/name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [d/name]
    return write


def no_permission(d): unreadable(d/"a.txt"); return [d/"a.txt"]


LINES = '{"text": "one"}\n{"text": "two"}\n'
GOOD = put("good.txt", "the hats of the fathers " * 9)
BAD = {
    "missing file": (lambda d: [d/"none.txt"], [], "none.txt does not exist"),
    "empty file": (put("a.txt", ""), [], "a.txt is empty"),
    "empty packed file": (put("a.txt.gz", gzip.compress(b"")), [], "a.txt.gz is empty"),
    "empty folder": (lambda d: [(d/"f").mkdir() or d/"f"], [], "f holds no .txt"),
    "unknown kind": (put("a.docx", "x"), [], "kind '.docx' is not read"),
    "no ending": (put("README", "x"), [], "is not read"),
    "zero byte": (put("a.txt", b"one\ntwo\n\0"), [], "a.txt:3 has a zero byte"),
    "binary": (put("a.txt", b"\x89PNG\r\n\xff"), [], "a.txt:1 is not UTF-8"),
    "Latin-1": (put("a.txt", "one\nd\u00e9j\u00e0".encode("latin-1")), [], "a.txt:2 is not UTF-8"),
    "malformed line": (put("a.jsonl", LINES + '{"text": "three"\n'), [], "a.jsonl:3 is not JSON"),
    "line of another type": (put("a.jsonl", LINES + "[1]\n"), [], "a.jsonl:3 is a list"),
    "missing field": (put("a.jsonl", LINES + '{"body": "x"}\n'), [],
                      "a.jsonl:3 has no field 'text', only body"),
    "wrong type": (put("a.jsonl", LINES + '{"text": 5}\n'), [], "a.jsonl:3 field 'text' is a int"),
    "null": (put("a.jsonl", '{"text": null}\n'), [], "a.jsonl:1 field 'text' is a NoneType"),
    "turns that are texts": (put("a.jsonl", '{"messages": ["Hi"]}\n'), [],
                             "a.jsonl:1 field 'messages' holds a str among its turns"),
    "half a pair": (put("a.jsonl", '{"text": "\\ud83d"}\n'), [],
                    "a.jsonl:1 holds half of a surrogate pair"),
    "other field": (put("a.jsonl", LINES), ["--text-field", "body"], "has no field 'body'"),
    "JSON that is no list": (put("a.json", '{"text": "one"}'), [], "a.json:1 is no list"),
    "JSON cut off": (put("a.json", '[{"text": "one"},\n{"text"'), [], "a.json:2 is not JSON"),
    "no gz": (put("a.txt.gz", "plain text"), [], "cannot unpack"),
    "gz cut off": (put("a.txt.gz", gzip.compress(os.urandom(9999))[:5000]), [], "cannot unpack"),
    "no zst": (put("a.jsonl.zst", "plain text"), [], "cannot unpack"),
    "no parquet": (put("a.parquet", "PAR1 and then nothing"), [], "is not parquet"),
    "no permission": (no_permission, [], "cannot read"),
    "no text at all": (put("a.jsonl", '{"text": ""}\n'), [], "no text in 1 records"),
    "second of two": (lambda d: [*GOOD(d), d/"none.txt"], [], "none.txt does not exist"),
    "too small": (GOOD, ["--vocab-size", "333"], "vocab_size 333 is too small"),
    "numbers that do not fit": (GOOD, ["--vocab-size", "400", "--prefill-numbers-upto", "100"],
                                "91 numbers take 425"),
       "no vocabulary": (GOOD, ["--vocab-size", "0"], "vocab_size must be"),
    "no group": (GOOD, ["--digit-group-size", "0"], "digit_group_size must be"),
    "negative numbers": (GOOD, ["--prefill-numbers-upto", "-1"], "prefill_numbers_upto must be"),
    "no frequency": (GOOD, ["--min-frequency", "0"], "min_frequency must be"),
    "no bytes": (GOOD, ["--max-bytes", "0"], "max_bytes must be"),
    "no memory": (GOOD, ["--memory-gb", "0"], "memory must be"),
    "unknown policy": (GOOD, ["--on-bad", "ignore"], "on_bad must be one of stop, skip"),
    "words for a number": (GOOD, ["--vocab-size", "many"], "--vocab-size"),
    "unknown option": (GOOD, ["--vocabsize", "500"], "vocabsize"),
    "no input": (lambda d: [], [], "--input is missing"),
    "out is a file": (GOOD, ["--vocab-size", "340"], "cannot make the folder")}


def test_there_are_thirty(): assert len(BAD) >= 30


@pytest.mark.filterwarnings("ignore:the texts hold only")
@pytest.mark.parametrize("name", BAD)
def test_trainbpe_refuses(name, tmp_path, capfd):
    prepare, words, message = BAD[name]
    out = tmp_path/"out"
    inputs = prepare(tmp_path)
    if name == "out is a file": out.write_text("mine")
    with pytest.raises(SystemExit) as e:
        main(["trainbpe", *[w for p in inputs for w in ("--input", str(p))], "--out",
              str(out), *words])
    said = capfd.readouterr().err.strip().splitlines()[-1].rpartition("\r")[2]
    assert e.value.code == 2 and said.startswith("bantam: ") and message in said, said
    assert out.read_text() == "mine" if name == "out is a file" else not out.exists()


@pytest.mark.filterwarnings("ignore:the texts hold only")
def test_trainbpe_skips_and_counts_when_told_so(tmp_path, capfd):
    folder = tmp_path/"in"
    folder.mkdir()
    put("a.jsonl", LINES + '{"text": "three"\n{"body": "x"}\n{"text": 5}\n{"text": ""}\n')(folder)
    put("b.txt.gz", "plain text")(folder)
    GOOD(folder)
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    import zstandard
    pq.write_table(pa.table(dict(text=["four", "five"], n=[1, 2])), folder/"c.parquet")
    put("d.json", json.dumps([dict(text="six")]))(folder)
    put("e.jsonl.zst", zstandard.compress(LINES.encode()))(folder)
    with pytest.raises(SystemExit) as e:
        main(["trainbpe", "--input", str(folder), "--out", str(tmp_path/"out"), "--vocab-size",
              "345", "--on-bad", "skip"])
    out, _ = capfd.readouterr()
    args = json.loads((tmp_path/"out/bpe_training_args.json").read_text())
    assert e.value.code == 0 and "1 records left out: not JSON" in out, out
    assert {k: n for k, n in args["skipped"].items() if n} == {
        "empty": 1, "not JSON": 1, "no field": 1, "wrong type": 1, "damaged archive": 1}
    assert {f["file"].rpartition("/")[2]: f["records"] for f in args["files"]} == {
        "a.jsonl": 3, "b.txt.gz": 0, "c.parquet": 2, "d.json": 1, "e.jsonl.zst": 2, "good.txt": 1}
    assert args["records"] == 9 and BantamTokenizer.load(tmp_path/"out").args == args


KILLED = """import os, signal, sys
import bantam.text.tokenizer as room
write = room.write_json
def last(path, content):
    if path.name == "special_tokens_map.json": os.kill(os.getpid(), signal.SIGKILL)
    return write(path, content)
room.write_json = last
from bantam.cli import main
main(sys.argv[1:])"""


@pytest.mark.filterwarnings("ignore:the texts hold only")
def test_trainbpe_killed_while_it_writes_leaves_no_half_folder(tmp_path):
    words = ["trainbpe", "--input", str(GOOD(tmp_path)[0]), "--out", str(tmp_path/"out"),
             "--vocab-size", "340"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, *words],
                          capture_output=True, text=True)
    assert done.returncode == -9 and not (tmp_path/"out").exists(), done.stderr
    for _ in range(2): # once more over the finished one: a folder that is there is written in place
        with pytest.raises(SystemExit) as e: main(words)
        assert e.value.code == 0
        assert BantamTokenizer.load(tmp_path/"out").args["files"][0]["records"] == 1
    subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, *words], capture_output=True)
    with pytest.raises(BantamError, match="give a folder with a tokenizer in it"):
        BantamTokenizer.load(tmp_path/"out")
