"""Labelled texts from a file: read, checked, hashed, split.

Texts are never altered: only a byte-order mark and the `\\r` that ends a line are dropped. A row
that does not fit is an error with its line number, and blank rows are counted, because a row
skipped in silence would change every metric that is computed from the file.
"""

import hashlib
import io
import json
import re
import reprlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, redirect_stderr
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from qwen_min.errors import UserError
from qwen_min.files.tables import note, read_table
from qwen_min.prompt import DEFAULT_LABELS, parse_labels

READINGS = ("words", "class numbers")  # of the labels in a file
MOST_LABELS = 1000  # more in one file are hardly classes
NUMBER = re.compile(r"[-+.\d]+")  # a label word that a class number could be taken for

# Share of the training rows. They alone choose penalty, layer, checkpoint and temperature.
HELD_OUT = 0.1


@dataclass(frozen=True)
class Example:
    """A text, its class index in 0..C-1, and the line (from 1) of the file where its row starts.

    read_as: one of READINGS, what the file's labels were read as.
    """

    text: str
    label: int
    line: int
    read_as: str | None = field(default=None, compare=False)


def read_examples(
    path: str | Path,
    labels: Sequence[str],
    encoding: str | None = None,
    limit: int | None = None,
    read_as: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    empty_texts: bool = False,
) -> list[Example]:
    """The examples of a data file, in file order; encoding and columns as in `read_table`.

    Separated by tabs: a header row; fields are not quoted, `"` is an ordinary character, unless the
    header is quoted.
    Separated by commas or semicolons: a header row; quoted fields may contain these, newlines and
    doubled quotes (RFC 4180). JSON: one object a line, or a list. Other columns are ignored.
    empty_texts: whether a text may be empty.

    Labels are the words in `labels` or the indices 0..C-1, one kind for the whole file, without
    white space around them. A JSON number counts as its digits, so all formats give the same
    classes. If every label fits both kinds (words that are digits), they are words. If the kinds
    would give different classes, stderr gets a note of the kind that was taken.

    read_as: one of READINGS, what the labels of data are read as that belongs to this data. Where a
    word of `labels` is a number, no other reading is taken. (Elsewhere the two cannot be confused.)

    With `limit`, only the first `limit` rows are checked. If their labels fit both kinds, with
    different classes, the rows after them are read too, because the whole file decides. The
    encoding is always checked for the whole file.

    Raises UserError, one line that names the file and if possible the line in it.
    """
    path = Path(path)
    table = read_table(path, encoding, text_column, label_column, empty_texts=empty_texts)
    with closing(table):
        rows = list(islice(table, limit and min(limit, sys.maxsize)))
        if not rows:
            raise UserError(f"{path}: found no rows, expected examples: give the right file")
        classes, read_as = _class_indices(path, rows, table, labels, read_as)
    return [Example(row[1], y, row[0], read_as) for row, y in zip(rows, classes, strict=True)]


def parse_names(
    argument: str, say: Callable | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """--labels → the classes' names, as in the file, and the words that are scored, in class order.

    "negative= negative,positive= positive" → ("negative", "positive"), (" negative", " positive").
    A name without `=` is its own word. White space before a word counts only after `=`; without
    any `=`, all is as in `parse_labels`. Raises UserError as `parse_labels` does.
    """
    if "=" not in argument:
        return (parse_labels(argument, say=say),) * 2
    typed = re.split("[,，]" if re.search("[,，]", argument) else "、", argument)
    names = parse_labels(",".join(piece.partition("=")[0].strip() for piece in typed))
    words = tuple((p.partition("=")[2] if "=" in p else p.strip()).rstrip() for p in typed)
    if "" in words or len({*words}) < len(words):
        found = "a word is empty or repeats"
        raise UserError(f"--labels {argument!r}: {found}; give each class a word of its own")
    return names, words


def find_labels(path: str | Path | None, *how: str | None) -> str:
    """What --labels would be for a file: the default, or else the file's own labels, sorted.

    The default fits no file (None), and a file with no labels but its words and their indices.
    how: encoding and columns, as in `read_table`. Numbers are sorted by value. stderr gets a line
    that says which labels were taken. Raises UserError as `read_examples` does, and for labels that
    cannot be those of classes.
    """
    table = read_table(path, *how) if path else ()
    with redirect_stderr(io.StringIO()):  # its notes come when the examples are read
        counts = Counter(label for *_, label in table)
    if counts.keys() <= {*DEFAULT_LABELS, "0", "1"}:
        return ",".join(DEFAULT_LABELS)
    numbers = all(re.fullmatch(r"[-+]?\d+(\.\d+)?", label) for label in counts)
    found = sorted(counts, key=float if numbers else None)
    odd = [label for label in found if not label or re.search("[,，=]", label)]
    shown = [f"{reprlib.repr(label)[1:-1]} ({counts[label]})" for label in (odd or found)[:10]]
    said = ", ".join(shown) + f", … {len(found)} in all" * (len(found) > 10)
    if odd or not 2 <= len(found) <= MOST_LABELS:
        expected = f"expected 2 to {MOST_LABELS:,} words without comma and ="
        advice = "correct them, name their column by --label-column, or all words by --labels"
        raise UserError(f"{path}: found the labels {said}, {expected}: {advice}")
    named = ",".join(f"{label}=WORD" for label in found[:2])
    advice = f"; to score words with a meaning: --labels '{named},…'" * numbers
    note(str(path), f"--labels are the file's own, with their rows: {said}{advice}")
    return ",".join(found)


def examples_hash(examples: Sequence[Example]) -> str:
    """SHA-256 in hex over the texts and labels in order, the same for every file format.

    Each example is hashed as one line of ASCII JSON, `[text, label]`. JSON escapes a newline inside
    a text, so different examples always give different bytes.
    """
    lines = [json.dumps([example.text, example.label]) + "\n" for example in examples]
    return hashlib.sha256("".join(lines).encode("ascii")).hexdigest()


def held_out_split(
    examples: Sequence[Example], fraction: float = HELD_OUT, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Indices of the rows to train on, and of the share `fraction` held out; both ascending.

    Rows with the same text stay on one side, whatever their labels: with a copy in training, the
    held-out part would measure memory. The distinct texts are ranked by the SHA-256 of seed and
    text, and held out in that order until the share is full; a text with more copies than still fit
    is skipped. A text's rank depends on nothing else: not on Python's version, nor on other rows.
    New rows therefore move few others across, whereas a shuffle would deal all of them again.
    A text is also skipped if no other text of a class would be left to train on; if that is so of
    every text, a class is lost.

    fraction: between 0 and 1. Raises UserError unless there are at least two distinct texts.
    """
    rows_of = defaultdict(list)
    for index, example in enumerate(examples):
        rows_of[example.text].append(index)
    if len(rows_of) < 2:
        raise UserError(f"found {len(rows_of)} distinct texts, at least 2 are needed: add data")
    ranked = sorted(rows_of, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    share = min(round(fraction * len(examples)), len(examples) - 1)
    labels_of = {t: Counter(examples[i].label for i in rows) for t, rows in rows_of.items()}
    left = Counter(example.label for example in examples)  # rows of each class to train on

    def last_of_class(text: str) -> bool:
        return any(left[y] == n for y, n in labels_of[text].items())

    held_out: list[int] = []
    for text in ranked:
        if len(held_out) + len(rows_of[text]) <= share and not last_of_class(text):
            held_out += rows_of[text]
            left -= labels_of[text]
    if not held_out:  # no text fits: the share may be 0, or every text may have more copies
        held_out = rows_of[min(ranked, key=lambda text: (last_of_class(text), len(rows_of[text])))]
    return sorted(set(range(len(examples))) - set(held_out)), sorted(held_out)


def _class_indices(
    path: Path, rows: list, rest: Iterator, labels: Sequence[str], read_as: str | None
) -> tuple[list[int], str]:
    """One class index for each of `rows`: (line, text, label); and the reading that was taken.

    The whole file decides between words and indices: `rest`, the rows after these, is read only if
    it can change the classes. read_as: as in `read_examples`.
    """
    words = {word.strip(): i for i, word in enumerate(labels)}
    numbers = {str(i): i for i in range(len(labels))}
    shown = (f"words ({', '.join(labels)})", f"class numbers (0..{len(labels) - 1})")
    shown = dict(zip(READINGS, shown, strict=True))
    kinds = dict(zip(READINGS, (words, numbers), strict=True))
    both = words.keys() & numbers.keys()
    differ = {label for label in both if words[label] != numbers[label]}
    count, asked, found = len(rows), read_as, {label for *_, label in rows}
    expected = f"{shown.get(read_as)}, as in the training data or the other file"
    if read_as is None or not any(map(NUMBER.fullmatch, words)):
        expected = f"{' or '.join(shown.values())}, one kind in all rows"
        if found <= both and found & differ:
            rows = [*rows, *rest]
            found = {label for *_, label in rows}
        # the kind that fits more rows from the start is the file's; words if both fit
        fits = {kind: [*(row[2] in kinds[kind] for row in rows), False] for kind in kinds}
        read_as = max(kinds, key=lambda kind: fits[kind].index(False))
    for line, _, label in rows:
        if label not in kinds[read_as]:
            wrong = f"found the label {reprlib.repr(label)}, expected {expected}"
            advice = "correct it, or name the words with --labels"
            raise UserError(f"{path}, line {line}: {wrong}: {advice}")
    if (asked, read_as) == READINGS:  # the run was trained on words, in the order of its labels
        named = ", ".join(f"{y} = {label}" for y, label in enumerate(labels[:10]))
        note(str(path), f"labels are class numbers: {named}{', …' * (len(labels) > 10)}")
    if found <= numbers.keys() and found & differ:
        both = "some labels are both a word of --labels and the number of another class"
        note(str(path), f"{both}; all are read as {shown[read_as]}")
    return [kinds[read_as][label] for *_, label in rows[:count]], read_as
