"""The adapters composed of library products, with no pass over y or dx added.

A recipe is the way in which the base product meets the update (``products.bases``), or one product
by W + ΔW: ``EFFECTIVE`` makes it anew in each step, ``KEPT`` hands the forward's to the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.problem import ELSEWHERE, LIBRARY_PRODUCTS, Problem, Recipe
from ..operands import (
    Kron,
    KronGradient,
    LinearAdd,
    LowRank,
    LowRankGradient,
    as_wide_as_the_gate,
)
from ..panels import least_for_one
from ..reference import HALF, accumulation_dtype, hidden_dtype
from .gates import back_through_gate, effective_weight, gate_gradient, through_gate
from .products import (
    ADDMM,
    FP32,
    bases,
    by_panels,
    gram,
    into_fp32,
    onto,
    out_of_fp32,
    through,
    times,
)

_MANY = least_for_one()
EFFECTIVE, KEPT = "effective weight", "effective weight, kept"
DTYPES = (torch.float32, torch.float64, *HALF)


def available() -> tuple[bool, str]:
    return True, "library products of PyTorch"


def supports(problem: Problem) -> list[Recipe] | str:
    """The recipes that run ``problem``, best first, or why there is none."""
    if problem.dtype not in DTYPES:
        return f"library products of {problem.dtype} are not used"
    if problem.form == "output":
        if problem.dtype in HALF:
            return "the output form needs a kernel that keeps x Wᵀ in fp32 until h is made"
        return [Recipe("composed", ADDMM, "library products, the update onto the base's")]
    reason = "library products, the base accumulated onto the update"
    code = LIBRARY_PRODUCTS if problem.op == "low_rank" else ELSEWHERE
    recipes = [Recipe("composed", how, reason, code) for how in bases(problem)]
    if _has_effective(problem):
        recipes.insert(0, Recipe("composed", EFFECTIVE, "one product by W + ΔW, made anew", code))
        if problem.step == "fwd":
            reason = "one product by W + ΔW, for the backward too"
            recipes.insert(0, Recipe("composed", KEPT, reason, code))
    return recipes


def _has_effective(problem: Problem) -> bool:
    """Not in half precision, where W + ΔW would lose a small update, nor where rows differ."""
    return (
        problem.op == "low_rank"
        and problem.gate in ("vector", "core")
        and problem.device.type == "cpu"
        and problem.dtype not in HALF
        and problem.needs[:1] != (False,)  # a backward without dx
    )


# --- low rank -----------------------------------------------------------------------------------


def low_rank_fwd(p: LowRank, recipe: str) -> tuple[Tensor, ...]:
    """y [M, N] and h [M, r]; by ``KEPT`` W + ΔW [N, K] after them."""
    dtype = p.x.dtype
    if recipe == FP32:
        p = _in_fp32(p)
    if p.up.shape[1] != p.gate.shape[-1]:
        p = as_wide_as_the_gate(p)
    if p.down is None:
        return _output_form(p)
    fp16 = p.x.dtype == torch.float16
    if recipe in (EFFECTIVE, KEPT):
        product = by_panels if p.x.shape[0] >= _MANY else F.linear
        effective = effective_weight(p)
        results = product(p.x, effective, p.bias), product(p.x, p.down)
        return results if recipe == EFFECTIVE else (*results, effective)
    h = into_fp32(p.x, p.down.mT) if fp16 else F.linear(p.x, p.down)
    mid = through_gate(h, p.gate, p.index, p.scaling)
    y = through(recipe, mid, p.up, p.x, p.weight, p.bias)
    return (y.to(dtype), h.to(hidden_dtype(dtype))) if recipe == FP32 else (y, h)


def low_rank_bwd(p: LowRankGradient, recipe: str) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and the gate's gradient; by ``KEPT`` ``p.weight`` is the forward's W + ΔW."""
    if not (p.need_dx or p.need_dgate):
        return None, None
    dtype, of_gate = p.dy.dtype, p.gate.dtype
    if recipe == FP32:
        p = _gradient_in_fp32(p)
    if p.up.shape[1] != p.gate.shape[-1]:
        p = as_wide_as_the_gate(p)
    fp16 = p.dy.dtype == torch.float16
    dx = dgate = None
    if recipe in (EFFECTIVE, KEPT):
        product = by_panels if p.dy.shape[0] >= _MANY else F.linear
        g = product(p.dy, p.up.mT)
        if p.need_dx:
            effective = effective_weight(p) if recipe == EFFECTIVE else p.weight
            dx = product(p.dy, effective.mT)
    else:
        g = into_fp32(p.dy, p.up) if fp16 else torch.mm(p.dy, p.up)
    if p.need_dx and dx is None:
        mid = back_through_gate(g, p.gate, p.index, p.scaling)
        if p.down is None:
            dx = torch.addmm(p.dy, mid, p.up.mT) @ p.weight
        else:
            update = out_of_fp32(mid, p.down) if fp16 else torch.mm(mid, p.down)
            dx = update.addmm_(p.dy, p.weight)
    if p.need_dgate:
        dgate = times(p.scaling, gate_gradient(p, g)).to(of_gate)
    if dx is not None and recipe == FP32:
        dx = dx.to(dtype)
    return dx, dgate


def _in_fp32(p: LowRank) -> LowRank:
    """The operands as they are multiplied where the library has no products of halves."""
    x, weight, bias, up, down, gate, index, scaling = p
    bias, down = (None if t is None else t.float() for t in (bias, down))
    return LowRank(x.float(), weight.float(), bias, up.float(), down, gate.float(), index, scaling)


def _gradient_in_fp32(p: LowRankGradient) -> LowRankGradient:
    dy, weight, up, down, gate, index, h, scaling, need_dx, need_dgate = p
    down = None if down is None else down.float()
    wide = dy.float(), weight.float(), up.float(), down, gate.float(), index, h.float()
    return LowRankGradient(*wide, scaling, need_dx, need_dgate)


def _output_form(p: LowRank) -> tuple[Tensor, Tensor]:
    y = torch.mm(p.x, p.weight.mT)
    h = torch.mm(y, p.up)
    y.addmm_(through_gate(h, p.gate, p.index, p.scaling), p.up.mT)
    return y if p.bias is None else y.add_(p.bias), h


# --- Kronecker ----------------------------------------------------------------------------------


def kron_fwd(p: Kron, recipe: str) -> Tensor:
    """y [M, N].

    The difference is taken as (A − A₀) X B + A₀ X (B − B₀): each term is as small as the update
    itself, so that rounding S = X B to half precision costs the update no more than its last bits.
    """
    (n, r), k = p.a.shape, p.b.shape[0]
    m = p.x.shape[0]
    dtype = _kron_dtype(p.x)
    left, right = kron_terms(p, dtype)
    tokens = p.x.to(dtype).reshape(m, r, k)
    update = (_kron_of_few_rows if n < r else _kron_update)(tokens, left, right)
    return onto(recipe, update.reshape(m, n * r).to(p.x.dtype), p.x, p.weight, p.bias)


def kron_bwd(p: KronGradient, recipe: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Per token S = X B, T = Aᵀ dY;  dA = s Σ dY Sᵀ;  dB = s Σ Xᵀ T;  dX = s (T Bᵀ − T₀ B₀ᵀ)."""
    a, b, dtype = p.a, p.b, _kron_dtype(p.x)
    (n, r), k = a.shape, b.shape[0]
    m = p.x.shape[0]
    tokens, grads = p.x.to(dtype).reshape(m, r, k), p.dy.to(dtype).reshape(m, n, r)
    dx = da = db = None
    if p.need_da:
        s = torch.mm(tokens.reshape(m * r, k), b.to(dtype)).view(m, r, r)
        # Σ_m dY Sᵀ as one product over the tokens and columns together: [n, m r] [m r, r].
        da = gram(grads.transpose(1, 2).reshape(m * r, n), s.transpose(1, 2).reshape(m * r, r))
        da = times(p.scaling, da).to(a.dtype)
    if p.need_db:
        t = torch.bmm(a.mT.to(dtype).expand(m, r, n), grads)
        db = times(p.scaling, gram(tokens.reshape(m * r, k), t.view(m * r, r))).to(b.dtype)
    if p.need_dx:
        left, right = kron_terms(p, dtype)
        update = tokens.new_empty(m * r, k)
        for i, (la, rb) in enumerate(zip(left, right, strict=True)):
            t = torch.bmm(la.mT.expand(m, r, n), grads).view(m * r, r)
            torch.mm(t, rb.mT, out=update) if i == 0 else update.addmm_(t, rb.mT)
        dx = onto(recipe, update.view(m, r * k).to(p.x.dtype), p.dy, p.weight.mT, None)
    return dx, da, db


def _kron_dtype(x: Tensor) -> torch.dtype:
    """Of S and T, which may leave fp16's range where y does not; a CPU is no slower in fp32."""
    return torch.float32 if x.dtype == torch.float16 and not x.is_cuda else x.dtype


Factors = tuple[Tensor, ...]


def kron_terms(p: Kron | KronGradient, dtype: torch.dtype) -> tuple[Factors, Factors]:
    """Factors (L_i, R_i) with s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) = Σ_i L_i ⊗ R_iᵀ, s in the smaller ones."""
    wide = accumulation_dtype(dtype)
    a, b = p.a.to(wide), p.b.to(wide)
    if p.a0 is None or p.b0 is None:
        return (times(p.scaling, a).to(dtype),), (b.to(dtype),)
    left = times(p.scaling, a - p.a0).to(dtype), p.a0.to(dtype)
    return left, (b.to(dtype), times(p.scaling, b - p.b0).to(dtype))


def _kron_update(tokens: Tensor, left: Factors, right: Factors) -> Tensor:
    """Σ_i L_i (X R_i) [M, N/r, r] on X [M, r, K/r]."""
    (m, r, k), n = tokens.shape, left[0].shape[0]
    update = tokens.new_empty(m, n, r)
    for i, (la, rb) in enumerate(zip(left, right, strict=True)):
        s = torch.mm(tokens.reshape(m * r, k), rb).view(m, r, r)
        lefts = la.expand(m, n, r)
        torch.bmm(lefts, s, out=update) if i == 0 else torch.baddbmm(update, lefts, s, out=update)
    return update


def _kron_of_few_rows(tokens: Tensor, left: Factors, right: Factors) -> Tensor:
    """The same where L has fewer rows than columns, through Sᵀ = Rᵀ Xᵀ.

    A batched product of few rows adds its r terms up in one chain, which loses 1.7 times as much as
    the eager expression (r = 150, one row, fp32). With the rows as columns of one large product the
    library takes dot products of several partial sums, as it does for eager.
    """
    (m, r, k), n = tokens.shape, left[0].shape[0]
    turned = tokens.new_empty(m * r, n)
    for i, (la, rb) in enumerate(zip(left, right, strict=True)):
        s = torch.bmm(rb.mT.expand(m, r, k), tokens.mT).view(m * r, r)
        torch.mm(s, la.mT, out=turned) if i == 0 else turned.addmm_(s, la.mT)
    return turned.view(m, r, n).mT


# --- a given update -----------------------------------------------------------------------------


def linear_add_fwd(p: LinearAdd, recipe: str) -> Tensor:
    """y [M, N] = x Wᵀ + b + addend."""
    if recipe != ADDMM:
        return onto(recipe, p.addend, p.x, p.weight, p.bias)
    y = torch.addmm(p.addend, p.x, p.weight.mT)
    return y if p.bias is None else y.add_(p.bias)
