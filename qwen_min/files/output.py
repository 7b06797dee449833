"""Result files that are opened before the work starts, and lose nothing when it ends badly."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from qwen_min.errors import UserError

STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}


class Output:
    """A result file that is opened before the work starts and appears, whole, at its end.

    A path that cannot be written is so known at once and not after an hour. The text is written
    aside and renamed; if even that fails (a full disk) it goes to the temporary directory, and the
    error says where. Without `commit` nothing is left behind.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._target = Path(os.path.realpath(path))  # a link stays; what it points to is replaced
        self._aside: Path | None = None
        try:
            if str(path) in STREAMS:
                # Opened by its name, a stream that the shell sends to a file would empty that file.
                opened: Path | int = STREAMS[str(path)]
            elif self.path.exists() and not self.path.is_file():
                opened = self.path  # a device or a pipe is written through, never replaced
            elif self.path.exists() and not os.access(self.path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            else:
                opened = self._target.parent / f".{self._target.name}.{os.getpid()}.partial"
                self._aside = opened
            # A file's name may hold half of a surrogate pair, which has no UTF-8: JSON's escape for
            # it, as in "\udcff", is what backslashreplace writes.
            self._file = open(  # noqa: SIM115
                opened,
                "w",
                encoding="utf-8",
                errors="backslashreplace",
                newline="\n",
                closefd=not isinstance(opened, int),
            )
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); name a file in a directory "
                "that exists and is yours"
            ) from None

    def commit(self, text: str) -> None:
        """Write `text` and put the file in its place."""
        try:
            with self._file as file:
                file.write(text)
            if self._aside:
                os.replace(self._aside, self._target)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); {self._rescue(text)}"
            ) from None

    def _rescue(self, text: str) -> str:
        """Write `text` to the temporary directory; says where, and what to do."""
        try:
            with tempfile.NamedTemporaryFile(
                "wb", prefix="qwen_min-", suffix=self.path.suffix, delete=False
            ) as file:
                file.write(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            return f"nor can a temporary file ({error.strerror}); make room and run again"
        return f"what was for it is in {file.name}: move that where there is room"

    def __enter__(self) -> "Output":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        if self._aside:
            self._aside.unlink(missing_ok=True)


def open_outputs(
    paths: Sequence[str | None], stack: contextlib.ExitStack, inputs: Sequence[str]
) -> list[Output | None]:
    """An Output for each path that is given; `stack` removes what is never committed.

    Raises UserError where one would replace another or one of the files `inputs`.
    """
    taken = {os.path.realpath(path) for path in inputs}
    for path in paths:
        if path is not None and os.path.realpath(path) in taken:
            raise UserError(
                f"{path}: this file is already the data or another output; give each its own"
            )
        if path is not None:
            taken.add(os.path.realpath(path))
    return [None if path is None else stack.enter_context(Output(path)) for path in paths]


def commit_outputs(texts: Sequence[tuple[Output | None, str]]) -> None:
    """Commit every output that is given, even where another fails. Raises UserError if one did."""
    failures = []
    for output, text in texts:
        try:
            if output:
                output.commit(text)
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError("; ".join(failures))
