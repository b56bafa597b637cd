"""Many adapters over one model: a table of what trains, rows of a batch, gradients of each."""

from .bank import AdapterBank
from .batch import Batch
from .optimizer import BankAdamW
from .per_example import PerExample, per_example

__all__ = ["AdapterBank", "BankAdamW", "Batch", "PerExample", "per_example"]
