"""Is a variant right? Nothing gets a ratio before this says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A variant may be this many times as wrong as the plain expression in the same dtype: in norm, and
# in its worst element, which is a noisier figure.
NORM_FACTOR, WORST_FACTOR = 2.0, 4.0


@dataclass(frozen=True)
class Verdict:
    """``excess`` is the largest error over what is allowed; ``detail`` names where it is."""

    ok: bool
    excess: float
    detail: str


def judge(
    got: dict[str, Tensor],
    plain: dict[str, Tensor],
    expected: dict[str, Tensor],
    slack: float = 1.0,
) -> Verdict:
    """Compare y, dx and every gradient with fp64, allowing a multiple of the plain error.

    Parameters
    ----------
    got, plain : dict of Tensor
        Results of the variant and of the plain PyTorch expression in the same dtype.
    expected : dict of Tensor
        The same in fp64.
    slack : float
        Allow this many times more: a whole model amplifies the rounding of its first layers.
    """
    worst = Verdict(True, 0.0, "")
    for name, reference in expected.items():
        if name not in got:
            return Verdict(False, float("inf"), f"{name} is missing")
        if got[name].shape != reference.shape:
            shapes = f"{tuple(got[name].shape)} instead of {tuple(reference.shape)}"
            return Verdict(False, float("inf"), f"{name} has shape {shapes}")
        excess = _excess(got[name].double(), plain[name].double(), reference) / slack
        if not excess <= 1.0:
            return Verdict(False, excess, f"{name} is off by {excess:.3g} of what is allowed")
        if excess > worst.excess:
            worst = Verdict(True, excess, name)
    return worst


def _excess(got: Tensor, plain: Tensor, reference: Tensor) -> float:
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    if reference.numel() == 0:
        return 0.0
    error, allowed = (got - reference).abs(), (plain - reference).abs()
    # Where the plain expression happens to be exact, rounding in fp32 must still pass.
    norm = NORM_FACTOR * allowed.norm() + 2e-6 * reference.norm()
    top = WORST_FACTOR * allowed.max() + 4e-6 * reference.abs().max()
    tiny = torch.finfo(torch.float64).tiny
    return max(float(error.norm() / (norm + tiny)), float(error.max() / (top + tiny)))
