"""Several processes, the same numbers: what they exchange, and why that is enough.

Each process is a rank r of W. All ranks read the same rows, build the same prompts and cut the same
batches as a single process. Then they share the work:

Evaluation. Rank r computes batches r, r + W, r + 2W, … So each number comes from one rank, in the
batch in which a single process would compute it; the other ranks hold zero there. The sum over
ranks (`gathered`) gives every rank every number, bit for bit (with equal processors and threads).

Training. The loss of a step is a sum over its rows, and so is the gradient: each rank computes both
for its rows, and one sum over ranks (`combine`) gives all ranks the whole. Then each makes the same
step. Only the order of additions differs from a single process: rounding.

A step has one or more forwards, its parts. Each rank computes some rows of every part, so no rank
is idle. Dropout must not depend on W: each rank draws the mask of the whole part and uses the rows
that it computes (`own_mask`). This costs one random number for each input of a LoRA layer, little
beside the matrix product.

After each exchange all ranks hold the same numbers and decide the same: which step is the best,
whether to stop, what to compute next. So no rank waits in an exchange that another does not enter.
A single process loads nothing of torch.distributed; for it, r is 0 and W is 1.
"""

import hashlib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from qwen_min.errors import UserError
from qwen_min.fast.layout import Text
from qwen_min.prompt import Prompts

SIGNALS = (signal.SIGINT, signal.SIGTERM)

rank, size = 0, 1  # of this process; group.py sets them
# Of the present part: number of own tokens → (number of all its tokens, indices of the own ones).
own_tokens: dict[int, tuple[int, Tensor]] = {}


class Lost(BaseException):
    """An exchange failed: another process has ended. Not an Exception, so that no
    `except Exception` catches it: this process cannot continue."""


def _sum_over_ranks(x: Tensor) -> None:
    """Replace x, on each rank, by the sum of all ranks' x. Gives equal bits on all ranks."""
    from torch import distributed

    try:
        distributed.all_reduce(x)
    except RuntimeError as error:
        raise Lost from error


def own_batches(
    batches: Sequence[list[int]], prompts: Prompts
) -> Iterator[tuple[list[int], list[int]]]:
    """This rank's batches; with each, for the progress, the rows that all ranks compute meanwhile.

    Raises UserError unless all ranks have the same prompts.
    """
    check_same("texts", batches, prompts)
    for start in range(rank, len(batches), size):
        together = batches[start - rank : start - rank + size]
        yield batches[start], [row for batch in together for row in batch]


def gathered(x: Tensor) -> Tensor:
    """x (on the CPU, 4 or 8 bytes a number) from all ranks, in place. For each number at most one
    rank holds bits that are not zero. They are added as integers, so -0.0 and NaN stay as they are.
    """
    if size > 1:
        _sum_over_ranks(x.view({4: torch.int32, 8: torch.int64}[x.element_size()]))
    return x


def from_first(x: Tensor | None) -> Tensor | None:
    """Rank 0's x on every rank: None, or an fp32 tensor of three dimensions."""
    own = torch.zeros(0, 0, 0) if x is None or rank else x.clone()  # x may be mapped, read-only
    shape = gathered(torch.tensor(own.shape)).tolist()
    return gathered(torch.zeros(shape) if rank else own) if any(shape) else None


def check_same(what: str, *values: Iterable[object]) -> None:
    """Raise UserError, on all ranks, unless all have the same values (as repr shows them)."""
    if size == 1:
        return
    hashes, own = torch.zeros(size, 32, dtype=torch.int32), hashlib.sha256()
    for value in chain(*values):
        own.update(repr(value).encode("utf-8", "backslashreplace"))
    hashes[rank] = torch.tensor(list(own.digest()))
    odd = (gathered(hashes) != hashes[0]).any(dim=1).nonzero()[:, 0].tolist()
    if odd:
        found = f"processes 0 and {odd[0]} (of 0 to {size - 1}) differ in their {what}"
        raise UserError(f"{found}; use the same for all")


# Training


def share(rows: int) -> tuple[slice, float]:
    """Which of a part's rows this rank computes, and the factor of their loss.

    Where there are fewer rows than ranks, the others compute the first row too, with factor 0.
    """
    return (slice(rank, None, size), 1.0) if rank < rows else (slice(0, 1), 0.0)


def combine(parameters: Sequence[nn.Parameter], stop: object, loss: float) -> float:
    """One exchange after the backward passes of a step: gradients and loss become sums over ranks.

    A signal that one of them has received (stop.signal) becomes stop.agreed on all of them.
    """
    numbers = [loss, *(float(n == stop.signal) for n in SIGNALS)]
    flat = torch.cat([*(p.grad.flatten() for p in parameters), parameters[0].new_tensor(numbers)])
    flat = flat if flat.is_cuda else flat.cpu()
    _sum_over_ranks(flat)
    *sums, found = flat.split([*(p.numel() for p in parameters), len(numbers)])
    for p, total in zip(parameters, sums, strict=True):
        p.grad = total.view_as(p).to(p)
    loss, *counts = found.tolist()
    stop.agreed = next((n for n, count in zip(SIGNALS, counts, strict=True) if count), None)
    return loss


def share_dropout(texts: Sequence[Text], own: Sequence[int]) -> None:
    """Before a forward: all texts of the part, as laid end to end, and those computed here."""
    own_tokens.clear()
    if len(own) == len(texts):
        return
    # The last layer computes fewer tokens; by the number of its rows `own_mask` knows it.
    for counts in ([len(t.ids) for t in texts], [t.queries or len(t.ids) for t in texts]):
        tokens = torch.arange(sum(counts)).split(counts)
        index = torch.cat([tokens[i] for i in own])
        own_tokens.setdefault(len(index), (sum(counts), index))


def own_mask(draw: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """In place of `LoRALinear.mask` (draw): draws for all tokens of the part, gives those of x."""
    if not own_tokens:
        return draw(x)
    total, index = own_tokens[len(x)]
    return draw(x.new_empty(total, *x.shape[1:]))[index.to(x.device)]
