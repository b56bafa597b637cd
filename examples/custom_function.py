"""A kernel inside an ``autograd.Function`` of one's own: QR-LoRA with a gradient clip on λ.

``qrlora_kernels.kernels`` has the forward and backward steps without any autograd around them.
"""

from typing import Any

import torch
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.kernels import qr_linear_bwd, qr_linear_fwd


class ClippedQRLinear(torch.autograd.Function):
    """y = x Wᵀ + (x R̃ᵀ ∘ λ) Qᵀ on x [M, K], with ‖dλ‖ at most ``limit``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: qk.QRLinear, lam: Tensor, limit: float) -> Tensor:
        y, h = qr_linear_fwd(x, layer.weight, layer.bias, layer.q, layer.r, lam, 1.0, None)
        ctx.save_for_backward(layer.weight, layer.q, layer.r, lam, h)
        ctx.limit = limit
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_dx, _, need_dlam, _ = ctx.needs_input_grad
        dx, dlam = qr_linear_bwd(dy, *ctx.saved_tensors, 1.0, need_dx, need_dlam, None)
        if need_dlam:
            dlam = dlam * (ctx.limit / dlam.norm().clamp(min=ctx.limit))
        return dx if need_dx else None, None, dlam if need_dlam else None, None


def main() -> None:
    torch.manual_seed(0)
    layer = qk.QRLinear.from_linear(nn.Linear(96, 64), rank=8)
    x = torch.randn(32, 96, requires_grad=True)
    ClippedQRLinear.apply(x, layer, layer.lam, 0.5).square().sum().backward()
    clipped = layer.lam.grad.clone()
    layer.lam.grad = None
    layer(x).square().sum().backward()
    plain = layer.lam.grad
    print(f"gradient of λ: norm {plain.norm():.2f}, clipped to {clipped.norm():.2f}")
    torch.testing.assert_close(clipped, plain * (0.5 / plain.norm()))


if __name__ == "__main__":
    main()
