"""A loaded method, as the commands and the Python interface use it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np

from qwen_min.head import LinearHead
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt

Progress = Callable[[int], object]  # called with the number of rows finished


def silent(rows: int) -> None:
    """Progress that nobody watches."""


def forms(plain: bool) -> ModuleType:
    """The module that computes: the definitions (--plain), or their fast forms."""
    if plain:
        from qwen_min.command import plain as module
    else:
        from qwen_min.fast import forms as module
    return module


@dataclass(frozen=True)
class Classifier:
    """A model, and what gives the scores of the classes."""

    model: Qwen
    by: Literal["label words", "head", "answers"]
    head: LinearHead | None
    forms: ModuleType
    batch_tokens: int  # at most so many tokens in one fast forward

    def scores(self, prompts: Sequence[Prompt], progress: Progress = silent) -> np.ndarray:
        """Class scores (n, C), float64. Not for answers, which have none."""
        if self.by == "label words":
            return self.forms.score_labels(self.model, prompts, self.batch_tokens, progress)
        head, last = self.head, self.model.config.num_hidden_layers
        every = head.layer != last
        features = self.forms.pooled_features(
            self.model, prompts, head.pooling, every, self.batch_tokens, progress
        )  # (n, L + 1, D), or (n, 1, D)
        return head.scores(features[:, head.layer if every else 0])
