"""A batch whose rows have an adapter each, through PEFT: against a batch of one adapter.

    python -m bench.peft_mixed          64 rows over 16 adapters of MiniLM's shape, random weights

Rounds of both are taken in turn; the table in ``docs/peft.md`` has the median ratio. Before
anything is timed every row is compared with what its adapter alone answers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel

from qrlora_kernels.peft import LoraXSConfig, OHoraConfig, QRLoraConfig

from .machine import REPOSITORY, facts
from .peft_table import PAGE, put
from .rows import replace_file

ROWS, ADAPTERS, TOKENS, ROUNDS = 64, 16, 32, 15
TARGETS = ["query", "value"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "QR-LoRA": lambda: QRLoraConfig(target_modules=TARGETS),
    "LoRA-XS": lambda: LoraXSConfig(target_modules=TARGETS),
    "OHoRA": lambda: OHoraConfig(target_modules=TARGETS),
    "PEFT's LoRA, r = 8": lambda: LoraConfig(target_modules=TARGETS, r=8),
}
LIMIT = 1e-4  # of the largest output: rounding
RESULTS = REPOSITORY / "bench" / "results" / "peft_mixed.json"
BEGIN, END = "<!-- peft_mixed:begin -->", "<!-- peft_mixed:end -->"


def main() -> int:
    """Measure, then write results and table; 1 where a row differs."""
    rows = {name: measure(config) for name, config in CONFIGS.items()}
    for name, row in rows.items():
        print(name, row, file=sys.stderr)
        if not row["difference"] <= LIMIT:
            print(f"{name}: rows differ from their adapters alone: nothing written")
            return 1
    text = json.dumps({"rows": rows, "machine": facts()}, indent=1)
    replace_file(RESULTS, lambda out: out.write(text + "\n"))
    put(PAGE, BEGIN, END, table(json.loads(text)))
    print(f"written: {PAGE}")
    return 0


def measure(config: Callable[[], Any]) -> dict[str, float]:
    """Ratio of the mixed batch's time, and the largest difference of a row."""
    model, ids = _model(config), torch.randint(1, 1000, (ROWS, TOKENS))
    names = [str(row % ADAPTERS) for row in range(ROWS)]

    @torch.no_grad()
    def answer(**options: Any) -> Tensor:
        hidden: Tensor = model(ids, **options).last_hidden_state
        return hidden

    mixed, differences = answer(adapter_names=names), []
    for name in dict.fromkeys(names):
        model.set_adapter(name)
        mine = [row for row, own in enumerate(names) if own == name]
        alone = answer()[mine]
        differences.append(float((mixed[mine] - alone).abs().max() / alone.abs().max()))
    ratios = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        answer()
        between = time.perf_counter()
        answer(adapter_names=names)
        ratios.append((time.perf_counter() - between) / (between - start))
    return {"ratio": round(median(ratios), 3), "difference": max(differences)}


def _model(config: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    sizes = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    model = get_peft_model(BertModel(sizes), config(), adapter_name="0")
    for name in map(str, range(1, ADAPTERS)):
        model.add_adapter(name, config())
    model.base_model.set_adapter(list(map(str, range(ADAPTERS))))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def table(results: dict[str, Any]) -> str:
    lines = ["| | mixed ÷ one adapter | largest difference of a row |", "|---|--:|--:|"]
    for name, row in results["rows"].items():
        lines.append(f"| {name} | {row['ratio']:.2f} | {row['difference']:.0e} |")
    machine = results["machine"]
    lines += [
        "",
        f"{ROWS} rows of {TOKENS} tokens over {ADAPTERS} adapters, fp32, MiniLM-L6's shape, random "
        f"weights; median of {ROUNDS} pairs in turn; differences relative to the largest output; "
        f"{machine['cpu']}, {machine['threads']} threads.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
