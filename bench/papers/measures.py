"""What is measured on a trained model beside its score, by the name that a cell asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from finetuning import adapters, run
from finetuning.adapters import ENCODER
from finetuning.data import read_tsv
from finetuning.methods import METHODS
from finetuning.settings import Settings
from finetuning.targets import target_names
from torch import Tensor, nn

import qrlora_kernels as qk
from qrlora_kernels.linalg import effective_rank

RETAINED = (4, 16, 64)  # ranks of the subspaces
FIRST = 10  # the first of so many parts of the directions


def ordering(settings: Settings) -> dict[str, float]:
    """Means over QR-LoRA layers of the share that the first tenth of the directions holds."""
    layers = qk.adapted_layers(trained_model(settings)).values()
    shares: dict[str, list[float]] = {"learned": [], "lam": [], "spectrum": []}
    for layer in layers:
        lam, spectrum = layer.lam.detach().double() ** 2, layer.diagonal.double() ** 2
        for name, weights in (("learned", lam * spectrum), ("lam", lam), ("spectrum", spectrum)):
            shares[name].append(_first_share(weights))
    return {name: sum(values) / len(values) for name, values in shares.items()}


def _first_share(weights: Tensor) -> float:
    """The share of the first tenth; the direction that the tenth ends in counts in part."""
    tenth = len(weights) / FIRST
    whole = int(tenth)
    part = weights[:whole].sum() + (tenth - whole) * weights[whole : whole + 1].sum()
    return float(part / weights.sum())


def effective_ranks(settings: Settings) -> dict[str, float]:
    return {name: effective_rank(update) for name, _, update in updates(settings)}


def retention(settings: Settings) -> dict[str, dict[str, float]]:
    """Of each layer, how much of three matrices lies in the top subspaces of its weight."""
    found = {}
    for name, weight, update in updates(settings):
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        found[name] = {
            f"{what} {rank}": retained(matrix, u[:, :rank], vh[:rank])
            for rank in RETAINED
            if rank <= len(vh)
            for what, matrix in (("tuned", weight + update), ("update", update))
        }
        # Of a matrix of independent entries of one variance, in expectation.
        found[name] |= {
            f"random {rank}": rank**2 / weight.numel() for rank in RETAINED if rank <= len(vh)
        }
    return found


def retained(matrix: Tensor, u: Tensor, vh: Tensor) -> float:
    """‖UUᵀ M VVᵀ‖² / ‖M‖² for orthonormal u [N, r] and vh [r, K]; 0 for a zero matrix."""
    whole = float(matrix.square().sum())
    return float((u.mT @ matrix @ vh.mT).square().sum()) / whole if whole else 0.0


def updates(settings: Settings) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight before and its update, [N, K] in fp64, of each target of a finished run."""
    tuned = trained_model(settings).get_submodule(ENCODER)
    base = _base(settings).get_submodule(ENCODER)
    if METHODS[settings.adapter].provider == "peft":
        tuned = tuned.get_base_model()
    for name in target_names(base, settings.targets, settings.layers):
        before = base.get_submodule(name).weight.detach().double()
        yield name, before, _tuned_weight(tuned.get_submodule(name)) - before


@torch.no_grad()
def _tuned_weight(layer: Any) -> Tensor:
    if isinstance(layer, nn.Linear) and not hasattr(layer, "delta_weight"):
        return layer.weight.double()
    if hasattr(layer, "delta_weight"):  # of the package
        return layer.matrix().double() + layer.delta_weight().double()
    weight: Tensor = layer.get_base_layer().weight.double()  # of PEFT
    return weight + layer.get_delta_weight("default").double()


def trained_model(settings: Settings) -> nn.Module:
    """The base with what the run saved loaded into it."""
    return adapters.load(_base(settings), settings)


def _base(settings: Settings) -> nn.Module:
    data = read_tsv(settings.train_file, settings.eval_file)
    train_set, _ = run.encoded(data, settings)
    return run.base_model(data, train_set, settings)


MEASURES: dict[str, Callable[[Settings], Any]] = {
    "ordering": ordering,
    "effective_rank": effective_ranks,
    "retention": retention,
}
