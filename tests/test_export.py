"""train.py --export: what transformers and PEFT, without this project, make of a finished run."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_reference, with_images
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_train import WORDS, arguments, base, data, one_line, record, scores_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import evaluate
import train
from lora import ATTENTION, DELTA_RULE
from qwen_min.files.weights import load_model

__all__ = ["base", "data"]  # fixtures
THREE = ["负面", "中 性", "Positive"]
CASES = {
    "qwen2": ("qwen2", []),
    "qwen2, vectors": ("qwen2", ["--train-embeddings"]),
    "qwen2, head only": ("qwen2", ["--lora-targets", "none"]),
    "qwen3, untied": ("qwen3", ["--lora-targets", "all"]),
    "qwen3, untied, vectors": ("qwen3", ["--train-embeddings", "--rslora"]),
    "qwen3_5, with images": ("with images", ["--lora-targets", "all"]),
    "qwen3_5, text, untied": ("qwen3_5", []),
    "markup": ("qwen2", ["--template", "<|im_start|>评：{text}<|im_end|>\\n<|endoftext|>"]),
    "no frame": ("qwen2", ["--template", "{text}"]),
}

ARCHITECTURE = {"qwen2": "Qwen2", "qwen3": "Qwen3"}  # in transformers; the others: Qwen3_5Text


def make_base(directory: Path, kind: str) -> None:
    if kind != "with images":
        make_reference(directory, kind, tied=kind == "qwen2")
        return
    make_reference(directory, "qwen3_5")
    with_images(directory, torch.float32)


def probabilities(scores: np.ndarray) -> np.ndarray:
    return torch.tensor(scores).softmax(-1).numpy()


def classified(out: Path, texts: list[str], labels: list[str], batch: int, **how) -> np.ndarray:
    """The pipeline's probability (n, C) of each class, on inputs made as prompt.json says."""
    prompt = json.loads((out / "prompt.json").read_text(encoding="utf-8"))
    classify = pipeline("text-classification", model=str(out), device="cpu", **how)
    assert classify.tokenizer.pad_token_id == classify.model.config.pad_token_id
    inputs = []
    for text in texts:
        offsets = classify.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        most = prompt["max_text_tokens"]
        cut = text[: offsets[most][0]] if len(offsets) > most else text
        inputs.append(prompt["template"].replace("{text}", cut))
    rows = classify(inputs, top_k=None, batch_size=batch)
    found = [{entry["label"]: entry["score"] for entry in row} for row in rows]
    return np.array([[row[label] for label in labels] for row in found])


@pytest.fixture(scope="module")
def three(data, tmp_path_factory) -> tuple[Path, list[str]]:
    """Rows of three classes and of very different lengths; the texts."""
    texts = [row.split("\t")[1] for row in data.read_text(encoding="utf-8").split("\n")[1:-1]]
    texts = [text[: 3 + 5 * (i % 9)] for i, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("three") / "three.tsv"
    rows = [f"{i % 3}\t{text}" for i, text in enumerate(texts)]
    path.write_text("\n".join(["label\ttext", *rows, ""]), encoding="utf-8")
    return path, texts


@pytest.mark.parametrize("case", CASES)
def test_a_classifier_gives_transformers_the_probabilities_of_evaluate(
    case, three, tmp_path, capsys
):
    (kind, more), (path, texts) = CASES[case], three
    make_base(tmp_path / "base", kind)
    if case == "markup":  # of older versions of transformers; newer ones obey it
        (tmp_path / "base/special_tokens_map.json").write_text('{"pad_token": "<|im_end|>"}')
    run, out = tmp_path / "run", tmp_path / "out"
    args = arguments("lora_head", tmp_path / "base", path, run, "--labels", ",".join(THREE))
    args += ["--max-text-tokens", "20", "--epochs", "1", *more]
    assert train.main([*args, "--export", str(out)]) == 0
    capsys.readouterr()
    expected = probabilities(scores_of(capsys, "--run", run, "--data", path))
    assert len({tuple(row) for row in expected.round(3)}) > 10
    for batch in (1, 8):
        found = classified(out, texts, THREE, batch)
        np.testing.assert_allclose(found, expected, atol=1e-5)  # fp32
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    name = f"{ARCHITECTURE.get(kind, 'Qwen3_5Text')}ForSequenceClassification"
    assert type(model).__name__ == name and model.config.architectures == [name]
    assert model.config.label2id == {label: y for y, label in enumerate(THREE)}
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert evaluate.main(["--method", "zero_shot", "--model", str(out), "--data", str(path)]) == 2
    assert "a classifier for transformers" in capsys.readouterr().err


def test_a_bf16_classifier(base, three, tmp_path, capsys):
    """transformers applies the head in bf16, evaluate.py in fp32."""
    run, out, (path, texts) = tmp_path / "run", tmp_path / "out", three
    args = arguments("lora_head", base, path, run, "--labels", ",".join(THREE))
    assert train.main([*args, "--dtype", "bfloat16", "--export", str(out)]) == 0
    capsys.readouterr()
    expected = probabilities(scores_of(capsys, "--run", run, "--data", path))
    found = classified(out, texts, THREE, 8)
    # bf16 has 8 bits: states, and scores of about 1, are off by some hundredths.
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert np.abs(found - expected).mean() < 0.02
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["lora_head", "lora_label_scoring"])
def test_a_finished_run_is_exported_without_its_data(method, base, data, tmp_path, capsys):
    for path in (base, data):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    own, rows, run = tmp_path / base.name, tmp_path / data.name, tmp_path / "run"
    args = arguments(method, own, rows, run, "--epochs", 1)
    assert train.main([*args, "--merge", str(tmp_path / "one")]) == 0  # its older name
    rows.unlink()
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    later = ["--resume", "--output", run, "--export", tmp_path / "two"]
    assert train.main([str(a) for a in later]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    capsys.readouterr()
    assert "exists already" in one_line(capsys, 2, *later)
    later[-1] = tmp_path / "three"
    weights = load_file(own / "model.safetensors")
    save_file({k: t * 1.01 for k, t in weights.items()}, own / "model.safetensors")
    assert "weights" in one_line(capsys, 2, *later)
    shutil.rmtree(own)
    assert str(own) in one_line(capsys, 2, *later)
    assert not (tmp_path / "three").exists()


def test_an_adapter_says_how_its_input_is_made(base, data, tmp_path, capsys):
    """PEFT's own loader ignores prompt.json; an evaluation does not need it."""
    from peft import AutoPeftModelForSequenceClassification

    run = tmp_path / "run"
    assert train.main(arguments("lora_head", base, data, run, "--chat", "--epochs", 1)) == 0
    prompt = run / "adapter/prompt.json"
    found = json.loads(prompt.read_text(encoding="utf-8"))
    assert found["template"] == record(run)["template"] and "<|im_start|>" in found["template"]
    assert (found["labels"], found["words"]) == (WORDS.split(","), [])
    expected = scores_of(capsys, "--run", run, "--data", data, "--limit", 3)
    model = AutoPeftModelForSequenceClassification.from_pretrained(run / "adapter").eval()
    prompt.unlink()
    assert evaluate.main(["--run", str(run), "--data", str(data)]) == 0
    texts = [row.split("\t")[1] for row in data.read_text(encoding="utf-8").split("\n")[1:4]]
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text, scores in zip(texts, expected, strict=True):
        ids = tokenizer(found["template"].replace("{text}", text), return_tensors="pt").input_ids
        with torch.no_grad():
            np.testing.assert_allclose(model(ids).logits[0], scores, atol=1e-4)


def test_words_are_written_where_they_are_scored(base, data, tmp_path):
    args = arguments("lora_label_scoring", base, data, tmp_path / "run", "--epochs", 1)
    assert train.main([*args, "--export", str(tmp_path / "out")]) == 0
    for place in ("run/adapter", "out"):
        found = json.loads((tmp_path / place / "prompt.json").read_text(encoding="utf-8"))
        assert found["words"] == WORDS.split(",")
        assert found["template"] == "评论：{text}\n情感倾向："


def test_what_the_scores_depend_on_is_printed_in_full(base, data, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    given = ["--labels", "坏= bad,好= good", "--template", "{text}\\n?", "--max-text-tokens", "9"]
    given += ["--system", "it's", "--chat"]
    args = arguments("lora_label_scoring", base, data, run, "--epochs", 1, *given)
    assert train.main([*args, "--dtype", "bfloat16", "--export", str(out)]) == 0
    said = capsys.readouterr().out
    assert "rounded to bfloat16" in said and "not after training in float32" in said
    typed = shlex.split(said.split("used with ")[1].split(" (rounded")[0])
    assert typed[:2] == ["--model", str(out)]
    assert {*typed[2:]} == {*given}
    expected = scores_of(capsys, "--run", run, "--data", data)
    found = scores_of(capsys, "--method", "zero_shot", "--data", data, *typed)
    np.testing.assert_allclose(found, expected, atol=0.2)  # bf16 has 8 bits
    assert not np.array_equal(found, expected)


def test_without_a_token_to_fill_a_batch_nothing_is_exported(base, data, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base/tokenizer.json"
    (tmp_path / "base/tokenizer_config.json").unlink()
    content = json.loads(path.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        if token["content"] != "<|endoftext|>":
            token |= {"content": f"[{token['id']}]", "special": False}
    path.write_text(json.dumps(content), encoding="utf-8")
    args = arguments("lora_head", tmp_path / "base", data, tmp_path / "run")
    args += ["--template", "{text}<|endoftext|>", "--export", tmp_path / "out"]
    assert "no special token to fill a batch" in one_line(capsys, 2, *args)
    assert not (tmp_path / "out").exists() and record(tmp_path / "run")["finished"]


@pytest.mark.parametrize("kind", ["with images", "qwen3_5"])
def test_a_merged_qwen3_5_is_a_text_model_for_transformers(kind, data, tmp_path, capsys):
    make_base(tmp_path / "base", kind)
    run, out = tmp_path / "run", tmp_path / "out"
    args = arguments("lora_label_scoring", tmp_path / "base", data, run, "--epochs", 1)
    assert train.main([*args, "--export", str(out)]) == 0
    err = capsys.readouterr().err
    assert err.count("note: ") == (kind == "with images"), err
    assert kind == "qwen3_5" or "note: " + str(tmp_path / "base") + ": 2 tensors" in err
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_text" and "text_config" not in config
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]
    adapter = json.loads((run / "adapter/adapter_config.json").read_text())
    assert adapter["target_modules"] == [*ATTENTION, *DELTA_RULE]
    # The merged weights, and the adapter on the base by PEFT, give the run's scores.
    ours, ids = load_model(out), torch.arange(7, 90)[None]
    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    with torch.no_grad():
        expected = ours.logits(ours(ids))
        # fp32, 4 layers, logits of size 3.
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-4)
    how = ("--data", data, "--limit", 20)
    expected = scores_of(capsys, "--run", run, *how)
    more = ("--labels", WORDS, "--max-text-tokens", record(run)["arguments"]["max_text_tokens"])
    found = scores_of(capsys, "--method", "zero_shot", "--model", out, *more, *how)
    np.testing.assert_allclose(found, expected, atol=1e-4)
