"""Read config.json and check it. A feature that this implementation cannot compute is an error."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from qwen_min.errors import UserError

# Qwen1.5, Qwen2 and Qwen2.5 all declare "qwen2": their structure is the same.
MODEL_TYPES = ("qwen2", "qwen3")


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
    num_key_value_heads: int  # K; H / K query heads share one key/value head
    head_dim: int  # Dh; not always D / H (Qwen3-0.6B: D = 1024, H = 16, Dh = 128)
    vocab_size: int  # V; the tokenizer's size, rounded up for the hardware
    rms_norm_eps: float = 1e-6
    rope_theta: float
    tie_word_embeddings: bool = False  # the LM head is the token embedding
    attention_bias: bool = False  # on q, k and v; Qwen2 always has it, and never one on o
    max_position_embeddings: int = 32768  # in tokens
    torch_dtype: str | None = None  # the dtype of the saved weights, if the file says it

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys go through an RMSNorm over Dh before the rotation (Qwen3)."""
        return self.model_type == "qwen3"

    @classmethod
    def from_json(cls, path: str | Path) -> "QwenConfig":
        """Read config.json as written by transformers 4 or 5.

        Raises UserError for a missing or malformed file, a missing field, an impossible value, and
        every feature that would load and then give wrong numbers: another architecture, mixture of
        experts, a sliding window in use, scaled RoPE, another activation, quantised weights.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such file; expected config.json, tokenizer.json, weights")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error}); fetch it again") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path}: holds {type(raw).__name__}, expected a JSON object")
        if reason := _unsupported(raw):
            raise UserError(f"{path}: {reason}")

        def field(key: str) -> float:
            kind = cls.__annotations__[key]
            value = raw.get(key, getattr(cls, key, None))
            if kind is float and type(value) is int:
                value = float(value)
            # The upper bound is for Infinity and NaN, which Python's json accepts as numbers.
            if type(value) is not kind or not (kind is bool or 0 < value < math.inf):
                expected = "true or false" if kind is bool else f"a positive {kind.__name__}"
                raise UserError(f"{path}: {key} is {value!r}, expected {expected}")
            return value

        raw = {key: value for key, value in raw.items() if value is not None}
        is_qwen3 = raw["model_type"] == "qwen3"
        if not is_qwen3:  # it has the bias without declaring it
            raw["attention_bias"] = True
        raw.setdefault("num_key_value_heads", field("num_attention_heads"))
        # As in the reference: Qwen3's default is 128, whatever D / H is.
        usual = 128 if is_qwen3 else field("hidden_size") // field("num_attention_heads")
        raw.setdefault("head_dim", usual)
        # As in the reference: rope_parameters.rope_theta takes precedence over the top-level one.
        nested = raw.get("rope_parameters") or {}
        raw["rope_theta"] = nested.get("rope_theta", raw.get("rope_theta"))
        heads, kv_heads = field("num_attention_heads"), field("num_key_value_heads")
        if heads % kv_heads:
            raise UserError(f"{path}: num_key_value_heads {kv_heads} does not divide {heads} heads")
        if field("head_dim") % 2:
            raise UserError(f"{path}: head_dim {raw['head_dim']} is odd; RoPE rotates pairs")
        checked = [key for key, kind in cls.__annotations__.items() if kind in (int, float, bool)]
        return cls(
            model_type=raw["model_type"],
            torch_dtype=raw.get("dtype") or raw.get("torch_dtype"),
            **{key: field(key) for key in checked},
        )


def _unsupported(raw: dict) -> str | None:
    """The first feature that the forward pass would compute wrongly, and what to do about it."""
    found = raw.get("model_type")
    if found not in MODEL_TYPES:
        return f"model_type is {found!r}, expected qwen2 or qwen3; choose a dense Qwen1.5 to Qwen3"
    if raw.get("num_experts") or raw.get("num_local_experts"):
        return "mixture of experts is not supported; use a dense Qwen"
    if raw.get("quantization_config"):
        return "quantised weights are not supported; use unquantised ones"
    if raw.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {raw['hidden_act']!r}, expected 'silu'; use a checkpoint with SiLU"
    for key in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5; a file may hold both
        rope = raw.get(key) or {}
        kind = isinstance(rope, dict) and rope.get("rope_type", rope.get("type"))
        if kind not in (None, "default"):
            return f"{key} is {rope!r}; scaled RoPE is not supported, use the default RoPE"
    # use_sliding_window applies to layers >= max_window_layers only; layer_types names each layer.
    first, layers = raw.get("max_window_layers"), raw.get("num_hidden_layers")
    no_layer = isinstance(first, int) and isinstance(layers, int) and first >= layers
    kinds = raw.get("layer_types") or []
    all_full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    if (raw.get("use_sliding_window") and not no_layer) or not all_full:
        return "sliding-window attention is not supported; use a checkpoint with full attention"
    return None
