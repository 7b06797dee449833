"""Numbers that are not finite are named, never read as an answer; what is computed is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import qwen_min
import train
from qwen_min import training
from qwen_min.command import task, trained
from qwen_min.errors import UserError
from qwen_min.fast import forms
from qwen_min.files.weights import load_model, save_model
from qwen_min.lab import calibration, label_sets
from qwen_min.report.__main__ import main as report

TEMPLATE = "评论：{text}\n情感倾向：\n"
TEXTS = ["很好", "不好 the dog", "房间小，但是很干净。", "慢", "面坨了", "不推荐"] * 4
FIXED = ["--data", "rows.jsonl", "--template", TEMPLATE, "--device", "cpu"]
FILES = ["--output", "out.json", "--predictions", "out.jsonl"]
WORDS = ["zero_shot", "lora_label_scoring"]
HEADS = ["head_only", "lora_head"]
PLAIN = [[], ["--plain"]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """large: layer 2 of 3 adds numbers above the largest one of float16, 65,504."""
    root = tmp_path_factory.mktemp("bases")
    make_reference(root / "large", tied=False)
    tensors = load_file(root / "large/model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e5
    save_file(tensors, root / "large/model.safetensors", {"format": "pt"})
    # partial: the vector of the token `d` is NaN, so rows that hold a d are.
    shutil.copytree(root / "large", root / "partial")
    tensors["model.layers.1.mlp.down_proj.weight"] /= 1e5
    tokens = AutoTokenizer.from_pretrained(root / "partial")
    tensors["model.embed_tokens.weight"][tokens(" dog").input_ids] = torch.nan
    save_file(tensors, root / "partial/model.safetensors", {"format": "pt"})
    return root


@pytest.fixture(autouse=True)
def workplace(bases, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("large", "partial"):
        Path(name).symlink_to(bases / name)
    write_rows(TEXTS)
    return tmp_path


def write_rows(texts: list[str]) -> None:
    rows = [json.dumps({"label": i % 2, "text": text}) for i, text in enumerate(texts)]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def train_run(method: str, model: str, *more: str) -> int:
    return train.main([*("--method", method, "--model", model, "--output", "run"), *FIXED, *more])


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def results_of(path: str = "out.json") -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


# Where it begins


def test_the_layer_is_the_references(bases):
    """The tests below expect layer 2; so does the reference, whose states are numbered alike."""
    model = AutoModelForCausalLM.from_pretrained(bases / "large", dtype=torch.float16)
    with torch.no_grad():
        states = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
    assert [bool(h.isfinite().all()) for h in states] == [True, True, False, False]


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("method", [*evaluate.METHODS, "explain zero_shot", "explain lora_head"])
def test_an_overflow_names_dtype_and_layer(method, plain, capsys):
    *look, method = method.split()
    trained = "lora_head" if method == "transplanted_head" else method
    source = ["--method", method, "--model", "large"]
    if not trained.startswith("zero_shot"):
        steps = [] if trained == "head_only" else ["--epochs", "1"]
        assert train_run(trained, "large", *steps, "--limit", "8") == 0
        source += ["--run", "run"]
    capsys.readouterr()
    before = sorted(Path().rglob("*"))
    more = ["--explain", "很好", *FIXED[2:]] if look else [*FIXED, *FILES]
    assert evaluate.main([*source, *more, "--dtype", "float32", *plain]) == 0
    for path in {*Path().rglob("*")} - {*before}:
        path.unlink()
    capsys.readouterr()
    assert evaluate.main([*source, *more, "--dtype", "float16", *plain]) == 2
    err = one_line(capsys)
    assert "not finite, in float16 from layer 2 of 3 on; use --dtype float32 or bfloat16" in err
    assert look or "rows.jsonl, line 1 (24 of 24 rows)" in err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("method", train.METHODS)
def test_training_names_them_too(method, plain, capsys):
    status = 2 if method == "head_only" else 1
    assert train_run(method, "large", "--dtype", "float16", *plain) == status
    err = one_line(capsys)
    assert "in float16 from layer 2 of 3 on; use --dtype float32 or bfloat16" in err
    assert "--lr" not in err


def test_the_python_interface_raises(capsys):
    assert train_run("lora_head", "large", "--epochs", "1", "--limit", "8") == 0
    run = json.loads(Path("run/run.json").read_text())
    run["arguments"]["dtype"] = "float16"
    Path("run/run.json").write_text(json.dumps(run))
    model, tokenizer = qwen_min.load("large", "float16", "cpu")
    prompts = qwen_min.build_prompts(tokenizer, ["很好"], TEMPLATE)
    loaded = qwen_min.Classifier.from_run("run", "cpu")
    for call in (lambda: loaded.predict(["很好"]), lambda: qwen_min.score_labels(model, prompts)):
        with pytest.raises(UserError, match="in float16 from layer 2 of 3 on"):
            call()


def test_the_python_interface_of_no_texts_and_of_half_a_character(capsys):
    assert train_run("lora_head", "large", "--epochs", "1", "--limit", "8") == 0
    assert train_run("lora_label_scoring", "large", "--epochs", "1", "--output", "words") == 0
    for run in ("run", "words"):
        loaded = qwen_min.Classifier.from_run(run, "cpu")
        assert loaded.scores([]).shape == (0, 2) and loaded.predict([]) == []
        with pytest.raises(UserError, match=r"'x\\ud800' holds half of a surrogate pair"):
            loaded.predict(["很好", "x\ud800"])
    model, tokenizer = qwen_min.load("large", "float32", "cpu")
    assert qwen_min.score_labels(model, []).size == 0
    for changes in ({"labels": ["a", "\udcff"]}, {"template": "{text}\ud800："}):
        with pytest.raises(UserError, match="half of a surrogate pair"):
            qwen_min.build_prompts(tokenizer, ["很好"], **changes)


def test_damaged_weights_are_not_blamed_on_the_dtype(capsys):
    assert evaluate.main(["--method", "zero_shot", "--model", "partial", *FIXED]) == 2
    err = one_line(capsys)
    assert "rows.jsonl, line 2 (4 of 24 rows)" in err and "fetch the weights again" in err
    assert "in float32 from the embedding on" in err and "--dtype" not in err


def test_the_head_is_checked_when_it_is_loaded(capsys):
    """(An adapter is, by lora.load_adapter.)"""
    assert train_run("head_only", "large", "--limit", "8") == 0
    with safe_open("run/head.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file("run/head.safetensors")
    tensors["bias"][1] = torch.nan
    save_file(tensors, "run/head.safetensors", metadata)
    capsys.readouterr()
    assert evaluate.main(["--run", "run", *FIXED]) == 2
    err = one_line(capsys)
    assert "run/head.safetensors: not a head that train.py wrote" in err and "train again" in err


@pytest.mark.parametrize("more", [["--explain", "很好"], ["--plain"], []])
def test_a_head_whose_scores_overflow_decides_nothing(more, capsys):
    """Its weights and the states are finite, their product is not."""
    assert train_run("head_only", "large", "--limit", "8") == 0
    with safe_open("run/head.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file("run/head.safetensors")
    tensors["weight"] = torch.full_like(tensors["weight"], 3e38) * torch.tensor([[1.0], [-1.0]])
    save_file(tensors, "run/head.safetensors", metadata)
    run = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps(run | {"result_hash": None}))  # an older run
    capsys.readouterr()
    fixed = ["--dtype", "float32"] if "--explain" in more else FIXED
    assert evaluate.main(["--run", "run", *fixed, *more]) == 2
    err = one_line(capsys)
    assert "scores of the head that are not finite" in err and "train again" in err
    with pytest.raises(UserError, match="scores of the head that are not finite"):
        qwen_min.Classifier.from_run("run", "cpu").predict(["很好"])


# A link to nothing


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tokenizer_config.json", []),
        ("special_tokens_map.json", []),
        ("fed.safetensors", []),
        ("chat_template.jinja", ["--chat"]),
        ("generation_config.json", ["--method", "zero_shot_generate"]),
    ],
)
def test_a_file_behind_a_link_to_nothing_is_not_taken_for_absent(name, more, bases, capsys):
    """As where a cache was cleared. Without it, prompts or answers would silently be others."""
    shutil.copytree(bases / "large", "model")
    Path("model", name).unlink(missing_ok=True)
    Path("model", name).symlink_to("nothing")
    assert evaluate.main(["--method", "zero_shot", "--model", "model", *FIXED, *more]) == 2
    assert f"model/{name}" in one_line(capsys)
    with pytest.raises(UserError, match=name):
        save_model(load_model("model"), Path("model"), "copy")
    assert not Path("copy").exists()


# What is computed is written


@pytest.mark.parametrize("method", ["zero_shot", "zero_shot_generate"])
def test_one_row_costs_no_other_row(method, capsys):
    given = ["--method", method, "--model", "partial", *FIXED, *FILES]
    good = [text for text in TEXTS if "dog" not in text]
    write_rows(good)
    assert evaluate.main(given) == 0
    expected = rows_of("out.jsonl")
    write_rows(TEXTS)
    capsys.readouterr()
    assert evaluate.main(given) == 2
    err = one_line(capsys)
    assert "rows.jsonl, line 2 (4 of 24 rows)" in err and "out.json and out.jsonl" in err
    rows, results = rows_of("out.jsonl"), results_of()
    assert [row["index"] for row in rows] == [*range(24)]
    bad = [row for row, text in zip(rows, TEXTS, strict=True) if "dog" in text]
    assert {(row["prediction"], row["scores"], row.get("answer")) for row in bad} == {(None,) * 3}
    found = [row for row, text in zip(rows, TEXTS, strict=True) if "dog" not in text]
    for a, b in zip(found, expected, strict=True):
        assert (a["prediction"], a.get("answer")) == (b["prediction"], b.get("answer"))
        if method == "zero_shot":
            # fp32 rounding, since other rows share the forwards.
            np.testing.assert_allclose(a["scores"], b["scores"], atol=1e-5)
    assert results["failed"]["lines"] == [2, 8, 14, 20]
    assert "in float32 from the embedding on" in results["failed"]["reason"]
    assert not {"accuracy", "confusion_matrix", "macro"} & results.keys()
    assert report(["out.json"]) == 2
    assert "failed" in one_line(capsys)


def fail(error: BaseException):
    def call(*_: object, **__: object) -> None:
        raise error

    return call


PARTS = {
    "metrics": (evaluate, "measure"),
    "clean": (evaluate, "clean_part"),
    "calibration": (calibration, "calibrations"),
    "label_sets": (label_sets, "compare_sets"),
}
ERRORS = {
    "a mistake": (UserError("it was this"), 2),
    "a bug": (ValueError("it was this"), None),
    "no memory": (MemoryError("it was this"), 2),
    "Ctrl-C": (KeyboardInterrupt("it was this"), 130),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_fails_costs_no_other_part(part, error, monkeypatch, capsys):
    write_rows([text.replace("dog", "") for text in TEXTS])
    more = ["--calibrate", "--label-sets", "差评,好评", "--train-data", "rows.jsonl"]
    given = ["--method", "zero_shot", "--model", "large", *FIXED, *FILES, *more]
    assert evaluate.main(given) == 0
    whole, rows, table = results_of(), Path("out.jsonl").read_bytes(), capsys.readouterr().out
    for path in ("out.json", "out.jsonl"):
        Path(path).unlink()
    raised, status = ERRORS[error]
    monkeypatch.setattr(*PARTS[part], fail(raised))
    if status is None:
        with pytest.raises(ValueError, match="it was this"):
            evaluate.main(given)
    else:
        assert evaluate.main(given) == status
    out, err = capsys.readouterr()
    if status == 2 and error == "a mistake":
        assert f"{part}: it was this; the rest is in out.json and out.jsonl" in err
    assert Path("out.jsonl").read_bytes() == rows
    found = results_of()
    note = f"{type(raised).__name__}: it was this"
    if part == "metrics":
        assert found.pop("failed") == note
    else:
        assert found.pop(part) == {"failed": note}
        assert out.splitlines()[0] == table.splitlines()[0] and f"{whole['accuracy']:.4f}" in out
    measured = ("seconds", "examples_per_second")
    assert found.keys() <= whole.keys()
    assert all(found[key] == whole[key] for key in found.keys() - {*measured})


def test_neutral_prompts_are_built_before_anything_is_scored(monkeypatch, capsys):
    monkeypatch.setattr(forms, "score_labels", fail(AssertionError("rows were scored")))
    # One of the neutral inputs is the empty text: in this template it makes no prompt.
    given = [*FIXED[:2], "--template", "{text}", "--labels", "。,！", "--max-text-tokens", "40"]
    assert evaluate.main(["--method", "zero_shot", "--model", "large", *given, "--calibrate"]) == 2
    assert "--calibrate, input ''" in one_line(capsys)


def test_neutral_inputs_that_are_not_finite(capsys):
    """No row has a ] but one of the neutral inputs, [MASK], does."""
    shutil.copytree("partial", "masked")
    tensors = load_file("masked/model.safetensors")
    ids = AutoTokenizer.from_pretrained("masked")("K]").input_ids
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].nan_to_num(0.1)
    tensors["model.embed_tokens.weight"][ids] = torch.inf
    save_file(tensors, "masked/model.safetensors", {"format": "pt"})
    given = ["--method", "zero_shot", "--model", "masked", *FIXED, *FILES, "--calibrate"]
    assert evaluate.main(given) == 2
    out, err = capsys.readouterr()
    assert "calibration: found numbers that are not finite" in err and "AUC-ROC" in out
    assert "not finite" in results_of()["calibration"]["failed"] and results_of()["n"] == 24
    assert len(rows_of("out.jsonl")) == 24


# Label words that no one scores


def test_methods_that_score_no_words_need_no_tokens_of_them(capsys):
    """`很 ` and `fox` merge behind this template, so there are no ids to score."""
    words = ["--template", "{text} ", "--labels", "fox,dog", "--model", "large"]
    given = [*FIXED[:2], "--device", "cpu", *words]
    for method in ("zero_shot", "lora_label_scoring"):
        command = train if method in train.METHODS else evaluate
        assert command.main(["--method", method, *given]) == 2
        assert "merge into one token" in one_line(capsys)
    model = AutoModelForCausalLM.from_pretrained("large", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("large")
    for method in HEADS:
        run = ["--output", method, *["--epochs", "1"] * (method == "lora_head")]
        assert train.main(["--method", method, *given, *run]) == 0
        assert evaluate.main(["--run", method, *FIXED[:2], *FILES]) == 0
        assert results_of()["label_ids"] is None and results_of()["label_mass"] is None
        assert evaluate.main(["--run", method, "--explain", "很好"]) == 0
        rows = rows_of("out.jsonl")
        scores = qwen_min.Classifier.from_run(method, "cpu").scores(TEXTS[:6])
        np.testing.assert_allclose(scores, [row["scores"] for row in rows[:6]], atol=1e-4)
        if method == "head_only":
            head = load_file("head_only/head.safetensors")
            ids = torch.tensor([tokenizer(TEXTS[2] + " ").input_ids])
            with torch.no_grad():
                h = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
            expected = (head["weight"] @ h + head["bias"]).tolist()
            np.testing.assert_allclose(rows[2]["scores"], expected, atol=1e-3)
    transplanted = ["--method", "transplanted_head", "--run", "lora_head", *FIXED[:2]]
    assert evaluate.main(transplanted) == 0
    assert evaluate.main(["--method", "zero_shot_generate", *given, *FILES]) == 0
    assert results_of()["label_ids"] is None
    assert "warning" not in capsys.readouterr().err


# Cheap checks first, and nothing twice


def truncate(path: str) -> None:
    shutil.copytree("large", "model")
    (Path("model") / path).write_bytes((Path("model") / path).read_bytes()[:-100])


def test_files_are_checked_before_the_prompts_are_built(monkeypatch, capsys):
    """Of 100,000 rows the prompts take half a minute, with many labels an hour."""
    monkeypatch.setattr(task, "build_prompts", fail(AssertionError("prompts were built")))
    truncate("model.safetensors")
    for command, method in ((evaluate, "zero_shot"), (train, "head_only")):
        assert command.main(["--method", method, "--model", "model", *FIXED]) == 2
        assert "model/model.safetensors: not a whole" in one_line(capsys)
    given = ["--method", "zero_shot", "--model", "large", *FIXED]
    for option in ("--output", "--predictions"):
        assert evaluate.main([*given, option, "nowhere/file"]) == 2
        assert "nowhere/file: cannot be written" in one_line(capsys)


def test_an_epochs_batches_are_made_once(monkeypatch, capsys):
    made = []
    real = training.shuffled_batches

    def counted(*args: object) -> list[list[int]]:
        made.append(args[-1])
        return real(*args)

    monkeypatch.setattr(training, "shuffled_batches", counted)
    assert train_run("lora_head", "large", "--epochs", "2", "--batch-size", "2") == 0
    assert made == [0, 1]


def test_a_training_whose_result_cannot_be_published_is_only_resumed(monkeypatch, capsys):
    given = ["--epochs", "1", "--batch-size", "4"]
    assert train_run("lora_head", "large", *given) == 0
    expected = Path("run/adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree("run")
    with monkeypatch.context() as patch:
        patch.setattr(trained.Trainable, "publish", fail(UserError("run/adapter: disk full")))
        assert train_run("lora_head", "large", *given) == 2
    assert "disk full" in one_line(capsys)
    with monkeypatch.context() as patch:
        patch.setattr(forms, "head_losses", fail(AssertionError("trained again")))
        assert train.main(["--resume", "--output", "run"]) == 0
    assert Path("run/adapter/adapter_model.safetensors").read_bytes() == expected


def test_a_rate_that_is_too_high_is_still_blamed(capsys):
    """The base is sound: only what was trained grew beyond float32."""
    more = ["--lr", "0.9", "--alpha", "9e18", "--epochs", "2", "--batch-size", "2"]
    assert train_run("lora_label_scoring", "large", *more) == 1
    assert "lower --lr" in one_line(capsys)
