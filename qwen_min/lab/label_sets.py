"""Several sets of label words on the same prompts: which words, which threshold, which ranking?

All words of all sets are candidates of one pass. A set can be bad in two ways: its words may rank
the texts badly, which the AUC shows, or one of them may be likelier than the other whatever the
text says, which moves the threshold and leaves the AUC. Only the first is about what they mean.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qwen_min.command.terminal import text_table, visible
from qwen_min.errors import UserError
from qwen_min.lab.calibration import batch, best_threshold, measures, shares
from qwen_min.prompt import Prompt, parse_labels
from qwen_min.scoring import label_mass
from qwen_min.tokenizer import Tokenizer

Set = tuple[str, ...]  # one word for each class, in class order


def parse_label_sets(argument: str, labels: Set) -> list[Set]:
    """ "负面,正面;差,好" → the set of --labels, then the others, each with as many words."""
    sets = [labels]
    for part in argument.split(";"):
        words = parse_labels(part, "--label-sets")
        if len(words) != len(labels):
            raise UserError(
                f"--label-sets: {part!r} has {len(words)} words, expected {len(labels)}, one for "
                f"each class of --labels {','.join(labels)}"
            )
        if words in sets[1:]:
            raise UserError(f"--label-sets {argument!r}: {part} stands in it twice; leave one out")
        sets.append(words)
    return list(dict.fromkeys(sets))


def distinct_words(sets: Sequence[Set]) -> Set:
    """Every word once, in order: those of the first set are the first."""
    return tuple(dict.fromkeys(word for words in sets for word in words))


def with_first_tokens(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with each label's first token as a candidate more: it costs nothing, since its
    logit is that of a state which is computed anyway."""
    return [replace(p, labels=(*p.labels, *((ids[0],) for ids in p.labels))) for p in prompts]


def compare_sets(
    labels: np.ndarray, sets: Sequence[Set], prompts: Sequence[Prompt], scores: np.ndarray
) -> list[dict]:
    """What each set's words are, and how they do.

    prompts and scores (n, 2 · words) are those of `with_first_tokens` on `distinct_words(sets)`.
    The ids are the first row's.
    """
    words = distinct_words(sets)
    found = []
    for chosen in sets:
        columns = [words.index(word) for word in chosen]
        own, first = scores[:, columns], scores[:, [len(words) + c for c in columns]]
        ids = [prompts[0].labels[c] for c in columns]
        of_rows = [[prompt.labels[c] for c in columns] for prompt in prompts]
        tokens = [token for word in ids for token in set(word)]
        # Words that begin alike have equal first tokens: no decision, where one would be shown.
        begin_alike = len({word[0] for word in ids}) < len(ids)
        two = len(chosen) == 2
        oracle, threshold = best_threshold(labels, own) if two else (None, None)
        found.append(
            {
                "labels": list(chosen),
                "ids": [list(word) for word in ids],
                "lengths": [len(word) for word in ids],
                "shared_tokens": sorted({t for t in tokens if tokens.count(t) > 1}),
                "mean_scores": own.mean(axis=0).tolist(),
                "label_mass": float(label_mass(own, of_rows).mean()),
                **measures(labels, own),
                "oracle_accuracy": oracle,
                "oracle_threshold": threshold,
                "batch_accuracy": measures(labels, batch(own))["accuracy"],
                "first_token": None if begin_alike else measures(labels, first),
            }
        )
    return found


def format_sets(found: Sequence[dict], tokenizer: Tokenizer) -> str:
    """Tables of the sets' words and of their figures; below them what a set loses, and by what."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    two = len(found[0]["labels"]) == 2
    word_rows, rows = [], []
    for entry in found:
        name = ",".join(entry["labels"])
        shared = " ".join(visible(tokenizer.decode([t])) for t in entry["shared_tokens"])
        notes = [name, f"shared: {shared}" if shared else ""]
        for word, ids, mean in zip(
            entry["labels"], entry["ids"], entry["mean_scores"], strict=True
        ):
            pieces = " ".join(visible(tokenizer.decode([token])) for token in ids)
            shown = " ".join(map(str, ids))
            word_rows.append([notes[0], word, pieces, shown, f"{mean:.2f}", notes[1]])
            notes = ["", ""]  # once for a set
        row = [name, number(entry["label_mass"]), number(entry["accuracy"])]
        row += [shares(entry["predicted"]), number(entry["auc_roc"])]
        row.append(number(entry["first_token"] and entry["first_token"]["accuracy"]))
        row.append(number(entry["batch_accuracy"]))
        if two:
            row.append(f"{number(entry['oracle_accuracy'])} at {entry['oracle_threshold']:+.2f}")
        rows.append(row)
    heads = ["set", "mass", "accuracy", "predicted", "AUC", "first token", "batch-cal."]
    heads += ["best threshold"] * two
    lines = [
        "label sets: all words scored in one pass over the prompts",
        "",
        text_table(["set", "word", "tokens", "ids", "mean log p", ""], word_rows, words=4),
        "",
        text_table(heads, rows),
        "",
        f"mass: probability of the words together. predicted: share of {'the second class' * two}"
        f"{'each class' * (not two)} among the decisions.",
        "first token: accuracy by each word's first token alone. batch-cal.: accuracy after batch",
        "calibration (Zhou et al. 2023), which sees no classes.",
    ]
    if two:
        lines += [
            "best threshold: an oracle, the accuracy if s1 - s0 were cut where it is best on these",
            "very rows.",
            "",
            verdicts(found),
        ]
    return "\n".join(lines).rstrip()


def verdicts(found: Sequence[dict]) -> str:
    """How much of each set's loss against the best one is threshold, and how much ranking.

    What is left of the loss when both are cut at their best threshold is ranking.
    """
    best = max(found, key=lambda entry: entry["accuracy"])
    rows = []
    for entry in found:
        loss = best["accuracy"] - entry["accuracy"]
        if entry is best or loss == 0:
            continue
        ranking = best["oracle_accuracy"] - entry["oracle_accuracy"]
        share = (loss - ranking) / loss
        main = "ranking more than threshold" if share < 0.5 else "threshold more than ranking"
        main = "threshold, not ranking" if share > 0.8 else main
        figures = [f"{x:.4f}" for x in (loss, loss - ranking, ranking)]
        rows.append([",".join(entry["labels"]), *figures, main])
    if not rows:
        return ""
    heads = ["set", "accuracy lost", "by threshold", "by ranking", "so it is"]
    return f"against {','.join(best['labels'])}:\n" + text_table(heads, rows)
