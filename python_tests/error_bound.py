"""How far a correct result may lie from the exact one: two rules, and neither trusts one sample.

``assert_within_bound`` holds every element to what the arithmetic gives. A sum accumulated in a
type of unit roundoff u, in any order and any grouping, gives every term at most L factors 1 + δ,
|δ| ≤ u, where L counts the roundings on the longest way from an operand to the result. So

    |result − exact| ≤ c(L, u) · Σ |terms| + k · u_half · |update| + ½ ulp(result)

with Σ |terms| = |x||W|ᵀ + |b| + s · |update|, every factor taken by its absolute value (c is
``growth``). Half precision may store k intermediates besides: h, h behind its gate, the update.
A factor that is itself a sum (h in the gradient of the gate, S in OHoRA's) enters by its exact
value and its own bound, which is closer than the product of all absolute values.

``assert_no_worse_than_eager`` is contract 1's other half, "in the root mean square over many
draws no worse than twice the plain PyTorch expression": it pools draws until a ratio of two root
mean squares says something, and refuses to judge fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
# The exponent of the probability in ``growth``.
LAMBDA = 8.0
# Numbers that a root mean square is taken over, at least, and how far ours may lie over eager's.
NUMBERS = 512
WORSE_THAN_EAGER = 2.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """u = eps / 2: the relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def growth(length: int, unit: float) -> float:
    """c(L, u): how far a product of L factors 1 + δ with |δ| ≤ u lies from 1, at most.

    The smaller of two bounds:

    - γ_L = L u / (1 − L u), which nothing exceeds: Higham, Accuracy and Stability of Numerical
      Algorithms (2002), Lemma 3.1; for inner products in any order Jeannerod and Rump, SIAM J.
      Matrix Anal. Appl. 34 (2013), have L u itself.
    - exp(λ √L u + L u² / (1 − u)) − 1: Higham and Mary, SIAM J. Sci. Comput. 41 (2019), Theorem
      2.4. Independent roundings of mean zero exceed it with a probability of at most
      2 exp(−λ² (1 − u)² / 2) a term: 2.6e-14 at λ = 8. It is the smaller one from L = 64.
    """
    never = length * unit / (1 - length * unit)
    hardly_ever = math.expm1(LAMBDA * math.sqrt(length) * unit + length * unit**2 / (1 - unit))
    return min(never, hardly_ever)


def half_ulp(at_most: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of one rounding to ``dtype`` of a number of at most this absolute value."""
    limits = torch.finfo(dtype)
    # at_most < 2^exponent, down to the smallest normal number, where the spacing stays the same.
    _, exponent = torch.frexp(at_most.clamp(min=limits.smallest_normal))
    return torch.ldexp(torch.full_like(at_most, limits.eps / 4), exponent)


def assert_within_bound(
    got: Mapping[str, Tensor], truth: Mapping[str, Tensor], allowed: Mapping[str, Tensor]
) -> None:
    """Every element of ``got`` within ``allowed`` and a rounding to its dtype of ``truth``."""
    for name, exact in truth.items():
        value = got[name]
        assert value.shape == exact.shape, f"{name}: {value.shape}, not {exact.shape}"
        if exact.numel() == 0:
            continue
        limit = allowed[name] + half_ulp(exact.abs() + allowed[name], value.dtype)
        error = (value.double() - exact).abs()
        worst = int((error / limit).nan_to_num(nan=math.inf).argmax())
        assert bool((error <= limit).all()), (
            f"{name}: element {worst} is off by {float(error.flatten()[worst]):.3e}, "
            f"{float(limit.flatten()[worst]):.3e} allowed"
        )


def assert_no_worse_than_eager(
    got: Sequence[Mapping[str, Tensor]],
    eager: Sequence[Mapping[str, Tensor]],
    truth: Sequence[Mapping[str, Tensor]],
) -> None:
    """rms(got − truth) ≤ 2 rms(eager − truth) for each name, pooled over the draws.

    Each draw's errors are taken relative to the norm of its exact result. The ratio of two root
    mean squares over n numbers of like size scatters by about 1/√n: 4 % at the 512 numbers that are
    asked for, so that a result as good as eager's crosses 2 by chance less than once in 10¹⁰⁰ runs
    and one 1.6 times as bad once in 10⁸. Over 1,000 seeds of every operation, dtype and backend of
    the tests the ratio nearest to 2 was 1.19 (``rms_ratios.py``, AMD EPYC Zen 3, AVX2).
    """
    for name in truth[0]:
        numbers = sum(draw[name].numel() for draw in truth)
        assert numbers >= NUMBERS, f"{name}: {numbers} numbers say nothing, {NUMBERS} needed"
        ours, theirs = rms(got, truth, name), rms(eager, truth, name)
        limit = WORSE_THAN_EAGER * theirs
        assert ours <= limit, f"{name}: rms error {ours:.3e}, eager's {theirs:.3e}"


def rms(
    results: Sequence[Mapping[str, Tensor]], truth: Sequence[Mapping[str, Tensor]], name: str
) -> float:
    """Root mean square over the draws of ‖result − exact‖ / ‖exact‖."""
    total = 0.0
    for result, draw in zip(results, truth, strict=True):
        exact = draw[name].double()
        total += float((result[name].double() - exact).norm() / (exact.norm() + 1e-300)) ** 2
    return math.sqrt(total / len(truth))


# --- the rules of each operation -----------------------------------------------------------------


def bounds(
    op: str, given: Mapping[str, Any], dy: Tensor, scaling: float, truth: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The error that each element of ``truth`` may have before the last rounding, in fp64.

    ``given`` holds the operands by the names of ``op``: those of a public function, or of the
    record where it is ``"low_rank"``. ``truth`` holds the exact results: ``y``, ``h`` and the
    gradients by the operand's name (``x``, ``bias``, …).
    """
    t = {name: v.double() for name, v in given.items() if isinstance(v, Tensor) and name != "index"}
    if given.get("index") is not None:
        t["index"] = given["index"].reshape(-1)
    n, k = t["weight"].shape
    t["x"], t["dy"] = t["x"].reshape(-1, k), dy.double().reshape(-1, n)
    size = {name: v.abs() for name, v in t.items()}
    base, base_dx = size["x"] @ size["weight"].T, size["dy"] @ size["weight"]
    if "bias" in size:
        base = base + size["bias"]
    rule = {"linear_add": _linear_add, "kron_linear": _kron}.get(op)
    rule = rule or partial(_low_rank, LOW_RANK_NAMES[op])
    found = rule(t, size, base, base_dx, abs(scaling), _Roundings(given["x"].dtype))
    found["bias"] = _Roundings(given["x"].dtype).summed(len(t["x"]) + 1) * size["dy"].sum(0)
    return {name: found[name].reshape(exact.shape) for name, exact in truth.items()}


class _Roundings:
    """What the roundings of one call may do, relative to the terms they fall on."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._wide = unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)
        self._half = unit_roundoff(dtype) if dtype in HALF else 0.0

    def summed(self, length: int) -> float:
        """A sum in the accumulator, L roundings long, against an exact value made in fp64."""
        return growth(length, self._wide) + growth(length, unit_roundoff(torch.float64))

    def stored(self, count: int) -> float:
        """So many intermediates kept in half precision; nothing in fp32 and fp64."""
        return growth(count, self._half)


Tensors = Mapping[str, Tensor]


def _linear_add(
    t: Tensors, size: Tensors, base: Tensor, base_dx: Tensor, scaling: float, e: _Roundings
) -> dict[str, Tensor]:
    n, k = t["weight"].shape
    return {
        "y": e.summed(k + 3) * (base + size["addend"].reshape(base.shape)),
        "x": e.summed(n + 1) * base_dx,
        "addend": torch.zeros_like(base),
    }


# What each function calls up, down and the gate.
LOW_RANK_NAMES = {
    "low_rank": ("up", "down", "gate"),
    "qr_linear": ("q", "r", "lam"),
    "lora_xs_linear": ("b", "a", "core"),
    "mixed_low_rank_linear": ("b", "a", "gates"),
}


def _low_rank(
    names: tuple[str, str, str],
    t: Tensors,
    size: Tensors,
    base: Tensor,
    base_dx: Tensor,
    scaling: float,
    e: _Roundings,
) -> dict[str, Tensor]:
    """h = x downᵀ or (x Wᵀ) up, y += s gate(h) upᵀ; g = dy up, dx += s gateᵀ(g) down, or upᵀ W.

    Factors count as far as the gate is wide, and a gate's gradient sums its own rows alone.
    """
    gate, index = t[names[2]], t.get("index")
    (n, k), m, r = t["weight"].shape, len(t["x"]), gate.shape[-1]
    core = gate.dim() == (2 if index is None else 3)
    through = r + 2 if core else 2  # the gate and the scaling
    up = t[names[0]][:, :r]
    if names[1] in t:
        down, size_down, inner = t[names[1]][:r], size[names[1]][:r], k
    else:  # each element of down a sum of its own
        down, size_down, inner = up.T @ t["weight"], up.T.abs() @ size["weight"], k + n
    of_rows = gate.abs() if index is None else gate.abs()[index]

    def gated(h: Tensor, turned: bool) -> Tensor:
        if not core:
            return scaling * h * of_rows
        cores = of_rows.mT if turned else of_rows
        return scaling * (h @ cores if index is None else (h[:, None] @ cores)[:, 0])

    def contracted(left: Tensor, right: Tensor) -> Tensor:
        if index is None:
            return scaling * (left.T @ right if core else (left * right).sum(0))
        terms = left[:, :, None] * right[:, None] if core else left * right
        return scaling * torch.zeros_like(gate).index_add_(0, index, terms)

    # h and g: the absolute terms, the exact value, and the error that it may have.
    terms_h, terms_g = size["x"] @ size_down.T, size["dy"] @ up.abs()
    h, g = (t["x"] @ down.T).abs(), (t["dy"] @ up).abs()
    error_h = e.summed(inner + 1) * terms_h + e.stored(1) * h
    error_g = e.summed(n + 1) * terms_g + e.stored(1) * g
    rows = m if index is None or m == 0 else int(index.bincount().max())

    # The update's sum goes on into the base's, which it lengthens.
    y = e.summed(k + inner + through + r + 3) * (base + gated(terms_h, False) @ up.abs().T)
    dx = e.summed(2 * n + through + r + 3) * (base_dx + gated(terms_g, True) @ size_down)
    return {
        "h": e.summed(inner + 1) * terms_h,
        "y": y + e.stored(3 + core) * gated(h, False) @ up.abs().T,
        "x": dx + e.stored(3 + core) * gated(g, True) @ size_down,
        names[2]: contracted(error_h, g + error_g)
        + contracted(h, error_g)
        + e.summed(rows + 4) * contracted(h, g),
    }


def _kron(
    t: Tensors, size: Tensors, base: Tensor, base_dx: Tensor, scaling: float, e: _Roundings
) -> dict[str, Tensor]:
    """S = X B, Y = A S; T = Aᵀ dY, dX = T Bᵀ; dA = s Σ dY Sᵀ, dB = s Σ Xᵀ T.

    Half precision stores the factors, as differences from the start, and the products with them:
    its roundings weigh on (A − A₀) X B + A₀ X (B − B₀), the accumulator's on A X B − A₀ X B₀.
    """
    (n, k), m, r = t["weight"].shape, len(t["x"]), t["a"].shape[1]
    tokens, grads = t["x"].reshape(m, r, k // r), t["dy"].reshape(m, n // r, r)
    tokens_size, grads_size = tokens.abs(), grads.abs()

    def applied(left: Tensor, s: Tensor) -> Tensor:
        return scaling * (left @ s).reshape(m, n)

    def turned(through: Tensor, right: Tensor) -> Tensor:
        return scaling * (through @ right.T).reshape(m, k)

    def inner_error(terms: Tensor, exactly: Tensor, length: int) -> Tensor:
        """Of S or T: the sum, a factor rounded to half precision before it, the result after."""
        return (e.summed(length + 2) + e.stored(1)) * terms + e.stored(1) * exactly

    pairs = [("a", "b"), ("a0", "b0")][: 2 if "a0" in t else 1]
    y = sum(applied(size[a], tokens_size @ size[b]) for a, b in pairs)
    dx = sum(turned(size[a].T @ grads_size, size[b]) for a, b in pairs)
    steps = [(t["a"], t["b"])]
    if "a0" in t:
        steps = [(t["a"] - t["a0"], t["b"]), (t["a0"], t["b"] - t["b0"])]
    stored, stored_dx = torch.zeros_like(y), torch.zeros_like(dx)
    for a, b in steps:
        left, right = a.abs(), b.abs()
        stored += e.stored(1) * applied(left, tokens_size @ right)
        stored += e.stored(4) * applied(left, (tokens @ b).abs())
        stored_dx += e.stored(1) * turned(left.T @ grads_size, right)
        stored_dx += e.stored(4) * turned((a.T @ grads).abs(), right)

    s, through = (tokens @ t["b"]).abs(), (t["a"].T @ grads).abs()
    error_s = inner_error(tokens_size @ size["b"], s, k // r)
    error_t = inner_error(size["a"].T @ grads_size, through, n // r)
    outer = e.summed(m * r + 3)
    da = torch.einsum("mnj,mij->ni", grads_size, error_s + outer * (s + error_s))
    db = torch.einsum("mik,mij->kj", tokens_size, error_t + outer * (through + error_t))
    inner = (n + k) // r + 2 * r + 6
    return {
        "y": e.summed(k + inner) * (base + y) + stored,
        "x": e.summed(n + inner) * (base_dx + dx) + stored_dx,
        "a": scaling * da,
        "b": scaling * db,
    }
