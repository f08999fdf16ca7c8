"""Learning a vocabulary and using it, beside the bare `tokenizers` and `tiktoken`: the same text, the same pattern, the same ids.

    python benchmarks/tokenizer.py [--quick] [--json FILE] [--text PATH] [--megabytes N]

Three comparisons, each in processes of their own (the number of threads belongs to a process), the contenders taking turns in it:

- train: `train_bpe` on texts and `trainbpe` on a file, beside the trainer of `tokenizers` called without bantam: how many times as long. What
  bantam does once, after learning (it checks the vocabulary and tries every control token), is in its time, and shown as a row of its own.
- encode: `BantamTokenizer.encode_batch` beside `encode_batch` of the same vocabulary in a Rust object without bantam, which is what its
  documentation shows, and, reported only, beside `encode_batch_fast`, which skips the offsets as bantam does, and `tiktoken`; on one core and on
  two: how many times as fast. All ids must be equal. The contenders take turns at every batch of 256 texts, in an order that changes, so that
  what else the machine does meets all alike; seconds are the sum over all batches.
- scratch: `BPE.train`, which is plain Python, on 130 KB and on 5 MB, as a part of what it may take. All merges must be those of `tokenizers`;
  in `train` they must be, too, where both get the same texts.

The text is the sources of Python's standard library (their comments and documentation are English), and for the 130 KB the text of Python's
own help pages; `--text` takes a file, or a folder of .txt files, instead. The last line is one JSON object.
"""
import argparse, importlib.util, json, os, random, statistics, subprocess, sys, tempfile, time
from pathlib import Path

from _common import machine, report, versions

AT_MOST = {"train_bpe: time beside tokenizers": 1.1, "trainbpe: time beside tokenizers": 1.1,
           "from scratch, 130 KB: part of 0.2 s": 1.0, "from scratch, 5 MB: part of 5 s": 1.0}
AT_LEAST = {"encode on one core: speed beside tokenizers": 1.0,
            "encode on two cores: speed beside tokenizers": 1.0}
SCRATCH = {"from scratch, 130 KB: part of 0.2 s": (130_000, 500, .2, 1),
           "from scratch, 5 MB: part of 5 s": (5_000_000, 10_000, 5., 2)}


# The texts

def read_all(path):
    "The texts of a file or folder, in order; what is not UTF-8 is left out and counted."
    path, found, bad = Path(path), [], 0
    for f in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        try: found.append(f.read_text(encoding="utf-8"))
        except UnicodeDecodeError: bad += 1
    if not found: sys.exit(f"{path} holds no text in UTF-8; give a .txt file or a folder of them")
    return found, bad


def library_text():
    "Sources of the standard library, in order."
    home, found, bad = Path(os.__file__).parent, [], 0
    for f in sorted(home.rglob("*.py")):
        if "site-packages" in f.parts or "lib2to3" in f.parts: continue
        try: found.append(f.read_text(encoding="utf-8"))
        except UnicodeDecodeError: bad += 1
    return found, bad


def cut_bytes(texts, size):
    "Texts of `size` bytes in all, at most."
    got, left = [], size
    for t in texts:
        data = t.encode("utf-8", "replace")[:left]
        got.append(data.decode("utf-8", "ignore")); left -= len(data)
        if left <= 0: break
    return got


def paragraphs(texts, size=2000):
    "Documents of about `size` characters, cut at line ends: what a batch is made of."
    out = []
    for t in texts:
        held, n = [], 0
        for line in t.splitlines(keepends=True):
            held.append(line); n += len(line)
            if n >= size: out.append("".join(held)); held, n = [], 0
        if held: out.append("".join(held))
    return out


# Inside a process: contenders in turns, seconds of each

def turns(contenders, rounds):
    "{name: seconds of each round} and what each gave last; who begins changes from round to round."
    times, gave, names = {n: [] for n in contenders}, {}, list(contenders)
    for i in range(rounds):
        for n in names[i % len(names):] + names[:i % len(names)]:
            start = time.perf_counter()
            gave[n] = contenders[n]()
            times[n].append(time.perf_counter() - start)
    return times, gave


def turns_in_batches(contenders, texts, rounds, size=256):
    """The same for contenders that take a list of texts, with a turn of each at every batch; what
    they gave for all texts."""
    times, rng, names = {n: [] for n in contenders}, random.Random(0), list(contenders)
    for _ in range(rounds):
        gave, spent = {n: [] for n in contenders}, dict.fromkeys(contenders, 0.)
        for k in range(0, len(texts), size):
            rng.shuffle(names)
            for n in names:
                start = time.perf_counter()
                found = contenders[n](texts[k:k+size])
                spent[n] += time.perf_counter() - start
                gave[n] += found
        for n in names: times[n].append(spent[n])
    return times, gave


def bare(pattern=None):
    "A Rust tokenizer as its own documentation makes it, with bantam's pattern or GPT-2's."
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    tok = Tokenizer(BPE())
    tok.pre_tokenizer = ByteLevel(add_prefix_space=False) if pattern is None else Sequence(
        [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    return tok


def bare_trainer(size):
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    return BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=ByteLevel.alphabet(),
                      show_progress=False)


def merges_of(tok): return [tuple(m) for m in json.loads(tok.to_str())["model"]["merges"]]


def time_train(texts, rounds, folder, vocab):
    from bantam.text.trainbpe import split_pattern, train_bpe
    from bantam.vocabulary import make_vocabulary
    # the control tokens are no merges
    file, texts, size = Path(folder)/"corpus.txt", paragraphs(texts), vocab - 78
    file.write_text("".join(texts), encoding="utf-8")
    def tokenizers_texts():
        tok = bare(split_pattern())
        tok.train_from_iterator(texts, bare_trainer(size))
        return merges_of(tok)
    def tokenizers_file():
        tok = bare(split_pattern())
        tok.train([str(file)], bare_trainer(size))
        return merges_of(tok)
    def bantam_texts(): return merges_of(train_bpe(texts, vocab).tok)
    def bantam_file(): return merges_of(make_vocabulary(file, vocab_size=vocab).tok)
    train_bpe(texts[:400], 1000) # imports and threads, untimed
    times, gave = turns(dict(bantam_texts=bantam_texts, tokenizers_texts=tokenizers_texts,
                             bantam_file=bantam_file, tokenizers_file=tokenizers_file), rounds)
    learned = train_bpe(texts, vocab)
    once, _ = turns({"of which once, after learning": lambda: type(learned)(learned.tok)}, 5)
    times |= once
    # a file is not compared: `tokenizers` cuts it at each line end, bantam does not
    equal = gave["bantam_texts"] == gave["tokenizers_texts"]
    return dict(times=times, same=equal, unlike=["bantam_file", "tokenizers_file", *once],
                bytes=file.stat().st_size, tokens=len(gave["bantam_texts"]) + 334)


def time_encode(texts, rounds, threads):
    from tokenizers import Tokenizer
    from bantam.text.tokenizer import BantamTokenizer
    from bantam.text.trainbpe import split_pattern
    ours, texts = BantamTokenizer.default(), paragraphs(texts)
    # one each, because a tokenizer remembers words
    raw, fast = (Tokenizer.from_str(ours.tok.to_str()) for _ in "12")
    raw.encode_special_tokens = fast.encode_special_tokens = True
    run = {"bantam": ours.encode_batch, "tokenizers": lambda part: [
        e.ids for e in raw.encode_batch(part, add_special_tokens=False)],
           "tokenizers, encode_batch_fast": lambda part: [
               e.ids for e in fast.encode_batch_fast(part, add_special_tokens=False)]}
    if importlib.util.find_spec("tiktoken"):
        import tiktoken
        ranks = {ours.token_bytes(i): i for i in range(ours.vocab_size) if ours.token_bytes(i)}
        tik = tiktoken.Encoding("bantam", pat_str=split_pattern(), mergeable_ranks=ranks,
                                special_tokens={})
        run["tiktoken"] = lambda part: tik.encode_ordinary_batch(part, num_threads=threads)
    turns_in_batches(run, texts, 1) # wakes threads and caches, untimed
    times, gave = turns_in_batches(run, texts, rounds)
    return dict(times=times, same=all(g == gave["bantam"] for g in gave.values()),
                bytes=sum(len(t.encode()) for t in texts), tokens=sum(map(len, gave["bantam"])))


def time_scratch(texts, rounds, size, vocab, workers):
    from bantam.text.encode import BPE
    from bantam.text.vocab import printable
    def ours():
        return [(printable(a), printable(b)) for a, b in BPE.train(
            texts, vocab, special=(), workers=workers).merges]
    def reference():
        tok = bare(); tok.train_from_iterator(texts, bare_trainer(vocab)); return merges_of(tok)
    BPE.train(["warm up"], 300, special=()) # imports
    times, gave = turns({"bantam, from scratch": ours}, rounds)
    again, ref = turns({"tokenizers": reference}, 1)
    return dict(times=times | again, same=gave["bantam, from scratch"] == ref["tokenizers"],
                bytes=sum(len(t.encode()) for t in texts), tokens=len(ref["tokenizers"]) + 256)


def inner(job):
    "Do one job and print its result."
    if job["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:job["cores"]])
    texts, kind = json.loads(Path(job["texts"]).read_text()), job["kind"]
    if kind == "train":
        result = time_train(texts, job["rounds"], Path(job["texts"]).parent, job["size"])
    elif kind == "encode": result = time_encode(texts, job["rounds"], job["cores"])
    else: result = time_scratch(texts, job["rounds"], *job["size"])
    print(json.dumps(result))


def ask(folder, texts, kind, cores, rounds, size=None):
    "Give a job to a process of its own."
    path = Path(folder)/"texts.json"
    path.write_text(json.dumps(texts))
    env = os.environ | {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([sys.executable, __file__, "--inner",
                           json.dumps(dict(kind=kind, texts=str(path), cores=cores, rounds=rounds,
                                           size=size))], env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the {kind} process ended with status {done.returncode}; "
                 "its message stands above")
    return json.loads(done.stdout.splitlines()[-1])


# The one that asks


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true",
                   help="one round and less text, to see that it runs")
    p.add_argument("--json", metavar="FILE", help="write the result, with every row, to FILE")
    p.add_argument("--text", metavar="PATH", help="a text file, or a folder of .txt files, "
                                                  "instead of Python's standard library")
    p.add_argument("--megabytes", type=float,
                   help="how much text to train on and to encode (default 10, quick 2)")
    p.add_argument("--inner", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.inner: return inner(json.loads(a.inner))

    texts, bad = read_all(a.text) if a.text else library_text()
    if a.text: english = texts
    else:
        from pydoc_data.topics import topics
        english = ["\n".join(topics[k] for k in sorted(topics))]
    rounds, learning = (1, 1) if a.quick else (3, 12)
    size = int((a.megabytes or (2 if a.quick else 10)) * 1e6)
    enough = sum(len(t.encode("utf-8", "replace")) for t in texts)
    about, rows, ratios, spread, same, missing = machine(), [], {}, {}, [], []

    def note(job, cores, result):
        same.append(result["same"])
        for name, seconds in result["times"].items():
            mid = statistics.median(seconds)
            rows.append(dict(job=job, name=name, cores=cores, seconds=mid, all_seconds=seconds,
                             megabytes=result["bytes"]/1e6,
                             megabytes_per_second=result["bytes"]/1e6/mid, tokens=result["tokens"],
                             same=None if name in result.get("unlike", ()) else result["same"]))

    def ratio(key, top, under):
        each = [x/y for x, y in zip(top, under)]
        ratios[key], spread[key] = (round(statistics.median(each), 3),
                                    [round(min(each), 3), round(max(each), 3)])

    with tempfile.TemporaryDirectory() as folder:
        cores = min(2, about["cores"])
        r = ask(folder, cut_bytes(texts, size), "train", cores, learning,
                size=8192 if a.quick else 16384)
        note("train", cores, r)
        for ours, kind in (("train_bpe", "texts"), ("trainbpe", "file")):
            ratio(f"{ours}: time beside tokenizers", r["times"][f"bantam_{kind}"],
                  r["times"][f"tokenizers_{kind}"])
        for n, word in ((1, "one core"), (2, "two cores")):
            if n > about["cores"]:
                missing.append(f"encode on {word} (this machine has {about['cores']})"); continue
            r = ask(folder, cut_bytes(texts, size), "encode", n, rounds)
            note("encode", n, r)
            ratio(f"encode on {word}: speed beside tokenizers", r["times"]["tokenizers"],
                  r["times"]["bantam"])
            for peer, key in (("tokenizers, encode_batch_fast", "encode_batch_fast"),
                              ("tiktoken", "tiktoken")):
                if peer in r["times"]:
                    ratio(f"encode on {word}: speed beside {key}", r["times"][peer],
                          r["times"]["bantam"])
                elif n == 1: missing.append(f"{peer} (not installed)")
        for key, (wanted, vocab, limit, workers) in SCRATCH.items():
            source = english if wanted < 10**6 else texts
            got = cut_bytes(source, wanted)
            if sum(len(t.encode()) for t in got) < .99*wanted:
                missing.append(f"{key} (the text has fewer than {wanted} bytes)"); continue
            r = ask(folder, got, "scratch", cores, rounds, size=(wanted, vocab, workers))
            note(f"scratch, {workers} worker{'s'*(workers > 1)}", cores, r)
            ratio(key, r["times"]["bantam, from scratch"], [limit]*rounds)

    print(f"{enough/1e6:.1f} MB of text at hand ({bad} files that are not UTF-8 left out); "
          f"{about['processor']}, {about['cores']} cores; median of {rounds} rounds, "
          f"of {learning} in training\n")
    print(f"{'job':21s} {'contender':30s} {'cores':>5s} {'MB':>7s} {'seconds':>9s} {'MB/s':>7s} "
          f"{'tokens':>9s}  equal")
    for r in rows:
        print(f"{r['job']:21s} {r['name']:30s} {r['cores']:5d} {r['megabytes']:7.2f} "
              f"{r['seconds']:9.3f} {r['megabytes_per_second']:7.2f} {r['tokens']:9d}  "
              f"{dict([(True, 'yes'), (False, 'NO'), (None, '-')])[r['same']]}")
    for m in missing: print(f"missing: {m}")
    print()
    targets = AT_MOST | AT_LEAST
    for key, value in ratios.items():
        goal = (f", target at {'most' if key in AT_MOST else 'least'} {targets[key]}"
                if key in targets else ", reported only")
        print(f"{key:50s} {value:6.2f} ({spread[key][0]:.2f} to {spread[key][1]:.2f}){goal}")
    met = (all(same) and all(ratios.get(k, 9) <= v for k, v in AT_MOST.items())
           and all(ratios.get(k, 0) >= v for k, v in AT_LEAST.items()))
    result = dict(name="tokenizer", ratios=ratios, targets=targets, met=met, machine=about,
                  versions=versions("tokenizers", "tiktoken", "regex"))
    report(result, a.json, at_most=sorted(AT_MOST), rows=rows, spread=spread, missing=missing)


if __name__ == "__main__": main()
