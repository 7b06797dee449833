"""Every computation that the commands need: through its definition (--plain), or its fast form."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qwen_min.head import LinearHead, head_loss, pooled_state
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.scoring import label_loss, score_label

Progress = Callable[[int], object]  # called with the number of rows finished


def silent(rows: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Compute:
    """plain: one forward for each candidate and one loss for each row, by the definitions.

    Otherwise `qwen_min.fast`, with at most `batch_tokens` tokens in one forward; checkpointing:
    recompute activations in the backward pass. Both give the same numbers up to rounding (and, in
    training, up to the draws of dropout).
    """

    plain: bool
    batch_tokens: int
    checkpointing: bool = False

    def label_scores(
        self, model: Qwen, prompts: Sequence[Prompt], progress: Progress = silent
    ) -> np.ndarray:
        """`score_label` of each prompt's label words: float64 (n, C)."""
        if self.plain:
            return np.array(
                [
                    [score_label(model, prompt.ids, label) for label in prompt.labels]
                    for prompt in counted(prompts, progress)
                ]
            )
        from qwen_min.fast.label_scores import score_labels

        return score_labels(model, prompts, self.batch_tokens, progress)

    def head_scores(
        self, model: Qwen, head: LinearHead, prompts: Sequence[Prompt], progress: Progress = silent
    ) -> np.ndarray:
        """The head's scores of each prompt's pooled state: float64 (n, C)."""
        every = head.layer != model.config.num_hidden_layers
        if self.plain:
            states = [
                pooled_state(model, prompt.ids, head.pooling, head.layer)
                for prompt in counted(prompts, progress)
            ]
            return head.scores(torch.stack(states))
        features = self.features(model, prompts, head.pooling, every, progress)
        return head.scores(features[:, head.layer if every else 0])

    def features(
        self,
        model: Qwen,
        prompts: Sequence[Prompt],
        pooling: str,
        all_layers: bool,
        progress: Progress = silent,
    ) -> Tensor:
        """`pooled_state` of each prompt: fp32 (n, L + 1, D), or without all_layers (n, 1, D)."""
        if self.plain:
            last = model.config.num_hidden_layers
            layers = range(last + 1) if all_layers else [last]
            states = [
                torch.stack([pooled_state(model, prompt.ids, pooling, layer) for layer in layers])
                for prompt in counted(prompts, progress)
            ]
            return torch.stack(states).cpu()
        from qwen_min.fast.features import pooled_features

        return pooled_features(model, prompts, pooling, all_layers, self.batch_tokens, progress)

    def answers(
        self,
        model: Qwen,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        stop: Collection[int],
        progress: Progress = silent,
    ) -> list[list[int]]:
        """The token ids that greedy decoding puts behind each prompt."""
        if self.plain:
            from qwen_min.lab.generation import greedy

            return [
                greedy(model, prompt.ids, max_new_tokens, stop)
                for prompt in counted(prompts, progress)
            ]
        from qwen_min.fast.generation import generate_answers

        return generate_answers(model, prompts, max_new_tokens, stop, self.batch_tokens, progress)

    def label_loss(self, model: Qwen, prompts: Sequence[Prompt], classes: Sequence[int]) -> Tensor:
        """Sum over rows of the true label's `label_loss`, with gradient."""
        if self.plain:
            rows = zip(prompts, classes, strict=True)
            return sum(label_loss(model, prompt.ids, prompt.labels[y]) for prompt, y in rows)
        from qwen_min.fast.label_scores import label_losses

        return label_losses(model, prompts, classes, self.checkpointing)

    def head_loss(
        self, model: Qwen, weight: Tensor, prompts: Sequence[Prompt], classes: Sequence[int]
    ) -> Tensor:
        """Sum over rows of `head_loss`, with gradient."""
        if self.plain:
            rows = zip(prompts, classes, strict=True)
            return sum(head_loss(model, weight, prompt.ids, y) for prompt, y in rows)
        from qwen_min.fast.features import head_losses

        return head_losses(model, weight, prompts, classes, self.checkpointing)

    def parts(self, lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
        """The rows of one training step cut into forwards. lengths: tokens of each of `rows`."""
        if self.plain:
            return [[row] for row in rows]
        from qwen_min.fast.batching import token_budget_batches

        return [
            [rows[i] for i in part] for part in token_budget_batches(lengths, self.batch_tokens)
        ]


@dataclass(frozen=True)
class Classifier:
    """A loaded method: its model, and what gives the scores of the classes."""

    model: Qwen
    by: Literal["label words", "head", "answers"]
    head: LinearHead | None = None
    stop: Collection[int] = ()  # tokens that end an answer
    max_new_tokens: int = 0  # of an answer

    def scores(
        self, prompts: Sequence[Prompt], compute: Compute, progress: Progress = silent
    ) -> np.ndarray:
        """Class scores (n, C), float64. Not for answers, which have none."""
        if self.by == "label words":
            return compute.label_scores(self.model, prompts, progress)
        return compute.head_scores(self.model, self.head, prompts, progress)

    def answers(
        self, prompts: Sequence[Prompt], compute: Compute, progress: Progress = silent
    ) -> list[list[int]]:
        """The tokens of each answer."""
        return compute.answers(self.model, prompts, self.max_new_tokens, self.stop, progress)


def counted(prompts: Sequence[Prompt], progress: Progress) -> Iterator[Prompt]:
    """The prompts one by one; each is reported when the next one is asked for, or at the end."""
    for prompt in prompts:
        yield prompt
        progress(1)
