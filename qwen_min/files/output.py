"""Result files that are opened before the work starts, so that no computed result is lost."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_min.errors import UserError
from qwen_min.files.disk import one_line_error

STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}


class Output(contextlib.AbstractContextManager):
    """A result file that is opened before the work starts and appears, complete, at its end.

    An unwritable path fails immediately and not after an hour. The text is written under another
    name, which is then renamed. If even that fails (a full disk), the text goes to the temporary
    directory and the error says where. Without `commit` nothing is left behind.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # A link stays a link: the file that it points to is replaced.
        self._target = Path(os.path.realpath(path))
        self._aside: Path | None = None
        with one_line_error(self.path, "name a file in a directory that exists and is yours"):
            if str(path) in STREAMS:
                # Opening the name would empty a file to which the shell redirects the stream.
                opened: Path | int = os.dup(STREAMS[str(path)])
            elif self.path.exists() and not self.path.is_file():
                opened = self.path  # a device or a pipe is written to, never replaced
            elif self.path.exists() and not os.access(self.path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            else:
                name = f".{self._target.name}.{os.getpid()}.partial"
                opened = self._aside = self._target.with_name(name)
            self._file = open(opened, "wb")  # noqa: SIM115

    def commit(self, text: str) -> None:
        """Write `text` and give the file its name. Raises UserError if that fails."""
        # A file name in `text` may hold half of a surrogate pair, which UTF-8 cannot encode.
        # backslashreplace writes it as JSON's own escape, such as "\\udcff".
        data = text.encode("utf-8", "backslashreplace")
        try:
            with self._file as file:
                file.write(data)
            if self._aside:
                os.replace(self._aside, self._target)
        except OSError as error:
            problem = f"{self.path}: cannot be written ({error.strerror})"
            try:
                descriptor, name = tempfile.mkstemp(self.path.suffix, "qwen_min-")
                with open(descriptor, "wb") as file:
                    file.write(data)
                advice = f"its content is in {name}: move that to a disk with room"
            except OSError as second:
                advice = f"nor can a temporary file ({second.strerror}); make room and run again"
            raise UserError(f"{problem}; {advice}") from None

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        if self._aside:
            self._aside.unlink(missing_ok=True)


def open_outputs(
    paths: Sequence[str | None], stack: contextlib.ExitStack, inputs: Sequence[str]
) -> list[Output | None]:
    """An Output for each path that is not None; `stack` removes those that are never committed.

    Raises UserError if one would replace another or one of the files `inputs`.
    """
    taken = {os.path.realpath(path) for path in inputs}
    for path in (path for path in paths if path is not None):
        if os.path.realpath(path) in taken:
            raise UserError(f"{path}: is already the data or another output; give each its own")
        taken.add(os.path.realpath(path))
    return [None if path is None else stack.enter_context(Output(path)) for path in paths]


def commit_outputs(texts: Sequence[tuple[Output | None, str]]) -> None:
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
