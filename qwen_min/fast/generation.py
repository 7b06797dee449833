"""Greedy decoding of several prompts at once, with a key/value cache.

It gives the tokens of `qwen_min.lab.generation.greedy`, but each step runs one token per text.
"""

import math
from collections.abc import Callable, Collection, Sequence

import torch

from qwen_min.fast.batching import token_budget_batches
from qwen_min.fast.layout import Text, pack
from qwen_min.fast.packed import forward_packed
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt


@torch.inference_mode()
def greedy_cached(
    model: Qwen, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int] = ()
) -> list[list[int] | None]:
    """The new token ids of each prompt, as `greedy`. A text that has ended leaves the batch."""
    new: list[list[int] | None] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the texts that are not finished, in the cache's order
    texts, cache = [Text(prompt, queries=1) for prompt in prompts], None
    for _ in range(max_new_tokens):
        h, cache = forward_packed(model, pack(model, texts, cache))
        most, tokens = (t.tolist() for t in model.logits(h).max(dim=-1))  # one for each active text
        for i, logit in enumerate(most):
            if not math.isfinite(logit):  # NaN is the maximum of all numbers
                new[active[i]] = None
        going = [i for i, t in enumerate(tokens) if t not in stop and new[active[i]] is not None]
        for i in going:
            new[active[i]].append(tokens[i])
        if not going:
            break
        active = [active[i] for i in going]
        cache = [[layer[i] for i in going] for layer in cache]
        texts = [Text([tokens[i]]) for i in going]
    return new


def generate_answers(
    model: Qwen,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop: Collection[int],
    batch_tokens: int,
    progress: Callable[[int], object] = lambda rows: None,
) -> list[list[int] | None]:
    """As `greedy_cached`, in batches of at most batch_tokens tokens."""
    answers: list[list[int] | None] = [[] for _ in prompts]
    # The cache also holds the answer.
    lengths = [len(prompt.ids) + max_new_tokens for prompt in prompts]
    for rows in token_budget_batches(lengths, batch_tokens):
        batch = [prompts[row].ids for row in rows]
        found = greedy_cached(model, batch, max_new_tokens, stop)
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
        progress(len(rows))
    return answers
