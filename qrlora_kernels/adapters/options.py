"""What an adapter was built with: plain Python values, or a refusal when they are given.

A value that cannot be written into a file is found here, before a training run and not after it.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

LARGEST = torch.finfo(torch.float32).max  # what the kernels can multiply by
SEEDS = range(-(2**63), 2**64)  # what PyTorch's generators take

Own = TypeVar("Own", bound="Options")


@dataclass(frozen=True)
class Options:
    """What every adapter takes; kept with the layer and written into the adapter file.

    ``dropout`` is the probability of dropping an element of the adapter's input during training;
    the base product sees the whole input, as in PEFT. ``strength`` multiplies the scaling at run
    time, see :func:`qrlora_kernels.scale`: at 0 the layer is its base.
    """

    dropout: float = 0.0
    strength: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = plain_value(one.name, one.type, getattr(self, one.name))
            object.__setattr__(self, one.name, value)  # the way into a frozen dataclass
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        largest = self.scaling_of(1) * self.strength  # a rank above 1 only makes it smaller
        if not abs(largest) <= LARGEST:
            raise ValueError(
                f"scaling or alpha, times strength, must be within ±{LARGEST:.3g}, got {largest}"
            )
        seed = getattr(self, "seed", 0)
        if seed not in SEEDS:
            raise ValueError(f"seed must be in [-2^63, 2^64), got {seed}")

    def to_dict(self) -> dict[str, Any]:
        """Without a strength of 1, which releases that know no strength mean as well."""
        values = asdict(self)
        if self.strength == 1.0:
            del values["strength"]
        return values

    @property
    def form(self) -> str:
        """That of the operation, as ``Problem`` calls it: in "output" ΔW is made of W as it is."""
        return "two_sided"

    def scaling_of(self, rank: int) -> float:
        """s in front of an update of ``rank``, without the strength."""
        raise NotImplementedError

    def with_scaling(self: Own, scaling: float, rank: int) -> Own:
        """The same options with s = ``scaling``."""
        raise NotImplementedError


@dataclass(frozen=True)
class AlphaOptions(Options):
    """Options of an adapter with s = alpha / rank, or 1 without an alpha."""

    alpha: float | None = field(default=None, kw_only=True)

    def scaling_of(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / rank

    def with_scaling(self: Any, scaling: float, rank: int) -> Any:
        return replace(self, alpha=plain_value("scaling", "float", scaling) * rank)


def plain_value(name: str, kind: Any, value: Any) -> Any:
    """``value`` as the int, float, bool, str or None that the annotation ``kind`` asks for.

    NumPy's and PyTorch's scalars are taken for what they hold.

    Raises
    ------
    TypeError, ValueError
        If it is something else, or a number that is not finite.
    """
    allowed = str(kind).replace(" ", "").split("|")
    if value is None and "None" in allowed:
        return None
    if "bool" in allowed:
        if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
            return bool(value)
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    if "int" in allowed:
        return _integer(name, value)
    if "float" in allowed:
        return _number(name, value)
    if isinstance(value, str):
        return str.__str__(value)  # of an enum's member that is a string, its value
    raise TypeError(f"{name} must be a string, got {type(value).__name__}")


def _integer(name: str, value: Any) -> int:
    value = _scalar(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {_told(value)}")
    return int(value)


def _number(name: str, value: Any) -> float:
    value = _scalar(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a float, got {_told(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite and within fp64's range, got {value!r}")
    return number


def _scalar(name: str, value: Any) -> Any:
    """The Python number in a NumPy or PyTorch scalar of no dimension."""
    if isinstance(value, torch.Tensor) and value.is_meta:
        raise TypeError(f"{name} must hold a number, got a tensor on the meta device")
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def _told(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"
