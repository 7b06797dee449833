"""Where the tokens of a batch stand in the chunked delta rule; delta.py has the computation.

Each text is cut into chunks of 64 tokens, the last one filled up. All chunks of all texts can be
prepared at once. But chunk c of a text needs the state after its chunk c − 1. So the order is:
chunk 0 of every text, then chunk 1 of every text that has one, and so on; in each step the texts
with most chunks first.

Tokens are named by their row in the batch, 0 … N−1. Row N stands for zeros. The rows behind it are
the last inputs of the convolution before each text, if the texts continue others.
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
    parents: Tensor  # of each the text, or the token of the level before, that it continues


@dataclass(frozen=True)
class Chunks:
    """Index tensors for one batch."""

    groups: list[Group]  # the second one, if any, continues the only text of the first
    windows: Tensor  # (chunks, kernel − 1 + CHUNK): rows of the convolution's inputs
    tokens: Tensor  # (chunks, CHUNK): the rows of its own tokens
    levels: list[Level]
    places: Tensor  # (N,): where each token's answer stands, those of levels behind all chunks
    ends: Tensor  # (texts, kernel − 1): the convolution's inputs that the next token would need

    def to(self, device: torch.device) -> "Chunks":
        """The same with its index tensors on `device`."""
        levels = [Level(*(t.to(device) for t in vars(level).values())) for level in self.levels]
        tensors = (self.windows, self.tokens, self.places, self.ends)
        windows, tokens, places, ends = (t.to(device) for t in tensors)
        return Chunks(self.groups, windows, tokens, levels, places, ends)


def make_chunks(
    lines: Sequence[int],
    trees: Sequence[Sequence[int]],
    kernel: int,
    continues: bool,
    first_is_prefix: bool,
) -> Chunks:
    """The layout of texts of lines[i] tokens, and a tree of len(trees[i]) tokens behind it.

    trees: of each token the one in the text that it follows, the line's last one or one of the
    tree; −1: what stands before the text. kernel: tokens that the convolution sees. continues:
    other inputs stand before each text. first_is_prefix: the first text stands before all others.
    """
    before, n = kernel - 1, len(lines)
    sizes = [line + len(tree) for line, tree in zip(lines, trees, strict=True)]
    N, firsts = sum(sizes), [sum(sizes[:i]) for i in range(n)]
    cut, ends = [], []
    for i, line in enumerate(lines):
        history = [N] * before
        if continues:
            history = list(range(N + 1 + i * before, N + 1 + (i + 1) * before))
        elif first_is_prefix and i:
            history = ends[0]
        chain = [*history, *range(firsts[i], firsts[i] + line)]
        ends.append(chain[len(chain) - before :])
        filled = torch.tensor([*chain, *[N] * CHUNK])
        cut.append(filled.unfold(0, before + CHUNK, CHUNK)[: -(-line // CHUNK)])  # the windows

    groups, order, starts = [], [], [sum(map(len, cut[:i])) for i in range(n)]
    for texts in [[0], range(1, n)] if first_is_prefix else [range(n)]:
        texts = sorted((i for i in texts if lines[i]), key=lambda i: -len(cut[i]))
        most = len(cut[texts[0]]) if texts else 0
        counts = [sum(c < len(cut[i]) for i in texts) for c in range(most)]
        groups.append(Group(texts, counts))
        order += [starts[i] + c for c, count in enumerate(counts) for i in texts[:count]]
    windows = torch.cat(cut)[order]

    steps, after = defaultdict(list), list(ends)
    for i, tree in enumerate(trees):
        found = {}  # of a token: the depth of what follows it, its place in its level, its window
        for token, parent in enumerate(tree, start=lines[i]):
            depth, origin, window = found.get(parent, (0, i, [N, *ends[i]]))
            window = [*window[1:], firsts[i] + token]
            found[token] = depth + 1, len(steps[depth]), window
            steps[depth].append((firsts[i] + token, window, origin))
            if parent < 0:
                after[i] = window[1:]
    levels = [Level(*map(torch.tensor, zip(*step, strict=True))) for step in steps.values()]
    # The rows 0 … N−1 stand once each in the answers, so sorting finds their places.
    tokens = windows[:, before:]
    places = torch.cat([tokens.flatten(), *(level.rows for level in levels)]).argsort()[:N]
    after = torch.tensor(after, dtype=torch.long).view(n, before)
    return Chunks(groups, windows, tokens, levels, places, after)
