"""Evaluate a method of text classification with Qwen: scores, metrics, and files of both.

    python evaluate.py --method zero_shot
    python evaluate.py --method zero_shot --model DIR --data reviews.tsv
    python evaluate.py --method zero_shot --model DIR --data news.csv --labels 体育,财经,科技 \\
        --template '新闻：{text}\\n类别：' --output results.json --predictions predictions.jsonl
    python evaluate.py --run runs/lora --data test.tsv
    python evaluate.py --method transplanted_head --run runs/lora_head --data test.tsv
    python evaluate.py --run runs/lora --explain 房间小，但是很干净。

zero_shot           each label word's log-probability as the continuation of the prompt
zero_shot_generate  greedy text, and the first label word in it
head_only           a linear head on the frozen base's hidden states (a linear probe)
lora_head           a linear head on the LoRA-adapted base's hidden states
lora_label_scoring  as zero_shot, on the LoRA-adapted base
transplanted_head   lora_head's head on the base without its LoRA: an ablation

A run brings its model, prompt and label words; command-line arguments override them.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from qwen_min.command.arguments import (
    add_data_arguments,
    add_machine_arguments,
    add_prompt_arguments,
    with_run,
)
from qwen_min.command.cli import choose_device, make_parser, parse_with_given, run_command, seed
from qwen_min.command.compute import Classifier, Compute
from qwen_min.command.summary import format_results
from qwen_min.command.task import Task, read_rows, read_task, warn_about_labels
from qwen_min.command.trained import Source
from qwen_min.errors import UserError
from qwen_min.files.data import Example, examples_hash
from qwen_min.files.output import commit_outputs, open_outputs
from qwen_min.files.overlap import clean_part, fed_rows, training_examples
from qwen_min.files.results import name_outputs, off_track_examples, prediction_lines
from qwen_min.metrics import evaluate_predictions
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.scoring import label_mass


def zero_shot(source: Source) -> Classifier:
    """The base as it is. Scores: log-probabilities of the label words behind the prompt."""
    return Classifier(source.base(), "label words")


def zero_shot_generate(source: Source) -> Classifier:
    """The base as it is. It writes an answer, and the first label word in it is the prediction."""
    from qwen_min.lab.generation import stop_ids

    stop = stop_ids(source.task.directory, source.task.tokenizer.markup)
    return Classifier(source.base(), "answers", stop=stop)


def head_only(source: Source) -> Classifier:
    """The frozen base, with --adapter in training an adapted one, and the head solved on it."""
    model = source.base()
    return Classifier(model, "head", source.add_trained(model))


def lora_head(source: Source) -> Classifier:
    """The base with its LoRA, and the linear head that was trained together with it."""
    model = source.base()
    return Classifier(model, "head", source.add_trained(model))


def lora_label_scoring(source: Source) -> Classifier:
    """The base with its LoRA. Scores: as in zero_shot."""
    model = source.base()
    source.add_trained(model)
    return Classifier(model, "label words")


def transplanted_head(source: Source) -> Classifier:
    """lora_head's head on the base without the LoRA that it was trained with."""
    head = source.add_trained(source.base())
    return Classifier(source.base(), "head", head)


METHODS = {
    method.__name__: method
    for method in (
        zero_shot, zero_shot_generate, head_only, lora_head, lora_label_scoring, transplanted_head,
    )
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command-line arguments, grouped as `--help` shows them."""
    parser = make_parser(__doc__)
    parser.add_argument("--method", choices=METHODS, help="default: the method of --run")
    parser.add_argument("--run", metavar="DIR", help="a directory that train.py made")
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="instead of --run: a LoRA in PEFT's format, for lora_head or lora_label_scoring",
    )
    add_data_arguments(parser, "test.tsv")
    parser.add_argument(
        "--train-data",
        metavar="FILE",
        help="also measure on the rows that are not in it (default: what --run was trained on)",
    )
    add_prompt_arguments(parser)
    add_machine_arguments(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of whatever is drawn at random")
    inside = parser.add_argument_group("see inside")
    inside.add_argument(
        "--explain",
        metavar="TEXT",
        help="one text's whole computation, step by step; with --run base and adapted side by side",
    )
    inside.add_argument(
        "--label-sets",
        metavar="SETS",
        help="compare label words, all scored in one pass: 消极,积极;差,好 (a ; between two sets)",
    )
    inside.add_argument(
        "--calibrate",
        action="store_true",
        help="compare corrections for a label word's probability before any text is read",
    )
    output = parser.add_argument_group("output (with --run, default: files in the run directory)")
    output.add_argument("--output", metavar="FILE", help="all results, as JSON")
    output.add_argument("--predictions", metavar="FILE", help="every row's scores, as JSON lines")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, given = parse_with_given(build_parser(), argv)
    return run_command(lambda args: evaluate(*with_run(args, given)), args)


@dataclass(frozen=True)
class Outcome:
    """What a method said of each row."""

    predictions: np.ndarray  # (n,), class numbers
    scores: np.ndarray | None  # (n, C); None: the predictions were read out of answers
    answers: list[str] | None
    seconds: float


def evaluate(args: argparse.Namespace, record: dict | None) -> int:
    """Read, load, score, measure, write; prints the table."""
    task, device = read_task(args), choose_device(args.device)
    source, compute = Source(args, task, device, record), Compute(args.plain, args.batch_tokens)
    if args.explain is not None:
        return explain(source)
    examples, prompts = read_prompts(args, task)
    fed = fed_rows(task.directory, examples)
    training = training_examples(args.train_data, args.encoding, task.labels, record)
    if args.run:
        name_outputs(args, record, examples_hash(examples))
    with ExitStack() as stack:
        inputs = [args.data, *filter(None, [args.train_data])]
        files = open_outputs([args.output, args.predictions], stack, inputs)
        started = time.perf_counter()
        classifier = METHODS[args.method](source)
        load_seconds = time.perf_counter() - started
        # The words of --labels come first in each prompt, those of other label sets behind them.
        own = [replace(p, labels=p.labels[: len(task.labels)]) for p in prompts]
        if classifier.by == "label words":
            warn_about_labels(own[0], task.labels)
        outcome, inside = look_inside(source, compute, classifier, examples, prompts, own, training)
        truth = np.array([example.label for example in examples])
        mass = None
        if classifier.by == "label words":
            mass = float(label_mass(outcome.scores, [p.labels for p in own]).mean())
        results = {
            "method": args.method,
            **evaluate_predictions(truth, outcome.predictions, outcome.scores, list(task.labels)),
            "clean": clean_part(training, examples, outcome.predictions, fed),
            "fed_rows": len(fed),
            "label_mass": mass,
            **inside,
            "truncated_rows": sum(prompt.truncated for prompt in own),
            "tokens": sum(len(prompt.ids) for prompt in own),
            "seconds": outcome.seconds,
            "load_seconds": load_seconds,
            "examples_per_second": len(examples) / outcome.seconds,
            "examples_hash": examples_hash(examples),
            "label_ids": [list(ids) for ids in own[0].labels],
            "dtype": dtype_of(classifier.model),
            "device": device,
            "torch": torch.__version__,
            "trained_parameters": record["trained_parameters"] if record else 0,
            "training_seconds": record["seconds"] if record else 0.0,
            "arguments": vars(args),
            "training_arguments": record["arguments"] if record else None,
        }
        rows = prediction_lines(examples, outcome.predictions, outcome.scores, outcome.answers)
        texts = [json.dumps(results, ensure_ascii=False, indent=2) + "\n", rows]
        try:
            commit_outputs(list(zip(files, texts, strict=True)))
        finally:
            print(format_results(results))
            print_inside(task, results)
    return 0


def read_prompts(args: argparse.Namespace, task: Task) -> tuple[list[Example], list[Prompt]]:
    """The rows and their prompts, with the words of all label sets."""
    if args.method == "zero_shot_generate":
        from qwen_min.lab.generation import MAX_NEW_TOKENS

        return read_rows(args, task, new_tokens=MAX_NEW_TOKENS)
    if args.label_sets:
        from qwen_min.lab.label_sets import distinct_words, parse_label_sets

        return read_rows(args, task, distinct_words(parse_label_sets(args.label_sets, task.labels)))
    return read_rows(args, task)


def classify(
    source: Source,
    compute: Compute,
    classifier: Classifier,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
) -> Outcome:
    """Score every prompt, or answer it. Raises UserError if a score is not finite."""
    started, scores, answers = time.perf_counter(), None, None
    with tqdm(total=len(prompts), unit=" rows", disable=None) as bar:
        if classifier.by == "answers":
            from qwen_min.lab.generation import MAX_NEW_TOKENS, first_label

            found = compute.answers(
                classifier.model, prompts, MAX_NEW_TOKENS, classifier.stop, bar.update
            )
            answers = [source.task.tokenizer.decode(ids) for ids in found]
            predictions = [first_label(answer, source.task.labels) for answer in answers]
        else:
            scores = classifier.scores(prompts, compute, bar.update)
            predictions = scores.argmax(axis=1)
    seconds = time.perf_counter() - started
    if scores is not None and not (finite := np.isfinite(scores).all(axis=1)).all():
        raise UserError(
            f"{source.args.data}, line {examples[finite.argmin()].line}: found a score that is not "
            "finite, expected numbers: fetch the weights again, or try --dtype float32 if they "
            "overflow"
        )
    return Outcome(np.array(predictions), scores, answers, seconds)


def look_inside(
    source: Source,
    compute: Compute,
    classifier: Classifier,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    own: Sequence[Prompt],
    training: tuple[str, list[Example]] | None,
) -> tuple[Outcome, dict]:
    """The outcome with the task's own labels; what --label-sets, --calibrate and answers show."""
    args, task, record = source.args, source.task, source.record
    truth = np.array([example.label for example in examples])
    inside = {}
    if args.label_sets:
        from qwen_min.lab.label_sets import compare_sets, parse_label_sets, with_first_tokens

        asked = with_first_tokens(prompts)
        outcome = classify(source, compute, classifier, examples, asked)
        sets = parse_label_sets(args.label_sets, task.labels)
        inside["label_sets"] = compare_sets(truth, sets, prompts, outcome.scores)
        scores = outcome.scores[:, : len(task.labels)]
        outcome = replace(outcome, scores=scores, predictions=scores.argmax(axis=1))
    else:
        outcome = classify(source, compute, classifier, examples, own)
    if args.calibrate:
        from qwen_min.lab.calibration import calibrations
        from qwen_min.lab.neutral import score_neutral

        split = record["arguments"]["data_seed"] if record else 0
        rows = training and training[1]
        with tqdm(unit=" rows", desc="calibration", disable=None) as bar:
            score = partial(classifier.scores, compute=compute, progress=bar.update)
            neutral = score_neutral(task, examples, rows, (args.seed, split), score)
        lengths = np.array([[len(ids) for ids in prompt.labels] for prompt in own])
        inside["calibration"] = calibrations(truth, outcome.scores, lengths, neutral)
    if classifier.by == "answers":
        inside["off_track_examples"] = off_track_examples(
            examples, outcome.predictions, outcome.answers
        )
    return outcome, inside


def print_inside(task: Task, results: dict) -> None:
    """The tables of --label-sets and --calibrate."""
    if "label_sets" in results:
        from qwen_min.lab.label_sets import format_sets

        print("\n" + format_sets(results["label_sets"], task.tokenizer))
    if "calibration" in results:
        from qwen_min.lab.calibration import format_calibrations

        print("\n" + format_calibrations(results["calibration"], task.labels))


def explain(source: Source) -> int:
    """--explain: one text's computation, on the base and on what was trained from it."""
    from qwen_min.lab.explain import explain_head, explain_labels

    args, task = source.args, source.task
    (prompt,) = task.prompts([args.explain], ["--explain"])
    classifier = METHODS[args.method](source)
    models = {"the model": classifier.model}
    if source.changes_base:
        models = {"base": source.base(), "adapted": classifier.model}
    print(f"{args.method}, {args.run or args.model}, {dtype_of(classifier.model)}\n")
    shown = (task.tokenizer, prompt, task.empty_prompt(), task.labels, models)
    if classifier.by == "head":
        print(explain_head(*shown, classifier.head))
    else:
        print(explain_labels(*shown))
    return 0


def dtype_of(model: Qwen) -> str:
    """The dtype of the base weights, as --dtype names it."""
    return str(model.lm_head_weight.dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
