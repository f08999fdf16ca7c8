"""Six experts in turn, in the memory of one, against all of them at once: held-out loss on the same tokens, and peak memory.

    python benchmarks/experts.py [--quick] [--json FILE] [--text FILE] [--seeds N]
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import machine, report, versions

ROOT = Path(__file__).parent.parent
WORK = '''
import json, sys
import torch
torch.set_num_threads(1)
from bantam import BantamConfig
import bantam.presets
from bantam.args import TrainingArgs
from bantam.runtime import peak_memory
from bantam.train.pretrain import pretrain
from bantam.train.turns import train_experts
how, shape, args, more = sys.argv[1], *map(json.loads, sys.argv[2:5])
start = peak_memory()
run = (lambda a, s: train_experts(a, s, **more)) if how == "turns" else pretrain
result = run(TrainingArgs(**args), lambda **kw: BantamConfig.from_preset("tiny", **shape | kw))
print("RESULT", json.dumps(dict(loss=result.get("whole_loss") or result["valid_loss"], memory=peak_memory() - start)))
'''
EXPERTS = dict(expert_type="topk", num_experts=6, moe_capacity_factor=None,
               layer_configs=[dict(expert_type="dense")])
SMALL = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=4, qk_norm=True, **EXPERTS)
WIDE = dict(hidden_size=256, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, **EXPERTS)


def run(how, shape, args, more=None):
    "One training run in a process of its own."
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "-c", WORK, how, json.dumps(shape),
                 json.dumps(args | dict(out_dir=f"{out}/run")), json.dumps(more or {})]
        done = subprocess.run(words, env=os.environ | dict(PYTHONPATH=str(ROOT)),
                              capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.rpartition("RESULT")[2])


def paragraphs(text, size=2000):
    "Pieces of about `size` characters, cut at empty lines."
    pieces = [""]
    for p in text.split("\n\n"):
        if len(pieces[-1]) > size: pieces.append("")
        pieces[-1] += p + "\n\n"
    return pieces


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--quick", action="store_true")
    ap.add_argument("--json")
    ap.add_argument("--text", help="a text file; without one, generated stories")
    ap.add_argument("--seeds", type=int, default=3)
    opt = ap.parse_args()
    from bantam import __version__
    from bantam.data.offline import documents
    from bantam.text.tokenizer import BantamTokenizer
    import torch
    steps, seeds = (40, 1) if opt.quick else (600, opt.seeds)
    with tempfile.TemporaryDirectory() as tmp:
        texts = (paragraphs(Path(opt.text).read_text()) if opt.text
                 else [d["text"] for d in documents(3000, seed=1) if "text" in d])
        (Path(tmp)/"text.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
        BantamTokenizer.char_level("".join(texts)).save(f"{tmp}/tokenizer")
        base = dict(dataset=f"{tmp}/text.jsonl", tokenizer=f"{tmp}/tokenizer", seq_len=64,
                    batch_size=16, accum_steps=1, max_steps=steps, lr=3e-3, valid_fraction=.1,
                    device="cpu", precision="fp32",
                    eval_every_n=steps, eval_batches=40, save_every_n=0)
        rows = []
        for seed in range(seeds):
            a = base | dict(seed=seed)
            joint = run("all", SMALL, a)["loss"]
            turns = {share: run("turns", SMALL, a, dict(share=share))["loss"] for share in (.8, 0.)}
            rows.append((joint, turns[.8], turns[0.]))
            print(f"seed {seed}: all at once {joint:.4f}   in turns {turns[.8]:.4f} "
                  f"({turns[.8]/joint - 1:+.1%})   in turns, each for itself {turns[0.]:.4f} "
                  f"({turns[0.]/joint - 1:+.1%})", flush=True)
        few = base | dict(batch_size=2, max_steps=14, eval_batches=2, eval_every_n=7,
                          save_every_n=7)
        memory = dict(turns=run("turns", WIDE, few, dict(rounds=1, beginning=.5))["memory"],
                      one=run("all", WIDE | dict(num_experts=1, moe_top_k=1), few)["memory"],
                      all=run("all", WIDE, few)["memory"])
    print("peak memory above the start: " + "   ".join(f"{k} {v/2**20:.0f} MB"
                                                       for k, v in memory.items()))
    mean = lambda k: sum(r[k] for r in rows)/len(rows)
    ratios = dict(loss=mean(1)/mean(0), loss_each_for_itself=mean(2)/mean(0),
                  memory=memory["turns"]/memory["one"], memory_of_all=memory["turns"]/memory["all"])
    targets = dict(loss=1.03, memory=1.15)
    result = dict(name="experts", ratios={k: round(v, 4) for k, v in ratios.items()},
                  targets=targets, met=all(ratios[k] <= v for k, v in targets.items()),
                  machine=machine(), versions=versions("torch"))
    report(result, opt.json)


if __name__ == "__main__": main()
