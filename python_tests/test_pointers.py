"""What kernels and library calls read through a pointer is what the tensor says."""

from __future__ import annotations

import helpers
import pytest
import torch
from torch import Tensor

from qrlora_kernels.backends import composed

# Biases [24] that are not contiguous.
BIASES = {
    "every second": lambda dtype: torch.randn(48).to(dtype)[::2],
    "expanded": lambda dtype: torch.randn(1).to(dtype).expand(24),
    "a column": lambda dtype: torch.randn(24, 3).to(dtype)[:, 1],
}
of_each_bias = pytest.mark.parametrize("bias", BIASES)


@of_each_bias
@pytest.mark.parametrize("m", [1, 3, 40])
def test_onednn_gets_a_dense_bias(bias: str, m: int) -> None:
    """In fp32, which oneDNN's linear with an addend takes on every CPU that has it."""
    if not composed._onednn_runs(torch.float32):
        pytest.skip("oneDNN is not there")
    x, weight, addend = torch.randn(m, 32), torch.randn(24, 32), torch.randn(m, 24)
    given = BIASES[bias](torch.float32)
    y = composed._linear_bias_add(x, weight, given, addend)
    want = x.double() @ weight.double().mT + given.double() + addend.double()
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


@of_each_bias
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 7, 40])
@pytest.mark.parametrize("op", helpers.OPS)
def test_a_bias_that_is_not_contiguous(op: str, m: int, dtype: torch.dtype, bias: str) -> None:
    operands = helpers.operands(op, m, 24, 36, 3, dtype) | {"bias": BIASES[bias](dtype)}
    dense = operands | {"bias": operands["bias"].clone(memory_format=torch.contiguous_format)}
    for backend in (None, *helpers.cpu_backends(op, dtype)):
        y: Tensor = helpers.call(op, operands, backend=backend)
        assert helpers.same_bits(y, helpers.call(op, dense, backend=backend)), backend
