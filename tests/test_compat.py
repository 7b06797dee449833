"""Files that commit fe28c7e made are read, and give the same numbers.

tests/compat/README.md lists them. Every test works on a copy. All of them were computed in float32:
with another order of sums (another machine, other batches) these scores differ by at most 4e-6. In
bfloat16 they could differ by 0.1, which would hide a mistake.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import evaluate
import train
from qwen_min.command.arguments import SCORE_LABELS
from qwen_min.report.__main__ import main as report

OLD = Path(__file__).parent / "compat"
# Twice what other batches or threads change in float32. Scores are up to 43 in size. The smallest
# margin between two classes is 0.0049, so predictions and all counts must be equal.
TOLERANCE = 1e-5
RUNS = ("head_only", "probe_best_mean", "probe_adapted", "lora_head", "lora_label_scoring")
NEWS_RUNS = ("news_head", "news_vectors")
NEWS = ["--model", "base", "--labels", "体育,财经,科技", "--template", "新闻：{text}\\n类别："]
INSIDE = ["--label-sets", "差,好;不太满意,非常满意", "--calibrate", "--train-data", "train.tsv"]
TEST, FP32 = ["--data", "test.tsv"], ["--dtype", "float32"]
# The kept results file and the arguments that made it.
EVALUATIONS = {
    **{f"runs/{run}/results-0969a279a8a9.json": ["--run", f"runs/{run}", *TEST] for run in RUNS},
    **{
        f"runs/{run}/results-5b3073f1636d.json": ["--run", f"runs/{run}", "--data", "news.jsonl"]
        for run in NEWS_RUNS
    },
    "runs/lora_head/results-transplanted_head-0969a279a8a9.json": [
        *["--method", "transplanted_head", "--run", "runs/lora_head", *TEST]
    ],
    "runs/lora_label_scoring/results-0969a279a8a9-5c241162.json": [
        *["--run", "runs/lora_label_scoring", "--labels", "差,好", *TEST]
    ],
    "zero_shot.json": ["--method", "zero_shot", *TEST, *INSIDE, *FP32],
    "zero_shot_generate.json": ["--method", "zero_shot_generate", *TEST, *FP32],
    "news_zero_shot.json": ["--method", "zero_shot", *NEWS, "--data", "news.jsonl", *FP32],
    "peft_adapter.json": [
        *["--method", "lora_label_scoring", "--adapter", "peft_adapter", *TEST, *FP32]
    ],
}
# What differs between two evaluations: the clock and the library.
MEASURED = {"seconds", "load_seconds", "examples_per_second", "torch"}


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A copy of the kept files, which is the working directory: their paths are relative."""
    directory = tmp_path / "compat"
    shutil.copytree(OLD, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(directory)
    return directory


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def predictions_of(results: Path) -> Path:
    """The file of predictions beside a kept results file."""
    if results.name.startswith("results"):
        return results.with_name(results.name.replace("results", "predictions") + "l")
    return results.with_suffix(".predictions.jsonl")


def assert_close(new: object, old: object, where: str = "") -> None:
    """All that is in `old` is in `new`: numbers within the tolerance, anything else equal."""
    if isinstance(old, dict):
        assert isinstance(new, dict), where
        for key in old.keys() - MEASURED:
            assert key in new, f"{where}/{key} is missing"
            assert_close(new[key], old[key], f"{where}/{key}")
    elif isinstance(old, list):
        assert isinstance(new, list) and len(new) == len(old), where
        for i, (a, b) in enumerate(zip(new, old, strict=True)):
            assert_close(a, b, f"{where}/{i}")
    elif isinstance(old, float):
        assert new == pytest.approx(old, abs=TOLERANCE, rel=0), where
    else:
        assert new == old and type(new) is type(old), where


def test_every_kept_result_is_computed_again():
    kept = {*OLD.glob("runs/*/results-*.json")}
    rows = OLD.glob("*.predictions.jsonl")
    kept |= {path.with_name(path.name.replace("predictions.jsonl", "json")) for path in rows}
    assert {OLD / name for name in EVALUATIONS} == kept


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_gives_the_same_numbers(name, copy, capsys):
    args = EVALUATIONS[name]
    old_results, old_rows = read_json(copy / name), read_lines(predictions_of(copy / name))
    for path in (copy / name, predictions_of(copy / name)):
        path.unlink()
    if "--run" not in args:
        args = [*args, "--output", name, "--predictions", predictions_of(Path(name)).name]
    assert evaluate.main(args) == 0
    # With --run nothing names the files: they must get the same names as before.
    rows, results = read_lines(predictions_of(copy / name)), read_json(copy / name)
    assert_close(rows, old_rows, "predictions")
    if results["method"] not in SCORE_LABELS:  # their prompts have no label tokens any more
        assert results["label_ids"] is None and old_results.pop("label_ids")
    # Where no encoding is given, it is found in the file now.
    assert results["arguments"]["encoding"] is None
    assert old_results["arguments"].pop("encoding") == "utf-8"
    assert_close(results, old_results, "results")
    assert f"{old_results['accuracy']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora_head", "lora_label_scoring"])
def test_a_runs_adapter_alone(method, copy, tmp_path, capsys):
    """--adapter on a run's adapter gives what --run gives."""
    record = read_json(copy / f"runs/{method}/run.json")["arguments"]
    args = ["--method", method, "--adapter", f"runs/{method}/adapter", *TEST, *FP32]
    args += ["--labels", record["labels"], "--max-text-tokens", str(record["max_text_tokens"])]
    out = tmp_path / "rows.jsonl"
    assert evaluate.main([*args, "--predictions", str(out)]) == 0
    old = read_lines(copy / f"runs/{method}/predictions-0969a279a8a9.jsonl")
    assert_close(read_lines(out), old)
    capsys.readouterr()


@pytest.mark.parametrize("method", ["lora_head", "lora_label_scoring"])
def test_an_unfinished_run_is_resumed(method, copy, capsys):
    """Adam divides a gradient by its size, so a rounding error in a small gradient is enlarged. Two
    threads instead of one change a trained number by at most 2.2e-6. The resumed steps change every
    tensor by at least 2.5e-3, a hundred times the tolerance."""
    run, expected = copy / "unfinished" / method, copy / "expected" / method
    before = read_lines(run / "log.jsonl")
    assert evaluate.main(["--run", str(run), *TEST]) == 2  # not before it is finished
    assert train.main(["--resume", "--output", f"unfinished/{method}"]) == 0

    tensors = load_file(run / "checkpoints/step-15/adapter/adapter_model.safetensors")
    old = load_file(expected / "last.safetensors")
    assert tensors.keys() == old.keys()
    for name, tensor in old.items():
        assert (tensors[name] - tensor).abs().max() < 2.5e-5, name
    log, old_log = read_lines(run / "log.jsonl"), read_lines(expected / "log.jsonl")
    assert log[: len(before)] == before
    assert [line["step"] for line in log] == list(range(1, 16))
    for key in ("loss", "lr"):
        assert_close([line[key] for line in log], [line[key] for line in old_log], key)
    record, old_record = read_json(run / "run.json"), read_json(expected / "run.json")
    for key in ("history", "best_step", "steps", "trained_parameters", "labels", "finished"):
        assert_close(record[key], old_record[key], key)
    assert evaluate.main(["--run", str(run), *TEST]) == 0
    capsys.readouterr()


def test_a_finished_run_needs_no_more_training(copy, capsys):
    files = {path: path.read_bytes() for path in (copy / "runs/lora_head").rglob("*.*")}
    assert train.main(["--resume", "--output", "runs/lora_head"]) == 0
    assert "finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in files} == files


REPORTED = ["runs/head_only", "runs/probe_adapted", "runs/lora_head", "zero_shot.json"]
REPORTED += ["zero_shot_generate.json", "peft_adapter.json"]


def numbers(text: str) -> list[str]:
    """The numbers of all tables: those with four decimals, wherever they stand."""
    return re.findall(r"[+-]?\d\.\d{4}\b", text)


@pytest.mark.parametrize(("form", "ending"), [("text", "txt"), ("markdown", "md")])
def test_report_gives_the_same_numbers(form, ending, copy, capsys):
    assert report([*REPORTED, "--format", form]) == 0
    old = Counter(numbers((copy / f"report.{ending}").read_text(encoding="utf-8")))
    new = Counter(numbers(capsys.readouterr().out))
    assert old.total() > 130
    assert not old - new
    # Seven macro F1, the majority's accuracy and interval.
    assert (new - old).total() == 7 + 3


def test_report_gives_the_same_json(copy, capsys):
    assert report([*REPORTED[-3:], "--format", "json"]) == 0
    new, old = json.loads(capsys.readouterr().out), read_json(copy / "report.json")
    assert new["pairs"] == old["pairs"]
    for row in new["methods"]:  # a younger measure
        for numbers in (row["mean"], row["standard_deviation"], *row["seeds"]):
            numbers.pop("macro_f1")
    assert new["methods"] == old["methods"]


def test_report_puts_new_results_beside_old_ones(copy, capsys):
    """A new evaluation that differs from an old one in a setting is another row. A new run that
    differs from an old one in its seed is another seed of the same row."""
    new = ["--method", "zero_shot", *TEST, *FP32, "--max-text-tokens", "5"]
    new += ["--output", "cut.json", "--predictions", "cut.predictions.jsonl"]
    assert evaluate.main(new) == 0
    old = read_json(copy / "runs/lora_head/run.json")["arguments"]
    names = ("method", "data", "dtype", "lora_targets", "r", "alpha", "epochs", "lr")
    args = [f"--{name.replace('_', '-')}={old[name]}" for name in names]
    assert train.main([*args, "--seed", "1", "--output", "runs/new"]) == 0
    assert evaluate.main(["--run", "runs/new", *TEST]) == 0
    capsys.readouterr()

    results = ["runs/lora_head/results-0969a279a8a9.json", "runs/new", "zero_shot.json", "cut.json"]
    assert report([*results, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert [[seed["seed"] for seed in row["seeds"]] for row in rows] == [[0, 1], [0], [0]]
    kept = [read_json(OLD / name) for name in (results[0], results[2])]
    assert [rows[i]["seeds"][0]["accuracy"] for i in (0, 1)] == [k["accuracy"] for k in kept]


def perturb(path: Path) -> None:
    """Change every tensor of a file by a hundredth."""
    with_metadata = path.read_bytes()
    length = int.from_bytes(with_metadata[:8], "little")
    metadata = json.loads(with_metadata[8 : 8 + length]).get("__metadata__")
    save_file({name: t * 1.01 for name, t in load_file(path).items()}, path, metadata)


@pytest.mark.parametrize("name", ["runs/lora_head/results-0969a279a8a9.json", "peft_adapter.json"])
def test_a_changed_tensor_would_be_seen(name, copy, capsys):
    for path in copy.rglob("adapter_model.safetensors"):
        perturb(path)
    out = copy / "rows.jsonl"
    assert evaluate.main([*EVALUATIONS[name], "--predictions", str(out)]) == 0
    with pytest.raises(AssertionError):
        assert_close(read_lines(out), read_lines(predictions_of(OLD / name)))
    capsys.readouterr()
