"""A registered operator that eager code may call without going through PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, library

from ..autocast import autocast_enabled
from ..dispatch.chooser import run
from ..native import pointers
from ..operands import Kron, LinearAdd, LowRank, Operands
from . import flops
from .checks import check_range

LIBRARY = library.Library("qrlora", "DEF")
_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), float, int, bool, str}


class Unanswered(TypeError):
    """The class of an operand answers no operator of ours; ``name`` is the operand's."""

    def __init__(self, name: str, operator: str, t: Tensor) -> None:
        self.name, self.operator, self.operand = name, operator, t
        super().__init__(
            f"{name} must be a plain tensor or of a class that answers {operator}, got "
            f"{type(t).__name__}"
        )


class Operator:
    """``qrlora::<name>``: its schema, its fake, and one implementation for every device.

    The implementation takes operands in their final dtypes, asks the chooser who runs them, and
    stands in a placeholder for each result nobody asked for: operators return tensors only.

    Calling this object in eager mode runs the implementation at once. Tracing (``torch.compile``,
    ``torch.jit.trace``, fake tensors, dispatch modes, tensor subclasses, batches of gradients) goes
    through the dispatcher and sees one operator; that detour costs about 15 µs a call, more than a
    small layer itself. The class of a wrapper tensor answers the operator there, or refuses it.

    The implementation is what every backend stands behind, library products included: tensors whose
    elements are not in their memory are refused here, by name.

    Parameters
    ----------
    name : str
        As ``"low_rank_fwd"``.
    schema : str
        "(arguments) -> (results)": the fields of ``record`` and ``str? backend``.
    record : type
        The record of operands that backends take.
    fake : callable
        record -> results without data, for tracing.
    flop_count : callable
        record -> floating-point operations of the products.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        record: Callable[..., Operands],
        fake: Callable[[Any], Any],
        flop_count: Callable[[Any], int],
    ) -> None:
        self.record = record
        arguments = schema[1 : schema.index(")")].split(", ")
        # Name and position of the tensors.
        self.tensors = {
            text.split()[1]: i for i, text in enumerate(arguments) if text.startswith("Tensor")
        }
        self._results = schema.rpartition("->")[2].count("Tensor")
        self._tensors_of = itemgetter(*self.tensors.values())
        # The index comes after the gates that it is an index of.
        self._gates_at = self.tensors["gate"] if "index" in self.tensors else None
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        library.register_fake(
            f"qrlora::{name}", lambda *operands: fake(record(*operands[:-1])), lib=LIBRARY
        )
        self.registered = getattr(torch.ops.qrlora, name)
        flops.add(self.registered, lambda *operands: flop_count(record(*operands[:-1])))

    def __call__(self, *operands: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.registered(*operands)
        functorch, rows = torch._C._functorch, operands[0]
        if (
            not set(map(type, operands)) <= _PLAIN_TYPES
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._get_tracing_state() is not None
            # vmap may stand behind a gradient that torch.autograd.grad is given.
            or functorch.is_batchedtensor(rows)
            or functorch.is_legacy_batchedtensor(rows)
        ):
            return self._dispatched(operands)
        return self._run(*operands)

    def _dispatched(self, operands: Sequence[Any]) -> Any:
        flops.register()
        try:
            return self.registered(*operands)
        except NotImplementedError as error:
            for name, t in zip(self.tensors, self._tensors_of(operands), strict=True):
                if t is not None and pointers.is_wrapper(t):
                    raise Unanswered(name, str(self.registered), t) from error
            raise

    def _run(self, *arguments: Any) -> Any:
        *operands, backend = arguments
        rows: Tensor = operands[0]
        device = rows.device.type
        if device != "meta" and not pointers.are_plain(*self._tensors_of(operands)):
            operands = self._readable(operands)
        p = self.record(*operands)
        if self._gates_at is not None and operands[self._gates_at + 1] is not None:
            # Here, since whatever was traced or compiled comes here with numbers of its own.
            check_range(operands[self._gates_at + 1], operands[self._gates_at].shape[0])
        if autocast_enabled(device):
            # The operands have their final dtypes; nothing inside may be recast.
            with torch.autocast(device, enabled=False):
                results = run(p, backend)
        else:
            results = run(p, backend)
        if isinstance(results, Tensor):
            return results
        asked = results[: self._results]  # a recipe may hand on more, which no schema has
        return tuple([placeholder(rows) if t is None else t for t in asked])

    def _readable(self, operands: Sequence[Any]) -> list[Any]:
        """With a copy in the place of each tensor that stands for something not yet done."""
        readable = list(operands)
        for name, at in self.tensors.items():
            if readable[at] is not None:
                readable[at] = pointers.checked(readable[at], name)
        return readable


def y_without_data(p: LowRank | Kron | LinearAdd) -> Tensor:
    """What stands for y [M, N] in a trace."""
    return p.x.new_empty(p.x.shape[0], p.weight.shape[0])


def placeholder(like: Tensor) -> Tensor:
    """What an operator returns in place of a result that nobody asked for."""
    return like.new_empty(0)
