"""`data prepare` beside the bare tokenizer on the same texts.

    python benchmarks/data_prepare.py [--quick] [--json FILE]

The tokenizer's own throughput is `encode_iterable` on all cores, texts in memory, ids thrown away. `data prepare` reads the same texts from a JSONL file, tokenises them
with the same tokenizer, and writes hashed shards to the disk; cleaning and duplicates are off (`dedup.py` times those). They take turns. The last line is one JSON object.
"""
import argparse, json, random, statistics, tempfile, time
from pathlib import Path

from _common import machine, report, versions

TARGETS = {"prepare over tokenizer": .8}


def texts(n, seed=0):
    """Documents of about 1,500 characters, of the generated world and the standard library's
    docstrings."""
    from bantam.data.corpora import stdlib
    rng, pool = (random.Random(seed),
                 [p for r in stdlib() for p in r.text.split("\n\n") if 20 < len(p) < 2000])
    return ["\n\n".join(rng.choices(pool, k=6)) for _ in range(n)]



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="few documents, to see that it runs")
    p.add_argument("--json", metavar="FILE", help="write the result, with every row, to FILE")
    a = p.parse_args()
    from bantam.data.plan import DataPlan
    from bantam.data.prepare import prepare
    from bantam.text.tokenizer import BantamTokenizer
    docs, tok, rows = texts(3000 if a.quick else 40_000), BantamTokenizer.default(), []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder)/"texts.jsonl").write_text(
            "".join(json.dumps(dict(text=t)) + "\n" for t in docs))
        plan = DataPlan(dict(data_args=dict(valid_fraction=0.), sources=[dict(path="texts.jsonl")]),
                        folder)
        for r in range(1 if a.quick else 5):
            start = time.perf_counter()
            tokens = sum(map(len, tok.encode_iterable(docs, add_bos=True, add_eos=True)))
            alone, start = time.perf_counter() - start, time.perf_counter()
            made = prepare(plan, Path(folder)/f"out{r}")
            took = time.perf_counter() - start
            assert (sum(s["tokens"] for s in made["shards"])
                    == tokens), "the two made different tokens"
            rows.append(dict(tokenizer=tokens/alone, prepare=tokens/took, ratio=alone/took))
    about, mid = machine(), {k: statistics.median(r[k] for r in rows) for k in rows[0]}
    print(f"{len(docs)} documents, {tokens:,} tokens; {about['processor']}, "
          f"{about['cores']} cores\n")
    print(f"{'':24s} {'tokens/s':>10s} {'of the tokenizer':>17s}")
    print(f"{'tokenizer, in memory':24s} {mid['tokenizer']:10.0f} {1:17.2f}\n{'data prepare':24s} "
          f"{mid['prepare']:10.0f} {mid['ratio']:17.2f}")
    ratios = {"prepare over tokenizer": round(mid["ratio"], 3)}
    met = ratios["prepare over tokenizer"] >= TARGETS["prepare over tokenizer"]
    result = dict(name="data_prepare", ratios=ratios, targets=TARGETS, met=bool(met), machine=about,
                  versions=versions("tokenizers", "numpy"))
    report(result, a.json, rows=rows)


if __name__ == "__main__": main()
