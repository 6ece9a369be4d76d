"""Scores of classes and of numbers. Apart from the tasks, which `--help` reads: numpy takes long to
import."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def classification(truth: list[str], found: list[str], labels: list[str]) -> dict[str, float]:
    """Accuracy; precision, recall and F1 of the second of two classes, else their mean over
    classes; Matthews' correlation. A ratio with nothing under it is 0."""
    table = np.zeros((len(labels), len(labels)))
    for t, f in zip(truth, found, strict=True):
        table[labels.index(t), labels.index(f)] += 1
    hits, actual, said = table.diagonal(), table.sum(1), table.sum(0)
    precision, recall = _ratio(hits, said), _ratio(hits, actual)
    f1 = _ratio(2 * precision * recall, precision + recall)
    of = slice(1, 2) if len(labels) == 2 else slice(None)
    n = table.sum()
    spread = math.sqrt(float((n**2 - said @ said) * (n**2 - actual @ actual)))
    covariance = hits.sum() * n - actual @ said
    return {
        "accuracy": float(hits.sum() / n),
        "precision": float(precision[of].mean()),
        "recall": float(recall[of].mean()),
        "f1": float(f1[of].mean()),
        "matthews": float(covariance / spread) if spread else 0.0,
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def regression(these: Sequence[Any], those: Sequence[Any]) -> dict[str, float]:
    """Mean squared error, Pearson's and Spearman's correlation (0 where one side is constant)."""
    truth, found = (np.asarray(numbers, dtype=float) for numbers in (these, those))
    return {
        "mse": float(np.mean((truth - found) ** 2)),
        "pearson": _correlation(truth, found),
        "spearman": _correlation(_ranks(truth), _ranks(found)),
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float((a @ a) * (b @ b)))
    return float(a @ b / size) if size else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
