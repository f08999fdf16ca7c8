"""Attention in a window with sinks: tiles beside PyTorch's kernel with a dense mask, and how both grow with the length.

    python benchmarks/attention.py [--quick] [--json FILE] [--precision fp32,bf16]

Forward and backward of one attention of 8 query heads, 2 key heads, width 32, batch 2. Tiles lay out their mask anew in every step, as
training does; the dense mask is made once, outside of the timing. Contenders live in processes of their own and take turns.

The second table runs tiles alone at growing lengths (window 256, 4 sinks, batch 1), each in a process of its own, in turns: time, and peak
memory above what the process held before. Work that grows with length x window doubles from row to row. The last line is one JSON object.
"""
import argparse, json, statistics, subprocess, sys, time

from _common import machine, report, versions

BATCH, HEADS, GROUPS, WIDTH, SINKS = 2, 8, 2, 32, 4
CASES = {"1024/128": (1024, 128, 1.6), "2048/256": (2048, 256, 2.2), "4096/256": (4096, 256, 5.0)}
LENGTHS, WINDOW, GROWTH = (4096, 8192, 16384), 256, 2.4


# Inside a contender's process

def contender(kind, precision, length, window, batch):
    """Answer each line on stdin (a number of steps) with the seconds of each step; an empty line
    ends it."""
    import torch
    import torch.nn.functional as F
    from bantam.model.attention import attend
    from bantam.model.mask import Marks
    from bantam.runtime import peak_memory, tune_allocator
    tune_allocator()
    gen = torch.Generator().manual_seed(0)
    made = [torch.randn(batch, n, length, WIDTH, generator=gen)
            for n in (HEADS, GROUPS, GROUPS, HEADS)]
    q, k, v, grad = (t.to(torch.bfloat16 if precision == "bf16" else torch.float32) for t in made)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    dense = Marks(length).mask(window, SINKS).dense() if kind == "dense mask" else None

    def step():
        for t in leaves: t.grad = None
        start = time.perf_counter()
        if dense is None: out = attend(q, k, v, Marks(length).mask(window, SINKS))
        else: out = F.scaled_dot_product_attention(q, k, v, dense, enable_gqa=True)
        out.backward(grad)
        return time.perf_counter() - start, out.detach().float().norm().item()

    before = peak_memory()
    norm = [step()[1] for _ in range(3)][0]
    say = lambda **kw: print(json.dumps(kw), flush=True)
    say(norm=norm, threads=torch.get_num_threads())
    for line in sys.stdin:
        if not line.strip(): break
        say(seconds=[step()[0] for _ in range(int(line))], memory=peak_memory() - before)


# The one that asks them in turns

class Process:
    "A contender, ready to be asked for steps."
    def __init__(self, kind, precision, length, window, batch=BATCH):
        self.kind, self.times, self.rounds = kind, [], []
        self.process = subprocess.Popen([sys.executable, __file__, "--contender",
                                         json.dumps([kind, precision, length, window, batch])],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.kind} ended with status {self.process.wait()}; "
                     "its message stands above")
        return json.loads(line)

    def steps(self, n):
        self.process.stdin.write(f"{n}\n"); self.process.stdin.flush()
        self.last = self.answer()
        self.times += self.last["seconds"]
        self.rounds.append(statistics.median(self.last["seconds"]))

    def close(self):
        self.process.stdin.write("\n"); self.process.stdin.close(); self.process.wait()


def compare(precision, case, rounds, steps):
    "Tiles and the dense mask in turns."
    length, window, _ = CASES[case]
    runners = [Process(kind, precision, length, window) for kind in ("tiles", "dense mask")]
    for i in range(rounds):
        for r in (runners, runners[::-1])[i % 2]: r.steps(steps)
    for r in runners: r.close()
    a, b = (r.about["norm"] for r in runners)
    if abs(a - b) > .02*b:
        sys.exit(f"the contenders disagree at {case}: outputs of norm {a} and {b}")
    ratios = [theirs/ours for ours, theirs in zip(*(r.rounds for r in runners))]
    rows = [dict(case=case, precision=precision, name=r.kind, ms=statistics.median(r.times)*1e3,
                 quartiles=[t*1e3 for t in statistics.quantiles(r.times, n=4)[::2]],
                 memory_mb=r.last["memory"]/2**20, steps=len(r.times), threads=r.about["threads"])
            for r in runners]
    return rows, ratios


def growth(precision, lengths, rounds, steps):
    "Tiles alone; the lengths take turns."
    runners = [Process("tiles", precision, length, WINDOW, 1) for length in lengths]
    for _ in range(rounds):
        for r in runners: r.steps(steps)
    for r in runners: r.close()
    return [dict(length=length, precision=precision, ms=statistics.median(r.times)*1e3,
                 memory_mb=r.last["memory"]/2**20)
            for length, r in zip(lengths, runners)]



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    p.add_argument("--json", metavar="FILE", help="write the result, with every row, to FILE")
    p.add_argument("--precision", default="fp32,bf16", help="fp32, bf16 or both")
    p.add_argument("--contender", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender: return contender(*json.loads(a.contender))

    rows, ratios, spread, targets, grown = [], {}, {}, {}, []
    for precision in a.precision.split(","):
        for case, (_, _, target) in CASES.items():
            got, pairs = compare(precision, case, *((1, 2) if a.quick else (5, 4)))
            rows += got
            key = f"{precision} {case}"
            ratios[key], spread[key], targets[key] = round(
                statistics.median(pairs), 3), [round(min(pairs), 3), round(max(pairs), 3)], target
        grown += growth(precision, [n//4 for n in LENGTHS] if a.quick else LENGTHS,
                        *((1, 2) if a.quick else (5, 3)))
    doublings = {}
    for before, after in zip(grown, grown[1:]):
        if before["precision"] != after["precision"]: continue
        for what in ("ms", "memory_mb"):
            doublings[f"{after['precision']} {'time' if what == 'ms' else 'memory'} "
                      f"{before['length']} to {after['length']}"] = round(
                          after[what]/max(before[what], 1e-9), 3)

    about = machine()
    print(f"batch {BATCH}, {HEADS} query heads, {GROUPS} key heads, width {WIDTH}, {SINKS} sinks, "
          f"forward and backward; {about['processor']}, {about['cores']} cores, "
          f"wait policy {about['OMP_WAIT_POLICY']}\n")
    print(f"{'length/window':14s} {'':5s} {'contender':11s} {'ms':>8s} {'quartiles':>17s} "
          f"{'steps':>6s} {'MB':>7s}")
    for r in rows:
        print(f"{r['case']:14s} {r['precision']:5s} {r['name']:11s} {r['ms']:8.1f} "
              f"{r['quartiles'][0]:8.1f}-{r['quartiles'][1]:<8.1f} {r['steps']:6d} "
              f"{r['memory_mb']:7.0f}")
    print()
    for key, ratio in ratios.items():
        print(f"{key:14s} {ratio:.2f} times ({spread[key][0]:.2f} to {spread[key][1]:.2f} over the "
              f"rounds), target {targets[key]}")
    print(f"\ntiles alone, window {WINDOW}, batch 1\n{'length':>7s} {'':5s} {'ms':>8s} {'MB':>7s}")
    for r in grown:
        print(f"{r['length']:7d} {r['precision']:5s} {r['ms']:8.1f} {r['memory_mb']:7.0f}")
    print("\nper doubling of the length: " + ", ".join(f"{k} {v:.2f}" for k, v in doublings.items())
          + f" (2 is linear, 4 is square; at most {GROWTH} is asked)")
    result = dict(name="attention", ratios=ratios, targets=targets, doublings=doublings,
                  doubling_target=GROWTH,
                  met=all(ratios[k] >= t for k, t in targets.items())
                  and all(v <= GROWTH for v in doublings.values()), machine=about,
                  versions=versions("torch"))
    report(result, a.json, rows=rows, spread=spread, growth=grown)


if __name__ == "__main__": main()
