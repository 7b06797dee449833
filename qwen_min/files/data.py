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
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qwen_min.errors import UserError

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
        raise UserError(
            f"{path}: extension is {suffix!r}, expected .tsv, .csv or .jsonl: rename it"
        )
    text = _decode(path, encoding)
    # Not str.splitlines: it also splits at U+2028, U+0085, \v and \f, which reviews contain.
    lines = ((n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), start=1))
    if suffix == ".jsonl":
        records = _objects(path, _refuse_blank(path, ((n, [line]) for n, line in lines)))
    elif suffix == ".csv":
        records = _table(path, _refuse_blank(path, _csv_rows(path, text)))
    else:
        records = _table(path, _refuse_blank(path, ((n, line.split("\t")) for n, line in lines)))
    # islice refuses numbers above sys.maxsize; --limit may be one.
    rows = [
        (line, record["label"], _checked_text(path, line, record))
        for line, record in islice(records, limit and min(limit, sys.maxsize))
    ]
    if not rows:
        raise UserError(f"{path}: found no rows, expected examples: give the right file")
    classes = _class_indices(path, [(line, label) for line, label, _ in rows], labels)
    return [Example(text, y, line) for (line, _, text), y in zip(rows, classes, strict=True)]


def examples_hash(examples: Sequence[Example]) -> str:
    """SHA-256 in hex over the texts and labels in order, the same for every file format.

    Each example is hashed as one line of ASCII JSON, `[text, label]`. JSON escapes a newline inside
    a text, so different examples always give different bytes.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.text, example.label]).encode("ascii") + b"\n")
    return digest.hexdigest()


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
    rows_of: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        rows_of.setdefault(example.text, []).append(index)
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
    counts = Counter(example.label for example in examples)
    return [counts[label] for label in range(num_classes)]


def _decode(path: Path, encoding: str) -> str:
    try:
        data = path.read_bytes()
        codec = codecs.lookup(encoding).name
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if utf16 and not codec.startswith("utf-16"):
            raise UserError(
                f"{path}: found a UTF-16 byte-order mark, expected {encoding}: "
                "add --encoding utf-16"
            )
        # Not utf-8-sig: it counts the offset of an error from after the mark.
        return data.decode(encoding).removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except LookupError:
        raise UserError(
            f"--encoding {encoding}: not a text encoding; try utf-8 or gb18030"
        ) from None
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, errors="replace").count("\n") + 1
        raise UserError(
            f"{path}, line {line}: byte offset {error.start} is not valid {encoding}: try "
            f"--encoding {'utf-8' if codec == 'gb18030' else 'gb18030'}"
        ) from None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    # newline="\n" keeps each line as it is, so that line_num counts lines as an editor does.
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    line = 1
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {line}: the row that starts here is not valid CSV ({error}): put a "
            'field with a comma, a newline or a quote in "...", and write " inside it as ""'
        ) from None


def _refuse_blank(
    path: Path, rows: Iterable[tuple[int, list[str]]]
) -> Iterator[tuple[int, list[str]]]:
    """The rows without the blank ones at the end of the file; any other blank row is an error."""
    blank = None
    for line, fields in rows:
        if not any(field.strip() for field in fields):
            blank = blank or line
        elif blank:
            raise UserError(f"{path}, line {blank}: found a blank line, expected a row: remove it")
        else:
            yield line, fields


def _table(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, dict]]:
    """Line number and fields by name, of each row below the header."""
    for line, header in islice(rows, 1):
        _check_names(path, line, header)
    for line, fields in rows:
        if len(fields) != len(header):
            raise UserError(
                f"{path}, line {line}: found {len(fields)} fields, expected {len(header)} as in "
                "the header: remove tabs from a .tsv text, quote a .csv text that has commas"
            )
        yield line, dict(zip(header, fields, strict=True))


def _objects(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, dict]]:
    """Line number and JSON object of each row."""
    for line, (source,) in rows:
        try:
            record = json.loads(source)
            if not isinstance(record, dict):
                raise ValueError("a value of another kind")
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # str(JSONDecodeError) adds a "line 1" of its own
            raise UserError(
                f"{path}, line {line}: not a JSON object ({reason}), expected one on each line, "
                'such as {"label": 1, "text": "..."}: correct the line'
            ) from None
        _check_names(path, line, list(record))
        yield line, record


def _check_names(path: Path, line: int, names: Sequence[str]) -> None:
    """Raise UserError unless there are a label and one text; two texts would be ambiguous."""
    one_text = ("text" in names) != ("text_a" in names)
    if "label" not in names or not one_text or len(set(names)) < len(names):
        raise UserError(
            f"{path}, line {line}: found the columns {', '.join(map(reprlib.repr, names))}, "
            "expected 'label' and either 'text_a' or 'text', no name twice: rename them"
        )


def _checked_text(path: Path, line: int, record: dict) -> str:
    text = record["text_a" if "text_a" in record else "text"]
    valid = isinstance(text, str) and text.strip()
    # JSON can escape half of a surrogate pair, which no tokenizer and no file can encode.
    if not valid or any("\ud800" <= char <= "\udfff" for char in text):
        raise UserError(
            f"{path}, line {line}: found the text {reprlib.repr(text)}, expected a string of valid "
            "characters, not all of them spaces: fill it in or remove the row"
        )
    return text


def _class_indices(
    path: Path, found: Sequence[tuple[int, object]], labels: Sequence[str]
) -> list[int]:
    """One class index for each (line, label).

    All rows together decide between words and indices, because words that are digits fit both.
    """
    words = {word: i for i, word in enumerate(labels)}
    indices = {str(i): i for i in range(len(labels))}
    as_words = [words.get(label) if isinstance(label, str) else None for _, label in found]
    as_indices = [indices.get(str(label)) for _, label in found]  # str(True) is no index
    for classes in (as_words, as_indices):
        if None not in classes:
            return classes
    kind = as_indices if as_words[0] is None else as_words
    line, label = found[kind.index(None)]
    raise UserError(
        f"{path}, line {line}: found the label {reprlib.repr(label)}, expected an index "
        f"0..{len(labels) - 1} or one of {', '.join(labels)}, the same kind in every row: correct "
        "it, or name the file's words with --labels"
    )
