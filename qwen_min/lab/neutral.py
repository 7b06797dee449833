"""The inputs that calibration learns from. The labels of evaluated rows are never used."""

from collections.abc import Callable, Sequence

import numpy as np

from qwen_min.files.data import HELD_OUT, Example, held_out_split
from qwen_min.files.overlap import normalised
from qwen_min.lab.calibration import Neutral
from qwen_min.prompt import FIELD, Prompt

# The average is over these three inputs, as in Zhao et al. 2021, section 5.
CONTENT_FREE = ("N/A", "[MASK]", "")
RANDOM_TEXTS = 20  # as Fei et al. 2023
# Enough to fit one number; the held-out part may have thousands of rows, each with a forward.
TEMPERATURE_ROWS = 256


def random_texts(texts: Sequence[str], seed: int, count: int = RANDOM_TEXTS) -> list[str]:
    """Texts of characters drawn at random from all of `texts`, each as long as their average.

    Fei et al. draw words. Chinese does not mark word borders, so characters are drawn here.
    """
    characters = np.array(list("".join(texts)))
    length = max(1, round(len(characters) / len(texts)))
    drawn = np.random.default_rng(seed).choice(characters, size=(count, length))
    return ["".join(row) for row in drawn]


def premise_template(template: str) -> str:
    """The template without the part before the text.

    With an empty text only the words that ask for the label remain. If the template has no words
    after the text, it is returned whole.
    """
    _, _, behind = template.partition(FIELD)
    return FIELD + behind.lstrip() if behind.strip() else template


def held_out_rows(
    training: Sequence[Example], evaluated: Sequence[Example], data_seed: int
) -> list[Example]:
    """Rows of the training data's held-out part, without texts that are evaluated."""
    _, held_out = held_out_split(training, HELD_OUT, data_seed)
    seen = {normalised(example.text) for example in evaluated}
    rows = [training[i] for i in held_out if normalised(training[i].text) not in seen]
    return rows[:TEMPERATURE_ROWS]


def score_neutral(
    prompts_of: Callable[..., list[Prompt]],
    template: str,
    examples: Sequence[Example],
    training: Sequence[Example] | None,
    seeds: tuple[int, int],
    score: Callable[[list[Prompt]], np.ndarray],
) -> Neutral:
    """Scores of all inputs that calibration needs besides the evaluated `examples`.

    prompts_of(texts) builds prompts in `template`, prompts_of(texts, other) in another template.
    training: the training data, if known. seeds: of the random texts, and of the training data's
    split. score: from prompts to the model's class scores (n, C).
    """
    held_out = None
    if rows := training and held_out_rows(training, examples, seeds[1]):
        labels = np.array([row.label for row in rows])
        held_out = labels, score(prompts_of([row.text for row in rows]))
    content_free = score(prompts_of(CONTENT_FREE))
    random = score(prompts_of(random_texts([example.text for example in examples], seeds[0])))
    premise = score(prompts_of([""], premise_template(template)))
    return Neutral(content_free, random, premise, held_out)
