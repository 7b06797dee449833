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
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

from qwen_min.command.cli import make_parser, parse_with_given, ranks, run_command
from qwen_min.command.finite import NotFinite
from qwen_min.command.interface import Classifier, add_classifier_arguments, read_source
from qwen_min.command.terminal import WIDTH, clipped, columns, one_line, progress_bar, text_table
from qwen_min.errors import UserError
from qwen_min.files.output import RowFile, open_outputs
from qwen_min.files.tables import read_table
from qwen_min.metrics import softmax

Row = tuple[int, str, str, list[float]]  # line, text, label, probability of each class (C,)


def build_parser() -> argparse.ArgumentParser:
    """The command-line arguments, grouped as `--help` shows them."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("texts", metavar="TEXTS", nargs="?", help="a file of texts, or - for standard input")
    add("--text", action="append", metavar="TEXT", help="one text instead of TEXTS; repeatable")
    add("--encoding", help="of the file of texts")
    add("--text-column", metavar="NAME", help="of the file of texts")
    add("--output", metavar="FILE", help="write a .csv, for Excel too, or a .jsonl")
    add_classifier_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, given = parse_with_given(build_parser(), argv)
    return run_command(lambda args: predict(args, given), args)


def predict(args: argparse.Namespace, given: dict) -> int:
    """Read, load, then chunk by chunk score and write."""
    if (args.texts is None) == (args.text is None):
        raise UserError("expected TEXTS, a file or - for standard input, or else --text")
    if args.texts == "-" and ranks():
        raise UserError("standard input reaches a single process only; name a file of texts")
    form = FORMS.get(Path(args.output).suffix) if args.output else table_rows
    if form is None:
        raise UserError(f"--output {args.output}: expected a name that ends in .csv or .jsonl")
    source = read_source(args, given)
    source.compare()
    inputs = [source.task.directory, args.adapter, args.run, args.run and f"{args.run}/adapter"]
    inputs.append(args.calibration)
    open_outputs([args.output], [*inputs, args.texts if args.texts != "-" else None])
    write = RowFile(args.output).append if args.output else partial(print, end="", flush=True)
    texts = enumerate(args.text or (), start=1)
    if args.texts:
        table = read_table(args.texts, args.encoding, args.text_column, labelled=False)
        texts = ((line, text) for line, text, _ in table)
    place = "standard input" if args.texts == "-" else args.texts or "--text"
    first = next(texts, None)  # a file that is missing fails before the model is loaded
    if not first:
        raise UserError(f"{place}: found no texts; give at least one")
    texts = chain([first], texts)
    classifier = Classifier.load(source)
    labels, n, shortened, started = classifier.labels, 0, 0, time.perf_counter()

    def rows() -> Iterator[Row]:
        nonlocal shortened
        # A chunk is read, scored and written together. With prompts of 64 tokens it fills 16
        # batches: most are full, of texts of like length, and a slow model that is stopped loses
        # seconds.
        while numbered := list(islice(texts, 1 + args.batch_tokens // 4)):
            places = [f"{place}, line {line}" for line, _ in numbered]
            prompts = source.task.prompts([text for _, text in numbered], places)
            try:
                scores = classifier.score_prompts(prompts, bar.update)
            except NotFinite as failure:
                line, _ = numbered[failure.rows[0]]
                raise UserError(f"{place}, line {line}: {failure}") from None
            for text, own, p in zip(numbered, scores, softmax(scores).tolist(), strict=True):
                yield *text, labels[own.argmax()], p
            shortened += sum(prompt.truncated for prompt in prompts)

    try:
        with progress_bar(desc="texts", disable=not args.output) as bar:
            for line in form(labels, rows()):  # one by one: a killed process leaves whole rows
                write(line)
                n += 1
                if getattr(sys.stdout, "failure", None):  # nobody reads on, as with `| head`
                    break
    finally:  # also if an error or Ctrl-C ends it
        said = f"{n} texts, {n / (time.perf_counter() - started):.1f} rows/s"
        said += f", written to {args.output}" * bool(args.output)
        most = f"; {shortened} shortened to their first {args.max_text_tokens} tokens"
        if n:
            print(said + most * bool(shortened), file=sys.stderr)
    return 0


def csv_rows(labels: Sequence[str], rows: Iterable[Row]) -> Iterator[str]:
    """CSV. The first row has the header before it, and a byte-order mark, for Excel."""
    # Its own line ends: with "\n" alone, a "\r" inside a text would not be quoted.
    as_line = csv.writer(SimpleNamespace(write=str)).writerow  # returns what `write` does
    head = as_line(["\ufeffline", "text", "label", *(f"p({label})" for label in labels)])
    for *row, probabilities in rows:
        yield head + as_line([*row, *(f"{p:.6g}" for p in probabilities)])
        head = ""


def json_rows(labels: Sequence[str], rows: Iterable[Row]) -> Iterator[str]:
    """JSON lines: line, text, label, and probabilities by label."""
    for line, text, label, probabilities in rows:
        row = {"line": line, "text": text, "label": label}
        row["probabilities"] = dict(zip(labels, probabilities, strict=True))
        yield json.dumps(row, ensure_ascii=False) + "\n"


def table_rows(labels: Sequence[str], rows: Iterable[Row]) -> Iterator[str]:
    """Lines for a terminal, the texts clipped. Of many labels only the predicted one's p fits."""
    names = [f"p({label})" for label in labels]
    fits = sum(columns(name) + 2 for name in names) <= WIDTH * 3 // 4
    heads = ["label".ljust(max(map(columns, labels))), *(names if fits else ["p"]), "text"]
    for i, (_, text, label, probabilities) in enumerate(rows):
        shown = probabilities if fits else [max(probabilities)]
        cells = [label, *(f"{p:.4f}" for p in shown), one_line(text)[:WIDTH]]
        lines = text_table(heads, [cells], words=len(heads)).split("\n")
        yield "".join(clipped(line, WIDTH) + "\n" for line in lines[i > 0 :])


FORMS = {".csv": csv_rows, ".jsonl": json_rows}
