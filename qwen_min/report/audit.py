"""Check labelled texts for copies, leaks, contradictory labels, class balance and lengths.

    python -m qwen_min.audit train.tsv
    python -m qwen_min.audit train.tsv test.tsv --list
    python -m qwen_min.audit train.tsv test.tsv --model Qwen/Qwen2.5-1.5B

A trained method may have memorised a test text that is also in the training data. "Normalised"
texts are compared without punctuation, white space and differences in character width.
"""

import argparse
from collections import defaultdict
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
    """A data file: its examples, their texts, and their token counts if there is a tokenizer."""

    name: str
    examples: list[Example]
    texts: dict[str, list[str]]  # "verbatim" and "normalised"
    tokens: list[int] | None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("first", metavar="A", help="a data file, .tsv, .csv or .jsonl")
    add("second", metavar="B", nargs="?", help="another one, such as the test data")
    words = ",".join(DEFAULT_LABELS)
    about = "the word for each class, in class order (0 first)"
    add("--labels", metavar="WORD,WORD", default=words, help=about)
    add("--encoding", default="utf-8", help="of the files")
    add("--model", help="count tokens too: tiny, a directory, or a hub name")
    add(
        "--max-text-tokens",
        type=positive_int,
        metavar="N",
        default=DEFAULT_MAX_TEXT_TOKENS,
        help="with --model, report the texts that have more than N tokens",
    )
    add("--list", action="store_true", help="print every row that was counted")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(audit, build_parser().parse_args(argv))


def audit(args: argparse.Namespace) -> int:
    """Read the files, count, print."""
    labels = parse_labels(args.labels)
    tokenizer = Tokenizer(resolve_model(args.model)) if args.model else None
    names = [name for name in (args.first, args.second) if name is not None]
    if len({Path(name).resolve() for name in names}) < len(names):
        raise UserError(f"{args.second}: given twice; name two files, or one alone")
    files = [read(name, labels, args.encoding, tokenizer) for name in names]
    print(format_audit(files, labels, args.max_text_tokens))
    if args.list:
        print("\n".join(["", *findings(files, labels, args.max_text_tokens)]))
    return 0


def read(name: str, labels: Sequence[str], encoding: str, tokenizer: Tokenizer | None) -> File:
    """Read a data file and compute what all counts need."""
    examples = read_examples(name, labels, encoding)
    texts = [example.text for example in examples]
    tokens = [len(ids) for ids in tokenizer.encode_batch(texts)] if tokenizer else None
    forms = {"verbatim": texts, "normalised": [normalised(text) for text in texts]}
    return File(name, examples, forms, tokens)


def format_audit(files: Sequence[File], labels: Sequence[str], max_tokens: int) -> str:
    """A table of counts with a column for each file; below it, what two files have in common."""
    columns = [file_counts(file, labels, max_tokens) for file in files]
    rows = [[what, *(column[what] for column in columns)] for what in columns[0]]
    names = short_names(files)
    lines = [text_table(["", *names], rows)]
    if len(files) == 2:
        a, b = files
        n = len(b.examples)
        copies = {form: len(stand_in(texts, a.texts[form])) for form, texts in b.texts.items()}
        lines += [
            "",
            f"rows of {names[1]} that stand in {names[0]}: {copies['verbatim']} of {n} verbatim, "
            f"{copies['normalised']} normalised ({copies['normalised'] / n:.1%})",
            f"texts with several labels in the two together: {conflicts(files, 'verbatim')} "
            f"verbatim, {conflicts(files, 'normalised')} normalised",
        ]
    return "\n".join(lines)


def short_names(files: Sequence[File]) -> list[str]:
    """The files' names without directories, unless these are equal."""
    names = [Path(file.name).name for file in files]
    return names if len(set(names)) == len(names) else [file.name for file in files]


def file_counts(file: File, labels: Sequence[str], max_tokens: int) -> dict[str, str]:
    """One file's column of the table: what is counted → the count."""
    n = len(file.examples)
    counts = {"rows": str(n)}
    for word, count in zip(labels, class_counts(file.examples, len(labels)), strict=True):
        counts[f"class {word}"] = f"{count} ({count / n:.1%})"
    lengths = {"characters": [len(example.text) for example in file.examples]}
    if file.tokens is not None:
        lengths["tokens"] = file.tokens
    for unit, values in lengths.items():
        middle, high = np.percentile(values, [50, 95])
        what = f"{unit}: median, 95th percentile, longest"
        counts[what] = f"{middle:.0f}, {high:.0f}, {max(values)}"
    if file.tokens is not None:
        over = sum(tokens > max_tokens for tokens in file.tokens)
        counts[f"texts that the cut at {max_tokens} tokens shortens"] = str(over)
    copies = {form: n - len(set(texts)) for form, texts in file.texts.items()}
    counts["duplicates: rows with an earlier row's text"] = str(copies["verbatim"])
    counts["  the same, normalised"] = str(copies["normalised"])
    counts["texts with several labels"] = str(conflicts([file], "verbatim"))
    counts["  these, normalised"] = str(conflicts([file], "normalised"))
    return counts


def conflicts(files: Sequence[File], form: str) -> int:
    """The number of distinct texts that have several labels, in all files together."""
    labels_of: defaultdict[str, set[int]] = defaultdict(set)
    for file in files:
        for text, example in zip(file.texts[form], file.examples, strict=True):
            labels_of[text].add(example.label)
    return sum(len(labels) > 1 for labels in labels_of.values())


def findings(files: Sequence[File], labels: Sequence[str], max_tokens: int) -> list[str]:
    """A line for each counted row and each reason: file, line, reason, beginning of the text."""
    titles = dict(zip((file.name for file in files), short_names(files), strict=True))
    # (form, text, file name or label) → file name and line of the first such row.
    first: dict[tuple[str, str, str | int], tuple[str, int]] = {}
    for file in files:
        for form, texts in file.texts.items():
            for text, example in zip(texts, file.examples, strict=True):
                for mark in (file.name, example.label):
                    first.setdefault((form, text, mark), (file.name, example.line))

    def twin(file: File, i: int, marks: Iterable[str | int]) -> str | None:
        """Where row i's text occurs again with one of the marks; a verbatim copy comes first."""
        here = (file.name, file.examples[i].line)
        for form, texts in file.texts.items():
            for mark in marks:
                name, line = first.get((form, texts[i], mark), here)
                if (name, line) != here:
                    place = f"line {line}" if name == file.name else f"{titles[name]}, line {line}"
                    return place if form == "verbatim" else f"{place}, {form}"
        return None

    lines = []
    for file in files:
        for i, example in enumerate(file.examples):
            others = [c for c in range(len(labels)) if c != example.label]
            reasons = []
            if place := twin(file, i, [file.name]):
                reasons.append(f"duplicate of {place}")
            if file is not files[0] and (place := twin(file, i, [files[0].name])):
                reasons.append(f"stands in {place}")
            if place := twin(file, i, others):
                reasons.append(f"labelled {labels[example.label]}, otherwise in {place}")
            if file.tokens and file.tokens[i] > max_tokens:
                reasons.append(f"{file.tokens[i]} tokens, cut to {max_tokens}")
            text = " ".join(example.text.split())
            text = text if len(text) <= 40 else text[:39] + "…"
            lines += [f"{file.name}, line {example.line}: {why}: {text}" for why in reasons]
    return lines
