"""Which texts go through the model together, and what they share. Lengths are in tokens."""

from collections.abc import Sequence

# Enough tokens for matrix products at full speed; more would only take more memory.
DEFAULT_BATCH_TOKENS = 2048


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Batches of at most `budget` tokens, as lists of row indices, each row in exactly one batch.

    The rows of a batch are laid end to end, so a batch costs about the sum of its lengths: only
    attention pads them, in training on a CPU (`kernels.padded_attention`). A row longer than the
    budget is a batch of its own. Longest first, equal lengths by index: if the budget is too large
    for the memory, the run fails in its first seconds, not in its last.
    """
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if not batches or used + lengths[index] > budget:
            batches.append([])
            used = 0
        batches[-1].append(index)
        used += lengths[index]
    return batches


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all rows share, at most the shortest length minus one.

    So each row keeps a token of its own: the last one, whose hidden state is read.
    """
    # The smallest and the largest row, in lexical order, differ first where any two rows do.
    low, high = min(rows), max(rows)
    limit = min(len(row) for row in rows) - 1
    return next((i for i in range(limit) if low[i] != high[i]), limit)
