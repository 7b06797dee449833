"""--plain: every computation through its definition, one forward at a time.

The functions have the names of those in fast/forms.py and can be called in the same way.
`batch_tokens` and `checkpointing` are not used here.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from qwen_min.head import head_loss, pooled_state
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt, Prompts
from qwen_min.scoring import label_loss, score_label

Classes = Sequence[int]
Weights = Sequence[float] | None


def score_labels(model: Qwen, prompts: Prompts, batch_tokens: int, progress) -> np.ndarray:
    """`score_label` for each label of each prompt: (n, C), float64."""
    rows = counted(prompts, progress)
    return np.array([[score_label(model, p.ids, ids) for ids in p.labels] for p in rows])


def pooled_features(
    model: Qwen, prompts: Prompts, pooling: str, all_layers: bool, batch_tokens: int, progress
) -> Tensor:
    """`pooled_state` of each prompt, one forward for each layer: (n, 1, D) or (n, L + 1, D)."""
    layers = range(model.config.num_hidden_layers + 1) if all_layers else [None]
    features = [
        torch.stack([pooled_state(model, prompt.ids, pooling, layer) for layer in layers])
        for prompt in counted(prompts, progress)
    ]
    return torch.stack(features).cpu()


def generate_answers(
    model: Qwen, prompts: Prompts, most: int, stop: Collection[int], batch_tokens: int, progress
) -> list[list[int] | None]:
    """`greedy` for each prompt: one forward for each of at most `most` new tokens."""
    from qwen_min.lab.generation import greedy

    return [greedy(model, prompt.ids, most, stop) for prompt in counted(prompts, progress)]


def label_losses(
    model: Qwen,
    prompts: Prompts,
    classes: Classes,
    checkpointing: bool,
    class_weights: Weights = None,
) -> Tensor:
    """Sum over rows of the true label's `label_loss`, times the class's weight, with gradient."""
    rows, by = zip(prompts, classes, strict=True), class_weights or [1.0] * len(prompts[0].labels)
    return sum(by[y] * label_loss(model, prompt.ids, prompt.labels[y]) for prompt, y in rows)


def head_losses(
    model: Qwen,
    weight: Tensor,
    prompts: Prompts,
    classes: Classes,
    checkpointing: bool,
    class_weights: Weights = None,
) -> Tensor:
    """Sum over rows of `head_loss`, times the class's weight, with gradient."""
    rows, by = zip(prompts, classes, strict=True), class_weights or [1.0] * len(weight)
    return sum(by[y] * head_loss(model, weight, prompt.ids, y) for prompt, y in rows)


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Each row by itself."""
    return [[row] for row in range(len(lengths))]


def counted(prompts: Prompts, progress) -> Iterator[Prompt]:
    """The prompts one by one; `progress` gets each one's tokens when its work is done."""
    for prompt in prompts:
        yield prompt
        progress(len(prompt.ids))
