"""What the two commands share: arguments, one-line errors, and outputs that are opened early."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from qwen_min.errors import UserError
from qwen_min.loading import DTYPES
from qwen_min.prompt import DEFAULT_LABELS, DEFAULT_MAX_TEXT_TOKENS, DEFAULT_TEMPLATE


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples of a docstring as they are written and shows every default."""


def positive_int(text: str) -> int:
    """An argument that counts something. Raises ArgumentTypeError below 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that make two methods comparable: one prompt, one cut, the same words."""
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--labels",
        metavar="WORD,WORD",
        default=",".join(DEFAULT_LABELS),
        help="the word for each class, in class order (0 first); more than two classes work",
    )
    group.add_argument(
        "--template",
        default=DEFAULT_TEMPLATE.replace("\n", "\\n"),
        help="the frame around a text; {text} marks its place, \\n a newline",
    )
    group.add_argument(
        "--max-text-tokens",
        type=positive_int,
        metavar="N",
        default=DEFAULT_MAX_TEXT_TOKENS,
        help="longer texts are cut to their first N tokens; the template is never cut",
    )


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and in what precision to compute."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="precision of the base weights; auto is the checkpoint's own",
    )
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="auto takes a GPU where there is one",
    )


def choose_device(name: str) -> str:
    """ "auto" → cuda, mps or cpu, whichever is there. Raises UserError for one that is not."""
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, present in there.items() if present)
    if not there[name]:
        raise UserError(f"--device {name}: this machine has none; use --device auto or cpu")
    return name


def run_command(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command: a user's mistake becomes one line and status 2; a bug keeps its traceback."""
    try:
        return command(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class Output:
    """A result file that is opened before the work starts and appears, whole, at its end.

    A path that cannot be written is so known at once and not after an hour. The text is written
    aside and renamed; if even that fails (a full disk) it goes to the temporary directory, and the
    error says where. Without `commit` nothing is left behind.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # A device or a pipe (/dev/stdout) is written through, not replaced by a file.
        self._direct = self.path.exists() and not self.path.is_file()
        self._aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            if not self._direct and self.path.exists() and not os.access(self.path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            target = self.path if self._direct else self._aside
            self._file = target.open("w", encoding="utf-8", newline="\n")
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
                file.flush()
            if not self._direct:
                os.replace(self._aside, self.path)
        except OSError as error:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", prefix="qwen_min-", suffix=self.path.suffix, delete=False
            ) as rescue:
                rescue.write(text)
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); the results are in "
                f"{rescue.name}: move them where there is room"
            ) from None

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
        self._aside.unlink(missing_ok=True)


def open_outputs(paths: Sequence[str | None], stack: contextlib.ExitStack) -> list[Output | None]:
    """An Output for each path that is given; `stack` removes what is never committed."""
    return [None if path is None else stack.enter_context(Output(path)) for path in paths]
