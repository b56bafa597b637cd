"""The adapters composed of library products (oneDNN, MKL, cuBLAS), with no pass over y or dx added.

The update is computed first and the base product accumulates onto it in place: the sum meets the
fp32 accumulator of the product and is rounded once, so an update far below the resolution of a
half-precision ``y`` survives. The other order, ``base.addmm_(h, q.T)``, would round ``y`` before
the update is added and lose nearly all of it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import accumulation_dtype
from .problem import Problem

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)


def available() -> tuple[bool, str]:
    return True, "library products of PyTorch"


def supports(problem: Problem) -> tuple[bool, str]:
    if problem.dtype not in DTYPES:
        return False, f"library products of {problem.dtype} are not used"
    return True, "library products, the base accumulated onto the update"


# --- QR-LoRA ------------------------------------------------------------------------------------


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
    h = F.linear(x, r)
    return accumulate_base(_scale_columns(h, lam, scaling), q, x, weight, bias), h


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
    if not (need_dx or need_dlam):
        return None, None
    g = torch.mm(dy, q)
    dx = torch.mm(_scale_columns(g, lam, scaling), r).addmm_(dy, weight) if need_dx else None
    dlam = times(scaling, _column_dots(h, g)).to(lam.dtype) if need_dlam else None
    return dx, dlam


# --- LoRA-XS ------------------------------------------------------------------------------------


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
    h = F.linear(x, a)
    return accumulate_base(torch.mm(h, times(scaling, core).to(x.dtype)), b, x, weight, bias), h


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
    if not (need_dx or need_dcore):
        return None, None
    g = torch.mm(dy, b)
    dx = dcore = None
    if need_dx:
        dx = torch.mm(F.linear(g, times(scaling, core).to(g.dtype)), a).addmm_(dy, weight)
    if need_dcore:
        dcore = times(scaling, _gram(h, g)).to(core.dtype)
    return dx, dcore


# --- Kronecker ----------------------------------------------------------------------------------


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
    """y = x Wᵀ + b + s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) x on x [M, K].

    The difference is taken as (A − A₀) X B + A₀ X (B − B₀): each term is as small as the update
    itself, so that rounding S = X B to half precision costs the update no more than its last bits.
    """
    (n, r), k = a.shape, b.shape[0]
    m = x.shape[0]
    left, right = kron_terms(a, b, a0, b0, scaling, x.dtype)
    tokens = x.reshape(m, r, k)
    update = _kron_of_few_rows if n < r else _kron_update
    return add_base(update(tokens, left, right).reshape(m, n * r), x, weight, bias)


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
    (n, r), k = a.shape, b.shape[0]
    m = x.shape[0]
    tokens, grads = x.reshape(m, r, k), dy.reshape(m, n, r)
    dx = da = db = None
    if need_da:
        s = torch.mm(tokens.reshape(m * r, k), b.to(x.dtype)).view(m, r, r)
        # Σ_m dY Sᵀ as one product over the tokens and columns together: [n, m r] [m r, r].
        da = _gram(grads.transpose(1, 2).reshape(m * r, n), s.transpose(1, 2).reshape(m * r, r))
        da = times(scaling, da).to(a.dtype)
    if need_db:
        t = torch.bmm(a.mT.to(x.dtype).expand(m, r, n), grads)
        db = times(scaling, _gram(tokens.reshape(m * r, k), t.view(m * r, r))).to(b.dtype)
    if need_dx:
        left, right = kron_terms(a, b, a0, b0, scaling, x.dtype)
        update = x.new_empty(m * r, k)
        for i, (la, rb) in enumerate(zip(left, right, strict=True)):
            t = torch.bmm(la.mT.expand(m, r, n), grads).view(m * r, r)
            torch.mm(t, rb.mT, out=update) if i == 0 else update.addmm_(t, rb.mT)
        dx = update.view(m, r * k).addmm_(dy, weight)
    return dx, da, db


def kron_terms(
    a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None, scaling: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Factors (L_i, R_i) with s (A ⊗ Bᵀ − A₀ ⊗ B₀ᵀ) = Σ_i L_i ⊗ R_iᵀ, s in the smaller ones."""
    wide = accumulation_dtype(dtype)
    a, b = a.to(wide), b.to(wide)
    if a0 is None or b0 is None:
        return (times(scaling, a).to(dtype),), (b.to(dtype),)
    left = times(scaling, a - a0).to(dtype), a0.to(dtype)
    return left, (b.to(dtype), times(scaling, b - b0).to(dtype))


Factors = tuple[Tensor, ...]


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


def linear_add_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """y = x Wᵀ + b + addend on x [M, K], addend [M, N]."""
    if bias is not None and _on_half_cpu(x):
        return _bias_in_one_rounding(x, weight, bias, addend)
    y = torch.addmm(addend, x, weight.mT)
    return y if bias is None else y.add_(bias)


# --- shared steps -------------------------------------------------------------------------------


def accumulate_base(
    mid: Tensor, up: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``mid upᵀ + x Wᵀ + b``, the update ``mid upᵀ`` first."""
    if bias is not None and x.dtype not in HALF:
        return F.linear(mid, up, bias).addmm_(x, weight.mT)
    return add_base(torch.mm(mid, up.mT), x, weight, bias)


def add_base(update: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b accumulated onto ``update`` [M, N], in place where the library can."""
    if bias is None:
        return update.addmm_(x, weight.mT)
    if _on_half_cpu(x):
        return _bias_in_one_rounding(x, weight, bias, update)
    # One pass more, and in half precision one rounding (on CUDA alone); the bias comes last and so
    # cannot drown the update.
    return update.addmm_(x, weight.mT).add_(bias)


def _on_half_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in HALF


def _bias_in_one_rounding(x: Tensor, weight: Tensor, bias: Tensor, addend: Tensor) -> Tensor:
    """x Wᵀ + b + addend in half precision on the CPU."""
    if 0 not in x.shape and _onednn_runs(x.dtype):
        return _linear_bias_add(x, weight, bias, addend)
    # A CPU without half-precision products: PyTorch's own add the bias to a rounded y. In fp32 the
    # sum is rounded once, and from 4 tokens on the product is the faster one too.
    y = torch.addmm(addend.float(), x.float(), weight.float().mT)
    return y.add_(bias).to(x.dtype)


def _linear_bias_add(x: Tensor, weight: Tensor, bias: Tensor, addend: Tensor) -> Tensor:
    # oneDNN takes the bias as N elements from its address on, whatever its stride; the other three
    # operands it reorders itself.
    dense = bias.contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, addend, weight, dense, "add")
    return y


@functools.cache
def _onednn_runs(dtype: torch.dtype) -> bool:
    """Whether oneDNN's linear with a bias and an added tensor runs for ``dtype`` on this CPU."""
    one = torch.ones(32, 32, dtype=dtype, device="cpu")
    try:
        y = _linear_bias_add(one, one, one[0], one)
    except (AttributeError, RuntimeError):
        return False
    return bool((y == 34).all())


def times(scaling: float, t: Tensor) -> Tensor:
    """s t, without an operation where s = 1: with few tokens each operation counts."""
    return t if scaling == 1 else scaling * t


def _scale_columns(h: Tensor, lam: Tensor, scaling: float) -> Tensor:
    """s (h ∘ λ) in h's dtype, multiplied in λ's."""
    scaled = h * times(scaling, lam)
    return scaled if scaled.dtype == h.dtype else scaled.to(h.dtype)


def _column_dots(h: Tensor, g: Tensor) -> Tensor:
    """Σ_m h ∘ g [r] with products and sum in fp32 (fp64 for fp64)."""
    wide = accumulation_dtype(h.dtype)
    return (h.to(wide) * g).sum(0)


def _gram(u: Tensor, v: Tensor) -> Tensor:
    """uᵀ v with fp32 accumulation and an fp32 result (fp64 for fp64)."""
    if u.is_cuda and u.dtype in HALF:
        return torch.mm(u.mT, v, out_dtype=torch.float32)
    wide = accumulation_dtype(u.dtype)
    return torch.mm(u.to(wide).mT, v.to(wide))
