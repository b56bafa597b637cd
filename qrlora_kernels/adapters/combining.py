"""Sums of low-rank adapters that begin alike, and the same adapter at another rank.

Such adapters differ in their gate alone: ΔW is linear in it. The gate of a smaller rank is that of
a larger one with zeros behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .adapter import AnyAdapter, Own, State, Tensors
from .lora_xs import LoRAXSOptions
from .low_rank import LowRank

AnyLowRank = type[LowRank[Any]]
NO_SUM = "adapters of OHoRA cannot be combined: a sum of Kronecker products is none"
NO_ORDER = "OHoRA has no other rank over the same start: its factors have no order"


def require_low_rank(adapter: AnyAdapter, refusal: str) -> AnyLowRank:
    """``adapter``, or a ValueError that says ``refusal``."""
    if not issubclass(adapter, LowRank):
        raise ValueError(refusal)
    return adapter


def weighted_sum(gates: Sequence[Tensor], weights: Sequence[float], rank: int) -> Tensor:
    """Σ wᵢ gateᵢ at ``rank``, summed in fp64 and rounded once, to the widest dtype of the gates."""
    parts = zip(gates, weights, strict=True)
    wide = [weight * resized(gate.detach().cpu().double(), rank) for gate, weight in parts]
    dtype = reduce(torch.promote_types, (gate.dtype for gate in gates))
    return torch.stack(wide).sum(0).to(dtype).to(gates[0].device)


def resized(gate: Tensor, rank: int) -> Tensor:
    """Its first ``rank`` directions, or all of them and zeros."""
    return pad(gate, (0, rank - len(gate)) * gate.dim())


def first_directions(adapter: AnyLowRank, factors: Tensors, rank: int) -> State:
    """The first ``rank`` directions of each of ``factors``, in memory of their own."""
    kept = {n: t[:, :rank] if n == adapter.up else t[:rank] for n, t in factors.items()}
    return {n: t.clone(memory_format=torch.contiguous_format) for n, t in kept.items()}


def begin_alike(
    adapter: AnyLowRank, one: Tensors, other: Tensors, rank: int, rebuilt: bool
) -> bool:
    """Whether two adapters over the same weight have the same first ``rank`` directions.

    Factors that are ``rebuilt`` from the weight are the same where their integers are, the pivots:
    floats of another search differ in their last bits. Others must have the same bits.
    """
    if rebuilt:
        names = [name for name in adapter.rebuilt_from if not one[name].is_floating_point()]
    else:
        known = [name for name in adapter.operands if name in adapter.factors]
        names = [name for name in known if name in one]
        if names != [name for name in known if name in other]:
            return False
    ours, theirs = (
        first_directions(adapter, {name: factors[name] for name in names}, rank)
        for factors in (one, other)
    )
    return all(torch.equal(ours[name], theirs[name]) for name in names)


def check_nested(name: str, options: object) -> None:
    """Raise unless a start at a smaller rank is the first directions of one at a larger."""
    if not isinstance(options, LoRAXSOptions):
        return
    if options.vectors != "top" or options.basis == "random":
        raise ValueError(
            "another rank needs directions in order, those of vectors='top' and of a basis other "
            f"than 'random', got vectors={options.vectors!r} and basis={options.basis!r} in {name}"
        )


def with_rank(options: Own, have: int, rank: int) -> Own:
    """The options of the same adapter at ``rank`` in place of ``have``; s stays what it is."""
    changes: dict[str, Any] = {"rank": rank}
    if hasattr(options, "tau"):
        changes |= {"tau": None, "max_rank": None}  # no rule any more
    changed = replace(options, **changes)
    scaling = options.scaling_of(have)
    return changed if changed.scaling_of(rank) == scaling else changed.with_scaling(scaling, rank)
