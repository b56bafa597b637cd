"""A small model that accelerate keeps elsewhere in four ways, adapted and trained by a step."""

from __future__ import annotations

from typing import Any

import accelerate
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.utils.checkpoint import checkpoint

import qrlora_kernels as qk

ADAPTERS: dict[str, dict[str, Any]] = {"qr": {"rank": 4}, "lora_xs": {"rank": 4}, "ohora": {}}
TARGETS = ["up", "down"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.checkpoints = False

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.block, x, use_reentrant=False) if self.checkpoints else self.block(x)
        return self.head(h)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def x() -> torch.Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def offloaded(how: str, folder: Any, model: Net | None = None) -> Net:
    model = net() if model is None else model
    if how == "cpu":
        return accelerate.cpu_offload(model)
    if how == "disk":
        return accelerate.disk_offload(model, str(folder / "weights"))
    if how == "dispatched":
        places = {"up": "cpu", "down": "disk", "head": "cpu"}
        return accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(folder / "weights")
        )
    for layer in (model.up, model.down):
        add_hook_to_module(layer, ModelHook())
    return accelerate.cpu_offload(model)  # behind the hooks that are there: in a sequence


HOW = ("cpu", "disk", "dispatched", "sequence")


def adapted(model: Net, adapter: str = "qr", trainable: Any = "head.bias") -> Net:
    torch.manual_seed(2)
    return qk.adapt(
        model, TARGETS, adapter, trainable=trainable, progress=False, **ADAPTERS[adapter]
    )


def step(model: Net) -> list[torch.Tensor]:
    """One step of training; what the optimizer's own parameters are then."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.5)
    before = [p.detach().clone() for p in own]
    model.train()
    model(x()).square().sum().backward()
    optimizer.step()
    model.eval()
    for p, was in zip(own, before, strict=True):
        assert p.grad is not None
        assert torch.equal(p, was) == (not p.grad.any())  # OHoRA may start with a factor of zeros
    assert all(any(p is q for q in model.parameters()) for p in own)
    return [p.detach().clone() for p in own]
