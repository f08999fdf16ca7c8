"""A training process is killed, again and again, goes on each time with the very line that it
printed, and must end with the bits of one that was left alone."""
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENV = os.environ | dict(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=2, max_position_embeddings=128, residual_dropout=.1)
RUN = dict(optimizer="muon", precision="bf16", lr=1e-2, seq_len=16, batch_size=2, accum_steps=2,
           max_steps=60, seed=3, device="cpu", log_every_n=1, eval_every_n=10, eval_batches=2,
           save_every_n=3)
MUON = dict() # Muon, bf16, accumulation 2, dropout
EVERYTHING = dict(ema_half_life=4., dropout_anneal=dict(start=1., end=0., steps=40))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Shards, dialogues, a tokenizer, the file of a model and a model, made once."
    from bantam.config import BantamConfig
    from bantam.data.offline import dialogues, documents
    from bantam.data.pack import write_shards
    from bantam.text.trainbpe import train_bpe
    from bantam.train.pretrain import init_model
    folder = tmp_path_factory.mktemp("data")
    texts = [d["text"] for d in documents(120, seed=1) if "text" in d]
    tokenizer = train_bpe(texts, vocab_size=400)
    tokenizer.save(folder/"tokenizer")
    for split, part in (("train", texts[:-10]), ("valid", texts[-10:])):
        write_shards((tokenizer.encode(t, add_bos=True, add_eos=True) for t in part),
                     folder/split, tokenizer)
        (folder/f"{split}.jsonl").write_text(
            "".join(json.dumps(dict(messages=d["messages"])) + "\n"
                    for d in dialogues(200, seed=0, split=split, kinds=("opposites",))))
    (folder/"model.yaml").write_text("bantam_config: " + json.dumps(SHAPE))
    (folder/"experts.yaml").write_text("bantam_config: " + json.dumps(
        SHAPE | dict(expert_type="topk", num_experts=3, moe_intermediate_size=32)))
    init_model(folder/"base", lambda **known: BantamConfig(**SHAPE, **known),
               str(folder/"tokenizer"))
    return folder


def command(data, out, changes=MUON, verb="pretrain", *more,
            program=(sys.executable, "-m", "bantam")):
    "The line that begins a run."
    talk = "jsonl" if verb == "sft" else None
    where = dict(dataset=str(data/(f"train.{talk}" if talk else "train")),
                 valid_dataset=str(data/(f"valid.{talk}" if talk else "valid")))
    if verb in ("pretrain", "experts train"): where |= dict(tokenizer=str(data/"tokenizer"))
    config = out.with_name(f"{out.name}.yaml")
    config.write_text("training_args: " + json.dumps(RUN | where | changes))
    return shlex.join([*program, *verb.split(), "--config", str(config), "--out", str(out),
                       *map(str, more)])


def from_file(data): return "pretrain", "--mconf", data/"model.yaml"


class Run:
    "A process started by a line of the shell, and what it has said so far."
    def __init__(self, line):
        self.process, self.said = subprocess.Popen("exec " + line, shell=True, env=ENV, text=True,
                                                   stdout=subprocess.PIPE,
                                                   stderr=subprocess.STDOUT), []

    def until(self, word):
        "Read lines until one begins with `word`; False when the process ends first."
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith(word): return True
        return False

    def end(self, rc=0):
        "All that it said, to the end."
        text = "".join(self.said) + self.process.communicate(timeout=300)[0]
        assert self.process.returncode == rc, text
        self.said = text.splitlines(keepends=True)
        return text

    @property
    def go_on(self):
        "The last line that it offered for going on."
        return re.findall("go on with: (.*)", "".join(self.said))[-1]

    def kill(self):
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL
        self.process.stdout.close()


def outcome(out):
    "Everything that must be equal to the last bit."
    from safetensors.torch import load_file
    last = out/"checkpoints"/(out/"latest").read_text().strip()
    tensors = {f"{p.parent.name} {p.name} {k}": t
               for p in (out/"model"/"model.safetensors", *last.glob("*.safetensors"))
               for k, t in load_file(p).items()}
    assert {"model.safetensors", "optimizer.safetensors",
            "rng.safetensors"} <= {p.name for p in last.iterdir()}
    state = json.loads((last/"training_state.json").read_text())
    rows = [json.loads(line) for line in (out/"logs"/"metrics.jsonl").read_text().splitlines()]
    for r in rows: r.pop("tokens_per_second"); r.pop("mfu")
    state.pop("seconds")
    return dict(tensors={k: t.numpy().tobytes() for k, t in tensors.items()},
                state=state, rows=rows,
                csv=(out/"logs"/"loss.csv").read_bytes(), best=(out/"best").read_text(),
                folders=sorted(p.name for p in (out/"checkpoints").iterdir()))


def differing(a, b):
    return [k for k in a if a[k] != b[k]] + [
        k for k in a["tensors"] | b["tensors"] if a["tensors"].get(k) != b["tensors"].get(k)]


WHOLE = {}


def whole(data, changes=MUON):
    "The run that is left alone, once per kind."
    kind = json.dumps(changes)
    if kind not in WHOLE:
        out = data/f"whole-{len(WHOLE)}"
        Run(command(data, out, changes, *from_file(data))).end()
        WHOLE[kind] = outcome(out)
    return WHOLE[kind]


def in_a_save(out):
    return any(not (p/"manifest.json").exists() for p in (out/"checkpoints").glob(".tmp-*"))


def reach(run, out, steps, inside):
    """Let the process take `steps` more steps; then, if asked, wait until it is inside a save.
    False when it ended before."""
    for _ in range(steps):
        if not run.until("step "): return False
    while inside and run.process.poll() is None:
        if in_a_save(out): return True
        time.sleep(.0005)
    return run.process.poll() is None


def kill_often(data, out, times, changes):
    """Kill `times` processes after random numbers of steps, the first before there is a checkpoint,
    every third inside a save; then let one end. How many died inside?"""
    rng, inside, line = random.Random(times), 0, command(data, out, changes, *from_file(data))
    for i in range(times):
        run = Run(line)
        alive = reach(run, out, rng.randint(1, 7) if i else 1, i % 3 == 2)
        assert alive, "the run was over before all kills; more steps: " + "".join(run.said)
        if i: time.sleep(rng.random()*.004)  # somewhere in a step, or in the save
        run.kill()
        inside += in_a_save(out)
        line = run.go_on
    Run(line).end()
    return inside


@pytest.mark.parametrize("times,changes", [
    (3, EVERYTHING),
    pytest.param(25, MUON | dict(max_steps=450), marks=pytest.mark.slow),
    pytest.param(3, dict(optimizer="adamw"), marks=pytest.mark.slow),
    pytest.param(3, dict(precision="fp32"), marks=pytest.mark.slow),
    pytest.param(3, dict(num_workers=2, persistent_workers=True), marks=pytest.mark.slow)],
                         ids=["everything", "muon-bf16", "adamw", "fp32", "workers"])
def test_sigkill(data, tmp_path, times, changes):
    inside = kill_often(data, tmp_path/"run", times, changes)
    assert differing(outcome(tmp_path/"run"), whole(data, changes)) == []
    assert inside >= times//5, f"only {inside} of {times} kills hit a save"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(data, tmp_path, number):
    out = tmp_path/"run"
    run = Run(command(data, out, EVERYTHING, *from_file(data)))
    run.until("step 7/" if number == signal.SIGTERM else "step 33/")
    first = run.go_on
    run.process.send_signal(number)
    text = run.end(130)
    assert (f"stopped by {number.name} at step" in text and "Traceback" not in text
            and run.go_on == first)
    assert not (out/"model").exists()
    Run(run.go_on).end()
    assert differing(outcome(out), whole(data, EVERYTHING)) == []


VERBS = { # words of a run, and what it leaves
    "continue-pretrain": lambda d: ("continue-pretrain", "--model", d/"base"),
    "sft": lambda d: ("sft", "--model", d/"base", "--mode", "lora", "--set", "sft_args.lora_r=4"),
    "sft-full": lambda d: ("sft", "--model", d/"base", "--mode", "full", "--template", "chatml"),
    "experts": lambda d: ("experts train", "--mconf", d/"experts.yaml", "--rounds", 2)}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_long_verb_says_the_line_that_goes_on(data, tmp_path, verb):
    """Killed before the first checkpoint, killed after it, asked to stop; the program is called by
    its name, and once by its module."""
    name = shutil.which("bantam-cli", path=str(Path(sys.executable).parent))
    program = (sys.executable, "-m", "bantam") if verb == "experts" or not name else (name,)
    changes = dict(max_steps=24, seq_len=128 if verb.startswith("sft") else 16)
    one, two = tmp_path/"left alone", tmp_path/"killed twice"
    Run(command(data, one, changes, *VERBS[verb](data), program=program)).end()
    line = command(data, two, changes, *VERBS[verb](data), program=program)
    for step, number in ((2, signal.SIGKILL), (8, signal.SIGKILL), (14, signal.SIGINT)):
        run = Run(line)
        assert run.until(f"step {step}/"), run.said
        assert (run.go_on.endswith(shlex.join(["--resume-from", str(two)]))
                and "--config" in run.go_on)
        if number == signal.SIGKILL: run.kill()
        else:
            run.process.send_signal(number)
            run.end(130)
        line = run.go_on
    text = Run(line).end()
    assert "begins again" not in text
    assert differing(outcome(two), outcome(one)) == []
    if verb == "sft":
        assert (two/"adapter/adapter_model.safetensors").read_bytes() == (
            one/"adapter/adapter_model.safetensors").read_bytes()


def test_a_difference_would_be_seen(data, tmp_path):
    "The same run with another precision is another run."
    Run(command(data, tmp_path/"run", EVERYTHING | dict(precision="fp32"), *from_file(data))).end()
    found = differing(outcome(tmp_path/"run"), whole(data, EVERYTHING))
    assert "csv" in found and "model model.safetensors embed_tokens.weight" in found


def test_nothing_to_go_on_from(data, tmp_path):
    "A folder that never was a run is refused; so is a run whose checkpoints are gone."
    out = tmp_path/"run"
    for there in (False, True):
        if there:
            (out/"logs").mkdir(parents=True)
            (out/"latest").write_text("step-00000030\n")
        text = Run(command(data, out, MUON, *from_file(data), "--resume-from", out)).end(2)
        assert "holds no good checkpoint" in text and "begins again" not in text
