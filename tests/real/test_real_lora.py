"""LoRA on real Qwen2.5 weights against PEFT, both ways, in fp32."""

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lora import ATTENTION, LoRAConfig, inject_lora, load_adapter, lora_parameters, save_adapter
from qwen_min.fast.features import pooled_features
from qwen_min.fast.label_scores import score_labels
from qwen_min.files.data import read_examples
from qwen_min.files.weights import load_model
from qwen_min.prompt import Prompt, build_prompts
from qwen_min.tokenizer import Tokenizer
from tests.real.test_real import SAMPLE, reference_score

pytestmark = pytest.mark.real
# fp32 rounding in another order over 24 layers: the same tolerance as for scores without LoRA.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def prompts(checkpoint) -> list[Prompt]:
    texts = [example.text for example in read_examples(SAMPLE, ["0", "1"], limit=6)]
    return build_prompts(Tokenizer(checkpoint), texts, labels=("负向", "正向"))


def draw(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Set A and B to values that clearly change the outputs (B starts at zero)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def test_peft_scores_labels_with_our_adapter(checkpoint, prompts, tmp_path):
    model = load_model(checkpoint, "float32")
    plain = score_labels(model, prompts)
    inject_lora(model, ATTENTION, 8, 16.0, 0.0)
    draw(lora_parameters(model))
    config = LoRAConfig(8, 16.0, 0.0, ATTENTION, False, "CAUSAL_LM", str(checkpoint))
    save_adapter(tmp_path, model, config)
    ours = score_labels(model, prompts)
    assert np.abs(ours - plain).max() > 0.1
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    reference = peft.PeftModel.from_pretrained(reference, tmp_path).eval()
    for row, prompt in enumerate(prompts):
        expected = [reference_score(reference, prompt.ids, label) for label in prompt.labels]
        np.testing.assert_allclose(ours[row], expected, atol=TOLERANCE, rtol=0)


def test_peft_classifies_with_our_adapter_and_head(checkpoint, prompts, tmp_path):
    model = load_model(checkpoint, "float32")
    inject_lora(model, ATTENTION, 8, 16.0, 0.0)
    draw(lora_parameters(model))
    head = torch.randn(2, 896, generator=torch.Generator().manual_seed(1)) * 0.02
    config = LoRAConfig(8, 16.0, 0.0, ATTENTION, False, "SEQ_CLS", str(checkpoint))
    save_adapter(tmp_path, model, config, head)
    ours = pooled_features(model, prompts, "last", False, 2048)[:, 0] @ head.T
    reference = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, dtype=torch.float32, num_labels=2, pad_token_id=151643
    )
    reference = peft.PeftModel.from_pretrained(reference, tmp_path).eval()
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = reference(torch.tensor([prompt.ids])).logits[0]
        torch.testing.assert_close(ours[row], expected, atol=TOLERANCE, rtol=0)


def test_we_score_labels_with_an_adapter_of_peft(checkpoint, prompts, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    reference = peft.get_peft_model(reference, config).eval()
    draw({name: p for name, p in reference.named_parameters() if "lora_" in name})
    reference.save_pretrained(tmp_path)
    model = load_model(checkpoint, "float32")
    load_adapter(tmp_path, model)
    ours = score_labels(model, prompts)
    for row, prompt in enumerate(prompts):
        expected = [reference_score(reference, prompt.ids, label) for label in prompt.labels]
        np.testing.assert_allclose(ours[row], expected, atol=TOLERANCE, rtol=0)
