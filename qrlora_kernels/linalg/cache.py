"""A folder of factorisations, so that the second start of a model only reads files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import save_tensors
from ..fingerprint import fingerprint
from .checks import named_matrices
from .records import Start, check_start, from_record, start_some, to_record

# Part of every key: raise it when the same options come to mean other factors.
FORMAT = 2


def cached_start(
    start: Start, weights: Sequence[Tensor], folder: str | os.PathLike[str], /, **options: Any
) -> list[Any]:
    """``start(weights, **options)``, reading from ``folder`` what an earlier call left there.

    A file is found by the digest of the weight's bits, shape and dtype, the start and the options
    that shape its result, so a changed weight or option is a miss. What is missing is computed in
    one batched call. A file that cannot be read is computed and written again.

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
        As ``start`` raises them, or ``start`` is another function.
    """
    check_start(start)
    if isinstance(weights, Tensor):
        raise TypeError("weights must be a list of tensors, got a Tensor")
    named_matrices(weights)
    store = Store(folder)
    keys = store.keys(start, weights, options)
    results = [store.read(start, key, w.device) for key, w in zip(keys, weights, strict=True)]
    missing = [i for i, result in enumerate(results) if result is None]
    for i, result in start_some(start, weights, missing, options).items():
        store.write(keys[i], result)
        results[i] = result
    return results


class Store:
    """The files of one folder, which is made if it does not exist."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.root = Path(folder)
        self.root.mkdir(parents=True, exist_ok=True)

    def keys(self, start: Start, weights: Sequence[Tensor], options: dict[str, Any]) -> list[str]:
        """The name of each matrix's file; hashing releases the GIL, so a thread per matrix."""
        shaping = {name: str(value) for name, value in options.items() if name != "progress"}

        def key(weight: Tensor) -> str:
            text = json.dumps(
                [FORMAT, start.__name__, fingerprint(weight), shaping], sort_keys=True
            )
            return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(key, weights))

    def path(self, key: str) -> Path:
        return self.root / f"{key}.safetensors"

    def read(self, start: Start, key: str, device: torch.device) -> Any:
        """The stored result on ``device``; None where there is no whole file."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                values = json.loads(file.metadata()["values"])
            return from_record(start, tensors, values)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None

    def write(self, key: str, result: Any) -> None:
        """Under a name of its own first: other processes see the whole file or none."""
        tensors, values = to_record(result)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_tensors(self.path(key), contiguous, {"values": json.dumps(values)})
