"""All methods on a small Qwen3.5, by the commands: the default form, --plain, and transformers."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, make_reference, with_images
from safetensors.torch import load_file
from test_chat import QWEN35
from test_plain import assert_same_predictions, numbers, read_lines
from test_tokenizer import WITH_MARKS, make_qwen3_5_tokenizer
from test_train import in_child
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import train
from qwen_min.command import predict
from qwen_min.fast import forms
from qwen_min.files.run import checkpoints
from qwen_min.files.tokens import read_tokenizer
from qwen_min.metrics import softmax
from qwen_min.prompt import shorten

TRAINED = ("head_only", "lora_head", "lora_label_scoring")
METHODS = {name: name for name in TRAINED}
METHODS |= {"zero_shot": None, "zero_shot_generate": None, "transplanted_head": "lora_head"}
WORDS = ["不满意", "好"]  # of several tokens and of one
TEMPLATE = "评论：{text}\n情感倾向："
# In fp32 sums in another order, through four layers; scores are up to 20 in size.
TOLERANCE = 1e-4
# Of a tensor's norm. Adam divides a gradient by its size, so that rounding in a small one is
# enlarged: measured at most 5e-5.
TENSOR_TOLERANCE = 5e-4
FORMS = {"default": [], "plain": ["--plain"]}
TARGETS = "in_proj_qkv,in_proj_z,out_proj,q_proj,v_proj,down_proj"
LORA = ["--epochs", 1, "--batch-size", 4, "--dropout", 0, "--lr", 1e-3, "--lora-targets", TARGETS]
LORA += ["--save-every", 2, "--eval-every", 2]


def command(*args: object) -> list[str]:
    labels = [] if "--run" in args else ["--labels", ",".join(WORDS)]
    return [*map(str, args), *labels, "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """20 reviews, cut short; three have more than 64 tokens, a chunk of the default form."""
    rows = (REPO / "qwen_min/sample/train.tsv").read_text(encoding="utf-8").split("\n")[:21]
    path = tmp_path_factory.mktemp("data") / "train.tsv"
    rows = [row[: 90 if len(row) > 100 else 20] for row in rows]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    make_reference(directory, "qwen3_5", tied=request.param == "tied")
    return directory


def trained(root: Path, method: str, base: Path, data: Path, *more: object) -> dict[str, Path]:
    """A run of the default form and one with --plain."""
    for form, how in FORMS.items():
        args = ["--method", method, "--model", base, "--data", data, "--output", root / form]
        assert train.main(command(*args, *more, *how)) == 0
    return {form: root / form for form in FORMS}


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory) -> dict[str, dict[str, Path]]:
    root = tmp_path_factory.mktemp("runs")
    more = {"head_only": ["--layer", "best", "--pooling", "mean"]}
    return {m: trained(root / m, m, base, data, *more.get(m, LORA)) for m in TRAINED}


def source(method: str, base: Path, runs: dict) -> list:
    run = METHODS[method]
    return ["--method", method, *(["--run", runs[run]["default"]] if run else ["--model", base])]


def evaluated(path: Path, *args: object) -> tuple[list[dict], dict]:
    """Each row of an evaluation, and its results."""
    files = ["--predictions", path, "--output", path.with_suffix(".json")]
    assert evaluate.main(command(*args, *files)) == 0
    return read_lines(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def both(directory: Path, *args: object) -> dict[str, tuple[list[dict], dict]]:
    """The same evaluation by the default form and with --plain; the rows agree."""
    found = {f: evaluated(directory / f"{f}.jsonl", *args, *how) for f, how in FORMS.items()}
    assert_same_predictions(found["plain"][0], found["default"][0], TOLERANCE)
    return found


def same_tensors(runs: dict[str, Path], name: str, some: str) -> None:
    """The file `name` is the same in both forms; some of its tensors have `some` in their names."""
    default, plain = (load_file(runs[form] / name) for form in ("default", "plain"))
    assert default.keys() == plain.keys() and any(some in key for key in default)
    for key, tensor in default.items():
        assert tensor.norm() > 0, key  # lora_B is zero at first
        assert (plain[key] - tensor).norm() <= TENSOR_TOLERANCE * tensor.norm(), key


@pytest.mark.parametrize("method", METHODS)
def test_both_forms_decide_alike(method, base, runs, data, tmp_path, capsys):
    # --plain generates each of 16 tokens by one more forward.
    few = ["--limit", 4] if method == "zero_shot_generate" else []
    both(tmp_path, *source(method, base, runs), "--data", data, *few)


@pytest.mark.parametrize("method", TRAINED)
def test_both_forms_train_alike(method, runs):
    if method == "head_only":
        same_tensors(runs[method], "head.safetensors", "weight")
        return
    same_tensors(
        runs[method], "adapter/adapter_model.safetensors", "linear_attn.in_proj_qkv.lora_B"
    )
    default, plain = (read_lines(runs[method][form] / "log.jsonl") for form in FORMS)
    losses = [[line["loss"] for line in lines] for lines in (default, plain)]
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], abs=TOLERANCE, rel=0)


def reference_score(model, tokenizer, prompt: str, word: str) -> float:
    """log p(word | prompt) by transformers."""
    n, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + word)["input_ids"]
    with torch.inference_mode():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return log_p[torch.arange(n - 1, len(ids) - 1), ids[n:]].sum().item()


def test_zero_shot_scores_are_those_of_transformers(base, data, tmp_path, capsys):
    rows, _ = evaluated(
        tmp_path / "p.jsonl", "--method", "zero_shot", "--model", base, "--data", data
    )
    reference = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert len(rows) == 20
    assert sum(len(tokenizer(row["text"])["input_ids"]) > 64 for row in rows) == 3
    for row in rows:
        prompt = TEMPLATE.replace("{text}", row["text"])
        for word, found in zip(WORDS, row["scores"], strict=True):
            expected = reference_score(reference, tokenizer, prompt, word)
            assert found == pytest.approx(expected, abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("method", ["lora_label_scoring", "lora_head", "head_only", "zero_shot"])
def test_explain_prints_the_scores_of_the_evaluation(method, base, runs, data, tmp_path, capsys):
    given = source(method, base, runs)
    row = evaluated(tmp_path / "p.jsonl", *given, "--data", data)[0][3]
    capsys.readouterr()
    for how in FORMS.values():
        assert evaluate.main(command(*given, "--explain", row["text"], *how)) == 0
        shown = capsys.readouterr().out
        # The rows of the decision: model, class, score, softmax; the trained model comes last.
        table = re.findall(
            rf"^\S.* ({'|'.join(WORDS)}) +(-?\d+\.\d{{4}}) +0\.\d{{4}}(.*)$", shown, re.M
        )
        table = table[-len(WORDS) :]
        assert [word for word, *_ in table] == WORDS
        # Printed with four digits.
        assert [float(x) for _, x, _ in table] == pytest.approx(row["scores"], abs=TOLERANCE + 5e-5)
        assert [bool(mark) for *_, mark in table].index(True) == row["prediction"]


def test_label_sets_and_calibrations_agree(base, data, tmp_path, capsys):
    more = ["--label-sets", "差,好;不太满意,满意", "--calibrate", "--limit", 6]
    found = both(tmp_path, "--method", "zero_shot", "--model", base, "--data", data, *more)
    for key in ("label_sets", "calibration"):
        one, other = (numbers(found[form][1][key]) for form in ("plain", "default"))
        assert len(one) > 10 and one == pytest.approx(other, abs=TOLERANCE, rel=0), key


@pytest.mark.parametrize("method", [*TRAINED, "transplanted_head", "zero_shot"])
def test_predict_repeats_the_evaluation(method, base, runs, data, tmp_path, capsys):
    given = source(method, base, runs)
    rows, _ = evaluated(tmp_path / "p.jsonl", *given, "--data", data)
    texts, out = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    texts.write_text("\n".join(row["text"] for row in rows), encoding="utf-8")
    for how in FORMS.values():
        assert predict.main(command(texts, *given, *how, "--output", out)) == 0
        found = read_lines(out)
        assert [row["label"] for row in found] == [WORDS[row["prediction"]] for row in rows]
        assert [[*row["probabilities"].values()] for row in found] == [
            pytest.approx(p, abs=TOLERANCE, rel=0) for p in softmax([r["scores"] for r in rows])
        ]


@pytest.mark.parametrize("method", ["lora_head", "lora_label_scoring"])
def test_token_vectors_are_trained_alike(method, base, data, tmp_path, capsys):
    more = [*LORA, "--train-embeddings"]
    runs = trained(tmp_path, method, base, data, *more)
    same_tensors(runs, "embeddings.safetensors", "")
    found = both(tmp_path, "--run", runs["default"], "--data", data)
    assert np.isfinite([row["scores"] for row in found["plain"][0]]).all()


@pytest.mark.parametrize("layer", [1, 4])
def test_a_probe_of_one_layer(layer, base, data, tmp_path, capsys):
    """A layer of the delta rule, and the last one, of attention, with the final norm."""
    runs = trained(tmp_path, "head_only", base, data, "--layer", layer)
    same_tensors(runs, "head.safetensors", "weight")
    both(tmp_path, "--run", runs["default"], "--data", data)


@pytest.mark.parametrize("method", ["lora_head", "lora_label_scoring"])
def test_a_killed_run_goes_on_to_the_bit(method, base, data, tmp_path):
    def die_in_step_five() -> None:
        name = "label_losses" if method == "lora_label_scoring" else "head_losses"
        real, calls = getattr(forms, name), []

        def counted(*args):
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(forms, name, counted)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    args = ["--method", method, "--model", base, "--data", data, *LORA, "--output"]
    assert os.waitpid(in_child(command(*args, whole)), 0)[1] == 0
    assert os.WIFSIGNALED(os.waitpid(in_child(command(*args, killed), die_in_step_five), 0)[1])
    assert 0 < checkpoints(killed)[-1][0] < 5
    assert os.waitpid(in_child([*command(*args, killed), "--resume"]), 0)[1] == 0
    files = []
    for run in (whole, killed):
        paths = [*checkpoints(run)[-1][1].rglob("*.safetensors")]
        files.append({str(path.relative_to(run)): path.read_bytes() for path in paths})
    assert len(files[0]) >= 2 and files[0] == files[1]


def as_released(directory: Path) -> torch.nn.Module:
    """A base with the files that a release has, its class of tokenizer too; returns the model."""
    model = make_reference(directory, "qwen3_5", vocab_size=960)
    with_images(directory, torch.float32)
    make_qwen3_5_tokenizer(directory, "qwen3_5", "Qwen2Tokenizer")
    (directory / "chat_template.jinja").write_text(QWEN35, encoding="utf-8")
    return model


@pytest.fixture(scope="module")
def marks(tmp_path_factory) -> Path:
    """Texts with marks, and with white space at both ends."""
    path = tmp_path_factory.mktemp("marks") / "marks.jsonl"
    rows = [{"label": i % 2, "text": f" {text}\n"} for i, text in enumerate(WITH_MARKS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("template", ["{text}", "评论：{text}", TEMPLATE])
def test_a_chat_is_scored_as_by_transformers(template, marks, tmp_path, capsys):
    """The whole way, with a text at both borders of the message, at one, and inside."""
    base = tmp_path / "base"
    reference = as_released(base)
    given = ["--method", "zero_shot", "--model", base, "--data", marks, "--chat"]
    given += ["--template", template, "--max-text-tokens", 9]
    rows = both(tmp_path, *given)["default"][0]
    ours, theirs = read_tokenizer(base), AutoTokenizer.from_pretrained(base)
    for row in rows:
        content = template.replace("{text}", shorten(ours, row["text"], 9))
        prompt = theirs.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        for word, found in zip(WORDS, row["scores"], strict=True):
            assert found == pytest.approx(
                reference_score(reference, theirs, prompt, word), abs=TOLERANCE
            )


@pytest.mark.parametrize("method", ["lora_head", "lora_label_scoring"])
def test_what_is_exported_has_its_tokenizer_and_its_prompt(method, marks, tmp_path, capsys):
    base, run, out = (tmp_path / name for name in ("base", "run", "out"))
    as_released(base)
    args = ["--method", method, "--model", base, "--data", marks, "--output", run, *LORA]
    args += ["--chat", "--template", "评：{text}", "--export", out]
    assert train.main(command(*args)) == 0
    ours, theirs = read_tokenizer(out), AutoTokenizer.from_pretrained(out)
    for text in WITH_MARKS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.padding_side == "right" or method != "lora_head"
    prompt = json.loads((out / "prompt.json").read_text(encoding="utf-8"))
    assert "{text}<|im_end|>" in prompt["template"]
    assert prompt["input"].endswith(" Once cut, trim the text as Python's rstrip does.")
    rows, _ = evaluated(tmp_path / "p.jsonl", "--run", run, "--data", marks)
    texts, found = tmp_path / "texts.jsonl", tmp_path / "found.jsonl"
    texts.write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in rows))
    assert predict.main(command(texts, "--run", run, "--output", found)) == 0
    assert [r["label"] for r in read_lines(found)] == [WORDS[r["prediction"]] for r in rows]
