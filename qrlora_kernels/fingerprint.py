"""A digest of a tensor's shape, dtype and bits, to tell one base weight from another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_CHUNK = 1 << 24  # elements hashed at a time, so that no whole copy is made


def fingerprint(tensor: Tensor) -> str:
    """Hexadecimal digest of ``tensor``'s dtype, shape and bits, whatever its strides and device."""
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    tensor = tensor.detach().resolve_neg()
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1, 1)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for part in rows.split(step):
        digest.update(part.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()
