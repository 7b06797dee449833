"""From a classification to what is written: parts that may fail, circumstances, and rows."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from qwen_min.command.classifier import Evaluation, Outcome
from qwen_min.command.cli import ranks
from qwen_min.command.finite import dtype_name
from qwen_min.errors import UserError
from qwen_min.files.data import Example, examples_hash
from qwen_min.metrics import OFF_TRACK, softmax


def try_parts(
    evaluation: Evaluation, outcome: Outcome, parts: Mapping[str, Callable[[], object]]
) -> tuple[dict, dict[str, BaseException]]:
    """What each part returns, and the errors of those that fail; "metrics" returns the results.

    A part that fails does not stop the others. Without numbers for every row there are no parts:
    they would be about other rows than the data's.
    """
    if outcome.error:
        rows = outcome.error.rows
        lines = [evaluation.examples[row].line for row in rows]
        failed = {"reason": str(outcome.error), "lines": lines}
        found = {"n": len(evaluation.examples), "failed": failed}
        return found, {evaluation.place(rows): outcome.error}
    found, failures = {}, {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except (Exception, KeyboardInterrupt) as error:
            if ranks() and not isinstance(error, UserError):
                raise  # of several processes perhaps in this one alone: the others would wait
            failures[name] = error
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
    return found.pop("metrics") | found, failures


def raise_failures(args: argparse.Namespace, failures: dict[str, BaseException]) -> None:
    """Raise what failed: a bug as it is, users' mistakes with the place of what was computed."""
    for failure in failures.values():
        if not isinstance(failure, UserError):
            raise failure
    if failures:
        said = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        kept = " and ".join(filter(None, [args.output, args.predictions]))
        rest = f"the rest is in {kept}" if kept else "give --predictions FILE to keep the rest"
        raise UserError(f"{said}; {rest}")


def circumstances(evaluation: Evaluation, seconds: float) -> dict:
    """On what, how and how fast the rows were classified."""
    prompts, record = evaluation.prompts, evaluation.source.record
    return {
        "truncated_rows": sum(prompt.truncated for prompt in prompts),
        "tokens": sum(len(prompt.ids) for prompt in prompts),
        "seconds": seconds,
        "examples_per_second": len(prompts) / seconds,
        "examples_hash": examples_hash(evaluation.examples),
        "label_ids": [list(ids) for ids in evaluation.label_ids[0]] or None,
        "dtype": dtype_name(evaluation.scorer.model),
        "device": evaluation.source.device,
        "torch": torch.__version__,
        "trained_parameters": record["trained_parameters"] if record else 0,
        "training_seconds": record["seconds"] if record else 0.0,
    }


def prediction_lines(
    examples: Sequence[Example], labels: Sequence[str], outcome: Outcome
) -> Iterator[str]:
    """JSON lines, one for each row, each made when it is asked for.

    index (from 0), line (of the data file), text, label and prediction (class numbers), label_word
    and predicted_word (their names in `labels`), probability (of the predicted class: softmax over
    the classes), scores (C numbers, in class order).

    If the predictions come from generated answers, scores and probability are null and the answer
    is added; without a label word in it, predicted_word is null too. Of rows without finite numbers
    what was predicted is null.
    """
    scores, failed = outcome.scores, set(outcome.error.rows if outcome.error else ())
    for index, (example, prediction) in enumerate(zip(examples, outcome.predictions, strict=True)):
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
        if outcome.answers is not None:
            row["answer"] = outcome.answers[index]
        yield json.dumps(row, ensure_ascii=False) + "\n"
