"""Names of layers and tensors without the wrappers that others put around modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor, nn

# torch.compile, DistributedDataParallel and DataParallel, FSDP, activation checkpointing.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Value = TypeVar("Value")


def canonical(name: str) -> str:
    """``name`` without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def check_model(model: object) -> None:
    """Raise where something else was passed for the model, such as a path."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers of the whole model."""
    check_model(model)
    while True:
        inside = [model._modules.get(name) for name in WRAPPERS]
        found = [m for m in inside if m is not None]
        if len(model._modules) != 1 or not found:
            return model
        model = found[0]


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its name, those with several names under each of them."""
    check_model(model)
    return _unique(model.named_modules(remove_duplicate=False))


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its name, tied ones under each of theirs."""
    return _unique(model.named_parameters(remove_duplicate=False))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Every buffer that a state dict holds, by its name."""
    return {
        name: buffer
        for name, module in modules(model).items()
        for name, buffer in _persistent(name, module)
    }


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return {**buffers(model), **parameters(model)}


def _persistent(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield f"{name}.{key}" if name else key, buffer


def _unique(named: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, value in named:
        known = found.setdefault(canonical(name), value)
        if known is not value and not _wraps(value, known):
            raise ValueError(
                f"model has two different things called {canonical(name)!r} once the names of "
                f"wrappers ({', '.join(WRAPPERS)}) are taken out"
            )
        found[canonical(name)] = value  # the innermost: what a wrapper holds
    return found


def _wraps(inner: object, outer: object) -> bool:
    """Whether ``outer`` is a wrapper and ``inner`` what it holds."""
    return isinstance(outer, nn.Module) and any(
        outer._modules.get(name) is inner for name in WRAPPERS
    )


def within(name: str, prefixes: Sequence[str]) -> bool:
    """Whether ``name`` lies in one of the named modules (full name or suffix of a path)."""
    return any(f".{prefix}." in f".{name}." for prefix in prefixes)


def under(name: str, tops: Sequence[str]) -> bool:
    """Whether ``name`` is one of the modules with these full names, or lies in one."""
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def as_names(argument: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several, of any iterable, which is read once; without those of wrappers."""
    if not isinstance(given, Iterable):
        raise TypeError(
            f"{argument} must be a name or an iterable of names, got {type(given).__name__}"
        )
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must hold strings, got {type(name).__name__}")
    return tuple(canonical(name) or name for name in names)
