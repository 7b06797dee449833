"""evaluate.py as its users meet it: the table, the two files, and one line for each mistake."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn import metrics as sk
from sklearn.dummy import DummyClassifier

import evaluate
import qwen_min
from qwen_min.command.classifier import Outcome
from qwen_min.command.finite import NotFinite
from qwen_min.command.outcome import prediction_lines
from qwen_min.command.summary import format_results, majority
from qwen_min.command.task import warn_about_labels
from qwen_min.command.terminal import columns
from qwen_min.fast import forms
from qwen_min.files.data import Example, read_examples
from qwen_min.files.weights import load_model
from qwen_min.metrics import evaluate_predictions
from qwen_min.prompt import build_prompts, parse_template
from qwen_min.scoring import score_label
from qwen_min.tokenizer import Tokenizer

REPO = Path(__file__).resolve().parent.parent
SAMPLE = REPO / "qwen_min" / "sample" / "test.tsv"
# The small tokenizer of the tests has a token `：负`: only after a newline do labels begin anew.
TEMPLATE = r"评论：{text}\n情感倾向：\n"
N = 24
# fp32, small checkpoint, sums of a few log-probabilities of up to 20.
FP32 = 1e-5


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `evaluate.py --method zero_shot` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = evaluate.main(["--method", "zero_shot", *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def defaults(**changes: object) -> list[str]:
    """Arguments that work together, and what is to differ from them."""
    chosen = {"template": TEMPLATE, "device": "cpu", "limit": N, "max_text_tokens": 40} | changes
    return [
        part
        for name, value in chosen.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """The sample's texts with labels of three classes, as words."""
    path = tmp_path_factory.mktemp("data") / "three.jsonl"
    words = np.random.default_rng(0).choice(["好评", "差评", "正向"], N)
    rows = [
        json.dumps({"text": example.text, "label": word}, ensure_ascii=False)
        for example, word in zip(read_examples(SAMPLE, "01", limit=N), words, strict=True)
    ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


class Run:
    """A run that succeeded: what it printed and what it wrote."""

    def __init__(self, directory: Path, **arguments: object):
        output, predictions = directory / "results.json", directory / "predictions.jsonl"
        status, self.out, self.err = command(
            *defaults(output=output, predictions=predictions, **arguments)
        )
        assert status == 0
        assert {*directory.iterdir()} == {output, predictions}
        self.results = json.loads(output.read_text(encoding="utf-8"))
        self.bytes = predictions.read_bytes()
        rows = [json.loads(line) for line in self.bytes.decode().splitlines()]
        assert [row["index"] for row in rows] == [*range(len(rows))]
        self.labels = np.array([row["label"] for row in rows])
        self.predictions = np.array([row["prediction"] for row in rows])
        self.scores = np.array([row["scores"] for row in rows])


@pytest.fixture(scope="module", params=["two classes", "three classes"])
def finished(request, reference, three, tmp_path_factory) -> Run:
    """A run on the tiny checkpoint."""
    data = (
        {"data": SAMPLE}
        if request.param == "two classes"
        else {"data": three, "labels": "好评,差评,正向"}
    )
    return Run(tmp_path_factory.mktemp("run"), model=reference[0], **data)


@pytest.fixture(scope="module")
def two(reference, tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), model=reference[0], data=SAMPLE)


# What a run says


def test_the_table_shows_every_figure(finished):
    results, rows = finished.results, [line.split() for line in finished.out.splitlines()]
    by_name = {row[0]: row for row in rows if row}

    def shown(value: float) -> str:
        return f"{value:.4f}"

    low, high = results["accuracy_interval"]
    words = [row["name"] for row in results["per_class"]]
    assert by_name["majority"][1] == shown(results["majority_share"])
    assert by_name["majority"][-1] in words
    assert by_name["method"] == ["method", "zero_shot"]
    assert by_name["examples"][:2] == ["examples", str(N)]
    assert f"({results['truncated_rows']} of {N} texts shortened)" in finished.out
    interval = f"95 % interval {shown(low)} to {shown(high)}"
    assert by_name["accuracy"][1:] == [shown(results["accuracy"]), *interval.split()]
    assert by_name["AUC-ROC"][1] == shown(results["auc_roc"])
    assert by_name["Brier"][1:] == [shown(results["brier"]), *results["brier_kind"].split()]
    assert by_name["ECE"][1] == shown(results["ece"])
    assert by_name["label"][:3] == ["label", "mass", shown(results["label_mass"])]
    assert by_name["speed"][1:3] == [f"{results['examples_per_second']:.1f}", "examples/s,"]
    assert by_name["speed"][-3:] == ["float32", "on", "cpu"]
    macro = {"name": "macro", **results["macro"], "support": N}
    for row in (*results["per_class"], macro):
        figures = [shown(row[key]) for key in ("precision", "recall", "f1")]
        assert [row["name"], *figures, str(row["support"])] in rows
    for row, counts in zip(results["per_class"], results["confusion_matrix"], strict=True):
        assert [row["name"], *map(str, counts)] in rows
    heads = [row["name"] for row in results["per_class"]]
    assert ["true", "\\", "predicted", *heads] in rows
    assert finished.err == ""


def test_the_results_follow_from_the_predictions(finished):
    """Every figure once more, from the scores in the other file and by another library."""
    results, y, scores = finished.results, finished.labels, finished.scores
    classes = range(scores.shape[1])
    guess = np.array([max(classes, key=lambda c: row[c]) for row in scores])
    assert finished.predictions.tolist() == guess.tolist()
    assert results["n"] == len(y) == N and results["off_track"] == 0
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    one_hot = np.eye(len(classes))[y]
    recomputed = {"accuracy": sk.accuracy_score(y, guess), "log_loss": sk.log_loss(y, p)}
    if len(classes) == 2:
        recomputed["auc_roc"] = sk.roc_auc_score(y, scores[:, 1] - scores[:, 0])
        recomputed["brier"] = sk.brier_score_loss(y, p[:, 1])
        headline = sk.precision_recall_fscore_support(y, guess, average="binary", zero_division=0)
        assert [results[k] for k in ("precision", "recall", "f1")] == pytest.approx(headline[:3])
    else:
        recomputed["auc_roc"] = sk.roc_auc_score(y, p, multi_class="ovr")
        recomputed["brier"] = ((p - one_hot) ** 2).sum(axis=1).mean()
        assert results["precision"] is results["recall"] is results["f1"] is None
    confidence, gaps = p.max(axis=1), 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        gaps += abs((guess == y)[inside].sum() - confidence[inside].sum())
    recomputed |= {"ece": gaps / N, "label_mass": np.exp(scores).sum() / N}
    # The same numbers in float64, by other roads.
    assert {key: results[key] for key in recomputed} == pytest.approx(recomputed, rel=1e-9)

    by_class = sk.precision_recall_fscore_support(y, guess, labels=[*classes], zero_division=0)
    for c, row in enumerate(results["per_class"]):
        figures = [row[key] for key in ("precision", "recall", "f1", "support")]
        assert figures == pytest.approx([values[c] for values in by_class])
    macro = [values.mean() for values in by_class[:3]]
    assert [results["macro"][k] for k in ("precision", "recall", "f1")] == pytest.approx(macro)
    assert results["confusion_matrix"] == sk.confusion_matrix(y, guess, labels=[*classes]).tolist()
    low, high = results["accuracy_interval"]
    assert 0 <= low < results["accuracy"] < high <= 1


def test_the_majority_share_is_that_of_a_dummy_classifier(finished):
    y = finished.labels
    dummy = DummyClassifier(strategy="most_frequent").fit(y[:, None], y)
    assert finished.results["majority_share"] == pytest.approx(dummy.score(y[:, None], y))
    names = finished.results["arguments"]["labels"].split(",")
    assert finished.results["majority_class"] == names[dummy.predict([[0]])[0]]


def test_a_row_of_the_predictions_can_be_read_alone(finished):
    arguments = finished.results["arguments"]
    names = arguments["labels"].split(",")
    rows = [json.loads(line) for line in finished.bytes.decode().splitlines()]
    path = Path(arguments["data"])
    lines = path.read_text(encoding="utf-8").split("\n")
    for row in rows:
        line = lines[row["line"] - 1]
        text = json.loads(line)["text"] if path.suffix == ".jsonl" else line.split("\t")[1]
        assert row["text"] == text and row["label_word"] == names[row["label"]]
        assert row["predicted_word"] == names[row["prediction"]]
        p = np.exp(row["scores"]) / np.exp(row["scores"]).sum()
        assert row["probability"] == pytest.approx(p.max(), abs=1e-12)


def test_rows_without_a_prediction_have_none():
    examples = [Example("差", 0, 2), Example("好", 1, 3)]
    # Answers: the first one is off track, the second was not finished.
    error = NotFinite("", [1], None)
    outcome = Outcome(np.array([-1, 1]), None, None, ["嗯", None], 0.0, error)
    off, lost = map(json.loads, prediction_lines(examples, ["负面", "正面"], outcome))
    unknown = dict.fromkeys(("predicted_word", "probability", "scores"))
    first = {"index": 0, "line": 2, "text": "差", "label": 0, "label_word": "负面"}
    assert off == first | unknown | {"prediction": -1, "answer": "嗯"}
    second = {"index": 1, "line": 3, "text": "好", "label": 1, "label_word": "正面"}
    assert lost == second | unknown | {"prediction": None, "answer": None}


def test_the_files_that_were_written_are_printed_last(two, reference):
    arguments = two.results["arguments"]
    *_, first, second = two.out.splitlines()
    assert first.split() == ["written", arguments["output"]]
    assert second.split() == [arguments["predictions"]]
    assert "written" not in command(*defaults(model=reference[0], limit=2))[1]


def test_the_scores_are_the_definition(finished, reference):
    """Each score is `score_label`, one forward, of the prompt that the arguments describe."""
    results, arguments = finished.results, finished.results["arguments"]
    labels = arguments["labels"].split(",")
    examples = read_examples(arguments["data"], labels, limit=N)
    tokenizer, model = Tokenizer(reference[0]), load_model(reference[0])
    template = parse_template(arguments["template"])
    prompts = build_prompts(tokenizer, [e.text for e in examples], template, labels, 40)
    expected = [[score_label(model, p.ids, ids) for ids in p.labels] for p in prompts]
    np.testing.assert_allclose(finished.scores, expected, atol=FP32)
    assert finished.labels.tolist() == [e.label for e in examples]
    assert results["label_ids"] == [list(ids) for ids in prompts[0].labels]
    assert results["tokens"] == sum(len(p.ids) for p in prompts)
    # 40 tokens are fewer than some of these reviews have and more than others.
    assert 0 < results["truncated_rows"] == sum(p.truncated for p in prompts) < N


def test_the_results_tell_how_they_came_about(two, reference):
    results, arguments = two.results, two.results["arguments"]
    assert arguments["model"] == str(reference[0]) and arguments["data"] == str(SAMPLE)
    assert (arguments["template"], arguments["labels"]) == (TEMPLATE, "负面,正面")
    assert (arguments["limit"], arguments["max_text_tokens"], arguments["seed"]) == (N, 40, 0)
    assert (results["method"], results["device"]) == ("zero_shot", "cpu")
    assert results["torch"] == torch.__version__
    assert results["examples_per_second"] == pytest.approx(N / results["seconds"])
    assert len(results["examples_hash"]) == 64


def test_a_process(reference):
    """From another directory, on a terminal without Chinese, predictions to the same stream."""
    arguments = defaults(model=reference[0], data=SAMPLE, limit=3, predictions="/dev/stdout")
    ended = subprocess.run(
        [sys.executable, REPO / "evaluate.py", "--method", "zero_shot", *arguments],
        cwd=reference[0],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    lines = ended.stdout.split(b"\n")
    assert [json.loads(line)["index"] for line in lines[:3]] == [0, 1, 2]  # the file is UTF-8
    lines = b"\n".join(lines[3:]).decode("ascii").splitlines()
    assert lines[0].split() == ["method", "zero_shot"]
    assert lines[-3].startswith(r"\u6b63\u9762")
    assert lines[-1].split() == ["written", "/dev/stdout"]


def test_many_label_words_make_few_warnings(capsys):
    ids = [(1,), *((1, n) for n in range(2, 1000))]
    warn_about_labels(ids, [f"w{n}" for n in range(len(ids))])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith(
        "warning: w1 begins with w0, w2 begins with w0, "
    )
    assert lines[1].endswith(", … 998 in all: the shorter one can never score lower")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("好评,不太满意,fox", None),
        ("体育,正面", ("differ in tokens", "体育 6", "正面 2")),
        ("非常,非常满意", ("differ in tokens", "非常满意 begins with 非常")),
    ],
)
def test_labels_that_are_hard_to_compare_are_warned_of(labels, words, reference, tmp_path):
    run = Run(tmp_path, model=reference[0], data=SAMPLE, labels=labels, limit=4)
    lines = run.err.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    assert all(word in run.err for word in words) if words else not lines


def test_a_class_that_is_absent_leaves_what_is_undefined_undefined(reference, tmp_path):
    run = Run(tmp_path, model=reference[0], data=SAMPLE, labels="好评,差评,正向")
    assert run.results["auc_roc"] is None
    assert "AUC-ROC       undefined" in run.out
    assert run.results["per_class"][2]["support"] == 0
    said = "classes       no examples of 正向 (0 in the macro mean)"
    assert said in run.out.splitlines()


def measured(true: list[int], said: list[int], names: list[str]) -> str:
    """The table for these classes, made without a model."""
    found = evaluate_predictions(true, said, None, names)
    speed = {"examples_per_second": 1.0, "seconds": 1.0, "dtype": "float32", "device": "cpu"}
    found |= speed | majority(found["per_class"]) | {"method": "x", "truncated_rows": 0}
    return format_results(found | {"label_mass": None, "off_track_examples": []})


def test_classes_that_are_never_predicted_are_said():
    out = measured([0, 0, 0, 1], [0, 0, 0, 0], ["正面", "负面"]).splitlines()
    assert "accuracy      0.7500   95 % interval 0.3006 to 0.9544" in out
    assert "majority      0.7500   share of the most frequent class, 正面" in out
    assert "predictions   never predicts 负面" in out
    assert not [line for line in out if line.startswith("classes ")]
    out = measured([0, 1], [1, 0], ["正面", "负面"])
    assert "never predicts" not in out and "no examples" not in out
    # The column of answers off track is no class.
    assert "never predicts 正面\n" in measured([0, 1], [-1, 1], ["正面", "负面"])
    out = measured([0, 1], [0, 0], [f"c{i}" for i in range(20)])
    assert (
        "predictions   never predicts c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12…\n" in out
    )
    assert (
        "classes       no examples of c2, c3, c4, c5, c6, c7, c8,… (0 in the macro mean)\n" in out
    )
    assert max(map(columns, out.split("\n\n")[0].splitlines())) <= 80


def test_a_limit_that_leaves_one_class_is_warned_of(reference, tmp_path):
    data = tmp_path / "sorted.tsv"
    data.write_text("label\ttext\n" + "0\t差\n" * 3 + "1\t好\n", encoding="utf-8")
    status, _, err = command(*defaults(model=reference[0], data=data, limit=3))
    assert status == 0 and err.count("\n") == 1
    assert err.startswith("warning: --limit 3 leaves only rows of class 负面")
    assert command(*defaults(model=reference[0], data=data, limit=4))[2] == ""


# What may and what may not change the numbers


def test_a_second_run_gives_the_same_bytes(two, reference, tmp_path):
    again = Run(tmp_path, model=reference[0], data=SAMPLE)
    assert again.bytes == two.bytes
    clocks = ("seconds", "examples_per_second", "arguments")
    assert {k: v for k, v in again.results.items() if k not in clocks} == {
        k: v for k, v in two.results.items() if k not in clocks
    }


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_the_batch_size_changes_nothing(batch_tokens, two, reference, tmp_path):
    run = Run(tmp_path, model=reference[0], data=SAMPLE, batch_tokens=batch_tokens)
    np.testing.assert_allclose(run.scores, two.scores, atol=FP32)
    clear = np.ptp(two.scores, axis=1) > 1e-4
    assert clear.sum() > N / 2
    assert run.predictions[clear].tolist() == two.predictions[clear].tolist()


def test_limit_takes_the_first_rows(two, reference, tmp_path):
    run = Run(tmp_path, model=reference[0], data=SAMPLE, limit=5)
    assert run.results["n"] == len(run.labels) == 5
    assert run.labels.tolist() == two.labels[:5].tolist()
    np.testing.assert_allclose(run.scores, two.scores[:5], atol=FP32)
    assert run.results["examples_hash"] != two.results["examples_hash"]


def test_the_file_format_changes_nothing(reference, tmp_path):
    rows = [(e.text, e.label) for e in read_examples(SAMPLE, "01", limit=8)]
    rows += [('"很好", 他说，', 1), ("一半“引号， 5,000 元", 0), ("  两端有空格 ", 1)]
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([("label", "text"), *((label, text) for text, label in rows)])
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    contents = {
        "a.tsv": "label\ttext_a\n" + "".join(f"{label}\t{text}\n" for text, label in rows),
        "a.csv": table.getvalue(),
        "a.jsonl": "\n".join(lines),
    }
    runs = []
    for name, content in contents.items():
        data, directory = tmp_path / name, tmp_path / f"run-{name}"
        data.write_bytes(content.encode())
        directory.mkdir()
        runs.append(Run(directory, model=reference[0], data=data, limit=100))
    # A table's header is a line.
    lines = [[json.loads(x).pop("line") for x in run.bytes.splitlines()] for run in runs]
    assert lines[0] == lines[1] == [line + 1 for line in lines[2]]
    same = [re.sub(rb'"line": \d+', b"", run.bytes) for run in runs]
    assert same[0] == same[1] == same[2]
    assert runs[0].results["n"] == len(rows)
    assert len({run.results["examples_hash"] for run in runs}) == 1


def test_bfloat16(two, reference, tmp_path):
    run = Run(tmp_path, model=reference[0], data=SAMPLE, dtype="bfloat16")
    assert run.results["dtype"] == "bfloat16" and two.results["dtype"] == "float32"
    assert "bfloat16 on cpu" in run.out
    # A logit between 16 and 32, and there are some, is stored to the nearest 1/8; a score sums two.
    difference = np.abs(run.scores - two.scores)
    assert 0.01 < difference.max() < 0.5


# One line for each mistake


@pytest.fixture
def workplace(reference, tmp_path, monkeypatch) -> Path:
    """A working directory with model/, reviews.tsv, earlier results and room for a mistake."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reference[0], "model")
    Path("reviews.tsv").write_text("label\ttext_a\n1\t很好\n0\t不好 the dog\n", encoding="utf-8")
    Path("out").mkdir()
    Path("out/results.json").write_text("earlier")
    return tmp_path


def refused(words: tuple[str, ...], **changes: object) -> None:
    """The command must end in status 2 with one line that holds `words`, and leave no trace."""
    before = sorted(Path().rglob("*"))
    arguments = {"model": "model", "data": "reviews.tsv", "output": "out/results.json"}
    status, out, err = command(
        *defaults(**arguments | {"predictions": "out/predictions.jsonl"} | changes)
    )
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert [word for word in words if word not in err] == [], err
    assert sorted(Path().rglob("*")) == before
    assert Path("out/results.json").read_text() == "earlier"


def never_loaded(*_: object) -> None:
    raise AssertionError("the model was loaded although the mistake could have been seen before")


def change_config(**fields: object) -> None:
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def write(text: str, name: str = "reviews.tsv", encoding: str = "utf-8") -> None:
    Path(name).write_text(text, encoding=encoding)


def empty_model() -> None:
    shutil.rmtree("model")
    Path("model").mkdir()


HEADER = "label\ttext_a\n"
# What is done to the workplace, what is changed in the arguments, what the line says.
SEEN_BEFORE_LOADING: dict[str, tuple[Callable[[], object] | None, dict, tuple[str, ...]]] = {
    "no model directory": (
        None,
        {"model": "nowhere"},
        ("nowhere", "no such directory", "hub name"),
    ),
    "empty model directory": (empty_model, {}, ("model/config.json", "no such", "tokenizer.json")),
    "a file as model": (None, {"model": "reviews.tsv"}, ("reviews.tsv",)),
    "another architecture": (
        lambda: change_config(model_type="llama"),
        {},
        ("model/config.json", "'llama'", "qwen2, qwen3 or qwen3_5", "choose"),
    ),
    "broken config": (
        lambda: write("{", "model/config.json"),
        {},
        ("model/config.json", "JSON", "fetch it again"),
    ),
    "no tokenizer": (
        lambda: Path("model/tokenizer.json").unlink(),
        {},
        ("model/tokenizer.json", "no such file"),
    ),
    "broken tokenizer": (
        lambda: write('{"added_tokens": [', "model/tokenizer.json"),
        {},
        ("model/tokenizer.json", "not a usable tokenizer", "fetch it again"),
    ),
    "tokenizer of another kind": (
        lambda: write('{"added_tokens": [], "model": {"type": "X"}}', "model/tokenizer.json"),
        {},
        ("model/tokenizer.json", "not a usable tokenizer", "fetch it again"),
    ),
    "tokenizer of a larger model": (
        lambda: change_config(vocab_size=300),
        {},
        ("tokenizer.json has 504 tokens", "at most", "vocab_size, 300", "one checkpoint"),
    ),
    "no data": (None, {"data": "nowhere.tsv"}, ("nowhere.tsv", "No such file", "check the path")),
    "empty data": (lambda: write(""), {}, ("reviews.tsv", "found no rows", "right file")),
    "header alone": (lambda: write(HEADER), {}, ("reviews.tsv", "found no rows", "right file")),
    "another encoding": (
        lambda: write(HEADER + "1\t很好\n", encoding="gbk"),
        {"encoding": "utf-8"},
        ("reviews.tsv, line 2", "not valid utf-8", "by --encoding"),
    ),
    "no label column": (
        lambda: write("stars\ttext_a\n1\t很好\n"),
        {},
        ("reviews.tsv, line 1", "'stars'", "--label-column"),
    ),
    "no text column": (
        lambda: write("label\tbody\n1\t很好\n"),
        {},
        ("reviews.tsv, line 1", "'body'", "--text-column"),
    ),
    "a label outside the set": (
        lambda: write(HEADER + "1\t很好\n2\t不好\n"),
        {"labels": "负面,正面"},
        ("reviews.tsv, line 3", "'2'", "0..1", "负面, 正面", "--labels"),
    ),
    "repeated label words": (None, {"labels": "正面,正面"}, ("--labels", "正面 repeats", "differ")),
    "an empty label word": (None, {"labels": "正面,"}, ("--labels", "'正面,'", "empty")),
    "one label word": (None, {"labels": "正面"}, ("--labels", "one word", "at least two")),
    "no place for the text": (None, {"template": "评论："}, ("--template", "{text}", "0 times")),
    "two places": (None, {"template": "{text}{text}\\n"}, ("--template", "2 times", "once")),
    "a label that merges": (
        None,
        {"template": "{text} ", "labels": "fox,dog"},
        (
            "reviews.tsv, line 2",
            "merge into one token",
            "很好 '",
            "begin each label with a space and end the template without",
        ),
    ),
    "limit 0": (None, {"limit": 0}, ("--limit", "'0'", "at least 1")),
    "no whole number": (None, {"batch_tokens": "many"}, ("--batch-tokens", "'many'", "at least 1")),
    "another dtype": (None, {"dtype": "int4"}, ("--dtype", "'int4'", "float32")),
    "a prompt too long": (
        lambda: change_config(max_position_embeddings=5),
        {},
        ("reviews.tsv, line 2", "prompt and label have", "at most 5", "--max-text-tokens"),
    ),
    "output in no directory": (
        None,
        {"output": "nowhere/r.json"},
        ("nowhere/r.json: cannot be written", "No such file", "directory that exists"),
    ),
    "a directory as output": (
        None,
        {"predictions": "out"},
        ("out: cannot be written", "directory", "name a file"),
    ),
    "one file for both": (
        None,
        {"predictions": "out/../out/results.json"},
        ("results.json", "another output", "its own"),
    ),
    "the data as output": (None, {"output": "reviews.tsv"}, ("reviews.tsv", "the data", "its own")),
}


@pytest.mark.parametrize("mistake", SEEN_BEFORE_LOADING)
def test_seen_before_the_model_is_loaded(mistake, workplace, monkeypatch):
    monkeypatch.setattr("qwen_min.command.classifier.load_model", never_loaded)
    prepare, changes, words = SEEN_BEFORE_LOADING[mistake]
    if prepare:
        prepare()
    refused(words, **changes)


def test_a_read_only_output(workplace, monkeypatch):
    monkeypatch.setattr("qwen_min.command.classifier.load_model", never_loaded)
    Path("out/results.json").chmod(0o444)
    if os.access("out/results.json", os.W_OK):  # root may write all the same
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refused(("out/results.json: cannot be written", "Permission denied", "is yours"))


def test_the_method_must_be_given(capsys):
    assert evaluate.main(["--data", "reviews.tsv"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --method is missing") and err.count("\n") == 1


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file("model/model.safetensors")
    change(tensors)
    save_file(tensors, "model/model.safetensors")


def truncate(file: str = "model/model.safetensors") -> None:
    Path(file).write_bytes(Path(file).read_bytes()[:-100])


BIAS = "model.layers.0.self_attn.q_proj.bias"
WEIGHTS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "no weights": (
        lambda: Path("model/model.safetensors").unlink(),
        ("model/model.safetensors", "no such file", "expected"),
    ),
    "truncated": (truncate, ("model/model.safetensors", "not a whole", "fetch it again")),
    "missing": (lambda: change_tensors(lambda t: t.pop(BIAS)), ("1 tensor", BIAS, "missing")),
    "extra": (
        lambda: change_tensors(lambda t: t.update({"more.weight": torch.ones(2)})),
        ("more.weight", "unknown to this architecture"),
    ),
    "classifier": (
        lambda: change_tensors(lambda t: t.update({"score.weight": torch.ones(2, 32)})),
        ("model: ", "a classifier for transformers", "give its run by --run"),
    ),
    "misshapen": (
        lambda: change_tensors(lambda t: t.update({BIAS: t[BIAS][:-2].clone()})),
        ("wrong shape", BIAS, "[30]", "[32]"),
    ),
    "not a number": (
        lambda: change_tensors(lambda t: t[BIAS].fill_(torch.nan)),
        ("reviews.tsv, line 2", "not finite", "float32 from layer 1 of 3 on", "fetch the weights"),
    ),
}


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_weights_that_do_not_fit(mistake, workplace):
    prepare, words = WEIGHTS[mistake]
    prepare()
    refused(words)


def test_a_prompt_as_long_as_the_model_takes_is_taken(workplace):
    """One token fewer and it is not: a boundary that lies where the message says."""
    status, _, err = command(*defaults(model="model", data="reviews.tsv", output="r.json"))
    assert status == 0, err
    tokenizer = Tokenizer("model")
    texts = [example.text for example in read_examples("reviews.tsv", "01")]
    prompts = build_prompts(tokenizer, texts, parse_template(TEMPLATE))
    longest = max(len(p.ids) + len(label) for p in prompts for label in p.labels)
    change_config(max_position_embeddings=longest)
    assert command(*defaults(model="model", data="reviews.tsv"))[0] == 0
    change_config(max_position_embeddings=longest - 1)
    refused(("reviews.tsv, line 3", f"have {longest} tokens, expected at most {longest - 1}"))


def test_an_empty_text_is_classified_and_a_blank_row_is_counted(workplace):
    write(HEADER + "1\t很好\n\n0\t\n")
    status, _, err = command(*defaults(model="model", data="reviews.tsv", predictions="p"))
    notes = "blank rows skipped: 1 (the first: line 3)", "empty texts: 1 (the first: line 4)"
    assert (status, err) == (0, "".join(f"note: reviews.tsv: {note}\n" for note in notes))
    rows = [json.loads(row) for row in Path("p").read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer("model")
    prompts = build_prompts(tokenizer, ["很好", ""], parse_template(TEMPLATE))
    scores = qwen_min.score_labels(load_model(Path("model"), "float32", "cpu"), prompts)
    assert np.allclose([row["scores"] for row in rows], scores, atol=1e-5)  # fp32, other batches


def test_a_bad_row_behind_the_limit_is_not_read(workplace):
    write(HEADER + "1\t很好\n9\t不好\n")
    given = {
        "labels": "负面,正面"
    }  # typed: labels that are taken from a file are those of all rows
    assert command(*defaults(model="model", data="reviews.tsv", limit=1, **given))[0] == 0
    refused(("reviews.tsv, line 3", "'9'"), limit=2, **given)


# Runs that end otherwise


def test_ctrl_c_leaves_nothing(workplace, monkeypatch):
    monkeypatch.setattr(forms, "score_labels", lambda *_: signal.raise_signal(signal.SIGINT))
    before = sorted(Path().rglob("*"))
    status, out, err = command(
        *defaults(model="model", data="reviews.tsv", output="out/results.json", predictions="p")
    )
    assert (status, out, err) == (130, "", "interrupted\n")
    assert sorted(Path().rglob("*")) == before
    assert Path("out/results.json").read_text() == "earlier"


def test_a_full_disk_at_the_end_costs_nothing(workplace, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    Path("elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(workplace / "elsewhere"))
    monkeypatch.setattr(os, "replace", full)
    status, out, err = command(
        *defaults(model="model", data="reviews.tsv", output="out/results.json", predictions="p")
    )
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: out/results.json: ")
    assert err.count("No space left on device") == 2
    assert out.startswith("method        zero_shot\nexamples      2 ")
    rescued = {file.suffix: file for file in Path("elsewhere").iterdir()}
    assert all(file.name in err for file in rescued.values())
    assert json.loads(rescued[".json"].read_text(encoding="utf-8"))["n"] == 2
    assert len(rescued[""].read_text().splitlines()) == 2
    assert sorted(os.listdir("out")) == ["results.json"] and not Path("p").exists()
    assert Path("out/results.json").read_text() == "earlier"
