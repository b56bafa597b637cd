"""How the starts of a whole model run: progress bar, cache folder, shared over ranks or not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from .agreement import require_agreement
from .cache import cached_start
from .distributed import distributed_start
from .ranks import Ranks, several_ranks
from .records import Start

T = TypeVar("T")


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

    def __call__(self, start: Start, weights: Sequence[Tensor], /, **options: Any) -> list[Any]:
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
        self, weights: Sequence[Tensor] = (), facts: Mapping[str, object] | None = None
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
        sent = [
            ranks.send(({"tensor": tensor}, {}), 0, tensor.device)
            for tensor in ranks.together(draw)
        ]
        return [tensors["tensor"] for tensors, _ in sent]

    def _shares(self) -> bool:
        return self.distributed and several_ranks()
