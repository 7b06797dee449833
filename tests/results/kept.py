"""Read the kept results, and compute the statistics that tables, pictures and answers show.

A row of the main table is named as in experiment.py, without its seed. A row of the 1.5B model is
named 1.5b/NAME. Two methods are compared on the clean rows of dev: the rows whose text is not among
the training rows.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from experiment import CURVE, KEPT, MODELS, SEEDS

from qwen_min.metrics import log_odds, mcnemar_exact
from qwen_min.report.compare import Result, read_result

LABELS_KEPT, OTHERS_KEPT = ", only 负面/正面 kept as trained", ", all kept but 负面/正面"
VECTORS = "`lora_label_scoring --train-embeddings --lora-targets none`"
# Rows of the main table, and the title of each.
METHODS = {
    "zero_shot": "`zero_shot`",
    "zero_shot-xiaoji": "`zero_shot`, 消极/积极",
    "zero_shot-chahao": "`zero_shot`, 差/好",
    "zero_shot-xiang": "`zero_shot`, 负向/正向",
    "zero_shot-chat": "`zero_shot --chat`",
    "zero_shot_generate": "`zero_shot_generate`",
    "zero_shot_generate-chat": "`zero_shot_generate --chat`",
    "head_only": "`head_only`",
    "head_only-best": "`head_only --layer best`",
    "head_only-mean": "`head_only --pooling mean`",
    "head_only-mean-best": "`head_only --pooling mean --layer best`",
    "lora_head": "`lora_head`",
    "lora_label_scoring": "`lora_label_scoring`",
    "lora_label_scoring-xiang": "`lora_label_scoring`, 负向/正向",
    "transplanted_head": "`transplanted_head`",
    "probe-of-lora_head": "`head_only --adapter` (`lora_head`)",
    "probe-of-lora_label_scoring": "`head_only --adapter` (`lora_label_scoring`)",
    "embeddings-head": "`lora_head --train-embeddings --lora-targets none`",
    "embeddings-words": VECTORS,
    "embeddings-words-labels": VECTORS + LABELS_KEPT,
    "embeddings-words-others": VECTORS + OTHERS_KEPT,
    "embeddings-lora-words": "`lora_label_scoring --train-embeddings`",
    "head_only-all": "`head_only`, all rows",
    "lora_head-all": "`lora_head`, all rows",
    "lora_label_scoring-all": "`lora_label_scoring`, all rows",
}
TRAINED = ("head_only", "lora_head", "lora_label_scoring")  # the methods of the learning curve


def kept_path(name: str) -> Path:
    """Path of a row's kept files, without the seed and the suffix."""
    size, _, bare = name.rpartition("/")
    return KEPT / (size or next(iter(MODELS))) / bare


def title(name: str) -> str:
    """The title of a row: `1.5b/head_only-n50` gives "1.5B: `head_only`, 50 rows"."""
    size, _, bare = name.rpartition("/")
    method, _, rows = bare.rpartition("-n")
    part = f", {rows} rows" if method and rows in map(str, CURVE) else ""
    return (f"{size.upper()}: " if size else "") + METHODS[method if part else bare] + part


@cache
def find(name: str) -> dict[int | None, Result]:
    """The kept results of a row by seed; the key is None where nothing is random."""
    path = kept_path(name)
    named = [(seed, path.with_name(f"{path.name}-s{seed}.json")) for seed in SEEDS]
    found = {seed: read_result(file) for seed, file in named if file.exists()}
    if (file := path.with_name(f"{path.name}.json")).exists():
        result = read_result(file)
        training = result.results["training_arguments"]
        # A probe is solved, so no seed matters. Other trained rows without -sN used one seed, 0.
        unseeded = training is None or training["method"] == "head_only"
        found[None if unseeded else training["seed"]] = result
    return found


def first(name: str) -> Result | None:
    """The result of seed 0, or the only result; None if nothing is kept."""
    found = find(name)
    return found.get(0, found.get(None))


def with_rows(name: str, n: int) -> str:
    """Name of the row whose method was trained on the first n rows."""
    return f"{name}-n{n}" if n in CURVE else name


@cache
def clean(path: Path) -> np.ndarray:
    """Boolean mask (n,): True where the text of a dev row is not among the training rows."""
    lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return np.array([json.loads(line)["clean"] for line in lines])


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
    """95 % interval: Wilson's for one result; a bootstrap of the mean for several seeds."""
    if len(results) == 1:
        return tuple(results[0].results["accuracy_interval"])
    return mean_interval(np.mean([correct(result) for result in results], axis=0))


def ranking(result: Result) -> np.ndarray:
    """Log-odds of class 1, (n,): the AUC ranks the rows by them."""
    return log_odds(result.predictions.scores)[:, 1]


def auc_interval(auc: float, positive: int, negative: int) -> tuple[float, float]:
    """95 % interval of an AUC, from its value and the class sizes alone (Hanley and McNeil 1982).

    q1 is the probability that two positive rows both rank above one negative row; q2 that one
    positive row ranks above two negative rows. Both assume exponentially distributed scores.
    """
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positive - 1) * (q1 - auc**2) + (negative - 1) * (q2 - auc**2)
    half = 1.96 * math.sqrt(variance / (positive * negative))
    return max(auc - half, 0.0), min(auc + half, 1.0)


def auc_components(labels: np.ndarray, odds: np.ndarray) -> list[np.ndarray]:
    """Each row's part of the AUC: (negatives,) and (positives,). The mean of each is the AUC.

    For a positive row: the fraction of negative rows that rank below it. For a negative row: the
    fraction of positive rows that rank above it. A tie counts 1/2 (DeLong, DeLong and
    Clarke-Pearson 1988).
    """
    negatives, positives = (odds[labels == c] for c in (0, 1))

    def below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        ends = [np.searchsorted(np.sort(others), values, side=side) for side in ("left", "right")]
        return (ends[0] + ends[1]) / (2 * len(others))

    return [1 - below(negatives, positives), below(positives, negatives)]


def auc_mean(parts: Sequence[Sequence[np.ndarray]]) -> tuple[float, ...]:
    """Mean AUC over seeds, from `auc_components`, and its 95 % interval (DeLong's variance)."""
    sides = [np.mean([part[c] for part in parts], axis=0) for c in (0, 1)]
    auc = float(sides[0].mean())
    half = 1.96 * math.sqrt(sum(side.var(ddof=1) / len(side) for side in sides))
    return auc, auc - half, auc + half


def auc_difference(labels: np.ndarray, pairs: Sequence[Sequence[np.ndarray]]) -> tuple[float, ...]:
    """AUC of A minus AUC of B on the same rows, and its 95 % interval (DeLong's variance).

    `pairs` has one pair for each seed: the log-odds (n,) of A and of B. The result is a mean over
    the pairs.
    """
    found = [[auc_components(labels, odds) for odds in pair] for pair in pairs]
    return auc_mean([[a[c] - b[c] for c in (0, 1)] for a, b in found])


@dataclass(frozen=True)
class Comparison:
    """A against B on the clean rows, by seed. A method without seeds is paired with every seed."""

    difference: float  # accuracy of A minus accuracy of B, mean over the seeds
    interval: tuple[float, float]  # of that mean: a bootstrap over rows, seeds fixed
    tests: list[dict]  # McNemar's test, one for each seed
    auc: tuple[float, ...] | None  # difference and interval of the AUC; None without scores

    @property
    def p(self) -> list[float]:
        """McNemar's p of each seed."""
        return [test["p"] for test in self.tests]


@cache
def compared(a: str, b: str) -> Comparison | None:
    """Compare two rows by name; None unless both are kept and have a seed in common."""
    found_a, found_b = find(a), find(b)
    pairs = [
        (found_a.get(seed, found_a.get(None)), found_b.get(seed, found_b.get(None)))
        for seed in sorted({*found_a, *found_b} - {None}) or [None]
    ]
    pairs = [(one, other) for one, other in pairs if one and other]
    if not pairs:
        return None
    for one, other in pairs:
        if one.results["examples_hash"] != other.results["examples_hash"]:
            sys.exit(f"error: {one.path} and {other.path} have different evaluation rows")
    # The same rows are clean for every method: none of the 3,000 rows, whichever were used.
    masks = [tuple(correct(r)[clean(r.path)] for r in pair) for pair in pairs]
    gain = np.mean([one.astype(int) - other for one, other in masks], axis=0)  # (clean rows,)
    tests = [mcnemar_exact(*pair) for pair in masks]
    auc = None
    if all(r.predictions.scores is not None for pair in pairs for r in pair):
        labels = pairs[0][0].predictions.labels[clean(pairs[0][0].path)]
        rankings = [[ranking(r)[clean(r.path)] for r in pair] for pair in pairs]
        auc = auc_difference(labels, rankings)
    return Comparison(float(gain.mean()), mean_interval(gain), tests, auc)


def mean(values: list[float | None]) -> float | None:
    """Mean over seeds; None if a value is undefined."""
    return None if None in values else statistics.fmean(values)
