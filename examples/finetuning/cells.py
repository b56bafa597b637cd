"""Runs one after another, each in a process of its own: its times and peak memory are its own."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import TYPE_CHECKING

from .report import Result, append_line, read_result
from .settings import Settings

if TYPE_CHECKING:  # Windows has no ForkServerContext
    from multiprocessing.context import ForkServerContext, SpawnContext

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
DIVERGED = 3  # the loss was no number: a result of the learning rate, not a fault
# Where processes can fork, one server imports these once and every run starts from it.
IMPORTED_ONCE = ("torch", "safetensors.torch", "transformers.modeling_utils", "qrlora_kernels")


class Stopped(Exception):
    """A run ended without a result; ``status`` is what the command should exit with."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a run ended with status {status}")
        self.status = status


def run_cells(cells: Iterable[Settings], lines: Path) -> Iterator[Result]:
    """Run the cells in order, add each result to the file ``lines`` and yield it.

    Raises
    ------
    Stopped
        If a run fails or is interrupted; it said why on stderr.
    """
    precision = ""
    for settings in cells:
        if precision and settings.precision == "auto":
            settings = replace(settings, precision=precision)  # decided once, so all are alike
        status = run_alone(settings)
        if status:
            raise Stopped(status)
        result = read_result(settings.result_file)
        precision = result["settings"]["precision"]
        append_line(lines, result)
        yield result


def run_alone(settings: Settings, log: Path | None = None) -> int:
    """One run in a process of its own; its exit status.

    Parameters
    ----------
    settings : Settings
    log : Path, optional
        A file for what the run says; by default it says it where this process does.
    """
    # Threads that spin while they wait slow every other job on the machine, and each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not settings.model or Path(settings.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to ask the hub for
    process = _context().Process(target=_child, args=(settings, log))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()  # Ctrl-C reached it too; it says what it left behind
        return INTERRUPTED
    if process.exitcode is not None and process.exitcode < 0:
        print(f"finetune.py: the run was killed by signal {-process.exitcode}", file=sys.stderr)
        return 1
    return process.exitcode or 0


def _context() -> ForkServerContext | SpawnContext:
    if "forkserver" not in get_all_start_methods():  # Windows
        return get_context("spawn")
    context = get_context("forkserver")
    peft = ("peft",) if importlib.util.find_spec("peft") is not None else ()
    context.set_forkserver_preload([*IMPORTED_ONCE, *peft])
    return context


def _child(settings: Settings, log: Path | None) -> None:
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout = sys.stderr = log.open("w", encoding="utf-8", buffering=1)
    # PEFT reads a name that transformers renames: nothing that a reader of the table can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from .run import Interrupted, ReloadError, fine_tune

    try:
        fine_tune(settings)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, TypeError, ReloadError, FloatingPointError, ImportError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        sys.exit(DIVERGED if isinstance(error, FloatingPointError) else 1)
