"""The rows of a data file, whichever program wrote it: encoding, format and columns are found here.

Rows are streamed, so that memory does not grow with the file (a JSON list and a workbook are read
whole). What the file holds decides how it is read, not the ending of its name.
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
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from qwen_min.errors import UserError
from qwen_min.files.disk import one_line_error, open_regular, refuse_malformed

WORKBOOK = b"PK\x03\x04"  # the beginning of a zip archive, which a workbook is
# The beginning of an old workbook, a Parquet file, a gzip archive.
BINARY = re.compile(rb"\xd0\xcf\x11\xe0|PAR1|\x1f\x8b")
# How JSON lines begin, and how a list of objects does.
JSON = re.compile(r'\s*(\{\s*("|\}|$)|\[\s*(\{|\]|$))')
QUOTING = 'a .csv has "..." around a field with a comma or newline; save a .tsv with quotes as .csv'
ADVICE = 'expected {"label": 1, "text": "..."}: correct it'
# The names that columns of texts and of labels usually have; letter case does not count.
USUAL = {
    "text": ("text", "text_a", "sentence", "content", "review", "评论", "内容", "文本"),
    "label": ("label", "category", "类别", "标签"),
}
Rows = Iterator[tuple[int, list[str] | dict]]  # the line and the fields of each row
ESCAPED = re.compile("_x(00[01][0-9A-Fa-f])_")  # a control character in a workbook
UNSAID = {"text", "text_a", "label"}  # what is taken without a note


def note(name: str, what: str) -> None:
    """Print a line about the file `name` to stderr."""
    print(f"note: {name}: {what}", file=sys.stderr)


def read_table(
    source: str | Path,
    encoding: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
    empty_texts: bool = True,
) -> Iterator[tuple[int, str, str]]:
    """Line (from 1), text and label of each row; a null text is an empty one.

    source: a path, or "-" for standard input. Of a workbook the line is the row's number, of a JSON
    list the object's. Without `labelled` no labels are looked for (they are ""); a .txt, a file
    without an ending and standard input then hold one text a line, unless a header comes first.

    encoding: None takes UTF-16 by its mark, else UTF-8, else GB18030. Columns: None takes the one
    with a usual name. empty_texts: whether a text of nothing but spaces is accepted. stderr gets a
    line for what is not the usual, and one each that counts empty texts, fields between tabs that
    begin with a quote, and what is skipped: blank rows, and labelled tasks of Label Studio with
    none or several choices.

    Raises UserError, one line that names the file and if possible the line in it.
    """
    name = "standard input" if source == "-" else str(source)
    wanted = {"text": text_column} | ({"label": label_column} if labelled else {})
    header, chosen, counted = None, {}, defaultdict(list)
    with _opened(source) as file:
        try:
            plain = not labelled and text_column is None
            for line, row in _rows(name, file, encoding, plain, labelled, label_column):
                place = f"{name}, line {line}"
                if isinstance(row, list):
                    if not "".join(row).strip():
                        counted["blank rows skipped"].append(line)
                        continue
                    header = header or row
                    if len(row) != len(header):
                        found = f"found {len(row)} fields, expected {len(header)} as in the header"
                        raise UserError(f"{place}: {found}: {QUOTING}")
                names = tuple(header or row)  # an object has its own
                if names not in chosen:
                    taken = {kind: _column(place, names, kind, wanted[kind]) for kind in wanted}
                    if not {*taken.values()} <= UNSAID and taken not in chosen.values():
                        said = [f"{kind}s from {column!r}" for kind, column in taken.items()]
                        note(name, f"columns read: {', '.join(said)}")
                    chosen[names] = taken
                if row is header:
                    continue
                record = dict(zip(header, row, strict=True)) if header else row
                text, label = (record.get(chosen[names].get(kind), "") for kind in USUAL)
                if isinstance(label, dict) and "choices" in label:
                    counted["tasks with none or several choices skipped"].append(line)
                    continue
                text, label = _checked(place, text, label, empty_texts)
                if not text.strip():
                    counted["empty texts"].append(line)
                yield line, text, label
        finally:  # also where the reader wants no more rows
            for what, lines in counted.items():
                note(name, f"{what}: {len(lines)} (the first: line {lines[0]})")


def _column(place: str, names: Sequence[str], kind: str, wanted: str | None) -> str:
    """The column of texts or labels among `names`: the one that is wanted, or has a usual name."""
    usual = USUAL[kind] if wanted is None else [wanted.strip().casefold()]
    found = [name for name in names if name == wanted] or _named(names, usual)
    if len(found) == 1:
        return found[0]
    shown = reprlib.repr(found or [*names])[1:-1]
    advice = f"name it by --{kind}-column, or begin the file with the columns' names"
    expected = f"one column of {kind}s" if wanted is None else repr(wanted)
    raise UserError(f"{place}: found the columns {shown}, expected {expected}: {advice}")


def _named(names: Iterable[str], usual: Sequence[str]) -> list[str]:
    return [name for name in names if name.strip().casefold() in usual]


def _checked(place: str, text: object, label: object, empty_texts: bool) -> tuple[str, str]:
    """A row's text and label; null and NaN are an empty text. Raises UserError for other values."""
    if text is None or text != text:  # NaN alone differs from itself
        text = ""
    # JSON can escape half of a surrogate pair, which no tokenizer and no file can encode.
    valid = isinstance(text, str) and not re.search("[\ud800-\udfff]", text)
    if not valid or not (empty_texts or text.strip()):
        found = f"found the text {reprlib.repr(text)}, expected valid characters"
        raise UserError(f"{place}: {found}, not all of them spaces: correct or remove the row")
    # Nor bool: true is no class number.
    if type(label) not in (str, int, float) or label != label:
        found = f"found the label {reprlib.repr(label)}"
        raise UserError(f"{place}: {found}, expected a string or a number: correct it")
    return text, str(label).strip()


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
    name: str,
    file: BinaryIO,
    encoding: str | None,
    plain: bool,
    labelled: bool,
    control: str | None,
) -> Rows:
    """Line and fields of each row, those of an object by name; the first list is the header.

    plain: whether the file may hold one text a line, without a header. labelled, control: whether
    labels are wanted, and which; see `_json_rows`.
    """
    start = file.read(4)
    if start == WORKBOOK:
        return _workbook_rows(name, file)
    if BINARY.match(start):
        found = "found an old workbook, a Parquet file or an archive, expected text"
        raise UserError(f"{name}: {found}: save it as .csv in its program, or unpack it")
    encoding = _encoding(name, file, encoding)
    # newline="\n": other separators of lines (U+2028, \v, \f, a lone \r) stand in reviews.
    stream = io.TextIOWrapper(file, encoding, newline="\n")

    def lines() -> Iterator[str]:
        stream.seek(0)
        for i, line in enumerate(stream):
            yield line if i else line.removeprefix("\ufeff")

    first, suffix = next(filter(str.strip, lines()), ""), Path(name).suffix.lower()
    # A single column has no delimiter: commas then belong to the texts of a .tsv or .txt.
    delimiter = max("\t,;" if suffix in (".tsv", ".txt") else ",;\t", key=first.count)
    # Names of columns are short; a sentence may hold "review" between its commas.
    pieces = [piece.strip().strip('"') for piece in first.split(delimiter)]
    has_header = _named(pieces, USUAL["text"]) and not any(" " in piece for piece in pieces)
    bare = (line.removesuffix("\n").removesuffix("\r") for line in lines())
    if JSON.match(first):
        return _json_rows(name, lines(), first.lstrip().startswith("["), labelled, control)
    if plain and suffix in ("", ".txt") and not has_header:
        return enumerate(chain([["text"]], ([line] for line in bare)))  # the header is line 0
    # Excel's "Unicode text" is UTF-16, with tabs, and quoted as CSV is.
    quoted = '"' in first or encoding.startswith("utf-16")
    if first and delimiter == "\t" and not quoted:
        return _tab_rows(name, bare)
    return _csv_rows(name, lines(), delimiter)


def _tab_rows(name: str, lines: Iterator[str]) -> Rows:
    """Fields between tabs, without quoting; a note counts quotes: some programs write them."""
    kept = []
    try:
        for i, line in enumerate(lines, start=1):
            if re.search('(^|\t)"', line):
                kept.append(i)
            yield i, line.split("\t")
    finally:
        if kept:
            what = "rows with a field that begins with a quote, which is kept"
            note(name, f"{what}: {len(kept)} (the first: line {kept[0]})")


def _csv_rows(name: str, lines: Iterator[str], delimiter: str) -> Rows:
    csv.field_size_limit(2**31 - 1)  # by default a text of more than 131,072 characters is refused
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    line = 1
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: not valid CSV ({error}): {QUOTING}") from None


def _json_rows(
    name: str, lines: Iterator[str], is_list: bool, labelled: bool, control: str | None
) -> Rows:
    """The objects of JSON lines, or of one list; a blank line is a blank row.

    A task of Label Studio is its data, and with `labelled` its choices: those of the control that
    is named, or of the only one. Raises UserError if there are several and none is named: a task
    may have sentiment and topic, say.
    """
    controls: set[str] = set()
    for i, source in enumerate(["".join(lines)] if is_list else lines, start=1):
        rows = [[source]]
        if source.strip():
            place = name if is_list else f"{name}, line {i}"
            with refuse_malformed(place, "JSON objects", ADVICE):
                found = json.loads(source)
                rows = [_flat(row, control, controls) for row in (found if is_list else [found])]
            if labelled and control is None and len(controls) > 1:
                several = f"found choices of {', '.join(sorted(controls))}"
                raise UserError(f"{place}: {several}: name one of these by --label-column")
        yield from enumerate(rows, start=i)


def _flat(row: object, control: str | None, controls: set[str]) -> dict:
    """An object; a task of Label Studio as its short export has it: its data, and as label the
    choice of its annotators, or an object with their choices where these are none or several.

    control: the name of the control whose choices count; None: all do. controls: receives the names
    of the task's controls.
    """
    if not isinstance(row, dict):
        raise ValueError(f"found {reprlib.repr(row)}")
    if not isinstance(row.get("data"), dict):
        return row
    done = [a for a in row.get("annotations") or () if not dict(a).get("was_cancelled")]
    own = [r for a in done for r in a["result"] if r["type"] == "choices"]
    controls |= {r["from_name"] for r in own}
    own = [r for r in own if control in (None, r["from_name"])]
    choices = {choice for r in own for choice in r["value"]["choices"]}
    label = choices.pop() if len(choices) == 1 else {"choices": choices}
    return row["data"] | {control or "label": label}


def _workbook_rows(name: str, file: BinaryIO) -> Rows:
    """The rows of an .xlsx file's first sheet."""
    advice = "install openpyxl, or save it as .csv in its program"
    with one_line_error(name, advice, "a workbook or archive that cannot be read", Exception):
        import openpyxl

        # Not read_only, which believes the width that other programs write, right or wrong.
        sheet, *others = openpyxl.load_workbook(file, data_only=True).worksheets
        rows = sheet.values
    if others:
        note(name, f"sheet {sheet.title} is read, not {', '.join(s.title for s in others)}")
    for line, cells in enumerate(rows, start=1):
        # A whole number may be kept as 1.0.
        cells = [int(c) if isinstance(c, float) and c.is_integer() else c for c in cells]
        # Excel writes a carriage return as _x000D_, other control characters likewise.
        texts = ["" if cell is None else str(cell) for cell in cells]
        yield line, [ESCAPED.sub(lambda found: chr(int(found[1], 16)), text) for text in texts]


def _encoding(name: str, file: BinaryIO, encoding: str | None) -> str:
    """The encoding that reads the whole file: the one that is asked for, or the first that fits."""
    file.seek(0)
    tried = ["utf-8", "gb18030"] if encoding is None else [encoding]
    if encoding is None and file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        tried = ["utf-16"]
    for candidate in tried:
        file.seek(0)
        try:
            b"\xff".decode(candidate, "replace")  # refuses codecs that are not for texts
            for _ in codecs.iterdecode(iter(partial(file.read, 2**20), b""), candidate):
                pass
        except UnicodeDecodeError as error:  # error.object: a chunk, with the last one's rest
            wrong = file.tell() - len(error.object) + error.start
        except (LookupError, ValueError):  # ValueError: a codec's own, or a name with a NUL
            raise UserError(f"--encoding {encoding}: not a text encoding; try utf-8") from None
        else:
            if candidate != tried[0]:
                note(name, "not valid UTF-8, read as GB18030; if texts look wrong, give --encoding")
            return codecs.lookup(candidate).name
    file.seek(0)
    line = file.read(wrong).decode(candidate, errors="replace").count("\n") + 1
    found = f"byte offset {wrong} is not valid {', nor is the file '.join(reversed(tried))}"
    raise UserError(f"{name}, line {line}: {found}: name the file's encoding by --encoding")
