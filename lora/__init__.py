"""LoRA from scratch: one layer (`layer`), a whole model (`inject`), PEFT's files (`adapter`)."""

from lora.adapter import LoRAConfig, load_adapter, read_adapter_config, save_adapter
from lora.inject import (
    ATTENTION,
    DELTA_RULE,
    MLP,
    inject_lora,
    lora_modules,
    lora_parameters,
    merge_lora,
    targeted,
)
from lora.layer import LoRAError, LoRALinear

__all__ = ["LoRAConfig", "load_adapter", "read_adapter_config", "save_adapter"]
__all__ += ["ATTENTION", "DELTA_RULE", "MLP", "inject_lora", "lora_modules", "lora_parameters"]
__all__ += ["LoRAError", "LoRALinear", "merge_lora", "targeted"]
