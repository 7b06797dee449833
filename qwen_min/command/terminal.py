"""Text in columns, for a terminal in which a Chinese character takes two of them."""

from collections.abc import Sequence
from unicodedata import category, east_asian_width

WIDTH = 100  # of a terminal, in columns


def columns(text: str) -> int:
    """Width in a terminal, where a Chinese character takes two columns."""
    return sum(2 if east_asian_width(char) in "WF" else 1 for char in text)


def clipped(text: str, width: int = 9) -> str:
    """`text`; if it is wider than that, its beginning and an ellipsis."""
    while columns(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Columns for a terminal: the first `words` aligned to the left, the others to the right."""
    table = [heads, *rows]
    widths = [max(map(columns, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - columns(cell))
            cells.append(cell + space if i < words else space + cell)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def visible(text: str) -> str:
    """`text` with a sign for each space, and an escape for what else is blank or has no width."""
    return "".join(
        char.encode("unicode_escape").decode() if category(char)[0] in "CMZ" else char
        for char in text.replace(" ", "␣")
    )
