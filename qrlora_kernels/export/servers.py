"""What each server reads of a LoRA folder, and what it would get wrong: refused before a file is.

The facts are of PEFT 0.21, vLLM 0.33, SGLang 0.5 and llama.cpp's converter of 2026. Said in a
warning is what a server's own settings decide; everything else is a ValueError with the way out.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from .beside import TO_MERGED
from .factors import Pair
from .records import Source

Form = Literal["padded", "pattern"]
Server = Literal["peft", "vllm", "sglang", "llama.cpp"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
VLLM_DEFAULT_RANK = 16
VLLM_HEADS = ("classifier", "score")
VLLM_VOCABULARY = 258_048
EXPERT = re.compile(r"(.*\.experts\.)\d+\.(gate|up|down)_proj")
IN_SGLANG = re.compile(r"(.*\.)?layers\.\d+\..*|(.*\.)?(lm_head|embed_tokens)")
# What SGLang stacks: each of the first needs all of the second beside it in one layer.
STACKED = ((("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")), (("up_proj",), ("gate_proj",)))


@dataclass
class Draft:
    """A folder before it is written."""

    source: Source
    form: Form
    pairs: dict[str, Pair]
    folder: Path

    @property
    def rank(self) -> int:
        """The largest."""
        return max(pair.rank for pair in self.pairs.values())


def check(server: Server | None, draft: Draft) -> None:
    """Raise what the server would get wrong, say what its settings decide, add what it misses."""
    if server is not None:
        CHECKS[server](draft)


def _say(text: str) -> None:
    warnings.warn(text, stacklevel=5)


def _check_peft(draft: Draft) -> None:
    """It reads everything that is written."""


def _check_vllm(draft: Draft) -> None:
    _refuse_conv1d(draft, "vLLM has no LoRA for these models")
    if draft.rank > VLLM_RANKS[-1]:
        raise ValueError(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, got {draft.rank} in "
            f"{_largest(draft.pairs)}: give truncate={VLLM_RANKS[-1]}, or {TO_MERGED}"
        )
    heads = [*draft.source.heads]
    if len(heads) > 1 or not all(name in VLLM_HEADS for name in heads):
        raise ValueError(
            f"vLLM takes one head, called {' or '.join(VLLM_HEADS)}, got {', '.join(heads)}: "
            f"{TO_MERGED}"
        )
    if split := [n for n in heads if any("." in key for key in draft.source.heads[n])]:
        raise ValueError(f"vLLM takes heads of one layer, got several in {split[0]}: {TO_MERGED}")
    for name, pair in draft.pairs.items():
        if _leaf(name) == "lm_head" and len(pair.b) > VLLM_VOCABULARY:
            raise ValueError(
                f"vLLM adapts an output of at most {VLLM_VOCABULARY} words, got {len(pair.b)} in "
                f"{name}: leave it out of the adapter, or {TO_MERGED}"
            )
    _check_experts(draft)
    if draft.rank > VLLM_DEFAULT_RANK:
        needed = next(rank for rank in VLLM_RANKS if rank >= draft.rank)
        _say(f"rank {draft.rank}: start vLLM with --max-lora-rank {needed} or more")
    if heads:
        _say(f"vLLM reads the head {heads[0]} from its release 0.31 on")


def _check_experts(draft: Draft) -> None:
    """All three projections of an expert, and one rank over the experts of a projection."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name, pair in draft.pairs.items():
        if match := EXPERT.fullmatch(name):
            found[match[1]][match[2]].add(pair.rank)
    for prefix, ranks in found.items():
        if missing := {"gate", "up", "down"} - ranks.keys():
            raise ValueError(
                f"vLLM needs gate, up and down of the experts in {prefix}*, got none of "
                f"{', '.join(sorted(missing))}: adapt these too, or {TO_MERGED}"
            )
        if draft.form == "pattern" and any(len(of_one) > 1 for of_one in ranks.values()):
            raise ValueError(
                f"vLLM needs one rank over the experts in {prefix}*, got several: give "
                "form='padded'"
            )


def _check_sglang(draft: Draft) -> None:
    _refuse_conv1d(draft, "SGLang has no LoRA for these models")
    _refuse_pattern(draft, "SGLang reads one rank for all layers")
    _refuse_heads(draft, "SGLang drops them without a word")
    for name in draft.pairs:
        if not IN_SGLANG.fullmatch(name):
            raise ValueError(
                f"SGLang finds layers by 'layers.<number>.' in their names and drops others, got "
                f"{name}: {TO_MERGED}"
            )
    stray = sorted(draft.folder.glob("*.safetensors")) if draft.folder.is_dir() else []
    if others := [file.name for file in stray if file.name != "adapter_model.safetensors"]:
        raise ValueError(
            f"SGLang reads every safetensors file of the folder, got {others[0]} in {draft.folder}:"
            " give a folder of its own"
        )
    here = draft.source.modules
    for name, beside in _missing(draft.pairs):
        if here and beside not in here:
            continue  # an MLP without a gate
        if not here:
            raise ValueError(
                f"SGLang needs {beside} beside {name}, whose shape only the model knows: give the "
                "model in place of the file"
            )
        draft.pairs[beside] = _silent(here[beside], draft.pairs[name])


def _missing(pairs: Iterable[str]) -> Iterator[tuple[str, str]]:
    """A layer that is there, and one that SGLang needs beside it and that is not."""
    there = set(pairs)
    for some, needed in STACKED:
        wanted = {
            f"{name.removesuffix(_leaf(name))}{leaf}": name
            for name in sorted(there)
            if _leaf(name) in some
            for leaf in needed
        }
        for beside, name in wanted.items():
            if beside not in there:
                yield name, beside


def _silent(layer: nn.Module, like: Pair) -> Pair:
    """A pair for ``layer`` that adds nothing."""
    n, k = layer.out_features, layer.in_features
    assert isinstance(n, int)
    assert isinstance(k, int)
    return Pair(like.a.new_zeros(1, k), like.b.new_zeros(n, 1))


def _check_llama_cpp(draft: Draft) -> None:
    _refuse_conv1d(draft, "llama.cpp's converter transposes their factors")
    _refuse_pattern(draft, "llama.cpp divides lora_alpha by each layer's own rank")
    _refuse_heads(draft, "llama.cpp's converter ends at them")
    for name, update in draft.source.updates.items():
        if update.tied:
            raise ValueError(
                f"llama.cpp has no tensor for {name}, whose weight is another module's too: leave "
                f"it out of the adapter, or {TO_MERGED}"
            )
    if draft.source.root is None and any(_leaf(name) == "lm_head" for name in draft.pairs):
        raise ValueError(
            "only the model knows whether its output is tied, which llama.cpp does not read: give "
            "the model in place of the file"
        )
    if draft.source.base_name is None:
        _say("the base's name is not known: give llama.cpp's converter --base")


def _refuse_conv1d(draft: Draft, why: str) -> None:
    for name, update in draft.source.updates.items():
        if update.conv1d:
            raise ValueError(f"{name} is a Conv1D, and {why}: {TO_MERGED}")


def _refuse_pattern(draft: Draft, why: str) -> None:
    if draft.form == "pattern":
        raise ValueError(f"form must be 'padded', since {why}, got 'pattern'")


def _refuse_heads(draft: Draft, why: str) -> None:
    if draft.source.heads:
        raise ValueError(f"{', '.join(draft.source.heads)} trained in full, and {why}: {TO_MERGED}")


def _largest(pairs: dict[str, Pair]) -> str:
    return max(pairs, key=lambda name: pairs[name].rank)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


CHECKS: dict[Server, Callable[[Draft], None]] = {
    "peft": _check_peft,
    "vllm": _check_vllm,
    "sglang": _check_sglang,
    "llama.cpp": _check_llama_cpp,
}
