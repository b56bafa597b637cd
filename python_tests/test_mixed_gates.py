"""Rows of many adapters in one call: whose gate is whose, and that nobody sees the others."""

from __future__ import annotations

import pytest
import torch
from backend_contract import assert_within_bound
from cases import ADAPTERS, MIXED_CORE, MIXED_VECTOR, Kind, draw
from helpers import DTYPES, poisoned_memory, same_bits
from mixed import FEW, MANY, MIXED, WAYS, assert_same_bits, call, case_of, flat, outcome
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qrlora_kernels import backends, functional, native
from qrlora_kernels.backends import composed
from qrlora_kernels.functional import mixed_low_rank_linear

# --- whose gate ---------------------------------------------------------------------------------


@MIXED
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lead", [FEW, MANY, (), (2, 3, 2)], ids=str)
def test_an_index_has_any_integer_dtype_and_either_shape(
    lead: tuple[int, ...], way: str | None, kind: Kind
) -> None:
    """Of [M] or of x's leading dimensions, contiguous or not; the results are right."""
    case = case_of(kind, lead)
    want = outcome(case, way)
    assert_within_bound(*flat(case, want))
    every_second = torch.stack([case.p.index, case.p.index + 99], -1)[..., 0]
    indices = [case.p.index.view(lead), every_second, every_second.view(lead)]
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16):
        indices += [case.p.index.to(dtype), case.p.index.view(lead).to(dtype)]
    for index in indices:
        assert_same_bits(outcome(case.given(index=index), way), want)


@MIXED
@pytest.mark.parametrize("lead", [FEW, MANY], ids=str)
@pytest.mark.parametrize("elsewhere", ["reference", "composed"])
def test_a_backward_takes_the_index_of_the_forward_on_any_backend(
    elsewhere: str, lead: tuple[int, ...], kind: Kind
) -> None:
    case = case_of(kind, lead)
    case = case.given(index=case.p.index.view(lead))
    x, gate = case.p.x.clone().requires_grad_(), case.p.gate.clone().requires_grad_()
    y = call(case.given(x=x, gate=gate))
    with backends.use_backend(elsewhere):
        y.backward(case.dy)
    assert_within_bound(*flat(case, {"y": y.detach(), "x": x.grad, "gate": gate.grad}))


@MIXED
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lead", [FEW, MANY], ids=str)
def test_an_adapter_in_no_row_has_a_gradient_of_exactly_zero(
    lead: tuple[int, ...], way: str | None, kind: Kind
) -> None:
    """Memory of whoever was there before is no zero."""
    with poisoned_memory():
        gradient = outcome(case_of(kind, lead), way)["gate"]
    assert not gradient[-1].any()
    assert gradient[:-1].any(-1).any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lead", [FEW, MANY], ids=str)
def test_one_adapter_has_the_bits_of_the_unmixed_call(
    lead: tuple[int, ...], way: str | None
) -> None:
    for kind, plain in ((MIXED_VECTOR, "qr_linear"), (MIXED_CORE, "lora_xs_linear")):
        case = case_of(kind, lead)
        case = case.given(gate=case.p.gate[:1], index=torch.zeros_like(case.p.index))
        got = outcome(case, way)
        x, gate = case.p.x.clone().requires_grad_(), case.p.gate[0].clone().requires_grad_()
        bias = case.p.bias.clone().requires_grad_()
        factors = (case.p.up, case.p.down)[:: 1 if plain == "qr_linear" else -1]
        y = getattr(functional, plain)(
            x, case.p.weight, bias, *factors, gate, case.p.scaling, backend=way
        )
        y.backward(case.dy)
        want = {"y": y.detach(), "x": x.grad, "bias": bias.grad, "gate": gate.grad[None]}
        assert_same_bits(got, want)


@MIXED
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lead", [FEW, MANY], ids=str)
def test_what_is_beyond_the_gates_rank_does_not_count(
    lead: tuple[int, ...], way: str | None, kind: Kind
) -> None:
    """Factors wider than the gate hold NaN there."""
    case = case_of(kind, lead)
    up, down = case.p.up, case.p.down
    wide = case.given(
        up=torch.cat([up, torch.full_like(up, torch.nan)], 1)[:, :13],
        down=torch.cat([down, torch.full_like(down, torch.nan)])[:13],
    )
    assert_within_bound(*flat(case, outcome(wide, way)))


@MIXED
@pytest.mark.parametrize("way", WAYS)
def test_no_tokens(way: str | None, kind: Kind) -> None:
    """Every gate has a gradient of zero, whatever lay in the memory."""
    for lead in ((0,), (2, 0, 3)):
        case = case_of(kind, lead)
        case = case.given(index=case.p.index.view(lead))
        with poisoned_memory():
            got = outcome(case, way)
        assert got["y"].shape == (*lead, 24)
        assert got["x"].shape == (*lead, 40)
        assert not got["gate"].any()
        assert not got["bias"].any()


@MIXED
def test_a_frozen_operand_that_asks_for_a_gradient_gets_it(kind: Kind) -> None:
    case = case_of(kind, (3, 4), torch.float64)
    case = case.given(index=case.p.index.view(3, 4))
    x, weight, bias, up, down, gate, index, scaling = case.p
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, up, down, gate)]
    x, weight, bias, up, down, gate = leaves
    y = functional.mixed_low_rank_linear(x, weight, bias, down, up, gate, index, scaling)
    h, gates = x @ down.mT, gate[index]
    update = h * gates if gate.dim() == 2 else torch.einsum("abi,abij->abj", h, gates)
    want = x @ weight.mT + bias + scaling * update @ up.mT
    torch.testing.assert_close(y, want)
    for got, exact in zip(
        torch.autograd.grad(y, leaves, case.dy),
        torch.autograd.grad(want, leaves, case.dy),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)


@MIXED
@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(way: str | None, kind: Kind) -> None:
    case = draw(kind, 6, 7, 5, 3, torch.float64)
    case = case.given(x=case.p.x.view(2, 3, 5), index=case.p.index.view(2, 3))

    def f(x: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return call(case.given(x=x, bias=bias, gate=gate), way)

    leaves = [t.clone().requires_grad_() for t in (case.p.x, case.p.bias, case.p.gate)]
    assert torch.autograd.gradcheck(f, leaves)


@MIXED
@pytest.mark.parametrize("lead", [FEW, MANY], ids=str)
def test_compiled_whole(lead: tuple[int, ...], kind: Kind) -> None:
    case = case_of(kind, lead)
    want = outcome(case)

    def f(x: Tensor, bias: Tensor, gate: Tensor, index: Tensor) -> Tensor:
        return call(case.given(x=x, bias=bias, gate=gate, index=index))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for index in (case.p.index, case.p.index.view(lead).int()):
        leaves = [t.clone().requires_grad_() for t in (case.p.x, case.p.bias, case.p.gate)]
        y = compiled(*leaves, index)
        y.backward(case.dy)
        got = dict(zip(("y", "x", "bias", "gate"), (y, *(t.grad for t in leaves)), strict=True))
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, msg=name)


@MIXED
def test_under_autocast(kind: Kind) -> None:
    """Rows and frozen operands in bf16, the gates as they are; the index is no number to cast."""
    case = case_of(kind, MANY)
    narrow = case.given(
        **{name: getattr(case.p, name).bfloat16() for name in ("x", "weight", "bias", "up", "down")}
    )
    want = call(narrow)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(call(case), want)


# --- who else is there --------------------------------------------------------------------------


@MIXED
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [7, 60])
def test_other_rows_in_the_same_places_change_no_bit(
    rows: int, dtype: torch.dtype, way: str | None, kind: Kind
) -> None:
    """Of y, dx and the gradient of adapter 1 where the other rows hold anything, NaN too."""
    if way == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the native kernels compute in fp32 and fp64")
    case = case_of(kind, (rows,), dtype)
    mine = case.p.index == 1
    assert 0 < mine.sum() < rows
    want = outcome(case, way)
    for x, index in ((torch.nan, 0), (-3.0, 2), (1e30, ADAPTERS - 1)):
        changed = case.given(x=case.p.x.clone(), dy=case.dy.clone(), index=case.p.index.clone())
        changed.p.x[~mine] = x
        changed.dy[~mine] = x
        changed.p.index[~mine] = index
        got = outcome(changed, way)
        assert same_bits(got["y"][mine], want["y"][mine])
        assert same_bits(got["x"][mine], want["x"][mine])
        assert same_bits(got["gate"][1], want["gate"][1])
        assert not got["gate"][[a for a in range(ADAPTERS) if a not in (1, index)]].any()


@MIXED
@pytest.mark.skipif(native.CORE is None, reason=native.REASON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(24, 40, 8), (33, 31, 3), (300, 450, 150)], ids=str)
def test_an_adapter_alone_has_the_bits_that_it_has_among_others(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: Kind
) -> None:
    """On the native kernels, which take a row's sums in one order for any number of rows."""
    case = draw(kind, 32, *shape, dtype)
    together = outcome(case, "cpu")
    for adapter in range(ADAPTERS):
        mine = case.p.index == adapter
        alone = case.given(x=case.p.x[mine], dy=case.dy[mine], index=case.p.index[mine])
        got = outcome(alone, "cpu")
        assert same_bits(got["y"], together["y"][mine])
        assert same_bits(got["x"], together["x"][mine])
        assert same_bits(got["gate"][adapter], together["gate"][adapter])


@MIXED
@pytest.mark.parametrize("way", ["composed", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_gates_make_of_a_row_is_its_own(dtype: torch.dtype, way: str, kind: Kind) -> None:
    """With factors that are the identity and no base the library's products are exact.

    Those of other factors are not: in fp64, and in fp32 where a size is no multiple of a vector's,
    the library takes a row's sum in an order that depends on the number of rows.
    """
    one = torch.eye(16, dtype=dtype)
    case = draw(kind, 500, 16, 16, 16, dtype, bias=False)
    case = case.given(weight=torch.zeros_like(one), up=one, down=one)
    together = outcome(case, way)
    for adapter in range(ADAPTERS):
        mine = case.p.index == adapter
        alone = case.given(x=case.p.x[mine], dy=case.dy[mine], index=case.p.index[mine])
        got = outcome(alone, way)
        assert same_bits(got["y"], together["y"][mine])
        assert same_bits(got["x"], together["x"][mine])
        assert same_bits(got["gate"][adapter], together["gate"][adapter])


# --- many adapters ------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """How many operations there are, and how many elements the largest result has."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        own = isinstance(result, Tensor) and not function.is_view
        self.largest = max(self.largest, result.numel() if own else 0)
        return result


@MIXED
def test_a_hundred_thousand_gates_are_served_without_touching_them(kind: Kind) -> None:
    """No operation for each, and no copy of all of them."""
    adapters, rank = 100_000, 4
    case = draw(kind, 50, 24, 40, rank, torch.float32)
    gate = torch.randn(adapters, *case.p.gate.shape[1:])
    index = torch.arange(50) * (adapters // 50) + 7
    case = case.given(gate=gate, index=index)
    with Sizes() as sizes:
        y, _ = case.forward(composed)
    assert sizes.largest <= 50 * 40
    assert sizes.operations < 20 * 50
    few = case.given(gate=gate[index], index=torch.arange(50))
    assert same_bits(y, few.forward(composed)[0])
    for way in WAYS:
        assert same_bits(call(case, way), call(few, way))


def test_what_rows_give_an_adapter_does_not_depend_on_how_many_others_have() -> None:
    """A rank at which a single product and a batched one round otherwise on some processors."""
    shapes = ((96, 64), (48, 64), (25, 64), (48, 25))
    x, weight, down, up = (torch.randn(shape) for shape in shapes)
    cores = torch.randn(3, 25, 25).requires_grad_()
    found = []
    for names in ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1], [0, 0, 1, 2, 2, 2]):
        index = torch.tensor(names).repeat_interleave(16)
        y = mixed_low_rank_linear(x, weight, None, down, up, cores, index)
        (gradient,) = torch.autograd.grad(y.square().sum(), cores)
        found.append((y[:32], gradient[0]))
    for y, gradient in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(gradient, found[0][1])
