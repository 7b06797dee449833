"""What --label-sets, --calibrate and --explain show: qwen_min.lab, put to one evaluation."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from qwen_min.command.arguments import UNTRAINED
from qwen_min.command.classifier import Evaluation, Outcome, Scorer, Source, forms
from qwen_min.command.finite import dtype_name
from qwen_min.command.task import Task
from qwen_min.command.terminal import progress_bar
from qwen_min.files.data import Example
from qwen_min.prompt import Prompt


def look_inside(evaluation: Evaluation, outcome: Outcome) -> dict[str, Callable[[], object]]:
    """What the results gain by --label-sets and --calibrate: a function for each part."""
    inside, args = {}, evaluation.source.args
    if args.label_sets:
        from qwen_min.lab.label_sets import compare_sets, parse_label_sets

        sets = parse_label_sets(args.label_sets, evaluation.source.task.labels)
        rows = (evaluation.prompts, outcome.all_scores)
        inside["label_sets"] = partial(compare_sets, evaluation.true_classes, sets, *rows)
    if args.calibrate:
        inside["calibration"] = partial(calibrate, evaluation, outcome.scores)
    return inside


def neutral_prompts(
    source: Source, examples: Sequence[Example], training: tuple[str, list[Example]] | None
) -> tuple:
    """The prompts that --calibrate scores besides the rows: a `Neutral`."""
    from qwen_min.lab import calibration

    task = source.task

    def prompts_of(texts: Sequence[str], template: str | None = None) -> list[Prompt]:
        places = [f"--calibrate, input {text!r}" for text in texts]
        return task.prompts(texts, places, template=template)

    own = source.record["arguments"] if source.record else {}
    split, held_out = own.get("data_seed", 0), None
    if own.get("dev"):  # all rows of its training data were trained on
        print(f"note: no temperature: {own['dev']} was this run's held-out part", file=sys.stderr)
        training = None
    if training and (rows := calibration.held_out_rows(training[1], examples, split)):
        held_out = np.array([row.label for row in rows]), prompts_of([row.text for row in rows])
    texts = [example.text for example in examples]
    random = prompts_of(calibration.random_texts(texts, source.args.seed))
    premise = prompts_of([""], calibration.premise_template(task.template))
    return calibration.Neutral(prompts_of(calibration.CONTENT_FREE), random, premise, held_out)


def calibrate(evaluation: Evaluation, scores: np.ndarray) -> dict[str, dict]:
    """--calibrate: the scores (n, C) corrected in each way, and how the corrections do."""
    from qwen_min.lab.calibration import Neutral, calibrations

    *others, held_out = evaluation.neutral
    parts = (*others, *(held_out or ())[1:])
    total = sum(len(prompt.ids) for prompts in parts for prompt in prompts)
    with progress_bar(total=total, desc="calibration") as bar:
        score = partial(evaluation.scorer.scores, progress=bar.update)
        neutral = Neutral(*map(score, others), held_out and (held_out[0], score(held_out[1])))
    lengths = np.array([[*map(len, words)] for words in evaluation.label_ids])
    return calibrations(evaluation.true_classes, scores, lengths, neutral)


def print_inside(task: Task, results: dict) -> None:
    """The tables of --label-sets and --calibrate."""
    if "failed" not in results.get("label_sets", ["failed"]):
        from qwen_min.lab.label_sets import format_sets

        print("\n" + format_sets(results["label_sets"], task.tokenizer))
    if "failed" not in results.get("calibration", ["failed"]):
        from qwen_min.lab.calibration import format_calibrations

        print("\n" + format_calibrations(results["calibration"], task.labels))


def explain(source: Source, load: Callable[[Source], Scorer]) -> int:
    """--explain: one text's computation, on the base and on what was trained from it."""
    from qwen_min.lab.explain import explain_head, explain_labels

    args, task = source.args, source.task
    (prompt,) = task.prompts([args.explain], ["--explain"])
    scorer = load(source)
    models = {"the model": scorer.model}
    unadapted = args.method in (*UNTRAINED, "transplanted_head")
    if not unadapted and (source.parts.lora or source.parts.vectors):
        models = {"base": source.base(), "adapted": scorer.model}
    empty = task.empty_prompt()
    for model in models.values():  # raises NotFinite
        plain = replace(scorer, model=model, forms=forms(plain=True))
        plain.scores([prompt, empty] if empty else [prompt])
    print(f"{args.method}, {args.run or args.model}, {dtype_name(scorer.model)}\n")
    shown = (task.tokenizer, prompt, empty, task.labels, models)
    by_head = scorer.by == "head"
    print(explain_head(*shown, scorer.head) if by_head else explain_labels(*shown))
    return 0
