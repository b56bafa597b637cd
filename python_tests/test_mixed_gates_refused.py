"""What a call with many adapters' gates refuses, and in which words."""

from __future__ import annotations

import pytest
import torch
from cases import ADAPTERS, MIXED_CORE, MIXED_VECTOR, Kind, draw
from helpers import same_bits
from mixed import FEW, MANY, MIXED, WAYS, call, case_of

from qrlora_kernels import kernels


@MIXED
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lead", [FEW, MANY], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8], ids=str)
@pytest.mark.parametrize("value", [ADAPTERS, 100, -1, -128])
def test_an_index_out_of_range_is_told(
    value: int, dtype: torch.dtype, lead: tuple[int, ...], way: str | None, kind: Kind
) -> None:
    case = case_of(kind, lead)
    case.p.index[3] = value
    case = case.given(index=case.p.index.to(dtype))
    with pytest.raises(ValueError, match=rf"^index must be from 0 to {ADAPTERS - 1}, got {value}$"):
        call(case, way)


def test_an_index_out_of_range_of_one_adapter_is_told() -> None:
    case = case_of(MIXED_VECTOR)
    with pytest.raises(ValueError, match=r"^index must be from 0 to 0, got \d$"):
        call(case.given(gate=case.p.gate[:1]))


@MIXED
@pytest.mark.parametrize("lead", [FEW, MANY], ids=str)
@pytest.mark.parametrize("square", [False, True])
def test_an_index_that_is_none_is_named(square: bool, lead: tuple[int, ...], kind: Kind) -> None:
    """Also where the gates [A, r] would make a core [r, r]."""
    case = case_of(kind, lead)
    if square and kind == MIXED_VECTOR:
        case = case.given(gate=torch.randn(8, 8))
    rows = case.p.index.numel()
    wrong = [
        (None, TypeError, "index must be a torch.Tensor, got NoneType"),
        (1, TypeError, "index must be a torch.Tensor, got int"),
        (case.p.index.tolist(), TypeError, "index must be a torch.Tensor, got list"),
        (case.p.index.float(), TypeError, "index must be of an integer dtype, got torch.float32"),
        (case.p.index.bool(), TypeError, "index must be of an integer dtype, got torch.bool"),
        (case.p.index.cfloat(), TypeError, "index must be of an integer dtype, got torch.comp"),
        (case.p.index.to("meta"), ValueError, "index must be on cpu like x, got meta"),
        (case.p.index[1:], ValueError, rf"index must have shape \[{lead[0]}, {lead[1]}\] like x"),
        (case.p.index[:, None], ValueError, rf"or \[{rows}\], got \[{rows}, 1\]"),
        (case.p.index.view(lead).mT, ValueError, rf"got \[{lead[1]}, {lead[0]}\]"),
    ]  # fmt: skip
    for way in WAYS:
        for index, error, message in wrong:
            with pytest.raises(error, match=message):
                call(case.given(index=index), way)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 8, 7), (2, 3, 8, 8)], ids=str)
def test_gates_of_another_shape_are_named(shape: tuple[int, ...]) -> None:
    case = case_of(MIXED_VECTOR)
    case = case.given(gate=torch.zeros(shape), index=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="gates must have shape"):
        call(case)


def test_factors_of_different_widths_or_too_narrow_are_named() -> None:
    case = case_of(MIXED_VECTOR)
    with pytest.raises(ValueError, match=r"b must have shape \[24, 8\], got \[24, 9\]"):
        call(case.given(up=torch.zeros(24, 9)))
    with pytest.raises(ValueError, match=r"b must have shape \[24, 8\], got \[24, 7\]"):
        call(case.given(up=torch.zeros(24, 7), down=torch.zeros(7, 40)))


@MIXED
@pytest.mark.parametrize("backend", ["amx", "triton", "cuda"])
def test_a_backend_without_a_kernel_for_it_refuses(backend: str, kind: Kind) -> None:
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run mixed_low_rank_linear"):
        call(case_of(kind), backend)


def test_the_steps_take_the_index_of_rows_alone() -> None:
    """``kernels`` checks nothing, and does the same."""
    case = draw(MIXED_CORE, 6, 24, 40, 8, torch.float32)
    y, _ = kernels.low_rank_fwd(*case.p, "composed")
    assert same_bits(y, call(case, "composed"))
