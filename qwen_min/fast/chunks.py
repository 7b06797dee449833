"""Where the tokens of a batch are in the chunked delta rule; delta.py has the computation.

Each text is cut into chunks of 64 tokens, the last one padded with zeros. All chunks of all texts
can be prepared at once. But chunk c of a text needs the state after its chunk c − 1. So the order
is: chunk 0 of every text, then chunk 1 of every text that has one, and so on; in each step the
texts with most chunks first.

Tokens are named by their row in the batch, 0 … N−1. Row N holds zeros. The rows after it are the
last inputs of the convolution before each text, if the texts continue others.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class Group:
    """Texts that are computed side by side."""

    texts: list[int]  # those with most chunks first
    counts: list[int]  # how many of them have a first chunk, a second one, ...


@dataclass(frozen=True)
class Level:
    """Tokens to compute in one step of the recurrence, each from a state of its own: (n,) each."""

    rows: Tensor
    windows: Tensor  # (n, kernel): rows of the convolution's inputs
    parents: Tensor  # whose state each continues: a text's, or a token's of the level before


@dataclass(frozen=True)
class Chunks:
    """Index tensors for one batch."""

    groups: list[Group]  # the second one, if any, continues the only text of the first
    windows: Tensor  # (chunks, kernel − 1 + CHUNK): rows of the convolution's inputs
    tokens: Tensor  # (chunks, CHUNK): the rows of its own tokens
    levels: list[Level]
    places: Tensor  # (N,): the row of each token's answer; those of levels come after all chunks
    ends: Tensor  # (texts, kernel − 1): the convolution's inputs that the next token would need

    def to(self, device: torch.device) -> "Chunks":
        """The same with its index tensors on `device`."""
        levels = [Level(*(t.to(device) for t in vars(level).values())) for level in self.levels]
        tensors = (self.windows, self.tokens, self.places, self.ends)
        windows, tokens, places, ends = (t.to(device) for t in tensors)
        return Chunks(self.groups, windows, tokens, levels, places, ends)


def make_chunks(
    trunks: Sequence[int],
    trees: Sequence[Sequence[int]],
    kernel: int,
    continues: bool,
    first_is_prefix: bool,
) -> Chunks:
    """The layout of texts: text i has a trunk of trunks[i] tokens, then a tree of len(trees[i]).

    trees[i][j]: the index in text i of the token before tree token j; −1 if that token is in the
    prefix. kernel: tokens that the convolution sees. continues: other inputs come before each text.
    first_is_prefix: the first text comes before all others.
    """
    before, n = kernel - 1, len(trunks)
    sizes = [trunk + len(tree) for trunk, tree in zip(trunks, trees, strict=True)]
    N, firsts = sum(sizes), [sum(sizes[:i]) for i in range(n)]
    cut, ends = [], []
    for i, trunk in enumerate(trunks):
        history = [N] * before
        if continues:
            history = list(range(N + 1 + i * before, N + 1 + (i + 1) * before))
        elif first_is_prefix and i:
            history = ends[0]
        chain = [*history, *range(firsts[i], firsts[i] + trunk)]
        ends.append(chain[len(chain) - before :])
        filled = torch.tensor([*chain, *[N] * CHUNK])
        cut.append(filled.unfold(0, before + CHUNK, CHUNK)[: -(-trunk // CHUNK)])  # the windows

    groups, order, starts = [], [], [sum(map(len, cut[:i])) for i in range(n)]
    for texts in [[0], range(1, n)] if first_is_prefix else [range(n)]:
        texts = sorted((i for i in texts if trunks[i]), key=lambda i: -len(cut[i]))
        most = len(cut[texts[0]]) if texts else 0
        counts = [sum(c < len(cut[i]) for i in texts) for c in range(most)]
        groups.append(Group(texts, counts))
        order += [starts[i] + c for c, count in enumerate(counts) for i in texts[:count]]
    windows = torch.cat(cut)[order]

    steps, after = defaultdict(list), list(ends)
    for i, tree in enumerate(trees):
        found = {}  # of a token: the depth of what follows it, its place in its level, its window
        for token, parent in enumerate(tree, start=trunks[i]):
            depth, origin, window = found.get(parent, (0, i, [N, *ends[i]]))
            window = [*window[1:], firsts[i] + token]
            found[token] = depth + 1, len(steps[depth]), window
            steps[depth].append((firsts[i] + token, window, origin))
            if parent < 0:
                after[i] = window[1:]
    levels = [Level(*map(torch.tensor, zip(*step, strict=True))) for step in steps.values()]
    # The rows 0 … N−1 are in the answers once each, so sorting finds their places.
    tokens = windows[:, before:]
    places = torch.cat([tokens.flatten(), *(level.rows for level in levels)]).argsort()[:N]
    after = torch.tensor(after, dtype=torch.long).view(n, before)
    return Chunks(groups, windows, tokens, levels, places, after)
