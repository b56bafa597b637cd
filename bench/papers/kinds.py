"""What kind of module a layer is, whatever its number."""

from __future__ import annotations


def module_kind(name: str) -> str:
    """ "encoder.layer.3.attention.self.query" gives "query", "…3.output.dense" "output.dense"."""
    parts = name.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    own = parts[numbered[-1] + 1 :] if numbered else parts
    # A name such as "dense" says nothing without its parents.
    return ".".join(own) if own[-1] == "dense" else own[-1]
