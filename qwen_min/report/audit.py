"""What a careful reader asks of labelled texts: copies, leaks, contradictions, balance, lengths.

    python -m qwen_min.audit train.tsv
    python -m qwen_min.audit train.tsv test.tsv --list
    python -m qwen_min.audit train.tsv test.tsv --model Qwen/Qwen2.5-1.5B

A text that stands in the training data as well is one that a trained method may have memorised.
"Normalised" texts are equal up to the width of characters, white space and punctuation.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_min.command.cli import make_parser, positive_int, run_command
from qwen_min.command.terminal import text_table
from qwen_min.errors import UserError
from qwen_min.files.data import Example, class_counts, read_examples
from qwen_min.files.hub import resolve_model
from qwen_min.files.overlap import normalised, stand_in
from qwen_min.prompt import DEFAULT_LABELS, DEFAULT_MAX_TEXT_TOKENS, parse_labels
from qwen_min.tokenizer import Tokenizer


@dataclass(frozen=True)
class File:
    """A file's examples, their normalised texts, and their tokens where there is a tokenizer."""

    name: str
    examples: list[Example]
    keys: list[str]
    tokens: list[int] | None


def build_parser() -> argparse.ArgumentParser:
    """The command line, grouped as `--help` shows it."""
    parser = make_parser(__doc__)
    parser.add_argument("first", metavar="A", help="a data file, .tsv, .csv or .jsonl")
    parser.add_argument("second", metavar="B", nargs="?", help="another, such as the test data")
    parser.add_argument(
        "--labels",
        metavar="WORD,WORD",
        default=",".join(DEFAULT_LABELS),
        help="the word for each class, in class order (0 first)",
    )
    parser.add_argument("--encoding", default="utf-8", help="of the files")
    parser.add_argument("--model", help="count tokens too: tiny, a directory, or a hub name")
    parser.add_argument(
        "--max-text-tokens",
        type=positive_int,
        metavar="N",
        default=DEFAULT_MAX_TEXT_TOKENS,
        help="the cut: with --model, the texts with more tokens are counted",
    )
    parser.add_argument("--list", action="store_true", help="print every row that was counted")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(audit, build_parser().parse_args(argv))


def audit(args: argparse.Namespace) -> int:
    """Read, count, print."""
    labels = parse_labels(args.labels)
    tokenizer = Tokenizer(resolve_model(args.model)) if args.model else None
    names = [args.first] + [args.second] * (args.second is not None)
    if len({Path(name).resolve() for name in names}) < len(names):
        raise UserError(f"{args.second}: given twice; name two files, or one alone")
    files = [read(name, labels, args.encoding, tokenizer) for name in names]
    print(format_audit(files, labels, args.max_text_tokens))
    if args.list:
        print("\n".join(["", *findings(files, labels, args.max_text_tokens)]))
    return 0


def read(name: str, labels: Sequence[str], encoding: str, tokenizer: Tokenizer | None) -> File:
    """A file with what every count below needs."""
    examples = read_examples(name, labels, encoding)
    texts = [example.text for example in examples]
    tokens = [len(ids) for ids in tokenizer.encode_batch(texts)] if tokenizer else None
    return File(name, examples, [normalised(text) for text in texts], tokens)


def format_audit(files: Sequence[File], labels: Sequence[str], max_tokens: int) -> str:
    """Every count as a table with a column for each file; below it what they have in common."""
    columns = [file_counts(file, labels, max_tokens) for file in files]
    rows = [[what, *(column[what] for column in columns)] for what in columns[0]]
    names = short_names(files)
    lines = [text_table(["", *names], rows)]
    if len(files) == 2:
        a, b = files
        exact = len(stand_in([e.text for e in b.examples], [e.text for e in a.examples]))
        near = len(stand_in(b.keys, a.keys))
        n = len(b.examples)
        lines += [
            "",
            f"rows of {names[1]} that stand in {names[0]}: {exact} of {n} verbatim, "
            f"{near} normalised ({near / n:.1%})",
            f"texts with several labels in the two together: {len(conflicts(files, True))} "
            f"verbatim, {len(conflicts(files, False))} normalised",
        ]
    return "\n".join(lines)


def short_names(files: Sequence[File]) -> list[str]:
    """The files' names without their directories, where that tells them apart."""
    names = [Path(file.name).name for file in files]
    return names if len(set(names)) == len(names) else [file.name for file in files]


def file_counts(file: File, labels: Sequence[str], max_tokens: int) -> dict[str, str]:
    """One file's column of the table: what is counted, and the count."""
    n = len(file.examples)
    texts = [example.text for example in file.examples]
    counts = {"rows": str(n)}
    for word, count in zip(labels, class_counts(file.examples, len(labels)), strict=True):
        counts[f"class {word}"] = f"{count} ({count / n:.1%})"
    lengths = {"characters": [len(text) for text in texts]}
    if file.tokens is not None:
        lengths["tokens"] = file.tokens
    for unit, values in lengths.items():
        middle, high = np.percentile(values, [50, 95])
        what = f"{unit}: median, 95th percentile, longest"
        counts[what] = f"{middle:.0f}, {high:.0f}, {max(values)}"
    if file.tokens is not None:
        over = sum(tokens > max_tokens for tokens in file.tokens)
        counts[f"texts that the cut at {max_tokens} tokens shortens"] = str(over)
    counts["duplicates: rows with an earlier row's text"] = str(n - len(set(texts)))
    counts["  the same, normalised"] = str(n - len(set(file.keys)))
    counts["texts with several labels"] = str(len(conflicts([file], True)))
    counts["  these, normalised"] = str(len(conflicts([file], False)))
    return counts


def conflicts(files: Sequence[File], exact: bool) -> set[str]:
    """The texts (or normalised texts) that stand with several labels, in one file or in two."""
    first: dict[str, int] = {}
    found = set()
    for file in files:
        for key, example in zip(file.keys, file.examples, strict=True):
            text = example.text if exact else key
            if first.setdefault(text, example.label) != example.label:
                found.add(text)
    return found


def findings(files: Sequence[File], labels: Sequence[str], max_tokens: int) -> list[str]:
    """A line for each row that was counted and for each reason: file, line, reason, text."""
    rows = [
        (file, example, {"": example.text, ", normalised": key})
        for file in files
        for example, key in zip(file.examples, file.keys, strict=True)
    ]
    names = dict(zip((file.name for file in files), short_names(files), strict=True))
    # The first row of a text in a file (a name), and with a label (a number).
    first: dict[tuple[str, str, str | int], tuple[File, Example]] = {}
    for file, example, forms in rows:
        for form in forms.items():
            first.setdefault((*form, file.name), (file, example))
            first.setdefault((*form, example.label), (file, example))

    def twin(row: tuple, marks: Iterable[str | int]) -> str | None:
        """Where the same text stands as another row, verbatim if there is such a place."""
        for form in row[2].items():
            for mark in marks:
                file, example = first.get((*form, mark), row[:2])
                if example is not row[1]:
                    within = "" if file is row[0] else f"{names[file.name]}, "
                    return f"{within}line {example.line}{form[0]}"
        return None

    lines = []
    token_counts = [n for file in files for n in file.tokens or [0] * len(file.examples)]
    for row, tokens in zip(rows, token_counts, strict=True):
        file, example, _ = row
        others = [c for c in range(len(labels)) if c != example.label]
        reasons = []
        if place := twin(row, [file.name]):
            reasons.append(f"duplicate of {place}")
        if file is not files[0] and (place := twin(row, [files[0].name])):
            reasons.append(f"stands in {place}")
        if place := twin(row, others):
            reasons.append(f"labelled {labels[example.label]}, otherwise in {place}")
        if tokens > max_tokens:
            reasons.append(f"{tokens} tokens, cut to {max_tokens}")
        text = " ".join(example.text.split())
        text = text if len(text) <= 40 else text[:39] + "…"
        lines += [f"{file.name}, line {example.line}: {reason}: {text}" for reason in reasons]
    return lines
