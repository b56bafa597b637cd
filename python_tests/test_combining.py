"""Sums of adapters over one base are exact, and one file serves every rank."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers import same_bits
from saved import LOW_RANK, assert_is_sum, base, drawn, metadata, refusal, updates, written, x
from torch import nn

import qrlora_kernels as qk

# --- sums


@pytest.mark.parametrize(
    "second",
    [
        {},
        {"rank": 2},
        {"rank": 6},
        {"names": ["2"]},
        {"names": ["0"], "rank": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter", LOW_RANK)
def test_the_file_holds_the_weighted_sum(adapter, second, tmp_path):
    one, first = written(tmp_path / "one", adapter, 1)
    two, other = written(tmp_path / "two", adapter, 2, **second)
    before = one.read_bytes(), two.read_bytes()
    state = qk.combine({one: 0.7, two: -0.2}, tmp_path / "sum")
    assert_is_sum(tmp_path / "sum", {first: 0.7, other: -0.2})
    loaded = qk.load_adapter(base(), tmp_path / "sum")
    for name, layer in qk.adapted_layers(loaded).items():
        for key in layer.trainables:
            assert same_bits(state.pop(f"{name}.{key}"), getattr(layer, key))
    assert not state
    assert (one.read_bytes(), two.read_bytes()) == before


@pytest.mark.parametrize(
    ("adapter", "first", "second"),
    [
        ("qr", {"scaling": 3.0}, {"scaling": 0.5}),
        ("lora_xs", {"alpha": 8.0}, {"alpha": 8.0, "rank": 2}),
        ("lora_xs", {}, {"alpha": 2.0, "rank": 6}),
    ],
    ids=str,
)
def test_scalings_and_strengths_go_into_the_numbers(adapter, first, second, tmp_path):
    one, two = drawn(adapter, 1, **first), drawn(adapter, 2, **second)
    qk.scale(one, 0.5)
    largest = max((one, two), key=lambda model: model[0].rank)
    qk.combine({one: 2.0, two: 1.0}, tmp_path / "sum")
    assert_is_sum(tmp_path / "sum", {one: 2.0, two: 1.0})
    layer = qk.load_adapter(base(), tmp_path / "sum")[0]
    assert layer.scaling == largest[0].scaling
    assert layer.options.strength == 1.0


def test_an_adapter_of_no_scaling_counts_as_nothing(tmp_path):
    one, two = drawn("qr", 1), drawn("qr", 2)
    for layer in qk.adapted_layers(one).values():
        layer.scaling = 0.0
    qk.combine({one: 1.0, two: 0.5}, tmp_path / "sum")
    assert_is_sum(tmp_path / "sum", {two: 0.5})


@pytest.mark.parametrize("adapter", LOW_RANK)
def test_the_sum_is_rounded_once(adapter):
    """In fp32 the large parts would leave nothing of the small one."""
    models = [drawn(adapter, seed) for seed in (1, 2, 3)]
    one, small, other = models
    with torch.no_grad():
        for key in one[0].trainables:
            getattr(one[0], key).fill_(1.0)
            getattr(other[0], key).fill_(1.0)
            getattr(small[0], key).fill_(1e-9)
    state = qk.combine({one: 1.0, small: 1.0, other: -1.0})
    (got,) = (t for name, t in state.items() if name.startswith("0."))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full_like(got, 1e-9), rtol=1e-6, atol=0)


def test_numbers_in_fp64_stay_wide():
    one, two = (drawn("qr", seed, base(torch.float64)) for seed in (1, 2))
    state = qk.combine({one: 0.5, two: 0.5})
    assert state["0.lam"].dtype == torch.float64
    assert torch.equal(state["0.lam"], 0.5 * one[0].lam + 0.5 * two[0].lam)


@pytest.mark.parametrize("adapter", LOW_RANK)
def test_of_one_adapter_alone_the_file_is_its_own(adapter, tmp_path):
    path, _ = written(tmp_path / "one", adapter, 1)
    qk.combine({path: 1}, tmp_path / "again")
    assert sorted(path.read_bytes()) == sorted((tmp_path / "again").read_bytes())


def test_models_and_files_and_folders_are_taken_alike(tmp_path):
    (tmp_path / "folder").mkdir()
    path, model = written(tmp_path / "folder", "qr", 1)
    other = drawn("qr", 2)
    want = qk.combine({model: 0.5, other: 0.5})
    got = qk.combine({str(path): 0.5, nn.DataParallel(other): 0.5})
    assert want.keys() == got.keys()
    assert all(same_bits(want[name], got[name]) for name in want)


def test_models_stay_as_they_are_and_share_nothing_with_the_sum():
    model = drawn("lora_xs", 1)
    before, generator = model.state_dict(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    state = qk.combine({model: 1.0})
    state["0.core"].zero_()
    assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_merged_model_counts_with_its_numbers():
    model = drawn("qr", 1)
    want = qk.combine({model: 0.5})
    qk.merge(model)
    assert torch.equal(qk.combine({model: 0.5})["0.lam"], want["0.lam"])


def test_a_weight_that_was_changed_before_comes_along(tmp_path):
    """Whichever of the adapters it is that brings it."""
    model = drawn("qr", 1)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.warns(UserWarning, match="base weights of 0 were changed"):
        qk.save_adapter(model, tmp_path / "one")
    two, _ = written(tmp_path / "two", "qr", 2, names=["2"])
    qk.combine({two: 1.0, tmp_path / "one": 1.0}, tmp_path / "sum")
    loaded = qk.load_adapter(base(), tmp_path / "sum")
    assert same_bits(loaded[0].weight, model[0].weight)
    assert same_bits(loaded[0].lam, model[0].lam)


def test_the_sum_answers_as_the_base_and_its_updates(tmp_path):
    one, two = drawn("qr", 1), drawn("qr", 2)
    qk.combine({one: 0.7, two: -0.2}, tmp_path / "sum")
    net = base()
    with torch.no_grad():
        for name in ("0", "2"):
            delta = 0.7 * updates(one)[name] - 0.2 * updates(two)[name]
            net.get_submodule(name).weight += delta.float()
        want = net(x())
        got = qk.load_adapter(base(), tmp_path / "sum")(x())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# --- what is beside the adapters


def test_a_head_that_differs_is_taken_from_none_silently(tmp_path):
    one = drawn("qr", 1, trainable=["3"])
    two = drawn("qr", 2, trainable=["3"])
    said = refusal(lambda: qk.combine({one: 1.0, two: 1.0}, tmp_path / "sum"))
    assert "3.bias is not the same in model 0 of weights and model 1 of weights" in said
    assert not list(tmp_path.iterdir())
    qk.combine({one: 1.0, two: 1.0}, tmp_path / "sum", extra="first")
    loaded = qk.load_adapter(base(), tmp_path / "sum")
    assert same_bits(loaded[3].weight, one[3].weight)
    assert loaded[3].weight.requires_grad
    assert set(qk.combine({one: 1.0, two: 1.0})) == {"0.lam", "2.lam"}


def test_a_head_that_only_one_trained_is_no_common_one(tmp_path):
    parts = {drawn("qr", 1): 1.0, drawn("qr", 2, trainable=["3"]): 1.0}
    with pytest.raises(ValueError, match=r"3\.bias is not the same"):
        qk.combine(parts, tmp_path / "sum")
    qk.combine(parts, tmp_path / "sum", extra="first")
    assert_is_sum(tmp_path / "sum", parts)


def test_a_file_samples_what_neither_trains_nor_comes_along(tmp_path):
    """A digest of what the sum adapts or brings would be that of one of its adapters alone."""
    parts = {drawn("qr", 1, names=["0"], trainable=["3"]): 1.0, drawn("qr", 2, names=["2"]): 1.0}
    qk.combine(parts, tmp_path / "sum", extra="first")
    manifest = json.loads(metadata(tmp_path / "sum")["manifest"])
    assert set(manifest["frozen"]) == {"0.bias", "2.bias"}
    assert manifest["extra"] == ["3.bias", "3.weight"]


def test_an_equal_head_and_what_is_tied_or_complex_stay(tmp_path):
    def model(seed):
        net = base()
        net.add_module("tied", nn.Linear(16, 3))
        net.tied.weight = net[3].weight
        net.register_buffer("turns", torch.tensor([1j, 2.0]))
        drawn("qr", seed, net, trainable=["3"])
        with torch.no_grad():
            net[3].weight.fill_(0.25)
            net[3].bias.fill_(0.5)
        return net

    one, two = model(1), model(2)
    qk.save_adapter(one, tmp_path / "one")
    qk.combine({one: 0.5, two: 0.5}, tmp_path / "sum")
    net = model(3)
    qk.load_adapter(net, tmp_path / "sum", strict=True)
    assert same_bits(net.turns, one.turns)
    assert same_bits(net[3].weight, one[3].weight)
    kept = [metadata(tmp_path / name)["manifest"] for name in ("one", "sum")]
    assert kept[0][kept[0].index('"extra"') :] == kept[1][kept[1].index('"extra"') :]


# --- the rank slider


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
@pytest.mark.parametrize("adapter", LOW_RANK)
def test_cut_to_a_rank_it_is_the_start_of_that_rank(adapter, rank, tmp_path):
    """One file serves every rank: pivots, factors and numbers are those of the first r'."""
    alpha = {"alpha": 16.0} if adapter == "lora_xs" else {"scaling": 2.0}
    path, whole = written(tmp_path / "one", adapter, 1, rank=8, **alpha)
    state = qk.combine({path: 1.0}, tmp_path / "cut", rank=rank)
    cut = qk.load_adapter(base(), tmp_path / "cut", strict=True)
    start = qk.adapt(base(), ["0", "2"], adapter, rank=rank, progress=False)
    for name, layer in qk.adapted_layers(cut).items():
        (gate,) = layer.trainables
        kept = getattr(qk.adapted_layers(whole)[name], gate).detach()
        kept = kept[:rank] if kept.dim() == 1 else kept[:rank, :rank]
        assert same_bits(getattr(layer, gate), kept)
        assert same_bits(state[f"{name}.{gate}"], kept)
        assert layer.options.rank == layer.rank == rank
        assert layer.scaling == 2.0
        for key in layer.factors:
            want = getattr(qk.adapted_layers(start)[name], key)
            if key == "diagonal":  # of another search: equal up to fp64's rounding
                torch.testing.assert_close(layer.diagonal, want, rtol=1e-12, atol=0)
            else:
                assert torch.equal(getattr(layer, key), want), key


def test_a_cut_file_of_pivots_stays_one(tmp_path):
    path, _ = written(tmp_path / "one", "qr", 1, rank=8)
    qk.combine({path: 1.0}, tmp_path / "cut", rank=3)
    again = qk.load_adapter(base(), tmp_path / "cut")
    qk.save_adapter(again, tmp_path / "again", factors="rebuild")
    assert os.path.getsize(tmp_path / "cut") < os.path.getsize(path)


def test_a_rule_gives_way_to_the_rank_where_it_gave_more(tmp_path):
    model = drawn("qr", 1, rank=None, tau=0.75, max_rank=9)
    ranks = [layer.rank for layer in qk.adapted_layers(model).values()]
    assert ranks[0] > ranks[1]
    qk.combine({model: 1.0}, tmp_path / "cut", rank=ranks[1])
    cut = qk.load_adapter(base(), tmp_path / "cut")
    first, second = (layer.options for layer in qk.adapted_layers(cut).values())
    assert (first.rank, first.tau, first.max_rank) == (ranks[1], None, None)
    assert second == model[2].options


def test_stored_factors_are_cut_too(tmp_path):
    path, whole = written(tmp_path / "one", "qr", 1, rank=8, factors="stored")
    qk.combine({path: 1.0}, tmp_path / "cut", rank=5)
    cut = qk.load_adapter(base(), tmp_path / "cut")
    assert same_bits(cut[0].q, whole[0].q[:, :5])
    assert same_bits(cut[0].r, whole[0].r[:5])


def test_what_was_cut_combines_with_what_it_was_cut_from(tmp_path):
    """Of LoRA-XS too, whose own start at that rank may have other bits."""
    for adapter in LOW_RANK:
        model = drawn(adapter, 1, rank=8)
        qk.combine({model: 1.0}, tmp_path / "cut", rank=3)
        rest = qk.combine({model: 1.0, tmp_path / "cut": -1.0})
        for tensor in rest.values():
            kept = tensor[:3] if tensor.dim() == 1 else tensor[:3, :3]
            assert not kept.any()
            assert tensor.any()
