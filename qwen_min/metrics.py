"""All metrics, in float64: from counts, from ranks (AUC), or from probabilities (Brier, ECE).

Shapes: n examples, C classes. Labels and predictions (n,) are class numbers from 0. Scores (n, C)
are log-probabilities of label words, or logits; probabilities (n, C) are their softmax.

Functions that take labels, predictions or scores raise ValueError if n is 0, if lengths differ, and
if a class number is out of range or a score is not finite; the last two name the first bad row.
`wilson_interval` checks its two numbers. `precision_recall_f1` and `log_odds` check nothing.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

OFF_TRACK = -1  # the prediction if the generated text contains no label word


def _class_numbers(what: str, values: ArrayLike, n: int, end: int, start: int = 0) -> np.ndarray:
    """`values` as int64 (n,), checked to be whole numbers from `start` to `end` - 1."""
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
    """`scores` as float64 (n, C), checked to be finite in fp32."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or len(scores) == 0 or scores.shape[1] < 2:
        raise ValueError(f"scores: expected shape (n, C), n > 0, C > 1, found {scores.shape}")
    # A model's scores fit into fp32; such numbers cannot overflow float64 in the formulas below. A
    # comparison with NaN is false, so NaN is refused too.
    is_finite = (np.abs(scores) <= np.finfo(np.float32).max).all(axis=1)
    if not is_finite.all():
        row = is_finite.argmin()
        raise ValueError(f"scores: row {row} is not finite in fp32: {scores[row].tolist()}")
    return scores


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores = _finite(scores)
    n, num_classes = scores.shape
    return _class_numbers("labels", labels, n, num_classes), scores


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> np.ndarray:
    """Counts (C, C): row = true class, column = predicted class.

    If any prediction is OFF_TRACK, the matrix is (C, C + 1): the last column counts them, as wrong.
    """
    labels = _class_numbers("labels", labels, len(labels), num_classes)
    predictions = _class_numbers("predictions", predictions, len(labels), num_classes, OFF_TRACK)
    columns = num_classes + int((predictions == OFF_TRACK).any())
    matrix = np.zeros((num_classes, columns), dtype=np.int64)
    # Index OFF_TRACK, -1, is the last column. add.at counts a repeated cell each time; += once.
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def precision_recall_f1(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, (C,) each, from a confusion matrix.

    0 where the denominator is 0, as in scikit-learn. F1 is hits / mean(predicted, support).
    """
    hits, support = np.diagonal(matrix), matrix.sum(axis=1)
    predicted = matrix.sum(axis=0)[: len(matrix)]
    # A denominator below 1 means no hits: the result is 0 after division by 1 as well.
    denominators = (predicted, support, (predicted + support) / 2)
    return tuple(hits / np.maximum(d, 1) for d in denominators)


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % score interval (low, high) of the proportion correct / n (Wilson 1927).

    It stays inside [0, 1], unlike p ± 1.96 standard errors. Raises ValueError unless n > 0 and
    0 <= correct <= n.
    """
    if n == 0 or not 0 <= correct <= n:
        raise ValueError(f"expected 0 <= correct <= n and n > 0, found {correct} of {n}")
    z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
    p = correct / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def log_odds(scores: np.ndarray) -> np.ndarray:
    """log(p_c / (1 - p_c)) of each class c: its score minus the log-sum-exp of the other scores.

    The result ranks rows as p_c does, also where p_c rounds to 0 or 1. With two classes it is
    exactly the difference of the scores. The sum over the other scores is not the whole sum minus
    c's term, which could round to nothing: after sorting, the sum of the smaller ones and that of
    the larger ones are added. `scores`: float (n, C), not checked; the result is (n, C).
    """
    # Sorted, and less the largest, so that rows whose other scores differ only in order, or which
    # differ by a constant, give exactly the same numbers.
    order = scores.argsort(axis=1)
    ascending = np.take_along_axis(scores, order, axis=1)
    ascending -= ascending[:, -1:].copy()
    nothing = np.full((len(scores), 1), -np.inf)  # the log of an empty sum
    before = np.logaddexp.accumulate(ascending[:, :-1], axis=1)
    after = np.logaddexp.accumulate(ascending[:, :0:-1], axis=1)[:, ::-1]
    # At each place: the log-sum-exp of the scores before it, and of those after it.
    others = np.logaddexp(np.hstack([nothing, before]), np.hstack([after, nothing]))
    # Of equal scores all take the first one's place; the numbers could differ in the last bit.
    places = np.tile(np.arange(scores.shape[1]), (len(scores), 1))
    places[:, 1:][ascending[:, 1:] == ascending[:, :-1]] = 0
    places = np.maximum.accumulate(places, axis=1)
    found = ascending - np.take_along_axis(others, places, axis=1)
    result = np.empty_like(found)
    np.put_along_axis(result, order, found, axis=1)
    return result


def _rank_sum_auc(positive: np.ndarray, ranking: np.ndarray) -> float | None:
    """P(a positive ranks above a negative), where a tie counts 1/2 (Hanley and McNeil 1982).

    `positive` (n,) is true/false, `ranking` (n,) any number per row. None if one side is empty.
    """
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return None
    _, place, counts = np.unique(ranking, return_inverse=True, return_counts=True)
    average_rank = np.cumsum(counts) - (counts - 1) / 2  # of each distinct value; from 1
    rank_sum = average_rank[place][positive].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def auc_roc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve, from 0 to 1; None if a class is absent.

    Two classes: class 1 against class 0, ranked by s_1 - s_0. More classes: the mean over classes
    of each class against the rest, ranked by its log-odds.
    """
    labels, scores = _checked(labels, scores)
    classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    parts = np.array_split(scores, 1 + len(scores) // 1024)  # not to hold copies of all scores
    ranking = np.concatenate([log_odds(part) for part in parts])
    areas = [_rank_sum_auc(labels == c, ranking[:, c]) for c in classes]
    return None if None in areas else float(np.mean(areas))


def softmax(scores: ArrayLike) -> np.ndarray:
    """Class probabilities: exp(s_c) / Σ_k exp(s_k), (n, C) to (n, C)."""
    scores = _finite(scores)
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def log_loss(labels: ArrayLike, scores: ArrayLike, class_weights: ArrayLike | None = None) -> float:
    """Mean of -log p(true class), in nats; finite also where p itself rounds to 0.

    class_weights (C,): each row counts as much as its true class's weight; None: all alike.
    """
    labels, scores = _checked(labels, scores)
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    by_row = None if class_weights is None else np.asarray(class_weights)[labels]
    return float(np.average(-log_p[np.arange(len(labels)), labels], weights=by_row))


def brier_score(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean squared error of the probabilities (Brier 1950).

    Two classes: (p_1 - y)², from 0 to 1. More classes: the sum over classes, from 0 to 2. (Brier's
    own definition is always the sum, which is twice as large for two classes.)
    """
    labels, scores = _checked(labels, scores)
    squared = (softmax(scores) - np.eye(scores.shape[1])[labels]) ** 2
    return float((squared[:, 1] if scores.shape[1] == 2 else squared.sum(axis=1)).mean())


def expected_calibration_error(labels: ArrayLike, scores: ArrayLike, bins: int = 15) -> float:
    """Mean of |accuracy - confidence| over bins, weighted by their counts (Guo et al. 2017).

    Confidence is the probability of the top class. The bins have equal width: bin i holds the
    examples with i/bins < confidence <= (i+1)/bins. From 0 to 1.
    """
    labels, scores = _checked(labels, scores)
    confidence = softmax(scores).max(axis=1)
    # argmax of the scores: two probabilities can round to the same number, a tie.
    correct = scores.argmax(axis=1) == labels
    # Edges as k / bins: a confidence of exactly k / bins rounds to the same number.
    bin_of = np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")
    # For one bin: count/n · |accuracy - confidence| = |sum of (correct - confidence)| / n.
    gaps = np.bincount(bin_of, weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(labels))


def mcnemar_exact(correct_a: ArrayLike, correct_b: ArrayLike) -> dict:
    """Exact test of whether A and B are equally accurate on the same n examples (McNemar 1947).

    `correct_a`, `correct_b`: (n,) of true/false. Returns `only_a` and `only_b`, the numbers of
    examples that only one of them has right, and the two-sided `p`. If both are equally accurate,
    only_a follows Binomial(only_a + only_b, 1/2); p is twice the smaller tail, at most 1.
    """
    a = _class_numbers("correct_a", correct_a, len(correct_a), 2)
    b = _class_numbers("correct_b", correct_b, len(a), 2)
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    n = only_a + only_b
    # tail = Σ_k (n choose k), k from 0 to the smaller count. Python's integers are exact.
    ways = tail = 1
    for k in range(min(only_a, only_b)):
        ways = ways * (n - k) // (k + 1)  # from (n choose k) to (n choose k + 1)
        tail += ways
    return {"only_a": only_a, "only_b": only_b, "p": min(1.0, 2 * tail / 2**n)}


def paired_bootstrap(
    correct_a: ArrayLike, correct_b: ArrayLike, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """A's accuracy minus B's, and its 95 % percentile interval: (difference, low, high).

    `correct_a`, `correct_b`: (n,) of true/false. A resample draws n examples with replacement
    (Efron and Tibshirani 1993, chapter 13). An example adds -1, 0 or 1 to the difference, so only
    the count of each matters. The three counts are one multinomial draw, which has the same
    distribution and needs no (resamples, n) numbers in memory.
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
    """All metrics of one evaluation, as numbers, strings and lists for JSON; no NaN.

    `predictions` may contain OFF_TRACK. Top-level precision, recall and F1 are those of class 1,
    and None unless there are two classes. Macro means are over all C classes, absent ones
    included. Without scores (generation) the metrics that need them are None; `auc_roc` is also
    None if a class is absent.
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
