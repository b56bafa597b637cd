"""Keep frozen weights as this processor multiplies them, in adapted and in plain layers."""

from __future__ import annotations

from torch import nn

from ..adapters.options import plain_value
from ..nn.prepacked import PrepackedLinear, can_keep, take_off, take_up
from .adapt import adapted_layers
from .names import check_model, modules


def prepack(model: nn.Module, on: bool = True) -> nn.Module:
    """Let the frozen linear layers of ``model`` keep their weights as calls take them.

    Under autocast a frozen weight is cast at every call; and where a CPU multiplies no halves (AVX2
    alone, say), a half-precision product is a plain loop. The adapted layers, with their factors,
    and the plain ``nn.Linear`` and ``Conv1D`` whose weights do not train keep a copy instead, made
    at the first call that needs it: in autocast's dtype, or in fp32 where halves are not
    multiplied, with one rounding of the sum. A model in fp32 without autocast has nothing to keep.

    The copies are no part of a state dict, a file or a copy of the model. They are made anew when
    a weight is written to, replaced or cast; :func:`summary` says what they take. A compiled call,
    a merged or an offloaded layer, and a weight that trains again go without.

    Parameters
    ----------
    model : nn.Module
        Call :func:`adapt` before, on the plain layers.
    on : bool
        False: give every layer its class and its memory back.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    TypeError, ValueError
        If there is no frozen linear layer, or an argument is of another type.
    """
    check_model(model)
    on = plain_value("on", "bool", on)
    adapted = list(adapted_layers(model).values())
    plain = [m for m in modules(model).values() if isinstance(m, PrepackedLinear) or can_keep(m)]
    if not (adapted or plain):
        raise ValueError("model must hold frozen linear layers, got none")
    for layer in adapted:
        layer._prepack = on
        if not on:
            layer.derived.drop()
    for module in plain:
        if not isinstance(module, PrepackedLinear):
            if on:
                take_up(module)
        elif not on:
            take_off(module)
    return model
