"""What only a GPU can show: ``python -m bench.gpu small|repeat|graph``, run by gpu_check.sh.

``small`` runs each operation once on a few odd shapes (for compute-sanitizer), ``repeat`` a
thousand times and compares bits, ``graph`` captures it in a CUDA graph and compares with the eager
result. Every check is done for each backend that can run the operation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .competitors import Layer, layers_for
from .competitors.ours import each_backend
from .problem import LayerProblem, Runner, Unavailable
from .registry import ADAPTERS, Case
from .suites.common import Gates, results
from .timing import graph_task

SMALL = [Case(1, 32, 48, 3, "bf16"), Case(19, 96, 64, 16, "fp32"), Case(65, 144, 80, 7, "fp16")]
LARGE = [Case(199, 736, 1504, 150, "bf16"), Case(16, 4096, 4096, 16, "bf16")]
BACKENDS = ["cuda", "triton", "composed"]
REPEATS = 1000


def small(problem: LayerProblem, runner: Runner, layer: Layer) -> str:
    """One forward and backward that passes its gate."""
    verdict = Gates(problem).judge(layer, runner)
    torch.cuda.synchronize()
    return "" if verdict.ok else verdict.detail


def repeat(problem: LayerProblem, runner: Runner, layer: Layer) -> str:
    """The same bits every time, while other work moves the allocator's blocks about."""
    first = results(runner, problem)
    for number in range(REPEATS):
        noise = torch.full((number % 7 + 1, 1 << 16), float("nan"), device=problem.device)
        again = results(runner, problem)
        del noise
        changed = [name for name in first if not torch.equal(first[name], again[name])]
        if changed:
            return f"{', '.join(changed)} changed in repeat {number + 1}"
    return ""


def graph(problem: LayerProblem, runner: Runner, layer: Layer) -> str:
    """A captured step, replayed on new inputs, gives what the eager step gives."""
    dy = problem.dy

    def backward(y: Tensor) -> dict[str, Tensor]:
        return {"y": y, **runner.gradients(y, problem.x, dy)}

    task = graph_task({"forward": lambda _: runner.forward(problem.x), "backward": backward})
    with torch.no_grad():
        problem.x.normal_()
        dy.normal_()
    replayed = {name: t.detach().clone() for name, t in task["both"](None).items()}
    torch.cuda.synchronize()
    eager = results(runner, problem)
    wrong = [name for name, t in eager.items() if not torch.equal(t, replayed[name])]
    return f"{', '.join(wrong)} differ from the eager result" if wrong else ""


CHECKS: dict[str, tuple[Callable[[LayerProblem, Runner, Layer], str], list[Case]]] = {
    "small": (small, SMALL),
    "repeat": (repeat, LARGE),
    "graph": (graph, LARGE),
}


def main(name: str) -> int:
    """Run a check on every operation and backend; the number of failures."""
    check, cases = CHECKS[name]
    failures = 0
    with each_backend(BACKENDS):
        layers = layers_for(ADAPTERS, ("qrlora_kernels",))
        for case in cases:
            for layer in (one for one in layers if one.adapter):
                said = _one(check, case, layer)
                failures += said not in ("", None)
                shown = {"": "ok", None: "not here"}.get(said, f"FAILED: {said}")
                print(f"{name}: {case} {layer.key}: {shown}", flush=True)
    return failures


def _one(
    check: Callable[[LayerProblem, Runner, Layer], str], case: Case, layer: Layer
) -> str | None:
    """What is wrong, "" if nothing, None where the backend does not run the case."""
    problem = LayerProblem(case, "cuda")
    with contextlib.suppress(Unavailable):
        runner = layer.start(problem)
        try:
            return check(problem, runner, layer)
        except Exception as error:  # the other operations must still be checked
            return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in CHECKS:
        sys.exit(f"usage: python -m bench.gpu {'|'.join(CHECKS)}")
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU here")
    sys.exit(min(main(sys.argv[1]), 125))
