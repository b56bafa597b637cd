"""What the cache and the ranks share: a start of some matrices, a result taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .checks import renamed_matrices
from .kron import KronFactors, kron_factors
from .pivoted_qr import PivotedQR, pivoted_qr
from .svd import TruncatedSVD, truncated_svd

Start = Callable[..., Any]
_RESULTS: dict[Start, type[Any]] = {
    pivoted_qr: PivotedQR,
    truncated_svd: TruncatedSVD,
    kron_factors: KronFactors,
}


def check_start(start: Start) -> None:
    if start not in _RESULTS:
        names = ", ".join(known.__name__ for known in _RESULTS)
        raise ValueError(f"start must be one of {names}, got {start!r}")


def shaping_options(options: Mapping[str, Any]) -> dict[str, str]:
    """The options that shape a start's result, as text."""
    return {name: str(value) for name, value in options.items() if name != "progress"}


def start_some(
    start: Start, weights: Sequence[Tensor], chosen: Sequence[int], options: Mapping[str, Any]
) -> dict[int, Any]:
    """``start`` of the chosen matrices by index; its errors name them as they stand in the list."""
    if not chosen:
        return {}
    with renamed_matrices([f"weights[{i}]" for i in chosen]):
        results = start([weights[i] for i in chosen], **options)
    return dict(zip(chosen, results, strict=True))


def to_record(result: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the other fields of a result, by name."""
    if dataclasses.is_dataclass(result):
        fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    else:
        fields = result._asdict()
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in fields.items() if name not in tensors}


def from_record(start: Start, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Any:
    """The result of ``start`` that :func:`to_record` took apart."""
    if isinstance(values.get("bracket"), list):  # JSON knows no tuples
        values = {**values, "bracket": tuple(values["bracket"])}
    return _RESULTS[start](**tensors, **values)
