"""Train a method of text classification with Qwen; what is learned goes into a run directory.

    python train.py --method lora_label_scoring
    python train.py --method head_only --model DIR --data train.tsv --output runs/probe
    python train.py --method lora_label_scoring --model DIR --data train.tsv --output runs/lora
    python train.py --resume --output runs/lora              # after Ctrl-C or a crash
    python evaluate.py --method lora_label_scoring --run runs/lora --data test.tsv

head_only           a linear head on the frozen base's hidden states (a linear probe)
lora_head           LoRA and a linear head, trained together by cross-entropy
lora_label_scoring  LoRA, trained to give the true label word's tokens a high probability
"""

import argparse
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluate import attach_adapter
from lora import (
    ATTENTION,
    MLP,
    LoRAConfig,
    LoRAError,
    inject_lora,
    lora_parameters,
    merge_lora,
    save_adapter,
)
from qwen_min.command.arguments import check_training
from qwen_min.command.cli import (
    add_data_arguments,
    add_machine_arguments,
    add_prompt_arguments,
    add_training_arguments,
    choose_device,
    make_parser,
    parse_with_given,
    run_command,
    seed,
)
from qwen_min.command.task import Split, read_rows, read_task, whole_template
from qwen_min.errors import UserError
from qwen_min.files.data import HELD_OUT, class_counts, examples_hash, held_out_split
from qwen_min.files.overlap import fed_rows
from qwen_min.files.run import (
    checkpoints,
    publish,
    run_arguments,
    start_record,
    write_atomically,
    write_json,
)
from qwen_min.files.weights import checkpoint_fingerprint, fingerprint, load_model, save_model
from qwen_min.head import (
    POOLINGS,
    LinearHead,
    cached_features,
    candidate_layers,
    fit_layers,
    format_layers,
    head_loss,
    load_head,
    save_head,
    score_rows,
)
from qwen_min.lab import token_vectors as embeddings
from qwen_min.metrics import log_loss
from qwen_min.model import Qwen
from qwen_min.scoring import label_loss
from qwen_min.training import Plan, Stopped, TrainingFailed, fit

METHODS = ("head_only", "lora_head", "lora_label_scoring")
TARGETS = {"attention": ATTENTION, "all": (*ATTENTION, *MLP), "none": ()}


def build_parser() -> argparse.ArgumentParser:
    """The command line, grouped as `--help` shows it."""
    parser = make_parser(__doc__)
    parser.add_argument("--method", choices=METHODS, help="required, unless --resume")
    add_data_arguments(parser, "train.tsv")
    parser.set_defaults(batch_tokens=1024)  # what a forward keeps for its backward grows with them
    parser.add_argument("--data-seed", type=seed, default=0, help="of the held-out part")
    add_prompt_arguments(parser)
    add_machine_arguments(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", help="the run directory (default: runs/METHOD)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --output")
    run.add_argument("--merge", metavar="DIR", help="also write base + LoRA as a plain checkpoint")
    run.add_argument("--seed", type=seed, default=0, help="of initial values, order and dropout")
    add_training_arguments(parser, POOLINGS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, given = parse_with_given(build_parser(), argv)
    return run_command(lambda args: train(run_arguments(args, given)), args)


def train(args: argparse.Namespace) -> int:
    """Read, split, train, and write the run directory."""
    check_training(args)
    device, task, run = choose_device(args.device), read_task(args), Path(args.output)
    labels, directory = task.labels, task.directory
    examples, prompts = read_rows(args, task)
    fed_rows(directory, examples)  # says so where the model has seen the rows already
    training, held_out = held_out_split(examples, HELD_OUT, args.data_seed)
    counts = class_counts([examples[i] for i in training], len(labels))
    for word, count in zip(labels, counts, strict=True):
        if not count:
            raise UserError(
                f"{args.data}: no row of class {word!r} in the training part; every class needs "
                "examples: add rows, or leave its word out of --labels"
            )
    model = load_model(directory, args.dtype, device)
    frozen = dict(model.named_parameters())
    if args.train_embeddings:
        for name in embeddings.token_vectors(model, args.method == "lora_label_scoring"):
            del frozen[name]
    record = {
        "method": args.method,
        "arguments": vars(args),
        "labels": list(labels),
        "template": whole_template(task),
        "base_fingerprint": checkpoint_fingerprint(directory),
        "frozen_before": fingerprint(frozen.items()),
        "data_hash": examples_hash(examples),
        "training_rows": len(training),
        "held_out_rows": len(held_out),
        "truncated_rows": sum(prompt.truncated for prompt in prompts),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "finished": False,
    }
    record = start_record(run, record, args.resume)
    if not record["finished"]:
        lines, labels_of = [e.line for e in examples], [e.label for e in examples]
        data = Split(task.tokenizer, prompts, labels_of, lines, training, held_out)
        try:
            method = train_head if args.method == "head_only" else train_lora
            found = method(args, run, model, data, record)
        except UserError:
            # A mistake seen before anything was computed leaves no run behind to be gone on with.
            if not args.resume and [path.name for path in run.iterdir()] == ["run.json"]:
                (run / "run.json").unlink()
            raise
        except Stopped as stopped:
            print(f"{stopped}; go on with: python train.py --resume --output {run}")
            return 128 + stopped.signal
        except TrainingFailed as failure:
            print(f"error: {failure} (rows: lines of {args.data})", file=sys.stderr)
            return 1
        after = fingerprint(frozen.items())
        if after != record["frozen_before"]:
            raise RuntimeError("a frozen weight has changed in training; this is a bug")
        # Linux counts kilobytes, macOS bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
        record |= found | {"frozen_after": after, "peak_memory_mib": peak, "finished": True}
        write_json(run / "run.json", record)
    print(f"{run}: finished; evaluate it with: python evaluate.py --run {run} --data FILE")
    if args.merge:
        merged = load_model(directory, args.dtype, device)
        weights = record["base_fingerprint"]
        if args.lora_targets != "none":
            attach_adapter(merged, run / "adapter", weights, vectors=args.train_embeddings)
            merge_lora(merged)
        if args.train_embeddings:
            embeddings.load(run / embeddings.FILE, merged, True, weights)
        save_model(merged, directory, args.merge)
        print(f"{args.merge}: base and LoRA, merged; use it with --model {args.merge}")
    return 0


def train_head(args: argparse.Namespace, run: Path, model: Qwen, data: Split, record: dict) -> dict:
    """head_only: features once, then a logistic regression for each candidate layer."""
    weights = record["base_fingerprint"]
    if args.adapter:
        attach_adapter(model, Path(args.adapter), weights)
        weights += fingerprint(lora_parameters(model).items())
        # Kept with the run: the head means nothing without the states that it was fitted on.
        publish(Path(args.adapter), run / "adapter")
    layers = candidate_layers(args.layer, model.config.num_hidden_layers)
    every = layers != [model.config.num_hidden_layers]
    started = time.perf_counter()
    with tqdm(total=len(data.prompts), unit=" rows", desc="features", disable=None) as bar:
        cache = Path(args.feature_cache or run / "features")
        features = cached_features(
            cache, weights, model, data.prompts, args.pooling, every, args.batch_tokens, bar.update
        )
    seconds_features = time.perf_counter() - started
    layers, head = fit_layers(
        features,
        layers,
        np.array(data.labels),
        data.training,
        data.held_out,
        len(record["labels"]),
        args.pooling,
    )
    save_head(run / "head.safetensors", head)
    print(format_layers(layers, head.layer))
    return {
        "layer": head.layer,
        "layers": layers,
        "trained_parameters": head.weight.numel() + head.bias.numel(),
        "seconds": time.perf_counter() - started,
        "seconds_features": seconds_features,
    }


def train_lora(args: argparse.Namespace, run: Path, model: Qwen, data: Split, record: dict) -> dict:
    """lora_head and lora_label_scoring: LoRA by gradient, with a head or with the label words."""
    weights, words = record["base_fingerprint"], args.method == "lora_label_scoring"
    whole = checkpoints(run)
    start = whole[-1][1] if whole else None
    # A word for a usual set, or names: `inject_lora` refuses one that the model does not have.
    targets = TARGETS.get(args.lora_targets, tuple(args.lora_targets.split(",")))
    torch.manual_seed(args.seed)
    try:
        task = "CAUSAL_LM" if words else "SEQ_CLS"
        shape = (args.r, args.alpha, args.dropout)
        config = LoRAConfig(*shape, targets, args.rslora, task, str(args.model))
        if targets and not start:
            inject_lora(model, targets, *shape, args.rslora)
    except LoRAError as error:
        raise UserError(str(error)) from None
    if start and targets:
        attach_adapter(model, start / "adapter", weights, args.dropout, args.train_embeddings)
    parameters, vectors, before = lora_parameters(model), {}, {}
    if args.train_embeddings:
        before = embeddings.token_vectors(model, words)
        vectors = embeddings.unfreeze(model, words)
        parameters |= vectors
        if start:
            embeddings.load(start / embeddings.FILE, model, words, weights)
    head = None
    if not words:
        # Small random values, as transformers starts its classifiers; fp32 whatever the base's.
        shape = (len(record["labels"]), model.config.hidden_size)
        head = nn.Parameter(torch.randn(shape).mul(0.02).to(model.lm_head_weight.device))
        if start:
            with torch.no_grad():
                head.copy_(load_head(start / "head.safetensors").weight)
        parameters["score"] = head

    def loss(rows: list[int]) -> Tensor:
        prompts = [data.prompts[data.training[row]] for row in rows]
        classes = [data.labels[data.training[row]] for row in rows]
        if head is None:
            return label_loss(model, prompts, classes, args.checkpointing)
        return head_loss(model, head, prompts, classes, args.checkpointing)

    def linear_head() -> LinearHead | None:
        if head is None:
            return None
        return LinearHead(head.detach(), None, model.config.num_hidden_layers, "last")

    def evaluate() -> dict:
        model.eval()
        prompts = [data.prompts[row] for row in data.held_out]
        scores = score_rows(model, prompts, linear_head(), args.batch_tokens)
        model.train()
        labels = np.array([data.labels[row] for row in data.held_out])
        if not np.isfinite(scores).all():
            row = data.held_out[int(np.isfinite(scores).all(axis=1).argmin())]
            raise TrainingFailed(
                f"the scores of the held-out row {data.lines[row]} are not finite; the last "
                "checkpoint is kept: try --dtype float32"
            )
        return {
            "held_out_log_loss": log_loss(labels, scores),
            "held_out_accuracy": float((scores.argmax(axis=1) == labels).mean()),
        }

    def write_parameters(directory: Path) -> None:
        if targets:
            together = {embeddings.TOGETHER: embeddings.FILE} if vectors else {}
            metadata = {"base_fingerprint": weights} | together
            save_adapter(directory / "adapter", model, config, head, metadata)
        if vectors:
            embeddings.write(directory / embeddings.FILE, vectors, weights)
        if head is not None:
            save_head(directory / "head.safetensors", linear_head())

    plan = Plan(**{field.name: getattr(args, field.name) for field in fields(Plan)})
    lengths = [len(data.prompts[row].ids) for row in data.training]
    model.train()
    lines = [data.lines[row] for row in data.training]
    state = fit(run, parameters, lengths, plan, loss, evaluate, write_parameters, start, lines)
    best = run / "checkpoints" / f"step-{state['best_step']}"
    if targets:
        publish(best / "adapter", run / "adapter")
    elif head is not None:
        write_atomically(run / "head.safetensors", (best / "head.safetensors").read_bytes())
    moved = None
    if vectors:
        write_atomically(run / embeddings.FILE, (best / embeddings.FILE).read_bytes())
        embeddings.load(run / embeddings.FILE, model, words, weights)
        seen = [data.prompts[row] for row in data.training]
        moved = embeddings.movements(before, vectors, data.tokenizer, seen)
        print(embeddings.format_movements(moved))
    return {
        "history": state["history"],
        "best_step": state["best_step"],
        "steps": state["step"],
        "trained_parameters": sum(p.numel() for p in parameters.values()),
        "seconds": state["seconds"],
        "embedding_movement": moved,
    }


if __name__ == "__main__":
    sys.exit(main())
