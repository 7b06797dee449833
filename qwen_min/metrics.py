"""Every metric by hand, from counts or ranks, in float64.

n examples, C classes. Labels and predictions are class numbers from 0, (n,). Scores are (n, C),
higher is likelier (log-probabilities of label words, or logits); probabilities are their softmax.
All functions raise ValueError, naming the first bad row, where a class number is out of range or a
score is not finite, and where lengths differ or n is 0.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

OFF_TRACK = -1  # the prediction where generated text held no label word


def _class_numbers(what: str, values: ArrayLike, n: int, end: int, start: int = 0) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (n,) or n == 0 or values.dtype.kind not in "iub":
        found = f"{values.dtype} of shape {values.shape}"
        raise ValueError(f"{what}: expected n = {n} > 0 whole numbers, found {found}")
    values = values.astype(np.int64)
    if (bad := np.flatnonzero((values < start) | (values >= end))).size:
        row = bad[0]
        raise ValueError(f"{what}: row {row} is {values[row]}, expected {start} to {end - 1}")
    return values


def _finite(scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or len(scores) == 0 or scores.shape[1] < 2:
        raise ValueError(f"scores: expected shape (n, C), n > 0, C > 1, found {scores.shape}")
    # A model's scores fit fp32, and what fits fp32 cannot overflow float64 below. NaN compares
    # false, so it is not within either.
    within = (np.abs(scores) <= np.finfo(np.float32).max).all(axis=1)
    if not within.all():
        row = within.argmin()
        raise ValueError(f"scores: row {row} is not finite in fp32: {scores[row].tolist()}")
    return scores


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores = _finite(scores)
    return _class_numbers("labels", labels, *scores.shape), scores


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> np.ndarray:
    """Counts, (C, C): row = true class, column = predicted class.

    Where a prediction is OFF_TRACK, a last column, (C, C+1), counts those: always wrong.
    """
    labels = _class_numbers("labels", labels, len(labels), num_classes)
    predictions = _class_numbers("predictions", predictions, len(labels), num_classes, OFF_TRACK)
    columns = num_classes + int((predictions == OFF_TRACK).any())
    matrix = np.zeros((num_classes, columns), dtype=np.int64)
    # Index -1, OFF_TRACK, is the last column. add.at counts repeated cells; += would count once.
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def precision_recall_f1(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each (C,), from a confusion matrix; 0 where the denominator is 0, as in scikit-learn."""
    hits, support = np.diagonal(matrix), matrix.sum(axis=1)
    predicted = matrix.sum(axis=0)[: len(matrix)]
    # Without a hit all three are 0, whatever the denominator; with one it is at least 1.
    denominators = (predicted, support, (predicted + support) / 2)
    precision, recall, f1 = (hits / np.maximum(d, 1) for d in denominators)
    return precision, recall, f1


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927): inside [0, 1], unlike p ± 1.96 se."""
    if n == 0 or not 0 <= correct <= n:
        raise ValueError(f"expected 0 <= correct <= n and n > 0, found {correct} of {n}")
    z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
    p = correct / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def log_odds(scores: np.ndarray, c: int) -> np.ndarray:
    """log(p_c / (1 - p_c)), (n,): class c's score minus the log-sum-exp of the others.

    It ranks as p_c does, but still tells rows apart where p_c has rounded to 0 or 1. With two
    classes it is exactly the difference of the scores.
    """
    # Sorted, so that rows which differ only in the order of the other classes tie exactly.
    others = np.sort(np.delete(scores, c, axis=1), axis=1)
    top = others[:, -1:]
    return scores[:, c] - top[:, 0] - np.log1p(np.exp(others[:, :-1] - top).sum(axis=1))


def _rank_sum_auc(positive: np.ndarray, ranking: np.ndarray) -> float | None:
    """P(a positive outranks a negative), a tie counting one half (Hanley and McNeil 1982)."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return None
    _, place, counts = np.unique(ranking, return_inverse=True, return_counts=True)
    average_rank = np.cumsum(counts) - (counts - 1) / 2  # of each distinct value; ranks from 1
    rank_sum = average_rank[place][positive].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def auc_roc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve; None where a class is absent.

    Two classes: class 1 against class 0, ranked by s_1 - s_0. More: the mean over classes of each
    against the rest, ranked by its log-odds.
    """
    labels, scores = _checked(labels, scores)
    classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    areas = [_rank_sum_auc(labels == c, log_odds(scores, c)) for c in classes]
    return None if None in areas else float(np.mean(areas))


def softmax(scores: ArrayLike) -> np.ndarray:
    """Class probabilities, (n, C) to (n, C)."""
    scores = _finite(scores)
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def log_loss(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean of -log p(true class), in nats; finite even where p itself rounds to 0."""
    labels, scores = _checked(labels, scores)
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(labels)), labels].mean())


def brier_score(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean squared error of the probabilities (Brier 1950).

    Two classes: (p_1 - y)², from 0 to 1, half of Brier's own sum over both. More: that sum, from 0
    to 2.
    """
    labels, scores = _checked(labels, scores)
    squared = (softmax(scores) - np.eye(scores.shape[1])[labels]) ** 2
    return float((squared[:, 1] if scores.shape[1] == 2 else squared.sum(axis=1)).mean())


def expected_calibration_error(labels: ArrayLike, scores: ArrayLike, bins: int = 15) -> float:
    """Mean gap between confidence (the top class's probability) and accuracy, over bins.

    They are of equal width: bin i holds i/bins < confidence <= (i+1)/bins, weighted by its count
    (Guo et al. 2017).
    """
    labels, scores = _checked(labels, scores)
    confidence = softmax(scores).max(axis=1)
    # From the scores: probabilities may have rounded to a tie that the scores do not have.
    correct = scores.argmax(axis=1) == labels
    # k / bins rounds as a confidence of that value does: on the edge means on the edge.
    bin_of = np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")
    # count/n · |accuracy - confidence| of a bin is |sum of (correct - confidence)| / n.
    gaps = np.bincount(bin_of, weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(labels))


def mcnemar_exact(correct_a: ArrayLike, correct_b: ArrayLike) -> dict:
    """Two-sided test that A and B, on the same n examples, are equally accurate: counts and p.

    `correct_a`, `correct_b`: (n,) of true/false. If both are equally accurate, each example that
    only one has right is a fair coin's toss (McNemar 1947); p is twice the smaller binomial tail.
    """
    a = _class_numbers("correct_a", correct_a, len(correct_a), 2)
    b = _class_numbers("correct_b", correct_b, len(a), 2)
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    n = only_a + only_b
    ways = tail = 1  # Python's whole numbers neither round nor overflow; the division rounds once
    for k in range(min(only_a, only_b)):
        ways = ways * (n - k) // (k + 1)  # from "n choose k" to "n choose k+1"
        tail += ways
    return {"only_a": only_a, "only_b": only_b, "p": min(1.0, 2 * tail / 2**n)}


def paired_bootstrap(
    correct_a: ArrayLike, correct_b: ArrayLike, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """A's accuracy minus B's, and its 95 % percentile interval: (difference, low, high).

    A resample draws n pairs with replacement (Efron and Tibshirani 1993, chapter 13). Each pair
    adds -1, 0 or 1, so how often each of the three is drawn says all, and those counts are one
    multinomial draw: the same distribution without (resamples, n) numbers in memory.
    """
    a = _class_numbers("correct_a", correct_a, len(correct_a), 2)
    b = _class_numbers("correct_b", correct_b, len(a), 2)
    shares = np.bincount(a - b + 1, minlength=3) / len(a)
    draws = np.random.default_rng(seed).multinomial(len(a), shares, size=resamples)
    low, high = np.quantile((draws[:, 2] - draws[:, 0]) / len(a), [0.025, 0.975])
    return float((a - b).mean()), float(low), float(high)


def evaluate_predictions(
    labels: ArrayLike, predictions: ArrayLike, scores: ArrayLike | None, class_names: list[str]
) -> dict:
    """Every metric of one evaluation, in plain numbers ready for JSON, never NaN.

    Precision, recall and F1 at the top are class 1's; None unless there are two classes. Macro
    means run over all C classes, absent ones too. What needs scores is None without them
    (generation), and so is `auc_roc` where a class is absent.
    """
    two = len(class_names) == 2
    matrix = confusion_matrix(labels, predictions, len(class_names))
    by_class = dict(zip(("precision", "recall", "f1"), precision_recall_f1(matrix), strict=True))
    n, correct = int(matrix.sum()), int(np.trace(matrix))
    per_class = [
        {"name": name, **{k: float(v[c]) for k, v in by_class.items()}, "support": int(row.sum())}
        for c, (name, row) in enumerate(zip(class_names, matrix, strict=True))
    ]
    scored = dict.fromkeys(("auc_roc", "brier", "brier_kind", "ece", "log_loss"))
    if scores is not None:
        if np.shape(scores) != (n, len(class_names)):
            raise ValueError(f"scores: expected {n, len(class_names)}, found {np.shape(scores)}")
        scored = {
            "auc_roc": auc_roc(labels, scores),
            "brier": brier_score(labels, scores),
            "brier_kind": "two classes: (p1-y)^2" if two else "sum over classes",
            "ece": expected_calibration_error(labels, scores),
            "log_loss": log_loss(labels, scores),
        }
    return {
        "n": n,
        "accuracy": correct / n,
        "accuracy_interval": list(wilson_interval(correct, n)),
        **{k: float(v[1]) if two else None for k, v in by_class.items()},
        "per_class": per_class,
        "macro": {k: float(v.mean()) for k, v in by_class.items()},
        **scored,
        "confusion_matrix": matrix.tolist(),
        "off_track": int(matrix[:, len(class_names) :].sum()),
    }
