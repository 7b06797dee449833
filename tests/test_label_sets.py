"""Sets of label words: one pass for all, figures by hand, and what is refused."""

import numpy as np
import pytest

from qwen_min.errors import UserError
from qwen_min.fast.label_scores import score_labels
from qwen_min.files.weights import load_model
from qwen_min.lab.label_sets import (
    compare_sets,
    distinct_words,
    format_sets,
    parse_label_sets,
    with_first_tokens,
)
from qwen_min.prompt import Prompt, build_prompts
from qwen_min.scoring import score_label
from qwen_min.tokenizer import Tokenizer

OWN = ("负面", "正面")


def test_the_own_set_is_the_first_and_no_word_stands_twice():
    sets = parse_label_sets("差,好;负面,正面;好,差", OWN)
    assert sets == [OWN, ("差", "好"), ("好", "差")]
    assert distinct_words(sets) == ("负面", "正面", "差", "好")
    notes = []
    assert parse_label_sets("差, 好；负面，正面; 好,差", OWN, notes.append) == sets
    assert len(notes) == 2 and all(note.startswith("note: --label-sets") for note in notes)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("差,好,中", "'差,好,中' has 3 words, expected 2"),
        ("差,好;", "a word is empty"),
        ("差,差", "差 repeats"),
        ("差", "one word"),
    ],
)
def test_what_is_no_set(argument, said):
    with pytest.raises(UserError) as error:
        parse_label_sets(argument, OWN)
    assert "--label-sets" in str(error.value) and said in str(error.value)


def test_one_pass_gives_each_sets_own_scores(reference):
    """Scored together they are what the definition gives for each word alone."""
    model, tokenizer = load_model(reference[0]), Tokenizer(reference[0])
    words = distinct_words([("差评", "好评"), ("不太满意", "非常满意"), ("差评", "非常")])
    prompts = build_prompts(tokenizer, ["房间很干净", "面坨了，慢"], "{text}\n：\n", words)
    asked = with_first_tokens(prompts)
    found = score_labels(model, asked)
    for row, prompt in enumerate(prompts):
        whole = [score_label(model, prompt.ids, ids) for ids in prompt.labels]
        first = [score_label(model, prompt.ids, ids[:1]) for ids in prompt.labels]
        np.testing.assert_allclose(found[row], [*whole, *first], atol=1e-5)  # fp32, small


# Rows of probabilities: class 0's word, class 1's, and each one's first token.
SETS = [("a", "b"), ("c", "d")]
PROMPTS = [Prompt((1,), ((5,), (6,), (7, 9), (8, 9)), False)] * 4
LABELS = np.array([0, 0, 1, 1])
P = np.array(
    [
        # a     b     c     d    and their first tokens
        [0.40, 0.10, 0.10, 0.20, 0.40, 0.10, 0.30, 0.20],
        [0.30, 0.20, 0.10, 0.30, 0.30, 0.20, 0.20, 0.30],
        [0.10, 0.20, 0.01, 0.40, 0.10, 0.20, 0.10, 0.40],
        [0.10, 0.50, 0.01, 0.50, 0.10, 0.50, 0.10, 0.50],
    ]
)


def test_figures_by_hand():
    good, shifted = compare_sets(LABELS, SETS, PROMPTS, np.log(P))
    assert good["accuracy"] == good["auc_roc"] == good["oracle_accuracy"] == 1.0
    assert good["label_mass"] == pytest.approx((0.5 + 0.5 + 0.3 + 0.6) / 4)
    assert good["predicted"] == [0.5, 0.5] and good["shared_tokens"] == []
    # d is always likelier than c, yet the rows are ranked without a mistake: a threshold would do.
    assert (shifted["accuracy"], shifted["auc_roc"]) == (0.5, 1.0)
    assert shifted["predicted"] == [0.0, 1.0] and shifted["oracle_accuracy"] == 1.0
    # log-odds are log 2, 3, 40, 50: the cut lies between 3 and 40.
    assert shifted["oracle_threshold"] == pytest.approx((np.log(3) + np.log(40)) / 2)
    assert shifted["first_token"]["accuracy"] == 0.75
    # q of d is 2/3, 3/4, 40/41, 50/51: the mean is 0.843, which only the first two are below.
    assert shifted["batch_accuracy"] == 1.0
    assert (shifted["ids"], shifted["lengths"]) == ([[7, 9], [8, 9]], [2, 2])
    assert shifted["shared_tokens"] == [9]
    assert shifted["mean_scores"][0] == pytest.approx(np.log(P[:, 2]).mean())


def test_words_that_begin_alike_have_no_first_token_to_decide_by():
    prompts = [Prompt((1,), ((7, 9), (7, 8)), False)] * 2
    scores = np.log([[0.1, 0.2, 0.5, 0.5], [0.2, 0.1, 0.5, 0.5]])
    (found,) = compare_sets(np.array([0, 1]), [("c", "d")], prompts, scores)
    assert found["first_token"] is None and found["shared_tokens"] == [7]


def test_the_report_says_what_a_set_loses_by(reference):
    found = compare_sets(LABELS, SETS, PROMPTS, np.log(P))
    shown = format_sets(found, Tokenizer(reference[0])).split("\n")
    assert max(map(len, shown)) <= 100
    figures = ["c,d", "0.5000", "0.5000", "0.0000"]
    assert shown[-1].split() == [*figures, "threshold"]
    assert shown[-3].startswith("against a,b")
    # Ranking: the second set's rows, dealt out anew, have nothing to do with the classes.
    mixed = np.log(P)
    mixed[:, 2:4] = mixed[[2, 0, 1, 3], 2:4]
    mixed[:, 2] -= 5
    shown = format_sets(compare_sets(LABELS, SETS, PROMPTS, mixed), Tokenizer(reference[0]))
    assert shown.split("\n")[-1].split()[-2:] == ["0.2500", "ranking"]


def test_three_classes_have_no_threshold(reference):
    sets = [("a", "b", "c")]
    prompts = [Prompt((1,), ((5,), (6,), (7,)), False)] * 3
    scores = np.log(np.tile(np.array([[0.5, 0.2, 0.1]]), (3, 2)))
    found = compare_sets(np.array([0, 1, 2]), sets, prompts, scores)
    assert found[0]["oracle_accuracy"] is None and found[0]["predicted"] == [1.0, 0.0, 0.0]
    shown = format_sets(found, Tokenizer(reference[0]))
    assert "threshold" not in shown and "1.00 0.00 0.00" in shown
