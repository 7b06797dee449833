"""Text in columns, for a terminal in which a Chinese character takes two of them."""

from collections.abc import Sequence
from unicodedata import category, east_asian_width

WIDTH = 100  # of a terminal, in columns


def columns(text: str) -> int:
    """Width in a terminal, where a Chinese character takes two columns."""
    return sum(2 if east_asian_width(char) in "WF" else 1 for char in text)


def pad(text: str, width: int, left: bool = False) -> str:
    """Fill with spaces to a width in terminal columns."""
    space = " " * max(0, width - columns(text))
    return space + text if left else text + space


def clipped(text: str, width: int = 9) -> str:
    """`text`, or where it is wider than that its beginning and an ellipsis."""
    while columns(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Columns for a terminal: the first `words` to the left, numbers to the right."""
    table = [list(heads), *rows]
    widths = [max(columns(row[i]) for row in table) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            pad(cell, width, left=i >= words)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def paragraph(sentences: Sequence[str]) -> str:
    """Indented sentences in lines of at most WIDTH columns, each beginning a line of its own.

    An empty one is an empty line, but not at the end.
    """
    lines = []
    for sentence in sentences:
        line = " " * bool(sentence)
        for word in sentence.split(" "):
            if columns(f"{line} {word}") > WIDTH:
                lines.append(line)
                line = "   "
            line = f"{line} {word}"
        lines.append(line.rstrip())
    return "\n".join(lines).rstrip()


def visible(text: str) -> str:
    """`text` with nothing in it that is blank or takes no column of its own."""
    shown = ""
    for char in text:
        if char == " ":
            shown += "␣"
        elif category(char)[0] in "CMZ":
            shown += char.encode("unicode_escape").decode()
        else:
            shown += char
    return shown
