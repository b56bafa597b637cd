"""Sentences with a label or a score, from a TSV file or a GLUE task."""

from __future__ import annotations

import csv
import os
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("label", "score", "similarity", "target", "gold")  # names of a target column
SCORES = ("score", "similarity")  # whose numbers are no classes, even when all are whole
# GLUE: sentence columns and the split to evaluate on.
GLUE = {
    "cola": (("sentence",), "validation"),
    "sst2": (("sentence",), "validation"),
    "mrpc": (("sentence1", "sentence2"), "validation"),
    "stsb": (("sentence1", "sentence2"), "validation"),
    "qqp": (("question1", "question2"), "validation"),
    "qnli": (("question", "sentence"), "validation"),
    "rte": (("sentence1", "sentence2"), "validation"),
    "mnli": (("premise", "hypothesis"), "validation_matched"),
}


@dataclass(frozen=True)
class Split:
    """Texts, one or two columns of them, and the target of each row as it was written."""

    texts: tuple[list[str], ...]
    targets: list[str]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Sequence[int]) -> Split:
        columns = tuple([column[row] for row in rows] for column in self.texts)
        return Split(columns, [self.targets[row] for row in rows])


@dataclass(frozen=True)
class Data:
    """A training and an evaluation split; ``labels`` is empty where the targets are scores."""

    train: Split
    evaluation: Split
    labels: tuple[str, ...]

    @property
    def regression(self) -> bool:
        return not self.labels

    def values(self, split: Split) -> list[float]:
        """The targets as scores or as indices into ``labels``."""
        if self.regression:
            return [float(target) for target in split.targets]
        return [float(self.labels.index(target)) for target in split.targets]


def read_tsv(path: Path, evaluation: Path | None = None, seed: int = 0) -> Data:
    """Read a tab-separated file with a header: one or two columns of text, a label or a score.

    The target is the column called label, score, similarity, target or gold, otherwise the last;
    columns of numbers (an index) are passed over. Targets that are not all whole numbers, or a
    column called score or similarity, make a regression, everything else a classification.

    Parameters
    ----------
    path : Path
    evaluation : Path, optional
        A second file with the same columns. Without it 15 % of the rows are held out, texts that
        are the same but for case and punctuation on one side together.
    seed : int
        Decides which rows are held out.

    Raises
    ------
    ValueError
        If the columns cannot be told apart, a row is incomplete, or a label is new in evaluation.
    """
    train, name = _read_columns(path)
    if evaluation is None:
        train, held = _held_out(train, seed)
    else:
        held, _ = _read_columns(evaluation)
    if len(held.texts) != len(train.texts):
        raise ValueError(
            f"{evaluation} must hold {len(train.texts)} columns of text as {path} does, "
            f"got {len(held.texts)}"
        )
    return _with_labels(train, held, is_score=name.lower() in SCORES)


def same_text(texts: Sequence[str]) -> str:
    """What texts that differ in case, punctuation and spaces alone have in common."""
    return "\t".join(" ".join(re.findall(r"\w+", text.casefold())) or text for text in texts)


def _held_out(split: Split, seed: int) -> tuple[Split, Split]:
    rows_of = defaultdict(list)
    for row, texts in enumerate(zip(*split.texts, strict=True)):
        rows_of[same_text(texts)].append(row)
    groups = random.Random(seed).sample(list(rows_of.values()), len(rows_of))
    rows = [row for group in groups for row in group]
    wanted, held_out = max(1, len(rows) * 15 // 100), 0
    while held_out < wanted:
        held_out += len(groups.pop(0))
    return split.take(rows[held_out:]), split.take(rows[:held_out])


def read_glue(task: str) -> Data:
    """A GLUE task through the optional ``datasets`` package (needs the network the first time)."""
    if task not in GLUE:
        raise ValueError(f"task must be one of {sorted(GLUE)}, got {task!r}")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("task needs the package datasets: pip install datasets") from None
    columns, held_out = GLUE[task]
    dataset = load_dataset("nyu-mll/glue", task)
    train, held = (
        Split(tuple(list(part[name]) for name in columns), [str(t) for t in part["label"]])
        for part in (dataset["train"], dataset[held_out])
    )
    return _with_labels(train, held, is_score=task == "stsb")


def write_tsv(data: Data, folder: Path) -> tuple[Path, Path]:
    """Write train.tsv and eval.tsv into ``folder``, in the form that :func:`read_tsv` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.tsv", folder / "eval.tsv"
    for path, split in zip(paths, (data.train, data.evaluation), strict=True):
        names = [f"sentence{i + 1}" for i in range(len(split.texts))]
        lines = ["\t".join([*names, "score" if data.regression else "label"])]
        rows = zip(*split.texts, split.targets, strict=True)
        lines += ["\t".join(" ".join(cell.split()) for cell in row) for row in rows]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    return paths


def _read_columns(path: Path) -> tuple[Split, str]:
    """The split and the name of its target column."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}:{number} must have {len(header)} cells, got {len(row)}")
    if not rows:
        raise ValueError(f"{path} must have a header line and rows, got no rows")
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    name = next((c for c in header if c.lower() in TARGETS), header[-1])
    targets = columns.pop(name)
    texts = tuple(column for column in columns.values() if not all(map(_is_number, column)))
    if len(texts) not in (1, 2):
        raise ValueError(
            f"{path} must have one or two columns of text beside the target {name!r}, "
            f"got {len(texts)} in the header {header}"
        )
    return Split(texts, targets), name


def _with_labels(train: Split, held: Split, is_score: bool) -> Data:
    numeric = all(map(_is_number, train.targets))
    if numeric and (is_score or any(float(t) != int(float(t)) for t in train.targets)):
        bad = next((t for t in held.targets if not _is_number(t)), None)
        if bad is not None:
            raise ValueError(f"the scores of the evaluation data must be numbers, got {bad!r}")
        return Data(train, held, ())
    labels = sorted(set(train.targets))
    unknown = sorted(set(held.targets) - set(labels))
    if unknown:
        raise ValueError(f"the evaluation data must have the labels {labels}, got also {unknown}")
    if len(labels) < 2:
        raise ValueError(f"the training data must have two or more labels, got {labels}")
    return Data(train, held, tuple(labels))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
