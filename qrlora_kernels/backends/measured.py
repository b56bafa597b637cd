"""Where a backend can run a problem but measured slower than one that comes after it.

The numbers are those of bench/notes/cpu.md and bench/notes/triton.md. A backend asked for by name
runs all the same; here is only what the chooser does unasked.
"""

from __future__ import annotations

from .problem import Problem

# fp32 and fp64: up to here one native call beats four library products; a weight of the second size
# is read at the pace of memory for some more (33 and 48 tokens of 768 and 1,024 features: 0.79 to
# 1.11 of the best alternative where library products take 0.97 to 1.17; 384 features: up to 1.3).
FEW_TOKENS = 32
SOME_TOKENS, WEIGHT_OF_SOME = 48, 1 << 19
# bf16: from so many tokens and features on, larger blocks outweigh a fused accumulator;
# for QR-LoRA and LoRA-XS only under a weight of so many elements (2,048 tokens, both ways, amx over
# the library products: 0.97 to 1.12 at 1024 x 1024; 0.68 to 1.13, mostly 0.9, above).
MANY_TOKENS, WIDE, FUSED_WEIGHT = 2048, 1024, 1 << 21
# bf16: up to the first count a weight is streamed as it lies, from the second on packing it pays.
# Between them library products are ahead for a weight of at least so many elements (65 tokens: amx
# takes 1.09 of their time at 2048 x 2048, 1.12 to 1.46 at 4096 x 4096; 96: 1.02, 0.80 to 1.13).
STREAMED, PACKED, LARGE_WEIGHT = 64, 96, 1 << 22

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
    few = SOME_TOKENS if problem.n * problem.k >= WEIGHT_OF_SOME else FEW_TOKENS
    if backend == "cpu" and low_rank and problem.m > few:
        return f"library products measure better from {few + 1} tokens"
    wide = min(problem.n, problem.k) >= WIDE
    small = problem.n * problem.k < FUSED_WEIGHT if low_rank else problem.op == "linear_add"
    if backend == "amx" and problem.m >= MANY_TOKENS and wide and small:
        under = f", under {FUSED_WEIGHT} weight elements" if low_rank else ""
        return (
            f"library products measure better from {MANY_TOKENS} tokens of {WIDE} features{under}"
        )
    large = problem.n * problem.k >= LARGE_WEIGHT
    if backend == "amx" and low_rank and STREAMED < problem.m < PACKED and large:
        return f"library products measure better from {STREAMED + 1} tokens of a large weight"
    if backend in ("cuda", "triton"):
        if problem.device.type != "cuda":
            return "its kernels are for CUDA devices"
        return "not yet measured against library products on a GPU; it runs when asked for"
    return None
