"""Several texts laid end to end: their tokens, the tokens' positions, what each attends to.

The linear layers then see one long matrix and compute nothing for padding; only attention treats
the texts separately. Shapes as in model.py, and N: tokens of all texts together; S: keys of a text,
those of its prefix included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qwen_min.fast.chunks import Chunks, make_chunks
from qwen_min.model import Qwen, rotary_cos_sin

# What a layer keeps of one text. Attention: keys (rotated) and values, two tensors (S, K, Dh). The
# gated delta rule: its state (Hv, dk, dv), and the last inputs of its convolution (kernel − 1, C).
Kept = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Past:
    """What comes before a text that continues another one, from an earlier forward.

    Never changed in place: continuing a text makes a new one, so many candidates can continue one
    prompt, in any order.
    """

    length: int  # tokens
    layers: list[Kept]


@dataclass(frozen=True)
class Text:
    """One text of a batch."""

    ids: Sequence[int]
    # The last tokens may be a tree: several continuations of one prompt side by side. For each tree
    # token, the index in `ids` of the token before it, in the trunk or in the tree; −1 if that is
    # the last token of the batch's prefix.
    parents: Sequence[int] = ()
    queries: int | None = None  # how many of its last tokens need an output; None: all

    @property
    def trunk(self) -> int:
        """How many tokens the text has before the tree."""
        return len(self.ids) - len(self.parents)

    def mask(self) -> Tensor:
        """(T, T): which of the text's tokens each token attends to: itself and those before."""
        mask = torch.ones(len(self.ids), len(self.ids), dtype=torch.bool).tril()
        for token, parent in enumerate(self.parents, start=self.trunk):
            mask[token, :token] = mask[parent, :token] if parent >= 0 else False
        return mask


@dataclass(frozen=True)
class Batch:
    """What `forward_packed` needs to know of the texts; made by `pack`."""

    ids: Tensor  # (N,)
    lengths: list[int]  # tokens of each text; their sum is N
    cos: Tensor  # (N, 1, rotary_dim), of each token's position in its text, prefix included
    sin: Tensor
    masks: list[Tensor | None]  # per text (query tokens, S), as of `additive`; None: causal
    query_counts: list[int]  # per text, the number of its last tokens that get an output
    asked: list[int]  # the same in the last layer: the tokens whose states the caller reads
    texts: Sequence[Text]
    dtype: torch.dtype  # of the hidden states
    kernel: int  # tokens that the convolution of Qwen3.5 sees
    prefix: Sequence[Past] | None = None  # what comes before each text
    first_is_prefix: bool = False  # all other texts continue the first one
    keep: bool = False  # whether the caller continues these texts: what each layer keeps of them
    query_index: Tensor | None = None  # in the last layer: the query tokens' rows among the N

    @cached_property
    def chunks(self) -> Chunks:
        """The layout for the gated delta rule, made once a batch."""
        # A single token that continues a text is one step of the recurrence, not a chunk.
        continues = self.prefix is not None
        trees = [(-1,) if continues and len(t.ids) == 1 else t.parents for t in self.texts]
        trunks = [len(t.ids) - len(tree) for t, tree in zip(self.texts, trees, strict=True)]
        chunks = make_chunks(trunks, trees, self.kernel, continues, self.first_is_prefix)
        return chunks.to(self.ids.device)

    @cached_property
    def padded_mask(self) -> Tensor:
        """All masks as one (texts, T, S), padded to the longest; on the CPU, made once a batch."""
        masks = [
            additive(torch.ones(n, n).tril()[-count:], self.dtype) if mask is None else mask
            for mask, n, count in zip(self.masks, self.lengths, self.query_counts, strict=True)
        ]
        longest = [max(mask.shape[dim] for mask in masks) for dim in (0, 1)]
        padded = torch.full((len(masks), *longest), -torch.inf, dtype=self.dtype)
        padded[:, :, 0] = 0  # rows of padding need one visible key, or softmax gives NaN
        for mask, row in zip(masks, padded, strict=True):
            row[: mask.shape[0], : mask.shape[1]] = mask
        return padded


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is true and −∞ elsewhere: what is added to the scores before the softmax.

    Made once a batch: scaled_dot_product_attention would make it of a boolean mask in each layer.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask == 0, -torch.inf)


def pack(
    model: Qwen,
    texts: Sequence[Text],
    prefix: Sequence[Past] | None = None,
    first_is_prefix: bool = False,
    keep: bool = False,
) -> Batch:
    """Lay texts end to end for `forward_packed`, on the model's device.

    prefix: what comes before each text, from an earlier forward with `keep`. first_is_prefix: the
    first text is a prefix that the other texts continue; it is computed once, and gradients flow
    through it as if each text had its own copy (LoRA's dropout draws once for all of them). Not
    together with `prefix`.
    """
    device, dtype, positions, masks = model.device, model.dtype, [], []
    for i, text in enumerate(texts):
        T = len(text.ids)
        start = len(texts[0].ids) if first_is_prefix and i else 0
        if prefix is not None:
            start = prefix[i].length
        if not text.parents and start == 0:
            positions.append(torch.arange(T))
            masks.append(None)
            continue
        own = text.mask()
        # A token's position is the number of tokens that it attends to, minus one.
        positions.append(start + own.sum(dim=1) - 1)
        # scaled_dot_product_attention aligns is_causal with the first key, not with the last one,
        # so texts that continue a prefix need an explicit mask (pytorch#108108).
        before = torch.ones(T, start, dtype=torch.bool)
        masks.append(additive(torch.cat([before, own], dim=1), dtype).to(device))
    config, ids = model.config, [token for text in texts for token in text.ids]
    cos, sin = rotary_cos_sin(torch.cat(positions).to(device), config.rotary_dim, config.rope_theta)
    lengths = [len(text.ids) for text in texts]
    asked = [n if t.queries is None else t.queries for t, n in zip(texts, lengths, strict=True)]
    ids = torch.tensor(ids, device=device)
    kernel = getattr(config, "linear_conv_kernel_dim", 0)
    how = {"prefix": prefix, "first_is_prefix": first_is_prefix, "keep": keep}
    return Batch(ids, lengths, cos, sin, masks, lengths, asked, texts, dtype, kernel, **how)


def select_queries(batch: Batch) -> Batch:
    """The batch for the last layer, which computes outputs for the tokens asked for only."""
    masks, index, end = [], [], 0
    for mask, T, count in zip(batch.masks, batch.lengths, batch.asked, strict=True):
        end += T
        index += range(end - count, end)
        if mask is None and count > 1:
            mask = additive(torch.ones(T, T, device=batch.cos.device).tril(), batch.dtype)
        # A single query token, the text's last, sees every key: no mask needed.
        masks.append(None if mask is None else mask[-count:])
    index = torch.tensor(index, device=batch.cos.device)
    return replace(batch, masks=masks, query_counts=batch.asked, query_index=index)
