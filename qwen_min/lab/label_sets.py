"""Comparison of several sets of label words on the same prompts.

All words of all sets are candidates of one pass. A set can fail in two ways. Its words may rank the
texts badly: the AUC shows this. Or one word may be more likely than the other in every text: this
moves the best threshold and leaves the AUC as it is. Only the first depends on what the words mean.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qwen_min.command.terminal import text_table, visible
from qwen_min.errors import UserError
from qwen_min.lab.calibration import best_threshold, log_mean_probability, measures, number, shares
from qwen_min.prompt import Prompt, parse_labels
from qwen_min.scoring import label_mass
from qwen_min.tokenizer import Tokenizer

Set = tuple[str, ...]  # one word for each class, in class order


def parse_label_sets(argument: str, labels: Set, say: Callable | None = None) -> list[Set]:
    """ "消极,积极;差,好" → the set of --labels, then these. Raises UserError for a wrong set.

    say: as in `parse_labels`.
    """
    sets = [labels]
    for part in re.split("[;；]", argument):
        words = parse_labels(part, "--label-sets", say)
        if len(words) != len(labels):
            counts = f"has {len(words)} words, expected {len(labels)}"
            raise UserError(f"--label-sets: {part!r} {counts}: one for each class of --labels")
        sets.append(words)
    return list(dict.fromkeys(sets))


def distinct_words(sets: Sequence[Set]) -> Set:
    """Every word once, those of the first set first."""
    return tuple(dict.fromkeys(word for words in sets for word in words))


def with_first_tokens(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with each label's first token as a further candidate.

    It costs no forward: the logits at that position are computed anyway.
    """
    more = {p.labels: (*p.labels, *((ids[0],) for ids in p.labels)) for p in prompts}
    return [replace(p, labels=more[p.labels]) for p in prompts]


def compare_sets(
    labels: np.ndarray, sets: Sequence[Set], prompts: Sequence[Prompt], scores: np.ndarray
) -> list[dict]:
    """The words and the measures of each set.

    prompts and scores (n, 2 · words) are those of `with_first_tokens` on `distinct_words(sets)`.
    The token ids are those of the first row.
    """
    words = distinct_words(sets)
    found = []
    for chosen in sets:
        columns = [words.index(word) for word in chosen]
        own, first = scores[:, columns], scores[:, [len(words) + c for c in columns]]
        of_rows = [tuple(prompt.labels[c] for c in columns) for prompt in prompts]
        ids = of_rows[0]
        uses = Counter(token for word in ids for token in set(word))
        # Words with the same first token tie there: the decision would be arbitrary.
        begin_alike = len({word[0] for word in ids}) < len(ids)
        corrected = own - log_mean_probability(own)  # batch calibration
        oracle, threshold = best_threshold(labels, own) if len(chosen) == 2 else (None, None)
        entry = {"labels": list(chosen), "ids": [*map(list, ids)], "lengths": [*map(len, ids)]}
        entry["shared_tokens"] = sorted(token for token, count in uses.items() if count > 1)
        entry["mean_scores"] = own.mean(axis=0).tolist()
        entry["label_mass"] = float(label_mass(own, of_rows).mean())
        entry |= measures(labels, own) | {"oracle_accuracy": oracle, "oracle_threshold": threshold}
        entry["batch_accuracy"] = measures(labels, corrected)["accuracy"]
        entry["first_token"] = None if begin_alike else measures(labels, first)
        found.append(entry)
    return found


def format_sets(found: Sequence[dict], tokenizer: Tokenizer) -> str:
    """Tables of the sets' words, of their measures, and of what each set loses against the best."""

    def pieces(ids: Sequence[int]) -> str:
        return " ".join(visible(tokenizer.decode([token])) for token in ids)

    two = len(found[0]["labels"]) == 2
    word_rows, rows = [], []
    for entry in found:
        name, shared = ",".join(entry["labels"]), pieces(entry["shared_tokens"])
        columns = entry["labels"], entry["ids"], entry["mean_scores"]
        for word, ids, mean in zip(*columns, strict=True):
            shown = [pieces(ids), " ".join(map(str, ids)), f"{mean:.2f}"]
            word_rows.append([name, word, *shown, f"shared: {shared}" if shared else ""])
        row = [name, *(number(entry[key]) for key in ("label_mass", "accuracy", "auc_roc"))]
        row.append(number(entry["first_token"] and entry["first_token"]["accuracy"]))
        row += [number(entry["batch_accuracy"]), shares(entry["predicted"])]
        if two:
            row.append(f"{entry['oracle_accuracy']:.4f} at {entry['oracle_threshold']:+.2f}")
        rows.append(row)
    heads = ["set", "mass", "accuracy", "AUC", "first token", "batch-cal.", "predicted"]
    text = f"""label sets: all words scored in one pass over the prompts

{text_table(["set", "word", "tokens", "ids", "mean log p", ""], word_rows, words=4)}

{text_table(heads + ["best threshold"] * two, rows)}

mass: probability of the set's words together. first token: accuracy by the first token of each word
alone. batch-cal.: accuracy after batch calibration (Zhou et al. 2023), which uses no labels.
predicted: share of {"the second class" if two else "each class"} among the decisions."""
    return text + losses(found) if two else text


def losses(found: Sequence[dict]) -> str:
    """What a best threshold is, and what each set loses against the most accurate one, two classes.

    The accuracy gap that remains at both best thresholds is due to ranking.
    """
    text = """
best threshold: an oracle, the accuracy with the cut of s1 - s0 that is best on these same rows."""
    best = max(found, key=lambda entry: entry["accuracy"])
    rows = []
    for entry in found:
        if loss := best["accuracy"] - entry["accuracy"]:
            ranking = best["oracle_accuracy"] - entry["oracle_accuracy"]
            figures = [f"{x:.4f}" for x in (loss, loss - ranking, ranking)]
            cause = "ranking" if ranking >= loss / 2 else "threshold"
            rows.append([",".join(entry["labels"]), *figures, cause])
    heads = ["set", "accuracy lost", "by threshold", "by ranking", "main cause"]
    against = f"\n\nagainst {','.join(best['labels'])}:\n"
    return text + against + text_table(heads, rows) if rows else text
