"""Sums of adapters over one base: exact, since the update is linear in what trains."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

from ..adapters import State
from ..adapters.combining import (
    NO_SUM,
    AnyLowRank,
    begin_alike,
    check_nested,
    first_directions,
    require_low_rank,
    weighted_sum,
    with_rank,
)
from ..adapters.options import plain_value
from ..files import save_tensors
from ..fingerprint import fingerprint
from ..linalg.checks import check_choice
from .comparing import refuse_sharded
from .manifest import AdapterFile, Entry, all_finite, file_at, metadata_of, packed, read
from .names import unwrapped
from .saving import contents

Adapter = str | os.PathLike[str] | nn.Module
Extra = Literal["same", "first"]
STORE = "save both with factors='stored'"


def combine(
    weights: Mapping[Adapter, float],
    path: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    extra: Extra = "same",
) -> dict[str, Tensor]:
    """Σ wᵢ ΔWᵢ as one adapter: exact, without a factorisation.

    An average is ``{a: 1 / 2, b: 1 / 2}``, half the way from the base to an adapter ``{a: 0.5}``,
    and a smaller rank of an adapter ``{a: 1.0}`` with ``rank``. The sum is computed in fp64 and
    rounded once, to fp32 or to what is wider among the numbers.

    Each layer of the result has the options of the adapter with the largest rank there, the first
    of them; its scaling s stays, and the other's scalings and all strengths go into the numbers.
    An adapter of a smaller rank counts as zero in the directions that it lacks, and one without a
    layer counts as zero there.

    Parameters
    ----------
    weights : dict
        From an adapter, the path of its file or a model that holds it, to its wᵢ. Neither changes.
    path : str or path, optional
        Where to write the sum too, as a file for :func:`load_adapter`.
    rank : int, optional
        Keep the first directions of the sum, in layers that have more. Of QR-LoRA these are the
        pivots of a start at that rank. Of LoRA-XS they are the largest singular vectors that the
        adapter was trained with, which a start at that rank gives up to the error of its SVD.
    extra : "same" or "first"
        What the file holds beside the adapters (heads, statistics), of which there is no exact
        sum: what is equal in all, or what the first adapter brings. Without ``path`` none is
        looked at.

    Returns
    -------
    dict of Tensor
        What trains, by its full name: ``lam`` [r] or ``core`` [r, r] of each layer, on the CPU.

    Raises
    ------
    FileNotFoundError
        If a path leads to no file.
    TypeError
        If an adapter is neither a path nor a model, or a weight is no number.
    ValueError
        If the adapters do not begin from the same base, factors and kind of adapter, are of OHoRA,
        whose sum is none, or cannot be cut to ``rank``; if the sum is not finite. The message
        names the layer, and nothing is written.
    """
    target = None if path is None else file_at(path)
    rank = plain_value("rank", "int | None", rank)
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    check_choice("extra", extra, get_args(Extra))
    parts = _parts(weights)
    names = dict.fromkeys(name for part in parts for name in part.content.layers)
    with_layer = {name: [p for p in parts if name in p.content.layers] for name in names}
    largest = max(part.rank(name) for name, some in with_layer.items() for part in some)
    if rank is not None and rank > largest:
        raise ValueError(f"rank must be at most {largest}, the adapters' largest, got {rank}")
    sums = {name: _sum(name, some, rank) for name, some in with_layer.items()}
    if target is not None:
        tensors, manifest = packed(_file(target, parts, sums, extra))
        save_tensors(target, tensors, metadata_of(manifest, tensors))
    return {
        f"{name}.{key}": made.state[key]
        for name, made in sums.items()
        for key in made.entry.kind.trainables
    }


class _Part(NamedTuple):
    """One adapter of the sum."""

    called: str
    weight: float
    content: AdapterFile

    def rank(self, name: str) -> int:
        """r in the layer ``name``."""
        adapter = self.content.layers[name].kind.adapter
        return adapter.rank(self.content.tensors_of(name))

    def strength(self, name: str) -> float:
        """What the update in the layer ``name`` is multiplied by."""
        options = self.content.layers[name].options
        return options.scaling_of(self.rank(name)) * options.strength


def _parts(weights: Mapping[Adapter, float]) -> list[_Part]:
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must map adapters to numbers, got {type(weights).__name__}")
    if not weights:
        raise ValueError("weights must hold one adapter at least, got none")
    called = [_called(number, one) for number, one in enumerate(weights)]
    values = [
        plain_value(f"the weight of {name}", "float", w)
        for name, w in zip(called, weights.values(), strict=True)
    ]
    found = [_content(name, one) for name, one in zip(called, weights, strict=True)]
    return [_Part(*part) for part in zip(called, values, found, strict=True)]


def _called(number: int, adapter: Any) -> str:
    if isinstance(adapter, nn.Module):
        return f"model {number} of weights"
    if isinstance(adapter, (str, os.PathLike)):
        return os.fspath(adapter)
    raise TypeError(f"weights must have paths or models as keys, got {type(adapter).__name__}")


def _content(called: str, adapter: Adapter) -> AdapterFile:
    if not isinstance(adapter, nn.Module):
        return read(adapter)
    refuse_sharded(unwrapped(adapter), "combine the files that save_adapter writes")
    return contents(adapter, "auto", False, {}).in_file(Path(called))


# --- one layer


class _Sum(NamedTuple):
    entry: Entry
    state: State  # what trains, and what the file keeps of the factors


def _sum(name: str, parts: Sequence[_Part], rank: int | None) -> _Sum:
    kept = max(parts, key=lambda part: part.rank(name))  # the first of those
    adapter = require_low_rank(kept.content.layers[name].kind.adapter, NO_SUM)
    for part in parts:
        _check_alike(name, adapter, kept, part)
    entry, factors = kept.content.layers[name], kept.content.tensors_of(name)
    (gate,) = adapter.trainables
    del factors[gate]
    own, options = kept.rank(name), replace(entry.options, strength=1.0)
    if rank is not None and rank < own:
        _check_can_be_cut(name, entry)
        options, factors = with_rank(options, own, rank), first_directions(adapter, factors, rank)
        own = rank
        entry = replace(entry, digests={key: fingerprint(factors[key]) for key in entry.digests})
    if options.scaling_of(own) == 0.0:
        options = options.with_scaling(1.0, own)
    scaling = options.scaling_of(own)
    gates = [part.content.tensors[f"{name}.{gate}"] for part in parts]
    shares = [part.weight * (part.strength(name) / scaling) for part in parts]
    total = weighted_sum(gates, shares, own)
    if not all_finite(total):
        called = ", ".join(part.called for part in parts)
        raise ValueError(f"the sum must be finite, got NaN or infinite numbers in {name}: {called}")
    return _Sum(replace(entry, options=options), {gate: total, **factors})


def _check_can_be_cut(name: str, entry: Entry) -> None:
    check_nested(name, entry.options)
    if not entry.stored_factors and not entry.kind.adapter.rebuilt_from:
        raise ValueError(f"factors that no file holds cannot be cut, got those of {name}: {STORE}")


def _check_alike(name: str, adapter: AnyLowRank, kept: _Part, other: _Part) -> None:
    """Raise unless ``other`` begins from the first directions of ``kept``."""
    one, two = kept.content.layers[name], other.content.layers[name]
    both = f"{name}: {kept.called}, {other.called}"
    if one.kind is not two.kind:
        raise ValueError(
            f"adapters must be of one kind to be combined, got {one.kind.kind} and "
            f"{two.kind.kind} in {both}"
        )
    if one.weight != two.weight:
        raise ValueError(
            f"adapters must begin from the same base to be combined, got other weights in {both}"
        )
    tensors, others = kept.content.tensors_of(name), other.content.tensors_of(name)
    rebuilt = not one.stored_factors
    if one.stored_factors == two.stored_factors and (adapter.rebuilt_from or not rebuilt):
        alike = begin_alike(adapter, tensors, others, other.rank(name), rebuilt)
    elif one.digests and kept.rank(name) == other.rank(name):
        alike = one.digests == two.digests
    else:
        raise ValueError(f"nothing tells whether the factors are the same in {both}; {STORE}")
    if not alike:
        raise ValueError(
            f"adapters must begin from the same factors to be combined, got others in {both}"
        )


# --- the file


def _file(
    path: Path, parts: Sequence[_Part], sums: Mapping[str, _Sum], extra: Extra
) -> AdapterFile:
    """With what is beside the sums, from the first adapter."""
    first = parts[0].content
    bases = {f"{name}.weight" for name in sums}
    held = {n: t for n, t in first.extra.items() if n not in bases}
    if extra == "same":
        _check_same_beside(parts, bases)
    for part in reversed(parts):  # base weights that were changed before an adapter began
        held |= {n: t for n, t in part.content.extra.items() if n in bases}
    return AdapterFile(
        path,
        {name: made.entry for name, made in sums.items()},
        held,
        first.thawed,
        first.tied,
        _frozen(parts, bases | held.keys()),
        {f"{name}.{key}": t for name, made in sums.items() for key, t in made.state.items()},
    )


def _check_same_beside(parts: Sequence[_Part], bases: set[str]) -> None:
    first = parts[0].content.extra
    for part in parts[1:]:
        there = part.content.extra
        for name in sorted((first.keys() | there.keys()) - bases):
            one, two = first.get(name), there.get(name)
            if one is None or two is None or fingerprint(one) != fingerprint(two):
                raise ValueError(
                    f"what was trained beside the adapters has no exact sum, and {name} is not the "
                    f"same in {parts[0].called} and {part.called}: take the first's with "
                    "extra='first', or the sum without a path"
                )


def _frozen(parts: Sequence[_Part], but: set[str]) -> dict[str, str] | None:
    """The digests that the adapters know of the base beside their layers, which must agree."""
    known = [part for part in parts if part.content.frozen is not None]
    digests: dict[str, str] = {}
    for part in known:
        for name, digest in (part.content.frozen or {}).items():
            if digests.setdefault(name, digest) != digest:
                raise ValueError(
                    "adapters must begin from the same base to be combined, got another "
                    f"{name} in {part.called}"
                )
    return {n: digest for n, digest in digests.items() if n not in but} if known else None
