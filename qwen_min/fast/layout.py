"""How several texts lie end to end in one forward pass, and which keys each token sees.

Bookkeeping for `forward_packed` in model.py; shapes as there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# Keys (rotated) and values of the tokens of one text, in one layer: two tensors (T, K, Dh).
KeysValues = tuple[Tensor, Tensor]
# The key/value cache: [layer][text]. It is never changed in place: continuing a text makes a new
# cache, so that one prompt can be continued by many candidates, in any order.
Cache = list[list[KeysValues]]


@dataclass(frozen=True)
class Layout:
    """How texts lie end to end, N tokens in all, and what each token sees."""

    lengths: list[int]  # of each text; their sum is N
    cos: Tensor  # (N, 1, Dh), of each token's position in its text
    sin: Tensor
    # For each text, which keys each token sees (T, keys); None: those up to itself.
    masks: list[Tensor | None]
    shared_prefix: bool = False  # whether the first text is what every other one begins with
    # Where only each text's last tokens are asked for: how many of each, and their places in N.
    last: list[int] | None = None
    places: Tensor | None = None

    @property
    def queries(self) -> list[int]:
        """How many tokens of each text are answered for."""
        return self.lengths if self.last is None else self.last

    @property
    def seen_size(self) -> int:
        """Elements of `seen`, known without building it."""
        keys = [
            n if mask is None else mask.shape[1]
            for mask, n in zip(self.masks, self.lengths, strict=True)
        ]
        return len(keys) * max(self.queries) * max(keys)

    @cached_property
    def seen(self) -> Tensor:
        """The masks as one (texts, T, keys), for the longest of both; made once for all layers.

        On the CPU: for `attention_side_by_side`, which runs there alone.
        """
        counts = self.queries
        masks = [
            torch.ones(n, n, dtype=torch.bool).tril()[-count:] if mask is None else mask
            for mask, n, count in zip(self.masks, self.lengths, counts, strict=True)
        ]
        longest = [max(mask.shape[dim] for mask in masks) for dim in (0, 1)]
        seen = torch.zeros(len(masks), *longest, dtype=torch.bool)
        seen[:, :, 0] = True  # every token does; padding must not see nothing at all
        for mask, into in zip(masks, seen, strict=True):
            into[: mask.shape[0], : mask.shape[1]] = mask
        return seen


def lay_out(
    angles: Callable[[Tensor], tuple[Tensor, Tensor]],
    device: torch.device,
    lengths: Sequence[int],
    past: Cache | None,
    visible: Sequence[Tensor | None] | None,
    shared_prefix: bool = False,
) -> Layout:
    """The layout for `QwenModel.forward_packed`, where the last four arguments are explained.

    angles: positions (T,) → cosine and sine of the rotary angles.
    """
    positions, masks = [], []
    for i, length in enumerate(lengths):
        start = 0 if past is None else len(past[0][i][0])
        if shared_prefix and i:
            start = lengths[0]
        seen = None if visible is None else visible[i]
        if seen is None and start == 0:
            positions.append(torch.arange(length))
            masks.append(None)
            continue
        seen = torch.ones(length, length, dtype=torch.bool).tril() if seen is None else seen
        positions.append(start + seen.sum(dim=1) - 1)
        # `is_causal` of scaled_dot_product_attention counts from the first key, not from the last,
        # so tokens that continue a cache need a mask of their own (pytorch#108108).
        before = torch.ones(length, start, dtype=torch.bool)
        masks.append(torch.cat([before, seen], dim=1).to(device))
    cos, sin = angles(torch.cat(positions).to(device))
    return Layout(list(lengths), cos, sin, masks, shared_prefix)


def ask_for_last(layout: Layout, last: Sequence[int]) -> Layout:
    """The layout of a layer that has to answer for the last `last[i]` tokens of text i alone."""
    masks, places, end = [], [], 0
    for mask, length, count in zip(layout.masks, layout.lengths, last, strict=True):
        end += length
        places += range(end - count, end)
        if mask is None and count > 1:
            mask = torch.ones(length, length, dtype=torch.bool, device=layout.cos.device).tril()
        # A text's very last token sees every key, unless a mask says otherwise.
        masks.append(None if mask is None else mask[-count:])
    at = torch.tensor(places, device=layout.cos.device)
    return replace(layout, masks=masks, last=list(last), places=at)
