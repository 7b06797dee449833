"""LoRA from scratch: one layer (`layer`), a whole model (`inject`), PEFT's files (`adapter`)."""

from lora.adapter import LoRAConfig, load_adapter, read_adapter_config, save_adapter
from lora.inject import ATTENTION, MLP, inject_lora, lora_modules, lora_parameters, merge_lora
from lora.layer import LoRAError, LoRALinear

__all__ = ["LoRAConfig", "load_adapter", "read_adapter_config", "save_adapter"]
__all__ += ["ATTENTION", "MLP", "inject_lora", "lora_modules", "lora_parameters", "merge_lora"]
__all__ += ["LoRAError", "LoRALinear"]
