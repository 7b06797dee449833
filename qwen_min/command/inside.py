"""What --label-sets, --calibrate, --errors and --explain show of an evaluation, or of a text."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from qwen_min.command.arguments import CALIBRATIONS, UNTRAINED
from qwen_min.command.classifier import Evaluation, Outcome, Scorer, Source, forms
from qwen_min.command.finite import dtype_name
from qwen_min.command.task import read_rows
from qwen_min.command.terminal import WIDTH, clipped, one_line, text_table
from qwen_min.errors import UserError
from qwen_min.files.data import Example
from qwen_min.files.disk import read_json
from qwen_min.files.overlap import Training
from qwen_min.metrics import softmax
from qwen_min.prompt import shorten


def look_inside(evaluation: Evaluation, outcome: Outcome) -> dict[str, Callable[[], object]]:
    """What the results gain by --label-sets and --calibrate: a function for each part."""
    inside, args = {}, evaluation.source.args
    if args.label_sets:
        from qwen_min.lab.label_sets import compare_sets, parse_label_sets

        sets = parse_label_sets(args.label_sets, evaluation.source.task.words)
        rows = (evaluation.prompts, outcome.all_scores)
        inside["label_sets"] = partial(compare_sets, evaluation.true_classes, sets, *rows)
    if args.calibrate:
        from qwen_min.lab.calibration import calibrations

        rows = (evaluation.true_classes, outcome.raw_scores, evaluation.label_ids)
        how = (evaluation.neutral, evaluation.scorer.scores)
        inside["calibration"] = partial(calibrations, *rows, *how)
    return inside


def neutral_prompts(source: Source, examples: Sequence[Example], training: Training) -> tuple:
    """What corrections learn from beside the rows' scores, a `Neutral`; less without examples."""
    from qwen_min.lab import calibration

    args, task, rows = source.args, source.task, []
    own = source.record["arguments"] if source.record else {}
    if training and own.get("dev"):  # all rows of its training data were trained on
        print(f"note: no temperature: {own['dev']} was this run's held-out part", file=sys.stderr)
    elif training and (own or args.train_data):  # how an adapter's run split them is not known here
        rows = calibration.held_out_rows(training[0][1], examples, own.get("data_seed", 0))
    if args.calibration == "temperature" and not rows:
        found = "no held-out rows of training data to fit it on"
        raise UserError(f"--calibration temperature: {found}; name the file by --train-data")
    inputs = {"contextual": calibration.CONTENT_FREE, "pmi_dc": [""]}
    if examples:
        texts = [example.text for example in examples]
        inputs["domain_context"] = calibration.random_texts(texts, args.seed)
    if rows:
        inputs["temperature"] = [row.text for row in rows]
    prompts = {}
    for name, texts in inputs.items():
        places = [f"--calibrate, input {text!r}" for text in texts]
        template = calibration.premise_template(task.template) if name == "pmi_dc" else None
        prompts[name] = task.prompts(texts, places, template=template)
    return calibration.Neutral(prompts, np.array([row.label for row in rows]))


def apply_calibration(evaluation: Evaluation, outcome: Outcome) -> tuple[dict, Outcome]:
    """--calibration: what the results say of the correction, and the outcome that it gives."""
    name, scores = evaluation.source.args.calibration, outcome.scores
    if not name:
        return {}, outcome
    from qwen_min.lab.calibration import learn

    finite = np.isfinite(scores).all(axis=1)
    correction = learn(name, scores[finite], evaluation.neutral, evaluation.scorer.scores)
    scores = correction.apply(scores, evaluation.label_ids)
    applied = {"applied_calibration": correction._asdict()}
    return applied, replace(outcome, predictions=scores.argmax(axis=1), scores=scores)


def correction_of(source: Source) -> Callable[[Scorer], tuple]:
    """What makes the `Correction` of new texts: --calibration NAME, or FILE with a learned one.

    Raises UserError if it needs more than the prompt, and for results of another model or prompt.
    """
    from qwen_min.lab.calibration import Correction, learn

    name, alone = source.args.calibration, CALIBRATIONS[:3]
    if name in alone:
        neutral = neutral_prompts(source, [], None)
        return lambda scorer: learn(name, None, neutral, scorer.scores)
    fields = {"applied": CALIBRATIONS, "log_prior": (list, None), "temperature": (float, None)}
    kind = "results with a calibration of this model and prompt"
    advice = f"give {', '.join(alone)} or results of evaluate.py --calibration NAME"
    needed = {"applied_calibration": fields, "method": source.args.method}
    needed |= source.identity | {"arguments": {"labels": source.args.labels}}
    found = read_json(Path(name), kind, advice, **needed)["applied_calibration"]
    return lambda scorer: Correction(*(found[field] for field in fields))


def print_inside(evaluation: Evaluation, outcome: Outcome, results: dict) -> None:
    """The tables of --label-sets, --calibrate and --errors."""
    task, most = evaluation.source.task, evaluation.source.args.errors
    if "failed" not in results.get("label_sets", ["failed"]):
        from qwen_min.lab.label_sets import format_sets

        print("\n" + format_sets(results["label_sets"], task.tokenizer))
    if "failed" not in results.get("calibration", ["failed"]):
        from qwen_min.lab.calibration import format_calibrations

        print("\n" + format_calibrations(results["calibration"], task.labels))
    if most:
        print("\n" + format_errors(evaluation, outcome, most))


def format_errors(evaluation: Evaluation, outcome: Outcome, most: int) -> str:
    """The mistakes whose wrong class has the highest probability, falling: `most` of them.

    Answers have no probability: the first mistakes, each with its answer.
    """
    names = [*evaluation.source.task.labels, "(none)"]  # OFF_TRACK is -1: the last one
    true, said = evaluation.true_classes, outcome.predictions
    wrong = np.flatnonzero(said != true)
    kind, head, why = "the first", "answer", outcome.answers
    if outcome.scores is not None:
        p = softmax(outcome.scores)[np.arange(len(said)), said]
        wrong = wrong[np.argsort(-p[wrong], kind="stable")]
        kind, head, why = "the most confident", "probability", [f"{x:.4f}" for x in p]
    rows = []
    for i in wrong[:most]:
        example, words = evaluation.examples[i], (names[true[i]], names[said[i]], why[i])
        cells = [clipped(one_line(word), 16) for word in words]
        rows.append([str(example.line), *cells, one_line(example.text)[:WIDTH]])
    table = text_table(["line", "true", "predicted", head, "text"], rows, words=5)
    lines = [f"mistakes: {kind} {len(rows)} of {len(wrong)}", *table.split("\n")]
    return "\n".join(clipped(line, WIDTH) for line in lines)


def explain(source: Source, load: Callable[[Source], Scorer]) -> int:
    """--explain: one text's computation, on the base and on what was trained from it."""
    from qwen_min.lab.clauses import format_clauses, split_clauses, without_each
    from qwen_min.lab.explain import explain_head, explain_labels

    args, task = source.args, source.task
    source.compare()
    text, place, true = args.explain, "--explain", ""
    if args.explain_row is not None:
        rows = {row.line: row for row in read_rows(args, task, source.record)}
        if not (row := rows.get(args.explain_row)):
            found = f"{args.data}: no row starts in line {args.explain_row}"
            raise UserError(f"{found}; expected one of lines {min(rows)} to {max(rows)}")
        text, place = row.text, f"{args.data}, line {row.line}"
        true = f"\nthe row that starts in line {row.line}, true label {task.labels[row.label]}"
    clauses = split_clauses(shorten(task.tokenizer, text, args.max_text_tokens))
    texts = [text, *without_each(clauses)]
    prompt, *others = task.prompts(texts, [place] * len(texts))
    scorer = load(source)
    models = {"the model": scorer.model}
    unadapted = args.method in (*UNTRAINED, "transplanted_head")
    if not unadapted and (source.parts.lora or source.parts.vectors):
        models = {"base": source.base(), "adapted": scorer.model}
    empty, of_clauses = task.empty_prompt(), {}
    for name, model in models.items():  # raises NotFinite
        plain = replace(scorer, model=model, forms=forms(plain=True))
        plain.scores([prompt, empty] if empty else [prompt])
        of_clauses[name] = replace(scorer, model=model).scores([prompt, *others])
    print(f"{args.method}, {args.run or args.model}, {dtype_name(scorer.model)}{true}\n")
    by_head = scorer.by == "head"
    shown = (task.tokenizer, prompt, empty, task.labels if by_head else task.words, models)
    print(explain_head(*shown, scorer.head) if by_head else explain_labels(*shown))
    print("\n" + format_clauses(clauses, of_clauses))
    if others and not args.plain and (dtype := dtype_name(scorer.model)) != "float32":
        print(f"  In {dtype} rounding can differ from the steps above; --dtype float32 agrees.")
    return 0
