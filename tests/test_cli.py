"""The command line: what it does from end to end on a tiny model, and what it says to bad input."""
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bantam.cli import main

MODEL = ("bantam_config:\n  preset: tiny\n  hidden_size: 32\n  intermediate_size: "
         "64\n  num_hidden_layers: 1\n")
TRAIN = """seed: 1
training_args:
  dataset: texts
  tokenizer: tok
  out_dir: run
  seq_len: 32
  batch_size: 2
  accum_steps: 1
  max_steps: 6
  lr: 0.01
  eval_every_n: 3
  eval_batches: 2
  save_every_n: 3
  precision: fp32
  valid_fraction: 0.2
sft_args:
  dataset: chats.jsonl
  out_dir: tuned
  max_steps: 4
  lr: 0.01
"""


def cli(capfd, *words):
    "Exit status, stdout and stderr of a command."
    capfd.readouterr()
    with pytest.raises(SystemExit) as e: main([str(w) for w in words])
    out, err = capfd.readouterr()
    return e.value.code, out, err


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    "A folder with texts, dialogues, settings, a tokenizer and a trained model."
    d = tmp_path_factory.mktemp("cli")
    (d/"texts").mkdir()
    (d/"texts/a.txt").write_text("The hen went to the barn. The fox went to the mill. " * 40)
    (d/"texts/b.jsonl").write_text("".join(json.dumps(dict(text=f"Hen number {i} has {i * 7} "
                                                                f"grains and {i} friends, "
                                                                "and it counts them every single "
                                                                "day.")) + "\n" for i in range(60)))
    chats = [dict(messages=[dict(role="user", content=f"What is {i} + 1?"),
                            dict(role="assistant", content=f"{i + 1}.")]) for i in range(20)]
    chats += [dict(prompt="Hello!", response="Hi!"),
              dict(instruction="Say yes.", input="", output="Yes.")]
    (d/"chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    (d/"model.yaml").write_text(MODEL)
    (d/"train.yaml").write_text(TRAIN)
    run = lambda *words: subprocess.run([sys.executable, "-m", "bantam", *map(str, words)],
                                        check=True, capture_output=True, text=True)
    run("trainbpe", "--input", d/"texts", "--out", d/"tok", "--vocab-size", 400)
    run("pretrain", "--config", d/"train.yaml", "--mconf", d/"model.yaml")
    return d


# --- from end to end ------------------------------------------------------------------------------

def test_trainbpe_writes_what_transformers_reads(world):
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
            "bpe_training_args.json"} <= {p.name for p in (world/"tok").iterdir()}


def test_pretrain_leaves_a_run_folder(world):
    run = world/"run"
    assert (run/"latest").read_text().strip() == "step-00000006"
    for f in ("logs/metrics.jsonl", "logs/loss.csv", "loss.png", "report.html",
              "model/model.safetensors", "model/tokenizer.json"):
        assert (run/f).exists(), f


@pytest.mark.parametrize("where", ["run", "run/model", "run/checkpoints/step-00000003"])
def test_generate_from_run_model_or_checkpoint(world, capfd, where):
    code, out, _ = cli(capfd, "generate", "--model", world/where, "--prompt", "The hen",
                       "--max-new-tokens", 8, "--seed", 1)
    assert code == 0 and out.strip()
    assert cli(capfd, "generate", "--model", world/where, "--prompt", "The hen", "--max-new-tokens",
               8, "--seed", 1)[1] == out
    code, streamed, _ = cli(capfd, "generate", "--model", world/where, "--prompt", "The hen",
                            "--max-new-tokens", 8, "--seed", 1, "--stream")
    assert code == 0 and streamed.strip() == out.strip()


def test_sft_and_chat(world, capfd, monkeypatch):
    code, out, err = cli(capfd, "sft", "--config", world/"train.yaml", "--model", world/"run")
    assert code == 0, err
    assert (world/"tuned/model/model.safetensors").exists()
    done = subprocess.run([sys.executable, "-m", "bantam", "chat", "--model", str(world/"tuned"),
                           "--max-new-tokens", "4"], input="Hello!\n/exit\n",
                          capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_continue_pretrain(world, capfd, tmp_path):
    code, out, err = cli(capfd, "continue-pretrain", "--model", world/"run", "--config",
                         world/"train.yaml", "--out", tmp_path/"more", "--set",
                         "training_args.tokenizer=null", "--set", "training_args.max_steps=2")
    assert code == 0, err
    assert (tmp_path/"more/model/model.safetensors").exists()


def test_define_init_and_print_config(capfd, tmp_path):
    code, out, _ = cli(capfd, "define", "--out", tmp_path/"configs", "--preset", "tiny")
    assert code == 0 and len(out.split()) == 3
    code, out, err = cli(capfd, "init", "--mconf", tmp_path/"configs/models/tiny.yaml", "--out",
                         tmp_path/"fresh")
    assert code == 0 and (tmp_path/"fresh/model.safetensors").exists(), err
    code, out, _ = cli(capfd, "pretrain", "--config", tmp_path/"configs/training/pretrain.yaml",
                       "--preset", "tiny", "--set", "training_args.lr=0.5", "--set",
                       "bantam_config.window=7", "--print-config")
    assert code == 0 and "lr: 0.5" in out and "window: 7" in out and not (tmp_path/"runs").exists()


def test_settings_from_toml(world, capfd, tmp_path):
    (tmp_path/"g.toml").write_text(f'model = "{world}/run"\nprompt = "The"\nmax-new-tokens = '
                                   '3\ntemperature = 0.0\n')
    code, out, err = cli(capfd, "generate", "--config", tmp_path/"g.toml", "--model", world/"run",
                         "--prompt", "The", "--print-config")
    assert code == 0 and "temperature: 0.0" in out and "max_new_tokens: 3" in out, err


# --- bad input: one line, status 2, nothing written -----------------------------------------------

def bad(world, tmp):
    "Name -> (words of the command, what the message must name)."
    w, t = world, tmp
    (t/"twice.yaml").write_text("seed: 1\nseed: 2\n")
    (t/"broken.yaml").write_text("training_args: [1\n")
    (t/"typo.yaml").write_text("training_args:\n  batchsize: 2\n")
    (t/"type.yaml").write_text("training_args:\n  batch_size: two\n")
    (t/"section.yaml").write_text("trainin_args:\n  batch_size: 2\n")
    (t/"model_typo.yaml").write_text("bantam_config:\n  hiden_size: 64\n")
    (t/"heads.yaml").write_text("bantam_config:\n  hidden_size: 64\n  num_attention_heads: 5\n")
    (t/"vocab.yaml").write_text(MODEL + "  vocab_size: 99\n")
    (t/"bad.jsonl").write_text('{"text": "fine"}\n{"text": broken}\n')
    (t/"field.jsonl").write_text('{"body": "no text field"}\n')
    (t/"empty.txt").write_text("")
    (t/"binary.txt").write_bytes(bytes(range(256)) * 8)
    (t/"role.jsonl").write_text('{"messages": [{"role": "wizard", "content": "x"}, {"role": '
                                '"assistant", "content": "y"}]}\n')
    (t/"notarget.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    (t/"tiny.txt").write_text("Hi.")
    (t/"taken").mkdir(); (t/"taken/x").write_text("mine")
    pre = ["pretrain", "--config", w/"train.yaml", "--mconf", w/"model.yaml", "--out", t/"out"]
    sft = ["sft", "--config", w/"train.yaml", "--model", w/"run", "--out", t/"out"]
    gen = ["generate", "--model", w/"run", "--prompt", "x"]
    return {
        "unknown verb": (["pretrian"], "pretrian"),
        "unknown option": (["init", "--outt", "x"], "--outt"),
        "missing option": (["generate", "--model", w/"run"], "--prompt"),
        "option of the wrong type": (["trainbpe", "--input", w/"texts", "--out", t/"out",
                                      "--vocab-size", "many"], "--vocab-size"),
        "missing settings file": (["pretrain", "--config", t/"none.yaml"],
                                  "none.yaml does not exist"),
        "settings of another kind": (["pretrain", "--config", t/"tiny.txt"], ".yaml"),
        "key twice": (["pretrain", "--config", t/"twice.yaml"], "line 2"),
        "broken YAML": (["pretrain", "--config", t/"broken.yaml"], "line 2"),
        "unknown key": (["pretrain", "--config", t/"typo.yaml"], "did you mean 'batch_size'"),
        "wrong type in a file": (["pretrain", "--config", t/"type.yaml"], "batch_size"),
        "unknown section": (["pretrain", "--config", t/"section.yaml"],
                            "did you mean 'training_args'"),
        "override without a value": ([*pre, "--set", "training_args.lr"], "key=value"),
        "override of an unknown key": ([*pre, "--set", "training_args.lrr=1"], "lrr"),
        "unknown key of the model": ([*pre[:3], "--mconf", t/"model_typo.yaml", "--out", t/"out"],
                                     "did you mean 'hidden_size'"),
        "heads that do not divide": ([*pre[:3], "--mconf", t/"heads.yaml", "--out", t/"out"],
                                     "num_attention_heads"),
        "vocabulary of another tokenizer": ([*pre[:3], "--mconf", t/"vocab.yaml", "--out", t/"out"],
                                            "vocab_size is 99"),
        "unknown preset": (["init", "--preset", "tinyy", "--out", t/"out"], "did you mean 'tiny'"),
        "model file and preset": (["init", "--preset", "tiny", "--mconf", w/"model.yaml", "--out",
                                   t/"out"], "contradict"),
        "output folder taken": (["init", "--preset", "tiny", "--out", t/"taken"], "exists already"),
        "settings that exist": (["define", "--out", w.parent/"defined"], "exists already"),
        "missing text": (["trainbpe", "--input", t/"none", "--out", t/"out"], "none"),
        "empty text": (["trainbpe", "--input", t/"empty.txt", "--out", t/"out"], "empty.txt"),
        "binary text": (["trainbpe", "--input", t/"binary.txt", "--out", t/"out"], "binary.txt"),
        "malformed JSON": (["trainbpe", "--input", t/"bad.jsonl", "--out", t/"out"], "bad.jsonl:2"),
        "missing field": (["trainbpe", "--input", t/"field.jsonl", "--out", t/"out"],
                          "field.jsonl:1"),
        "vocabulary too small": (["trainbpe", "--input", w/"texts", "--out", t/"out",
                                  "--vocab-size", 100], "vocab"),
        "no such tokenizer": ([*pre, "--tokenizer", t/"none"], "none"),
        "no such data": ([*pre, "--dataset", t/"none"], "none"),
        "rows longer than the model": ([*pre, "--set", "training_args.seq_len=4096"], "4096"),
        "too little text": ([*pre, "--dataset", t/"tiny.txt"], "tiny.txt"),
        "no such device": ([*pre, "--device", "cudda"], "did you mean 'cuda'"),
        "no dataset": (["pretrain", "--preset", "tiny", "--tokenizer", "default", "--out", t/"out"],
                       "dataset is not set"),
        "run folder taken": (["pretrain", "--config", w/"train.yaml", "--mconf", w/"model.yaml"],
                             "already holds a run"),
        "resume from nothing": (["pretrain", "--config", w/"train.yaml", "--resume-from", t/"none",
                                 "--out", t/"out"], "none"),
        "resume another run": (["pretrain", "--config", w/"train.yaml", "--resume-from", w/"run",
                                "--set", "training_args.lr=0.5"], "lr was 0.01"),
        "served without a token": (["serve", "--model", w/"run", "--host", "0.0.0.0"], "token"),
        "served at no port": (["serve", "--model", w/"run", "--port", "99999"], "99999"),
        "served without seats": (["serve", "--model", w/"run", "--port", "0", "--max-batch", "0"],
                                 "seats"),
        "served from nowhere": (["serve", "--model", t/"none", "--port", "0"], "none"),
        "no such model": (["generate", "--model", t/"none", "--prompt", "x"], "none"),
        "a folder that is no model": (["generate", "--model", t/"taken", "--prompt", "x"], "taken"),
        "temperature below zero": ([*gen, "--temperature", "-1"], "temperature"),
        "top-p above one": ([*gen, "--top-p", "1.5"], "top_p"),
        "unknown role": ([*sft, "--dataset", t/"role.jsonl"], "wizard"),
        "nothing to learn": ([*sft, "--dataset", t/"notarget.jsonl"], "notarget.jsonl:1"),
        "unknown template": ([*sft, "--set", "sft_args.template=chatlm"], "template"),
        "unknown corpus": (["demo", "--corpus", "stdlibb", "--out", t/"out"],
                           "did you mean 'stdlib'"),
        "corpus and text": (["demo", "--corpus", "stdlib", "--text", t/"tiny.txt", "--out",
                             t/"out"], "contradict"),
        "no minutes": (["demo", "--minutes", "0", "--out", t/"out"], "minutes"),
    }


@pytest.fixture(scope="session")
def cases(world, tmp_path_factory):
    main_define = subprocess.run([sys.executable, "-m", "bantam", "define", "--out",
                                  str(world.parent/"defined")], capture_output=True)
    assert main_define.returncode == 0
    return bad(world, tmp_path_factory.mktemp("bad"))


# the names alone, for pytest's list
with tempfile.TemporaryDirectory() as _d: CASES = list(bad(Path(_d), Path(_d)))


def test_there_are_many(): assert len(CASES) >= 40


def test_generate_with_beams_draft_log_and_lines(world, capfd, tmp_path, monkeypatch):
    gen = ["generate", "--model", world/"run", "--max-new-tokens", 8, "--temperature", 0]
    code, plain, _ = cli(capfd, *gen, "--prompt", "The hen")
    assert code == 0
    code, guessed, err = cli(capfd, *gen, "--prompt", "The hen", "--draft", world/"run", "--log",
                             tmp_path/"log.jsonl")
    assert (code, guessed) == (0, plain) and "guesses kept" in err
    line, = map(json.loads, (tmp_path/"log.jsonl").read_text().splitlines())
    assert (line["text.prompt"] == "The hen" and line["text.output"] == plain.removesuffix("\n")
            and line["params.temperature"] == 0 and line["metrics.latency_ms"] > 0)
    code, out, _ = cli(capfd, "generate", "--model", world/"run", "--max-new-tokens", 8, "--prompt",
                       "The hen", "--num-beams", 2, "--num-samples", 2)
    assert code == 0 and out.count("\n") >= 2
    monkeypatch.setattr("sys.stdin", io.StringIO("The hen\n\nThe hen\n"))
    code, out, _ = cli(capfd, *gen, "--interactive", "--precision", "fp32")
    assert (code, out) == (0, plain*2)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, cases, capfd):
    words, must = cases[name]
    out = next((Path(words[i + 1]) for i, w in enumerate(words) if w == "--out"), None)
    before = sorted(str(p) for p in out.rglob("*")) if out and out.exists() else []
    code, _, err = cli(capfd, *words)
    last = err.strip().splitlines()[-1] if err.strip() else ""
    assert code == 2, (code, err)
    assert last.startswith("bantam: ") and must in last and "Traceback" not in err, err
    left = sorted(str(p) for p in out.rglob("*")) if out and out.exists() else []
    assert ([p for p in left if p not in before and "/data" not in p and not p.endswith("out")]
            == []), "something half-written is left"


def test_debug_shows_the_traceback():
    done = subprocess.run([sys.executable, "-m", "bantam", "init", "--preset", "tinyy", "--out",
                           "x", "--debug"], capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" in done.stderr and "BantamError" in done.stderr
