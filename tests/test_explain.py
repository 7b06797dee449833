"""--explain: its numbers are the scorer's, its columns line up, its last lines say why."""

import re

import numpy as np
import pytest
import torch
from conftest import make_reference

from qwen_min.command.terminal import WIDTH, clipped, columns, visible
from qwen_min.fast.features import pooled_features
from qwen_min.fast.label_scores import score_labels
from qwen_min.files.weights import load_model
from qwen_min.head import LinearHead, pooled_state
from qwen_min.lab.clauses import format_clauses, margins, split_clauses
from qwen_min.lab.explain import (
    decision,
    explain_head,
    explain_labels,
    label_positions,
    prompt_part,
)
from qwen_min.prompt import Prompt, build_prompts
from qwen_min.scoring import label_mass, score_label
from qwen_min.tokenizer import Tokenizer

WORDS = ("差评", "好评")
TEXT = "房间很干净，服务员 态度也好。\n😀"
TEMPLATE = "评论：{text}\n情感倾向：\n"


@pytest.fixture(scope="module")
def tokenizer(reference):
    return Tokenizer(reference[0])


@pytest.fixture(scope="module")
def models(reference, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    make_reference(other, num_hidden_layers=3, rope_theta=500.0)
    return {"base": load_model(reference[0]), "adapted": load_model(other)}


def prompts_of(tokenizer: Tokenizer, words: tuple[str, ...] = WORDS) -> tuple[Prompt, Prompt]:
    prompt, blank = build_prompts(tokenizer, [TEXT, ""], TEMPLATE, words)
    return prompt, blank


def shows(out: str, value: float) -> bool:
    """Whether a number is printed, to the last of its three or four digits."""
    return any(abs(x - value) < 1.6e-3 for x in numbers(out))


def why(shown: str) -> dict[str, list[str]]:
    """The table of reasons: for each row, what it says of each model."""
    rows = [re.split(r" {2,}", row) for row in shown[shown.index("\nwhy ") + 1 :].split("\n")]
    return {fact: of_models for fact, *of_models in rows}


def numbers(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"(?<![\w.])-?\d+\.\d+", line)]


@pytest.mark.parametrize("words", [WORDS, ("坏", "好"), ("非常满意", "非常", "差")])
def test_the_sums_are_the_scores(words, models, tokenizer):
    """Position by position from the definition, to fp32's rounding of sums of tens."""
    prompt, _ = prompts_of(tokenizer, words)
    (scores,) = score_labels(models["base"], [prompt])
    for score, ids in zip(scores, prompt.labels, strict=True):
        found = label_positions(models["base"], prompt.ids, ids)
        assert [position.token for position in found] == list(ids)
        total = sum(position.log_p for position in found)
        assert total == pytest.approx(score, abs=1e-5)
        assert total == pytest.approx(score_label(models["base"], prompt.ids, ids), abs=1e-5)


def test_a_position_by_hand(reference, models):
    """Logit, log-sum-exp and the four likeliest, from transformers' logits."""
    prompt, label = (5, 6, 7), (8, 9)
    found = label_positions(models["base"], prompt, label)
    with torch.no_grad():
        logits = reference[1](torch.tensor([[*prompt, *label]])).logits[0].double()
    for t, position in enumerate(found):
        at = logits[2 + t]
        assert position.logit == pytest.approx(at[label[t]].item(), abs=1e-5)
        assert position.log_sum_exp == pytest.approx(at.exp().sum().log().item(), abs=1e-5)
        assert position.log_p == position.logit - position.log_sum_exp
        assert [token for token, _ in position.likeliest] == at.topk(4).indices.tolist()
        best = (at.max() - at.exp().sum().log()).item()
        assert position.likeliest[0][1] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_the_heads_state_is_the_one_it_was_fitted_on(pooling, layer, models, tokenizer):
    prompt, _ = prompts_of(tokenizer)
    head = LinearHead(torch.randn(2, 32), torch.randn(2), layer, pooling)
    h = pooled_state(models["base"], prompt.ids, head.pooling, head.layer)
    features = pooled_features(models["base"], [prompt], pooling, True, 2048)
    torch.testing.assert_close(h, features[0, layer], atol=1e-5, rtol=1e-5)
    if layer == 3:
        assert torch.equal(h, pooled_state(models["base"], prompt.ids, pooling))


@pytest.mark.parametrize("words", [WORDS, ("非常满意", "非常", "差")])
@pytest.mark.parametrize("several", [False, True])
def test_what_is_shown_for_label_words(words, several, models, tokenizer):
    prompt, blank = prompts_of(tokenizer, words)
    shown_models = models if several else {"the model": models["base"]}
    shown = explain_labels(tokenizer, prompt, blank, words, shown_models)
    lines = shown.split("\n")
    assert max(map(columns, lines)) <= WIDTH
    # Every difference that is shown is right to the last of four digits.
    table = lines[lines.index("label words") + 2 : lines.index("", lines.index("label words"))]
    for line in table:
        found = numbers(line)
        for logit, log_sum_exp, log_p in zip(found[::3], found[1::3], found[2::3], strict=False):
            assert logit - log_sum_exp == pytest.approx(log_p, abs=1.01e-4)
    for model in shown_models.values():
        (scores,) = score_labels(model, [prompt])
        assert all(shows(shown, score) for score in scores)
        p = np.exp(scores - np.logaddexp.reduce(scores))
        assert all(shows(shown, share) for share in p)
        assert words[scores.argmax()] in shown
    assert shown.count("<- decision") == len(shown_models)
    said = why(shown)
    assert said["why"] == list(shown_models)
    assert ("base to adapted: the margin of" in shown) == several
    starts = {ids[0] for ids in prompt.labels}
    for i, model in enumerate(shown_models.values()):
        (scores,), (empty,) = score_labels(model, [prompt]), score_labels(model, [blank])
        second, best = np.argsort(scores)[-2:]
        assert (said["decision"][i], said["second"][i]) == (words[best], words[second])
        margin, before = scores[best] - scores[second], empty[best] - empty[second]
        assert float(said["margin"][i]) == pytest.approx(margin, abs=1e-4)
        by_token = [float(x) for x in said["margin by token (missing: 0)"][i].split()]
        assert len(by_token) == max(len(prompt.labels[y]) for y in (best, second))
        assert sum(by_token) == pytest.approx(margin, abs=3e-4)  # of up to five rounded numbers
        assert float(said["margin without a text"][i]) == pytest.approx(before, abs=1e-4)
        assert float(said["the text adds"][i]) == pytest.approx(margin - before, abs=1e-4)
        mass = label_mass(scores[None], [prompt.labels]).item()
        assert said["p(any label word)"][i] == f"{mass:.2%}"
        likeliest, log_p = label_positions(model, prompt.ids, (0,))[0].likeliest[0]
        piece = visible(tokenizer.decode([likeliest]))
        assert said["most likely token"][i] == f"{piece} {np.exp(log_p):.2%}"
        assert said["begins a label word"][i] == ("yes" if likeliest in starts else "no")
    # Each beginning that is followed by a token has its likeliest tokens shown once.
    beginnings = {ids[:t] for ids in prompt.labels for t in range(len(ids))}
    assert shown.count("the 4 most likely tokens after the prompt") == len(beginnings)


@pytest.mark.parametrize("bias", [None, torch.tensor([0.5, -0.25])])
def test_what_is_shown_for_a_head(bias, models, tokenizer):
    prompt, blank = prompts_of(tokenizer)
    head = LinearHead(torch.randn(2, 32, generator=torch.manual_seed(0)), bias, 3, "last")
    shown = explain_head(tokenizer, prompt, blank, WORDS, models, head)
    assert max(map(columns, shown.split("\n"))) <= WIDTH
    for model in models.values():
        h = pooled_state(model, prompt.ids)
        (scores,) = head.scores(h[None])
        assert all(shows(shown, score) for score in scores)
        assert shows(shown, h.norm().item()) and shows(shown, h[0].item())
    # Every sum that is shown is right to the last of four digits.
    table = shown[shown.index("W h + b\n") :].split("\n")[2:6]
    for line in table:
        _, product, b, score = numbers(line)
        assert product + b == pytest.approx(score, abs=1.01e-4)
    said = why(shown)
    for i in range(2):
        product, b = (float(said[k][i]) for k in said if "w(decision)" in k or "b(decision)" in k)
        assert product + b == pytest.approx(float(said["margin"][i]), abs=1.6e-4)
        norms = [float(said[k][i]) for k in ("d·h = |d|", "* |h|", "* cos(d, h)")]
        # The cosine has four digits after the point.
        assert np.prod(norms) == pytest.approx(product, abs=1e-4 * norms[0] * norms[1])
    assert shown.count("<- decision") == 2 and "cosine between both" in shown


def test_without_a_blank_prompt_nothing_is_compared_with_it(models, tokenizer):
    prompt, _ = prompts_of(tokenizer)
    shown = explain_labels(tokenizer, prompt, None, WORDS, {"the model": models["base"]})
    assert "without a text" not in shown and "the text adds" not in shown


@pytest.mark.parametrize(
    ("blank", "larger"),
    [([0.0, -1.0], "the template"), ([0.0, -0.4], "the text"), ([-3.0, 0.0], "the text")],
)
def test_whether_the_text_or_the_words_decided(blank, larger):
    said = why(decision("score", ("a", "b"), {"x": [-1.0, -2.5]}, {"x": blank}, {"x": {}}))
    assert said["margin without a text"] == [f"{blank[0] - blank[1]:+.4f}"]
    assert said["the text adds"] == [f"{1.5 - blank[0] + blank[1]:+.4f}"]
    assert said["the larger part"] == [larger]


@pytest.mark.parametrize(("margin", "odds"), [(0.5, "1.649"), (30.0, "e^30"), (5000.0, "e^5000")])
def test_the_odds(margin, odds):
    said = why(decision("score", ("a", "b"), {"x": [0.0, margin]}, {}, {"x": {}}))
    assert said["odds = e^margin"] == [odds]


def test_a_tie_is_called_one():
    shown = decision("score", ("a", "b"), {"base": [-1.0, -1.0]}, {}, {"base": {}})
    assert why(shown)["decision"] == ["a (a tie; try --dtype float32)"]


@pytest.mark.parametrize(("after", "best"), [([2.0, 0.5], "a"), ([0.0, 0.5], "b")])
def test_what_the_second_model_changes(after, best):
    shown = decision("score", ("a", "b"), {"x": [1.0, 0.0], "y": after}, {}, {"x": {}, "y": {}})
    old, new, second = (1.0, 1.5, "b") if best == "a" else (-1.0, 0.5, "a")
    said = f"x to y: the margin of {best} over {second}\n  goes from"
    assert f"{said} {old:+.4f} to {new:+.4f} ({new - old:+.4f})" in shown
    assert why(shown)["decision"] == ["a", best]


def test_tokens_stand_above_their_ids(tokenizer):
    prompt, _ = prompts_of(tokenizer)
    lines = prompt_part(tokenizer, prompt).split("\n")
    assert max(map(columns, lines)) <= WIDTH
    assert lines[-2:] == ["", "\ufffd: a part of a character"]  # of the emoji
    del lines[-2:]
    ids, starts = [], []
    for above, below in zip(lines[1::3], lines[2::3], strict=True):
        # In columns: a wide character stands for two.
        spread = "".join(c + "\0" * (columns(c) - 1) for c in above)
        ids += map(int, below.split())
        starts = [m.start() for m in re.finditer(r"\d+", below)]
        assert [m.start() for m in re.finditer(r"[^ \0][^ ]*", spread)] == starts
    assert ids == list(prompt.ids)


def test_what_takes_no_column_is_written_out():
    assert visible("a b\n\u0301\u200b。") == "a␣b\\n\\u0301\\u200b。"
    assert columns(visible("\u3000")) == 6  # a space too, of two columns


def test_a_long_token_is_clipped():
    assert clipped("情感倾向") == "情感倾向" and clipped("very long token") == "very lon…"
    assert clipped("情感倾向。") == "情感倾向…" and columns(clipped("a情感倾向")) == 9


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ("房间小，但是很干净。", ["房间小，", "但是很干净。"]),
        ("好吃！！！就是贵；、下次", ["好吃！！！", "就是贵；、", "下次"]),
        ("3.5分，5,000元。10分钟", ["3.5分，", "5,000元。", "10分钟"]),
        ("“好吃。”他说：差\n\n真的?", ["“好吃。”", "他说：差\n\n", "真的?"]),
        ("Good food, but cold. www.a.com", ["Good food, ", "but cold. ", "www.a.com"]),
        ("小,但是", ["小,", "但是"]),
        ("！好", ["！", "好"]),
        ("很好", ["很好"]),
    ],
)
def test_clauses(text, clauses):
    assert split_clauses(text) == clauses and "".join(clauses) == text


def test_a_long_text_is_split_in_linear_time():
    text = "1.2,a" * 20_000 + "，" * 50_000 + " \n" * 20_000
    assert "".join(split_clauses(text)) == text


def test_a_margin_is_that_over_the_highest_other_class():
    scores = np.array([[1.0, 3.0, 2.5], [0.0, 1.0, 4.0], [5.0, 1.0, 0.0]])
    assert margins(scores, 1).tolist() == [0.5, -3.0, -4.0]
    shown = format_clauses(["a,", "b"], {"x": scores})
    rows = [line.split() for line in shown.split("\n\n")[0].split("\n")[2:]]
    assert rows == [["(none)", "+0.5000"], ["b", "-4.0000"], ["a,", "-3.0000"]]
    assert "margin of x's decision over the best other" in shown and "largest" not in shown


def test_margins_of_all_models_are_of_the_last_ones_decision():
    base = np.array([[2.0, 1.0, 0.0], [3.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
    adapted = np.array([[1.0, 3.0, 2.5], [0.0, 1.0, 4.0], [5.0, 1.0, 0.0]])  # class 1, not 0
    shown = format_clauses(["a,", "b"], {"base": base, "adapted": adapted})
    rows = [line.split() for line in shown.split("\n\n")[0].split("\n")[2:]]
    assert rows[0] == ["(none)", "-1.0000", "+0.5000"]
    assert rows[1:] == [["b", "+3.0000", "-4.0000"], ["a,", "-3.0000", "-3.0000"]]
    assert shown.startswith("margin of adapted's decision over the best other, one of 2 ")


def test_clauses_fit_the_terminal():
    clauses, scores = ["宽" * 500 + "\n", "\u200b" * 500] * 6, np.full((13, 2), -1000.0)
    scores[:, 1] = np.arange(13) * -150
    shown = format_clauses(clauses, {"base": scores, "adapted": scores})
    assert max(map(columns, shown.split("\n"))) <= WIDTH
