"""The results of one evaluation: a table for a person, a line of JSON for each row."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen_min.command.terminal import pad
from qwen_min.files.data import Example
from qwen_min.metrics import OFF_TRACK


def format_results(results: dict) -> str:
    """The results as a table for a person."""

    def number(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.4f}"

    low, high = results["accuracy_interval"]
    mass = []
    if results["label_mass"] is not None:
        share = number(results["label_mass"])
        mass = [f"label mass    {share}   probability that the label words hold"]
    # Generated text has no scores, hence nothing that is computed from them.
    scored = [
        f"AUC-ROC       {number(results['auc_roc'])}",
        f"Brier         {number(results['brier'])}   {results['brier_kind']}",
        f"ECE           {number(results['ece'])}   15 bins",
    ]
    if results["brier"] is None:
        scored = off_track_lines(results)
    shortened = f"{results['truncated_rows']} of {results['n']} texts shortened"
    lines = [
        f"method        {results['method']}",
        f"examples      {results['n']}   ({shortened})",
        f"accuracy      {number(results['accuracy'])}   95 % interval {low:.4f} to {high:.4f}",
        *clean_line(results.get("clean")),
        *scored,
        *mass,
        f"speed         {results['examples_per_second']:.1f} examples/s, "
        f"{results['seconds']:.1f} s, {results['dtype']} on {results['device']}",
        "",
        "class          precision   recall       F1   examples",
    ]
    rows = [*results["per_class"], {"name": "macro", **results["macro"], "support": results["n"]}]
    lines += [
        f"{pad(row['name'], 14)} {row['precision']:9.4f} {row['recall']:8.4f} {row['f1']:8.4f} "
        f"{row['support']:10d}"
        for row in rows
    ]
    names = [row["name"] for row in results["per_class"]]
    heads = names + ["off track"] * bool(results["off_track"])
    lines += ["", "true \\ predicted" + "".join("  " + pad(name, 8, left=True) for name in heads)]
    lines += [
        pad(name, 16) + "".join(f"  {count:8d}" for count in counts)
        for name, counts in zip(names, results["confusion_matrix"], strict=True)
    ]
    return "\n".join(lines)


def off_track_examples(
    examples: Sequence[Example], predictions: Sequence[int], answers: Sequence[str]
) -> list[dict]:
    """The first five answers without a label word, and the lines of the file that they are to."""
    rows = zip(examples, predictions, answers, strict=True)
    astray = [{"line": e.line, "answer": answer} for e, y, answer in rows if y == OFF_TRACK]
    return astray[:5]


def off_track_lines(results: dict) -> list[str]:
    """How many answers held no label word, and what some of them said instead."""
    count, n = results["off_track"], results["n"]
    lines = [f"off track     {count / n:.4f}   {count} of {n} answers hold no label word"]
    for example in results["off_track_examples"]:
        lines.append(f"              line {example['line']}: {example['answer']!r}")
    return lines


def clean_line(clean: dict | None) -> list[str]:
    """The line on the rows that are not in the training data; none where these are unknown."""
    if clean is None:
        return []
    if not clean["n"]:
        return [f"  clean part  undefined   every text stands in {clean['train_data']}"]
    low, high = clean["accuracy_interval"]
    return [
        f"  clean part  {clean['accuracy']:.4f}   95 % interval {low:.4f} to {high:.4f}   "
        f"{clean['n']} texts that are not in {clean['train_data']}"
    ]


def name_outputs(args: argparse.Namespace, record: dict, data_hash: str) -> None:
    """Put files in the run's directory where the arguments name none.

    Settings other than the run's own, in `args.changed`, make another result, in another file.
    """
    other = hashlib.sha256(" ".join(args.changed).encode()).hexdigest()[:8]
    transplanted = args.method != record["method"]
    parts = [args.method] * transplanted + [data_hash[:12]] + [other] * bool(args.changed)
    ending = "-".join(parts)
    args.output = args.output or str(Path(args.run) / f"results-{ending}.json")
    args.predictions = args.predictions or str(Path(args.run) / f"predictions-{ending}.jsonl")


def prediction_lines(
    examples: Sequence[Example],
    predictions: Sequence[int],
    scores: np.ndarray | None,
    answers: Sequence[str] | None = None,
) -> str:
    """JSON lines: index (from 0), label, prediction, scores in class order.

    Where the prediction was read out of an answer: that answer, and null for the scores.
    """
    lines = []
    for index, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        row = {
            "index": index,
            "label": example.label,
            "prediction": int(prediction),
            "scores": None if scores is None else scores[index].tolist(),
        }
        if answers is not None:
            row["answer"] = answers[index]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)
