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

A run brings its model, prompt and label words along; what is typed here goes before them.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lora import LoRAError, load_adapter, lora_modules
from qwen_min.command.arguments import UNTRAINED, check_head, with_run
from qwen_min.command.cli import (
    add_data_arguments,
    add_machine_arguments,
    add_prompt_arguments,
    choose_device,
    make_parser,
    parse_with_given,
    run_command,
    seed,
)
from qwen_min.command.task import (
    Task,
    blank_prompt,
    read_rows,
    read_task,
    task_prompts,
    warn_about_labels,
)
from qwen_min.errors import UserError
from qwen_min.files.data import examples_hash
from qwen_min.files.output import commit_outputs, open_outputs
from qwen_min.files.overlap import clean_part, fed_rows, training_examples
from qwen_min.files.results import (
    format_results,
    name_outputs,
    off_track_examples,
    prediction_lines,
)
from qwen_min.files.weights import checkpoint_fingerprint, load_model
from qwen_min.head import LinearHead, load_head, score_rows
from qwen_min.lab import token_vectors as embeddings
from qwen_min.lab.calibration import calibrations, format_calibrations
from qwen_min.lab.explain import explain_head, explain_labels
from qwen_min.lab.generation import MAX_NEW_TOKENS, first_label, generate_answers, stop_ids
from qwen_min.lab.label_sets import (
    compare_sets,
    distinct_words,
    format_sets,
    parse_label_sets,
    with_first_tokens,
)
from qwen_min.lab.neutral import score_neutral
from qwen_min.metrics import evaluate_predictions
from qwen_min.model import Qwen
from qwen_min.scoring import label_mass, score_labels

METHODS = (*UNTRAINED, "head_only", "lora_head", "lora_label_scoring", "transplanted_head")


def build_parser() -> argparse.ArgumentParser:
    """The command line, grouped as `--help` shows it."""
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
        help="compare corrections for what a label word brings along whatever the text says",
    )
    output = parser.add_argument_group("output (with --run, default: files in the run directory)")
    output.add_argument("--output", metavar="FILE", help="all results, as JSON")
    output.add_argument("--predictions", metavar="FILE", help="every row's scores, as JSON lines")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, given = parse_with_given(build_parser(), argv)
    return run_command(lambda args: evaluate(*with_run(args, given)), args)


def evaluate(args: argparse.Namespace, record: dict | None) -> int:
    """Read, score, measure, write; prints the table."""
    task, device = read_task(args), choose_device(args.device)
    if args.explain is not None:
        return explain(args, task, record, device)
    labels, generates = task.labels, args.method == "zero_shot_generate"
    sets = parse_label_sets(args.label_sets, labels) if args.label_sets else [labels]
    examples, prompts = read_rows(args, task, distinct_words(sets), MAX_NEW_TOKENS * generates)
    truth, data_hash = np.array([e.label for e in examples]), examples_hash(examples)
    fed = fed_rows(task.directory, examples)
    training = training_examples(args.train_data, args.encoding, labels, record)
    stop = stop_ids(task.directory, task.tokenizer.markup) if generates else set()
    if args.run:
        name_outputs(args, record, data_hash)
    with ExitStack() as stack:
        results_file, predictions_file = open_outputs(
            [args.output, args.predictions], stack, [args.data, *filter(None, [args.train_data])]
        )
        started = time.perf_counter()
        model, head = load_method(args, task, record, device)
        load_seconds = time.perf_counter() - started
        # The words of --labels are the first; those of other sets come behind them.
        own = [replace(prompt, labels=prompt.labels[: len(labels)]) for prompt in prompts]
        if by_words := head is None and not generates:
            warn_about_labels(own[0], labels)

        started, scores, answers = time.perf_counter(), None, None
        with tqdm(total=len(prompts), unit=" rows", disable=None) as bar:
            if generates:
                found = generate_answers(model, own, stop, args.batch_tokens, bar.update)
                answers = [task.tokenizer.decode(ids) for ids in found]
            else:
                asked = with_first_tokens(prompts) if args.label_sets else own
                scores = score_rows(model, asked, head, args.batch_tokens, bar.update)
        seconds = time.perf_counter() - started
        if scores is not None and not (finite := np.isfinite(scores).all(axis=1)).all():
            raise UserError(
                f"{args.data}, line {examples[finite.argmin()].line}: found a score that is not "
                "finite, expected numbers: fetch the weights again, or try --dtype float32 if "
                "they overflow"
            )
        more = {}
        if args.label_sets:
            more["label_sets"] = compare_sets(truth, sets, prompts, scores)
            scores = scores[:, : len(labels)]
        if args.calibrate:
            split = record["arguments"]["data_seed"] if record else 0
            rows = training and training[1]
            with tqdm(unit=" rows", desc="calibration", disable=None) as bar:
                score = partial(
                    score_labels, model, batch_tokens=args.batch_tokens, progress=bar.update
                )
                neutral = score_neutral(task, examples, rows, (args.seed, split), score)
            lengths = np.array([[len(ids) for ids in prompt.labels] for prompt in own])
            more["calibration"] = calibrations(truth, scores, lengths, neutral)
        if generates:
            predictions = np.array([first_label(answer, labels) for answer in answers])
            more["off_track_examples"] = off_track_examples(examples, predictions, answers)
        else:
            predictions = scores.argmax(axis=1)

        # How much of all probability the label words hold between them: near 0, the model would
        # rather have said something else, and the ranking among them means less.
        mass = float(label_mass(scores, [p.labels for p in own]).mean()) if by_words else None
        results = {
            "method": args.method,
            **evaluate_predictions(truth, predictions, scores, list(labels)),
            "clean": clean_part(training, examples, predictions, fed),
            "fed_rows": len(fed),
            "label_mass": mass,
            **more,
            "truncated_rows": sum(prompt.truncated for prompt in prompts),
            "tokens": sum(len(prompt.ids) for prompt in prompts),
            "seconds": seconds,
            "load_seconds": load_seconds,
            "examples_per_second": len(examples) / seconds,
            "examples_hash": data_hash,
            "label_ids": [list(ids) for ids in own[0].labels],
            "dtype": str(model.lm_head_weight.dtype).removeprefix("torch."),
            "device": device,
            "torch": torch.__version__,
            "trained_parameters": record["trained_parameters"] if record else 0,
            "training_seconds": record["seconds"] if record else 0.0,
            "arguments": vars(args),
            "training_arguments": record["arguments"] if record else None,
        }
        lines = prediction_lines(examples, predictions, scores, answers)
        try:
            commit_outputs(
                [
                    (results_file, json.dumps(results, ensure_ascii=False, indent=2) + "\n"),
                    (predictions_file, lines),
                ]
            )
        finally:
            print(format_results(results))
            if args.label_sets:
                print("\n" + format_sets(results["label_sets"], task.tokenizer))
            if args.calibrate:
                print("\n" + format_calibrations(results["calibration"], labels))
    return 0


def explain(args: argparse.Namespace, task: Task, record: dict | None, device: str) -> int:
    """--explain: one text's computation, on the base and on what was trained from it."""
    (prompt,) = task_prompts(task, [args.explain], ["--explain"])
    blank = blank_prompt(task)
    model, head = load_method(args, task, record, device)
    vectors = args.run and args.method == record["method"] and embeddings.trained_by(record)
    models = {"the model": model}
    if lora_modules(model) or vectors:
        models = {"base": load_model(task.directory, args.dtype, device), "adapted": model}
    dtype = str(model.lm_head_weight.dtype).removeprefix("torch.")
    print(f"{args.method}, {args.run or args.model}, {dtype}\n")
    if head is None:
        print(explain_labels(task.tokenizer, prompt, blank, task.labels, models))
    else:
        print(explain_head(task.tokenizer, prompt, blank, task.labels, models, head))
    return 0


def load_method(
    args: argparse.Namespace, task: Task, record: dict | None, device: str
) -> tuple[Qwen, LinearHead | None]:
    """The model that `args.method` scores with, and its head where it has one."""
    directory = task.directory
    model = load_model(directory, args.dtype, device)
    if args.method in UNTRAINED:
        return model, None
    base = checkpoint_fingerprint(directory)
    if record and record["base_fingerprint"] != base:
        raise UserError(
            f"{args.run}: trained on other weights than those in {args.model} (their fingerprints "
            "differ); give the checkpoint that it was trained on by --model"
        )
    head = None
    if args.run:
        # What the run must have made: what is missing is never left out in silence.
        given, arguments = record["method"], record["arguments"]
        lora = arguments["adapter"] if given == "head_only" else arguments["lora_targets"] != "none"
        adapter = Path(args.run) / "adapter" if lora else None
        if given == "head_only" or (given == "lora_head" and not lora):
            head = load_head(Path(args.run) / "head.safetensors")
    else:
        adapter = Path(args.adapter)
    vectors = bool(args.run) and embeddings.trained_by(record)
    if adapter:
        weight = attach_adapter(model, adapter, base, vectors=vectors)
        if (weight is not None) != (args.method in ("lora_head", "transplanted_head")) and not head:
            found = "no head" if weight is None else "a classifier's head"
            raise UserError(f"{adapter}: holds {found}, so it is not an adapter for {args.method}")
        if not head and weight is not None:
            head = LinearHead(weight.float(), None, model.config.num_hidden_layers, "last")
    if vectors:
        file = Path(args.run) / embeddings.FILE
        embeddings.load(file, model, given == "lora_label_scoring", base)
    if args.method == "transplanted_head":
        model = load_model(directory, args.dtype, device)  # the base again, without the LoRA
    if head is not None:
        check_head(args, head, model.config, task.labels, record)
    return model, head


def attach_adapter(
    model: Qwen,
    directory: Path,
    base_fingerprint: str,
    dropout: float | None = None,
    vectors: bool = False,
) -> Tensor | None:
    """Put the LoRA in `directory` on `model`, which stays in eval mode; returns its head (C, D).

    vectors: whether the caller also loads the token vectors that were trained with it, if there
    were such. Raises UserError for an adapter that cannot be read, or that was trained on other
    weights. One that PEFT wrote does not say which weights, and is taken at its user's word.
    """
    try:
        _, head, metadata = load_adapter(directory, model, dropout)
    except LoRAError as error:
        raise UserError(str(error)) from None
    if any(name.endswith("lm_head") for name in lora_modules(model)):
        raise UserError(f"{directory}: has a LoRA on lm_head, which stays frozen here; train anew")
    if metadata.get(embeddings.TOGETHER) and not vectors:
        raise UserError(
            f"{directory}: was trained together with the token vectors in its run's "
            f"{embeddings.FILE}, without which it means nothing; give the run by --run"
        )
    if metadata.get("base_fingerprint", base_fingerprint) != base_fingerprint:
        raise UserError(
            f"{directory}: trained on another base (its fingerprint differs from the model's); "
            "give the checkpoint that it was trained on by --model"
        )
    return head


if __name__ == "__main__":
    sys.exit(main())
