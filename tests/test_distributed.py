"""Several processes are one run: the same losses, the same gradients, the same files, and one end."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENV = os.environ | dict(OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo", PYTHONUNBUFFERED="1")

# Every run that is asked for, one after the other in one job: starting Python is what takes the time.
JOB = '''
import json, sys
import numpy as np, torch
torch.set_num_threads(1)
import bantam.presets
from bantam.args import TrainingArgs
from bantam.config import BantamConfig
from bantam.data.loader import Loader
from bantam.data.rows import RowDataset, Sample
from bantam.model.lm import BantamForCausalLM
from bantam.train.checkpoint import checkpoints
from bantam.train.trainer import Interrupted, Trainer

def rows(n, T=16, seed=0):
    rng = np.random.default_rng(seed)
    samples = [Sample(rng.integers(1, 60, T).tolist(), (rng.random(T) * (rng.random(T) < rng.random())).tolist()) for _ in range(n)]
    for i,s in enumerate(samples): s.weights[5] = 1. if i % 7 else .01 # ragged: some rows have next to no targets
    return RowDataset(samples, T, 0, packing=False)

class Stop:
    def __init__(self, at): self.at = at
    def on_step(self, trainer, row):
        if row["step"] == self.at: trainer.stop = "SIGTERM"

for out, options, stop_at, shape in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    model = BantamForCausalLM(BantamConfig.from_preset("tiny", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, **shape))
    usual = dict(device="cpu", precision="fp32", lr=1e-2, batch_size=4, accum_steps=2, log_every_n=1, eval_every_n=5, eval_batches=3, grad_clip=.5)
    args = TrainingArgs(**usual | options, out_dir=out, resume_from_checkpoint=out if checkpoints(out) else None)
    trainer = Trainer(model, args, Loader(rows(80), args.batch_size, seed=1), Loader(rows(10, seed=1), 3, shuffle=False), callbacks=[Stop(stop_at)])
    if "muon" in vars(trainer.optimizer) and trainer.optimizer.muon.params: trainer.optimizer.muon.dtype = torch.float32
    try: trainer.train()
    except Interrupted: pass
'''


def start(argv, ranks, **env):
    "A job: one plain process, or ranks under torchrun."
    how = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen([*how, *argv], cwd=ROOT, env=ENV | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process, rc=0, seconds=240):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == rc if rc is not None else process.returncode != 0, out + err
    return out, err


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    file = tmp_path_factory.mktemp("job")/"job.py"
    file.write_text(JOB)
    return lambda runs, ranks: end(start([str(file), json.dumps([[str(o), a, s, shape] for o, a, s, shape in runs])], ranks))


def rows_of(out): return [json.loads(line) for line in (Path(out)/"logs"/"metrics.jsonl").read_text().splitlines()]


def apart(a, b, keys=("loss", "grad_l2_norm", "valid_loss")):
    "The largest relative distance of two runs, whose steps, tokens and rates must be equal."
    assert [(r["step"], r["tokens"], r["lr"], r["epoch"], r["skipped"]) for r in a] == [(r["step"], r["tokens"], r["lr"], r["epoch"], r["skipped"]) for r in b]
    return max(abs(x[k]-y[k])/max(1, abs(y[k])) for x, y in zip(a, b) for k in keys if y[k] is not None)


def curves(job, tmp_path, steps, kinds, shape={}):
    run = lambda name, **kw: [str(tmp_path/name), dict(max_steps=steps) | kw, None, shape]
    one = {o: run(f"one-{o}", optimizer=o) for o in {o for o, _ in kinds}}
    two = {k: run("-".join(k), optimizer=k[0], parallel=k[1]) for k in kinds}
    job(list(one.values()), 1)
    job(list(two.values()), 2)
    return {k: apart(rows_of(two[k][0]), rows_of(one[k[0]][0])) for k in kinds}


def test_curves(job, tmp_path):
    found = curves(job, tmp_path, 12, [("muon", "ddp"), ("muon", "fsdp")])
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, dict(expert_type="topk", num_experts=3, moe_top_k=2, moe_aux_loss_weight=0.)], ids=["dense", "experts"])
def test_curves_of_fifty_steps(job, tmp_path, shape):
    found = curves(job, tmp_path, 50, [(o, p) for o in ("muon", "adamw") for p in ("ddp", "fsdp")], shape)
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_rows_are_cut_where_micro_batches_cannot_be_dealt(job, tmp_path):
    run = lambda name, **kw: [str(tmp_path/name), dict(max_steps=8, accum_steps=1) | kw, None, {}]
    job([run("one")], 1)
    job([run("two", parallel="fsdp")], 2)
    assert apart(rows_of(tmp_path/"two"), rows_of(tmp_path/"one")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resume_on_another_number_of_ranks(job, tmp_path, parallel):
    "Stopped after 4 of 12 steps on two ranks, after 8 on one, ended on two."
    run = lambda name, stop: [str(tmp_path/name), dict(max_steps=12, parallel=parallel), stop, {}]
    job([run("whole", None)], 1)
    job([run("journey", 4)], 2)
    assert len(rows_of(tmp_path/"journey")) == 4
    job([run("journey", 8)], 1)
    job([run("journey", None)], 2)
    assert len(rows_of(tmp_path/"journey")) == 12
    assert apart(rows_of(tmp_path/"journey"), rows_of(tmp_path/"whole")) < 1e-5
    assert [p.name for p in (tmp_path/"journey/model").glob("*.safetensors")] == ["model.safetensors"] and not (tmp_path/"journey/model/shards").exists()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resume_is_exact_on_as_many_ranks(job, tmp_path, parallel):
    "Dropout included: what is dropped follows from seed, step and rank."
    from safetensors.torch import load_file
    run = lambda name, stop: [str(tmp_path/name), dict(max_steps=8, parallel=parallel), stop, dict(residual_dropout=.1)]
    job([run("whole", None), run("halves", 3)], 2)
    job([run("halves", None)], 2)
    a, b = (load_file(tmp_path/d/"model"/"model.safetensors") for d in ("whole", "halves"))
    assert all(a[k].equal(b[k]) for k in a)


def pretrain(tmp_path, ranks, *more, steps=6):
    text = tmp_path/"text.txt"
    text.write_text("\n\n".join(f"Number {i} comes before {i+1}, and after {i-1}." for i in range(400)))
    keys = dict(max_steps=steps, seq_len=16, batch_size=2, accum_steps=2, log_every_n=1, eval_every_n=0, save_every_n=2, precision="fp32", tokenizer="default", valid_fraction=.1)
    argv = ["-m", "bantam", "pretrain", "--preset", "tiny", "--dataset", str(text), "--out", str(tmp_path/"run"), "--device", "cpu"]
    for k, v in keys.items(): argv += ["--set", f"training_args.{k}={v}"]
    return start([*argv, "--set", "bantam_config.hidden_size=32", "--set", "bantam_config.intermediate_size=64", *more], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_is_one_run(tmp_path, parallel):
    "One console, one log, one model."
    out, err = end(pretrain(tmp_path, 2, "--set", f"training_args.parallel={parallel}"))
    assert [len(re.findall(rf"step {i}/6", out)) for i in range(1, 7)] == [1]*6, out
    assert out.count("model: ") == 1 and "Traceback" not in err
    assert [r["step"] for r in rows_of(tmp_path/"run")] == [1, 2, 3, 4, 5, 6]
    assert len(list((tmp_path/"run/model").glob("*.safetensors"))) == 1


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid): return dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v).get("RANK")


def running(tmp_path, *more):
    "A run of two ranks that has just taken a few steps, and its processes by rank."
    p = pretrain(tmp_path, 2, *more, steps=100000)
    for line in p.stdout:
        if line.startswith("step 3/"): break
    return p, {rank_of(c): c for c in children(p.pid)}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_rank_ends_the_others_with_one_message(tmp_path, victim):
    p, ranks = running(tmp_path)
    os.kill(ranks[victim], signal.SIGKILL)
    out, err = end(p, rc=None, seconds=60)
    assert len(re.findall(r"bantam: rank \d lost another rank at step \d+", err)) == 1, err
    assert "go on with: " in err
    from bantam.train.checkpoint import newest_checkpoint
    assert newest_checkpoint(tmp_path/"run")


@pytest.mark.slow
@pytest.mark.parametrize("who,parallel", [("1", "ddp"), ("0", "fsdp"), ("all", "fsdp")])
def test_a_signal_to_one_stops_all(tmp_path, who, parallel):
    p, ranks = running(tmp_path, "--set", f"training_args.parallel={parallel}", "--set", "training_args.save_every_n=0")
    if who == "all": p.send_signal(signal.SIGTERM) # torchrun hands it on
    else: os.kill(ranks[who], signal.SIGTERM)
    out, err = end(p, rc=None, seconds=60)
    assert err.count("bantam: stopped by SIGTERM at step") == 1, err
    assert len(list((tmp_path/"run/checkpoints").glob("step-*"))) == 1 and not list((tmp_path/"run/checkpoints").glob(".tmp-*"))


@pytest.mark.slow
def test_bad_settings_are_said_once(tmp_path):
    for more, what in ((["--device", "mps"], "device mps cannot be shared"), (["--device", "cuda:0"], "is one device"),
                       (["--set", "training_args.accum_steps=3", "--set", "training_args.batch_size=3"], "multiple of 2")):
        out, err = end(pretrain(tmp_path, 2, *more), rc=None)
        assert what in err and not re.search(r'File ".*/bantam/', err), err


def test_a_launcher_that_says_half_is_refused():
    done = subprocess.run([sys.executable, "-c", "from bantam.train.distributed import Ranks; Ranks.current()"], cwd=ROOT, capture_output=True, text=True,
                          env={k: v for k, v in ENV.items() if k != "RANK"} | dict(WORLD_SIZE="2"))
    assert "WORLD_SIZE is 2, but RANK" in done.stderr and "start with torchrun" in done.stderr


def test_one_process_makes_no_group(tmp_path):
    "With one process nothing of this is even imported."
    code = ("import sys, torch; import bantam.train.shared; from bantam.train.distributed import Ranks; r = Ranks.current('cpu'); m = torch.nn.Linear(2, 2); t = torch.ones(2)\n"
            "assert r.wrap(m) is m and r.sum_(t) is t and r.gather([1]) == [[1]] and r.tell('x') == 'x' and not torch.distributed.is_initialized()\n"
            "assert not [m for m in sys.modules if m.startswith('torch.distributed.fsdp') or m.startswith('torch.distributed.checkpoint')]")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, check=True)
