"""Check labelled texts for copies, leaks, contradictory labels, class balance and lengths.

    python -m qwen_min.audit train.tsv
    python -m qwen_min.audit train.tsv test.tsv --list
    python -m qwen_min.audit train.tsv test.tsv --model Qwen/Qwen2.5-1.5B

A trained method may have memorised a test text that is also in the training data. "Normalised"
texts are compared without punctuation, white space and differences in character width.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwen_min.command.cli import make_parser, positive_int, run_command
from qwen_min.command.terminal import WIDTH, clipped, text_table
from qwen_min.files.data import Example, find_labels, parse_names, read_examples
from qwen_min.files.hub import resolve_model
from qwen_min.files.overlap import normalised, stand_in
from qwen_min.files.tokens import read_tokenizer
from qwen_min.prompt import DEFAULT_MAX_TEXT_TOKENS
from qwen_min.tokenizer import Tokenizer

FORMS = ("verbatim", "normalised")


class File(NamedTuple):
    """A data file: its examples, their texts, and their token counts if there is a tokenizer."""

    name: str
    examples: list[Example]
    texts: dict[str, list[str]]  # by form
    tokens: list[int] | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("first", metavar="A", help="a data file: .tsv, .csv, .xlsx, .json or JSON lines")
    add("second", metavar="B", nargs="?", help="another one, such as the test data")
    about = "the word for each class, in class order (default: 负面,正面, or A's own labels)"
    add("--labels", metavar="WORD,WORD", help=about)
    for name in ("--text-column", "--label-column", "--encoding"):
        add(name, metavar="NAME", help="of the files (default: the usual ones)")
    add("--model", help="count tokens too: tiny, a directory, or a hub name")
    count = {"type": positive_int, "metavar": "N", "default": DEFAULT_MAX_TEXT_TOKENS}
    about = "with --model, report the texts that have more than N tokens"
    add("--max-text-tokens", **count, help=about)
    add("--list", action="store_true", help="print every row that was counted")
    return run_command(audit, parser.parse_args(argv))


def audit(args: argparse.Namespace) -> int:
    """Read the files, count, print."""
    columns = (args.text_column, args.label_column)
    labels = parse_names(args.labels or find_labels(args.first, args.encoding, *columns))[0]
    tokenizer = read_tokenizer(resolve_model(args.model)) if args.model else None
    names = [args.first, *filter(None, [args.second])]
    files, read_as = [], None
    for name in names:  # what the labels of the first file are read as holds for the second
        examples = read_examples(name, labels, args.encoding, None, read_as, *columns, True)
        read_as = examples[0].read_as
        files.append(file_of(name, examples, tokenizer))
    print(format_audit(files, labels, args.max_text_tokens))
    if args.list:
        print("\n".join(["", *findings(files, labels, args.max_text_tokens)]))
    return 0


def file_of(name: str, examples: list[Example], tokenizer: Tokenizer | None) -> File:
    """A data file with what all counts need."""
    texts = [example.text for example in examples]
    tokens = [len(tokenizer.encode(text)) for text in texts] if tokenizer else None
    forms = (texts, [normalised(text) for text in texts])
    return File(name, examples, dict(zip(FORMS, forms, strict=True)), tokens)


def short_names(files: Sequence[File]) -> list[str]:
    """The files' names without directories, unless these are equal."""
    names = [Path(file.name).name for file in files]
    return names if len(set(names)) == len(names) else [file.name for file in files]


def format_audit(files: Sequence[File], labels: Sequence[str], max_tokens: int) -> str:
    """A table of counts with a column for each file; below it, what two files have in common."""
    columns = [file_counts(file, labels, max_tokens) for file in files]
    rows = [[what, *(str(column[what]) for column in columns)] for what in columns[0]]
    names = short_names(files)
    table = text_table(["", *names], rows)
    if len(files) == 1:
        return table
    copies, same = (len(stand_in(files[1].texts[form], files[0].texts[form])) for form in FORMS)
    n = len(files[1].examples)
    verbatim, normal = (conflicts(files, form) for form in FORMS)
    return (
        f"{table}\n\nrows of {names[1]} that stand in {names[0]}: {copies} of {n} verbatim, "
        f"{same} normalised ({same / n:.1%})\n"
        f"texts with several labels in the two together: {verbatim} verbatim, {normal} normalised"
    )


def file_counts(file: File, labels: Sequence[str], max_tokens: int) -> dict[str, str | int]:
    """One file's column of the table: what is counted → the count."""
    n, texts = len(file.examples), file.texts
    counts: dict[str, str | int] = {"rows": n}
    rows_of = Counter(example.label for example in file.examples)
    for y, word in enumerate(labels):
        counts[f"class {word}"] = f"{rows_of[y]} ({rows_of[y] / n:.1%})"
    lengths = {"characters": [len(text) for text in texts["verbatim"]], "tokens": file.tokens}
    for unit, values in lengths.items():
        if values:
            middle, high = np.percentile(values, [50, 95])
            spread = f"{middle:.0f}, {high:.0f}, {max(values)}"
            counts[f"{unit}: median, 95th percentile, longest"] = spread
    if file.tokens:
        over = sum(tokens > max_tokens for tokens in file.tokens)
        counts[f"texts that the cut at {max_tokens} tokens shortens"] = over
    return counts | {
        "duplicates: rows with an earlier row's text": n - len(set(texts["verbatim"])),
        "  the same, normalised": n - len(set(texts["normalised"])),
        "texts with several labels": conflicts([file], "verbatim"),
        "  these, normalised": conflicts([file], "normalised"),
    }


def conflicts(files: Sequence[File], form: str) -> int:
    """The number of distinct texts that have several labels, in all files together."""
    rows = [row for file in files for row in zip(file.texts[form], file.examples, strict=True)]
    labels_of = Counter(text for text, _ in {(text, example.label) for text, example in rows})
    return sum(labels > 1 for labels in labels_of.values())


def findings(files: Sequence[File], labels: Sequence[str], max_tokens: int) -> list[str]:
    """A line for each counted row and each reason: file, line, reason, beginning of the text."""
    titles = dict(zip((file.name for file in files), short_names(files), strict=True))
    # (form, text, file name or label) → file name and line of the first such row.
    first: dict[tuple[str, str, str | int], tuple[str, int]] = {}
    for file, form in product(files, FORMS):
        for text, example in zip(file.texts[form], file.examples, strict=True):
            for mark in (file.name, example.label):
                first.setdefault((form, text, mark), (file.name, example.line))

    def twin(file: File, i: int, marks: Sequence[str | int]) -> str | None:
        """Where row i's text occurs again with one of the marks; a verbatim copy comes first."""
        here = (file.name, file.examples[i].line)
        for form, mark in product(FORMS, marks):
            name, line = first.get((form, file.texts[form][i], mark), here)
            if (name, line) != here:
                place = f"line {line}" if name == file.name else f"{titles[name]}, line {line}"
                return place if form == "verbatim" else f"{place}, {form}"
        return None

    lines = []
    for file in files:
        earlier = [] if file is files[0] else [files[0].name]
        for i, example in enumerate(file.examples):
            others = [c for c in range(len(labels)) if c != example.label]
            labelled = f"labelled {labels[example.label]}, otherwise in"
            marks = {"duplicate of": [file.name], "stands in": earlier, labelled: others}
            reasons = [f"{what} {at}" for what, of in marks.items() if (at := twin(file, i, of))]
            if file.tokens and file.tokens[i] > max_tokens:
                reasons.append(f"{file.tokens[i]} tokens, cut to {max_tokens}")
            text = clipped(" ".join(example.text.split()), WIDTH)
            lines += [f"{file.name}, line {example.line}: {why}: {text}" for why in reasons]
    return lines
