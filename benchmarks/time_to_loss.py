"""How long until a small character model knows as much as the usual recipe: bantam beside a plain PyTorch baseline, over three seeds.

    python benchmarks/time_to_loss.py [--quick] [--json FILE] [--text FILE] [--seeds 3]

The baseline is the widely known small recipe for a CPU, written out here on plain PyTorch: 4 layers, 4 heads, width 128, context 64, batch 12, GELU,
learned positions, LayerNorm, tied head, no dropout, AdamW with its rate from 1e-3 to 1e-4 along a cosine over 2000 steps, 100 of them warm-up, beta2 0.99,
weight decay 0.1, clipping at 1, float32, unfused. bantam gets a model of at most as many parameters, the same context and the same characters. Two questions:

- sprint: the share of the baseline's wall time after which bantam's held-out loss is no higher than the baseline's last one.
- equal time: how much lower bantam's loss is when it may take as long as the baseline took.

Text of about 1.1 million characters: `--text`, or else sources of Python's standard library, which every machine has; 90 % to train on, 10 % held out.
Held-out loss is that of every character of the held-out part, in windows of 64, for both. Clocks run during training steps (batch, forward, backward, update), not during
evaluation; start-up is warmed up alike. Every run is a process of its own, with the same C allocator settings. The last line is one JSON object.
"""
import argparse, json, math, os, statistics, subprocess, sys, time

from _common import machine, report, versions

CONTEXT = 64
BASELINE = dict(layers=4, heads=4, width=128, batch=12, steps=2000, warmup=100, lr=1e-3,
                min_lr=1e-4, betas=(.9, .99), decay=.1, clip=1.)
MODEL = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=CONTEXT,
             ffn_type="relu2", qk_norm=True, residual_init="zero")
SPRINT = dict(steps=180, batch=24, precision="bf16", warmup=.01, model={},
              args=dict(lr=2e-2, muon_lr=2e-2, muon_momentum=.85, beta2=.95, weight_decay=0.,
                        grad_clip=1.))
EQUAL = SPRINT | dict(args=SPRINT["args"] | dict(lr=1e-2, muon_lr=1.5e-2, muon_momentum=.95,
                                                 weight_decay=.1))
TARGETS = {"time to the baseline's loss": 1/6, "loss below the baseline's at equal time": .25}


def characters(path):
    "Ids of the text, (N,), and the size of its alphabet."
    import torch
    text = open(path, encoding="utf-8").read() if path else stdlib(1_115_000)
    alphabet = sorted(set(text))
    index = {c: i for i, c in enumerate(alphabet)}
    return torch.tensor([index[c] for c in text]), len(alphabet)


def stdlib(length):
    "Sources of the standard library in the order of their names, as far as they are ASCII."
    import sysconfig
    from pathlib import Path
    texts, n = [], 0
    for f in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = f.read_text(encoding="utf-8", errors="replace")
        if text.isascii(): texts.append(text); n += len(text)
        if n > length: break
    return "\n".join(texts)[:length]


def batches(ids, size, seed, context=CONTEXT):
    "Endless random windows: inputs and targets (B,T)."
    import torch
    gen = torch.Generator().manual_seed(seed)
    windows = ids.unfold(0, context + 1, 1)
    while True:
        rows = windows[torch.randint(len(windows), (size,), generator=gen)]
        yield rows[:,:-1].contiguous(), rows[:,1:].contiguous()


# The baseline, on plain PyTorch

def baseline_model(vocab):
    import torch
    import torch.nn.functional as F
    from torch import nn
    L, H, D = BASELINE["layers"], BASELINE["heads"], BASELINE["width"]

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.qkv, self.out = nn.LayerNorm(D, bias=False), nn.Linear(
                D, 3*D, bias=False), nn.Linear(D, D, bias=False)
            self.ln2, self.up, self.down = nn.LayerNorm(D, bias=False), nn.Linear(
                D, 4*D, bias=False), nn.Linear(4*D, D, bias=False)

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = (t.view(B, T, H, D//H).transpose(1, 2)
                       for t in self.qkv(self.ln1(x)).split(D, -1))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(a.transpose(1, 2).reshape(B, T, D))
            return x + self.down(F.gelu(self.up(self.ln2(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(vocab, D), nn.Embedding(CONTEXT, D)
            self.layers, self.norm = (nn.ModuleList(Layer() for _ in range(L)),
                                      nn.LayerNorm(D, bias=False))
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    nn.init.normal_(
                        p, std=.02 / ((2*L)**.5 if "out." in name or "down." in name else 1))

        def forward(self, x, y):
            h = self.words(x) + self.places.weight[:x.shape[1]]
            for layer in self.layers: h = layer(h)
            return F.cross_entropy((self.norm(h) @ self.words.weight.T).flatten(0, 1), y.flatten())

    return Model()


def run_baseline(ids, vocab, seed, b, stop):
    import torch
    model = baseline_model(vocab)
    groups = [dict(params=[p for p in model.parameters() if p.ndim == n], weight_decay=d)
              for n, d in ((2, b["decay"]), (1, 0.))]
    opt = torch.optim.AdamW(groups, lr=b["lr"], betas=b["betas"], foreach=False, fused=False)

    def rate(step):
        if step < b["warmup"]: return b["lr"] * (step + 1) / (b["warmup"] + 1)
        share = (step - b["warmup"]) / (b["steps"] - b["warmup"])
        return b["min_lr"] + (b["lr"] - b["min_lr"]) * (1 + math.cos(math.pi*share)) / 2

    def step(done, x, y):
        for g in opt.param_groups: g["lr"] = rate(done * b["steps"])
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), b["clip"])
        opt.step(); opt.zero_grad(set_to_none=True)

    return train(step, stop, batches(ids, b["batch"], seed)), model, model


# bantam

def run_bantam(ids, vocab, seed, plan, stop):
    import torch
    from bantam.args import TrainingArgs
    from bantam.config import BantamConfig
    from bantam.data.loader import Batch
    from bantam.model.lm import BantamForCausalLM
    from bantam.runtime import autocast, has_bf16
    from bantam.train.optim import build_optimizer
    from bantam.train.step import accumulate, take_step
    cpu = torch.device("cpu")
    precision = plan["precision"] if has_bf16(cpu) else "fp32"
    model = BantamForCausalLM(BantamConfig(vocab_size=vocab, **MODEL | plan["model"]))
    args = TrainingArgs(**plan["args"])
    opt = build_optimizer(model, args)

    def loss_of(x, y):
        with autocast(cpu, precision): return model(x, targets=y).loss

    def step(done, x, y):
        loss = accumulate(model, [Batch(x, y)], cpu, precision)
        take_step(opt, loss, min(1 - done, (done + 1/plan["steps"]) / plan["warmup"]),
                  args.grad_clip)

    return train(step, stop, batches(ids, plan["batch"], seed)), model, loss_of


# What both share

def train(step, progress, data):
    """Seconds and number of steps until `progress(steps, seconds)` reaches one; only the steps
    count, with the making of their batches."""
    elapsed, i = 0., 0
    while (done := progress(i, elapsed)) < 1:
        start = time.perf_counter()
        step(done, *next(data))
        elapsed += time.perf_counter() - start
        i += 1
    return elapsed, i


def held_out(loss_of, ids, context=CONTEXT):
    "Mean loss of every character of `ids` in windows of the context."
    import torch
    n = (len(ids) - 1) // context
    x, y = (ids[k:k + n*context].view(n, context) for k in (0, 1))
    with torch.no_grad():
        return sum(loss_of(a, b).item() * len(a) for a, b in zip(x.split(128), y.split(128))) / n


def contender(a):
    "One run in a process of its own; its last line is the result."
    import torch
    from bantam.runtime import seed_everything, tune_allocator
    tune_allocator()
    ids, vocab = characters(a.text)
    cut = int(.9 * len(ids))
    run = run_baseline if a.contender == "baseline" else run_bantam
    # a few steps on a model that is thrown away wake threads and caches
    for stop in (Steps(3), Seconds(a.seconds) if a.seconds else Steps(a.steps)):
        seed_everything(a.seed)
        (seconds, steps), model, loss_of = run(ids[:cut], vocab, a.seed, json.loads(a.plan), stop)
    model.eval()
    print(json.dumps(dict(seconds=seconds, steps=steps, loss=held_out(loss_of, ids[cut:]),
                          parameters=sum(p.numel() for p in model.parameters()),
                          threads=torch.get_num_threads())))


def Steps(n): return lambda i, elapsed: i/n
def Seconds(n): return lambda i, elapsed: elapsed/n


def run(name, plan, a, seed, **stop):
    "The result of a contender."
    command = [sys.executable, __file__, "--contender", name, "--plan", json.dumps(plan), "--seed",
               str(seed), *(["--text", a.text] if a.text else [])]
    done = subprocess.run(command + [f"--{k}={v}" for k, v in stop.items()],
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} ended with status {done.returncode}; its message stands above")
    return json.loads(done.stdout.splitlines()[-1])



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true",
                   help="a fortieth of the steps, one seed: shows that it runs, not how well")
    p.add_argument("--json", metavar="FILE", help="write the result, with every run, to FILE")
    p.add_argument("--text", metavar="FILE", help="train on this text; "
                                                  "without it on sources of Python's standard "
                                                  "library")
    p.add_argument("--seeds", type=int, default=3)
    for hidden, kind in dict(contender=str, plan=str, seed=int, steps=int, seconds=float).items():
        p.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender: return contender(a)

    small = 40 if a.quick else 1
    rows, shares, gains, reached = [], [], [], []
    print(f"{'seed':>4s}  {'run':10s} {'steps':>6s} {'seconds':>8s} {'ms a step':>10s} "
          f"{'held-out loss':>14s} {'parameters':>11s}")
    for seed in range(1 if a.quick else a.seeds):
        base = run("baseline", BASELINE, a, seed, steps=BASELINE["steps"] // small)
        got = {"baseline": base, "sprint": run("sprint", SPRINT, a, seed,
                                               steps=SPRINT["steps"] // small),
               "equal time": run("equal time", EQUAL, a, seed, seconds=base["seconds"])}
        for name, r in got.items():
            rows.append(dict(seed=seed, run=name) | r)
            print(f"{seed:4d}  {name:10s} {r['steps']:6d} {r['seconds']:8.2f} "
                  f"{1e3*r['seconds']/r['steps']:10.1f} {r['loss']:14.4f} {r['parameters']:11d}",
                  flush=True)
        if max(got[n]["parameters"] for n in ("sprint", "equal time")) > base["parameters"]:
            sys.exit("bantam has more parameters than the baseline; make MODEL smaller")
        reached.append(got["sprint"]["loss"] <= base["loss"])
        shares.append(got["sprint"]["seconds"] / base["seconds"])
        gains.append(base["loss"] - got["equal time"]["loss"])

    ratios = dict(zip(TARGETS, (round(statistics.mean(shares), 4),
                                round(statistics.mean(gains), 4))))
    (sixth, below), (share, gain) = TARGETS.values(), ratios.values()
    about = machine()
    print(f"\n{a.text or 'sources of the standard library'}; {about['processor']}, "
          f"{about['cores']} cores, wait policy {about['OMP_WAIT_POLICY']}")
    print(f"sprint: {share:.3f} of the baseline's time ({min(shares):.3f} to {max(shares):.3f}), "
          f"target at most {sixth:.3f}; loss reached in {sum(reached)} of {len(reached)} seeds")
    print(f"equal time: loss lower by {gain:.3f} ({min(gains):.3f} to {max(gains):.3f}), "
          f"target at least {below}")
    import torch
    met = not a.quick and all(reached) and share <= sixth and gain >= below
    result = dict(name="time_to_loss", ratios=ratios, targets=TARGETS, met=met, machine=about,
                  versions=versions("torch"))
    text = os.path.basename(a.text) if a.text else "stdlib"
    report(result, a.json, rows=rows, reached=reached, text=text, sprint=SPRINT, equal_time=EQUAL,
           model=MODEL)


if __name__ == "__main__": main()
