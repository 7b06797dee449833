"""The inputs that calibration learns from, none of them an evaluated row with its class."""

from collections.abc import Callable, Sequence

import numpy as np

from qwen_min.command.task import Task, task_prompts
from qwen_min.files.data import HELD_OUT, Example, held_out_split
from qwen_min.files.overlap import normalised
from qwen_min.lab.calibration import Neutral
from qwen_min.prompt import FIELD, Prompt

# The three that Zhao et al. 2021, section 5, average over.
CONTENT_FREE = ("N/A", "[MASK]", "")
RANDOM_TEXTS = 20  # as Fei et al. 2023
# Enough for one number; a held-out part may be thousands of rows, each a forward.
TEMPERATURE_ROWS = 256


def random_texts(texts: Sequence[str], seed: int, count: int = RANDOM_TEXTS) -> list[str]:
    """Texts of characters drawn from all of `texts`, each as long as these are on average.

    Fei et al. draw words; Chinese has no spaces between them, so here it is characters.
    """
    characters = np.array(list("".join(texts)))
    length = max(1, round(len(characters) / len(texts)))
    drawn = np.random.default_rng(seed).choice(characters, size=(count, length))
    return ["".join(row) for row in drawn]


def premise_template(template: str) -> str:
    """The template with nothing before the text's place: what is left once the text is empty is
    the words that ask for the label. The whole template where there are none behind the text."""
    _, _, behind = template.partition(FIELD)
    return FIELD + behind.lstrip() if behind.strip() else template


def held_out_rows(
    training: Sequence[Example], evaluated: Sequence[Example], data_seed: int
) -> list[Example]:
    """Rows of the held-out part of the training data, none of whose texts is evaluated."""
    _, held_out = held_out_split(training, HELD_OUT, data_seed)
    seen = {normalised(example.text) for example in evaluated}
    rows = [training[i] for i in held_out if normalised(training[i].text) not in seen]
    return rows[:TEMPERATURE_ROWS]


def score_neutral(
    task: Task,
    examples: Sequence[Example],
    training: Sequence[Example] | None,
    seeds: tuple[int, int],
    score: Callable[[list[Prompt]], np.ndarray],
) -> Neutral:
    """Prompt and score everything that calibration takes beside the evaluated `examples`.

    training: the training data, where it is known. seeds: of the random texts, and of the split
    into training and held-out part. score: a model's class scores (n, C) of prompts.
    """

    def scores(texts: Sequence[str], template: str | None = None) -> np.ndarray:
        places = [f"--calibrate, input {text!r}" for text in texts]
        return score(task_prompts(task, texts, places, template=template))

    rows = [] if training is None else held_out_rows(training, examples, seeds[1])
    held_out = None
    if rows:
        held_out = np.array([row.label for row in rows]), scores([row.text for row in rows])
    return Neutral(
        content_free=scores(CONTENT_FREE),
        random=scores(random_texts([example.text for example in examples], seeds[0])),
        premise=scores([""], premise_template(task.template)),
        held_out=held_out,
    )
