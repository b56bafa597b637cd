"""Layers with factors="output" merged, copied, moved, compiled and asked by row."""

from __future__ import annotations

import copy
import pickle
import warnings

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from output_factors import close, pair, trained_by
from saved import base, drawn, moved, x
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers.pytorch_utils import Conv1D

import qrlora_kernels as qk

# --- merging, copies, moves


@pytest.mark.parametrize("conv1d", [False, True])
def test_a_merged_layer_still_knows_its_update_and_goes_back_bit_for_bit(conv1d):
    torch.manual_seed(0)
    linear = Conv1D(16, 24) if conv1d else nn.Linear(24, 16)
    layer = qk.QRLinear.from_linear(linear, rank=4, factors="output")
    with torch.no_grad():
        layer.lam.fill_(0.5)
    rows, bits, delta = torch.randn(5, 24), layer.weight.clone(), layer.delta_weight()
    want = layer(rows)
    layer.merge()
    merged = layer.weight.clone()
    close(layer.eval()(rows), want)
    assert helpers.same_bits(layer.delta_weight(), delta)  # of W, and not of W + ΔW
    layer.unmerge()
    assert helpers.same_bits(layer.weight, bits)
    assert helpers.same_bits(layer(rows), want)
    layer.merge()
    assert helpers.same_bits(layer.weight, merged)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_answer_alike(copied):
    model = pair()[1]
    assert helpers.same_bits(copied(model)(x()), model(x()))


def test_a_cast_to_fp64_and_a_meta_device_take_everything_along():
    model = pair()[1].double()
    close(model(x(torch.float64)), moved("qr").double()(x(torch.float64)))
    assert model.to("meta")[0].q.is_meta
    assert model[0].r is None


@pytest.mark.parametrize("first", ["both", "output"])
def test_a_state_dict_of_the_other_form_is_refused(first):
    """Its λ belongs to the same directions, but not its tensors: one has r and the other not."""
    models = dict(zip(("both", "output"), pair(), strict=True))
    model = models.pop(first)
    (other,) = models.values()
    with pytest.raises(RuntimeError, match=r"was made with factors .* the state dict with factors"):
        model.load_state_dict(other.state_dict())
    fresh = drawn("qr", 5, factors=first)
    fresh.load_state_dict(model.state_dict())
    assert helpers.same_bits(fresh(x()), model(x()))
    fresh.load_state_dict(dict(model.state_dict()))  # which has lost its metadata
    with pytest.raises(RuntimeError, match=r"0\.r"):
        fresh.load_state_dict(dict(other.state_dict()))


# --- other ways to compute


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_transformed_it_is_the_same():
    model = pair()[1]
    want = trained_by(model, x())
    model.zero_grad()
    torch.compiler.reset()
    got = trained_by(torch.compile(model, backend="aot_eager", fullgraph=True), x())
    for one, other in zip(got.values(), want.values(), strict=True):
        close(one, other)
    close(torch.func.vmap(model)(x()[None].expand(3, -1, -1))[0], model(x()))


def test_a_second_derivative_is_refused_as_with_two_factors():
    for model in pair():
        rows = x().requires_grad_()
        (dx,) = torch.autograd.grad(model(rows).square().sum(), rows, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_each_examples_gradient():
    both, output = pair(torch.float64)
    found = []
    for model in (both, output):
        with qk.per_example(model) as examples:
            model(x(torch.float64)).square().sum().backward()
        found.append(examples.gradients)
    close(found[1], found[0], torch.float64)


def test_rows_of_a_bank():
    answers = []
    for factors in ("both", "output"):
        model = moved("qr", base(torch.float64), factors=factors)
        bank = qk.AdapterBank(model, 2)
        for name, size in (("a", 0.5), ("b", -1.0)):
            bank.add(name, {f"{at}.lam": torch.full((4,), size) for at in ("0", "2")})
        with bank.use(["a", "b", "b", "a", "a"]):
            answers.append(model(x(torch.float64)))
    close(answers[1], answers[0], torch.float64)


def test_prepacked_under_autocast():
    model = pair()[1]
    want = {}
    for kept in (False, True):
        qk.prepack(model, kept)
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            want[kept] = model(x())
    torch.testing.assert_close(want[True], want[False], rtol=2e-2, atol=2e-2)


# --- spread over ranks


def told(model: nn.Module) -> list[torch.Tensor]:
    """What a model answers, and what is computed of whole weights."""
    table = qk.summary(model, show=False)
    energies = torch.tensor([row.energy for row in table.layers])
    with torch.no_grad():
        return [model(x()), energies, model[0].delta_weight()]


def rank_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = pair()[1]
    want = told(model)
    fully_shard(model[0])
    for got, one in zip(told(fully_shard(model)), want, strict=True):
        close(got, one)
    dist.destroy_process_group()


def test_sharded_what_is_made_of_the_weight_is_of_the_whole_one(tmp_path):
    """``summary`` multiplied a rank's part of the weight."""
    mp.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
