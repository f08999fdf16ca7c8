"""Two gigabytes of text become a vocabulary in less than four gigabytes of memory."""
import json
import random
import subprocess
import sys

import pytest

GB = 10**9
pytestmark = pytest.mark.slow


def letters(r, n): return "".join(r.choices("abcdefghijklmnopqrstuvwxyz", k=n))


def language(r):
    """Blocks of words as people use them: 200,000 known ones by Zipf's law, and some that were
    never seen."""
    known = [letters(r, r.randint(2, 11)) for _ in range(200_000)]
    odds = [1 / (k + 3) for k in range(len(known))]
    blocks = [" ".join(r.choices(known, odds, k=300_000)) for _ in range(8)]
    while True:
        fresh = " ".join(letters(r, 8) for _ in range(2500))
        yield f"{r.choice(blocks)}\n{fresh} {r.random()}\n".encode()


def noise(r):
    "Random letters: every word is new."
    while True: yield (" ".join(letters(r, 8) for _ in range(50_000)) + "\n").encode()


def one_line(r):
    "Letters without a space or a line end, never the same twice."
    part = letters(r, 1 << 20).encode()
    while True:
        k = r.randrange(len(part))
        yield part[k:] + part[:k]


# What is written, how much of it, and the size of the vocabulary: long words are slow to merge
KINDS = {"language": (language, 2 * GB, 16384), "noise": (noise, GB // 5, 16384),
         "one line": (one_line, GB // 50, 400)}

# Memory of the process that does it, in KB, beside the records that were left out because it was
# full
CODE = """
import json, resource, sys
from bantam.cli import main
try: main(["trainbpe", "--input", sys.argv[1], "--out", sys.argv[2], *sys.argv[3:]])
except SystemExit as e: assert e.code == 0, e.code
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_training_stays_under_four_gigabytes(kind, tmp_path):
    make, size, vocab_size = KINDS[kind]
    with open(tmp_path/"corpus.txt", "wb") as f:
        for block in make(random.Random(0)):
            f.write(block)
            if f.tell() >= size: break
    words = [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path/"corpus.txt"),
             str(tmp_path/"tok"), "--vocab-size", str(vocab_size)]
    done = subprocess.run(words, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = json.loads(done.stdout.splitlines()[-1])
    args = json.loads((tmp_path/"tok/bpe_training_args.json").read_text())
    print(kind, f"{peak / 1e6:.2f} GB,", args["bytes"], "bytes used,", args["skipped"])
    assert peak < 4_000_000
    assert args["records"] == 1 and args["files"][0]["bytes"] >= size
    assert (args["bytes"] < size) == (args["skipped"]["memory"] > 0)
    if kind == "language": assert args["bytes"] >= GB  # the memory is used, not only saved
