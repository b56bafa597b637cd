"""Another adapter on these kernels: VeRA (arXiv 2310.11454), W + diag(b) B diag(d) A.

A [r, K] and B [N, r] are random, frozen and shared by all layers; b [N] and d [r] train. The update
is small products; ``linear_add`` joins it to the base product in one rounding, so that it survives
in half precision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrlora_kernels.functional import linear_add


class VeRALinear(nn.Module):
    """x [..., K] -> y [..., N] over a frozen ``linear``, with factors a [r, K] and b [N, r]."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.scale_in = nn.Parameter(torch.full((a.shape[0],), 0.1))
        self.scale_out = nn.Parameter(torch.zeros(b.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.a) * self.scale_in.to(x.dtype)
        update = F.linear(h, self.b) * self.scale_out.to(x.dtype)
        return linear_add(x, self.weight, self.bias, update)


def main() -> None:
    torch.manual_seed(0)
    base = nn.Linear(256, 128).requires_grad_(False)
    a, b = torch.randn(32, 256) / 16, torch.randn(128, 32) / 6
    layer = VeRALinear(base, a, b)
    x = torch.randn(4096, 256)
    target = base(x) + 0.1 * torch.randn(128) * F.linear(F.linear(x, a), b)
    optimiser = torch.optim.Adam([layer.scale_in, layer.scale_out], lr=0.05)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(f"VeRA with {32 + 128} numbers: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    if not losses[-1] < 0.5 * losses[0]:
        raise SystemExit("training did not lower the loss")


if __name__ == "__main__":
    main()
