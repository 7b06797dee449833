"""Each correction by hand on small numbers; what none of them may change; their inputs."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from qwen_min.files.data import HELD_OUT, Example, held_out_split
from qwen_min.lab.calibration import (
    NAMES,
    TEMPERATURE_ROWS,
    Neutral,
    best_threshold,
    calibrations,
    fit_temperature,
    format_calibrations,
    held_out_rows,
    learn,
    log_mean_probability,
    premise_template,
    random_texts,
)
from qwen_min.metrics import auc_roc, log_loss, softmax

ln = np.log
# Probabilities of two words and of everything else: the words hold 0.5, 0.1 and 0.9.
S = ln([[0.4, 0.1], [0.05, 0.05], [0.3, 0.6]])
Y = np.array([0, 1, 1])


def drawn(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    scores = rng.normal(size=(n, classes)) * 2 - 5
    scores[np.arange(n), labels] += 1
    return labels, scores


def neutral(classes: int, held_out: bool) -> Neutral:
    """Scores in the place of prompts."""
    sizes = {"contextual": 3, "domain_context": 20, "pmi_dc": 1}
    found = {name: drawn(m, classes, seed=m)[1] for name, m in sizes.items()}
    labels, scores = drawn(50, classes, 4)
    return Neutral(found | {"temperature": scores} if held_out else found, labels)


def given(scores: np.ndarray) -> np.ndarray:
    return scores


# Formulas, by hand


def test_length_normalised():
    scores, ids = np.array([[-6.0, -4.0]]), [((7, 8, 9), (7,))]
    found = calibrations(np.array([0]), scores, ids, neutral(2, held_out=False), given)
    # Three tokens of -2 each beat one of -4.
    assert found["raw"]["accuracy"] == 0 and found["length_normalised"]["accuracy"] == 1
    expected = log_loss(np.array([0]), np.array([[-2.0, -4.0]]))
    assert found["length_normalised"]["log_loss"] == pytest.approx(expected, abs=1e-12)


def test_the_prior_of_two_inputs_is_the_mean_of_renormalised_probabilities():
    # (0.4, 0.1) is 0.8 to 0.2; (0.05, 0.05) is 0.5 to 0.5 and weighs as much, though it holds less.
    np.testing.assert_allclose(np.exp(log_mean_probability(S[:2])), [0.65, 0.35])


def corrected_by(name: str, scores: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """The scores after one correction, of which `inputs` are what it learns from."""
    others = {other: np.full_like(inputs, -1.0) for other in NAMES}  # these may not matter
    return scores - learn(name, scores, Neutral(others | {name: inputs}, None), given).log_prior


def test_contextual_and_domain_context():
    # Row 3 is 1/3 to 2/3; over the prior (1/3)/0.65 to (2/3)/0.35, which is 7 to 26.
    for name in ("contextual", "domain_context"):
        np.testing.assert_allclose(softmax(corrected_by(name, S, S[:2]))[2], [7 / 33, 26 / 33])


def test_pmi_dc_is_pointwise_mutual_information():
    # log (0.4 / 0.2) and log (0.1 / 0.4): the premise's probabilities as they are, their sum 0.6.
    np.testing.assert_allclose(corrected_by("pmi_dc", S[:1], ln([[0.2, 0.4]])), ln([[2, 0.25]]))


def test_batch():
    # Of the three rows q_1 is 0.2, 0.5, 2/3: its mean is 41/90.
    prior = np.array([49, 41]) / 90
    np.testing.assert_allclose(corrected_by("batch", S, S), S - ln(prior))
    # The mean row is undecided afterwards.
    np.testing.assert_allclose(softmax(corrected_by("batch", ln([prior, prior]), S)), 0.5)


def test_temperature_by_hand():
    # Three rows of odds 9 say class 1, one of them wrongly: softmax(s/T) should say 2/3, odds 2.
    scores = np.tile(ln([0.1, 0.9]), (3, 1))
    assert fit_temperature(np.array([1, 1, 0]), scores) == pytest.approx(math.log(9) / math.log(2))


@pytest.mark.parametrize("classes", [2, 4])
def test_temperature_is_the_minimum_of_the_log_loss(classes):
    labels, scores = drawn(200, classes)
    best = minimize_scalar(
        lambda b: log_loss(labels, scores * b), bounds=(0.01, 10), method="bounded"
    )
    t = fit_temperature(labels, scores)
    assert 1 / t == pytest.approx(best.x, rel=1e-4)  # the other search stops there
    assert log_loss(labels, scores / t) <= best.fun + 1e-12
    assert log_loss(labels, scores / t) < log_loss(labels, scores)


def test_temperature_at_its_ends():
    right = np.tile(ln([0.1, 0.9]), (3, 1))
    sharp = fit_temperature(np.ones(3, int), right)
    assert 1e-3 <= sharp < 0.1 and log_loss(np.ones(3, int), right / sharp) < 1e-15
    assert fit_temperature(np.zeros(3, int), right) == pytest.approx(1e3)


def test_best_threshold_by_hand():
    odds = np.array([-3.0, -1.0, 2.0, 4.0])
    scores = np.stack([np.zeros(4), odds], axis=1)
    # At 0 three are right; between 2 and 4 all four.
    assert best_threshold(np.array([0, 0, 0, 1]), scores) == (1.0, 3.0)
    assert best_threshold(np.array([0, 0, 1, 1]), scores) == (1.0, 0.0)  # no need to move
    assert best_threshold(np.array([1, 1, 1, 1]), scores) == (1.0, -4.0)
    assert best_threshold(np.array([0, 0, 0, 0]), scores) == (1.0, 4.0)
    assert best_threshold(np.array([0, 1, 0, 1]), scores) == (0.75, -2.0)


def test_best_threshold_is_the_best_of_all():
    for seed in range(30):
        labels, scores = drawn(40, 2, seed)
        scores = scores.round(1 - seed % 2)  # with ties
        odds = scores[:, 1] - scores[:, 0]
        accuracy, t = best_threshold(labels, scores)
        assert accuracy == ((odds > t) == labels).mean()
        tried = [*odds, odds.min() - 1, 0.0]
        assert accuracy == max(((odds > cut) == labels).mean() for cut in tried)


# What must not change


@pytest.mark.parametrize("seed", range(20))
def test_a_fixed_prior_moves_all_log_odds_alike_and_leaves_auc(seed):
    labels, scores = drawn(60, 2, seed)
    prior = np.random.default_rng(seed).normal(size=2) * 5
    moved = scores - prior
    shift = (moved[:, 1] - moved[:, 0]) - (scores[:, 1] - scores[:, 0])
    np.testing.assert_allclose(shift, prior[0] - prior[1], atol=1e-12)  # float64 sums of tens
    assert auc_roc(labels, moved) == auc_roc(labels, scores)
    assert best_threshold(labels, moved)[0] == best_threshold(labels, scores)[0]
    # A number shared by the classes is of no effect, so it matters not whether a prior sums to one.
    renormalised = scores - (prior - np.logaddexp(*prior))
    np.testing.assert_allclose(softmax(moved), softmax(renormalised), atol=1e-12)


def test_with_three_classes_a_prior_may_change_the_auc():
    """So that the test above says something about two classes."""
    labels, scores = drawn(200, 3)
    assert auc_roc(labels, scores - np.array([0.0, 3.0, -3.0])) != auc_roc(labels, scores)


# The report


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("held_out", [True, False])
def test_all_corrections_beside_the_raw_scores(classes, held_out):
    labels, scores = drawn(80, classes)
    ids = [[(7,) * n for n in range(1, classes + 1)]] * 80
    found = calibrations(labels, scores, ids, neutral(classes, held_out), given)
    assert ("temperature" in found) == held_out
    assert found["raw"]["log_loss"] == log_loss(labels, scores)
    for name in ("contextual", "domain_context", "pmi_dc", "batch"):
        log_prior = learn(name, scores, neutral(classes, held_out), given).log_prior
        assert found[name]["log_loss"] == log_loss(labels, scores - log_prior)
        np.testing.assert_allclose(found[name]["prior"], softmax([log_prior])[0])
    assert all(sum(row["predicted"]) == pytest.approx(1) for row in found.values())
    if classes == 2:
        fixed = ("contextual", "domain_context", "pmi_dc", "batch")
        assert {found[name]["auc_roc"] for name in fixed} == {found["raw"]["auc_roc"]}
    if held_out:
        assert found["temperature"]["accuracy"] == found["raw"]["accuracy"]
        assert found["temperature"]["held_out_rows"] == 50
    words = ("负面", "正面", "中性")[:classes]
    shown = format_calibrations(found, words)
    rows = {line.split("  ")[0]: line for line in shown.split("\n")}
    for name, row in (("raw scores", found["raw"]), ("PMI_DC", found["pmi_dc"])):
        assert f"{row['accuracy']:.4f}" in rows[name] and f"{row['ece']:.4f}" in rows[name]
    assert ("T = " in shown) == held_out and ("--train-data" in shown) != held_out
    assert max(map(len, shown.split("\n"))) <= 100


# Inputs


def test_random_texts_are_of_the_domain_and_seeded():
    texts = ["很好很好", "差 dog"]
    found = random_texts(texts, seed=3)
    assert len(found) == 20 and {len(text) for text in found} == {4}  # 9 characters in 2 texts
    assert set("".join(found)) <= set("".join(texts))
    assert found == random_texts(texts, 3) != random_texts(texts, 4)
    often = "".join(random_texts(["好" * 99 + "差"], 0))
    assert often.count("好") > 0.95 * len(often)  # as often as it is there


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("评论：{text}\n情感倾向：", "{text}情感倾向："),
        ("{text}\n情感：", "{text}情感："),
        ("情感？{text}", "情感？{text}"),  # nothing behind: what stands before it is all there is
    ],
)
def test_the_premise(template, found):
    assert premise_template(template) == found


def test_held_out_rows_are_never_evaluated_ones():
    training = [Example(f"第{i}条", i % 2, i) for i in range(4000)]
    _, held_out = held_out_split(training, HELD_OUT, 5)
    rows = held_out_rows(training, [], 5)
    assert rows == [training[i] for i in held_out][:TEMPERATURE_ROWS]
    evaluated = [Example(f"{rows[0].text}！", 0, 1)]  # a copy, but for punctuation
    assert held_out_rows(training, evaluated, 5)[:3] == rows[1:4]
    assert held_out_rows(training, training, 5) == []
