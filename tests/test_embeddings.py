"""--train-embeddings: fp32 whatever the base, resumed to the bit, all else frozen; movement."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from conftest import make_reference
from safetensors.torch import load_file, save_file
from test_train import WORDS, arguments, base, data, in_child, one_line, record, scores_of

import evaluate
import train
from qwen_min.command.trained import VECTORS
from qwen_min.errors import UserError
from qwen_min.fast import forms
from qwen_min.fast.layout import Text, pack
from qwen_min.files.run import checkpoints
from qwen_min.files.weights import fingerprint, load_model
from qwen_min.lab.token_vectors import (
    EMBEDDING,
    LM_HEAD,
    Fp32Embedding,
    format_movements,
    load,
    movement,
    movements,
    unfreeze,
    write,
)
from qwen_min.prompt import Prompt
from qwen_min.scoring import label_loss
from qwen_min.tokenizer import Tokenizer

__all__ = ["base", "data"]  # fixtures
CASES = [
    ("lora_label_scoring", "attention", "float32"),
    ("lora_label_scoring", "none", "float32"),
    ("lora_label_scoring", "none", "bfloat16"),
    ("lora_head", "attention", "bfloat16"),
    ("lora_head", "none", "float32"),
]


def more(targets: str, dtype: str) -> list[object]:
    return ["--train-embeddings", "--lora-targets", targets, "--dtype", dtype]


# Mechanics


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_fp32_embedding_computes_what_the_frozen_one_does(dtype, reference):
    ids = torch.arange(30)
    plain, trained = (load_model(reference[0], dtype) for _ in range(2))
    parameters = unfreeze(trained, True)
    assert list(parameters) == [EMBEDDING] and parameters[EMBEDDING].dtype == torch.float32
    states = [model(ids[None]) for model in (plain, trained)]
    assert torch.equal(*states) and states[1].dtype == trained.dtype == plain.lm_head_weight.dtype
    # Attention masks have the states' dtype: a GPU's kernels may read another one wrongly.
    texts = [Text(range(9)), Text(range(5)), Text((1, 2, 3, 4), parents=(1, 1))]
    batch = pack(trained, texts, first_is_prefix=True)
    assert {m.dtype for m in [*batch.masks[1:], batch.padded_mask]} == {states[1].dtype}
    assert torch.equal(plain.logits(states[0]), trained.logits(states[1]))


def test_a_step_too_small_for_bf16_is_not_lost():
    """Sixteen steps of 1/64 of a bf16 spacing: in bf16 none of them would be seen."""
    embedding = Fp32Embedding(torch.ones(2, 4, dtype=torch.bfloat16))
    with torch.no_grad():
        for _ in range(64):
            embedding.weight += 2**-7 / 64
    assert (embedding(torch.tensor([0])) > 1).all()
    weight = torch.ones(2, 4, dtype=torch.bfloat16)
    for _ in range(64):
        weight += 2**-7 / 64
    assert (weight == 1).all()


def test_gradients_reach_the_token_vectors_by_both_ways(reference):
    """As input and, tied, as output: against transformers, whose weight is one tensor as well."""
    ours, prompt = load_model(reference[0]), Prompt((5, 6, 7), ((8,), (9, 10)), False)
    parameters = unfreeze(ours, True)
    label_loss(ours, prompt.ids, prompt.labels[1]).backward()
    theirs = reference[1]
    theirs.zero_grad()
    log_probs = theirs(torch.tensor([[5, 6, 7, 9, 10]])).logits[0].log_softmax(-1)
    (-(log_probs[2, 9] + log_probs[3, 10])).backward()
    expected = theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(parameters[EMBEDDING].grad, expected, atol=1e-5, rtol=1e-4)
    theirs.zero_grad(set_to_none=True)


def test_an_untied_head_is_trained_where_label_words_are_scored(tmp_path):
    make_reference(tmp_path, tied=False)
    for words, names in ((True, [EMBEDDING, LM_HEAD]), (False, [EMBEDDING])):
        model = load_model(tmp_path, "bfloat16")
        before = {name: model.get_parameter(name).clone() for name in names}
        parameters = unfreeze(model, words)
        assert list(parameters) == names
        assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters.values())
        assert all(torch.equal(before[n], p.bfloat16()) for n, p in parameters.items())
    assert not model.lm_head.weight.requires_grad


def test_movement_by_hand():
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    after = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 3.0]])
    still, turned, longer = (movement(before, after, [i]) for i in range(3))
    assert (still["cosine"], still["change"]) == (1.0, 0.0)
    assert still["norm_before"] == still["norm_after"] == 5.0
    assert turned["cosine"] == 0.0 and turned["change"] == pytest.approx(2**0.5)
    assert (longer["cosine"], longer["norm_after"], longer["change"]) == (1.0, 3.0, 0.5)
    mean = movement(before, after, {1, 2})
    assert (mean["tokens"], mean["cosine"], mean["norm_before"]) == (2, 0.5, 1.5)


def test_label_vectors_against_others(reference):
    tokenizer, rng = Tokenizer(reference[0]), torch.manual_seed(0)
    before = torch.randn(20, 4, generator=rng)
    after = before.clone()
    after[7] *= -1
    prompts = [Prompt((1, 2, 7), ((7,), (8, 9)), False), Prompt((3,), ((7,), (8, 9)), False)]
    found = movements({EMBEDDING: before}, {EMBEDDING: after}, tokenizer, prompts)[EMBEDDING]
    assert [group["tokens"] for group in found] == [1, 1, 1, 3, 14]
    assert [round(group["cosine"], 6) for group in found] == [-1, 1, 1, 1, 1]
    shown = format_movements({EMBEDDING: found})
    assert "(7)" in shown and "others in the prompts" in shown and "-1.000000" in shown


# Runs


@pytest.mark.parametrize(("method", "targets", "dtype"), CASES)
def test_a_run_trains_the_vectors_and_nothing_else_of_the_base(
    method, targets, dtype, base, data, tmp_path, capsys
):
    run = tmp_path / "run"
    assert train.main(arguments(method, base, data, run, *more(targets, dtype))) == 0
    said = capsys.readouterr().out
    found = record(run)
    assert found["frozen_before"] == found["frozen_after"]
    tensors = load_file(run / VECTORS)
    assert list(tensors) == [EMBEDDING] and tensors[EMBEDDING].dtype == torch.float32
    own = load_model(base, dtype).lm_head_weight
    moved = (tensors[EMBEDDING] != own.float()).any(dim=1)
    # A softmax over the vocabulary touches every row; a classifier's loss those of its texts.
    assert moved.all() if method == "lora_label_scoring" else 0 < moved.sum() < len(moved)
    assert (run / "adapter").exists() == (targets != "none")
    assert (run / "head.safetensors").exists() == (method == "lora_head" and targets == "none")
    expected = own.numel() + (64 if method == "lora_head" else 0)
    assert found["trained_parameters"] > expected or targets == "none"
    assert found["trained_parameters"] == expected or targets != "none"
    rest = [item for item in load_model(base, dtype).named_parameters() if item[0] != EMBEDDING]
    assert found["frozen_before"] == fingerprint(rest)
    groups = found["embedding_movement"][EMBEDDING]
    first = "label " if method == "lora_label_scoring" else "others in the prompts"
    assert groups[0]["vectors"].startswith(first) and groups[0]["cosine"] < 1
    assert groups[-1]["vectors"] == "all others, mean" and "all others, mean" in said

    # What evaluate.py restores is what the run measured on its held-out rows at its best step.
    scores = scores_of(capsys, "--run", run, "--data", data)
    assert np.array_equal(scores, scores_of(capsys, "--run", run, "--data", data))
    (run / VECTORS).rename(tmp_path / "elsewhere")
    assert evaluate.main(["--run", str(run), "--data", str(data)]) == 2
    err = capsys.readouterr().err
    assert VECTORS in err and err.count("\n") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_gives_the_held_out_figures_of_the_run(dtype, base, data, tmp_path, capsys):
    from qwen_min.files.data import held_out_split, read_examples
    from qwen_min.metrics import log_loss

    run = tmp_path / "run"
    args = arguments("lora_label_scoring", base, data, run, *more("none", dtype))
    assert train.main(args) == 0
    scores = scores_of(capsys, "--run", run, "--data", data)
    examples = read_examples(data, WORDS.split(","))
    _, held_out = held_out_split(examples)
    labels = np.array([examples[i].label for i in held_out])
    found = record(run)
    best = next(h for h in found["history"] if h["step"] == found["best_step"])
    # The batches differ, and in bf16 their sums round differently.
    tolerance = 1e-5 if dtype == "float32" else 0.2
    assert log_loss(labels, scores[held_out]) == pytest.approx(
        best["held_out_log_loss"], abs=tolerance
    )


@pytest.mark.parametrize(
    ("method", "targets", "dtype"), [CASES[2], CASES[3], ("lora_head", "none", "bfloat16")]
)
def test_a_killed_run_goes_on_to_the_bit(method, targets, dtype, base, data, tmp_path):
    """Killed inside its seventh step; then weights, moments and result as if it never had been."""
    given = [*more(targets, dtype), "--save-every", 2, "--eval-every", 4]
    runs = [tmp_path / name for name in ("whole", "killed")]

    def die_in_step_seven() -> None:
        name = "label_losses" if method == "lora_label_scoring" else "head_losses"
        real, calls = getattr(forms, name), []

        def counted(*args):
            calls.append(1)
            if len(calls) == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(forms, name, counted)

    assert os.waitpid(in_child(arguments(method, base, data, runs[0], *given)), 0)[1] == 0
    args = arguments(method, base, data, runs[1], *given)
    assert os.WIFSIGNALED(os.waitpid(in_child(args, die_in_step_seven), 0)[1])
    assert 0 < checkpoints(runs[1])[-1][0] < 7
    assert os.waitpid(in_child([*args, "--resume"]), 0)[1] == 0
    files = []
    for run in runs:
        _, last = checkpoints(run)[-1]
        paths = [*last.rglob("*.safetensors"), *run.glob("*.safetensors")]
        files.append({str(path.relative_to(run)): path.read_bytes() for path in paths})
    assert any(VECTORS in name for name in files[0])
    assert files[0] == files[1]


def test_merge_holds_the_trained_vectors(base, data, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "merged"
    args = arguments("lora_label_scoring", base, data, run, *more("none", "bfloat16"))
    assert train.main([*args, "--merge", str(out)]) == 0
    capsys.readouterr()
    common = ["--data", data, "--labels", WORDS, "--dtype", "bfloat16"]
    merged = scores_of(capsys, "--method", "zero_shot", "--model", out, *common)
    assert np.array_equal(merged, scores_of(capsys, "--run", run, "--data", data))


def test_an_adapter_without_the_vectors_trained_with_it_is_refused(base, data, tmp_path, capsys):
    run = tmp_path / "run"
    args = arguments("lora_label_scoring", base, data, run, *more("attention", "float32"))
    assert train.main([*args, "--merge", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    given = ["--data", data, "--labels", WORDS]
    alone = ["--method", "lora_label_scoring", "--adapter", run / "adapter", "--model", base]
    assert evaluate.main([str(a) for a in [*alone, *given]]) == 2
    err = capsys.readouterr().err
    assert VECTORS in err and "--run" in err and err.count("\n") == 1
    probe = ["--adapter", run / "adapter"]
    assert VECTORS in one_line(
        capsys, 2, *arguments("head_only", base, data, tmp_path / "p", *probe)
    )
    merged = scores_of(capsys, "--method", "zero_shot", "--model", tmp_path / "merged", *given)
    scores = scores_of(capsys, "--run", run, "--data", data)
    np.testing.assert_allclose(merged, scores, atol=1e-4)  # fp32; the LoRA's sum in another order


def test_transplanted_head_is_on_the_base_as_it_was(base, data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(arguments("lora_head", base, data, run, *more("none", "float32"))) == 0
    capsys.readouterr()
    given = ["--method", "transplanted_head", "--run", run, "--data", data]
    bare = scores_of(capsys, *given)
    (run / VECTORS).unlink()  # the head on the bare base, as a run without trained vectors has it
    changed = record(run)
    changed["arguments"]["train_embeddings"] = False
    changed["result_hash"] = None
    (run / "run.json").write_text(json.dumps(changed))
    assert np.array_equal(scores_of(capsys, "--run", run, "--data", data), bare)


# One line


@pytest.mark.parametrize("change", ["shape", "dtype", "extra", "base", "cut"])
def test_a_file_that_is_not_the_runs_own_is_refused(change, reference, tmp_path):
    model, path = load_model(reference[0]), tmp_path / VECTORS
    write(path, unfreeze(load_model(reference[0]), True), "base")
    load(path, model, True, "base")
    tensors = load_file(path)
    if change == "shape":
        tensors[EMBEDDING] = tensors[EMBEDDING][:-1].clone()
    if change == "dtype":
        tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
    if change == "extra":
        tensors[LM_HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, path, {"base_fingerprint": "other" if change == "base" else "base"})
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="not the token vectors that train") as error:
        load(path, model, True, "base")
    assert "\n" not in str(error.value)


def test_a_probe_has_no_vectors_to_train(base, data, tmp_path, capsys):
    args = arguments("head_only", base, data, tmp_path / "run", "--train-embeddings")
    assert (
        "--train-embeddings: for lora_head and lora_label_scoring, not for head_only"
        in one_line(capsys, 2, *args)
    )


def test_a_run_from_before_the_option_goes_on_and_is_evaluated(base, data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(arguments("lora_label_scoring", base, data, run, "--epochs", 1)) == 0
    capsys.readouterr()
    now = scores_of(capsys, "--run", run, "--data", data)
    found = record(run)
    for name in ("train_embeddings", "chat", "system"):
        del found["arguments"][name]
    (run / "run.json").write_text(json.dumps(found))
    assert np.array_equal(scores_of(capsys, "--run", run, "--data", data), now)
    assert train.main(["--resume", "--output", str(run)]) == 0
    assert "finished" in capsys.readouterr().out
