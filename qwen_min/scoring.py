"""From logits to log-probabilities to label scores.

The score of class y for a text is the log-probability that the model gives to the tokens of y's
label word, one after the other, after the prompt:

    s_y = Σ_t log p(y_t | prompt, y_<t),    log p(token) = logit(token) − log Σ_v exp logit(v)

These are the definitions, one full forward for each candidate. fast/label_scores.py computes the
same for many prompts at once. Shapes as in model.py.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwen_min.model import Qwen


def label_log_probs(model: Qwen, prompt: Sequence[int], label: Sequence[int]) -> Tensor:
    """log p(y_t | prompt, y_<t) of each token of a label: (label tokens,), fp32, with gradient."""
    ids = torch.tensor([[*prompt, *label]], device=model.device)  # (1, T)
    # The state at each position predicts the next token. So the label's last token is a target
    # only, not an input, and the last states are the ones that predict the label.
    inputs, targets = ids[:, :-1], ids[0, -len(label) :]
    h = model(inputs)[0, -len(label) :]  # (label tokens, D)
    log_probs = model.logits(h).log_softmax(dim=-1)  # (label tokens, V)
    return log_probs.gather(1, targets[:, None])[:, 0]


@torch.inference_mode()
def score_label(model: Qwen, prompt: Sequence[int], label: Sequence[int]) -> float:
    """s_y: the natural logarithm of the label's probability after the prompt, at most 0."""
    return label_log_probs(model, prompt, label).sum().item()


def label_loss(model: Qwen, prompt: Sequence[int], label: Sequence[int]) -> Tensor:
    """−s_y of the true label, a scalar with gradient: what lora_label_scoring minimises.

    It is the cross-entropy of a language model, on the label's tokens only.
    """
    return -label_log_probs(model, prompt, label).sum()


def label_mass(scores: np.ndarray, labels: Sequence[Sequence[tuple[int, ...]]]) -> np.ndarray:
    """Probability (n,) that what follows each prompt begins with one of its label words.

    Near 0, the model would rather say something else, and the ranking among the words means less.
    scores (n, C), and each row's C words as token ids. A word that begins with another label word
    is not added: the shorter word's probability contains it.
    """

    def counted(words: tuple[tuple[int, ...], ...]) -> list[bool]:
        return [not any(a != b and b[: len(a)] == a for a in words) for b in words]

    distinct = {words: counted(words) for words in set(map(tuple, labels))}  # mostly one
    own = np.array([distinct[tuple(words)] for words in labels])  # (n, C)
    return (np.exp(scores) * own).sum(axis=1)
