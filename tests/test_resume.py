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
import json
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

data, out, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
tokenizer = BantamTokenizer.load(data)
loaders = [Loader(BlockDataset(Shards(f"{data}/{split}", tokenizer), 16), batch_size=2, seed=3, num_workers=changes.get("num_workers", 0)) for split in ("train", "valid")]
seed_everything(3)
model = BantamForCausalLM(BantamConfig.from_preset("tiny", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
                                                   num_hidden_layers=1, residual_dropout=.1))
given = dict(out_dir=out, optimizer="muon", precision="bf16", lr=1e-2, batch_size=2, accum_steps=2, max_steps=60, seed=3, device="cpu",
             log_every_n=1, eval_every_n=10, eval_batches=2, save_every_n=3, resume_from_checkpoint=out if checkpoints(out) else None)
args = TrainingArgs(**given | changes)

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


MUON = dict() # Muon, bf16, accumulation 2, dropout
EVERYTHING = dict(ema_half_life=4., dropout_anneal=dict(start=1., end=0., steps=40))


def start(data, out, changes=MUON):
    "A training process; it resumes by itself when `out` holds checkpoints."
    env = os.environ | dict(OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=str(Path(__file__).parent.parent))
    return subprocess.Popen([sys.executable, "-c", CHILD, str(data), str(out), json.dumps(changes)], env=env, text=True,
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
    tensors = {f"{p.parent.name} {p.name} {k}": t for p in (out/"model"/"model.safetensors", *last.glob("*.safetensors")) for k, t in load_file(p).items()}
    assert {"model.safetensors", "optimizer.safetensors", "rng.safetensors"} <= {p.name for p in last.iterdir()}
    state = json.loads((last/"training_state.json").read_text())
    rows = [json.loads(line) for line in (out/"logs"/"metrics.jsonl").read_text().splitlines()]
    for r in rows: r.pop("tokens_per_second"); r.pop("mfu")
    state.pop("seconds")
    return dict(tensors={k: t.numpy().tobytes() for k, t in tensors.items()}, state=state, rows=rows,
                csv=(out/"logs"/"loss.csv").read_bytes(), best=(out/"best").read_text(), folders=sorted(p.name for p in (out/"checkpoints").iterdir()))


def differing(a, b): return [k for k in a if a[k] != b[k]] + [k for k in a["tensors"] | b["tensors"] if a["tensors"].get(k) != b["tensors"].get(k)]


WHOLE = {}


def whole(data, changes=MUON):
    "The run that is left alone, once per kind."
    kind = json.dumps(changes)
    if kind not in WHOLE:
        out = data/f"whole-{len(WHOLE)}"
        finish(start(data, out, changes))
        WHOLE[kind] = outcome(out)
    return WHOLE[kind]


def reach(process, out, steps, inside):
    "Let the process take `steps` more steps; then, if asked, wait until it is inside a save. False when it ended before."
    for _ in range(steps):
        if not wait_for(process, "step")[-1:][0].startswith("step"): return False
    while inside and process.poll() is None:
        if any((out/"checkpoints").glob(".tmp-*")): return True
        time.sleep(.0005)
    return process.poll() is None


def kill_often(data, out, times, changes):
    "Kill `times` processes after random numbers of steps, every third one inside a save; then let one end. How many died inside?"
    rng, inside = random.Random(times), 0
    for i in range(times):
        p = start(data, out, changes)
        assert reach(p, out, rng.randint(1, 7), i % 3 == 2), "the run was over before all kills; give it more steps"
        time.sleep(rng.random()*.004)  # somewhere in a step, or in the save
        p.kill()
        assert p.wait() == -signal.SIGKILL
        p.stdout.close()
        inside += any((out/"checkpoints").glob(".tmp-*"))
    finish(start(data, out, changes))
    return inside


@pytest.mark.parametrize("times,changes", [
    (3, EVERYTHING),
    pytest.param(25, MUON | dict(max_steps=450), marks=pytest.mark.slow),
    pytest.param(3, dict(optimizer="adamw"), marks=pytest.mark.slow),
    pytest.param(3, dict(precision="fp32"), marks=pytest.mark.slow),
    pytest.param(3, dict(num_workers=2, persistent_workers=True), marks=pytest.mark.slow)], ids=["everything", "muon-bf16", "adamw", "fp32", "workers"])
def test_sigkill(data, tmp_path, times, changes):
    inside = kill_often(data, tmp_path/"run", times, changes)
    assert differing(outcome(tmp_path/"run"), whole(data, changes)) == []
    assert inside >= times//5, f"only {inside} of {times} kills hit a save"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(data, tmp_path, number):
    out = tmp_path/"run"
    p = start(data, out, EVERYTHING)
    wait_for(p, "step 7\n" if number == signal.SIGTERM else "step 33\n")
    p.send_signal(number)
    text = p.communicate(timeout=120)[0]
    assert p.returncode == 130, text
    assert f"stopped by {number.name} at step" in text and "go on with: " in text and "Traceback" not in text
    assert not (out/"model").exists()
    finish(start(data, out, EVERYTHING))
    assert differing(outcome(out), whole(data, EVERYTHING)) == []


def test_a_difference_would_be_seen(data, tmp_path):
    "The same run with another precision is another run."
    finish(start(data, tmp_path/"run", EVERYTHING | dict(precision="fp32")))
    found = differing(outcome(tmp_path/"run"), whole(data, EVERYTHING))
    assert "csv" in found and "model model.safetensors embed_tokens.weight" in found
