"""Memory that `plan` predicts beside the memory that a training process really takes.

    python benchmarks/plan_memory.py [--quick] [--json FILE] [--device cpu|cuda] [--only WORD]

Each case is a process of its own. Measured is the most resident memory that the process ever held, minus what it held when everything was imported and
nothing was built (on CUDA: the most that PyTorch took there). The steps are the trainer's own: `accumulate` and `take_step`. Predicted is the sum of `plan`'s kinds; what it adds to the tensors for the allocator was fitted to other shapes (`OTHERS`).
The last line is one JSON object; `ratios` are predicted / measured.
"""
import argparse, json, os, subprocess, sys

from _common import machine, report, versions

# name: (preset, changes of the shape, batch_size, seq_len, accum_steps, gradient checkpointing,
# precision, optimizer)
CASES = {
    "tiny": ("tiny", {}, 32, 128, 1, False, "fp32", "muon"),
    "tiny, checkpointing, bf16": ("tiny", {}, 64, 128, 2, True, "bf16", "muon"),
    "small, adamw": ("small", {}, 8, 256, 1, False, "fp32", "adamw"),
    "small, experts": ("small", dict(expert_type="topk", num_experts=4, moe_intermediate_size=512),
                       8, 256, 2, False, "fp32", "muon"),
    "medium, bf16": ("medium", {}, 2, 512, 2, False, "bf16", "muon"),
    "dense_25m, checkpointing": ("dense_25m", {}, 4, 512, 1, True, "fp32", "muon"),
    "mac_nano, experts, checkpointing": ("mac_nano", dict(num_hidden_layers=4), 2, 256, 1, True,
                                         "fp32", "muon"),
    "dense_65m": ("dense_65m", {}, 2, 256, 1, False, "fp32", "muon"),
    "dense_65m, bf16": ("dense_65m", {}, 2, 512, 2, False, "bf16", "adamw"),
}
EXPERTS = dict(expert_type="topk", num_experts=4, moe_intermediate_size=256)


def of(width, layers, **more):
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width//64,
                num_key_value_heads=width//64, intermediate_size=3*width) | more


# Shapes from which `plan` has the shares of what an allocator spoils; none of them is judged
OTHERS = {
    "192 x 6": ("small", of(192, 6, vocab_size=16000), 8, 192, 1, False, "fp32", "muon"),
    "384 x 8": ("small", of(384, 8), 4, 256, 1, False, "fp32", "muon"),
    "256 x 4, bf16": ("small", of(256, 4, vocab_size=24000), 12, 256, 2, False, "bf16", "adamw"),
    "320 x 6, adamw": ("small", of(320, 6, vocab_size=20000), 6, 256, 2, False, "fp32", "adamw"),
    "192 x 5, experts": ("small", of(192, 5, vocab_size=24000, **EXPERTS), 12, 192, 1, False,
                         "fp32", "muon"),
    "256 x 8, checkpointing": ("small", of(256, 8, vocab_size=24000), 8, 384, 1, True,
                               "fp32", "muon"),
    "192 x 6, checkpointing, bf16": ("small", of(192, 6), 24, 192, 2, True, "bf16", "muon"),
    "448 x 10, checkpointing, adamw": ("small", of(448, 10), 4, 384, 1, True, "fp32", "adamw"),
    "256 x 6, experts, checkpointing": ("small", of(256, 6, vocab_size=20000, **EXPERTS), 6, 256, 2,
                                        True, "fp32", "muon"),
}
QUICK = ("small, adamw", "small, experts")


def resident(key):
    "A line of /proc/self/status, in bytes: VmRSS now, VmHWM the most so far."
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"): return int(line.split()[1]) * 1024


def child(case, device, steps):
    "Train a few steps and say what they took."
    import torch
    import bantam.presets
    from bantam.args import TrainingArgs
    from bantam.config import BantamConfig
    from bantam.data.loader import Batch
    from bantam.model.lm import BantamForCausalLM
    from bantam.runtime import tune_allocator
    from bantam.train.optim import build_optimizer
    from bantam.train.step import accumulate, take_step
    preset, changes, B, T, accum, again, precision, optimizer = (CASES | OTHERS)[case]
    device = torch.device(device)
    tune_allocator()
    before = resident("VmRSS") if device.type == "cpu" else 0
    torch.manual_seed(0)
    model = BantamForCausalLM(BantamConfig.from_preset(preset, **changes)).to(device)
    model.gradient_checkpointing = again
    opt = build_optimizer(model, TrainingArgs(optimizer=optimizer))
    gen = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = [torch.randint(model.config.vocab_size, (B, T + 1), generator=gen)
               for _ in range(accum)]
        batches = [Batch(i[:,:-1].contiguous(), i[:,1:].contiguous()) for i in ids]
        model.train()
        loss = accumulate(model, batches, device, precision)
        if os.environ.get("PHASES"):
            print("accumulate", (resident("VmHWM") - before)/2**20, file=sys.stderr)
        take_step(opt, loss, 1., 1.)
        if os.environ.get("PHASES"):
            print("step", (resident("VmHWM") - before)/2**20, file=sys.stderr)
    print(json.dumps(dict(bytes=torch.cuda.max_memory_allocated() if device.type == "cuda"
                          else resident("VmHWM") - before)))


def predicted(case, device):
    "What plan says, by kind."
    from bantam.args import TrainingArgs
    from bantam.config import BantamConfig
    import bantam.presets
    from bantam.train.plan import plan
    preset, changes, B, T, accum, again, precision, optimizer = (CASES | OTHERS)[case]
    args = TrainingArgs(batch_size=B, seq_len=T, accum_steps=accum, precision=precision,
                        optimizer=optimizer, device=device, use_gradient_checkpoint=again)
    return plan(BantamConfig.from_preset(preset, **changes), args).memory


def measured(case, device, steps=3):
    "Run the case in a process of its own."
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--child", case, "--device",
                           device, "--steps", str(steps)], text=True, capture_output=True)
    if done.returncode: sys.exit(done.stderr[-3000:])
    if done.stderr: print(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


def calibrate():
    "Fit the shares of room 46 to the other shapes, by least squares of relative errors."
    import numpy as np
    import torch
    import bantam.presets
    from bantam.args import TrainingArgs
    from bantam.config import BantamConfig
    from bantam.model.lm import BantamForCausalLM
    from bantam.train.plan import FRAMEWORK, state_bytes
    rows = {False: [], True: []}
    for name, (preset, changes, B, T, accum, again, precision, optimizer) in OTHERS.items():
        with torch.device("meta"):
            model = BantamForCausalLM(BantamConfig.from_preset(preset, **changes))
        moments = model.moments(B, T, 4 if precision == "fp32" else 2,
                                state_bytes(model, optimizer), accum_steps=accum,
                                checkpointing=again)
        loss, real, tensors = (moments["loss"], measured(name, "cpu"),
                               max(sum(m.values()) for m in moments.values()))
        logits = loss["logits and their gradients"]
        if again:
            x, y = [
                moments["shared table"]["gradients"] + logits + moments["way back"]["activations"],
                loss["activations"]], real - FRAMEWORK - loss["weights"] - loss["optimizer"]
        else: x, y = [loss["activations"] + logits], real - FRAMEWORK - tensors
        rows[again].append([v/real for v in (*x, y)])
        print(f"{name:34s} {real/2**20:9.0f} MB")
    for again, names in ((False, ("HOLES",)), (True, ("APART", "SPOILT"))):
        table = np.array(rows[again])
        print(dict(zip(names, np.linalg.lstsq(table[:,:-1], table[:,-1],
                                              rcond=None)[0].round(3).tolist())))



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="two small cases")
    p.add_argument("--json", metavar="FILE", help="write the result, with every kind, to FILE")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--only", default="", help="cases whose name holds this word")
    p.add_argument("--child", choices=CASES | OTHERS, help=argparse.SUPPRESS)
    p.add_argument("--calibrate", action="store_true",
                   help="run the other shapes, and fit the shares of room 46 to them")
    p.add_argument("--steps", type=int, default=3, help="optimiser steps of each process")
    a = p.parse_args()
    if a.child: return child(a.child, a.device, a.steps)
    if a.calibrate: return calibrate()
    cases = [c for c in CASES if a.only in c and (not a.quick or c in QUICK)]
    if not cases: sys.exit(f"no case holds the word {a.only!r}; there are {', '.join(CASES)}")
    rows = {c: dict(measured=measured(c, a.device, a.steps), kinds=predicted(c, a.device))
            for c in cases}
    print(f"{'':34s} {'planned':>9s} {'measured':>9s} {'off':>6s}   MB")
    for c, r in rows.items():
        said = sum(r["kinds"].values())
        print(f"{c:34s} {said/2**20:9.0f} {r['measured']/2**20:9.0f} "
              f"{said/r['measured'] - 1:+6.1%}")
    ratios = {c: round(sum(r["kinds"].values())/r["measured"], 3) for c, r in rows.items()}
    result = dict(name="plan_memory" + "_cuda"*(a.device == "cuda"), ratios=ratios,
                  targets={c: [.9, 1.1] for c in rows},
                  met=all(.9 <= v <= 1.1 for v in ratios.values()),
                  machine=machine(a.device), versions=versions("torch"))
    report(result, a.json, rows=rows)


if __name__ == "__main__": main()
