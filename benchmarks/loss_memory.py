"""Memory and time of the last layer's loss, forward and backward, beside the ordinary way that holds all logits.

    python benchmarks/loss_memory.py [--quick] [--json FILE] [--precision fp32,bf16] [--device cpu|cuda]

The ordinary way is `F.cross_entropy(F.linear(h, w).float(), targets)`. Hidden states, head and targets exist before the measurement, so
what is counted is what the loss and its gradients add: the peak of the process (its resident memory; on CUDA what PyTorch took) minus
what it held before. Each contender lives in a process of its own, since a peak belongs to a process, and the processes take turns for the times. Both
run with the C allocator's defaults and with the settings that bantam makes for training (`tune_allocator`). Those keep freed memory for reuse, which hides
a peak, so memory is compared with the defaults. The last line is one JSON object.
"""
import argparse, json, os, statistics, subprocess, sys, time

from _common import machine, report, versions

VOCAB, TOKENS, WIDTH = 32000, 4096, 512
# ordinary / bantam: at most a quarter of the memory, at most 10 % more time
TARGETS = {"memory": 4., "time": .9}
CONTENDERS = ("bantam", "all logits")


# Inside a contender's process

def resident():
    "Bytes that this process holds now; without /proc, the most that it has held."
    from bantam.runtime import peak_memory
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError: return peak_memory()


def contender(kind, precision, tuned, device):
    """Say what one step added to memory, then answer each line on stdin (a number of steps) with
    the seconds of each."""
    import torch
    import torch.nn.functional as F
    from bantam.model.loss import linear_cross_entropy
    from bantam.runtime import autocast, peak_memory, tune_allocator
    if tuned: tune_allocator()
    device = torch.device(device)
    gen = torch.Generator().manual_seed(0)
    h = torch.randn(TOKENS, WIDTH, generator=gen).to(device).requires_grad_()
    w = (torch.randn(VOCAB, WIDTH, generator=gen) / WIDTH**.5 / 2).to(device).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=gen).to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def loss(h, w, targets):
        if kind == "all logits": return F.cross_entropy(F.linear(h, w).float(), targets)
        total, weight = linear_cross_entropy(h, w, targets)
        return total / weight

    def step(rows=TOKENS, vocab=VOCAB):
        h.grad = w.grad = None
        wait(); start = time.perf_counter()
        with autocast(device, precision): value = loss(h[:rows], w[:vocab], targets[:rows] % vocab)
        value.backward()
        wait()
        return time.perf_counter() - start, value.item()

    step(64, 64) # libraries load their kernels
    h.grad = w.grad = None
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident()
    value = step()[1]
    say = lambda **kw: print(json.dumps(kw), flush=True)
    say(memory=peak_memory(device) - before, loss=value, threads=torch.get_num_threads())
    for line in sys.stdin:
        if not line.strip(): break
        step() # wakes threads and caches, untimed
        say(seconds=[step()[0] for _ in range(int(line))])


# The one that asks them in turns

class Process:
    "A contender, ready to be asked for steps."
    def __init__(self, kind, precision, tuned, device):
        self.kind, self.times, self.rounds = kind, [], []
        args = [sys.executable, __file__, "--contender", kind, "--precision", precision, "--device",
                device] + ["--tuned"]*tuned
        self.process = subprocess.Popen(args, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.kind} ended with status {self.process.wait()}; "
                     "its message stands above")
        return json.loads(line)

    def steps(self, n):
        self.process.stdin.write(f"{n}\n"); self.process.stdin.flush()
        seconds = self.answer()["seconds"]
        self.times += seconds
        self.rounds.append(statistics.median(seconds))

    def close(self):
        self.process.stdin.write("\n"); self.process.stdin.close(); self.process.wait()


def compare(precision, tuned, device, rounds, steps):
    "Rows of both contenders, and of each ratio its value and its spread over the rounds."
    ours, full = runners = [Process(k, precision, tuned, device) for k in CONTENDERS]
    for i in range(rounds):
        for r in runners[::-1] if i % 2 else runners: r.steps(steps)
    for r in runners: r.close()
    rows = [dict(precision=precision, allocator="tuned" if tuned else "default", name=r.kind,
                 ms=statistics.median(r.times)*1e3, steps=len(r.times),
                 memory_mb=None if tuned else r.about["memory"]/2**20, loss=r.about["loss"],
                 threads=r.about["threads"]) for r in runners]
    times = [theirs/mine for theirs, mine in zip(full.rounds, ours.rounds)]
    return rows, {"time": times} if tuned else {
        "memory": [full.about["memory"]/ours.about["memory"]], "time": times}



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    p.add_argument("--json", metavar="FILE", help="write the result, with every row, to FILE")
    p.add_argument("--precision", default="fp32,bf16", help="fp32, bf16 or both")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    p.add_argument("--tuned", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender: return contender(a.contender, a.precision, a.tuned, a.device)

    for v in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"):
        os.environ.pop(v, None)
    rows, ratios, spread, targets = [], {}, {}, {}
    for precision in a.precision.split(","):
        for tuned in (False, True) if a.device == "cpu" else (False,):
            got, found = compare(precision, tuned, a.device, *((1, 1) if a.quick else (5, 2)))
            rows += got
            for what, values in found.items():
                key = f"{precision} {what}" + (", tuned allocator" if tuned else "")
                ratios[key], spread[key], targets[key] = (round(statistics.median(values), 3),
                                                          [round(min(values), 3),
                                                           round(max(values), 3)], TARGETS[what])

    about = machine(a.device)
    print(f"vocab {VOCAB}, tokens {TOKENS}, width {WIDTH}; {about.get('gpu', about['processor'])}, "
          f"{about['cores']} cores, wait policy {about['OMP_WAIT_POLICY']}\n")
    print(f"{'':5s} {'allocator':9s} {'contender':11s} {'MB added':>9s} {'ms a step':>10s} "
          f"{'steps':>6s} {'loss':>8s}")
    for r in rows:
        added = "" if r["memory_mb"] is None else f"{r['memory_mb']:.0f}"
        print(f"{r['precision']:5s} {r['allocator']:9s} {r['name']:11s} {added:>9s} "
              f"{r['ms']:10.1f} {r['steps']:6d} {r['loss']:8.4f}")
    print("\nall logits / bantam:")
    for key, ratio in ratios.items():
        print(f"{key:32s} {ratio:.2f} times ({spread[key][0]:.2f} to {spread[key][1]:.2f} over the "
              f"rounds), target {targets[key]}")
    result = dict(name="loss_memory" + "_cuda"*(a.device == "cuda"), ratios=ratios, targets=targets,
                  met=all(ratios[k] >= t for k, t in targets.items()), machine=about,
                  versions=versions("torch"))
    report(result, a.json, rows=rows, spread=spread)


if __name__ == "__main__": main()
