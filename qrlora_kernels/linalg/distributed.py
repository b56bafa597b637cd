"""The starts of a whole model: shared over ranks or not, through a cache or not."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from ..fingerprint import digest_of
from .cache import (
    Start,
    Store,
    cached_start,
    check_start,
    from_record,
    shaping_options,
    start_some,
    to_record,
)
from .checks import Named, Weights, named_matrices
from .ranks import Ranks, require_agreement, several_ranks

T = TypeVar("T")
# For each matrix the digest of what each rank has of it, None for nothing.
Held = list[list[str | None]]


@dataclass(frozen=True)
class StartRunner:
    """Runs a start over a list of matrices.

    Attributes
    ----------
    progress : bool
        Show one bar over the matrices that are computed.
    cache : path, optional
        Folder to read results from and leave them in, see :func:`cached_start`.
    distributed : bool
        Share the work where ``torch.distributed`` has several ranks, see :func:`distributed_start`;
        all ranks must then make the same calls, with equal weights.
    """

    progress: bool = False
    cache: str | os.PathLike[str] | None = None
    distributed: bool = False

    def __call__(self, start: Start, weights: Weights, /, **options: Any) -> list[Any]:
        options["progress"] = self.progress
        if self._shares():
            return distributed_start(start, weights, cache=self.cache, **options)
        if self.cache is not None:
            return cached_start(start, weights, self.cache, **options)
        results: list[Any] = start(weights, **options)
        return results

    def together(self, task: Callable[[], T]) -> T:
        """``task()``; where ranks share the work, an error of one is raised on all."""
        return Ranks().together(task) if self._shares() else task()

    def require_agreement(
        self, weights: Weights = (), facts: Mapping[str, object] | None = None
    ) -> None:
        """Raise ValueError on all ranks that share the work where weights or ``facts`` differ."""
        if self._shares():
            require_agreement(Ranks(), weights, facts or {})

    def drawn(self, draw: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Tensors that depend on random numbers: rank 0's on all ranks that share the work.

        Every rank draws, so that their generators stay where they would be without sharing.
        """
        if not self._shares():
            return draw()
        ranks = Ranks()
        own = ranks.together(draw)
        return [ranks.send(({"drawn": t}, {}), 0, t.device)[0]["drawn"] for t in own]

    def _shares(self) -> bool:
        return self.distributed and several_ranks()


def distributed_start(
    start: Start,
    weights: Weights,
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
    weights : sequence of Tensor [N, K], or mapping from the names that errors use
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
    check_start(start, weights)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("distributed_start needs torch.distributed.init_process_group first")
    ranks = Ranks(group)
    if ranks.rank != 0:
        options = {**options, "progress": False}
    facts = {"factorisation": start.__name__, "cache": "none" if cache is None else "a folder"}
    require_agreement(ranks, weights, facts | shaping_options(options))
    named = named_matrices(weights)
    if cache is None:
        return _share(ranks, start, named, {}, [[None] * ranks.size for _ in named], options)
    store = ranks.together(lambda: Store(cache))
    keys = _shared_keys(ranks, store, start, named, options)
    found = ranks.together(lambda: store.read(start, keys, named.values()))
    digests = ranks.gather(lambda: {i: _digest(result) for i, result in found.items()})
    held = [[of_rank.get(i) for of_rank in digests] for i in range(len(keys))]
    results = _share(ranks, start, named, found, held, options)
    lacking = {
        key: result
        for key, digests, result in zip(keys, held, results, strict=True)
        if digests[ranks.rank] is None or digests[ranks.rank] != _first(digests)
    }
    unkept = ranks.gather(lambda: store.keep(lacking))
    own = unkept[ranks.rank]
    if own is not None and own not in unkept[: ranks.rank]:  # once where several say the same
        warnings.warn(own, stacklevel=2)
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
    named: Named,
    found: dict[int, Any],
    held: Held,
    options: dict[str, Any],
) -> list[Any]:
    """All results: computed by its owner where no rank has one, sent where not all have the same.

    ``found`` holds what this rank has already.
    """
    weights = list(named.values())
    missing = [i for i, digests in enumerate(held) if not any(digests)]
    shares = share_out([weights[i].shape for i in missing], ranks.size)
    owners = dict(zip(missing, shares, strict=True))
    mine = [i for i in missing if owners[i] == ranks.rank]
    made = found | ranks.together(lambda: start_some(start, named, mine, options))
    results = []
    for i, (weight, digests) in enumerate(zip(weights, held, strict=True)):
        if digests[0] is not None and digests.count(digests[0]) == ranks.size:
            results.append(made[i])
            continue
        source = owners[i] if i in owners else digests.index(_first(digests))
        parts = to_record(made[i]) if source == ranks.rank else None
        results.append(from_record(start, *ranks.send(parts, source, weight.device)))
    return results


def _shared_keys(
    ranks: Ranks, store: Store, start: Start, named: Named, options: dict[str, Any]
) -> list[str]:
    """The keys of all files; each rank hashes its share of the weights."""
    owners = share_out([weight.shape for weight in named.values()], ranks.size)
    mine = [w for w, owner in zip(named.values(), owners, strict=True) if owner == ranks.rank]
    shares = [iter(share) for share in ranks.gather(lambda: store.keys(start, mine, options))]
    return [next(shares[owner]) for owner in owners]


def _digest(result: Any) -> str:
    tensors, values = to_record(result)
    return digest_of(tensors, json.dumps(values, sort_keys=True))


def _first(digests: Sequence[str | None]) -> str | None:
    """What the lowest rank that has something holds."""
    return next((digest for digest in digests if digest is not None), None)
