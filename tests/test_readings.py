"""Training and evaluation of one run agree: on what labels mean, on words, on dtype; and say so."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import qwen_min
import train
from qwen_min.files.data import read_examples
from qwen_min.report.__main__ import main as report
from qwen_min.report.audit import main as audit

TINY = Path(qwen_min.__file__).parent / "tiny"
STARS = "1,2,3,4,5"
TEXTS = ("房间很干净", "书的印刷很差", "屏幕不错", "散热不好", "早餐一般", "服务很好", "慢", "很差")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("train.csv", range(5))
    write("test.csv", range(1, 5))
    write("words.csv", range(1, 6))
    write("two.csv", range(2))


def write(name: str, labels: range) -> None:
    rows = [f"{y},{text}{y}" for text in TEXTS for y in labels]
    Path(name).write_text("\n".join(["label,text", *rows, ""]), encoding="utf-8")


def run(command, *args: str) -> int:
    return command([*args, "--device", "cpu"])


def trained(run_: str, *more: str) -> int:
    return run(train.main, "--method", "head_only", "--output", run_, *more)


def results(file: str = "out.json") -> dict:
    return json.loads(Path(file).read_text(encoding="utf-8"))


def test_the_data_of_a_run_is_read_as_its_training_data(capsys):
    assert trained("run", "--data", "train.csv", "--labels", STARS) == 0
    assert results("run/run.json")["labels_read_as"] == "class numbers"
    files = ("--output", "out.json", "--predictions", "out.jsonl")
    assert run(evaluate.main, "--run", "run", "--data", "test.csv", *files) == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [1, 2, 3, 4] * len(TEXTS)  # as they stand in the file
    # The same texts are in the training data, whichever way that is named: none is new.
    assert results()["clean"]["n"] == 0
    more = (*files, "--train-data", "test.csv")
    assert run(evaluate.main, "--run", "run", "--data", "train.csv", *more) == 0
    capsys.readouterr()
    for data in (("--data", "words.csv"), ("--data", "test.csv", "--train-data", "words.csv")):
        assert run(evaluate.main, "--run", "run", *data) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "words.csv, line 6: found the label '5', expected class numbers (0..4)" in said
    # An older run does not know: each file decides for itself, as before.
    record = results("run/run.json")
    del record["labels_read_as"]
    Path("run/run.json").write_text(json.dumps(record))
    assert run(evaluate.main, "--run", "run", "--data", "words.csv", *files) == 0


def test_words_and_numbers_that_cannot_be_confused_stay_free():
    words = ["差", "好"]
    Path("words.csv").write_text("label,text\n好,a\n差,b\n", encoding="utf-8")
    assert [e.label for e in read_examples("two.csv", words, read_as="words")][:2] == [0, 1]
    assert [e.label for e in read_examples("words.csv", words, read_as="class numbers")] == [1, 0]


@pytest.mark.parametrize("order", [("train.csv", "words.csv"), ("words.csv", "train.csv")])
def test_two_files_are_read_alike_or_refused(order, capsys):
    assert audit([*order, "--labels", STARS]) == 2
    assert f"{order[1]}, line " in capsys.readouterr().err
    assert audit(["train.csv", "test.csv", "--labels", STARS]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[-4:] == ["8", "(20.0%)", "0", "(0.0%)"]
    zero_shot = ("--method", "zero_shot", "--labels", STARS)
    files = ("--data", order[0], "--train-data", order[1])
    assert run(evaluate.main, *zero_shot, *files) == 2
    assert f"{order[1]}, line " in capsys.readouterr().err


def test_resume_reads_the_words_that_the_run_began_with(capsys):
    """An older version kept the space of ' 正面': the run's record says so."""
    given = ("--data", "two.csv", "--labels", "负面, 正面")
    assert trained("run", *given) == 0
    record = results("run/run.json")
    assert record["labels"] == ["负面", "正面"]
    Path("run/run.json").write_text(json.dumps(record | {"labels": ["负面", " 正面"]}))
    capsys.readouterr()
    for more in ((), ("--labels", "负面, 正面")):
        files = ("--output", "out.json", "--data", "two.csv")
        assert run(evaluate.main, "--run", "run", *files, *more) == 0
        assert [row["name"] for row in results()["per_class"]] == ["负面", " 正面"]
        assert "white space" not in capsys.readouterr().err
    lora = ("--epochs", "1", "--limit", "8", "--output", "lora")
    assert run(train.main, "--method", "lora_label_scoring", *given, *lora) == 0
    record = results("lora/run.json") | {"labels": ["负面", " 正面"], "finished": False}
    Path("lora/run.json").write_text(json.dumps(record))
    assert run(train.main, "--resume", "--output", "lora") == 0
    assert results("lora/run.json")["labels"] == ["负面", " 正面"]
    assert run(evaluate.main, "--run", "lora", "--data", "two.csv", "--output", "out.json") == 0
    assert [row["name"] for row in results()["per_class"]] == ["负面", " 正面"]


def json_of_report(capsys, *files: str) -> dict:
    capsys.readouterr()
    assert report([*files, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def rows_of_report(capsys, *files: str) -> list[dict]:
    return json_of_report(capsys, *files)["methods"]


@pytest.mark.parametrize("same", [True, False])
def test_the_dtype_that_was_trained_in_tells_methods_apart(same, capsys):
    for seed, dtype in enumerate(["bfloat16", "bfloat16" if same else "float32"]):
        shutil.copytree(TINY, f"model{seed}")
        config = json.loads((TINY / "config.json").read_text())
        config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": dtype}
        Path(f"model{seed}/config.json").write_text(json.dumps(config))
        more = ("--model", f"model{seed}", "--data", "two.csv", "--seed", str(seed))
        assert trained(f"run{seed}", *more, "--dtype", dtype if same and seed else "auto") == 0
        assert results(f"run{seed}/run.json")["dtype"] == dtype
        more = ("--dtype", "float32", "--output", f"results{seed}.json")
        assert run(evaluate.main, "--run", f"run{seed}", "--data", "two.csv", *more) == 0
        assert results(f"results{seed}.json")["training_dtype"] == dtype
    found = rows_of_report(capsys, "results0.json", "results1.json")
    assert [len(row["seeds"]) for row in found] == ([2] if same else [1, 1])
    apart = json_of_report(capsys, "results0.json", "results1.json")["differences"]
    assert same or set(apart["train_dtype"].values()) == {"bfloat16", "float32"}


def test_words_are_compared_as_they_count(capsys):
    typed = {0: "负面,正面", 1: "负面，正面", 2: "负面, 正面"}
    for seed, labels in typed.items():
        more = ("--labels", labels, "--seed", str(seed), "--output", f"{seed}.json")
        more += ("--label-sets", "差,好") * (seed == 1)
        assert run(evaluate.main, "--method", "zero_shot", "--data", "two.csv", *more) == 0
        assert trained(f"run{seed}", *("--data", "two.csv", "--labels", labels, *more[2:4])) == 0
        assert run(evaluate.main, "--run", f"run{seed}", "--data", "two.csv") == 0
    for files in ([f"{seed}.json" for seed in typed], [f"run{seed}" for seed in typed]):
        (row,) = rows_of_report(capsys, *files)
        assert [seed["seed"] for seed in row["seeds"]] == [0, 1, 2]
    more = ("--labels", " 负面, 正面", "--seed", "1", "--output", "1.json")  # other words
    assert run(evaluate.main, "--method", "zero_shot", "--data", "two.csv", *more) == 0
    assert len(rows_of_report(capsys, "0.json", "1.json")) == 2


@pytest.mark.parametrize(
    "failed, said",
    [
        ({"reason": "found numbers", "lines": [2, 8]}, "failed (found numbers): evaluate ag"),
        ("KeyError: 'x'", "failed (KeyError: 'x'): evaluate again"),
        ({"lines": 3}, "not results of evaluate.py"),
        ([1], "not results of evaluate.py"),
    ],
)
def test_a_report_says_which_results_failed(failed, said, capsys):
    Path("out.json").write_text(json.dumps({"n": 24, "failed": failed}))
    assert report(["out.json"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out.json: ") and said in err and err.count("\n") == 1


def test_a_limit_above_every_file_is_the_whole_file():
    assert len(read_examples("two.csv", ["差", "好"], limit=10**30)) == 2 * len(TEXTS)


@pytest.mark.parametrize("rows", [16, 600])  # with 600, the features of the first 256 are kept
@pytest.mark.parametrize("probed", [False, True])
def test_a_probe_without_features_leaves_its_directory_free(rows, probed, capsys, monkeypatch):
    texts = [f"{i % 2},第{i}条" for i in range(rows)]
    Path("rows.csv").write_text("\n".join(["label,text", *texts, ""]), encoding="utf-8")
    pooled, bad = train.forms(False).pooled_features, rows - 3

    def overflow(model, prompts, *more):
        states = pooled(model, prompts, *more).clone()
        if len(prompts) < 256:  # the last file of features
            states[-3] = torch.inf
        return states

    given = ["--data", "rows.csv"]
    if probed:
        lora = ("--lora-targets", "q_proj", "--epochs", "1", "--output", "lora", "--limit", "8")
        assert run(train.main, "--method", "lora_label_scoring", *given, *lora) == 0
        given += ["--adapter", "lora/adapter"]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train.forms(False), "pooled_features", overflow)
        assert trained("run", *given, "--dtype", "float16") == 2
    assert f"rows.csv, line {bad + 2}: found numbers" in capsys.readouterr().err
    assert not Path("run").exists()
    assert trained("run", *given, "--dtype", "float32") == 0


def test_only_a_checkpoint_that_exists_is_said_to_be_kept(capsys, monkeypatch):
    losses, steps = train.forms(False).head_losses, []

    def nan_at_second(*args):
        steps.append(1)
        return losses(*args) * (torch.nan if len(steps) == at else 1)

    monkeypatch.setattr(train.forms(False), "head_losses", nan_at_second)
    given = ("--method", "lora_head", "--data", "two.csv", "--batch-size", "4", "--save-every", "1")
    for at, kept in ((1, False), (3, True)):
        steps.clear()
        assert run(train.main, *given, "--output", f"run{at}") == 1
        assert ("the last checkpoint is kept" in capsys.readouterr().err) is kept
        assert any(Path(f"run{at}").glob("checkpoints/*")) is kept
