"""Starts shared over ranks: each factorises its share and all end with the same bits."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..fingerprint import digest_of
from .agreement import require_agreement
from .cache import Store
from .ranks import Ranks
from .records import Start, check_start, from_record, shaping_options, start_some, to_record


def distributed_start(
    start: Start,
    weights: Sequence[Tensor],
    /,
    group: dist.ProcessGroup | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[Any]:
    """``start(weights, **options)`` shared over the ranks of a process group.

    Every rank calls it with the same weights and options, which is checked. A matrix is factorised
    by one rank, which sends the result to the others, so that different machines do not start from
    different bits. An error on one rank is raised on all.

    Parameters
    ----------
    start : pivoted_qr, truncated_svd or kron_factors
    weights : sequence of Tensor [N, K]
        Equal on all ranks, bit for bit. Where the group's backend cannot send from their device,
        results go over one that it can.
    group : ProcessGroup, optional
        The default group if None.
    cache : path, optional
        A folder as :func:`cached_start` takes it, one for all ranks or one of each. A result that
        any rank finds there is not computed again; where ranks find different bits, all take the
        lowest one's. A rank that cannot write there warns, one of several with the same folder.
    **options
        As ``start`` takes them. A progress bar is shown by rank 0, for its share.

    Returns
    -------
    list
        The results in the order of ``weights``, on the devices of the weights.

    Raises
    ------
    RuntimeError
        ``torch.distributed`` is not initialised, or another rank had an error of another kind.
    TypeError, ValueError
        As ``start`` raises them, or ranks differ in ``start``, options or weights; on all ranks.
    """
    check_start(start)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("distributed_start needs torch.distributed.init_process_group first")
    if isinstance(weights, Tensor):
        raise TypeError("weights must be a list of tensors, got a Tensor")
    ranks = Ranks(group)
    if ranks.rank != 0:
        options = {**options, "progress": False}
    facts = {"factorisation": start.__name__, "cache": "none" if cache is None else "a folder"}
    require_agreement(ranks, weights, facts | shaping_options(options))
    if cache is None:
        return _share(ranks, start, weights, {}, [{}] * ranks.size, options)
    store = ranks.together(lambda: Store(cache))
    keys = _shared_keys(ranks, store, start, weights, options)
    found = ranks.together(lambda: store.read(start, keys, weights))
    digests = ranks.gather(lambda: {i: _digest(result) for i, result in found.items()})
    results = _share(ranks, start, weights, found, digests, options)

    def keep() -> str | None:
        lacking = {}
        for i, result in enumerate(results):
            held = [digest.get(i) for digest in digests]
            if held[ranks.rank] is None or held[ranks.rank] != _first(held):
                lacking[keys[i]] = result
        return store.keep(lacking)

    _tell_unkept(ranks, ranks.gather(keep))
    return results


def share_out(shapes: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Owner of each matrix: the largest first, each to the rank with the least to do so far."""
    load = [0] * ranks
    owners = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: (-shapes[i][0] * shapes[i][1], i)):
        owners[i] = load.index(min(load))
        load[owners[i]] += shapes[i][0] * shapes[i][1]
    return owners


def _share(
    ranks: Ranks,
    start: Start,
    weights: Sequence[Tensor],
    found: dict[int, Any],
    digests: Sequence[dict[int, str]],
    options: dict[str, Any],
) -> list[Any]:
    """All results: computed by its owner where no rank has one, sent where not all have the same.

    ``found`` holds what this rank has already, ``digests`` the digests of what each rank has.
    """
    missing = [i for i in range(len(weights)) if not any(i in held for held in digests)]
    shares = share_out([weights[i].shape for i in missing], ranks.size)
    owners = dict(zip(missing, shares, strict=True))
    mine = [i for i in missing if owners[i] == ranks.rank]
    made = found | ranks.together(lambda: start_some(start, weights, mine, options))
    results = []
    for i, weight in enumerate(weights):
        held = [digest.get(i) for digest in digests]
        if held[0] is not None and held.count(held[0]) == ranks.size:
            results.append(made[i])
            continue
        source = owners[i] if i in owners else held.index(_first(held))
        parts = to_record(made[i]) if source == ranks.rank else None
        results.append(from_record(start, *ranks.send(parts, source, weight.device)))
    return results


def _shared_keys(
    ranks: Ranks,
    store: Store,
    start: Start,
    weights: Sequence[Tensor],
    options: dict[str, Any],
) -> list[str]:
    """The keys of all files; each rank hashes its share of the weights."""
    owners = share_out([weight.shape for weight in weights], ranks.size)
    mine = [i for i, owner in enumerate(owners) if owner == ranks.rank]
    shares = ranks.gather(
        lambda: dict(zip(mine, store.keys(start, [weights[i] for i in mine], options), strict=True))
    )
    return [shares[owner][i] for i, owner in enumerate(owners)]


def _tell_unkept(ranks: Ranks, unkept: Sequence[str | None]) -> None:
    """Warn of what a rank could not keep, once where several ranks say the same."""
    own = unkept[ranks.rank]
    if own is not None and own not in unkept[: ranks.rank]:
        warnings.warn(own, stacklevel=3)


def _digest(result: Any) -> str:
    tensors, values = to_record(result)
    return digest_of(tensors, json.dumps(values, sort_keys=True))


def _first(held: Sequence[str | None]) -> str | None:
    """What the lowest rank that has something holds."""
    return next((digest for digest in held if digest is not None), None)
