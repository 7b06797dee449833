"""What one evaluation writes: names of its files, and a line of JSON for each row."""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_min.files.data import Example


def name_outputs(args: argparse.Namespace, record: dict, data_hash: str) -> None:
    """Set --output and --predictions, where not given, to files in the run's directory.

    The name depends on the data, and on settings that differ from the run's (`args.changed`), so
    that different results never replace each other.
    """
    parts = [data_hash[:12]] if args.method == record["method"] else [args.method, data_hash[:12]]
    if args.changed:
        parts.append(hashlib.sha256(" ".join(args.changed).encode()).hexdigest()[:8])
    ending = "-".join(parts)
    args.output = args.output or os.path.join(args.run, f"results-{ending}.json")
    args.predictions = args.predictions or os.path.join(args.run, f"predictions-{ending}.jsonl")


def prediction_lines(
    examples: Sequence[Example],
    predictions: Sequence[int],
    scores: np.ndarray | None,
    answers: Sequence[str | None] | None = None,
    failed: Sequence[int] = (),
) -> Iterator[str]:
    """JSON lines: index (from 0), label, prediction, scores (C numbers, in class order).

    If the predictions come from generated answers, the scores are null and the answer is added.
    failed: the rows without finite numbers; their prediction and scores are null.
    """
    failed = set(failed)
    for index, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        known = index not in failed
        row = {"index": index, "label": example.label}
        row["prediction"] = int(prediction) if known else None
        row["scores"] = scores[index].tolist() if known and scores is not None else None
        if answers is not None:
            row["answer"] = answers[index]
        yield json.dumps(row, ensure_ascii=False) + "\n"
