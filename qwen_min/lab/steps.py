"""The numbers behind one text's decision, computed by the definitions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_min.head import LinearHead
from qwen_min.model import Qwen, rotary_cos_sin

LIKELIEST = 5  # tokens listed at each position


@dataclass(frozen=True)
class Position:
    """One label token, as the hidden state at the previous position predicts it."""

    token: int
    logit: float
    log_sum_exp: float  # over the vocabulary
    likeliest: tuple[tuple[int, float], ...]  # the most likely tokens here: (token, log p), falling

    @property
    def log_p(self) -> float:
        return self.logit - self.log_sum_exp


@torch.inference_mode()
def label_positions(model: Qwen, prompt: Sequence[int], label: Sequence[int]) -> list[Position]:
    """One forward of prompt + label; for each label token the numbers that make up its log p."""
    ids = torch.tensor([[*prompt, *label]], device=model.lm_head_weight.device)  # (1, T)
    first = len(prompt) - 1  # the state at a position predicts the next token
    h = model(ids)[0, first : first + len(label)]  # (label tokens, D)
    found = []
    for token, logits in zip(label, model.logits(h).cpu(), strict=True):  # logits (V,)
        log_sum_exp = logits.logsumexp(dim=-1)
        best = logits.topk(LIKELIEST)
        pairs = zip(best.indices.tolist(), (best.values - log_sum_exp).tolist(), strict=True)
        found.append(Position(token, logits[token].item(), log_sum_exp.item(), tuple(pairs)))
    return found


@torch.inference_mode()
def head_state(model: Qwen, prompt: Sequence[int], head: LinearHead) -> Tensor:
    """The state h (D,), fp32, that the head reads: its layer's output, pooled over the prompt."""
    ids = torch.tensor([prompt], device=model.lm_head_weight.device)  # (1, T)
    core, last = model.model, model.config.num_hidden_layers
    positions = torch.arange(len(prompt), device=ids.device)
    cos, sin = rotary_cos_sin(positions, model.config.head_dim, model.config.rope_theta)
    x = core.embed_tokens(ids)  # (1, T, D)
    for layer in core.layers[: head.layer]:
        x = layer(x, cos, sin)
    h = (core.norm(x) if head.layer == last else x)[0].float()  # (T, D)
    return (h[-1] if head.pooling == "last" else h.mean(dim=0)).cpu()
