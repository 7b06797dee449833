"""What --label-sets, --calibrate and --explain show: qwen_min.lab, put to one evaluation."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from qwen_min.command.classifier import Classifier, Evaluation, Outcome, Source, dtype_name
from qwen_min.command.task import Task
from qwen_min.command.terminal import progress_bar
from qwen_min.metrics import OFF_TRACK
from qwen_min.prompt import Prompt


def look_inside(evaluation: Evaluation, outcome: Outcome) -> dict:
    """What the results gain by --label-sets and --calibrate, or by answers off track."""
    inside, args = {}, evaluation.source.args
    if args.label_sets:
        from qwen_min.lab.label_sets import compare_sets, parse_label_sets

        sets = parse_label_sets(args.label_sets, evaluation.source.task.labels)
        inside["label_sets"] = compare_sets(
            evaluation.true_classes, sets, evaluation.all_prompts, outcome.all_scores
        )
    if args.calibrate:
        inside["calibration"] = calibrate(evaluation, outcome.scores)
    if outcome.answers is not None:
        rows = zip(evaluation.examples, outcome.predictions, outcome.answers, strict=True)
        found = [{"line": e.line, "answer": answer} for e, y, answer in rows if y == OFF_TRACK]
        inside["off_track_examples"] = found[:5]
    return inside


def calibrate(evaluation: Evaluation, scores: np.ndarray) -> dict[str, dict]:
    """--calibrate: the scores (n, C) corrected in each way, and how the corrections do."""
    from qwen_min.lab.calibration import calibrations, score_neutral

    source, task = evaluation.source, evaluation.source.task

    def prompts_of(texts: Sequence[str], template: str | None = None) -> list[Prompt]:
        places = [f"--calibrate, input {text!r}" for text in texts]
        return task.prompts(texts, places, template=template)

    split = source.record["arguments"]["data_seed"] if source.record else 0
    rows = evaluation.training and evaluation.training[1]
    seeds = (source.args.seed, split)
    with progress_bar(unit=" rows", desc="calibration") as bar:
        score = partial(evaluation.classifier.scores, progress=bar.update)
        neutral = score_neutral(prompts_of, task.template, evaluation.examples, rows, seeds, score)
    lengths = np.array([[len(ids) for ids in prompt.labels] for prompt in evaluation.prompts])
    return calibrations(evaluation.true_classes, scores, lengths, neutral)


def print_inside(task: Task, results: dict) -> None:
    """The tables of --label-sets and --calibrate."""
    if "label_sets" in results:
        from qwen_min.lab.label_sets import format_sets

        print("\n" + format_sets(results["label_sets"], task.tokenizer))
    if "calibration" in results:
        from qwen_min.lab.calibration import format_calibrations

        print("\n" + format_calibrations(results["calibration"], task.labels))


def explain(source: Source, load: Callable[[Source], Classifier]) -> int:
    """--explain: one text's computation, on the base and on what was trained from it."""
    from qwen_min.lab.explain import explain_head, explain_labels

    args, task = source.args, source.task
    (prompt,) = task.prompts([args.explain], ["--explain"])
    classifier = load(source)
    models = {"the model": classifier.model}
    if source.changes_base:
        models = {"base": source.base(), "adapted": classifier.model}
    print(f"{args.method}, {args.run or args.model}, {dtype_name(classifier.model)}\n")
    shown = (task.tokenizer, prompt, task.empty_prompt(), task.labels, models)
    if classifier.by == "head":
        print(explain_head(*shown, classifier.head))
    else:
        print(explain_labels(*shown))
    return 0
