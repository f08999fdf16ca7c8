"""What a trainer does besides training: logging, evaluation bookkeeping and checkpointing, and how fast a checkpoint reaches the disk.

    python benchmarks/trainer_overhead.py [--quick] [--json FILE]

Overhead: the `small` preset at 256 tokens, default settings (micro-batches of 1, 32 a step, a log line every 10 steps, an evaluation every 500, a checkpoint every 1000). Time inside
the loader, the forward and backward passes, the update and the evaluation's own forward passes is training; all other wall time of the loop is overhead. A step, an evaluation
and a checkpoint are measured by themselves and put together as often as the defaults ask for them. A second row has steps of a single micro-batch, where overhead weighs most.

Saving: a checkpoint of about 100 MB (weights and optimiser), written, hashed, synced and renamed, and the oldest one taken out of the list, beside the peer that writes as many bytes to one file and
syncs it; the two take turns in the same folder. The place of the oldest is given back in the background, while training goes on; here that is waited for between the two, in neither's time. Figures are medians. The last line is one JSON object.
"""
import argparse, contextlib, io, os, statistics, tempfile, time

from _common import machine, report, versions

TARGETS = {"overhead, share of wall time": .03, "saving, share of the disk's write speed": .70}


class Clock:
    "Adds up the time that is spent inside wrapped functions."
    def __init__(self): self.inside = 0.

    def wrap(self, f):
        def timed(*a, **kw):
            start = time.perf_counter()
            try: return f(*a, **kw)
            finally: self.inside += time.perf_counter() - start
        return timed


def make_data(folder, tokens):
    "Loaders of random rows of 256 tokens."
    import numpy as np
    from bantam.data.pack import Shards, write_shards
    class Vocabulary: vocab_size, fingerprint = 8192, "0"*64
    rng = np.random.default_rng(0)
    write_shards((rng.integers(78, 8192, 300).astype("<u2") for _ in range(tokens//300)),
                 folder, Vocabulary)
    return Shards(folder, verify=False)


def trainer_of(folder, shards, accum_steps, preset="small"):
    "A trainer at default settings, begun and ready to step."
    import bantam.presets
    from bantam.args import TrainingArgs
    from bantam.config import BantamConfig
    from bantam.data.loader import BlockDataset, Loader
    from bantam.model.lm import BantamForCausalLM
    from bantam.train.trainer import Trainer
    model = BantamForCausalLM(BantamConfig.from_preset(preset, vocab_size=8192,
                                                       max_position_embeddings=256))
    data = lambda: Loader(BlockDataset(shards, 256), 1)
    t = Trainer(model, TrainingArgs(out_dir=folder, device="cpu", accum_steps=accum_steps,
                                    max_steps=10**6), data(), data())
    t._begin()
    return t


def overhead(t, steps, clock):
    "Seconds of a step, of which overhead; overhead of an evaluation; seconds of a checkpoint."
    import bantam.train.trainer as room
    real = room.accumulate, room.take_step, room.measure, t.mine.batch
    walls, extra = [], []
    try:
        room.accumulate, room.take_step, room.measure, t.mine.batch = map(clock.wrap, real)
        for i in range(steps + 2):
            clock.inside, start = 0., time.perf_counter()
            t.watch(t.one_step())
            wall = time.perf_counter() - start
            if i > 1: walls.append(wall); extra.append(wall - clock.inside)
        clock.inside, start = 0., time.perf_counter()
        t.evaluate()
        evaluation = time.perf_counter() - start - clock.inside
    finally: room.accumulate, room.take_step, room.measure, t.mine.batch = real
    saves = []
    for _ in range(3):
        t.saved, start = None, time.perf_counter()
        t.save()
        saves.append(time.perf_counter() - start)
    return statistics.median(walls), statistics.fmean(extra), evaluation, statistics.median(saves)


def naive(folder, size):
    "Seconds to write and sync as many bytes, in one file."
    block, path = os.urandom(2**20), os.path.join(folder, "naive.bin")
    start = time.perf_counter()
    with open(path, "wb") as f:
        for _ in range(size//len(block)): f.write(block)
        f.flush(); os.fsync(f.fileno())
    took = time.perf_counter() - start
    os.unlink(path)
    return took


def saving(t, rounds):
    "Bytes of a checkpoint; seconds to save it, and to write as many bytes naively, in turns."
    from bantam.train.checkpoint import cleared
    ours, theirs = [], []
    for _ in range(rounds + 1):
        cleared()
        t.saved, t.step = None, t.step + 1
        start = time.perf_counter()
        path = t.save()
        ours.append(time.perf_counter() - start)
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        cleared()
        theirs.append(naive(t.out_dir, size))
    return size, statistics.median(ours[1:]), statistics.median(theirs[1:])



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true",
                   help="few steps and a small checkpoint, to see that it runs")
    p.add_argument("--json", metavar="FILE", help="write the result, with every row, to FILE")
    a = p.parse_args()
    clock, rows = Clock(), {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        shards = make_data(f"{folder}/data", 200_000)
        for name, accum in (("32 micro-batches a step (default)", 2 if a.quick else 32),
                            ("1 micro-batch a step", 1)):
            t = trainer_of(f"{folder}/run{accum}{name[0]}", shards, accum,
                           "tiny" if a.quick else "small")
            step, extra, evaluation, save = overhead(t,
                                                     4 if a.quick else max(10, 100//accum), clock)
            every = dict(logging=extra, evaluation=evaluation/t.args.eval_every_n,
                         checkpoints=save/t.args.save_every_n)
            rows[name] = dict(step=step, **every, share=sum(
                every.values())/(step + evaluation/t.args.eval_every_n + save/t.args.save_every_n))
            t.log.close()
        big = trainer_of(f"{folder}/big", shards, 1, "tiny" if a.quick else "small")
        if not a.quick:
            from bantam.config import BantamConfig
            import bantam.presets, bantam.train.trainer as room
            big.log.close()
            from bantam.args import TrainingArgs
            from bantam.model.lm import BantamForCausalLM
            model = BantamForCausalLM(
                BantamConfig.from_preset("small", vocab_size=8192, hidden_size=320,
                                         intermediate_size=896, num_hidden_layers=7,
                                         num_attention_heads=10, num_key_value_heads=10))
            big = room.Trainer(model, TrainingArgs(out_dir=f"{folder}/hundred", device="cpu",
                                                   optimizer="adamw"), big.data)
            big._begin()
        size, ours, theirs = saving(big, 2 if a.quick else 9)
        big.log.close()
    about = machine()
    print(f"the {'tiny' if a.quick else 'small'} preset, 256 tokens a row; "
          f"{about['processor']}\n\n{'':36s} {'ms a step':>10s} {'logging':>9s} "
          f"{'evaluation':>11s} {'checkpoints':>12s} {'overhead':>9s}")
    for n, r in rows.items():
        print(f"{n:36s} {r['step']*1e3:10.1f} {r['logging']*1e3:9.3f} {r['evaluation']*1e3:11.3f} "
              f"{r['checkpoints']*1e3:12.3f} {r['share']:9.2%}")
    print(f"\na checkpoint of {size/1e6:.0f} MB: {size/ours/1e6:.0f} MB/s; "
          f"write and fsync of as many bytes: {size/theirs/1e6:.0f} MB/s; share {theirs/ours:.2f}")
    first = next(iter(rows.values()))["share"]
    ratios = {"overhead, share of wall time": round(first, 5),
              "overhead with one micro-batch a step": round(list(rows.values())[1]["share"], 5),
              "saving, share of the disk's write speed": round(theirs/ours, 3)}
    met = first < .03 and theirs/ours >= .7
    result = dict(name="trainer_overhead", ratios=ratios, targets=TARGETS, met=bool(met),
                  machine=about, versions=versions("torch", "safetensors"))
    report(result, a.json, rows=rows, checkpoint=dict(bytes=size, seconds=ours,
                                                      naive_seconds=theirs))


if __name__ == "__main__": main()
