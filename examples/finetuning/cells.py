"""Runs, each in a process of its own: its times and peak memory are its own."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

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


def run_cells(cells: Iterable[Settings], lines: Path, jobs: int = 1) -> Iterator[Result]:
    """Run the cells, add each result to the file ``lines`` and yield it, in their order.

    Parameters
    ----------
    cells : iterable of Settings
    lines : Path
    jobs : int
        Runs at a time, which share the cores; what several say goes into a log beside each.

    Raises
    ------
    Stopped
        If a run fails or is interrupted; it said why on stderr.
    """
    if jobs > 1:
        yield from _together(list(cells), lines, jobs)
        return
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


def _together(cells: list[Settings], lines: Path, jobs: int) -> Iterator[Result]:
    """Small models use two cores badly: two runs, a core each, take much less than two in turn."""
    share_cores(jobs)
    if any(settings.precision == "auto" for settings in cells):
        from .training import faster_precision  # imports torch, with the threads of a run

        precision = faster_precision(cells[0].device)
        cells = [replace(s, precision=precision) if s.precision == "auto" else s for s in cells]
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(cells), unit="run") as bar:
        runs = [pool.submit(run_alone, settings, _log_of(settings)) for settings in cells]
        for run in runs:
            run.add_done_callback(lambda _: bar.update())
        try:
            for settings, run in zip(cells, runs, strict=True):
                if status := run.result():
                    log = _log_of(settings)
                    bar.write(log.read_text(encoding="utf-8") if log.exists() else "", sys.stderr)
                    raise Stopped(status)
                result = read_result(settings.result_file)
                append_line(lines, result)
                yield result
        except KeyboardInterrupt:  # it reached the runs too
            raise Stopped(INTERRUPTED) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _log_of(settings: Settings) -> Path:
    return settings.out.with_suffix(".log")


def share_cores(jobs: int) -> None:
    """Give each of ``jobs`` runs at a time its part of the cores; before the first of them."""
    if jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))


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
