"""Keep frozen weights as this processor multiplies them, in adapted and in plain layers."""

from __future__ import annotations

from typing import get_args

from torch import nn

from ..adapters.options import plain_value
from ..linalg.checks import check_choice
from ..nn.layouts import Directions
from ..nn.prepacked import PrepackedLinear, can_keep, check_on_top, take_off, take_up
from .adapt import adapted_layers
from .names import check_model


def prepack(model: nn.Module, on: bool = True, *, packed: Directions | None = None) -> nn.Module:
    """Let the frozen linear layers of ``model`` keep their weights as calls take them.

    Under autocast a frozen weight is cast at every call; and where a CPU multiplies no halves (AVX2
    alone, say), a half-precision product is a plain loop. The adapted layers, with their factors,
    and the plain ``nn.Linear`` and ``Conv1D`` whose weights do not train keep a copy instead, made
    at the first call that needs it: in autocast's dtype, or in fp32 where halves are not
    multiplied, with one rounding of the sum. A model in fp32 without autocast has nothing to keep.

    The copies are no part of a state dict, a file or a copy of the model. They are made anew when
    a weight is written to, replaced or cast; :func:`summary` says what they take. A compiled call,
    an offloaded or sharded layer, and a weight that trains again go without.

    What PyTorch does not count as a write goes unseen: one through ``weight.data``, and a
    collective of ``torch.distributed``. After it call :func:`prepack` again, which forgets every
    copy. The layers below PEFT's adapters, into which its ``merge_adapter`` writes so, are left.

    Parameters
    ----------
    model : nn.Module
        Call :func:`adapt` before, on the plain layers.
    on : bool
        False: give every layer its class and its memory back.
    packed : "forward" or "both", optional
        Let the layers keep their weights and factors in the order in which a kernel reads them too,
        for y, or for y and dx, and take it on a CPU for the sizes that it measured faster for
        (docs/kernels.md): a native kernel's with AVX2, oneDNN's, for plain layers alone, with
        AVX-512. Each direction takes the memory of weight and factors once more. Calls inside a
        torch function mode (``torch.device`` as a context is one) go without.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    TypeError, ValueError
        If there is no frozen linear layer, an argument is of another type, or something that was
        put on top of a layer since (a parametrisation) has to be taken off first.
    """
    check_model(model)
    on = plain_value("on", "bool", on)
    if packed is not None:
        check_choice("packed", packed, get_args(Directions))
    here = dict(model.named_modules())
    adapted = list(adapted_layers(model).values())
    before = {name: m for name, m in here.items() if isinstance(m, PrepackedLinear)}
    plain = [m for name, m in here.items() if not _is_written_to(name) and can_keep(m)]
    if not (adapted or before or plain):
        raise ValueError("model must hold frozen linear layers, got none")
    for name, linear in before.items():
        if not on:
            check_on_top(linear, name)
    for linear in before.values():
        linear.derived.drop()
    for layer in adapted:
        layer.derived.drop()
        layer._prepack, layer._packed = on, packed if on else None
    if on:
        for linear in before.values():
            linear.packed = packed
        for module in plain:
            take_up(module, packed)
    else:
        for linear in before.values():
            take_off(linear)
    return model


def _is_written_to(name: str) -> bool:
    """Whether a module of this name lies below a wrapper of PEFT."""
    return name.rpartition(".")[2] == "base_layer"
