"""Near-duplicates among 200,000 short documents: time, memory, and what is found, beside `datasketch` used by itself.

    python benchmarks/dedup.py [--quick] [--json FILE] [--documents N] [--workers N]

The documents (about 100 words each, three in a hundred of them copies with a few words changed) are written to a file first, untimed. Then each
contender runs in a process of its own, so that its memory is its own:

- bantam: signatures in worker processes, `Deduplicator.seen` in one; the time is from the first line read to the last answer.
- datasketch: the same shingles as strings, hashed one by one into its `MinHash`, then its `MinHashLSH` alone, in one process. It takes a part of the documents.
- one worker: bantam without worker processes on the same part, for the comparison.

Memory is the peak of the process and of its workers together. The last line is one JSON object; every ratio is budget over use, so that 1 meets it.
"""
import argparse, importlib.util, json, os, random, re, resource, subprocess, sys, tempfile, time

from _common import machine, report, versions

BUDGET = dict(seconds=180, memory_mb=2048, recall=.95, precision=.99)
TARGETS = {"time in 3 minutes": 1.0, "memory in 2 GB": 1.0, "recall over 95 %": 1.0,
           "precision over 99 %": 1.0}
WORDS = [f"{a}{b}{c}" for a in ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu")
         for b in ("n", "r", "st", "ll", "nd", "ck") for c in ("a", "er", "ing", "o", "y", "ed")]


def write_documents(path, n, seed=0):
    """One document a line, `number of its group` and text; three in a hundred are copies with a few
    words changed, dropped or doubled."""
    rng, recent = random.Random(seed), []
    with open(path, "w") as f:
        for i in range(n):
            if recent and rng.random() < .03:
                group, text = rng.choice(recent)
                w = text.split()
                for k in rng.sample(range(len(w)), max(1, len(w)//60)):
                    w[k] = rng.choice((rng.choice(WORDS), "", f"{w[k]} {w[k]}"))
                text = " ".join(w)
            else:
                group, text = i, " ".join(rng.choices(WORDS, k=rng.randint(60, 140)))
                if len(recent) < 5000: recent.append((group, text))
                elif rng.random() < .1: recent[rng.randrange(5000)] = (group, text)
            f.write(f"{group}\t{text}\n")


# Inside a contender's process

def lines(path, n):
    with open(path) as f:
        for i, line in zip(range(n), f): yield line.rstrip("\n").split("\t", 1)


def by_bantam(path, n, workers):
    "Signatures of batches in the workers, a few batches ahead; answers in order."
    from collections import deque
    from concurrent.futures import ProcessPoolExecutor
    from itertools import islice
    from multiprocessing import get_context
    from bantam.data.dedup import Deduplicator
    find, found, docs, k = Deduplicator(), [], lines(path, n), 0
    batches = iter(lambda: list(islice(docs, 500)), [])
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers else None
    def signed(batch):
        return pool.submit(signatures, [t for _, t in batch]) if pool else signatures(
            [t for _, t in batch])
    ahead = deque((b, signed(b)) for b in islice(batches, 2*workers + 1))
    while ahead:
        batch, made = ahead.popleft()
        if (more := next(batches, None)): ahead.append((more, signed(more)))
        for (group, _), sig in zip(batch, made.result() if pool else made):
            first = find.seen((k, group), sig)
            if first is not None: found.append((k, group, first[1]))
            k += 1
    if pool: pool.shutdown()
    return found, find.candidates


def signatures(texts):
    from bantam.data.dedup import signature
    return [signature(t) for t in texts]


def by_datasketch(path, n, workers):
    "What its documentation shows: a MinHash of each document, a query, an insertion."
    from datasketch import MinHash, MinHashLSH
    from bantam.data.dedup import bands_for
    index, groups, hashes, found, candidates = (MinHashLSH(num_perm=128, params=bands_for(.8)),
                                                {}, {}, [], 0)
    for k, (group, text) in enumerate(lines(path, n)):
        w = re.findall(r"\w+", text.lower())
        m = MinHash(num_perm=128)
        m.update_batch([" ".join(w[i:i+5]).encode() for i in range(max(1, len(w) - 4))])
        near = sorted(index.query(m))
        candidates += len(near)
        best = max(near, key=lambda j: m.jaccard(hashes[j]), default=None)
        if best is not None and m.jaccard(hashes[best]) >= .8:
            found.append((k, group, groups[best]))
        else: index.insert(k, m, check_duplication=False); groups[k], hashes[k] = group, m
    return found, candidates


def contender(name, path, n, workers):
    "Run once, print what came of it."
    start = time.perf_counter()
    found, candidates = (by_datasketch if name == "datasketch" else by_bantam)(path, n, workers)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            + workers*resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * unit / 2**20
    firsts, planted = set(), 0
    for group, _ in lines(path, n):
        planted += group in firsts
        firsts.add(group)
    right = sum(a == b for _, a, b in found)
    print(json.dumps(dict(name=name, documents=n, workers=workers, seconds=seconds, memory_mb=peak,
                          planted=planted, found=len(found), candidates=candidates,
                          recall=right/max(1, planted), precision=right/max(1, len(found)))))



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true",
                   help="a tenth of the documents, to see that it runs; budgets shrink with it")
    p.add_argument("--json", metavar="FILE", help="write the result, with every row, to FILE")
    p.add_argument("--documents", type=int, default=200_000)
    p.add_argument("--workers", type=int, default=2, help="processes that make signatures")
    p.add_argument("--contender", nargs=2, metavar=("NAME", "PATH"), help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender: return contender(*a.contender, a.documents, a.workers)

    n = a.documents // 10 if a.quick else a.documents
    part = min(n, 2_000 if a.quick else 20_000)
    missing = [m for m in ("datasketch",) if importlib.util.find_spec(m) is None]
    if missing: sys.exit("missing: datasketch, which the index is made of; pip install datasketch")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "documents.tsv")
        write_documents(path, n)
        rows = []
        for name, docs, workers in (("bantam", n, a.workers), ("one worker", part, 0),
                                    ("datasketch", part, 0)):
            done = subprocess.run([sys.executable, __file__, "--contender", name, path,
                                   "--documents", str(docs), "--workers", str(workers)],
                                  capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))

    about, (ours, alone, peer) = machine(), rows
    print(f"{n} documents; {about['processor']}, {about['cores']} cores\n")
    print(f"{'contender':12s} {'documents':>9s} {'workers':>7s} {'seconds':>8s} {'docs/s':>8s} "
          f"{'MB':>6s} {'planted':>8s} {'found':>6s} {'recall':>7s} {'precision':>9s} "
          f"{'candidates':>10s}")
    for r in rows:
        print(f"{r['name']:12s} {r['documents']:9d} {r['workers']:7d} {r['seconds']:8.1f} "
              f"{r['documents']/r['seconds']:8.0f} {r['memory_mb']:6.0f} {r['planted']:8d} "
              f"{r['found']:6d} "
              f"{r['recall']:7.2%} {r['precision']:9.2%} {r['candidates']:10d}")
    # the time budget is for 200,000; memory has a part that does not grow, so it is held against
    # the whole budget
    share = n / 200_000
    ratios = {"time in 3 minutes": BUDGET["seconds"]*share/ours["seconds"],
              "memory in 2 GB": BUDGET["memory_mb"]/ours["memory_mb"],
              "recall over 95 %": ours["recall"]/BUDGET["recall"],
              "precision over 99 %": ours["precision"]/BUDGET["precision"],
              "beside datasketch": peer["seconds"]/alone["seconds"]}
    ratios = {k: round(v, 3) for k, v in ratios.items()}
    print()
    for k, v in ratios.items():
        print(f"{k:20s} {v:.2f}" + (
            f", target {TARGETS[k]:g}" if k in TARGETS else " times as fast in one process"))
    result = dict(name="dedup", ratios=ratios, targets=TARGETS,
                  met=all(ratios[k] >= t for k, t in TARGETS.items()), machine=about,
                  versions=versions("numpy", "datasketch"))
    report(result, a.json, rows=rows, quick=a.quick)


if __name__ == "__main__": main()
