"""The short tables: what a reader of the README wants to know, chosen from the recorded rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from .losses import NAMES, OURS
from .rows import OTHER, RED, SKIPPED, Row
from .table import by_case, markdown, quantity

READERS = ("qr", "lora_xs", "ohora")
_PLAIN = ("eager", "torch.compile", "addmm")
_STARTS = {
    "qrlora_kernels pivoted_qr": "**QR-LoRA: pivoted QR**",
    "scipy geqp3": "pivoted QR in scipy (geqp3)",
    "LAPACK geqp3rk": "pivoted QR in LAPACK (geqp3rk)",
    "qrlora_kernels truncated_svd": "**LoRA-XS: truncated SVD**",
    "torch.linalg.svd": "SVD in PyTorch",
    "qrlora_kernels kron_factors": "**OHoRA: QR and Kronecker factors**",
}
_MODELS = {"minilm": "MiniLM-L6", "llama-block": "a LLaMA-3 block"}


@dataclass(frozen=True)
class Line:
    """A line of a short table: its name, and which rows it may take the best of."""

    name: str
    takes: Callable[[Row], bool]


def lines_for(families: Iterable[str] = NAMES) -> list[Line]:
    """This package and its alternatives, family by family."""
    found = []
    for family in families:
        found.append(_line(f"**{NAMES[family]}, this package**", family, (OURS,)))
        found.append(_line(f"{NAMES[family]}, best of {', '.join(_PLAIN)}", family, _PLAIN))
    found.append(_line("LoKr, best of LyCORIS", "lokr", ("lycoris",)))
    found.append(_line("LoKr, best of PEFT", "lokr", ("peft",)))
    found.append(
        Line(
            "LoRA (other maths), PEFT default", lambda r: (r.adapter, r.variant) == ("lora", "peft")
        )
    )
    found.append(_line("LoRA (other maths), best of PEFT", "lora", ("peft",)))
    return found


def _line(name: str, family: str, prefixes: tuple[str, ...]) -> Line:
    def takes(row: Row) -> bool:
        return row.adapter == family and row.variant.partition("/")[0] in prefixes

    return Line(name, takes)


def readers_lines() -> list[Line]:
    """The lines of the README: the three adapters, the same in PyTorch, and PEFT's LoRA."""
    found = []
    for family in READERS:
        found.append(_line(f"**{NAMES[family]}**", family, (OURS,)))
        found.append(_line(f"{NAMES[family]} in PyTorch", family, _PLAIN))
    return [*found, _line("LoRA in PEFT (other maths)", "lora", ("peft",))]


def readers_starts() -> list[Line]:
    """Likewise of the starts."""
    return [Line(name, partial(_is_variant, variant)) for variant, name in _STARTS.items()]


def layer_table(rows: list[Row], wanted: list[Line]) -> str:
    """Forward and backward of the layer, by tokens, at the shape with most of them."""
    chosen = [r for r in rows if r.suite == "layer" and r.metric == "both" and r.ratio]
    chosen = [r for r in chosen if _best_clock(r, rows)]
    shapes: dict[tuple[int, int, str], set[int]] = {}
    for row in chosen:
        if not row.adapter:
            shapes.setdefault((row.n, row.k, row.dtype), set()).add(row.m)
    if not shapes:
        return ""
    n, k, dtype = shape = max(shapes, key=lambda key: len(shapes[key]))
    tokens = sorted(shapes[shape])
    groups = [[r for r in chosen if (r.n, r.k, r.dtype) == shape and r.m == m] for m in tokens]
    head = [f"one layer, {n}×{k} {dtype}", *(f"{m:,} tokens" for m in tokens)]
    lines = [Line("frozen layer", lambda row: not row.adapter), *wanted]
    return _table(head, lines, groups, min)


def model_table(rows: list[Row], wanted: list[Line]) -> str:
    """Tokens a second in a training step."""
    chosen = [r for r in rows if r.suite == "model" and r.metric == "tokens"]
    cases = by_case([r for r in chosen if r.clock == "wall" and r.value])
    head = ["one training step", *(_spoken(group[0].model) for group in cases)]
    lines = [Line("frozen model", lambda row: not row.adapter)]
    return _table(head, lines + [one for one in wanted if "LoKr" not in one.name], cases, max)


def start_table(rows: list[Row], wanted: list[Line] | None = None) -> str:
    """Time from a weight to its factors; without ``wanted`` of every start that was recorded."""
    chosen = [r for r in rows if r.suite == "start" and r.adapter != "floor"]
    cases = by_case([r for r in chosen if r.r == max(c.r for c in chosen)]) if chosen else []
    sizes = (f"{group[0].n}×{group[0].k} {group[0].dtype}" for group in cases)
    head = [f"start of one matrix, r = {cases[0][0].r}" if cases else "", *sizes]
    return _table(head, _every_start(chosen) if wanted is None else wanted, cases, min)


def _every_start(rows: list[Row]) -> list[Line]:
    found = []
    for variant in dict.fromkeys(row.variant for row in rows):
        name = f"**{variant}**" if variant.startswith(OURS) else variant
        if all(row.status == OTHER for row in rows if row.variant == variant):
            name += " (other maths)"
        found.append(Line(name, partial(_is_variant, variant)))
    return found


def _is_variant(variant: str, row: Row) -> bool:
    return row.variant == variant


def _spoken(case: str) -> str:
    """What a ``ModelCase`` calls itself, in words."""
    name, size, rank, dtype = case.split()
    batch, length = size.split("x")
    spoken = _MODELS.get(name.rstrip("-0123456789"), name)
    return f"{spoken}, {batch} × {length} tokens, {dtype}, {rank.replace('=', ' = ')}"


Best = Callable[..., Row | None]  # min or max


def _table(head: list[str], wanted: list[Line], groups: list[list[Row]], best: Best) -> str:
    """A column for each of ``groups``, in each line the best row that it takes."""
    lines = [head]
    for line in wanted:
        found = [best(_values(group, line), key=_value, default=None) for group in groups]
        if any(found):
            lines.append([line.name, *map(_with_ratio, found)])
    return markdown(lines) if len(lines) > 1 else ""


def _best_clock(row: Row, rows: list[Row]) -> bool:
    """The clock to judge by: CUDA graphs where they were taken, else the device's, else wall."""
    known = {r.clock for r in rows if (r.m, r.n, r.k, r.dtype) == (row.m, row.n, row.k, row.dtype)}
    return row.clock == next(c for c in ("graph", "device", "wall") if c in known)


def _values(rows: list[Row], line: Line) -> list[Row]:
    return [r for r in rows if r.value and r.status not in (RED, SKIPPED) and line.takes(r)]


def _value(row: Row) -> float:
    return row.value or 0.0


def _with_ratio(row: Row | None) -> str:
    """The value with its unit; of an adapter also how many times the frozen one's it is."""
    if row is None:
        return "–"
    ratio = "" if row.ratio is None or row.suite == "start" or not row.adapter else row.ratio
    return quantity(_value(row), row.unit) + (f" ({ratio:.2f}×)" if ratio else "")
