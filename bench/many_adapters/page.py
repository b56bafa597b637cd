"""The tables and the picture of docs/many_adapters.md, from the results alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import svg
from ..machine import REPOSITORY, spoken
from ..peft_table import put
from .sizes import EACH, ROWS

PAGE = REPOSITORY / "docs" / "many_adapters.md"
PICTURE = "images/many-adapters.svg"
BEGIN, END = "<!-- many_adapters:begin -->", "<!-- many_adapters:end -->"
NOTHING = "No rows yet: `python -m bench.many_adapters`."
Results = Mapping[str, Any]


def write(page: Path, results: Results) -> None:
    """Put the tables between the page's marks, and the picture beside the page."""
    put(page, BEGIN, END, text(results))
    if _drawn(results) and importlib.util.find_spec("matplotlib") is not None:
        svg.write(page.parent / PICTURE, "many adapters", lambda figure: draw(figure, results))


def text(results: Results) -> str:
    """All tables that there are results for."""
    parts = [make(results[name]) for name, make in PARTS.items() if name in results]
    if _drawn(results):
        parts.insert(0, f"![Time of a step and bytes over the number of tenants]({PICTURE})")
    return "\n\n".join(parts) or NOTHING


def _drawn(results: Results) -> bool:
    return {"serve", "train"} <= results.keys()


# --- tables


def _serve(part: Results) -> str:
    sizes = part["sizes"]
    head = ["", "resident", "bytes", "LoRA r = 8", "mixed ÷ one", "p50", "p99", "add", "replace"]
    head += ["load", "difference"]
    rows = [
        [
            row["adapter"],
            f"{row['resident']:,}",
            size(row["bytes"]),
            size(row["lora_bytes"]),
            f"{row['ratio']:.2f}",
            f"{row['p50_ms']:.0f} ms ({row['own_p50_ms']:.0f})",
            f"{row['p99_ms']:.0f} ms ({row['own_p99_ms']:.0f})",
            f"{row['add_us']:.0f} µs",
            f"{row['replace_us']:.0f} µs",
            f"{row['load_seconds']:.2f} s",
            f"{row['difference']:.0e}",
        ]
        for row in part["rows"]
    ]
    note = (
        f"Served: batches of {ROWS} rows over {ROWS} adapters, or as many as there are. Mixed ÷ "
        f"one: against a batch of the model's own adapter, {sizes['tokens']} tokens a row, the "
        f"median of {sizes['rounds']} pairs in turn. p50 and p99 of {sizes['calls']} calls over "
        f"rows of {sizes['short']} tokens, other adapters each, in brackets those of the model's "
        "own adapter in turn. Load: all of them from one packed file. Difference: the largest of a "
        "row from what its adapter alone answers, relative to the largest number. LoRA's bytes are "
        f"counted. {_where(part)}"
    )
    return _table(head, rows, note)


def _train(part: Results) -> str:
    sizes = part["sizes"]
    head = ["tenants in a batch", "in one step", "one tenant's step", "one by one", "÷ one tenant"]
    rows = [
        [
            str(row["tenants"]),
            f"{row['together_ms']:.0f} ms",
            f"{row['one_ms']:.0f} ms",
            f"{row['one_by_one_ms']:.0f} ms",
            f"{row['ratio']:.2f}",
        ]
        for row in part["steps"]
    ]
    note = (
        f"Trained: {ROWS} sentences of movie reviews a step, QR-LoRA by the default τ, heads too; "
        f"medians of {sizes['rounds']} rounds in turn.\n\n"
        f"{part['tenants']} tenants with {part['sentences']} sentences each, in batches of {EACH} "
        f"rows of each of {min(ROWS // EACH, part['tenants'])}, {part['steps_of_each']} steps a "
        f"tenant: mean accuracy on {part['held']} sentences {part['before']:.3f} before, "
        f"**{part['together']:.4f}** in one bank, **{part['alone']:.4f}** by runs of each alone; "
        f"largest difference of a tenant's score {part['largest_score_difference']:.3f}, of its "
        f"numbers {part['difference']:.0e} of the largest step from the start. What training keeps "
        f"of a tenant besides its head's: {size(part['state_bytes'])} (numbers and two moments), "
        f"LoRA r = 8 {size(part['lora_state_bytes'])}. {_where(part)}"
    )
    return _table(head, rows, note)


def _examples(part: Results) -> str:
    head = ["", "a step", "with each example's gradient", "÷ ordinary", "difference"]
    rows = [
        [
            row["adapter"],
            f"{row['plain_ms']:.0f} ms",
            f"{row['each_ms']:.0f} ms",
            f"{row['ratio']:.2f}",
            f"{row['difference']:.0e}",
        ]
        for row in part["rows"]
    ]
    note = (
        f"Per example: {ROWS} sentences a step, heads too; medians of {part['sizes']['rounds']} "
        "pairs in turn. Difference: the largest from backwards of single examples, relative to the "
        f"largest number of a layer. {_where(part)}"
    )
    return _table(head, rows, note)


PARTS = {"serve": _serve, "train": _train, "examples": _examples}


def _table(head: list[str], rows: list[list[str]], note: str) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}"


def _where(part: Results) -> str:
    machine = part["machine"]
    torch = next(v for v in machine["versions"].split("; ") if v.startswith("torch"))
    chip = spoken(f"{machine['cpu']}, {machine['threads']} threads")
    return f"MiniLM-L6, query and value, fp32; {chip}, {torch}."


def size(count: float) -> str:
    """Bytes as one reads them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


# --- the picture


def draw(figure: Any, results: Results) -> None:
    """Seconds of a step on the left, bytes of all adapters on the right."""
    left, right = figure.subplots(1, 2)
    steps = results["train"]["steps"]
    lines = {"together_ms": "in one bank", "one_ms": "one tenant's", "one_by_one_ms": "one by one"}
    for key, label in lines.items():
        left.plot([s["tenants"] for s in steps], [s[key] for s in steps], marker="o", label=label)
    left.set(xlabel=f"tenants in a batch of {ROWS}", ylabel="ms a training step", ylim=(0, None))
    rows = results["serve"]["rows"]
    for adapter in dict.fromkeys(row["adapter"] for row in rows):
        own = [row for row in rows if row["adapter"] == adapter]
        right.plot(
            [r["resident"] for r in own], [r["bytes"] for r in own], marker="o", label=adapter
        )
    own = [row for row in rows if row["adapter"] == rows[0]["adapter"]]
    right.plot(
        [r["resident"] for r in own], [r["lora_bytes"] for r in own], "k--", label="LoRA, r = 8"
    )
    right.set(xscale="log", yscale="log", xlabel="adapters resident", ylabel="bytes of all")
    for axes in (left, right):
        axes.legend(fontsize=7)
