"""config.json, read and checked: what this implementation cannot compute is refused by name."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from qwen_min.errors import UserError

# Qwen1.5, Qwen2 and Qwen2.5 all declare "qwen2"; in structure they are one.
MODEL_TYPES = ("qwen2", "qwen3")


@dataclass(frozen=True)
class QwenConfig:
    """The fields of config.json that the forward pass depends on, under their own names."""

    model_type: str
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K; H / K query heads share one key/value head
    head_dim: int  # Dh; not always D / H (Qwen3-0.6B: D = 1024, H = 16, Dh = 128)
    vocab_size: int  # V; larger than the tokenizer's, rounded up for the hardware
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool  # on q, k and v; never on o in Qwen2
    max_position_embeddings: int
    torch_dtype: str | None  # what the weights were saved in, if the file says

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys pass an RMSNorm over Dh before rotation (Qwen3)."""
        return self.model_type == "qwen3"

    @classmethod
    def from_json(cls, path: str | Path) -> "QwenConfig":
        """Read config.json as written by transformers 4 or 5.

        Raises UserError, in one line, for a missing or malformed file, a missing or impossible
        field, and everything that would load and then be quietly wrong: another architecture,
        mixture of experts, a sliding window in use, scaled RoPE, another activation.
        """
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file; a model directory holds config.json, tokenizer.json and "
                "*.safetensors"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error}); fetch it again") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path}: holds {type(raw).__name__}, expected a JSON object")
        _refuse_unsupported(raw, path)

        # A theta inside rope_parameters goes before one beside it, as in the reference.
        nested = raw.get("rope_parameters") or {}
        raw["rope_theta"] = nested.get("rope_theta", raw.get("rope_theta"))

        def field(key: str, kind: type, default: float | None = None) -> float:
            value = raw.get(key)
            if value is None:
                value = default
            if kind is float and type(value) is int:
                value = float(value)
            # Python's json takes NaN and Infinity for numbers.
            if type(value) is not kind or not (kind is bool or 0 < value < math.inf):
                expected = "true or false" if kind is bool else f"a positive {kind.__name__}"
                raise UserError(f"{path}: {key} is {value!r}, expected {expected}")
            return value

        hidden, heads = field("hidden_size", int), field("num_attention_heads", int)
        is_qwen3 = raw["model_type"] == "qwen3"
        config = cls(
            model_type=raw["model_type"],
            hidden_size=hidden,
            intermediate_size=field("intermediate_size", int),
            num_hidden_layers=field("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=field("num_key_value_heads", int, heads),
            # The reference's own default for Qwen3 is 128, whatever D / H may be.
            head_dim=field("head_dim", int, 128 if is_qwen3 else hidden // heads),
            vocab_size=field("vocab_size", int),
            rms_norm_eps=field("rms_norm_eps", float, 1e-6),
            rope_theta=field("rope_theta", float),
            tie_word_embeddings=field("tie_word_embeddings", bool, False),
            # Qwen2 has the bias without declaring it; Qwen3 declares it, normally false.
            attention_bias=field("attention_bias", bool, False) if is_qwen3 else True,
            max_position_embeddings=field("max_position_embeddings", int, 32768),
            torch_dtype=raw.get("dtype") or raw.get("torch_dtype"),
        )
        if heads % config.num_key_value_heads:
            raise UserError(
                f"{path}: {heads} query heads cannot be shared out evenly over "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        if config.head_dim % 2:
            raise UserError(f"{path}: head_dim {config.head_dim} is odd; RoPE rotates pairs")
        return config


def _refuse_unsupported(raw: dict, path: Path) -> None:
    """Raise UserError for what this forward pass would compute wrongly."""
    found = raw.get("model_type")
    if found not in MODEL_TYPES:
        raise UserError(
            f"{path}: model_type is {found!r}, expected {' or '.join(MODEL_TYPES)} "
            "(Qwen1.5, Qwen2, Qwen2.5 or Qwen3, dense); choose such a checkpoint"
        )
    if raw.get("num_experts") or raw.get("num_local_experts"):
        raise UserError(f"{path}: mixture of experts is not supported; use a dense Qwen")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {raw['hidden_act']!r}, expected 'silu'")
    for key in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5; a file may hold both
        rope = raw.get(key) or {}
        kind = isinstance(rope, dict) and rope.get("rope_type", rope.get("type"))
        if kind not in (None, "default"):
            raise UserError(
                f"{path}: {key} is {rope!r}; scaled RoPE is not supported, only default"
            )
    first, layers = raw.get("max_window_layers"), raw.get("num_hidden_layers")
    beyond = isinstance(first, int) and isinstance(layers, int) and first >= layers
    kinds = raw.get("layer_types") or []
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    if (raw.get("use_sliding_window") and not beyond) or not full:
        raise UserError(
            f"{path}: sliding-window attention is in use and not supported; only checkpoints with "
            "full attention in every layer are"
        )
    if raw.get("quantization_config"):
        raise UserError(f"{path}: quantised weights are not supported; use unquantised ones")
