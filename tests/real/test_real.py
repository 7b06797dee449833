"""Real Qwen2.5 weights against transformers: logits, label scores, generation.

The checkpoint is made from packages on first use (about a minute). For exact comparisons its
bfloat16 values are loaded as fp32, so that both programs compute with the same numbers.
"""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_min.fast.generation import generate_answers
from qwen_min.fast.label_scores import score_labels
from qwen_min.fast.layout import Text, pack
from qwen_min.fast.packed import forward_packed
from qwen_min.files.data import read_examples
from qwen_min.files.weights import load_model
from qwen_min.lab.chat import QWEN25_SYSTEM, ChatFormat, read_chat_format, wrap_template
from qwen_min.lab.explain import label_positions
from qwen_min.prompt import DEFAULT_TEMPLATE, Prompt, build_prompts
from qwen_min.scoring import score_label
from qwen_min.tokenizer import Tokenizer
from tests import parity

pytestmark = pytest.mark.real
SAMPLE = Path(__file__).parents[2] / "qwen_min" / "sample" / "test.tsv"


@pytest.fixture(scope="module")
def fp32(checkpoint):
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    yield load_model(checkpoint, "float32"), reference.eval()
    del reference
    gc.collect()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [example.text for example in read_examples(SAMPLE, ["0", "1"], limit=40)]


@torch.no_grad()
def reference_score(reference, prompt: tuple[int, ...], label: tuple[int, ...]) -> float:
    logits = reference(torch.tensor([[*prompt, *label]])).logits[0].double()
    log_probs = logits.log_softmax(dim=-1)
    return sum(log_probs[len(prompt) - 1 + t, token].item() for t, token in enumerate(label))


def test_tokens_equal_transformers(checkpoint, texts):
    ours, theirs = Tokenizer(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    for text in texts:
        prompt = DEFAULT_TEMPLATE.replace("{text}", text)
        assert ours.encode(prompt) == theirs(prompt)["input_ids"]


def test_parity(checkpoint, texts):
    """Each module, logits, label scores and greedy tokens, in float32 and bfloat16."""
    assert parity.main(["--model", str(checkpoint), *(f"--text={text}" for text in texts[:3])]) == 0


@pytest.mark.parametrize(
    "labels", [("负面", "正面"), ("负向", "正向"), ("不太满意", "非常满意", "满意")]
)
def test_label_scores_fp32(checkpoint, fp32, texts, labels):
    ours, reference = fp32
    prompts = build_prompts(Tokenizer(checkpoint), texts, labels=labels)
    scores = score_labels(ours, prompts)
    rows = range(40) if labels == ("负面", "正面") else range(0, 40, 8)
    for row in rows:
        ids, words = prompts[row].ids, prompts[row].labels
        expected = [reference_score(reference, ids, word) for word in words]
        np.testing.assert_allclose(scores[row], expected, atol=1e-4, rtol=0)
    definition = [score_label(ours, prompts[0].ids, word) for word in prompts[0].labels]
    np.testing.assert_allclose(scores[0], definition, atol=5e-5, rtol=0)


def test_batches_fp32(checkpoint, fp32, texts):
    ours, _ = fp32
    prompts = build_prompts(Tokenizer(checkpoint), texts[:12], labels=("负向", "正向"))
    whole = score_labels(ours, prompts)
    for budget in (1, 300):
        scores = score_labels(ours, prompts, budget)
        np.testing.assert_allclose(scores, whole, atol=5e-5, rtol=0)
        clear = np.abs(whole[:, 1] - whole[:, 0]) > 1e-4
        assert (scores.argmax(axis=1) == whole.argmax(axis=1))[clear].all()


def test_generation_fp32(checkpoint, fp32, texts):
    ours, reference = fp32
    tokenizer = Tokenizer(checkpoint)
    prompts = [tokenizer.encode(DEFAULT_TEMPLATE.replace("{text}", text)) for text in texts[:3]]
    rows = [Prompt(tuple(ids), (), False) for ids in prompts]
    found = generate_answers(ours, rows, 20, (), 10**6)
    for prompt, new in zip(prompts, found, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=151643,
        )
        assert new == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("system", [None, "", "只回答一个词。"])
def test_chat_equals_the_checkpoints_own_template(checkpoint, texts, system):
    ours, theirs = Tokenizer(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    chat = read_chat_format(checkpoint, "qwen2")
    template = wrap_template(DEFAULT_TEMPLATE, chat, ours.markup, system)
    by_hand = ChatFormat(QWEN25_SYSTEM, empty_thoughts=False)
    assert template == wrap_template(DEFAULT_TEMPLATE, by_hand, ours.markup, system)
    for text, prompt in zip(texts, build_prompts(ours, texts, template), strict=True):
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": "user", "content": DEFAULT_TEMPLATE.replace("{text}", text)}]
        expected = theirs.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert list(prompt.ids) == list(expected)


def test_what_explain_adds_up_is_the_score(checkpoint, fp32, texts):
    ours, _ = fp32
    prompts = build_prompts(Tokenizer(checkpoint), texts[:3], labels=("负向", "正面"))
    for prompt, scores in zip(prompts, score_labels(ours, prompts), strict=True):
        for ids, score in zip(prompt.labels, scores, strict=True):
            positions = label_positions(ours, prompt.ids, ids)
            assert sum(p.log_p for p in positions) == pytest.approx(score, abs=5e-5)


@torch.no_grad()
def test_logits_bf16(checkpoint, texts):
    """In bf16 (8 significant bits) two correct programs differ by rounding in each of 24 layers. So
    the bound is the error of transformers in bf16, compared with fp32."""
    tokenizer = Tokenizer(checkpoint)
    exact, ours = load_model(checkpoint, "float32"), load_model(checkpoint, "bfloat16")
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="eager"
    )
    errors = []
    for text in texts[:6]:
        ids = torch.tensor([tokenizer.encode(text)])
        truth = exact.logits(exact(ids))[0]
        packed, _ = forward_packed(ours, pack(ours, [Text(ids[0])]))
        candidates = (reference(ids).logits[0].float(), ours.logits(ours(ids))[0])
        candidates = (*candidates, ours.logits(packed))
        errors.append([(found - truth).square().mean().sqrt().item() for found in candidates])
    theirs, definition, packed = np.mean(errors, axis=0)
    assert definition < 1.1 * theirs
    assert packed < 1.1 * theirs
