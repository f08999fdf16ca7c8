"""One training step beside the same step in other libraries: forward, backward, clipping, AdamW.

    python benchmarks/train_step.py [--quick] [--json FILE] [--shape small|large] [--precision fp32,bf16] [--peers transformers,...] [--compile] [--rounds N]

Peers: `transformers` (Llama), `litgpt`, `x-transformers`, `transformer-toolkit`; `benchmarks/peers.txt` names what to install. All have the same
shape, tied embeddings, optimiser settings and initial scale. Every contender lives in a process of its own, because allocator settings and
environment belong to a process. The processes take turns, a few steps each, so that whatever else the machine does hits all of them alike.
Two comparisons, each with the fastest peer:

- as shipped: each as its user gets it. bantam sets the C allocator for itself (`tune_allocator`), the peers do not.
- same environment: the peers' processes get bantam's allocator settings too.

With `--compile` all of them, bantam too, run under `torch.compile`. The wait policy of OpenMP is the machine's default for all of them, and is
printed. The last line is one JSON object.
"""
import argparse, importlib.util, json, os, statistics, subprocess, sys, time

from _common import machine, report, versions

SHAPES = dict(
    small=dict(vocab=4096, width=256, layers=6, heads=8, kv_heads=2, inner=688,
               length=256, batch=8),
    large=dict(vocab=32000, width=512, layers=8, heads=8, kv_heads=2, inner=1408,
               length=512, batch=4))
TARGETS = dict(
    small={"fp32 as shipped": 1.2, "bf16 as shipped": 1.2, "fp32 same environment": 1.05,
           "bf16 same environment": 1.0},
    large={"bf16 as shipped": 1.3, "bf16 same environment": 1.15})
MEMORY = 0.6 # share of the fastest peer's peak memory at the large shape
PEERS = {"transformers": "transformers", "litgpt": "litgpt", "x-transformers": "x_transformers",
         "transformer-toolkit": "transformer_toolkit"}


# Inside a contender's process. Each builder gives a module and a function from ids (B,T) to the
# loss of predicting each next id.

def of_bantam(s, bantam_model):
    return bantam_model, lambda m, ids: m(input_ids=ids, labels=ids).loss


def of_transformers(s, _):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=s["vocab"], hidden_size=s["width"], intermediate_size=s["inner"],
        num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"], max_position_embeddings=s["length"],
        tie_word_embeddings=True, rms_norm_eps=1e-6)), lambda m, ids: m(
            input_ids=ids, labels=ids).loss


def of_litgpt(s, _):
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy
    model = GPT(Config(block_size=s["length"], vocab_size=s["vocab"], padded_vocab_size=s["vocab"],
                       n_layer=s["layers"], n_head=s["heads"], n_embd=s["width"],
                       n_query_groups=s["kv_heads"],
                       rotary_percentage=1., parallel_residual=False, bias=False,
                       norm_class_name="RMSNorm", norm_eps=1e-6, mlp_class_name="LLaMAMLP",
                       intermediate_size=s["inner"]))
    model.lm_head.weight = model.transformer.wte.weight
    return model, lambda m, ids: chunked_cross_entropy(m(ids[:,:-1]), ids[:,1:])


def of_x_transformers(s, _):
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
    layers = Decoder(dim=s["width"], depth=s["layers"], heads=s["heads"],
                     attn_dim_head=s["width"]//s["heads"], attn_kv_heads=s["kv_heads"],
                     rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True,
                     ff_swish=True, ff_mult=s["inner"]/s["width"], ff_no_bias=True, attn_flash=True)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=s["vocab"], max_seq_len=s["length"],
                                                    attn_layers=layers, tie_embedding=True,
                                                    use_abs_pos_emb=False)), lambda m, ids: m(ids)


def of_transformer_toolkit(s, _):
    import torch.nn.functional as F
    from transformer_toolkit.model import Transformer, TransformerConfig
    model = Transformer(TransformerConfig(vocab_size=s["vocab"], dim=s["width"],
                                          n_layers=s["layers"], n_heads=s["heads"],
                                          max_seq=s["length"], attn="gqa", n_kv_heads=s["kv_heads"],
                                          ffn="swiglu",
                                          hidden_dim=s["inner"], norm="rmsnorm", pos_enc="rope",
                                          tie_weights=True))
    def loss(m, ids):
        out = m(ids[:,:-1])
        logits = out[0] if isinstance(out, tuple) else out
        return F.cross_entropy(logits.flatten(0, 1), ids[:,1:].flatten())
    return model, loss


BUILDERS = {"bantam": of_bantam, "transformers": of_transformers, "litgpt": of_litgpt,
            "x-transformers": of_x_transformers, "transformer-toolkit": of_transformer_toolkit}


def build(kind, s):
    "A fresh model of shape `s`, its loss, and the floating point operations of a token."
    import torch
    torch.manual_seed(0)
    from bantam.config import BantamConfig
    from bantam.model.lm import BantamForCausalLM
    import bantam.model.account # adds flops_per_token
    config = BantamConfig(vocab_size=s["vocab"], hidden_size=s["width"],
                          intermediate_size=s["inner"], num_hidden_layers=s["layers"],
                          num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"],
                          max_position_embeddings=s["length"])
    with torch.device("meta"): flops = BantamForCausalLM(config).flops_per_token(s["length"])
    model,loss = BUILDERS[kind](s, BantamForCausalLM(config) if kind == "bantam" else None)
    if kind != "bantam":
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1: p.normal_(0, .02)
    return model.train(), loss, flops


def contender(kind, tuned, precision, s, compiled):
    """Answer each line on stdin (a number of steps) with the seconds of each step; an empty line
    ends it."""
    import torch
    from bantam.runtime import autocast, peak_memory, tune_allocator
    if tuned: tune_allocator()
    model, loss_of, flops = build(kind, s)
    run = torch.compile(model) if compiled else model
    opt = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(.9, .95),
                            weight_decay=.1, fused=True)
    ids = torch.randint(s["vocab"], (s["batch"], s["length"]),
                        generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")

    def step():
        start = time.perf_counter()
        with autocast(cpu, precision): loss = loss_of(run, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        return time.perf_counter() - start, loss.item()

    first = [step()[1] for _ in range(3)][0]
    say = lambda **kw: print(json.dumps(kw), flush=True)
    say(first=first, flops=flops, threads=torch.get_num_threads())
    for line in sys.stdin:
        if not line.strip(): break
        step() # wakes threads and caches, untimed
        seconds, losses = zip(*(step() for _ in range(int(line))))
        say(seconds=seconds, loss=losses[-1], memory=peak_memory())


def product_peak(precision):
    "The machine's matrix products, in operations a second; in a process without a model."
    code = ("import torch; from bantam.runtime import matmul_peak; "
            f"print(matmul_peak(torch.device('cpu'), {precision!r}, repeats=50))")
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                                text=True).stdout)


# The one that asks them in turns

class Process:
    "A contender, ready to be asked for steps."
    def __init__(self, name, precision, shape, compiled):
        self.name, self.times, self.rounds = name, [], []
        self.process = subprocess.Popen([sys.executable, __file__, "--contender", name,
                                         "--precision", precision, "--shape", shape,
                                         *["--compile"]*compiled],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with status {self.process.wait()}; "
                     "its message stands above")
        return json.loads(line)

    def steps(self, n):
        self.process.stdin.write(f"{n}\n"); self.process.stdin.flush()
        self.last = self.answer()
        self.times += self.last["seconds"]
        self.rounds.append(statistics.median(self.last["seconds"]))

    def close(self):
        self.process.stdin.write("\n"); self.process.stdin.close(); self.process.wait()


def compare(precision, shape, names, rounds, steps, compiled):
    """Let the contenders take turns; one row for each, and the ratios of the rounds of bantam to
    each peer."""
    peak = product_peak(precision)
    runners = [Process(n, precision, shape, compiled) for n in names]
    for i in range(rounds):
        for r in runners[i % len(runners):] + runners[:i % len(runners)]: r.steps(steps)
    for r in runners: r.close()
    s, rows = SHAPES[shape], []
    for r in runners:
        low, mid, high = statistics.quantiles(r.times, n=4)
        speed = s["batch"] * s["length"] / mid
        rows.append(dict(precision=precision, name=r.name, ms=mid*1e3,
                         quartiles=[low*1e3, high*1e3], steps=len(r.times), tokens_per_second=speed,
                         peak_share=speed*r.about["flops"]/peak,
                         memory_mb=r.last["memory"]/2**20,
                         first_loss=r.about["first"], last_loss=r.last["loss"],
                         threads=r.about["threads"]))
    pairs = {r.name: [theirs/ours for theirs, ours in zip(r.rounds, runners[0].rounds)]
             for r in runners[1:]}
    return rows, pairs



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    p.add_argument("--json", metavar="FILE", help="write the result, with every row, to FILE")
    p.add_argument("--shape", choices=SHAPES, default="small")
    p.add_argument("--precision", default="fp32,bf16", help="fp32, bf16 or both")
    p.add_argument("--peers", default=",".join(PEERS), help="which peers, of " + ", ".join(PEERS))
    p.add_argument("--compile", action="store_true", help="all of them under torch.compile")
    p.add_argument("--rounds", type=int, default=12, help="turns of 4 timed steps each")
    p.add_argument("--contender", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender:
        name, _, tuned = a.contender.partition("+")
        return contender(name, name == "bantam" or tuned == "tuned", a.precision,
                         SHAPES[a.shape], a.compile)

    for v in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"):
        os.environ.pop(v, None)
    asked = a.peers.split(",")
    if unknown := set(asked) - PEERS.keys():
        p.error(f"unknown peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    missing = [n for n in asked if importlib.util.find_spec(PEERS[n]) is None]
    peers = [n for n in asked if n not in missing]
    names = ["bantam", *peers, *(f"{n}+tuned" for n in peers)]
    rows, ratios, spread, by_peer = [], {}, {}, {}
    for precision in a.precision.split(","):
        got, pairs = compare(precision, a.shape, names,
                             *((2, 3) if a.quick else (a.rounds, 4)), a.compile)
        rows += got
        median = {n: statistics.median(r) for n,r in pairs.items()}
        by_peer |= {f"{precision} {n}": round(m, 3) for n,m in median.items()}
        for end, kind in (("", "as shipped"), ("+tuned", "same environment")):
            group = [n for n in pairs if n.endswith("+tuned") == bool(end)]
            if not group: continue
            fastest = min(group, key=median.get)
            ratios[key := f"{precision} {kind}"] = round(median[fastest], 3)
            spread[key] = [fastest, round(min(pairs[fastest]), 3), round(max(pairs[fastest]), 3)]
            if a.shape == "large" and end:
                memory = {r["name"]: r["memory_mb"] for r in got}
                ratios[f"{precision} memory"] = round(memory["bantam"]/memory[fastest], 3)

    about = machine()
    print(f"{', '.join(f'{k} {v}' for k, v in SHAPES[a.shape].items())}; {about['processor']}, "
          f"{about['cores']} cores, "
          f"wait policy {about['OMP_WAIT_POLICY']}{', compiled' if a.compile else ''}\n")
    print(f"{'':5s} {'contender':26s} {'ms a step':>10s} {'quartiles':>15s} {'steps':>6s} "
          f"{'tokens/s':>9s} {'of peak':>8s} {'MB':>6s} {'ratio':>6s} {'first loss':>11s} "
          f"{'last':>6s}")
    for r in rows:
        ratio = by_peer.get(f"{r['precision']} {r['name']}", 1.)
        print(f"{r['precision']:5s} {r['name']:26s} {r['ms']:10.1f} "
              f"{r['quartiles'][0]:7.1f}-{r['quartiles'][1]:<7.1f} {r['steps']:6d} "
              f"{r['tokens_per_second']:9.0f} "
              f"{r['peak_share']:8.2f} {r['memory_mb']:6.0f} {ratio:6.2f} {r['first_loss']:11.3f} "
              f"{r['last_loss']:6.3f}")
    for name in missing: print(f"missing: {name} (not installed, so not compared)")
    print()
    targets = {} if a.compile else dict(TARGETS[a.shape])
    if a.compile: targets = {k: t for k,t in TARGETS[a.shape].items() if "same" in k}
    targets = {k: t for k,t in targets.items() if k.split()[0] in a.precision.split(",")}
    for key, ratio in ratios.items():
        if key in spread:
            print(f"{key:22s} {ratio:.2f} times the fastest peer, "
                  f"{spread[key][0]} ({spread[key][1]:.2f} to {spread[key][2]:.2f} over the "
                  "rounds)" + (f", target {targets[key]}" if key in targets else ""))
        else:
            print(f"{key:22s} {ratio:.2f} of the fastest peer's peak"
                  + (f", target at most {MEMORY}" if key == "bf16 memory" else ""))
    met = (not missing and all(ratios.get(k, 0) >= t for k, t in targets.items())
           and ratios.get("bf16 memory", 0) <= MEMORY)
    name = "train_step" + "_large"*(a.shape == "large") + "_compiled"*a.compile
    result = dict(name=name, ratios=ratios, targets=targets | (
        {"bf16 memory": MEMORY} if "bf16 memory" in ratios else {}), met=met, machine=about,
                  versions=versions("torch", *PEERS))
    report(result, a.json, rows=rows, spread=spread, by_peer=by_peer, missing=missing)


if __name__ == "__main__": main()
