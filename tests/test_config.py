"""config.json: both styles mean the same; what would silently give wrong numbers is refused."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import make_reference
from transformers import AutoConfig, Qwen2Config, Qwen3_5TextConfig

from qwen_min.config import FULL, LINEAR, Qwen3_5Config, QwenConfig
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

# The text model of Qwen3.5-0.8B, and the whole: a model of images and text.
QWEN3_5_TEXT = {
    "attention_bias": False,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 6,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "tie_word_embeddings": True,
    "vocab_size": 248320,
}
QWEN3_5 = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5",
    "text_config": QWEN3_5_TEXT,
    "tie_word_embeddings": True,
    "vision_config": {"depth": 12, "hidden_size": 768, "model_type": "qwen3_5"},
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


def of_qwen3_5(directory: Path, raw: dict) -> Qwen3_5Config:
    config = QwenConfig.from_json(write(directory, raw))
    assert isinstance(config, Qwen3_5Config)
    return config


def with_images(raw: dict, **outside: object) -> dict:
    return without(QWEN3_5, "tie_word_embeddings") | {"text_config": raw} | outside


def test_every_field_of_qwen3_5(tmp_path):
    expected = Qwen3_5Config(
        model_type="qwen3_5_text",
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        vocab_size=248320,
        rms_norm_eps=1e-6,
        rope_theta=1e7,
        tie_word_embeddings=True,
        attention_bias=False,
        max_position_embeddings=262144,
        torch_dtype="bfloat16",
        partial_rotary_factor=0.25,
        layer_types=(LINEAR, LINEAR, LINEAR, FULL) * 6,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
    )
    assert of_qwen3_5(tmp_path, QWEN3_5) == of_qwen3_5(tmp_path, QWEN3_5_TEXT) == expected
    assert (expected.rotary_dim, expected.conv_channels) == (64, 6144)


def test_the_defaults_of_qwen3_5_are_the_references(tmp_path):
    needed = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"}
    bare = {key: QWEN3_5_TEXT[key] for key in (*needed, "num_attention_heads")}
    found = of_qwen3_5(tmp_path, bare | {"rope_theta": 1e7})
    reference = Qwen3_5TextConfig(**bare)
    assert found.partial_rotary_factor == reference.rope_parameters["partial_rotary_factor"]
    assert list(found.layer_types) == reference.layer_types
    names = ["num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"]
    names += ["attention_bias", "max_position_embeddings"]
    names += [name for name in Qwen3_5Config.__annotations__ if name.startswith("linear_")]
    for name in names:
        assert getattr(found, name) == getattr(reference, name), name


def test_what_stands_outside_text_config(tmp_path):
    """These two may; inside takes precedence, as in the reference's text model."""
    bare = without(QWEN3_5_TEXT, "tie_word_embeddings", "dtype")
    for tied in (True, False):
        outside = with_images(bare, tie_word_embeddings=tied, dtype="float16")
        found = of_qwen3_5(tmp_path, outside)
        assert (found.tie_word_embeddings, found.torch_dtype) == (tied, "float16")
        inside = with_images(QWEN3_5_TEXT, tie_word_embeddings=tied, dtype="float16")
        found = of_qwen3_5(tmp_path, inside)
        assert (found.tie_word_embeddings, found.torch_dtype) == (True, "bfloat16")
    assert of_qwen3_5(tmp_path, with_images(bare)).tie_word_embeddings is False
    # Sizes of the image model, or of anything else outside, do not count.
    assert of_qwen3_5(tmp_path, QWEN3_5 | {"hidden_size": 7, "rope_theta": 1.0}).hidden_size == 1024


@pytest.mark.parametrize("text", [..., None, [], "x", {}])
def test_a_model_of_images_without_its_text_model(tmp_path, text):
    raw = with_images(text) if text is not ... else without(QWEN3_5, "text_config")
    refused(write(tmp_path, raw), "hidden_size" if text == {} else "text_config")


def test_a_null_inside_does_not_hide_what_stands_outside(tmp_path):
    raw = with_images(QWEN3_5_TEXT | {"quantization_config": None}, quantization_config={"bits": 4})
    refused(write(tmp_path, raw), "quantization_config", "bits")


def test_where_the_rotated_part_is_said(tmp_path):
    """In rope_parameters, in rope_scaling, which replaces it, or at the top; the default is 1/4."""
    rope, bare = {"rope_theta": 1e7}, without(QWEN3_5_TEXT, "rope_parameters")
    half = {"partial_rotary_factor": 0.5}
    for raw, expected in [
        ({"rope_parameters": rope}, 64),
        ({"rope_parameters": rope | half}, 128),
        ({"rope_parameters": rope} | half, 128),
        ({"rope_parameters": rope | half, "partial_rotary_factor": 0.125}, 128),
        ({"rope_parameters": rope | half, "rope_scaling": {"type": "default"}, **rope}, 64),
        ({"rope_scaling": rope | half}, 128),
        ({"rope_parameters": rope, "partial_rotary_factor": 1}, 256),
    ]:
        assert of_qwen3_5(tmp_path, bare | raw).rotary_dim == expected, raw
        reference = AutoConfig.from_pretrained(tmp_path).rope_parameters
        assert reference["partial_rotary_factor"] * 256 == expected, raw


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"partial_rotary_factor": 5 / 256}, "rotate 5 of head_dim"),
        ({"partial_rotary_factor": 0.001}, "rotate 0 of head_dim"),
        ({"partial_rotary_factor": 2}, "rotate 512 of head_dim"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor is null"),
        ({"partial_rotary_factor": "1/4"}, "partial_rotary_factor is '1/4'"),
        ({"linear_num_value_heads": 24}, "linear_num_key_heads 16 does not divide 24"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0"),
        ({"linear_num_value_heads": 2**24, "linear_value_head_dim": 2**20}, "too large"),
        ({"linear_num_value_heads": 2**24, "linear_conv_kernel_dim": 2**31 - 1}, "too large"),
        ({"layer_types": [LINEAR] * 23}, "for each of 24 layers"),
        ({"layer_types": [LINEAR] * 23 + [{}]}, "for each of 24 layers"),
        ({"layer_types": LINEAR}, "for each of 24 layers"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval 0"),
        ({"layer_types": None, "full_attention_interval": -2}, "full_attention_interval -2"),
        ({"layer_types": None, "full_attention_interval": "4"}, "full_attention_interval '4'"),
        ({"layer_types": None, "num_hidden_layers": 2**31 - 1}, "2147483647 layers"),
    ],
)
def test_impossible_values_of_qwen3_5(tmp_path, changes, words):
    rope = {"rope_parameters": {"rope_theta": 1e7}}
    refused(write(tmp_path, QWEN3_5_TEXT | rope | changes), words)
    refused(write(tmp_path, with_images(QWEN3_5_TEXT | rope | changes)), words)


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
UNSUPPORTED = {
    "llama": (QWEN2 | {"model_type": "llama"}, "model_type", "'llama'", "qwen2, qwen3 or qwen3_5"),
    "qwen2_moe": (QWEN2 | {"model_type": "qwen2_moe"}, "model_type", "'qwen2_moe'", "dense"),
    "qwen3_moe": (QWEN3 | {"model_type": "qwen3_moe"}, "model_type", "'qwen3_moe'", "dense"),
    **{
        kind: (raw | {"model_type": kind}, "model_type", repr(kind), "dense")
        for kind in ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp", "qwen3_vl")
        for raw in (QWEN3_5, QWEN3_5_TEXT)
    },
    "qwen3_5, text of experts": (
        QWEN3_5 | {"text_config": QWEN3_5_TEXT | {"model_type": "qwen3_5_moe_text"}},
        "'qwen3_5_moe_text'",
    ),
    "qwen3_5, experts": (QWEN3_5_TEXT | {"num_experts": 256}, "mixture of experts"),
    "qwen3_5, quantised": (
        QWEN3_5 | {"quantization_config": {"quant_method": "fp8"}},
        "use unquantised ones",
    ),
    "qwen3_5, window": (
        QWEN3_5_TEXT | {"layer_types": [FULL] * 23 + ["sliding_attention"]},
        "layer_types",
        "linear_attention or full_attention for each of 24 layers",
    ),
    "qwen3_5, yarn": (
        QWEN3_5_TEXT | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7, **YARN}},
        "scaled RoPE",
    ),
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
    refused(write(tmp_path, QWEN3 | {"head_dim": 65}), "head_dim", "65", "even")
    refused(write(tmp_path, QWEN2 | {"hidden_size": 14 * 63}), "head_dim", "63", "even")
    refused(write(tmp_path, QWEN2 | {"hidden_size": 7}), "head_dim", "0")


def test_no_value_of_any_field_ends_in_a_traceback(tmp_path):
    values = [None, True, -1, 3, 1.5, math.nan, "x\ny", "default", [3], ["x"], {"a": [1]}]
    plain = style_5(QWEN3) | QWEN3 | {"num_experts": 0, "quantization_config": None}
    changes = [{field: value} for field in plain for value in values]
    new = QWEN3_5_TEXT | {"partial_rotary_factor": 0.25}
    changes += [new | {field: value} for field in new for value in values]
    changes += [QWEN3_5 | {field: value} for field in QWEN3_5 for value in values]
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
