"""Where the tokens of a batch stand in the chunked delta rule; delta.py has the computation.

Each text is cut into chunks of 64 tokens, the last one filled up. All chunks of all texts can be
prepared at once. But a chunk also needs the state in which the chunk before it leaves the text, so
the chunks stand in this order: the first one of each text, then the second one of each text that
has one, and so on, the texts with most chunks first.

Tokens are named by their row in the batch, 0 … N−1. Row N stands for zeros. The rows behind it are
the last inputs of the convolution before each text, if the texts continue others.
"""

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
    filling, chains, ends = [N] * CHUNK, [], []
    for i, line in enumerate(lines):
        history = [N] * before
        if continues:
            history = list(range(N + 1 + i * before, N + 1 + (i + 1) * before))
        elif first_is_prefix and i:
            history = ends[0]
        chain = [*history, *range(firsts[i], firsts[i] + line)]
        ends.append(chain[len(chain) - before :])
        chains.append(torch.tensor([*chain, *filling]))

    groups, windows, places = [], [], torch.zeros(N, dtype=torch.long)
    for texts in [[0], list(range(1, n))] if first_is_prefix else [list(range(n))]:
        chunks = {i: -(-lines[i] // CHUNK) for i in texts if lines[i]}
        texts = sorted(chunks, key=lambda i: -chunks[i])
        counts = [sum(c < chunks[i] for i in texts) for c in range(max(chunks.values(), default=0))]
        groups.append(Group(texts, counts))
        for c, count in enumerate(counts):
            for i in texts[:count]:
                done, left = c * CHUNK, min(CHUNK, lines[i] - c * CHUNK)
                start = len(windows) * CHUNK
                places[firsts[i] + done : firsts[i] + done + left] = start + torch.arange(left)
                windows.append(chains[i][done : done + before + CHUNK])

    found: dict[tuple[int, int], tuple[int, int, list[int]]] = {}  # token: level, place, window
    levels: list[list[tuple[int, list[int], int]]] = []
    after = list(ends)
    for i, tree in enumerate(trees):
        for token, parent in enumerate(tree, start=lines[i]):
            level, origin, window = found.get((i, parent), (-1, i, [N, *ends[i]]))
            row, window = firsts[i] + token, [*window[1:], firsts[i] + token]
            if len(levels) == level + 1:
                levels.append([])
            found[i, token] = (level + 1, len(levels[level + 1]), window)
            levels[level + 1].append((row, window, origin))
            if parent < 0:
                after[i] = window[1:]
    made, answered = [], len(windows) * CHUNK
    for level in levels:
        rows, inputs, origins = (torch.tensor(part) for part in zip(*level, strict=True))
        made.append(Level(rows, inputs, origins))
        places[rows] = answered + torch.arange(len(rows))
        answered += len(rows)
    shape = (len(windows), before + CHUNK)
    windows = torch.stack(windows) if windows else torch.zeros(shape, dtype=torch.long)
    return Chunks(
        groups, windows, windows[:, before:], made, places, torch.tensor(after).view(n, before)
    )
