"""Corrections of label scores, each beside the raw ones: what does the word itself bring along?

A label word has a probability before any text is read: from how common it is, from the template,
from the number of its tokens. That shifts every row's decision alike. Scores s are (n, C) with
s_y = log p(y's tokens | prompt), q_y = softmax(s)_y is the probability among the classes alone
(where no word begins another: else their events overlap).

Most corrections take the log of a prior off the scores. With two classes this moves the log-odds
s_1 - s_0 of all rows by one number: the decisions change, the order of the rows, and with it the
AUC, does not. Whether the prior sums to one never matters, since a factor that all classes share
cancels; whether each row does before a mean over rows is taken does: see `log_mean_probability`.

No correction uses the class of an evaluated row; `best_threshold`, a bound and no correction, does.
`batch` uses the evaluated rows' scores, `domain_context` their characters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_min.command.terminal import text_table
from qwen_min.metrics import auc_roc, expected_calibration_error, log_loss, softmax


def length_normalised(scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """s_y / (number of y's tokens): the mean log-probability of a token (Brown et al. 2020,
    arXiv:2005.14165, section 2.4). lengths (n, C). Where all are equal to k it is temperature k."""
    return scores / lengths


def with_prior(scores: np.ndarray, log_prior: np.ndarray) -> np.ndarray:
    """s_y - log prior_y, so that softmax gives q_y / prior_y, renormalised. log_prior (C,)."""
    return scores - log_prior


def log_mean_probability(scores: np.ndarray) -> np.ndarray:
    """log of the mean over rows of q: (m, C) → (C,).

    Each row is renormalised over the classes before the mean, so that one on which the label words
    hold little probability weighs as much as any other.
    """
    return np.log(softmax(scores).mean(axis=0))


def contextual(scores: np.ndarray, content_free: np.ndarray) -> np.ndarray:
    """Prior: the mean of q over inputs that say nothing, such as "N/A" (Zhao et al. 2021,
    arXiv:2102.09690, section 5). content_free: their scores (m, C)."""
    return with_prior(scores, log_mean_probability(content_free))


def domain_context(scores: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Prior: the mean of q over random text of the domain (Fei et al. 2023, arXiv:2305.19148),
    which brings the words of the domain along and no sense. random: their scores (m, C)."""
    return with_prior(scores, log_mean_probability(random))


def pmi_dc(scores: np.ndarray, premise: np.ndarray) -> np.ndarray:
    """log p(y | prompt) - log p(y | premise): pointwise mutual information of text and label
    (Holtzman et al. 2021, arXiv:2104.08315). premise, their domain premise, is what asks
    for the label, without a text or what stands before it: its scores (C,), not renormalised over
    the classes, since with a single input that is a number shared by all, and cancels."""
    return with_prior(scores, premise)


def batch(scores: np.ndarray) -> np.ndarray:
    """Prior: the mean of q over the evaluated rows themselves (Zhou et al. 2023, arXiv:2309.17249).
    It takes the classes to be about equally frequent there."""
    return with_prior(scores, log_mean_probability(scores))


def fit_temperature(labels: np.ndarray, scores: np.ndarray) -> float:
    """The T for which softmax(s / T) has the lowest log-loss on these rows (Guo et al. 2017,
    arXiv:1706.04599, section 4.2). Not to be fitted on the rows that it is then judged on.

    With b = 1/T the slope of the log-loss is the mean of Σ_y q_y(b s) s_y - s_true. It rises with
    b, so its zero is found by halving. T stays between 0.001 and 1,000: it would be infinite where
    scores are worse than chance, and 0 where every row is right (there the search ends as soon as
    the slope rounds to 0).
    """
    true = scores[np.arange(len(labels)), labels]

    def slope(b: float) -> float:
        return float(((softmax(b * scores) * scores).sum(axis=1) - true).mean())

    low, high = np.log(1e-3), np.log(1e3)  # of b
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Accuracy of "class 1 where s_1 - s_0 > t" at the best t, and that t, scores (n, 2).

    An oracle: t is chosen on the very rows and classes that it is judged on. What it misses, no
    prior can repair; what the raw decision (t = 0) misses beyond that is threshold, not ranking.
    Of several best t the one that moves the decision least.
    """
    odds, y = scores[:, 1] - scores[:, 0], np.asarray(labels)
    distinct = np.unique(odds)
    middles = (distinct[:-1] + distinct[1:]) / 2
    candidates = np.array([0.0, distinct[0] - 1, *middles, distinct[-1]])
    # Right are class 0's rows at or below t and class 1's above it.
    zeros, ones = np.sort(odds[y == 0]), np.sort(odds[y == 1])
    below = [rows.searchsorted(candidates, side="right") for rows in (zeros, ones)]
    hits = below[0] + len(ones) - below[1]
    best = candidates[hits == hits.max()]
    return float(hits.max() / len(y)), float(best[np.abs(best).argmin()])


@dataclass(frozen=True)
class Neutral:
    """Scores of the inputs that the corrections learn from; each (rows, C)."""

    content_free: np.ndarray
    random: np.ndarray
    premise: np.ndarray  # one row
    held_out: tuple[np.ndarray, np.ndarray] | None  # classes (m,) and scores, or no such rows


def calibrations(
    labels: np.ndarray, scores: np.ndarray, lengths: np.ndarray, neutral: Neutral
) -> dict[str, dict]:
    """Every correction of `scores`: its measures, and what it took off (prior) or divided by."""
    corrected = {
        "raw": (scores, None),
        "length_normalised": (length_normalised(scores, lengths), None),
        "contextual": (contextual(scores, neutral.content_free), neutral.content_free),
        "domain_context": (domain_context(scores, neutral.random), neutral.random),
        "pmi_dc": (pmi_dc(scores, neutral.premise[0]), neutral.premise),
        "batch": (batch(scores), scores),
    }
    found = {}
    for name, (new, prior) in corrected.items():
        prior = None if prior is None else softmax(prior).mean(axis=0).tolist()
        found[name] = measures(labels, new) | {"prior": prior, "temperature": None}
    if neutral.held_out is not None:
        t = fit_temperature(*neutral.held_out)
        rows = len(neutral.held_out[0])
        found["temperature"] = measures(labels, scores / t) | {
            "prior": None,
            "temperature": t,
            "held_out_rows": rows,
        }
    return found


def measures(labels: np.ndarray, scores: np.ndarray) -> dict:
    """What a correction may change: accuracy, AUC, log-loss, ECE, share predicted of each class."""
    predictions = scores.argmax(axis=1)
    counts = np.bincount(predictions, minlength=scores.shape[1])
    return {
        "accuracy": float((predictions == labels).mean()),
        "auc_roc": auc_roc(labels, scores),
        "log_loss": log_loss(labels, scores),
        "ece": expected_calibration_error(labels, scores),
        "predicted": (counts / len(labels)).tolist(),
    }


NAMES = {
    "raw": "raw scores",
    "length_normalised": "per token",
    "contextual": "contextual",
    "domain_context": "domain-context",
    "pmi_dc": "PMI_DC",
    "batch": "batch",
    "temperature": "temperature",
}


def shares(values: Sequence[float]) -> str:
    """Of two classes the second one's share; of more, all."""
    return f"{values[1]:.4f}" if len(values) == 2 else " ".join(f"{v:.2f}" for v in values)


def format_calibrations(found: dict[str, dict], words: Sequence[str]) -> str:
    """One row for each correction, and what its name means."""
    of = f"p({words[1]})" if len(words) == 2 else "p(each class)"
    heads = ["calibration", "accuracy", "AUC", "log-loss", "ECE", "predicted", f"prior {of}"]
    rows = []
    for name, row in found.items():
        auc = "-" if row["auc_roc"] is None else f"{row['auc_roc']:.4f}"
        took = shares(row["prior"]) if row["prior"] else ""
        took = f"T = {row['temperature']:.3g}" if row["temperature"] else took
        figures = [f"{row['accuracy']:.4f}", auc, f"{row['log_loss']:.4f}", f"{row['ece']:.4f}"]
        rows.append([NAMES[name], *figures, shares(row["predicted"]), took])
    lines = [text_table(heads, rows), ""]
    what = f"{words[1]}'s share" if len(words) == 2 else "the classes' shares"
    lines += [
        f"predicted: {what} of the decisions. per token: a score over its word's tokens. The",
        "next four take a prior off the scores, as log p. It is the mean over: contextual, inputs",
        "that say nothing; domain-context, random characters of these texts; batch, these rows",
        "themselves; for PMI_DC it is that of one input, the template's end behind the text.",
    ]
    if "temperature" in found:
        rows_used = found["temperature"]["held_out_rows"]
        lines.append(f"temperature: fitted by log-loss on {rows_used} held-out training rows.")
    else:
        lines.append("temperature: not fitted, no held-out rows; --train-data FILE gives some.")
    return "\n".join(lines)
