"""Names travel with the matrices: whatever fails, the error has the caller's name for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from pivot_matrices import gaussian
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.linalg import (
    StartRunner,
    cached_start,
    kron_factors,
    pivoted_qr,
    truncated_svd,
)

STARTS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (pivoted_qr, {}),
    (truncated_svd, {"rank": 2}),
    (kron_factors, {"columns": "selected"}),
]
# Names that look like places in a list, as a text that is searched for them would find.
NAMES = ("weights[1]", "weights[0]", "a.weight")


def matrices() -> list[Tensor]:
    return [gaussian(16, 12), gaussian(12, 16, 1).bfloat16(), gaussian(12, 12, 2).float()]


def broken(at: int) -> dict[str, Tensor]:
    named = dict(zip(NAMES, matrices(), strict=True))
    named[NAMES[at]][0, 0] = torch.nan
    return named


def tensors(result: Any) -> list[Tensor]:
    fields = vars(result).values() if hasattr(result, "__dict__") else result
    return [value for value in fields if isinstance(value, Tensor)]


@pytest.mark.parametrize(("start", "options"), STARTS)
def test_a_mapping_gives_what_a_list_gives(
    start: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    named = dict(zip(NAMES, matrices(), strict=True))
    wanted = start(matrices(), **options)
    for results in (
        start(named, **options),
        cached_start(start, named, tmp_path, **options),
        StartRunner(cache=tmp_path)(start, named, **options),
    ):
        for one, other in zip(results, wanted, strict=True):
            assert all(map(same_bits, tensors(one), tensors(other)))
    assert start({}, **options) == []


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize(("start", "options"), STARTS)
def test_an_error_has_the_name_of_a_mapping(
    start: Callable[..., Any], options: dict[str, Any], at: int, tmp_path: Path
) -> None:
    for call in (
        lambda: start(broken(at), **options),
        # All others are found there, so that the broken one is computed alone.
        lambda: cached_start(start, broken(at), tmp_path, **options),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call()
        assert str(caught.value).startswith(f"{NAMES[at]} must be finite")
        cached_start(start, matrices(), tmp_path, **options)


def test_an_error_has_the_place_in_the_whole_list(tmp_path: Path) -> None:
    weights = matrices()
    cached_start(pivoted_qr, weights, tmp_path)
    weights[2] = torch.zeros(12, 12)
    with pytest.raises(ValueError, match=r"^weights\[2\] must not be zero"):
        cached_start(pivoted_qr, weights, tmp_path)


@pytest.mark.parametrize("refused", ["text", b"bytes", 3, {1.0}, None])
@pytest.mark.parametrize(("start", "options"), STARTS)
def test_what_holds_no_matrices_is_refused(
    start: Callable[..., Any], options: dict[str, Any], refused: Any
) -> None:
    with pytest.raises(
        TypeError, match=f"weights must be a tensor or a list of them, got {type(refused).__name__}"
    ):
        start(refused, **options)
    with pytest.raises(TypeError, match=r"^up must be a torch.Tensor, got "):
        start({"up": refused}, **options)


@pytest.mark.parametrize("rank", [100, 2])
@pytest.mark.parametrize("basis", ["svd", "random", "random_svd", "gradient"])
def test_lora_xs_names_the_layer_whatever_its_basis(basis: str, rank: int) -> None:
    """Fault: a NaN that the scaling of gradients met was one of weights[1]."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))
    for layer in model:
        layer.weight.grad = torch.ones_like(layer.weight)
    if rank == 2:
        model[1].weight.data[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"(^|for )[01]\.weight ") as caught:
        qk.adapt(model, ["0", "1"], "lora_xs", rank=rank, basis=basis, progress=False)
    assert "weights[" not in str(caught.value)
    assert all(map(same_bits, model.state_dict().values(), before.values()))
