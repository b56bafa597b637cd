"""What other adapter code imports: one function per operation and gate."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .ops import kron, low_rank, onto
from .ops import linear_add as sums
from .ops.checks import asks_for_operators as asks_for_operators  # for the layers' own backward
from .ops.kept import kept_kron as kept_kron  # for the layers that keep them
from .ops.kept import kept_low_rank as kept_low_rank

__all__ = [
    "kron_linear", "linear_add", "lora_xs_linear", "low_rank_onto", "mixed_low_rank_linear",
    "qr_linear",
]  # fmt: skip


def qr_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    r: Tensor | None,
    lam: Tensor,
    scaling: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """QR-LoRA over a frozen linear layer (arXiv 2508.21810, eq. 3).

    Equivalent to ``F.linear(x, weight, bias) + scaling * (x @ r.T * lam) @ q.T`` with fp32
    accumulation and one rounding of the sum.

    Parameters
    ----------
    x : Tensor [..., K]
        Any number of leading dimensions and any strides; fp16, bf16, fp32 or fp64.
    weight : Tensor [N, K]
    bias : Tensor [N] or None
    q : Tensor [N, r]
        Orthonormal columns of the pivoted QR.
    r : Tensor [r, K] or None
        Its triangular factor with the column permutation undone; None for qᵀ weight, and nothing
        is asked but ``x @ weight.T``. Both factors may be wider than lam, alike: what is beyond
        does not count.
    lam : Tensor [r]
        The trainable diagonal; x's dtype, or fp32 over half-precision operands.
    scaling : float
    backend : str, optional
        Force a backend (see ``qrlora_kernels.backends``) instead of choosing one.

    Returns
    -------
    Tensor [..., N] in x's dtype

    Raises
    ------
    TypeError, ValueError
        If an operand's type, shape, dtype or device does not fit the others; the message names it.
    """
    operands = (x, weight, bias, q, r, lam, None, scaling)
    y = low_rank.at_once(low_rank.QR_LINEAR, backend, *operands)
    if y is not None:
        return y
    tensors = (x, weight, bias, q, r, lam)
    if has_torch_function(tensors):
        return handle_torch_function(qr_linear, tensors, *tensors, scaling, backend=backend)
    return low_rank.call(low_rank.QR_LINEAR, backend, *operands)


def lora_xs_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor,
    scaling: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """LoRA-XS over a frozen linear layer (arXiv 2405.17604, eq. 2).

    Equivalent to ``F.linear(x, weight, bias) + scaling * ((x @ a.T) @ core) @ b.T`` with fp32
    accumulation and one rounding of the sum.

    Parameters
    ----------
    x : Tensor [..., K]
        Any number of leading dimensions and any strides; fp16, bf16, fp32 or fp64.
    weight : Tensor [N, K]
    bias : Tensor [N] or None
    a : Tensor [r, K]
        Input side of the frozen basis, Σ_r V_rᵀ.
    b : Tensor [N, r]
        Output side of the frozen basis, U_r. Both factors may be wider than r, alike: what is
        beyond does not count.
    core : Tensor [r, r]
        The trainable core; x's dtype, or fp32 over half-precision operands.
    scaling : float
    backend : str, optional
        Force a backend (see ``qrlora_kernels.backends``) instead of choosing one.

    Returns
    -------
    Tensor [..., N] in x's dtype

    Raises
    ------
    TypeError, ValueError
        If an operand's type, shape, dtype or device does not fit the others; the message names it.
    """
    operands = (x, weight, bias, b, a, core, None, scaling)
    y = low_rank.at_once(low_rank.LORA_XS_LINEAR, backend, *operands)
    if y is not None:
        return y
    tensors = (x, weight, bias, a, b, core)
    if has_torch_function(tensors):
        return handle_torch_function(lora_xs_linear, tensors, *tensors, scaling, backend=backend)
    return low_rank.call(low_rank.LORA_XS_LINEAR, backend, *operands)


def mixed_low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor,
    gates: Tensor,
    index: Tensor,
    scaling: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Many adapters over one frozen layer and one pair of factors: each row has its own gate.

    Row m is ``F.linear(x[m], weight, bias) + scaling * (a @ x[m] * gates[index[m]]) @ b.T``, or
    with ``(a @ x[m]) @ gates[index[m]]`` for square gates, with fp32 accumulation and one rounding
    of the sum. What an adapter adds to its rows, and its gradient, do not depend on who else is in
    the batch, as far as the library's products of a row do not.

    Parameters
    ----------
    x : Tensor [..., K]
        Any number of leading dimensions and any strides; fp16, bf16, fp32 or fp64.
    weight : Tensor [N, K]
    bias : Tensor [N] or None
    a : Tensor [r, K] or None
        Input side of the factors: R̃ of QR-LoRA, Σ_r V_rᵀ of LoRA-XS; None for bᵀ weight.
    b : Tensor [N, r]
        Output side: Q, or U_r. Both factors may be wider than r, alike: what is beyond does not
        count.
    gates : Tensor [A, r] or [A, r, r]
        The trainable diagonals (QR-LoRA) or cores (LoRA-XS) of A adapters; x's dtype, or fp32 over
        half-precision operands. The gradient of one that no row names is zero.
    index : Tensor, x.shape[:-1] or [M] for M rows
        Of any integer dtype: the adapter of each row.
    scaling : float
    backend : str, optional
        Force a backend (see ``qrlora_kernels.backends``) instead of choosing one.

    Returns
    -------
    Tensor [..., N] in x's dtype

    Raises
    ------
    TypeError, ValueError
        If an operand's type, shape, dtype or device does not fit the others, or an index is not
        from 0 to A - 1; the message names it. On a GPU the latter is an assertion on the device.
    """
    operands = (x, weight, bias, b, a, gates, index, scaling)
    y = low_rank.at_once(low_rank.MIXED_LOW_RANK_LINEAR, backend, *operands)
    if y is not None:
        return y
    tensors = (x, weight, bias, a, b, gates, index)
    if has_torch_function(tensors):
        return handle_torch_function(
            mixed_low_rank_linear, tensors, *tensors, scaling, backend=backend
        )
    return low_rank.call(low_rank.MIXED_LOW_RANK_LINEAR, backend, *operands)


def kron_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
    scaling: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """A Kronecker update over a frozen linear layer (OHoRA, EMNLP 2025, eq. 6 and 7).

    Equivalent to ``F.linear(x, weight + scaling * (torch.kron(a, b.T) - torch.kron(a0, b0.T)),
    bias)``, computed per token as ``a @ (x.view(r, K/r) @ b)`` without forming the product.

    Parameters
    ----------
    x : Tensor [..., K]
        Any number of leading dimensions and any strides; fp16, bf16, fp32 or fp64.
    weight : Tensor [N, K]
    bias : Tensor [N] or None
    a : Tensor [N/r, r]
    b : Tensor [K/r, r]
        The trainable factors; x's dtype, or fp32 over half-precision operands.
    a0, b0 : Tensor, optional
        The start, shaped and typed as a and b; without it the whole product is added.
    scaling : float
    backend : str, optional
        Force a backend (see ``qrlora_kernels.backends``) instead of choosing one.

    Returns
    -------
    Tensor [..., N] in x's dtype

    Raises
    ------
    TypeError, ValueError
        If an operand's type, shape, dtype or device does not fit the others; the message names it.
    """
    operands = (x, weight, bias, a, b, a0, b0)
    y = kron.at_once(backend, *operands, scaling)
    if y is not None:
        return y
    if has_torch_function(operands):
        return handle_torch_function(kron_linear, operands, *operands, scaling, backend=backend)
    return kron.call(backend, *operands, scaling)


def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """``F.linear(x, weight, bias) + addend`` with fp32 accumulation and one rounding.

    Parameters
    ----------
    x : Tensor [..., K]
        Any number of leading dimensions and any strides; fp16, bf16, fp32 or fp64.
    weight : Tensor [N, K]
    bias : Tensor [N] or None
    addend : Tensor [..., N]
        In x's dtype.
    backend : str, optional
        Force a backend (see ``qrlora_kernels.backends``) instead of choosing one.

    Returns
    -------
    Tensor [..., N] in x's dtype

    Raises
    ------
    TypeError, ValueError
        If an operand's type, shape, dtype or device does not fit the others; the message names it.
    """
    operands = (x, weight, bias, addend)
    if has_torch_function(operands):
        return handle_torch_function(linear_add, operands, *operands, backend=backend)
    return sums.call(*operands, backend)


def low_rank_onto(
    y0: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor, scaling: float = 1.0
) -> Tensor:
    """A low-rank update added to a base product that somebody else made, with one rounding.

    Equivalent to ``y0 + scaling * ((x @ a.T) * gate) @ b.T`` or, of a square gate, ``(x @ a.T) @
    gate``, with fp32 accumulation: ``low_rank_onto(base(x.float()), x, ...)`` for int8 weights.

    Parameters
    ----------
    y0 : Tensor [..., N]
        The base product with its bias: in x's dtype, or fp32 over half-precision x. A rounded one
        has lost most of what a small update would change.
    x : Tensor [..., K]
        Any number of leading dimensions and any strides; fp16, bf16, fp32 or fp64.
    a, b : Tensor [r, K], [N, r]
        The frozen factors, as :func:`mixed_low_rank_linear` takes them.
    gate : Tensor [r] or [r, r]
        The trainable λ (QR-LoRA) or core (LoRA-XS); x's dtype, or fp32 over half precision.

    Returns
    -------
    Tensor [..., N] in x's dtype

    Raises
    ------
    TypeError, ValueError
        If an operand's type, shape, dtype or device does not fit the others; the message names it.
    """
    tensors = (y0, x, a, b, gate)
    if has_torch_function(tensors):
        return handle_torch_function(low_rank_onto, tensors, *tensors, scaling)
    return onto.call(*tensors, scaling)
