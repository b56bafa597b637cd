"""The adapters over a frozen linear layer on the CPU: ours / frozen and eager / frozen.

Forward and backward (dx and the trained numbers), variants interleaved in one process:

    python bench/layer_cpu.py --dtype bf16 --tokens 1 16 512 2048 --sizes 384 768 1024 4096

``--clock cpu`` counts the process's CPU time instead of wall time: on a machine shared with others
its ratios are steadier. Ratios are of medians; ``best other`` is the fastest of the alternatives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qrlora_kernels import functional
from qrlora_kernels.backends import last_choice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], Tensor]


class Layer:
    """Operands of one size, and a step (forward and backward) for each way to compute it."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.x = torch.randn(m, k, dtype=dtype, requires_grad=True)
        self.weight = (torch.randn(n, k) / k**0.5).to(dtype)
        self.bias = torch.randn(n, dtype=dtype)
        self.dy = torch.randn(m, n, dtype=dtype)

    def frozen(self) -> Tensor:
        return F.linear(self.x, self.weight, self.bias)

    def steps(self, adapter: str, rank: int) -> dict[str, tuple[Step, list[Tensor]]]:
        """Forward functions with what they train: ours, composed, eager."""
        n, k = self.weight.shape
        down, up = torch.randn(rank, k) / k**0.5, torch.randn(n, rank) / n**0.5
        down, up = down.to(self.dtype), up.to(self.dtype)
        frozen = self.x, self.weight, self.bias
        if adapter == "qr":
            lam, op = self._trainable(rank), functional.qr_linear
            same = lam.detach().to(self.dtype).requires_grad_()
            fused = lambda backend: op(*frozen, up, down, lam, backend=backend)  # noqa: E731
            eager = lambda: self.frozen() + ((self.x @ down.T) * same) @ up.T  # noqa: E731
            ours, theirs = [lam], [same]
        elif adapter == "lora_xs":
            core, op = self._trainable(rank, rank), functional.lora_xs_linear
            same = core.detach().to(self.dtype).requires_grad_()
            fused = lambda backend: op(*frozen, down, up, core, backend=backend)  # noqa: E731
            eager = lambda: self.frozen() + ((self.x @ down.T) @ same) @ up.T  # noqa: E731
            ours, theirs = [core], [same]
        else:
            return self._kron_steps(rank)
        return {
            "eager": (eager, theirs),
            "composed": (lambda: fused("composed"), ours),
            "ours": (lambda: fused(None), ours),  # last, so that last_choice() is its own
        }

    def _kron_steps(self, rank: int) -> dict[str, tuple[Step, list[Tensor]]]:
        n, k = self.weight.shape
        a0, b0 = torch.randn(n // rank, rank) / rank**0.5, torch.randn(k // rank, rank) / rank**0.5
        a0, b0 = (t if self.dtype == torch.float32 else t.float() for t in (a0, b0))
        a, b = ((t + 0.01 * torch.randn_like(t)).requires_grad_() for t in (a0, b0))
        frozen = self.x, self.weight, self.bias
        fused = lambda backend: functional.kron_linear(*frozen, a, b, a0, b0, backend=backend)  # noqa: E731
        same = [t.detach().to(self.dtype).requires_grad_(t.requires_grad) for t in (a, b, a0, b0)]

        def eager() -> Tensor:
            tokens = self.x.view(-1, rank, k // rank)
            update = same[0] @ (tokens @ same[1]) - same[2] @ (tokens @ same[3])
            return self.frozen() + update.reshape(-1, n)

        return {
            "eager": (eager, same[:2]),
            "composed": (lambda: fused("composed"), [a, b]),
            "ours": (lambda: fused(None), [a, b]),
        }

    @staticmethod
    def _trainable(*shape: int) -> Tensor:
        return (0.1 * torch.randn(*shape)).requires_grad_()


def measure(
    layer: Layer, steps: dict[str, tuple[Step, list[Tensor]]], clock: str, seconds: float
) -> dict[str, float]:
    """Median seconds of forward and backward for each step, taken in turns."""
    now = CLOCKS[clock]

    def once(forward: Step, train: list[Tensor]) -> float:
        begin = now()
        torch.autograd.grad(forward(), [layer.x, *train], layer.dy)
        return now() - begin

    for step in steps.values():
        once(*step)
    round_begin = time.perf_counter()
    samples = {name: [once(*step)] for name, step in steps.items()}
    rounds = min(200, max(5, round(seconds / (time.perf_counter() - round_begin))))
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(once(*step))
    return {name: statistics.median(times) for name, times in samples.items()}


def kron_rank(n: int, k: int) -> int:
    """r_high of the paper: the largest common divisor of N and K below the root of both."""
    return max(r for r in range(1, int(min(n, k) ** 0.5) + 1) if n % r == 0 and k % r == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512, 2048])
    parser.add_argument("--sizes", nargs="+", type=int, default=[384, 768, 1024, 4096])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64, 150])
    parser.add_argument("--adapters", nargs="+", default=["qr", "lora_xs", "kron"])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each row")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"
    print(f"torch {torch.__version__}, {threads}, {args.clock} clock")
    print("| dtype | M | N = K | adapter | r | frozen ms | ours/frozen | eager/frozen "
          "| composed/frozen | ours/best other | backend |\n" + "|---" * 11 + "|")  # fmt: skip
    rows = []
    for dtype in args.dtype:
        for m in args.tokens:
            for n in args.sizes:
                layer = Layer(m, n, n, DTYPES[dtype])
                for adapter in args.adapters:
                    ranks = [kron_rank(n, n)] if adapter == "kron" else args.ranks
                    for rank in ranks:
                        steps = {"frozen": (layer.frozen, []), **layer.steps(adapter, rank)}
                        times = measure(layer, steps, args.clock, args.seconds)
                        frozen = times.pop("frozen")
                        choice = last_choice(f"{adapter}_linear")
                        rows.append(
                            {"dtype": dtype, "m": m, "n": n, "adapter": adapter, "r": rank}
                            | {"frozen": frozen}
                            | {name: value / frozen for name, value in times.items()}
                        )
                        best = min(times["eager"], times["composed"])
                        print(f"| {dtype} | {m} | {n} | {adapter} | {rank} | {frozen * 1e3:.3f} "
                              f"| {times['ours'] / frozen:.2f} | {times['eager'] / frozen:.2f} "
                              f"| {times['composed'] / frozen:.2f} | {times['ours'] / best:.2f} "
                              f"| {choice.name if choice else '-'} |", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
