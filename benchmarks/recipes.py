"""Which recipe is best here? Paired runs: one thing changed, everything else and the seeds the same.

    python benchmarks/recipes.py [--json FILE] # prints what FILE holds
    python benchmarks/recipes.py --steps 200 | --minutes 3 [--task characters|offline] [--text FILE] [--seeds 3] [--choices lr,ffn,...] [--threads N] [--json FILE] # runs what is missing
    python benchmarks/recipes.py --quick # shows that it runs

Two tasks: characters of a text of about 1.1 million (`--text`; without it, sources of Python's standard library) and the offline corpus in 1024 tokens. Every arm of
every choice differs from BASE in one thing, keeps the number of parameters (to 2 %), and meets the same batches from the same random start as BASE with the same seed. What counts is the loss on
all held-out text at equal wall time (`--minutes`), or for equal numbers of tokens (`--steps` of BASE), which does not depend on what else the machine does.

Every finished run is added to FILE (benchmarks/results/recipes.json) at once, and runs that are in it are not run again: stop and go on at any time. The table shows the mean
difference to BASE with the 95 % interval of the paired differences. The last line is one JSON object.
"""
import argparse, json, os
from pathlib import Path

from _common import machine, report, versions
from time_to_loss import Seconds, Steps, batches, characters, held_out, train

BASE = dict(context=64, batch=12, warmup=.02, precision="bf16",
            model=dict(hidden_size=128, intermediate_size=344, num_hidden_layers=4,
                       num_attention_heads=4, num_key_value_heads=4, ffn_type="swiglu",
                       qk_norm=True, residual_init="zero"),
            args=dict(lr=1e-2, muon_lr=1.5e-2, muon_momentum=.9, weight_decay=.1,
                      lr_scheduler="linear", min_lr_ratio=0.))
CHOICES = { # What differs from BASE, and where
    "optimiser": {"AdamW, lr 0.001": dict(args=dict(optimizer="adamw", lr=1e-3)),
                  "AdamW, lr 0.003": dict(args=dict(optimizer="adamw", lr=3e-3)),
                  "AdamW, lr 0.01": dict(args=dict(optimizer="adamw", lr=1e-2))},
    "muon_lr": {f"{v:g}": dict(args=dict(muon_lr=v)) for v in (.005, .03)},
    "lr": {f"{v:g}": dict(args=dict(lr=v)) for v in (.003, .03)},
    "momentum": {f"{v:g}": dict(args=dict(muon_momentum=v)) for v in (.8, .95)},
    "qk_norm": {"off": dict(model=dict(qk_norm=False))},
    "residual_init": {"scaled": dict(model=dict(residual_init="scaled"))},
    "soft-cap": {f"{v:g}": dict(model=dict(final_logit_softcapping=v)) for v in (15., 30.)},
    "ffn": {k: dict(model=dict(ffn_type=k, intermediate_size=512 if k in ("gelu", "relu2")
                               else 344)) for k in ("relu2", "gelu")},
    "schedule": {"cosine to 0.1": dict(args=dict(lr_scheduler="cosine", min_lr_ratio=.1)),
                 "wsd to 0": dict(args=dict(lr_scheduler="wsd")),
                 "constant": dict(args=dict(lr_scheduler="constant"))},
    "batch": {f"{v}": dict(batch=v) for v in (6, 24)},
    "heads": {f"{v}": dict(model=dict(num_attention_heads=v, num_key_value_heads=v))
              for v in (2, 8)},
    "weight_decay": {f"{v:g}": dict(args=dict(weight_decay=v)) for v in (0., .3)},
    "muon": {"word tables too": dict(args=dict(muon_exclude_embeddings=False)),
             "bias correction": dict(args=dict(muon_bias_correction=True)),
             "clip by layer": dict(args=dict(muon_clip_by_layer=True))},
    "precision": {"fp32": dict(precision="fp32")}}


def plans(choices):
    "`{(choice, arm): plan}`, BASE first."
    merge = lambda change: BASE | change | {k: BASE[k] | change.get(k, {})
                                            for k in ("model", "args")}
    return {("base", "base"): BASE} | {(c, arm): merge(change) for c in choices
                                       for arm, change in CHOICES[c].items()}


def corpus(task, text):
    "Ids to train on, ids held out, size of the vocabulary."
    import torch
    if task == "characters":
        ids, vocab = characters(text)
        return ids[:int(.9*len(ids))], ids[int(.9*len(ids)):], vocab
    from bantam.data.offline import documents
    from bantam.text.trainbpe import train_bpe
    texts = [d["text"] for d in documents(12000, seed=0) if "text" in d]
    cut = int(.9 * len(texts))
    tok = train_bpe(texts[:2000], vocab_size=1024)
    a, b = (torch.tensor([i for t in part for i in tok.encode(t, add_bos=True, add_eos=True)])
            for part in (texts[:cut], texts[cut:]))
    return a, b, tok.vocab_size


def one_run(plan, data, seed, budget):
    "Train one arm with one seed."
    import torch
    from bantam.args import TrainingArgs
    from bantam.config import BantamConfig
    from bantam.data.loader import Batch
    from bantam.model.lm import BantamForCausalLM
    from bantam.runtime import autocast, seed_everything
    from bantam.train.optim import build_optimizer
    from bantam.train.schedule import lr_scale
    from bantam.train.step import accumulate, take_step
    ids, valid, vocab = data
    cpu, precision, context = torch.device("cpu"), plan["precision"], plan["context"]
    args = TrainingArgs(**plan["args"])

    def go(stop):
        seed_everything(seed)
        model = BantamForCausalLM(BantamConfig(vocab_size=vocab, max_position_embeddings=context,
                                               **plan["model"]))
        opt = build_optimizer(model, args)
        def step(done, x, y):
            scale = lr_scale(int(done*10_000), 10_000, int(plan["warmup"]*10_000),
                             args.lr_scheduler, args.min_lr_ratio)
            take_step(opt, accumulate(model, [Batch(x, y)], cpu, precision), max(scale, 1e-3),
                      args.grad_clip)
        return train(step, stop, batches(ids, plan["batch"], seed, context)), model

    if "minutes" in budget:
        go(Steps(3)) # wakes threads and caches
        stop = Seconds(60*budget["minutes"])
    else:
        stop = Steps(
            round(budget["steps"] * BASE["batch"]*BASE["context"] / (plan["batch"]*context)))
    (seconds, steps), model = go(stop)
    model.eval()
    def loss_of(x, y):
        with autocast(cpu, precision): return model(x, targets=y).loss
    return dict(loss=held_out(loss_of, valid, context), steps=steps, seconds=round(seconds, 3),
                parameters=sum(p.numel() for p in model.parameters()))


def save(path, runs, about):
    "The whole file anew, in place of the old one only when it is complete."
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(dict(name="recipes", base=BASE, machine=about, runs=runs),
                              indent=1) + "\n")
    tmp.replace(path)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true",
                   help="two choices, two seeds, six steps, nothing kept: shows that it runs")
    p.add_argument("--json", type=Path, default=Path(__file__).parent/"results/recipes.json",
                   help="the file of runs that grows")
    p.add_argument("--task", choices=("characters", "offline"), default="characters")
    p.add_argument("--text", metavar="FILE", help="text of the character task")
    p.add_argument("--steps", type=int, help="steps of BASE, and as many tokens of the others")
    p.add_argument("--minutes", type=float, help="wall time of every run, in minutes")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--choices", default=",".join(CHOICES), help="which, of " + ", ".join(CHOICES))
    p.add_argument("--threads", type=int, help="of PyTorch")
    a = p.parse_args()
    choices = a.choices.split(",")
    if unknown := set(choices) - CHOICES.keys():
        p.error(f"unknown choice {', '.join(unknown)}; there are {', '.join(CHOICES)}")
    if a.steps and a.minutes: p.error("--steps and --minutes contradict each other; give one")
    if a.quick: choices, a.seeds, a.steps, a.minutes = ["optimiser", "ffn"], 2, 6, None
    import torch
    from bantam.runtime import tune_allocator
    tune_allocator()
    if a.threads: torch.set_num_threads(a.threads)
    about = machine()
    runs = json.loads(a.json.read_text())["runs"] if a.json.exists() and not a.quick else []
    if a.steps or a.minutes: runs = run_missing(a, choices, runs, about)
    elif not runs: p.error(f"{a.json} holds no runs yet; give --steps or --minutes")
    show(runs, about)


def run_missing(a, choices, runs, about):
    """Make the runs that the file lacks, keep each at once, and return those of this task and
    budget."""
    import torch
    budget = dict(minutes=a.minutes) if a.minutes else dict(steps=a.steps)
    text = None if a.task == "offline" else os.path.basename(a.text) if a.text else "stdlib"
    where = dict(task=a.task, text=text, budget=budget)
    data = corpus(a.task, a.text)
    todo = [(seed, names, plan) for seed in range(a.seeds)
            for names, plan in plans(choices).items()]
    known = {json.dumps([r["task"], r["text"], r["budget"], r["plan"], r["seed"]], sort_keys=True)
             for r in runs}
    for seed, (choice, arm), plan in todo:
        if json.dumps([a.task, text, budget, plan, seed], sort_keys=True) in known: continue
        got = one_run(plan, data, seed, budget)
        runs.append(where | dict(choice=choice, arm=arm, seed=seed,
                                 plan=plan) | got | dict(threads=torch.get_num_threads()))
        if not a.quick: save(a.json, runs, about)
        print(f"{a.task} {choice:14s} {arm:18s} seed {seed}: loss {got['loss']:.4f} after "
              f"{got['steps']} steps, {got['seconds']:.1f} s", flush=True)

    return [r for r in runs if all(r[k] == v for k, v in where.items())]


def show(runs, about):
    "A table for each task and budget, and the line of JSON."
    import torch
    from bantam.train.recipes import comparisons, groups, table
    found = {}
    for name, mine in groups(runs).items():
        print(f"\n{name}\n\n{table(mine)}")
        found |= {f"{name}: {c.choice} {c.arm}": round(c.mean, 4) for c in comparisons(mine)}
    print()
    report(dict(name="recipes", ratios=found, targets={}, met=True, machine=about,
                versions=versions("torch")))


if __name__ == "__main__": main()
