"""Two ranks beside one process, on the same two cores.

    python benchmarks/two_ranks.py [--quick] [--rounds N] [--ways one,ddp] [--json FILE]

The same training steps (model of the small preset, Muon, the same rows in the same order) by one process with two threads, and by two ranks of gloo with
one thread each, under `OMP_WAIT_POLICY=PASSIVE`. Tokens a second are those of the whole run. Rounds take turns; figures are medians. Also shown: what FSDP2
reaches, gradients sent as bf16, and plain gradients without overlap. The last line is one JSON object.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile

from _common import machine, report, versions

TARGETS = {"two ranks, DDP, over one process": .9}

WORK = r'''
import json, sys, time
import torch
import torch.distributed as dist
import bantam.presets
from bantam.args import TrainingArgs
from bantam.config import BantamConfig
from bantam.data.loader import Batch
from bantam.model.lm import BantamForCausalLM
from bantam.runtime import pick_precision, tune_allocator
from bantam.train.dealt import ranked
from bantam.train.distributed import Ranks
from bantam.train.optim import build_optimizer
from bantam.train.step import accumulate, take_step

way, steps, preset, rows, length, accum, precision = json.loads(sys.argv[1])
tune_allocator()
ranks = Ranks.current("cpu", "fsdp" if way == "fsdp" else "ddp")
if ranks.size == 1: torch.set_num_threads(2)
precision = pick_precision(ranks.device, precision)
torch.manual_seed(0)
model = BantamForCausalLM(BantamConfig.from_preset(preset, vocab_size=8192)).train()
optimizer = build_optimizer(model, TrainingArgs())
runner = model if way == "by hand" else ranks.wrap(model, wire=torch.bfloat16 if way == "bf16" else torch.float32)
optimizer = ranked(optimizer, model, ranks)
rows, accum = ranks.dealt(rows, accum)

def step(i):
    gen = torch.Generator().manual_seed(i*ranks.size + ranks.rank)
    ids = [torch.randint(8192, (rows, length+1), generator=gen) for _ in range(accum)]
    loss = accumulate(runner, [Batch(x[:,:-1], x[:,1:]) for x in ids], ranks.device, precision, ranks=ranks)
    if way == "by hand" and ranks.size > 1:
        for p in model.parameters(): ranks.sum_(p.grad)
    take_step(optimizer, loss, 1., 1.)

for i in range(3): step(i)
ranks.barrier()
start = time.perf_counter()
for i in range(steps): step(i+3)
ranks.barrier()
if ranks.main: print(json.dumps(ranks.size*rows*accum*length*steps/(time.perf_counter() - start)))
'''


def run(file, way, job):
    "Tokens a second of one job."
    how = [sys.executable] if way == "one" else [sys.executable, "-m", "torch.distributed.run",
                                                 "--standalone", "--nproc-per-node", "2"]
    env = os.environ | dict(OMP_WAIT_POLICY="PASSIVE", GLOO_SOCKET_IFNAME="lo",
                            OMP_NUM_THREADS="2" if way == "one" else "1",
                            PYTHONPATH=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run([*how, file, json.dumps([way, *job])], capture_output=True,
                          text=True, env=env)
    if done.returncode: sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true",
                   help="a few steps of one round, to see that it runs")
    p.add_argument("--json", metavar="FILE", help="write the result, with every round, to FILE")
    p.add_argument("--preset", default="small", help="shape of the model")
    p.add_argument("--batch-size", type=int, default=8, help="rows of a micro-batch")
    p.add_argument("--seq-len", type=int, default=256, help="tokens of a row")
    p.add_argument("--accum-steps", type=int, default=4, help="micro-batches of a step")
    p.add_argument("--precision", default="auto", help="auto, bf16, fp32")
    p.add_argument("--rounds", type=int, default=5, help="turns of each way")
    p.add_argument("--ways", default="one,ddp,bf16,fsdp,by hand",
                   help="which of one, ddp, bf16, fsdp, by hand; one and ddp are needed")
    a = p.parse_args()
    names = {"one": "one process, two threads", "ddp": "two ranks, DDP",
             "bf16": "two ranks, DDP, bf16 sums", "fsdp": "two ranks, FSDP2",
             "by hand": "two ranks, summed afterwards"}
    asked = a.ways.split(",")
    if unknown := set(asked) - names.keys(): p.error(f"unknown way {', '.join(sorted(unknown))}")
    if not {"one", "ddp"} <= set(asked): p.error("--ways needs one and ddp")
    names = {w: n for w,n in names.items() if w in asked}
    job = (2 if a.quick else 8, a.preset, a.batch_size, a.seq_len, a.accum_steps, a.precision)
    speeds = {w: [] for w in names}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "job.py")
        with open(file, "w") as f: f.write(WORK)
        for _ in range(1 if a.quick else a.rounds):
            for way in names: speeds[way].append(run(file, way, job))
    medians, about = {w: statistics.median(s) for w, s in speeds.items()}, machine()
    print(f"{a.preset}, {a.accum_steps} x {a.batch_size} rows of {a.seq_len}, {a.precision}; "
          f"{about['processor']}, {about['cores']} cores\n\n{'':32s} {'tokens/s':>10s} "
          f"{'over one process':>17s}")
    for w, s in medians.items(): print(f"{names[w]:32s} {s:10.0f} {s/medians['one']:17.3f}")
    ratios = {f"{names[w]}, over one process": round(s/medians["one"], 4)
              for w, s in medians.items() if w != "one"}
    result = dict(name="two_ranks", ratios=ratios, targets=TARGETS,
                  met=bool(ratios["two ranks, DDP, over one process"] >= .9), machine=about,
                  versions=versions("torch"))
    report(result, a.json, tokens_per_second=speeds)


if __name__ == "__main__": main()
