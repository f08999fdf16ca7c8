"""The demo, killed again and again, and gone on with by the line that it printed: it must end in
the same bits as one that was left alone."""
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bantam.data.offline import documents

OPTIONS = ["--steps", "60", "--seed", "3", "--set", "training_args.precision=fp32", "--set",
           "training_args.seq_len=64", "--set", "training_args.batch_size=8",
           "--set", "bantam_config.num_hidden_layers=2"]

MOMENTS = {  # what is there when the kill comes
    "while the tokens are written": lambda out: (out/"tokenizer").exists(),
    "before the first checkpoint": lambda out: (out/"base/logs").exists(),
    "in pre-training": lambda out: len(list(out.glob("base/checkpoints/step-*"))) >= 2,
    "later in pre-training": lambda out: (out/"base/checkpoints/step-00000040").exists(),
    "in fine-tuning": lambda out: bool(list(out.glob("sft/checkpoints/step-*"))),
}


def words(out, text):
    return shlex.join([sys.executable, "-m", "bantam", "demo", "--out", str(out), "--text",
                       str(text), *OPTIONS])


def start(line):
    return subprocess.Popen("exec " + line, shell=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finish(line):
    p = start(line)
    said = p.communicate(timeout=600)[0]
    assert p.returncode == 0, said[-2000:]
    return said


@pytest.mark.slow
def test_killed_demo_ends_in_the_same_bits(tmp_path):
    text = tmp_path/"stories.jsonl"
    text.write_text("".join(json.dumps(dict(text=d["text"])) + "\n"
                            for d in documents(3000, seed=0) if "text" in d))
    whole, killed = tmp_path/"whole", tmp_path/"killed"
    said = finish(words(whole, text))
    line = words(killed, text)
    assert "bantam-cli chat --model" in said.splitlines()[-1]
    for moment, reached in MOMENTS.items():
        p = start(line)
        end = time.monotonic() + 300
        while not reached(killed) and p.poll() is None and time.monotonic() < end: time.sleep(.005)
        assert p.poll() is None, f"it ended before it could be killed {moment}: {p.stdout.read()}"
        p.send_signal(signal.SIGKILL)
        p.wait()
        line = re.findall("go on with: (.*)", p.stdout.read())[-1]
    finish(line)
    for part in ("base/model", "sft/model", "chat"):
        a, b = (load_file(d/part/"model.safetensors") for d in (whole, killed))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
    one, two = (json.loads((d/"summary.json").read_text()) for d in (whole, killed))
    same = ("bits_per_byte", "exact_answers", "answers_that_end", "steps", "sft_steps", "precision",
            "parameters")
    assert ({k: one[k] for k in same} == {k: two[k] for k in same} and two["interrupted"]
            and not one["interrupted"])
    assert (whole/"base/logs/loss.csv").read_bytes() == (killed/"base/logs/loss.csv").read_bytes()
    assert not [p for p in killed.rglob(".*")], "nothing half-written is left"
