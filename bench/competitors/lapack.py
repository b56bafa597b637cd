"""LAPACK 3.12's truncated pivoted QR, geqp3rk, from the OpenBLAS that scipy carries.

No Python package exposes it; anyone who wants it today writes this call.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..problem import Unavailable

Array = npt.NDArray[Any]
_PREFIX = {
    np.dtype(np.float32): ("s", ctypes.c_float),
    np.dtype(np.float64): ("d", ctypes.c_double),
}


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("scipy")
    if spec is None or spec.origin is None:
        raise Unavailable("scipy not installed")
    package = Path(spec.origin).parent
    for path in sorted((package.parent / "scipy.libs").glob("libscipy_openblas*")):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "scipy_sgeqp3rk_"):
            return library
    raise Unavailable("scipy's OpenBLAS exports no geqp3rk (LAPACK 3.12)")


def geqp3rk(weight: Array, rank: int) -> tuple[Array, Array, Array]:
    """(q [N, k], r [k, K] in the original column order, pivots [k]) of the first ``rank`` steps."""
    prefix, real = _PREFIX[weight.dtype]
    rows, columns = weight.shape
    a = np.asfortranarray(weight)  # a copy where the weight is in C order, as torch's are
    a = a.copy(order="F") if a is weight else a
    pivots, reflectors = np.zeros(columns, np.int32), np.zeros(min(rows, columns), weight.dtype)
    found, info = ctypes.c_int(), ctypes.c_int()
    largest, relative = real(), real()
    work_indices = np.zeros(max(columns - 1, 1), np.int32)

    def factorise(work: Array, size: int) -> None:
        getattr(_library(), f"scipy_{prefix}geqp3rk_")(
            *_ints(rows, columns, 0, rank),
            *(ctypes.byref(real(-1.0)) for _ in range(2)),  # no tolerance: stop at rank
            _at(a),
            *_ints(rows),
            *(ctypes.byref(out) for out in (found, largest, relative)),
            _at(pivots),
            _at(reflectors),
            _at(work),
            *_ints(size),
            _at(work_indices),
            ctypes.byref(info),
        )
        if info.value < 0:
            raise ValueError(f"geqp3rk refused argument {-info.value}")

    query = np.zeros(1, weight.dtype)
    factorise(query, -1)
    work = np.zeros(int(query[0]), weight.dtype)
    factorise(work, len(work))
    k = found.value
    order = pivots - 1
    r = np.zeros((k, columns), weight.dtype)
    r[:, order] = np.triu(a[:k])
    return _orthonormal(a[:, :k], reflectors, prefix), r, order[:k].astype(np.int64)


def _orthonormal(a: Array, reflectors: Array, prefix: str) -> Array:
    """Q [N, k] from Householder vectors, by orgqr."""
    rows, k = a.shape
    q, info = np.asfortranarray(a), ctypes.c_int()

    def expand(work: Array, size: int) -> None:
        getattr(_library(), f"scipy_{prefix}orgqr_")(
            *_ints(rows, k, k),
            _at(q),
            *_ints(rows),
            _at(reflectors),
            _at(work),
            *_ints(size),
            ctypes.byref(info),
        )

    query = np.zeros(1, a.dtype)
    expand(query, -1)
    work = np.zeros(int(query[0]), a.dtype)
    expand(work, len(work))
    return q


def _at(array: Array) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _ints(*values: int) -> list[Any]:
    return [ctypes.byref(ctypes.c_int(value)) for value in values]
