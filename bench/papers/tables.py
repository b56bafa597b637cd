"""All tables, in the order in which they are run and shown."""

from __future__ import annotations

from . import costs, decisions, lora_xs, ohora, qr_lora, weights
from .page import AnyTable

_ALL: tuple[AnyTable, ...] = (
    *decisions.TABLES,
    *qr_lora.TABLES,
    *lora_xs.TABLES,
    *ohora.TABLES,
    *weights.TABLES,
    *costs.TABLES,
)
TABLES: dict[str, AnyTable] = {table.name: table for table in _ALL}
