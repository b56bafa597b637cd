"""Where a backend can run a problem but measured slower than one that comes after it.

The numbers are those of bench/notes/cpu.md and bench/notes/triton.md. A backend asked for by name
runs all the same; here is only what the chooser does unasked.
"""

from __future__ import annotations

from .problem import Problem

# fp32 and fp64: up to here one native call beats four library products; for a small weight and
# rank, where the products' own calls weigh most, for some more (33 to 64 tokens of 64 to 256
# features, over an addmm expression: 0.80 to 1.07 at r = 16 to 64, where library products take 1.08
# to 1.29 at r = 16; for larger weights or ranks they are mostly ahead).
FEW_TOKENS = 32
MORE_TOKENS, LIGHT_WEIGHT, LIGHT_RANK = 64, 1 << 16, 64
# bf16: a base product onto a given addend over so many tokens; the library's is ahead for a weight
# of at most so many elements (amx over it: 0.94 to 1.50 there, 0.65 to 1.01 above).
MANY_TOKENS, SMALL_WEIGHT = 2048, 1 << 20

# fp32 and fp64: the base product over so few tokens is streamed by a native kernel (its time over
# that of addmm, 128 to 4,096 features: 0.4 to 1.1). dx, which adds rows of W up, is so only where
# W comes from memory (1,024 features and more: 0.5 to 1.2; below mostly 1.1 to 2).
STREAMED_FORWARD, STREAMED_BACKWARD, STREAMED_WEIGHT = 32, 16, 1 << 20


def streams_base(step: str, m: int, n: int, k: int) -> bool:
    """fp32 and fp64: whether the base product of ``step`` measured better as a native kernel."""
    if step == "fwd":
        return m <= STREAMED_FORWARD
    return m <= STREAMED_BACKWARD and n * k >= STREAMED_WEIGHT


def passed_over(backend: str, problem: Problem) -> str | None:
    """Why ``backend`` is passed over for ``problem`` unless asked for; None if it is not."""
    low_rank = problem.op in ("qr_linear", "lora_xs_linear")
    light = problem.n * problem.k <= LIGHT_WEIGHT and problem.r <= LIGHT_RANK
    few = MORE_TOKENS if light else FEW_TOKENS
    if backend == "cpu" and low_rank and problem.m > few:
        return f"library products measure better from {few + 1} tokens"
    small = problem.n * problem.k <= SMALL_WEIGHT
    if backend == "amx" and problem.op == "linear_add" and problem.m >= MANY_TOKENS and small:
        return (
            f"library products measure better from {MANY_TOKENS} tokens of a weight of up to "
            f"{SMALL_WEIGHT} elements"
        )
    if backend in ("cuda", "triton"):
        if problem.device.type != "cuda":
            return "its kernels are for CUDA devices"
        return "not yet measured against library products on a GPU; it runs when asked for"
    return None
