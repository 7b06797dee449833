"""What a careful reader asks of labelled texts: copies, leaks, contradictions, balance, lengths.

    python -m qwen_min.audit train.tsv
    python -m qwen_min.audit train.tsv test.tsv --list
    python -m qwen_min.audit train.tsv test.tsv --model Qwen/Qwen2.5-1.5B

A text that stands in the training data as well is one that a trained method may have memorised.
"Normalised" texts are equal up to the width of characters, white space and punctuation.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category, normalize

import numpy as np
from safetensors.numpy import load_file

from qwen_min.cli import make_parser, positive_int, run_command
from qwen_min.data import Example, class_counts, examples_hash, read_examples
from qwen_min.errors import UserError
from qwen_min.hub import resolve_model
from qwen_min.metrics import wilson_interval
from qwen_min.prompt import DEFAULT_LABELS, DEFAULT_MAX_TEXT_TOKENS, parse_labels
from qwen_min.table import text_table
from qwen_min.tokenizer import Tokenizer

FED = "fed.safetensors"  # in a model's directory: `text_hashes` of what it was made from


class _Dropped(dict):
    """For str.translate: None (to be removed) for punctuation, white space and the invisible."""

    def __missing__(self, code: int) -> int | None:
        # Unicode's categories P, Z and C; tabs and newlines are Cc, a zero-width space is Cf.
        self[code] = None if category(chr(code))[0] in "PZC" else code
        return self[code]


_DROPPED = _Dropped()


def normalised(text: str) -> str:
    """The key by which two texts count as one: NFKC, without white space and punctuation.

    A text that has nothing else ("？！") keeps its punctuation: it is not every such text's copy.
    """
    whole = normalize("NFKC", text)
    return whole.translate(_DROPPED) or "".join(whole.split())


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


def stand_in(texts: Iterable[str], known: Iterable[str]) -> list[int]:
    """Indices of the texts that are among the known ones."""
    known = set(known)
    return [i for i, text in enumerate(texts) if text in known]


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


def training_examples(
    file: str | None, encoding: str, labels: Sequence[str], record: dict | None
) -> tuple[str, list[Example]] | None:
    """The file that holds the training data, and its rows; None where there is none to read.

    file: as the user names it; without it the one that a run, `record`, says it was trained on. If
    that is gone or has changed, stderr says so: the evaluation goes on without.
    """
    if file is not None:
        return file, read_examples(file, labels, encoding)
    if record is None:
        return None
    arguments = record["arguments"]
    file = arguments["data"]
    try:
        own = parse_labels(arguments["labels"])
        examples = read_examples(file, own, arguments["encoding"], arguments["limit"])
        if examples_hash(examples) != record["data_hash"]:
            raise UserError(f"{file}: has changed since the run was trained on it")
    except UserError as error:
        print(
            f"note: no accuracy on the part that is not in the training data: {error} "
            "(--train-data FILE names it)",
            file=sys.stderr,
        )
        return None
    return file, examples


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """Eight bytes of SHA-256 of each normalised text, (distinct texts,) int64, in ascending order.

    Enough to recognise a text, and nothing that it could be read from.
    """
    digests = (hashlib.sha256(normalised(text).encode()).digest()[:8] for text in texts)
    return np.unique(np.frombuffer(b"".join(digests), dtype="<i8"))


def fed_rows(directory: Path, examples: Sequence[Example]) -> list[int]:
    """Indices of the examples that the model in `directory` was itself made from.

    By the hashes in its file FED: a model without the file does not say, and none are found. If
    there are any, stderr says how many.
    """
    if not (path := directory / FED).exists():
        return []
    known = load_file(path)["texts"]
    fed = [i for i, e in enumerate(examples) if np.isin(text_hashes([e.text]), known).all()]
    if fed:
        print(
            f"warning: {len(fed)} of these {len(examples)} texts are among those that the model "
            f"in {directory} was itself made from; figures on them say nothing about new texts",
            file=sys.stderr,
        )
    return fed


def clean_part(
    training: tuple[str, list[Example]] | None,
    examples: Sequence[Example],
    predictions: Sequence[int],
    fed: Sequence[int] = (),
) -> dict | None:
    """Accuracy on the examples that neither training nor the model's own making has seen.

    training: see `training_examples`; a text counts as seen exact or normalised. fed: as `fed_rows`
    finds them. None without either. predictions: (n,), class numbers. Accuracy and interval are
    None where no row is clean.
    """
    sources, seen = [], set(fed)
    if training is not None:
        sources.append(training[0])
        # Texts that are equal are equal normalised.
        known = (normalised(row.text) for row in training[1])
        seen.update(stand_in((normalised(e.text) for e in examples), known))
    if fed:
        sources.append("what the model itself was made from")
    if not sources:
        return None
    right = [e.label == p for e, p in zip(examples, predictions, strict=True)]
    clean = [hit for i, hit in enumerate(right) if i not in seen]
    correct, n = sum(map(int, clean)), len(clean)
    return {
        "train_data": " or ".join(sources),
        "n": n,
        "accuracy": correct / n if n else None,
        "accuracy_interval": list(wilson_interval(correct, n)) if n else None,
    }


if __name__ == "__main__":
    sys.exit(main())
