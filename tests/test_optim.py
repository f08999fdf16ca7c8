"Optimisers on the real model, in all shapes, and the benchmarks that stand on them."
import json, subprocess, sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import bantam.presets  # adds from_preset
from bantam.args import TrainingArgs
from bantam.config import BantamConfig
from bantam.model.lm import BantamForCausalLM
from bantam.train.average import WeightAverage
from bantam.train.muon import Muon, batches_of, newton_schulz, step_factor
from bantam.train.optim import build_optimizer

ROOT = Path(__file__).parent.parent
SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)


# --- every argument of the optimiser acts on a real model -----------------------------------------

BESIDE = dict(muon_exclude_embeddings=False, muon_beta1=.5, muon_beta2=.5, muon_eps=10.,
              muon_bias_correction=True, muon_clip_by_layer=True, muon_lr_correction=False,
              muon_momentum=.5, muon_lr=.003)


def trained(steps=3, **changes):
    "Weights after a few steps on the same tokens."
    torch.manual_seed(0)
    model = BantamForCausalLM(BantamConfig.from_preset("tiny", **SHAPE))
    args = TrainingArgs(**dict(lr=.01, grad_clip=.05) | changes)
    opt, gen = build_optimizer(model, args), torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(64, (4, 16), generator=gen)
        model(ids, labels=ids).loss.backward()
        opt.clip_grad_norm(args.grad_clip); opt.step(); opt.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("field", BESIDE)
def test_every_muon_argument_acts(field):
    usual = trained()
    assert torch.equal(usual, trained()) and not torch.allclose(
        usual, trained(**{field: BESIDE[field]}), rtol=1e-4, atol=1e-6)


def test_all_muon_arguments_are_tested():
    import dataclasses
    assert ({f.name for f in dataclasses.fields(TrainingArgs) if f.name.startswith("muon_")}
            == set(BESIDE))


@pytest.mark.parametrize("field", [f for f in BESIDE if f != "muon_lr"])
def test_muon_arguments_leave_adamw_alone(field):
    assert torch.equal(trained(optimizer="adamw"),
                       trained(optimizer="adamw", **{field: BESIDE[field]}))


# --- Muon in all shapes ---------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 9)),
                min_size=1, max_size=5), st.integers(1, 200))
def test_runs_cover_every_row_once(weights, limit):
    params = [torch.zeros(sum(parts), cols) for parts, cols in weights]
    batches = batches_of(params, [tuple(parts) for parts, _ in weights], limit)
    for batch in batches:
        shapes = {tuple(sorted((r.rows, params[r.index].shape[-1]))) for r in batch}
        assert len(shapes) == 1
        (rows, cols), = shapes
        n = sum(r.count for r in batch)
        assert n == 1 or n*rows*cols <= limit
        for r in batch: r.of(params[r.index]).add_(1)
    assert all((p == 1).all() for p in params)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.sampled_from([4, 12, 20]), st.sampled_from([6, 12, 30]),
       st.integers(1, 2000), st.integers(0, 10**6))
def test_a_step_is_that_of_the_parts_alone(count, rows, cols, limit, seed):
    gen = torch.Generator().manual_seed(seed)
    whole = torch.nn.Parameter(torch.randn(count*rows, cols, generator=gen))
    start, grad = whole.detach().clone(), torch.randn(count*rows, cols, generator=gen)
    muon = Muon([whole], [(rows,)*count], momentum=.9, decay=.2, dtype=torch.float64)
    muon.batches = batches_of([whole], [(rows,)*count], limit)
    whole.grad = grad
    muon.step(.01)
    for part, g, w in zip(whole.detach().split(rows), grad.split(rows), start.split(rows)):
        want = w*(1 - .01*.2) - .01*step_factor(rows,
                                                cols)*newton_schulz(.19*g, dtype=torch.float64)
        torch.testing.assert_close(part.double(), want.double(), rtol=1e-4, atol=1e-5)


def test_work_can_be_dealt_out():
    """Two half-blind copies, each computing every other batch, together take the step of one: what
    sharing between processes relies on."""
    torch.manual_seed(0)
    start = [torch.randn(s) for s in ((24, 8), (8, 16), (12, 12), (16, 8))]
    one, two = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    grads = [torch.randn_like(w) for w in start]
    a, b = (Muon(one, [(8, 8, 8), (8,), (12,), (16,)], dtype=torch.float32),
            Muon(two, [(8, 8, 8), (8,), (12,), (16,)], dtype=torch.float32))
    for p, q, g in zip(one, two, grads): p.grad, q.grad = g, g.clone()
    a.step(.1)
    b.remember(.1)
    found = {i: b.directions(b.batches[i]) for rank in (0, 1)
             for i in range(rank, len(b.batches), 2)}
    for i, directions in found.items(): b.move(b.batches[i], directions, .1)
    assert len(b.batches) > 2 and all(torch.equal(p, q) for p, q in zip(one, two))


def test_another_muon_can_be_handed_in():
    calls = []
    class Counted(Muon):
        def directions(self, runs): calls.append(len(runs)); return super().directions(runs)
    model = BantamForCausalLM(BantamConfig.from_preset("tiny", **SHAPE))
    opt = build_optimizer(model, TrainingArgs(), muon=Counted)
    for p in opt.params: p.grad = torch.randn_like(p)
    opt.step()
    assert len(calls) == len(opt.muon.batches) > 0


# --- the average of the weights -------------------------------------------------------------------

def test_average_of_a_real_model():
    torch.manual_seed(0)
    model = BantamForCausalLM(BantamConfig.from_preset("tiny", **SHAPE))
    ids, avg, seen = torch.randint(64, (2, 8)), WeightAverage(model, 2), []
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn_like(p)/10)
        avg.update(model); seen.append(model.layers[0].attn.o_proj.weight.detach().clone())
    d = .5**.5
    want = sum(w * d**(4-k) for k, w in enumerate(seen)) * (1-d)/(1-d**5)
    own = model(ids).logits
    with avg.swapped(model):
        torch.testing.assert_close(model.layers[0].attn.o_proj.weight.detach(), want,
                                   rtol=1e-5, atol=1e-6)
        assert not torch.equal(model(ids).logits, own)
    assert torch.equal(model(ids).logits, own)


# --- benchmarks run -------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("script", ["time_to_loss", "recipes"])
def test_benchmark_runs(script):
    done = subprocess.run([sys.executable, f"benchmarks/{script}.py", "--quick"], cwd=ROOT,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == script and {"ratios", "targets", "met", "machine",
                                         "versions"} <= result.keys()
