"""A registered operator that eager code may call without going through PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from ..backends.chooser import run
from ..backends.problem import Problem
from ..native import pointers
from .common import autocast_enabled

LIBRARY = library.Library("qrlora", "DEF")
_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), float, int, bool, str}


class Operator:
    """``qrlora::<op>_<step>``: its schema, its fake, and one implementation for every device.

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
    op, step : str
        ``Problem.op`` and ``"fwd"`` or ``"bwd"``.
    schema : str
        "(arguments) -> (results)"; the last argument is ``str? backend``.
    fake : callable
        Results without data, for tracing.
    weight_at, trainable_at : int
        Positions of W [N, K] and of the operand whose last dimension is the rank.
    """

    def __init__(
        self,
        op: str,
        step: str,
        schema: str,
        fake: Callable[..., Any],
        weight_at: int,
        trainable_at: int,
    ) -> None:
        self.op, self.step = op, step
        self.weight_at, self.trainable_at = weight_at, trainable_at
        name = f"{op}_{step}"
        arguments = schema[1 : schema.index(")")].split(", ")
        # The tensors come first.
        self.tensors = [text.split()[1] for text in arguments if text.startswith("Tensor")]
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        library.register_fake(f"qrlora::{name}", fake, lib=LIBRARY)
        self.registered = getattr(torch.ops.qrlora, name)

    def __call__(self, *operands: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.registered(*operands)
        return self._dispatched(operands) if _is_traced(operands) else self._run(*operands)

    def _dispatched(self, operands: Sequence[Any]) -> Any:
        try:
            return self.registered(*operands)
        except NotImplementedError as error:
            for name, t in zip(self.tensors, operands, strict=False):
                if t is not None and pointers.is_wrapper(t):
                    raise TypeError(
                        f"{name} must be a plain tensor or of a class that answers "
                        f"{self.registered}, got {type(t).__name__}"
                    ) from error
            raise

    def _run(self, *arguments: Any) -> Any:
        *operands, backend = arguments
        if operands[0].device.type != "meta":
            count = len(self.tensors)
            operands[:count] = pointers.all_checked(self.tensors, operands[:count])
        rows: Tensor = operands[0]
        n, k = operands[self.weight_at].shape
        r = operands[self.trainable_at].shape[-1]
        problem = Problem(self.op, rows.device, rows.dtype, rows.shape[0], n, k, r)
        device = rows.device.type
        if autocast_enabled(device):
            # The operands have their final dtypes; nothing inside may be recast.
            with torch.autocast(device, enabled=False):
                results = run(problem, self.step, backend, operands)
        else:
            results = run(problem, self.step, backend, operands)
        if isinstance(results, Tensor):
            return results
        return tuple(placeholder(rows) if t is None else t for t in results)


def _is_traced(operands: Sequence[Any]) -> bool:
    """Whether someone other than the backends must see this call as one operator."""
    plain = set(map(type, operands)) <= _PLAIN_TYPES
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
    return not plain or watched or _is_batched(operands[0])


def _is_batched(tensor: Tensor) -> bool:
    """Whether vmap stands behind a tensor: a gradient of ``torch.autograd.grad`` may be one."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def placeholder(like: Tensor) -> Tensor:
    """What an operator returns in place of a result that nobody asked for."""
    return like.new_empty(0)
