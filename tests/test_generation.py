"""Greedy decoding: both forms against transformers' generate."""

import numpy as np
import pytest
import torch
from conftest import make_reference

from qwen_min.generation import greedy, greedy_cached
from qwen_min.loading import load_model


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
    assert greedy_cached(ours, prompts, 12) == expected


def test_a_text_ends_at_its_stop_token_and_the_others_go_on(reference):
    ours = load_model(reference[0])
    prompts = [[5, 6, 7], [100, 200], [42]]
    whole = greedy_cached(ours, prompts, 8)
    stop = {whole[1][3]}  # the second text ends at its fourth token at the latest
    expected = [new[: next((i for i, t in enumerate(new) if t in stop), len(new))] for new in whole]
    assert len(expected[1]) <= 3
    assert greedy_cached(ours, prompts, 8, stop) == expected
    assert [greedy(ours, p, 8, stop) for p in prompts] == expected
