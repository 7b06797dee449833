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
    # Of each answer the number of its tokens plus 1, or 0 for None; then the tokens.
    table = torch.zeros(len(prompts), 1 + max_new_tokens, dtype=torch.int64)
    # The cache also holds the answer.
    lengths = [len(prompt.ids) + max_new_tokens for prompt in prompts]
    for rows, together in ranks.own_batches(token_budget_batches(lengths, batch_tokens), prompts):
        table[rows, 0] = 1
        active, pasts = rows, None  # the rows that are not finished, and what is kept of each
        texts = [Text(prompts[row].ids, queries=1) for row in rows]
        for _ in range(max_new_tokens):
            h, pasts = forward_packed(model, pack(model, texts, pasts, keep=True))
            most, tokens = (t.tolist() for t in model.logits(h).max(dim=-1))  # (active rows,)
            going = []
            for i, row in enumerate(active):
                if not math.isfinite(most[i]):  # NaN is the maximum of all numbers
                    table[row] = 0
                elif tokens[i] not in stop:
                    table[row, table[row, 0]] = tokens[i]
                    table[row, 0] += 1
                    going.append(i)
            if not going:
                break
            active = [active[i] for i in going]
            pasts = [pasts[i] for i in going]
            texts = [Text([tokens[i]]) for i in going]
        progress(sum(len(prompts[row].ids) for row in together))
    return [tokens[: n - 1] if n else None for n, *tokens in ranks.gathered(table).tolist()]
