"""Several processes are one run: the same losses, gradients and files, and one end."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENV = os.environ | dict(OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo",
                        PYTHONUNBUFFERED="1")

# Every run that is asked for, one after the other in one job: starting Python is what takes the
# time.
JOB = '''
import hashlib, json, sys
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

def digest(model): return hashlib.sha256(b"".join(getattr(p, "_local_tensor", p).detach().clone().numpy().tobytes() for p in model.parameters())).hexdigest()

def poison(trainer, rank, steps, out):
    "On one rank, all numbers of some steps are NaN; every rank writes down what its weights were before and after each step."
    told, real = [], trainer.one_step
    def step():
        before, row = digest(trainer.model), real()
        told.append([row["step"], row["skipped"], before, digest(trainer.model)])
        open(f"{out}-rank{trainer.ranks.rank}.json", "w").write(json.dumps(told))
        return row
    trainer.one_step = step
    if trainer.ranks.rank == rank:
        trainer.model.embed_tokens.register_forward_hook(lambda m, a, h: h*float("nan") if m.training and trainer.step+1 in steps else h)

class Stop:
    def __init__(self, at): self.at = at
    def on_step(self, trainer, row):
        if row["step"] == self.at: trainer.stop = "SIGTERM"

for out, options, stop_at, shape in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    model = BantamForCausalLM(BantamConfig.from_preset("tiny", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, **shape))
    usual = dict(device="cpu", precision="fp32", lr=1e-2, batch_size=4, accum_steps=2, log_every_n=1, eval_every_n=5, eval_batches=3, grad_clip=.5)
    bad = options.pop("poison", None)
    args = TrainingArgs(**usual | options, out_dir=out, resume_from_checkpoint=out if checkpoints(out) else None)
    trainer = Trainer(model, args, Loader(rows(80), args.batch_size, seed=1), Loader(rows(10, seed=1), 3, shuffle=False), callbacks=[Stop(stop_at)])
    if "muon" in vars(trainer.optimizer) and trainer.optimizer.muon.params: trainer.optimizer.muon.dtype = torch.float32
    if bad: poison(trainer, *bad, out)
    try: trainer.train()
    except Interrupted: pass
'''


def start(argv, ranks, **env):
    "A job: one plain process, or ranks under torchrun."
    how = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run",
                                               "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen([*how, *argv], cwd=ROOT, env=ENV | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process, rc=0, seconds=240):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == rc if rc is not None else process.returncode != 0, out + err
    return out, err


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    file = tmp_path_factory.mktemp("job")/"job.py"
    file.write_text(JOB)
    return lambda runs, ranks: end(
        start([str(file), json.dumps([[str(o), a, s, shape] for o, a, s, shape in runs])], ranks))


def rows_of(out):
    return [json.loads(line) for line in (
        Path(out)/"logs"/"metrics.jsonl").read_text().splitlines()]


def apart(a, b, keys=("loss", "grad_l2_norm", "valid_loss")):
    "The largest relative distance of two runs, whose steps, tokens and rates must be equal."
    assert ([(r["step"], r["tokens"], r["lr"], r["epoch"], r["skipped"]) for r in a]
            == [(r["step"], r["tokens"], r["lr"], r["epoch"], r["skipped"]) for r in b])
    return max(abs(x[k]-y[k])/max(1, abs(y[k])) for x, y in zip(a, b)
               for k in keys if y[k] is not None)


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


def test_numbers_that_go_bad_on_one_rank_are_skipped_by_all(job, tmp_path):
    """The second rank sees NaN in steps 3 and 4: both pass over them, and both have the weights
    that they had."""
    kinds = ("ddp", "fsdp")
    job([[str(tmp_path/k), dict(max_steps=6, parallel=k, optimizer="muon", eval_every_n=0,
                                poison=[1, [3, 4]]), None, {}] for k in kinds], 2)
    for kind in kinds:
        told = [json.loads((tmp_path/f"{kind}-rank{r}.json").read_text()) for r in (0, 1)]
        for rank in told:
            assert [(step, skipped) for step, skipped, _, _ in rank] == [
                (1, 0), (2, 0), (3, 1), (4, 2), (5, 2), (6, 2)]
            assert [before == after for _, _, before, after in rank] == [
                False, False, True, True, False, False]
            assert all(a[3] == b[2] for a, b in zip(rank, rank[1:]))
        if kind == "ddp": assert told[0] == told[1]
        rows = rows_of(tmp_path/kind)
        assert ([r["loss"] is None for r in rows] == [r["step"] in (3, 4) for r in rows]
                and [r["skipped"] for r in rows] == [0, 0, 1, 2, 2, 2])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, dict(expert_type="topk", num_experts=3, moe_top_k=2,
                                            moe_aux_loss_weight=0.)], ids=["dense", "experts"])
def test_curves_of_fifty_steps(job, tmp_path, shape):
    found = curves(job, tmp_path, 50, [(o, p) for o in ("muon", "adamw") for p in ("ddp", "fsdp")],
                   shape)
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
    assert ([p.name for p in (tmp_path/"journey/model").glob("*.safetensors")]
            == ["model.safetensors"] and not (tmp_path/"journey/model/shards").exists())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resume_is_exact_on_as_many_ranks(job, tmp_path, parallel):
    "Dropout included: what is dropped follows from seed, step and rank."
    from safetensors.torch import load_file
    run = lambda name, stop: [str(tmp_path/name), dict(max_steps=8, parallel=parallel), stop,
                              dict(residual_dropout=.1)]
    job([run("whole", None), run("halves", 3)], 2)
    job([run("halves", None)], 2)
    a, b = (load_file(tmp_path/d/"model"/"model.safetensors") for d in ("whole", "halves"))
    assert all(a[k].equal(b[k]) for k in a)


def pretrain(tmp_path, ranks, *more, steps=6):
    tmp_path.mkdir(exist_ok=True)
    text = tmp_path/"text.txt"
    text.write_text("\n\n".join(f"Number {i} comes before {i+1}, and after {i-1}."
                                for i in range(400)))
    keys = dict(max_steps=steps, seq_len=16, batch_size=2, accum_steps=2, log_every_n=1,
                eval_every_n=0, save_every_n=2, precision="fp32", tokenizer="default",
                valid_fraction=.1)
    argv = ["-m", "bantam", "pretrain", "--preset", "tiny", "--dataset", str(text), "--out",
            str(tmp_path/"run"), "--device", "cpu"]
    for k, v in keys.items(): argv += ["--set", f"training_args.{k}={v}"]
    return start([*argv, "--set", "bantam_config.hidden_size=32", "--set",
                  "bantam_config.intermediate_size=64", *more], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_is_one_run(tmp_path, parallel):
    "One console, one log, one model."
    out, err = end(pretrain(tmp_path, 2, "--set", f"training_args.parallel={parallel}"))
    assert [len(re.findall(rf"step {i}/6", out)) for i in range(1, 7)] == [1]*6, out
    assert out.count("model: ") == 1 and "Traceback" not in err
    assert [r["step"] for r in rows_of(tmp_path/"run")] == [1, 2, 3, 4, 5, 6]
    assert len(list((tmp_path/"run/model").glob("*.safetensors"))) == 1


@pytest.mark.slow
def test_torchrun_says_the_line_that_goes_on(tmp_path):
    """All words, torchrun's own as well; stopped and started again with them, the run ends as if it
    had been left alone."""
    from safetensors.torch import load_file
    end(pretrain(tmp_path/"whole", 2, steps=200))
    p = pretrain(tmp_path/"halves", 2, steps=200)
    for line in p.stdout:
        if "go on with: " in line: first = line.split("go on with: ")[1].strip()
        if line.startswith("step 3/"): break
    p.send_signal(signal.SIGTERM)
    out, err = end(p, rc=None, seconds=60)
    assert re.findall("go on with: (.*)", err) == [first] and "stopped by SIGTERM at step" in err
    assert first.startswith(
        shlex.join([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "2", "-m", "bantam", "pretrain"]))
    done = subprocess.run("exec " + first, shell=True, cwd=ROOT, env=ENV, text=True,
                          capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    a, b = (load_file(tmp_path/d/"run/model/model.safetensors") for d in ("whole", "halves"))
    assert (all(a[k].equal(b[k]) for k in a) and [r["loss"] for r in rows_of(tmp_path/"halves/run")]
            == [r["loss"] for r in rows_of(tmp_path/"whole/run")])


@pytest.mark.slow
def test_fine_tuning_on_two_ranks(tmp_path):
    """Adapters and all weights: the losses of one process, one model and one adapter; what cannot
    be shared is refused once."""
    from bantam.config import BantamConfig
    from bantam.data.offline import dialogues
    from bantam.train.pretrain import init_model
    init_model(tmp_path/"base", lambda **known: BantamConfig(hidden_size=32, intermediate_size=64,
                                                             num_hidden_layers=1,
                                                             num_attention_heads=2,
                                                             num_key_value_heads=2,
                                                             max_position_embeddings=128, **known))
    for split in ("train", "valid"):
        (tmp_path/f"{split}.jsonl").write_text(
            "".join(json.dumps(dict(messages=d["messages"])) + "\n"
                    for d in dialogues(60, seed=0, split=split, kinds=("opposites",))))
    keys = dict(dataset=tmp_path/"train.jsonl", valid_dataset=tmp_path/"valid.jsonl", seq_len=64,
                batch_size=2, accum_steps=2, max_steps=8, lr=.001, eval_every_n=4, eval_batches=2,
                log_every_n=1, precision="fp32",
                # Muon rounds to bf16, which is not what is asked here
                save_every_n=4, lora_r=4, lora_dropout=0, optimizer="adamw")
    sets = [w for k, v in keys.items() for w in ("--set", f"sft_args.{k}={v}")]
    def run(name, ranks, *more):
        return start(["-m", "bantam", "sft", "--model", str(tmp_path/"base"), "--out",
                      str(tmp_path/name), "--device", "cpu", *sets, *more], ranks)
    for mode, parallel in (("lora", "ddp"), ("full", "ddp"), ("full", "fsdp")):
        alone, _ = end(run(f"one-{mode}-{parallel}", 1, "--mode", mode))
        out, err = end(run(f"two-{mode}-{parallel}", 2, "--mode", mode, "--set",
                           f"sft_args.parallel={parallel}"))
        assert (out.count("target |") == alone.count("target |") and out.count("model: ") == 1
                and "Traceback" not in err)
        rows = [rows_of(tmp_path/f"{n}-{mode}-{parallel}") for n in ("two", "one")]
        # one process adds up the squares of 262144 numbers in float32, shares in float64
        assert (apart(*rows, ("loss", "valid_loss")) < 1e-5
                and apart(*rows, ("grad_l2_norm",)) < 1e-4)
        assert (tmp_path/f"two-{mode}-{parallel}/adapter").exists() == (mode == "lora")
    out, err = end(run("no", 2, "--set", "sft_args.parallel=fsdp"), rc=None)
    assert err.count("bantam: parallel fsdp cuts weights") == 1


@pytest.mark.slow
def test_experts_are_for_one_process(tmp_path):
    out, err = end(start(["-m", "bantam", "experts", "train", "--preset", "tiny", "--dataset",
                          "offline", "--tokenizer", "default", "--out", str(tmp_path/"run"),
                          "--device", "cpu"], 2), rc=None)
    assert (err.count("bantam: experts that take turns are trained by one process") == 1
            and not re.search(r'File ".*/bantam/', err))


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid):
    return dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0")
                if "=" in v).get("RANK")


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
    p, ranks = running(tmp_path, "--set", f"training_args.parallel={parallel}", "--set",
                       "training_args.save_every_n=0")
    if who == "all": p.send_signal(signal.SIGTERM) # torchrun hands it on
    else: os.kill(ranks[who], signal.SIGTERM)
    out, err = end(p, rc=None, seconds=60)
    assert err.count("bantam: stopped by SIGTERM at step") == 1, err
    assert (len(list((tmp_path/"run/checkpoints").glob("step-*"))) == 1
            and not list((tmp_path/"run/checkpoints").glob(".tmp-*")))


@pytest.mark.slow
def test_bad_settings_are_said_once(tmp_path):
    for more, what in ((["--device", "mps"], "device mps cannot be shared"),
                       (["--device", "cuda:0"], "is one device"),
                       (["--set", "training_args.accum_steps=3", "--set",
                         "training_args.batch_size=3"], "multiple of 2")):
        out, err = end(pretrain(tmp_path, 2, *more), rc=None)
        assert what in err and not re.search(r'File ".*/bantam/', err), err


def test_a_launcher_that_says_half_is_refused():
    done = subprocess.run([sys.executable, "-c", "from bantam.train.distributed import Ranks; "
                                                 "Ranks.current()"], cwd=ROOT,
                          capture_output=True, text=True,
                          env={k: v for k, v in ENV.items() if k != "RANK"} | dict(WORLD_SIZE="2"))
    assert "WORLD_SIZE is 2, but RANK" in done.stderr and "start with torchrun" in done.stderr


def test_one_process_makes_no_group(tmp_path):
    "With one process nothing of this is even imported."
    code = ("import sys, torch; import bantam.train.shared; from bantam.train.distributed import "
            "Ranks; r = Ranks.current('cpu'); m = torch.nn.Linear(2, 2); t = torch.ones(2)\n"
            "assert r.wrap(m) is m and r.sum_(t) is t and r.gather([1]) == [[1]] and r.tell('x') "
            "== 'x' and not torch.distributed.is_initialized()\n"
            "assert not [m for m in sys.modules if m.startswith('torch.distributed.fsdp') or "
            "m.startswith('torch.distributed.checkpoint')]")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, check=True)
