"""What is measured on a trained model beside its score, by the name that a cell asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetuning.settings import Settings

MEASURES: dict[str, Callable[[Settings], Any]] = {}
