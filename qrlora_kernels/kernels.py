"""The forward and backward steps themselves, for an ``autograd.Function`` or engine of your own.

No argument is checked, no autocast applied, nothing recorded for autograd; the chooser picks the
backend unless the last argument, ``backend``, names one. All of them run under ``torch.compile`` as
one operator::

    y, h = qr_linear_fwd(x, weight, bias, q, r, lam, scaling, backend)
    dx, dlam = qr_linear_bwd(dy, weight, q, r, lam, h, scaling, need_dx, need_dlam, backend)

    y, h = lora_xs_linear_fwd(x, weight, bias, a, b, core, scaling, backend)
    dx, dcore = lora_xs_linear_bwd(
        dy, weight, a, b, core, h, scaling, need_dx, need_dcore, backend)

    y = kron_linear_fwd(x, weight, bias, a, b, a0, b0, scaling, backend)
    dx, da, db = kron_linear_bwd(
        dy, x, weight, a, b, a0, b0, scaling, need_dx, need_da, need_db, backend)

    y = linear_add_fwd(x, weight, bias, addend, backend)

Shapes are those of ``qrlora_kernels.reference``: x [M, K], dy and y [M, N], h [M, r]; bias, a0 with
b0, and backend may be None. Any strides and any alignment are right; rows that are contiguous and,
on CUDA, 16-byte aligned are fast. fp16, bf16, fp32 and fp64, one dtype for x, weight, bias and
frozen factors; trainables may be fp32 over half precision, and their gradients come in their own
dtype. A gradient not asked for comes as an empty tensor. h has x's dtype.
"""

from .ops.kron_linear import kron_linear_bwd, kron_linear_fwd
from .ops.linear_add import linear_add_fwd
from .ops.lora_xs_linear import lora_xs_linear_bwd, lora_xs_linear_fwd
from .ops.qr_linear import qr_linear_bwd, qr_linear_fwd

__all__ = [
    "kron_linear_bwd",
    "kron_linear_fwd",
    "linear_add_fwd",
    "lora_xs_linear_bwd",
    "lora_xs_linear_fwd",
    "qr_linear_bwd",
    "qr_linear_fwd",
]
