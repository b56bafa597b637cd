"""Adapters that have no exact sum are refused by name, and nothing is written."""

from __future__ import annotations

import pytest
import torch
from saved import assert_is_sum, base, drawn, written

import qrlora_kernels as qk


def other_base():
    model = base()
    with torch.no_grad():
        model[0].weight[3, 3] += 1
    return model


def other_norm():
    model = base()
    with torch.no_grad():
        model[3].weight[0, 0] += 1
    return model


def moved_pivots():
    """Over the same base, but with directions that another machine might have chosen."""
    model = drawn("qr", 2)
    layer = model[0]
    state = {key: getattr(layer, key) for key in ("q", "r", "pivots", "diagonal")}
    order = torch.tensor([0, 2, 1, 3])
    state["pivots"] = state["pivots"][order]
    state |= layer.adapter.rebuild(layer.weight.detach(), layer.options, state | {
        "diagonal": torch.linalg.qr(layer.weight[:, state["pivots"]].double()).R.diagonal().abs()
    })  # fmt: skip
    layer.take_state(state | {"lam": layer.lam.detach()})
    return model


REFUSED = {
    "another base": (lambda: drawn("qr", 2, other_base()), "the same base .* other weights in 0"),
    "a base that differs elsewhere": (
        lambda: drawn("qr", 2, other_norm()),
        r"the same base .* another 3\.weight in model 1",
    ),
    "a base in another dtype": (
        lambda: drawn("qr", 2, base(torch.bfloat16)),
        "the same base .* other weights in 0",
    ),
    "other pivots": (moved_pivots, "the same factors .* got others in 0: model 0 of weights"),
    "another kind": (lambda: drawn("lora_xs", 2), "one kind .* got qr and lora_xs in 0"),
}


@pytest.mark.parametrize(("other", "says"), REFUSED.values(), ids=REFUSED)
def test_adapters_that_begin_otherwise_are_refused(other, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        qk.combine({drawn("qr", 1): 1.0, other(): 1.0}, tmp_path / "sum")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"vectors": "bottom"}, {"sigma": "out"}, {"basis": "random"}], ids=str
)
@pytest.mark.parametrize("rank", [4, 6])
def test_other_factors_of_lora_xs_are_refused(options, rank):
    parts = {drawn("lora_xs", 1): 1.0, drawn("lora_xs", 2, rank=rank, **options): 1.0}
    with pytest.raises(ValueError, match=r"begin from the same factors .* got others in 0"):
        qk.combine(parts)


def test_factors_in_no_file_are_known_by_their_digests_alone(tmp_path):
    one, first = written(tmp_path / "one", "lora_xs", 1, factors="rebuild")
    two, other = written(tmp_path / "two", "lora_xs", 2, factors="rebuild")
    qk.combine({one: 0.5, two: 0.5}, tmp_path / "sum")
    assert_is_sum(tmp_path / "sum", {first: 0.5, other: 0.5})
    qk.combine({one: 0.5, other: 0.5}, tmp_path / "sum")
    with pytest.raises(ValueError, match=r"begin from the same factors .* got others in 0"):
        qk.combine({one: 1.0, drawn("lora_xs", 3, sigma="out"): 1.0})
    with pytest.raises(ValueError, match=r"nothing tells .* in 0: .*factors='stored'"):
        qk.combine({one: 1.0, drawn("lora_xs", 3, rank=2): 1.0})
    with pytest.raises(ValueError, match=r"no file holds cannot be cut, got those of 0"):
        qk.combine({one: 1.0}, rank=2)


def test_pivots_in_one_file_and_factors_in_the_other_are_refused(tmp_path):
    """After a cast the factors may be others though the pivots are the same."""
    one, _ = written(tmp_path / "one", "qr", 1)
    two, _ = written(tmp_path / "two", "qr", 2, factors="stored")
    with pytest.raises(ValueError, match=r"nothing tells .* in 0: .*factors='stored'"):
        qk.combine({one: 1.0, two: 1.0})


@pytest.mark.parametrize(
    "options", [{"vectors": "middle"}, {"vectors": "bottom"}, {"basis": "random"}], ids=str
)
def test_directions_without_an_order_are_not_cut(options):
    model = drawn("lora_xs", 1, **options)
    assert qk.combine({model: 0.5})
    with pytest.raises(ValueError, match=r"another rank needs directions in order.* in 0$"):
        qk.combine({model: 1.0}, rank=2)


def test_ohora_has_no_sum(tmp_path):
    model = qk.adapt(base(), ["0", "2"], "ohora", columns="selected", progress=False)
    with pytest.raises(ValueError, match="a sum of Kronecker products is none"):
        qk.combine({model: 1.0})


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (lambda m: ([m],), TypeError, "weights must map adapters to numbers, got list"),
        (lambda m: ({},), ValueError, "one adapter at least"),
        (lambda m: ({3: 1.0},), TypeError, "paths or models as keys, got int"),
        (lambda m: ({m: "1"},), TypeError, "the weight of model 0 of weights must be a float"),
        (lambda m: ({m: float("nan")},), ValueError, "model 0 of weights must be finite"),
        (lambda m: ({m: 1e300},), ValueError, "the sum must be finite, got .* in 0"),
        (lambda m: ({"nowhere": 1.0},), FileNotFoundError, "no adapter file at nowhere"),
        (lambda m: ({base(): 1.0},), ValueError, "must hold adapted layers"),
        (lambda m: ({m: 1.0}, None, 0), ValueError, "rank must be at least 1, got 0"),
        (lambda m: ({m: 1.0}, None, 5), ValueError, "rank must be at most 4, .* got 5"),
        (lambda m: ({m: 1.0}, None, 2.5), TypeError, "rank must be an int"),
        (lambda m: ({m: 1.0}, ""), ValueError, "path must name a file"),
        (lambda m: ({m: 1.0}, None, None, "mean"), ValueError, "extra must be one of same, first"),
    ],
)
def test_wrong_arguments_are_named(arguments, kind, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=says):
        qk.combine(*arguments(drawn("qr", 1)))
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_earlier_file(tmp_path):
    path, model = written(tmp_path / "sum", "qr", 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="sum must be finite"):
        qk.combine({path: 1e300}, path)
    assert path.read_bytes() == before
    qk.combine({path: 0.5}, path)  # in place of itself, if that is asked for
    assert_is_sum(path, {model: 0.5})
