"""A training process is killed, again and again, and must end with the bits of one that was left alone."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = '''
import sys
from pathlib import Path
import torch
from bantam.args import TrainingArgs
from bantam import BantamConfig
from bantam.data.loader import BlockDataset, Loader
from bantam.data.pack import Shards
from bantam.model.lm import BantamForCausalLM
from bantam.runtime import seed_everything
from bantam.text.tokenizer import BantamTokenizer
from bantam.train.checkpoint import checkpoints
from bantam.train.trainer import Interrupted, Trainer

data, out, optimizer, precision, steps = sys.argv[1:]
torch.set_num_threads(1)
tokenizer = BantamTokenizer.load(data)
loaders = [Loader(BlockDataset(Shards(f"{data}/{split}", tokenizer), 16), batch_size=2, seed=3) for split in ("train", "valid")]
seed_everything(3)
model = BantamForCausalLM(BantamConfig.from_preset("tiny", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
                                                   num_hidden_layers=1, residual_dropout=.1))
args = TrainingArgs(out_dir=out, optimizer=optimizer, precision=precision, lr=1e-2, batch_size=2, accum_steps=2, max_steps=int(steps), seed=3, device="cpu",
                    log_every_n=1, eval_every_n=10, eval_batches=2, save_every_n=3, resume_from_checkpoint=out if checkpoints(out) else None)

class Tell:
    def on_step(self, trainer, row): print("step", row["step"], flush=True)

print("ready", flush=True)
try: Trainer(model, args, *loaders, tokenizer, [Tell()]).train()
except Interrupted as e: print(e); sys.exit(130)
print("done", flush=True)
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Shards and a tokenizer, made once."
    from bantam.data.offline import documents
    from bantam.data.pack import write_shards
    from bantam.text.trainbpe import train_bpe
    folder = tmp_path_factory.mktemp("data")
    texts = [d["text"] for d in documents(120, seed=1) if "text" in d]
    tokenizer = train_bpe(texts, vocab_size=400)
    tokenizer.save(folder)
    for split, part in (("train", texts[:-10]), ("valid", texts[-10:])):
        write_shards((tokenizer.encode(t, add_bos=True, add_eos=True) for t in part), folder/split, tokenizer)
    return folder


def start(data, out, optimizer="muon", precision="bf16", steps=150):
    "A training process; it resumes by itself when `out` holds checkpoints."
    env = os.environ | dict(OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=str(Path(__file__).parent.parent))
    return subprocess.Popen([sys.executable, "-c", CHILD, str(data), str(out), optimizer, precision, str(steps)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(process, word):
    "Read lines until one begins with `word`; all lines when the process ends first."
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(word): return lines
    return lines


def finish(process):
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    return text


def outcome(out):
    "Everything that must be equal to the last bit."
    from safetensors.torch import load_file
    last = out/"checkpoints"/(out/"latest").read_text().strip()
    tensors = {**load_file(out/"model"/"model.safetensors"), **load_file(last/"optimizer.safetensors"), **load_file(last/"rng.safetensors")}
    state = json.loads((last/"training_state.json").read_text())
    rows = [json.loads(line) for line in (out/"logs"/"metrics.jsonl").read_text().splitlines()]
    for r in rows: r.pop("tokens_per_second"); r.pop("mfu")
    state.pop("seconds")
    return dict(tensors={k: t.numpy().tobytes() for k, t in tensors.items()}, state=state, rows=rows,
                csv=(out/"logs"/"loss.csv").read_bytes(), best=(out/"best").read_text(), folders=sorted(p.name for p in (out/"checkpoints").iterdir()))


def differing(a, b): return [k for k in a if a[k] != b[k]] + [k for k in a["tensors"] if a["tensors"][k] != b["tensors"].get(k)]


WHOLE = {}


def whole(data, *kind):
    "The run that is left alone, once per kind."
    if kind not in WHOLE:
        out = data/"-".join(map(str, ("whole", *kind)))
        finish(start(data, out, *kind))
        WHOLE[kind] = outcome(out)
    return WHOLE[kind]


def kill_often(data, out, times, kind):
    "Kill `times` processes at random moments, every third one inside a save; then let one end."
    rng, inside, killed = random.Random(times), 0, 0
    for i in range(times):
        p = start(data, out, *kind)
        wait_for(p, "ready")
        if i % 3 == 2:
            saving, end = out/"checkpoints", time.monotonic() + 60
            while not (found := list(saving.glob(".tmp-*"))) and p.poll() is None and time.monotonic() < end: time.sleep(.001)
            time.sleep(rng.random()*.02)
            inside += bool(found)
        else:
            wait_for(p, "step")
            time.sleep(rng.random()*.4)
        p.kill()
        killed += p.wait() == -signal.SIGKILL
        p.stdout.close()
    finish(start(data, out, *kind))
    assert killed >= .8*times
    return inside


@pytest.mark.parametrize("times,kind", [
    (4, ("muon", "bf16", 150)),
    pytest.param(25, ("muon", "bf16", 600), marks=pytest.mark.slow),
    pytest.param(3, ("adamw", "bf16", 150), marks=pytest.mark.slow),
    pytest.param(3, ("muon", "fp32", 150), marks=pytest.mark.slow)])
def test_sigkill(data, tmp_path, times, kind):
    inside = kill_often(data, tmp_path/"run", times, kind)
    assert differing(outcome(tmp_path/"run"), whole(data, *kind)) == []
    assert inside >= times//4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(data, tmp_path, number):
    p = start(data, tmp_path/"run")
    wait_for(p, "step 7\n")
    p.send_signal(number)
    text = p.communicate(timeout=120)[0]
    assert p.returncode == 130, text
    assert f"stopped by {number.name} at step" in text and "go on with: " in text and "Traceback" not in text
    assert not (tmp_path/"run"/"model").exists()
    finish(start(data, tmp_path/"run"))
    assert differing(outcome(tmp_path/"run"), whole(data, "muon", "bf16", 150)) == []


def test_a_difference_would_be_seen(data, tmp_path):
    "The same run with another precision is another run."
    finish(start(data, tmp_path/"run", "muon", "fp32"))
    found = differing(outcome(tmp_path/"run"), whole(data, "muon", "bf16", 150))
    assert "csv" in found and "embed_tokens.weight" in found
