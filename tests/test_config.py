"""config.json: both styles mean the same; what would silently give wrong numbers is refused."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import make_reference
from transformers import AutoConfig, Qwen2Config

from qwen_min.config import QwenConfig
from qwen_min.errors import UserError
from qwen_min.files.weights import load_model

# Qwen2.5-0.5B and Qwen3-0.6B as transformers 4 writes them.
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}


def without(raw: dict, *keys: str) -> dict:
    return {key: value for key, value in raw.items() if key not in keys}


def style_5(raw: dict) -> dict:
    """A transformers-4 config as transformers 5 writes it."""
    return without(raw, "rope_theta", "rope_scaling", "torch_dtype") | {
        "dtype": raw["torch_dtype"],
        "layer_types": ["full_attention"] * raw["num_hidden_layers"],
        "rope_parameters": {"rope_theta": raw["rope_theta"], "rope_type": "default"},
    }


def write(directory: Path, raw: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(raw))
    return path


def refused(path: Path, *words: str) -> None:
    """from_json raises one line that holds the path and every one of `words`."""
    with pytest.raises(UserError) as caught:
        QwenConfig.from_json(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in (str(path), *words):
        assert word in message


# ---- reading -------------------------------------------------------------------------------------


def test_every_field_of_qwen2(tmp_path):
    assert QwenConfig.from_json(write(tmp_path, QWEN2)) == QwenConfig(
        model_type="qwen2",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        attention_bias=True,
        max_position_embeddings=32768,
        torch_dtype="bfloat16",
    )


@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_both_styles_give_the_same_config(tmp_path, raw):
    four = QwenConfig.from_json(write(tmp_path, raw))
    five = QwenConfig.from_json(write(tmp_path, style_5(raw)))
    assert four == five
    assert (five.rope_theta, five.torch_dtype) == (1e6, "bfloat16")


@pytest.mark.parametrize("style", [dict, style_5], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_agrees_with_transformers(tmp_path, raw, style):
    config = QwenConfig.from_json(write(tmp_path, style(raw)))
    # The reference reads its own style, and older ones; not every version reads newer ones.
    write(tmp_path, raw)
    reference = AutoConfig.from_pretrained(tmp_path)
    for name in [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
    ]:
        assert getattr(config, name) == getattr(reference, name), name
    nested = getattr(reference, "rope_parameters", None) or {}
    assert config.rope_theta == nested.get("rope_theta", getattr(reference, "rope_theta", None))
    default = reference.hidden_size // reference.num_attention_heads
    assert config.head_dim == getattr(reference, "head_dim", default)


def test_head_dim(tmp_path):
    def head_dim(raw: dict) -> int:
        return QwenConfig.from_json(write(tmp_path, raw)).head_dim

    assert head_dim(QWEN3 | {"head_dim": 96}) == 96
    # Qwen3's default is 128 however wide the model: D / H would be 64 here.
    assert head_dim(without(QWEN3, "head_dim")) == 128
    assert head_dim(QWEN2) == 64  # D / H
    assert head_dim(QWEN2 | {"head_dim": 32}) == 32
    assert head_dim(QWEN2 | {"head_dim": None}) == 64


def test_attention_bias_is_declared_by_qwen3_alone(tmp_path):
    def bias(raw: dict) -> bool:
        return QwenConfig.from_json(write(tmp_path, raw)).attention_bias

    assert not bias(QWEN3) and not bias(without(QWEN3, "attention_bias"))
    assert bias(QWEN3 | {"attention_bias": True})
    # The reference's Qwen2 has the bias built in and never looks at the field.
    assert bias(QWEN2) and bias(QWEN2 | {"attention_bias": False})


def test_qk_norm_is_qwen3s(tmp_path):
    assert not QwenConfig.from_json(write(tmp_path, QWEN2)).has_qk_norm
    assert QwenConfig.from_json(write(tmp_path, QWEN3)).has_qk_norm


def test_defaults(tmp_path):
    needed = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_theta"}
    needed |= {"num_attention_heads", "vocab_size"}
    bare = without(QWEN2, *(QWEN2.keys() - needed)) | {"num_attention_heads": 64}
    config = QwenConfig.from_json(write(tmp_path, bare))
    assert config.num_key_value_heads == Qwen2Config().num_key_value_heads == 32
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 32768)
    assert config.tie_word_embeddings is False
    assert config.torch_dtype is None


def test_nested_rope_theta_takes_precedence(tmp_path):
    """As in transformers 5: a top-level rope_theta is then a leftover."""
    raw = style_5(QWEN2) | {"rope_theta": 10000.0}
    assert QwenConfig.from_json(write(tmp_path, raw)).rope_theta == 1e6


# ---- both styles, down to the logits -------------------------------------------------------------

IDS = torch.arange(7, 71)[None]  # (1, 64): positions far enough apart for theta to matter


@pytest.fixture(scope="module")
def theta_1e6(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A tiny Qwen2 with Qwen's usual theta: its directory and the reference's logits."""
    directory = tmp_path_factory.mktemp("theta")
    with torch.no_grad():
        return directory, make_reference(directory, rope_theta=1e6)(IDS).logits


def tiny(theta: float) -> dict:
    """The config of `make_reference`'s Qwen2 in transformers-4 style."""
    return QWEN2 | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 2048,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "rope_theta": theta,
        "torch_dtype": "float32",
        "vocab_size": 512,
    }


def logits(directory: Path, raw: dict) -> torch.Tensor:
    write(directory, raw)
    model = load_model(directory)
    return model.logits(model(IDS))


def test_both_styles_give_the_references_logits(theta_1e6):
    directory, expected = theta_1e6
    four = logits(directory, tiny(1e6))
    five = logits(directory, style_5(tiny(1e6)))
    assert torch.equal(four, five)
    # Logits lie between -10 and 10; fp32 sums in another order differ by a few 1e-6.
    assert (four - expected).abs().max() < 5e-5


@pytest.mark.parametrize("style", [dict, style_5], ids=["transformers 4", "transformers 5"])
def test_another_theta_gives_other_logits(theta_1e6, style):
    directory, expected = theta_1e6
    # Not a tolerance: rotation by other angles moves logits of size 1 by about as much.
    assert (logits(directory, style(tiny(1e4))) - expected).abs().max() > 0.1


# ---- refused by name -----------------------------------------------------------------------------

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
SLIDING = ["full_attention"] * 23 + ["sliding_attention"]
QWEN35 = {  # a model of images and text: the fields of the text part stand one level down
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": style_5(QWEN3) | {"model_type": "qwen3_5_text", "full_attention_interval": 4},
    "vision_config": {"depth": 12},
}
UNSUPPORTED = {
    "llama": (QWEN2 | {"model_type": "llama"}, "model_type", "'llama'", "qwen2 or qwen3"),
    "qwen2_moe": (QWEN2 | {"model_type": "qwen2_moe"}, "model_type", "'qwen2_moe'", "dense"),
    "qwen3_moe": (QWEN3 | {"model_type": "qwen3_moe"}, "model_type", "'qwen3_moe'", "dense"),
    "qwen3.5": (QWEN35, "model_type", "'qwen3_5'"),
    "qwen3.5 text": (QWEN35["text_config"], "model_type", "'qwen3_5_text'"),
    "no model_type": (without(QWEN2, "model_type"), "model_type", "None"),
    "model_type a list": (QWEN2 | {"model_type": ["qwen2"]}, "model_type"),
    "experts": (QWEN3 | {"num_experts": 128}, "mixture of experts"),
    "local experts": (QWEN3 | {"num_local_experts": 8}, "mixture of experts"),
    "activation": (QWEN2 | {"hidden_act": "gelu"}, "hidden_act", "'gelu'", "'silu'"),
    "window": (QWEN2 | {"use_sliding_window": True}, "sliding-window"),
    "window, last layer": (
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 23},
        "sliding-window",
    ),
    "window, style 5": (style_5(QWEN2) | {"layer_types": SLIDING}, "sliding-window"),
    "window, no bound": (
        without(QWEN2, "max_window_layers") | {"use_sliding_window": True},
        "sliding-window",
    ),
    "yarn": (QWEN2 | {"rope_scaling": {"type": "yarn", **YARN}}, "scaled RoPE", "yarn"),
    "yarn, rope_type": (
        QWEN2 | {"rope_scaling": {"rope_type": "yarn", **YARN}},
        "scaled RoPE",
        "yarn",
    ),
    "linear": (
        QWEN2 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "scaled RoPE",
        "linear",
    ),
    "yarn, style 5": (
        style_5(QWEN2) | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
        "scaled RoPE",
        "yarn",
    ),
    # Qwen's model cards tell to add rope_scaling for long texts; the file may be in either style.
    "yarn added to style 5": (
        style_5(QWEN2) | {"rope_scaling": {"type": "yarn", **YARN}},
        "scaled RoPE",
        "yarn",
    ),
    "a theta per kind of layer": (
        style_5(QWEN2)
        | {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
        "rope_theta",
    ),
    "quantised": (
        QWEN2 | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantised",
        "use unquantised ones",
    ),
}


@pytest.mark.parametrize("raw, words", [(r, w) for r, *w in UNSUPPORTED.values()], ids=UNSUPPORTED)
def test_unsupported_is_refused_by_name(tmp_path, raw, words):
    refused(write(tmp_path, raw), *words)


@pytest.mark.parametrize(
    "raw",
    [
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 24},
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 28},
        QWEN2 | {"sliding_window": 4096, "max_window_layers": 0},  # declared, not in use
        style_5(QWEN2) | {"use_sliding_window": True, "max_window_layers": 24},
        QWEN2 | {"rope_scaling": {"type": "default"}},
        style_5(QWEN2) | {"rope_parameters": {"rope_theta": 1e6}},
        QWEN3 | {"num_experts": None, "quantization_config": None},
    ],
)
def test_declared_but_not_in_use_is_accepted(tmp_path, raw):
    assert QwenConfig.from_json(write(tmp_path, raw)).rope_theta == 1e6


# ---- impossible values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"],
)
def test_missing_field(tmp_path, field):
    refused(write(tmp_path, without(QWEN2, field)), field, "expected a positive int")


@pytest.mark.parametrize("value", [0, -1, 2.5, "14", True, [14], math.nan, math.inf])
@pytest.mark.parametrize("field", ["hidden_size", "num_key_value_heads", "head_dim", "vocab_size"])
def test_impossible_whole_number(tmp_path, field, value):
    refused(write(tmp_path, QWEN2 | {field: value}), field, repr(value), "expected a positive int")


@pytest.mark.parametrize("value", [0, -1e-6, "1e-6", True, {}, math.nan, math.inf])
@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
def test_impossible_number(tmp_path, field, value):
    raw = QWEN2 | {field: value}
    refused(write(tmp_path, raw), field, repr(value), "expected a positive float")
    if field == "rope_theta":
        refused(write(tmp_path, style_5(raw)), field, repr(value), "expected a positive float")


def test_a_whole_number_will_do_for_a_float(tmp_path):
    theta = QwenConfig.from_json(write(tmp_path, QWEN2 | {"rope_theta": 1000000})).rope_theta
    assert theta == 1e6 and isinstance(theta, float)


@pytest.mark.parametrize("value", [2**31, 2**63, 10**30, 10**400])
@pytest.mark.parametrize(
    "field", ["hidden_size", "num_attention_heads", "head_dim", "vocab_size", "num_hidden_layers"]
)
def test_sizes_that_no_model_has(tmp_path, field, value):
    refused(write(tmp_path, QWEN2 | {field: value}), field, "below 2^31")


def test_a_matrix_that_no_model_has(tmp_path):
    """Each size alone is possible; the bytes of their product are more than an int64 counts."""
    largest = 2**31 - 2
    sizes = {"hidden_size": largest, "head_dim": largest, "vocab_size": largest}
    refused(write(tmp_path, QWEN2 | sizes), "too large")
    refused(write(tmp_path, QWEN2 | {"hidden_size": 14 * 2**26}), "too large")


def test_a_theta_beyond_floats(tmp_path):
    refused(write(tmp_path, QWEN2 | {"rope_theta": 10**400}), "rope_theta", "a positive float")


@pytest.mark.parametrize("value", ["false", 1, []])
@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias"])
def test_a_flag_is_true_or_false(tmp_path, field, value):
    """A quoted "false" counts as true in Python; a tied head would then replace the real one."""
    refused(write(tmp_path, QWEN3 | {field: value}), field, repr(value), "true or false")


def test_theta_has_no_default(tmp_path):
    """The reference would take 10000. Qwen's is 1000000, and every Qwen checkpoint gives it."""
    refused(write(tmp_path, without(QWEN2, "rope_theta")), "rope_theta", "None")
    refused(write(tmp_path, without(style_5(QWEN2), "rope_parameters")), "rope_theta", "None")


def test_heads_that_do_not_fit(tmp_path):
    refused(write(tmp_path, QWEN2 | {"num_key_value_heads": 4}), "14", "num_key_value_heads", "4")
    refused(write(tmp_path, QWEN3 | {"head_dim": 65}), "head_dim", "65", "odd")
    refused(write(tmp_path, QWEN2 | {"hidden_size": 14 * 63}), "head_dim", "63", "odd")
    refused(write(tmp_path, QWEN2 | {"hidden_size": 7}), "head_dim", "0")


def test_no_value_of_any_field_ends_in_a_traceback(tmp_path):
    values = [None, True, -1, 3, 1.5, math.nan, "x\ny", "default", [3], ["x"], {"a": [1]}]
    plain = style_5(QWEN3) | QWEN3 | {"num_experts": 0, "quantization_config": None}
    changes = [{field: value} for field in plain for value in values]
    changes += [
        {"use_sliding_window": True, field: value}
        for field in ("max_window_layers", "num_hidden_layers", "layer_types")
        for value in values
    ]
    for change in changes:
        path = write(tmp_path, plain | change)
        try:
            QwenConfig.from_json(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1, change


# ---- the file ------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    refused(tmp_path / "config.json", "no such file", "expected config.json, tokenizer.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"model_type": "qwen2",}', b"version https://git-lfs", b'{"a": "\xff"}'],
    ids=["empty", "cut off", "trailing comma", "not JSON", "not UTF-8"],
)
def test_broken_json(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    refused(path, "cannot be read as JSON", "fetch it again")


@pytest.mark.parametrize("raw", [[], "qwen2", 2, None, [QWEN2]])
def test_not_an_object(tmp_path, raw):
    refused(write(tmp_path, raw), type(raw).__name__, "expected a JSON object")


def test_a_directory_in_its_place(tmp_path):
    (tmp_path / "config.json").mkdir()
    refused(tmp_path / "config.json", "cannot be read")


def test_a_pipe_in_its_place(tmp_path):
    """Nobody writes into it: opening it would block forever."""
    os.mkfifo(tmp_path / "config.json")
    refused(tmp_path / "config.json", "cannot be read", "regular file")


def test_a_device_in_its_place(tmp_path):
    (tmp_path / "config.json").symlink_to("/dev/zero")
    refused(tmp_path / "config.json", "cannot be read", "regular file")


def test_a_file_without_end(tmp_path):
    path = write(tmp_path, QWEN2)
    os.truncate(path, 2**40)  # sparse: it takes no room on the disk
    refused(path, "cannot be read", "16 MB")


@pytest.mark.parametrize("depth", [200, 900, 10**5])
def test_deep_nesting(tmp_path, depth):
    for field in ("rope_scaling", "hidden_act", "hidden_size", "model_type"):
        value = "[" * depth + "]" * depth
        text = json.dumps(QWEN2 | {field: "HERE"}).replace('"HERE"', value)
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path / "config.json")
