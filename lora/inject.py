"""LoRA on a whole model: wrap linear layers by name, list what is trained, merge it away again."""

from collections.abc import Sequence

from torch import nn

from lora.layer import LoRAError, LoRALinear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def find_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The nn.Linear modules that `targets` name, by full name, in the model's order.

    A target is a module's name, or the end of one from a dot on: `q_proj` means every module whose
    last path component is `q_proj`, and never `my_q_proj`. This is PEFT's rule for a list.

    Raises LoRAError where a target names no Linear, or the model already carries LoRA.
    """
    wrapped = list(lora_modules(model))
    if wrapped:
        raise LoRAError(
            f"the model already carries LoRA on {len(wrapped)} modules (first: {wrapped[0]}); "
            "merge it, or start from the base model"
        )
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not targets:
        raise LoRAError("no LoRA targets were given; expected at least one name such as q_proj")
    for target in targets:
        if not any(matches(name, target) for name in linears):
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in linears)
            raise LoRAError(
                f"LoRA target {target!r} names no linear layer of the model; "
                f"it has: {', '.join(kinds) or 'none'}"
            )
    return {n: m for n, m in linears.items() if any(matches(n, t) for t in targets)}


def matches(name: str, target: str) -> bool:
    """Whether a target names the module of this full name."""
    return name == target or name.endswith("." + target)


def inject_lora(
    model: nn.Module,
    targets: Sequence[str],
    r: int,
    alpha: float,
    dropout: float,
    use_rslora: bool = False,
) -> list[str]:
    """Freeze every parameter of `model` and wrap the Linears that `targets` name, in place.

    Afterwards `lora_parameters(model)` is all that is trainable; a head that is to be trained with
    them is unfrozen by the caller. Returns the wrapped modules' names. Raises LoRAError as
    `find_targets` and `LoRALinear` do, and then leaves the model as it was.
    """
    wrapped = {}
    for name, linear in find_targets(model, targets).items():
        # A new module is in train mode: left so, dropout would be on in a model in eval mode.
        wrapped[name] = LoRALinear(linear, r, alpha, dropout, use_rslora).train(linear.training)
    # All that is there, rather than all but some names: nothing trains for a likeness of names.
    model.requires_grad_(False)
    for name, module in wrapped.items():
        _replace(model, name, module)
    return list(wrapped)


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear of `model` by the name of the Linear it replaced."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every A and B, named as in `model.named_parameters()`: `....q_proj.lora_A`, `....lora_B`."""
    parameters = {}
    for name, module in lora_modules(model).items():
        parameters[f"{name}.lora_A"] = module.lora_A
        parameters[f"{name}.lora_B"] = module.lora_B
    return parameters


def merge_lora(model: nn.Module) -> int:
    """Replace every LoRALinear of `model` by its `merged()` Linear, in place; returns how many."""
    modules = lora_modules(model)
    for name, module in modules.items():
        _replace(model, name, module.merged())
    return len(modules)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
