"""Speculative decoding: a draft of a tenth of the size beside the model alone, greedy and drawn, on the demo's own text.

    python benchmarks/speculate.py [--quick] [--json FILE] [--target FOLDER --draft FOLDER] [--seconds 200] [--ahead 7] [--no-compile]

Without folders both models are trained here on the offline texts of the demo, the target for seven tenths of `--seconds`. The draft learns from the target: its probabilities for half real texts and half its own writing, begun from texts that are not asked about later (Zhou et al., DistillSpec, 2023). It is one wide layer, since a small model's step costs what its layers cost to call, however narrow they are.
With folders (of `bantam-cli pretrain`, say) those are taken; they must have one tokenizer.

"greedy" is against the fastest way to decode the model alone of those tried: bf16, int8, int8 compiled. What a guess and a pass cost is measured as well, and what the arithmetic of room 52 makes of it printed beside what came.
In 32 bits every greedy answer must be that of the model alone. In bf16 and int8 several rows may round differently from one: how many texts are the same is told. Contenders take turns; a ratio is the median over prompts. The last line is one JSON object.
"""
import argparse, copy, statistics, time, warnings

from _common import machine, report, versions

TARGETS = {"greedy": 1.3}
SHAPES = dict(target=dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
                          num_attention_heads=6, num_key_value_heads=6),
              draft=dict(hidden_size=320, intermediate_size=832, num_hidden_layers=1,
                         num_attention_heads=5, num_key_value_heads=5))
PLAIN = dict(stop_ids=[], repetition_penalty=1., no_repeat_ngram_size=0)
GREEDY, DRAWN = dict(temperature=0), dict(temperature=.7, top_p=.9)


def texts_and_tokenizer():
    "Documents of the demo's world, as the demo would train on them."
    from bantam.data.offline import documents
    from bantam.text.trainbpe import train_bpe
    told = [d["text"] for d in documents(6000, seed=0) if "text" in d]
    return told, train_bpe(told, vocab_size=1024, digit_group_size=1)


def train(name, tok, seconds, batch, loss_of):
    "Train a model of that shape for so many seconds."
    import torch
    from bantam import BantamConfig
    from bantam.model.lm import BantamForCausalLM
    from bantam.runtime import autocast, pick_precision
    torch.manual_seed(0)
    model = BantamForCausalLM(BantamConfig(vocab_size=tok.vocab_size,
                                           max_position_embeddings=512, **SHAPES[name]))
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(.9, .95),
                            weight_decay=.1, fused=True)
    device, begin, step = torch.device("cpu"), time.monotonic(), 0
    precision = pick_precision(device, "auto")
    while (spent := time.monotonic() - begin) < seconds:
        for g in opt.param_groups: g["lr"] = 2e-3 * min(1, (step + 1)/20) * (1 - .9*spent/seconds)
        with autocast(device, precision): loss = loss_of(model, batch(step))
        loss.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step(); opt.zero_grad(); step += 1
    print(f"{name}: {model.num_parameters():,} parameters, {step} steps, "
          f"loss {loss.item():.3f}", flush=True)
    return model.eval()


def next_token_loss(model, some): return model(some[:, :-1], targets=some[:, 1:]).loss


def likeness(target):
    "Cross entropy of a draft with what the target thinks of each place."
    import torch
    def loss(model, some):
        with torch.no_grad(): p = target(some[:, :-1]).logits.softmax(-1)
        return -(p*model(some[:, :-1]).logits.log_softmax(-1)).sum(-1).mean()
    return loss


def own_writing(target, prompts, new=113):
    "How the target goes on, greedily and by chance."
    import torch
    from bantam.decode.reader import in_precision
    ids, writer = torch.tensor(prompts), in_precision(copy.deepcopy(target), "auto")
    return torch.cat([writer.generate(ids, seed=0, max_new_tokens=new, **PLAIN | how)
                      for how in (GREEDY, DRAWN)])


def made(seconds):
    "Target, draft, tokenizer, prompts."
    import torch
    told, tok = texts_and_tokenizer()
    held, told = told[:12], told[12:]
    ids = [i for t in told for i in tok.encode(t, add_bos=True, add_eos=True)]
    rows_NT = torch.tensor(ids[:len(ids)//129*129]).view(-1, 129)
    of = lambda rows_NT: rows_NT[torch.randint(len(rows_NT), (8,))]
    target = train("target", tok, .7*seconds, lambda _: of(rows_NT), next_token_loss)
    begins = [tok.encode(t, add_bos=True)[:16] for t in told[:160]]
    own_NT = own_writing(target, [b for b in begins if len(b) == 16])
    draft = train("draft", tok, .3*seconds, lambda step: of((rows_NT, own_NT)[step % 2]),
                  likeness(target))
    return target, draft, tok, [tok.encode(t, add_bos=True)[:16] for t in held]


def loaded(target, draft):
    from bantam.model.files import BantamForCausalLM
    from bantam.text.tokenizer import BantamTokenizer
    from bantam.train.checkpoint import weights_folder
    folders = [weights_folder(f) for f in (target, draft)]
    tok, other = (BantamTokenizer.load(f) for f in folders)
    from bantam.decode.speculate import Draft
    Draft(None, other, tok)  # refuses another tokenizer
    held = texts_and_tokenizer()[0][:12]
    return (*(BantamForCausalLM.from_pretrained(f) for f in folders), tok,
            [tok.encode(t, add_bos=True)[:16] for t in held])


def in_kinds(model):
    "The model in the forms that it is decoded in."
    from bantam.decode.quantize import quantize
    from bantam.decode.reader import in_precision
    return {"fp32": model, "bf16": in_precision(copy.deepcopy(model), "bf16"),
            "int8": quantize(copy.deepcopy(model), "int8")}


def race(contenders, prompts, how):
    """Seconds and texts of each contender, {name: [one per prompt]}; a contender is a model, its
    draft or None, and whether it is compiled. The first prompt comes once more in front, to warm
    up, and a draft's counts of it are thrown away."""
    import torch
    times, texts = ({n: [] for n in contenders} for _ in range(2))
    names = list(contenders)
    for n, ids in enumerate([prompts[0], *prompts]):
        ids, first = torch.tensor([ids]), n % len(names)
        for name in names[first:] + names[:first]:
            model, draft, compile = contenders[name]
            begin = time.perf_counter()
            text = model.generate(ids, draft=draft, compile=compile, seed=n, **PLAIN | how)
            times[name].append(time.perf_counter() - begin); texts[name].append(text)
            if n == 0 and draft: draft.guessed = draft.kept = draft.passes = draft.tokens = 0
    return ({n: t[1:] for n, t in times.items()}, {n: t[1:] for n, t in texts.items()})


def costs(target, draft, ids, ahead, rounds=40):
    "Milliseconds of a step of the target, of the draft's, and of the pass that checks `ahead`."
    import torch
    from bantam.decode.reader import Reader
    zero, T = torch.zeros(1, dtype=torch.long), ids.shape[1] - ahead
    readers = {n: Reader(m, zero, most=ids.shape[1], slack=ahead + 1)
               for n, m in (("step", target), ("guess", draft), ("pass", target))}
    times = {n: [] for n in readers}
    for _ in range(rounds):
        for n, r in readers.items():
            r.forget(T - 1)
            if not r.read: r(ids[:, :T-1])
            begin = time.perf_counter()
            r(ids, last=ahead + 1) if n == "pass" else r(ids[:, :T])
            times[n].append((time.perf_counter() - begin)*1e3)
    return {n: statistics.median(t[5:]) for n, t in times.items()}


def works(model, ids):
    "Compile a model's step; is it compiled?"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.generate(ids, compile=True, max_new_tokens=4, **PLAIN | GREEDY)
    return not any("compile=True" in str(w.message) for w in seen)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true"); parser.add_argument("--json")
    parser.add_argument("--target"); parser.add_argument("--draft")
    parser.add_argument("--seconds", type=float, default=200.)
    parser.add_argument("--ahead", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if (args.target is None) != (args.draft is None):
        parser.error("--target and --draft come together")
    import torch
    import bantam.decode.generate
    from bantam.decode.speculate import Draft
    torch.set_num_threads(args.threads)
    target, draft, tok, prompts = (loaded(args.target, args.draft) if args.target
                                   else made(15 if args.quick else args.seconds))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (target, draft)]
    new, prompts = (32, prompts[:3]) if args.quick else (128, prompts)
    targets, drafts, missing = in_kinds(target), in_kinds(draft), {}
    guess = lambda kind: Draft(drafts[kind], ahead=args.ahead)
    # in 32 bits: the very same text
    _, texts = race(dict(alone=(targets["fp32"], None, False),
                         helped=(targets["fp32"], guess("fp32"), False)),
                    prompts[:3], GREEDY | dict(max_new_tokens=new))
    exact = all(map(torch.equal, texts["alone"], texts["helped"]))
    contenders = {f"alone, {k}": (targets[k], None, False) for k in ("bf16", "int8")}
    if args.no_compile or args.quick: missing["alone, int8 compiled"] = "left out"
    elif works(targets["int8"], torch.tensor([prompts[0]])):
        contenders["alone, int8 compiled"] = targets["int8"], None, True
    else: missing["alone, int8 compiled"] = "the compiler failed"
    contenders |= {f"helped, {k}": (targets[k], guess(k), False) for k in ("bf16", "int8")}
    times, texts = race(contenders, prompts, GREEDY | dict(max_new_tokens=new))
    drawn = {n: (m, guess("int8") if d else None, c) for n, (m, d, c) in contenders.items()
             if n in ("alone, int8", "helped, int8")}
    drawn_times, _ = race(drawn, prompts, DRAWN | dict(max_new_tokens=new))
    over = lambda times, a, b: statistics.median(x/y for x, y in zip(times[a], times[b]))
    fastest = min((n for n in times if n.startswith("alone")),
                  key=lambda n: statistics.median(times[n]))
    ratios = {"greedy": over(times, fastest, "helped, int8")}
    for kind in ("bf16", "int8"):
        ratios[f"greedy, {kind}"] = over(times, f"alone, {kind}", f"helped, {kind}")
    ratios["temperature 0.7, top_p 0.9"] = over(drawn_times, "alone, int8", "helped, int8")
    print(f"target {sizes[0]:,} parameters, draft {sizes[1]:,} ({sizes[1]/sizes[0]:.0%}); in 32 "
          f"bits all greedy texts are the target's own: {exact}")
    for n, t in times.items():
        draft = contenders[n][1]
        print(f"  {n:22}{new/statistics.median(t):8.0f} tokens/s"
              + (f"; {draft.report}" if draft else ""))
    same = {}
    for kind in ("bf16", "int8"):
        both = zip(*(texts[f"{who}, {kind}"] for who in ("alone", "helped")))
        same[kind] = sum(torch.equal(a, b) for a, b in both)
        each = costs(targets[kind], drafts[kind], texts[f"alone, {kind}"][0], args.ahead)
        c, v, helper = (each["guess"]/each["step"], each["pass"]/each["step"],
                        contenders[f"helped, {kind}"][1])
        print(f"{kind}: a guess costs {c:.2f} of a step, a pass over {args.ahead + 1} tokens "
              f"{v:.2f}; {helper.tokens/max(1, helper.passes):.1f} tokens in a pass, which makes "
              f"{helper.tokens/(helper.guessed*c + helper.passes*v):.2f}; greedy "
              f"{ratios[f'greedy, {kind}']:.2f}, {same[kind]} of {len(prompts)} texts the same")
    print(f"greedy, beside the fastest without help ({fastest}): {ratios['greedy']:.2f}; drawn "
          f"{ratios['temperature 0.7, top_p 0.9']:.2f}; {drawn['helped, int8'][1].report}")
    for n, why in missing.items(): print(f"missing: {n}: {why}")
    result = dict(name="speculate", ratios={n: round(r, 3) for n, r in ratios.items()},
                  targets=TARGETS,
                  met=exact and all(ratios[k] >= t for k, t in TARGETS.items()),
                  acceptance={"greedy": round(contenders["helped, int8"][1].acceptance, 3),
                              "drawn": round(drawn["helped, int8"][1].acceptance, 3)},
                  fastest=fastest, same=same, sizes=sizes, missing=missing,
                  machine=machine(threads=args.threads), versions=versions("torch"))
    report(result, args.json)


if __name__ == "__main__": main()
