"""A registered operator that eager code may call without going through PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from ..backends.chooser import run
from ..backends.problem import Problem
from .common import autocast_enabled

LIBRARY = library.Library("qrlora", "DEF")


class Operator:
    """``qrlora::<op>_<step>``: its schema, its fake, and one implementation for every device.

    The implementation takes operands in their final dtypes, asks the chooser who runs them, and
    stands in a placeholder for each result nobody asked for: operators return tensors only.

    Calling this object in eager mode runs the implementation at once. Tracing (``torch.compile``,
    ``torch.jit.trace``, fake tensors, dispatch modes, tensor subclasses, batches of gradients) goes
    through the dispatcher and sees one operator; that detour costs about 15 µs a call, more than a
    small layer itself.

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
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        library.register_fake(f"qrlora::{name}", fake, lib=LIBRARY)
        self.registered = getattr(torch.ops.qrlora, name)

    def __call__(self, *operands: Any) -> Any:
        if torch.compiler.is_compiling() or _is_traced(operands[0]):
            return self.registered(*operands)
        return self._run(*operands)

    def _run(self, *arguments: Any) -> Any:
        *operands, backend = arguments
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


def _is_traced(tensor: Tensor) -> bool:
    """Whether someone other than the backends must see this call as one operator."""
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
    return not plain or watched or _is_batched(tensor)


def _is_batched(tensor: Tensor) -> bool:
    """Whether vmap stands behind a tensor: a gradient of ``torch.autograd.grad`` may be one."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def placeholder(like: Tensor) -> Tensor:
    """What an operator returns in place of a result that nobody asked for."""
    return like.new_empty(0)
