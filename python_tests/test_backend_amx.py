"""bf16 on AMX tiles keeps the contract, in every size of tile and order of memory."""

from __future__ import annotations

import pytest
import torch
from backend_contract import Contract, check_error_bound
from cases import CORE, VECTOR, Kind, draw
from torch import Tensor

from qrlora_kernels import native
from qrlora_kernels.backends import Problem, amx, choose

needs_core = pytest.mark.skipif(native.CORE is None, reason=native.REASON)


class TestAMX(Contract):
    backend = amx


@needs_core
def test_amx_tiles_are_given_back_to_the_library() -> None:
    """oneDNN's own AMX products agree before, between and after ours."""
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    case = draw(VECTOR, 128, 256, 256, 16, torch.bfloat16)
    before = case.p.x @ case.p.weight.mT
    for _ in range(3):
        check_error_bound(amx, case)
        assert torch.equal(case.p.x @ case.p.weight.mT, before)


@needs_core
@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    [
        (97, 45, 4700, 21),  # in y's sums three segments
        (97, 4700, 45, 21),  # in dx's
        (70, 70, 4608, 40),  # the base product ends where a segment does not
        (4230, 33, 2400, 8),  # more rows than wait at a time, of two threads too
    ],
)
def test_deep_products_wait_in_fp32_between_their_segments(m: int, n: int, k: int, r: int) -> None:
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    for kind in (VECTOR, CORE):
        check_error_bound(amx, draw(kind, m, n, k, r, torch.bfloat16))


@needs_core
def test_many_tokens_in_the_core_gradient() -> None:
    """The contraction over tokens is cut into parts that are added in order."""
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    case = draw(CORE, 2 * 8192 + 37, 48, 80, 16, torch.bfloat16, train_dtype=torch.float32)
    check_error_bound(amx, case)


@needs_core
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("kind", [VECTOR, CORE], ids="-".join)
def test_few_tokens_on_tiles_in_every_size(kind: Kind, layout: str) -> None:
    """One to four tiles of tokens, and the first count that goes to the larger blocks."""
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    for n, k, r in ((33, 47, 3), (70, 101, 37), (96, 130, 16), (15, 200, 8)):
        tokens = (*range(1, 36), 47, 48, 49, 63, 64, 65)
        for m in tokens:
            case = draw(kind, m, n, k, r, torch.bfloat16, bias=m % 2 == 0)
            laid_out = case.given(
                weight=_laid_out(case.p.weight, layout),
                x=_laid_out(case.p.x, "strided"),
                dy=_laid_out(case.dy, "strided"),
            )
            check_error_bound(amx, laid_out)


@needs_core
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize(
    ("n", "k"),
    [
        (40, 4200),  # more columns than the sums of one panel
        (1100, 2100),  # more than is swept 64 rows at a time, by two threads too
        (600, 333),  # cached, and no tile fits the edges
    ],
)
def test_a_token_has_the_bits_that_it_has_alone(n: int, k: int, layout: str) -> None:
    """Few tokens are summed in one order, whatever their number and the operands' layout."""
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    case = draw(VECTOR, 65, n, k, 21, torch.bfloat16)
    check_error_bound(amx, case)
    want = case.run(amx)
    p = case.p
    factors = {"up": _laid_out(p.up, layout), "down": _laid_out(p.down, layout)}
    for weight, frozen in ((layout, {}), ("rows", factors), (layout, factors)):
        laid_out = case.given(weight=_laid_out(p.weight, weight), **frozen)
        for m in (1, 2, 15, 16, 17, 32, 33, 48, 49, 64):
            got = laid_out.given(x=p.x[:m], dy=case.dy[:m]).run(amx)
            assert torch.equal(got["y"], want["y"][:m]), m
            assert torch.equal(got["x"], want["x"][:m]), m


def _laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "columns":
        return t.mT.contiguous().mT
    return torch.cat([t, t], 1)[:, : t.shape[1]] if layout == "strided" else t


@needs_core
@pytest.mark.parametrize(
    ("op", "m", "side", "name"),
    [
        ("qr_linear", 1, 384, "amx"),
        ("lora_xs_linear", 65, 4096, "amx"),
        ("qr_linear", 8192, 1024, "amx"),
        ("linear_add", 2047, 1024, "amx"),
        ("linear_add", 2048, 1024, "composed"),
        ("linear_add", 2048, 2048, "amx"),
    ],
)
def test_what_goes_to_the_tiles_unasked(op: str, m: int, side: int, name: str) -> None:
    if not amx.available()[0]:
        pytest.skip(amx.available()[1])
    problem = Problem(op, torch.device("cpu"), torch.bfloat16, m, side, side, 16)
    assert choose(problem).name == name
