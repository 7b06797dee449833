"""--plain: every computation through its definition, one forward at a time.

The functions have the names and arguments of those in fast/forms.py, so that either module can be
used; `batch_tokens` and `checkpointing` have no meaning here.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from qwen_min.head import head_loss, pooled_state
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.scoring import label_loss, score_label


def score_labels(model: Qwen, prompts: Sequence[Prompt], batch_tokens: int, progress) -> np.ndarray:
    """`score_label` of each prompt's label words: one forward for each candidate. (n, C)."""
    scores = []
    for prompt in prompts:
        scores.append([score_label(model, prompt.ids, label) for label in prompt.labels])
        progress(1)
    return np.array(scores)


def pooled_features(
    model: Qwen, prompts: Sequence[Prompt], pooling: str, all_layers: bool, batch_tokens: int, progress
) -> Tensor:
    """`pooled_state` of each prompt, one forward for each layer: (n, 1, D) or (n, L + 1, D)."""
    last, features = model.config.num_hidden_layers, []
    for prompt in prompts:
        layers = range(last + 1) if all_layers else [last]
        states = [pooled_state(model, prompt.ids, pooling, layer) for layer in layers]
        features.append(torch.stack(states).cpu())
        progress(1)
    return torch.stack(features)


def generate_answers(
    model: Qwen,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop: Collection[int],
    batch_tokens: int,
    progress,
) -> list[list[int]]:
    """`greedy` for each prompt: one forward for each new token."""
    from qwen_min.lab.generation import greedy

    answers = []
    for prompt in prompts:
        answers.append(greedy(model, prompt.ids, max_new_tokens, stop))
        progress(1)
    return answers


def label_losses(
    model: Qwen, prompts: Sequence[Prompt], classes: Sequence[int], checkpointing: bool
) -> Tensor:
    """Sum over rows of the true label's `label_loss`, with gradient."""
    rows = zip(prompts, classes, strict=True)
    return sum(label_loss(model, prompt.ids, prompt.labels[y]) for prompt, y in rows)


def head_losses(
    model: Qwen,
    weight: Tensor,
    prompts: Sequence[Prompt],
    classes: Sequence[int],
    checkpointing: bool,
) -> Tensor:
    """Sum over rows of `head_loss`, with gradient."""
    rows = zip(prompts, classes, strict=True)
    return sum(head_loss(model, weight, prompt.ids, y) for prompt, y in rows)


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Each row by itself."""
    return [[row] for row in range(len(lengths))]
