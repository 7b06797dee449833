"""What one evaluation writes: names of its files, and a line of JSON for each row."""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_min.files.data import Example
from qwen_min.metrics import OFF_TRACK, softmax


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
    labels: Sequence[str],
    predictions: Sequence[int],
    scores: np.ndarray | None,
    answers: Sequence[str | None] | None = None,
    failed: Sequence[int] = (),
) -> Iterator[str]:
    """JSON lines, one for each row, each made when it is asked for.

    index (from 0), line (of the data file), text, label and prediction (class numbers), label_word
    and predicted_word (their names in `labels`), probability (of the predicted class: softmax over
    the classes), scores (C numbers, in class order).

    If the predictions come from generated answers, scores and probability are null and the answer
    is added; without a label word in it, predicted_word is null too. failed: the rows without
    finite numbers; what was predicted of them is null.
    """
    failed = set(failed)
    for index, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        known = index not in failed
        own = scores[index] if known and scores is not None else None
        row = {
            "index": index,
            "line": example.line,
            "text": example.text,
            "label": example.label,
            "label_word": labels[example.label],
            "prediction": int(prediction) if known else None,
            "predicted_word": labels[prediction] if known and prediction != OFF_TRACK else None,
            "probability": None if own is None else float(softmax([own])[0, prediction]),
            "scores": None if own is None else own.tolist(),
        }
        if answers is not None:
            row["answer"] = answers[index]
        yield json.dumps(row, ensure_ascii=False) + "\n"
