"""Every field that the reference's configs have is honoured, refused, or shown to be harmless.

`reference_fields` reads the names from the installed transformers, so that a field that a later
version adds fails here until somebody has looked at what it changes.
"""

import contextlib
import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import redraw, redraw_qwen3_5
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    masking_utils,
)
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_5 import modeling_qwen3_5

from qwen_min.config import COMPUTED, LINEAR, QwenConfig
from qwen_min.errors import UserError
from qwen_min.files.weights import load_model

IDS = torch.arange(7, 71)[None]  # (1, 64): positions far enough apart for theta to matter
FULL, SLIDING = "full_attention", "sliding_attention"
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 96,
}
QWEN3 = QWEN2 | {"model_type": "qwen3", "head_dim": 16}
ROPE = {"rope_theta": 50.0, "rope_type": "default"}
QWEN3_5 = QWEN3 | {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
WITH_IMAGES = {  # of what stands outside, only the fields that are named in a case count
    "model_type": "qwen3_5",
    "tie_word_embeddings": ...,
    "text_config": QWEN3_5 | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2},
}
ALL_LAYERS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}

# Honoured: with these values, none of them the default, the reference's logits are the same.
HONOURED: dict[str, list[dict]] = {
    "model_type": [QWEN3, QWEN3_5, WITH_IMAGES],
    "text_config": [WITH_IMAGES | {"hidden_size": 8, "rope_theta": 7.0, "rms_norm_eps": 0.3}],
    "hidden_size": [{"hidden_size": 40}],
    "intermediate_size": [{"intermediate_size": 56}],
    "num_hidden_layers": [{"num_hidden_layers": 2}],
    "num_attention_heads": [{"num_attention_heads": 8}, QWEN3 | {"num_attention_heads": 2}],
    "num_key_value_heads": [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": None},  # one for each head
        {"num_key_value_heads": ..., "num_attention_heads": 64, "hidden_size": 128},  # 32
        QWEN3_5 | {"num_key_value_heads": ..., "num_attention_heads": 8},  # 4
    ],
    "head_dim": [
        {"head_dim": 24},
        QWEN3 | {"head_dim": 6},
        QWEN3 | {"head_dim": ...},
        QWEN3_5 | {"head_dim": ...},
    ],
    "vocab_size": [{"vocab_size": 131}],
    "rms_norm_eps": [changes | {"rms_norm_eps": 0.3} for changes in ({}, QWEN3, QWEN3_5)],
    "tie_word_embeddings": [{"tie_word_embeddings": False}, {"tie_word_embeddings": ...}],
    "attention_bias": [
        QWEN3 | {"attention_bias": True},
        QWEN3_5 | {"attention_bias": True},
        {"attention_bias": False},
    ],
    **{
        field: [QWEN3_5 | {field: value}, QWEN3_5 | {"linear_num_value_heads": 32, field: ...}]
        for field, value in {
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 20,
            "linear_value_head_dim": 6,
            "linear_conv_kernel_dim": 2,
        }.items()
    },
    "full_attention_interval": [
        QWEN3_5 | {"full_attention_interval": 2},
        QWEN3_5 | {"full_attention_interval": 1},
        QWEN3_5 | {"full_attention_interval": 2, "layer_types": [LINEAR, FULL, FULL, LINEAR]},
    ],
    "max_position_embeddings": [{"max_position_embeddings": 64}],
    "hidden_act": [{"hidden_act": "silu"}, {"hidden_act": "swish"}],
    "rope_theta": [{"rope_theta": 50.0}, {"rope_theta": 10**10}, QWEN3_5 | {"rope_theta": 50.0}],
    "rope_parameters": [
        {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 50.0}, "rope_theta": ...},
        {"rope_parameters": {"rope_type": "default", "factor": 4.0}},  # no scaling, so no factor
        {"rope_parameters": {}, "rope_scaling": None},
        QWEN3_5 | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
        # Sections for positions in images: those of a text are equal in all three.
        QWEN3_5
        | {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    ],
    "rope_scaling": [
        {"rope_scaling": {"type": "default"}, "rope_theta": 50.0},
        {"rope_scaling": {"type": "default", "rope_theta": 50.0}},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 50.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 50.0}},
    ],
    "partial_rotary_factor": [
        {"partial_rotary_factor": 1.0},
        *(QWEN3_5 | {"partial_rotary_factor": part} for part in (1, 0.5, 0.3, ...)),
    ],
    "use_sliding_window": [ALL_LAYERS | {"use_sliding_window": False}],
    "max_window_layers": [ALL_LAYERS | {"max_window_layers": 3}],
    "sliding_window": [ALL_LAYERS | {"sliding_window": None}],
    "layer_types": [
        {"layer_types": [FULL] * 3},
        ALL_LAYERS | {"layer_types": [FULL] * 3},  # it names the layers, so no window is used
        {"layer_types": None},
        QWEN3_5 | {"layer_types": [FULL, LINEAR, FULL, LINEAR]},
        QWEN3_5 | {"layer_types": [FULL] * 4},
        QWEN3_5 | ALL_LAYERS,  # it has no window
    ],
    "is_causal": [{"is_causal": True}],
    "per_layer_config": [{"per_layer_config": {}}],
    "dtype": [{"dtype": "bfloat16"}, {"dtype": "float16"}],
    "torch_dtype": [{"torch_dtype": "bfloat16"}, {"torch_dtype": None}],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# Refused: with these values the reference computes something else, or fails.
REFUSED: dict[str, list[dict]] = {
    "model_type": [{"model_type": kind} for kind in ("qwen2_moe", "qwen3_5_moe", "qwen3_next")],
    "text_config": [WITH_IMAGES | {"text_config": None}],
    "hidden_act": [{"hidden_act": "gelu"}, {"hidden_act": None}, {"hidden_act": "relu"}],
    "is_causal": [{"is_causal": False}, {"is_causal": None}, {"is_causal": 0}],
    "rope_scaling": [
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"factor": 1.0}},
        {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "default"}, "rope_theta": ..., "rope_parameters": {}},
        {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
        {"rope_scaling": "yarn"},
    ],
    "rope_parameters": [
        {"rope_parameters": YARN},
        {"rope_parameters": YARN, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {FULL: YARN}},
        {"rope_parameters": {FULL: {"rope_theta": 50.0}, SLIDING: {"rope_theta": 10.0}}},
        {"rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_theta": None}},
    ],
    "partial_rotary_factor": [
        {"partial_rotary_factor": 0.5},
        QWEN3_5 | {"partial_rotary_factor": None},
        QWEN3_5 | {"partial_rotary_factor": 0.3125},  # 5 of 16
    ],
    "full_attention_interval": [QWEN3_5 | {"full_attention_interval": -2}],
    "use_sliding_window": [ALL_LAYERS, QWEN3 | ALL_LAYERS],
    "sliding_window": [ALL_LAYERS | {"sliding_window": 0}],
    "max_window_layers": [ALL_LAYERS | {"max_window_layers": 2}],
    "layer_types": [
        ALL_LAYERS | {"layer_types": [FULL, FULL, SLIDING]},
        {"layer_types": [FULL, "chunked_attention", FULL]},
        {"layer_types": [FULL] * 2},
        {"layer_types": []},
        QWEN3_5 | {"layer_types": [LINEAR, LINEAR, LINEAR, SLIDING]},
        QWEN3_5 | {"layer_types": [LINEAR] * 3},
    ],
    "per_layer_config": [{"per_layer_config": {"1": {"rms_norm_eps": 0.3}}}],
    "auto_map": [{"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}],
    "attribute_map": [{"attribute_map": {"rms_norm_eps": "vocab_size"}}],
    "transformers_weights": [{"transformers_weights": "other.safetensors"}],
    "quantization_config": [{"quantization_config": {"quant_method": "gptq", "bits": 4}}],
    "num_experts": [{"num_experts": 8}],
    "num_local_experts": [{"num_local_experts": 8}],
    "dtype": [{"dtype": "float64"}, {"dtype": []}, {"dtype": "auto"}],
    "torch_dtype": [{"torch_dtype": "float8_e4m3fn"}, {"torch_dtype": {"": "bfloat16"}}],
}
# Harmless: the reference's logits are the same to the bit, for this reason.
HARMLESS: dict[str, tuple[object, str]] = {
    **dict.fromkeys(
        ["attention_dropout", "attention_chunk_size"],
        (0.5, "dropout is only in the reference's training, chunks only in layers of that type"),
    ),
    "initializer_range": (0.5, "the weights come from the file"),
    "pad_token_id": (5, "its embedding is zero only before training; the file holds what it is"),
    **dict.fromkeys(
        ["bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"],
        (5, "for generation, which stops by generation_config.json"),
    ),
    **dict.fromkeys(
        ["use_cache", "return_dict", "torchscript", "gradient_checkpointing", "use_bfloat16"],
        (True, "how it is computed or returned, not what"),
    ),
    **dict.fromkeys(["output_hidden_states", "output_attentions"], (True, "more is returned")),
    **dict.fromkeys(
        ["attn_implementation", "_attn_implementation", "experts_implementation"],
        ("eager", "another program for the same numbers"),
    ),
    "chunk_size_feed_forward": (1, "not read by Qwen"),
    **dict.fromkeys(
        ["is_decoder", "add_cross_attention", "tie_encoder_decoder", "is_encoder_decoder"],
        (True, "not read by Qwen's layers, which have no cross-attention"),
    ),
    "cross_attention_hidden_size": (8, "the same"),
    "pruned_heads": ({"0": [1]}, "the shapes of all tensors are checked"),
    "mlp_bias": (True, "not read by Qwen; a bias in the file is an unknown tensor"),
    "architectures": (["Qwen2Model"], "the class is chosen by model_type"),
    **dict.fromkeys(
        ["id2label", "label2id"],
        ({"0": "a", "1": "b", "2": "c"}, "the class names of a head that is not loaded"),
    ),
    "num_labels": (7, "the same"),
    "problem_type": ("regression", "the same"),
    **dict.fromkeys(
        ["finetuning_task", "task_specific_params", "tokenizer_class", "prefix"],
        ("x", "not about the forward pass"),
    ),
    **dict.fromkeys(
        ["name_or_path", "_name_or_path", "_commit_hash", "transformers_version"],
        ("4.0", "where the file is from"),
    ),
    "tf_legacy_loss": (True, "not PyTorch"),
    "default_theta": (7.0, "a theta is always required here"),
    **dict.fromkeys(
        ["vision_config", "image_token_id", "video_token_id", "vision_start_token_id"],
        (8, "for images"),
    ),
    "vision_end_token_id": (8, "for images"),
    "attn_output_gate": (False, "not read by Qwen3.5, which always has the gate"),
    "mtp_num_hidden_layers": (1, "heads that are not loaded"),
    "mamba_ssm_dtype": ("bfloat16", "the state is in fp32, whatever this says"),
    "an_unknown_field": ({"a": 1}, "kept as an attribute that nothing reads"),
}
ONLY_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 reads fewer fields"
)
NAMES_OF_CODE = {"self", "kwargs", "get_text_config"}  # not fields of a file
TEXT = re.compile("Qwen3_5(Text.*|RMSNorm.*|GatedDeltaNet|Attention|MLP|DecoderLayer|ForCausalLM)")


def reference_fields() -> set[str]:
    """The fields of the reference's configs, and all others that its forward pass reads."""
    names = set()
    configs = (Qwen2Config, Qwen3Config, Qwen3_5Config, Qwen3_5TextConfig)
    for cls in {parent for config in configs for parent in config.__mro__} - {object}:
        if dataclasses.is_dataclass(cls):  # transformers 5
            names |= {field.name for field in dataclasses.fields(cls)}
        for method in ("__init__", "__post_init__", "convert_rope_params_to_dict"):
            if function := cls.__dict__.get(method):
                names |= set(inspect.signature(function).parameters)
                with contextlib.suppress(OSError):  # generated code has no source
                    source = inspect.getsource(inspect.unwrap(function))
                    names |= set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', source))
    modules = [modeling_qwen2, modeling_qwen3, masking_utils]
    # Of Qwen3.5 only what is about text.
    modules += [part for name, part in vars(modeling_qwen3_5).items() if TEXT.fullmatch(name)]
    for module in modules:
        source = inspect.getsource(module)
        names |= set(re.findall(r'config(?:\.|, ")(\w+)', source))
    return names - NAMES_OF_CODE - {"args"}


def config_of(changes: dict) -> dict:
    """QWEN2 with `changes`; `...` takes a field away."""
    return {key: value for key, value in (QWEN2 | changes).items() if value is not ...}


def write(directory: Path, raw: dict) -> None:
    (directory / "config.json").write_text(json.dumps(raw))


def reference_logits(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(IDS, return_dict=True).logits


def write_weights(directory: Path) -> None:
    """Random weights, fp32, of the shapes that the reference gives to config.json."""
    config = AutoConfig.from_pretrained(directory)
    config = config.get_text_config()
    config.dtype = torch.float32
    draw = redraw_qwen3_5 if config.model_type == "qwen3_5_text" else redraw
    model = draw(AutoModelForCausalLM.from_config(config))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def cases(table: dict[str, list[dict]]) -> list:
    return [
        pytest.param(changes, id=f"{field} {number}")
        for field, several in table.items()
        for number, changes in enumerate(several)
    ]


def test_every_field_of_the_reference_is_in_a_table():
    found = reference_fields()
    assert len(found) > 40 and {"is_causal", "rope_scaling", "hidden_act"} <= found
    assert not found - HONOURED.keys() - REFUSED.keys() - HARMLESS.keys()
    assert REFUSED.keys() >= COMPUTED.keys()


@ONLY_5
@pytest.mark.parametrize("changes", cases(HONOURED))
def test_honoured(tmp_path, changes):
    write(tmp_path, config_of(changes))
    write_weights(tmp_path)
    write(tmp_path, config_of(changes))
    expected = reference_logits(tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head_weight.dtype == expected.dtype
    with torch.no_grad():
        found = model.logits(model(IDS))
    # Logits of size 10 to 100. fp32 sums in another order, three layers: a few 1e-5 at most. The
    # half formats: the same operations and casts in the same order, on the same kernels.
    tolerance = 2e-4 if expected.dtype == torch.float32 else 0
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("changes", cases(REFUSED))
def test_refused(tmp_path, changes):
    write(tmp_path, config_of(changes))
    with pytest.raises(UserError) as caught:
        QwenConfig.from_json(tmp_path / "config.json")
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path / "config.json") in str(caught.value)


@ONLY_5
@pytest.mark.parametrize("base", [QWEN2, QWEN3_5], ids=["qwen2", "qwen3_5"])
@pytest.mark.parametrize("field", HARMLESS)
def test_harmless(tmp_path, field, base):
    assert field not in base
    write(tmp_path, base)
    write_weights(tmp_path)
    write(tmp_path, base)
    own, expected = load_model(tmp_path), reference_logits(tmp_path)
    write(tmp_path, base | {field: HARMLESS[field][0]})
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(IDS), own(IDS))
    assert torch.equal(reference_logits(tmp_path), expected)
