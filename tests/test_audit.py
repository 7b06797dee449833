"""The audit's counts on rows made for each case and on real files; accuracy on clean rows."""

import contextlib
import io
import json
import shutil
import time
import unicodedata
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, make_tokenizer
from safetensors.numpy import save, save_file

import evaluate
import train
from qwen_min.errors import UserError
from qwen_min.files.data import Example, examples_hash, read_examples
from qwen_min.files.hub import TINY
from qwen_min.files.overlap import clean_part, fed_rows, normalised, text_hashes, training_examples
from qwen_min.metrics import wilson_interval
from qwen_min.report import audit
from qwen_min.report.audit import file_of, findings

WORDS = ("负面", "正面")
SAMPLE = REPO / "qwen_min" / "sample"
REAL = REPO.parent / "shared" / "data" / "chnsenticorp"
A = [
    ("房间很干净，服务也好。", 1),
    ("书的印刷很差。", 0),
    ("房间很干净，服务也好。", 1),  # line 4: line 2 again
    ("房间 很干净,服务也好", 1),  # line 5: the same, normalised
    ("书的印刷很差。", 1),  # line 6: line 3 again, with the other label
    ("屏幕不错", 1),
]
B = [
    ("书的印刷很差。", 0),  # line 2: in A, there with both labels
    ("屏幕不错！", 0),  # line 3: in A, normalised, with the other label
    ("散热不好", 0),
    ("散热不好", 0),  # line 5: line 4 again
]


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = audit.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def tsv(path: Path, rows: list[tuple[str, int]]) -> Path:
    lines = ["label\ttext_a", *(f"{label}\t{text}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    return tsv(tmp_path / "a.tsv", A), tsv(tmp_path / "b.tsv", B)


def counted(out: str) -> dict[str, list[str]]:
    """The table's rows by what they count."""
    lines = out.split("\n\n")[0].splitlines()[1:]
    cells = [[c.strip() for c in line.split("  ") if c.strip()] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_counts(files):
    status, out, err = command(*files)
    assert (status, err) == (0, "")
    assert out.splitlines()[0].split() == ["a.tsv", "b.tsv"]
    table = counted(out)
    assert table["rows"] == ["6", "4"]
    assert table["class 负面"] == ["1 (16.7%)", "4 (100.0%)"]
    assert table["class 正面"] == ["5 (83.3%)", "0 (0.0%)"]
    assert table["duplicates: rows with an earlier row's text"] == ["2", "1"]
    assert table["the same, normalised"] == ["3", "1"]
    assert table["texts with several labels"] == ["1", "0"]
    assert table["these, normalised"] == ["1", "0"]
    # Lengths of A: 4, 7, 7, 11, 11, 11; of B: 4, 4, 5, 7, a median of 4.5.
    assert table["characters: median, 95th percentile, longest"] == ["9, 11, 11", "4, 7, 7"]
    assert "rows of b.tsv that stand in a.tsv: 1 of 4 verbatim, 2 normalised (50.0%)" in out
    assert "labels in the two together: 1 verbatim, 2 normalised" in out
    assert "tokens" not in out


def test_the_list_names_every_row(files):
    a, b = files
    out = command(a, b, "--list")[1]
    listed = out.split("\n\n")[-1].splitlines()
    assert listed == [
        f"{a}, line 3: labelled 负面, otherwise in line 6: 书的印刷很差。",
        f"{a}, line 4: duplicate of line 2: 房间很干净，服务也好。",
        f"{a}, line 5: duplicate of line 2, normalised: 房间 很干净,服务也好",
        f"{a}, line 6: duplicate of line 3: 书的印刷很差。",
        f"{a}, line 6: labelled 正面, otherwise in line 3: 书的印刷很差。",
        f"{a}, line 7: labelled 正面, otherwise in b.tsv, line 3, normalised: 屏幕不错",
        f"{b}, line 2: stands in a.tsv, line 3: 书的印刷很差。",
        f"{b}, line 2: labelled 负面, otherwise in a.tsv, line 6: 书的印刷很差。",
        f"{b}, line 3: stands in a.tsv, line 7, normalised: 屏幕不错！",
        f"{b}, line 3: labelled 负面, otherwise in a.tsv, line 7, normalised: 屏幕不错！",
        f"{b}, line 5: duplicate of line 4: 散热不好",
    ]


def test_a_copy_of_a_file_stands_in_it_line_by_line(tmp_path):
    a, b = (tsv(tmp_path / name, A[:2]) for name in ("a.tsv", "b.tsv"))
    out = command(a, b, "--list")[1]
    assert "rows of b.tsv that stand in a.tsv: 2 of 2 verbatim, 2 normalised (100.0%)" in out
    assert [line.split(": ")[1] for line in out.split("\n\n")[-1].splitlines()] == [
        "stands in a.tsv, line 2",
        "stands in a.tsv, line 3",
    ]


def test_one_file_alone(files):
    status, out, _ = command(files[0])
    assert status == 0
    assert "stand in" not in out
    assert "together" not in out
    assert "b.tsv" not in command(files[0], "--list")[1]


def test_tokens_and_the_cut(tmp_path, files):
    make_tokenizer(tmp_path)
    data = tsv(tmp_path / "long.tsv", [("差" * 9, 0), ("a b c", 1)])
    rows = read_examples(data, WORDS)
    tokens = file_of(str(data), rows, audit.Tokenizer(tmp_path)).tokens
    assert tokens[0] > tokens[1] > 1
    for cut, over in ((tokens[0], "0"), (tokens[0] - 1, "1"), (1, "2")):
        out = command(data, "--model", tmp_path, "--max-text-tokens", cut, "--list")[1]
        table = counted(out)
        assert table[f"texts that the cut at {cut} tokens shortens"] == [over]
        assert out.count(f"tokens, cut to {cut}: ") == int(over)
    found = table["tokens: median, 95th percentile, longest"]
    assert found[0].startswith(f"{sum(tokens) / 2:.0f}, ")
    assert found[0].endswith(f", {max(tokens)}")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ＡＢＣ１２", "ABC12", True),  # full width
        ("很 好\t吃\u3000\u200b", "很好吃", True),  # white space, also of zero width
        ("好，真的好！", "好,真的好", True),
        ("……", "。。", False),  # NFKC makes six dots of the first
        ("？！", "。", False),
        ("？！", "?!", True),
        ("很好", "很 不好", False),
        ("ABC", "abc", False),
        ("3+2", "32", False),  # symbols are not punctuation
        ("e\u0301", "é", True),
    ],
)
def test_what_counts_as_one_text(one, other, same):
    assert (normalised(one) == normalised(other)) is same
    assert normalised(one)


def test_no_punctuation_is_left():
    every = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x11000)]))
    kinds = {unicodedata.category(char)[0] for char in normalised(every)}
    assert kinds == {"L", "M", "N", "S"}


def test_the_counts_of_the_real_files():
    if not REAL.exists():
        pytest.skip("needs ChnSentiCorp, which is not part of the project, in ../shared/data")
    paths = [REAL / f"{name}.tsv" for name in ("train", "dev")]
    files = [file_of(str(path), read_examples(path, WORDS), None) for path in paths]
    out = audit.format_audit(files, WORDS, 256)
    table = counted(out)
    assert table["rows"] == ["9600", "1200"]
    assert table["class 正面"][1].startswith("593 ")
    assert table["duplicates: rows with an earlier row's text"] == ["1351", "22"]
    assert "rows of dev.tsv that stand in train.tsv: 338 of 1200 verbatim" in out
    assert "labels in the two together: 32 verbatim" in out
    # The list has exactly the rows that the table counts.
    listed = findings(files, WORDS, 256)
    exact = [line for line in listed if ", normalised: " not in line]
    assert sum(": stands in train.tsv, line " in line for line in exact) == 338
    for file, rows in zip(files, (1351, 22), strict=True):
        start = f"{file.name}, line "
        assert sum(": duplicate of " in x and x.startswith(start) for x in exact) == rows


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "required: A"),
        (["a.tsv", "b.tsv", "c.tsv"], "unrecognized arguments: c.tsv"),
        (["missing.tsv"], "missing.tsv: not a data file (No such"),
        (["a.tsv", "--labels", "好"], "at least two classes"),
        (["a.tsv", "--encoding", "latin-9000"], "not a text encoding"),
        (["a.tsv", "gbk.tsv", "--encoding", "utf-8"], "not valid utf-8"),
        (["a.tsv", "--model", "."], "tokenizer.json: no such file"),
        (["a.tsv", "--max-text-tokens", "0"], "not a whole number of at least 1"),
        (["three.tsv", "--labels", "差,好"], "found the label '2'"),
        (["three.tsv"], "found the labels 2 (1), expected 2 to 1,000"),
        (["a.tsv", "--text-column", "review"], "expected 'review': name it by --text-column"),
    ],
)
def test_a_mistake_gets_one_line(files, monkeypatch, arguments, part):
    monkeypatch.chdir(files[0].parent)
    Path("gbk.tsv").write_bytes("label\ttext_a\n1\t很好\n".encode("gb18030"))
    tsv(Path("three.tsv"), [("好", 2)])
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


def test_encoding_and_labels(tmp_path):
    path = tmp_path / "gbk.csv"
    path.write_bytes("label,text\n好,不错\n差,太慢\n中,还行\n".encode("gb18030"))
    out = command(path, "--encoding", "gb18030", "--labels", "差,中,好")[1]
    assert counted(out)["class 中"] == ["1 (33.3%)"]


# Accuracy on the clean part


def test_clean_part_on_a_worked_example():
    texts = ["很好", "很好！", "不好", "太慢", "还行"]
    examples = [Example(text, i % 2, i + 2) for i, text in enumerate(texts)]
    training = [("train.tsv", [Example("很好", 1, 2), Example("书很好", 1, 3)])]
    found = clean_part(training, examples, [0, 1, 0, 0, 1], [])
    # Three rows are clean, with classes 0, 1, 0; only the first prediction is right.
    assert found == {
        "train_data": "train.tsv",
        "n": 3,
        "accuracy": 1 / 3,
        "accuracy_interval": list(wilson_interval(1, 3)),
    }
    assert clean_part([], examples, [0] * 5, []) is None
    none_left = clean_part([("train.tsv", examples)], examples, [0] * 5, [])
    assert (none_left["n"], none_left["accuracy"]) == (0, None)
    assert "accuracy_interval" in json.dumps(none_left)


def test_a_run_knows_its_training_data(tmp_path, capsys):
    path = tsv(tmp_path / "a.tsv", A)
    examples = [Example(text, label, 0) for text, label in A]
    arguments = {"data": str(path), "labels": "负面,正面", "encoding": "utf-8", "limit": 4}
    record = {"arguments": arguments, "labels": ["负面", "正面"]}
    record["data_hash"] = examples_hash(examples[:4])
    args = {"train_data": None, "encoding": "ascii", "adapter": None}
    args = Namespace(**args, text_column=None, label_column=None)
    found = training_examples(args, ("x", "y"), record)
    assert found == [(str(path), [Example(*row, i + 2) for i, row in enumerate(A[:4])])]
    assert training_examples(args, WORDS, None) == []
    # A file that the user names takes precedence over the run's, and is read whole.
    given = {"train_data": str(tsv(tmp_path / "b.tsv", B)), "encoding": "utf-8"}
    given = Namespace(**vars(args) | given)
    ((_, named),) = training_examples(given, WORDS, record)
    assert [(example.text, example.label) for example in named] == B
    # The rows of --dev chose the step: they are not new texts either.
    dev = tsv(tmp_path / "dev.tsv", B)
    dev_hash = examples_hash([Example(*row, 0) for row in B])
    with_dev = record | {"arguments": arguments | {"dev": str(dev)}, "dev_hash": dev_hash}
    rows = [
        [(e.text, e.label) for e in known] for _, known in training_examples(args, WORDS, with_dev)
    ]
    assert rows == [A[:4], B] and len(training_examples(given, WORDS, with_dev)) == 2
    assert capsys.readouterr().err == ""
    tsv(dev, A)
    assert training_examples(args, WORDS, with_dev) == []
    assert f"{dev}: has changed" in capsys.readouterr().err
    assert len(training_examples(given, WORDS, with_dev)) == 1
    assert "note: its texts count as new: " in capsys.readouterr().err

    tsv(path, B)
    assert training_examples(args, WORDS, record) == []
    changed = capsys.readouterr().err
    assert "has changed since the run was trained on it" in changed
    path.unlink()
    assert training_examples(args, WORDS, record) == []
    gone = capsys.readouterr().err
    assert "not a data file (No such file" in gone
    assert gone.count("\n") == changed.count("\n") == 1


def test_evaluate_says_how_it_does_on_clean_rows(tmp_path, reference, files, capsys):
    b = tsv(tmp_path / "test.tsv", B[1:])
    given = ["--method", "zero_shot", "--model", reference[0], "--data", b, "--device", "cpu"]
    given += ["--template", r"{text}\n情感倾向：\n", "--output", tmp_path / "r.json"]
    assert evaluate.main([*map(str, given), "--train-data", str(files[0])]) == 0
    clean = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["clean"]
    assert (clean["n"], clean["train_data"]) == (2, str(files[0]))  # 屏幕不错！ stands in A
    assert clean["accuracy"] in (0.0, 1.0)  # two rows of one text and one class
    line = next(x for x in capsys.readouterr().out.splitlines() if "clean part" in x)
    assert line.split()[2] == f"{clean['accuracy']:.4f}"
    assert f"2 texts that are not in {files[0]}" in line

    assert evaluate.main([*map(str, given), "--train-data", str(b)]) == 0
    assert "every text is in" in capsys.readouterr().out
    assert evaluate.main([*map(str, given), "--train-data", "missing.tsv"]) == 2
    assert "missing.tsv: not a data file (No such" in capsys.readouterr().err
    assert evaluate.main([*map(str, given[:-1]), str(files[0]), "--train-data", str(files[0])]) == 2
    assert "already the data or another output" in capsys.readouterr().err


def test_rows_that_a_probes_adapter_was_trained_on_are_not_clean(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    heads, *rows = (SAMPLE / "train.tsv").read_text(encoding="utf-8").splitlines()
    for name, part in (("a.tsv", rows[:40]), ("b.tsv", rows[40:80])):
        Path(name).write_text("\n".join([heads, *part]) + "\n", encoding="utf-8")
    lora = ["--method", "lora_label_scoring", "--data", "a.tsv", "--output", "lora"]
    assert train.main([*lora, "--epochs", "1"]) == 0
    shutil.copytree("lora/adapter", "alone")
    capsys.readouterr()
    for adapter, clean in (("lora/adapter", 0), ("alone", 40)):
        probe = ["--method", "head_only", "--data", "b.tsv", "--output", f"of-{clean}"]
        assert train.main([*probe, "--adapter", adapter]) == 0
        assert ("alone is in no run" in capsys.readouterr().err) == bool(clean)
        assert evaluate.main(["--run", f"of-{clean}", "--data", "a.tsv", "--output", "r.json"]) == 0
        assert json.loads(Path("r.json").read_text(encoding="utf-8"))["clean"]["n"] == clean
        Path("r.json").unlink()
        method = ["--method", "lora_label_scoring", "--adapter", adapter, "--data", "a.tsv"]
        assert evaluate.main([*method, "--output", "r.json"]) == 0
        found = json.loads(Path("r.json").read_text(encoding="utf-8"))["clean"]
        assert (found and found["n"]) == (None if clean else 0)
        Path("r.json").unlink()
        assert ("alone is in no run" in capsys.readouterr().err) == bool(clean)
    record = json.loads(Path("of-0/run.json").read_text(encoding="utf-8"))
    for damaged in ("x", [5], [{"path": 1}], {"path": "a.tsv"}):
        text = json.dumps(record | {"adapter_files": damaged})
        Path("of-0/run.json").write_text(text, encoding="utf-8")
        assert evaluate.main(["--run", "of-0", "--data", "a.tsv"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: of-0/run.json: ") and "adapter_files" in err


# Texts in the model's own training data


def test_looking_up_training_texts_costs_what_hashing_them_costs(tmp_path):
    own = [f"评论{i}" for i in range(20_000)]
    save_file({"texts": text_hashes(own)}, tmp_path / "fed.safetensors")
    texts = [text for i in range(1000) for text in (f"{own[7 * i]} ！", f"新评论{i}")]
    started = time.perf_counter()
    text_hashes(texts)
    hashing = time.perf_counter() - started
    found = fed_rows(tmp_path, [Example(text, 0, 0) for text in texts])
    assert found == list(range(0, 2000, 2))
    # Sorting all hashes again for each row takes about 5 ms a row, 10 s.
    assert time.perf_counter() - started < 10 * hashing + 1


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"text": np.zeros(3, np.int64)}, "texts"),
        ({"texts": np.zeros(3, np.float32)}, "texts are float32, expected int64"),
        (None, "header"),
    ],
)
def test_hashes_of_another_form_are_refused(tmp_path, tensors, reason):
    path = tmp_path / "fed.safetensors"
    path.write_bytes(save(tensors) if tensors else b"{}")
    with pytest.raises(UserError) as caught:
        fed_rows(tmp_path, [Example("好", 0, 0)])
    start = f"{path}: not the hashes of a model's training texts ("
    assert str(caught.value).startswith(start) and reason in str(caught.value)


# Through the commands: what their notes and errors say about a data file


def trained(tmp_path: Path, data: Path, *more: str) -> int:
    """The exit status of training a probe on the small model."""
    import train

    given = ["--method", "head_only", "--model", "tiny", "--device", "cpu", "--data", str(data)]
    return train.main([*given, "--output", str(tmp_path / "run"), *more])


def test_a_class_with_one_row_keeps_it_to_train_on(tmp_path, capsys):
    rows = [(f"房间{i}", 0) for i in range(19)]
    # SHA-256 of "8\n只此一条" is lower than that of any other text: without a rule, it is held out.
    data = tsv(tmp_path / "a.tsv", [*rows, ("只此一条", 1)])
    assert trained(tmp_path, data, "--data-seed", "8") == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (record["training_rows"], record["held_out_rows"]) == (18, 2)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("rows", "more", "reason"),
    [
        ([("a", 0), ("b", 0)], [], "no row in the file: add rows, or leave its word out"),
        ([("a", 0), ("b", 0), ("c", 1)], ["--limit", "2"], "no row in the first 2 (--limit): add"),
        ([("a", 0), ("b", 1)], [], "its only text is held out, and every other text is a class's"),
    ],
)
def test_a_class_that_cannot_be_trained_gets_the_true_reason(tmp_path, capsys, rows, more, reason):
    assert trained(tmp_path, tsv(tmp_path / "a.tsv", rows), *more) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and reason in err
    assert not (tmp_path / "run").exists()


def evaluated(tmp_path: Path, data: Path, *more: str) -> dict:
    """The results of zero_shot with the small model."""
    given = ["--method", "zero_shot", "--model", "tiny", "--device", "cpu", "--data", str(data)]
    assert evaluate.main([*given, "--output", str(tmp_path / "results.json"), *more]) == 0
    return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))


def notes(capsys) -> list[str]:
    """The notes on stderr; nothing else is there."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: ") for line in lines), lines
    return lines


def test_spaces_between_label_words_change_nothing_but_a_note(tmp_path, capsys):
    data = tsv(tmp_path / "a.tsv", [("这条评论写于七月八日", 1), ("灯坏了，没人来修", 0)])
    sets = ["--label-sets", "差,好;消极,积极"]
    right = evaluated(tmp_path, data, "--labels", "负面,正面", *sets)
    assert notes(capsys) == []
    for labels in ("负面, 正面", "负面，正面", "负面、正面"):
        found = evaluated(tmp_path, data, "--labels", labels, "--label-sets", "差，好; 消极,积极")
        for key in ("label_ids", "accuracy", "label_sets"):
            assert found[key] == right[key]
        said = [note.split("'")[0] for note in notes(capsys)]
        assert said == ["note: --labels "] * (" " in labels) + ["note: --label-sets "]


def test_one_note_of_digits_in_every_command(tmp_path, capsys):
    """One content as CSV words and as JSON numbers: the same examples, and one note a file."""
    rows = [(f"房间{i}", i % 4 + 1) for i in range(12)]
    (tmp_path / "a.csv").write_text(
        "label,text\n" + "".join(f"{label},{text}\n" for text, label in rows), encoding="utf-8"
    )
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    )
    frame = ["--template", "评论：{text}\n星级："]  # the default's question does not fit stars
    hashes, stars = set(), ["--labels", "1,2,3,4", *frame]
    for name in ("a.csv", "a.jsonl"):
        status, out, err = command(tmp_path / name, "--labels", "1,2,3,4,5")
        assert (status, err.count("\n")) == (0, 1)
        assert err.startswith(f"note: {tmp_path / name}: ")
        assert err.endswith("read as words (1, 2, 3, 4, 5)\n")
        assert counted(out)["class 1"] == ["3 (25.0%)"] and counted(out)["class 5"] == ["0 (0.0%)"]
        (tmp_path / name).rename(tmp_path / f"new{name}")
        data = tmp_path / f"new{name}"
        assert trained(tmp_path / name, data, *stars) == 0
        assert notes(capsys) == []  # with four words, a 4 can only be a word
        record = json.loads((tmp_path / name / "run" / "run.json").read_text(encoding="utf-8"))
        hashes.add(record["data_hash"])
    assert len(hashes) == 1
    words = ["--labels", "1,2,3,4,5", *frame, "--train-data", str(tmp_path / "newa.csv")]
    found = evaluated(tmp_path, tmp_path / "newa.jsonl", *words, "--limit", "2")
    assert found["clean"]["n"] == 0
    assert [note.split(":")[1] for note in notes(capsys)] == [
        f" {tmp_path / name}" for name in ("newa.jsonl", "newa.csv")
    ]


def test_tokens_are_counted_only_with_a_tokenizer_that_evaluate_accepts(tmp_path, capsys):
    shutil.copytree(TINY, tmp_path / "model")
    config = {"additional_special_tokens": ["[差评]"]}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    sample = str(TINY.parent / "sample" / "test.tsv")
    assert audit.main([sample, "--model", str(tmp_path / "model")]) == 2
    assert "its added tokens are not those of tokenizer.json" in capsys.readouterr().err
