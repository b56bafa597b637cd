"""Whole models: which layers are adapted, what is remembered, files, tables."""

from .adapt import adapt, adapted_layers, count_parameters
from .combining import combine
from .lifecycle import merge, refresh, unload, unmerge
from .loading import load_adapter
from .prepack import prepack
from .resizing import set_rank
from .saving import save_adapter
from .strength import disabled, scale
from .summary import summary

__all__ = [
    "adapt",
    "adapted_layers",
    "combine",
    "count_parameters",
    "disabled",
    "load_adapter",
    "merge",
    "prepack",
    "refresh",
    "save_adapter",
    "scale",
    "set_rank",
    "summary",
    "unload",
    "unmerge",
]
