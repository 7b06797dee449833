"""The numbers behind one text's decision, from the definitions, and in words why it came out so."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
import torch
from torch import Tensor

from qwen_min.command.terminal import visible
from qwen_min.head import LinearHead
from qwen_min.model import Qwen, rotary_cos_sin
from qwen_min.prompt import Prompt
from qwen_min.scoring import label_mass
from qwen_min.tokenizer import Tokenizer

LIKELIEST = 5


@dataclass(frozen=True)
class Position:
    """One label token: what the state before it says of it, and of the tokens it likes best."""

    token: int
    logit: float
    log_sum_exp: float  # over the vocabulary
    likeliest: tuple[tuple[int, float], ...]  # (token, log p), falling

    @property
    def log_p(self) -> float:
        return self.logit - self.log_sum_exp


@torch.inference_mode()
def label_positions(model: Qwen, prompt: Sequence[int], label: Sequence[int]) -> list[Position]:
    """One forward of prompt + label; at each label token's place the numbers behind its log p."""
    ids = torch.tensor([[*prompt, *label]], device=model.lm_head_weight.device)  # (1, T)
    first = len(prompt) - 1  # the state at a position predicts the next token
    h = model(ids)[0, first : first + len(label)]  # (label tokens, D)
    logits = model.logits(h).cpu()  # (label tokens, V)
    log_sum_exp = logits.logsumexp(dim=-1)
    best = logits.topk(min(LIKELIEST, logits.shape[1]))
    return [
        Position(
            token,
            logits[t, token].item(),
            log_sum_exp[t].item(),
            tuple(
                (int(token), float(logit - log_sum_exp[t]))
                for token, logit in zip(best.indices[t], best.values[t], strict=True)
            ),
        )
        for t, token in enumerate(label)
    ]


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


def ranked(values: Sequence[float]) -> tuple[int, int]:
    """The classes with the highest and the second highest value."""
    order = sorted(range(len(values)), key=lambda y: -values[y])
    return order[0], order[1]


def capital(name: str) -> str:
    """The name as it begins a sentence."""
    return name[:1].upper() + name[1:]


def label_reasons(
    tokenizer: Tokenizer,
    prompt: Prompt,
    words: Sequence[str],
    found: dict[str, list[list[Position]]],
    sums: dict[str, list[float]],
    blank: dict[str, list[float]] | None,
) -> list[str]:
    """In words why each model decided as it did; of two models also what the second changed.

    blank: the sums behind the template without the text, where there are any.
    """
    lines = []
    for name, rows in found.items():
        values = sums[name]
        best, other = ranked(values)
        margin = values[best] - values[other]
        mass = label_mass(np.array([values]), [prompt.labels]).item()
        odds = f"{exp(margin):.4g}" if margin < 20 else f"e^{margin:.0f}"
        lines.append(
            f"{capital(name)} says {words[best]}: log p {values[best]:.4f} against "
            f"{values[other]:.4f} of {words[other]}, a margin of {margin:.4f}: {words[best]} is "
            f"{odds} times as likely."
        )
        if margin == 0:
            lines.append("A tie: the first is taken. In --dtype float32 they may differ.")
        pairs = list(zip(rows[best], rows[other], strict=False))
        if len(rows[best]) == len(rows[other]) == 1:
            (a, b) = pairs[0]
            lines.append(
                "Both words are predicted at one place, where log Σ exp is the same: the margin "
                f"is that of the logits, {a.logit:.4f} - {b.logit:.4f}."
            )
        elif len(rows[best]) == len(rows[other]):
            terms = [f"{a.log_p - b.log_p:+.4f} (token {t + 1})" for t, (a, b) in enumerate(pairs)]
            lines.append(f"Token by token the margin is {' '.join(terms)}.")
        else:
            parts = [
                f"{words[y]} {' '.join(f'{p.log_p:+.4f}' for p in rows[y])}" for y in (best, other)
            ]
            lines.append(
                f"The words differ in tokens, and each one more can only lower the sum: "
                f"{', '.join(parts)}."
            )
        token, log_p = rows[best][0].likeliest[0]
        ours = any(ids[0] == token for ids in prompt.labels)
        rather = "begins one of them" if ours else "begins none of them"
        lines.append(
            f"All label words together hold {mass:.2%} of the probability; the likeliest token of "
            f"all, {visible(tokenizer.decode([token]))} ({exp(log_p):.2%}), {rather}."
        )
        if blank:
            lines.append(text_reason(words, values, blank[name]))
        lines.append("")
    if len(found) == 2:
        lines += change_reasons(words, sums)
    return lines


def head_reasons(
    words: Sequence[str],
    weight: Tensor,
    bias: Tensor,
    states: dict[str, Tensor],
    sums: dict[str, list[float]],
    blank: dict[str, list[float]] | None,
) -> list[str]:
    """In words why the head decided as it did on each model's state; blank as in label_reasons."""
    lines = []
    for name, h in states.items():
        best, other = ranked(sums[name])
        w, b = weight[best] - weight[other], (bias[best] - bias[other]).item()
        margin, along = sums[name][best] - sums[name][other], (w @ h).item()
        cosine = along / (w.norm() * h.norm()).item()
        lines.append(
            f"{capital(name)} says {words[best]}: score {sums[name][best]:.4f} against "
            f"{sums[name][other]:.4f} of {words[other]}, a margin of {margin:.4f}."
        )
        lines.append(
            f"It is d·h + b with d = w({words[best]}) - w({words[other]}): {along:.4f} + {b:.4f}; "
            f"d·h = |d| |h| cos = {w.norm():.4f} · {h.norm():.4f} · {cosine:.4f}."
        )
        if blank:
            lines.append(text_reason(words, sums[name], blank[name]))
        lines.append("")
    if len(states) == 2:
        a, b = states.values()
        cosine = (a @ b / (a.norm() * b.norm())).item()
        lines.append(
            f"What was trained turned h: the two states have cosine {cosine:.4f}, and their "
            f"distance is {(b - a).norm() / a.norm():.4f} of the first one's length."
        )
        lines += change_reasons(words, sums)
    return lines


def text_reason(words: Sequence[str], values: list[float], blank: list[float]) -> str:
    """How much of the margin stands there without the text, and how much the text has made."""
    best, other = ranked(values)
    before, margin = blank[best] - blank[other], values[best] - values[other]
    if before <= 0:
        verdict = "the text has decided it"
    elif margin - before >= before:
        verdict = "the text speaks for it more than the template alone does"
    else:
        verdict = f"most of the margin is there whatever the text says, which favours {words[best]}"
    side = "behind" if before < 0 else "ahead of"
    return (
        f"Where the template holds no text, {words[best]} is {abs(before):.4f} {side} "
        f"{words[other]}; this text moves that by {margin - before:+.4f} to {margin:+.4f}: "
        f"{verdict}."
    )


def change_reasons(words: Sequence[str], sums: dict[str, list[float]]) -> list[str]:
    """What the second model changed in the margin between the classes that count."""
    (base, before), (adapted, after) = sums.items()
    best, other = ranked(after)
    old, new = before[best] - before[other], after[best] - after[other]
    was = ranked(before)[0]
    turned = (
        f"the decision stays {words[best]}"
        if was == best
        else f"the decision turns from {words[was]} to {words[best]}"
    )
    return [
        f"From {base} to {adapted} the margin of {words[best]} over {words[other]} goes from "
        f"{old:+.4f} to {new:+.4f}, by {new - old:+.4f}: {turned}."
    ]
