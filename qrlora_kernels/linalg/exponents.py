"""Powers of two that bring a matrix into range and its factors back out of it, both exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_finite, largest_magnitude

# Exponents of two of the largest magnitude with which a factorisation of up to 2³⁰ elements, that
# takes fourth powers of singular values, neither overflows nor vanishes: in fp32, which fp16 always
# fits, and in fp64.
_WIDE = (-200, 200)
_NARROW = (-24, 16)


def in_range(name: str, weight: Tensor) -> tuple[Tensor, int]:
    """``weight`` · 2⁻ᵉ in its dtype, and e; ``weight`` itself and 0 where it is in range.

    What is some 2¹²⁰ (fp64: 2⁸⁰⁰) times smaller than the largest element may vanish.

    Raises
    ------
    ValueError
        ``weight`` holds NaN or Inf.
    """
    largest = check_finite(name, weight)
    low, high = _WIDE if weight.dtype == torch.float64 else _NARROW
    if largest == 0.0 or 2.0**low <= largest <= 2.0**high:
        return weight, 0
    exponent = math.frexp(largest)[1]
    return times_two_to(-exponent, weight), exponent


def times_two_to(exponent: int, tensor: Tensor) -> Tensor:
    """``tensor`` · 2ᵉ in its dtype; ``tensor`` itself for e = 0."""
    if exponent == 0:
        return tensor
    half = exponent // 2  # 2ᵉ alone may overflow
    return tensor * 2.0**half * 2.0 ** (exponent - half)


def rounded(name: str, factor: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """``exact``, a factor of the matrix ``name``, in ``dtype``; ValueError if it has no room."""
    held = exact.to(dtype)
    check_held(name, factor, held, exact)
    return held


def check_held(name: str, factor: str, held: Tensor, exact: Tensor) -> None:
    """Raise ValueError where ``held`` is infinite, or zero in every element and ``exact`` is not.

    Of ``exact`` the largest elements are enough.
    """
    if is_held(held):
        return
    largest = largest_magnitude(exact)
    if largest != 0.0:
        raise ValueError(
            f"{name} must have a factor {factor} that {held.dtype} can hold, got values up to "
            f"{largest:.4g}: ask for a wider dtype (out_dtype, or the weight's own)"
        )


def is_held(factor: Tensor) -> bool:
    """Finite, and not zero in every element."""
    return 0.0 < largest_magnitude(factor) < math.inf
