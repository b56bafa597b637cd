"""Triton kernels for NVIDIA GPUs from compute capability 8.0; also under Triton's interpreter.

Importing this imports neither Triton nor CUDA; the first call does. On Hopper and later the tiles
move by tensor descriptors (TMA) wherever an operand's rows start on 16 bytes, so factors are best
stored with padded rows (``storage[:, :r]`` of a [N, multiple of 8] tensor); anything else is read
through pointers, with any strides.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from ...dispatch.problem import Problem, Recipe
from ...native import pointers
from ...operands import (
    Kron,
    KronGradient,
    LinearAdd,
    LowRank,
    LowRankGradient,
    as_wide_as_the_gate,
)
from .. import products
from .tables import MAX_CORE_RANK, MAX_RANK, max_factor, padded

# Base and update in one product; or the update by a kernel, and the library's base onto it.
TWO_PHASE, LIBRARY_BASE = "two-phase", "addmm base"
MINIMUM = (3, 6)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def available() -> tuple[bool, str]:
    """Whether Triton is installed and has a GPU, or its interpreter, to run on."""
    try:
        import triton
    except ImportError as error:
        return False, f"Triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM:
        return False, f"Triton {triton.__version__} is older than {MINIMUM[0]}.{MINIMUM[1]}"
    if triton.knobs.runtime.interpret:
        return True, f"Triton {triton.__version__}, interpreted on the CPU (TRITON_INTERPRET)"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False, "no CUDA device"
    return True, f"Triton {triton.__version__}"


def supports(problem: Problem) -> list[Recipe] | str:
    """The recipes that run ``problem``, best first, or why there is none."""
    # Without importing Triton: this is asked for every problem on the CPU too.
    interpreted = problem.device.type == "cpu" and "TRITON_INTERPRET" in os.environ
    if problem.device.type != "cuda" and not interpreted:
        return f"Triton kernels run on CUDA devices, not {problem.device.type}"
    ok, reason = available()
    if not ok:
        return reason
    if interpreted != reason.endswith("(TRITON_INTERPRET)"):
        return "the interpreter takes CPU tensors, and compiled kernels CUDA tensors"
    if problem.dtype not in DTYPES:
        return f"Triton kernels compute in float32, float16 and bfloat16, not {problem.dtype}"
    from .common import chip_of

    chip = chip_of(problem.device)
    if chip.capability < 80:
        return f"compute capability {chip.capability / 10} is below 8.0"
    if problem.op == "kron":
        return _kron_recipes(problem, max_factor(chip))
    if why_not := _no_low_rank(problem):
        return why_not
    reason = "skinny product, then base and update in one fp32 accumulator"
    return [Recipe("triton", TWO_PHASE, reason)]


def _no_low_rank(problem: Problem) -> str | None:
    if problem.op != "low_rank":
        return None
    if problem.gate not in ("vector", "core") or problem.form != "two_sided":
        return "no Triton kernel for mixed gates and for the output form"
    limit = MAX_CORE_RANK if problem.gate == "core" else MAX_RANK
    return f"rank {problem.r} is above {limit}" if problem.r > limit else None


def _kron_recipes(problem: Problem, largest: int) -> list[Recipe] | str:
    na, kb = problem.n // problem.r, problem.k // problem.r
    if problem.dtype == torch.float32:
        return "Kronecker kernels need tensor cores, which float32 does not use"
    if problem.r % 8 or kb % 8:
        # Rows that no descriptor reaches; the addresses of a tile then cost registers.
        largest = min(largest, 4096)
    factor = max(padded(na), padded(kb)) * padded(problem.r)
    if factor > largest:
        return f"a factor of {factor} padded elements is above the {largest} held on chip"
    reason = "one pass over the tokens, the base accumulated onto the update"
    # Without a bias the library adds onto the update in its fp32 accumulator and rounds once.
    how = TWO_PHASE if problem.bias else LIBRARY_BASE
    return [Recipe("triton", how, reason)]


def low_rank_fwd(p: LowRank, recipe: str) -> tuple[Tensor, Tensor]:
    """y [M, N] = x Wᵀ + b + s·(h∘λ or h C) upᵀ and h [M, r] = x downᵀ."""
    from .skinny import low_rank_in
    from .two_phase import two_phase

    p = as_wide_as_the_gate(readable(p))
    h, scaled = low_rank_in(p)
    return two_phase((p.x, p.weight), (scaled, p.up), p.bias), h


def low_rank_bwd(p: LowRankGradient, recipe: str) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy W + s·(g∘λ or g Cᵀ) down and the gate's gradient, g = dy up."""
    from .skinny import low_rank_back
    from .two_phase import two_phase

    if not (p.need_dx or p.need_dgate):
        return None, None
    p = as_wide_as_the_gate(readable(p))
    assert p.down is not None
    scaled, dgate = low_rank_back(p)
    if scaled is None:
        return None, dgate
    return two_phase((p.dy, p.weight.t()), (scaled, p.down.t())), dgate


def kron_fwd(p: Kron, recipe: str) -> Tensor:
    """y [M, N] = x Wᵀ + b + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x; a [N/r, r], b [K/r, r]."""
    from .kron import kron_update
    from .two_phase import two_phase

    p = readable(p)
    update = kron_update(p)
    if recipe == LIBRARY_BASE:
        return products.onto(products.ADDMM, update, p.x, p.weight, p.bias)
    return two_phase((p.x, p.weight), bias=p.bias, start=update)


def kron_bwd(p: KronGradient, recipe: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [M, K], dA and dB."""
    from .kron import kron_gradients

    p = readable(p)
    dx, da, db = kron_gradients(p)
    if dx is not None:
        dx = products.onto(products.ADDMM, dx, p.dy, p.weight.mT, None)
    return dx, da, db


def linear_add_fwd(p: LinearAdd, recipe: str) -> Tensor:
    """y [M, N] = x Wᵀ + b + addend, rounded once."""
    from .two_phase import two_phase

    p = readable(p)
    return two_phase((p.x, p.weight), bias=p.bias, start=p.addend)


def readable(p: Any) -> Any:
    """The operands as kernels may read them, in any strides, or a ``TypeError``.

    On the meta device kernels are compiled ahead of time, and none is launched.
    """
    return type(p)(
        *(pointers.checked(t) if isinstance(t, Tensor) and not t.is_meta else t for t in p)
    )
