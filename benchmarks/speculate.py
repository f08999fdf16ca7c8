"""Speculative decoding: a draft of a tenth of the size beside the model alone, greedy and drawn, on the demo's own text.

    python benchmarks/speculate.py [--quick] [--json FILE] [--target FOLDER --draft FOLDER] [--seconds 200] [--ahead 5] [--precision auto]

Without folders both models are trained here on the offline texts of the demo, for `--seconds`, of which the draft gets a fifth. With folders (of `bantam-cli pretrain`, say) those are taken; they must have one tokenizer.
Every answer with temperature 0 is compared with that of the model alone. Contenders take turns; a ratio is the median over prompts. The last line is one JSON object.
"""
import argparse, statistics, time

from _common import machine, report, versions

TARGETS = {"greedy": 1.3}
SHAPES = dict(target=dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
                          num_attention_heads=6, num_key_value_heads=6),
              draft=dict(hidden_size=192, intermediate_size=512, num_hidden_layers=3,
                         num_attention_heads=3, num_key_value_heads=3))


def texts_and_tokenizer():
    "Documents of the demo's world, as the demo would train on them."
    from bantam.data.offline import documents
    from bantam.text.trainbpe import train_bpe
    told = [d["text"] for d in documents(6000, seed=0) if "text" in d]
    return told, train_bpe(told, vocab_size=1024, digit_group_size=1)


def train(name, shape, rows_NT, seconds, tok):
    "Next-token training for so many seconds."
    import torch
    from bantam import BantamConfig
    from bantam.model.lm import BantamForCausalLM
    from bantam.runtime import autocast, pick_precision
    torch.manual_seed(0)
    model = BantamForCausalLM(BantamConfig(vocab_size=tok.vocab_size,
                                           max_position_embeddings=512, **shape))
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(.9, .95),
                            weight_decay=.1, fused=True)
    device, begin, step = torch.device("cpu"), time.monotonic(), 0
    precision = pick_precision(device, "auto")
    while (spent := time.monotonic() - begin) < seconds:
        for g in opt.param_groups: g["lr"] = 2e-3 * min(1, (step + 1)/20) * (1 - .9*spent/seconds)
        some = rows_NT[torch.randint(len(rows_NT), (8,))]
        with autocast(device, precision): loss = model(some[:, :-1], targets=some[:, 1:]).loss
        loss.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step(); opt.zero_grad(); step += 1
    print(f"{name}: {model.num_parameters():,} parameters, {step} steps, "
          f"loss {loss.item():.3f}", flush=True)
    return model.eval()


def made(seconds):
    "Target, draft, tokenizer, prompts."
    import torch
    told, tok = texts_and_tokenizer()
    held, told = told[:12], told[12:]
    ids = [i for t in told for i in tok.encode(t, add_bos=True, add_eos=True)]
    rows_NT = torch.tensor(ids[:len(ids)//129*129]).view(-1, 129)
    models = [train(n, SHAPES[n], rows_NT, seconds*share, tok)
              for n, share in (("target", .8), ("draft", .2))]
    return *models, tok, [tok.encode(t, add_bos=True)[:16] for t in held]


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


def compare(target, draft, prompts, new, ahead, **how):
    "Speed-up of each prompt, and the draft's report."
    import torch
    from bantam.decode.speculate import Draft
    guess, ratios, same = Draft(draft, ahead=ahead), [], 0
    for n, ids in enumerate([prompts[0], *prompts]):
        ids, times = torch.tensor([ids]), {}
        for who in ((None, guess), (guess, None))[n % 2]:
            begin = time.perf_counter()
            text = target.generate(ids, draft=who, seed=n, max_new_tokens=new, stop_ids=[],
                                   repetition_penalty=1., no_repeat_ngram_size=0, **how)
            times[who is None] = time.perf_counter() - begin, text
        if n == 0: guess = Draft(draft, ahead=ahead)  # the first one warms up
        else: ratios.append(times[True][0] / times[False][0])
        same += n > 0 and torch.equal(times[True][1], times[False][1])
    return statistics.median(ratios), guess, same


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true"); parser.add_argument("--json")
    parser.add_argument("--target"); parser.add_argument("--draft")
    parser.add_argument("--seconds", type=float, default=200.)
    parser.add_argument("--ahead", type=int, default=5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if (args.target is None) != (args.draft is None):
        parser.error("--target and --draft come together")
    import torch
    import bantam.decode.generate
    from bantam.decode.reader import in_precision
    torch.set_num_threads(args.threads)
    target, draft, tok, prompts = (loaded(args.target, args.draft) if args.target
                                   else made(10 if args.quick else args.seconds))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (target, draft)]
    new, prompts = (32, prompts[:3]) if args.quick else (128, prompts)
    # in 32 bits: the very same text
    exact = compare(target, draft, prompts[:3], new, args.ahead, temperature=0)
    target, draft, rows = (in_precision(target, args.precision),
                           in_precision(draft, args.precision), {})
    for name, how in {"greedy": dict(temperature=0),
                      "temperature 0.7, top_p 0.9": dict(temperature=.7, top_p=.9)}.items():
        rows[name] = compare(target, draft, prompts, new, args.ahead, **how)
    print(f"target {sizes[0]:,} parameters, draft {sizes[1]:,} ({sizes[1]/sizes[0]:.0%}); "
          f"in 32 bits {exact[2]} of {min(3, len(prompts))} greedy texts are the target's own")
    for name, (ratio, guess, _) in rows.items():
        print(f"{name:28} {ratio:5.2f} times as fast; {guess.report}")
    ratios = {n: round(r[0], 3) for n, r in rows.items()}
    result = dict(name="speculate", ratios=ratios, targets=TARGETS,
                  met=all(ratios[k] >= t for k, t in TARGETS.items())
                  and exact[2] == min(3, len(prompts)),
                  acceptance={n: round(r[1].acceptance, 3) for n, r in rows.items()}, sizes=sizes,
                  machine=machine(threads=args.threads),
                  versions=versions("torch"))
    report(result, args.json)


if __name__ == "__main__": main()
