"""Experts one at a time: what it costs in memory and in loss, and what a kill does to it."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bantam import BantamConfig
from bantam.core import BantamError
from bantam.model.lm import BantamForCausalLM
from bantam.train.experts import join_experts, list_experts, num_experts, on_demand, split_experts

ROOT = Path(__file__).parent.parent
ENV = os.environ | dict(OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=str(ROOT))
BASE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, num_experts=6, moe_capacity_factor=None)


# --- at inference ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [dict(expert_type="topk"), dict(expert_type="switch"),
                                  dict(expert_type="dense_moe"),
                                  dict(expert_type="shared", moe_num_shared=2),
                                  dict(expert_type="topk", mlp_bias=True),
                                  dict(expert_type="topk", ffn_type="relu2"),
                                  dict(expert_type="topk", moe_bias_balancing=True),
                                  dict(expert_type="topk",
                                       layer_configs=[dict(expert_type="dense"),
                                                      dict(moe_intermediate_size=32)])], ids=str)
def test_on_demand_is_the_same_model(tmp_path, kind):
    torch.manual_seed(1)
    whole = BantamForCausalLM(BantamConfig.from_preset("tiny", **BASE, **kind)).eval()
    whole.save_pretrained(tmp_path/"whole")
    split_experts(tmp_path/"whole", tmp_path/"split")
    join_experts(tmp_path/"split", tmp_path/"joined")
    assert (tmp_path/"joined"/"model.safetensors").read_bytes() == (
        tmp_path/"whole"/"model.safetensors").read_bytes()
    x_BT = torch.randint(96, (3, 20))
    for folder, cap in (("split", 1), ("split", 4), ("whole", 2)):
        model = on_demand(tmp_path/folder, cap)
        assert (model(x_BT).logits - whole(x_BT).logits).abs().max() < 1e-5
        assert len(model.shelf.held) <= model.shelf.most <= cap
        assert not [n for n, _ in model.named_parameters() if ".experts." in n]
    assert {r["state"] for r in list_experts(tmp_path/"split")} == {"whole"}


@pytest.mark.parametrize("kind", [dict(expert_type="expert_choice"),
                                  dict(expert_type="topk", layer_configs=[dict(num_experts=4)])],
                         ids=str)
def test_models_that_cannot_be_taken_apart(tmp_path, kind):
    with pytest.warns() if kind["expert_type"] == "expert_choice" else torch.no_grad():
        model = BantamForCausalLM(BantamConfig.from_preset("tiny", **BASE, **kind))
    with pytest.raises(BantamError): num_experts(model.config)
    model.save_pretrained(tmp_path/"whole")
    with pytest.raises(BantamError): split_experts(tmp_path/"whole", tmp_path/"split")
    assert not (tmp_path/"split").exists()


def test_memory_on_demand(tmp_path):
    "A model of 100 MB, nearly all of it experts, runs in a fraction of that."
    config = BantamConfig.from_preset("tiny",
                                      **BASE | dict(hidden_size=256, intermediate_size=2048,
                                                    num_hidden_layers=2, num_experts=8),
                                      expert_type="topk")
    BantamForCausalLM(config).save_pretrained(tmp_path/"whole")
    look = """
import sys, torch
torch.set_num_threads(1)
import bantam.presets
from bantam.model.lm import BantamForCausalLM
from bantam.runtime import peak_memory
from bantam.train.experts import on_demand
small = BantamForCausalLM(bantam.presets.BantamConfig.from_preset("tiny", vocab_size=96, hidden_size=32, num_experts=2, expert_type="topk")).eval()
x_BT = torch.randint(96, (1, 16), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    small(x_BT); start = peak_memory()
    model = on_demand(sys.argv[1], int(sys.argv[2])) if sys.argv[2] != "0" else BantamForCausalLM.from_pretrained(sys.argv[1])
    for _ in range(3): logits = model(x_BT).logits
print(peak_memory() - start, logits.sum().item())
"""
    taken, sums = zip(
        *([float(v) for v in subprocess.run([sys.executable, "-c", look, tmp_path/"whole", cap],
                                            env=ENV, capture_output=True, text=True,
                                            check=True).stdout.split()] for cap in ("0", "2")))
    assert abs(sums[0] - sums[1]) < 1e-2
    # two parts of 16, and what it takes to read one
    assert (taken[1]
            < taken[0]/3), f"{taken[1]/2**20:.0f} MB on demand, {taken[0]/2**20:.0f} MB otherwise"


# --- in training ----------------------------------------------------------------------------------

CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
from bantam import BantamConfig
import bantam.presets
from bantam.args import TrainingArgs
from bantam.runtime import peak_memory
from bantam.train.pretrain import pretrain
from bantam.train.turns import train_experts
from bantam.train.trainer import Interrupted

how, shape, args, more = sys.argv[1], *map(json.loads, sys.argv[2:5])
class Tell:
    def on_step(self, trainer, row): print("step", row["step"], flush=True)
args = TrainingArgs(**args)
make = lambda **kw: BantamConfig.from_preset("tiny", **shape | kw)
start = peak_memory()
print("ready", flush=True)
try: result = train_experts(args, make, callbacks=[Tell()], **more) if how == "turns" else pretrain(args, make, [Tell()])
except Interrupted as e: print(e); sys.exit(130)
print("RESULT", json.dumps(dict(valid_loss=result["valid_loss"], whole_loss=result.get("whole_loss"), memory=peak_memory() - start)), flush=True)
"""
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, expert_type="topk", num_experts=6, moe_capacity_factor=None,
             residual_dropout=.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Text and a tokenizer, made once."
    from bantam.data.offline import documents
    from bantam.text.trainbpe import train_bpe
    folder = tmp_path_factory.mktemp("data")
    texts = [d["text"] for d in documents(1500, seed=1) if "text" in d]
    train_bpe(texts[:300], vocab_size=400).save(folder/"tokenizer")
    (folder/"text.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    return folder


def args_of(data, out, **changes):
    return dict(dataset=str(data/"text.jsonl"), tokenizer=str(data/"tokenizer"), out_dir=str(out),
                seq_len=32, batch_size=8, accum_steps=1, max_steps=48, lr=.01, valid_fraction=.05,
                device="cpu",
                eval_every_n=16, eval_batches=8, save_every_n=4, precision="fp32") | changes


def child(how, shape, args, more=None):
    return subprocess.Popen([sys.executable, "-c", CHILD, how, json.dumps(shape), json.dumps(args),
                             json.dumps(more or {})], env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def result_of(process):
    text = process.communicate(timeout=900)[0]
    assert process.returncode == 0, text
    return json.loads(text.rpartition("RESULT")[2])


def files_of(out):
    """What must be equal to the last bit: the whole model, and all that the last checkpoint knows
    of the experts."""
    last = out/"checkpoints"/(out/"latest").read_text().strip()
    files = [out/"model"/"model.safetensors", out/"logs"/"loss.csv", last/"optimizer.safetensors",
             last/"model.safetensors", *sorted((last/"experts").iterdir())]
    assert len(files) == 12  # six experts, the start of this turn, and whose turn it is
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}


MORE = dict(rounds=2, beginning=.25, share=.8)


@pytest.fixture(scope="module")
def whole(data):
    result_of(child("turns", SHAPE, args_of(data, data/"whole"), MORE))
    return files_of(data/"whole")


def test_killed_in_any_turn(data, tmp_path, whole):
    """SIGKILL in the first turn, in the middle of the rounds, and just where experts change;
    SIGTERM once."""
    out, steps = tmp_path/"run", (5, 17, 27, 38)
    for i, step in enumerate(steps):
        p = child("turns", SHAPE, args_of(data, out,
                                          resume_from_checkpoint=str(out) if i else None), MORE)
        for line in p.stdout:
            if line == f"step {step}\n": break
        p.send_signal(signal.SIGTERM if i == 2 else signal.SIGKILL)
        rest = p.communicate(timeout=300)[0]
        assert p.returncode == (130 if i == 2 else -signal.SIGKILL), rest
    result_of(child("turns", SHAPE, args_of(data, out, resume_from_checkpoint=str(out)), MORE))
    found = files_of(out)
    assert [n for n in whole if whole[n] != found[n]] == []


BIG = dict(hidden_size=256, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=4, expert_type="topk", num_experts=6, moe_capacity_factor=None)


@pytest.mark.slow
def test_memory_of_one_expert(data, tmp_path):
    """Peak memory of a run in turns, against that of a model that has but one expert: at most 15 %
    more. All at once take far more."""
    few = dict(batch_size=2, max_steps=14, eval_batches=2, eval_every_n=7,
               save_every_n=7, seq_len=32)
    turns = result_of(child("turns", BIG, args_of(data, tmp_path/"turns", **few),
                            dict(rounds=1, beginning=.5)))["memory"]
    one = result_of(child("all", BIG | dict(num_experts=1, moe_top_k=1),
                          args_of(data, tmp_path/"one", **few)))["memory"]
    joint = result_of(child("all", BIG, args_of(data, tmp_path/"all", **few)))["memory"]
    print(f"in turns {turns/2**20:.0f} MB, one expert alone {one/2**20:.0f} MB, "
          f"all {joint/2**20:.0f} MB")
    assert turns <= 1.15*one, f"in turns {turns/2**20:.0f} MB, one expert alone {one/2**20:.0f} MB"
    assert joint > 1.8*turns


@pytest.mark.slow
def test_loss_of_turns(data, tmp_path):
    "Six experts in turn against all of them at once, on the same tokens: held-out loss within 3 %."
    shape = SHAPE | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=4, residual_dropout=0.,
                         qk_norm=True, layer_configs=[dict(expert_type="dense")])
    few = dict(max_steps=300, batch_size=16, eval_every_n=300, eval_batches=20, save_every_n=0,
               lr=.005, seq_len=64)
    joint = result_of(child("all", shape, args_of(data, tmp_path/"all", **few)))["valid_loss"]
    turns = result_of(child("turns", shape, args_of(data, tmp_path/"turns", **few),
                            {}))["whole_loss"]
    print(f"all at once {joint:.4f}, in turns {turns:.4f}: {turns/joint - 1:+.2%}")
    assert turns <= 1.03*joint, f"all at once {joint:.4f}, in turns {turns:.4f}"
