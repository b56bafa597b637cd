"""A batch whose rows have an adapter each, by how many are resident, and what comes and goes."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import qrlora_kernels as qk

from .base import RANKS, adapted, difference, in_turn, lora_numbers, milliseconds, put, ratio
from .sizes import ROWS, Sizes

FIRST_WORD, WORDS = 1000, 1000  # of the vocabulary: none is a mark


def serve(sizes: Sizes) -> dict[str, Any]:
    """A row for each rank and number of adapters."""
    rows = []
    with tqdm(total=len(RANKS) * len(sizes.resident), unit="table") as bar:
        for label, options in RANKS.items():
            model = adapted(head=False, **options).eval()
            for resident in sizes.resident:
                bar.set_description(f"{label}, {resident:,} resident")
                rows.append({"adapter": label, **_measure(model, resident, sizes)})
                bar.update()
    return {"rows": rows}


def _measure(model: nn.Module, resident: int, sizes: Sizes) -> dict[str, Any]:
    bank, files = _filled(model, resident, room=sizes.calls)
    return {
        "resident": resident,
        "numbers": bank.numbers,
        "bytes": bank.nbytes,
        "lora_bytes": resident * 4 * lora_numbers(model),
        **files,
        "difference": _gate(bank, sizes.short),
        **_batches(bank, sizes),
        **_changes(bank, sizes.calls),
    }


def _filled(model: nn.Module, resident: int, room: int) -> tuple[qk.AdapterBank, dict[str, Any]]:
    """A bank of random adapters from a packed file, and what the file took."""
    first = qk.AdapterBank(model, resident)
    generator = torch.Generator().manual_seed(0)
    start = first.layout.begin()
    for number in range(resident):
        row = start + 0.05 * torch.randn(start.shape, generator=generator)
        first.add(f"user {number}", first.layout.state(row))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.safetensors"
        first.pack(path)
        del first
        bank = qk.AdapterBank(model, resident + room)
        begin = time.perf_counter()
        bank.load(path)
        seconds = time.perf_counter() - begin
        return bank, {"file_bytes": path.stat().st_size, "load_seconds": round(seconds, 3)}


def _some(bank: qk.AdapterBank, seed: int) -> list[str]:
    """A name for each row, as many others as there are: drawn anew by each seed."""
    names, chosen = bank.names(), random.Random(seed)
    distinct = chosen.sample(names, min(ROWS, len(names)))
    return [distinct[row % len(distinct)] for row in range(ROWS)]


def _answers(
    bank: qk.AdapterBank, tokens: int
) -> tuple[Callable[..., Tensor], Callable[[], Tensor]]:
    """Two calls over the same rows: of adapters by name, and of the model's own."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(WORDS, (ROWS, tokens), generator=generator) + FIRST_WORD
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def own() -> Tensor:
        hidden: Tensor = bank.model.get_submodule("encoder")(**inputs).last_hidden_state
        return hidden

    def mixed(names: list[str]) -> Tensor:
        with torch.no_grad(), bank.use(names):
            return own()

    return mixed, own


def _gate(bank: qk.AdapterBank, tokens: int) -> float:
    """The largest difference of a row from what its adapter alone answers, put into the model."""
    mixed, own = _answers(bank, tokens)
    names = _some(bank, 0)
    together, differences = mixed(names), []
    for name in dict.fromkeys(names):
        put(bank.model, bank.state(name))
        mine = [row for row, one in enumerate(names) if one == name]
        differences.append(difference(together[mine], own()[mine]))
    return max(differences)


def _batches(bank: qk.AdapterBank, sizes: Sizes) -> dict[str, float]:
    """The mixed batch against the model's own adapter's; then many short calls, other rows each."""
    mixed, own = _answers(bank, sizes.tokens)
    names = _some(bank, 0)
    compared = in_turn({"mixed": lambda: mixed(names), "own": own}, sizes.rounds)
    mixed, own = _answers(bank, sizes.short)
    drawn = iter([_some(bank, seed) for seed in range(sizes.calls + 1)])
    many = in_turn({"mixed": lambda: mixed(next(drawn)), "own": own}, sizes.calls)
    return {
        "ratio": ratio(compared, "mixed", "own"),
        "p50_ms": milliseconds(many["mixed"]),
        "p99_ms": milliseconds(many["mixed"], 0.99),
        "own_p50_ms": milliseconds(many["own"]),
        "own_p99_ms": milliseconds(many["own"], 0.99),
    }


def _changes(bank: qk.AdapterBank, calls: int) -> dict[str, float]:
    """Microseconds of an add, a replace and an evict, the median of each."""
    state = bank.state(bank.names()[0])
    new = [f"new {number}" for number in range(calls)]

    def microseconds(change: Callable[[str], object]) -> float:
        seconds = []
        for name in new:
            start = time.perf_counter()
            change(name)
            seconds.append(time.perf_counter() - start)
        return round(median(seconds) * 1e6, 1)

    return {
        "add_us": microseconds(lambda name: bank.add(name, state)),
        "replace_us": microseconds(lambda name: bank.replace(name, state)),
        "evict_us": microseconds(bank.evict),
    }
