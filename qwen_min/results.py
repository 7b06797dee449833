"""The results of one evaluation: a table for a person, a line of JSON for each row."""

import json
from collections.abc import Sequence

import numpy as np

from qwen_min.data import Example
from qwen_min.table import pad


def format_results(results: dict) -> str:
    """The results as a table for a person."""

    def number(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.4f}"

    low, high = results["accuracy_interval"]
    mass = []
    if results["label_mass"] is not None:
        share = number(results["label_mass"])
        mass = [f"label mass    {share}   probability that the label words hold"]
    shortened = f"{results['truncated_rows']} of {results['n']} texts shortened"
    lines = [
        f"method        {results['method']}",
        f"examples      {results['n']}   ({shortened})",
        f"accuracy      {number(results['accuracy'])}   95 % interval {low:.4f} to {high:.4f}",
        *clean_line(results.get("clean")),
        f"AUC-ROC       {number(results['auc_roc'])}",
        f"Brier         {number(results['brier'])}   {results['brier_kind']}",
        f"ECE           {number(results['ece'])}   15 bins",
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


def prediction_lines(examples: Sequence[Example], scores: np.ndarray) -> str:
    """JSON lines: index (from 0), label, prediction, scores in class order."""
    return "".join(
        json.dumps(
            {
                "index": index,
                "label": example.label,
                "prediction": int(row.argmax()),
                "scores": row.tolist(),
            }
        )
        + "\n"
        for index, (example, row) in enumerate(zip(examples, scores, strict=True))
    )
