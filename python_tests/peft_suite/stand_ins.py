"""Modules that PEFT's tests import and none of ours uses: gigabytes that need not be installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Pipeline:
    """``diffusers.StableDiffusionPipeline``, which the tests ask about with ``isinstance``."""


def _no_data(*_: Any, **__: Any) -> None:
    raise RuntimeError("datasets is not installed: no test that needs it can be run")


_CONTENTS: dict[str, dict[str, Any]] = {
    "diffusers": {"StableDiffusionPipeline": _Pipeline, "__version__": "0"},
    "datasets": {"load_dataset": _no_data},
}


@contextmanager
def stand_ins() -> Iterator[None]:
    """While the tests are imported, and no longer: libraries look for these modules themselves."""
    missing = {name: what for name, what in _CONTENTS.items() if find_spec(name) is None}
    for name, contents in missing.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, loader=None)
        vars(module).update(contents)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
