"""Run what has no record yet: every cell a process of its own, the results as JSON lines."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from finetuning import corpora
from finetuning.cells import DIVERGED, INTERRUPTED, Stopped, run_alone
from finetuning.data import write_tsv
from finetuning.report import read_result
from finetuning.settings import Settings
from tqdm import tqdm

from ..machine import facts
from .cell import Cell
from .measures import MEASURES
from .records import Record, Records, versions

Files = tuple[Path, Path]
LOSSES = 4  # decimals


@dataclass
class Workshop:
    """Where the runs lie and what they read.

    Parameters
    ----------
    records : Records
    folder : Path
        Of data, logs and warmed-up models; results go to ``records`` alone.
    archive : Path, optional
        The rated sentences, by default :func:`finetuning.corpora.download`'s.
    """

    records: Records
    folder: Path
    archive: Path | None = None
    _files: dict[tuple[str, int, int], Files] = field(default_factory=dict)

    def files(self, cell: Cell) -> Files:
        wanted = cell.task, cell.train_rows, cell.eval_rows
        if wanted not in self._files:
            rows = corpora.load_task(*wanted, self.archive)
            self._files[wanted] = write_tsv(rows, self.folder / "data" / "-".join(map(str, wanted)))
        return self._files[wanted]

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Each of ``cells`` once that has no record with these data and versions."""
        once = {cell.digest(): cell for cell in cells}
        now = versions()
        return [
            cell
            for digest, cell in once.items()
            if not self.records.find(digest, data=data_digest(self.files(cell)), versions=now)
        ]

    def run(self, cells: Iterable[Cell], jobs: int = 1) -> int:
        """Run the missing ones in their order, ``jobs`` at a time; how many failed.

        A run whose loss is no number is a result, an empty one. Any other failure is said on
        stderr and leaves no record, so that the next call tries again.
        """
        missing = self.missing(cells)
        failed = 0
        bar = tqdm(total=len(missing), unit="run", disable=not missing)
        for cell, status, record in self._outcomes(missing, jobs):
            if record is not None:
                self.records.add(record)
            else:
                failed += 1
                bar.write(_complaint(cell, status, self._log(cell)), file=sys.stderr)
            bar.set_postfix_str(f"{cell.adapter} {cell.task} seed {cell.seed}", refresh=False)
            bar.update()
        bar.close()
        return failed

    def _outcomes(self, cells: list[Cell], jobs: int) -> Iterator[tuple[Cell, int, Record | None]]:
        with ThreadPoolExecutor(jobs) as pool:
            waiting = {pool.submit(self._run, cell): cell for cell in cells}
            try:
                for done in as_completed(waiting):
                    status, record = done.result()
                    if status == INTERRUPTED:
                        raise Stopped(status)
                    yield waiting[done], status, record
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, cell: Cell) -> tuple[int, Record | None]:
        settings = cell.settings(self.files(cell), self.folder)
        status = run_alone(settings, self._log(cell))
        record = None
        if status in (0, DIVERGED):
            record = self._record(cell, settings, diverged=status == DIVERGED)
        shutil.rmtree(settings.out, ignore_errors=True)  # a fine-tuned model is 90 MB
        return status, record

    def _record(self, cell: Cell, settings: Settings, diverged: bool) -> Record:
        record = {
            "digest": cell.digest(),
            "cell": cell.claims(),
            "data": data_digest(self.files(cell)),
            "versions": versions(),
            "scores": [],
            **where(),
        }
        if diverged:
            return record
        result = read_result(settings.result_file)
        measured = {name: MEASURES[name](settings) for name in cell.measures}
        return record | _outcome(result) | {"measured": measured}

    def _log(self, cell: Cell) -> Path:
        return self.folder / "logs" / f"{cell.digest()}.txt"


def data_digest(files: Files) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def where() -> dict[str, str]:
    """The processor, the commit and the day of a record."""
    today = datetime.now(timezone.utc).date().isoformat()
    return {"cpu": facts()["cpu"], "commit": facts()["commit"], "day": today}


def _outcome(result: dict[str, Any]) -> Record:
    metric = next(iter(result["scores"][0]))
    same = (
        "trained head rows seconds_to_start seconds_an_epoch adapter_bytes peak_memory "
        "reload_difference"
    )
    return {
        "metric": metric,
        "scores": [scores[metric] for scores in result["scores"]],
        "losses": [round(loss, LOSSES) for loss in result["losses"]],
        "ranks": {name: layer["rank"] for name, layer in result["layers"].items()},
        "machine": result["versions"]["machine"],  # with the run's own threads
        **{name: result[name] for name in same.split()},
    }


def _complaint(cell: Cell, status: int, log: Path) -> str:
    said = log.read_text(encoding="utf-8").strip().splitlines() if log.exists() else []
    return f"{cell.claims()} ended with status {status}: {said[-1] if said else 'it said nothing'}"
