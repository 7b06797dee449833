"""Greedy decoding of several prompts at once, each layer keeping what it needs of past tokens.

It gives the tokens of `qwen_min.lab.generation.greedy`, but each step runs one token per text.
"""

import math
from collections.abc import Callable, Collection, Sequence

import torch

from qwen_min.fast import ranks
from qwen_min.fast.batching import token_budget_batches
from qwen_min.fast.layout import Text, pack
from qwen_min.fast.packed import forward_packed
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt


@torch.inference_mode()
def generate_answers(
    model: Qwen,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop: Collection[int],
    batch_tokens: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[list[int] | None]:
    """The new token ids of each prompt, as `greedy`. batch_tokens bounds the tokens of one batch.

    A text that has ended leaves its batch. `progress` is called with the prompts' tokens that are
    finished.
    """
    answers: list[list[int] | None] = [[] for _ in prompts]
    # For the other ranks, of each answer: the number of its tokens plus 1, or 0 for None; tokens.
    table = torch.zeros(len(prompts), 1 + max_new_tokens, dtype=torch.int64)
    # The cache also holds the answer.
    lengths = [len(prompt.ids) + max_new_tokens for prompt in prompts]
    for rows, together in ranks.mine(token_budget_batches(lengths, batch_tokens)):
        active, pasts = rows, None  # the rows that are not finished, and what is kept of each
        texts = [Text(prompts[row].ids, queries=1) for row in rows]
        for _ in range(max_new_tokens):
            h, pasts = forward_packed(model, pack(model, texts, pasts, keep=True))
            most, tokens = (t.tolist() for t in model.logits(h).max(dim=-1))  # (active rows,)
            going = []
            for i, row in enumerate(active):
                if not math.isfinite(most[i]):  # NaN is the maximum of all numbers
                    answers[row] = None
                elif tokens[i] not in stop:
                    answers[row].append(tokens[i])
                    going.append(i)
            if not going:
                break
            active = [active[i] for i in going]
            pasts = [pasts[i] for i in going]
            texts = [Text([tokens[i]]) for i in going]
        for row in rows:
            if (new := answers[row]) is not None:
                table[row, : 1 + len(new)] = torch.tensor([1 + len(new), *new])
        progress(sum(len(prompts[row].ids) for row in together))
    found = ranks.gathered(table).tolist()
    return [tokens[:count] if (count := n - 1) >= 0 else None for n, *tokens in found]
