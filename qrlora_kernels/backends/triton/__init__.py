"""Triton kernels for NVIDIA GPUs from compute capability 8.0; also under Triton's interpreter.

Importing this imports neither Triton nor CUDA; the first call does. On Hopper and later the tiles
move by tensor descriptors (TMA) wherever an operand's rows start on 16 bytes, so factors are best
stored with padded rows (``storage[:, :r]`` of a [N, multiple of 8] tensor); anything else is read
through pointers, with any strides.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ..problem import Problem
from .tables import MAX_CORE_RANK, MAX_RANK, max_factor, padded

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


def supports(problem: Problem) -> tuple[bool, str]:
    """Whether these kernels run ``problem``, and in a few words why (not)."""
    # Without importing Triton: this is asked for every problem on the CPU too.
    interpreted = problem.device.type == "cpu" and "TRITON_INTERPRET" in os.environ
    if problem.device.type != "cuda" and not interpreted:
        return False, f"Triton kernels run on CUDA devices, not {problem.device.type}"
    ok, reason = available()
    if not ok:
        return ok, reason
    if interpreted != reason.endswith("(TRITON_INTERPRET)"):
        return False, "the interpreter takes CPU tensors, and compiled kernels CUDA tensors"
    if problem.dtype not in DTYPES:
        return (
            False,
            f"Triton kernels compute in float32, float16 and bfloat16, not {problem.dtype}",
        )
    from .common import chip_of

    chip = chip_of(problem.device)
    if chip.capability < 80:
        return False, f"compute capability {chip.capability / 10} is below 8.0"
    limit = MAX_CORE_RANK if problem.op == "lora_xs_linear" else MAX_RANK
    if problem.op in ("qr_linear", "lora_xs_linear") and problem.r > limit:
        return False, f"rank {problem.r} is above {limit}"
    if problem.op == "kron_linear":
        return _supports_kron(problem, max_factor(chip))
    return True, "skinny product, then base and update in one fp32 accumulator"


def _supports_kron(problem: Problem, largest: int) -> tuple[bool, str]:
    na, kb = problem.n // problem.r, problem.k // problem.r
    if problem.dtype == torch.float32:
        return False, "Kronecker kernels need tensor cores, which float32 does not use"
    if problem.r % 8 or kb % 8:
        # Rows that no descriptor reaches; the addresses of a tile then cost registers.
        largest = min(largest, 4096)
    factor = max(padded(na), padded(kb)) * padded(problem.r)
    if factor > largest:
        return False, f"a factor of {factor} padded elements is above the {largest} held on chip"
    return True, "one pass over the tokens, the base accumulated onto the update"


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
    from .linear import gated_fwd

    return gated_fwd(x, weight, bias, q, r, lam, scaling)


def qr_linear_bwd(
    dy: Tensor,
    weight: Tensor,
    q: Tensor,
    r: Tensor,
    lam: Tensor,
    h: Tensor,
    scaling: float,
    need_dx: bool = True,
    need_dlam: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """g = dy Q;  dλ = s Σ_m h ∘ g;  dx = dy W + s (g ∘ λ) R̃."""
    from .linear import gated_bwd

    return gated_bwd(dy, weight, q, r, lam, h, scaling, need_dx, need_dlam)


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
    from .linear import gated_fwd

    return gated_fwd(x, weight, bias, b, a, core, scaling)


def lora_xs_linear_bwd(
    dy: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor,
    h: Tensor,
    scaling: float,
    need_dx: bool = True,
    need_dcore: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """g = dy B;  dC = s hᵀ g;  dx = dy W + s (g Cᵀ) A."""
    from .linear import gated_bwd

    return gated_bwd(dy, weight, b, a, core, h, scaling, need_dx, need_dcore)


def kron_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
) -> Tensor:
    """y = x Wᵀ + b + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x on x [M, K], a [N/r, r], b [K/r, r]."""
    from . import kron

    return kron.kron_linear_fwd(x, weight, bias, a, b, a0, b0, scaling)


def kron_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    scaling: float,
    need_dx: bool = True,
    need_da: bool = True,
    need_db: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Per token S = X B, T = Aᵀ dY;  dA = s Σ dY Sᵀ;  dB = s Σ Xᵀ T;  dX = s (T Bᵀ − T₀ B₀ᵀ)."""
    from . import kron

    return kron.kron_linear_bwd(dy, x, weight, a, b, a0, b0, scaling, need_dx, need_da, need_db)


def linear_add_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """y [M, N] = x Wᵀ + b + addend, rounded once."""
    from .common import readable
    from .two_phase import two_phase

    x, weight, bias, addend = readable(x, weight, bias, addend)
    return two_phase(x, weight, bias=bias, start=addend)
