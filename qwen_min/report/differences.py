"""Names for the rows of a report, and everything besides the method in which the rows differ.

A name is the method, with a number from the second row of the method on.
"""

import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_min.report.compare import Result

UNKNOWN = "not known"  # about a field that older results lack
# Arguments that a method ignores.
UNUSED = {"head_only": {"lora_targets", "train_embeddings", "r", "alpha", "rslora", "dropout"}}
UNUSED["head_only"] |= {"epochs", "lr", "warmup", "batch_size", "clip", "eval_every"}
UNUSED["head_only"] |= {"save_every", "checkpointing"}
TITLES = {"train_data": "trained on"}

Groups = Sequence[Sequence["Result"]]  # the seeds of each row
Texts = dict[str, list[str | None]]  # what differs → a text for each row, None if it has no such


def rows_apart(groups: Groups) -> tuple[list[str], dict[str, dict[str, str]]]:
    """A unique name for each row, and what differs between the rows: {what: {name: text}}."""
    firsts = [group[0] for group in groups]
    found, methods = settings_apart(firsts), [r.results["method"] for r in firsts]
    nth = [methods[: i + 1].count(method) for i, method in enumerate(methods)]
    names = [f"{m} {n}" if n > 1 else m for m, n in zip(methods, nth, strict=True)]
    alike = list(zip(methods, *found.values(), strict=True))
    if any(alike.count(row) > 1 for row in alike):
        found["file"] = [str(r.path) for r in firsts]
    found |= consequences(groups)
    return names, {
        TITLES.get(what, what): {n: text for n, text in zip(names, texts, strict=True) if text}
        for what, texts in found.items()
    }


def settings_apart(results: Sequence["Result"]) -> Texts:
    """The settings whose values differ. One that is not known does not count as different."""
    evaluated = {key for r in results for key in (*r.results["arguments"], "dtype", "device")}
    evaluated |= {"tokenizer_hash", "examples"}
    keys = dict.fromkeys(key for r in results for key in r.identity if key != "method")
    found = {}
    for key in keys:
        values = [setting(r, key, evaluated) for r in results]
        if any(value == text != UNKNOWN for value, text in values):  # without a hash: by its name
            values = [(text if text else None, text) for _, text in values]
        if len({json.dumps(v) for v, text in values if text not in (None, UNKNOWN)}) > 1:
            found[key] = [distinct(value, values) for value in values]
    return found


def setting(result: "Result", key: str, evaluated: set[str]) -> tuple[object, str | None]:
    """(what is compared, its text) of a setting; the text is None if the result has no such."""
    if key in result.identity:
        text = "yes" if result.shown.get(key) is True else str(result.shown.get(key))
        return result.identity[key], text.replace("\n", "\\n")
    unused = UNUSED.get(result.results["method"], set())
    base, training = key.removeprefix("train_"), result.results.get("training_arguments") or {}
    if base != key and not result.trained:
        return None, None
    if key == "train_dtype" and not result.results.get("training_dtype"):
        return None, UNKNOWN
    if base != key and base in result.shown:
        return setting(result, base, evaluated)  # trained as it is evaluated
    if {key, base} & ({*result.results["arguments"], *training} - unused):
        return None, "no"  # an option that was not given
    return None, UNKNOWN if key in evaluated else None


def distinct(value: tuple, values: Sequence[tuple]) -> str | None:
    """A value's text, shortened; with its hash, or whole, where others would look the same."""
    own, text = value
    others = [t for v, t in values if t and v != own]
    if text in others:
        return f"{text} ({str(own)[:8]})"
    return short(text) if text and short(text) not in map(short, others) else text


def short(text: str, characters: int = 40) -> str:
    """A long text keeps its end, where paths and templates differ."""
    return text if len(text) <= characters else "…" + text[1 - characters :]


def consequences(groups: Groups) -> Texts:
    """What the settings led to: texts that were shortened, and test rows seen in training."""
    firsts = [group[0].results for group in groups]
    cut = [first.get("truncated_rows", UNKNOWN) for first in firsts]
    found = {}
    if len({*cut} - {UNKNOWN}) > 1:
        found["texts shortened"] = list(map(str, cut))
    seen = [contamination(group) for group in groups]
    if any(text[0].isdigit() and text != "0" for text in seen):
        found["rows that stand in training data"] = seen
    return found


def contamination(group: Sequence["Result"]) -> str:
    """How many rows stand in training data, and the accuracy on the others (mean over seeds)."""
    parts = [result.results.get("clean") or {} for result in group]
    if any("n" not in part for part in parts):  # not measured, or failed
        return "not trained" if group[0].results["method"].startswith("zero_shot") else UNKNOWN
    n, rest = group[0].results["n"], parts[0]["n"]
    if rest in (0, n):
        return f"{n - rest}"
    accuracy = statistics.fmean(part["accuracy"] for part in parts)
    return f"{n - rest}, accuracy on the other {rest}: {accuracy:.4f}"
