"""Read config.json and check it. A feature that this implementation cannot compute is an error.

The forward pass needs only the fields of `QwenConfig` (and of `Qwen3_5Config`); all else checks.
"""

import json
import math
import reprlib
from dataclasses import dataclass, fields
from pathlib import Path

from qwen_min.errors import UserError

# Qwen1.5, Qwen2 and Qwen2.5 all declare "qwen2": their structure is the same. Qwen3.5, 3.6 and 3.8
# also read images as released: then model_type is "qwen3_5", and text_config is the text model.
QWEN3_5, WITH_IMAGES = "qwen3_5_text", "qwen3_5"
MODEL_TYPES = ("qwen2", "qwen3", QWEN3_5)
LINEAR, FULL = "linear_attention", "full_attention"  # the layer_types that are computed here
NAMES = ("float32", "bfloat16", "float16")
# Fields that change what the reference computes: the values that are computed here, and advice.
COMPUTED = {
    "hidden_act": (("silu", "swish"), "use a checkpoint with SiLU"),  # two names of one function
    # False and null: tokens also see what comes after them.
    "is_causal": ((True,), "attention is causal here; use a causal language model"),
    "per_layer_config": ((None, {}), "layers have no settings of their own; use such a checkpoint"),
    "num_experts": ((None, 0), "mixture of experts is not supported; use a dense Qwen"),
    "num_local_experts": ((None, 0), "mixture of experts is not supported; use a dense Qwen"),
    "quantization_config": ((None, {}), "quantised weights do not load; use unquantised ones"),
    "auto_map": ((None, {}), "code from a checkpoint is not run; use a checkpoint without its own"),
    "attribute_map": ((None, {}), "fields have no other names here; rename them in the file"),
    "transformers_weights": ((None,), "weights are read from model.safetensors or its shards"),
    "dtype": ((*NAMES, None), "use a checkpoint saved in one of them"),
    "torch_dtype": ((*NAMES, None), "use a checkpoint saved in one of them"),
}


@dataclass(frozen=True, kw_only=True)
class QwenConfig:
    """The fields of config.json that the forward pass needs, under the names they have there.

    The defaults are those of the reference, for a file without the field.
    """

    model_type: str
    hidden_size: int  # D
    intermediate_size: int  # I
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int = 32  # K; H / K query heads share one key/value head
    head_dim: int  # Dh; not always D / H (Qwen3-0.6B: D = 1024, H = 16, Dh = 128)
    vocab_size: int  # V; the tokenizer's size, rounded up for the hardware
    rms_norm_eps: float = 1e-6
    rope_theta: float
    tie_word_embeddings: bool = False  # the LM head is the token embedding
    attention_bias: bool = False  # on q, k and v; Qwen2 always has it, and never one on o
    max_position_embeddings: int = 32768  # in tokens
    torch_dtype: str | None = None  # the dtype to compute in, if the file says it

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys go through an RMSNorm over Dh before RoPE: from Qwen3 on."""
        return self.model_type != "qwen2"

    @property
    def rotary_dim(self) -> int:
        """How many components of each query and key RoPE rotates: all Dh."""
        return self.head_dim

    @classmethod
    def from_json(cls, path: str | Path) -> "QwenConfig":
        """Read config.json as written by transformers 4 or 5; a `Qwen3_5Config` for Qwen3.5.

        Raises UserError for a missing or malformed file, a missing field, an impossible value, and
        every feature that would load and then give wrong numbers: those in COMPUTED, another
        architecture, a sliding window in use, scaled RoPE.
        """
        path = Path(path)
        try:
            # A pipe or a device would block, or never end.
            if path.exists() and not (path.is_file() and path.stat().st_size < 2**24):
                raise OSError("expected a regular file below 16 MB")
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            expected = "expected config.json, tokenizer.json, weights"
            raise UserError(f"{path}: no such file; {expected}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error}); fetch it again") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path}: holds {type(raw).__name__}, expected a JSON object")
        raw = text_fields(raw)
        if reason := _unsupported(raw):
            raise UserError(f"{path}: {reason}")
        if raw.get("num_key_value_heads", 32) is None:  # as in the reference: one for each head
            raw["num_key_value_heads"] = raw.get("num_attention_heads")
        raw = {key: value for key, value in raw.items() if value is not None}
        model_type = raw["model_type"]
        kind = Qwen3_5Config if model_type == QWEN3_5 else QwenConfig
        types = {f.name: f.type for f in fields(kind) if f.type in (int, float, bool)}

        def field(key: str) -> float:
            value = raw.get(key, getattr(kind, key, None))
            if types[key] is float and type(value) is int and abs(value) < 2**63:
                value = float(value)
            # Python's json also accepts Infinity and NaN as numbers.
            whole = types[key] is int
            limit, bound = (2**31, " below 2^31") if whole else (math.inf, "")
            if type(value) is not types[key] or not (types[key] is bool or 0 < value < limit):
                expected = f"a positive {types[key].__name__}{bound}"
                expected = "true or false" if types[key] is bool else expected
                raise UserError(f"{path}: {key} is {reprlib.repr(value)}, expected {expected}")
            return value

        if model_type == "qwen2":  # it has the bias without declaring it
            raw["attention_bias"] = True
            raw.setdefault("head_dim", field("hidden_size") // field("num_attention_heads"))
        if model_type == "qwen3":  # as in the reference, whatever D / H is
            raw.setdefault("head_dim", 128)
        # As in the reference: rope_scaling replaces rope_parameters, and what either says takes
        # precedence over the top level.
        raw |= raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        found = {key: field(key) for key in types}
        if kind is Qwen3_5Config:
            found["layer_types"] = _layer_types(path, raw)
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        config = kind(model_type=model_type, torch_dtype=dtype, **found)
        if problem := config.problem():
            raise UserError(f"{path}: {problem}")
        return config

    def problem(self) -> str | None:
        """What makes these sizes impossible together, if anything does."""
        heads, kv_heads, part = self.num_attention_heads, self.num_key_value_heads, self.rotary_dim
        if heads % kv_heads:
            return f"num_key_value_heads {kv_heads} does not divide {heads} heads"
        if part % 2 or not 0 < part <= self.head_dim:
            found = f"RoPE would rotate {part} of head_dim {self.head_dim}"
            return f"{found}; expected an even number from 2 to {self.head_dim}"
        widest = max(heads * self.head_dim, self.intermediate_size, self.vocab_size)
        if widest * self.hidden_size >= 2**48:  # the size of a matrix is an int64, in bytes
            return f"a matrix of {widest} rows is too large; check its sizes"
        return None


@dataclass(frozen=True, kw_only=True)
class Qwen3_5Config(QwenConfig):
    """Qwen3.5 has the gated delta rule in most layers, and in the others attention with a gate."""

    num_key_value_heads: int = 4
    head_dim: int = 256
    partial_rotary_factor: float = 0.25  # of each head's components, the first ones, RoPE rotates
    layer_types: tuple[str, ...]  # of each layer: LINEAR, the gated delta rule, or FULL
    linear_num_key_heads: int = 16  # Hk
    linear_num_value_heads: int = 32  # Hv; Hv / Hk value heads share one key head
    linear_key_head_dim: int = 128  # dk
    linear_value_head_dim: int = 128  # dv
    linear_conv_kernel_dim: int = 4  # tokens that the convolution sees

    @property
    def rotary_dim(self) -> int:
        """How many components of each query and key RoPE rotates: the first of Dh."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def conv_channels(self) -> int:
        """Channels of a linear layer's convolution: those of its queries, keys and values."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    def problem(self) -> str | None:
        """What makes these sizes impossible together, if anything does."""
        key_heads, value_heads = self.linear_num_key_heads, self.linear_num_value_heads
        if value_heads % key_heads:
            return f"linear_num_key_heads {key_heads} does not divide {value_heads} value heads"
        widest = self.conv_channels * max(self.hidden_size, self.linear_conv_kernel_dim)
        if widest >= 2**48:
            return f"a matrix of {self.conv_channels} rows is too large; check linear_* sizes"
        return super().problem()


def text_fields(raw: dict) -> dict:
    """The fields of a text-only checkpoint: those of config.json or, if the model reads images too,
    of text_config, and a few from outside it, such as tie_word_embeddings.
    """
    text = raw.get("text_config")
    if raw.get("model_type") != WITH_IMAGES or not isinstance(text, dict):
        return raw
    kept = (*COMPUTED, "tie_word_embeddings")
    outside = {key: raw[key] for key in kept if key in raw and text.get(key) is None}
    if text.get("model_type") in (None, WITH_IMAGES):
        outside["model_type"] = QWEN3_5
    return text | outside | {"architectures": ["Qwen3_5ForCausalLM"]}


def _layer_types(path: Path, raw: dict) -> tuple[str, ...]:
    """LINEAR or FULL for each layer; without the field, as in the reference, every 4th is FULL."""
    layers, every = raw["num_hidden_layers"], raw.get("full_attention_interval", 4)
    kinds = raw.get("layer_types")
    if kinds is None and type(every) is int and every > 0 and layers < 2**16:
        kinds = [LINEAR if (i + 1) % every else FULL for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or {*map(str, kinds)} - {LINEAR, FULL}:
        found = f"layer_types is {reprlib.repr(raw.get('layer_types'))}"
        found += f", full_attention_interval {reprlib.repr(every)}"
        raise UserError(f"{path}: {found}; expected {LINEAR} or {FULL} for each of {layers} layers")
    return tuple(kinds)


def _unsupported(raw: dict) -> str | None:
    """The first feature that the forward pass would compute wrongly, and what to do about it."""
    found = raw.get("model_type")
    if found == WITH_IMAGES:
        found = f"text_config is {reprlib.repr(raw.get('text_config'))}"
        return f"{found}, expected the fields of the text model; fetch it again"
    if found not in MODEL_TYPES:
        found = f"model_type is {reprlib.repr(found)}, expected qwen2, qwen3 or qwen3_5"
        return f"{found}; choose a dense Qwen1.5 to Qwen3.8"
    for key, (values, advice) in COMPUTED.items():
        if key in raw and raw[key] not in values:
            found, expected = reprlib.repr(raw[key]), " or ".join(map(repr, values))
            return f"{key} is {found}, expected {expected}; {advice}"
    for key in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5; a file may hold both
        rope = raw.get(key) or {}
        # With this key the values are one level down, one set for each type of layer.
        plain = isinstance(rope, dict) and FULL not in rope
        # rope_type is the newer name of type. Versions of the reference differ in which one counts.
        plain = plain and all(rope.get(k) in (None, "default") for k in ("rope_type", "type"))
        if not plain:
            found = f"{key} is {reprlib.repr(rope)}"
            return f"{found}; scaled RoPE is not supported, use the default RoPE"
    if raw["model_type"] == QWEN3_5:  # all else that the file may ask for is computed
        null = "partial_rotary_factor" in raw and raw["partial_rotary_factor"] is None
        # The reference takes the default where the field is missing, but rotates all if it is null.
        return "partial_rotary_factor is null; give a number" if null else None
    for place in filter(None, (raw, raw.get("rope_scaling"), raw.get("rope_parameters"))):
        if (part := place.get("partial_rotary_factor")) not in (1, None):
            found = f"partial_rotary_factor is {reprlib.repr(part)}, expected 1"
            return f"{found}; RoPE rotates whole heads here; use such a checkpoint"
    # As in the reference: layer_types, where it is given, names each layer. Otherwise there is a
    # window where use_sliding_window and sliding_window ask for it, from max_window_layers on.
    first, layers = raw.get("max_window_layers"), raw.get("num_hidden_layers")
    if (kinds := raw.get("layer_types")) is not None:
        full = isinstance(kinds, list) and len(kinds) == layers
        full = full and all(kind == FULL for kind in kinds)
    else:
        no_layer = isinstance(first, int) and isinstance(layers, int) and first >= layers
        window = raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None
        full = no_layer or not window
    if not full:
        found = "attention is not full in every layer (layer_types, use_sliding_window)"
        return f"{found}; sliding-window attention is not supported, use another checkpoint"
    return None
