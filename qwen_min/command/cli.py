"""Parsing and error output of every command: a user's mistake is one line and exit status 2."""

import argparse
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout
from types import ModuleType
from typing import NoReturn

from qwen_min.command.terminal import SafeStream, one_line
from qwen_min.errors import UserError

OUT_OF_MEMORY = (
    "out of memory|can't (allocate memory|start new thread)|Storage size .* overflowed"
    "|^could not create a primitive$"  # oneDNN: no memory for the code of a product
)
SIZES = ("batch_tokens", "batch_size", "max_text_tokens", "r")  # arguments that memory grows with


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong argument as `run_command` reports any other mistake."""

    def error(self, message: str) -> NoReturn:
        advice = "--help shows the arguments"
        if found := re.match(r"unrecognized arguments: (?:.*? )?(-[^\s=]+)", message):
            message = f"unknown option {found[1]}"
            if near := difflib.get_close_matches(found[1], self._option_string_actions, n=1):
                advice = f"did you mean {near[0]}?"
        self.exit(2, f"error: {one_line(message)}; {advice}\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples of a docstring as they are written, and shows every default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


def ranks() -> ModuleType | None:
    """fast/ranks.py if this is one of several processes, as torchrun starts them; or None."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    from qwen_min.fast import ranks

    return ranks


def make_parser(description: str) -> CommandParser:
    """A parser whose help keeps the description's examples and shows every default.

    What is printed from then on, the help first, has characters that the encoding of standard
    output lacks as their codes, as on stderr.
    """
    if ranks() and os.environ.get("RANK", "0") != "0":  # the first process alone prints
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return CommandParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def positive_int(text: str) -> int:
    """An argument that counts something. Raises ArgumentTypeError below 1."""
    # Below what the record of a run can hold.
    if not text.strip().isdecimal() or not 1 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """An argument that seeds random numbers: 0 to 2³¹ - 1."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2147483647")
    return int(text)


def parse_with_given(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, dict]:
    """All arguments, and those of them that were given on the command line.

    A run's own arguments replace defaults, never what was given.
    """
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, str) and value != value.encode("utf-8", "replace").decode():
            parser.error(f"{option(name)} {value!r} is not valid UTF-8")
    # argparse fills in a default only where the namespace has no value yet.
    unset: list = []  # a list, because an option that can be repeated extends a copy of it
    again = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    return args, {name: value for name, value in vars(again).items() if value is not unset}


def refuse_unused(parser: CommandParser, methods: Collection, method: str, given: dict) -> None:
    """Raise UserError for given options of a group whose title names other methods only."""
    for group in parser._action_groups:
        users = (group.title or "").split(", ")
        unused = [option(a.dest) for a in group._group_actions if a.dest in given]
        if unused and method not in users and set(users) <= set(methods):
            found = f"{', '.join(unused)}: for {' and '.join(users)}, not for {method}"
            raise UserError(f"{found}; leave {'them' if unused[1:] else 'it'} out")


def option(name: str) -> str:
    """An argument's name as it is typed: batch_tokens → --batch-tokens."""
    return f"--{name.replace('_', '-')}"


def choose_device(name: str) -> str:
    """ "auto" → cuda if there is one, else cpu. Raises UserError for cuda where there is none.

    Apple's mps is not offered: several releases of torch compute attention wrongly there, without
    an error (pytorch#174861).
    """
    import torch

    available = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    name = available[0] if name == "auto" else name
    if name not in available:
        raise UserError(f"--device {name}: not available; use --device auto or cpu")
    if name == "cuda" and ranks():  # each has its own device, which "cuda" means from now on
        here, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if here >= present:
            found = f"--device cuda: process {here} of this machine, which has {present} GPUs"
            raise UserError(f"{found}; start as many processes as there are GPUs")
        torch.cuda.set_device(here)
    return name


def run_command(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command: a user's mistake becomes one line and status 2; a bug keeps its traceback."""
    if ranks() and hasattr(args, "plain"):  # a command that computes
        from qwen_min.fast import group

        group.run(_run, command, args)  # ends the process
    return _run(command, args)


def _run(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    if not getattr(args, "plain", True):  # a command that computes, and not by the definitions
        from qwen_min.fast.memory import keep_freed_memory

        keep_freed_memory()
    out, err = SafeStream(sys.stdout), SafeStream(sys.stderr, lines=True)
    with redirect_stdout(out), redirect_stderr(err):
        status = _status(command, args)
        out.flush()
        if out.failure is None:
            return status
        # Python would try to write again at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.stream.fileno())
        if isinstance(out.failure, BrokenPipeError):  # the reader has ended, as `| head` does
            return status or 141
        print_error(f"standard output: cannot be written ({out.failure.strerror}); make room")
        return status or 2


def _status(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        return command(args)
    except UserError as error:
        print_error(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch raises RuntimeError on the CPU, OutOfMemoryError, a kind of it, on a GPU.
        if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        sizes = [option(name) for name in SIZES if getattr(args, name, None)]
        print_error(f"out of memory ({error}); lower {', '.join(sizes) or 'the size of the data'}")
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        # No permission, a name that is too long, ...
        print_error(f"{error.filename}: {error.strerror}; check the path and its permissions")
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def print_error(message: str) -> None:
    """The one line that a command prints for what went wrong."""
    print(f"error: {message}", file=sys.stderr)
