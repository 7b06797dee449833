"""What the two commands share: arguments, one-line errors, and outputs that are opened early."""

import argparse
import contextlib
import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from qwen_min.batching import DEFAULT_BATCH_TOKENS
from qwen_min.errors import UserError
from qwen_min.loading import DTYPES
from qwen_min.prompt import DEFAULT_LABELS, DEFAULT_MAX_TEXT_TOKENS, DEFAULT_TEMPLATE

SAMPLE = Path(__file__).parent / "sample"  # reviews written for this project
STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}


class CommandParser(argparse.ArgumentParser):
    """Answers a wrong argument as `run_command` does any other mistake: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {_one_line(message)}; --help shows the arguments\n")


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


def make_parser(description: str) -> CommandParser:
    """A parser whose help keeps the description's examples as they are and shows every default."""
    return CommandParser(description=description, formatter_class=HelpFormatter)


def parse_with_given(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, dict]:
    """All arguments, and those among them that were typed and not left at their default.

    What a run was trained with takes the place of a default, never of what somebody typed.
    """
    args = parser.parse_args(argv)
    # argparse gives a default only to what the namespace does not hold yet.
    unset = object()
    again = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    return args, {name: value for name, value in vars(again).items() if value is not unset}


def add_data_arguments(parser: argparse.ArgumentParser, sample: str) -> None:
    """Which model, which texts (by default the sample's file `sample`), how many tokens at once."""
    parser.add_argument(
        "--model",
        default="tiny",
        help="tiny (embedded), a directory, or a hub name such as Qwen/Qwen2.5-1.5B[@REVISION]",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="FILE",
        default=str(SAMPLE / sample),
        help=".tsv (label, text_a), .csv or .jsonl (label, text); labels are 0, 1, … or the words",
    )
    group.add_argument("--encoding", default="utf-8", help="of the data file")
    group.add_argument("--limit", type=positive_int, metavar="N", help="only the first N rows")
    group.add_argument(
        "--batch-tokens",
        type=positive_int,
        metavar="N",
        default=DEFAULT_BATCH_TOKENS,
        help="tokens that go through the model at once",
    )


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
    # As Python itself has it for stderr: what a terminal's encoding lacks is shown as its code.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command(args)
        print(end="", flush=True)
        return status
    except UserError as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has left (`| head`). Python would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _one_line(message: str) -> str:
    """A message may quote a path or an argument, and either may hold a newline."""
    return message.replace("\r", "\\r").replace("\n", "\\n")


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
