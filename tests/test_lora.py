"""Adapters end to end: a run on the command line, killed and resumed; read by plain peft; merged
where everybody reads."""
import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bantam.chat.chat import BantamChat
from bantam.config import BantamConfig
import bantam.presets  # adds from_preset
from bantam.core import BantamError
from bantam.data.offline import dialogues
from bantam.model.lm import BantamForCausalLM
import bantam.model.files  # adds from_pretrained
from bantam.runtime import seed_everything
from bantam.text.template import ChatTemplate
from bantam.text.tokenizer import BantamTokenizer
from bantam.tune.lora import from_adapter, load_adapter

X = torch.arange(100, 130)[None]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A base model, dialogues, and a settings file."
    w, tok = tmp_path_factory.mktemp("lora"), BantamTokenizer.default()
    seed_everything(0)
    BantamForCausalLM(BantamConfig.from_preset("tiny", vocab_size=tok.vocab_size, hidden_size=32,
                                               intermediate_size=64,
                                               num_hidden_layers=2)).save_pretrained(w/"base")
    tok.save(w/"base")
    (w/"talk.jsonl").write_text(
        "".join(json.dumps(dict(messages=d["messages"])) + "\n" for d in dialogues(120)))
    (w/"sft.yaml").write_text("""seed: 1
training_args: {dataset: talk.jsonl, finetune_from: base, seq_len: 64, batch_size: 4, accum_steps: 1, max_steps: 8, save_every_n: 2, eval_every_n: 4, eval_batches: 2,
                log_every_n: 1, device: cpu, precision: fp32, valid_fraction: 0.1}
sft_args: {template: chatml, lora_r: 4, lora_alpha: 8, lr: 0.003}
""")
    return w


def command(world, out, *more):
    env = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    words = [sys.executable, "-m", "bantam", "sft", "--config", world/"sft.yaml", "--out",
             world/out, *more]
    return subprocess.Popen([str(x) for x in words], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def done(world):
    run = command(world, "whole")
    text, _ = run.communicate(timeout=240)
    assert run.returncode == 0, text
    return text


def test_the_run_says_what_it_learns(done):
    assert ("LoRA of rank 4 on down_proj, gate_proj, o_proj, qkv_proj, up_proj and " in done
            and "rows of the word table" in done)
    assert "target | " in done and "read" in done


def test_killed_and_resumed_it_is_the_same_run(world, done):
    run = command(world, "killed")
    deadline = time.time() + 200
    while (not (world/"killed/checkpoints/step-00000004/manifest.json").exists()
           and run.poll() is None and time.time() < deadline):
        time.sleep(.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    again = command(world, "killed", "--resume-from", world/"killed")
    text, _ = again.communicate(timeout=240)
    assert again.returncode == 0, text
    for name in ("model/model.safetensors", "model/lora.safetensors",
                 "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (world/"whole"/name).read_bytes() == (world/"killed"/name).read_bytes(), name
    refused = command(world, "killed", "--resume-from", world/"killed", "--set",
                      "sft_args.lora_r=8")
    text, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "lora_r was 4 and is 8" in text


def test_plain_peft_opens_the_adapter(world, done):
    from peft import PeftModel
    base, left = (BantamForCausalLM.from_pretrained(world/d) for d in ("base", "whole/model"))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), world/"whole/adapter").eval()
    ours = left(X).logits
    assert (theirs(X).logits - ours).abs().max() < 1e-5 < (base(X).logits - ours).abs().max()
    with theirs.disable_adapter(): assert not torch.equal(theirs(X).logits, ours)
    merged = theirs.merge_and_unload()
    assert type(merged) is BantamForCausalLM and (merged(X).logits - ours).abs().max() < 1e-5
    assert merged.state_dict().keys() == left.state_dict().keys()


def test_the_rows_of_the_template_and_no_others_have_changed(world, done):
    base, left = (BantamForCausalLM.from_pretrained(world/d).embed_tokens.weight
                  for d in ("base", "whole/model"))
    tok = BantamTokenizer.default()
    moved = {i for i in range(tok.vocab_size) if not torch.equal(base[i], left[i])}
    assert moved <= {tok.id_of(t) for t in ("<|im_start|>", "<|im_end|>", "<|EOS|>",
                                            "<|THINK_START|>", "<|THINK_END|>",
                                            "<|TOOL_CALL_START|>", "<|TOOL_CALL_END|>")}
    assert {tok.id_of("<|im_start|>"), tok.id_of("<|im_end|>")} <= moved


def test_everybody_reads_the_model_and_the_adapter(world, done):
    chat = BantamChat.from_pretrained(world/"whole/model", device="cpu", seed=0)
    assert chat.template.name == "chatml" and isinstance(chat.say("Hi", max_new_tokens=3), str)
    checkpoint = sorted((world/"whole/checkpoints").iterdir())[-1]
    left = BantamForCausalLM.from_pretrained(world/"whole/model")
    assert torch.equal(BantamForCausalLM.from_pretrained(checkpoint)(X).logits, left(X).logits)
    assert ChatTemplate.of(BantamTokenizer.load(world/"whole/adapter")).name == "chatml"
    assert (from_adapter(world/"whole/adapter")(X).logits - left(X).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    "harm, says", [(lambda c: c.update(peft_type="IA3"), "only adapters of the type LORA"),
                   (lambda c: c.update(r=8), "has no place"),
                                        (lambda c: c.update(target_modules=["q_proj"]),
                                         "not for that model"),
                   (lambda c: c.update(trainable_token_indices=None), "has no place")])
def test_an_adapter_that_does_not_fit_is_refused(world, done, harm, says, tmp_path):
    config = json.loads((world/"whole/adapter/adapter_config.json").read_text())
    harm(config)
    (tmp_path/"adapter_config.json").write_text(json.dumps(config))
    (tmp_path/"adapter_model.safetensors").write_bytes(
        (world/"whole/adapter/adapter_model.safetensors").read_bytes())
    with pytest.raises(BantamError, match=says):
        load_adapter(BantamForCausalLM.from_pretrained(world/"base"), tmp_path)
