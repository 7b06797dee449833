"""Small reference checkpoints, made on the fly with transformers, and a small tokenizer.

A freshly initialised model proves little: its biases are 0 and its norms 1, so that a forgotten
bias or norm would go unseen. Every parameter is drawn again.
"""

import json
import os
import signal
from pathlib import Path

import pytest

# Before any library reads them: tests never look for a hub, and say so if one tries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models this small gain nothing from a second thread, and lose much where another program runs.
# With several threads a forked process may crash or wait for ever.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3_5TextConfig, Qwen3Config

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "评论：房间很干净，服务员态度也好，下次还会来。\n情感倾向：正面",
    "评论：书的印刷很差，看了两页就头疼，不推荐！\n情感倾向：负面",
    "评论：电脑散热不好，但是屏幕不错。\n情感倾向：负面 好评 差评 正向 负向",
    "The quick brown fox jumps over the lazy dog, 12345 times; don't ask why.\n\n",
    "送餐慢了四十分钟，面都坨了……客服还说正常。 非常满意 不太满意 很不满意",
]


def make_tokenizer(directory: Path) -> None:
    """A byte-level BPE of about 500 tokens with Qwen2's pre-tokenizer and markup."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    markup = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in markup])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": "<|endoftext|>",
                "eos_token": "<|im_end|>",
            }
        )
    )


def redraw(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every parameter again: norms around 1, all else with a standard deviation of 0.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model


def redraw_qwen3_5(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter again, with a standard deviation of 0.1: norms around 0, which Qwen3.5 adds
    1 to, except those of the gated delta rule. Heads forget half of their state in 1 to 100 tokens.

    With 0.3, rounding in fp32 moves the logits of 8 layers by 1e-3, here and in the reference.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(torch.linspace(-5, 0, len(noise)) + 0.1 * noise)
            else:
                parameter.copy_((name.endswith("linear_attn.norm.weight")) + 0.1 * noise)
    return model


def make_reference(
    directory: Path, kind: str = "qwen2", tied: bool = True, shard: str = "5GB", **changes
) -> torch.nn.Module:
    """Save a tiny redrawn reference model with a tokenizer; return the model (fp32, eval)."""
    fields = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "attn_implementation": "eager",
    }
    kinds = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen3_5": Qwen3_5TextConfig}
    if kind != "qwen2":
        fields["head_dim"] = 16  # H · Dh = 64, not D = 32
    if kind == "qwen3_5":
        fields |= {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        fields |= {"linear_key_head_dim": 8, "linear_value_head_dim": 12}
    model = AutoModelForCausalLM.from_config(kinds[kind](**(fields | changes)))
    model = (redraw_qwen3_5 if kind == "qwen3_5" else redraw)(model).eval()
    model.save_pretrained(directory, max_shard_size=shard)
    make_tokenizer(directory)
    return model


def with_images(
    directory: Path, dtype: torch.dtype = torch.bfloat16, tied_outside: bool = False
) -> None:
    """Write a text-only Qwen3.5 again as Qwen3.5 is released: in a model of images and text, in
    bf16, but two kinds of tensors in fp32 with more digits than bf16 has."""
    path = directory / "config.json"
    text = json.loads(path.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    del text["architectures"]
    raw = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}
    raw |= {"text_config": text, "image_token_id": 500}
    raw["vision_config"] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    raw["tie_word_embeddings"] = text["tie_word_embeddings"]
    if tied_outside:  # and only there
        del text["tie_word_embeddings"]
    path.write_text(json.dumps(raw))
    tensors = {
        "model.visual.blocks.0.norm1.weight": torch.ones(16),
        "mtp.norm.weight": torch.ones(32),
    }
    for name, tensor in load_file(directory / "model.safetensors").items():
        name = name.replace("model.", "model.language_model.", 1)
        fp32 = name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))
        tensors[name] = tensor if fp32 else tensor.to(dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A tied Qwen2: its directory and the reference model."""
    directory = tmp_path_factory.mktemp("qwen2")
    return directory, make_reference(directory)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct for the tests marked `real`, made on first use."""
    from tests.real.make_checkpoint import ensure

    # Real weights are worth every core.
    torch.set_num_threads(os.cpu_count())
    return ensure("0.5b", "bfloat16")
