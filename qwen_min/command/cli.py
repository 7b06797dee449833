"""What the two commands share: their arguments, and one line for a mistake."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from qwen_min.errors import UserError
from qwen_min.fast.batching import DEFAULT_BATCH_TOKENS
from qwen_min.fast.memory import keep_freed_memory
from qwen_min.files.weights import DTYPES
from qwen_min.prompt import DEFAULT_LABELS, DEFAULT_MAX_TEXT_TOKENS, DEFAULT_TEMPLATE

SAMPLE = Path(__file__).parent.parent / "sample"  # reviews written for this project


class CommandParser(argparse.ArgumentParser):
    """Answers a wrong argument as `run_command` does any other mistake: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {_one_line(message)}; --help shows the arguments\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples of a docstring as they are written and shows every default there is."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


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
    for name, value in vars(args).items():
        if isinstance(value, str) and value != value.encode("utf-8", "replace").decode():
            parser.error(f"--{name.replace('_', '-')} {value!r} is not valid UTF-8")
    # argparse gives a default only to what the namespace does not hold yet.
    unset = object()
    again = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    return args, {name: value for name, value in vars(again).items() if value is not unset}


def add_data_arguments(parser: argparse.ArgumentParser, sample: str) -> None:
    """Which model, which texts (by default the sample's file `sample`), how many tokens at once."""
    parser.add_argument(
        "--model",
        default="tiny",
        help="tiny (comes with the project), a directory, or a hub name: Qwen/Qwen2.5-1.5B[@REV]",
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


def seed(text: str) -> int:
    """An argument that seeds random numbers: 0 to 2³¹ - 1."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2147483647")
    return int(text)


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
    group.add_argument(
        "--chat", action="store_true", help="the template as the user's message in Qwen's markup"
    )
    group.add_argument(
        "--system",
        metavar="TEXT",
        help="with --chat: the system message (default: the checkpoint's own, if it has one)",
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


def add_training_arguments(parser: argparse.ArgumentParser, poolings: Iterable[str]) -> None:
    """How each method is trained. The defaults serve a few hundred to a few thousand rows."""
    head = parser.add_argument_group("head_only")
    head.add_argument("--pooling", choices=poolings, default="last", help="token(s) to read")
    head.add_argument(
        "--layer",
        default="last",
        help="last, best (chosen on the held-out part), or a number: 0 is the embedding",
    )
    head.add_argument("--adapter", metavar="DIR", help="probe the base adapted by this LoRA")
    head.add_argument("--feature-cache", metavar="DIR", help="default: features/ in the run")
    lora = parser.add_argument_group("lora_head, lora_label_scoring")
    # Attention alone, as in the paper: in a 0.5B model a quarter of the parameters of all seven.
    lora.add_argument(
        "--lora-targets",
        metavar="NAMES",
        default="attention",
        help="attention (q, k, v, o), all (with gate, up, down), none, or names: q_proj,v_proj",
    )
    lora.add_argument(
        "--train-embeddings",
        action="store_true",
        help="train the token vectors too (and the tied LM head): an ablation",
    )
    # A few hundred to a few thousand rows: a small rank is enough to move a decision, and alpha
    # twice the rank is the customary scale at which 2e-4 is a safe rate.
    lora.add_argument("--r", type=positive_int, default=8, help="rank of the LoRA")
    lora.add_argument("--alpha", type=float, default=16.0, help="scale: the update is alpha/r · BA")
    lora.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(r) instead")
    # Some regularisation, since two passes over little data already fit it closely.
    lora.add_argument("--dropout", type=float, default=0.05, help="on the LoRA's input")
    # Customary for a few thousand rows, not tuned here; the held-out part keeps the best step.
    lora.add_argument("--epochs", type=positive_int, default=2, help="passes over the data")
    lora.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    # Adam's second moments mean little in the first steps; they get small ones.
    lora.add_argument("--warmup", type=float, default=0.1, help="share of steps with a rising rate")
    # Few rows a step: a few hundred rows would otherwise make only a handful of steps.
    lora.add_argument("--batch-size", type=positive_int, default=8, help="rows in one step")
    # A single surprising row must not undo what the others taught.
    lora.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    lora.add_argument(
        "--eval-every", type=positive_int, metavar="STEPS", help="default: twice an epoch"
    )
    lora.add_argument(
        "--save-every", type=positive_int, metavar="STEPS", default=50, help="at least"
    )
    lora.add_argument(
        "--checkpointing", action="store_true", help="recompute activations: slower, less memory"
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
    keep_freed_memory()
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
