"""PEFT's adapter format: `adapter_config.json` and `adapter_model.safetensors` in one directory.

What is written here PEFT reads, and the other way round. PEFT ignores a tensor that it has no place
for and only warns of one that is missing; here the two sets must be the same. A config that asks
for more than plain LoRA is refused by the name of the field, since its A and B mean something else.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora.inject import (
    ATTENTION,
    MLP,
    find_targets,
    inject_lora,
    lora_modules,
    lora_parameters,
    matches,
)
from lora.layer import LoRAError, LoRALinear, check_hyperparameters

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
HEAD_KEY = "base_model.model.score.weight"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_MODULES = ["classifier", "score"]  # PEFT's names for the head of any SEQ_CLS model

# Config fields that may hold anything: they do not change what A and B mean.
HARMLESS = {
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter's config says; `targets` as in `inject.find_targets`, `base_model` a name or
    path to show the reader. Raises LoRAError for an r, alpha or dropout out of range."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    use_rslora: bool
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"]
    base_model: str

    def __post_init__(self) -> None:
        check_hyperparameters(self.r, self.alpha, self.dropout)


def save_adapter(
    directory: str | Path,
    model: nn.Module,
    config: LoRAConfig,
    head: Tensor | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the LoRA of `model` and, for SEQ_CLS, the classifier's `head` (num_labels, D).

    `metadata` goes into the safetensors header, which PEFT does not read. Both files are whole on
    the disk under other names before either takes its place. Raises ValueError where `config` is
    not how `model` was injected, or a head comes without SEQ_CLS or SEQ_CLS without one.
    """
    modules = lora_modules(model)
    claimed = (config.r, config.alpha, config.use_rslora)
    named = {
        name
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, LoRALinear)) and any(matches(name, t) for t in config.targets)
    }
    others = any((m.r, m.alpha, m.use_rslora) != claimed for m in modules.values())
    if not modules or others or named != modules.keys():
        raise ValueError(f"the model does not carry the LoRA that the config describes: {config}")
    if (head is not None) != (config.task_type == "SEQ_CLS"):
        raise ValueError(f"task type {config.task_type}: a head is saved with SEQ_CLS, always")
    tensors = {_key(name): p.detach() for name, p in lora_parameters(model).items()}
    if head is not None:
        tensors[HEAD_KEY] = head.detach().float()
    tensors = {key: t.cpu().contiguous() for key, t in tensors.items()}
    # One key: safetensors writes several in an order of its own, and equal adapters would differ.
    header = {"metadata": json.dumps(metadata or {}, sort_keys=True)}

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        directory / TENSOR_FILE: safetensors.torch.save(tensors, header),
        directory / CONFIG_FILE: _config_json(config).encode(),
    }
    for path, data in files.items():
        with open(f"{path}.part", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    for path in files:
        os.replace(f"{path}.part", path)


def load_adapter(
    directory: str | Path, model: nn.Module, dropout: float | None = None
) -> tuple[LoRAConfig, Tensor | None, dict[str, str]]:
    """Inject the adapter in `directory` into `model` (see `inject_lora`) and load its A and B.

    `dropout` replaces the config's. Returns the config as read; the head (num_labels, D), fp32 on
    the CPU, or None under CAUSAL_LM; and the header's metadata. That the base is the right one, and
    the head as wide as its hidden states, is the caller's to check. Raises LoRAError for files that
    cannot be read, are more than plain LoRA, or hold other tensors than exactly the expected; the
    model is then as it was.
    """
    config = read_adapter_config(directory)
    path = Path(directory) / TENSOR_FILE
    tensors, metadata = _read_tensors(path)
    expected: dict[str, tuple] = {}
    for name, linear in find_targets(model, config.targets).items():
        expected[_key(f"{name}.lora_A")] = (config.r, linear.in_features)
        expected[_key(f"{name}.lora_B")] = (linear.out_features, config.r)
    if config.task_type == "SEQ_CLS":
        shape = tuple(tensors[HEAD_KEY].shape) if HEAD_KEY in tensors else ()
        expected[HEAD_KEY] = shape if len(shape) == 2 else ("num_labels", "D")
    _check_tensors(path, tensors, expected)

    dropout = config.dropout if dropout is None else dropout
    inject_lora(model, config.targets, config.r, config.alpha, dropout, config.use_rslora)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(tensors[_key(name)])
    head = tensors[HEAD_KEY].float() if HEAD_KEY in tensors else None
    return config, head, metadata


def read_adapter_config(directory: str | Path) -> LoRAConfig:
    """Read `adapter_config.json`; LoRAError where it is unreadable or asks for more than LoRA."""
    path = Path(directory) / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoRAError(f"{path}: {error.strerror}; expected an adapter's directory") from error
    except (ValueError, RecursionError) as error:
        raise LoRAError(f"{path}: not JSON ({error}); expected an adapter's config") from error
    if not isinstance(fields, dict):
        raise LoRAError(f"{path}: found a {type(fields).__name__}; expected a JSON object")

    def check(name: str, value: Any, ok: bool, expected: str) -> None:
        if not ok:
            raise LoRAError(f"{path}: {name} is {repr(value)[:80]}; expected {expected}")

    # Each field that is read here leaves `fields`; what is then left over must be empty. A default
    # is what PEFT means by the field's absence.
    plain = "(only plain LoRA is read: with PEFT, merge it into its base and use the result)"
    kind = fields.pop("peft_type", None)
    check("peft_type", kind, kind == "LORA", "LORA")
    bias = fields.pop("bias", "none")
    check("bias", bias, bias == "none", f"none {plain}")
    init = fields.pop("init_lora_weights", True)
    # PiSSA, OLoRA, CorDA and LoftQ start by changing the base's weights, which this base never saw.
    check("init_lora_weights", init, init in (True, False, "gaussian"), f"true or gaussian {plain}")
    task = fields.pop("task_type", None)
    check("task_type", task, task in ("CAUSAL_LM", "SEQ_CLS"), "CAUSAL_LM or SEQ_CLS")
    saved = fields.pop("modules_to_save", None) or []
    savable = HEAD_MODULES if task == "SEQ_CLS" else []
    ok = isinstance(saved, list) and all(module in savable for module in saved)
    check("modules_to_save", saved, ok, f"nothing outside {savable} with {task}")
    targets = fields.pop("target_modules", None)
    targets = [*ATTENTION, *MLP] if targets == "all-linear" else targets
    ok = isinstance(targets, list) and all(isinstance(t, str) and t for t in targets)
    check("target_modules", targets, ok and len(targets) > 0, "a list of names, not a pattern")
    rslora = fields.pop("use_rslora", False)
    check("use_rslora", rslora, isinstance(rslora, bool), "true or false")
    r, alpha = fields.pop("r", None), fields.pop("lora_alpha", None)
    dropout = fields.pop("lora_dropout", 0.0)
    base_model = fields.pop("base_model_name_or_path", None) or ""
    for name in sorted(fields.keys() - HARMLESS):
        check(name, fields[name], _empty(fields[name]), f"none {plain}")
    try:
        return LoRAConfig(r, alpha, dropout, tuple(targets), rslora, task, str(base_model))
    except LoRAError as error:
        raise LoRAError(f"{path}: {error}") from None


def _config_json(config: LoRAConfig) -> str:
    fields = {
        "base_model_name_or_path": config.base_model or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": HEAD_MODULES if config.task_type == "SEQ_CLS" else None,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": list(config.targets),
        "task_type": config.task_type,
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }
    return json.dumps(fields, indent=2) + "\n"


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, copied into memory: the file may be replaced while they are in use."""
    try:
        with safe_open(path, framework="pt") as file:
            keys, header = list(file.keys()), file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in keys}
        metadata = json.loads(header.get("metadata", "{}"))
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not an object")
    except (OSError, SafetensorError, ValueError) as error:
        raise LoRAError(f"{path}: {error}; expected a safetensors file") from error
    return tensors, metadata


def _check_tensors(path: Path, tensors: dict[str, Tensor], expected: dict[str, tuple]) -> None:
    """Raise LoRAError unless `tensors` are the expected ones, of these shapes, and finite."""
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected],
        "misshapen": [
            f"{key} {tuple(tensors[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ],
        "not finite floats of 16 to 64 bits": [
            key for key, t in tensors.items() if t.dtype not in FLOATS or not t.isfinite().all()
        ],
    }
    # The first two names of each kind: an adapter holds hundreds of tensors, a message is one line.
    found = [
        f"{len(names)} {kind} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise LoRAError(f"{path}: expected {len(expected)} tensors; {'; '.join(found)}")


def _empty(value: Any) -> bool:
    # 0 is not empty: `layers_to_transform: 0` means the first layer alone.
    return value is None or value is False or value in ("", [], {})


def _key(parameter: str) -> str:
    """PEFT's key of a parameter: A and B are Linears of its own there, hence `.weight`."""
    return f"base_model.model.{parameter}.weight"
