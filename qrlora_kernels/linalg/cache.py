"""A folder of factorisations, so that the second start of a model only reads files."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import save_tensors
from ..fingerprint import digest_of, fingerprint
from .checks import Named, Weights, named_matrices
from .kron import KronFactors, kron_factors
from .parallel import in_threads
from .pivoted_qr import PivotedQR, pivoted_qr
from .svd import TruncatedSVD, truncated_svd

# Part of every key: raise it when the same options come to mean other factors.
FORMAT = 3

Start = Callable[..., Any]
_RESULTS: dict[Start, type[Any]] = {
    pivoted_qr: PivotedQR,
    truncated_svd: TruncatedSVD,
    kron_factors: KronFactors,
}


def cached_start(
    start: Start, weights: Weights, folder: str | os.PathLike[str], /, **options: Any
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
    weights : sequence of Tensor [N, K], or mapping from the names that errors use
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
    check_start(start, weights)
    named = named_matrices(weights)
    store = Store(folder)
    keys = store.keys(start, named.values(), options)
    found = store.read(start, keys, named.values())
    missing = [i for i in range(len(keys)) if i not in found]
    made = start_some(start, named, missing, options)
    unkept = store.keep({keys[i]: result for i, result in made.items()})
    if unkept is not None:
        warnings.warn(unkept, stacklevel=2)
    found |= made
    return [found[i] for i in range(len(keys))]


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

    def keys(self, start: Start, weights: Iterable[Tensor], options: dict[str, Any]) -> list[str]:
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

    def read(self, start: Start, keys: Iterable[str], weights: Iterable[Tensor]) -> dict[int, Any]:
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
                tensors, values = to_record(result)
                tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
                text = json.dumps(values)
                # One entry: safetensors writes several in an order that changes from call to call.
                entry = json.dumps([_digest(key, tensors, text), text])
                save_tensors(self.path(key), tensors, {"entry": entry})
        except (SafetensorError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return (
                f"cannot keep factors in the cache folder {self.root}: {reason}; the start is "
                "complete, and the next one computes again what is missing there"
            )
        return None


def _digest(key: str, tensors: Mapping[str, Tensor], values: str) -> str:
    """Of everything in a file, and of the place it was written for."""
    return digest_of(tensors, f"{key} {values}")


def check_start(start: Start, weights: Weights) -> None:
    if start not in _RESULTS:
        names = ", ".join(known.__name__ for known in _RESULTS)
        raise ValueError(f"start must be one of {names}, got {start!r}")
    if isinstance(weights, Tensor):
        raise TypeError("weights must be a list of tensors, got a Tensor")


def shaping_options(options: Mapping[str, Any]) -> dict[str, str]:
    """The options that shape a start's result, as text."""
    return {name: str(value) for name, value in options.items() if name != "progress"}


def start_some(
    start: Start, named: Named, chosen: Sequence[int], options: Mapping[str, Any]
) -> dict[int, Any]:
    """``start`` of the chosen matrices by index."""
    names = list(named)
    results = start({names[i]: named[names[i]] for i in chosen}, **options) if chosen else []
    return dict(zip(chosen, results, strict=True))


def to_record(result: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the other fields of a result, by name."""
    fields = result._asdict() if hasattr(result, "_asdict") else vars(result)
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in fields.items() if name not in tensors}


def from_record(start: Start, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Any:
    """The result of ``start`` that :func:`to_record` took apart."""
    if isinstance(values.get("bracket"), list):  # JSON knows no tuples
        values = {**values, "bracket": tuple(values["bracket"])}
    return _RESULTS[start](**tensors, **values)
