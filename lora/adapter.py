"""PEFT's adapter format: `adapter_config.json` and `adapter_model.safetensors` in one directory.

PEFT can read what this module writes, and the other way round. PEFT ignores unexpected tensors and
only warns of missing ones; here both are errors. A config that asks for more than plain LoRA is
refused with the name of the field, because its A and B have another meaning.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import lora.inject as inject
from lora.layer import LoRAError, check_hyperparameters

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PEFT_KEY = "base_model.model.{}.weight"  # of a parameter; A and B are Linears in PEFT
HEAD_KEY = PEFT_KEY.format("score")
# How keys begin in an adapter that was trained on the vision-language Qwen3.5.
WITH_IMAGES = "base_model.model.model.language_model."
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_MODULES = ["classifier", "score"]  # PEFT's names for the head of any SEQ_CLS model

# What the absence of a config field means in PEFT; for the other fields it means None.
DEFAULTS = {"bias": "none", "fan_in_fan_out": False, "init_lora_weights": True}
DEFAULTS |= {"lora_dropout": 0.0, "use_dora": False, "use_rslora": False}
# The values that are plain LoRA. PiSSA, OLoRA, CorDA and LoftQ, which are other values of
# init_lora_weights, also change the base's weights, so A and B would not fit the unchanged base.
PLAIN = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", "SEQ_CLS"), "bias": ("none",)}
PLAIN |= {"init_lora_weights": (True, False, "gaussian"), "use_rslora": (False, True)}
# Fields that `read_adapter_config` checks one by one, and fields that do not change A and B.
OTHER = {"r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"}
OTHER |= {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core"}
OTHER |= {"peft_version", "qalora_group_size", "revision", "runtime_config"}
# Any other field asks for a variant of LoRA, unless it is off.
OFF = (None, False, "", [], {})


@dataclass(frozen=True)
class LoRAConfig:
    """The content of an adapter's config.

    `targets` as in `inject.targeted`; `base_model` is a name or path, for the reader only.
    Raises LoRAError if r, alpha or dropout is out of range.
    """

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    use_rslora: bool
    task_type: str  # CAUSAL_LM or SEQ_CLS
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
    """Write A and B of `model` and, for SEQ_CLS only, the classifier's `head` (num_labels, D).

    `metadata` goes into the safetensors header, which PEFT does not read. Both files are written
    under temporary names and synced before either is renamed, so a failed save leaves the earlier
    adapter. Raises ValueError if `config` does not describe the LoRA of `model`, if SEQ_CLS has no
    head, or if CAUSAL_LM has one.
    """
    wrapped = inject.lora_modules(model)
    settings = {(m.r, m.alpha, m.use_rslora) for m in wrapped.values()}
    same = settings == {(config.r, config.alpha, config.use_rslora)}
    if not same or wrapped.keys() != inject.targeted(model, config.targets).keys():
        raise ValueError(f"the model does not have the LoRA that the config describes: {config}")
    if (head is not None) != (config.task_type == "SEQ_CLS"):
        raise ValueError(f"task type {config.task_type}: SEQ_CLS needs a head, CAUSAL_LM none")
    tensors = {PEFT_KEY.format(name): p for name, p in inject.lora_parameters(model).items()}
    if head is not None:
        tensors[HEAD_KEY] = head.float()
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    # One entry: safetensors writes several in no fixed order, and equal adapters would differ.
    header = {"metadata": json.dumps(metadata or {}, sort_keys=True)}
    fields = DEFAULTS | {"peft_type": "LORA", "task_type": config.task_type, "inference_mode": True}
    fields |= {"r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    fields |= {"use_rslora": config.use_rslora, "target_modules": list(config.targets)}
    fields["base_model_name_or_path"] = config.base_model or None
    fields["modules_to_save"] = None if head is None else HEAD_MODULES

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contents = {TENSOR_FILE: safetensors.torch.save(tensors, header)}
    contents[CONFIG_FILE] = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
    for name, content in contents.items():
        with open(directory / f"{name}.part", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for name in contents:
        os.replace(directory / f"{name}.part", directory / name)


def load_adapter(directory: str | Path, model: nn.Module) -> tuple[LoRAConfig, Tensor | None, dict]:
    """Inject the adapter in `directory` into `model` (see `inject_lora`) and load its A and B.

    Returns the config; the head (num_labels, D), fp32 on the CPU, or None for CAUSAL_LM; and the
    header's metadata. The caller must check that the base is the right one and that D is its hidden
    size. Raises LoRAError if a file cannot be read, if the config is not plain LoRA, or if a tensor
    is missing, unexpected, of another shape or not finite; the model is then unchanged.
    """
    config = read_adapter_config(directory, inject.all_linear(model))
    path = Path(directory) / TENSOR_FILE
    try:
        _check_regular(path)
        # Cloned, because the file can change while the tensors are used.
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in list(file.keys())}
            metadata = json.loads((file.metadata() or {}).get("metadata", "{}"))
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not an object")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoRAError(f"{path}: {reason}; expected an adapter's safetensors file") from error
    # All keys have this form or none: a mixture is refused below.
    if all(key.startswith(WITH_IMAGES) for key in {*tensors} - {HEAD_KEY}):
        tensors = {key.replace(".language_model.", ".", 1): t for key, t in tensors.items()}
        targets = tuple(target.replace("language_model.", "") for target in config.targets)
        config = replace(config, targets=targets)
    head = tensors.get(HEAD_KEY)
    shapes: dict[str, tuple] = {}
    for name, linear in inject.find_targets(model, config.targets).items():
        shapes[PEFT_KEY.format(f"{name}.lora_A")] = (config.r, linear.in_features)
        shapes[PEFT_KEY.format(f"{name}.lora_B")] = (linear.out_features, config.r)
    if config.task_type == "SEQ_CLS":
        is_matrix = head is not None and head.ndim == 2
        shapes[HEAD_KEY] = tuple(head.shape) if is_matrix else ("num_labels", "D")
    _check_tensors(path, tensors, shapes, config.base_model)

    settings = (config.r, config.alpha, config.dropout, config.use_rslora)
    inject.inject_lora(model, config.targets, *settings)
    with torch.no_grad():
        for name, parameter in inject.lora_parameters(model).items():
            parameter.copy_(tensors[PEFT_KEY.format(name)])
    return config, None if head is None else head.float(), metadata


def read_adapter_config(
    directory: str | Path, all_linear: Sequence[str] = (*inject.ATTENTION, *inject.MLP)
) -> LoRAConfig:
    """Read `adapter_config.json`. Raises LoRAError if it is unreadable or not plain LoRA.

    all_linear: the targets that "all-linear" stands for in the model.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        _check_regular(path, 2**24)
        return _plain_lora(json.loads(path.read_text(encoding="utf-8")), all_linear)
    except LoRAError as error:
        raise LoRAError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        found = getattr(error, "strerror", None) or error
        raise LoRAError(f"{path}: cannot be read as JSON ({found}); give a whole adapter") from None


def _check_regular(path: Path, limit: int = 2**40) -> None:
    """Raise OSError for a pipe or a device, which would block or never end, or above the limit."""
    if path.exists() and not (path.is_file() and path.stat().st_size <= limit):
        raise OSError(f"not a regular file of at most {limit} bytes")


def _plain_lora(fields: object, all_linear: Sequence[str]) -> LoRAConfig:
    """The config in these fields of PEFT's. Raises LoRAError if it is not plain LoRA."""

    def check(name: str, ok: bool, expected: str) -> None:
        if not ok:
            advice = "only plain LoRA is read: merge it into its base with PEFT, and use the result"
            found = repr(fields.get(name))[:80]
            raise LoRAError(f"{name} is {found}; expected {expected} ({advice})")

    if not isinstance(fields, dict):
        raise LoRAError(f"found a {type(fields).__name__}; expected a JSON object")
    fields = DEFAULTS | fields
    for name in (*PLAIN, *sorted(fields.keys() - PLAIN.keys() - OTHER)):
        # Compared as JSON, because in Python 1 == True and 0 == False. 0 is not off:
        # `"layers_to_transform": 0` means only the first layer.
        ok = json.dumps(fields.get(name)) in map(json.dumps, PLAIN.get(name, OFF))
        check(name, ok, " or ".join(map(str, PLAIN.get(name, ["none"]))))
    task, saved = fields["task_type"], fields.get("modules_to_save") or []
    heads = HEAD_MODULES if task == "SEQ_CLS" else []
    ok = isinstance(saved, list) and all(module in heads for module in saved)
    check("modules_to_save", ok, f"nothing outside {heads} with {task}")
    targets = fields.get("target_modules")
    targets = [*all_linear] if targets == "all-linear" else targets
    ok = isinstance(targets, list) and targets and all(isinstance(t, str) and t for t in targets)
    check("target_modules", ok, "a list of module names, not a pattern")
    numbers = (fields.get("r"), fields.get("lora_alpha"), fields["lora_dropout"])
    base_model = str(fields.get("base_model_name_or_path") or "")
    targets = tuple(dict.fromkeys(targets))  # each once
    return LoRAConfig(*numbers, targets, fields["use_rslora"], task, base_model)


def _check_tensors(path: Path, tensors: dict, shapes: dict[str, tuple], base: str) -> None:
    """Raise LoRAError unless `tensors` has exactly these names and shapes and is finite in fp32."""
    problems = [f"{key} is missing" for key in shapes if key not in tensors]
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if key not in shapes:
            problems.append(f"{key} is unexpected")
        elif shape != shapes[key]:
            problems.append(f"{key} has shape {shape}, expected {shapes[key]}")
        elif tensor.dtype not in FLOATS or not tensor.float().isfinite().all():
            problems.append(f"{key} has other values than finite floats of 16 to 64 bits")
    if problems:  # two are enough: an adapter has hundreds of tensors, a message has one line
        found = "; ".join(problems[:2]) + "; ..." * (len(problems) > 2)
        problem = f"expected {len(shapes)} tensors, {len(problems)} wrong ({found})"
        model = "the model it was trained on" + f", {base}" * bool(base)
        raise LoRAError(f"{path}: {problem}; give its whole file, and {model}")
