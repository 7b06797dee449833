"""Evaluate a method of text classification with Qwen: scores, metrics, and files of both.

    python evaluate.py --method zero_shot --model DIR --data reviews.tsv
    python evaluate.py --method zero_shot --model DIR --data news.csv --labels 体育,财经,科技 \\
        --template '新闻：{text}\\n类别：' --output results.json --predictions predictions.jsonl

zero_shot scores each label word as the continuation of the prompt; nothing is trained.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from qwen_min.cli import (
    CommandParser,
    HelpFormatter,
    add_machine_arguments,
    add_prompt_arguments,
    choose_device,
    commit_outputs,
    open_outputs,
    positive_int,
    run_command,
)
from qwen_min.config import QwenConfig
from qwen_min.data import Example, examples_hash, read_examples
from qwen_min.errors import UserError
from qwen_min.loading import load_model
from qwen_min.metrics import evaluate_predictions
from qwen_min.prompt import Prompt, build_prompts, parse_labels, parse_template
from qwen_min.scoring import DEFAULT_BATCH_TOKENS, score_labels
from qwen_min.tokenizer import Tokenizer

METHODS = ("zero_shot",)


def build_parser() -> argparse.ArgumentParser:
    """The command line, grouped as `--help` shows it."""
    parser = CommandParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--model", required=True, metavar="DIR", help="a model directory")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help=".tsv (label, text_a), .csv or .jsonl (label, text); labels are 0, 1, … or the words",
    )
    data.add_argument("--encoding", default="utf-8", help="of the data file")
    data.add_argument("--limit", type=positive_int, metavar="N", help="only the first N rows")
    add_prompt_arguments(parser)
    add_machine_arguments(parser)
    parser.add_argument(
        "--batch-tokens",
        type=positive_int,
        metavar="N",
        default=DEFAULT_BATCH_TOKENS,
        help="tokens that go through the model at once",
    )
    parser.add_argument("--seed", type=int, default=0, help="of whatever is drawn at random")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="all results, as JSON")
    output.add_argument("--predictions", metavar="FILE", help="every row's scores, as JSON lines")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(evaluate, build_parser().parse_args(argv))


def evaluate(args: argparse.Namespace) -> int:
    """Read, score, measure, write; prints the table."""
    labels, template = parse_labels(args.labels), parse_template(args.template)
    device = choose_device(args.device)
    with ExitStack() as stack:
        results_file, predictions_file = open_outputs(
            [args.output, args.predictions], stack, [args.data]
        )
        config = QwenConfig.from_json(Path(args.model) / "config.json")
        examples = read_examples(args.data, labels, args.encoding, args.limit)
        places = [f"{args.data}, line {e.line}" for e in examples]
        tokenizer = Tokenizer(args.model)
        if tokenizer.size > config.vocab_size:
            raise UserError(
                f"{args.model}: tokenizer.json has {tokenizer.size} tokens, expected at most "
                f"config.json's vocab_size, {config.vocab_size}; take both from one checkpoint"
            )
        prompts = build_prompts(
            tokenizer, [e.text for e in examples], template, labels, args.max_text_tokens, places
        )
        check_lengths(prompts, config.max_position_embeddings, places)
        started = time.perf_counter()
        model = load_model(args.model, args.dtype, device)
        load_seconds = time.perf_counter() - started
        warn_about_labels(prompts[0], labels)

        started = time.perf_counter()
        with tqdm(total=len(prompts), unit=" rows", disable=None) as bar:
            scores = score_labels(model, prompts, args.batch_tokens, bar.update)
        seconds = time.perf_counter() - started
        if not (finite := np.isfinite(scores).all(axis=1)).all():
            raise UserError(
                f"{places[finite.argmin()]}: found a score that is not finite, expected numbers: "
                "fetch the weights again, or try --dtype float32 if they overflow"
            )

        results = {
            "method": args.method,
            **evaluate_predictions(
                [e.label for e in examples], scores.argmax(axis=1), scores, list(labels)
            ),
            # How much of all probability the label words hold between them: near 0, the model
            # would rather have said something else, and the ranking among them means less.
            "label_mass": float(np.exp(scores).sum(axis=1).mean()),
            "truncated_rows": sum(prompt.truncated for prompt in prompts),
            "tokens": sum(len(prompt.ids) for prompt in prompts),
            "seconds": seconds,
            "load_seconds": load_seconds,
            "examples_per_second": len(examples) / seconds,
            "examples_hash": examples_hash(examples),
            "label_ids": [list(ids) for ids in prompts[0].labels],
            "dtype": str(model.head_weight.dtype).removeprefix("torch."),
            "device": device,
            "torch": torch.__version__,
            "arguments": vars(args),
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


def check_lengths(prompts: Sequence[Prompt], max_positions: int, places: Sequence[str]) -> None:
    """Raise UserError where prompt and longest label have more tokens than the model has places."""
    for prompt, place in zip(prompts, places, strict=True):
        tokens = len(prompt.ids) + max(len(ids) for ids in prompt.labels)
        if tokens > max_positions:
            raise UserError(
                f"{place}: prompt and label have {tokens} tokens, expected at most {max_positions} "
                "(max_position_embeddings in config.json); lower --max-text-tokens or shorten "
                "the template"
            )


def warn_about_labels(prompt: Prompt, labels: Sequence[str]) -> None:
    """Say on stderr what makes label words hard to compare: lengths, and one inside another."""
    lengths = [len(ids) for ids in prompt.labels]
    if len(set(lengths)) > 1:
        counts = ", ".join(f"{w} {n}" for w, n in zip(labels, lengths, strict=True))
        print(
            f"warning: label words differ in tokens ({counts}); each is scored whole, and longer "
            "ones tend to score lower",
            file=sys.stderr,
        )
    for word, ids in zip(labels, prompt.labels, strict=True):
        for other, longer in zip(labels, prompt.labels, strict=True):
            if len(ids) < len(longer) and longer[: len(ids)] == ids:
                print(
                    f"warning: {word} is how {other} begins, so it can never score lower",
                    file=sys.stderr,
                )


def prediction_lines(examples: Sequence[Example], scores: np.ndarray) -> str:
    """JSON lines: index (from 0), label, prediction, scores in class order."""
    return "".join(
        json.dumps(
            {
                "index": index,
                "label": example.label,
                "prediction": int(row.argmax()),
                "scores": row.tolist(),
            }
        )
        + "\n"
        for index, (example, row) in enumerate(zip(examples, scores, strict=True))
    )


def format_results(results: dict) -> str:
    """The results as a table for a person."""

    def number(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.4f}"

    low, high = results["accuracy_interval"]
    shortened = f"{results['truncated_rows']} of {results['n']} texts shortened"
    lines = [
        f"method        {results['method']}",
        f"examples      {results['n']}   ({shortened})",
        f"accuracy      {number(results['accuracy'])}   95 % interval {low:.4f} to {high:.4f}",
        f"AUC-ROC       {number(results['auc_roc'])}",
        f"Brier         {number(results['brier'])}   {results['brier_kind']}",
        f"ECE           {number(results['ece'])}   15 bins",
        f"label mass    {number(results['label_mass'])}   probability that the label words hold",
        f"speed         {results['examples_per_second']:.1f} examples/s, "
        f"{results['seconds']:.1f} s, {results['dtype']} on {results['device']}",
        "",
        "class          precision   recall       F1   examples",
    ]
    rows = [*results["per_class"], {"name": "macro", **results["macro"], "support": results["n"]}]
    lines += [
        f"{pad(row['name'], 14)} {row['precision']:9.4f} {row['recall']:8.4f} {row['f1']:8.4f} "
        f"{row['support']:10d}"
        for row in rows
    ]
    names = [row["name"] for row in results["per_class"]]
    heads = names + ["off track"] * bool(results["off_track"])
    lines += ["", "true \\ predicted" + "".join("  " + pad(name, 8, left=True) for name in heads)]
    lines += [
        pad(name, 16) + "".join(f"  {count:8d}" for count in counts)
        for name, counts in zip(names, results["confusion_matrix"], strict=True)
    ]
    return "\n".join(lines)


def pad(text: str, width: int, left: bool = False) -> str:
    """Fill with spaces to a width in terminal columns, where a Chinese character takes two."""
    from unicodedata import east_asian_width

    columns = sum(2 if east_asian_width(char) in "WF" else 1 for char in text)
    space = " " * max(0, width - columns)
    return space + text if left else text + space


if __name__ == "__main__":
    sys.exit(main())
