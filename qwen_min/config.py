"""config.json, read and checked: what this implementation cannot compute is refused by name."""

import json
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

        def number(key: str, kind: type, default: float | None = None) -> float:
            value = raw.get(key)
            if value is None:
                value = default
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (kind is float and isinstance(value, float))) or value <= 0:
                raise UserError(f"{path}: {key} is {value!r}, expected a positive {kind.__name__}")
            return kind(value)

        hidden, heads = number("hidden_size", int), number("num_attention_heads", int)
        is_qwen3 = raw["model_type"] == "qwen3"
        config = cls(
            model_type=raw["model_type"],
            hidden_size=hidden,
            intermediate_size=number("intermediate_size", int),
            num_hidden_layers=number("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", int, heads),
            # The reference's own default for Qwen3 is 128, whatever D / H may be.
            head_dim=number("head_dim", int, 128 if is_qwen3 else hidden // heads),
            vocab_size=number("vocab_size", int),
            rms_norm_eps=number("rms_norm_eps", float, 1e-6),
            rope_theta=number("rope_theta", float, _nested_rope(raw).get("rope_theta", 10000.0)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            # Qwen2 has the bias without declaring it; Qwen3 declares it, normally false.
            attention_bias=bool(raw.get("attention_bias", False)) if is_qwen3 else True,
            max_position_embeddings=number("max_position_embeddings", int, 32768),
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


def _nested_rope(raw: dict) -> dict:
    """RoPE's settings where they may be nested (transformers 5: rope_parameters)."""
    nested = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return nested if isinstance(nested, dict) else {"rope_type": repr(nested)}


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
    rope = _nested_rope(raw)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"{path}: scaled RoPE ({rope_type}) is not supported; remove rope_scaling")
    layers = raw.get("num_hidden_layers") or 0
    windowed = raw.get("use_sliding_window") and raw.get("max_window_layers", 0) < layers
    if windowed or any(kind != "full_attention" for kind in raw.get("layer_types") or []):
        raise UserError(
            f"{path}: sliding-window attention is in use and not supported; only checkpoints with "
            "full attention in every layer are"
        )
    if raw.get("quantization_config"):
        raise UserError(f"{path}: quantised weights are not supported; use unquantised ones")
