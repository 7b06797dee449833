"""Greedy decoding: both forms against transformers' generate; classes out of answers."""

import json

import numpy as np
import pytest
import torch
from conftest import make_reference

from qwen_min.errors import UserError
from qwen_min.fast.generation import generate_answers
from qwen_min.files.weights import load_model
from qwen_min.lab.generation import MAX_NEW_TOKENS, first_label, greedy, stop_ids
from qwen_min.metrics import OFF_TRACK
from qwen_min.prompt import Prompt


def batched(model, prompts: list[list[int]], most: int, stop=()) -> list[list[int] | None]:
    """`generate_answers` of all prompts in one batch."""
    rows = [Prompt(tuple(ids), (), False) for ids in prompts]
    return generate_answers(model, rows, most, stop, 10**6)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_both_forms_equal_transformers(kind, tmp_path):
    theirs = make_reference(tmp_path, kind)
    ours = load_model(tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 500, n).tolist() for n in (3, 11, 1)]
    expected = [
        theirs.generate(
            torch.tensor([p]),
            attention_mask=torch.ones(1, len(p), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(p) :].tolist()
        for p in prompts
    ]
    assert [greedy(ours, p, 12) for p in prompts] == expected
    assert batched(ours, prompts, 12) == expected


def test_a_text_ends_at_its_stop_token_and_the_others_go_on(reference):
    ours = load_model(reference[0])
    prompts = [[5, 6, 7], [100, 200], [42]]
    whole = batched(ours, prompts, 8)
    stop = {whole[1][3]}  # the second text ends at its fourth token at the latest
    expected = [new[: next((i for i, t in enumerate(new) if t in stop), len(new))] for new in whole]
    assert len(expected[1]) <= 3
    assert batched(ours, prompts, 8, stop) == expected
    assert [greedy(ours, p, 8, stop) for p in prompts] == expected


def test_answers_in_batches_are_each_prompts_own(reference):
    ours, rng = load_model(reference[0]), np.random.default_rng(1)
    prompts = [Prompt(tuple(rng.integers(0, 500, n).tolist()), ((7,),), False) for n in (9, 2, 30)]
    stop = {greedy(ours, prompts[0].ids, 3)[2]}
    expected = [greedy(ours, prompt.ids, MAX_NEW_TOKENS, stop) for prompt in prompts]
    for budget in (1, 60, 1000):
        seen = []
        found = generate_answers(ours, prompts, MAX_NEW_TOKENS, stop, budget, seen.append)
        assert found == expected
        assert sum(seen) == 41  # tokens


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("正面", 1),
        ("答案是负面，不是正面", 0),  # the first of two
        ("不好", 0),  # 不好 and 不 at one place: the longest
        ("不，好", 2),
        ("我觉得好", 3),
        ("", OFF_TRACK),
        ("中性", OFF_TRACK),
    ],
)
def test_the_first_label_word_decides(answer, found):
    words = ("负面", "正面") if "面" in answer else ("不好", "很差", "不", "好")
    assert first_label(answer, words) == found


@pytest.mark.parametrize(
    ("words", "answer", "found"),
    [
        (("negative", "positive"), "Negative", 0),
        (("negative", "positive"), " negative", 0),
        (("negative", "positive"), "\n\nPOSITIVE.", 1),
        (("Negative", "Positive"), "it is positive", 1),
        ((" negative", " positive"), "Positive", 1),
        (("negative", "positive"), "Negative, not positive", 0),
        (("negative", "positive"), "答案是Positive。", 1),
        (("negative", "positive"), "unsure", OFF_TRACK),
        (("отрицательно", "положительно"), "Положительно", 1),
        (("good", "not good"), "Not good", 1),  # the longest, in any case
        (("us", "US"), "US", 1),
        (("us", "US"), "us, not US", 0),
        (("us", "US"), "the US, not us", 1),
        (("us", "US"), "Us", 0),  # neither: the first class
        (("bad", " bad"), " bad", 1),
        (("bad", " bad"), "bad", 0),
        (("A", "B"), "The answer is B", 1),  # the a in `answer` is no A
        (("A", "B"), "a", 0),
        (("A", "B"), " a.", 0),
        (("A", "B"), "This is a positive review: B", 1),
        (("A", "B"), "a review of a customer", OFF_TRACK),
        (("no", "yes"), "I cannot tell. Yes", 1),
        (("No", "Yes"), "I cannot tell. yes", 1),
        (("good", "bad"), "Goods are bad", 1),
        (("0", "1"), "10", OFF_TRACK),
        (("1", "2"), "12, so 2", 1),
        (("1", "2"), "答案是2。", 1),
        (("US", "EU"), "because the EU", 1),
        (("negative", "positive"), "Negatives", OFF_TRACK),
        (("(a)", "[b]"), "[B]", 1),
        (("{0}", "."), "x{0}", 0),
    ],
)
def test_letter_case_and_white_space_do_not_count(words, answer, found):
    assert first_label(answer, words) == found


def test_what_ends_an_answer(tmp_path):
    markup = {"<|im_end|>": 11, "<|endoftext|>": 12, "<|im_start|>": 13}
    path = tmp_path / "generation_config.json"
    assert stop_ids(tmp_path, markup) == {11, 12}
    for eos, more in ((12, {12}), ([11, 99], {11, 99}), (None, set())):
        path.write_text(json.dumps({"eos_token_id": eos}))
        assert stop_ids(tmp_path, markup) == {11, 12} | more
    assert stop_ids(tmp_path, {}) == set()
    for broken in ("{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}'):
        path.write_text(broken)
        with pytest.raises(UserError, match="not a generation config") as error:
            stop_ids(tmp_path, markup)
        assert "\n" not in str(error.value)
