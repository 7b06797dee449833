"""Read config.json and check it. A feature that this implementation cannot compute is an error."""

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path

from qwen_min.errors import UserError

# Qwen1.5, Qwen2 and Qwen2.5 all declare "qwen2": their structure is the same.
MODEL_TYPES = ("qwen2", "qwen3")
NAMES = ("float32", "bfloat16", "float16")
# Fields that change what the reference computes: the values that are computed here, and advice.
COMPUTED = {
    "hidden_act": (("silu", "swish"), "use a checkpoint with SiLU"),  # two names of one function
    # False and null: tokens also see what comes after them.
    "is_causal": ((True,), "attention is causal here; use a causal language model"),
    "partial_rotary_factor": ((1, None), "RoPE rotates whole heads here; use such a checkpoint"),
    "per_layer_config": ((None, {}), "all layers are alike here; use such a checkpoint"),
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
        """Whether queries and keys go through an RMSNorm over Dh before the rotation (Qwen3)."""
        return self.model_type == "qwen3"

    @classmethod
    def from_json(cls, path: str | Path) -> "QwenConfig":
        """Read config.json as written by transformers 4 or 5.

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
        if reason := _unsupported(raw):
            raise UserError(f"{path}: {reason}")

        def field(key: str) -> float:
            kind = cls.__annotations__[key]
            value = raw.get(key, getattr(cls, key, None))
            if kind is float and type(value) is int and abs(value) < 2**63:
                value = float(value)
            # Python's json also accepts Infinity and NaN as numbers.
            limit, bound = (2**31, " below 2^31") if kind is int else (math.inf, "")
            if type(value) is not kind or not (kind is bool or 0 < value < limit):
                expected = "true or false" if kind is bool else f"a positive {kind.__name__}{bound}"
                raise UserError(f"{path}: {key} is {reprlib.repr(value)}, expected {expected}")
            return value

        if raw.get("num_key_value_heads", 32) is None:  # as in the reference: one for each head
            raw["num_key_value_heads"] = raw.get("num_attention_heads")
        raw = {key: value for key, value in raw.items() if value is not None}
        is_qwen3 = raw["model_type"] == "qwen3"
        if not is_qwen3:  # it has the bias without declaring it
            raw["attention_bias"] = True
        # As in the reference: Qwen3's default is 128, whatever D / H is.
        usual = 128 if is_qwen3 else field("hidden_size") // field("num_attention_heads")
        raw.setdefault("head_dim", usual)
        # As in the reference: rope_scaling replaces rope_parameters, and the rope_theta in either
        # takes precedence over the top-level one.
        nested = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        raw["rope_theta"] = nested.get("rope_theta", raw.get("rope_theta"))
        heads, kv_heads = field("num_attention_heads"), field("num_key_value_heads")
        if heads % kv_heads:
            raise UserError(f"{path}: num_key_value_heads {kv_heads} does not divide {heads} heads")
        if field("head_dim") % 2:
            raise UserError(f"{path}: head_dim {raw['head_dim']} is odd; RoPE rotates pairs")
        widest = max(heads * field("head_dim"), field("intermediate_size"), field("vocab_size"))
        if widest * field("hidden_size") >= 2**48:  # the size of a matrix is an int64, in bytes
            raise UserError(f"{path}: a matrix of {widest} rows is too large; check its sizes")
        checked = [key for key, kind in cls.__annotations__.items() if kind in (int, float, bool)]
        fields = {key: field(key) for key in checked}
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        return cls(model_type=raw["model_type"], torch_dtype=dtype, **fields)


def _unsupported(raw: dict) -> str | None:
    """The first feature that the forward pass would compute wrongly, and what to do about it."""
    found = raw.get("model_type")
    if found not in MODEL_TYPES:
        found = f"model_type is {reprlib.repr(found)}, expected qwen2 or qwen3"
        return f"{found}; choose a dense Qwen1.5 to Qwen3"
    for key, (values, advice) in COMPUTED.items():
        if key in raw and raw[key] not in values:
            found, expected = reprlib.repr(raw[key]), " or ".join(map(repr, values))
            return f"{key} is {found}, expected {expected}; {advice}"
    for key in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5; a file may hold both
        rope = raw.get(key) or {}
        # With this key the values are one level down, one set for each type of layer.
        plain = isinstance(rope, dict) and "full_attention" not in rope
        # rope_type is the newer name of type. Versions of the reference differ in which one counts.
        plain = plain and all(rope.get(k) in (None, "default") for k in ("rope_type", "type"))
        if not plain or rope.get("partial_rotary_factor") not in (1, None):
            found = f"{key} is {reprlib.repr(rope)}"
            return f"{found}; scaled RoPE is not supported, use the default RoPE"
    # As in the reference: layer_types, where it is given, names each layer. Otherwise there is a
    # window where use_sliding_window and sliding_window ask for it, from max_window_layers on.
    first, layers = raw.get("max_window_layers"), raw.get("num_hidden_layers")
    if (kinds := raw.get("layer_types")) is not None:
        full = isinstance(kinds, list) and len(kinds) == layers
        full = full and all(kind == "full_attention" for kind in kinds)
    else:
        no_layer = isinstance(first, int) and isinstance(layers, int) and first >= layers
        window = raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None
        full = no_layer or not window
    if not full:
        found = "attention is not full in every layer (layer_types, use_sliding_window)"
        return f"{found}; sliding-window attention is not supported, use another checkpoint"
    return None
