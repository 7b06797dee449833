"""A training in a run directory: the loop of training.py with log, checkpoints and signals."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from qwen_min.command.classifier import Source
from qwen_min.command.finite import first_not_finite
from qwen_min.command.task import Task, check_classes, read_rows
from qwen_min.command.terminal import progress_bar
from qwen_min.errors import UserError
from qwen_min.files import run as run_files
from qwen_min.files.data import HELD_OUT, Example, held_out_split
from qwen_min.files.disk import read_json, write_atomically, write_json
from qwen_min.files.overlap import normalised, stand_in
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.training import Plan, best_step, make_optimizer, training_steps

STATE = {"step": int, "seconds": float, "history": [{"step": int, "held_out_log_loss": float}]}


@dataclass(frozen=True)
class Job:
    """What a method trains on: the loaded base, and the rows of the data file with their split."""

    source: Source
    run: Path  # the run directory
    model: Qwen
    examples: Sequence[Example]
    places: Sequence[str]  # where each example is: file and line
    prompts: Sequence[Prompt]  # of each example
    training: Sequence[int]  # rows to train on
    held_out: Sequence[int]  # rows that choose penalty, layer or step
    class_weights: Sequence[float] | None  # in the losses; None: none are given


def parse_class_weights(
    given: str | None, labels: Sequence[str], classes: Sequence[int]
) -> list[float] | None:
    """The weight of each class, from --class-weights: (C,); None if it is not given.

    balanced: n / (C · n_y) over the n rows trained on, whose classes these are. Their mean over
    these rows is one. Raises UserError for numbers that cannot be weights, or are not C.
    """
    if given is None:
        return None
    balanced = len(classes) / len(labels) / np.bincount(classes)
    weights = balanced.tolist() if given == "balanced" else []
    with suppress(ValueError):
        weights = weights or [float(number) for number in given.split(",")]
    if len(weights) != len(labels) or not all(1e-9 <= weight <= 1e9 for weight in weights):
        expected = f"balanced, or a number above 0 for each of {', '.join(labels)}: 1,2.5"
        raise UserError(f"--class-weights {given!r}: expected {expected}")
    return weights


def split_rows(
    args: argparse.Namespace, task: Task, before: dict | None
) -> tuple[list[Example], list[str], list[int], list[int]]:
    """The examples and their places; and of them the rows to train on, and those held out: a part
    of --data, or all rows of --dev, which then come after those of --data."""
    examples = read_rows(args, task, before)
    places = [f"{args.data}, line {example.line}" for example in examples]
    if args.dev is None:
        training, held_out = held_out_split(examples, HELD_OUT, args.data_seed)
        check_classes(args, task, examples, training)
        return examples, places, training, held_out
    training = list(range(len(examples)))
    check_classes(args, task, examples, training)
    other = argparse.Namespace(**vars(args) | {"data": args.dev, "limit": None})
    dev = read_rows(other, task, {"labels_read_as": examples[0].read_as})
    if both := stand_in(*([normalised(row.text) for row in rows] for rows in (dev, examples))):
        found = f"{len(both)} of its {len(dev)} texts are in {args.data} too"
        print(f"warning: {args.dev}: {found}: the log-loss measures memory", file=sys.stderr)
    places += [f"{args.dev}, line {example.line}" for example in dev]
    return [*examples, *dev], places, training, list(range(len(training), len(places)))


class Stopped(Exception):
    """A signal asked the run to stop; it stopped after a step and saved a checkpoint."""

    def __init__(self, signal: int, step: int):
        super().__init__(f"stopped after step {step}, saved")
        self.signal = signal


@dataclass(frozen=True)
class Training:
    """What is trained, and how it is measured and saved."""

    parameters: dict[str, nn.Parameter]
    lengths: Sequence[int]  # tokens of each row
    loss: Callable[[list[int]], Tensor]  # of rows: the sum of their losses, with gradient
    parts: Callable[[list[int]], list[list[int]]]  # the rows of one step, cut into forwards
    evaluate: Callable[[], dict]  # on held-out rows: held_out_log_loss at least
    save: Callable[[Path], None]  # the parameters, into a directory
    eval_every: int | None  # steps; None: twice an epoch
    save_every: int  # steps; every evaluation saves too
    combine: Callable[[run_files.StopRequest, float], float] | None = None  # of several processes


def fit(run: Path, training: Training, plan: Plan, checkpoint: Path | None = None) -> dict:
    """Train in `run`; returns step, seconds, history and best_step.

    The step with the lowest held-out log-loss is the best. checkpoint: one of the same run to
    continue from, whose parameters the caller has loaded already.

    Raises TrainingFailed as `training_steps` does, and Stopped on SIGINT or SIGTERM, after the
    current step and a checkpoint.
    """
    names, optimizer = list(training.parameters), make_optimizer(training.parameters.values())
    state = {"step": 0, "seconds": 0.0, "history": []}
    if checkpoint is not None:
        advice = "remove this checkpoint, then use --resume"
        state = read_json(checkpoint / "state.json", "a training's state", advice, **STATE)
        state["history"] = with_best_saved(run, state["history"])
        run_files.restore_optimizer(optimizer, names, checkpoint / "optimizer.safetensors")
    per_epoch = plan.steps_per_epoch(len(training.lengths))
    steps = plan.epochs * per_epoch
    eval_every = training.eval_every or -(-per_epoch // 2)
    before, started = state["seconds"], time.perf_counter()

    def write(directory: Path) -> None:
        training.save(directory)
        data = run_files.optimizer_bytes(optimizer, names)
        write_atomically(directory / "optimizer.safetensors", data)
        write_json(directory / "state.json", state)

    def stopping() -> int | None:
        return stop.agreed if training.combine else stop.signal

    log = run / "log.jsonl"
    run_files.trim_log(log, state["step"])
    stop = run_files.StopRequest()
    total = plan.epochs * sum(training.lengths)  # tokens
    # Steps differ in tokens: of those that are done, the share is about that of the steps.
    bar = progress_bar(total=total, initial=total * state["step"] // steps, desc="training")
    try:
        step_started = time.perf_counter()
        steps_done = training_steps(
            optimizer,
            training.lengths,
            plan,
            training.loss,
            training.parts,
            done=state["step"],
            combine=partial(training.combine, stop) if training.combine else None,
        )
        for step in steps_done:
            state["step"] = step.number
            tokens = sum(training.lengths[row] for row in step.rows)
            speed = tokens / (time.perf_counter() - step_started)
            numbers = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm}
            run_files.append_log(log, step=step.number, **numbers, tokens_per_s=speed)
            bar.set_postfix_str(f"step {step.number}/{steps}, loss {step.loss:.3f}", refresh=False)
            bar.update(min(tokens, total - bar.n))
            last = step.number == steps
            if evaluates := step.number % eval_every == 0 or last:
                found = training.evaluate()
                state["history"].append({"step": step.number, **found})
                bar.clear()  # the line takes its place; the next step draws it again
                line = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
                print(f"step {step.number} of {steps}  {line}", flush=True)
            if evaluates or step.number % training.save_every == 0 or stopping():
                state["seconds"] = before + time.perf_counter() - started
                run_files.save_checkpoint(run, step.number, write)
                run_files.prune_checkpoints(run, [step.number, best_step(state["history"])])
                if (number := stopping()) and not last:
                    raise Stopped(number, step.number)
            # A signal after a step that was not saved waits for the next one.
            step_started = time.perf_counter()
    finally:
        bar.close()
        stop.restore()
    return {**state, "best_step": best_step(state["history"])}


def with_best_saved(run: Path, history: list[dict]) -> list[dict]:
    """The history without the steps that would be the best but whose checkpoint was removed.

    At the end the best step's checkpoint is published. If any are left out, stderr gets a note.
    """
    kept = history
    while (step := best_step(kept)) and not (run / "checkpoints" / f"step-{step}").exists():
        kept = [entry for entry in kept if entry["step"] != step]
    if lost := [entry["step"] for entry in history if entry not in kept]:
        found = f"no checkpoint of steps {lost}, which were better than those that are left"
        print(f"note: {run}: {found}; the best of the others is taken", file=sys.stderr)
    return kept


def why_failed(job: Job, failed: Sequence[int]) -> str:
    """Where the numbers of a step's rows stop being finite, if they do; otherwise which rows."""
    job.model.eval()
    rows = [(job.prompts[job.training[i]], job.examples[job.training[i]]) for i in failed]
    prompts = [replace(p, labels=p.labels[e.label : e.label + 1]) for p, e in rows]
    if rows and (where := first_not_finite(job.model, prompts)):
        lower = ", or lower --lr" * (not where.startswith("in float16"))
        return f", numbers that are not finite {where}{lower}"
    lines = f"in rows {[example.line for _, example in rows]} (lines of {job.source.args.data})"
    return f", {lines}: look at these, or lower --lr" * bool(rows)
