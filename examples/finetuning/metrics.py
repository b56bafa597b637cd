"""Accuracy, F1, Pearson and Spearman, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def accuracy(predicted: Array, target: Array) -> float:
    return float((predicted == target).mean())


def f1(predicted: Array, target: Array) -> float:
    """F1 of class 1 where there are two classes, otherwise the mean F1 of all classes."""
    classes = np.unique(target)
    chosen = classes[-1:] if len(classes) <= 2 else classes
    return float(np.mean([_f1_of(c, predicted, target) for c in chosen]))


def _f1_of(chosen: float, predicted: Array, target: Array) -> float:
    hits = np.sum((predicted == chosen) & (target == chosen))
    total = np.sum(predicted == chosen) + np.sum(target == chosen)
    return float(2 * hits / total) if total else 0.0


def pearson(predicted: Array, target: Array) -> float:
    """0 where one side is constant: such a prediction carries nothing."""
    a, b = predicted - predicted.mean(), target - target.mean()
    norm = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / norm) if norm > 0 else 0.0


def spearman(predicted: Array, target: Array) -> float:
    return pearson(_ranks(predicted), _ranks(target))


def _ranks(values: Array) -> Array:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1.0
    return (last - (counts - 1) / 2.0)[inverse]


def scores(logits: Array, target: Array) -> dict[str, float]:
    """The metrics of [rows, outputs] predictions; a single output is a regression."""
    if logits.shape[1] == 1:
        return {
            "pearson": pearson(logits[:, 0], target),
            "spearman": spearman(logits[:, 0], target),
        }
    predicted = logits.argmax(axis=1).astype(np.float64)
    return {"accuracy": accuracy(predicted, target), "f1": f1(predicted, target)}
