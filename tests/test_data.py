import os
from collections import Counter
from pathlib import Path

import pytest

from qwen_min.errors import UserError
from qwen_min.files.data import Example, examples_hash, held_out_split, read_examples

WORDS = ("负面", "正面")
# Measurement data lies beside a development checkout and is not part of the project.
CHNSENTICORP = Path(__file__).resolve().parents[2] / "shared" / "data" / "chnsenticorp"


def read(tmp_path, name, content, labels=WORDS, **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(path, labels, **options)


def rows(examples):
    return [(example.text, example.label, example.line) for example in examples]


# --- what is read ---------------------------------------------------------------------------------


def test_tsv_has_no_quoting(tmp_path):
    # A CSV reader would join rows 2 to 4 into one, and turn row 5 into: 好"的
    content = 'label\ttext_a\n0\t"屏幕太暗\n1\t尺寸 15.4"\n1\t"很好"\n0\t"好""的"\n'
    assert rows(read(tmp_path, "a.tsv", content)) == [
        ('"屏幕太暗', 0, 2),
        ('尺寸 15.4"', 1, 3),
        ('"很好"', 1, 4),
        ('"好""的"', 0, 5),
    ]


def test_csv_has_quoting(tmp_path):
    content = 'id,text,label\n7,"一,二",1\n8,"第一行\n第二行\r\n\n他说""好""",0\n9,没有引号,1\n'
    assert rows(read(tmp_path, "a.csv", content)) == [
        ("一,二", 1, 2),
        ('第一行\n第二行\r\n\n他说"好"', 0, 3),
        ("没有引号", 1, 7),  # the record before covers lines 3 to 6
    ]


def test_a_long_text_is_read_from_every_format(tmp_path):
    text = "好" * 200_000
    assert read(tmp_path, "a.csv", f'label,text\n1,"{text}"\n')[0].text == text
    assert read(tmp_path, "a.tsv", f"label\ttext\n1\t{text}\n")[0].text == text
    assert read(tmp_path, "a.jsonl", f'{{"label": 1, "text": "{text}"}}')[0].text == text


def test_csv_lines_are_counted_by_newlines(tmp_path):
    content = 'label,text\n1,"一\r二\u2028三"\n0,差\n'
    assert rows(read(tmp_path, "a.csv", content)) == [("一\r二\u2028三", 1, 2), ("差", 0, 3)]


def test_jsonl(tmp_path):
    content = '{"label": 1, "text": "好\\n\\"的\\""}\r\n{"text_a": "差", "label": "0", "id": [1]}'
    assert rows(read(tmp_path, "a.jsonl", content)) == [('好\n"的"', 1, 1), ("差", 0, 2)]


@pytest.mark.parametrize(
    ("field", "noted"),
    [
        ('"他说""好"""', True),  # as pandas writes 他说"好"
        ('"""好"""', True),
        ('"很好"', True),
        ('"屏幕太暗\n1\t很好"', True),  # one field of pandas, two rows here
        ('尺寸 15.4"', False),
        ('"屏幕"太暗', True),
        ('他说"好"', False),
        ('"房间10元', True),
    ],
)
def test_quotes_in_a_tsv_are_read_as_they_are_with_a_note(tmp_path, capsys, field, noted):
    found = read(tmp_path, "a.tsv", f"label\ttext\n0\t差\n1\t{field}\n")
    assert [e.text for e in found] == ["差", *(part for part in field.split("\n1\t"))]
    note = "rows with a field that begins with a quote, which is kept: 1 (the first: line 3)"
    note = f"note: {tmp_path / 'a.tsv'}: {note}\n"
    assert capsys.readouterr().err == note * noted


def test_columns_go_by_name_and_others_are_ignored(tmp_path):
    content = "qid\ttext\tlabel\tsplit\nq1\t很好\t1\ttrain\n"
    assert rows(read(tmp_path, "a.TSV", content)) == [("很好", 1, 2)]


# Characters at which str.splitlines breaks a line, besides \r and \n.
SEPARATORS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e"


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_only_newlines_end_a_line(tmp_path, name):
    separators = SEPARATORS
    if name == "a.jsonl":
        # JSON allows these three as they are; the others have to be escaped, being controls.
        separators = "\u2028 \u2029 \x85"
    text = f"前{separators}后"
    content = {
        "a.tsv": f"label\ttext\n1\t{text}\n0\t差\n",
        "a.csv": f"label,text\n1,{text}\n0,差\n",
        "a.jsonl": f'{{"label": 1, "text": "{text}"}}\n{{"label": 0, "text": "差"}}\n',
    }[name]
    first = 1 if name == "a.jsonl" else 2
    assert rows(read(tmp_path, name, content)) == [(text, 1, first), ("差", 0, first + 1)]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n \n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16", "utf-16-le"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.tsv", ["label\ttext", "1\t 很好 ", "0\t差"]),
        ("a.csv", ["label,text", "1, 很好 ", "0,差"]),
        ("a.jsonl", ['{"label":1,"text":" 很好 "}', '{"label":0,"text":"差"}']),
    ],
)
def test_encodings_and_line_ends(tmp_path, name, lines, encoding, mark, end, newline):
    if mark and encoding == "utf-16":
        mark = ""  # the codec writes one itself
    content = (mark + "\n".join(lines) + end).replace("\n", newline).encode(encoding)
    found = read(tmp_path, name, content, encoding=encoding)
    assert [(e.text, e.label) for e in found] == [(" 很好 ", 1), ("差", 0)]


def test_the_locale_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    monkeypatch.setattr("locale.getencoding", lambda: "ascii", raising=False)
    assert read(tmp_path, "a.tsv", "label\ttext\n1\t好\n")[0].text == "好"


def test_labels_are_words_or_indices(tmp_path):
    for labels, found, expected in [
        (WORDS, ["正面", "负面", "正面"], [1, 0, 1]),
        (WORDS, ["1", "0", "0"], [1, 0, 0]),
        (("a", "b", "c"), ["2", "0", "1"], [2, 0, 1]),
        # Words that are digits: all labels fit as words, so they are words.
        (("1", "0"), ["1", "0", "1"], [0, 1, 0]),
        # One label that is no word makes all of them indices.
        (("1", "2"), ["1", "0", "1"], [1, 0, 1]),
    ]:
        content = "label\ttext\n" + "".join(f"{label}\t好\n" for label in found)
        assert [e.label for e in read(tmp_path, "a.tsv", content, labels)] == expected


def in_every_format(tmp_path, found, labels, **options):
    """The classes that the labels `found` get from .tsv, .csv, JSON strings and JSON numbers."""
    contents = [
        ("a.tsv", "text\tlabel\n", "好\t{}\n"),
        ("a.csv", "\ufefflabel,text\r\n", '"{}",好\r\n'),
        ("b.csv", "label,text\n", " {} ,好\n"),
        ("a.jsonl", "", '{{"label": "{}", "text": "好"}}\n'),
        ("b.jsonl", "", '{{"label": {}, "text": "好"}}\n'),
    ]
    for name, head, row in contents:
        content = head + "".join(row.format(label) for label in found)
        yield [e.label for e in read(tmp_path, name, content, labels, **options)]


STARS = ("1", "2", "3", "4", "5")
WRITTEN = "some labels are both a word of --labels and the number of another class; all are read as"


@pytest.mark.parametrize(
    ("labels", "found", "expected", "note"),
    [
        (STARS, "12345", [0, 1, 2, 3, 4], None),  # "5" is no index
        (STARS, "01234", [0, 1, 2, 3, 4], "class numbers (0..4)"),  # "0" is no word
        (STARS, "1234", [0, 1, 2, 3], "words (1, 2, 3, 4, 5)"),  # both fit
        (STARS, "4123", [3, 0, 1, 2], "words (1, 2, 3, 4, 5)"),
        (("1", "0"), "0110", [1, 0, 0, 1], "words (1, 0)"),
        (("0", "1"), "0110", [0, 1, 1, 0], None),  # both fit and agree
        (("-1", "1"), ["-1", "1"], [0, 1], None),
        (("0.5", "1.5"), ["1.5", "0.5"], [1, 0], None),
        (WORDS, "10", [1, 0], None),
    ],
)
def test_labels_mean_the_same_in_every_format(tmp_path, capsys, labels, found, expected, note):
    assert list(in_every_format(tmp_path, found, labels)) == [expected] * 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (5 if note else 0)
    assert all(x.startswith("note: ") and x.endswith(f"{WRITTEN} {note}") for x in lines)


def test_the_whole_file_decides_what_digits_are_even_with_a_limit(tmp_path, capsys):
    for found in ("12340", "12345", "12343", "11111", "43210", "54321"):
        whole = next(in_every_format(tmp_path, found, STARS))
        for limit in range(1, 6):
            expected = [whole[:limit]] * 5
            assert list(in_every_format(tmp_path, found, STARS, limit=limit)) == expected
    capsys.readouterr()
    # "0" alone says that the file has indices, and "5" that it has words.
    with pytest.raises(UserError, match=r"line 4: found the label '5', expected words"):
        next(in_every_format(tmp_path, "1052", STARS))
    with pytest.raises(UserError, match="line 4: found the label '5'"):
        next(in_every_format(tmp_path, "1052", STARS, limit=1))


def test_a_word_that_begins_with_a_space_is_matched_without_it(tmp_path):
    content = "label,text\nnegative,差\n positive,好\n"
    assert [e.label for e in read(tmp_path, "a.csv", content, (" negative", " positive"))] == [0, 1]


def test_limit_reads_and_validates_the_first_rows_only(tmp_path):
    content = "label\ttext\n1\t好\n0\t差\n\n9\tx\ty\n"
    assert rows(read(tmp_path, "a.tsv", content, limit=2)) == [("好", 1, 2), ("差", 0, 3)]
    assert len(read(tmp_path, "a.tsv", "label\ttext\n1\t好\n", limit=5)) == 1
    with pytest.raises(UserError, match="line 5: found 3 fields"):
        read(tmp_path, "a.tsv", content, limit=3)


# --- what is refused ------------------------------------------------------------------------------

QUOTING = 'a .csv has "..." around a field with a comma or newline; save a .tsv with quotes as .csv'
FIELDS = "as in the header: " + QUOTING
NO_ROWS = "{path}: found no rows, expected examples: give the right file"
TEXT_COLUMN = "expected one column of texts: name it by --text-column, or begin the file with the "
TEXT_COLUMN += "columns' names"
LABEL_COLUMN = TEXT_COLUMN.replace("text", "label")
WORKBOOK = (
    "{path}: found an old workbook, a Parquet file or an archive, expected text: save it as .csv "
    "in its program, or unpack it"
)
ARCHIVE = (
    "{path}: a workbook or archive that cannot be read (File is not a zip file); install openpyxl, "
    "or save it as .csv in its program"
)
TEXT = "expected valid characters, not all of them spaces: correct or remove the row"
LABEL = (
    "expected words (负面, 正面) or class numbers (0..1), one kind in all rows: correct it, or "
    "name the words with --labels"
)
NAME = "name the file's encoding by --encoding"
OBJECT = 'expected {"label": 1, "text": "..."}: correct it'
HEAD = "label\ttext\n"
GOOD = '{"label": 1, "text": "好"}\n'

REFUSED = {
    "zip": ("a.zip", b"PK\x03\x04\x14\x00", ARCHIVE),
    "xlsx, damaged, renamed": ("a.csv", b"PK\x03\x04\x14\x00", ARCHIVE),
    "xls": ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", WORKBOOK),
    "parquet": ("train.parquet", b"PAR1\x15\x04", WORKBOOK),
    "gzip": ("a.tsv.gz", b"\x1f\x8b\x08\x00", WORKBOOK),
    "empty tsv": ("a.tsv", "", NO_ROWS),
    "empty csv": ("a.csv", "\ufeff", NO_ROWS),
    "empty jsonl": ("a.jsonl", "\n \n", NO_ROWS),
    "header only tsv": ("a.tsv", HEAD, NO_ROWS),
    "header only csv": ("a.csv", "label,text\r\n\r\n", NO_ROWS),
    "no label column": (
        "a.tsv",
        "sentiment\ttext_a\n1\t好\n",
        "{path}, line 1: found the columns 'sentiment', 'text_a', " + LABEL_COLUMN,
    ),
    "two text columns": (
        "a.tsv",
        "label\ttext\ttext_a\n1\t好\t好\n",
        "{path}, line 1: found the columns 'text', 'text_a', " + TEXT_COLUMN,
    ),
    "duplicate column": (
        "a.tsv",
        "label\ttext\tlabel\n1\t好\t0\n",
        "{path}, line 1: found the columns 'label', 'label', " + LABEL_COLUMN,
    ),
    "a quoted tab": (
        "a.tsv",
        HEAD + '1\t"好\t的"\n',
        "{path}, line 2: found 3 fields, expected 2 " + FIELDS,
    ),
    "a quoted newline": (
        "a.tsv",
        HEAD + '1\t"好\n的"\n',
        "{path}, line 3: found 1 fields, expected 2 " + FIELDS,
    ),
    "no header, a long text": (
        "a.tsv",
        "1\t" + "好" * 99 + "\n0\t差\n",
        f"{{path}}, line 1: found the columns '1', '{'好' * 12}...{'好' * 13}', " + TEXT_COLUMN,
    ),
    "no label in an object": (
        "a.jsonl",
        GOOD + '{"text": "好"}\n',
        "{path}, line 2: found the columns 'text', " + LABEL_COLUMN,
    ),
    "too many fields": (
        "a.tsv",
        HEAD + "1\t好\n1\t好\t的\n",
        "{path}, line 3: found 3 fields, expected 2 " + FIELDS,
    ),
    "too few fields": (
        "a.tsv",
        HEAD + "1\t好\n好\n",
        "{path}, line 3: found 1 fields, expected 2 " + FIELDS,
    ),
    "unquoted comma, after a row of three lines": (
        "a.csv",
        'label,text\n1,"a\nb\nc"\n1,a,b\n',
        "{path}, line 5: found 3 fields, expected 2 as in the header: " + QUOTING,
    ),
    "quote not closed": (
        "a.csv",
        'label,text\n1,a\n1,"b\n0,c\n',
        "{path}, line 3: not valid CSV (unexpected end of data): " + QUOTING,
    ),
    "characters after a quote": (
        "a.csv",
        'label,text\n1,"b"c\n',
        "{path}, line 2: not valid CSV (',' expected after '\"'): " + QUOTING,
    ),
    "empty text": ("a.tsv", HEAD + "1\t好\n0\t\n", "{path}, line 3: found the text '', " + TEXT),
    "spaces alone": (
        "a.csv",
        "label,text\n0, \u3000\n",
        r"{path}, line 2: found the text ' \u3000', " + TEXT,
    ),
    "text is null": (
        "a.jsonl",
        GOOD + '{"label": 1, "text": null}\n',
        "{path}, line 2: found the text '', " + TEXT,
    ),
    "half a surrogate pair": (
        "a.jsonl",
        GOOD + r'{"label": 1, "text": "\ud83d"}',
        r"{path}, line 2: found the text '\ud83d', " + TEXT,
    ),
    "not json": (
        "a.jsonl",
        GOOD + "好\n",
        "{path}, line 2: not JSON objects (Expecting value); " + OBJECT,
    ),
    "json of another kind": (
        "a.jsonl",
        GOOD + '[1, "好"]\n',
        "{path}, line 2: not JSON objects (found [1, '好']); " + OBJECT,
    ),
    "label outside": (
        "a.tsv",
        HEAD + "1\t好\n2\t好\n0\t差\n",
        "{path}, line 3: found the label '2', " + LABEL,
    ),
    "label word unknown": (
        "a.tsv",
        HEAD + "好评\t好\n负面\t差\n",
        "{path}, line 2: found the label '好评', " + LABEL,
    ),
    "index in a file of words": (
        "a.tsv",
        HEAD + "正面\t好\n1\t好\n",
        "{path}, line 3: found the label '1', " + LABEL,
    ),
    "word in a file of indices": (
        "a.tsv",
        HEAD + "0\t好\n1\t好\n正面\t好\n",
        "{path}, line 4: found the label '正面', " + LABEL,
    ),
    "label with a space inside": (
        "a.csv",
        "label,text\n正 面,好\n",
        "{path}, line 2: found the label '正 面', " + LABEL,
    ),
    "label 1.0": ("a.tsv", HEAD + "1.0\t好\n", "{path}, line 2: found the label '1.0', " + LABEL),
    "label 1.0 in JSON": (
        "a.jsonl",
        GOOD + '{"label": 1.0, "text": "好"}',
        "{path}, line 2: found the label '1.0', " + LABEL,
    ),
    "label 01": ("a.tsv", HEAD + "01\t好\n", "{path}, line 2: found the label '01', " + LABEL),
    "label -1": (
        "a.jsonl",
        GOOD + '{"label": -1, "text": "好"}',
        "{path}, line 2: found the label '-1', " + LABEL,
    ),
    "label empty": ("a.tsv", HEAD + "\t好\n", "{path}, line 2: found the label '', " + LABEL),
    **{
        f"label {source} in JSON": (
            "a.jsonl",
            GOOD + f'{{"label": {source}, "text": "好"}}\n',
            f"{{path}}, line 2: found the label {shown}, expected a string or a number: correct it",
        )
        for source, shown in [
            ("true", "True"),
            ("false", "False"),
            ("null", "None"),
            ("[1]", "[1]"),
        ]
    },
}


def refusal(tmp_path, name, content, **options):
    with pytest.raises(UserError) as caught:
        read(tmp_path, name, content, **options)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(tmp_path, case):
    name, content, expected = REFUSED[case]
    assert refusal(tmp_path, name, content) == expected.replace("{path}", str(tmp_path / name))


def test_json_too_deep_for_the_parser(tmp_path):
    # The reason in brackets is the interpreter's own, in words that differ between versions.
    start = f"{tmp_path / 'a.jsonl'}, line 2: not JSON objects ("
    assert refusal(tmp_path, "a.jsonl", GOOD + "[" * 200_000).startswith(start)


def test_another_encoding_is_refused_with_its_byte_and_line(tmp_path):
    head = "label\ttext\n1\tgood\n"
    content = (head + "0\t差\n").encode("gb18030")
    offset = len(head) + len("0\t")
    assert content[offset] == 0xB2  # the first byte of 差 in GB18030, no start of a UTF-8 sequence
    path = tmp_path / "a.tsv"
    expected = f"{path}, line 3: byte offset {offset} is not valid utf-8: {NAME}"
    assert refusal(tmp_path, "a.tsv", content, encoding="utf-8") == expected
    assert read(tmp_path, "a.tsv", content, encoding="gb18030")[1].text == "差"

    # With a byte-order mark the offset still counts from the start of the file.
    marked = b"\xef\xbb\xbf" + content
    expected = expected.replace(f"offset {offset}", f"offset {offset + 3}")
    assert refusal(tmp_path, "a.tsv", marked, encoding="utf-8") == expected


def test_a_wrong_gb18030_is_not_answered_with_gb18030(tmp_path):
    content = b"label\ttext\n1\t\xff\n"
    assert refusal(tmp_path, "a.tsv", content, encoding="GB18030") == (
        f"{tmp_path / 'a.tsv'}, line 2: byte offset 13 is not valid GB18030: {NAME}"
    )


def test_line_of_a_bad_byte_in_utf16_is_counted_in_characters(tmp_path):
    # 上 is U+4E0A: its low byte is that of a newline, which counting bytes would take for one.
    content = "label\ttext\n1\t上上上\n".encode("utf-16-le") + b"\x00\xdc"
    assert refusal(tmp_path, "a.tsv", content, encoding="utf-16-le") == (
        f"{tmp_path / 'a.tsv'}, line 3: byte offset {len(content) - 2} is not valid utf-16-le: "
        + NAME
    )


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_utf16_is_recognised_by_its_mark(tmp_path, codec, encoding):
    content = "\ufefflabel\ttext\n1\t好\n".encode(codec)
    assert refusal(tmp_path, "a.tsv", content, encoding=encoding) == (
        f"{tmp_path / 'a.tsv'}, line 1: byte offset 0 is not valid {encoding}: {NAME}"
    )
    assert read(tmp_path, "a.tsv", content)[0].text == "好"


@pytest.mark.parametrize("encoding", ["nope", "hex", "", "idna", "undefined", "utf-8\0", "编码"])
def test_unknown_encoding(tmp_path, encoding):
    assert refusal(tmp_path, "a.tsv", HEAD + "1\t好\n", encoding=encoding) == (
        f"--encoding {encoding}: not a text encoding; try utf-8"
    )


def test_no_file(tmp_path):
    for name, reason in [
        ("none.tsv", "No such file or directory"),
        ("none", "No such file or directory"),
        ("好" * 300 + ".tsv", "File name too long"),
    ]:
        with pytest.raises(UserError) as caught:
            read_examples(tmp_path / name, WORDS)
        assert str(caught.value) == f"{tmp_path / name}: not a data file ({reason}); check the path"


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.tsv")
    (tmp_path / "zero.tsv").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "pipe.tsv", tmp_path / "zero.tsv"):
        with pytest.raises(UserError) as caught:
            read_examples(path, WORDS)
        reason = "Is a directory" if path == tmp_path else "it is not a regular file"
        assert str(caught.value) == f"{path}: not a data file ({reason}); check the path"


# --- hash, split, counts --------------------------------------------------------------------------


def examples_of(*pairs):
    return [Example(text, label, line) for line, (text, label) in enumerate(pairs, start=2)]


def test_hash_is_of_texts_and_labels_in_order(tmp_path):
    examples = examples_of(("好", 1), ("a\nb", 0))
    # printf '["\\u597d", 1]\n["a\\nb", 0]\n' | sha256sum
    expected = "4123621511807a6a53e1ed595a5e38ce657f036248f45fe981d3c2107f73eb47"
    assert examples_hash(examples) == expected
    others = [
        examples[::-1],
        examples[:1],
        examples_of(("好", 0), ("a\nb", 0)),
        # The bytes of all texts joined are the same, the borders between them are not.
        examples_of(("好a", 1), ("\nb", 0)),
        examples_of(('好", 1]\n["a\nb', 0)),
    ]
    assert len({expected, *map(examples_hash, others)}) == 1 + len(others)


def test_hash_does_not_depend_on_the_file(tmp_path):
    hashes = {
        examples_hash(read(tmp_path, "a.tsv", "label\ttext\n1\t好,的\n0\t差\n")),
        examples_hash(read(tmp_path, "a.csv", '\ufefftext_a,label\r\n"好,的",正面\r\n差,负面\r\n')),
        examples_hash(
            read(tmp_path, "a.jsonl", GOOD.replace("好", "好,的") + '{"text":"差","label":0}')
        ),
    }
    assert len(hashes) == 1


# 60 texts that stand once, 10 that stand twice, 4 that stand five times: 100 rows.
MIXED = examples_of(
    *[(f"评论{i}", i % 2) for i in range(60)],
    *[(f"重复{i % 10}", i % 2) for i in range(20)],
    *[(f"套话{i % 4}", i % 2) for i in range(20)],
)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_split_keeps_identical_texts_together(seed, fraction):
    train, held_out = held_out_split(MIXED, fraction, seed)
    assert sorted(train + held_out) == list(range(100))
    assert train == sorted(train) and held_out == sorted(held_out)
    assert not {MIXED[i].text for i in train} & {MIXED[i].text for i in held_out}
    # Exact: there are enough texts that stand once to fill what the others leave.
    assert len(held_out) == round(fraction * 100)


def test_split_is_the_same_on_every_platform():
    # printf '0\n评论0' | sha256sum, and so on: the two lowest of ten are held out.
    examples = examples_of(*[(f"评论{i}", 0) for i in range(10)])
    assert held_out_split(examples, 0.2, seed=0)[1] == [6, 7]
    assert held_out_split(examples, 0.2, seed=3)[1] == [1, 4]


def test_split_does_not_depend_on_row_order_and_little_on_other_rows():
    def texts(examples):
        return {examples[i].text for i in held_out_split(examples)[1]}

    singles = examples_of(*[(f"评论{i}", 0) for i in range(500)])
    assert texts(singles) == texts(singles[::-1])
    # Five rows more: at most five of the fifty held-out texts give way to better ranked new ones.
    more = singles + examples_of(*[(f"新{i}", 0) for i in range(5)])
    assert len(texts(singles) & texts(more)) >= 45


def test_split_of_few_rows():
    assert sorted(map(len, held_out_split(examples_of(("a", 0), ("b", 1))))) == [1, 1]
    train, held_out = held_out_split(examples_of(("a", 0), ("b", 0), ("c", 0)), fraction=0.99)
    assert (len(train), len(held_out)) == (1, 2)
    # No text fits into a share of one row: the one with the fewest copies is held out whole.
    copies = examples_of(("a", 0), ("b", 1), ("a", 0), ("b", 1), ("a", 0))
    assert held_out_split(copies) == ([0, 2, 4], [1, 3])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.9])
def test_split_keeps_a_text_of_every_class_to_train_on(seed, fraction):
    rare = [("只此一条", 1), ("两条", 2), ("两条", 2), ("两种", 0), ("两种", 3)]
    examples = examples_of(*rare, *[(f"评论{i}", 0) for i in range(45)])
    train, held_out = held_out_split(examples, fraction, seed)
    assert {examples[i].label for i in train} == {0, 1, 2, 3}
    # The same where the share is less than a row and one text is held out nevertheless.
    few = examples_of(("只此一条", 1), ("a", 0), ("b", 0))
    assert 0 in held_out_split(few, 0.1, seed)[0]
    # Where no class would be lost, the split is what it is without this rule.
    plenty = examples_of(*((text, 0) for text, _ in rare), *[(f"评论{i}", 0) for i in range(45)])
    rest, wanted = held_out_split(plenty, fraction, seed)
    if not set(wanted) & set(range(5)):
        assert (train, held_out) == (rest, wanted)
    assert len(held_out) == min(round(fraction * 50), 45) or fraction == 0.01


def test_split_refuses_what_cannot_be_split():
    for examples in (examples_of(("a", 0), ("a", 1)), []):
        with pytest.raises(UserError) as caught:
            held_out_split(examples)
        assert str(caught.value) == (
            f"found {min(1, len(examples))} distinct texts, at least 2 are needed: add data"
        )


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not CHNSENTICORP.is_dir(),
    reason="ChnSentiCorp is research data and not part of the project; it is read from "
    "../shared/data/chnsenticorp where that exists",
)
def test_chnsenticorp():
    train = read_examples(CHNSENTICORP / "train.tsv", WORDS)
    assert len(train) == 9600  # 9,146 if `"` were read as a quote
    assert Counter(example.label for example in train) == {0: 4801, 1: 4799}
    dev = read_examples(CHNSENTICORP / "dev.tsv", WORDS)
    assert len(dev) == 1200
    assert Counter(example.label for example in dev) == {0: 607, 1: 593}
    assert sum('"' in example.text for example in train) == 55

    texts = Counter(example.text for example in train)
    assert len(train) - len(texts) == 1351
    rest, held_out = held_out_split(train)
    assert len(held_out) == 960 and len(rest) == 8640
    assert not {train[i].text for i in rest} & {train[i].text for i in held_out}
