"""Digests of tensors: an exact one for files and a quick one for memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 24  # elements hashed at a time, so that no whole copy is made
_WORD = 8  # bytes


def fingerprint(tensor: Tensor) -> str:
    """Hexadecimal digest of ``tensor``'s dtype, shape and bits, whatever its strides and device."""
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    if tensor.numel():
        rows = _resolved(tensor).reshape(tensor.shape[0] if tensor.dim() else 1, -1)
        for part in rows.split(max(1, _CHUNK // rows.shape[1])):
            digest.update(_bytes(part.cpu()).numpy().data)
    return digest.hexdigest()


def quick_digest(tensor: Tensor) -> str:
    """A digest in a fraction of the time, for comparisons in one process; never for a file.

    The bits as words of 64 are summed over rows and over columns modulo 2⁶⁴, and the sums hashed
    with dtype and shape: exact in any order, and every element counts. A change that cancels in
    each row and in each column goes unseen, so it is no cryptographic digest.
    """
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    if tensor.numel():
        rows = _resolved(tensor).reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)
        raw = _bytes(rows)
        whole = raw.shape[1] // _WORD * _WORD
        for sums in (*_sums(raw[:, :whole]), *_sums(_padded(raw[:, whole:]))):
            digest.update(sums)
    return digest.hexdigest()


def _resolved(tensor: Tensor) -> Tensor:
    """``tensor`` with the bits that it stands for, where a view only notes a sign."""
    return tensor.detach().resolve_conj().resolve_neg()


def _bytes(rows: Tensor) -> Tensor:
    """The bytes of ``rows`` [n, m] as [n, bytes]."""
    # A dimension of one element may keep any stride and pass for contiguous.
    packed = rows.contiguous().as_strided(rows.shape, (rows.shape[1], 1))
    return packed.view(torch.uint8)


def _padded(tail: Tensor) -> Tensor:
    """The last bytes of every row, [rows, 0 … 7], as whole words."""
    missing = -tail.shape[1] % _WORD
    return torch.nn.functional.pad(tail, (0, missing)) if missing else tail


def _sums(raw: Tensor) -> tuple[bytes, ...]:
    """Sums of 64-bit words of ``raw`` [rows, bytes] over each row and over each column."""
    if not raw.numel():
        return ()
    if raw.device.type == "cpu":
        # NumPy's sums of integers are ten times as fast as PyTorch's.
        words = np.ascontiguousarray(raw.numpy()).view(np.uint64)
        return words.sum(1, dtype=np.uint64).tobytes(), words.sum(0, dtype=np.uint64).tobytes()
    words_there = raw.contiguous().view(torch.int64)
    return tuple(words_there.sum(axis).cpu().numpy().tobytes() for axis in (1, 0))


def digest_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """One digest over names, dtypes, shapes and bits of ``tensors``, and over ``text``."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {fingerprint(tensors[name])}".encode())
    return digest.hexdigest()
