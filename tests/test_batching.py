import random
from itertools import pairwise

import pytest

from qwen_min.errors import UserError
from qwen_min.fast.batching import common_prefix, token_budget_batches
from qwen_min.training import shuffled_batches


def draw_lengths(count, seed=0):
    rng = random.Random(seed)
    return [rng.randint(1, 100) for _ in range(count)]


# --- scoring: batches under a token budget --------------------------------------------------------


def test_longest_first_and_ties_by_index():
    assert token_budget_batches([3, 5, 3, 9, 5], budget=10) == [[3], [1, 4], [0, 2]]


def test_the_cost_is_the_sum_of_lengths_and_may_reach_the_budget():
    # Padded to the longest, [6, 2, 2] would cost 18.
    assert token_budget_batches([6, 2, 2], budget=10) == [[0, 1, 2]]
    assert token_budget_batches([6, 2, 2], budget=9) == [[0, 1], [2]]


def test_a_row_over_the_budget_is_alone():
    assert token_budget_batches([2, 50, 3, 40], budget=10) == [[1], [3], [2, 0]]


def test_no_rows():
    assert token_budget_batches([], budget=10) == []


@pytest.mark.parametrize("budget", [1, 50, 100, 1000, 10**6])
def test_every_row_once_within_the_budget_and_no_batch_too_small(budget):
    lengths = draw_lengths(300)
    batches = token_budget_batches(lengths, budget)
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(300), key=lambda index: -lengths[index])  # sorted() is stable
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    for batch, following in pairwise(batches):
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > budget


# --- training: shuffled batches -------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 400, 403, 1000])
@pytest.mark.parametrize("pool", [1, 3, 50])
def test_each_row_once_an_epoch_in_batches_of_the_given_size(count, pool):
    batches = shuffled_batches(draw_lengths(count), 8, seed=0, epoch=0, pool=pool)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    whole, rest = divmod(count, 8)
    assert [len(batch) for batch in batches] == [8] * whole + [rest] * (rest > 0)


def test_seed_and_epoch_alone_decide():
    lengths = draw_lengths(100)
    drawn = {
        (seed, epoch): shuffled_batches(lengths, 8, seed, epoch)
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 11), (11, 1)]
    }
    for (seed, epoch), batches in drawn.items():
        random.seed(99)  # the global generator plays no part
        assert shuffled_batches(lengths, 8, seed, epoch) == batches
    assert len({str(batches) for batches in drawn.values()}) == len(drawn)


def test_the_order_is_the_same_on_every_platform():
    # Kept from one run: a resumed run on another machine has to meet the same rows.
    assert shuffled_batches([5, 1, 4, 2, 3, 9, 7], 2, seed=3, epoch=1, pool=2) == [
        [0, 6],
        [2, 5],
        [1, 4],
        [3],
    ]


def spread(batches, lengths):
    """Mean of longest − shortest in a batch, in tokens."""
    return sum(
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches
    ) / len(batches)


def test_texts_of_a_batch_have_nearly_one_length():
    lengths = draw_lengths(800)
    # Lengths are uniform in 1..100. Eight drawn at random span 7/9 of that, 77 tokens; eight
    # neighbours of 400 sorted ones span about 7/400 of it, 2 tokens.
    assert spread(shuffled_batches(lengths, 8, 0, 0, pool=1), lengths) > 60
    assert spread(shuffled_batches(lengths, 8, 0, 0, pool=50), lengths) < 4


def test_batches_do_not_come_in_order_of_length():
    lengths = draw_lengths(800)
    batches = shuffled_batches(lengths, 8, seed=0, epoch=0)
    means = [sum(lengths[i] for i in batch) / 8 for batch in batches]
    rising = sum(a < b for a, b in pairwise(means))
    # 99 steps, half of them upward on average (deviation about 3); were pools kept in order, 98.
    assert 35 < rising < 65


def test_rows_meet_others_in_the_next_epoch():
    pairs = []
    for epoch in (0, 1):
        batches = shuffled_batches(list(range(800)), 8, seed=0, epoch=epoch)
        pairs.append({(a, b) for batch in batches for a in batch for b in batch if a < b})
    # Of two rows that share a batch, three in ten meet again: both have to be in one of the two
    # pools (a half) and between the same cuts of it. Sorting the whole epoch would bring all.
    assert len(pairs[0] & pairs[1]) < 0.5 * len(pairs[0])


def test_the_smaller_last_batch_is_a_random_one():
    lengths = list(range(803))  # the last pool, sorted, would always leave an end of it over
    left_over = [
        index
        for epoch in range(40)
        for index in shuffled_batches(lengths, 8, seed=0, epoch=epoch)[-1]
    ]
    # 120 draws from 0..802: the mean is 401 with a deviation of 232 / √120 = 21.
    assert abs(sum(left_over) / len(left_over) - 401) < 4 * 21


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: shuffled_batches([1], 0, 0, 0), "batches of 0 rows in pools of 50"),
        (lambda: shuffled_batches([1], 8, 0, 0, -1), "batches of 8 rows in pools of -1"),
    ],
)
def test_numbers_below_one_are_refused(call, expected):
    with pytest.raises((UserError, ValueError), match=f"^{expected}.* expected at least 1"):
        call()


# --- common prefix -------------------------------------------------------------------------------


def common_prefix_by_force(rows: list[tuple[int, ...]]) -> int:
    shared = 0
    while all(len(row) > shared + 1 and row[shared] == rows[0][shared] for row in rows):
        shared += 1
    return shared


def test_common_prefix_by_hand():
    assert common_prefix([(1, 2, 3)]) == 2  # a row keeps its last token
    assert common_prefix([(1, 2, 3)] * 4) == 2
    assert common_prefix([(1, 2, 3), (1, 2)]) == 1
    assert common_prefix([(1, 2, 3), (1, 2, 3, 4)]) == 2
    assert common_prefix([(1, 2, 3), (1, 9, 3)]) == 1
    assert common_prefix([(1, 2), (3, 4)]) == 0
    assert common_prefix([(1,)]) == common_prefix([(1,), (1, 2)]) == 0


def test_common_prefix_on_random_rows():
    rng = random.Random(6)
    seen = set()
    for _ in range(3000):
        stem = tuple(rng.choices(range(3), k=rng.randrange(1, 6)))
        rows = [stem + tuple(rng.choices(range(2), k=rng.randrange(4))) for _ in range(4)]
        rows = rng.sample(rows + [stem] * rng.randrange(2), k=rng.randrange(1, 5))
        rows = [list(row) for row in rows] if rng.random() < 0.5 else rows
        shared = common_prefix(rows)
        assert shared == common_prefix_by_force(rows), rows
        seen.add(shared)
    assert seen == set(range(8))
