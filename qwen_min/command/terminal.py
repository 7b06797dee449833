"""Text for a terminal: escaped control characters, and tables with wide Chinese characters."""

import io
import json
import sys
from collections.abc import Callable, Sequence
from typing import TextIO
from unicodedata import category, east_asian_width

from tqdm import tqdm

WIDTH = 80  # of a terminal, in columns
LOG_SECONDS = 30  # between two lines of progress in a log
LINE = 500  # characters of an error or a warning, at most


def printable(text: str) -> str:
    """`text` without what could act on a terminal: control and format characters are escaped.

    The escape is JSON's, so that printed JSON keeps its value. Newlines stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """`text` printable and without newlines; a longer one than LINE without its middle."""
    text = printable(text).replace("\n", "\\n")
    return text if len(text) <= LINE else f"{text[: LINE // 2 - 1]}…{text[-LINE // 2 :]}"


class SafeStream(io.TextIOBase):
    """Stands for sys.stdout or sys.stderr while a command runs, and writes only printable text.

    lines: each text that is written, without its final newline, becomes one line. A stream that is
    closed or full does not stop the command: `failure` keeps the error, later text is dropped. It
    is no terminal, so that other libraries draw no bar: its cursor movements would be escaped.
    """

    def __init__(self, stream: TextIO | None, lines: bool = False):
        self.stream = stream or io.StringIO()  # Python has None for a stream that is closed
        self.lines, self.failure = lines, None

    def write(self, text: str) -> int:
        """Write the text, made printable; returns its length."""
        end = "\n" if self.lines and text.endswith("\n") else ""
        shown = one_line(text.removesuffix("\n")) + end if self.lines else printable(text)
        self._try(lambda: self.stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered."""
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            if self.failure is None:
                action()
        except OSError as error:
            self.failure = error


def progress_bar(**options: object) -> tqdm:
    """tqdm's bar, which counts tokens; if stderr is no terminal, a line every LOG_SECONDS.

    The bar moves the cursor, so it writes without SafeStream.
    """

    class Lines(tqdm):
        def display(self, **_: object) -> None:
            print(self, file=sys.stderr, flush=True)

    options = {"unit": " tokens", "unit_scale": True} | options
    stream = getattr(sys.stderr, "stream", sys.stderr)
    if stream.isatty():
        return tqdm(file=stream, **options)
    line = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}"
    every = {"delay": LOG_SECONDS, "mininterval": LOG_SECONDS, "miniters": 1}
    return Lines(file=io.StringIO(), bar_format=line, **every, **options)


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
    table = [[cell.replace("\n", "\\n") for cell in row] for row in [heads, *rows]]
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
