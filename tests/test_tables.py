"""Data files in the shapes that pandas, Excel, Label Studio and the datasets library write."""

import codecs
import csv
import io
import json
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import openpyxl
import pytest

import evaluate
import train
from qwen_min.errors import UserError
from qwen_min.files.data import examples_hash, find_labels, parse_names, read_examples
from qwen_min.files.tables import read_table
from qwen_min.report.audit import main as audit
from qwen_min.report.tables import main as report

WORDS = ("负面", "正面")
TEXTS = ['他说"好", 真的', "第一行\n第二行", "不错"]
LABELS = [0, 1, 1]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes, encoding: str = "utf-8") -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return name


def quoted(delimiter: str, names: str, index: bool = False) -> str:
    """As pandas' to_csv writes TEXTS: quotes where they are needed, an index without a name."""
    lines = [delimiter.join([""] * index + names.split(","))]
    for i, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True)):
        field = text.replace('"', '""')
        field = f'"{field}"' if set(field) & set(f'{delimiter}"\n') else field
        lines.append(delimiter.join([f"{i}"] * index + [field, f"{label}"]))
    return "\n".join([*lines, ""])


def all_quoted() -> str:
    data = io.StringIO()
    rows = [("text", "label"), *zip(TEXTS, LABELS, strict=True)]
    csv.writer(data, delimiter="\t", quoting=csv.QUOTE_ALL).writerows(rows)
    return data.getvalue()


def objects(names: str = "text,label") -> list[dict]:
    text, label = names.split(",")
    return [{text: t, label: y} for t, y in zip(TEXTS, LABELS, strict=True)]


def workbook(names: str = "text,label") -> bytes:
    book, data = openpyxl.Workbook(), io.BytesIO()
    for row in (names.split(","), *zip(TEXTS, LABELS, strict=True)):
        book.active.append(row)
    book.create_sheet("more").append(["no", "columns"])
    book.save(data)
    return data.getvalue()


def read_texts(source: str, text_column: str | None = None) -> Iterator[tuple[int, str]]:
    """Lines and texts, as predict reads them."""
    for line, text, _ in read_table(source, text_column=text_column, labelled=False):
        yield line, text


def task(text: str, *choices: list[str], **more: object) -> dict:
    """A task of Label Studio with the choices of each annotator."""

    def result(chosen: list[str]) -> dict:
        value = {"choices": chosen}
        return {"type": "choices", "from_name": "sentiment", "to_name": "text", "value": value}

    annotations = [{"id": 1, "was_cancelled": False, "result": [result(c)]} for c in choices]
    return {"id": 7, "data": {"text": text}, "annotations": annotations, "predictions": []} | more


STUDIO = [task(text, [WORDS[y]]) for text, y in zip(TEXTS, LABELS, strict=True)]
MIN = [{"id": 1, "text": t, "label": WORDS[y]} for t, y in zip(TEXTS, LABELS, strict=True)]
SHAPES = {
    "pandas, with index": ("a.csv", quoted(",", "text,label", index=True)),
    "Excel, utf-8-sig": ("a.csv", codecs.BOM_UTF8 + quoted(",", "Text,LABEL").encode()),
    "Excel, semicolons": ("a.csv", quoted(";", "text,label").replace("\n1\n", "\n1\r\n")),
    "Excel, Unicode text": ("a.txt", quoted("\t", "text,label").encode("utf-16")),
    "Excel, GB18030": ("a.csv", quoted(",", "内容,类别").encode("gb18030")),
    "the ending is wrong": ("a.tsv", quoted(";", "sentence,category")),
    "tabs, all quoted": ("a.tsv", all_quoted()),
    "records": ("a.json", json.dumps(objects())),
    "records, indented": ("a.txt", json.dumps(objects("评论,标签"), indent=1, ensure_ascii=False)),
    "JSON lines": ("a.json", "\n".join(map(json.dumps, objects("review,label")))),
    "JSON lines as text": ("a.txt", "\n".join(map(json.dumps, objects()))),
    "Label Studio": ("a.json", json.dumps(STUDIO)),
    "Label Studio, JSON_MIN": ("a.json", json.dumps(MIN)),
    "workbook": ("a.xlsx", workbook()),
    "workbook, renamed": ("a.csv", workbook("文本,标签")),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_holds_the_same_examples(shape):
    examples = read_examples(write(*SHAPES[shape]), WORDS)
    assert [(e.text, e.label) for e in examples] == [*zip(TEXTS, LABELS, strict=True)]
    assert len({example.line for example in examples}) == 3
    texts = list(read_texts(SHAPES[shape][0]))
    assert texts == [(example.line, example.text) for example in examples]


def test_what_is_not_the_usual_is_said_in_one_line(capsys):
    read_examples(write("a.csv", quoted(",", "内容,类别"), "gb18030"), WORDS)
    assert capsys.readouterr().err.splitlines() == [
        "note: a.csv: not valid UTF-8, read as GB18030; if texts look wrong, give --encoding",
        "note: a.csv: columns read: texts from '内容', labels from '类别'",
    ]
    read_examples(write("a.csv", quoted(",", "text,label")), WORDS)
    assert capsys.readouterr().err == ""
    # The first decides: UTF-8 that is asked for is not guessed away.
    with pytest.raises(UserError, match=r"line 2: byte offset .* is not valid utf-8"):
        read_examples(write("a.csv", quoted(",", "text,label"), "gb18030"), WORDS, "utf-8")
    with pytest.raises(
        UserError, match=r"line 3: .* not valid gb18030, nor is the file utf-8: name"
    ):
        read_examples(write("a.csv", b"text,label\na,1\n\xff\xff,0\n"), WORDS)


def test_columns_are_named_by_the_user_or_missed_in_one_line(capsys):
    write("a.csv", "title,body,stars\nt,一,1\nu,二,0\n")
    found = read_examples("a.csv", WORDS, text_column="BODY", label_column="stars")
    assert [e.text for e in found] == ["一", "二"]
    for given, part in [
        ({}, "line 1: found the columns 'title', 'body', 'stars', expected one column of texts: "),
        ({"text_column": "body"}, "expected one column of labels: name it by --label-column"),
        ({"text_column": "x"}, "found the columns 'title', 'body', 'stars', expected 'x': name"),
    ]:
        with pytest.raises(UserError, match=part):
            read_examples("a.csv", WORDS, **given)
    with pytest.raises(UserError, match="found the columns 'Text', 'content', expected one col"):
        list(read_texts(write("b.csv", "Text,content\na,b\n")))
    assert list(read_texts("b.csv", text_column="content")) == [(2, "b")]
    found = read_examples(write("c.csv", " Text ,label,x,x\n一,1,,\n"), WORDS)  # x is not needed
    assert [e.text for e in found] == ["一"]
    for name in ("a.tsv", "a.txt"):
        assert list(read_texts(write(name, "text\n一, 二\n"))) == [(2, "一, 二")]
    assert list(read_texts(write("b.txt", "id\t内容\n1\t一\n"))) == [(2, "一")]
    for other in ('{"data": [{"text": "a"}]}', '[["a", 1]]', '["a"]', '"\ufefftext",label\na,1\n'):
        with pytest.raises(UserError, match="found the columns"):
            read_examples(write("a.json", "\ufeff" + other), WORDS)


def test_tasks_without_one_choice_are_skipped_and_counted(capsys):
    cancelled = {
        "annotations": [{"was_cancelled": True, "result": task("", ["正面"])["annotations"]}]
    }
    tasks = [
        STUDIO[0],
        task("两个", ["正面", "负面"]),
        task("不同", ["正面"], ["负面"]),
        task("同", ["正面"], ["正面"]),
        task("无"),
        task("取消", **cancelled),
    ]
    write("a.json", json.dumps(tasks))
    found = read_examples("a.json", WORDS)
    assert [(e.text, e.label, e.line) for e in found] == [(TEXTS[0], 0, 1), ("同", 1, 4)]
    said = "note: a.json: tasks with none or several choices skipped: 4 (the first: line 2)\n"
    assert capsys.readouterr().err == said
    assert len(list(read_texts("a.json"))) == 6  # a prediction needs no choice
    assert len(read_examples("a.json", WORDS, label_column="sentiment")) == 2
    with pytest.raises(UserError, match="found no rows"):
        read_examples("a.json", WORDS, label_column="another")
    flat = [
        {"text": "a", "sentiment": {"choices": ["负面", "正面"]}},
        {"text": "b", "sentiment": "负面"},
    ]
    write("min.json", json.dumps(flat))
    assert [e.line for e in read_examples("min.json", WORDS, label_column="sentiment")] == [2]
    with pytest.raises(UserError, match=r"a\.json: not JSON objects"):
        read_examples(write("a.json", '[{"data": {"text": "a"}, "annotations": [1]}]'), WORDS)


def test_texts_alone(capsys, monkeypatch):
    lines = "很好\n\n[赞] 不错, 内容好\n{坏}\n"
    expected = [(1, "很好"), (3, "[赞] 不错, 内容好"), (4, "{坏}")]
    assert list(read_texts(write("a.txt", lines))) == expected
    assert capsys.readouterr().err == "note: a.txt: blank rows skipped: 1 (the first: line 2)\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode("gb18030"))))
    assert list(read_texts("-")) == expected
    assert "note: standard input: not valid UTF-8" in capsys.readouterr().err
    assert list(read_texts(write("b.txt", "label\ttext\n1\t好\n\t\n0\t\n"))) == [(2, "好"), (4, "")]
    nulls = '{"text": null}\n{"text": NaN}\n{"text": ""}\n'
    assert list(read_texts(write("a.jsonl", nulls))) == [(1, ""), (2, ""), (3, "")]
    with pytest.raises(UserError, match=r"a.csv, line 1: found the columns '很好'"):
        list(read_texts(write("a.csv", lines)))


@pytest.mark.parametrize(
    ("name", "head", "row"),
    [
        ("a.txt", "", "第{}条，很好\n"),
        ("a.tsv", "label\ttext\n", '1\t"第{}条，很好\n'),
        ("a.csv", "label,text\n", '1,"第{}条，\n很好"\n'),
        ("a.jsonl", "", '{{"text": "第{}条，很好"}}\n'),
    ],
)
def test_memory_does_not_grow_with_the_file(name, head, row):
    peaks = []
    for n in (4_000, 40_000):
        write(name, head + "".join(row.format(i) for i in range(n)))
        tracemalloc.start()
        assert sum(1 for _ in read_texts(name)) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The first pass decodes a MiB at a time: up to 4 MiB as a Python string of Chinese.
    assert peaks[1] < 6 * 2**20, peaks


def test_a_workbook_without_openpyxl(monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match=r"a.xlsx: a workbook .*; install openpyxl, or save"):
        read_examples(write("a.xlsx", workbook()), WORDS)


def test_cells_of_a_workbook():
    book = openpyxl.Workbook()
    for row in ([None, None], ["text", "label", None], ["a", 1.0], [None, 2], [], [15.5, "2"]):
        book.active.append(row)
    book.active["F9"] = None
    book.save("a.xlsx")
    found = read_examples("a.xlsx", ("1", "2"), empty_texts=True)
    assert [(e.text, e.label, e.line) for e in found] == [("a", 0, 3), ("", 1, 4), ("15.5", 1, 6)]


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected", "said"),
    [
        ("0 1 1", "负面,正面", None),
        ("正面 负面", "负面,正面", None),
        ("1", "负面,正面", None),
        ("b a b", "a,b", "a (1), b (2)"),
        (
            "10 9 2",
            "2,9,10",
            "2 (1), 9 (1), 10 (1); to score words with a meaning: --labels '2=WORD,",
        ),
        ("正面 负面 中性", "中性,正面,负面", "中性 (1), 正面 (1), 负面 (1)"),
        (" ".join(f"w{i:02}" for i in range(12)), None, "w09 (1), … 12 in all"),
    ],
)
def test_labels_of_a_file(labels, expected, said, capsys):
    labels = labels.split()
    write("a.csv", "text,label\n" + "".join(f"x, {label} \n" for label in labels))
    assert find_labels("a.csv") == (expected or ",".join(labels))
    err = capsys.readouterr().err
    assert err.count("\n") == bool(said) and (said or "") in err
    assert not said or err.startswith("note: a.csv: --labels are the file's own, with their rows: ")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            ["a", "a"],
            r"a.csv: found the labels a \(2\), expected 2 to 1,000 words .* name their col",
        ),
        (
            [f"x{i}" for i in range(1001)],
            r"found the labels x0 \(1\), x1 .*… 1001 in all, expected",
        ),
        (
            ["a", '"b,c"'],
            r"found the labels b,c \(1\), expected 2 to 1,000 words without comma and =",
        ),
        (["a", "b=c"], r"found the labels b=c \(1\)"),
        (["a", ""], r"found the labels  \(1\)"),
    ],
)
def test_labels_of_a_file_that_cannot_be_classes(labels, said):
    write("a.csv", "text,label\n" + "".join(f"x,{label}\n" for label in labels))
    with pytest.raises(UserError, match=said):
        find_labels("a.csv")


def test_names_and_words():
    both = parse_names("negative= negative, positive= positive")
    assert both == (("negative", "positive"), (" negative", " positive"))
    assert parse_names("0=差，1=好、") == (("0", "1"), ("差", "好、"))
    assert parse_names("0=差、1=好") == (("0", "1"), ("差", "好"))
    assert parse_names("中性,a=差 ,好") == (("中性", "a", "好"), ("中性", "差", "好"))
    assert parse_names(" bad, good") == ((" bad", " good"),) * 2  # as before
    for wrong in ("a=,b=c", "a=x,b=x", "a=x,a=y", "=x,b=y", "a=x", "a=b,b"):
        with pytest.raises(UserError, match="--labels"):
            parse_names(wrong)


def run(command, *args: str) -> int:
    return command([*args, *(["--device", "cpu"] * (command not in (audit, report)))])


def test_other_words_than_the_files_are_scored(capsys):
    write("a.csv", "text,label\n" + "".join(f"评论{i},{'ab'[i % 2]}\n" for i in range(8)))
    out = ["--method", "zero_shot", "--data", "a.csv", "--output"]
    assert run(evaluate.main, *out, "names.json", "--labels", "a=差,b=好") == 0
    assert run(evaluate.main, *out, "words.json", "--labels", "a=坏,b=棒") == 0
    write("b.csv", Path("a.csv").read_text().replace(",a", ",差").replace(",b", ",好"))
    out[3] = "b.csv"
    assert run(evaluate.main, *out, "plain.json", "--labels", "差,好") == 0
    read = {n: json.loads(Path(f"{n}.json").read_text()) for n in ("names", "words", "plain")}
    assert [row["name"] for row in read["names"]["per_class"]] == ["a", "b"]
    same = ("label_mass", "brier", "confusion_matrix", "examples_hash")
    assert all(read["names"][key] == read["plain"][key] for key in same)
    assert read["words"]["brier"] != read["names"]["brier"]
    capsys.readouterr()
    assert run(report, "names.json", "words.json", "--format", "json") == 0
    assert len(json.loads(capsys.readouterr().out)["methods"]) == 2  # not seeds of one method


def test_a_run_keeps_the_labels_that_it_found(capsys):
    rows = [f"第{i}条,{'xyz'[i % 3]},一" for i in range(30)]
    write("a.csv", "\n".join(["body,topic,text", *rows]))
    columns = ["--text-column", "body", "--label-column", "topic"]
    frame = ["--template", "新闻：{text}\\n类别：", "--data", "a.csv"]
    given = ["--method", "head_only", "--output", "run", *frame, *columns]
    assert run(train.main, *given) == 0
    record = json.loads(Path("run/run.json").read_text())
    assert (record["arguments"]["labels"], record["labels"]) == ("x,y,z", ["x", "y", "z"])
    assert record["arguments"]["text_column"] == "body"
    assert capsys.readouterr().err.count("--labels are the file's own") == 1
    write("b.csv", "body,topic\n好,y\n")  # the run's labels count
    assert run(evaluate.main, "--run", "run", "--data", "b.csv", *columns) == 0
    assert "--labels" not in capsys.readouterr().err
    assert run(train.main, "--resume", "--output", "run") == 0
    assert run(audit, "a.csv", "b.csv", *columns) == 0
    assert "class z" in capsys.readouterr().out
    examples = read_examples("a.csv", "xyz", None, None, None, "body", "topic")
    assert record["data_hash"] == examples_hash(examples)


@pytest.mark.parametrize(
    ("labels", "template", "warned"),
    [
        ("体育,财经", None, True),
        ("差,一般,好", None, False),
        ("Negative,Positive", None, False),
        ("体育,财经", "新闻：{text}\\n类别：", False),
        (None, None, False),
    ],
)
def test_labels_that_do_not_answer_the_templates_question(labels, template, warned, capsys):
    given = ["--labels", labels] * bool(labels) + ["--template", template] * bool(template)
    assert run(evaluate.main, "--method", "zero_shot", "--explain", "很好", *given) == 0
    err = capsys.readouterr().err
    assert ("warning: the default template asks for" in err) is warned, err


def test_a_sentence_is_no_header(capsys):
    found = list(read_texts(write("a.txt", "text, as it came in\nbad, cold\n")))
    assert found == [(1, "text, as it came in"), (2, "bad, cold")]
    assert [text for _, text in read_texts(write("b.txt", "id,text\n1,好\n"))] == ["好"]


def test_what_is_not_read_or_empty_is_said(capsys):
    book = openpyxl.Workbook()
    for sheet in (book.active, book.create_sheet("二月")):
        for row in (["text", "label"], ["好", "正面"], [None, "负面"]):
            sheet.append(row)
    book.save("a.xlsx")
    assert [e.text for e in read_examples("a.xlsx", WORDS, empty_texts=True)] == ["好", ""]
    err = capsys.readouterr().err
    assert "a.xlsx: sheet Sheet is read, not 二月" in err
    assert "a.xlsx: empty texts: 1 (the first: line 3)" in err


def test_control_characters_that_excel_escapes_are_read():
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["text", "label"], ["干净_x000D_\n安静_x0009_近", "正面"], ["_x4E00_", "负面"]):
        book.active.append(row)
    book.save("a.xlsx")
    assert [text for _, text in read_texts("a.xlsx")] == ["干净\r\n安静\t近", "_x4E00_"]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv"])
def test_quotes_between_tabs_are_kept_with_a_note_whatever_the_files_name(name, capsys):
    found = read_examples(write(name, 'label\ttext\n0\t差\n1\t"好, 很好"\n'), WORDS)
    assert [example.text for example in found] == ["差", '"好, 很好"']
    note = "rows with a field that begins with a quote, which is kept: 1 (the first: line 3)"
    assert note in capsys.readouterr().err


def test_one_of_several_controls_must_be_named():
    """Sentiment and topic in one task: their choices are not one set of labels."""

    def result(control: str, choice: str) -> dict:
        return {"type": "choices", "from_name": control, "value": {"choices": [choice]}}

    def tasks(other: str) -> str:
        rows = [("好", "正面", "房间"), ("差", "负面", "早餐")]
        results = [[result(other, y), result("topic", topic)] for _, y, topic in rows]
        data = [{"text": text} for text, _, _ in rows]
        pairs = zip(data, results, strict=True)
        return json.dumps([{"data": d, "annotations": [{"result": r}]} for d, r in pairs])

    write("a.json", tasks("sentiment"))
    with pytest.raises(UserError, match="choices of sentiment, topic: name one of these"):
        read_examples("a.json", WORDS)
    assert [e.label for e in read_examples("a.json", WORDS, label_column="sentiment")] == [1, 0]
    topics = read_examples("a.json", ("房间", "早餐"), label_column="topic")
    assert [e.label for e in topics] == [0, 1]
    assert [text for _, text in read_texts("a.json")] == ["好", "差"]  # needs no labels
    # Also where one is called label, and where each task has a single one of them.
    write("b.json", tasks("label"))
    assert [e.label for e in read_examples("b.json", WORDS, label_column="label")] == [1, 0]
    mixed = [json.loads(tasks("topic"))[0], *json.loads(tasks("label"))]
    write("d.json", json.dumps(mixed))
    assert [e.line for e in read_examples("d.json", WORDS, label_column="label")] == [2, 3]
    apart = [("好", result("sentiment", "正面")), ("早", result("topic", "早餐"))]
    apart = [{"data": {"text": t}, "annotations": [{"result": [r]}]} for t, r in apart]
    with pytest.raises(UserError, match="choices of sentiment, topic"):
        read_examples(write("c.json", json.dumps(apart)), WORDS)


def test_a_task_may_have_other_results_or_none():
    choice = {"type": "choices", "from_name": "s", "value": {"choices": ["正面"]}}
    tasks = [{"data": {"text": "好"}, "annotations": [{"result": [{"type": "relation"}, choice]}]}]
    write("a.json", json.dumps([*tasks, {"data": {"text": "差"}}]))
    assert [(e.text, e.label) for e in read_examples("a.json", WORDS)] == [("好", 1)]
    assert [text for _, text in read_texts("a.json")] == ["好", "差"]


def test_a_label_that_is_not_a_number_is_refused():
    with pytest.raises(UserError, match="found the label nan"):
        read_examples(write("a.json", '[{"text": "a", "label": NaN}]'), ("a", "nan"))


def test_class_numbers_beside_the_words_of_a_run_are_said(capsys):
    write("a.csv", "text,label\n好,1\n差,0\n")
    assert [e.label for e in read_examples("a.csv", ("b", "a"), read_as="words")] == [1, 0]
    assert capsys.readouterr().err == "note: a.csv: labels are class numbers: 0 = b, 1 = a\n"
