"""The whole computation of one text's decision, printed step by step, and the reasons for it.

Everything is computed by the definitions, one full forward per candidate. The printed numbers are
the ones that were added, so a reader can check every line by hand.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch

from qwen_min.command.terminal import WIDTH, clipped, columns, text_table, visible
from qwen_min.head import LinearHead, pooled_state
from qwen_min.metrics import softmax
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.scoring import label_mass, score_label
from qwen_min.tokenizer import Tokenizer

Models = dict[str, Qwen]  # by name
Scores = dict[str, list[float]]  # for each model by name, a number for each class
Reasons = dict[str, dict[str, str]]  # for each model by name, rows of the table "why"
LIKELIEST = 4  # tokens listed at each position: so many fit the terminal


class Position(NamedTuple):
    """One label token, as the hidden state at the previous position predicts it."""

    token: int
    logit: float
    log_sum_exp: float  # over the vocabulary
    log_p: float  # logit - log_sum_exp
    likeliest: list[tuple[int, float]]  # the most likely tokens here: (token, log p), falling


@torch.inference_mode()
def label_positions(model: Qwen, prompt: Sequence[int], label: Sequence[int]) -> list[Position]:
    """One forward of prompt + label; for each label token the numbers that make up its log p."""
    ids = torch.tensor([[*prompt, *label]], device=model.device)  # (1, T)
    first = len(prompt) - 1  # the state at a position predicts the next token
    h = model(ids)[0, first : first + len(label)]  # (label tokens, D)
    found = []
    for token, logits in zip(label, model.logits(h).cpu(), strict=True):  # logits (V,)
        logit, log_sum_exp = logits[token].item(), logits.logsumexp(dim=-1).item()
        values, tokens = logits.topk(LIKELIEST)
        likeliest = list(zip(tokens.tolist(), (values - log_sum_exp).tolist(), strict=True))
        found.append(Position(token, logit, log_sum_exp, logit - log_sum_exp, likeliest))
    return found


def explain_labels(
    tokenizer: Tokenizer, prompt: Prompt, empty: Prompt | None, words: Sequence[str], models: Models
) -> str:
    """The computation of the label words' scores, by each of `models`.

    empty: the prompt of an empty text, to compare with; None if the template allows none.
    """

    def piece(token: int) -> str:
        return visible(tokenizer.decode([token]))

    found, scores, empty_scores, reasons, rows = {}, {}, {}, {}, []
    for name, model in models.items():
        found[name] = [label_positions(model, prompt.ids, ids) for ids in prompt.labels]
        scores[name] = [sum(p.log_p for p in word) for word in found[name]]
        if empty:
            empty_scores[name] = [score_label(model, empty.ids, ids) for ids in empty.labels]
        # 1. logit - log-sum-exp = log p, for each token of each word.
        for word, positions in zip(words, found[name], strict=True):
            for p in positions:
                figures = digits(p.logit, p.log_sum_exp, p.log_p)
                rows.append([name, word, str(p.token), piece(p.token), *figures])
        best, second = ([p.log_p for p in found[name][y]] for y in ranked(scores[name]))
        differences = [a - b for a, b in zip_longest(best, second, fillvalue=0.0)]
        likeliest, log_p = found[name][0][0].likeliest[0]
        mass = label_mass(np.array([scores[name]]), [prompt.labels]).item()
        reasons[name] = {
            "margin by token (missing: 0)": " ".join(f"{x:+.4f}" for x in differences),
            "p(any label word)": f"{mass:.2%}",
            "most likely token": f"{piece(likeliest)} {np.exp(log_p):.2%}",
            "begins a label word": "yes" if likeliest in {w[0] for w in prompt.labels} else "no",
        }
    heads = ["model", "word", "id", "token", "logit", "- log Σ exp", "= log p"]
    parts = [prompt_part(tokenizer, prompt), f"label words\n{text_table(heads, rows, words=4)}"]

    # 2. The most likely tokens after the prompt, and after each beginning of a word.
    places = {ids[:t]: (y, t) for y, ids in enumerate(prompt.labels) for t in range(len(ids))}
    for beginning, (y, t) in places.items():
        after = " + ".join(["the prompt", *map(piece, beginning)])
        rows = []
        for name, of in found.items():
            pairs = [(clipped(piece(i), 8), np.exp(log_p)) for i, log_p in of[y][t].likeliest]
            rows.append([name, *(f"{text} {p:.4f}" for text, p in pairs)])
        table = text_table(rows[0], rows[1:], words=1 + LIKELIEST)
        parts.append(f"the {LIKELIEST} most likely tokens after {after}\n{table}")

    # 3. Sums, softmax, decision.
    parts.append(decision("sum of log p", words, scores, empty_scores, reasons))
    return "\n\n".join(parts)


def explain_head(
    tokenizer: Tokenizer,
    prompt: Prompt,
    empty: Prompt | None,
    words: Sequence[str],
    models: Models,
    head: LinearHead,
) -> str:
    """The computation of a head's scores; arguments as in `explain_labels`."""
    weight = head.weight.cpu()  # (C, D)
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.cpu()
    states, scores, empty_scores, reasons, rows, state_rows = {}, {}, {}, {}, [], []
    for name, model in models.items():
        states[name] = h = pooled_state(model, prompt.ids, head.pooling, head.layer).cpu()
        scores[name] = head.scores(h[None])[0].tolist()
        if empty:
            h_empty = pooled_state(model, empty.ids, head.pooling, head.layer)
            empty_scores[name] = head.scores(h_empty[None])[0].tolist()
        state_rows.append([name, *(f"{x:.3f}" for x in h[:6]), "…", f"{h.norm():.3f}"])
        for y, (word, w) in enumerate(zip(words, weight, strict=True)):
            rows.append([name, word, *digits(w.norm(), w @ h, bias[y], scores[name][y])])
        best, second = ranked(scores[name])
        d = weight[best] - weight[second]
        factors = digits(d.norm(), h.norm(), torch.cosine_similarity(d, h, dim=0))
        reasons[name] = {
            "= d·h, d = w(decision) - w(second)": f"{d @ h:.4f}",
            "+ b(decision) - b(second)": f"{bias[best] - bias[second]:.4f}",
            **dict(zip(("d·h = |d|", "* |h|", "* cos(d, h)"), factors, strict=True)),
        }

    # 1. The state h.
    norm = " and the final norm" * (head.layer == model.config.num_hidden_layers)
    pooled = {"last": "the last token's state", "mean": "the mean of all states"}[head.pooling]
    state = f"h: {pooled} after layer {head.layer}{norm}, {weight.shape[1]} numbers\n"
    state += text_table(["model", *(f"h_{i}" for i in range(1, 7)), "", "|h|"], state_rows)
    if len(states) == 2:
        a, b = states.values()
        cosine, distance = torch.cosine_similarity(a, b, dim=0), (b - a).norm() / a.norm()
        state += f"\ncosine between both {cosine:.4f}, distance / first |h| {distance:.4f}"

    # 2. W h + b, softmax, decision.
    heads = ["model", "class", "|w|", "w·h", "+ b", "= score"]
    product = f"W h + b\n{text_table(heads, rows, words=2)}"
    why = decision("score", words, scores, empty_scores, reasons)
    return "\n\n".join([prompt_part(tokenizer, prompt), state, product, why])


def prompt_part(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """The prompt's tokens, each above its id, in lines that fit the terminal."""
    pieces = [visible(tokenizer.decode([token])) for token in prompt.ids]
    ids = list(map(str, prompt.ids))
    n = max(1, WIDTH // (max(map(columns, pieces + ids)) + 2))  # tokens in a line
    starts = range(0, len(ids), n)
    tables = [text_table(pieces[i : i + n], [ids[i : i + n]], words=n) for i in starts]
    cut = ", the text cut to its first tokens" * prompt.truncated
    shown = f"prompt: {len(prompt.ids)} tokens{cut}\n" + "\n\n".join(tables)
    return shown + "\n\n\ufffd: a part of a character" * ("\ufffd" in shown)


def digits(*numbers: float) -> list[str]:
    """The numbers with four digits after the point."""
    return [f"{x:.4f}" for x in numbers]


def ranked(scores: list[float]) -> list[int]:
    """The classes with the highest and the second highest score; of equal ones the first."""
    return np.argsort(np.negative(scores), kind="stable")[:2].tolist()


def decision(
    quantity: str, words: Sequence[str], scores: Scores, empty_scores: Scores, reasons: Reasons
) -> str:
    """Each model's softmax and decision, and why; of two models also how the margin changes.

    quantity: what a score is. empty_scores: the scores without a text, or none.
    """
    rows, why, change = [], {}, []
    for name, s in scores.items():
        best, second = ranked(s)
        for y, p in enumerate(softmax([s])[0]):
            rows.append([name, words[y], *digits(s[y], p), "<- decision" * (y == best)])
        margin = s[best] - s[second]
        odds = f"{np.exp(margin):.4g}" if margin < 20 else f"e^{margin:.0f}"
        why[name] = {"decision": words[best] + " (a tie; try --dtype float32)" * (margin == 0)}
        why[name] |= {"second": words[second], "margin": f"{margin:.4f}", "odds = e^margin": odds}
        why[name] |= reasons[name]
        if empty_scores:
            empty = empty_scores[name][best] - empty_scores[name][second]
            adds = margin - empty
            why[name] |= {"margin without a text": f"{empty:+.4f}", "the text adds": f"{adds:+.4f}"}
            why[name]["the larger part"] = "the text" if adds >= empty else "the template"
    if len(scores) == 2:
        (base, before), (adapted, after) = scores.items()
        best, second = ranked(after)
        old, new = before[best] - before[second], after[best] - after[second]
        change.append(
            f"{base} to {adapted}: the margin of {words[best]} over {words[second]}\n"
            f"  goes from {old:+.4f} to {new:+.4f} ({new - old:+.4f})."
        )
    table = text_table(["model", "class", quantity, "softmax", ""], rows, words=2)
    facts = [[fact, *(of[fact] for of in why.values())] for fact in next(iter(why.values()))]
    why_table = text_table(["why", *why], facts, words=1 + len(why))
    return "\n\n".join([table, why_table, *change])
