"""Accuracy of one row with its interval, over one or several seeds, and of the majority class."""

from collections.abc import Sequence

import numpy as np

from qwen_min.metrics import wilson_interval
from qwen_min.report.compare import Result


def correct(result: Result) -> np.ndarray:
    """Boolean mask (n,): True where the prediction is correct."""
    return result.predictions.predicted == result.predictions.labels


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of (n,) numbers.

    It equals `metrics.paired_bootstrap`, but also takes means over seeds. The numbers take few
    distinct values, so one multinomial draw says how often each value occurs in a resample.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=10_000)
    low, high = np.quantile(draws @ distinct / len(values), [0.025, 0.975])
    return float(low), float(high)


def accuracy_interval(results: Sequence[Result]) -> tuple[float, float]:
    """95 % interval: Wilson's for one result; a bootstrap of the mean for several seeds.

    Without predictions of every seed, the interval of several seeds has no width.
    """
    if len(results) == 1:
        return tuple(results[0].results["accuracy_interval"])
    if any(result.predictions is None for result in results):
        return (float(np.mean([result.results["accuracy"] for result in results])),) * 2
    return mean_interval(np.mean([correct(result) for result in results], axis=0))


def majority(result: Result) -> dict:
    """What always predicting the most frequent class gets: class, n, accuracy and its interval."""
    rows = np.sum(result.results["confusion_matrix"], axis=1)
    c, n = int(rows.argmax()), int(rows.sum())
    found = {"class": result.results["per_class"][c]["name"], "n": n, "accuracy": rows[c] / n}
    return found | {"accuracy_interval": list(wilson_interval(int(rows[c]), n))}
