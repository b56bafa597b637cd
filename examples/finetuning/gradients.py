"""The mean gradient of the loss at the pretrained weights, for a basis that follows from it."""

from __future__ import annotations

from torch import nn

from .settings import Settings
from .targets import target_names
from .training import Encoded, loss_of, predict_batch

ROWS = 64


def accumulate(encoder: nn.Module, model: nn.Module, data: Encoded, settings: Settings) -> None:
    """Leave the mean gradient of the first rows in ``weight.grad`` of the layers to adapt.

    ``encoder`` is the part of ``model`` that is adapted; which parameters train stays as it was.
    """
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for name in target_names(encoder, settings.targets, settings.layers):
        encoder.get_submodule(name).weight.requires_grad_(True)
    model.eval()
    rows = list(range(min(ROWS, len(data.targets))))
    targets = data.targets.to(settings.device)
    loss_of(predict_batch(model, data, rows, settings), targets, rows).backward()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[name])
