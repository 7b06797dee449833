"""The embedded checkpoint: what it is, what its recipe trains on, and that it names that data."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import REPO
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import train
from qwen_min.fast.label_scores import score_labels
from qwen_min.files.data import Example, read_examples
from qwen_min.files.hub import TINY, resolve_model
from qwen_min.files.overlap import fed_rows, text_hashes
from qwen_min.files.weights import load_model
from qwen_min.prompt import DEFAULT_LABELS, DEFAULT_TEMPLATE, build_prompts
from qwen_min.tiny import pretrain
from qwen_min.tokenizer import Tokenizer

SAMPLE = REPO / "qwen_min" / "sample"


def test_it_is_a_small_qwen2_and_small_on_disk():
    files = {path.name: path.stat().st_size for path in TINY.iterdir() if path.is_file()}
    weights = {"config.json", "model.safetensors", "tokenizer.json", "fed.safetensors"}
    assert files.keys() == {*weights, "pretrain.py", "README.md"}
    assert sum(files.values()) < 5e6
    model = load_model(TINY)
    assert model.lm_head_weight.dtype == torch.bfloat16
    assert 1.8e6 < sum(p.numel() for p in model.parameters()) < 2.2e6
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    assert config["num_key_value_heads"] < config["num_attention_heads"]


@torch.no_grad()
def test_transformers_reads_the_same_model():
    theirs = AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ours = load_model(TINY, "float32")
    text = DEFAULT_TEMPLATE.replace("{text}", "房间很干净，服务员态度也好，下次还会来。")
    ids = Tokenizer(TINY).encode(text)
    assert tokenizer(text)["input_ids"] == ids
    ids = torch.tensor([ids])
    # fp32 rounding of logits of up to 20.
    torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)


def test_punctuation_and_label_words_stay_apart():
    tokenizer = Tokenizer(TINY)
    for _, word in [*enumerate(DEFAULT_LABELS), (0, "好评"), (0, "差评"), (0, "负向")]:
        ids = tokenizer.encode(f"情感倾向：{word}")
        assert tokenizer.decode(ids[-1:]) == word and tokenizer.decode(ids[-2:-1]) == "："
    text = "颜值 10 分，Wi-Fi…… 囧\u3000😀\n\n“🦀”"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_first_command_does_the_main_job(capsys):
    assert evaluate.main(["--method", "zero_shot"]) == 0
    out, err = capsys.readouterr()
    accuracy = float(re.search(r"^accuracy +([\d.]+)", out, re.M)[1])
    assert accuracy >= 0.75
    assert "examples      200" in out and "warning" not in err


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_trains_without_arguments(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = [] if method == "head_only" else ["--epochs", "1"]
    assert train.main(["--method", method, *short]) == 0
    assert evaluate.main(["--run", f"runs/{method}", "--limit", "20"]) == 0
    assert f"method        {method}" in capsys.readouterr().out


def test_no_training_sample_is_what_zero_shot_asks():
    """The default template is in no sample as a whole, nor its words after its end."""
    tokenizer, rng = Tokenizer(TINY), random.Random(0)
    rows = [Example(text, i % 2, 0) for i, text in enumerate(["房间很好，早餐一般。", "差"] * 3000)]
    drawn = [pretrain.training_sample(tokenizer, row, rng) for row in rows]
    samples = [tokenizer.decode(sample[:, 0].tolist()) for sample in drawn]
    start, end = DEFAULT_TEMPLATE.split("{text}")
    assert not any(s.startswith(start) and end in s for s in samples)
    assert not any(f"{end}{word}" in s for s in samples for word in DEFAULT_LABELS)
    # Each part occurs, and so do the words.
    for part in (start, end, *DEFAULT_LABELS):
        assert sum(part in s for s in samples) > 100, part
    # Both verdicts on a review agree with its label, and no other token has the verdicts' loss.
    for row in rows[:500]:
        sample = pretrain.training_sample(tokenizer, row, rng)
        verdicts = sample[sample[:, 1] == pretrain.VERDICT, 0].tolist()
        said = tokenizer.decode(verdicts)
        pairs = [(a, b) for a in pretrain.VERDICTS for b in pretrain.VERDICTS]
        assert any(said == a[row.label] + b[row.label] for a, b in pairs), said


def test_the_recipe_gives_the_same_bytes_twice(tmp_path, capsys):
    """On 60 of this project's own reviews and one pass; the real training data takes minutes."""
    lines = (SAMPLE / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.tsv").write_text("".join(lines[:61]), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("".join(lines[:1] + lines[61:81]), encoding="utf-8")
    threads = torch.get_num_threads()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arguments = ["--output", str(tmp_path / name), "--epochs", "1", "--seed", str(seed)]
        assert pretrain.main(["--reviews", str(tmp_path), *arguments]) == 0
    torch.set_num_threads(threads)
    files = ("config.json", "model.safetensors", "tokenizer.json", "fed.safetensors")
    a, b, c = ([(tmp_path / n / file).read_bytes() for file in files] for n in "abc")
    assert a == b and a[1] != c[1]
    assert a[0] == (TINY / "config.json").read_bytes()
    assert fed_rows(tmp_path / "a", read_examples(tmp_path / "train.tsv", "01")) == [*range(60)]
    assert fed_rows(tmp_path / "a", read_examples(tmp_path / "dev.tsv", "01")) == []
    assert pretrain.main(["--reviews", str(tmp_path), "--output", str(tmp_path / "a")]) == 2
    assert "name a new directory" in capsys.readouterr().err


def test_rows_of_its_training_data_are_named(tmp_path, capsys):
    """As `--model tiny` says of ChnSentiCorp: here of two texts that a copy of it claims."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    rows = read_examples(SAMPLE / "test.tsv", "01", limit=5)
    save_file(
        {"texts": text_hashes([rows[1].text, rows[3].text + " ！"])}, model / "fed.safetensors"
    )
    assert fed_rows(model, rows) == [1, 3]
    capsys.readouterr()
    output = tmp_path / "r.json"
    arguments = ["--method", "zero_shot", "--model", str(model), "--limit", "5"]
    assert evaluate.main([*arguments, "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: 2 of these 5 texts") and err.count("\n") == 1
    results = json.loads(output.read_text(encoding="utf-8"))
    assert (results["fed_rows"], results["clean"]["n"]) == (2, 3)
    assert "3 texts that are not in what the model itself was made from" in out
    # None of the sample is in the embedded checkpoint's training data.
    whole = read_examples(SAMPLE / "test.tsv", "01") + read_examples(SAMPLE / "train.tsv", "01")
    assert fed_rows(TINY, whole) == []
    known = load_file(TINY / "fed.safetensors")["texts"]
    assert len(known) > 15_000 and (np.diff(known) > 0).all()


def test_tiny_is_a_name_and_never_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert resolve_model("tiny") == TINY
    assert resolve_model("./tiny").resolve() == (tmp_path / "tiny").resolve()


def test_other_words_and_frames_work_too():
    """Transfer is not to one template alone: above chance on the sample with words it knows."""
    rows = read_examples(SAMPLE / "test.tsv", "01")
    model, tokenizer = load_model(TINY), Tokenizer(TINY)
    template = "以下是一条中文评论，请判断它的情感倾向。\n评论：{text}\n情感倾向："
    prompts = build_prompts(tokenizer, [r.text for r in rows], template, ("差评", "好评"))
    predictions = score_labels(model, prompts).argmax(axis=1)
    assert (predictions == [r.label for r in rows]).mean() > 0.6
