"""The training loop: order of rows, learning-rate schedule, gradient accumulation, clipping, AdamW.

It knows parameters and a loss, not what they mean. Everything in a step follows from the seed and
the step's number (rows, learning rate, dropout), so a resumed run needs only the parameters, the
optimizer's moments and the number. command/fit.py adds log, checkpoints and signals around it.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class TrainingFailed(Exception):
    """Loss or gradient is not finite. `rows` are those of the step."""

    def __init__(self, message: str, rows: Sequence[int] = ()):
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train; the command chooses the defaults."""

    epochs: int
    batch_size: int  # rows in one step
    lr: float  # at its peak
    warmup: float  # share of the steps in which the rate rises
    clip: float  # largest norm of the whole gradient
    seed: int

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps in one pass over `rows` rows."""
        return math.ceil(rows / self.batch_size)


@dataclass(frozen=True)
class Step:
    """What happened in one optimizer step."""

    number: int  # from 1
    rows: list[int]
    loss: float  # mean over the rows
    lr: float
    grad_norm: float  # before clipping


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of step 0 … steps-1: a linear rise, then half a cosine, zero after the last step."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def shuffled_batches(
    lengths: Sequence[int], rows_per_batch: int, seed: int, epoch: int, pool: int = 50
) -> list[list[int]]:
    """One epoch of batches of `rows_per_batch` row indices, the rest in a smaller last one.

    The permutation is cut into pools of `pool` batches, and each pool is sorted by length before it
    is cut into batches; then the order of the batches is shuffled. So the texts of a batch have
    similar lengths, and attention, which pads them, wastes little. The price: tokens per batch vary
    more, and the longest batch sets the peak of memory. Sorting a whole epoch would put the same
    rows together every time; pools are drawn anew, so a batch's gradient stays closer to a random
    sample's. The last batch is not sorted: cut from a sorted pool it would always get the longest
    texts.

    The same (seed, epoch) gives the same batches. Raises ValueError if a number is below 1.
    """
    if rows_per_batch < 1 or pool < 1:
        found = f"batches of {rows_per_batch} rows in pools of {pool}"
        raise ValueError(f"{found}: expected at least 1")
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


def make_optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW without weight decay, which is Adam.

    Decay would pull A and B, which are a small change already, towards no change at all, and token
    vectors towards zero instead of towards where they started.
    """
    return torch.optim.AdamW(parameters, weight_decay=0.0)


def training_steps(
    optimizer: torch.optim.Optimizer,
    lengths: Sequence[int],
    plan: Plan,
    loss: Callable[[list[int]], Tensor],
    parts: Callable[[list[int]], list[list[int]]],
    done: int = 0,
    combine: Callable[[float], float] | None = None,
) -> Iterator[Step]:
    """Minimise the mean loss over rows, one optimizer step at a time; yields after each.

    lengths: tokens of each row. loss(rows) is the *sum* of the rows' losses, with gradient.
    parts(rows) cuts the rows of a step into forwards; the step divides by all its rows, so cutting
    changes only rounding and the draws of dropout. done: steps that are finished already.
    combine: called with a step's loss when its gradients are there; where several processes share
    the rows it adds up the gradients of all, in place, and returns the whole loss.

    Raises TrainingFailed, before the optimizer's step, if loss or gradient is not finite.
    """
    (group,) = optimizer.param_groups
    per_epoch = plan.steps_per_epoch(len(lengths))
    steps = plan.epochs * per_epoch
    for step in range(done, steps):
        epoch, index = divmod(step, per_epoch)
        if step == done or index == 0:
            batches = shuffled_batches(lengths, plan.batch_size, plan.seed, epoch)
        rows = batches[index]
        group["lr"] = learning_rate(step, steps, plan.lr, plan.warmup)
        # Dropout is drawn from the step's number: a resumed run draws the same.
        torch.manual_seed(plan.seed * 1_000_003 + step)
        optimizer.zero_grad()
        mean_loss = 0.0
        for part in parts(rows):
            part_loss = loss(part) / len(rows)
            part_loss.backward()
            mean_loss += part_loss.item()
        if combine:
            mean_loss = combine(mean_loss)
        norm = nn.utils.clip_grad_norm_(group["params"], plan.clip).item()
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise TrainingFailed(f"step {step + 1}: loss {mean_loss}, gradient norm {norm}", rows)
        optimizer.step()
        yield Step(step + 1, rows, mean_loss, group["lr"], norm)


def best_step(history: Sequence[dict]) -> int | None:
    """The evaluated step with the lowest held-out log-loss, the first of equals."""
    best = min(history, key=lambda entry: entry["held_out_log_loss"], default={"step": None})
    return best["step"]
