"""The gradient of every example of a batch, from the pass that gives the batch's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.names import as_names, check_model
from ..nn.per_row import Rows, asking, asks
from .layout import Layout, by_module


@contextmanager
def per_example(model: nn.Module, heads: str | Iterable[str] | None = None) -> Iterator[PerExample]:
    """Inside, a backward finds the gradient of each example as well.

    Every example has a copy of what trains, over the same factors: the segment sums of a batch of
    many adapters, one example a segment. The parameters get their gradients as ever.

    Parameters
    ----------
    model : nn.Module
        With layers adapted by :func:`adapt` or, under PEFT, with one active adapter of ours. Its
        first dimension is that of the examples, and an example's loss must not depend on others.
    heads : str or iterable of str, optional
        Linear layers that count as well; by default those that train. Nothing else may train.

    Yields
    ------
    PerExample
        Whose ``gradients`` [batch, numbers] are there after the backward, inside and afterwards.

    Raises
    ------
    TypeError, ValueError
        As of :class:`AdapterBank`, and inside a batch of one.
    """
    check_model(model)
    found = PerExample(Layout(model, None if heads is None else as_names("heads", heads)))
    if asks(found.layout.modules):
        raise ValueError(
            "per_example must not be inside another per_example or use() of a bank over the same "
            "model: it is of the model's own adapter"
        )
    with asking(found.layout.modules, found):
        yield found


class PerExample:
    """Gradients of each example, see :func:`per_example`.

    Attributes
    ----------
    columns : dict of slice
        Those of each tensor in :attr:`gradients`, by its full name.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.columns = layout.columns
        self._trained = by_module(layout.places, layout.trained())
        self._rows: dict[nn.Module, Rows] = {}

    def has(self, module: nn.Module) -> bool:
        """See :class:`qrlora_kernels.nn.per_row.Source`."""
        return module in self._trained

    def rows_of(self, module: nn.Module, x: Tensor) -> Rows:
        """See :class:`qrlora_kernels.nn.per_row.Source`."""
        if not torch.is_grad_enabled():  # copies of now would have no gradient later
            return self._copies(module, x)
        if module not in self._rows:
            rows = self._copies(module, x)
            for copies in rows.own.values():
                if copies.requires_grad:
                    copies.retain_grad()
            self._rows[module] = rows
        rows = self._rows[module]
        if len(rows.place) != len(x):
            raise ValueError(
                f"model must get as many examples at every call inside per_example, got {len(x)} "
                f"after {len(rows.place)}"
            )
        return rows

    def _copies(self, module: nn.Module, x: Tensor) -> Rows:
        trained = self._trained[module].items()
        own = {key: tensor.expand(len(x), *tensor.shape) for key, tensor in trained}
        return Rows(own, torch.arange(len(x), device=x.device))

    @property
    def gradients(self) -> Tensor:
        """[batch, numbers]: the sum over all backwards so far, zero in layers without one.

        Raises
        ------
        ValueError
            If there was no backward.
        """
        found = [self._gradient(place.module, place.key) for place in self.layout.places.values()]
        some = next((gradient for gradient in found if gradient is not None), None)
        if some is None:
            raise ValueError("gradients need a backward of what the model gave inside, got none")
        like = some.new_zeros(len(some), 1, dtype=self.layout.dtype)
        whole = [
            like.expand(-1, width) if gradient is None else gradient.flatten(1).to(like)
            for gradient, width in zip(found, self.layout.widths, strict=True)
        ]
        return torch.cat(whole, 1)

    def _gradient(self, module: nn.Module, key: str) -> Tensor | None:
        return self._rows[module].own[key].grad if module in self._rows else None
