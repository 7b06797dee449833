"""The whole computation of one text's decision, printed step by step, and the reasons for it.

Everything is computed by the definitions, one full forward per candidate. The printed numbers are
the ones that were added, so a reader can check every line by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
import torch

from qwen_min.command.terminal import WIDTH, clipped, columns, pad, paragraph, text_table, visible
from qwen_min.head import LinearHead, pooled_state
from qwen_min.metrics import softmax
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.scoring import label_mass, score_label
from qwen_min.tokenizer import Tokenizer

Scores = list[float]  # one for each class
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
    ids = torch.tensor([[*prompt, *label]], device=model.device)  # (1, T)
    first = len(prompt) - 1  # the state at a position predicts the next token
    h = model(ids)[0, first : first + len(label)]  # (label tokens, D)
    found = []
    for token, logits in zip(label, model.logits(h).cpu(), strict=True):  # logits (V,)
        log_sum_exp = logits.logsumexp(dim=-1)
        best = logits.topk(LIKELIEST)
        pairs = zip(best.indices.tolist(), (best.values - log_sum_exp).tolist(), strict=True)
        found.append(Position(token, logits[token].item(), log_sum_exp.item(), tuple(pairs)))
    return found


def explain_labels(
    tokenizer: Tokenizer,
    prompt: Prompt,
    empty_prompt: Prompt | None,
    words: Sequence[str],
    models: dict[str, Qwen],
) -> str:
    """The computation of the label words' scores, for each of `models` by name, side by side.

    empty_prompt: the prompt of an empty text, to compare with; None if the template allows none.
    """
    found, scores, empty_scores, reasons, figures = {}, {}, {}, {}, {}
    for name, model in models.items():
        found[name] = [label_positions(model, prompt.ids, ids) for ids in prompt.labels]
        scores[name] = [sum(p.log_p for p in word) for word in found[name]]
        figures[name] = [[p.logit, p.log_sum_exp, p.log_p] for word in found[name] for p in word]
        if empty_prompt:
            empty = [score_label(model, empty_prompt.ids, ids) for ids in empty_prompt.labels]
            empty_scores[name] = empty
        mass = label_mass(np.array([scores[name]]), [prompt.labels]).item()
        token, log_p = found[name][0][0].likeliest[0]
        begins = "begins" if any(ids[0] == token for ids in prompt.labels) else "does not begin"
        reasons[name] = [
            margin_reason(words, found[name], scores[name]),
            f"All label words together have {mass:.2%} of the probability. The most likely token, "
            f"{visible(tokenizer.decode([token]))} ({exp(log_p):.2%}), {begins} one of them.",
        ]

    # 1. logit - log-sum-exp = log p, for each token of each word.
    rows, places = [], {}
    for y, (word, ids) in enumerate(zip(words, prompt.labels, strict=True)):
        for t, token in enumerate(ids):
            rows.append(["" if t else word, str(token), visible(tokenizer.decode([token]))])
            places.setdefault(ids[:t], (y, t))  # for each beginning, the first word that has it
    heads = ["word", "id", "token"], ["logit", "- log Σ exp", "= log p"]
    parts = ["label words\n" + side_by_side(*heads, rows, figures, words=3)]

    # 2. The most likely tokens after each beginning.
    lines = []
    for beginning, (y, t) in places.items():
        pieces = ["the prompt", *(visible(tokenizer.decode([token])) for token in beginning)]
        lines.append(f"the {LIKELIEST} most likely tokens after {' + '.join(pieces)}")
        for name, positions in found.items():
            line = pad(f"  {name}", 12)
            for token, log_p in positions[y][t].likeliest:
                piece = clipped(visible(tokenizer.decode([token])))
                line += pad(f"{piece} {exp(log_p):.4f}", 17)
            lines.append(line.rstrip())
    parts.append("\n".join(lines))

    # 3. Sums, softmax, decision.
    parts.append(decision("sum of log p", words, scores, empty_scores, reasons))
    return "\n\n".join([prompt_part(tokenizer, prompt), *parts])


def explain_head(
    tokenizer: Tokenizer,
    prompt: Prompt,
    empty_prompt: Prompt | None,
    words: Sequence[str],
    models: dict[str, Qwen],
    head: LinearHead,
) -> str:
    """The computation of a head's scores; arguments as in `explain_labels`."""
    weight = head.weight.cpu()  # (C, D)
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.cpu()
    states, scores, empty_scores, reasons, figures = {}, {}, {}, {}, {}
    for name, model in models.items():
        states[name] = h = pooled_state(model, prompt.ids, head.pooling, head.layer).cpu()
        scores[name] = s = head.scores(h[None])[0].tolist()
        if empty_prompt:
            empty = pooled_state(model, empty_prompt.ids, head.pooling, head.layer).cpu()
            empty_scores[name] = head.scores(empty[None])[0].tolist()
        figures[name] = [[weight[y] @ h, bias[y], s[y]] for y in range(len(words))]
        best, second = ranked(s)
        d, b = weight[best] - weight[second], bias[best] - bias[second]
        reasons[name] = [
            f"The margin is d·h + b with d = w({words[best]}) - w({words[second]}): {d @ h:.4f} + "
            f"{b:.4f}. In it, d·h = |d| |h| cos = {d.norm():.4f} · {h.norm():.4f} · "
            f"{torch.cosine_similarity(d, h, dim=0):.4f}."
        ]

    # 1. The state h.
    pooled = {"last": "the last token's state", "mean": "the mean of all states"}[head.pooling]
    norm = " and the final norm" * (head.layer == model.config.num_hidden_layers)
    rows = [
        [f"  {name}", *(f"{x:.3f}" for x in h[:6]), "…", f"{h.norm():.3f}"]
        for name, h in states.items()
    ]
    table = text_table(["", *(f"h_{i}" for i in range(1, 7)), "", "|h|"], rows)
    title = f"h: {pooled} after layer {head.layer}{norm}, {weight.shape[1]} numbers"
    parts = [prompt_part(tokenizer, prompt), f"{title}\n{table}"]
    if len(states) == 2:
        a, b = states.values()
        cosine, distance = torch.cosine_similarity(a, b, dim=0), (b - a).norm() / a.norm()
        parts[-1] += f"\n  cosine between both {cosine:.4f}, distance / first |h| {distance:.4f}"

    # 2. W h + b, softmax, decision.
    rows = [[word, f"{w.norm():.4f}"] for word, w in zip(words, weight, strict=True)]
    heads = ["class", "|w|"], ["w·h", "+ b", "= score"]
    parts.append("W h + b\n" + side_by_side(*heads, rows, figures))
    parts.append(decision("score", words, scores, empty_scores, reasons))
    return "\n\n".join(parts)


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
    if "\ufffd" in "".join(lines):
        lines += ["", "  \ufffd: a part of a character"]
    return "\n".join(lines)


def side_by_side(
    heads: list[str],
    figure_heads: list[str],
    rows: list[list[str]],
    figures: dict[str, list[list]],
    words: int = 1,
) -> str:
    """A table of `rows`, followed in each row by the figures of each model: numbers or text."""
    for name, of_model in figures.items():
        first, *others = figure_heads
        heads = [*heads, f"{name}: {first}" if len(figures) > 1 else first, *others]
        cells = [[x if isinstance(x, str) else f"{x:.4f}" for x in row] for row in of_model]
        rows = [[*row, *more] for row, more in zip(rows, cells, strict=True)]
    return text_table(heads, rows, words)


def ranked(scores: Scores) -> tuple[int, int]:
    """The classes with the highest and the second highest score."""
    best, second, *_ = sorted(range(len(scores)), key=lambda y: -scores[y])
    return best, second


def decision(
    quantity: str,
    words: Sequence[str],
    scores: dict[str, Scores],
    empty_scores: dict[str, Scores],
    reasons: dict[str, list[str]],
) -> str:
    """Each model's softmax and decision, and in sentences why; of two models also what changed.

    All dicts are by model. quantity: what a score is. empty_scores: the scores without a text, or
    none. reasons: sentences to add.
    """
    figures, lines = {}, []
    for name, s in scores.items():
        best, second = ranked(s)
        margin, p = s[best] - s[second], softmax([s])[0]
        figures[name] = [[s[y], p[y], "<- decision" * (y == best)] for y in range(len(s))]
        odds = f"{exp(margin):.4g}" if margin < 20 else f"e^{margin:.0f}"
        lines.append(
            f"{name[:1].upper()}{name[1:]} says {words[best]}: {quantity} {s[best]:.4f} against "
            f"{s[second]:.4f} of {words[second]}, a margin of {margin:.4f}. {words[best]} is "
            f"{odds} times as likely."
        )
        if margin == 0:
            lines.append("A tie: the first class is taken. --dtype float32 may separate them.")
        lines += reasons[name]
        if empty_scores:
            lines.append(text_reason(words, s, empty_scores[name]))
        lines.append("")
    if len(scores) == 2:
        (base, before), (adapted, after) = scores.items()
        was, (best, second) = ranked(before)[0], ranked(after)
        old, new = before[best] - before[second], after[best] - after[second]
        turn = "stays" if was == best else f"changes from {words[was]} to"
        lines.append(
            f"From {base} to {adapted} the margin of {words[best]} over {words[second]} changes by "
            f"{new - old:+.4f}, from {old:+.4f} to {new:+.4f}. The decision {turn} {words[best]}."
        )
    table = side_by_side(["class"], [quantity, "softmax", ""], [[word] for word in words], figures)
    return f"{table}\n\nWhy\n{paragraph(lines)}"


def margin_reason(words: Sequence[str], found: Sequence[list[Position]], scores: Scores) -> str:
    """How the tokens of the two best label words make the margin."""
    best, second = ranked(scores)
    a, b = found[best], found[second]
    if len(a) == len(b) == 1:
        return (
            "Both words are one token, predicted at the same position with the same log Σ exp. So "
            f"the margin is the difference of the logits, {a[0].logit:.4f} - {b[0].logit:.4f}."
        )
    if len(a) == len(b):
        terms = " ".join(f"{p.log_p - q.log_p:+.4f}" for p, q in zip(a, b, strict=True))
        return f"Token by token, the margin is {terms}."
    sums = [" ".join([words[y], *(f"{p.log_p:+.4f}" for p in found[y])]) for y in (best, second)]
    return (
        "The words have different numbers of tokens, and each further token can only lower the "
        f"sum: {', '.join(sums)}."
    )


def text_reason(words: Sequence[str], scores: Scores, empty_scores: Scores) -> str:
    """Which part of the margin is there without the text, and which part the text adds."""
    best, second = ranked(scores)
    before, margin = empty_scores[best] - empty_scores[second], scores[best] - scores[second]
    verdict = f"Most of the margin is there without the text: the template favours {words[best]}"
    if before <= 0:
        verdict = "The text decides"
    elif margin - before >= before:
        verdict = "The text contributes more than the template"
    side = "behind" if before < 0 else "ahead of"
    return (
        f"Without a text in the template, {words[best]} is {abs(before):.4f} {side} "
        f"{words[second]}. This text adds {margin - before:+.4f}, which gives {margin:+.4f}. "
        f"{verdict}."
    )
