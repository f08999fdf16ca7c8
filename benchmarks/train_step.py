"""One training step beside the same step in `transformers`: forward, backward, clipping, AdamW.

    python benchmarks/train_step.py [--quick] [--json FILE] [--shape small|large] [--precision fp32,bf16]

Every contender lives in a process of its own, because allocator settings and environment belong to a process. The processes take
turns, a few steps each, so that whatever else the machine does hits all of them alike. Two comparisons:

- as shipped: each as its user gets it. bantam sets the C allocator for itself (`tune_allocator`), the peer does not.
- same environment: the peer's process gets bantam's allocator settings too.

The wait policy of OpenMP is the machine's default for all of them, and is printed. The last line is one JSON object.
"""
import argparse, importlib.util, json, os, platform, statistics, subprocess, sys, time

SHAPES = dict(
    small=dict(vocab=4096, width=256, layers=6, heads=8, kv_heads=2, inner=688, length=256, batch=8),
    large=dict(vocab=32000, width=512, layers=8, heads=8, kv_heads=2, inner=1408, length=512, batch=4))
TARGETS = {"fp32 as shipped": 1.2, "bf16 as shipped": 1.2, "fp32 same environment": 1.05, "bf16 same environment": 1.0}
CONTENDERS = dict(bantam=("bantam", True), transformers=("transformers", False), transformers_tuned=("transformers", True))


# Inside a contender's process

def build(kind, s):
    "A fresh model of shape `s` that returns its loss for `labels`, and the floating point operations of a token."
    import torch
    torch.manual_seed(0)
    from bantam.config import BantamConfig
    from bantam.model.lm import BantamForCausalLM
    config = BantamConfig(vocab_size=s["vocab"], hidden_size=s["width"], intermediate_size=s["inner"], num_hidden_layers=s["layers"],
                          num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"], max_position_embeddings=s["length"])
    with torch.device("meta"): flops = BantamForCausalLM(config).flops_per_token(s["length"])
    if kind == "bantam": return BantamForCausalLM(config).train(), flops
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=s["vocab"], hidden_size=s["width"], intermediate_size=s["inner"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"], max_position_embeddings=s["length"], tie_word_embeddings=True, rms_norm_eps=1e-6)).train(), flops


def contender(kind, tuned, precision, s):
    "Answer each line on stdin (a number of steps) with the seconds of each step; an empty line ends it."
    import torch
    from bantam.runtime import autocast, matmul_peak, peak_memory, tune_allocator
    if tuned: tune_allocator()
    model, flops = build(kind, s)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(.9, .95), weight_decay=.1, fused=True)
    ids = torch.randint(s["vocab"], (s["batch"], s["length"]), generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")

    def step():
        start = time.perf_counter()
        with autocast(cpu, precision): loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        return time.perf_counter() - start, loss.item()

    first = [step()[1] for _ in range(3)][0]
    say = lambda **kw: print(json.dumps(kw), flush=True)
    say(first=first, flops=flops, peak=matmul_peak(cpu, precision), threads=torch.get_num_threads())
    for line in sys.stdin:
        if not line.strip(): break
        step() # wakes threads and caches, untimed
        seconds, losses = zip(*(step() for _ in range(int(line))))
        say(seconds=seconds, loss=losses[-1], memory=peak_memory())


# The one that asks them in turns

class Process:
    "A contender, ready to be asked for steps."
    def __init__(self, name, precision, shape):
        self.name, self.times, self.rounds = name, [], []
        self.process = subprocess.Popen([sys.executable, __file__, "--contender", name, "--precision", precision, "--shape", shape],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line: sys.exit(f"{self.name} ended with status {self.process.wait()}; its message stands above")
        return json.loads(line)

    def steps(self, n):
        self.process.stdin.write(f"{n}\n"); self.process.stdin.flush()
        self.last = self.answer()
        self.times += self.last["seconds"]
        self.rounds.append(statistics.median(self.last["seconds"]))

    def close(self):
        self.process.stdin.write("\n"); self.process.stdin.close(); self.process.wait()


def compare(precision, shape, names, rounds, steps):
    "Let the contenders take turns; one row for each, and the ratios of the rounds of bantam to each peer."
    runners = [Process(n, precision, shape) for n in names]
    for i in range(rounds):
        for r in runners[i % len(runners):] + runners[:i % len(runners)]: r.steps(steps)
    for r in runners: r.close()
    s, rows = SHAPES[shape], []
    for r in runners:
        low, mid, high = statistics.quantiles(r.times, n=4)
        speed = s["batch"] * s["length"] / mid
        rows.append(dict(precision=precision, name=r.name, ms=mid*1e3, quartiles=[low*1e3, high*1e3], steps=len(r.times), tokens_per_second=speed,
                         peak_share=speed*r.about["flops"]/max(x.about["peak"] for x in runners), memory_mb=r.last["memory"]/2**20,
                         first_loss=r.about["first"], last_loss=r.last["loss"], threads=r.about["threads"]))
    pairs = {r.name: [theirs/ours for theirs, ours in zip(r.rounds, runners[0].rounds)] for r in runners[1:]}
    return rows, pairs


def machine():
    "What a figure depends on: processor, cores, system, wait policy."
    model = platform.processor() or platform.machine()
    try: model = next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    except (OSError, StopIteration): pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(processor=model, cores=cores, system=platform.system(), OMP_WAIT_POLICY=os.environ.get("OMP_WAIT_POLICY", "default"))


def versions():
    from importlib.metadata import PackageNotFoundError, version
    found = dict(python=platform.python_version())
    for name in ("bantam-lm", "torch", "transformers"):
        try: found[name] = version(name)
        except PackageNotFoundError: pass
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    p.add_argument("--json", metavar="FILE", help="write the result, with every row, to FILE")
    p.add_argument("--shape", choices=SHAPES, default="small")
    p.add_argument("--precision", default="fp32,bf16", help="fp32, bf16 or both")
    p.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender: return contender(*CONTENDERS[a.contender], a.precision, SHAPES[a.shape])

    for v in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"): os.environ.pop(v, None)
    missing = [n for n in ("transformers",) if importlib.util.find_spec(n) is None]
    names = ["bantam"] + ([] if missing else ["transformers", "transformers_tuned"])
    rows, ratios, spread = [], {}, {}
    for precision in a.precision.split(","):
        got, pairs = compare(precision, a.shape, names, *((2, 3) if a.quick else (12, 4)))
        rows += got
        for name, kind in (("transformers", "as shipped"), ("transformers_tuned", "same environment")):
            if name in pairs: ratios[key := f"{precision} {kind}"], spread[key] = round(statistics.median(pairs[name]), 3), [round(min(pairs[name]), 3), round(max(pairs[name]), 3)]

    about = machine()
    print(f"{', '.join(f'{k} {v}' for k, v in SHAPES[a.shape].items())}; {about['processor']}, {about['cores']} cores, wait policy {about['OMP_WAIT_POLICY']}\n")
    print(f"{'':5s} {'contender':19s} {'ms a step':>10s} {'quartiles':>15s} {'steps':>6s} {'tokens/s':>9s} {'of peak':>8s} {'MB':>6s} {'first loss':>11s} {'last':>6s}")
    for r in rows:
        print(f"{r['precision']:5s} {r['name']:19s} {r['ms']:10.1f} {r['quartiles'][0]:7.1f}-{r['quartiles'][1]:<7.1f} {r['steps']:6d} {r['tokens_per_second']:9.0f} "
              f"{r['peak_share']:8.2f} {r['memory_mb']:6.0f} {r['first_loss']:11.3f} {r['last_loss']:6.3f}")
    for name in missing: print(f"missing: {name} (not installed, so not compared)")
    print()
    targets = TARGETS if a.shape == "small" else {}
    for key, ratio in ratios.items(): print(f"{key:22s} {ratio:.2f} times ({spread[key][0]:.2f} to {spread[key][1]:.2f} over the rounds)" + (f", target {targets[key]}" if key in targets else ""))
    result = dict(name="train_step" if a.shape == "small" else f"train_step_{a.shape}", ratios=ratios, targets=targets,
                  met=not missing and all(ratios.get(k, 0) >= t for k, t in targets.items()), machine=about, versions=versions())
    if a.json:
        os.makedirs(os.path.dirname(os.path.abspath(a.json)), exist_ok=True)
        with open(a.json, "w") as f: json.dump(result | dict(rows=rows, spread=spread, missing=missing), f, indent=2)
    print(json.dumps(result))


if __name__ == "__main__": main()
