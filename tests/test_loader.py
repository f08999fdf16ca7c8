"""What a cell cannot say about packing and loading: any corpus, any number of ranks, any moment of
a kill."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bantam.core import sha256_file
from bantam.data.loader import IGNORE, BlockDataset, Loader
from bantam.data.order import order_key, permute
from bantam.data.pack import Shards, pack_rows, write_shards
from bantam.data.rows import DocumentDataset, RowDataset, Sample

ROOT = Path(__file__).parent.parent
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


class Vocabulary:
    "All that shards ask of a tokenizer."
    vocab_size, fingerprint = 1000, "0"*64


class Numbers:
    "A dataset whose rows are their own numbers."
    fingerprint = "numbers"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def batch(self, rows): return list(rows)
    def plan(self, rows): return lambda a, b: list(rows[a:b])


# --- the order ------------------------------------------------------------------------------------

@settings(max_examples=300)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64-1))
def test_permute_is_a_permutation(n, key):
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


@settings(max_examples=50)
@given(n=st.integers(10**6, 2**62), key=st.integers(0, 2**64-1), seed=st.integers(0, 99))
def test_permute_of_any_size_never_meets(n, key, seed):
    places = np.unique(np.random.default_rng(seed).integers(0, n, 500))
    found = permute(places, n, key)
    assert len(set(found.tolist())) == len(places) and found.min() >= 0 and found.max() < n


@settings(max_examples=120)
@given(n=st.integers(1, 400), B=st.integers(1, 9), W=st.integers(1, 5), seed=st.integers(0, 2**40),
       shuffle=st.booleans(), resume=st.integers(0, 40))
def test_an_epoch_is_every_sample_once(n, B, W, seed, shuffle, resume):
    """For any batch size, number of ranks and resume point; the ranks together read what one
    process would."""
    make = lambda r=0, W=W, B=B: Loader(Numbers(n), B, seed=seed, shuffle=shuffle, rank=r,
                                        world_size=W)
    ranks = [make(r) for r in range(W)]
    steps = max(resume+1, 2*ranks[0].batches_per_epoch)
    line = [x for i in range(steps) for r in ranks for x in r.batch(i)]
    for e in range(len(line)//n): assert sorted(line[e*n:(e+1)*n]) == list(range(n))
    assert line == [x for i in range(steps) for x in make(W=1, B=B*W).batch(i)]
    fresh = [make(r) for r in range(W)] # a run that goes on knows only its step
    assert [x for i in range(resume, steps) for r in fresh for x in r.batch(i)] == line[resume*B*W:]
    # iterating: one epoch, nothing twice
    assert sorted(x for r in ranks for b in r for x in b) == list(range(n))


@settings(max_examples=40)
@given(n=st.integers(1, 200), B=st.integers(1, 9), W=st.integers(1, 3),
       workers=st.sampled_from([1, 4]), keep=st.booleans(), resume=st.integers(0, 30))
def test_workers_change_nothing(n, B, W, workers, keep, resume):
    """For any number of ranks and any point to go on from, workers give the batches that one
    process makes."""
    for r in range(W):
        alone = Loader(Numbers(n), B, seed=n, rank=r, world_size=W)
        helped = Loader(Numbers(n), B, seed=n, rank=r, world_size=W, num_workers=workers,
                        persistent_workers=keep)
        steps = range(resume, resume + 2*len(alone) + 3)
        assert [helped.batch(i) for i in steps] == [alone.batch(i) for i in steps]
        assert list(helped) == list(alone)
        helped.close()


def test_long_runs_cross_the_planned_part():
    "The order is planned some thousand rows ahead; the seam must not show."
    loader, n = Loader(Numbers(1001), 7, seed=3), 1001
    steps = 3*8192//7
    line = [x for i in range(steps) for x in loader.batch(i)]
    keys = order_key(3, np.arange(len(line))//n)
    assert line == permute(np.arange(len(line)) % n, n, keys).tolist()
    # in any order
    assert all(loader.batch(i) == line[7*i:7*i+7]
               for i in random.Random(0).sample(range(steps), 50))


# --- rows -----------------------------------------------------------------------------------------

DOCS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def numbered(lengths):
    "Documents in which every token tells which document it is of and where it stands."
    return [[(37*d + 11*p) % 1000 for p in range(n)] for d, n in enumerate(lengths)]


@settings(max_examples=100)
@given(lengths=DOCS, T=st.integers(2, 50), most=st.integers(2, 400), seed=st.integers(0, 9))
def test_blocks_are_the_stream(tmp_path_factory, lengths, T, most, seed):
    "Against a walk over the documents, token by token."
    folder = tmp_path_factory.mktemp("shards")/"s"
    docs = numbered(lengths)
    write_shards(docs, folder, Vocabulary, max_shard_tokens=most)
    shards = Shards(folder, Vocabulary)
    expected, d = [], 0
    for starts in shards.starts:
        stream = [(d+k, p, i) for k in range(len(starts)) for p, i in enumerate(docs[d+k])]
        d += len(starts)
        for r in range((len(stream)-1)//T):
            row, after = stream[r*T:(r+1)*T], stream[r*T+1:(r+1)*T+1]
            expected.append(([i for _, _, i in row],
                             [i if a[0] == b else IGNORE for a, (b, _, i) in zip(row, after)],
                             [b for b, _, _ in row],
                             [p - row[0][1]*(b == row[0][0]) for b, p, _ in row]))
    if not expected: return
    ds = BlockDataset(shards, T)
    assert len(ds) == len(expected)
    rows = np.random.default_rng(seed).permutation(len(ds))
    got = ds.batch(rows)
    for k, r in enumerate(rows):
        x, y, doc, pos = expected[r]
        assert ((got.x_BT[k].tolist(), got.y_BT[k].tolist(), got.position_ids[k].tolist())
                == (x, y, pos))
        ids = got.document_ids[k].numpy()
        assert np.array_equal(ids[:, None] == ids, np.array(doc)[:, None] == np.array(doc))
    read = ds.plan(rows) # any slice of a plan is the batch of its rows
    a, b = sorted(np.random.default_rng(seed).integers(0, len(rows)+1, 2).tolist())
    if a < b: assert all((u == v).all() for u, v in zip(read(a, b)[:2], ds.batch(rows[a:b])[:2]))


@settings(max_examples=150)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=50), T=st.integers(30, 64),
       packing=st.booleans(), seed=st.integers(0, 99))
def test_dialogues_stay_whole(lengths, T, packing, seed):
    rng = random.Random(seed)
    weights = [[0.]+[float(rng.random() < .5) for _ in range(n-2)]+[1.] for n in lengths]
    samples = [Sample(ids, w) for ids, w in zip(numbered(lengths), weights)]
    ds, found = RowDataset(samples, T, packing=packing), []
    for r in range(len(ds)):
        x, y, _, doc, pos = (None if v is None else v[0].numpy() for v in ds.batch([r]))
        for k in sorted(set(doc[doc >= 0].tolist())):
            at = np.flatnonzero(doc == k)
            assert ((np.diff(at) == 1).all() and pos[at].tolist() == list(range(len(at)))
                    and y[at[-1]] == IGNORE)
            asked = y[at[:-1]] != IGNORE
            assert (y[at[:-1]][asked] == x[at[1:]][asked]).all()
            found.append((x[at].tolist(), [0., *asked.astype(float).tolist()]))
        pad = doc < 0
        assert ((y[pad] == IGNORE).all() and (x[pad] == ds.pad_id).all()
                and not pad[:-1][~pad[1:]].any())
    assert sorted(found) == sorted((s.ids, s.weights) for s in samples)


@settings(max_examples=60)
@given(lengths=DOCS, T=st.integers(9, 50), most=st.integers(40, 400), least=st.integers(2, 9),
       window=st.integers(1, 80))
def test_documents_never_straddle_rows(tmp_path_factory, lengths, T, most, least, window):
    """Best fit: each document stands in one row, rows start where documents start, and the account
    adds up."""
    docs, folder = numbered(lengths), tmp_path_factory.mktemp("shards")/"s"
    write_shards(docs, folder, Vocabulary, max_shard_tokens=most)
    kept = [d for d in docs if len(d) >= least]
    if not kept: return
    ds, found = DocumentDataset(Shards(folder), T, min_sample_token_length=least, window=window), []
    for r in range(len(ds)):
        x, y, _, doc, pos = (None if v is None else v[0].numpy() for v in ds.batch([r]))
        assert doc[0] >= 0 and pos[0] == 0
        for k in sorted(set(doc[doc >= 0].tolist())):
            at = np.flatnonzero(doc == k)
            assert pos[at].tolist() == list(range(len(at))) and (y[at[:-1]] == x[at[1:]]).all()
            found.append(x[at].tolist() + [t for t in [int(y[at[-1]])] if t != IGNORE])
        assert (y[doc < 0] == IGNORE).all()
    assert sorted(found) == sorted(d[:T+1] for d in kept)
    assert ds.kept == sum(min(len(d), T) for d in kept) and ds.short == len(docs) - len(kept)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """12,800 rows of a 4 GB sparse file and of a small one: the process stays within 300 MB of the
    same size."""
    run = ("import sys, numpy as np, torch; torch.set_num_threads(1)\nfrom bantam.runtime import "
           "peak_memory\nfrom bantam.data.loader import BlockDataset, Loader\n"
           "f, n = sys.argv[1], int(sys.argv[2])//2\nopen(f, 'wb').truncate(2*n)\n"
           "class S: arrays, starts, tokens, fingerprint, folder = [np.memmap(f, '<u2', 'r', "
           "shape=(n,))], [np.arange(0, n, 10**5)], n, 'x', 'x'\n"
           "L = Loader(BlockDataset(S, 512), 32)\nfor i in range(400): "
           "L.batch(i)\nprint(peak_memory())")
    peak = [int(subprocess.run([sys.executable, "-c", run, str(tmp_path/"x.bin"), str(size)],
                               capture_output=True, text=True, check=True, cwd=ROOT).stdout)
            for size in (2**22, 2**32)]
    assert peak[1] - peak[0] < 300*2**20


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(1, 64), max_size=200))
def test_packing_is_near_the_bound(lengths):
    rows = pack_rows(lengths, 64)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in r) <= 64 for r in rows)
    assert len(rows) <= 11/9*max(-(-sum(lengths)//64), sum(n > 32 for n in lengths)) + 1


# --- a kill while shards are written --------------------------------------------------------------

WRITER = """
import random, sys, time
from bantam.data.pack import write_shards
class Vocabulary: vocab_size, fingerprint = 1000, "0"*64
def documents():
    rng = random.Random(int(sys.argv[2]))
    for n in range(3000):
        if n == 10: print("writing", flush=True)
        yield [rng.randrange(1000) for _ in range(rng.randrange(2, 100))]
write_shards(documents(), sys.argv[1], Vocabulary, max_shard_tokens=5000)
"""


def hashes(folder): return {p.name: sha256_file(p) for p in folder.iterdir()}


def start_writer(out, seed):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(out), str(seed)], cwd=ROOT,
                            stdout=subprocess.PIPE)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_writer_leaves_old_or_new(tmp_path):
    """At whatever moment it is killed, the folder is the old one or the new one, whole; a rerun
    gives the same bytes."""
    for seed, name in ((1, "old"), (2, "new")): assert start_writer(tmp_path/name, seed).wait() == 0
    old, new = hashes(tmp_path/"old"), hashes(tmp_path/"new")
    (tmp_path/"old").rename(tmp_path/"out")
    rng, seen = random.Random(0), set()
    for turn in range(8):
        p = start_writer(tmp_path/"out", 2)
        p.stdout.readline()
        time.sleep(rng.random() * .02*turn)  # the first at once, then later and later
        p.kill(); p.wait(); p.stdout.close()
        found = hashes(tmp_path/"out")
        assert found in (old, new)
        Shards(tmp_path/"out", Vocabulary)
        seen.add(found == new)
    assert False in seen, "no kill came before the end"
    assert start_writer(tmp_path/"out", 2).wait() == 0
    assert hashes(tmp_path/"out") == new


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    from bantam.core import BantamError
    from bantam.data import pack
    write_shards(numbered([5, 6]), tmp_path/"s", Vocabulary)
    before = hashes(tmp_path/"s")
    monkeypatch.setattr(pack, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    with pytest.raises(BantamError, match="No space left on device; nothing was kept"):
        write_shards(numbered([40]*2000), tmp_path/"s", Vocabulary)
    monkeypatch.undo()
    assert hashes(tmp_path/"s") == before and [p.name for p in tmp_path.iterdir()] == ["s"]
