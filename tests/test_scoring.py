"""Label scores: the batched form against the definition, both against transformers by hand."""

import numpy as np
import pytest
import torch
from conftest import make_reference

from qwen_min.fast.label_scores import label_tree, score_labels
from qwen_min.files.weights import load_model
from qwen_min.prompt import Prompt
from qwen_min.scoring import label_mass, score_label

# fp32, small checkpoint, log-probabilities of up to a few tens.
FP32 = 1e-5
LABELS = ((7,), (8, 9), (8, 10, 11), (8,), (12, 9))  # shared beginnings, one a prefix of another


@pytest.fixture(scope="module")
def model(reference):
    return load_model(reference[0])


def random_prompts(count: int, shared: int, labels=LABELS, seed: int = 0) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, 500, shared).tolist()
    return [
        Prompt((*prefix, *rng.integers(0, 500, rng.integers(1, 40)).tolist()), labels, False)
        for _ in range(count)
    ]


@torch.no_grad()
def brute_force(reference: torch.nn.Module, prompt: Prompt) -> list[float]:
    """Teacher forcing with transformers, one token at a time, without any slice to get wrong."""
    scores = []
    for label in prompt.labels:
        total, ids = 0.0, list(prompt.ids)
        for token in label:
            logits = reference(torch.tensor([ids])).logits[0, -1].double()
            total += (logits[token] - logits.exp().sum().log()).item()
            ids.append(token)
        scores.append(total)
    return scores


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_both_forms_equal_transformers(kind, tmp_path):
    theirs = make_reference(tmp_path, kind)
    ours = load_model(tmp_path)
    prompts = random_prompts(6, shared=5)
    expected = np.array([brute_force(theirs, prompt) for prompt in prompts])
    definition = [[score_label(ours, p.ids, label) for label in p.labels] for p in prompts]
    np.testing.assert_allclose(definition, expected, atol=FP32, rtol=1e-6)
    np.testing.assert_allclose(score_labels(ours, prompts), expected, atol=FP32, rtol=1e-6)


@pytest.mark.parametrize("shared", [0, 1, 7])
@pytest.mark.parametrize("budget", [1, 50, 10_000])
def test_batch_and_order_change_nothing(model, shared, budget):
    prompts = random_prompts(12, shared)
    whole = score_labels(model, prompts)
    np.testing.assert_allclose(score_labels(model, prompts, budget), whole, atol=FP32)
    order = np.random.default_rng(1).permutation(len(prompts))
    shuffled = score_labels(model, [prompts[i] for i in order], budget)
    np.testing.assert_allclose(shuffled, whole[order], atol=FP32)


def test_candidates_in_another_order_and_twice(model):
    prompts = random_prompts(5, shared=3)
    first, second = score_labels(model, prompts), score_labels(model, prompts)
    assert np.array_equal(first, second)
    turned = [Prompt(p.ids, p.labels[::-1], False) for p in prompts]
    np.testing.assert_allclose(score_labels(model, turned)[:, ::-1], first, atol=FP32)


def test_labels_may_differ_from_row_to_row(model):
    one, several = random_prompts(3, 2, ((7,), (8,))), random_prompts(3, 2, ((7, 8, 9), (10, 11)))
    prompts = [prompt for pair in zip(one, several, strict=True) for prompt in pair]
    expected = [[score_label(model, p.ids, label) for label in p.labels] for p in prompts]
    np.testing.assert_allclose(score_labels(model, prompts), expected, atol=FP32)


def test_a_label_that_begins_another_never_scores_lower(model):
    scores = score_labels(model, random_prompts(20, 0, ((8,), (8, 9))))
    assert (scores[:, 0] >= scores[:, 1]).all()


def test_a_label_that_begins_another_adds_no_mass():
    """What begins with (5, 6) begins with (5,) as well: one event lies inside the other."""
    scores = np.log([[0.5, 0.3, 0.1], [0.5, 0.3, 0.1]])
    nested, apart = ((5,), (5, 6), (7,)), ((5,), (4, 6), (7,))
    assert label_mass(scores, [nested, apart]) == pytest.approx([0.6, 0.9])


def test_all_first_tokens_make_one(model):
    """Scores are log-probabilities: over the whole vocabulary their exponentials sum to one."""
    prompts = random_prompts(2, 1, tuple((token,) for token in range(512)))
    np.testing.assert_allclose(np.exp(score_labels(model, prompts)).sum(axis=1), 1, atol=1e-5)


def test_label_tree_runs_shared_tokens_once():
    tree = label_tree(LABELS)
    assert sorted(tree.tokens) == [8, 10, 12]  # 8 once; last tokens and one-token labels never
    node = {token: i for i, token in enumerate(tree.tokens)}
    assert tree.parents[node[10]] == 1 + node[8]
    assert tree.parents[node[8]] == tree.parents[node[12]] == 0  # the prompt's end
    assert tree.steps[0] == ((0, 7),)
    assert tree.steps[2] == ((0, 8), (1 + node[8], 10), (1 + node[10], 11))
    assert label_tree(((1,), (2,))).tokens == ()


def test_progress_counts_every_token(model):
    prompts, seen = random_prompts(9, 2), []
    score_labels(model, prompts, batch_tokens=60, progress=seen.append)
    assert sum(seen) == sum(len(prompt.ids) for prompt in prompts)
    assert len(seen) > 1


def test_bf16_errs_no_more_than_its_definition(reference):
    """In bf16 both forms round, differently; neither may be further from fp32 than the other."""
    exact, rounded = (load_model(reference[0], dtype) for dtype in ("float32", "bfloat16"))
    prompts = random_prompts(60, 4, ((7,), (8, 9)))
    truth = score_labels(exact, prompts)
    definition = [[score_label(rounded, p.ids, label) for label in p.labels] for p in prompts]
    error = np.array(definition) - truth
    for budget in (1, 100, 10_000):
        scores = score_labels(rounded, prompts, budget)
        # Root mean squares of 120 errors each: chance alone moves their ratio by about a tenth.
        assert np.sqrt(np.square(scores - truth).mean() / np.square(error).mean()) < 1.5
        flipped = scores.argmax(axis=1) != truth.argmax(axis=1)
        margins = np.abs(truth[:, 1] - truth[:, 0])[flipped]
        assert (margins <= 2 * np.abs(scores - truth).max()).all()
        assert flipped.mean() < 0.1
