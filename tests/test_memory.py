"""Memory is flat in rows, save for what is kept of each: its prompt and its scores."""

import itertools
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch

from qwen_min.command.classifier import Outcome
from qwen_min.command.outcome import prediction_lines
from qwen_min.fast.features import pooled_features
from qwen_min.fast.label_scores import score_labels
from qwen_min.fast.memory import MANY, store_by_columns
from qwen_min.files.data import Example
from qwen_min.files.output import Output
from qwen_min.files.weights import fingerprint, load_model
from qwen_min.prompt import build_prompts
from qwen_min.tokenizer import Tokenizer

ROWS = (128, 256)
LABELS = ["".join(word) for word in itertools.product("很不非常", "好差满意", "的了")]
TEMPLATE = "评论：{text}\n情感倾向：\n"


def growth(call) -> float:
    """Bytes by which the peak of call(rows) grows with each row."""
    peaks = []
    call(8)  # what is made once is there already
    for rows in ROWS:
        tracemalloc.start()
        call(rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (peaks[1] - peaks[0]) / (ROWS[1] - ROWS[0])


def texts(rows: int) -> list[str]:
    return [f"房间很干净，服务员态度也好 {i}" for i in range(rows)]


@pytest.fixture(scope="module")
def tokenizer(reference) -> Tokenizer:
    return Tokenizer(reference[0])


def test_prompts(tokenizer):
    """Of a row: 24 tokens at 8 bytes, and the prompt's own fields. With every label's ids of the
    whole prompt it would be 32 labels · 24 tokens · 8 bytes at least."""
    found = growth(lambda rows: build_prompts(tokenizer, texts(rows), TEMPLATE, LABELS))
    assert found < 1000


def test_equal_ids_are_one_object(tokenizer):
    first, *others = build_prompts(tokenizer, texts(ROWS[1]), TEMPLATE, LABELS)
    assert {id(prompt.labels) for prompt in others} == {id(first.labels)}
    assert len({id(token) for p in others for token in p.ids}) <= tokenizer.size


def test_a_prompt_does_not_depend_on_other_rows(tokenizer):
    many = texts(40)
    together = build_prompts(tokenizer, many, TEMPLATE, LABELS[:3])
    assert together == [build_prompts(tokenizer, [t], TEMPLATE, LABELS[:3])[0] for t in many]


def test_scores(reference, tokenizer):
    """Of a row: 32 scores at 8 bytes. A tree of its label tokens would be some 10 kB."""
    model = load_model(reference[0])
    prompts = {n: build_prompts(tokenizer, texts(n), TEMPLATE, LABELS) for n in (8, *ROWS)}
    assert growth(lambda rows: score_labels(model, prompts[rows])) < 5 * 8 * len(LABELS)


def test_predictions(tmp_path):
    """Of a row nothing is kept: it is written before the next one is made."""
    scores = np.random.default_rng(0).normal(size=(ROWS[1], 100))
    examples = [Example("a", 0, i) for i in range(ROWS[1])]

    def write(rows: int) -> None:
        outcome = Outcome(np.zeros(rows, int), scores[:rows], None, None, 0.0, None)
        lines = partial(prediction_lines, examples[:rows], ["a"], outcome)
        Output(tmp_path / "rows.jsonl").commit(lines)

    assert growth(write) < 100
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == ROWS[1]


def by_columns(model: torch.nn.Module) -> list[bool]:
    """Of each weight of the layers: whether its columns, and not its rows, lie together."""
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    return [m.weight.T.is_contiguous() for m in linears]


@pytest.fixture
def amx(monkeypatch) -> None:
    """A processor with AMX, whatever this one has."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True}, raising=False)


@pytest.mark.parametrize("scored_by", ["label words", "head"])
def test_many_tokens_are_scored_with_weights_stored_by_columns(
    reference, tokenizer, scored_by, amx
):
    def scores(model, prompts):
        if scored_by == "label words":
            return score_labels(model, prompts)
        return pooled_features(model, prompts, "last", False, 512).numpy()

    model = load_model(reference[0], "bfloat16")
    before = fingerprint(model.named_parameters())
    prompts = build_prompts(tokenizer, texts(100), TEMPLATE, LABELS[:3])
    rows = scores(model, prompts)
    assert not any(by_columns(model))
    store_by_columns(model, MANY)
    columns = scores(model, prompts)
    assert all(by_columns(model)) and fingerprint(model.named_parameters()) == before
    np.testing.assert_allclose(columns, rows, rtol=0, atol=0.05)
    many = prompts * 6  # more than MANY tokens behind their common prefix
    again = load_model(reference[0], "bfloat16")
    np.testing.assert_allclose(scores(again, many)[: len(rows)], rows, rtol=0, atol=0.05)
    assert all(by_columns(again))
    assert not any(weight.is_inference() for weight in again.parameters())


def test_weights_stay_as_they_are_in_fp32_in_training_without_amx_and_where_memory_is_short(
    reference, monkeypatch, amx
):
    model = load_model(reference[0])
    store_by_columns(model, MANY)
    assert not any(by_columns(model))
    model = load_model(reference[0], "bfloat16")
    store_by_columns(model, MANY - 1)
    assert not any(by_columns(model))
    model.model.norm.weight.requires_grad_(True)
    store_by_columns(model, MANY)
    assert not any(by_columns(model))
    model.model.norm.weight.requires_grad_(False)
    with monkeypatch.context() as plain:
        plain.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        store_by_columns(model, MANY)
    assert not any(by_columns(model))
    with monkeypatch.context() as small:
        small.setattr("os.sysconf", lambda name: 100)  # 10 kB
        store_by_columns(model, MANY)
    assert not any(by_columns(model))
    with monkeypatch.context() as windows:
        windows.delattr("os.sysconf")
        store_by_columns(model, MANY)
    assert not any(by_columns(model))
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older releases: it is not known then
    store_by_columns(model, MANY)  # nothing else kept them
    assert all(by_columns(model))
