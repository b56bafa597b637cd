"""A model's adapters at another rank: what was trained stays, and new directions begin at zero."""

from __future__ import annotations

import copy

import offloaded_net
import pytest
import torch
from helpers import same_bits
from saved import LOW_RANK, base, drawn, updates, x
from torch import nn

import qrlora_kernels as qk

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def gates(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = qk.adapted_layers(model).items()
    return {n: getattr(layer, layer.trainables[0]).detach().clone() for n, layer in layers}


def options(adapter: str) -> dict[str, float]:
    return {"scaling": 2.0} if adapter == "qr" else {"alpha": 8.0}


# --- larger


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 9), (1, 16)])
@pytest.mark.parametrize("adapter", LOW_RANK)
def test_a_larger_rank_answers_as_before(adapter, before, after, dtype, tmp_path):
    model = drawn(adapter, 1, base(dtype), rank=before, **options(adapter))
    want, had, scaling = model(x(dtype)), gates(model), model[0].scaling
    assert qk.set_rank(model, after) is model
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model(x(dtype)), want, rtol=4 * eps, atol=4 * eps)
    for name, gate in gates(model).items():
        first = gate[:before] if gate.dim() == 1 else gate[:before, :before]
        assert same_bits(first.contiguous(), had[name])
        assert int(gate.count_nonzero()) == had[name].count_nonzero()
    assert {layer.rank for layer in qk.adapted_layers(model).values()} == {after}
    assert model[0].scaling == scaling
    grown = model(x(dtype))
    qk.save_adapter(model, tmp_path / "grown")
    again = qk.load_adapter(base(dtype), tmp_path / "grown", strict=True)
    assert same_bits(again(x(dtype)), grown)
    assert again[0].options == model[0].options
    assert again[0].options.rank == after


def test_where_the_factors_keep_their_bits_the_updates_do():
    model = drawn("lora_xs", 1)
    want = {name: layer.delta_weight() for name, layer in qk.adapted_layers(model).items()}
    factors = model[0].a.clone(), model[0].b.clone()
    qk.set_rank(model, 7)
    assert same_bits(model[0].a[:4].contiguous(), factors[0])
    assert same_bits(model[0].b[:, :4].contiguous(), factors[1])
    for name, layer in qk.adapted_layers(model).items():
        torch.testing.assert_close(layer.delta_weight(), want[name], rtol=1e-6, atol=1e-8)


def test_new_directions_train():
    for adapter in LOW_RANK:
        model = qk.set_rank(drawn(adapter, 1), 6)
        model(x()).square().sum().backward()
        for layer in qk.adapted_layers(model).values():
            parameter = getattr(layer, layer.trainables[0])
            assert parameter.requires_grad
            assert parameter.grad[4:].count_nonzero() == parameter[4:].numel()


def test_a_grown_file_of_pivots_stays_one(tmp_path):
    """Also where the factors of a longer search have other last bits."""
    model = drawn("qr", 1, rank=3)
    qk.set_rank(model, 12)
    qk.save_adapter(model, tmp_path / "grown", factors="rebuild")
    start = qk.adapt(base(), ["0", "2"], "qr", rank=12, progress=False)
    for key in model[0].factors:
        assert same_bits(getattr(model[0], key), getattr(start[0], key)), key


def test_random_numbers_are_left_alone():
    model = drawn("lora_xs", 1)
    before = torch.get_rng_state()
    qk.set_rank(model, 6)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_weight_of_a_smaller_rank_ends_the_growth():
    model = base()
    with torch.no_grad():
        model[0].weight[:, 5:] = 0
    drawn("qr", 1, model, rank=2)
    want = model(x())
    qk.set_rank(model, 9)
    assert [layer.rank for layer in qk.adapted_layers(model).values()] == [5, 9]
    torch.testing.assert_close(model(x()), want)


# --- smaller


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("adapter", LOW_RANK)
def test_a_smaller_rank_is_the_file_cut_to_it(adapter, rank, tmp_path):
    model = drawn(adapter, 1, rank=8, **options(adapter))
    qk.combine({model: 1.0}, tmp_path / "cut", rank=rank)
    qk.set_rank(model, rank)
    cut = qk.load_adapter(base(), tmp_path / "cut")
    assert same_bits(model(x()), cut(x()))
    assert model[0].options == cut[0].options
    for one, name in ((model, "resized"), (cut, "loaded")):
        qk.save_adapter(one, tmp_path / name)
    files = [sorted((tmp_path / n).read_bytes()) for n in ("resized", "loaded", "cut")]
    assert files[0] == files[1]
    if adapter == "lora_xs":  # a diagonal of QR is that of another search, in its last bits
        assert files[1] == files[2]
    assert len(files[1]) == len(files[2])


def test_there_and_back_gives_the_first_bits():
    for adapter in LOW_RANK:
        model = drawn(adapter, 1)
        want, before = model(x()), model[0].options
        qk.set_rank(qk.set_rank(model, 11), 4)
        assert same_bits(model(x()), want)
        assert model[0].options == before


def test_factors_that_a_cast_changed_are_cut_as_they_are():
    model = drawn("qr", 1, rank=8).bfloat16()
    q, r = model[0].q.clone(), model[0].r.clone()
    qk.set_rank(model, 5)
    assert same_bits(model[0].q, q[:, :5].contiguous())
    assert same_bits(model[0].r, r[:5])
    for key in model[0].factors:
        factor = getattr(model[0], key)
        assert factor.untyped_storage().nbytes() == factor.nbytes, key  # what was cut off is freed


# --- what stays and what does not


def test_a_rule_gives_way_to_the_rank():
    model = drawn("qr", 1, rank=None, tau=0.75)
    assert len({layer.rank for layer in qk.adapted_layers(model).values()}) == 2
    smaller = model[2].rank
    qk.set_rank(model, smaller)
    for layer in qk.adapted_layers(model).values():
        assert (layer.rank, layer.options.rank, layer.options.tau) == (smaller, smaller, None)


def test_the_same_rank_keeps_parameters_and_strength():
    model = qk.scale(drawn("qr", 1), 0.5)
    lam, want = model[0].lam, model(x())
    qk.set_rank(model, 4)
    assert model[0].lam is lam
    qk.set_rank(model, 2)
    assert model[0].lam is not lam
    qk.set_rank(model, 4)
    assert model[0].options.strength == 0.5
    assert not same_bits(model(x()), want)  # what was cut off is lost


def test_what_was_frozen_by_hand_stays_frozen():
    model = drawn("qr", 1)
    model[0].lam.requires_grad_(False)
    qk.set_rank(model, 6)
    assert [model[0].lam.requires_grad, model[2].lam.requires_grad] == [False, True]


def test_a_copy_is_another_model():
    model = drawn("qr", 1)
    other, want = copy.deepcopy(model), updates(model)["0"]
    qk.set_rank(other, 2)
    assert torch.equal(updates(model)["0"], want)


def test_a_merge_after_it_goes_there_and_back():
    model = qk.set_rank(drawn("lora_xs", 1), 6)
    want = model(x())
    torch.testing.assert_close(qk.merge(model)(x()), want)
    assert same_bits(qk.unmerge(model)(x()), want)


@pytest.mark.parametrize("rank", [2, 6])
def test_a_compiled_model_goes_on(rank):
    model = drawn("qr", 1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(x())
    qk.set_rank(compiled, rank)
    assert same_bits(compiled(x()), model(x()))
    assert same_bits(model(x()), qk.set_rank(drawn("qr", 1), rank)(x()))


@pytest.mark.parametrize("how", offloaded_net.HOW)
@pytest.mark.parametrize("adapter", LOW_RANK)
def test_layers_that_are_away_as_if_all_were_in_memory(adapter, how, tmp_path):
    whole = offloaded_net.adapted(offloaded_net.net(), adapter)
    away = offloaded_net.adapted(offloaded_net.offloaded(how, tmp_path), adapter)
    for rank in (2, 5):
        qk.set_rank(whole, rank)
        qk.set_rank(away, rank)
        assert same_bits(away(offloaded_net.x()), whole(offloaded_net.x()))
        offloaded_net.step(whole)
        offloaded_net.step(away)
    both = (qk.combine({model: 0.5}) for model in (whole, away))
    one, other = both
    assert all(same_bits(one[name], other[name]) for name in one)
