"""Checkpoints under real damage and real kills: what a cell cannot say."""
import errno
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from bantam.args import TrainingArgs
from bantam import BantamConfig
from bantam.core import BantamError, sha256_file
from bantam.model.lm import BantamForCausalLM
from bantam.text.tokenizer import BantamTokenizer
from bantam.text.trainbpe import train_bpe
from bantam.train.checkpoint import (NEEDED, checkpoints, cleared, is_good, load_checkpoint,
                                     newest_checkpoint, pointed, save_checkpoint, verify_checkpoint)
from bantam.train.optim import build_optimizer

ARGS = TrainingArgs(lr=.01, keep_last_k=3)
CONFIG = BantamConfig.from_preset("tiny", vocab_size=96, hidden_size=16, intermediate_size=32,
                                  num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "bpe_training_args.json")
EXTRA = ("average.safetensors", "experts/expert_0.safetensors")
FILES = (*NEEDED, *TOKENIZER_FILES, *EXTRA, "manifest.json")


def fresh(config=CONFIG):
    model = BantamForCausalLM(config)
    return model, build_optimizer(model, ARGS)


def extra(folder):
    "What only some runs have to remember."
    (folder/"experts").mkdir()
    for name in EXTRA: save_file(dict(w=torch.arange(300.)), folder/name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run with three good checkpoints."
    torch.manual_seed(0)
    folder, (model, opt), tokenizer = (tmp_path_factory.mktemp("run"), fresh(),
                                       BantamTokenizer.default())
    for step in (1, 2, 3):
        x_BT = torch.randint(96, (2, 8))
        model(x_BT, targets=x_BT).loss.backward()
        opt.step(); opt.zero_grad()
        save_checkpoint(folder, step, model, tokenizer, opt, dict(epoch=0), ARGS, extra=extra)
    return folder


@pytest.fixture
def hurt(run, tmp_path):
    "A copy of the run, to be damaged."
    return shutil.copytree(run, tmp_path/"run")


def truncate(p): p.write_bytes(p.read_bytes()[:-5])
def empty(p): p.write_bytes(b"")
def longer(p): p.write_bytes(p.read_bytes() + b"\n")
def first_bit(p): flip(p, 0, 1)
def middle_bit(p): flip(p, p.stat().st_size//2, 16)
def last_bit(p): flip(p, -1, 128)
def zero_page(p):
    p.write_bytes(p.read_bytes()[:8] + bytes(len(p.read_bytes()[8:4096])) + p.read_bytes()[4096:])
def missing(p): p.unlink()
def folder(p): p.unlink(); p.mkdir()


def flip(p, at, bit):
    data = bytearray(p.read_bytes())
    data[at] ^= bit
    p.write_bytes(data)


def test_the_table_has_every_file(run):
    newest = newest_checkpoint(run)
    assert ({p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file()}
            == set(FILES))


@pytest.mark.parametrize("harm", [truncate, empty, longer, first_bit, middle_bit, last_bit,
                                  zero_page, missing, folder], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_used(hurt, caplog, name, harm):
    if (name, harm) == ("manifest.json", longer):
        pytest.skip("a line break after JSON changes nothing")
    newest = hurt/"checkpoints"/"step-00000003"
    harm(newest/name)
    with pytest.raises(BantamError, match=name): verify_checkpoint(newest)
    with pytest.raises(BantamError, match=name): load_checkpoint(newest, *fresh())
    with caplog.at_level(logging.WARNING): found = newest_checkpoint(hurt)
    assert found.name == "step-00000002"
    assert (len(caplog.records) == 1 and name in caplog.text and "NOT USED" in caplog.text
            and "\n" not in caplog.records[0].getMessage())
    assert load_checkpoint(found, *fresh())["step"] == 2


def test_two_rotten_ones_leave_the_third(hurt):
    for step in (2, 3): last_bit(hurt/"checkpoints"/f"step-{step:08d}"/"model.safetensors")
    assert newest_checkpoint(hurt).name == "step-00000001"
    last_bit(hurt/"checkpoints"/"step-00000001"/"rng.safetensors")
    with pytest.raises(BantamError, match="no good checkpoint"): newest_checkpoint(hurt)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors",
                                  "training_state.json"])
def test_files_of_another_checkpoint_do_not_pass(hurt, name):
    shutil.copy(hurt/"checkpoints"/"step-00000002"/name, hurt/"checkpoints"/"step-00000003"/name)
    with pytest.raises(BantamError, match=name):
        verify_checkpoint(hurt/"checkpoints"/"step-00000003")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    "A tokenizer, a config and training arguments of another run."
    folder = tmp_path_factory.mktemp("other")
    train_bpe(["other words in another order " * 20], vocab_size=340,
              lowercase=True).save(folder/"tokenizer")
    model = BantamForCausalLM(CONFIG.replace(rope_theta=500., bos_token_id=5))
    opt = build_optimizer(model, ARGS.replace(lr=.5))
    # the third one, so that a foreign manifest says as well that it is the newest
    for step in (1, 2, 3):
        c = save_checkpoint(folder, step, model, BantamTokenizer.load(folder/"tokenizer"), opt,
                            dict(epoch=1), ARGS.replace(seed=1), extra=extra)
    return c


def test_swapped_tokenizer(run, other):
    "Both folders are whole, but they do not belong together."
    model, opt = fresh()
    before = [t.clone() for t in (*model.parameters(), *opt.state_dict()[0].values())]
    with pytest.raises(BantamError, match="tokenizer.json is not the tokenizer in use"):
        load_checkpoint(newest_checkpoint(run), model, opt, BantamTokenizer.load(other))
    assert all(torch.equal(a, b) for a, b in zip(
        before, (*model.parameters(), *opt.state_dict()[0].values())))


# those are the same in both
@pytest.mark.parametrize("name", [n for n in FILES if n not in (*EXTRA, "special_tokens_map.json")])
def test_a_file_of_another_run(hurt, other, caplog, name):
    "Well-formed, but not the one that was written."
    newest = hurt/"checkpoints"/"step-00000003"
    assert (newest/name).read_bytes() != (
        other/name).read_bytes(), f"{name} is the same in both runs; the test would show nothing"
    shutil.copy(other/name, newest/name)
    # A foreign list names the first file that is not its own
    named = "bpe_training_args.json" if name == "manifest.json" else name
    with pytest.raises(BantamError, match=named): load_checkpoint(newest, *fresh())
    with caplog.at_level(logging.WARNING): assert newest_checkpoint(hurt).name == "step-00000002"
    assert "NOT USED" in caplog.text


@pytest.mark.parametrize("change", [dict(hidden_size=32), dict(num_hidden_layers=2),
                                    dict(rope_theta=500.), dict(tie_word_embeddings=False),
                                    dict(vocab_size=97), dict(residual_dropout=.1)], ids=str)
def test_other_config_changes_nothing_in_the_model(run, change):
    model, opt = fresh(CONFIG.replace(**change))
    before = [t.clone() for t in (*model.parameters(), *opt.state_dict()[0].values())]
    with pytest.raises(BantamError, match=next(iter(change))):
        load_checkpoint(newest_checkpoint(run), model, opt)
    assert all(torch.equal(a, b) for a, b in zip(
        before, (*model.parameters(), *opt.state_dict()[0].values())))


def test_saving_over_damage_heals_the_run(hurt):
    last_bit(hurt/"checkpoints"/"step-00000003"/"model.safetensors")
    missing(hurt/"checkpoints"/"step-00000002"/"manifest.json")
    model, opt = fresh()
    load_checkpoint(newest_checkpoint(hurt), model, opt)
    for step in (2, 3, 4): save_checkpoint(hurt, step, model, None, opt, dict(epoch=0), ARGS)
    assert [c.name[-1] for c in checkpoints(hurt)] == ["4", "3", "2"]
    for c in checkpoints(hurt): verify_checkpoint(c)


# --- how many stay --------------------------------------------------------------------------------

def test_keep_one_keeps_two_until_the_new_one_is_whole(tmp_path):
    """At every act of the file system of every save there are two good ones, once there have been
    two."""
    model, opt = fresh()
    seen, acts = [], {n: getattr(os, n) for n in ("fsync", "replace", "unlink")}
    def watched(name):
        def act(*a, **kw):
            done = acts[name](*a, **kw)
            seen.append(sum(map(is_good, checkpoints(tmp_path))))
            return done
        return act
    for step in range(1, 6):
        with patch("os.fsync", watched("fsync")), patch("os.replace", watched("replace")), patch(
            "os.unlink", watched("unlink")):
            save_checkpoint(tmp_path, step, model, None, opt, dict(epoch=0),
                            ARGS.replace(keep_last_k=1))
            cleared()
        if step == 2: seen.clear()
    assert len(seen) > 30 and min(seen) == 2 and max(seen) == 3
    assert [c.name[-1] for c in checkpoints(tmp_path)] == ["5", "4"]


def test_what_was_touched_is_read_again(run, tmp_path):
    "An older checkpoint goes only when two others were read by this process and not touched since."
    run, (model, opt) = shutil.copytree(run, tmp_path/"run"), fresh()
    def save(step):
        save_checkpoint(run, step, model, None, opt, dict(epoch=0), ARGS.replace(keep_last_k=1))
    read = []
    with patch("bantam.train.checkpoint.sha256_file",
               lambda p, f=sha256_file: read.append(p) or f(p)):
        save(4)
    # a copy that this process has not read yet
    assert {p.parent.name for p in read if p.name == "model.safetensors"
            and not p.parent.name.startswith(".")} == {"step-00000003"}
    assert [c.name[-1] for c in checkpoints(run)] == ["4", "3"]
    stamp = (run/"checkpoints"/"step-00000004"/"model.safetensors").stat()
    last_bit(run/"checkpoints"/"step-00000004"/"model.safetensors")
    os.utime(run/"checkpoints"/"step-00000004"/"model.safetensors",
             ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    read.clear()
    with patch("bantam.train.checkpoint.sha256_file",
               lambda p, f=sha256_file: read.append(p) or f(p)):
        save(5)
    assert {p.parent.name for p in read if p.name == "model.safetensors"
            and not p.parent.name.startswith(".")} == {"step-00000004"}
    # 4 is rotten, so 3 is the second good one
    assert [c.name[-1] for c in checkpoints(run)] == ["5", "4", "3"]
    read.clear()
    with patch("bantam.train.checkpoint.sha256_file",
               lambda p, f=sha256_file: read.append(p) or f(p)):
        newest_checkpoint(run)
    assert {p.name for p in read} >= set(NEEDED)  # whoever loads reads everything


def test_a_tagged_checkpoint_stays(tmp_path):
    model, opt = fresh()
    for step, tag in enumerate(["early", "early", None, "late", "late", None, None, None], 1):
        save_checkpoint(tmp_path, step, model, None, opt, dict(epoch=0),
                        ARGS.replace(keep_last_k=1, save_tag=tag))
    assert [c.name[-1] for c in checkpoints(tmp_path)] == ["8", "7", "5", "2"]
    assert [pointed(tmp_path, f"tags/{t}").name[-1] for t in ("early", "late")] == ["2", "5"]


# --- a full disk ----------------------------------------------------------------------------------

def after_a_failure(run, good, error):
    "One line, and everything as it was."
    assert "\n" not in str(error) and "cannot write" in str(error)
    for c in good: verify_checkpoint(c)
    assert newest_checkpoint(run).name >= good[-1].name
    assert pointed(run, "latest") is not None
    cleared()
    left = [p for home in (run, run/"checkpoints") for p in home.glob(".*")]
    assert left == []


@pytest.fixture
def small_disk(tmp_path):
    "A file system with 1 MB."
    disk = tmp_path/"disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` here to make a small disk with")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk],
                          capture_output=True, text=True)
    if made.returncode: pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_loses_nothing(small_disk):
    """With room for so many pages more, from none to enough: each save fails in one line or is
    whole."""
    run, (model, opt), good, failed = small_disk/"run", fresh(), [], 0
    args = ARGS.replace(keep_last_k=2)
    for step in (1, 2):
        good.append(save_checkpoint(run, step, model, None, opt, dict(epoch=0), args))
    step = 3
    for pages in range(0, 60):
        cleared()
        room = os.statvfs(small_disk)
        (small_disk/"ballast").write_bytes(bytes((room.f_bavail - pages)*room.f_frsize))
        try: made = save_checkpoint(run, step, model, None, opt, dict(epoch=0), args)
        except BantamError as e:
            failed += 1
            assert "No space left" in str(e)
            after_a_failure(run, good, e)
            made = newest_checkpoint(run)  # a pointer that found no room, after the folder had
        (small_disk/"ballast").unlink()
        if made.name == f"step-{step:08d}":
            step += 1
            good = sorted(checkpoints(run))
        if step == 6: break
    assert failed >= 5 and step == 6


@pytest.mark.parametrize("limit", [0, 60, 500, 2000, 5000])
def test_no_file_may_grow(tmp_path, limit):
    """The same where nothing can be mounted: the system refuses to write on, at any place of any
    file."""
    run, (model, opt) = tmp_path, fresh()
    good = [save_checkpoint(run, step, model, None, opt, dict(epoch=0), ARGS) for step in (1, 2)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(BantamError) as e:
            save_checkpoint(run, 3, model, None, opt, dict(epoch=0), ARGS)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after_a_failure(run, good, e.value)
    save_checkpoint(run, 3, model, None, opt, dict(epoch=0), ARGS)


def test_every_fsync_may_fail(tmp_path):
    "Disks that buffer say only at `fsync` that they are full."
    (model, opt), real, n = fresh(), os.fsync, 0
    good = [save_checkpoint(tmp_path, step, model, None, opt, dict(epoch=0), ARGS)
            for step in (1, 2)]
    while True:
        calls = iter(range(n + 1))
        def fails(fd):
            if next(calls, n) == n: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd)
        try:
            with patch("os.fsync", fails):
                save_checkpoint(tmp_path, 3, model, None, opt, dict(epoch=0), ARGS)
        except BantamError as e: after_a_failure(tmp_path, good, e)
        else: break
        n += 1
    assert n > 15
    verify_checkpoint(tmp_path/"checkpoints"/"step-00000003")


# --- kills ----------------------------------------------------------------------------------------

# A helper that saves without pause in a child process, kills it at a random moment, and looks. It
# is a process of its own because a process
# that has used several threads must not fork. The weights say which step they belong to, so a
# mixture of two saves would be seen.
KILLS = """
import os, random, signal, struct, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_checkpoint import ARGS, fresh
from bantam.train.checkpoint import checkpoints, cleared, is_good, load_checkpoint, newest_checkpoint, save_checkpoint

run, kills, rnd = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)
args = ARGS.replace(keep_last_k=1)
model, opt = fresh()

def mark(step):
    with torch.no_grad():
        for p in model.parameters(): p.fill_(step)
        for t in opt.state_dict()[0].values(): t.fill_(step)

def save_on(step, pipe):
    while True:
        step += 1
        mark(step)
        save_checkpoint(run, step, model, None, opt, dict(epoch=0), args)
        os.write(pipe, struct.pack("q", step))

step, left = 0, 0
for _ in range(kills):
    r, w = os.pipe()
    if (child := os.fork()) == 0: save_on(step, w)
    os.close(w)
    done = struct.unpack("q", os.read(r, 8))[0] if step == 0 else step      # the first save is waited for
    time.sleep(rnd.uniform(0, .12))
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    while (b := os.read(r, 8)): done = struct.unpack("q", b)[0]
    os.close(r)
    left += any((run/"checkpoints").glob(".*"))
    newest = newest_checkpoint(run)
    step = load_checkpoint(newest, model, opt)["step"]
    assert step >= done, (step, done)
    assert int(newest.name[5:]) == step
    assert all((t == step).all() for t in (*model.parameters(), *opt.state_dict()[0].values()))
    assert sum(map(is_good, checkpoints(run))) >= min(2, step)
save_checkpoint(run, step+1, model, None, opt, dict(epoch=0), args)
cleared()
assert not [p for home in (run, run/"checkpoints") for p in home.glob(".*")]
assert len(checkpoints(run)) == 2
print(f"killed {kills} times, {left} times in the middle, {step} steps")
"""


def test_kill_at_any_moment_leaves_the_last_good_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path/"run"), "25",
                           str(Path(__file__).parent)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (int(done.stdout.split(", ")[1].split()[0])
            >= 5), f"too few kills hit a save: {done.stdout}"
