"""What ranks must have in common before they share a start: weights, bit for bit, and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..fingerprint import quick_digest
from .checks import named_matrices
from .parallel import in_threads
from .ranks import Ranks

# The facts, and the layout and the digest of each weight.
Claim = tuple[dict[str, str], list[str], list[str]]


def require_agreement(ranks: Ranks, weights: Sequence[Tensor], facts: Mapping[str, object]) -> None:
    """Return where all ranks call with the same ``facts`` and equal ``weights``.

    Raises
    ------
    TypeError, ValueError
        On all ranks: a rank's weights are no matrices, or ranks differ; the message names the fact
        or the weight and two ranks.
    """

    def claim() -> Claim:
        matrices = [weight for _, weight in named_matrices(weights)[0]]
        return (
            {name: str(value) for name, value in facts.items()},
            [f"{tuple(weight.shape)} of {weight.dtype}" for weight in matrices],
            in_threads(quick_digest, matrices),
        )

    first, *others = ranks.gather(claim)
    for rank, other in enumerate(others, start=1):
        _compare(first, other, rank)


def _compare(first: Claim, other: Claim, rank: int) -> None:
    facts, layouts, digests = first
    other_facts, other_layouts, other_digests = other
    for name in sorted(facts | other_facts):
        _require_same(name, facts.get(name, "none"), other_facts.get(name, "none"), rank)
    _require_same("the number of weights", str(len(layouts)), str(len(other_layouts)), rank)
    for i, pair in enumerate(zip(layouts, other_layouts, strict=True)):
        _require_same(f"the shape and dtype of weights[{i}]", *pair, rank)
    for i, (digest, other_digest) in enumerate(zip(digests, other_digests, strict=True)):
        if digest != other_digest:
            raise ValueError(
                f"weights[{i}] must be equal on all ranks that share a start, but rank {rank} "
                "holds other values than rank 0; ranks with models of their own start alone "
                "(adapt's distributed=False)"
            )


def _require_same(name: str, first: str, other: str, rank: int) -> None:
    if first != other:
        raise ValueError(
            f"{name} must be the same on all ranks that share a start, got {first} on rank 0 and "
            f"{other} on rank {rank}"
        )
