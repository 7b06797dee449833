"""From logits to log-probabilities to label scores.

The score of class y for a text is the log-probability that the model gives to the tokens of y's
label word, one after the other, behind the prompt:

    s_y = Σ_t log p(y_t | prompt, y_<t),    log p(token) = logit(token) − log Σ_v exp logit(v)

These are the definitions, one full forward for each candidate. fast/label_scores.py computes the
same for many prompts at once. Shapes as in model.py.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from qwen_min.errors import UserError
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt


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


def score_labels(
    model: Qwen, prompts: Sequence[Prompt], batch_tokens: int, progress: Callable[[int], object]
) -> np.ndarray:
    """`score_label` for each label of each prompt: (n, C), float64. `progress` counts the prompts.

    `batch_tokens` is not used: it is there because the fast form has the same arguments.
    """
    scores = []
    for prompt in prompts:
        scores.append([score_label(model, prompt.ids, label) for label in prompt.labels])
        progress(1)
    scores = np.array(scores)
    check_finite(model, prompts, np.isfinite(scores).all(axis=1), scores)
    return scores


def label_loss(model: Qwen, prompt: Sequence[int], label: Sequence[int]) -> Tensor:
    """−s_y of the true label, a scalar with gradient: what lora_label_scoring minimises.

    It is the cross-entropy of a language model, on the label's tokens only.
    """
    return -label_log_probs(model, prompt, label).sum()


def label_mass(scores: np.ndarray, labels: Sequence[Sequence[tuple[int, ...]]]) -> np.ndarray:
    """Probability (n,) that what follows each prompt begins with one of its label words.

    Near 0, the model would rather say something else, and the ranking among the words means less.
    scores (n, C), and each row's C words as token ids. If one word begins with another, its event
    is part of the other's and is not added again.
    """

    def counted(words: tuple[tuple[int, ...], ...]) -> list[bool]:
        return [not any(a != b and b[: len(a)] == a for a in words) for b in words]

    distinct = {words: counted(words) for words in set(map(tuple, labels))}  # mostly one
    own = np.array([distinct[tuple(words)] for words in labels])  # (n, C)
    return (np.exp(scores) * own).sum(axis=1)


class NotFinite(UserError):
    """Infinite numbers or NaN. rows: of these prompts. found: what was computed, of all prompts."""

    def __init__(self, message: str, rows: Sequence[int], found: object):
        super().__init__(message)
        self.rows, self.found = rows, found


def check_finite(
    model: Qwen, prompts: Sequence[Prompt], finite: Sequence[bool], found: object = None
) -> None:
    """Raise NotFinite, which says where this begins, unless `finite` (n,) is true for every prompt.

    Called before scores, states or logits decide: NaN would decide too, but not by the text.
    """
    rows = np.flatnonzero(~np.asarray(finite, dtype=bool)).tolist()
    if rows:
        place = first_not_finite(model, [prompts[rows[0]]]) or "but not with --plain: use that"
        raise NotFinite(f"found numbers that are not finite, {place}", rows, found)


@torch.no_grad()
def first_not_finite(model: Qwen, prompts: Sequence[Prompt]) -> str | None:
    """By the definitions: the dtype, the first layer whose output is not finite, and what to do.

    None if everything is finite, and the dtype is not one that overflows early.
    """
    dtype = str(model.lm_head_weight.dtype).removeprefix("torch.")
    stream, L = model.model.residual_stream, model.config.num_hidden_layers
    place, texts = "", [(*p.ids, *label) for p in prompts for label in p.labels or [()]]
    while texts and not place:
        ids = torch.tensor([texts.pop(0)], device=model.device)  # (1, T)
        # A layer adds to the residual stream, so what is not finite stays so: bisection finds it.
        n = bisect_left(range(L + 1), True, key=lambda n: not bool(stream(ids, n).isfinite().all()))
        if n <= L:
            place = f" from layer {n} of {L} on" if n else " from the embedding on"
        elif not model.logits(model(ids)).isfinite().all():
            place = " in the LM head"
    if dtype == "float16":  # its largest number is 65,504
        return f"in float16{place}; use --dtype float32 or bfloat16"
    damaged = "the weights are damaged: fetch the weights again, or train again what was trained"
    return f"in {dtype}{place}; {damaged}" if place else None
