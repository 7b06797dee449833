"""Result files that are checked before the work starts, so that no computed result is lost."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from qwen_min.errors import UserError
from qwen_min.files.disk import one_line_error, write_atomically

ADVICE = "make room or name another file"
RESULTS = ("results", "predictions")  # how the names of an evaluation's files begin
Paths = Sequence[str | Path | None]
Text = str | Callable[[], Iterable[str]]  # whole, or what makes its pieces, one in memory at once
STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
STREAMS |= {f"{place}/{n}": n for place in ("/dev/fd", "/proc/self/fd") for n in (1, 2)}


class Output:
    """A result file that is checked before the work starts and appears, complete, at its end.

    An unwritable path fails immediately and not after an hour. If the file cannot be written at
    the end (a full disk), its text goes to the temporary directory and the error says where.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._stream = STREAMS.get(str(path))
        with one_line_error(self.path, "name a file in a directory that exists and is yours"):
            # Not by the descriptor: if it was closed, another file may have its number by now.
            streams = [n for n, s in ((1, sys.__stdout__), (2, sys.__stderr__)) if s is not None]
            if self._stream not in (None, *streams):
                raise OSError("it is closed")
            exists = self.path.exists()
            # A stream, a device or a pipe is written to. Only a file is replaced.
            self._replaced = self._stream is None and (self.path.is_file() or not exists)
            if self.path.is_dir():
                raise IsADirectoryError("it is a directory")
            if self._stream is None and exists and not os.access(self.path, os.W_OK):
                raise PermissionError("Permission denied")
            if self._replaced:
                taken = [os.fstat(n) for n in streams if exists]
                if any(os.path.samestat(self.path.stat(), status) for status in taken):
                    raise FileExistsError("standard output or standard error goes to it")
                target = Path(os.path.realpath(path))
                # Can a file of this name be made there? It is removed at once.
                name = {"prefix": f".{target.name}.", "suffix": f".{os.getpid()}.partial"}
                tempfile.NamedTemporaryFile(dir=target.parent, **name).close()

    def commit(self, text: Text) -> None:
        """Write the file. Raises UserError if that fails."""

        def data() -> Iterator[bytes]:
            # A file name in `text` may hold half of a surrogate pair, which UTF-8 cannot encode.
            # backslashreplace writes it as JSON's own escape, such as "\\udcff".
            for piece in [text] if isinstance(text, str) else text():
                yield piece.encode("utf-8", "backslashreplace")

        try:
            if self._replaced:
                return write_atomically(self.path, data(), ADVICE)
            # Opening a stream by its name would empty the file to which the shell redirects it.
            with one_line_error(self.path, ADVICE):
                opened = self.path if self._stream is None else os.dup(self._stream)
                with open(opened, "wb") as file:
                    file.writelines(data())
        except UserError as error:
            try:
                descriptor, name = tempfile.mkstemp(self.path.suffix, "qwen_min-")
                with open(descriptor, "wb") as file:
                    file.writelines(data())
                rescue = f"its content is in {name}"
            except OSError as second:
                rescue = f"nor can a temporary file ({second.strerror}): run again"
            raise UserError(f"{error}; {rescue}") from None


class RowFile:
    """A file that grows by whole rows. It replaces an existing one when it gets its first."""

    def __init__(self, path: str | Path):
        self.path, self._file = Path(path), None

    def append(self, rows: str) -> None:
        """Write whole rows at once, held back nowhere. Raises UserError if there is no room."""
        with one_line_error(self.path, ADVICE):
            self._file = self._file or self.path.open("wb", buffering=0)
            size, data = self._file.tell(), rows.encode()
            if self._file.write(data) < len(data):  # the disk is full, and holds a part of a row
                self._file.truncate(size)
                raise OSError("No space left on device")


def open_outputs(paths: Paths, inputs: Paths) -> list[Output | None]:
    """An Output for each path that is not None. Raises UserError as `refuse_inputs` does."""
    refuse_inputs(paths, inputs)
    return [None if path is None else Output(path) for path in paths]


def refuse_inputs(paths: Paths, inputs: Paths) -> None:
    """Raise UserError if one of `paths` is another one or an input, or lies in an input directory.

    Only a file that is named results… or predictions… may be new there, or be replaced.
    """
    around, taken = set(), set()
    for place in map(Path, filter(None, inputs)):
        around |= _identities(place)
        with one_line_error(place, "make it readable", "cannot be read"):
            names = os.listdir(place) if place.is_dir() else []
        # A link in the directory may lead to a file elsewhere.
        entries = (place / name for name in names if not name.startswith(RESULTS))
        taken = taken.union(around, *map(_identities, entries))
    for path in (path for path in paths if path is not None):
        target = Path(os.path.realpath(path))
        parents = () if target.name.startswith(RESULTS) else target.parents
        if taken & _identities(target) or around & set().union(*map(_identities, parents)):
            found = "is already the data or another output, or lies in a directory that is read"
            raise UserError(f"{path}: {found}; give each its own, elsewhere")
        taken |= _identities(target)


def _identities(path: Path) -> set:
    """Equal for two names of one file: its path without links and, if it exists, its number."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return {os.path.realpath(path), (found.st_dev, found.st_ino)}
    return {os.path.realpath(path)}


def commit_outputs(texts: Sequence[tuple[Output | None, Text]]) -> None:
    """Commit every output, even if another one fails. Raises UserError if any did."""
    failures = []
    for output, text in texts:
        try:
            if output:
                output.commit(text)
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError("; ".join(failures))
