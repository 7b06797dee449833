"""One text's whole computation, as a person reads it: what a decision is made of, and why.

Everything is computed from the definition, one full forward for each candidate, and the numbers
shown are those that were added, so that a reader can check every line with pencil and paper.
"""

from collections.abc import Sequence
from math import exp

import torch

from qwen_min.command.terminal import WIDTH, clipped, columns, pad, paragraph, text_table, visible
from qwen_min.head import LinearHead
from qwen_min.lab.steps import LIKELIEST, head_reasons, head_state, label_positions, label_reasons
from qwen_min.metrics import softmax
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.tokenizer import Tokenizer


def explain_labels(
    tokenizer: Tokenizer,
    prompt: Prompt,
    blank: Prompt | None,
    words: Sequence[str],
    models: dict[str, Qwen],
) -> str:
    """The computation of the label words' scores, for each of `models` by name, side by side.

    blank: the prompt of no text, where the template can make one, to compare with.
    """
    found = {
        name: [label_positions(model, prompt.ids, ids) for ids in prompt.labels]
        for name, model in models.items()
    }
    sums = {name: [sum(p.log_p for p in word) for word in rows] for name, rows in found.items()}
    bare = blank and {
        name: [sum(p.log_p for p in label_positions(model, blank.ids, ids)) for ids in blank.labels]
        for name, model in models.items()
    }

    # 1. logit - log-sum-exp = log p, for each token of each word.
    heads = ["word", "id", "token"]
    for name in found:
        heads += [of_model(name, "logit", found), "- log Σ exp", "= log p"]
    rows = []
    for y, (word, ids) in enumerate(zip(words, prompt.labels, strict=True)):
        for t, token in enumerate(ids):
            row = ["" if t else word, str(token), visible(tokenizer.decode([token]))]
            for words_of in found.values():
                at = words_of[y][t]
                row += [f"{at.logit:.4f}", f"{at.log_sum_exp:.4f}", f"{at.log_p:.4f}"]
            rows.append(row)
        if len(ids) > 1:
            rows.append(["", "", "sum"] + [x for n in found for x in ("", "", f"{sums[n][y]:.4f}")])
    parts = [prompt_part(tokenizer, prompt), "label words\n" + text_table(heads, rows, words=3)]

    # 2. What the model would rather have said, once for each beginning that words share.
    lines = []
    beginnings = dict.fromkeys(ids[:t] for ids in prompt.labels for t in range(len(ids)))
    for beginning in beginnings:
        place = " + ".join(
            ["the prompt", *(visible(tokenizer.decode([token])) for token in beginning)]
        )
        lines.append(f"the {LIKELIEST} likeliest tokens behind {place}")
        t = len(beginning)
        y = next(y for y, ids in enumerate(prompt.labels) if ids[:t] == beginning and len(ids) > t)
        for name, words_of in found.items():
            cells = [
                pad(f"{clipped(visible(tokenizer.decode([token])))} {exp(log_p):.4f}", 16)
                for token, log_p in words_of[y][t].likeliest
            ]
            lines.append((pad(f"  {name}", 12) + " ".join(cells)).rstrip())
    parts.append("\n".join(lines))

    # 3. Sums, softmax, decision.
    parts.append(decision_table("sum of log p", words, sums))
    parts.append("Why\n" + paragraph(label_reasons(tokenizer, prompt, words, found, sums, bare)))
    return "\n\n".join(parts)


def explain_head(
    tokenizer: Tokenizer,
    prompt: Prompt,
    blank: Prompt | None,
    words: Sequence[str],
    models: dict[str, Qwen],
    head: LinearHead,
) -> str:
    """The computation of a head's scores, for each of `models` by name, side by side.

    blank: as in `explain_labels`.
    """
    states = {name: head_state(model, prompt.ids, head) for name, model in models.items()}
    weight = head.weight.cpu().float()  # (C, D)
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.cpu().float()
    last = head.layer == next(iter(models.values())).config.num_hidden_layers
    of = "the last token's state" if head.pooling == "last" else "the mean of all tokens' states"
    lines = [f"h: {of} after layer {head.layer}{' and the final norm' * last}, {weight.shape[1]}"]
    lines[0] += " numbers"
    rows = [
        [f"  {name}", *(f"{x:.3f}" for x in h[:6].tolist()), "…", f"{h.norm():.3f}"]
        for name, h in states.items()
    ]
    lines.append(text_table(["", "h_1", "h_2", "h_3", "h_4", "h_5", "h_6", "", "|h|"], rows))
    parts = [prompt_part(tokenizer, prompt), "\n".join(lines)]

    heads, rows = ["class", "|w|"], []
    for name in states:
        heads += [of_model(name, "w·h", states), "+ b", "= score"]
    sums = {name: (weight @ h + bias).double().tolist() for name, h in states.items()}
    bare = blank and {
        name: (weight @ head_state(model, blank.ids, head) + bias).double().tolist()
        for name, model in models.items()
    }
    for y, word in enumerate(words):
        row = [word, f"{weight[y].norm():.4f}"]
        for name, h in states.items():
            row += [f"{weight[y] @ h:.4f}", f"{bias[y]:.4f}", f"{sums[name][y]:.4f}"]
        rows.append(row)
    parts.append("W h + b\n" + text_table(heads, rows))
    parts.append(decision_table("score", words, sums))
    parts.append("Why\n" + paragraph(head_reasons(words, weight, bias, states, sums, bare)))
    return "\n\n".join(parts)


def of_model(name: str, what: str, models: dict) -> str:
    """A column's head: whose it is, where there are several."""
    return f"{name}: {what}" if len(models) > 1 else what


def prompt_part(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """The prompt's tokens, each above its id, in lines that fit the terminal."""
    cut = ", the text cut to its first tokens" * prompt.truncated
    lines, above, below = [f"prompt: {len(prompt.ids)} tokens{cut}"], "", ""
    for token in prompt.ids:
        text, number = visible(tokenizer.decode([token])), str(token)
        width = max(columns(text), len(number)) + 2
        if columns(above) + width + 2 > WIDTH:
            lines += [f"  {above}".rstrip(), f"  {below}".rstrip(), ""]
            above = below = ""
        above, below = above + pad(text, width), below + pad(number, width)
    lines += [f"  {above}".rstrip(), f"  {below}".rstrip()]
    if any("\ufffd" in tokenizer.decode([token]) for token in prompt.ids):
        lines += ["", "  \ufffd: a part of a character"]
    return "\n".join(lines)


def decision_table(what: str, words: Sequence[str], sums: dict[str, list[float]]) -> str:
    """Sum, softmax and decision of each model."""
    heads, columns_of = ["class"], []
    for name, values in sums.items():
        heads += [of_model(name, what, sums), "softmax", ""]
        p, best = softmax([values])[0], values.index(max(values))
        columns_of.append(
            [[f"{v:.4f}", f"{p[y]:.4f}", "<- decision" * (y == best)] for y, v in enumerate(values)]
        )
    rows = [
        [word, *(cell for model in columns_of for cell in model[y])] for y, word in enumerate(words)
    ]
    return text_table(heads, rows)
