"""The tables and figures of the three papers, in kind, on a small model: ``make papers``."""

from __future__ import annotations

import sys

from ..machine import REPOSITORY

EXAMPLES = str(REPOSITORY / "examples")
if EXAMPLES not in sys.path:  # the training code of the tables is the example's
    sys.path.insert(0, EXAMPLES)
