"""Evaluate a method of text classification with Qwen: scores, metrics, and files of both.

    python evaluate.py --method zero_shot
    python evaluate.py --method zero_shot --model DIR --data reviews.tsv
    python evaluate.py --method zero_shot --model DIR --data news.csv --labels 体育,财经,科技 \\
        --template '新闻：{text}\\n类别：' --output results.json --predictions predictions.jsonl
    python evaluate.py --run runs/lora --data test.tsv
    python evaluate.py --method transplanted_head --run runs/lora_head --data test.tsv

zero_shot           each label word's log-probability as the continuation of the prompt
head_only           a linear head on the frozen base's hidden states (a linear probe)
lora_head           a linear head on the LoRA-adapted base's hidden states
lora_label_scoring  as zero_shot, on the LoRA-adapted base
transplanted_head   lora_head's head on the base without its LoRA: an ablation

A run brings its model, prompt and label words along; what is typed here goes before them.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lora import LoRAError, load_adapter, lora_modules
from qwen_min.audit import clean_part, fed_rows, training_texts
from qwen_min.cli import (
    add_data_arguments,
    add_machine_arguments,
    add_prompt_arguments,
    choose_device,
    make_parser,
    parse_with_given,
    run_command,
    seed,
)
from qwen_min.config import QwenConfig
from qwen_min.data import Example, examples_hash, read_examples
from qwen_min.errors import UserError
from qwen_min.head import LinearHead, load_head, pooled_features
from qwen_min.hub import resolve_model
from qwen_min.loading import checkpoint_fingerprint, load_model
from qwen_min.metrics import evaluate_predictions
from qwen_min.model import Qwen
from qwen_min.output import commit_outputs, open_outputs
from qwen_min.prompt import (
    Prompt,
    build_prompts,
    check_lengths,
    parse_labels,
    parse_template,
    warn_about_labels,
)
from qwen_min.report import format_results, prediction_lines
from qwen_min.run import read_run
from qwen_min.scoring import score_labels
from qwen_min.tokenizer import Tokenizer

METHODS = ("zero_shot", "head_only", "lora_head", "lora_label_scoring", "transplanted_head")


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
    output = parser.add_argument_group("output (with --run, default: files in the run directory)")
    output.add_argument("--output", metavar="FILE", help="all results, as JSON")
    output.add_argument("--predictions", metavar="FILE", help="every row's scores, as JSON lines")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, given = parse_with_given(build_parser(), argv)
    return run_command(lambda args: evaluate(*with_run(args, given)), args)


def with_run(args: argparse.Namespace, given: dict) -> tuple[argparse.Namespace, dict | None]:
    """The arguments, a run's own in place of defaults, and the run's record (None without --run).

    Raises UserError for methods, runs and adapters that do not go together.
    """
    record, changed = None, []
    if args.run:
        record = read_run(args.run)
        if not record.get("finished"):
            raise UserError(
                f"{args.run}: training has not finished; go on with: "
                f"python train.py --resume --output {args.run}"
            )
        fits = [record["method"]] + ["transplanted_head"] * (record["method"] == "lora_head")
        args.method = args.method or record["method"]
        if args.method not in fits:
            raise UserError(
                f"{args.run}: a run of {record['method']}, which {args.method} cannot use; "
                f"expected --method {' or '.join(fits)}"
            )
        for name in ("model", "labels", "template", "max_text_tokens", "dtype"):
            if name not in given:
                setattr(args, name, record["arguments"][name])
            elif getattr(args, name) != record["arguments"][name]:
                changed.append(f"{name}={getattr(args, name)}")
    elif args.method is None:
        raise UserError("--method is missing; name one, or a trained run with --run")
    elif args.adapter and args.method not in ("lora_head", "lora_label_scoring"):
        raise UserError(f"--adapter is for lora_head and lora_label_scoring, not {args.method}")
    elif args.method != "zero_shot" and not args.adapter:
        raise UserError(f"--method {args.method} needs --run, a directory that train.py made")
    if args.run and args.adapter:
        raise UserError("--run brings its own adapter; give --run or --adapter, not both")
    args.changed = changed  # where the run's own setting was not wanted
    return args, record


def evaluate(args: argparse.Namespace, record: dict | None) -> int:
    """Read, score, measure, write; prints the table."""
    labels, template = parse_labels(args.labels), parse_template(args.template)
    device, directory = choose_device(args.device), resolve_model(args.model)
    examples, prompts = read_prompts(args, directory, labels, template)
    data_hash, fed = examples_hash(examples), fed_rows(directory, examples)
    training = training_texts(args.train_data, args.encoding, labels, record)
    if args.run:
        own = args.method == record["method"]
        # Settings other than the run's own make another result, in another file.
        other = hashlib.sha256(" ".join(args.changed).encode()).hexdigest()[:8]
        parts = [args.method] * (not own) + [data_hash[:12]] + [other] * bool(args.changed)
        ending = "-".join(parts)
        args.output = args.output or str(Path(args.run) / f"results-{ending}.json")
        args.predictions = args.predictions or str(Path(args.run) / f"predictions-{ending}.jsonl")
    with ExitStack() as stack:
        results_file, predictions_file = open_outputs(
            [args.output, args.predictions], stack, [args.data, *filter(None, [args.train_data])]
        )
        started = time.perf_counter()
        model, head = load_method(args, directory, record, device)
        if head is not None and list(labels) != (record["labels"] if record else list(labels)):
            raise UserError(
                f"--labels {args.labels}: the head was trained for {','.join(record['labels'])}; "
                "leave --labels out"
            )
        if head is not None and len(head.weight) != len(labels):
            raise UserError(
                f"--labels names {len(labels)} classes, the trained head has {len(head.weight)}; "
                "name as many"
            )
        load_seconds = time.perf_counter() - started
        if head is None:
            warn_about_labels(prompts[0], labels)

        started = time.perf_counter()
        with tqdm(total=len(prompts), unit=" rows", disable=None) as bar:
            scores = score_rows(model, prompts, head, args.batch_tokens, bar.update)
        seconds = time.perf_counter() - started
        if not (finite := np.isfinite(scores).all(axis=1)).all():
            raise UserError(
                f"{args.data}, line {examples[finite.argmin()].line}: found a score that is not "
                "finite, expected numbers: fetch the weights again, or try --dtype float32 if "
                "they overflow"
            )

        results = {
            "method": args.method,
            **evaluate_predictions(
                [e.label for e in examples], scores.argmax(axis=1), scores, list(labels)
            ),
            "clean": clean_part(training, examples, scores.argmax(axis=1), fed),
            "fed_rows": len(fed),
            # How much of all probability the label words hold between them: near 0, the model
            # would rather have said something else, and the ranking among them means less.
            "label_mass": float(np.exp(scores).sum(axis=1).mean()) if head is None else None,
            "truncated_rows": sum(prompt.truncated for prompt in prompts),
            "tokens": sum(len(prompt.ids) for prompt in prompts),
            "seconds": seconds,
            "load_seconds": load_seconds,
            "examples_per_second": len(examples) / seconds,
            "examples_hash": data_hash,
            "label_ids": [list(ids) for ids in prompts[0].labels],
            "dtype": str(model.head_weight.dtype).removeprefix("torch."),
            "device": device,
            "torch": torch.__version__,
            "trained_parameters": record["trained_parameters"] if record else 0,
            "training_seconds": record["seconds"] if record else 0.0,
            "arguments": vars(args),
            "training_arguments": record["arguments"] if record else None,
        }
        try:
            commit_outputs(
                [
                    (results_file, json.dumps(results, ensure_ascii=False, indent=2) + "\n"),
                    (predictions_file, prediction_lines(examples, scores)),
                ]
            )
        finally:
            print(format_results(results))
    return 0


def read_prompts(
    args: argparse.Namespace, directory: Path, labels: Sequence[str], template: str
) -> tuple[list[Example], list[Prompt]]:
    """The examples of --data and their prompts, checked against the model's limits."""
    config = QwenConfig.from_json(directory / "config.json")
    examples = read_examples(args.data, labels, args.encoding, args.limit)
    places = [f"{args.data}, line {e.line}" for e in examples]
    tokenizer = Tokenizer(directory)
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"{directory}: tokenizer.json has {tokenizer.size} tokens, expected at most "
            f"config.json's vocab_size, {config.vocab_size}; take both from one checkpoint"
        )
    prompts = build_prompts(
        tokenizer, [e.text for e in examples], template, labels, args.max_text_tokens, places
    )
    check_lengths(prompts, config.max_position_embeddings, places)
    return examples, prompts


def load_method(
    args: argparse.Namespace, directory: Path, record: dict | None, device: str
) -> tuple[Qwen, LinearHead | None]:
    """The model that `args.method` scores with, and its head where it has one."""
    model = load_model(directory, args.dtype, device)
    if args.method == "zero_shot":
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
        if given == "head_only" or not lora:
            head = load_head(Path(args.run) / "head.safetensors")
    else:
        adapter = Path(args.adapter)
    if adapter:
        weight = attach_adapter(model, adapter, base)
        if (weight is not None) != (args.method in ("lora_head", "transplanted_head")) and not head:
            found = "no head" if weight is None else "a classifier's head"
            raise UserError(f"{adapter}: holds {found}, so it is not an adapter for {args.method}")
        if not head and weight is not None:
            head = LinearHead(weight.float(), None, model.config.num_hidden_layers, "last")
    if args.method == "transplanted_head":
        model = load_model(directory, args.dtype, device)  # the base again, without the LoRA
    if head is not None and not (
        head.weight.shape[1] == model.config.hidden_size
        and 0 <= head.layer <= model.config.num_hidden_layers
    ):
        raise UserError(
            f"the head is for layer {head.layer} of {head.weight.shape[1]} numbers, the model in "
            f"{args.model} has {model.config.num_hidden_layers} layers of "
            f"{model.config.hidden_size}; give the model that it was trained on"
        )
    return model, head


def attach_adapter(
    model: Qwen, directory: Path, base_fingerprint: str, dropout: float | None = None
) -> Tensor | None:
    """Put the LoRA in `directory` on `model`, which stays in eval mode; returns its head (C, D).

    Raises UserError for an adapter that cannot be read, or that was trained on other weights. One
    that PEFT wrote does not say which weights, and is taken at its user's word.
    """
    try:
        _, head, metadata = load_adapter(directory, model, dropout)
    except LoRAError as error:
        raise UserError(str(error)) from None
    if any(name.endswith("lm_head") for name in lora_modules(model)):
        raise UserError(f"{directory}: has a LoRA on lm_head, which stays frozen here; train anew")
    if metadata.get("base_fingerprint", base_fingerprint) != base_fingerprint:
        raise UserError(
            f"{directory}: trained on another base (its fingerprint differs from the model's); "
            "give the checkpoint that it was trained on by --model"
        )
    return head


def score_rows(
    model: Qwen,
    prompts: Sequence[Prompt],
    head: LinearHead | None,
    batch_tokens: int,
    progress: Callable[[int], object] = lambda rows: None,
) -> np.ndarray:
    """Class scores (n, C): of the label words, or of the head where there is one."""
    if head is None:
        return score_labels(model, prompts, batch_tokens, progress)
    every = head.layer != model.config.num_hidden_layers
    features = pooled_features(model, prompts, head.pooling, every, batch_tokens, progress)
    return head.scores(features[:, head.layer if every else 0])


if __name__ == "__main__":
    sys.exit(main())
