"""An adapted layer in training on a CPU, beside all that the processor's library gives by hand."""

from __future__ import annotations

from ..competitors import Layer, layers_for, select
from ..competitors.ours import NAME, prepacked
from ..competitors.rivals import rivals
from ..registry import GridCase
from ..rows import Row
from .common import FLOOR, Options
from .grid import at_all_ranks

_PLAIN = (FLOOR, NAME, "eager", "addmm")
_FAMILIES = ("", "qr", "lora_xs", "ohora")


def run(case: GridCase, options: Options) -> list[Row]:
    """Rows of the frozen layers, LoRA over both, and of each family's variants at all ranks."""
    known = layers_for(options.adapters, options.variants)
    plain = [one for one in known if one.name in _PLAIN and one.adapter in _FAMILIES]
    others: list[Layer] = select([*prepacked(), *rivals()], options.adapters, options.variants)
    return at_all_ranks("cpu", case, options, plain + others)
