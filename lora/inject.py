"""LoRA on a whole model: wrap linear layers by name, list A and B, merge them into the base."""

from collections.abc import Sequence

from torch import nn

from lora.layer import LoRAError, LoRALinear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# The large projections of Qwen3.5's gated delta rule; in_proj_a and in_proj_b are small.
DELTA_RULE = ("in_proj_qkv", "in_proj_z", "out_proj")


def targeted(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear | LoRALinear]:
    """The linear layers, with or without LoRA, that `targets` name, as {full name: module}.

    A target stands for each module that has it as its full name or as its last components: `q_proj`
    matches `layers.0.self_attn.q_proj` and never `my_q_proj`. This is PEFT's rule for a list of
    targets.
    """
    endings = tuple(f".{target}" for target in targets)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, LoRALinear))}
    return {name: m for name, m in linears.items() if f".{name}".endswith(endings)}


def all_linear(model: nn.Module) -> tuple[str, ...]:
    """The names that PEFT's "all-linear" stands for: of every Linear but the output's."""
    names = [n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return tuple(dict.fromkeys(name for name in names if name not in ("lm_head", "score")))


def find_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The modules to wrap: see `targeted`; in the model's order.

    Raises LoRAError if `targets` is empty, if a target names no Linear, or if the model already has
    LoRA.
    """
    if wrapped := list(lora_modules(model)):
        found = f"the model already has LoRA on {len(wrapped)} modules (first: {wrapped[0]})"
        raise LoRAError(f"{found}; merge it, or start from the base model")
    if not targets:
        raise LoRAError("no LoRA targets; expected at least one module name such as q_proj")
    for target in targets:
        if not targeted(model, [target]):
            names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names)) or "none"
            raise LoRAError(f"LoRA target {target!r} names no linear layer; the model has {kinds}")
    return targeted(model, targets)


def inject_lora(
    model: nn.Module,
    targets: Sequence[str],
    r: int,
    alpha: float,
    dropout: float,
    use_rslora: bool = False,
) -> list[str]:
    """Freeze every parameter of `model` and wrap the Linears that `targets` name, in place.

    Afterwards only `lora_parameters(model)` are trainable; the caller unfreezes a head if it is to
    be trained too. Returns the names of the wrapped modules. Raises LoRAError as `find_targets` and
    `LoRALinear` do; the model is then unchanged.
    """
    wrapped = {}
    for name, linear in find_targets(model, targets).items():
        # A new module is in train mode; in a model in eval mode its dropout would be on.
        wrapped[name] = LoRALinear(linear, r, alpha, dropout, use_rslora).train(linear.training)
    # Freeze the whole base: choosing by name could leave a weight trainable.
    model.requires_grad_(False)
    for name, module in wrapped.items():
        model.set_submodule(name, module)
    return list(wrapped)


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear of `model`, by the full name of the Linear that it replaced."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every A (r, in) and B (out, r), under the names of `model.named_parameters()`."""
    return {n: p for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))}


def merge_lora(model: nn.Module) -> int:
    """Replace every LoRALinear of `model` by its `merged()` Linear, in place; return the count."""
    modules = lora_modules(model)
    for name, module in modules.items():
        model.set_submodule(name, module.merged())
    return len(modules)
