"""Benchmarks against naive code, PEFT, LyCORIS and LAPACK: ``python -m bench --help``."""

from __future__ import annotations

import sys

from .machine import REPOSITORY

EXAMPLES = str(REPOSITORY / "examples")
if EXAMPLES not in sys.path:  # what is fine-tuned here is fine-tuned by the example's code
    sys.path.insert(0, EXAMPLES)
