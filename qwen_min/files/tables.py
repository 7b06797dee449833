"""The rows of a data file, whichever program wrote it: encoding, format and columns are found here.

Rows are streamed, so that memory does not grow with the file (a JSON list is read whole). What the
file holds decides how it is read, not the ending of its name.
"""

import codecs
import csv
import io
import json
import re
import reprlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from qwen_min.errors import UserError
from qwen_min.files.disk import one_line_error, open_regular, refuse_malformed

WORKBOOK = b"PK\x03\x04"  # the beginning of a zip archive, which a workbook is
# The beginning of an old workbook, a Parquet file, a gzip archive.
BINARY = re.compile(rb"\xd0\xcf\x11\xe0|PAR1|\x1f\x8b")
# A whole field in quotes, as CSV writes it; and the beginning of one that goes on in the next line.
QUOTED = re.compile(r'"(?<![^\t\n]")[^"]*(?:""[^"]*)*"(?![^\t\r\n])')
OPEN = re.compile(r'"(?<![^\t\n]")[^"]*(?:""[^"]*)*\Z')
NO_QUOTING = "a .tsv has no quoting: remove tabs and newlines from its texts, or save it as .csv"
QUOTING = 'write a field with commas, newlines or quotes in "...", and " inside it as ""'
OBJECT = re.compile(r'\s*\{\s*("|\}|$)')  # how JSON lines begin, and how a list of objects does
LIST = re.compile(r"\s*\[\s*(\{|\]?\s*$)")
ADVICE = 'expected {"label": 1, "text": "..."}: correct the line'
MALFORMED = (KeyError, TypeError, AttributeError, ValueError, RecursionError)
NAMES = {dict: "object", list: "list"}
# The names that columns of texts and of labels usually have; letter case does not count.
TEXTS = ("text", "text_a", "sentence", "content", "review", "评论", "内容", "文本")
LABELS = ("label", "category", "类别", "标签")
UNSAID = {"text", "text_a", "label", False}  # what is taken without a note


def note(name: str, what: str) -> None:
    """Print a line about the file `name` to stderr."""
    print(f"note: {name}: {what}", file=sys.stderr)


class Unquoted(list):
    """The fields of a line that is cut at its tabs."""


class Header(dict):
    """The first row of a table: each name under itself."""


def read_table(
    source: str | Path,
    encoding: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
) -> Iterator[tuple[int, object, object]]:
    """Line (from 1), text and label of each row, as they stand in the file.

    source: a path, or "-" for standard input. Of a workbook the line is the row's number, of a JSON
    list the object's. Without `labelled` no labels are looked for (they are None); a .txt, a file
    without an ending and standard input then hold one text a line, unless a header comes first.

    encoding: None takes UTF-16 by its mark, else UTF-8, else GB18030. Columns: None takes the one
    with a usual name. stderr gets a line for what is not the usual, and one that counts what is
    skipped: blank rows, and labelled tasks of Label Studio with none or several choices.

    Raises UserError, one line that names the file and if possible the line in it.
    """
    name, chosen, skipped = "standard input" if source == "-" else str(source), {}, {}
    with _opened(source) as file:
        rows = _rows(name, file, encoding, not labelled and text_column is None)
        try:
            for line, record in _records(name, rows, skipped):
                place = f"{name}, line {line}"
                if isinstance(record.get("data"), dict) and "annotations" in record:
                    record = _label_studio(place, record, label_column)
                if (names := tuple(record)) not in chosen:
                    text = _column(place, names, "text", text_column, TEXTS)
                    label = labelled and _column(place, names, "label", label_column, LABELS)
                    taken = (text, label)
                    if not {*taken} <= UNSAID and taken not in chosen.values():
                        labels = f", labels from {label!r}" if labelled else ""
                        note(name, f"texts are read from the column {text!r}{labels}")
                    chosen[names] = taken
                if isinstance(record, Header):
                    continue
                text, label = (record.get(column) for column in chosen[names])
                if isinstance(label, dict) and isinstance(choices := label.get("choices"), list):
                    if len(choices) != 1:
                        skipped.setdefault("tasks with none or several choices", []).append(line)
                        continue
                    label = choices[0]
                yield line, text, label
        finally:  # also where the reader wants no more rows
            for what, lines in skipped.items():
                note(name, f"{what} skipped: {len(lines)} (the first: line {min(lines)})")


def _records(name: str, rows: Iterator, skipped: dict) -> Iterator[tuple[int, dict]]:
    """Each row's fields by name, the names from the header; blank rows are added to `skipped`."""
    header, ends = None, []  # ends: blank lines, dropped in silence at the end of a file
    for line, row in rows:
        place = f"{name}, line {line}"
        if isinstance(row, list) and not any(map(str.strip, row)):
            (ends if len(row) < 2 else skipped.setdefault("blank rows", [])).append(line)
            continue
        if ends:
            skipped.setdefault("blank rows", []).extend(ends)
            ends = []
        if isinstance(row, dict):
            yield line, row
        elif header is None:
            header = [field.strip() for field in row]
            if twice := [n for i, n in enumerate(header) if n and n in header[:i]]:
                raise UserError(f"{place}: two columns are called {twice[0]!r}: rename one")
            yield line, Header(zip(header, header, strict=True))
        elif len(row) != len(header):
            found = f"found {len(row)} fields, expected {len(header)} as in the header"
            advice = NO_QUOTING if isinstance(row, Unquoted) else QUOTING
            raise UserError(f"{place}: {found}: {advice}")
        else:
            yield line, dict(zip(header, row, strict=True))


def _column(
    place: str, names: Sequence[str], kind: str, wanted: str | None, usual: Sequence[str]
) -> str:
    """The column of texts or labels among `names`: the one that is wanted, or has a usual name."""
    accepted = usual if wanted is None else [wanted.strip().casefold()]
    found = [name for name in names if name.strip().casefold() in accepted]
    if wanted in found or len(found) == 1:
        return wanted if wanted in found else found[0]
    shown = [reprlib.repr(name) for name in (found or names)[:8]] + ["…"] * (len(names) > 8)
    advice = f"name it by --{kind}-column, or begin the file with the columns' names"
    if not found and any(re.search('["\t,;]', name) for name in names):
        advice = "separate them with tabs, unquoted, or with commas"
    expected = f"one column of {kind}s" if wanted is None else repr(wanted)
    raise UserError(f"{place}: found the columns {', '.join(shown)}, expected {expected}: {advice}")


def _label_studio(place: str, task: dict, control: str | None) -> dict:
    """A task as one flat object, with the choices of all its annotators as its label."""
    with one_line_error(place, "export it again", "not a task of Label Studio", MALFORMED):
        done = [a for a in task["annotations"] if not a.get("was_cancelled")]
        results = [r for a in done for r in a["result"] if r["type"] == "choices"]
        own = [r for r in results if control in (None, "label", r.get("from_name"))]
        choices = {choice: None for r in own for choice in r["value"]["choices"]}
    return task["data"] | {control or "label": {"choices": [*choices]}}


def _opened(source: str | Path) -> BinaryIO:
    """The bytes of a file, or of standard input, copied to a file that can be read twice."""
    if source != "-":
        with refuse_malformed(Path(source), "a data file", "check the path"):
            return open_regular(Path(source))
    file = tempfile.TemporaryFile()  # noqa: SIM115, the caller closes it
    shutil.copyfileobj(sys.stdin.buffer, file)
    file.seek(0)
    return file


def _rows(
    name: str, file: BinaryIO, encoding: str | None, plain: bool
) -> Iterator[tuple[int, list[str] | dict]]:
    """Line and fields of each row, those of an object by name; the first list is the header.

    plain: whether the file may hold one text a line, without a header.
    """
    start, suffix = file.read(8), Path(name).suffix.lower()  # standard input has none
    if start.startswith(WORKBOOK):
        yield from _workbook_rows(name, file)
        return
    if BINARY.match(start):
        found = "found an old workbook, a Parquet file or an archive, expected text"
        advice = "save it as .csv in its program (df.to_csv, Dataset.to_csv), or unpack it"
        raise UserError(f"{name}: {found}: {advice}")
    encoding = _encoding(name, file, encoding)
    # newline="\n": other separators of lines (U+2028, \v, \f, a lone \r) stand in reviews.
    stream = io.TextIOWrapper(file, encoding, newline="\n")

    def rewind() -> None:
        stream.seek(0)
        if stream.read(1) != "\ufeff":
            stream.seek(0)

    rewind()
    first = next((line for line in stream if line.strip()), "")
    rewind()
    lines = ((i, line.rstrip("\n").removesuffix("\r")) for i, line in enumerate(stream, start=1))
    if LIST.match(first) and (suffix != ".jsonl" or not first.rstrip().endswith("]")):
        yield from enumerate(_json(name, stream.read(), list, "export it again"), start=1)
    elif OBJECT.match(first) or suffix in (".json", ".jsonl", ".ndjson"):
        parse = partial(_json, kind=dict, advice=ADVICE)
        places = ((i, line, f"{name}, line {i}") for i, line in lines)
        yield from ((i, parse(at, line) if line.strip() else [line]) for i, line, at in places)
    elif plain and suffix in ("", ".txt") and not _is_header(first):
        yield from ((i, {"text": line} if line.strip() else [line]) for i, line in lines)
    elif "\t" in first and not encoding.startswith("utf-16"):
        yield from _tab_rows(lines, name)
    else:  # Excel's "Unicode text" is UTF-16, with tabs, and quoted as CSV is
        delimiter = "\t" if "\t" in first else max(",;", key=first.count)
        yield from _csv_rows(name, stream, delimiter)


def _is_header(line: str) -> bool:
    """Whether a line names a column of texts, and either nothing else or one of labels too."""
    names = {name.strip().strip('"').casefold() for name in re.split("[\t,;]", line)}
    return not names.isdisjoint(TEXTS) and (len(names) == 1 or not names.isdisjoint(LABELS))


def _tab_rows(lines: Iterator, name: str) -> Iterator[tuple[int, Unquoted]]:
    """Rows cut at tabs; `"` is an ordinary character. The first field in quotes is noted."""
    before, begun, noted = "", 0, False  # before: a quote that is open at the end of a line
    for i, line in lines:
        if not noted and (before or '"' in line):
            if found := QUOTED.search(before + line):
                at = begun if before and found.start() == 0 else i
                how = "read as it is: a .tsv has no quoting, each line is a row"
                advice = "if a program wrote it so, save it as .csv"
                note(f"{name}, line {at}", f"found a field in quotes, {how}; {advice}")
                noted = True
            found = OPEN.search(before + line)
            begun = begun if found and before and found.start() == 0 else i
            before = '"\n' if found else ""  # what follows the quote does not matter
        yield i, Unquoted(line.split("\t"))


def _csv_rows(name: str, stream: io.TextIOBase, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # by default a text of more than 131,072 characters is refused
    reader = csv.reader(stream, strict=True, delimiter=delimiter)
    line = 1
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: not valid CSV ({error}): {QUOTING}") from None


def _json(place: str, source: str, kind: type, advice: str) -> object:
    with one_line_error(place, advice, f"not a JSON {NAMES[kind]}", MALFORMED):
        if not isinstance(found := json.loads(source), kind):
            raise ValueError("a value of another kind")
        if kind is list and (odd := [i for i, row in enumerate(found) if type(row) is not dict]):
            raise ValueError(f"item {odd[0] + 1} is no object")
    return found


def _workbook_rows(name: str, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """The rows of an .xlsx file's first sheet, without the empty cells at their ends."""
    try:
        import openpyxl
    except ImportError:
        found = "found a workbook (or an archive), which openpyxl reads"
        raise UserError(f"{name}: {found}: install openpyxl, or save it as .csv") from None
    advice = "save it as .csv in its program, or unpack it"
    width, how = 0, (advice, "not a workbook that openpyxl reads", Exception)
    with one_line_error(name, *how):
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        rows = enumerate(book.worksheets[0].iter_rows(values_only=True), start=1)
    while True:
        with one_line_error(name, *how):
            line, cells = next(rows, (0, ()))
        if not line:
            return
        # A whole number may be kept as 1.0.
        cells = [int(c) if isinstance(c, float) and c.is_integer() else c for c in cells]
        fields = ["" if cell is None else str(cell) for cell in cells]
        while len(fields) > max(width, 1) and not fields[-1]:
            fields.pop()
        width = width or len(fields) * any(fields)  # of the header
        yield line, fields + [""] * (width - len(fields))


def _encoding(name: str, file: BinaryIO, encoding: str | None) -> str:
    """The encoding that reads the whole file: the one that is asked for, or what fits."""
    file.seek(0)
    marked = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    if encoding is None and marked:
        encoding = "utf-16"
    asked, codec = "utf-8" if encoding is None else encoding, None
    try:
        codec = codecs.lookup(asked).name
        b"\xff".decode(asked, "replace")  # idna, which is not for texts, refuses it
        if marked and not codec.startswith("utf-16"):
            raise UserError(f"{name}: found a UTF-16 byte-order mark: add --encoding utf-16")
        if (wrong := _first_wrong_byte(file, asked)) is None:
            return codec
        if encoding is None and _first_wrong_byte(file, "gb18030") is None:
            note(name, "not valid UTF-8, read as GB18030; if texts look wrong, give --encoding")
            return "gb18030"
        file.seek(0)
        line = file.read(wrong).decode(asked, errors="replace").count("\n") + 1
    except (LookupError, ValueError):  # ValueError: a codec's own, or a name with a NUL
        raise UserError(f"--encoding {encoding}: not a text encoding; try utf-8") from None
    found = f"byte offset {wrong} is not valid {asked}"
    advice = f"try --encoding {'utf-8' if codec == 'gb18030' else 'gb18030'}"
    if encoding is None:
        found, advice = found + " nor is the file GB18030", "name its encoding by --encoding"
    raise UserError(f"{name}, line {line}: {found}: {advice}")


def _first_wrong_byte(file: BinaryIO, encoding: str) -> int | None:
    """The offset of the first byte that `encoding` cannot read; None if it reads everything."""
    decoder, total = codecs.getincrementaldecoder(encoding)(), 0
    file.seek(0)
    try:
        while chunk := file.read(2**20):
            total += len(chunk)
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:  # error.object: the chunk, and what was left of the last
        return total - len(error.object) + error.start
    return None
