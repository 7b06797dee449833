"""Numbers that are not finite: an error that says where in the model they begin."""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch

from qwen_min.errors import UserError
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt


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


def dtype_name(model: Qwen) -> str:
    """The dtype of the base weights, as --dtype names it."""
    return str(model.dtype).removeprefix("torch.")


@torch.no_grad()
def first_not_finite(model: Qwen, prompts: Sequence[Prompt]) -> str | None:
    """By the definitions: the dtype, the first layer whose output is not finite, and what to do.

    None if everything is finite, and the dtype is not one that overflows early.
    """
    dtype, L = dtype_name(model), model.config.num_hidden_layers
    stream = model.model.residual_stream
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
