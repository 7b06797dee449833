"""Train a method of text classification with Qwen; the result goes into a run directory.

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
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from torch import Tensor

from lora import lora_modules, lora_parameters
from qwen_min.command import arguments, cli
from qwen_min.command.classifier import Source, forms
from qwen_min.command.export import export
from qwen_min.command.finite import NotFinite, check_finite, dtype_name
from qwen_min.command.fit import (
    Job,
    Stopped,
    Training,
    fit,
    parse_class_weights,
    split_rows,
    why_failed,
)
from qwen_min.command.summary import format_held_out, format_layers
from qwen_min.command.task import read_task
from qwen_min.command.terminal import progress_bar
from qwen_min.command.trained import Trainable, attach_adapter, identity, result_hash
from qwen_min.errors import UserError
from qwen_min.files import run as run_files
from qwen_min.files.data import examples_hash
from qwen_min.files.disk import write_json
from qwen_min.files.output import refuse_inputs
from qwen_min.files.overlap import adapter_files, fed_rows
from qwen_min.files.probe import cached_features, save_head
from qwen_min.files.weights import fingerprint, load_model
from qwen_min.head import fit_layers
from qwen_min.metrics import log_loss
from qwen_min.prompt import Prompt
from qwen_min.training import Plan, TrainingFailed


def head_only(job: Job) -> dict:
    """Compute features once, then solve a logistic regression for each candidate layer."""
    args, task, last = job.source.args, job.source.task, job.model.config.num_hidden_layers
    layers, started = arguments.candidate_layers(args.layer, last), time.perf_counter()
    found, head = fit_layers(
        probe_features(job, all_layers=layers != [last]),
        layers,
        np.array([example.label for example in job.examples]),
        job.training,
        job.held_out,
        num_classes=len(task.labels),
        pooling=args.pooling,
        class_weights=job.class_weights,
    )
    save_head(job.run / run_files.HEAD, head)
    print(format_layers(found, head.layer))
    size, seconds = head.weight.numel() + head.bias.numel(), time.perf_counter() - started
    measured = {"trained_parameters": size, "seconds": seconds}
    return {"layer": head.layer, "layers": found} | measured


def lora_head(job: Job) -> dict:
    """Train LoRA and a linear head together, by the cross-entropy of the head's scores."""
    trained = Trainable(job.model, job.source.record, job.run)
    losses = forms(job.source.args.plain).head_losses
    return by_gradient(job, trained, partial(losses, job.model, trained.weight))


def lora_label_scoring(job: Job) -> dict:
    """Train LoRA by the log-probability of the true label word's tokens."""
    trained = Trainable(job.model, job.source.record, job.run)
    return by_gradient(job, trained, partial(forms(job.source.args.plain).label_losses, job.model))


METHODS = {method.__name__: method for method in (head_only, lora_head, lora_label_scoring)}


def probe_features(job: Job, all_layers: bool) -> Tensor:
    """Pooled states of every row, (n, L + 1, D) or (n, 1, D): from the cache, or computed."""
    args, model, base_hash = job.source.args, job.model, job.source.record["base_fingerprint"]
    if args.adapter:
        attach_adapter(model, Path(args.adapter), job.source.record, base=args.model)
        base_hash += fingerprint(lora_parameters(model).items())
        base_hash += str({(m.r, m.alpha, m.use_rslora) for m in lora_modules(model).values()})
        # Kept with the run: the head means nothing without the states that it was fitted on.
        run_files.publish(Path(args.adapter), job.run / run_files.ADAPTER)
    with progress_bar(total=sum(len(p.ids) for p in job.prompts), desc="features") as bar:

        def compute(prompts: Sequence[Prompt]) -> Tensor:
            return forms(args.plain).pooled_features(
                model, prompts, args.pooling, all_layers, args.batch_tokens, bar.update
            )

        directory = Path(args.feature_cache or job.run / "features")
        setting = f"{base_hash} {model.dtype} {args.pooling} {all_layers}"
        setting += " plain" * args.plain  # so that --plain computes
        many = [ranks.from_first, ranks.rank == 0] if (ranks := cli.ranks()) else []
        features = cached_features(directory, setting, job.prompts, compute, bar.update, *many)
    try:
        check_finite(model, job.prompts, features.isfinite().flatten(1).all(dim=1))
    except NotFinite as error:
        raise NotFinite(f"{job.places[error.rows[0]]}: {error}", error.rows, None) from None
    return features


def by_gradient(job: Job, trained: Trainable, losses: Callable[..., Tensor]) -> dict:
    """Train in steps; the best step on the held-out part becomes the run's result.

    losses(prompts, true classes, checkpointing, class_weights) is the sum of these rows' losses,
    each times its class's weight, with gradient. A step divides it by its number of rows: balanced
    weights have a mean of one.
    """
    args, model = job.source.args, job.model
    prompts = [job.prompts[row] for row in job.training]
    labels = [job.examples[row].label for row in job.training]
    true = np.array([job.examples[row].label for row in job.held_out])
    lengths, ranks = [len(prompt.ids) for prompt in prompts], cli.ranks()

    def parts(rows: list[int]) -> list[list[int]]:
        cut = forms(args.plain).token_budget_batches
        batches = cut([lengths[row] for row in rows], args.batch_tokens)
        return [[rows[i] for i in batch] for batch in batches]

    def evaluate() -> dict:
        model.eval()
        by = "label words" if trained.head is None else "head"
        scorer = job.source.scorer(model, by, trained.head)
        try:
            scores = scorer.scores([job.prompts[row] for row in job.held_out])
        except NotFinite as error:
            place = job.places[job.held_out[error.rows[0]]]
            raise TrainingFailed(f"the held-out row of {place}: {error}") from None
        model.train()
        found, right = log_loss(true, scores, job.class_weights), scores.argmax(axis=1) == true
        return {"held_out_log_loss": found, "held_out_accuracy": float(right.mean())}

    def loss(rows: list[int]) -> Tensor:
        chosen = [prompts[i] for i in rows], [labels[i] for i in rows]
        if not ranks:
            return losses(*chosen, args.checkpointing, job.class_weights)
        own, factor = ranks.share(len(rows))
        return factor * losses(*chosen, args.checkpointing, job.class_weights, own)

    for module in lora_modules(model).values():
        if args.plain:
            module.forward = module.definition  # in bf16 too
        if ranks:
            module.mask = partial(ranks.own_mask, module.mask)
    training = Training(
        trained.parameters,
        lengths,
        loss,
        parts,
        evaluate,
        save=trained.save,
        eval_every=args.eval_every,
        save_every=args.save_every,
        combine=partial(ranks.combine, list(trained.parameters.values())) if ranks else None,
    )
    model.train()
    plan = Plan(**{field.name: getattr(args, field.name) for field in fields(Plan)})
    state = fit(job.run, training, plan, trained.checkpoint)
    best = job.run / "checkpoints" / f"step-{state['best_step']}"
    trained.publish(best, job.run, job.source.task)
    return {
        **{name: state[name] for name in ("history", "best_step", "seconds")},
        "steps": state["step"],
        "trained_parameters": sum(p.numel() for p in trained.parameters.values()),
        "embedding_movement": trained.movement(job.run, job.source.task.tokenizer, prompts),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command-line arguments, grouped as `--help` shows them."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--method", choices=METHODS, help="required, unless --resume")
    # Activation memory grows with the tokens in one forward.
    arguments.add_model_arguments(parser, batch_tokens=1024)
    arguments.add_data_arguments(parser, "train.tsv")
    text = "your own held-out part, like --data; then all rows of --data are trained on"
    parser.add_argument("--dev", metavar="FILE", help=text)
    parser.add_argument("--data-seed", type=cli.seed, default=0, help="of the held-out part")
    text = "in the losses: balanced (a rare class counts more), or one for each class: 1,2.5"
    parser.add_argument("--class-weights", metavar="W,W", help=text)
    arguments.add_prompt_arguments(parser)
    arguments.add_machine_arguments(parser)
    add = parser.add_argument_group("run").add_argument
    add("--output", metavar="DIR", help="the run directory (default: runs/METHOD)")
    add("--resume", action="store_true", help="continue the run in --output")
    text = "also write base + LoRA (+ head) as a checkpoint for transformers"
    add("--export", "--merge", metavar="DIR", help=text)
    add("--seed", type=cli.seed, default=0, help="of initial values, order and dropout")
    arguments.add_training_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = build_parser()
    args, given = cli.parse_with_given(parser, argv)

    def command(args: argparse.Namespace) -> int:
        with run_files.lock_run(args):  # before anything of the run is read
            args = run_files.run_arguments(args, given)
            cli.refuse_unused(parser, METHODS, args.method, given)
            return train(args)

    return cli.run_command(command, args)


def train(args: argparse.Namespace) -> int:
    """Read, split, load, train, and write the run directory."""
    before = arguments.check_training(args)
    device, task, run = cli.choose_device(args.device), read_task(args, before), Path(args.output)
    refuse_inputs([args.export], [task.directory, run])
    if args.export and before and before["finished"]:  # trains nothing: needs no data
        record = run_files.start_record(run, identity(task, args.adapter), args.resume)
        return export(Source(args, task, device, record), run)
    refuse_inputs([args.feature_cache], [task.directory, args.adapter])
    examples, places, training, held_out = split_rows(args, task, before)
    labels = [examples[row].label for row in training]
    class_weights = parse_class_weights(args.class_weights, task.labels, labels)
    prompts = task.prompts([example.text for example in examples], places)
    data_rows = len(training) if args.dev else len(examples)  # of --data
    fed_rows(task.directory, examples)  # warns if the model was made from some of the rows
    model = load_model(task.directory, args.dtype, device)
    frozen = dict(model.named_parameters())
    if args.train_embeddings:
        from qwen_min.lab.token_vectors import token_vectors

        for name in token_vectors(model, args.method == "lora_label_scoring"):
            del frozen[name]
    record = {
        "method": args.method,
        "arguments": vars(args),
        "labels": list(task.labels),
        "labels_read_as": examples[0].read_as,
        "dtype": dtype_name(model),
        **identity(task, args.adapter),
        "frozen_before": fingerprint(frozen.items()),
        "data_hash": examples_hash(examples[:data_rows]),
        "dev_hash": examples_hash(examples[data_rows:]) if args.dev else None,
        "class_weights": class_weights,
        "adapter_files": adapter_files(args.adapter),
        "training_rows": len(training),
        "held_out_rows": len(held_out),
        "truncated_rows": sum(prompt.truncated for prompt in prompts),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "finished": False,
    }
    if ranks := cli.ranks():
        manifests = sorted(run.glob(f"checkpoints/step-*/{run_files.MANIFEST}"))
        kept = [(path.parent.name, path.read_bytes()) for path in manifests]
        own = dict.fromkeys(("output", "export", "feature_cache"))  # may differ
        what = [{**record, "arguments": vars(args) | own}, device]
        ranks.check_same("model, run, data or device", what, kept)
    record = run_files.start_record(run, record, args.resume)
    source = Source(args, task, device, record)
    if not record["finished"]:
        job = Job(source, run, model, examples, places, prompts, training, held_out, class_weights)
        if status := run_job(job, frozen):
            return status
    print(f"{run}: finished; evaluate it with: python evaluate.py --run {run} --data FILE")
    return export(source, run) if args.export else 0


def run_job(job: Job, frozen: dict[str, Tensor]) -> int:
    """Train, check that the frozen weights are unchanged, complete run.json; the exit status."""
    args, run, record = job.source.args, job.run, job.source.record
    held_out = [job.examples[row].label for row in job.held_out]
    print(format_held_out(job.source.task.labels, held_out), flush=True)
    try:
        found = METHODS[args.method](job)
    except UserError as error:
        if not args.resume:
            run_files.discard_unused(run, features=isinstance(error, NotFinite))
        raise
    except Stopped as stopped:
        again = f" --export {quote(args.export)}" if args.export else ""  # a run doesn't keep it
        print(f"{stopped}; continue with: python train.py --resume --output {run}{again}")
        return 128 + stopped.signal
    except TrainingFailed as failure:
        kept = "; the last checkpoint is kept" if any(run.glob("checkpoints/step-*")) else ""
        cli.print_error(f"{failure}{why_failed(job, failure.rows)}{kept}")
        return 1
    if (after := fingerprint(frozen.items())) != record["frozen_before"]:
        raise RuntimeError("a frozen weight has changed in training; this is a bug")
    # macOS counts bytes, Linux kilobytes.
    per_mib = 2 ** (20 if sys.platform == "darwin" else 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mib
    record |= found | {"frozen_after": after, "peak_memory_mib": peak}
    record |= {"result_hash": result_hash(run), "finished": True}
    write_json(run / "run.json", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
