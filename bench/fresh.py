"""Peak memory on a CPU, each in a process of its own.

In a process that has run other variants, scratch that a library keeps between calls hides. So a
server that imports everything and computes nothing forks once per request: a fork is fresh, yet
has its imports already, and no OpenMP threads to lose.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, TextIO

import torch

from .competitors import layers_for, starts_for
from .competitors.ours import each_backend
from .machine import REPOSITORY
from .memory import peak_bytes
from .problem import LayerProblem, training_step
from .registry import Case
from .suites.start import draw_weight

_IMPORTS = ("peft", "lycoris", "scipy.linalg", "torch._dynamo")
_SECONDS = 300
_TINY = 8  # tokens and ranks of the first step, which loads code


def peak(kind: str, key: str, case: Case) -> int | None:
    """Bytes that a "layer" step or a "start" takes at most; None where it cannot be said.

    Parameters
    ----------
    kind : "layer" or "start"
    key : str
        Of a registered layer, or the name of a start.
    case : Case
    """
    server = _server(torch.get_num_threads())
    if server.stdin is None or server.stdout is None:
        return None
    request = {"kind": kind, "key": key, "case": asdict(case)}
    try:
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
    except OSError:
        return None
    found: int | None = json.loads(answer) if answer else None
    return found


@functools.cache
def _server(threads: int) -> subprocess.Popen[str]:
    """Ends with this process, which closes its standard input."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench.fresh", str(threads)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _serve(threads: int, requests: TextIO, answers: TextIO) -> None:
    for name in _IMPORTS:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    for line in requests:
        child = os.fork()
        if child == 0:
            _answer(threads, json.loads(line), answers)
        if os.waitpid(child, 0)[1] != 0:
            answers.write("null\n")
            answers.flush()


def _answer(threads: int, request: dict[str, Any], answers: TextIO) -> None:
    """In the fork: measure, write, leave without the clean-up that is the server's."""
    status = 1
    signal.alarm(_SECONDS)  # which ends the process, should a library not survive the fork
    try:
        torch.set_num_threads(threads)
        measured = _MEASURE[request["kind"]](request["key"], Case(**request["case"]))
        answers.write(json.dumps(measured) + "\n")
        answers.flush()
        status = 0
    finally:
        os._exit(status)


def _layer(key: str, case: Case) -> int | None:
    """Beyond what the frozen layer at the same shape makes its libraries keep."""
    backend = key.partition("[")[2].rstrip("]")
    with each_backend([backend] if backend else []):
        layers = {layer.key: layer for layer in layers_for()}
        layer, frozen = layers[key], layers["frozen"]
        small = LayerProblem(replace(case, m=_TINY), "cpu")
        training_step(layer.start(small), small)()
        problem = LayerProblem(case, "cpu")
        training_step(frozen.start(problem), problem)()
        step = training_step(layer.start(problem), problem)
        # The compiler's own memory is no part of a step.
        return peak_bytes(step, "cpu", warm=layer.name == "torch.compile")


def _start(name: str, case: Case) -> int | None:
    (start,) = (one for one in starts_for() if one.name == name)
    small = draw_weight(64, 64, case.dtype, "cpu")
    start.run(start.prepare(small, _TINY), _TINY)
    weight = start.prepare(draw_weight(case.n, case.k, case.dtype, "cpu"), case.r)
    return peak_bytes(lambda: start.run(weight, case.r), "cpu", warm=False)


_MEASURE: dict[str, Callable[[str, Case], int | None]] = {"layer": _layer, "start": _start}


if __name__ == "__main__":
    # What a library prints must not mix with the answers.
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(int(sys.argv[1]), sys.stdin, reply)
