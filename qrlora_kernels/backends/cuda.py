"""CUDA C++ for few tokens (decoding): two launches, three with a core, the weight read once.

The product with the weight starts while h is still being made (programmatic dependent launch on
Hopper and later); base and update share one fp32 accumulator. Only the forward is written for few
tokens: the backward, and a weight stored transposed, are library products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..native import pointers
from . import composed
from .problem import Problem

__all__ = [
    "available",
    "lora_xs_linear_bwd",
    "lora_xs_linear_fwd",
    "qr_linear_bwd",
    "qr_linear_fwd",
    "supports",
]

qr_linear_bwd = composed.qr_linear_bwd
lora_xs_linear_bwd = composed.lora_xs_linear_bwd

# The tags of csrc/include/qrlora/dtype.h.
_DTYPES = {torch.bfloat16: 2, torch.float16: 3}


def available() -> tuple[bool, str]:
    """Whether the native core has its CUDA part, and there is a GPU."""
    if native.CORE is None:
        return False, native.REASON
    if not hasattr(native.CORE, "cuda_decode"):
        return False, f"native core without CUDA: {native.build_config()['cuda']}"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False, "no CUDA device"
    return True, native.build_config()["cuda"]


def supports(problem: Problem) -> tuple[bool, str]:
    """Whether these kernels run ``problem``, and in a few words why (not)."""
    if problem.device.type != "cuda":
        return False, f"CUDA kernels run on CUDA devices, not {problem.device.type}"
    if problem.op not in ("qr_linear", "lora_xs_linear"):
        return False, f"no CUDA kernel for {problem.op}"
    if problem.dtype not in _DTYPES:
        return False, f"the CUDA kernels compute in float16 and bfloat16, not {problem.dtype}"
    ok, reason = available()
    if not ok:
        return ok, reason
    tokens = native.core().cuda_decode_tokens
    if not 1 <= problem.m <= tokens:
        return False, f"the CUDA kernels take 1 to {tokens} tokens, not {problem.m}"
    ok, reason = native.runs_on(problem.device)
    if not ok:
        return ok, reason
    return True, "few tokens: the weight read once, base and update in one fp32 accumulator"


def qr_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    r: Tensor,
    lam: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + s (h ∘ λ) Qᵀ on x [M, K]; returns y [M, N] and h = x R̃ᵀ [M, r]."""
    if weight.stride(1) != 1:
        return composed.qr_linear_fwd(x, weight, bias, q, r, lam, scaling)
    return _decode(x, weight, bias, q, r, lam, scaling)


def lora_xs_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + s (h C) Bᵀ on x [M, K]; returns y [M, N] and h = x Aᵀ [M, r]."""
    if weight.stride(1) != 1:
        return composed.lora_xs_linear_fwd(x, weight, bias, a, b, core, scaling)
    return _decode(x, weight, bias, b, a, core, scaling)


def _decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_factor: Tensor,
    in_factor: Tensor,
    gate: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """``gate`` is λ [r] or C [r, r]."""
    (m, k), n, r = x.shape, weight.shape[0], in_factor.shape[0]
    device = x.device
    # What is held may be a copy: it has to live until the launches are in the stream.
    x, (x_at, x_row, _) = pointers.rows(x, "x", device)
    weight, (weight_at, weight_row, _) = pointers.rows(weight, "weight", device)
    out_factor, (out_at, out_row, _) = pointers.rows(out_factor, device=device)
    in_factor, (in_at, in_row, _) = pointers.rows(in_factor, device=device)
    held, (bias_at, gate_at) = pointers.dense(bias, gate, device=device)
    y, h = x.new_empty(m, n), x.new_empty(m, r)
    mid = x.new_empty(m, -(-r // 8) * 8)
    wide = x.new_empty(m, r, dtype=torch.float32) if gate.dim() == 2 else None
    native.core().cuda_decode(
        _DTYPES[x.dtype],
        *(m, n, k, r),
        *(x_at, x_row),
        *(weight_at, weight_row),
        bias_at,
        *(out_at, out_row),
        *(in_at, in_row),
        *(gate_at, gate.dim() == 2, gate.dtype == torch.float32),
        scaling,
        *pointers.out(y, h, device=device),
        *(*pointers.out(mid, device=device), mid.stride(0)),
        *pointers.out(wide, device=device),
        x.get_device(),
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    del held
    return y, h
