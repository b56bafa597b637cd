"""Where a recipe that can run a problem is passed over, because another measured faster.

The figures are those of bench/notes/cpu.md and bench/notes/triton.md. A backend asked for by name
runs all the same; here is only what the chooser does unasked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import native, panels
from .problem import PANELS, Problem

FEW_TOKENS = 32
MORE_TOKENS, LIGHT_WEIGHT, LIGHT_RANK = 64, 1 << 16, 64
MANY_TOKENS, SMALL_WEIGHT = 2048, 1 << 20
EFFECTIVE_TOKENS, EFFECTIVE_AHEAD = 2, 3
KEPT_WEIGHT, KEPT_RANK = 1 << 16, 0.25
CAST_TOKENS = 4
HALF_TOKENS = 64
STREAMED_FORWARD, STREAMED_BACKWARD, STREAMED_WEIGHT = 32, 16, 1 << 20


class Rule(NamedTuple):
    """``backend``'s ``recipe`` ("" for all of them) is passed over where ``applies``."""

    number: int
    backend: str
    recipe: str
    op: str  # "" for all of them
    applies: Callable[[Problem], bool]
    reason: Callable[[Problem], str]
    figures: str  # what was measured, as a ratio of times


def _few(p: Problem) -> float:
    """Up to how many tokens one native call is ahead."""
    if p.dtype == torch.bfloat16:
        return math.inf if native.instructions().startswith("avx512") else HALF_TOKENS
    light = p.n * p.k <= LIGHT_WEIGHT and p.r <= LIGHT_RANK
    return MORE_TOKENS if light else FEW_TOKENS


def _native_is_ahead(p: Problem) -> bool:
    if p.m <= _few(p):
        return True
    if p.op == "low_rank" and (p.m >= EFFECTIVE_AHEAD * _tokens_side(p) or _keeps_effective(p)):
        return False
    return panels.made_pays(p.m, p.dtype) and not p.gate.startswith("mixed")


def _streams_base(p: Problem) -> bool:
    if p.dtype == torch.bfloat16:
        return p.m <= _few(p)
    if panels.made_pays(p.m, p.dtype):
        return True
    if p.step == "fwd":
        return p.m <= STREAMED_FORWARD
    return p.m <= STREAMED_BACKWARD and p.n * p.k >= STREAMED_WEIGHT


def _tokens_side(p: Problem) -> int:
    """The features against which tokens save: W + ΔW costs N·K·r, forward M·N·r, backward M·K·r."""
    return p.k if p.step == "fwd" else p.n


def _keeps_effective(p: Problem) -> bool:
    """Whether W + ΔW for both steps is ahead, and takes half of what x and y do at most."""
    if p.dtype not in panels.WIDE:  # W + ΔW in half precision would lose a small update
        return False
    large = p.n * p.k >= KEPT_WEIGHT and p.r >= KEPT_RANK * min(p.n, p.k)
    return large and p.m >= p.k and p.m * (p.n + p.k) >= 2 * p.n * p.k


RULES = (
    Rule(
        1, "cpu", "native", "",
        lambda p: not _native_is_ahead(p),
        lambda p: "W + ΔW measures better for so many tokens"
        if panels.made_pays(p.m, p.dtype) and not p.gate.startswith("mixed")
        else f"library products measure better from {_few(p) + 1} tokens",
        "fp32 and fp64, one native call over four library products: ahead to 32 tokens; for 64 to "
        "256 features 0.80 to 1.07 of an addmm expression at 33 to 64 tokens and r = 16 to 64, "
        "where library products take 1.08 to 1.29 at r = 16; mostly behind for larger weights or "
        "ranks. AMD EPYC, where it brings operands into panels from 33 tokens on, two threads, 384 "
        "to 4,096 features, 33 to 1,024 tokens: fp32 with AVX-512 0.67 to 0.93, told of AVX2 alone "
        "0.73 to 1.01, one thread 0.87 to 1.10; fp64 from 512 tokens 0.81 to 1.00, below 0.73 to "
        "1.05, its forward to 1.2; over W + ΔW from three times as many tokens as features 0.95 to "
        "1.11. bf16, AMD EPYC, over addmm onto an update: with AVX512-BF16 0.62 to 0.95 at 16 to "
        "2,048 tokens, with AVX-512 alone 0.34 to 0.45, with AVX2 alone 0.09 to 0.80 to 16 tokens, "
        "1.0 to 1.3 from 128 on",
    ),
    Rule(
        2, "cpu", "native base", "kron",
        lambda p: not _streams_base(p),
        lambda p: "the library's base product measures better here",
        "fp32 and fp64, the base product streamed over that of addmm, 128 to 4,096 features: 0.4 "
        "to 1.1 to 32 tokens; dx, which adds rows of W up, 0.5 to 1.2 to 16 tokens of a weight "
        "that comes from memory (1,024 features and more), mostly 1.1 to 2 below. AMD EPYC, panels "
        "as in rule 1: fp32 from 33 tokens 0.71 to 0.99, fp64 from 512 0.91 to 0.98. bf16 with "
        "AVX512-BF16, 384 to 2,048 features: 0.69 to 0.98, with the backward 0.79 to 1.00",
    ),
    Rule(
        3, "amx", "native", "linear_add",
        lambda p: p.m >= MANY_TOKENS and p.n * p.k <= SMALL_WEIGHT,
        lambda p: f"library products measure better from {MANY_TOKENS} tokens of a weight of up "
        f"to {SMALL_WEIGHT} elements",
        "bf16, the library's base product onto an addend over amx's: 0.94 to 1.50 there, 0.65 to "
        "1.01 above",
    ),
    Rule(
        6, "composed", "effective weight", "low_rank",
        lambda p: p.m < EFFECTIVE_TOKENS * _tokens_side(p),
        lambda p: f"the update by itself measures better below {EFFECTIVE_TOKENS * _tokens_side(p)}"
        " tokens",
        "fp32, forward and backward by W + ΔW over the update onto the base's, AMD EPYC with AVX2: "
        "from twice as many tokens as features 384² r = 147 0.84 to 0.89 (LoRA-XS 0.78 to 0.84), r "
        "= 16 0.95 to 0.98, 1024² r = 16 0.98 to 1.01; as plain products 0.95 to 1.03 from as many "
        "tokens as features to a third more, 1.02 to 1.16 from a half to two thirds",
    ),
    Rule(
        8, "composed", "effective weight, kept", "low_rank",
        lambda p: not _keeps_effective(p),
        lambda p: "W + ΔW is kept for ranks from a quarter of the features, where x and y take "
        "twice its memory or more",
        "fp32, forward and backward with W + ΔW kept over the update onto the base's, AMD EPYC "
        "with AVX2, one thread and two: 384² r = 147 0.96 with as many tokens as features, 0.86 to "
        "0.91 with half as many more, 1024² r = 256 and 512 0.87 to 0.95 and 0.84 to 0.91, 1536 × "
        "384 r = 150 0.98 to 1.00; the forward alone 0.98 to 1.11 and 0.94 to 1.00",
    ),
    Rule(
        9, "cpu", PANELS, "",
        lambda p: not panels.pays_adapted(p.m, p.n, p.k, p.dtype)
        or (p.op == "low_rank" and _keeps_effective(p)),
        lambda p: "panels that are kept measure better for weights from half a million numbers, "
        "and where W + ΔW is not kept",
        "forward and backward of the layer by kept panels over its own native call, AMD EPYC with "
        "AVX512-BF16, two threads, 16, 33, 64, 128, 512 tokens: fp32 4096² 0.80 (16), 2048² 0.67 "
        "to 0.98, 1024² 1.1 (16), 0.79 to 0.97, 768² 0.93 to 1.00, 512² 0.98 to 1.09, 384² 1.08 "
        "to 1.29, 384 × 1536 r = 147 0.84 to 1.00; fp64 1024² 0.67, 0.77, 0.96 (33, 128, 512); "
        "OHoRA fp32 1024² 0.79 to 0.98, 384² 1.14 to 1.36, bf16 4096² 0.66 to 0.99; bf16 of "
        "QR-LoRA 4096² 0.62 to 0.95, 1024² 0.86 to 1.01. Told of AVX2 alone, over library "
        "products: 0.73 to 0.99",
    ),
    *(
        Rule(
            7, backend, recipe, "",
            lambda p: p.m < CAST_TOKENS and not p.bias,
            lambda p: f"a loop over halves measures better below {CAST_TOKENS} tokens than the "
            "casts",
            "bf16, forward and backward over the frozen layer's loop, fp32 in place of addmm, 384² "
            "r = 147 to 1024² r = 16, AMD EPYC with AVX2: 4 tokens 1.03 to 1.98 -> 0.23 to 0.94, "
            "16 1.01 to 1.75 -> 0.08 to 0.41, 128 1.00 to 1.69 -> 0.02 to 0.13; one token of 1024² "
            "took 1.5 times as long in fp32",
        )
        for backend, recipe in (("composed", "fp32"), ("cpu", "fp32 base"))
    ),
    *(
        Rule(
            number, backend, "", "",
            lambda p: True,
            lambda p: "its kernels are for CUDA devices"
            if p.device.type != "cuda"
            else "not yet measured against library products on a GPU; it runs when asked for",
            "none: no GPU has run them",
        )
        for number, backend in ((4, "cuda"), (5, "triton"))
    ),
)  # fmt: skip


def passed_over(backend: str, recipe: str, problem: Problem) -> str | None:
    """Why ``recipe`` is passed over for ``problem`` unless asked for; None if it is not."""
    for rule in RULES:
        if (
            rule.backend == backend
            and rule.recipe in ("", recipe)
            and rule.op in ("", problem.op)
            and rule.applies(problem)
        ):
            return f"{rule.reason(problem)} (rule {rule.number})"
    return None
