"""The rows of a data file, whichever program wrote it: encoding, format and columns are found here.

Rows are streamed, so that memory does not grow with the file (a JSON list is read whole). What the
file holds decides how it is read, not the ending of its name.
"""

import codecs
import contextlib
import csv
import io
import json
import re
import reprlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from qwen_min.errors import UserError
from qwen_min.files.disk import one_line_error, open_regular, refuse_malformed

# The beginning of a zip archive, an old workbook, a Parquet file, a gzip archive.
BINARY = re.compile(rb"PK\x03\x04|\xd0\xcf\x11\xe0|PAR1|\x1f\x8b")
# A whole field in quotes, as CSV writes it; and the beginning of one that goes on in the next line.
QUOTED = re.compile(r'"(?<![^\t\n]")[^"]*(?:""[^"]*)*"(?![^\t\r\n])')
OPEN = re.compile(r'"(?<![^\t\n]")[^"]*(?:""[^"]*)*\Z')
NO_QUOTING = "a .tsv has no quoting: remove tabs and newlines from its texts, or save it as .csv"
QUOTING = 'write a field with commas, newlines or quotes in "...", and " inside it as ""'
OBJECT = re.compile(r'\s*\{\s*("|\}|$)')  # how JSON lines begin, and how a list of objects does
LIST = re.compile(r"\s*\[\s*(\{|\]|$)")
ADVICE = 'expected {"label": 1, "text": "..."}: correct the line'
# The names that columns of texts and of labels usually have; letter case does not count.
TEXTS = ("text", "text_a", "sentence", "content", "review", "评论", "内容", "文本")
LABELS = ("label", "category", "类别", "标签")
UNSAID = {"text", "text_a", "label", None}  # what is taken without a note

Say = Callable[[str], object]


def say_on_stderr(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr)


class Unquoted(list):
    """The fields of a line that is cut at its tabs."""


class Header(dict):
    """The columns of a table, each with itself as its name."""


def read_table(
    source: str | Path,
    encoding: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
    say: Say = say_on_stderr,
) -> Iterator[tuple[int, object, object]]:
    """Line (from 1), text and label of each row, as they stand in the file.

    source: a path, or "-" for standard input. Of a workbook the line is the row's number, of a JSON
    list the object's. Without `labelled` no labels are looked for (they are None); a .txt, a file
    without an ending and standard input then hold one text a line, unless a header comes first.

    encoding: None takes UTF-16 by its mark, else UTF-8, else GB18030. Columns: None takes the one
    with a usual name. `say` gets a line for what is not the usual, and one that counts what is
    skipped: blank rows, and labelled tasks of Label Studio with none or several choices.

    Raises UserError, one line that names the file and if possible the line in it.
    """
    name, chosen, skipped = "standard input" if source == "-" else str(source), {}, {}
    with _opened(source) as file:
        rows = _rows(name, file, encoding, not labelled and text_column is None, say)
        try:
            for line, record in _records(name, rows, skipped):
                place = f"{name}, line {line}"
                if isinstance(record.get("data"), dict) and "annotations" in record:
                    record = _label_studio(place, record, label_column)
                if (names := tuple(record)) not in chosen:
                    text = _column(place, names, "text", text_column, TEXTS)
                    label = _column(place, names, "label", label_column, LABELS, labelled)
                    if not chosen and not UNSAID.issuperset((text, label)):
                        labels = f", labels from {label!r}" * labelled
                        say(f"note: {name}: texts are read from the column {text!r}{labels}")
                    chosen[names] = text, label
                if isinstance(record, Header):
                    continue
                text, label = (record.get(column) for column in chosen[names])
                if isinstance(label, dict) and isinstance(label.get("choices"), list):
                    if len(label := label["choices"]) != 1:
                        skipped.setdefault("tasks with none or several choices", []).append(line)
                        continue
                    (label,) = label
                yield line, text, label
        finally:  # also where the reader wants no more rows
            for what, lines in skipped.items():
                say(f"note: {name}: {what} skipped: {len(lines)} (the first: line {lines[0]})")


def _records(name: str, rows: Iterator, skipped: dict) -> Iterator[tuple[int, dict]]:
    """Each row's fields by name, the names from the header; blank rows are added to `skipped`."""
    header, ends = None, []  # ends: blank lines, dropped in silence at the end of a file
    for line, row in rows:
        if isinstance(row, list) and not any(field.strip() for field in row):
            (ends if len(row) < 2 else skipped.setdefault("blank rows", [])).append(line)
            continue
        if ends:
            skipped["blank rows"] = sorted([*skipped.get("blank rows", []), *ends])
            ends = []
        if isinstance(row, dict):
            yield line, row
        elif header is None:
            header = [field.strip() for field in row]
            if len({*filter(None, header)}) < len([*filter(None, header)]):
                raise UserError(
                    f"{name}, line {line}: {_found(header)}; a name is there twice: rename one"
                )
            yield line, Header(zip(header, header, strict=True))
        elif len(row) != len(header):
            found = f"found {len(row)} fields, expected {len(header)} as in the header"
            advice = NO_QUOTING if isinstance(row, Unquoted) else QUOTING
            raise UserError(f"{name}, line {line}: {found}: {advice}")
        else:
            yield line, dict(zip(header, row, strict=True))


def _found(names: Sequence[str]) -> str:
    shown = [reprlib.repr(name) for name in names[:8]] + ["…"] * (len(names) > 8)
    return f"found the columns {', '.join(shown)}"


def _column(
    place: str,
    names: Sequence[str],
    kind: str,
    wanted: str | None,
    usual: Sequence[str],
    needed: bool = True,
) -> str | None:
    """The column of texts or labels among `names`: the one that is wanted, or has a usual name."""
    if not needed:
        return None
    accepted = usual if wanted is None else [wanted.strip().casefold()]
    found = [name for name in names if name == wanted] or [
        name for name in names if name.strip().casefold() in accepted
    ]
    if len(found) == 1:
        return found[0]
    option = f"--{kind}-column"
    if found:
        raise UserError(
            f"{place}: {_found(found)}, both could hold the {kind}s: name one by {option}"
        )
    expected = f"expected {wanted!r}" if wanted else f"none is called {kind!r} or the like"
    advice = f"name the column of the {kind}s by {option}"
    if any(re.search('["\t,;]', name) for name in names):
        advice = "separate them with tabs, unquoted, or with commas"
    raise UserError(f"{place}: {_found(names)}, {expected}: {advice}")


def _label_studio(place: str, task: dict, control: str | None) -> dict:
    """A task as one flat object, with the choices of all its annotators as its label."""
    with one_line_error(place, "export it again", "not a task of Label Studio", _MALFORMED):
        done = [a for a in task["annotations"] if not a.get("was_cancelled")]
        results = [r for a in done for r in a["result"] if r["type"] == "choices"]
        own = [r for r in results if control in (None, "label", r.get("from_name"))]
        choices = {choice: None for r in own for choice in r["value"]["choices"]}
    return task["data"] | {control or "label": {"choices": [*choices]}}


_MALFORMED = (KeyError, TypeError, AttributeError, ValueError)


@contextlib.contextmanager
def _opened(source: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file, or of standard input, which is kept in a file to be read twice."""
    if source == "-":
        with tempfile.TemporaryFile() as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.seek(0)
            yield file
        return
    with refuse_malformed(Path(source), "a data file", "check the path"):
        file = open_regular(Path(source))
    with file:
        yield file


def _rows(
    name: str, file: BinaryIO, encoding: str | None, plain: bool, say: Say
) -> Iterator[tuple[int, list[str] | dict]]:
    """Line and fields of each row, those of an object by name; the first list is the header.

    plain: whether the file may hold one text a line, without a header.
    """
    start = file.read(8)
    suffix = Path(name).suffix.lower() if name != "standard input" else ""
    if start.startswith(b"PK\x03\x04") and "xl/workbook.xml" in _zipped(file):
        yield from _workbook_rows(name, file)
        return
    if BINARY.match(start):
        found = "found an old workbook, a Parquet file or an archive, expected text"
        advice = "save it as .csv in its program (df.to_csv, Dataset.to_csv), or unpack it"
        raise UserError(f"{name}: {found}: {advice}")
    encoding = _encoding(name, file, encoding, say)
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
        yield from _listed(name, stream.read())
    elif OBJECT.match(first) or suffix in (".json", ".jsonl", ".ndjson"):
        yield from ((i, _object(name, i, line) if line.strip() else [line]) for i, line in lines)
    elif plain and suffix in ("", ".txt") and not _is_header(first):
        yield from ((i, {"text": line} if line.strip() else [line]) for i, line in lines)
    elif "\t" in first and not encoding.startswith("utf-16"):
        yield from _tab_rows(name, lines, say)
    else:  # Excel's "Unicode text" is UTF-16, with tabs, and quoted as CSV is
        delimiter = "\t" if "\t" in first else max(",;", key=first.count)
        yield from _csv_rows(name, stream, delimiter)


def _is_header(line: str) -> bool:
    """Whether a line names a column of texts, and either nothing else or one of labels too."""
    names = {name.strip().strip('"').casefold() for name in re.split("[\t,;]", line)}
    return not names.isdisjoint(TEXTS) and (len(names) == 1 or not names.isdisjoint(LABELS))


def _tab_rows(name: str, lines: Iterator, say: Say) -> Iterator[tuple[int, Unquoted]]:
    """Rows cut at tabs; `"` is an ordinary character. The first field in quotes is noted."""
    before, begun, noted = "", 0, False  # before: a quote that is open at the end of a line
    for i, line in lines:
        if not noted and (before or '"' in line):
            if found := QUOTED.search(before + line):
                at = begun if before and found.start() == 0 else i
                how = "read as it is: a .tsv has no quoting, each line is a row"
                advice = "if a program wrote it so, save it as .csv"
                say(f"note: {name}, line {at}: found a field in quotes, {how}; {advice}")
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


def _object(name: str, line: int, source: str) -> dict:
    with one_line_error(
        f"{name}, line {line}", ADVICE, "not a JSON object", (ValueError, RecursionError)
    ):
        if not isinstance(record := json.loads(source), dict):
            raise ValueError("a value of another kind")
    return record


def _listed(name: str, source: str) -> Iterator[tuple[int, dict]]:
    with one_line_error(name, "export it again", "not a JSON list", (ValueError, RecursionError)):
        records = json.loads(source)
        if odd := [i for i, record in enumerate(records, start=1) if not isinstance(record, dict)]:
            raise ValueError(f"item {odd[0]} is no object")
    yield from enumerate(records, start=1)


def _zipped(file: BinaryIO) -> list[str]:
    with contextlib.suppress(zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return zipfile.ZipFile(file).namelist()
    return []


def _workbook_rows(name: str, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """The rows of an .xlsx file's first sheet, without the empty cells at their ends."""
    try:
        import openpyxl
    except ImportError:
        advice = "install openpyxl, or save it as .csv"
        raise UserError(f"{name}: found a workbook, which openpyxl reads: {advice}") from None
    width = 0
    with one_line_error(name, "save it as .csv", "not a workbook that openpyxl reads", Exception):
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        rows = enumerate(book.worksheets[0].iter_rows(values_only=True), start=1)
    while True:
        with one_line_error(name, "save it as .csv", "not a sheet that openpyxl reads", Exception):
            if (numbered := next(rows, None)) is None:
                return
        line, cells = numbered
        fields = ["" if cell is None else str(cell) for cell in cells]
        while len(fields) > max(width, 1) and not fields[-1]:
            fields.pop()
        fields += [""] * (width - len(fields))
        width = width or len(fields) * any(fields)
        yield line, fields


def _encoding(name: str, file: BinaryIO, encoding: str | None, say: Say) -> str:
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
            advice = "if the texts look wrong, give --encoding"
            say(f"note: {name}: not valid UTF-8, read as GB18030; {advice}")
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
