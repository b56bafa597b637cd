"""A small model over tokens with two adapted layers and a head, and adapters to put over it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qrlora_kernels as qk

WIDTH, TOKENS, CLASSES = 16, 5, 3
KINDS = {
    "qr": {"rank": 6},
    "lora_xs": {"rank": 4, "init_std": 0.1},
    "ohora": {"rank": 4},
}
RATES = {"lr": 0.02, "weight_decay": 0.1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(self.first(x)))
        return self.head(torch.tanh(hidden).mean(1))


def model(kind: str = "qr", head: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Always the same base."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    return qk.adapt(
        net, ["first", "second"], kind, trainable=["head"] if head else [], **KINDS[kind]
    )


def state(net: nn.Module, seed: int) -> dict[str, Tensor]:
    """An adapter away from the start."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    noise = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in trained.items()
    }
    return {name: (p + 0.3 * noise[name]).detach() for name, p in trained.items()}


def put(net: nn.Module, numbers: dict[str, Tensor]) -> nn.Module:
    """Give the model itself these numbers."""
    with torch.no_grad():
        for name, tensor in numbers.items():
            net.get_parameter(name).copy_(tensor)
    return net


def batch(rows: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, TOKENS, WIDTH, generator=generator, dtype=dtype)


# --- training


def alone(kind, state, steps, head, dtype=torch.float64):
    """The numbers after ``steps`` of (x, labels) by PyTorch's AdamW."""
    net = put(model(kind, head, dtype), state)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], **RATES)
    for x, labels in steps:
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}


def data(rows, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return batch(rows, dtype, seed), torch.randint(CLASSES, (rows,), generator=generator)


def step(net, bank, optimizer, names, x, labels):
    optimizer.zero_grad()
    with bank.use(names) as batch:
        losses = F.cross_entropy(net(x), labels, reduction="none")
        batch.mean(losses).backward()
    optimizer.step()
