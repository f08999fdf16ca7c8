"""The doctor before a real run: it stops what cannot work, and a run that it looked at is equal to
one that it did not."""
import pytest
import torch

import bantam.presets  # noqa: F401
from bantam.args import TrainingArgs
from bantam.config import BantamConfig
from bantam.core import BantamError
from bantam.data.loader import BlockDataset, Loader
from bantam.data.pack import Shards, write_shards
from bantam.model.lm import BantamForCausalLM
from bantam.text.tokenizer import BantamTokenizer
from bantam.train.doctor import CHECKS, Checkup, examine
from bantam.train.trainer import Trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    d, tok = tmp_path_factory.mktemp("doctor"), BantamTokenizer.byte_level()
    write_shards([tok.encode("The hen sat on six eggs. "*10, add_bos=True, add_eos=True)
                  for _ in range(8)], d/"shards", tok)
    return d, tok, Loader(BlockDataset(Shards(d/"shards", tok), 32), 4, seed=1)


def model(**changes):
    torch.manual_seed(0)
    small = dict(vocab_size=BantamTokenizer.byte_level().vocab_size, hidden_size=32,
                 intermediate_size=64, num_hidden_layers=2)
    return BantamForCausalLM(BantamConfig.from_preset("tiny", **small | changes))


def args(folder, **changes):
    return TrainingArgs(**dict(out_dir=str(folder), max_steps=4, batch_size=4, accum_steps=1,
                               eval_every_n=0, save_every_n=0, precision="fp32", device="cpu",
                               lr=.01) | changes)


@pytest.mark.parametrize("changes", [dict(residual_dropout=.2),
                                     dict(expert_type="topk", num_experts=4,
                                          moe_bias_balancing=True, moe_router_jitter=.1),
                                     dict(residual_init="zero", stochastic_depth_rate=.2)],
                         ids=["dropout", "experts", "zero"])
def test_a_run_is_bit_equal_with_and_without(world, tmp_path, changes, capsys):
    d, tok, loader = world
    left = []
    for name, calls in (("with", [Checkup()]), ("without", [])):
        t = Trainer(model(**changes), args(tmp_path/name), loader, tokenizer=tok, callbacks=calls)
        t.train()
        left.append([*t.model.state_dict().values(), *t.optimizer.state_dict()[0].values(),
                     torch.rand(4)])
    assert all(torch.equal(a, b) for a, b in zip(*left)) and len(left[0]) == len(left[1])


class Hidden(Loader):
    def batch(self, step):
        return (b := super().batch(step))._replace(y_BT=torch.full_like(b.y_BT, -100))


def test_a_run_that_cannot_work_does_not_begin(world, tmp_path):
    d, tok, loader = world
    blind = Hidden(loader.dataset, 4, seed=1)
    with pytest.raises(BantamError, match="the doctor says no: targets: 16 of 16"):
        Trainer(model(), args(tmp_path/"a"), blind, tokenizer=tok, callbacks=[Checkup()]).train()
    broken = model()
    with torch.no_grad(): broken.layers[0].ffn.up_proj.weight.fill_(torch.nan)
    with pytest.raises(BantamError, match="first loss: it is nan"):
        Trainer(broken, args(tmp_path/"b"), loader, tokenizer=tok, callbacks=[Checkup()]).train()


def test_a_warning_is_said_and_the_run_goes_on(world, tmp_path, capfd):
    d, tok, loader = world
    odd = model()
    odd.layers[0].ffn.unused = torch.nn.Parameter(torch.ones(3, 3))
    Trainer(odd, args(tmp_path/"c"), loader, tokenizer=tok, callbacks=[Checkup()]).train()
    said = "".join(capfd.readouterr())
    assert "none reaches layers.0.ffn.unused" in said


def test_every_check_is_asked_in_full(world):
    d, tok, loader = world
    assert [v.check for v in examine(model(), loader, tok, fast=False)] == list(CHECKS)


def test_it_cleans_up_when_a_check_raises(world):
    "Whatever happens inside, nothing stays."
    d, tok, loader = world
    m = model(expert_type="topk", num_experts=4, moe_bias_balancing=True).train()
    m.register_forward_hook(lambda *a: (_ for _ in ()).throw(RuntimeError("inside")))
    before, noise = {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"): examine(m, loader, tok)
    assert (m.training and torch.equal(noise, torch.get_rng_state())
            and all(torch.equal(v, before[k]) for k, v in m.state_dict().items()))
    assert all(p.grad is None for p in m.parameters())
