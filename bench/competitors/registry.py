"""Where variants register: layers (a Runner for a problem) and starts (factors of one weight)."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..problem import LayerProblem, Runner, Unavailable

R_KRON = "r-kron"  # OHoRA's layer with its product formed, the rival that its paper times
_PROVIDERS = ("plain", "ours", "peft_adapters", "lycoris_lokr", "starts")


@dataclass(frozen=True)
class Layer:
    """A way to run an adapted layer of a family ("" for the floor).

    ``needs`` are modules that must be importable; ``half_only`` variants differ from another one
    only over half-precision weights; ``not_in`` are suites that leave it to ``--full``.
    """

    name: str
    adapter: str
    build: Callable[[LayerProblem], Runner]
    needs: tuple[str, ...] = ()
    half_only: bool = False
    not_in: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.adapter} {self.name}".strip()

    def start(self, problem: LayerProblem) -> Runner:
        """Build it, or raise :class:`Unavailable` with the reason."""
        require(self.needs)
        return self.build(problem)


@dataclass(frozen=True)
class Start:
    """A way to factorise a weight [N, K]: ``run(prepare(weight, rank), rank)``, run is timed.

    ``family`` is "qr" (factors, and the greedy diagonal of R are checked), "svd" (singular values
    are checked), "floor", or "" (other mathematics).
    """

    name: str
    family: str
    run: Callable[[Any, int], Any]
    prepare: Callable[[Tensor, int], Any] = lambda weight, rank: weight
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    largest: int = 1 << 30  # skipped in shorter runs above this min(N, K): it takes minutes


LAYERS: list[Layer] = []
STARTS: list[Start] = []


def require(modules: Sequence[str]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"{', '.join(missing)} not installed")


def layers_for(adapters: Sequence[str] = (), variants: Sequence[str] = ()) -> list[Layer]:
    """The floor, and the layers of these families whose key holds one of ``variants``."""
    _load()
    return select(LAYERS, adapters, variants)


def select(
    layers: Sequence[Layer], adapters: Sequence[str], variants: Sequence[str]
) -> list[Layer]:
    """As :func:`layers_for`, of layers that are registered nowhere."""
    chosen = [
        layer
        for layer in layers
        if layer.adapter
        and (not adapters or layer.adapter in adapters)
        and (not variants or any(v in layer.key for v in variants))
    ]
    return [layer for layer in layers if not layer.adapter] + chosen


def starts_for(variants: Sequence[str] = ()) -> list[Start]:
    """The floor, and the starts whose family and name hold one of ``variants``."""
    _load()
    return [
        start
        for start in STARTS
        if start.family == "floor"
        or not variants
        or any(v in f"{start.family} {start.name}" for v in variants)
    ]


@contextlib.contextmanager
def temporarily(layer: Layer) -> Iterator[None]:
    """Register a layer for the time of the block."""
    _load()
    LAYERS.append(layer)
    try:
        yield
    finally:
        LAYERS.remove(layer)


def _load() -> None:
    for name in _PROVIDERS:
        importlib.import_module(f"{__package__}.{name}")
