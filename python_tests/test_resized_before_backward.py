"""An operand that is resized or cast between forward and backward is named, and never read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels import functional, native, panels

K, N, R = 48, 40, 4
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def qr(dtype: torch.dtype) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    return functional.qr_linear, {
        "weight": drawn(dtype, N, K), "q": drawn(dtype, N, R), "r": drawn(dtype, R, K),
        "lam": drawn(dtype, R).requires_grad_(),
    }  # fmt: skip


def lora_xs(dtype: torch.dtype) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    return functional.lora_xs_linear, {
        "weight": drawn(dtype, N, K), "a": drawn(dtype, R, K), "b": drawn(dtype, N, R),
        "core": drawn(dtype, R, R).requires_grad_(),
    }  # fmt: skip


def ohora(dtype: torch.dtype) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    return functional.kron_linear, {
        "weight": drawn(dtype, N, K), "a": drawn(dtype, N // R, R).requires_grad_(),
        "b": drawn(dtype, K // R, R).requires_grad_(),
        "a0": drawn(dtype, N // R, R), "b0": drawn(dtype, K // R, R),
    }  # fmt: skip


every_adapter = pytest.mark.parametrize("adapter", [qr, lora_xs, ohora])


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("larger", [True, False])
@every_adapter
def test_it_is_named(
    adapter: Callable[..., tuple[Callable[..., Tensor], dict[str, Tensor]]],
    larger: bool,
    dtype: torch.dtype,
    tokens: int,
) -> None:
    """λ of 30 million numbers ended the process, a smaller Q gave NaN."""
    function, named = adapter(dtype)
    for name in named:
        _, operands = adapter(dtype)
        x = drawn(dtype, tokens, K).requires_grad_()
        y = function(x, bias=None, **operands)
        t = operands[name]
        before = list(t.shape)
        shape = [9 * size for size in t.shape] if larger else [1 for _ in t.shape]
        t.data = torch.zeros(shape, dtype=dtype)
        with pytest.raises(RuntimeError) as error:
            y.sum().backward()
        ours = f"must be of the forward's shape, {before}, got {shape}: it was resized"
        assert ours in str(error.value), name


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize(
    ("dtype", "other"),
    [(torch.float32, torch.float64), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.half)],
    ids=str,
)
@every_adapter
def test_what_is_cast_through_data_is_named(
    adapter: Callable[..., tuple[Callable[..., Tensor], dict[str, Tensor]]],
    dtype: torch.dtype,
    other: torch.dtype,
    tokens: int,
) -> None:
    """λ in fp64 was read as twice as many numbers of fp32, in bf16 behind its end."""
    function, named = adapter(dtype)
    for name in named:
        _, operands = adapter(dtype)
        y = function(drawn(dtype, tokens, K).requires_grad_(), bias=None, **operands)
        operands[name].data = operands[name].data.to(other)
        with pytest.raises(RuntimeError) as error:
            y.sum().backward()
        assert f"must be of the forward's dtype, {dtype}, got {other}: it" in str(error.value), name


@pytest.mark.parametrize("tokens", [1, 3000])
def test_an_input_that_ohora_keeps(tokens: int) -> None:
    """More rows ended the process."""
    function, operands = ohora(torch.float32)
    x = drawn(torch.float32, 40, K).requires_grad_()
    y = function(x, bias=None, **operands)
    x.data = torch.zeros(tokens, K)
    with pytest.raises(RuntimeError, match=r"x must be of the forward's shape, \[40, 48\]"):
        y.sum().backward()


@pytest.mark.skipif(native.CORE is None, reason=native.REASON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_it_is_kept_in_panels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "used", lambda dtype: True)
    monkeypatch.setattr(panels, "pays_adapted", lambda *shape: True)
    model = nn.Sequential(nn.Linear(1024, 1024)).to(dtype)
    qk.adapt(model, ["0"], rank=R, progress=False)
    qk.prepack(model, packed="both")
    y = model(drawn(dtype, 20, 1024).requires_grad_())
    model[0].weight.data = torch.zeros(2000, 2000, dtype=dtype)
    with pytest.raises(
        RuntimeError, match=r"weight must be of the forward's shape, \[1024, 1024\]"
    ):
        y.sum().backward()
