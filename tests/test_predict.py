"""predict as its users meet it, and the Python interface: equal to evaluate.py, whole rows only."""

import csv
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, make_reference
from safetensors.torch import load_file, save_file

import evaluate
import qwen_min
import train
from qwen_min.command import predict
from qwen_min.command.arguments import CALIBRATIONS
from qwen_min.command.cli import option
from qwen_min.command.terminal import columns
from qwen_min.errors import UserError
from qwen_min.fast import features, label_scores
from qwen_min.lab.calibration import NAMES

# fp32, small checkpoint: other batches change sums of a few log-probabilities by less.
FP32 = 1e-5
TEMPLATE = "评论：{text}\\n情感倾向：\\n"
PROMPT = ["--model", "base", "--template", TEMPLATE, "--device", "cpu"]
TEXTS = ["很好", "the dog", "房间小，但是很干净。", '慢，"太慢"', "面坨了", "不推荐！" * 9] * 6
TEXTS = [f"{i}{text}" for i, text in enumerate(TEXTS)]
TRAINED = ("head_only", "lora_head", "lora_label_scoring")
SOURCES = {name: ["--run", name] for name in TRAINED}
SOURCES["transplanted_head"] = ["--run", "lora_head", "--method", "transplanted_head"]
SOURCES["zero_shot"] = ["--method", "zero_shot", *PROMPT]
SOURCES["adapter"] = ["--method", "lora_label_scoring", "--adapter", "lora_label_scoring/adapter"]
SOURCES["adapter"] += PROMPT


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A base, and a run of each method that trains."""
    root = tmp_path_factory.mktemp("predict")
    before = os.getcwd()
    os.chdir(root)
    make_reference(root / "base")
    rows = [json.dumps({"label": i % 2, "text": text}) for i, text in enumerate(TEXTS)]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for method in TRAINED:
        fixed = ["--data", "rows.jsonl", "--output", method, *PROMPT]
        more = [] if method == "head_only" else ["--epochs", "1", "--lr", "1e-2"]
        assert train.main(["--method", method, *fixed, *more]) == 0
    os.chdir(before)
    return root


@pytest.fixture(autouse=True)
def workplace(kept, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in kept.iterdir():
        Path(path.name).symlink_to(path)
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return tmp_path


def evaluated(*arguments: str) -> tuple[dict, list[dict]]:
    """The results and the predictions of evaluate.py on the texts."""
    files = ["--data", "rows.jsonl", "--output", "results.json", "--predictions", "p.jsonl"]
    assert evaluate.main([*arguments, *files]) == 0
    return json.loads(Path("results.json").read_text(encoding="utf-8")), json_rows("p.jsonl")


def json_rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def csv_rows(path: str) -> list[dict]:
    data = Path(path).read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")  # by which Excel knows UTF-8
    return [*csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))]


def error_of(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert predict.main([*map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def softmax(scores: list[list[float]]) -> np.ndarray:
    return torch.tensor(scores, dtype=torch.float64).softmax(dim=1).numpy()


# What is predicted


@pytest.mark.parametrize("source", SOURCES)
def test_every_method_predicts_what_evaluate_does(source, capsys):
    _, known = evaluated(*SOURCES[source])
    expected = softmax([row["scores"] for row in known])
    words = ["负面", "正面"]
    labels = [words[row["prediction"]] for row in known]
    assert len({*labels}) == 2  # otherwise this test would show little
    # Several chunks, whose batches are others than evaluate.py's.
    small = ["--batch-tokens", "64", "--output"]
    assert predict.main(["texts.txt", *SOURCES[source], *small, "a.jsonl"]) == 0
    assert predict.main(["rows.jsonl", *SOURCES[source], *small, "a.csv"]) == 0
    assert predict.main(["texts.txt", *SOURCES[source]]) == 0
    rows = json_rows("a.jsonl")
    assert [row["text"] for row in rows] == TEXTS and [row["label"] for row in rows] == labels
    assert [row["line"] for row in rows] == [*range(1, len(TEXTS) + 1)]
    assert all([*row["probabilities"]] == words for row in rows)
    found = [[*row["probabilities"].values()] for row in rows]
    np.testing.assert_allclose(found, expected, atol=FP32)
    rows = csv_rows("a.csv")
    assert [row["text"] for row in rows] == TEXTS and [row["label"] for row in rows] == labels
    found = [[float(row["p(负面)"]), float(row["p(正面)"])] for row in rows]
    np.testing.assert_allclose(found, expected, atol=FP32)
    lines = capsys.readouterr().out.splitlines()[-len(TEXTS) - 1 :]
    assert lines[0].split() == ["label", "p(负面)", "p(正面)", "text"]
    for line, text, label, row in zip(lines[1:], TEXTS, labels, expected, strict=True):
        first, *shown = line.split(maxsplit=3)
        assert first == label and text.startswith(shown[2].removesuffix("…"))
        assert columns(line) <= 80
        np.testing.assert_allclose([*map(float, shown[:2])], row, atol=1e-4)  # four digits


@pytest.mark.parametrize("source", ["zero_shot", "head_only", "lora_head", "transplanted_head"])
def test_the_classifier_predicts_the_same(source):
    _, known = evaluated(*SOURCES[source])
    scores = [row["scores"] for row in known]
    if source == "zero_shot":
        how = {"template": "评论：{text}\n情感倾向：\n", "device": "cpu", "batch_tokens": 100}
        found = qwen_min.Classifier.zero_shot("base", ["负面", "正面"], **how)
    else:
        run = "head_only" if source == "head_only" else "lora_head"
        found = qwen_min.Classifier.from_run(run, "cpu", method=source)
    assert found.labels == ("负面", "正面")
    np.testing.assert_allclose(found.scores(TEXTS), scores, atol=10 * FP32)  # scores of up to 40
    np.testing.assert_allclose(found.predict_proba(TEXTS), softmax(scores), atol=FP32)
    assert found.predict(TEXTS) == [found.labels[row["prediction"]] for row in known]
    assert found.predict(np.array(TEXTS[:2])) == found.predict(tuple(TEXTS[:2]))
    assert found.predict([]) == [] and found.predict_proba([]).shape == (0, 2)
    assert found.scores([]).shape == (0, 2)
    for call in (found.predict, found.predict_proba, found.scores):
        with pytest.raises(TypeError, match="expected a list"):
            call("很好")


def test_the_classifier_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="expected a list of words"):
        qwen_min.Classifier.zero_shot("base", "负面,正面")
    with pytest.raises(UserError, match="expected a list of words"):
        qwen_min.Classifier.zero_shot("base", ["负面,中性", "正面"])
    with pytest.raises(TypeError, match="unknown argument 'max_tokens'"):
        qwen_min.Classifier.zero_shot("base", max_tokens=3)
    with pytest.raises(UserError, match=r"run\.json"):
        qwen_min.Classifier.from_run("base")


@pytest.mark.parametrize("source", ["zero_shot", "head_only"])
def test_batches_in_bf16_are_filled_up_and_the_filler_is_ignored(source, monkeypatch):
    if source == "zero_shot":
        how = {"template": TEMPLATE, "device": "cpu", "dtype": "bfloat16"}
        found = qwen_min.Classifier.zero_shot("base", **how)
    else:
        record = json.loads(Path("head_only/run.json").read_text("utf-8"))
        Path("run").mkdir()
        record["arguments"]["dtype"] = "bfloat16"
        Path("run/run.json").write_text(json.dumps(record), encoding="utf-8")
        Path("run/head.safetensors").symlink_to(Path("head_only/head.safetensors").resolve())
        found = qwen_min.Classifier.from_run("run", "cpu")
    sizes = []
    for module in (label_scores, features):
        real = module.forward_packed

        def counted(model, batch, *more, real=real):
            sizes.append(sum(batch.lengths))
            return real(model, batch, *more)

        monkeypatch.setattr(module, "forward_packed", counted)
    filled = found.scores(TEXTS[:7])
    assert sizes[-1] % label_scores.ROW_MULTIPLE == 0
    monkeypatch.setattr(label_scores, "ROW_MULTIPLE", 1)
    # Equal but for the kernel that bf16 products of another size may take; scores reach 40.
    np.testing.assert_allclose(filled, found.scores(TEXTS[:7]), atol=0.5)
    assert sizes[-1] % 64


def test_standard_input_and_single_texts(monkeypatch, capsys):
    assert predict.main(["texts.txt", *PROMPT, "--output", "file.jsonl"]) == 0
    command = [sys.executable, "-m", "qwen_min.predict", "-", *PROMPT, "--output", "in.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(REPO), "LANG": "C.UTF-8"}
    data = Path("texts.txt").read_bytes()
    subprocess.run(command, input=data, env=environment, check=True, capture_output=True)
    assert json_rows("in.jsonl") == json_rows("file.jsonl")
    single = [word for text in TEXTS[:3] for word in ("--text", text)]
    assert predict.main([*single, *PROMPT, "--output", "text.jsonl"]) == 0
    rows = json_rows("text.jsonl")
    assert [row["text"] for row in rows] == TEXTS[:3]
    assert [row["label"] for row in rows] == [row["label"] for row in json_rows("file.jsonl")[:3]]


def test_the_last_line_counts(capsys):
    assert predict.main(["texts.txt", *PROMPT, "--max-text-tokens", "9", "--output", "a.csv"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    results, _ = evaluated(*SOURCES["zero_shot"], "--max-text-tokens", "9")
    shortened = results["truncated_rows"]
    assert 0 < shortened < len(TEXTS)
    assert re.match(
        rf"{len(TEXTS)} texts, [\d.]+ rows/s, written to a.csv; {shortened} short", line
    )


def test_more_classes_than_the_table_has_columns(capsys):
    labels = [f"{n}" for n in range(10, 35)]
    given = ["--text", "很好\n" + "好" * 99, *PROMPT, "--labels", ",".join(labels)]
    assert predict.main([*given, "--output", "a.jsonl"]) == 0
    (row,) = json_rows("a.jsonl")
    assert [*row["probabilities"]] == labels
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    best = max(labels, key=lambda label: row["probabilities"][label])
    assert row["label"] == best
    capsys.readouterr()
    assert predict.main(given) == 0
    head, shown = capsys.readouterr().out.splitlines()
    assert head.split() == ["label", "p", "text"]
    assert shown.split()[:2] == [best, f"{row['probabilities'][best]:.4f}"]
    assert "很好\\n好好" in shown and columns(shown) <= 80


def test_any_text_is_read_back_from_a_csv():
    texts = ["a\rb", 'c"d', "e\nf", "=1+1", " g,h "]
    rows = [(i, text, "负面", [0.75, 0.25]) for i, text in enumerate(texts)]
    written = "".join(predict.csv_rows(("负面", "正面"), rows))
    found = list(csv.reader(io.StringIO(written.removeprefix("\ufeff"), newline="")))
    assert [row[1] for row in found[1:]] == texts and {*map(len, found)} == {5}


def test_python_arguments_are_checked_as_typed_ones():
    for wrong in ({"dtype": "float8"}, {"max_text_tokens": -1}, {"batch_tokens": 0}):
        with pytest.raises(UserError, match=option(*wrong)):
            qwen_min.Classifier.zero_shot("base", **wrong)
    how = {"template": TEMPLATE, "device": "cpu", "plain": True, "chat": False, "system": None}
    args = qwen_min.Classifier.zero_shot("base", **how).source.args
    assert (args.plain, args.chat, args.system) == (True, False, None)
    for texts in ("好", [None]):
        with pytest.raises(TypeError, match="expected a list of str"):
            qwen_min.Classifier.zero_shot("base", template=TEMPLATE).predict(texts)


def test_the_tables_lines_fit_a_terminal():
    texts = ["好" * 200, "x" * 200, "短"]
    rows = [(i, text, "负面", [0.75, 0.25]) for i, text in enumerate(texts)]
    lines = "".join(predict.table_rows(("负面", "正面"), rows)).splitlines()
    assert [columns(line) for line in lines[1:3]] == [80, 80]  # 好 takes two
    assert lines[3].split() == ["负面", "0.7500", "0.2500", "短"]


def test_what_is_refused(capsys):
    Path("labels.csv").write_text("old")
    Path("empty.txt").write_text("")
    before = sorted(Path().rglob("*"))
    for arguments, said in {
        (): "expected TEXTS",
        ("texts.txt", "--text", "很好"): "expected TEXTS",
        ("texts.txt", "--output", "a.txt"): "ends in .csv or .jsonl",
        ("texts.txt", "--output", "rows.jsonl", "--run", "lora_head"): "",
        ("rows.jsonl", "--output", "rows.jsonl"): "is already the data",
        ("texts.txt", "--output", "base/a.csv"): "lies in a directory that is read",
        ("texts.txt", "--output", "lora_head/a.csv", "--run", "lora_head"): "lies in a directory",
        ("texts.txt", "--output", "missing/a.csv"): "cannot be written",
        ("texts.txt", "--model", "missing", "--output", "labels.csv"): "missing",
        ("missing.txt", "--output", "labels.csv"): "missing.txt",
        ("empty.txt", "--output", "labels.csv"): "empty.txt: found no",
        ("texts.txt", "--method", "lora_head"): "needs --run",
        ("texts.txt", "--calibration", "batch"): "batch: not results with a calibration",
    }.items():
        if said:
            more = PROMPT if not {"--model", "--run"} & {*arguments} else []
            assert said in error_of(capsys, *arguments, *more)
    assert Path("labels.csv").read_text() == "old" and sorted(Path().rglob("*")) == before


# A command that ends early


def test_a_row_that_is_not_finite_is_named_and_the_rows_before_it_kept(capsys):
    make_reference(Path("partial"), tied=False)
    tensors = load_file("partial/model.safetensors")
    tokenizer = qwen_min.load("base", device="cpu")[1]
    tensors["model.embed_tokens.weight"][tokenizer.encode(" dog")] = torch.nan
    save_file(tensors, "partial/model.safetensors", {"format": "pt"})
    given = ["--model", "partial", *PROMPT[2:], "--output", "a.jsonl"]
    Path("a.jsonl").write_text("old")
    error = error_of(capsys, "--text", "the dog", *given)
    assert "--text, line 1: found numbers that are not finite" in error
    assert Path("a.jsonl").read_text() == "old"
    good = [text for text in TEXTS if "dog" not in text]
    Path("texts.txt").write_text("\n".join([*good, "the dog", *good]), encoding="utf-8")
    assert predict.main(["texts.txt", *given, "--batch-tokens", "64"]) == 2
    said, error = capsys.readouterr().err.splitlines()
    rows = json_rows("a.jsonl")
    assert f"texts.txt, line {len(good) + 1}: " in error and said.startswith(f"{len(rows)} texts")
    assert rows and [row["text"] for row in rows] == good[: len(rows)]


def begun(output: str, *more: str, **options: object) -> subprocess.Popen:
    """predict on many texts, as a process."""
    Path("many.txt").write_text(
        "".join(f"{i}，房间小。\n" for i in range(50_000)), encoding="utf-8"
    )
    command = [sys.executable, "-m", "qwen_min.predict", "many.txt", *PROMPT, "--output", output]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    return subprocess.Popen([*command, *more], env=environment, stderr=subprocess.PIPE, **options)


def wait_for(path: str, size: int) -> None:
    end = time.monotonic() + 60
    while not (Path(path).exists() and Path(path).stat().st_size > size):
        assert time.monotonic() < end
        time.sleep(0.01)


def check_whole(path: str) -> int:
    """Every row that is in the file is whole, and none is missing before it; returns how many."""
    assert Path(path).read_bytes().endswith(b"\n")
    rows = csv_rows(path) if path.endswith("csv") else json_rows(path)
    for i, row in enumerate(rows):
        assert row["text"] == f"{i}，房间小。" and int(row["line"]) == i + 1
        p = [float(row["p(负面)"]), float(row["p(正面)"])] if path.endswith("csv") else None
        assert sum(p or row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    return len(rows)


@pytest.mark.parametrize("output", ["a.csv", "a.jsonl"])
def test_killed_at_any_moment_the_file_has_whole_rows(output):
    Path(output).write_text("old\n")
    for pause in (0.0, 0.05, 0.13):
        process = begun(output, "--batch-tokens", "128")
        wait_for(output, 100)  # more than is in the old one
        time.sleep(pause)
        process.kill()
        process.communicate()
        assert 0 < check_whole(output) < 50_000
        Path(output).write_text("old\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_says_how_many_rows_there_are(number):
    process = begun("a.csv", "--batch-tokens", "128")
    wait_for("a.csv", 1000)
    process.send_signal(number)
    err = process.communicate()[1].decode()
    assert process.returncode == 130
    said, last = err.splitlines()
    assert last == "interrupted" and said.endswith("rows/s, written to a.csv")
    assert 0 < int(said.split()[0]) <= check_whole("a.csv")  # stopped between writing and counting


def test_on_a_full_disk_the_whole_rows_are_kept():
    limit = 9000
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    process = begun("a.csv", "--batch-tokens", "128", **full)
    err = process.communicate()[1].decode()
    rows = check_whole("a.csv")
    assert process.returncode == 2 and rows > 0 and Path("a.csv").stat().st_size <= limit
    said, error = err.splitlines()
    assert said.startswith(f"{rows} texts, ") and said.endswith("written to a.csv")
    assert error.startswith("error: a.csv: cannot be written")


# Corrections of the scores


def test_the_names_are_those_that_are_compared():
    assert {*CALIBRATIONS} == {*NAMES} - {"raw"}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_evaluate_decides_by_corrected_scores(name, capsys):
    training = ["--train-data", "train.jsonl"]
    rows = [json.dumps({"label": i % 2, "text": f"{text}?又"}) for i, text in enumerate(TEXTS)]
    Path("train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    raw_results, raw = evaluated(*SOURCES["zero_shot"], "--calibrate", *training)
    assert "applied_calibration" not in raw_results
    both = ["--calibration", name, "--calibrate", "--label-sets", "好,差"]
    results, rows = evaluated(*SOURCES["zero_shot"], *both, *training)
    assert f"calibration   {name}" in capsys.readouterr().out
    # What is compared is what the raw scores give.
    for other, found in raw_results["calibration"].items():
        again = results["calibration"][other]
        assert again["log_loss"] == pytest.approx(found["log_loss"], abs=1e-4)
        assert again["predicted"] == found["predicted"]
    own, _ = results["label_sets"]
    assert own["log_loss"] == pytest.approx(raw_results["log_loss"], abs=1e-4)
    assert own["predicted"] == raw_results["calibration"]["raw"]["predicted"]
    applied, compared = results["applied_calibration"], raw_results["calibration"][name]
    assert applied["applied"] == name == results["arguments"]["calibration"]
    # The figures that --calibrate printed for it are the results now.
    for key in ("accuracy", "auc_roc", "log_loss", "ece"):
        assert results[key] == pytest.approx(compared[key], abs=1e-4)
    assert results["label_mass"] == pytest.approx(raw_results["label_mass"])
    # By hand: the raw scores, divided by the words' lengths, minus log prior, divided by T.
    scores = np.array([row["scores"] for row in raw])
    lengths = [len(ids) for ids in raw_results["label_ids"]]
    assert lengths[0] * lengths[1] > 1
    if name == "length_normalised":
        scores = scores / lengths
    elif name == "temperature":
        scores = scores / compared["temperature"]
    else:
        scores = scores - np.array(applied["log_prior"])
        assert softmax([applied["log_prior"]])[0] == pytest.approx(compared["prior"], abs=1e-5)
    if name == "batch":
        mean = softmax([row["scores"] for row in raw]).mean(axis=0)
        assert np.exp(applied["log_prior"]) == pytest.approx(mean, rel=1e-4)
    np.testing.assert_allclose([row["scores"] for row in rows], scores, atol=10 * FP32)
    assert [row["prediction"] for row in rows] == scores.argmax(axis=1).tolist()

    # predict takes it from the results, or, if it needs no data, by its name.
    known = [name] * (name in CALIBRATIONS[:3]) + ["results.json"]
    for given in known:
        more = ["--calibration", given, "--output", "a.jsonl"]
        assert predict.main(["texts.txt", *SOURCES["zero_shot"], *more]) == 0
        found = [[*row["probabilities"].values()] for row in json_rows("a.jsonl")]
        np.testing.assert_allclose(found, softmax(scores.tolist()), atol=FP32)
        how = {"template": TEMPLATE, "device": "cpu", "calibration": given}
        classifier = qwen_min.Classifier.zero_shot("base", **how)
        np.testing.assert_allclose(classifier.scores(TEXTS), scores, atol=10 * FP32)


def test_a_correction_of_another_prompt_or_model_is_refused(capsys):
    evaluated(*SOURCES["zero_shot"], "--calibration", "batch")
    given = ["texts.txt", "--device", "cpu", "--calibration", "results.json"]
    same = [*PROMPT[:4], *given]
    for more, said in {
        ("--labels", "正面,负面"): "arguments.labels is",
        ("--template", "评价：{text}\\n情感倾向：\\n"): "template is",
        ("--run", "lora_label_scoring"): "method is 'zero_shot', expected",
        ("--run", "head_only"): "about scores of label words",
    }.items():
        error = error_of(capsys, *(same if more[0] != "--run" else given), *more)
        assert said in error
    make_reference(Path("other"), kind="qwen3")
    assert "base_fingerprint" in error_of(capsys, *same, "--model", "other")
    evaluated(*SOURCES["zero_shot"])
    assert "applied_calibration is None" in error_of(capsys, *same)


def test_corrected_results_do_not_replace_raw_ones(capsys):
    for run in ("lora_label_scoring",):
        data = ["--run", run, "--data", "rows.jsonl"]
        assert evaluate.main(data) == 0 and evaluate.main([*data, "--calibration", "batch"]) == 0
        files = [json.loads(p.read_text("utf-8")) for p in Path(run).glob("results-*.json")]
        assert sorted("applied_calibration" in found for found in files) == [False, True]
    assert evaluate.main(["--run", "lora_head", "--calibration", "batch"]) == 2
    assert "about scores of label words" in capsys.readouterr().err
    alone = [*SOURCES["zero_shot"], "--data", "rows.jsonl", "--calibration", "temperature"]
    assert evaluate.main(alone) == 2
    assert "name the file by --train-data" in capsys.readouterr().err
