"""The training loop: batches, accumulation, schedule, clipping, checkpoints, and going on again.

It knows parameters and a loss, not what they mean. Everything that a step depends on follows from
the seed and the step's number (order of the rows, learning rate, dropout), so that what a resumed
run has to restore is the parameters, the optimizer's moments and the number.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qwen_min.fast.batching import shuffled_batches, token_budget_batches
from qwen_min.files.run import (
    StopRequest,
    append_log,
    optimizer_bytes,
    prune_checkpoints,
    restore_optimizer,
    save_checkpoint,
    trim_log,
    write_atomically,
    write_json,
)


class TrainingFailed(Exception):
    """Loss or gradient is no longer a number. The message, one line, names step and rows."""


class Stopped(Exception):
    """A signal asked the run to stop; it did so after a step, with a checkpoint."""

    def __init__(self, signal: int, step: int):
        super().__init__(f"stopped after step {step}, saved")
        self.signal = signal


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train; defaults are the command's to choose."""

    epochs: int
    batch_size: int  # rows in one step
    batch_tokens: int  # tokens in one forward; a step that has more is accumulated from several
    lr: float  # at its peak
    warmup: float  # share of the steps in which the rate rises
    clip: float  # largest norm of the whole gradient
    eval_every: int | None  # steps; None: twice an epoch
    save_every: int  # steps; every evaluation saves too
    seed: int


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of step 0 … steps-1: a linear rise, then half a cosine, zero after the last step."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def fit(
    run: Path,
    parameters: dict[str, nn.Parameter],
    lengths: Sequence[int],
    plan: Plan,
    loss: Callable[[list[int]], Tensor],
    evaluate: Callable[[], dict],
    write_parameters: Callable[[Path], None],
    checkpoint: Path | None = None,
    places: Sequence[int] | None = None,
) -> dict:
    """Minimise the mean of `loss` over rows; returns step, seconds, history and best_step.

    lengths: tokens of each row. loss(rows) is the *sum* over those rows of each one's loss; a step
    divides by all its rows, however it is cut into forwards, so that accumulation changes nothing
    but rounding, and under dropout the draw: each forward has its own.
    evaluate() measures on held-out rows and returns at least held_out_log_loss; the step where that
    is lowest is the best. write_parameters(directory) puts the trained parameters into a directory.
    checkpoint: of the same run, to go on from; the parameters have been read from it already.
    places: what to call each row in an error, such as its line in a file; default: 1, 2, …

    Raises TrainingFailed before the optimizer's step where loss or gradient is not finite, and
    Stopped after a step and a checkpoint on SIGINT or SIGTERM.
    """
    names, places = list(parameters), places or range(1, len(lengths) + 1)
    # Decay would pull A and B, which are a small change already, towards no change at all, and
    # token vectors towards zero instead of towards where they were.
    optimizer = torch.optim.AdamW(parameters.values(), lr=plan.lr, weight_decay=0.0)
    state = {"step": 0, "seconds": 0.0, "history": []}
    if checkpoint is not None:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        path = checkpoint / "optimizer.safetensors"
        restore_optimizer(optimizer, names, path)
    per_epoch = math.ceil(len(lengths) / plan.batch_size)
    steps = plan.epochs * per_epoch
    eval_every = plan.eval_every or math.ceil(per_epoch / 2)
    before, started = state["seconds"], time.perf_counter()

    def save() -> None:
        def write(directory: Path) -> None:
            write_parameters(directory)
            data = optimizer_bytes(optimizer, names)
            write_atomically(directory / "optimizer.safetensors", data)
            write_json(directory / "state.json", state)

        state["seconds"] = before + time.perf_counter() - started
        save_checkpoint(run, state["step"], write)
        prune_checkpoints(run, [state["step"], best_step(state["history"])])

    log = run / "log.jsonl"
    trim_log(log, state["step"])
    stop = StopRequest()
    bar = tqdm(total=steps, initial=state["step"], unit=" steps", disable=None)
    try:
        while state["step"] < steps:
            step_started = time.perf_counter()
            epoch, index = divmod(state["step"], per_epoch)
            rows = shuffled_batches(lengths, plan.batch_size, plan.seed, epoch)[index]
            rate = learning_rate(state["step"], steps, plan.lr, plan.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # Dropout of a step is drawn from its number: a resumed run draws the same.
            torch.manual_seed(plan.seed * 1_000_003 + state["step"])
            optimizer.zero_grad()
            mean_loss = 0.0
            for part in token_budget_batches([lengths[row] for row in rows], plan.batch_tokens):
                part_loss = loss([rows[i] for i in part]) / len(rows)
                part_loss.backward()
                mean_loss += part_loss.item()
            norm = nn.utils.clip_grad_norm_(parameters.values(), plan.clip).item()
            if not (math.isfinite(mean_loss) and math.isfinite(norm)):
                raise TrainingFailed(
                    f"step {state['step'] + 1}: loss {mean_loss}, gradient norm {norm}, in rows "
                    f"{[places[row] for row in rows]}; nothing was changed by this step, the last "
                    "checkpoint is kept: look at these rows, or lower --lr"
                )
            optimizer.step()
            state["step"] += 1

            tokens = sum(lengths[row] for row in rows)
            speed = tokens / (time.perf_counter() - step_started)
            append_log(
                log, step=state["step"], loss=mean_loss, lr=rate, grad_norm=norm, tokens_per_s=speed
            )
            bar.update()
            bar.set_postfix(loss=f"{mean_loss:.3f}", lr=f"{rate:.1e}", tok_s=f"{speed:.0f}")
            if state["step"] % eval_every == 0 or state["step"] == steps:
                state["history"].append({"step": state["step"], **evaluate()})
                save()
            elif state["step"] % plan.save_every == 0 or stop.signal is not None:
                save()
            else:
                continue  # nothing is saved: a signal that comes right now waits for the next step
            if stop.signal is not None and state["step"] < steps:
                raise Stopped(stop.signal, state["step"])
    finally:
        bar.close()
        stop.restore()
    return {**state, "best_step": best_step(state["history"])}


def best_step(history: Sequence[dict]) -> int | None:
    """The evaluated step with the lowest held-out log-loss, the first of equals."""
    best = min(history, key=lambda entry: entry["held_out_log_loss"], default={"step": None})
    return best["step"]
