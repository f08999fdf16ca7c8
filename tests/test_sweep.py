"""Sweeps: killed and gone on with, and the two files that the repository ships."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import bantam.presets  # noqa: F401
from bantam.args import TrainingArgs
from bantam.config import BantamConfig
from bantam.train.sweep import Sweep

ROOT = Path(__file__).parent.parent
SMALL = ["bantam_config.hidden_size=32", "bantam_config.intermediate_size=64",
         "bantam_config.num_hidden_layers=1"]


def texts(folder):
    folder.mkdir()
    for i in range(20):
        (folder/f"{i}.txt").write_text(f"Story {i}. " + "The hen sat on six eggs. "*30)
    return folder


def bantam(*words, **more):
    return subprocess.run([sys.executable, "-W", "ignore", "-m", "bantam", *map(str, words)],
                          cwd=ROOT, capture_output=True, text=True, **more)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_a_sweep_that_is_broken_off_goes_on(tmp_path, number):
    texts(tmp_path/"texts")
    (tmp_path/"s.yaml").write_text("sweep_args: {out_dir: s, preset: tiny, trials: 3, sampler: "
                                   "random, prune: false}\nspace: {training_args.lr: {low: 0.001, "
                                   "high: 0.1, log: true}}\n")
    given = [f"training_args.dataset={tmp_path/'texts'}", "training_args.tokenizer=default",
             "training_args.max_steps=60", "training_args.seq_len=32",
             "training_args.accum_steps=1", "training_args.batch_size=2",
             "training_args.eval_every_n=10", "training_args.save_every_n=5",
             "training_args.valid_fraction=0.2", "training_args.eval_batches=1", *SMALL]
    words = [sys.executable, "-W", "ignore", "-m", "bantam", "sweep", "--config",
             str(tmp_path/"s.yaml"), *(w for g in given for w in ("--set", g))]
    p = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                         text=True)
    for _ in range(600):
        time.sleep(.1)
        if list((tmp_path/"s/trial-0001/checkpoints").glob("step-*")) or p.poll() is not None: break
    assert p.poll() is None, "the sweep ended before it could be killed"
    os.kill(p.pid, number)
    _, said = p.communicate()
    if number == signal.SIGINT:
        assert p.returncode == 130 and "start it again to go on" in said, said
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 done" in done.stdout
    steps = [json.loads(line)["step"] for line in (
        tmp_path/"s/trial-0001/logs/metrics.jsonl").read_text().splitlines()]
    assert (steps == sorted(set(steps))
            and steps[-1] == 60), "the killed trial went on in its own folder"
    assert (TrainingArgs.from_yaml(tmp_path/"s/best.yaml")
            and BantamConfig.from_yaml(tmp_path/"s/best_model.yaml"))


def test_the_shipped_sweep_is_valid(tmp_path):
    s = Sweep.from_yaml(ROOT/"configs/sweep.yaml", [f"sweep_args.out_dir={tmp_path}"])
    assert s.args.trials == 20 and {r.field for r in s.space} >= {
        "training_args.lr", "bantam_config.qk_norm"}
    for r in s.space:
        for v in r.ends(): assert s.settings({r.field: v}, tmp_path)


def choice(p):
    "One value that Weights & Biases could draw."
    return p["values"][0] if "values" in p else p["value"] if "value" in p else p["min"]


def test_the_wandb_sweep_drives_the_command(tmp_path):
    "Its command, filled in as the agent of Weights & Biases fills it in, trains two steps."
    spec = yaml.safe_load((ROOT/"configs/wandb_sweep.yaml").read_text())
    assert spec["method"] in ("grid", "random", "bayes") and spec["metric"]["goal"] == "minimize"
    from bantam.train.track import METRICS
    assert spec["metric"]["name"] in METRICS
    known = {"distribution", "min", "max", "mu", "sigma", "q", "value", "values", "probabilities"}
    assert set(spec) <= {"program", "command", "method", "metric", "early_terminate", "parameters",
                         "name", "project", "entity", "description", "run_cap"}
    for name, p in spec["parameters"].items():
        assert set(p) <= known, name
        section, _, field = name.partition(".")
        assert field in {f for f in (
            TrainingArgs if section == "training_args" else BantamConfig).__dataclass_fields__}
    args = [f"--{k}={str(choice(p)).lower() if isinstance(choice(p), bool) else choice(p)}"
            for k, p in spec["parameters"].items()]
    words = []
    for w in spec["command"]:
        if w == "${args}": words += args
        elif w == "${env}": words += ["/usr/bin/env"]
        else: words.append(re.sub(r"\$\{envvar:(\w+)\}", "local", w))
    assert not any("${" in w for w in words)
    texts(tmp_path/"texts")
    for k, v in dict(dataset=tmp_path/"texts", tokenizer="default", out_dir=tmp_path/"run",
                     max_steps=2, seq_len=32, batch_size=2, eval_every_n=1, eval_batches=1,
                     valid_fraction=.2, trackers="null").items():
        words += ["--set", f"training_args.{k}={v}"]
    for s in SMALL: words += ["--set", s]
    i = words.index("bantam-cli")
    done = subprocess.run([*words[:i], sys.executable, "-W", "ignore", "-m", "bantam",
                           *words[i+1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"run/model/model.safetensors").exists()


@pytest.mark.parametrize("line, message", [("training_args.lrr: [1]", "did you mean 'lr'"),
                                           ("training_args.lr: {low: 1, high: 0.1}",
                                            "must be below"),
                                           ("bantam_config.num_attention_heads: [3]", "= 3"),
                                           ("training_args.batch_size: {low: 0, high: 4}",
                                            "'training_args.batch_size' = 0"),
                                           ("training_args.seed: {low: 0.5, high: 2.5}",
                                            "'training_args.seed'")])
def test_bad_ranges_are_refused_by_name(tmp_path, line, message):
    (tmp_path/"s.yaml").write_text(f"sweep_args: {{out_dir: s, preset: tiny}}\nspace:\n  {line}\n")
    done = bantam("sweep", "--config", tmp_path/"s.yaml")
    assert (done.returncode == 2 and message in done.stderr
            and done.stderr.count("\n") == 1), done.stderr
    assert not (tmp_path/"s").exists()
