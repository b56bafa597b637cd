"""The plain PyTorch mathematics as a backend: always there, accumulates in fp32, never fast."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..dispatch.problem import Problem, Recipe
from ..operands import Kron, KronGradient, LinearAdd, LowRank, LowRankGradient

RECIPE = Recipe("reference", "plain", "runs every shape and dtype")


def available() -> tuple[bool, str]:
    return True, "plain PyTorch"


def supports(problem: Problem) -> list[Recipe] | str:
    """Its one recipe, for every problem."""
    return [RECIPE]


def low_rank_fwd(p: LowRank, recipe: str) -> tuple[Tensor, Tensor]:
    return reference.low_rank_fwd_ref(p)


def low_rank_bwd(p: LowRankGradient, recipe: str) -> tuple[Tensor | None, Tensor | None]:
    return reference.low_rank_bwd_ref(p)


def kron_fwd(p: Kron, recipe: str) -> Tensor:
    return reference.kron_ref(p)


def kron_bwd(p: KronGradient, recipe: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return reference.kron_bwd_ref(p)


def linear_add_fwd(p: LinearAdd, recipe: str) -> Tensor:
    return reference.linear_add_ref(p)
