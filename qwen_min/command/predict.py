"""Classify texts that have no labels: the label of each, and the probability of every label.

    python -m qwen_min.predict --text 房间小，但是很干净。
    python -m qwen_min.predict reviews.txt --output labels.csv
    python -m qwen_min.predict reviews.csv --run runs/lora_head --output labels.jsonl
    python -m qwen_min.predict news.txt --model DIR --labels 体育,财经,科技 \\
        --template '新闻：{text}\\n类别：'
    cat reviews.txt | python -m qwen_min.predict - --run runs/lora_head

TEXTS is a .txt with one text a line, or any file that evaluate.py reads; labels in it are ignored.
Without --output a table is printed. Rows keep their order, and each is written as soon as the
texts around it are done, so texts may be many.
"""

import argparse
import csv
import io
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from types import FrameType
from typing import NamedTuple

import numpy as np

from qwen_min.command import arguments
from qwen_min.command.cli import make_parser, parse_with_given, positive_int, run_command
from qwen_min.command.finite import NotFinite
from qwen_min.command.interface import Classifier, read_source
from qwen_min.command.terminal import clipped, columns, printable, progress_bar, text_table
from qwen_min.errors import UserError
from qwen_min.fast.batching import DEFAULT_BATCH_TOKENS
from qwen_min.files.data import read_texts
from qwen_min.files.output import RowFile, open_outputs
from qwen_min.metrics import softmax
from qwen_min.prompt import Prompt

METHODS = ("zero_shot", "head_only", "lora_head", "lora_label_scoring", "transplanted_head")
# A chunk is read, scored and written together. With 16 batches in it most are full, of texts of
# like length, and a slow model loses seconds if it is stopped.
BATCHES = 16
TEXTS = 64  # that become prompts at once
LINE = 80  # columns of the table
NARROWEST = 20  # of these, for the text


class Row(NamedTuple):
    """A text with its label and the probability of each class (C,); None if not finite."""

    line: int
    text: str
    label: str | None
    probabilities: Sequence[float] | None


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def build_parser() -> argparse.ArgumentParser:
    """The command-line arguments, grouped as `--help` shows them."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("texts", metavar="TEXTS", nargs="?", help="a file of texts, or - for standard input")
    add("--text", action="append", metavar="TEXT", help="one text instead of TEXTS; repeatable")
    add("--method", choices=METHODS, help="default: the method of --run, or zero_shot")
    add("--run", metavar="DIR", help="a directory that train.py made")
    adapter = "instead of --run: a LoRA in PEFT's format, for lora_head or lora_label_scoring"
    add("--adapter", metavar="DIR", help=adapter)
    names = "tiny (comes with the project), a directory, or a hub name: Qwen/Qwen2.5-1.5B[@REV]"
    add("--model", default="tiny", help=names)
    names = ", ".join(arguments.CALIBRATIONS[:3])
    corrected = f"correct the scores of label words: {names}, or results of evaluate.py "
    add("--calibration", metavar="NAME", help=corrected + "--calibration, whose prior is taken")
    add("--encoding", help="of the file of texts")
    add("--text-column", metavar="NAME", help="of the file of texts")
    most = "at most this many tokens in one forward pass"
    count = {"type": positive_int, "metavar": "N", "default": DEFAULT_BATCH_TOKENS}
    add("--batch-tokens", **count, help=most)
    add("--output", metavar="FILE", help="write a .csv, for Excel too, or a .jsonl")
    arguments.add_prompt_arguments(parser)
    arguments.add_machine_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, given = parse_with_given(build_parser(), argv)
    return run_command(lambda args: predict(args, given), args)


def predict(args: argparse.Namespace, given: dict) -> int:
    """Read, load, then chunk by chunk score and write."""
    if (args.texts is None) == (args.text is None):
        raise UserError("expected TEXTS, a file or - for standard input, or else --text")
    if args.output and not args.output.endswith((".csv", ".jsonl")):
        raise UserError(f"--output {args.output}: expected a name that ends in .csv or .jsonl")
    if not (args.run or args.adapter or args.method):
        args.method = "zero_shot"
    source = read_source(args, given)
    inputs = [source.task.directory, args.adapter, args.run, args.run and f"{args.run}/adapter"]
    open_outputs([args.output], [*inputs, args.texts if args.texts != "-" else None])
    texts = enumerate(args.text or (), start=1)
    if args.texts:
        texts = read_texts(args.texts, args.encoding, args.text_column)
    first = list(islice(texts, 1))  # a file that is missing fails before the model is loaded
    if not first:
        raise UserError(f"{place(args)}: found no texts; give at least one")
    file = RowFile(args.output) if args.output else None
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        classifier = Classifier.load(source)
        return classify_all(args, classifier, chain(first, texts), file)
    except UserError as error:
        if file and file.rows:
            raise UserError(f"{error}; the first {file.rows} rows are in {args.output}") from None
        raise
    except KeyboardInterrupt as stop:
        kept = f": {file.rows} rows are in {args.output}" if file and file.rows else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        if file:
            file.close()


def place(args: argparse.Namespace) -> str:
    """What a message calls the texts."""
    return "standard input" if args.texts == "-" else args.texts or "--text"


def terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM stops a command as Ctrl-C does."""
    raise Terminated


def classify_all(
    args: argparse.Namespace,
    classifier: Classifier,
    texts: Iterable[tuple[int, str]],
    file: RowFile | None,
) -> int:
    """Write a row for each text; says at the end how many. Returns the exit status."""
    labels, failed, failure = classifier.labels, 0, ""
    n, shortened, started = 0, 0, time.perf_counter()
    if file:
        form = csv_rows(labels) if args.output.endswith(".csv") else json_rows(labels)
    else:
        form = table(labels)
    with progress_bar(disable=not file) as bar:
        for numbered, prompts in chunks(args, classifier, texts):
            rows, error = score_rows(classifier, numbered, prompts, bar.update)
            if error:
                first = rows[error.rows[0]].line
                failure = failure or f"{place(args)}, line {first}: {error}"
                if len(error.rows) == len(rows) == n + len(rows):
                    raise UserError(failure)
                failed += len(error.rows)
            if file:
                file.append(form(rows).encode(), len(rows))
            else:
                print(form(rows), end="", flush=True)
                if getattr(sys.stdout, "failure", None):  # nobody reads on, as with `| head`
                    break
            n += len(rows)
            shortened += sum(prompt.truncated for prompt in prompts)
    seconds = time.perf_counter() - started
    said = f"{n} texts, {n / seconds:.1f} rows/s" + f", written to {args.output}" * bool(file)
    most = classifier.source.task.max_text_tokens
    said += f"; {shortened} shortened to their first {most} tokens" * bool(shortened)
    print(said, file=sys.stderr)
    if failed:
        raise UserError(f"{failure}; {failed} of {n} rows have no label for this reason")
    return 0


def chunks(
    args: argparse.Namespace, classifier: Classifier, texts: Iterable[tuple[int, str]]
) -> Iterator[tuple[list[tuple[int, str]], list[Prompt]]]:
    """The texts with their lines, and their prompts, in parts of about BATCHES full batches."""
    texts, numbered, prompts = iter(texts), [], []
    while part := list(islice(texts, TEXTS)):
        places = [f"{place(args)}, line {line}" for line, _ in part]
        numbered += part
        prompts += classifier.prompts([text for _, text in part], places)
        if sum(len(prompt.ids) for prompt in prompts) >= BATCHES * args.batch_tokens:
            yield numbered, prompts
            numbered, prompts = [], []
    if numbered:
        yield numbered, prompts


def score_rows(
    classifier: Classifier,
    numbered: Sequence[tuple[int, str]],
    prompts: Sequence[Prompt],
    progress: Callable[[int], object],
) -> tuple[list[Row], NotFinite | None]:
    """The row of each text, and the error of those whose numbers are not finite."""
    error = None
    try:
        scores = classifier.score_prompts(prompts, progress)
    except NotFinite as failure:
        scores, error = np.array(failure.found), failure
        scores[failure.rows] = 0.0
    labels = [classifier.labels[y] for y in scores.argmax(axis=1)]
    probabilities: list = softmax(scores).tolist()
    for row in error.rows if error else ():
        labels[row] = probabilities[row] = None
    found = zip(numbered, labels, probabilities, strict=True)
    return [Row(*text, label, known) for text, label, known in found], error


def csv_rows(labels: Sequence[str]) -> Callable[[Sequence[Row]], str]:
    """What writes rows as CSV, the header and a byte-order mark, for Excel, before the first."""
    heads = [["\ufeffline", "text", "label", *(f"p({label})" for label in labels)]]

    def form(rows: Sequence[Row]) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([heads.pop()] if heads else [])
        for row in rows:
            values = row.probabilities or [None] * len(labels)
            values = ["" if p is None else f"{p:.6g}" for p in values]
            writer.writerow([row.line, row.text, row.label or "", *values])
        return out.getvalue()

    return form


def json_rows(labels: Sequence[str]) -> Callable[[Sequence[Row]], str]:
    """What writes rows as JSON lines: line, text, label, and probabilities by label."""

    def form(rows: Sequence[Row]) -> str:
        known = [r.probabilities and dict(zip(labels, r.probabilities, strict=True)) for r in rows]
        lines = [r._asdict() | {"probabilities": p} for r, p in zip(rows, known, strict=True)]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    return form


def table(labels: Sequence[str]) -> Callable[[Sequence[Row]], str]:
    """What shows rows as a table; the text is clipped on a terminal, and whole elsewhere."""
    terminal = getattr(sys.stdout, "stream", sys.stdout).isatty()
    width = max(5, *(min(columns(label), NARROWEST) for label in labels))
    names = [clipped(f"p({label})", NARROWEST) for label in labels]
    left = LINE - 2 - width - sum(2 + max(6, columns(name)) for name in names)
    best = left < NARROWEST
    if best:
        left, names = LINE - 2 - width - 8, ["p"]
        found = f"{len(labels)} labels are too wide for the table"
        print(f"note: {found}; --output FILE has all probabilities", file=sys.stderr)
    heads = ["label" + " " * (width - 5), *(" " * (6 - columns(name)) + name for name in names)]
    begun = []

    def form(rows: Sequence[Row]) -> str:
        cells = []
        for row in rows:
            values = row.probabilities or [None] * len(names)
            values = [max(values)] if best and row.probabilities else values
            values = ["-" if p is None else f"{p:.4f}" for p in values]
            cells.append([clipped(printable(row.label or "-"), NARROWEST), *values])
        texts = [printable(row.text).replace("\n", "\\n") for row in rows]
        if terminal:
            texts = [clipped(text[: left + 1], left) for text in texts]
        lines = text_table(heads, cells).split("\n")
        shown = [f"{line}  {text}\n" for line, text in zip(lines, ["text", *texts], strict=True)]
        first, begun[:] = len(begun), [True]
        return "".join(shown[first:])

    return form
