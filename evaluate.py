"""Evaluate a method of text classification with Qwen: scores, metrics, and files of both.

    python evaluate.py --method zero_shot
    python evaluate.py --method zero_shot --model DIR --data reviews.tsv
    python evaluate.py --method zero_shot --model DIR --data news.csv --labels 体育,财经,科技 \\
        --template '新闻：{text}\\n类别：' --output results.json --predictions predictions.jsonl
    python evaluate.py --run runs/lora --data test.tsv
    python evaluate.py --method transplanted_head --run runs/lora_head --data test.tsv
    python evaluate.py --run runs/lora --explain 房间小，但是很干净。
    python evaluate.py --run runs/lora --data test.tsv --errors 10
    python evaluate.py --run runs/lora --data test.tsv --explain-row 12

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
from functools import partial

import numpy as np

from qwen_min.command import arguments, inside
from qwen_min.command.classifier import Evaluation, Outcome, Scorer, Source
from qwen_min.command.cli import choose_device, make_parser, parse_with_given, run_command, seed
from qwen_min.command.finite import NotFinite
from qwen_min.command.outcome import circumstances, prediction_lines, raise_failures, try_parts
from qwen_min.command.summary import format_results, majority
from qwen_min.command.task import read_rows, read_task, row_prompts, warn_about_labels
from qwen_min.command.terminal import progress_bar
from qwen_min.errors import UserError
from qwen_min.files.data import Example, examples_hash
from qwen_min.files.output import commit_outputs, open_outputs
from qwen_min.files.overlap import clean_part, fed_rows, training_examples
from qwen_min.metrics import OFF_TRACK, evaluate_predictions
from qwen_min.prompt import Prompt
from qwen_min.scoring import label_mass


def zero_shot(source: Source) -> Scorer:
    """The base as it is, scored by label words: their log-probabilities after the prompt."""
    return source.scorer(source.base(), "label words")


def zero_shot_generate(source: Source) -> Scorer:
    """The base as it is. It writes an answer, and the first label word in it is the prediction."""
    return source.scorer(source.base(), "answers")


def head_only(source: Source) -> Scorer:
    """The head, and the base whose states it was fitted on: frozen, or adapted by --adapter."""
    model = source.base()
    return source.scorer(model, "head", source.add_trained(model))


def lora_head(source: Source) -> Scorer:
    """The base with its LoRA, and the linear head that was trained together with it."""
    return head_only(source)  # what is added to the base is decided by the run


def lora_label_scoring(source: Source) -> Scorer:
    """The base with its LoRA, scored by label words as in zero_shot."""
    model = source.base()
    source.add_trained(model)
    return source.scorer(model, "label words")


def transplanted_head(source: Source) -> Scorer:
    """lora_head's head on the base without the LoRA that it was trained with."""
    head = source.add_trained(source.base())
    return source.scorer(source.base(), "head", head)


_functions = [zero_shot, zero_shot_generate, head_only, lora_head, lora_label_scoring]
METHODS = {method.__name__: method for method in [*_functions, transplanted_head]}


def build_parser() -> argparse.ArgumentParser:
    """The command-line arguments, grouped as `--help` shows them."""
    parser = make_parser(__doc__)
    parser.add_argument("--method", choices=METHODS, help="default: the method of --run")
    arguments.add_trained_arguments(parser)
    arguments.add_model_arguments(parser, batch_tokens=2048)
    arguments.add_data_arguments(parser, "test.tsv")
    text = "also measure on the rows that are not in it (default: what --run was trained on)"
    parser.add_argument("--train-data", metavar="FILE", help=text)
    arguments.add_prompt_arguments(parser)
    arguments.add_machine_arguments(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of whatever is drawn at random")
    group = parser.add_argument_group("see inside")
    add, one = group.add_argument, group.add_mutually_exclusive_group().add_argument
    text = "one text's whole computation, step by step; with --run base and adapted side by side"
    one("--explain", metavar="TEXT", help=text)
    text = "the same for the row that starts in this line of --data"
    one("--explain-row", metavar="LINE", type=arguments.positive_int, help=text)
    text = "print the N most confident mistakes; for generated answers the first N"
    add("--errors", metavar="N", type=arguments.positive_int, help=text)
    text = "compare label words, all scored in one pass: 消极,积极;差,好 (a ; between two sets)"
    add("--label-sets", metavar="SETS", help=text)
    text = "compare corrections for a label word's probability before any text is read"
    add("--calibrate", action="store_true", help=text)
    text = "decide by scores with one of these corrections; the results keep what it learned"
    add("--calibration", choices=arguments.CALIBRATIONS, help=text)
    title = "output (with --run, default: files in the run directory)"
    add = parser.add_argument_group(title).add_argument
    add("--output", metavar="FILE", help="all results, as JSON")
    add("--predictions", metavar="FILE", help="every row's text and scores, as JSON lines")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, given = parse_with_given(build_parser(), argv)
    return run_command(lambda args: evaluate(*arguments.with_run(args, given)), args)


def evaluate(args: argparse.Namespace, record: dict | None) -> int:
    """Read, load, classify, measure, write; prints the table."""
    task, device = read_task(args, record), choose_device(args.device)
    source = Source(args, task, device, record)
    if args.explain is not None or args.explain_row is not None:
        return inside.explain(source, METHODS[args.method])
    examples = read_rows(args, task, record, empty_texts=True)
    source.compare(examples_hash(examples))
    inputs = [task.directory, args.data, args.train_data, args.adapter, args.run]
    if args.run:
        arguments.name_outputs(args, record, examples_hash(examples))
        inputs += [f"{args.run}/adapter", record["arguments"].get("data")]
    files = open_outputs([args.output, args.predictions], inputs)
    # Before the model is loaded: hashing finds a malformed file early. The base is not hashed where
    # no file gets the hashes and no trained weights are compared with them.
    identity = source.identity if args.output or args.method == "zero_shot_generate" else {}
    prompts = all_prompts(args.data, source, examples)
    fed = fed_rows(task.directory, examples)
    training = training_examples(args, task.labels, record, examples[0].read_as)
    corrected = args.calibrate or args.calibration
    neutral = inside.neutral_prompts(source, examples, training) if corrected else None
    evaluation = Evaluation(source, METHODS[args.method](source), examples, prompts, neutral)
    applied, outcome = inside.apply_calibration(evaluation, classify(evaluation))
    parts = {
        "metrics": partial(measure, evaluation, outcome),
        **inside.look_inside(evaluation, outcome),
        "clean": partial(clean_part, training, examples, outcome.predictions, fed),
    }
    found, failures = try_parts(evaluation, outcome, parts)
    results = {
        "method": args.method,
        **found,
        **circumstances(evaluation, outcome.seconds),
        **applied,
        "fed_rows": len(fed),
        **identity,
        "arguments": vars(args),
        "training_arguments": record["arguments"] if record else None,
    }
    rows = partial(prediction_lines, examples, task.labels, outcome)
    texts = [json.dumps(results, ensure_ascii=False, indent=2) + "\n", rows]
    try:
        commit_outputs(list(zip(files, texts, strict=True)))
    finally:
        if "accuracy" in results:
            print(format_results(results))
            inside.print_inside(evaluation, outcome, results)
    raise_failures(args, failures)
    if written := [str(file.path) for file in files if file]:
        print("\nwritten       " + f"\n{'':14}".join(written))
    return 0


def all_prompts(file: str, source: Source, examples: Sequence[Example]) -> list[Prompt]:
    """The prompts of a file's examples, with all words that are to be scored."""
    args, task = source.args, source.task
    if args.method == "zero_shot_generate":
        from qwen_min.lab.generation import MAX_NEW_TOKENS

        return row_prompts(file, task, examples, new_tokens=MAX_NEW_TOKENS)
    if args.label_sets:
        from qwen_min.lab.label_sets import distinct_words, parse_label_sets, with_first_tokens

        say = partial(print, file=sys.stderr)
        words = distinct_words(parse_label_sets(args.label_sets, task.words, say))
        return with_first_tokens(row_prompts(file, task, examples, labels=words))
    return row_prompts(file, task, examples)


def classify(evaluation: Evaluation) -> Outcome:
    """Score all words of every row, or let the model answer; then decide.

    Raises UserError if no row has finite numbers; if some have, the outcome names the others.
    """
    source, scorer, error = evaluation.source, evaluation.scorer, None
    prompts, words = evaluation.prompts, source.task.words
    if scorer.by == "label words":
        warn_about_labels(evaluation.label_ids[0], words)
    started = time.perf_counter()
    with progress_bar(total=sum(len(p.ids) for p in prompts), desc="evaluation") as bar:
        try:
            if scorer.by == "answers":
                found = scorer.answers(prompts, source.identity["stop_ids"], bar.update)
            else:
                found = scorer.scores(prompts, bar.update)  # (n, all words)
        except NotFinite as failure:
            found, error = failure.found, failure
    seconds = time.perf_counter() - started
    if error and len(error.rows) == len(evaluation.examples):
        raise UserError(f"{evaluation.place(error.rows)}: {error}")
    if scorer.by == "answers":
        from qwen_min.lab.generation import first_label

        texts = [None if ids is None else source.task.tokenizer.decode(ids) for ids in found]
        predictions = np.array([first_label(text or "", words) for text in texts])
        return Outcome(predictions, None, None, texts, seconds, error)
    own = found[:, : len(words)]  # the words of --labels; without --label-sets there are no others
    # The class with the highest score; of equal scores the first (in bf16 they can be equal).
    return Outcome(own.argmax(axis=1), own, found, None, seconds, error)


def measure(evaluation: Evaluation, outcome: Outcome) -> dict:
    """The metrics of an outcome; for generated answers, also up to five that are off track."""
    mass, names = None, list(evaluation.source.task.labels)
    if evaluation.scorer.by == "label words":
        mass = float(label_mass(outcome.raw_scores, evaluation.label_ids).mean())
    true, predictions = evaluation.true_classes, outcome.predictions
    found = evaluate_predictions(true, predictions, outcome.scores, names) | {"label_mass": mass}
    found |= majority(found["per_class"])
    if found["majority_share"] == 1 and (limit := evaluation.source.args.limit):
        said = f"--limit {limit} leaves only rows of class {found['majority_class']}"
        print(f"warning: {said}; shuffle the file, or leave --limit out", file=sys.stderr)
    if outcome.answers is not None:
        rows = zip(evaluation.examples, predictions, outcome.answers, strict=True)
        off = [{"line": e.line, "answer": text} for e, y, text in rows if y == OFF_TRACK]
        found["off_track_examples"] = off[:5]
    return found


if __name__ == "__main__":
    sys.exit(main())
