"""Which parts of a text decide: each clause is left out once, and the margin computed again.

This is a counterfactual (occlusion, Zeiler and Fergus 2014, with clauses for patches), not a cause:
the shorter text is another text, and clauses act together.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from qwen_min.command.terminal import WIDTH, clipped, one_line, text_table

MARKS = "。！？；，、,.!?;\n"
# What a clause says, marks in 3.5 or a.b included; then its marks, with spaces and closing quotes.
CLAUSE = re.compile(
    rf"(?:[^{MARKS}]|(?<=[0-9A-Za-z])[.,](?=[0-9A-Za-z]))+[{MARKS}\s”’」』）)]*|[{MARKS}\s]+"
)


def split_clauses(text: str) -> list[str]:
    """The clauses of a text, each with the marks after it; joined they are the text."""
    return CLAUSE.findall(text)


def without_each(clauses: Sequence[str]) -> list[str]:
    """For each clause the text without it; none where there is only one clause."""
    texts = ["".join([*clauses[:i], *clauses[i + 1 :]]) for i in range(len(clauses))]
    return texts if len(clauses) > 1 else []


def margins(scores: np.ndarray, best: int) -> np.ndarray:
    """Of each row of scores (n, C), the score of class `best` minus the highest other: (n,)."""
    return scores[:, best] - np.delete(scores, best, axis=1).max(axis=1)


def format_clauses(clauses: Sequence[str], scores: Mapping[str, np.ndarray]) -> str:
    """The margins without each clause, the most decisive first, by the last of the models.

    scores: for each model by name (1 + clauses, C), of the whole text and of `without_each`. All
    margins are of the class that the last model decides for, so that models can be compared.
    """
    if len(clauses) < 2:
        found = "the text is one clause" if "".join(clauses).strip() else "the model reads no text"
        return f"{found}: no clause can be left out"
    *_, last = scores
    found = [margins(of, scores[last][0].argmax()) for of in scores.values()]
    change = np.abs(found[-1][1:] - found[-1][0])
    rows = [["(none)", *(f"{m[0]:+.4f}" for m in found)]]
    for i in np.argsort(-change, kind="stable"):
        clause = clipped(one_line(clauses[i].strip())[:WIDTH], 40)
        rows.append([clause, *(f"{m[i + 1]:+.4f}" for m in found)])
    return (
        f"margin of {last}'s decision over the best other, one of {len(clauses)} clauses left out\n"
        f"{text_table(['left out', *scores], rows)}\n\n"
        "Below zero, another class is ahead.\n"
        "  This is a counterfactual, not a cause: the shorter text is another text,\n"
        "  and clauses act together."
    )
