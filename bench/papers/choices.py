"""The settings of each method where a table does not vary them.

Every one is given in full: a row goes on meaning the same when a default changes.
"""

from __future__ import annotations

from typing import Any

TAU = 0.5
RANK = 16  # of LoRA-XS and OHoRA; r_high of MiniLM's layers

# Fields of a cell. The Kronecker start takes R[I, I]: to the letter of eq. 8, 9 some layers of
# MiniLM would start with both factors zero.
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    # The package's default, and the better of the rules in the table "The rank rule".
    "qr": {"options": {"tau": TAU, "rank_rule": "magnitude"}, "lr": 1e-1},
    "lora_xs": {"options": {"rank": RANK}, "lr": 2e-2},
    "ohora": {"options": {"rank": RANK, "columns": "selected"}, "lr": 2e-2},
    "lora": {"options": {"rank": 8}, "lr": 4e-3},
    "svd_lora": {"options": {"rank": 2, "directions": 1}, "lr": 4e-3},
    "pissa": {"options": {"rank": 8}, "lr": 2e-3},
    "vera": {"options": {"rank": 256}, "lr": 2e-2},
    "full": {"lr": 1e-4},
}
