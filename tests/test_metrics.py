"""Metrics against scikit-learn and scipy on random cases, and against cases worked by hand."""

import json
import math
import time

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from qwen_min import metrics as m

# Both sides compute in float64 by formulas that differ only in the order of few operations on
# numbers near 1, over at most 40 examples: about 40 roundings of 1.1e-16 each.
CLOSE = 1e-13


def random_case(seed):
    """Labels (some classes often absent), predictions and scores, with C from 2 to 5.

    Two cases in three have scores from a few whole numbers, so that ties abound.
    """
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(2, 6))
    n = int(rng.integers(1, 41))
    labels = rng.choice(rng.integers(0, num_classes, size=num_classes), size=n)
    if seed % 3:
        scores = rng.integers(-2, 3, size=(n, num_classes)).astype(np.float64)
    else:
        scores = rng.normal(size=(n, num_classes)) * 3
    return num_classes, labels, rng.integers(0, num_classes, size=n), scores


def by_pairs(positive, ranking):
    """The definition of the area: the share of (positive, negative) pairs in the right order."""
    gap = ranking[positive][:, None] - ranking[~positive][None, :]
    return ((gap > 0) + 0.5 * (gap == 0)).mean()


def test_counts_equal_scikit_learn():
    for seed in range(150):
        num_classes, labels, predictions, _ = random_case(seed)
        matrix = m.confusion_matrix(labels, predictions, num_classes)
        classes = list(range(num_classes))
        np.testing.assert_array_equal(
            matrix, sk.confusion_matrix(labels, predictions, labels=classes), err_msg=str(seed)
        )
        expected = sk.precision_recall_fscore_support(
            labels, predictions, labels=classes, zero_division=0
        )
        np.testing.assert_allclose(
            m.precision_recall_f1(matrix), expected[:3], rtol=0, atol=CLOSE, err_msg=str(seed)
        )


def test_auc_equals_scikit_learn():
    undefined = ties = 0
    for seed in range(1000):
        num_classes, labels, _, scores = random_case(seed)
        area = m.auc_roc(labels, scores)
        if len(set(labels.tolist())) < num_classes:
            assert area is None, seed
            undefined += 1
            continue
        # Rounded to 12 digits, so that probabilities which are equal on paper tie here as well;
        # different ones of these cases lie much farther apart.
        p = m.softmax(scores).round(12)
        ties += any(len(np.unique(column)) < len(column) for column in p.T)
        if num_classes == 2:
            expected = sk.roc_auc_score(labels, p[:, 1])
        else:
            expected = np.mean([sk.roc_auc_score(labels == c, p[:, c]) for c in range(num_classes)])
        assert area == pytest.approx(expected, abs=CLOSE), seed
        pairs = [by_pairs(labels == c, p[:, c]) for c in range(num_classes)]
        assert area == pytest.approx(np.mean(pairs), abs=CLOSE), seed
    # The comparison means something only while both kinds of case are drawn often.
    assert undefined > 100
    assert ties > 100


def test_probabilities_equal_scikit_learn_and_scipy():
    for seed in range(100):
        num_classes, labels, _, scores = random_case(seed)
        classes = list(range(num_classes))
        p = m.softmax(scores)
        log_p = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        np.testing.assert_allclose(p, np.exp(log_p), rtol=0, atol=CLOSE)
        # scikit-learn refuses a sum that its own tolerance finds off, so p also sums to 1.
        expected = sk.log_loss(labels, p, labels=classes)
        assert m.log_loss(labels, scores) == pytest.approx(expected, rel=1e-12), seed
        weights = np.linspace(0.1, 3, num_classes)
        expected = sk.log_loss(labels, p, labels=classes, sample_weight=weights[labels])
        assert m.log_loss(labels, scores, weights) == pytest.approx(expected, rel=1e-12), seed
        if num_classes == 2:
            expected = sk.brier_score_loss(labels, p[:, 1], pos_label=1)
        else:
            one_hot = labels[:, None] == np.arange(num_classes)
            expected = np.sum((p - one_hot) ** 2) / len(labels)
        assert m.brier_score(labels, scores) == pytest.approx(expected, abs=CLOSE), seed


def test_ece_equals_its_definition():
    for seed in range(300):
        _, labels, _, scores = random_case(seed)
        confidence, correct = m.softmax(scores).max(axis=1), scores.argmax(axis=1) == labels
        expected = 0.0
        for i in range(15):
            held = (confidence > i / 15) & (confidence <= (i + 1) / 15)
            if held.any():
                gap = abs(correct[held].mean() - confidence[held].mean())
                expected += held.mean() * gap
        assert m.expected_calibration_error(labels, scores) == pytest.approx(expected, abs=CLOSE)


# Counts


def test_confusion_matrix_by_hand():
    labels, predictions = [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]
    assert m.confusion_matrix(labels, predictions, 2).tolist() == [[1, 1], [1, 2]]
    # A class that never occurs keeps its row and its column.
    assert m.confusion_matrix(labels, predictions, 3).tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]


def test_off_track_has_a_column_and_is_wrong():
    matrix = m.confusion_matrix([0, 0, 1, 1], [0, -1, -1, 1], 2)
    assert matrix.tolist() == [[1, 0, 1], [0, 1, 1]]
    precision, recall, f1 = m.precision_recall_f1(matrix)
    assert precision.tolist() == [1, 1]
    assert recall.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(f1, [2 / 3, 2 / 3], rtol=1e-15)


def test_zero_denominators_give_zero():
    # Class 0 is never predicted, class 1 never true: no precision for 0, no recall for 1.
    precision, recall, f1 = m.precision_recall_f1(m.confusion_matrix([0, 0], [1, 1], 3))
    assert precision.tolist() == recall.tolist() == f1.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3; four digits printed.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published_and_as_scipy(correct, n, low, high):
    interval = m.wilson_interval(correct, n)
    assert interval == pytest.approx((low, high), abs=0.5e-4)
    ours = stats.binomtest(correct, n).proportion_ci(method="wilson")
    assert interval == pytest.approx((ours.low, ours.high), abs=CLOSE)


def test_wilson_interval_stays_inside_0_and_1():
    for n in range(1, 200):
        low, high = m.wilson_interval(0, n)
        assert 0 <= low < 1e-15 and 0 < high < 1
        low, high = m.wilson_interval(n, n)
        assert 0 < low < 1 and 1 - 1e-15 < high <= 1
    with pytest.raises(ValueError, match="n > 0"):
        m.wilson_interval(0, 0)
    with pytest.raises(ValueError, match="5 of 4"):
        m.wilson_interval(5, 4)


# Ranks


def test_auc_by_hand():
    # s_1 - s_0 = 1, 2, 2, 3. Of four pairs, (2, 1) and (3, 1), (3, 2) are right, (2, 2) ties.
    scores = [[0, 1], [0, 2], [1, 3], [0, 3]]
    assert m.auc_roc([0, 0, 1, 1], scores) == 3.5 / 4
    assert m.auc_roc([1, 1, 0, 0], scores) == 0.5 / 4


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_auc_of_all_tied_is_one_half(num_classes):
    labels = np.arange(20) % num_classes
    assert m.auc_roc(labels, np.full((20, num_classes), -1.25)) == 0.5
    # Tied on paper although no two rows are alike: each is the same row shifted.
    shifted = np.arange(20.0)[:, None] + np.arange(num_classes)
    assert m.auc_roc(labels, shifted) == 0.5


def test_auc_is_undefined_where_a_class_is_absent():
    assert m.auc_roc([1, 1], [[0, 1], [1, 0]]) is None
    assert m.auc_roc([0], [[0, 1]]) is None
    assert m.auc_roc([0, 1, 1], np.eye(3)) is None


def test_order_of_examples_changes_nothing():
    rng = np.random.default_rng(0)
    for num_classes in (2, 3, 5):
        labels = np.arange(60) % num_classes
        scores = rng.integers(0, 3, size=(60, num_classes)) * 0.1
        area = m.auc_roc(labels, scores)
        for _ in range(20):
            order = rng.permutation(60)
            assert m.auc_roc(labels[order], scores[order]) == area  # to the bit: ranks are halves


def test_naming_of_classes_changes_nothing():
    rng = np.random.default_rng(1)
    labels, scores = np.arange(60) % 5, rng.integers(0, 3, size=(60, 5)) * 0.1
    for _ in range(20):
        new_name = rng.permutation(5)
        renamed = np.empty_like(scores)
        renamed[:, new_name] = scores
        area = m.auc_roc(new_name[labels], renamed)
        # The areas are averaged in another order: a few roundings of numbers below 1.
        assert area == pytest.approx(m.auc_roc(labels, scores), abs=1e-15)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("far", [40.0, 1000.0])
def test_saturated_probabilities_are_still_ranked(num_classes, far):
    """Class 1 is ahead by `far` and more: every p_1 rounds to 1, and p_0 to 0 or nearly so."""
    scores = np.full((4, num_classes), -3 * far)
    scores[:, 0] = 0
    scores[:, 1] = far + np.arange(4)
    assert (m.softmax(scores)[:, 1] == 1).all()
    labels = np.array([0, 0, 1, 1])
    if num_classes == 2:
        assert m.auc_roc(labels, scores) == 1
        assert m.auc_roc(1 - labels, scores) == 0
        return
    # Three classes: add one example of class 2, far ahead there. Every class is ranked perfectly.
    scores = np.vstack([scores, [0, 0, 2 * far]])
    assert m.auc_roc([*labels, 2], scores) == 1


def test_log_odds_are_those_of_the_probabilities_whatever_the_order_of_the_classes():
    """Ties stay ties: rows with the same other scores in another order have the same number."""
    rng = np.random.default_rng(0)
    for classes in (2, 3, 7):
        scores = rng.normal(size=(200, classes)) * 3
        scores[::3] = np.round(scores[::3])  # some equal scores
        p = m.softmax(scores)
        # Where p is within 1e-6 of 1, 1 - p keeps ten of its sixteen digits.
        np.testing.assert_allclose(m.log_odds(scores), np.log(p / (1 - p)), rtol=1e-9, atol=1e-12)
        order = rng.permutation(classes)
        assert (m.log_odds(scores[:, order]) == m.log_odds(scores)[:, order]).all()


def test_three_hundred_classes_take_seconds():
    """One sort in all, not one for each class: 16 s before, 0.4 s now."""
    scores = np.random.default_rng(0).normal(size=(6000, 300))
    started = time.perf_counter()
    m.auc_roc(np.arange(6000) % 300, scores)
    assert time.perf_counter() - started < 5


def test_log_odds_keep_what_is_below_one_rounding():
    # exp(-50) beside 1 is lost in 1 + exp(-50), and so would be the order of these rows.
    scores = np.array([[0.0, 0.0, -50.0], [0.0, 0.0, -60.0], [0.0, 0.0, -70.0]])
    assert (np.diff(m.log_odds(scores)[:, 0]) > 0).all()


# Probabilities


def test_softmax_by_hand_and_far_out():
    third = [[1 / 3, 1 / 3, 1 / 3]]
    assert m.softmax([[7, 7, 7]]).tolist() == third
    np.testing.assert_allclose(m.softmax([[math.log(3), 0]]), [[0.75, 0.25]], rtol=1e-15)
    assert m.softmax([[1e5, 0], [-1e5, 0]]).tolist() == [[1, 0], [0, 1]]


def test_log_loss_stays_finite_and_exact_far_out():
    assert m.log_loss([0], [[0, 1000]]) == 1000
    assert m.log_loss([1], [[0, 1000]]) == 0
    assert m.log_loss([0, 1, 2], np.zeros((3, 3))) == pytest.approx(math.log(3), rel=1e-15)


def test_brier_by_hand():
    scores = [[math.log(3), 0], [math.log(3), 0]]  # p_1 = 1/4
    assert m.brier_score([0, 1], scores) == pytest.approx((1 / 16 + 9 / 16) / 2, rel=1e-15)
    assert m.brier_score([1], [[1000, 0]]) == 1
    # More than two classes: the sum, so certain and wrong costs 2.
    assert m.brier_score([1], [[1000, 0, 0]]) == 2
    assert m.brier_score([0], [[0, 0, 0]]) == pytest.approx(4 / 9 + 2 / 9, rel=1e-15)


def test_ece_at_its_ends():
    certain = [[1000, 0], [0, 1000]]  # confidence exactly 1, in the last bin
    assert m.expected_calibration_error([0, 1], certain) == 0
    assert m.expected_calibration_error([1, 0], certain) == 1
    # Confidence 1/4 in four classes and one in four right: calibrated.
    assert m.expected_calibration_error([0, 1, 2, 3], np.zeros((4, 4))) == 0


def test_ece_right_edges_are_inclusive():
    """Confidence exactly on an edge belongs to the bin below it."""
    # 1/2 (right) and 3/4 (wrong), two bins. Inclusive right: gaps 1/2 and 3/4 in two bins. Were 1/2
    # in the upper bin, the two would share it: |1 - 1.25| / 2.
    half_right, three_quarters_wrong = [0, 0], [math.log(3), 0]
    scores = [half_right, three_quarters_wrong]
    ece = m.expected_calibration_error([0, 1], scores, bins=2)
    assert ece == pytest.approx((0.5 + 0.75) / 2, rel=1e-15)
    # The same for 1/3 = 5/15 and 1/5 = 3/15 of the default bins, beside confidences just above.
    for num_classes in (3, 5):
        tied = np.zeros((2, num_classes))
        tied[1, 0] = 1e-3
        above = m.softmax(tied)[1, 0]
        ece = m.expected_calibration_error([0, 1], tied)
        assert ece == pytest.approx((1 - 1 / num_classes + above) / 2, rel=1e-12)


def test_ece_with_empty_bins_by_hand():
    # Confidences 3/4, 3/4 and 9/10 of fifteen bins: twelve are empty or below 1/2.
    scores = [[math.log(3), 0], [math.log(3), 0], [0, math.log(9)]]
    # |1 - 1.5| of the first bin, |1 - 0.9| of the second, over three examples.
    expected = (0.5 + 0.1) / 3
    ece = m.expected_calibration_error([0, 1, 1], scores)
    assert ece == pytest.approx(expected, rel=1e-14)


def test_ece_follows_the_scores_where_probabilities_tie():
    # exp(-1e-17) rounds to 1: as probabilities both are 1/2, but the scores name class 1.
    assert m.expected_calibration_error([1], [[0, 1e-17]]) == 0.5
    assert m.expected_calibration_error([1, 0], [[0, 1e-17], [0, 0]]) == 0.5
    assert m.expected_calibration_error([1, 1], [[0, 1e-17], [0, 0]]) == 0


# Two methods


def pairs(only_a, only_b, both, neither):
    a = [1] * only_a + [0] * only_b + [1] * both + [0] * neither
    b = [0] * only_a + [1] * only_b + [1] * both + [0] * neither
    return np.array(a, dtype=bool), np.array(b, dtype=bool)


def test_mcnemar_by_hand():
    # Ten discordant pairs, one against nine: 2 (1 + 10) / 1024.
    result = m.mcnemar_exact(*pairs(9, 1, 30, 10))
    assert result == {"only_a": 9, "only_b": 1, "p": 22 / 1024}
    assert m.mcnemar_exact(*pairs(0, 1, 5, 5)) == {"only_a": 0, "only_b": 1, "p": 1.0}
    assert m.mcnemar_exact(*pairs(0, 0, 5, 5))["p"] == 1
    assert m.mcnemar_exact(*pairs(6, 6, 0, 0))["p"] == 1  # doubled, the middle would exceed 1


def test_mcnemar_equals_scipy():
    rng = np.random.default_rng(0)
    cases = [(int(a), int(b)) for a, b in rng.integers(0, 60, size=(200, 2)) if a + b]
    cases += [(2500, 2600), (3000, 2000), (0, 5000)]  # the last: far below the least float
    for only_a, only_b in cases:
        expected = stats.binomtest(only_a, only_a + only_b).pvalue
        result = m.mcnemar_exact(*pairs(only_a, only_b, 7, 3))
        assert (result["only_a"], result["only_b"]) == (only_a, only_b)
        # Ours is exact but for one division; scipy's tail function is good to about ten digits.
        assert result["p"] == pytest.approx(expected, rel=1e-9, abs=0), (only_a, only_b)


def test_bootstrap_worked_example():
    # A alone is right on 5 pairs of 10, nobody alone on the others: ten times the resampled
    # difference is binomial(10, 1/2). P(X <= 1) = 0.011 and P(X <= 2) = 0.055 put the 2.5 %
    # quantile at 2, by symmetry the other at 8; 10,000 draws err by about 0.002 in these.
    a, b = pairs(5, 0, 3, 2)
    assert m.paired_bootstrap(a, b) == pytest.approx((0.5, 0.2, 0.8), abs=1e-15)
    assert m.paired_bootstrap(b, a) == pytest.approx((-0.5, -0.8, -0.2), abs=1e-15)


def test_bootstrap_at_its_ends():
    assert m.paired_bootstrap([1, 1], [0, 0]) == (1, 1, 1)
    assert m.paired_bootstrap([0], [1]) == (-1, -1, -1)
    assert m.paired_bootstrap([1, 0, 1], [1, 0, 1]) == (0, 0, 0)


def test_bootstrap_is_seeded_and_blind_to_order():
    a, b = pairs(40, 25, 100, 35)
    first = m.paired_bootstrap(a, b, resamples=500, seed=3)
    assert m.paired_bootstrap(a, b, resamples=500, seed=3) == first
    order = np.random.default_rng(0).permutation(len(a))
    assert m.paired_bootstrap(a[order], b[order], resamples=500, seed=3) == first
    others = {m.paired_bootstrap(a, b, resamples=500, seed=seed) for seed in range(10)}
    assert len(others) > 1


def test_bootstrap_equals_drawing_the_pairs_one_by_one():
    a, b = pairs(40, 25, 100, 35)
    gain = a.astype(int) - b.astype(int)
    drawn = np.random.default_rng(5).integers(0, 200, size=(10_000, 200))
    low, high = np.quantile(gain[drawn].mean(axis=1), [0.025, 0.975])
    # A 2.5 % quantile of 10,000 draws has a standard error of sqrt(0.025 · 0.975 / 10,000) over
    # the density there, 0.0584 / 0.04: about 0.001. Both sides err, and the values lie on a grid
    # of 1/200. Independent instead of paired resampling would move the ends by 0.02.
    assert m.paired_bootstrap(a, b) == pytest.approx((0.075, low, high), abs=0.0051)


# All together


def test_evaluate_two_classes_by_hand():
    log3 = math.log(3)
    labels, predictions = [0, 0, 1, 1], [0, 1, 1, 1]
    scores = [[log3, 0], [0, log3], [0, log3], [0, log3]]
    result = m.evaluate_predictions(labels, predictions, scores, ["负面", "正面"])
    approx = pytest.approx
    expected = {
        "n": 4,
        "accuracy": 0.75,
        "accuracy_interval": [approx(0.30064, abs=1e-5), approx(0.95441, abs=1e-5)],
        "precision": approx(2 / 3),
        "recall": 1.0,
        "f1": approx(0.8),
        "per_class": [
            {"name": "负面", "precision": 1.0, "recall": 0.5, "f1": approx(2 / 3), "support": 2},
            {"name": "正面", "precision": approx(2 / 3), "recall": 1.0, "f1": approx(0.8)}
            | {"support": 2},
        ],
        "macro": {"precision": approx(5 / 6), "recall": 0.75, "f1": approx(11 / 15)},
        "auc_roc": 0.75,  # two pairs right, two tied
        "brier": approx((3 * 1 / 16 + 9 / 16) / 4),
        "brier_kind": "two classes: (p1-y)^2",
        "ece": approx(0, abs=1e-15),  # confidence 3/4, three of four right
        "log_loss": approx(math.log(4) - 0.75 * log3),
        "confusion_matrix": [[1, 1], [0, 2]],
        "off_track": 0,
    }
    assert result == expected
    assert list(result) == list(expected)


def test_evaluate_more_classes():
    labels, scores = [0, 1, 2, 2], np.eye(3)[[0, 1, 2, 0]]
    result = m.evaluate_predictions(labels, scores.argmax(axis=1), scores, ["a", "b", "c"])
    assert result["precision"] is result["recall"] is result["f1"] is None
    assert result["brier_kind"] == "sum over classes"
    assert [row["support"] for row in result["per_class"]] == [1, 1, 2]
    # Class 0: (0) above 1 and 2, tied with 3. Class 1: above all. Class 2: a pair right with each,
    # and row 3 ties with rows 0 and 1.
    assert result["auc_roc"] == pytest.approx((2.5 / 3 + 1 + 3 / 4) / 3, abs=CLOSE)


def test_evaluate_generation():
    result = m.evaluate_predictions([0, 1, 1], [0, -1, 1], None, ["负面", "正面"])
    assert result["off_track"] == 1
    assert result["accuracy"] == 2 / 3
    assert result["recall"] == 0.5
    assert result["confusion_matrix"] == [[1, 0, 0], [0, 1, 1]]
    assert [row["support"] for row in result["per_class"]] == [1, 2]
    for name in ("auc_roc", "brier", "brier_kind", "ece", "log_loss"):
        assert result[name] is None


def test_evaluate_is_json_without_nan():
    for seed in range(100):
        num_classes, labels, predictions, scores = random_case(seed)
        if seed % 2:
            predictions[0] = m.OFF_TRACK
        names = [str(c) for c in range(num_classes)]
        far = 3.4e38 * scores / np.abs(scores).max().clip(1)  # as far out as fp32 goes
        for given in (None, scores, far):
            result = m.evaluate_predictions(labels, predictions, given, names)
            assert json.loads(json.dumps(result, allow_nan=False)) == result
            assert result["off_track"] == seed % 2
            assert result["accuracy"] == (labels == predictions).mean()
            for name, mean in result["macro"].items():  # over absent classes too
                each = [row[name] for row in result["per_class"]]
                assert mean == pytest.approx(sum(each) / num_classes, abs=CLOSE)


# Mistakes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("metric", ["auc_roc", "brier_score", "expected_calibration_error"])
def test_scores_that_are_not_finite_are_refused(metric, value):
    scores = np.zeros((5, 2))
    scores[3, 1] = scores[4, 0] = value
    with pytest.raises(ValueError, match="scores: row 3 is not finite"):
        getattr(m, metric)([0, 1, 0, 1, 0], scores)
    with pytest.raises(ValueError, match="scores: row 3 is not finite"):
        m.evaluate_predictions([0, 1, 0, 1, 0], [0] * 5, scores, ["a", "b"])


@pytest.mark.parametrize(
    ("labels", "predictions", "scores", "message"),
    [
        ([], [], None, "n = 0"),
        (np.array([], dtype=int), np.array([], dtype=int), None, "n = 0"),
        ([0, 1], [0], None, "predictions: expected n = 2"),
        ([0, 2], [0, 1], None, "labels: row 1 is 2, expected 0 to 1"),
        ([0, -1], [0, 1], None, "labels: row 1 is -1, expected 0 to 1"),
        ([0, 1], [0, -2], None, "predictions: row 1 is -2, expected -1 to 1"),
        ([0, 1], [0, 2], None, "predictions: row 1 is 2, expected -1 to 1"),
        ([0.0, 1.0], [0, 1], None, "labels: expected n = 2 > 0 whole numbers, found float64"),
        ([0, 1], [0, 1], [[0, 1]], r"scores: expected \(2, 2\), found \(1, 2\)"),
        ([0, 1], [0, 1], [[0, 1, 2]] * 2, r"scores: expected \(2, 2\), found \(2, 3\)"),
    ],
)
def test_mistakes_are_refused(labels, predictions, scores, message):
    with pytest.raises(ValueError, match=message):
        m.evaluate_predictions(labels, predictions, scores, ["a", "b"])


def test_unpaired_results_are_refused():
    for compare in (m.mcnemar_exact, m.paired_bootstrap):
        with pytest.raises(ValueError, match="correct_b: expected n = 3"):
            compare([1, 0, 1], [1])
        with pytest.raises(ValueError, match="correct_a: row 1 is 2"):
            compare([1, 2], [1, 0])
