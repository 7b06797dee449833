"""The report: one table, seeds as one row, paired tests, errors, and pictures without boxes."""

import contextlib
import io
import json
import re
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats
from sklearn import metrics as sk

from qwen_min.command.terminal import columns
from qwen_min.files.data import Example, examples_hash
from qwen_min.metrics import auc_roc, evaluate_predictions
from qwen_min.report import fonts, plots
from qwen_min.report import tables as report
from qwen_min.report.compare import compare, gather, read_all

N = 120
WORDS = ["负面", "正面"]
FORMS = ("text", "markdown")


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = report.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def labels_of(examples: int, classes: int = 2) -> np.ndarray:
    return np.random.default_rng(examples).integers(0, classes, N)


def evaluated(
    directory: Path,
    method: str,
    skill: float = 1.0,
    noise: int = 0,
    examples: int = 1,
    words: list[str] = WORDS,
    training: dict | None = None,
    name: str = "results.json",
    predicted: np.ndarray | None = None,
    **arguments: object,
) -> Path:
    """What evaluate.py leaves for a method of this skill: results, and predictions beside them.

    `examples` seeds the labels, like another data file; `noise` seeds the scores.
    """
    directory.mkdir(parents=True, exist_ok=True)
    labels = labels_of(examples, len(words))
    scores = np.random.default_rng(noise).normal(size=(N, len(words)))
    scores[np.arange(N), labels] += skill
    if predicted is not None:
        scores = np.eye(len(words))[predicted]
    run = None
    if training is not None:
        run = str(directory)
        record = {"method": method, "arguments": training, "history": []}
        (directory / "run.json").write_text(json.dumps(record), encoding="utf-8")
    rows = [Example(f"text {i} of {examples}", int(y), i) for i, y in enumerate(labels)]
    results = {
        "method": method,
        **evaluate_predictions(labels, scores.argmax(axis=1), scores, words),
        "examples_hash": examples_hash(rows),
        "seconds": 2.5 + noise,
        "trained_parameters": 1000 if training else 0,
        "training_seconds": 60.0 if training else 0.0,
        "training_arguments": training,
        "arguments": {
            "method": method, "run": run, "adapter": None, "model": "tiny", "seed": 0,
            "data": f"{examples}.tsv", "limit": None, "encoding": "utf-8", "device": "cpu",
            "labels": ",".join(words), "template": "{text}：", "output": name, "predictions": None,
        } | arguments,
    }  # fmt: skip
    lines = [
        {"index": i, "label": int(y), "prediction": int(s.argmax()), "scores": s.tolist()}
        for i, (y, s) in enumerate(zip(labels, scores, strict=True))
    ]
    path = directory / name
    path.write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")
    beside = path.with_name(name.replace("results", "predictions")).with_suffix(".jsonl")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def trained(seed: int, **changes: object) -> dict:
    return {"method": "lora_head", "data": "train.tsv", "seed": seed, "lr": 2e-4} | changes


@pytest.fixture
def seeds(tmp_path) -> list[Path]:
    """zero_shot, and lora_head with three seeds, each a run directory."""
    paths = [evaluated(tmp_path / "zero", "zero_shot", 0.5)]
    for seed in (2, 0, 1):
        run = tmp_path / f"lora-{seed}"
        evaluated(run, "lora_head", 2.0, 5 + seed, training=trained(seed), name="results-a.json")
        (run / "log.jsonl").write_text(
            "".join(
                json.dumps({"step": step, "loss": 2 / step + 0.01 * seed, "lr": 2e-4 / step}) + "\n"
                for step in range(1, 41)
            )
        )
        paths.append(run)
    return paths


def as_json(*paths: object) -> dict:
    status, out, _ = command(*paths, "--format", "json")
    assert status == 0
    return json.loads(out)


# Paired tests


def test_mcnemar_and_difference_on_a_worked_example(tmp_path):
    """100 rows right by both, 12 by A alone, 3 by B alone, 5 by neither."""
    labels = labels_of(1)
    a, b = labels.copy(), labels.copy()
    a[100:103] ^= 1
    b[103:115] ^= 1
    a[115:] ^= 1
    b[115:] ^= 1
    paths = [evaluated(tmp_path / name, name, predicted=p) for name, p in (("A", a), ("B", b))]
    (pair,) = as_json(*paths)["pairs"]
    (test,) = pair["tests"]
    assert (test["only_a"], test["only_b"]) == (12, 3)
    # 2 · (C(15,0) + C(15,1) + C(15,2) + C(15,3)) / 2^15 = 2 · 576 / 32768
    assert test["p"] == 1152 / 32768 == pytest.approx(stats.binomtest(3, 15).pvalue, rel=1e-12)
    assert test["difference"] == pytest.approx(9 / 120, abs=1e-15)

    found = stats.bootstrap(
        ((a == labels).astype(float) - (b == labels),),
        np.mean,
        n_resamples=10_000,
        method="percentile",
        random_state=1,
    ).confidence_interval
    # Two percentiles of 10,000 draws each; the difference moves in steps of 1/120.
    assert test["interval"] == pytest.approx([found.low, found.high], abs=1.01 / N)
    row = next(line for line in command(*paths)[1].splitlines() if "+0.0750" in line).split()
    assert row[:3] == ["A", "B", "+0.0750"]
    assert row[-3:] == ["0.0352", "12", "3"]


@pytest.mark.parametrize("case", range(5))
def test_paired_tests_against_scipy(tmp_path, case):
    paths = [evaluated(tmp_path / str(i), f"m{i}", 0.5 + i / 2, 10 * case + i) for i in (0, 1)]
    a, b = read_all(paths)
    (test,) = compare(*gather([a, b]))["tests"]
    right = [r.predictions.predicted == r.predictions.labels for r in (a, b)]
    only_a, only_b = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
    assert test["p"] == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue, rel=1e-12)
    difference = right[0].astype(float) - right[1]
    error = difference.std() / np.sqrt(N)
    normal = stats.norm.interval(0.95, difference.mean(), error)
    # The normal approximation, at n = 120: off by less than a third of a standard error.
    assert test["interval"] == pytest.approx(normal, abs=error / 3)
    # Both in float64, rounded at other places.
    expected = a.results["accuracy"] - b.results["accuracy"]
    assert test["difference"] == pytest.approx(expected, abs=1e-15)


def test_other_examples_are_not_compared(tmp_path):
    paths = [evaluated(tmp_path / str(i), f"m{i}", examples=i) for i in (1, 2)]
    paths.append(evaluated(tmp_path / "3", "m3", examples=2, noise=1))
    pairs = as_json(*paths)["pairs"]
    assert [len(pair["tests"]) for pair in pairs] == [0, 0, 1]
    hashes = [json.loads(p.read_text())["examples_hash"][:8] for p in paths[:2]]
    for pair in pairs[:2]:
        assert all(h in pair["not_compared"] for h in hashes)
        assert "different examples: 120 examples" in pair["not_compared"]
    text = command(*paths)[1]
    assert "m1 and m2: not compared, evaluated on different examples" in text
    assert text.count("not compared") == 2


def test_without_predictions_there_is_a_row_and_no_test(tmp_path):
    a, b = (evaluated(tmp_path / m, m, noise=i) for i, m in enumerate("AB"))
    a.with_name("predictions.jsonl").unlink()
    status, out, _ = command(a, b)
    assert status == 0
    assert f"A and B: not compared, no predictions beside\n  {a}" in out
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["A", "B"]


def test_predictions_are_found_where_the_results_say(tmp_path):
    a, b = (evaluated(tmp_path, m, noise=i, name=f"{m}.json") for i, m in enumerate("AB"))
    for path in (a, b):  # written by --predictions X.jsonl, beside the results
        content = json.loads(path.read_text())
        content["arguments"]["predictions"] = f"gone/rows-of-{path.stem}.jsonl"
        path.write_text(json.dumps(content))
        path.with_suffix(".jsonl").rename(tmp_path / f"rows-of-{path.stem}.jsonl")
    assert len(as_json(a, b)["pairs"][0]["tests"]) == 1


# Seeds


def test_seeds_are_one_row(seeds):
    found = as_json(*seeds)
    zero, lora = found["methods"]
    assert (zero["name"], lora["name"]) == ("zero_shot", "lora_head")
    assert [row["seed"] for row in lora["seeds"]] == [0, 1, 2]
    for key in ("accuracy", "auc_roc", "recall_0", "seconds"):
        values = [row[key] for row in lora["seeds"]]
        assert len(set(values)) > 1
        assert lora["mean"][key] == pytest.approx(statistics.mean(values), rel=1e-12)
        assert lora["standard_deviation"][key] == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert zero["standard_deviation"]["accuracy"] is None
    # An untrained method is tested against each seed.
    (pair,) = found["pairs"]
    assert [(test["seed_a"], test["seed_b"]) for test in pair["tests"]] == [(0, 0), (0, 1), (0, 2)]
    for test, row in zip(pair["tests"], lora["seeds"], strict=True):
        assert test["difference"] == pytest.approx(zero["mean"]["accuracy"] - row["accuracy"])

    text = command(*seeds)[1]
    first = text[: text.index("\n\n")]
    assert sum(line.startswith("lora_head ") for line in first.splitlines()) == 1
    assert f"sd {lora['standard_deviation']['accuracy']:.4f}, 3 seeds" in text
    for row in lora["seeds"]:
        line = next(x for x in text.splitlines() if x.startswith(f"lora_head, seed {row['seed']}"))
        assert f"{row['accuracy']:.4f}" in line
        assert re.search(rf"^zero_shot +lora_head, seed {row['seed']} ", text, re.MULTILINE)


def test_paired_seed_by_seed(tmp_path, seeds):
    for seed in (1, 2, 3):
        run = tmp_path / f"other-{seed}"
        evaluated(
            run, "lora_label_scoring", 2.0, seed, training=trained(seed), name="results-a.json"
        )
        seeds.append(run)
    pairs = {(pair["a"], pair["b"]): pair for pair in as_json(*seeds)["pairs"]}
    tests = pairs["lora_head", "lora_label_scoring"]["tests"]
    assert [(test["seed_a"], test["seed_b"]) for test in tests] == [(1, 1), (2, 2)]
    (refused,) = as_json(seeds[1], seeds[2], seeds[-1])["pairs"]
    assert refused["not_compared"] == "no seed in common: 0, 2 and 3"


def test_other_arguments_are_another_method(tmp_path):
    for i, changes in enumerate(({}, {"lr": 1e-3}, {"seed": 1}, {"data": "more.tsv"})):
        training = trained(0) | changes
        evaluated(tmp_path / str(i), "lora_head", 1.0, i, training=training, name="results-a.json")
    found = as_json(*(tmp_path / str(i) for i in range(4)))
    assert [m["name"] for m in found["methods"]] == ["lora_head", "lora_head 2", "lora_head 3"]
    assert [len(m["seeds"]) for m in found["methods"]] == [2, 1, 1]
    texts = {"lr": ("0.0002", "0.001", "0.0002"), "train_data": ("train.tsv",) * 2 + ("more.tsv",)}
    names = ("lora_head", "lora_head 2", "lora_head 3")
    for what, values in texts.items():
        assert found["differences"][what] == dict(zip(names, values, strict=True))
    assert set(found["differences"]) == {*texts, "file", "training seed"}
    trained_with = dict(zip(names, ("0, 1", "0", "0"), strict=True))
    assert found["differences"]["training seed"] == trained_with
    said = command(*(tmp_path / str(i) for i in range(4)))[1].replace("\n  ", " ")
    assert "\ntraining seed: 0, 1 (lora_head) | 0 (lora_head 2, lora_head 3)\n" in said


def test_the_run_tells_what_older_results_do_not(seeds):
    """Results without training_arguments: they are read from run.json."""
    for run in seeds[1:]:
        path = run / "results-a.json"
        results = json.loads(path.read_text())
        del results["training_arguments"]
        path.write_text(json.dumps(results))
    assert [len(m["seeds"]) for m in as_json(*seeds)["methods"]] == [1, 3]


def test_the_same_twice_is_two_rows_and_one_file_once(tmp_path):
    a, b = (evaluated(tmp_path / name, "zero_shot") for name in "AB")
    again = a.parent / ".." / a.parent.name / a.name
    found = as_json(again, b, a, a)
    assert [m["name"] for m in found["methods"]] == ["zero_shot", "zero_shot 2"]
    assert found["differences"] == {"file": {"zero_shot": str(a), "zero_shot 2": str(b)}}


# Formats


def test_every_number_is_in_the_table(tmp_path):
    path = evaluated(tmp_path, "zero_shot")
    results = json.loads(path.read_text(encoding="utf-8"))
    blocks = [block.splitlines() for block in command(path)[1].split("\n\n")[:3]]
    head, row = ("  ".join(lines) for lines in zip(*blocks, strict=True))
    assert all(lines[0].split()[0] == "method" for lines in blocks)
    for key in ("accuracy", "precision", "recall", "f1", "auc_roc", "brier", "ece"):
        assert f"{results[key]:.4f}" in row
    low, high = results["accuracy_interval"]
    assert f"{low:.4f} to {high:.4f}" in row
    for entry in results["per_class"]:
        assert f"recall {entry['name']}" in head
        assert f"{entry['recall']:.4f}" in row
    assert f"{results['macro']['f1']:.4f}" in row and "macro F1" in head
    assert row.replace("zero_shot", "").split()[-3:] == ["0", "0.0", "2.5"]


def test_chinese_words_stand_in_columns(tmp_path):
    path = evaluated(tmp_path, "zero_shot", words=["好评", "差"])
    for block in command(path)[1].split("\n\n")[:3]:
        head, row = block.splitlines()
        # All characters here from U+2E80 on are two columns wide: Chinese and its punctuation.
        assert len(head) + sum(char > "\u2e7f" for char in head) == len(row)


def test_markdown(tmp_path, seeds):
    path = evaluated(tmp_path / "bar", "head|only")
    status, out, _ = command(*seeds, path, "--format", "markdown")
    assert status == 0
    tables = [part for part in out.split("\n\n") if part.startswith("|")]
    assert len(tables) == 3  # methods, seeds, pairs
    for table in tables:
        bars = {line.replace("\\|", "").count("|") for line in table.splitlines()}
        assert len(bars) == 1
        assert set(table.splitlines()[1]) <= set("|-: ")
    assert "head\\|only" in out


def test_more_classes(tmp_path):
    words = ["好评", "差评", "中评"]
    paths = [evaluated(tmp_path / str(i), f"m{i}", words=words, noise=i) for i in (0, 1)]
    out = command(*paths)[1]
    assert "recall 中评" in out
    assert "precision, recall, F1 and AUC are means over the classes" in out
    macro = json.loads(paths[0].read_text(encoding="utf-8"))["macro"]
    assert f"{macro['f1']:.4f}" in out.splitlines()[1]


def test_generation_has_no_scores(tmp_path):
    path = evaluated(tmp_path, "zero_shot_generate")
    results = json.loads(path.read_text(encoding="utf-8"))
    labels = labels_of(1)
    predicted = np.where(np.arange(N) % 9, labels, -1)
    results |= evaluate_predictions(labels, predicted, None, WORDS)
    path.write_text(json.dumps(results), encoding="utf-8")
    lines = [
        {"index": i, "label": int(y), "prediction": int(p), "scores": None}
        for i, (y, p) in enumerate(zip(labels, predicted, strict=True))
    ]
    path.with_name("predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    other = evaluated(tmp_path / "other", "zero_shot")
    status, out, _ = command(path, other, "--plots", tmp_path / "plots")
    assert status == 0
    assert re.search(r"^zero_shot_generate .* -  +-  +-$", out, re.MULTILINE)
    assert "McNemar" in out


def test_output_file(tmp_path):
    path = evaluated(tmp_path, "zero_shot")
    shown = command(path)[1]
    assert command(path, "--output", tmp_path / "table.txt") == (0, "", "")
    assert (tmp_path / "table.txt").read_text(encoding="utf-8") == shown


@pytest.mark.parametrize("name", ["results-a.json", "predictions-a.jsonl", "log.jsonl", "run.json"])
@pytest.mark.parametrize("as_directory", [False, True])
def test_the_output_replaces_nothing_that_is_read(name, as_directory, seeds, tmp_path):
    run = tmp_path / "lora-0"
    before = {path: path.read_bytes() for path in run.iterdir()}
    given = run if as_directory else run / "results-a.json"
    for output in (run / name, tmp_path / "lora-1" / ".." / "lora-0" / name):
        status, out, err = command(given, seeds[0], "--output", output)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: {output}: is already the data")
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert command(given, "--output", run / "report.txt")[0] == 0


def test_the_output_replaces_no_predictions_that_have_a_name_of_their_own(tmp_path):
    path = evaluated(tmp_path / "a", "zero_shot", predictions=str(tmp_path / "b" / "rows.jsonl"))
    (tmp_path / "b").mkdir()
    rows = path.with_name("predictions.jsonl").rename(tmp_path / "b" / "rows.jsonl")
    before = rows.read_bytes()
    status, _, err = command(path, "--output", rows)
    assert status == 2 and f"{rows}: is already the data" in err
    assert rows.read_bytes() == before


# What differs


def changed(path: Path, **fields: object) -> Path:
    """A results file with other fields."""
    results = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(results | fields, ensure_ascii=False), encoding="utf-8")
    return path


def run_of(path: Path, method: str = "lora_head", results: dict | None = None, **arguments) -> Path:
    """A run, evaluated; arguments: of its training. results: other fields of its results."""
    training = trained(0) | {"method": method, "model": "tiny"} | arguments
    file = evaluated(path, method, training=training, name="results-a.json")
    changed(file, **results or {})
    return path


def differing(*paths: Path) -> dict[str, dict[str, str]]:
    """Without the files that rows of one method have."""
    return {k: v for k, v in as_json(*paths)["differences"].items() if k != "file"}


def test_nothing_differs_but_the_method(tmp_path):
    paths = [evaluated(tmp_path / "a", "zero_shot")]
    paths += [run_of(tmp_path / m, m) for m in ("head_only", "lora_head")]
    assert differing(*paths) == {}
    assert "differs besides" not in command(*paths)[1]


@pytest.mark.parametrize("method", ["zero_shot", "lora_head"])
@pytest.mark.parametrize(
    ("name", "values", "shown"),
    [
        ("model", ("tiny", "Qwen/Qwen2.5-0.5B"), ("tiny", "Qwen/Qwen2.5-0.5B")),
        ("max_text_tokens", (256, 64), ("256", "64")),
        ("template", ("{text}：", "评论：{text}\n"), ("{text}：", "评论：{text}\\n")),
        ("dtype", ("float32", "bfloat16"), ("float32", "bfloat16")),
        ("device", ("cpu", "cuda"), ("cpu", "cuda")),
        ("chat", (False, True), ("no", "yes")),
        ("calibration", (None, "contextual"), ("no", "contextual")),
    ],
)
def test_an_argument_that_differs_has_a_line(method, name, values, shown, tmp_path):
    paths = [evaluated(tmp_path / str(i), method, **{name: v}) for i, v in enumerate(values)]
    assert differing(*paths)[name] == dict(zip((method, f"{method} 2"), shown, strict=True))
    line = f"{name}: {shown[0]} ({method}) | {shown[1]} ({method} 2)"
    assert line in re.sub(r"\n  ", " ", command(*paths)[1])


@pytest.mark.parametrize(
    ("name", "values", "shown"),
    [
        ("lr", (1e-4, 1e-3), ("0.0001", "0.001")),
        ("class_weights", (None, "balanced"), ("no", "balanced")),
        ("dev", (None, "dev.tsv"), ("no", "dev.tsv")),
        ("train_embeddings", (False, True), ("no", "yes")),
    ],
)
def test_training_that_differs_has_a_line_without_the_untrained(name, values, shown, tmp_path):
    paths = [evaluated(tmp_path / "z", "zero_shot")]
    paths += [run_of(tmp_path / str(i), **{name: value}) for i, value in enumerate(values)]
    assert differing(*paths) == {name: dict(zip(("lora_head", "lora_head 2"), shown, strict=True))}


def test_what_a_method_ignores_is_no_difference(tmp_path):
    paths = [run_of(tmp_path / m, m, lr=i) for i, m in enumerate(("lora_head", "head_only"))]
    assert differing(*paths) == {}
    paths = [run_of(tmp_path / f"{m}2", m, lr=i) for i, m in enumerate(("a", "b"))]
    assert differing(*paths) == {"lr": {"a": "0", "b": "1"}}


def test_neither_outputs_nor_columns_are_differences(tmp_path):
    names = ("errors", "explain_row", "export", "text_column", "label_column", "encoding")
    paths = [evaluated(tmp_path / str(i), f"m{i}", **{n: f"{n}{i}" for n in names}) for i in "ab"]
    assert differing(*paths) == {}


def test_rows_trained_on(tmp_path):
    hashes = ("a" * 64, "b" * 64, "c" * 64)
    limits, files = (None, 60, None), ("x/train.tsv", "x/train.tsv", "y/train.tsv")
    runs = [
        run_of(
            tmp_path / str(i),
            results={"training_data_hash": h, "base_fingerprint": None},
            data=file,
            limit=limit,
        )
        for i, (h, file, limit) in enumerate(zip(hashes, files, limits, strict=True))
    ]
    expected = [
        f"{name} ({h[:8]})"
        for name, h in zip(
            ("x/train.tsv", "x/train.tsv, first 60 rows", "y/train.tsv"), hashes, strict=True
        )
    ]
    names = ("lora_head", "lora_head 2", "lora_head 3")
    assert differing(*runs) == {"train_data": dict(zip(names, expected, strict=True))}


def test_a_hash_that_is_not_known_is_no_difference(tmp_path):
    hashes = ("a" * 64, "b" * 64, None)
    given = [{"tokenizer_hash": h, "base_fingerprint": h} for h in hashes]
    paths = [changed(evaluated(tmp_path / str(i), f"m{i}"), **g) for i, g in enumerate(given)]
    assert differing(paths[0], paths[2]) == {}
    found = differing(*paths[:2])
    assert found["model"] == {"m0": "tiny (aaaaaaaa)", "m1": "tiny (bbbbbbbb)"}


def test_words_that_are_scored_under_the_same_names(tmp_path):
    words, typed = ["negative", "positive"], "negative= negative,positive= positive"
    a, b = (evaluated(tmp_path / i, "zero_shot", words=words) for i in "ab")
    arguments = json.loads(b.read_text(encoding="utf-8"))["arguments"]
    changed(b, arguments=arguments | {"labels": typed})
    assert differing(a, b)["labels"] == {"zero_shot": "negative,positive", "zero_shot 2": typed}


def test_shortened_texts_and_rows_seen_in_training(tmp_path):
    def clean(n: int, accuracy: float | None) -> dict:
        return {"train_data": "t.tsv", "n": n, "accuracy": accuracy, "accuracy_interval": [0, 1]}

    plain = changed(evaluated(tmp_path / "z", "zero_shot"), truncated_rows=3, fed_rows=0)
    old = changed(evaluated(tmp_path / "old", "zero_shot_generate"))
    peft = evaluated(tmp_path / "p", "lora_label_scoring", adapter="peft")  # trained elsewhere
    runs = [
        run_of(tmp_path / "a", results={"truncated_rows": 3, "clean": clean(100, 0.75)}),
        run_of(tmp_path / "b", lr=1, results={"truncated_rows": 9, "clean": clean(N, 0.5)}),
        run_of(tmp_path / "c", lr=2, results={"truncated_rows": 3, "clean": clean(0, None)}),
    ]
    fed = changed(evaluated(tmp_path / "f", "zero_shot_chat"), fed_rows=7)
    found = differing(plain, old, *runs)
    names = ("zero_shot", "zero_shot_generate", "lora_head", "lora_head 2", "lora_head 3")
    texts = dict(zip(names, ("3", "not known", "3", "9", "3"), strict=True))
    assert found["texts shortened"] == {k: v for k, v in texts.items() if v != "not known"}
    # Of what is not trained here nobody knows: its base may be an exported run.
    texts = dict(zip(names[2:], ("20", "0", "120"), strict=True))
    assert found["rows seen in training"] == texts
    seen = differing(peft, plain, fed, runs[0])["rows seen in training"]
    assert seen == {"zero_shot_chat": "7", "lora_head": "20"}
    assert "rows seen in training" not in differing(plain, runs[0])


def test_the_majority_baseline(tmp_path):
    path = evaluated(tmp_path, "zero_shot")
    counts = np.bincount(labels_of(1))
    c, accuracy, *ends = read_all([path])[0].majority()
    interval = stats.binomtest(int(counts.max()), N).proportion_ci(method="wilson")
    assert (c, accuracy) == (counts.argmax(), counts.max() / N)
    assert ends == pytest.approx([interval.low, interval.high], rel=1e-9)
    said = f"always {WORDS[c]} has accuracy {accuracy:.4f} ({interval.low:.4f} to"
    assert said in command(path)[1].replace("\n  ", " ")
    two = command(path, evaluated(tmp_path / "b", "zero_shot", examples=2))[1]
    assert two.count("Majority baseline (120 examples with hash ") == 2


def test_runs_that_are_not_evaluated_are_skipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_of(Path("a"))
    Path("b").mkdir()
    Path("b/run.json").write_text("{}")
    line = "b: holds no results-*.json; make one with: python evaluate.py --run b --data FILE\n"
    status, out, err = command("a", "b")
    assert (status, err) == (0, f"skipped {line}") and out == command("a")[1]
    status, out, err = command("b")
    assert (status, out, err) == (2, "", f"error: {line}")


@pytest.mark.parametrize("words", [WORDS, ["neg", "pos"], ["体育新闻" * 9, "b" * 50, "c"]])
def test_no_line_is_wider_than_a_terminal(words, tmp_path, seeds):
    paths = [
        evaluated(tmp_path / "很长的目录" / str(i), m, noise=i, words=words, template=template)
        for i, (m, template) in enumerate(
            [("lora_label_scoring", "{text}" + "：" * 99), ("lora_label_scoring", "短{text}" * 30),
             ("zero_shot_generate" * 9, "{text} " * 40), ("方法" * 40, "{text}")]
        )
    ]  # fmt: skip
    paths.append(evaluated(tmp_path / "other", "m" * 90, examples=7))
    for given in (paths, [*paths[:2], *seeds], seeds):
        out = command(*given)[1]
        assert len(out.splitlines()) > 20
        assert max(map(columns, out.splitlines())) <= 80
    # Nothing is lost where a table is split: its numbers are those of the one table of Markdown.
    cells = [re.findall(r"[+-]?\d\.\d{4}\b", command(*seeds, "--format", f)[1]) for f in FORMS]
    assert sorted(cells[0]) == sorted(cells[1])


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "required: RESULTS"),
        (
            ["missing.json"],
            "missing.json: not results of evaluate.py (No such file or directory); give the file",
        ),
        (["empty"], "holds no results-*.json; make one with: python evaluate.py --run"),
        (["text.json"], "text.json: not results of evaluate.py"),
        (["list.json"], "list.json: not results of evaluate.py"),
        (["some.json"], "accuracy_interval is None, expected type list"),
        (["results.json", "--format", "html"], "invalid choice: 'html'"),
        (["results.json", "--output", "no/such/file"], "cannot be written"),
        (["results.json", "--output", "results.json"], "already the data or another output"),
        (["results.json", "--plots", "results.json"], "cannot be written"),
        (["mangled/results.json"], "not the predictions of results.json"),
        (["short/results.json"], "rows are not numbered 0 to 119"),
        (["swapped/results.json"], "another confusion matrix"),
        (["nan/results.json"], "found the number NaN, expected a finite one"),
        (
            ["results.json", "relabelled/results.json"],
            "predictions have other labels than those of results.json",
        ),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("accuracy 0.5\n")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "some.json").write_text('{"method": "zero_shot", "n": 3}')
    evaluated(tmp_path, "zero_shot")

    def damaged(name: str, change) -> None:
        path = evaluated(tmp_path / name, "zero_shot").with_name("predictions.jsonl")
        path.write_text(change(path.read_text()))

    damaged("mangled", lambda text: text[:-9])
    damaged("short", lambda text: "".join(text.splitlines(keepends=True)[:-1]))
    damaged("swapped", lambda text: text.replace('"prediction": 1', '"prediction": 0', 1))
    damaged("nan", lambda text: re.sub(r"\[[^,]*,", "[NaN,", text, count=1))
    if "relabelled/results.json" in arguments:  # two rows swap places; the counts stay

        def swap(text: str) -> str:
            rows = [json.loads(line) for line in text.splitlines()]
            one, two = (next(r for r in rows if r["label"] == y) for y in (0, 1))
            for key in ("label", "prediction", "scores"):
                one[key], two[key] = two[key], one[key]
            return "\n".join(map(json.dumps, rows))

        damaged("relabelled", swap)
    status, out, err = command(*arguments)
    assert status == 2
    assert out == "" or "--plots" in arguments
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


def test_plots_name_the_package_that_is_missing(tmp_path, monkeypatch):
    path = evaluated(tmp_path, "zero_shot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "qwen_min.report.plots")
    monkeypatch.delattr("qwen_min.report.plots")
    status, out, err = command(path, "--plots", tmp_path / "plots")
    assert (status, out) == (2, "")
    assert "needs matplotlib, which is not installed: pip install matplotlib" in err
    assert err.count("\n") == 1
    assert command(path)[0] == 0


# Pictures


@pytest.fixture
def no_boxes(monkeypatch):
    """matplotlib warns when it draws a box for a character. Few pixels, to save time."""
    monkeypatch.setattr(plots, "DPI", 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pictures(directory: Path) -> list[str]:
    for path in directory.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5_000
    return sorted(path.name.split("-")[0] for path in directory.iterdir())


def test_pictures(tmp_path, seeds, no_boxes):
    status, _, err = command(*seeds, "--plots", tmp_path / "plots")
    assert status == 0
    kinds = ["accuracy", "confusion", "reliability", "roc", "training.png"]
    assert pictures(tmp_path / "plots") == kinds
    assert err.count(".png\n") == 5  # where they are


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", {"history": [{"held_out_log_loss": 0.5}]}),
        ("run.json", {"history": [{"step": 1, "held_out_log_loss": "low"}]}),
        ("run.json", {"history": 3}),
        ("log.jsonl", {"step": 1, "loss": None, "lr": 0.1}),
        ("log.jsonl", {"step": [], "loss": 0.5, "lr": 0.1}),
    ],
)
def test_pictures_of_a_damaged_run_are_refused(file, content, tmp_path, seeds):
    path = Path(seeds[1]) / file
    before = json.loads(path.read_text("utf-8")) if file == "run.json" else {}
    path.write_text(json.dumps(before | content) + "\n", "utf-8")
    status, _, err = command(*seeds, "--plots", tmp_path / "plots")
    assert status == 2 and err.count("\n") == 1 and str(path) in err


def test_pictures_of_three_classes_on_two_sets(tmp_path, no_boxes):
    words = ["好评", "差评", "a$\\frac$\t😀"]  # no formula
    paths = [evaluated(tmp_path / str(i), "zero_shot", words=words, examples=i) for i in (1, 2)]
    assert command(*paths, "--plots", tmp_path / "plots")[0] == 0
    assert pictures(tmp_path / "plots") == sorted(
        ["accuracy", "confusion", "reliability", "roc"] * 2
    )


def test_words_are_drawn_with_a_font_that_has_them(monkeypatch):
    """matplotlib brings these two families; which others are installed depends on the machine."""
    manager = fonts.font_manager.fontManager
    own = [font for font in manager.ttflist if font.name.startswith(("DejaVu", "STIX"))]
    monkeypatch.setattr(manager, "ttflist", own)
    found, drawable = fonts.find_fonts()
    assert found == ["DejaVu Sans"]
    assert fonts.readable("ROC 正面 é\n", drawable) == "ROC \\u6b63\\u9762 é\\n"
    # The first of the list that is installed stands beside it.
    monkeypatch.setattr(fonts, "CHINESE", ("No Such Font", "STIXGeneral", "DejaVu Serif"))
    found, more = fonts.find_fonts()
    assert found == ["DejaVu Sans", "STIXGeneral"]
    (char,) = map(chr, sorted(more - drawable)[:1])
    assert more > drawable and fonts.readable(char, more) == char != fonts.readable(char, drawable)


@pytest.mark.parametrize("ties", [False, True])
def test_the_roc_curve_is_scikit_learns(ties):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 200)
    ranking = rng.normal(size=200) + labels
    ranking = ranking.round(0) if ties else ranking
    x, y = plots.roc_curve(labels == 1, ranking)
    expected = sk.roc_curve(labels, ranking, drop_intermediate=False)[:2]
    # Quotients of the same whole numbers.
    np.testing.assert_allclose([x, y], expected, rtol=1e-15)
    area = np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2)
    scores = np.stack([np.zeros(200), ranking], axis=1)
    assert area == pytest.approx(auc_roc(labels, scores), abs=1e-12)
    assert plots.roc_curve(np.ones(3, dtype=bool), np.arange(3)) is None


def test_what_the_pictures_say(seeds):
    """Legends, axis labels with units, and curves that differ in line style and marker."""
    methods = gather(read_all(seeds))
    scored = {m.name: [r.predictions for r in m.seeds.values()] for m in methods}
    figure = plots.plot_roc(scored, ["neg", "pos"])
    (axes,) = figure.axes
    assert not axes.get_legend()  # it stands below
    entries = axes.get_legend_handles_labels()[1]
    mean = as_json(*seeds)["methods"][1]["mean"]["auc_roc"]
    assert entries[1] == f"lora_head (AUC {mean:.4f}, mean of 3 seeds)"
    assert len(entries) == 3
    assert axes.get_xlabel() == "false positive rate: share of neg taken for pos"
    styles = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(styles) == 3  # two methods and chance

    results = {name: r.predictions for m in methods for name, r in m.titled.items()}
    panels = plots.plot_reliability(results).axes
    assert len(panels) == 8  # four results, each followed by its counts
    assert sum(bar.get_height() for bar in panels[1].patches) == N
    # How far the points are from the diagonal, weighted by their counts, is the ECE.
    points = panels[0].lines[1]
    counts = [bar.get_height() for bar in panels[1].patches if bar.get_height()]
    gaps = np.abs(np.array(points.get_ydata()) - points.get_xdata())
    ece = methods[0].first.results["ece"]
    assert np.dot(gaps, counts) / N == pytest.approx(ece, abs=1e-12)

    kinds = {"a": "classes", "b": "vocabulary"}
    figure = plots.plot_training([(m, k, [[1], [1.0], [0.1]], []) for m, k in kinds.items()])
    assert ["(" in axes.get_ylabel() for axes in figure.axes] == [True] * 4
    assert figure.axes[3].get_xlabel() == "step (batches trained on)"
    for axes, (name, kind) in zip(figure.axes[:2], kinds.items(), strict=True):
        assert kind in axes.get_ylabel()
        assert [line.get_label() for line in axes.lines] == [name]


def overlaps(figure) -> list[str]:
    """The legends of a figure that cover a part of its axes."""
    FigureCanvasAgg(figure).draw()
    parts = [figure, *figure.subfigs]
    legends = [box for part in parts for box in part.legends]
    legends += [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    assert legends
    boxes = [legend.get_window_extent() for legend in legends]
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 for b in boxes)
    assert all(figure.bbox.y0 <= b.y0 for b in boxes)
    axes = [axes.get_tightbbox(for_layout_only=True) for axes in figure.axes]  # with its labels
    return [str(box) for box in boxes if any(box.overlaps(other) for other in axes)]


@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("words", [["neg", "pos"], ["a", "b", "a rather long name of a class"]])
def test_no_legend_covers_a_point(n, words, tmp_path, seeds):
    paths = [evaluated(tmp_path / str(i), f"m{i}" * 10, 1, i, words=words) for i in range(n)]
    methods = gather(read_all(paths))
    rows = {m.name: m.first for m in methods}
    log = [[1, 2], [1.0, 0.9], [0.1, 0.1]]
    figures = [plots.plot_roc({name: [r.predictions] for name, r in rows.items()}, words)]
    figures.append(plots.plot_reliability({name: r.predictions for name, r in rows.items()}))
    figures.append(plots.plot_accuracies(rows, words))
    figures.append(plots.plot_training([(name, "classes", log, []) for name in rows]))
    assert [overlaps(figure) for figure in figures] == [[]] * 4


def test_the_pictures_of_a_users_own_runs_show_the_numbers(seeds):
    methods = gather(read_all(seeds))
    rows = {name: r for m in methods for name, r in m.titled.items()}
    axes = plots.plot_accuracies(rows, WORDS).axes[0]
    names = ["zero_shot", *(f"lora_head, seed {seed}" for seed in range(3))]
    assert [text.get_text() for text in axes.get_yticklabels()] == names
    dots, _, (bars,) = axes.containers[0]
    numbers = [seed for method in as_json(*seeds)["methods"] for seed in method["seeds"]]
    assert list(dots.get_xdata()) == [row["accuracy"] for row in numbers]
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx(row["accuracy_interval"]) for row in numbers]
    counts = np.bincount(labels_of(1))
    base = next(line for line in axes.lines if "majority" in line.get_label())
    assert base.get_xdata()[0] == counts.max() / N
    assert WORDS[counts.argmax()] in base.get_label()

    left, *others = plots.plot_confusion(rows, dict.fromkeys(rows, WORDS)).axes
    matrix = np.array(methods[0].first.results["confusion_matrix"])
    shown = [text.get_text().split("\n") for text in left.texts]
    assert [int(count) for count, _ in shown] == matrix.ravel().tolist()
    shares = (matrix / matrix.sum(axis=1, keepdims=True)).ravel()
    assert [share for _, share in shown] == [f"{share:.1%}" for share in shares]
    # Readable in grey: white on dark, black on light.
    assert [t.get_color() for t in left.texts] == ["white" if s > 0.5 else "black" for s in shares]
    assert [axes.get_title() for axes in others] == names[1:]


def test_a_run_is_named_as_its_row(tmp_path, seeds):
    run = tmp_path / "words"
    method = {"method": "lora_label_scoring"}
    evaluated(run, "lora_label_scoring", training=trained(0) | method, name="results-a.json")
    log = json.dumps({"step": 1, "loss": 3.0, "lr": 0.1}) + "\n"
    (run / "log.jsonl").write_text(log)
    methods = gather(read_all([*seeds, run]))
    kinds = {name: kind for name, kind, *_ in plots.training_logs(methods)}
    names = {f"lora_head, seed {seed}": "classes" for seed in (0, 1, 2)}
    assert kinds == names | {"lora_label_scoring": "vocabulary"}
    # The head of a run on the bare base: its training is still that of lora_head.
    evaluated(seeds[1], "transplanted_head", training=trained(2), name="results-t.json")
    first = gather(read_all(seeds[:2]))
    assert [m.name for m in first] == ["zero_shot", "lora_head", "transplanted_head"]
    assert [name for name, *_ in plots.training_logs(first)] == ["lora_head"]


def test_characters_without_a_font_are_named_with_a_package(tmp_path, monkeypatch, no_boxes):
    manager = fonts.font_manager.fontManager
    dejavu = [font for font in manager.ttflist if "dejavu" in font.name.lower()]
    monkeypatch.setattr(manager, "ttflist", dejavu)
    path = evaluated(tmp_path, "zero_shot")
    status, _, err = command(path, "--plots", tmp_path / "plots")
    (line,) = [line for line in err.splitlines() if not line.endswith(".png")]
    assert status == 0 and "no known font has 负面正" in line and "fonts-noto-cjk" in line
    path = evaluated(tmp_path, "zero_shot", words=["neg", "pos"])
    assert "warning" not in command(path, "--plots", tmp_path / "plots")[2]


def test_pictures_replace_nothing_that_is_read(tmp_path, seeds, no_boxes):
    run, directory = Path(seeds[1]), tmp_path / "plots"
    directory.mkdir()
    (directory / "training.png").symlink_to(run / "run.json")
    before = (run / "run.json").read_bytes()
    status, _, err = command(*seeds, "--plots", directory)
    assert (status, err.count("\n")) == (2, 1) and "already the data or another output" in err
    assert (run / "run.json").read_bytes() == before
    assert [path.name for path in directory.iterdir()] == ["training.png"]
