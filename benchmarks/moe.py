"""Experts beside the dense feed-forward part of equal active width, and beside naive loops, forward and backward.

    python benchmarks/moe.py [--quick] [--json FILE] [--shape small,large] [--precision bf16] [--device cpu|cuda]

- dense: 8 experts of which a token visits 2, against one feed-forward part of twice an expert's width: the same products per token. What is lost is sorting, smaller products and
  the traffic of four times as many weights.
- loop over experts: at 4, 16 and 64 experts, a list of feed-forward parts; each masks, fetches, computes and adds its tokens (the way it is mostly written).
- loop over tokens: the formula as it stands, token by token. It is so slow that it gets 64 tokens; speeds are per token.

Every step gets new tokens. No capacity limit, so nobody is dropped and all do the same work. Each contender lives in a process of its own with the allocator settings that bantam makes for training; the processes take turns.
The last line is one JSON object.
"""
import argparse, json, statistics, subprocess, sys, time

from _common import machine, report, versions

# inner: of one expert
SHAPES = dict(small=dict(width=256, inner=344, tokens=2048),
              large=dict(width=512, inner=704, tokens=2048))
EXPERTS, TOP, FEW = (4, 16, 64), 2, 64
TARGET = .7 # tokens/s of the experts / those of the dense part


# Inside a contender's process

def build(kind, experts, s):
    "A module of that kind, from tokens (1,N,D) to the same shape."
    import torch
    import torch.nn.functional as F
    from torch import nn
    from bantam.config import BantamConfig
    from bantam.model.ffn import FeedForward
    from bantam.model.moe import MoE
    torch.manual_seed(0)
    shape = dict(vocab_size=8, hidden_size=s["width"], num_attention_heads=8, num_key_value_heads=8,
                 num_hidden_layers=1)
    if kind == "dense": return FeedForward(BantamConfig(**shape, intermediate_size=TOP*s["inner"]))
    config = BantamConfig(**shape, intermediate_size=s["inner"], expert_type="topk",
                          num_experts=experts, moe_top_k=TOP, moe_capacity_factor=None)
    if kind == "bantam": return MoE(config)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(s["width"], experts, bias=False)
            self.experts = nn.ModuleList(FeedForward(config) for _ in range(experts))

        def forward(self, x_1ND):
            x_ND = x_1ND[0]
            w_Nk, e_Nk = self.router(x_ND).float().softmax(-1).topk(TOP, -1)
            w_Nk = w_Nk / w_Nk.sum(-1, keepdim=True)
            if kind == "tokens":
                return torch.stack([sum(w * self.experts[e](x) for w, e in zip(ws, es))
                                    for x, ws, es in zip(x_ND, w_Nk, e_Nk.tolist())])[None]
            y_ND = torch.zeros_like(x_ND)
            for i, expert in enumerate(self.experts):
                token, slot = torch.where(e_Nk == i)
                if len(token):
                    y_ND = y_ND.index_add(
                        0, token, (expert(x_ND[token]) * w_Nk[token, slot, None]).to(y_ND.dtype))
            return y_ND[None]
    return Loop()


def contender(kind, experts, precision, s, device):
    """Answer each line on stdin (a number of steps) with the seconds of each step; an empty line
    ends it."""
    import torch
    from bantam.runtime import autocast, peak_memory, tune_allocator
    tune_allocator()
    device = torch.device(device)
    model, tokens = build(kind, experts, s).to(device), FEW if kind == "tokens" else s["tokens"]
    gen = torch.Generator().manual_seed(0)
    fresh = lambda: torch.randn(1, tokens, s["width"], generator=gen).to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step():
        model.zero_grad()
        # as in training, blocks have other sizes at every step
        x, d = fresh().requires_grad_(), fresh()
        wait(); start = time.perf_counter()
        with autocast(device, precision): y = model(x)
        y = y[0] if kind == "bantam" else y
        y.backward(d.to(y.dtype))
        wait()
        return time.perf_counter() - start

    for _ in range(2): step()
    say = lambda **kw: print(json.dumps(kw), flush=True)
    say(tokens=tokens, threads=torch.get_num_threads())
    for line in sys.stdin:
        if not line.strip(): break
        step() # wakes threads and caches, untimed
        say(seconds=[step() for _ in range(int(line))], memory=peak_memory(device))


# The one that asks them in turns

class Process:
    "A contender, ready to be asked for steps."
    def __init__(self, kind, experts, precision, shape, device):
        self.kind, self.experts, self.times, self.rounds = kind, experts, [], []
        args = ["--contender", f"{kind},{experts}", "--precision", precision, "--shape", shape,
                "--device", device]
        self.process = subprocess.Popen([sys.executable, __file__, *args], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.kind} with {self.experts} experts ended with status "
                     f"{self.process.wait()}; its message stands above")
        return json.loads(line)

    def steps(self, n):
        self.process.stdin.write(f"{n}\n"); self.process.stdin.flush()
        self.last = self.answer()
        self.times += self.last["seconds"]
        self.rounds.append(self.about["tokens"] / statistics.median(self.last["seconds"]))

    def close(self):
        self.process.stdin.write("\n"); self.process.stdin.close(); self.process.wait()


def compare(experts, peers, precision, shape, device, rounds, steps):
    """Let bantam's experts and their peers take turns; a row for each, and for each peer bantam's
    speed divided by its, round by round."""
    runners = [Process(k, experts, precision, shape, device) for k in ("bantam", *peers)]
    for i in range(rounds):
        for r in runners[i % len(runners):] + runners[:i % len(runners)]:
            r.steps(1 if r.kind == "tokens" else steps)
    for r in runners: r.close()
    rows = []
    for r in runners:
        low, mid, high = statistics.quantiles(r.times, n=4)
        rows.append(dict(shape=shape, precision=precision, name=r.kind,
                         experts=0 if r.kind == "dense" else experts, ms=mid*1e3,
                         quartiles=[low*1e3, high*1e3],
                         steps=len(r.times), tokens=r.about["tokens"],
                         tokens_per_second=r.about["tokens"]/mid, memory_mb=r.last["memory"]/2**20,
                         threads=r.about["threads"]))
    return rows, {r.kind: [ours/theirs for ours, theirs in zip(runners[0].rounds, r.rounds)]
                  for r in runners[1:]}



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    p.add_argument("--json", metavar="FILE", help="write the result, with every row, to FILE")
    p.add_argument("--shape", default="small,large", help="small, large or both")
    p.add_argument("--precision", default="bf16", help="bf16, fp32 or both")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--contender", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender:
        kind, experts = a.contender.split(",")
        return contender(kind, int(experts), a.precision, SHAPES[a.shape], a.device)

    rows, ratios, spread, targets = [], {}, {}, {}
    def keep(name, pairs, target=None):
        ratios[name], spread[name] = (round(statistics.median(pairs), 3),
                                      [round(min(pairs), 3), round(max(pairs), 3)])
        if target: targets[name] = target
    for shape in a.shape.split(","):
        for precision in a.precision.split(","):
            how = (precision, shape, a.device, *((3, 2) if a.quick else (10, 4)))
            got, pairs = compare(8, ("dense",), *how)
            rows += got
            keep(f"{shape} {precision} 8 experts to dense", pairs["dense"],
                 TARGET if precision == "bf16" else None)
            for n in EXPERTS:
                got, pairs = compare(n, ("experts", "tokens"), *how)
                rows += got
                for kind in pairs:
                    keep(f"{shape} {precision} {n} experts to the loop over {kind}", pairs[kind])

    about = machine(a.device)
    print(f"top {TOP}, forward and backward; {about.get('gpu', about['processor'])}, "
          f"{about['cores']} cores, wait policy {about['OMP_WAIT_POLICY']}")
    for n, s in SHAPES.items():
        print(f"{n}: width {s['width']}, inside an expert {s['inner']}, {s['tokens']} tokens")
    names = dict(bantam="bantam", dense="dense", experts="loop over experts",
                 tokens="loop over tokens")
    print(f"\n{'':5s} {'':5s} {'contender':18s} {'experts':>7s} {'tokens':>6s} {'ms a step':>10s} "
          f"{'quartiles':>17s} {'steps':>6s} {'tokens/s':>9s} {'MB':>6s}")
    for r in rows:
        print(f"{r['shape']:5s} {r['precision']:5s} {names[r['name']]:18s} {r['experts'] or '':>7} "
              f"{r['tokens']:6d} {r['ms']:10.1f} "
              f"{r['quartiles'][0]:8.1f}-{r['quartiles'][1]:<8.1f} {r['steps']:6d} "
              f"{r['tokens_per_second']:9.0f} {r['memory_mb']:6.0f}")
    print("\nspeed of bantam / speed of the other:")
    for key, ratio in ratios.items():
        print(f"{key:46s} {ratio:6.2f} times ({spread[key][0]:.2f} to {spread[key][1]:.2f} over "
              "the rounds)" + (f", target {targets[key]}" if key in targets else ""))
    result = dict(name="moe" + "_cuda"*(a.device == "cuda"), ratios=ratios, targets=targets,
                  met=all(ratios[k] >= t for k, t in targets.items()), machine=about,
                  versions=versions("torch"))
    report(result, a.json, rows=rows, spread=spread)


if __name__ == "__main__": main()
