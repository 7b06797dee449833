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
SHOWN = 10  # clauses in the table


def split_clauses(text: str) -> list[str]:
    """The clauses of a text, each with the marks behind it; joined they are the text."""
    return CLAUSE.findall(text)


def without_each(clauses: Sequence[str]) -> list[str]:
    """For each clause the text without it; none where there is only one clause."""
    texts = ["".join([*clauses[:i], *clauses[i + 1 :]]) for i in range(len(clauses))]
    return texts if len(clauses) > 1 else []


def margins(scores: np.ndarray) -> np.ndarray:
    """Of each row of scores (n, C), the score of row 0's decision minus the highest other: (n,)."""
    best = scores[0].argmax()
    return scores[:, best] - np.delete(scores, best, axis=1).max(axis=1)


def format_clauses(clauses: Sequence[str], scores: Mapping[str, np.ndarray]) -> str:
    """The margins without each clause, the most decisive first, by the last of the models.

    scores: for each model by name (1 + clauses, C), of the whole text and of `without_each`.
    """
    if len(clauses) < 2:
        return "the text is one clause: none can be left out"
    found = [margins(of) for of in scores.values()]
    change = np.abs(found[-1][1:] - found[-1][0])
    rows = [["(none)", *(f"{m[0]:+.4f}" for m in found)]]
    for i in np.argsort(-change, kind="stable")[:SHOWN]:
        clause = clipped(one_line(clauses[i].strip())[:WIDTH], 40)
        rows.append([clause, *(f"{m[i + 1]:+.4f}" for m in found)])
    return (
        f"margin of the decision over the next class, with one of {len(clauses)} clauses left out\n"
        f"{text_table(['left out', *scores], rows)}\n\n"
        f"The {len(rows) - 1} with the largest change. Below zero, the decision is another one.\n"
        "  This is a counterfactual, not a cause: the shorter text is another text,\n"
        "  and clauses act together."
    )
