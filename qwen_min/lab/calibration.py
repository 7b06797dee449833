"""Corrections of label scores, each beside the raw scores.

A label word has a probability before any text is read. It depends on how common the word is, on the
template and on the number of its tokens, and it shifts the decision of every row alike. Scores s
are (n, C) with s_y = log p(y's tokens | prompt); q_y = softmax(s)_y is the probability among the
classes (if no word is the beginning of another one: otherwise their events overlap).

Four corrections subtract the log of a prior: s_y - log prior_y. Softmax then gives q_y / prior_y,
renormalised. With two classes this moves the log-odds s_1 - s_0 of all rows by the same number. So
decisions change, but the order of the rows and the AUC do not. A prior need not sum to one: a
factor that all classes share cancels.

No correction uses the labels of evaluated rows. `best_threshold` does: it is a bound, not a
correction.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qwen_min.command.terminal import text_table
from qwen_min.files.data import HELD_OUT, Example, held_out_split
from qwen_min.files.overlap import normalised
from qwen_min.metrics import evaluate_predictions, softmax
from qwen_min.prompt import FIELD, Prompt

# The average is over these three inputs, as in Zhao et al. 2021, section 5.
CONTENT_FREE = ("N/A", "[MASK]", "")
# Enough to fit one number; the held-out part may have thousands of rows, each with a forward.
TEMPERATURE_ROWS = 256
MEASURES = ("accuracy", "auc_roc", "log_loss", "ece")
LabelIds = Sequence[Sequence[Sequence[int]]]  # of each row's words
Score = Callable[[Sequence[Prompt]], np.ndarray]  # the scores (m, C) of m prompts


def log_mean_probability(scores: np.ndarray) -> np.ndarray:
    """log of the mean over rows of q: (m, C) → (C,).

    Each row is renormalised over the classes before the mean is taken. So every row has the same
    weight, even if the label words have little probability in it.
    """
    return np.log(softmax(scores).mean(axis=0))


def fit_temperature(labels: np.ndarray, scores: np.ndarray) -> float:
    """The T for which softmax(s / T) has the lowest log-loss on these rows (Guo et al. 2017,
    arXiv:1706.04599, section 4.2). Fit it on other rows than those that are evaluated.

    With b = 1/T the slope of the log-loss is the mean of Σ_y q_y(b s) s_y - s_true. It rises with
    b, so bisection finds its zero. T stays between 0.001 and 1,000. Otherwise it would be infinite
    if the scores are worse than chance, and 0 if every row is right (the search then stops earlier,
    when the slope rounds to 0).
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

    An oracle: t is chosen on the same rows and labels on which the accuracy is measured. No prior
    can correct the errors that remain: they are due to ranking. The other errors of the raw
    decision (t = 0) are due to the threshold. Of several best t, the one nearest to 0 is taken.
    """
    odds, y = scores[:, 1] - scores[:, 0], np.asarray(labels)
    distinct = np.unique(odds)
    middles = (distinct[:-1] + distinct[1:]) / 2
    candidates = np.array([0.0, distinct[0] - 1, *middles, distinct[-1]])
    # Correct are the rows of class 0 at or below t, and those of class 1 above it.
    below = [np.sort(odds[y == c]).searchsorted(candidates, side="right") for c in (0, 1)]
    hits = below[0] + (y == 1).sum() - below[1]
    best = candidates[hits == hits.max()]
    return float(hits.max() / len(y)), float(best[np.abs(best).argmin()])


class Neutral(NamedTuple):
    """The inputs that corrections learn from, beside the evaluated rows."""

    prompts: Mapping[str, Sequence[Prompt]]  # by the name of the correction in NAMES
    labels: np.ndarray  # (m,), the true classes of prompts["temperature"], held-out rows


def random_texts(texts: Sequence[str], seed: int, count: int = 20) -> list[str]:
    """Texts of characters drawn at random from all of `texts`, each as long as their average.

    20 texts, as in Fei et al. 2023. They draw words. Chinese does not mark word borders, so
    characters are drawn here.
    """
    characters = "".join(texts)
    length = max(1, round(len(characters) / len(texts)))
    drawn = np.random.default_rng(seed).choice(len(characters), size=(count, length))
    return ["".join(characters[i] for i in row) for row in drawn]


def premise_template(template: str) -> str:
    """The template without the part before the text.

    With an empty text only the words that ask for the label remain. If the template has no words
    after the text, it is returned whole.
    """
    _, _, after = template.partition(FIELD)
    return FIELD + after.lstrip() if after.strip() else template


def held_out_rows(
    training: Sequence[Example], evaluated: Sequence[Example], data_seed: int
) -> list[Example]:
    """Rows of the training data's held-out part, without texts that are evaluated."""
    _, held_out = held_out_split(training, HELD_OUT, data_seed)
    seen = {normalised(example.text) for example in evaluated}
    rows = [training[i] for i in held_out if normalised(training[i].text) not in seen]
    return rows[:TEMPERATURE_ROWS]


class Correction(NamedTuple):
    """A correction by its name in NAMES, with what it learned. JSON can hold it."""

    applied: str
    log_prior: list[float] | None = None  # (C,)
    temperature: float | None = None

    def apply(self, scores: np.ndarray, label_ids: LabelIds) -> np.ndarray:
        """Scores (n, C), corrected. label_ids: the token ids of each row's words.

        length_normalised is s_y / (y's tokens), the mean log-probability of a token (Brown et al.
        2020, arXiv:2005.14165, section 2.4).
        """
        if self.applied == "length_normalised":
            return scores / np.array([[*map(len, words)] for words in label_ids])
        return (scores - np.array(self.log_prior or 0.0)) / (self.temperature or 1.0)


def learn(name: str, scores: np.ndarray | None, neutral: Neutral, score: Score) -> Correction:
    """The correction `name`, learned from the scores (n, C) of the rows, or from neutral inputs.

    contextual: the mean of q over inputs without content, such as "N/A" (Zhao et al. 2021,
    arXiv:2102.09690, section 5).
    domain_context: the mean of q over random text of the domain, which has its characters without
    their meaning (Fei et al. 2023, arXiv:2305.19148).
    pmi_dc: p(y | premise), where the domain premise is the end of the prompt, after the text. The
    corrected score is pointwise mutual information of text and label (Holtzman et al. 2021,
    arXiv:2104.08315). A single input needs no renormalisation over the classes.
    batch: the mean of q over the evaluated rows themselves, which assumes that the classes are
    about equally frequent in them (Zhou et al. 2023, arXiv:2309.17249).
    """
    if name == "batch":
        inputs = scores
    elif name in neutral.prompts:
        inputs = score(neutral.prompts[name])
    else:
        return Correction(name)  # nothing is learned
    if name == "temperature":
        return Correction(name, temperature=fit_temperature(neutral.labels, inputs))
    log_prior = inputs[0] if name == "pmi_dc" else log_mean_probability(inputs)
    return Correction(name, log_prior.tolist())


def calibrations(
    labels: np.ndarray, scores: np.ndarray, label_ids: LabelIds, neutral: Neutral, score: Score
) -> dict[str, dict]:
    """For each correction of `scores`: its measures, its prior (C,) and temperature, if any.

    label_ids: the token ids of each row's words.
    """
    found = {}
    for name in NAMES:
        if name != "temperature" or name in neutral.prompts:
            learned = learn(name, scores, neutral, score)
            prior = learned.log_prior and softmax([learned.log_prior])[0].tolist()
            found[name] = measures(labels, learned.apply(scores, label_ids))
            found[name] |= {"prior": prior, "temperature": learned.temperature}
    if "temperature" in found:
        found["temperature"]["held_out_rows"] = len(neutral.labels)
    return found


def measures(labels: np.ndarray, scores: np.ndarray) -> dict:
    """Accuracy, AUC, log-loss, ECE, and the share of each class among the predictions."""
    predictions, num_classes = scores.argmax(axis=1), scores.shape[1]
    found = evaluate_predictions(labels, predictions, scores, [""] * num_classes)
    counts = np.bincount(predictions, minlength=num_classes)
    return {key: found[key] for key in MEASURES} | {"predicted": (counts / len(labels)).tolist()}


NAMES = {"raw": "raw scores", "length_normalised": "per token", "contextual": "contextual"}
NAMES |= {"domain_context": "domain-context", "pmi_dc": "PMI_DC", "batch": "batch"}
NAMES |= {"temperature": "temperature"}


def shares(values: Sequence[float]) -> str:
    """With two classes the share of the second one, with more classes all shares."""
    return f"{values[1]:.4f}" if len(values) == 2 else " ".join(f"{v:.2f}" for v in values)


def number(value: float | None) -> str:
    """Four digits, or "-" for an undefined value."""
    return "-" if value is None else f"{value:.4f}"


def format_calibrations(found: dict[str, dict], words: Sequence[str]) -> str:
    """A table with one row for each correction, and what its name means."""
    of = words[1] if len(words) == 2 else "each class"
    heads = ["calibration", "accuracy", "AUC", "log-loss", "ECE", "predicted", f"prior p({of})"]
    rows = []
    for name, row in found.items():
        figures = [number(row[key]) for key in MEASURES]
        t, prior = row["temperature"], row["prior"]
        learned = f"T = {t:.3g}" if t else shares(prior) if prior else ""
        rows.append([NAMES[name], *figures, shares(row["predicted"]), learned])
    fit = "not fitted, no held-out rows; --train-data FILE names the training data."
    if "temperature" in found:
        fit = f"fitted on {found['temperature']['held_out_rows']} held-out training rows."
    return f"""{text_table(heads, rows)}

predicted: share of {of} among the decisions. per token: score / number of tokens.
The next four subtract log prior, a mean over: contextual, inputs without content; domain-context,
random characters of these texts; PMI_DC, the template's part after the text; batch, these rows.
temperature: {fit}"""
