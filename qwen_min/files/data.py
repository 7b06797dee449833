"""Labelled texts from a file: read, checked, hashed, split.

Texts are never altered: only a byte-order mark, the `\\r` that ends a line, and blank lines at the
end of the file are dropped. A row that does not fit is an error with its line number, because a row
skipped in silence would change every metric that is computed from the file.
"""

import codecs
import csv
import hashlib
import io
import json
import os
import re
import reprlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qwen_min.errors import UserError
from qwen_min.files.disk import one_line_error

# Share of the training rows. They alone choose penalty, layer, checkpoint and temperature.
HELD_OUT = 0.1


@dataclass(frozen=True)
class Example:
    """A text, its class index in 0..C-1, and the line (from 1) of the file where its row starts."""

    text: str
    label: int
    line: int


def read_examples(
    path: str | Path, labels: Sequence[str], encoding: str = "utf-8", limit: int | None = None
) -> list[Example]:
    """The examples of a .tsv, .csv or .jsonl file, in file order.

    .tsv: a header row; fields are separated by tabs and not quoted, `"` is an ordinary character.
    .csv: a header row; quoted fields may contain commas, newlines and doubled quotes (RFC 4180).
    .jsonl: one object a line. In each, the names are `label` and `text_a` (or `text`); others are
    ignored. Labels are the words in `labels` or the indices 0..C-1, one kind for the whole file.
    If every label fits both (words that are digits), they are words.

    With `limit`, only the first `limit` rows are checked, and only they decide which kind the
    labels are; the encoding is checked for the whole file.

    Raises UserError, one line that names the file and if possible the line in it.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}, expected at least 1 row: give a positive number")
    suffix = path.suffix.lower()
    if os.path.isfile(path) and suffix not in (".tsv", ".csv", ".jsonl"):
        raise UserError(f"{path}: extension {suffix!r}, expected .tsv, .csv or .jsonl: rename it")
    records = _records(path, _decode(path, encoding))
    # islice refuses numbers above sys.maxsize; --limit may be one.
    rows = list(islice(records, limit and min(limit, sys.maxsize)))
    if not rows:
        raise UserError(f"{path}: found no rows, expected examples: give the right file")
    classes = _class_indices(path, rows, labels)
    return [Example(text, y, line) for (line, _, text), y in zip(rows, classes, strict=True)]


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

    Raises UserError unless 0 < fraction < 1 and there are at least two distinct texts.
    """
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction is {fraction}, expected between 0 and 1: try 0.1")
    rows_of = defaultdict(list)
    for index, example in enumerate(examples):
        rows_of[example.text].append(index)
    if len(rows_of) < 2:
        raise UserError(f"found {len(rows_of)} distinct texts, at least 2 are needed: add data")
    ranked = sorted(rows_of, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    share = min(round(fraction * len(examples)), len(examples) - 1)
    held_out: list[int] = []
    for text in ranked:
        if len(held_out) + len(rows_of[text]) <= share:
            held_out += rows_of[text]
    if not held_out:  # no text fits: the share may be 0, or every text may have more copies
        held_out = rows_of[min(ranked, key=lambda text: len(rows_of[text]))]
    return sorted(set(range(len(examples))) - set(held_out)), sorted(held_out)


def class_counts(examples: Sequence[Example], num_classes: int) -> list[int]:
    """Number of examples of each class, in class order: (C,)."""
    labels = [example.label for example in examples]
    return [labels.count(label) for label in range(num_classes)]


def _decode(path: Path, encoding: str) -> str:
    with one_line_error(path, "check the path", "cannot be read"):
        data = path.read_bytes()
    try:
        codec = codecs.lookup(encoding).name
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") and not codec.startswith("utf-16"):
            raise UserError(f"{path}: found a UTF-16 byte-order mark: add --encoding utf-16")
        # Not utf-8-sig: it counts the offset of an error from after the mark.
        return data.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise UserError(f"--encoding {encoding}: not a text encoding; try utf-8") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, errors="replace").count("\n") + 1
        found = f"byte offset {error.start} is not valid {encoding}"
        other = "utf-8" if codec == "gb18030" else "gb18030"
        raise UserError(f"{path}, line {line}: {found}: try --encoding {other}") from None


def _records(path: Path, content: str) -> Iterator[tuple[int, object, str]]:
    """Line number, label and text of each row."""
    header = None
    for line, fields in _rows(path, content):
        place = f"{path}, line {line}"
        if path.suffix.lower() == ".jsonl":
            record = _parse_object(place, *fields)
            _check_names(place, list(record))
        elif header is None:
            header = fields
            _check_names(place, header)
            continue
        elif len(fields) != len(header):
            found = f"found {len(fields)} fields, expected {len(header)} as in the header"
            raise UserError(f"{place}: {found}: remove tabs from .tsv texts, quote .csv texts")
        else:
            record = dict(zip(header, fields, strict=True))
        text = record["text_a" if "text_a" in record else "text"]
        # JSON can escape half of a surrogate pair, which no tokenizer and no file can encode.
        if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
            found = f"found the text {reprlib.repr(text)}, expected valid characters"
            raise UserError(f"{place}: {found}, not all of them spaces: correct or remove the row")
        yield line, record["label"], text


def _rows(path: Path, content: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row, without blank rows at the end; others are an error."""
    if path.suffix.lower() == ".csv":
        rows = _csv_rows(path, content)
    else:
        separator = "\n" if path.suffix.lower() == ".jsonl" else "\t"  # no line has a "\n" in it
        # Not str.splitlines: it also splits at U+2028, U+0085, \v and \f, which reviews contain.
        lines = enumerate(content.split("\n"), start=1)
        rows = ((line, row.removesuffix("\r").split(separator)) for line, row in lines)
    blank = None
    for line, fields in rows:
        if not any(field.strip() for field in fields):
            blank = blank or line
        elif blank:
            raise UserError(f"{path}, line {blank}: found a blank line, expected a row: remove it")
        else:
            yield line, fields


def _csv_rows(path: Path, content: str) -> Iterator[tuple[int, list[str]]]:
    # newline="\n" keeps each line as it is, so that line_num counts lines as an editor does.
    reader = csv.reader(io.StringIO(content, newline="\n"), strict=True)
    line = 1
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        advice = 'write a field with commas, newlines or quotes in "...", and " inside it as ""'
        raise UserError(f"{path}, line {line}: not valid CSV ({error}): {advice}") from None


def _parse_object(place: str, source: str) -> dict:
    advice = 'expected {"label": 1, "text": "..."}: correct the line'
    with one_line_error(place, advice, "not a JSON object", (ValueError, RecursionError)):
        record = json.loads(source)
        if not isinstance(record, dict):
            raise ValueError("a value of another kind")
    return record


def _check_names(place: str, names: Sequence[str]) -> None:
    """Raise UserError unless there are a label and one text; two texts would be ambiguous."""
    one_text = ("text" in names) != ("text_a" in names)
    if "label" not in names or not one_text or len(set(names)) < len(names):
        found = ", ".join(map(reprlib.repr, names))
        expected = "'label' and either 'text_a' or 'text', no name twice"
        raise UserError(f"{place}: found the columns {found}, expected {expected}: rename them")


def _class_indices(path: Path, rows: Sequence[tuple], labels: Sequence[str]) -> list[int]:
    """One class index for each row (line, label, text).

    All rows together decide between words and indices, because words that are digits fit both.
    """
    words = {word: i for i, word in enumerate(labels)}
    indices = {str(i): i for i in range(len(labels))}
    as_words = [words.get(label) if isinstance(label, str) else None for _, label, _ in rows]
    as_indices = [indices.get(str(label)) for _, label, _ in rows]  # str(True) is no index
    for classes in (as_words, as_indices):
        if None not in classes:
            return classes
    kind = as_indices if as_words[0] is None else as_words
    line, label, _ = rows[kind.index(None)]
    found = f"{path}, line {line}: found the label {reprlib.repr(label)}"
    expected = f"an index 0..{len(labels) - 1} or one of {', '.join(labels)}, one kind in all rows"
    raise UserError(f"{found}, expected {expected}: correct it, or name the words with --labels")
