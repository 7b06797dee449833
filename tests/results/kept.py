"""The kept results, and the statistics that tables, pictures and answers take from them.

A row is named as in experiment.py, without its seed; one of the larger model 1.5b/NAME. Pairs of
methods are tested on the clean rows of dev: those whose text is not among the training rows.
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

LABELS_ALONE, OTHERS_ALONE = ", those of 负面/正面 alone", ", all but 负面/正面's"
VECTORS = "`lora_label_scoring --train-embeddings --lora-targets none`"
# Rows of the main table, and what the reader sees.
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
    "embeddings-words-labels": VECTORS + LABELS_ALONE,
    "embeddings-words-others": VECTORS + OTHERS_ALONE,
    "embeddings-lora-words": "`lora_label_scoring --train-embeddings`",
}
TRAINED = ("head_only", "lora_head", "lora_label_scoring")  # those of the learning curve


def place(name: str) -> Path:
    """Where the files of a row are kept, without what tells seed and kind."""
    size, _, bare = name.rpartition("/")
    return KEPT / (size or next(iter(MODELS))) / bare


def shown(name: str) -> str:
    """What the reader sees of a row: `1.5b/head_only-n50` is "1.5B: `head_only`, 50 rows"."""
    size, _, bare = name.rpartition("/")
    method, _, rows = bare.rpartition("-n")
    part = f", {rows} rows" if method and rows in map(str, CURVE) else ""
    return (f"{size.upper()}: " if size else "") + METHODS[method if part else bare] + part


@cache
def find(name: str) -> dict[int | None, Result]:
    """The kept results of a row by seed; None for what draws nothing at random."""
    path = place(name)
    named = [(seed, path.with_name(f"{path.name}-s{seed}.json")) for seed in SEEDS]
    found = {seed: read_result(file) for seed, file in named if file.exists()}
    if (file := path.with_name(f"{path.name}.json")).exists():
        result = read_result(file)
        training = result.results["training_arguments"]
        # A probe is solved, not drawn; the others that have no seed in their name were given 0.
        solved = training is None or training["method"] == "head_only"
        found[None if solved else training["seed"]] = result
    return found


def first(name: str) -> Result | None:
    """Seed 0, or the only result."""
    found = find(name)
    return found.get(0, found.get(None))


def with_rows(name: str, n: int) -> str:
    """The row of a method that was trained on the first n rows."""
    return f"{name}-n{n}" if n in CURVE else name


@cache
def clean(path: Path) -> np.ndarray:
    """Which rows of dev are not among the training rows: (n,) of true and false."""
    lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return np.array([json.loads(line)["clean"] for line in lines])


def right(result: Result) -> np.ndarray:
    """Which rows a result has right: (n,) of true and false."""
    return result.predictions.predicted == result.predictions.labels


def ranking(result: Result) -> np.ndarray:
    """What a result ranks its rows by: (n,)."""
    return log_odds(result.predictions.scores, 1)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of (n,) numbers, rows drawn with replacement.

    As `metrics.paired_bootstrap`, for numbers that are means over seeds: they take few levels, and
    how often each level is drawn is one multinomial.
    """
    levels, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=10_000)
    low, high = np.quantile(draws @ levels / len(values), [0.025, 0.975])
    return float(low), float(high)


def accuracy_interval(results: Sequence[Result]) -> tuple[float, float]:
    """Wilson's interval of one result; of several seeds that of their mean, by rows drawn anew."""
    if len(results) == 1:
        return tuple(results[0].results["accuracy_interval"])
    return mean_interval(np.mean([right(r) for r in results], axis=0))


def auc_interval(auc: float, positive: int, negative: int) -> tuple[float, float]:
    """95 % interval of an AUC from itself and the sizes of the classes (Hanley and McNeil 1982).

    Q1: the chance that two positive rows both rank above a negative one, Q2: that one positive row
    ranks above two negative ones, both as for exponential scores.
    """
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positive - 1) * (q1 - auc**2) + (negative - 1) * (q2 - auc**2)
    half = 1.96 * math.sqrt(variance / (positive * negative))
    return max(auc - half, 0.0), min(auc + half, 1.0)


def auc_components(labels: np.ndarray, ranks_by: np.ndarray) -> list[np.ndarray]:
    """What each row adds to the AUC: (negative,) and (positive,), both with the AUC as their mean.

    Of a positive row the share of negative ones that rank below it, of a negative row the share of
    positive ones above, ties by half (DeLong, DeLong and Clarke-Pearson 1988).
    """
    sides = [np.sort(ranks_by[labels == c]) for c in (0, 1)]

    def below(values: np.ndarray, among: np.ndarray) -> np.ndarray:
        ends = [np.searchsorted(among, values, side=side) for side in ("left", "right")]
        return (ends[0] + ends[1]) / (2 * len(among))

    negative = 1 - below(ranks_by[labels == 0], sides[1])
    return [negative, below(ranks_by[labels == 1], sides[0])]


def auc_mean(parts: Sequence[Sequence[np.ndarray]]) -> tuple[float, ...]:
    """Mean over seeds of what `auc_components` gave, and its 95 % interval by DeLong's variance."""
    sides = [np.mean([part[c] for part in parts], axis=0) for c in (0, 1)]
    auc = float(sides[0].mean())
    half = 1.96 * math.sqrt(sum(side.var(ddof=1) / len(side) for side in sides))
    return auc, auc - half, auc + half


def auc_difference(labels: np.ndarray, pairs: Sequence[Sequence[np.ndarray]]) -> tuple[float, ...]:
    """AUC of A less that of B on the same rows, mean over pairs (one for each seed) of rankings
    (n,): difference, and its 95 % interval by DeLong's variance."""
    found = [[auc_components(labels, ranks_by) for ranks_by in pair] for pair in pairs]
    return auc_mean([[a[c] - b[c] for c in (0, 1)] for a, b in found])


@dataclass(frozen=True)
class Comparison:
    """A against B on the clean rows, seed by seed; what has no seed goes with every one."""

    difference: float  # accuracy of A minus that of B, mean over the seeds
    interval: tuple[float, float]  # of that mean, rows drawn anew, these seeds
    tests: list[dict]  # McNemar's, one for each seed
    auc: tuple[float, ...] | None  # the same of AUC: difference and interval; None without scores

    @property
    def p(self) -> list[float]:
        """Of each seed."""
        return [test["p"] for test in self.tests]


@cache
def compared(a: str, b: str) -> Comparison | None:
    """The comparison of two rows by name; None unless both are kept, with a seed in common."""
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
            sys.exit(f"error: {one.path} and {other.path} are about different rows")
    # What is clean is so for every method, whatever it was trained on.
    rights = [tuple(right(r)[clean(r.path)] for r in pair) for pair in pairs]
    gain = np.mean([one.astype(int) - other for one, other in rights], axis=0)  # of each row
    tests = [mcnemar_exact(*pair) for pair in rights]
    auc = None
    if all(r.predictions.scores is not None for pair in pairs for r in pair):
        labels = pairs[0][0].predictions.labels[clean(pairs[0][0].path)]
        rankings = [[ranking(r)[clean(r.path)] for r in pair] for pair in pairs]
        auc = auc_difference(labels, rankings)
    return Comparison(float(gain.mean()), mean_interval(gain), tests, auc)


def mean(values: list[float | None]) -> float | None:
    """The mean over seeds; None where one is undefined."""
    return None if None in values else statistics.fmean(values)
