"""Every argument of a run acts, the numbers of a step are right, and trackers tell what the log
says."""
import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import struct
import time
from types import SimpleNamespace

import pytest
import torch

import bantam.presets  # adds `from_preset`
import bantam.train.pretrain as pretraining
import bantam.train.trainer as training
from bantam.args import TrainingArgs
from bantam.config import BantamConfig
from bantam.core import BantamError
from bantam.data.loader import Batch, BlockDataset, Loader
from bantam.data.offline import documents
from bantam.data.pack import Shards, write_shards
from bantam.model.lm import BantamForCausalLM
from bantam.runtime import seed_everything
from bantam.text.tokenizer import BantamTokenizer
from bantam.train.checkpoint import checkpoints
from bantam.train.step import accumulate
from bantam.train.track import Samples
from bantam.train.trainer import Interrupted, Trainer

torch.set_num_threads(1)
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4)


def shape(vocab_size=None, **changes):
    return BantamConfig.from_preset("tiny", **SHAPE | dict(vocab_size=vocab_size or 334,
                                                           residual_dropout=.1) | changes)


class Lab:
    "A folder with stories, tokens and a tokenizer; short runs on them."
    def __init__(self, folder):
        self.folder, self.count, self.cache = folder, 0, {}
        self.tokenizer = BantamTokenizer.byte_level()
        texts = [d["text"] for d in documents(60, seed=1) if "text" in d]
        (folder/"text.jsonl").write_text(
            "".join(
                json.dumps(dict(text=t, other=t.upper(),
                                messages=[dict(role="user", content=t[:9])])) + "\n"
                    for t in texts))
        (folder/"held.jsonl").write_text(
            "".join(json.dumps(dict(text=t)) + "\n" for t in texts[:5]))
        for split, part in (("train", texts[:-8]), ("valid", texts[-8:])):
            write_shards((self.tokenizer.encode(t, add_bos=True, add_eos=True) for t in part),
                         folder/split, self.tokenizer)
        self.tokenizer.save(folder/"tok")

    def loader(self, split, batch_size=2, seed=0, **how):
        return Loader(BlockDataset(Shards(self.folder/split, self.tokenizer), 16), batch_size,
                      seed=seed, **how)

    def out(self):
        self.count += 1
        return str(self.folder/f"run{self.count}")

    def args(self, **changes):
        usual = dict(out_dir=self.out(), lr=1e-2, batch_size=2, accum_steps=2, max_steps=4,
                     log_every_n=1, eval_every_n=0, save_every_n=0, precision="fp32", device="cpu")
        return TrainingArgs(**usual | changes)

    def trainer(self, callbacks=(), model=None, config=None, valid=False, **changes):
        args = self.args(**changes)
        if model is None:
            seed_everything(0)
            model = BantamForCausalLM(shape(**config or {}))
        return Trainer(model, args, self.loader("train", args.batch_size, args.seed),
                       self.loader("valid") if valid else None, self.tokenizer, callbacks)

    def run(self, *callbacks, **changes):
        "A whole run, quietly; `.printed` has what it said."
        t = self.trainer(callbacks, **changes)
        with contextlib.redirect_stdout(out := io.StringIO()): t.result = t.train()
        t.printed = out.getvalue()
        return t

    def weights(self, config=None, **changes):
        "All weights after four steps with these arguments."
        key = json.dumps([config, changes], sort_keys=True)
        if key not in self.cache:
            t = self.run(config=config, **changes)
            self.cache[key] = torch.cat([p.detach().flatten() for p in t.model.parameters()])
            shutil.rmtree(t.out_dir)
        return self.cache[key]

    def begun(self, **changes):
        "The trainer that `pretrain` makes, before it trains."
        kept = []
        class Keep:
            def __init__(self, *a):
                kept.append(SimpleNamespace(
                    **dict(zip(("model", "args", "train", "valid", "tokenizer"), a))))
            def train(self): return {}
        args = TrainingArgs(**dict(dataset=str(self.folder/"text.jsonl"),
                                   tokenizer=str(self.folder/"tok"), out_dir=self.out(), seq_len=16,
                                   device="cpu", valid_fraction=.2) | changes)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(pretraining, "Trainer", Keep)
            pretraining.pretrain(args, shape)
        return kept[0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Pictures and reports are tested in their own rooms; here they would only take time."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training, "png", lambda figure: b"")
        m.setattr(training, "loss_curve", lambda *a: None)
        m.setattr(training, "run_report", lambda trainer, result, picture: trainer.args.run_name
                  or trainer.out_dir.name)
        m.setattr(training, "peak_speed", lambda *a: 1e9)
        yield Lab(tmp_path_factory.mktemp("lab"))


# --- every argument acts --------------------------------------------------------------------------

def differs(field, *values, base=None, **others):
    "Other weights after four steps, and not by rounding."
    def test(lab):
        base_weights = lab.weights(**base or {}, **others)
        for v in values:
            assert ((lab.weights(**(base or {}) | others | {field: v}) - base_weights).abs().max()
                    > 1e-6), v
    return test


def refuses(message, **args):
    with pytest.raises(BantamError, match=message): TrainingArgs(**args)


def rows_of(t): return [r["step"] for r in t.log.rows]
def kept(t): return sorted(int(p.name[5:]) for p in checkpoints(t.out_dir))
def ids(t): return t.train.batch(0).x_BT


def dataset(lab):
    with pytest.raises(BantamError, match="dataset is not set"): lab.begun(dataset=None)
    assert not torch.equal(ids(lab.begun()), ids(lab.begun(dataset=str(lab.folder/"held.jsonl"))))


def valid_dataset(lab):
    assert len(lab.begun(valid_dataset=str(lab.folder/"held.jsonl")).valid.dataset) != len(
        lab.begun().valid.dataset)


def valid_fraction(lab):
    assert len(lab.begun(valid_fraction=.5).valid.dataset) > len(lab.begun().valid.dataset)
def dataset_text_field(lab):
    assert not torch.equal(ids(lab.begun(dataset_text_field="other")), ids(lab.begun()))


def dataset_dtype(lab):
    raw = lab.folder/"raw.bin"
    torch.arange(4000).remainder(300).to(torch.int16).numpy().tofile(raw)
    wide = torch.arange(4000).remainder(300)
    wide.to(torch.int32).numpy().tofile(lab.folder/"wide.bin")
    with pytest.raises(BantamError, match="declare dtype"):
        lab.begun(dataset=str(raw), eval_every_n=0)
    narrow = lab.begun(dataset=str(raw), eval_every_n=0, dataset_dtype="uint16").train
    as_wide = lab.begun(dataset=str(lab.folder/"wide.bin"), eval_every_n=0,
                        dataset_dtype="uint32").train
    assert (len(narrow.dataset) == len(as_wide.dataset)
            and torch.equal(narrow.batch(0).x_BT, as_wide.batch(0).x_BT))


def min_sample_token_length(lab):
    lengths = sorted(len(lab.tokenizer.encode(json.loads(line)["text"]))
                     for line in (lab.folder/"text.jsonl").read_text().splitlines())
    assert lab.begun(min_sample_token_length=lengths[len(lengths)//2 + 1],
                     eval_every_n=0).train.dataset.tokens < lab.begun(
                         eval_every_n=0).train.dataset.tokens


def tokenizer(lab):
    with pytest.raises(BantamError, match="tokenizer is not set"): lab.begun(tokenizer=None)
    assert lab.begun(
        tokenizer="default").model.config.vocab_size != lab.begun().model.config.vocab_size


def seq_len(lab):
    assert ids(lab.begun(seq_len=24)).shape[1] == 24 and ids(lab.begun()).shape[1] == 16
    assert ids(lab.begun(seq_len=None)).shape[1] == shape().max_position_embeddings


def document_mask(lab):
    assert lab.begun(document_mask=False).train.batch(
        0).document_ids is None is not lab.begun().train.batch(0).document_ids
def pack(lab):
    assert ((ids(lab.begun(pack="best_fit"))[:, 0] == lab.tokenizer.bos_id).all()
            and type(lab.begun().train.dataset) is BlockDataset)
def stride(lab): assert len(lab.begun(stride=4).train.dataset) > 3*len(lab.begun().train.dataset)


def loading(field, value):
    def test(lab):
        t = lab.begun(
            **{field: value}, **(dict(num_workers=1) if field == "persistent_workers" else {}))
        assert TrainingArgs(**{field: value},
                            **(dict(num_workers=1) if field == "persistent_workers"
                               else {})).loading()[field] == value
        assert getattr(t.train, field) == value and getattr(lab.begun().train, field) != value
        t.train.close()
    return test


def pin_memory(lab):
    if torch.cuda.is_available(): assert lab.begun(pin_memory=True).train.batch(0).x_BT.is_pinned()
    else:
        with pytest.raises(BantamError, match="pin_memory needs a CUDA device"):
            lab.begun(pin_memory=True)


def parallel(lab): # with two processes: tests of several ranks
    assert lab.trainer(parallel="fsdp").ranks.parallel == "fsdp" != lab.trainer().ranks.parallel


def overfit_subset(lab): assert lab.begun(overfit_subset=3).train.batches_per_epoch == 3


def hub(field, value, place):
    "The dataset is asked for with this."
    def test(lab):
        asked = []
        class Seen(Exception): pass
        def spy(*a, **kw): asked.append(a); raise Seen
        with pytest.MonkeyPatch.context() as m, pytest.raises(Seen):
            m.setattr("bantam.data.mixture.hub_records", spy)
            lab.begun(**dict(dataset=None, use_hf=True, hf_name="hens") | {field: value})
        assert asked[0][place] == value
        if field != "hf_name": refuses(f"{field} does nothing without use_hf", **{field: value})
    return test


def use_hf(lab):
    refuses("hf_name is not", use_hf=True)
    folder = lab.folder/"hub"
    folder.mkdir()
    shutil.copy(lab.folder/"text.jsonl", folder/"train.jsonl")
    assert torch.equal(ids(lab.begun(dataset=None, use_hf=True, hf_name=str(folder),
                                     hf_messages_field="none")), ids(lab.begun()))


def batch_size(lab): assert lab.run(batch_size=4).tokens == 2*lab.run().tokens
def accum_steps(lab): assert lab.run(accum_steps=4).tokens == 2*lab.run().tokens
def epochs(lab):
    assert lab.trainer(max_steps=None, epochs=2).total_steps == 2*lab.trainer(
        max_steps=None, epochs=1).total_steps
def max_steps(lab): assert lab.run(max_steps=3).step == 3


def dropout_anneal(lab):
    gone = dict(start=0, end=0, steps=1)
    assert (lab.weights(dropout_anneal=gone) - lab.weights(
        config=dict(residual_dropout=0.))).abs().max() == 0
    half = lab.run(dropout_anneal=dict(start=1., end=.5, steps=3))
    assert [b.dropout for b in half.model.layers] == [.05, .05]
    assert (lab.weights(dropout_anneal=dict(start=1., end=0., steps=2))
            - lab.weights()).abs().max() > 1e-6
    with pytest.raises(BantamError, match="no dropout"):
        lab.trainer(dropout_anneal=gone, config=dict(residual_dropout=0.))


def ema_half_life(lab):
    t = lab.run(ema_half_life=2., valid=True, eval_every_n=2)
    final = BantamForCausalLM.from_pretrained(t.out_dir/"model")
    with t.shown():
        assert all(torch.equal(a, b) for a, b in zip(final.parameters(), t.model.parameters()))
    assert ((t.out_dir/"checkpoints/step-00000004/average.safetensors").exists()
            and not (t.out_dir/"model/average.safetensors").exists())
    plain = lab.run(valid=True, eval_every_n=2)
    assert (torch.equal(t.model.head_weight, plain.model.head_weight)
            and t.log.rows[-1]["valid_loss"] != plain.log.rows[-1]["valid_loss"])


def log_every_n(lab): assert rows_of(lab.run(log_every_n=3)) == [1, 3, 4]
def eval_every_n(lab):
    assert [r["step"] for r in lab.run(eval_every_n=3, valid=True).log.rows if r["valid_loss"]] == [
        3, 4]
def eval_batches(lab):
    assert lab.run(eval_every_n=4, valid=True,
                   eval_batches=1).log.rows[-1]["valid_loss"] != lab.run(
                       eval_every_n=4, valid=True).log.rows[-1]["valid_loss"]
def save_every_n(lab): assert kept(lab.run(save_every_n=2)) == [2, 4] and kept(lab.run()) == [4]
def keep_last_k(lab):
    assert (kept(lab.run(save_every_n=1, keep_last_k=3, max_steps=6, lr=1e-9)) >= [4, 5, 6]
            and len(kept(lab.run(save_every_n=1, keep_last_k=9, max_steps=6))) == 6)


def sample_every_n(lab):
    with pytest.raises(BantamError, match="nothing generates"): lab.trainer(sample_every_n=2)
    assert [s["step"] for s in lab.run(Samples(lambda model: "A hen."),
                                       sample_every_n=2).log.samples] == [2, 4]


def save_on_improve(lab):
    t = lab.run(valid=True, eval_every_n=1, save_on_improve=True, keep_last_k=9)
    best = [r["step"] for i, r in enumerate(t.log.rows) if r["valid_loss"] < min(
        (x["valid_loss"] for x in t.log.rows[:i]), default=math.inf)]
    assert kept(t) == sorted({*best, 4}) and t.best["step"] == best[-1]
    # nothing held out: the smoothed training loss decides
    alone = lab.run(eval_every_n=2, save_on_improve=True)
    assert kept(alone) == [2, 4] and alone.best == dict(step=4, loss=alone.guard.level.loss)


def improve_delta(lab):
    t = lab.run(valid=True, eval_every_n=1, save_on_improve=True, improve_delta=50., keep_last_k=9)
    assert kept(t) == [1, 4] and t.best["step"] == 1


def save_tag(lab):
    t = lab.run(save_tag="good", save_every_n=1, max_steps=4)
    assert (t.out_dir/"tags/good").read_text() == "step-00000004\n"


def log_format(lab):
    assert ("metrics.loss" in json.loads(lab.run(log_format="json").printed.splitlines()[0])
            and "tok/s" in lab.run().printed)
def log_loss_to_csv(lab):
    assert ((lab.run().out_dir/"logs/loss.csv").exists()
            and not (lab.run(log_loss_to_csv=False).out_dir/"logs/loss.csv").exists())


def log_norms(lab):
    t = lab.run(log_norms=True, log_every_n=2)
    rows = [json.loads(line) for line in (t.out_dir/"logs/norms.jsonl").read_text().splitlines()]
    assert ([r["step"] for r in rows] == [1, 2, 4] and "embed_tokens.weight" in rows[0]["weights"]
            and "layers.1" in rows[0]["activations"])
    assert torch.equal(t.model.head_weight, lab.run().model.head_weight)


def trackers(lab):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    t = lab.run(trackers=["tensorboard"], log_norms=True)
    seen = EventAccumulator(str(t.out_dir/"logs/tensorboard"))
    seen.Reload()
    assert [e.step for e in seen.Scalars("train/loss")] == [1, 2, 3, 4]
    for e, r in zip(seen.Scalars("train/loss"), t.log.rows): assert abs(e.value - r["loss"]) < 1e-5
    assert ("weights/norm.weight" in seen.Tags()["scalars"]
            and not (lab.run().out_dir/"logs/tensorboard").exists())


def records(path):
    """The records of a `.wandb` file: a header of 7 bytes, then LevelDB's log format (blocks of 32
    KiB; checksum, length, kind, part)."""
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7: at += left; continue
        _, size, kind = struct.unpack("<IHB", data[at:at+7])
        part += data[at+7:at+7+size]; at += 7 + size
        if kind in (1, 4): yield part; part = b""


def wandb(lab):
    from wandb.proto import wandb_internal_pb2 as pb
    with pytest.MonkeyPatch.context() as m:
        m.setenv("WANDB_MODE", "offline")
        t = lab.run(trackers=["wandb"], wandb=dict(project="hens", artifacts=True),
                    run_name="third hen", max_steps=3)
    found, end = [], time.monotonic() + 20
    # another process writes the file
    while time.monotonic() < end and not any(r.WhichOneof("record_type") == "exit" for r in found):
        file, = (t.out_dir/"logs/wandb").glob("offline-run-*/*.wandb")
        found = [pb.Record.FromString(r) for r in records(file)]
        time.sleep(.05)
    history = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
               for r in found if r.WhichOneof("record_type") == "history"]
    assert [h["progress/step"] for h in history] == [1, 2, 3]
    assert [h["train/loss"] for h in history] == [r["loss"] for r in t.log.rows]
    run, = [r.run for r in found if r.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.display_name, run.run_id) == (
        "hens", "third hen", json.loads((t.out_dir/"logs/wandb.json").read_text())["id"])
    text = b"".join(r.SerializeToString() for r in found)
    assert (b"third-hen-tokenizer" in text and b"third-hen-checkpoint" in text
            and b"step-00000003" in text and b"model.safetensors" in text)


def interruptible(lab):
    class Asks:
        def on_step(self, trainer, row):
            if row["step"] == 2: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 2"): lab.run(Asks())
    heard, old = [], signal.signal(signal.SIGTERM, lambda *a: heard.append(a))
    try: assert lab.run(Asks(), interruptible=False).step == 4 and heard
    finally: signal.signal(signal.SIGTERM, old)


def out_dir(lab):
    with pytest.raises(BantamError, match="out_dir is not set"): lab.trainer(out_dir=None)
    assert (lab.run().out_dir/"model/config.json").exists()


def starts(lab):
    "A model to begin with."
    if not hasattr(lab, "start"): lab.start = lab.run(valid=True)
    return str(lab.start.out_dir)


def init_from_checkpoint(lab):
    begun = lab.begun(init_from_checkpoint=starts(lab))
    assert (torch.equal(begun.model.head_weight, lab.start.model.head_weight)
            and not torch.equal(lab.begun().model.head_weight, begun.model.head_weight))


def finetune_from(lab):
    begun = lab.begun(finetune_from=starts(lab), tokenizer=None)
    assert (torch.equal(begun.model.head_weight, lab.start.model.head_weight)
            and begun.tokenizer.fingerprint == lab.tokenizer.fingerprint)


def resume_from_checkpoint(lab):
    class Stop:
        def on_step(self, trainer, row): trainer.stop = "a test" if row["step"] == 2 else None
    out = lab.out()
    with pytest.raises(Interrupted): lab.run(Stop(), out_dir=out)
    assert torch.equal(lab.run(out_dir=out, resume_from_checkpoint=out).model.head_weight,
                       lab.run().model.head_weight)


def run_name(lab):
    assert (lab.run(run_name="Third hen").out_dir/"report.html").read_text() == "Third hen"
    t = lab.run()
    assert (t.out_dir/"report.html").read_text() == t.out_dir.name


def device(lab):
    with pytest.raises(BantamError, match="not on this machine"): lab.trainer(device="cuda:99")
    assert lab.trainer(device="cpu").device.type == "cpu"


def use_gradient_checkpoint(lab):
    def calls(**changes):
        count = []
        t = lab.trainer(max_steps=1, **changes)
        t.model.layers[0].ffn.register_forward_hook(lambda *a: count.append(1))
        with contextlib.redirect_stdout(io.StringIO()): t.train()
        return len(count)
    assert calls(use_gradient_checkpoint=True) == 2*calls()


def compile(lab):
    asked = []
    def stand_in(model, say): asked.append(model); return model
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training, "Compiled", stand_in)
        t = lab.run(compile=True)
        lab.run(compile="auto")
        lab.run()
    assert asked == [t.model]


def seed(lab):
    assert not torch.equal(lab.begun(seed=1).model.head_weight, lab.begun().model.head_weight)
    assert (lab.weights(seed=1) - lab.weights()).abs().max() > 1e-6


def active_expert(lab):
    from bantam.train.turns import plan_turns
    assert plan_turns(12, 3, 1, 0, .25, 1) != plan_turns(12, 3, 1, 0, .25, None)
    with pytest.raises(BantamError, match="active_expert is 3"): plan_turns(12, 3, 1, 0, .25, 3)


ADAM = dict(optimizer="adamw")
TABLES = {name: globals()[name] for name in (
    "dataset", "valid_dataset", "valid_fraction", "dataset_text_field", "dataset_dtype",
    "min_sample_token_length", "tokenizer", "seq_len", "document_mask", "pack", "stride",
    "overfit_subset", "use_hf", "batch_size", "accum_steps", "epochs", "max_steps",
    "dropout_anneal", "ema_half_life", "log_every_n", "eval_every_n", "eval_batches",
    "sample_every_n", "save_every_n", "keep_last_k", "save_on_improve", "improve_delta", "save_tag",
    "log_format", "log_loss_to_csv", "log_norms", "trackers", "wandb",
    "interruptible", "out_dir", "init_from_checkpoint", "finetune_from", "resume_from_checkpoint",
    "run_name", "device", "use_gradient_checkpoint", "compile", "seed", "active_expert",
    "pin_memory", "parallel")}
ACTS = TABLES | dict(
    num_workers=loading("num_workers", 2), persistent_workers=loading("persistent_workers", True),
    hf_name=hub("hf_name", "cocks", 0), hf_subset=hub("hf_subset", "en", 1),
    hf_split=hub("hf_split", "test", 2), hf_streaming=hub("hf_streaming", False, 3),
    hf_text_field=hub("hf_text_field", "body", 4), hf_messages_field=hub(
        "hf_messages_field", "turns", 5), shuffle_buffer_size=hub("shuffle_buffer_size", 9, 6),
    optimizer=differs("optimizer", "adamw"), lr=differs("lr", 2e-2),
    weight_decay=differs("weight_decay", .5),
    beta1=differs("beta1", .5, base=ADAM), beta2=differs("beta2", .5, base=ADAM),
    optim_eps=differs("optim_eps", 1e-3, base=ADAM),
    grad_clip=differs("grad_clip", .01, base=ADAM | dict(optim_eps=1e-2)),
    muon_lr=differs("muon_lr", 5e-2), muon_momentum=differs("muon_momentum", .5),
    muon_exclude_embeddings=differs("muon_exclude_embeddings", False),
    muon_beta1=differs("muon_beta1", .5), muon_beta2=differs("muon_beta2", .5),
    muon_eps=differs("muon_eps", 10.), muon_bias_correction=differs("muon_bias_correction", True),
    muon_clip_by_layer=differs("muon_clip_by_layer", True, grad_clip=.01),
    muon_lr_correction=differs("muon_lr_correction", False),
    lr_scheduler=differs("lr_scheduler", "linear", "constant", "wsd"),
    stages=differs("stages", [dict(until=2, lr_scale=.5)], lr_scheduler="stages",
                   base=dict(stages=[dict(until=2, lr_scale=1.)])),
    warmup_frac=differs("warmup_frac", .8), warmup_steps=differs("warmup_steps", 3),
    min_lr_ratio=differs("min_lr_ratio", .9), precision=differs("precision", "bf16"))


def test_every_argument_has_a_test():
    fields = {f.name for f in dataclasses.fields(TrainingArgs)}
    assert (sorted(fields - set(ACTS))
            == []), "give each new field an entry in ACTS that shows what it changes"
    assert sorted(set(ACTS) - fields) == []


@pytest.mark.parametrize("field", sorted(ACTS))
def test_argument_acts(lab, field): ACTS[field](lab)


def test_a_field_that_did_nothing_would_be_seen(lab):
    with pytest.raises(AssertionError): differs("log_every_n", 3)(lab)


# --- what is unknown or contradictory -------------------------------------------------------------

@pytest.mark.parametrize("field", sorted(f.name for f in dataclasses.fields(TrainingArgs)))
def test_a_slip_is_told_the_nearest_name(field):
    slip = field[:-1] + field[-1]*2 if field not in ("lr", "pack", "seed") else field + "_"
    with pytest.raises(BantamError, match="unknown key .* did you mean"): TrainingArgs(**{slip: 1})


@pytest.mark.parametrize("message,wrong", [
    ("finetune_from and resume_from_checkpoint contradict",
     dict(finetune_from="a", resume_from_checkpoint="b")),
    ("use_hf and dataset contradict", dict(use_hf=True, hf_name="a", dataset="b")),
    ("stages and lr_scheduler", dict(lr_scheduler="stages")),
    ("stages and lr_scheduler", dict(stages=[dict(until=1, lr_scale=1.)])),
    ("set num_workers", dict(persistent_workers=True)),
    ("stride is for pack", dict(stride=3, pack="best_fit")),
    ("trackers does not name it", dict(wandb=dict(project="a"))),
    ("dropout_anneal and compile", dict(compile=True,
                                        dropout_anneal=dict(start=1., end=0., steps=9)))])
def test_contradictions_are_refused(message, wrong): refuses(message, **wrong)


# --- the numbers of a step ------------------------------------------------------------------------

def ragged(rows, T=24, seed=1):
    "Rows with shares of targets from two to a hundred per cent, and weights."
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 334, (rows, T+1), generator=g)
    y = ids[:, 1:].clone()
    y[torch.rand(rows, T, generator=g) < torch.linspace(.0, .98, rows)[:, None]] = -100
    return Batch(ids[:, :-1], y, loss_weights=torch.rand(rows, T, generator=g))


def gradients(batches, **changes):
    seed_everything(0)
    model = BantamForCausalLM(shape(residual_dropout=0., **changes)).train()
    loss = accumulate(model, batches, torch.device("cpu"))
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


def test_eight_times_one_is_one_times_eight():
    big = ragged(8)
    one, eight = (gradients(b) for b in (
        [big], [Batch(*(t[i:i+1] if t is not None else None for t in big)) for i in range(8)]))
    assert abs(one[0] - eight[0]) < 1e-6
    assert max((one[1][n] - eight[1][n]).abs().max().item() for n in one[1]) < 1e-6


def test_gradient_checkpointing_changes_nothing(lab):
    for config in (None, dict(expert_type="topk", num_experts=4)):
        a, b = (lab.weights(config=config, use_gradient_checkpoint=on) for on in (False, True))
        assert (a - b).abs().max() < 1e-5    # with dropout on: chance is replayed too


@pytest.mark.slow
def test_compiling_changes_nothing(lab):
    """Loss and gradients of a step to 1e-5, and the losses of six steps. Weights are not compared:
    Adam divides by the gradient's size, so where that is rounding, its sign decides a whole step."""
    from bantam.train.compiled import Compiled
    seed_everything(0)
    model, found = BantamForCausalLM(shape(residual_dropout=0.)).train(), []
    for net in (model, Compiled(model, pytest.fail)):
        loss = accumulate(net, [ragged(4), ragged(4, seed=2)], torch.device("cpu"))
        found.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    assert abs(found[0][0] - found[1][0]) < 1e-5
    for a, b in zip(found[0][1], found[1][1]): assert (a - b).abs().max() < 1e-5
    # Muon rounds its directions to bf16, so a difference in the last bit grows with the rate
    for how in (dict(optimizer="adamw"), dict(optimizer="muon", lr=1e-3)):
        base, fast = (lab.run(config=dict(residual_dropout=0.), compile=on, max_steps=6, **how)
                      for on in (False, True))
        assert "could not be compiled" not in fast.printed and fast.net.tried
        assert (max(abs(a["loss"] - b["loss"]) for a, b in zip(base.log.rows, fast.log.rows)) < 1e-5
                and len(fast.log.rows) == 6)
        assert fast.log.rows[-1]["loss"] < fast.log.rows[0]["loss"]


def test_a_failed_compiler_is_said_and_survived(lab, monkeypatch):
    def broken(model):
        def call(**kw): raise RuntimeError("no C++ compiler was found")
        return call
    import bantam.train.compiled as compiled
    monkeypatch.setattr(training, "Compiled",
                        lambda model, say: compiled.Compiled(model, say, compiler=broken))
    t = lab.run(compile=True)
    assert (t.printed.count("no C++ compiler was found") == 1
            and torch.equal(t.model.head_weight, lab.run().model.head_weight))


# --- numbers that go bad --------------------------------------------------------------------------

class Harm:
    "Does something to the steps that are named, and sees that the weights stay where they were."
    def __init__(self, *steps): self.steps, self.before, self.held = steps, None, 0

    def snapshot(self, t):
        return [x.clone() for x in (*t.model.state_dict().values(),
                                    *t.optimizer.state_dict()[0].values())]

    def on_start(self, t):
        self.t = t
        real = t.net
        def net(**inputs):
            out = real(**inputs)
            if t.step + 1 in self.steps: self.hurt(t, out)
            return out
        t.net = net
        one_step = t.one_step
        def watched():
            bad, before = t.step + 1 in self.steps, self.snapshot(t)
            row = one_step()
            if bad:
                assert all(torch.equal(a, b) for a, b in zip(before, self.snapshot(t)))
                self.held += 1
            return row
        t.one_step = watched


class NaNGradient(Harm):
    def hurt(self, t, out): out.loss.register_hook(lambda g: g*math.nan)


class InfLoss(Harm):
    def hurt(self, t, out): out.loss = out.loss*math.inf


class Spike(Harm):
    def hurt(self, t, out): out.loss = out.loss*100


@pytest.mark.parametrize("harm,why,steps", [(NaNGradient, "gradient not finite", (2, 4)),
                                            (InfLoss, "loss not finite", (3,)),
                                            (Spike, "spike", (24, 25))])
def test_bad_steps_leave_no_trace(lab, harm, why, steps):
    h = harm(*steps)
    t = lab.run(h, max_steps=max(steps)+2, lr=1e-3)
    assert h.held == len(steps) and t.guard.skips == {why: len(steps)}
    assert t.log.rows[-1]["skipped"] == len(steps) and t.printed.count(f"{why} (") == len(steps)
    assert t.result["skipped_because"] == f"{len(steps)} x {why}"


def masked(lab, t, bad):
    "Blank the targets of these micro-batches."
    real = t.data.batch
    t.data.batch = lambda i: real(i)._replace(
        y_BT=torch.full_like(real(i).y_BT, -100)) if i in bad else real(i)


def test_a_masked_batch_is_passed_over_and_a_masked_step_skipped(lab):
    t = lab.trainer()
    masked(lab, t, {1, 4, 5})    # half of step 1, all of step 3
    with contextlib.redirect_stdout(io.StringIO()): result = t.train()
    assert t.guard.skips == {"no target": 1} and t.guard.empty == 1
    assert [r["loss"] is None for r in t.log.rows] == [False, False, True, False]
    assert (result["skipped"], result["empty_batches"]) == (1, 1)


def test_a_run_that_can_take_no_step_stops_with_a_reason(lab):
    with pytest.raises(BantamError, match="10 steps in a row could not be taken"):
        lab.run(NaNGradient(*range(5, 99)), max_steps=40)
    t = lab.trainer(max_steps=20)
    masked(lab, t, set(range(99)))
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(BantamError, match="no target"):
        t.train()


def test_a_resumed_run_counts_on(lab):
    class Stop:
        def on_step(self, trainer, row): trainer.stop = "a test" if row["step"] == 3 else None
    out = lab.out()
    with pytest.raises(Interrupted): lab.run(NaNGradient(2), Stop(), out_dir=out)
    t = lab.run(NaNGradient(4), out_dir=out, resume_from_checkpoint=out)
    assert t.guard.skips == {"gradient not finite": 2} and t.log.rows[-1]["skipped"] == 2


def test_fp16_overflow_halves_the_factor_and_does_not_stop():
    from bantam.train.guard import Guard
    from bantam.train.optim import build_optimizer
    from bantam.train.step import LossScaler, take_step
    seed_everything(0)
    model, guard, scaler = BantamForCausalLM(shape()), Guard(), LossScaler(on=True)
    optimizer, before = build_optimizer(model, TrainingArgs(lr=1e-2)), model.head_weight.clone()
    for step in range(12):
        factor = scaler.scale
        loss = accumulate(model, [ragged(2)], torch.device("cpu"), scale=factor)
        next(model.parameters()).grad[0] = math.inf
        _, norm, taken = take_step(optimizer, loss, scaler=scaler, lets=guard.lets)
        assert not taken
        guard.skipped(step, loss.item(), norm, factor)
    assert (scaler.scale == 2.**4 and guard.skips == {"fp16 overflow": 12}
            and torch.equal(model.head_weight, before))
