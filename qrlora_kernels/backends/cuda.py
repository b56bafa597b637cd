"""CUDA C++ for few tokens (decoding): two launches, three with a core, the weight read once.

The product with the weight starts while h is still being made (programmatic dependent launch on
Hopper and later); base and update share one fp32 accumulator. Only the forward is written for few
tokens, and only for a weight whose rows are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch.problem import Problem, Recipe
from ..native import pointers
from ..operands import LowRank
from ..reference import hidden_dtype

DECODE = "decode"
# The tags of csrc/core/include/qrlora/dtype.h.
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


def supports(problem: Problem) -> list[Recipe] | str:
    """The recipes that run ``problem``, best first, or why there is none."""
    if problem.device.type != "cuda":
        return f"CUDA kernels run on CUDA devices, not {problem.device.type}"
    if problem.op != "low_rank":
        return f"no CUDA kernel for {problem.op}"
    if problem.step != "fwd":
        return "no CUDA kernel for a backward"
    if problem.gate not in ("vector", "core") or problem.form != "two_sided":
        return "no CUDA kernel for mixed gates and for the output form"
    if problem.layout != "rows":
        return "the CUDA kernels read a weight whose rows are contiguous"
    if problem.dtype not in _DTYPES:
        return f"the CUDA kernels compute in float16 and bfloat16, not {problem.dtype}"
    ok, reason = available()
    if not ok:
        return reason
    tokens = native.core().cuda_decode_tokens
    if not 1 <= problem.m <= tokens:
        return f"the CUDA kernels take 1 to {tokens} tokens, not {problem.m}"
    ok, reason = native.runs_on(problem.device)
    if not ok:
        return reason
    reason = "few tokens: the weight read once, base and update in one fp32 accumulator"
    return [Recipe("cuda", DECODE, reason)]


def low_rank_fwd(p: LowRank, recipe: str) -> tuple[Tensor, Tensor]:
    """y [M, N] and h [M, r]."""
    assert p.down is not None
    (m, k), n, r = p.x.shape, p.weight.shape[0], p.gate.shape[-1]
    device = p.x.device
    # What is held may be a copy: it has to live until the launches are in the stream.
    x, (x_at, x_row, _) = pointers.rows(p.x, "x", device)
    weight, (weight_at, weight_row, _) = pointers.rows(p.weight, "weight", device)
    up, (up_at, up_row, _) = pointers.rows(p.up, device=device)
    down, (down_at, down_row, _) = pointers.rows(p.down, device=device)
    held, (bias_at, gate_at) = pointers.dense(p.bias, p.gate, device=device)
    y, h = x.new_empty(m, n), x.new_empty(m, r, dtype=hidden_dtype(x.dtype))
    mid = x.new_empty(m, -(-r // 8) * 8)
    core = p.gate.dim() == 2
    wide = x.new_empty(m, r, dtype=torch.float32) if core else None
    native.core().cuda_decode(
        _DTYPES[x.dtype],
        *(m, n, k, r),
        *(x_at, x_row),
        *(weight_at, weight_row),
        bias_at,
        *(up_at, up_row),
        *(down_at, down_row),
        *(gate_at, core, p.gate.dtype == torch.float32),
        p.scaling,
        *pointers.out(y, h, device=device),
        *(*pointers.out(mid, device=device), mid.stride(0)),
        *pointers.out(wide, device=device),
        x.get_device(),
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    del held, weight, up, down
    return y, h
