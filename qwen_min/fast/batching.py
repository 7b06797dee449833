"""Which rows go through the model together: by token budget to score, by row count to train.

A batch is a list of row indices. Lengths are in tokens.
"""

import random
from collections.abc import Sequence

from qwen_min.errors import UserError

# Enough rows for the matrix products to run at full speed, few enough for what a layer writes to
# stay near the processor.
DEFAULT_BATCH_TOKENS = 2048


def token_budget_batches(
    lengths: Sequence[int], budget: int, max_rows: int | None = None
) -> list[list[int]]:
    """Batches of at most `budget` tokens (and `max_rows` rows), each index in exactly one.

    The rows of a batch are concatenated, never padded, so a batch costs the sum of its lengths. A
    row longer than the budget is a batch of its own. Longest first, equal lengths by index: if the
    budget is too large for the memory, the run fails in its first seconds and not in its last.

    Raises UserError if `budget` or `max_rows` is below 1.
    """
    _at_least_one("the token budget", budget)
    if max_rows is not None:
        _at_least_one("the maximum of rows in a batch", max_rows)
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        full = not batches or used + lengths[index] > budget or len(batches[-1]) == max_rows
        if full:
            batches.append([])
            used = 0
        batches[-1].append(index)
        used += lengths[index]
    return batches


def shuffled_batches(
    lengths: Sequence[int], rows_per_batch: int, seed: int, epoch: int, pool: int = 50
) -> list[list[int]]:
    """One epoch of training batches: `rows_per_batch` rows each, the rest in a smaller last one.

    The permutation is cut into pools of `pool` batches, and rows are sorted by length inside a pool
    before the batches are cut; then the order of the batches is shuffled. So the texts of a batch
    have nearly one length, and attention, which is padded in training on a CPU, pads little. The
    price is that tokens per batch vary more, and the longest batch sets the peak of memory. Sorting
    the whole epoch would do as well but give each row the same company every epoch; pools are drawn
    anew, so that a batch's gradient stays closer to a random sample's. The last batch is left as
    drawn: cut from a sorted pool it would always get the extremes.

    The same (seed, epoch) gives the same batches, which is what a resumed run relies on.

    Raises UserError if `rows_per_batch` or `pool` is below 1.
    """
    _at_least_one("the number of rows in a batch", rows_per_batch)
    _at_least_one("the number of batches in a pool", pool)
    # A string: Random hashes all of it, where seed + epoch would make (0, 1) and (1, 0) the same.
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    whole = len(order) - len(order) % rows_per_batch
    batches = []
    for start in range(0, whole, rows_per_batch * pool):
        drawn = order[start : min(start + rows_per_batch * pool, whole)]
        drawn.sort(key=lambda index: lengths[index])
        batches += [drawn[i : i + rows_per_batch] for i in range(0, len(drawn), rows_per_batch)]
    rng.shuffle(batches)
    if whole < len(order):
        batches.append(order[whole:])
    return batches


def _at_least_one(what: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{what} is {value}: expected at least 1; give a larger one")


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all rows share, at most the shortest length minus one.

    Each row keeps at least one token of its own: the one whose hidden state is read.
    """
    # In lexical order the smallest and the largest row differ as early as any two rows.
    low, high = min(rows), max(rows)
    limit = min(len(row) for row in rows) - 1
    shared = 0
    while shared < limit and low[shared] == high[shared]:
        shared += 1
    return shared
