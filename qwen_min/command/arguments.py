"""Which arguments go together: a mistake among them is seen before anything is read or loaded."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qwen_min.config import QwenConfig
from qwen_min.errors import UserError
from qwen_min.files.run import read_run
from qwen_min.head import LinearHead

UNTRAINED = ("zero_shot", "zero_shot_generate")
SCORE_LABELS = ("zero_shot", "lora_label_scoring")
# What an evaluation takes from a run where nothing else is typed.
RESTORED = ("model", "labels", "template", "max_text_tokens", "dtype", "chat", "system")


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
        for name in RESTORED:
            own = record["arguments"].get(name, getattr(args, name))  # older runs lack some
            if name not in given:
                setattr(args, name, own)
            elif getattr(args, name) != own:
                changed.append(f"{name}={getattr(args, name)}")
    elif args.method is None:
        raise UserError("--method is missing; name one, or a trained run with --run")
    elif args.adapter and args.method not in ("lora_head", "lora_label_scoring"):
        raise UserError(f"--adapter is for lora_head and lora_label_scoring, not {args.method}")
    elif args.method not in UNTRAINED and not args.adapter:
        raise UserError(f"--method {args.method} needs --run, a directory that train.py made")
    if args.run and args.adapter:
        raise UserError("--run brings its own adapter; give --run or --adapter, not both")
    check_evaluation(args, given)
    args.changed = changed  # where the run's own setting was not wanted
    return args, record


def check_evaluation(args: argparse.Namespace, given: dict) -> None:
    """Refuse additions that the method has no numbers for, and what --explain does not look at."""
    for name in ("label_sets", "calibrate"):
        if getattr(args, name) and args.method not in SCORE_LABELS:
            raise UserError(
                f"--{name.replace('_', '-')} is about the scores of label words, which "
                f"{args.method} has none of; expected --method {' or '.join(SCORE_LABELS)}"
            )
    if args.explain is None:
        return
    if not args.explain.strip():
        raise UserError(f"--explain {args.explain!r}: no text; give the one to be explained")
    if args.method == "zero_shot_generate":
        raise UserError(
            "--explain shows how scores come about, which zero_shot_generate has none of; take "
            "--method zero_shot"
        )
    aside = ("data", "limit", "train_data", "output", "predictions", "label_sets", "calibrate")
    if unused := [f"--{name.replace('_', '-')}" for name in aside if name in given]:
        raise UserError(
            f"--explain looks at its one text and prints; leave out {', '.join(unused)}"
        )


def check_training(args: argparse.Namespace) -> None:
    """Refuse what would fail only after the model is loaded, or train nothing."""
    nothing = args.lora_targets == "none" and not args.train_embeddings
    if args.merge and (args.method != "lora_label_scoring" or nothing):
        raise UserError(
            "--merge needs lora_label_scoring with LoRA: a plain checkpoint has no head"
        )
    if args.method == "lora_label_scoring" and nothing:
        raise UserError("--lora-targets none leaves nothing to train; choose attention or all")
    if args.train_embeddings and args.method == "head_only":
        raise UserError(
            "--train-embeddings is for lora_head and lora_label_scoring; head_only is a probe of "
            "frozen states: leave it out"
        )
    if args.adapter and args.method != "head_only":
        raise UserError(f"--adapter is for head_only, to probe an adapted base, not {args.method}")
    for name, low, high in (("lr", 0, 1), ("warmup", 0, 1), ("dropout", 0, 1), ("clip", 0, 1e9)):
        value = getattr(args, name)
        if not low <= value < high or (name in ("lr", "clip") and value == 0):
            raise UserError(f"--{name} is {value}; expected a number from {low} to below {high:g}")
    if args.merge and Path(args.merge).exists():
        raise UserError(f"--merge {args.merge} exists already; name a directory that does not")


def check_head(
    args: argparse.Namespace,
    head: LinearHead,
    config: QwenConfig,
    labels: Sequence[str],
    record: dict | None,
) -> None:
    """Refuse a head that is not for this model, or for other classes than those of --labels."""
    fits = head.weight.shape[1] == config.hidden_size
    if not (fits and 0 <= head.layer <= config.num_hidden_layers):
        raise UserError(
            f"the head is for layer {head.layer} of {head.weight.shape[1]} numbers, the model in "
            f"{args.model} has {config.num_hidden_layers} layers of "
            f"{config.hidden_size}; give the model that it was trained on"
        )
    if list(labels) != (record["labels"] if record else list(labels)):
        raise UserError(
            f"--labels {args.labels}: the head was trained for {','.join(record['labels'])}; "
            "leave --labels out"
        )
    if len(head.weight) != len(labels):
        raise UserError(
            f"--labels names {len(labels)} classes, the trained head has {len(head.weight)}; "
            "name as many"
        )
