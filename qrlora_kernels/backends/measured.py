"""Where a backend can run a problem but measured slower than one that comes after it.

The numbers are those of bench/notes/cpu.md and bench/notes/triton.md. A backend asked for by name
runs all the same; here is only what the chooser does unasked.
"""

from __future__ import annotations

from .problem import Problem

# fp32 and fp64: up to here one native call beats four library products (48 tokens of 384, 768 and
# 1,024 features, r = 16 and 150, forward and backward: 0.82 to 1.17 of the best alternative where
# library products take 0.90 to 1.16).
FEW_TOKENS = 48
# bf16: from both of these on, the library's larger blocks outweigh a fused accumulator (2048 x 1024
# x 1024, forward and backward: 1.02 to 1.14 of the library products' time).
MANY_TOKENS, WIDE = 2048, 1024
# bf16, a weight that comes from memory at each call (4096 x 4096, 1 and 16 tokens: 1.2 and 1.5 of
# the library products' time).
LARGE_WEIGHT, LARGE_WEIGHT_TOKENS = 1 << 23, 32


def passed_over(backend: str, problem: Problem) -> str | None:
    """Why ``backend`` is passed over for ``problem`` unless asked for; None if it is not."""
    low_rank = problem.op in ("qr_linear", "lora_xs_linear")
    if backend == "cpu" and low_rank and problem.m > FEW_TOKENS:
        return f"library products measure better from {FEW_TOKENS + 1} tokens"
    wide = min(problem.n, problem.k) >= WIDE
    if backend == "amx" and problem.op != "kron_linear" and problem.m >= MANY_TOKENS and wide:
        return f"library products measure better from {MANY_TOKENS} tokens of {WIDE} features"
    large = problem.n * problem.k >= LARGE_WEIGHT
    if backend == "amx" and low_rank and problem.m <= LARGE_WEIGHT_TOKENS and large:
        return (
            f"library products measure better for {LARGE_WEIGHT_TOKENS} tokens and less of a large "
            "weight"
        )
    if backend in ("cuda", "triton"):
        if problem.device.type != "cuda":
            return "its kernels are for CUDA devices"
        return "not yet measured against library products on a GPU; it runs when asked for"
    return None
