"""Quantised models as a user meets them: the verb, the folder, what is refused, peers. The
arithmetic is proved in rooms 30b and 53."""
import contextlib, io, json, logging, shutil

import pytest
import torch

import bantam.presets
from bantam.config import BantamConfig
from bantam.core import BantamError
from bantam.decode.generate import complete
from bantam.decode.quantize import bits_per_byte, quantize, weight_bytes
from bantam.model.files import BantamForCausalLM
from bantam.model.packed import Int4Linear, Int8Linear
from bantam.text.tokenizer import BantamTokenizer

PLAIN = dict(temperature=0, repetition_penalty=1., no_repeat_ngram_size=0, stop_ids=[])
ZOO = dict(tied={}, untied=dict(tie_word_embeddings=False),
           softcap=dict(final_logit_softcapping=8., scaled_embeddings=True, norm_placement="both",
                        ffn_type="geglu", qk_norm=True),
           window=dict(window=9, num_attention_sinks=2),
           dynamic=dict(rope_scaling=dict(type="dynamic", factor=2.,
                                          original_max_position_embeddings=16)),
           experts=dict(expert_type="topk", num_experts=4, moe_intermediate_size=64),
           shared=dict(expert_type="shared", num_experts=4, moe_num_shared=1,
                       moe_intermediate_size=64),
           latent=dict(attn_type="mla", kv_lora_rank=32, q_lora_rank=32, num_key_value_heads=4),
           odd=dict(hidden_size=80, num_attention_heads=5, num_key_value_heads=5,
                    intermediate_size=112))


def fresh(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 initializer_range=.15) | changes
    return BantamForCausalLM(BantamConfig.from_preset("tiny", **shape)).eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home, tok = tmp_path_factory.mktemp("home"), BantamTokenizer.default()
    model = fresh(vocab_size=tok.vocab_size)
    model.save_pretrained(home/"model")
    tok.save(home/"model")
    (home/"model"/"generation_config.json").write_text(
        json.dumps(dict(max_new_tokens=5, temperature=0.)))
    (home/"held.jsonl").write_text('{"text": "The hen sat on the wall."}\n{"text": '
                                   '"A fox came by."}\n')
    return home


def cli(*words):
    from bantam.cli import main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main([str(w) for w in words])
        except SystemExit as e: code = e.code
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ZOO)
def test_every_way_to_generate_gives_the_same_tokens(name, kind):
    "In 32 bits the whole numbers are multiplied exactly: cached or not, alone or in a batch."
    model = quantize(fresh(**ZOO[name]), kind, 16 if kind == "int4" and name == "odd" else None,
                     precision="fp32")
    ids = torch.randint(100, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    both = model.generate(ids, max_new_tokens=16, **PLAIN)
    assert torch.equal(both, model.generate(ids, max_new_tokens=16, use_cache=False, **PLAIN))
    for b in range(2):
        assert torch.equal(both[b:b+1], model.generate(ids[b:b+1], max_new_tokens=16, **PLAIN))
    with torch.no_grad():
        gap = (model(ids).logits - fresh(**ZOO[name])(ids).logits).norm() / model(ids).logits.norm()
    assert 0 < gap < (.15 if kind == "int8" else .6)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ZOO)
def test_folder_says_what_the_model_said(tmp_path, name, kind):
    model = quantize(fresh(**ZOO[name]), kind, 16 if kind == "int4" else None)
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        one, many = model(ids[:, :1]).logits, model(ids).logits  # puts four bits into blocks
        model.save_pretrained(tmp_path/"a")
        again = BantamForCausalLM.from_pretrained(tmp_path/"a")
        assert torch.equal(again(ids).logits, many) and torch.equal(again(ids[:, :1]).logits, one)
        assert torch.equal(model(ids[:, :1]).logits, one)
    again.save_pretrained(tmp_path/"b")
    assert (tmp_path/"a"/"model.safetensors").read_bytes() == (
        tmp_path/"b"/"model.safetensors").read_bytes()
    assert not list((tmp_path/"a").glob("*.bin")) and not list((tmp_path/"a").glob("*.p*"))


def test_a_float_model_saved_over_it_leaves_no_record(tmp_path):
    quantize(fresh()).save_pretrained(tmp_path/"m")
    fresh().save_pretrained(tmp_path/"m")
    assert not (tmp_path/"m"/"quantization.json").exists()
    assert BantamForCausalLM.from_pretrained(tmp_path/"m").quantization is None


@pytest.mark.parametrize("damage,message", {
    "no JSON": (lambda f: f.write_text("{"), "not JSON"),
    "a list": (lambda f: f.write_text("[]"), "no record"),
    "a missing key": (lambda f: f.write_text('{"kind": "int8"}'), "no record"),
    "a path": (lambda f: f.write_text(f.read_text().replace("embed_tokens", "__class__")),
               "'__class__'"), "other layers": (lambda f: f.write_text(
                   f.read_text().replace("layers.1", "layers.7")), "layers.7"),
    "another kind": (lambda f: f.write_text(f.read_text().replace('"int8"', '"int2"')), "int2"),
    "gone": (lambda f: f.unlink(), "no place in this model"),
    "fewer layers": (lambda f: f.write_text(
        json.dumps(json.loads(f.read_text()) | dict(packed={}))), "no place in this model"),
    "another type": (lambda f: f.write_text(f.read_text().replace("bfloat16", "complex64")),
                     "dtype")}.values())
def test_a_damaged_record_is_refused(tmp_path, damage, message):
    quantize(fresh()).save_pretrained(tmp_path/"m")
    damage(tmp_path/"m"/"quantization.json")
    with pytest.raises(BantamError, match=message): BantamForCausalLM.from_pretrained(tmp_path/"m")


def test_it_cannot_be_trained(home, tmp_path):
    model = quantize(fresh())
    ids = torch.randint(300, (2, 9))
    with pytest.raises(BantamError, match="cannot be trained"): model.train()
    assert not model.training and model.eval() is model
    assert not model(ids, targets=ids).loss.requires_grad
    small = quantize(BantamForCausalLM.from_pretrained(home/"model"))
    small.save_pretrained(tmp_path/"small")
    BantamTokenizer.load(home/"model").save(tmp_path/"small")
    (tmp_path/"told.jsonl").write_text("".join(json.dumps(dict(text=f"Hen number {n} laid {n + 1} "
                                                                    "eggs. " * 40)) + "\n"
                                               for n in range(400)))
    (tmp_path/"said.jsonl").write_text(
        "".join(json.dumps(dict(prompt=f"Eggs of hen {n}?", response=f"{n + 1} eggs.")) + "\n"
                for n in range(400)))
    for verb, data, more in (("continue-pretrain", "told", ["--set", "training_args.max_steps=1"]),
                             ("sft", "said", ["--set", "sft_args.sft_mode=full"]),
                             ("sft", "said", [])):
        code, _, err = cli(verb, "--model", tmp_path/"small", "--dataset", tmp_path/f"{data}.jsonl",
                           "--out", tmp_path/"run", *more)
        assert code == 2 and "cannot be trained" in err and err.count("\n") == 1, (verb, err)


@pytest.mark.parametrize("how,message", [(("int3",), "did you mean"), (("int8", 32), "no groups"),
                                         (("int4", 24), "must be even and divide"),
                                         (("int4", 1), "must be even"),
                                         (("int8", None, "fp8"), "precision")])
def test_bad_wishes_leave_the_model_as_it_was(how, message):
    model = fresh()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(BantamError, match=message): quantize(model, *how)
    assert (model.quantization is None and model.state_dict().keys() == before.keys()
            and all(torch.equal(t, before[n]) for n, t in model.state_dict().items()))


def test_widths_that_the_kernel_must_not_see_do_not_crash():
    "In bf16 the kernel reads past rows that are no multiple of 16 wide."
    for D in (1, 7, 20, 33, 40, 100):
        layer, x = Int8Linear(torch.randn(24, D)), torch.randn(2, D).bfloat16()
        want = x.double() @ (layer.q.double()*layer.scale.double()[:, None]).T
        assert ((layer(x).double() - want).abs().max() / want.abs().max()) < .02


def test_memory_is_held_once_and_as_stated():
    for tied in (True, False):
        model = fresh(tie_word_embeddings=tied)
        full = weight_bytes(model)["total"]
        small = quantize(model, "int8")
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in [*small.parameters(), *small.buffers()]}
        assert sum(storages.values()) == weight_bytes(small)["total"] < .27*full
        assert not any(p.dim() > 1 for p in small.parameters())


def test_four_bits_come_in_blocks_and_back_when_moved_or_copied():
    import copy
    layer = Int4Linear(torch.randn(64, 96)).float()
    x = torch.randn(1, 96)
    want = layer(x)
    assert layer.blocked
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(layer.to(torch.float64).float()(x), want) and torch.equal(layer(x), want)


def test_torchao_says_the_same():
    pytest.importorskip("torchao", reason="torchao is the second implementation; "
                                          "install bantam-lm[quant]")
    for name in ("torchao", "torch.utils._pytree"): logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(torch.nn.Linear(96, 64, bias=True)).bfloat16()
    ours, x = (Int8Linear(theirs[0].weight.detach(), theirs[0].bias.detach()),
               torch.randn(5, 96).bfloat16())
    quantize_(theirs, Int8WeightOnlyConfig())
    torch.testing.assert_close(ours(x), theirs(x), atol=.02, rtol=.02)


def test_eight_bits_cost_little_on_text_a_model_knows():
    tok, text = BantamTokenizer.default(), "one two three four five six seven eight nine ten " * 6
    torch.manual_seed(0)
    model = fresh(vocab_size=tok.vocab_size, initializer_range=.02).train()
    ids = torch.tensor([tok.encode(text, add_bos=True)[:100]])
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(25):
        model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
        opt.step(); opt.zero_grad()
    was = bits_per_byte(model.eval(), tok, [text])
    assert abs(bits_per_byte(quantize(model), tok, [text]) - was) < .01*was + .002


def test_verb_makes_a_folder_that_generates_and_chats(home):
    code, out, err = cli("quantize", "--model", home/"model", "--out", home/"int8", "--text",
                         home/"held.jsonl")
    assert code == 0 and not err, err
    assert "total" in out and "bits per byte" in out and "on 2 documents" in out
    code, said, err = cli("generate", "--model", home/"int8", "--prompt", "The hen")
    assert code == 0 and not err
    assert cli("generate", "--model", home/"int8", "--prompt", "The hen", "--stream")[1] == said
    model, tok = BantamForCausalLM.from_pretrained(home/"int8"), BantamTokenizer.load(home/"int8")
    # its own generation_config came along
    assert complete(model, tok, ["The hen"], max_new_tokens=5, temperature=0)[0].text + "\n" == said
    from bantam.chat.chat import BantamChat
    assert isinstance(BantamChat.from_pretrained(home/"int8", device="cpu", seed=0).say("Hello?"),
                      str)
    assert BantamChat.from_pretrained(home/"int8",
                                      device="cpu").model.quantization["kind"] == "int8"


def test_verb_with_four_bits_and_the_stories(home):
    code, out, err = cli("quantize", "--model", home/"model", "--out", home/"int4", "--bits", 4,
                         "--group-size", 16, "--limit", 3)
    assert code == 0 and "on 3 documents" in out, err
    assert json.loads((home/"int4"/"quantization.json").read_text())["group_size"] == 16
    assert cli("generate", "--model", home/"int4", "--prompt", "The hen")[0] == 0


ROWS = {"bits": (["--bits", 5], "8 or 4"), "bits that are words": (["--bits", "many"], "bits"),
        "groups of int8": (["--group-size", 32], "no groups"),
        "groups that do not fit": (["--bits", 4, "--group-size", 24], "must be even and divide"),
        "no text": (["--text", "nowhere.txt"], "nowhere.txt"),
        "an empty text": (["--text", "EMPTY"], "is empty"), "limit": (["--limit", 0], "--limit"),
        "no model": (["--model", "nowhere"], "nowhere"),
        "unknown option": (["--group", 3], "--group")}

@pytest.mark.parametrize("words,message", ROWS.values(), ids=ROWS)
def test_verb_refuses_in_one_line_and_writes_nothing(home, tmp_path, words, message):
    (tmp_path/"empty.txt").write_text("")
    words = [tmp_path/"empty.txt" if w == "EMPTY" else w for w in words]
    code, out, err = cli("quantize", "--model", home/"model", "--out", tmp_path/"out", "--limit", 2,
                         *words)
    assert code == 2 and err.startswith("bantam: ") and err.count("\n") == 1 and message in err, err
    assert not (tmp_path/"out").exists() and not list(tmp_path.glob(".*"))


def test_verb_never_writes_over_something_nor_halfway(home, tmp_path, monkeypatch):
    (tmp_path/"taken").mkdir(); (tmp_path/"taken"/"diary.txt").write_text("mine")
    code, _, err = cli("quantize", "--model", home/"model", "--out", tmp_path/"taken", "--limit", 2)
    assert code == 2 and "not empty" in err and (tmp_path/"taken"/"diary.txt").read_text() == "mine"
    # of the module, or of its notebook where that ran in this process before
    room = BantamForCausalLM.save_pretrained.__globals__
    monkeypatch.setitem(room, "write_tensors", lambda *a, **k: (
        _ for _ in ()).throw(OSError(28, "No space left on device")))
    code, _, err = cli("quantize", "--model", home/"model", "--out", tmp_path/"out", "--limit", 2)
    assert (code == 2 and "No space left" in err
            and sorted(p.name for p in tmp_path.iterdir()) == ["taken"])


def test_quantised_twice_is_refused(home, tmp_path):
    cli("quantize", "--model", home/"model", "--out", tmp_path/"a", "--limit", 2)
    code, _, err = cli("quantize", "--model", tmp_path/"a", "--out", tmp_path/"b", "--limit", 2)
    assert code == 2 and "quantised already" in err and not (tmp_path/"b").exists()
