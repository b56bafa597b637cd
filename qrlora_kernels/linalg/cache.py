"""A folder of factorisations, so that the second start of a model only reads files."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import save_tensors
from ..fingerprint import digest_of, fingerprint
from .checks import named_matrices
from .parallel import in_threads
from .records import Start, check_start, from_record, shaping_options, start_some, to_record

# Part of every key: raise it when the same options come to mean other factors.
FORMAT = 3


def cached_start(
    start: Start, weights: Sequence[Tensor], folder: str | os.PathLike[str], /, **options: Any
) -> list[Any]:
    """``start(weights, **options)``, reading from ``folder`` what an earlier call left there.

    A file is found by the digest of the weight's bits, shape and dtype, the start and the options
    that shape its result, so a changed weight or option is a miss. What is missing is computed in
    one batched call. A file that cannot be read, or holds other bits than were written, is computed
    and written again. Where nothing can be written (a full disk, a folder that is read only), the
    results are returned all the same and a warning names the folder.

    Parameters
    ----------
    start : pivoted_qr, truncated_svd or kron_factors
    weights : sequence of Tensor [N, K]
    folder : path
        Made if it does not exist. Files of q and r are as large as the factors.
    **options
        As ``start`` takes them.

    Returns
    -------
    list
        The results in the order of ``weights``, on the devices of the weights.

    Raises
    ------
    TypeError, ValueError
        As ``start`` raises them, ``start`` is another function, or ``folder`` is a file.
    """
    check_start(start)
    if isinstance(weights, Tensor):
        raise TypeError("weights must be a list of tensors, got a Tensor")
    named_matrices(weights)
    store = Store(folder)
    keys = store.keys(start, weights, options)
    found = store.read(start, keys, weights)
    missing = [i for i in range(len(weights)) if i not in found]
    made = start_some(start, weights, missing, options)
    unkept = store.keep({keys[i]: result for i, result in made.items()})
    if unkept is not None:
        warnings.warn(unkept, stacklevel=2)
    found |= made
    return [found[i] for i in range(len(weights))]


class Store:
    """The files of one folder, which is made if it does not exist.

    Raises
    ------
    ValueError
        ``folder`` is a file or lies in one: a mistake, seen before anything is computed. A folder
        that cannot be made for another reason is noticed by :meth:`keep`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.root = Path(folder)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"cache must be a folder, got {self.root}, which is a file") from None
        except OSError:
            pass

    def keys(self, start: Start, weights: Sequence[Tensor], options: dict[str, Any]) -> list[str]:
        """The name of each matrix's file."""
        shaping = shaping_options(options)

        def key(weight: Tensor) -> str:
            text = json.dumps(
                [FORMAT, start.__name__, fingerprint(weight), shaping], sort_keys=True
            )
            return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

        return in_threads(key, weights)

    def path(self, key: str) -> Path:
        return self.root / f"{key}.safetensors"

    def read(self, start: Start, keys: Sequence[str], weights: Sequence[Tensor]) -> dict[int, Any]:
        """The stored results by index, on the devices of the weights; no more than are whole."""
        results = in_threads(lambda key, w: self._read(start, key, w.device), keys, weights)
        return {i: result for i, result in enumerate(results) if result is not None}

    def _read(self, start: Start, key: str, device: torch.device) -> Any:
        """None where there is no file with the content that was written there."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                digest, values = json.loads(file.metadata()["entry"])
            if digest != _digest(key, tensors, values):
                return None
            there = {name: tensor.to(device) for name, tensor in tensors.items()}
            return from_record(start, there, json.loads(values))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None

    def keep(self, results: Mapping[str, Any]) -> str | None:
        """Write results by key; what prevents it, as a sentence with the folder, or None.

        Each is written under a name of its own first: other processes see a whole file or none.
        The first that cannot be written is the last that is tried.
        """
        try:
            for key, result in results.items():
                self._write(key, result)
        except (SafetensorError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return (
                f"cannot keep factors in the cache folder {self.root}: {reason}; the start is "
                "complete, and the next one computes again what is missing there"
            )
        return None

    def _write(self, key: str, result: Any) -> None:
        tensors, values = to_record(result)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        text = json.dumps(values)
        # One entry: safetensors writes several in an order that changes from call to call.
        entry = json.dumps([_digest(key, contiguous, text), text])
        save_tensors(self.path(key), contiguous, {"entry": entry})


def _digest(key: str, tensors: Mapping[str, Tensor], values: str) -> str:
    """Of everything in a file, and of the place it was written for."""
    return digest_of(tensors, f"{key} {values}")
