"""All tables, in the order in which they are run and shown."""

from __future__ import annotations

from . import decisions

TABLES = {table.name: table for table in (*decisions.TABLES,)}
