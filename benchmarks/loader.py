"""The loader beside `torch.utils.data.DataLoader` over the same memory map, and beside a training step.

    python benchmarks/loader.py [--quick] [--json FILE]

Rows of 512 tokens, batches of 32, one process, one thread, from a warm page cache. The peer reads the same rows of the same file, as a map-style dataset
with a shuffling sampler. Figures are medians of rounds in which the contenders take turns. The memory of a 4 GB sparse file is measured in a process
of its own. The last line is one JSON object.
"""
import argparse, statistics, subprocess, sys, tempfile, time

from _common import machine, report, versions

TARGETS = {"million tokens a second": 300., "share of a training step": .01,
           "resident MB of a 4 GB file over a small one": 300.}
T, B = 512, 32


def make_shards(folder, tokens):
    "A shard folder of random documents of about 300 tokens."
    import numpy as np
    from bantam.data.pack import Shards, write_shards
    class Vocabulary: vocab_size, fingerprint = 8192, "0"*64
    rng = np.random.default_rng(0)
    def documents():
        left = tokens
        while left > 0:
            n = int(rng.integers(20, 600)); left -= n
            yield rng.integers(78, 8192, n).astype("<u2")
    write_shards(documents(), folder, Vocabulary, max_shard_tokens=2**40)
    return Shards(folder, verify=False)


def peer(shards):
    "The same rows by PyTorch's own loader: x and y, int64."
    import numpy as np, torch
    class Rows(torch.utils.data.Dataset):
        ids = shards.arrays[0]
        def __len__(self): return (len(self.ids)-1)//T
        def __getitem__(self, i):
            w = torch.from_numpy(np.asarray(self.ids[i*T:i*T+T+1]).astype(np.int64))
            return w[:-1], w[1:]
    def batches():
        while True:
            yield from torch.utils.data.DataLoader(Rows(), B, shuffle=True, drop_last=True,
                                                   generator=torch.Generator().manual_seed(0))
    return batches()


def resident(size):
    "Peak resident MB of a process that reads 40,000 random rows of a sparse file of `size` bytes."
    run = ("import sys, numpy as np, torch; torch.set_num_threads(1)\nfrom bantam.runtime import "
           "peak_memory\nfrom bantam.data.loader import BlockDataset, Loader\n"
           "f, n = sys.argv[1], int(sys.argv[2])//2\nopen(f, 'wb').truncate(2*n)\n"
           "class S: arrays, starts, tokens, fingerprint, folder = [np.memmap(f, '<u2', 'r', "
           "shape=(n,))], [np.arange(0, n, 10**5)], n, 'x', 'x'\n"
           "L = Loader(BlockDataset(S, 512), 32)\nfor i in range(1250): "
           "L.batch(i)\nprint(peak_memory()/2**20)")
    with tempfile.TemporaryDirectory() as d:
        return float(subprocess.run([sys.executable, "-c", run, f"{d}/x.bin", str(size)],
                                    capture_output=True, text=True, check=True).stdout)


def step_seconds():
    "A training step of the `small` preset at its own length, 8 rows."
    import torch
    import bantam.presets
    from bantam.config import BantamConfig
    from bantam.model.lm import BantamForCausalLM
    model = BantamForCausalLM(BantamConfig.from_preset("small", vocab_size=8192)).train()
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(8192, (8, 256), generator=torch.Generator().manual_seed(0))
    def step():
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward(); opt.step(); opt.zero_grad()
        return time.perf_counter() - start
    step()
    return statistics.median(step() for _ in range(5))



def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true",
                   help="a few rounds on a small file, to see that it runs")
    p.add_argument("--json", metavar="FILE", help="write the result, with every row, to FILE")
    a = p.parse_args()
    import torch
    from bantam.data.loader import BlockDataset, Loader
    from bantam.data.rows import DocumentDataset
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(f"{folder}/s", 4_000_000 if a.quick else 64_000_000)
        loaders = {"blocks": Loader(BlockDataset(shards, T, document_mask=False), B),
                   "blocks, documents masked": Loader(BlockDataset(shards, T), B),
                   "best-fit rows": Loader(DocumentDataset(shards, T), B)}
        theirs, at, times = (peer(shards), {n: 0 for n in loaders},
                             {n: [] for n in [*loaders, "torch DataLoader"]})
        for _ in range(4 if a.quick else 30):
            for name, loader in loaders.items():
                n = 256; start = time.perf_counter()
                for i in range(at[name], at[name] + n): loader.batch(i)
                times[name].append((time.perf_counter() - start)/n); at[name] += n
            n = 16; start = time.perf_counter()
            for _ in range(n): next(theirs)
            times["torch DataLoader"].append((time.perf_counter() - start)/n)
    times = {n: statistics.median(t[1:]) for n, t in times.items()}
    step = step_seconds()
    big = 2**28 if a.quick else 4*2**30
    memory = resident(big) - resident(2**22)
    about = machine()
    print(f"{T} tokens a row, {B} rows a batch; {about['processor']}, "
          f"one thread\n\n{'':28s} {'us a batch':>10s} {'million tokens/s':>17s} "
          f"{'times the peer':>15s}")
    for n, t in times.items():
        print(f"{n:28s} {t*1e6:10.1f} {B*T/t/1e6:17.0f} {times['torch DataLoader']/t:15.1f}")
    masked = times["blocks, documents masked"]
    share = masked*(8*256)/(B*T)/step
    ratios = {"million tokens a second": round(B*T/times["blocks"]/1e6, 1),
              "million tokens a second, documents masked": round(B*T/masked/1e6, 1),
              "times torch DataLoader": round(times["torch DataLoader"]/times["blocks"], 1),
              "share of a training step": round(share, 6),
              "resident MB of a 4 GB file over a small one": round(memory, 1)}
    print(f"\na step of the small preset takes {step*1e3:.0f} ms, of which its batch would be "
          f"{share:.3%}\na sparse file of {big/2**30:g} GB takes {memory:.0f} MB more than one of "
          "4 MB")
    met = ratios["million tokens a second"] >= 300 and share < .01 and memory < 300
    result = dict(name="loader", ratios=ratios, targets=TARGETS, met=bool(met), machine=about,
                  versions=versions("torch", "numpy"))
    report(result, a.json, seconds=times, step=step)


if __name__ == "__main__": main()
