"""A run directory: the arguments of a training run, its log, its checkpoints and its result.

    run.json             every argument, versions, hashes, history
    log.jsonl            one line for each step
    checkpoints/step-N/  as `save_checkpoint` writes them
    adapter/, head.safetensors, embeddings.safetensors: the result, as far as its method has them

Every file except log.jsonl, and every checkpoint as a whole, is complete or absent whenever the
process dies (see disk.py). No pickle anywhere.
"""

import argparse
import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import save

from qwen_min.errors import UserError
from qwen_min.files import disk
from qwen_min.files.disk import write_atomically, write_json

MANIFEST = "manifest.json"


def read_run(directory: str | Path, **fields: object) -> dict:
    """Read run.json of a run directory. fields: as in `read_json`.

    Raises UserError if it is missing or not a run's record.
    """
    path, advice = Path(directory) / "run.json", "give a directory that train.py made"
    fields = {"method": str, "arguments": dict} | fields
    return disk.read_json(path, "a run's record", advice, **fields)


# What may differ when a run is resumed: paths (model and data are compared by their hashes), and
# settings that change only the rounding of sums and the draws of dropout.
FREE = ("output", "resume", "merge", "model", "data", "encoding", "feature_cache")
FREE += ("device", "batch_tokens")


def run_arguments(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The arguments of a training run: `args`, or with --resume the ones that the run began with.

    given: those of `args` that the user typed. Raises UserError if --output already holds a run
    (with --resume: if it holds none), and if a typed argument differs from the resumed run's.
    """
    if args.output is None and args.method:
        args.output = f"runs/{args.method}"
    if not args.resume:
        if not args.method:
            raise UserError("--method is missing; name the method to train")
        # A new run would wrongly continue from checkpoints that are there without a run.json.
        if any((Path(args.output) / name).exists() for name in ("run.json", "checkpoints")):
            raise UserError(f"--output {args.output} has a run: add --resume, or name another one")
        return args
    if args.output is None:
        raise UserError("--resume needs --output, the directory of the run to continue")
    before = read_run(args.output)["arguments"]
    for name, value in given.items():
        if name not in FREE and before.get(name) != value:
            found = f"--{name.replace('_', '-')} is {value!r} but the run has {before.get(name)!r}"
            raise UserError(f"--resume: {found}; leave it out, or start another run")
    free = {name: given[name] for name in FREE if name in given}
    # --merge applies to one command only. --output is where the run was found: it may have moved.
    before |= {"merge": None, **free, "output": args.output}
    return argparse.Namespace(**(vars(args) | before))


def start_record(run: Path, record: dict, resume: bool) -> dict:
    """Write run.json; with --resume compare `record` with the existing one, and return that.

    Raises UserError if the directory cannot be made, or if model or data are not those that the
    run began with.
    """
    if not resume:
        with disk.one_line_error(run, "name another directory with --output"):
            run.mkdir(parents=True, exist_ok=True)
        write_json(run / "run.json", record)
        return record
    before = read_run(run)
    hashes = {"base_fingerprint": "model", "frozen_before": "model", "data_hash": "data"}
    for key, what in hashes.items():
        if before.get(key) != record.get(key):
            same = f"give the same {what}, or start another run"
            raise UserError(f"--resume: the {what} is not the one of {run} ({key} differs); {same}")
    return before


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Make checkpoints/step-N from the files that `write` puts into a new directory.

    The manifest holds each file's size and SHA-256. A checkpoint that exists already is kept.
    """
    target = run / "checkpoints" / f"step-{step}"
    if not target.exists():
        with disk.new_directory(target) as directory:
            write(directory)
            files = sorted(path for path in directory.rglob("*") if path.is_file())
            manifest = {str(path.relative_to(directory)): _size_and_hash(path) for path in files}
            write_json(directory / MANIFEST, manifest)
    return target


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint, oldest first.

    Raises UserError for one that does not match its manifest: it was changed after it was saved.
    """
    found = []
    for path in (run / "checkpoints").glob("step-*"):
        with disk.refuse_malformed(path, "a whole checkpoint", "remove it, then use --resume"):
            step = int(path.name.removeprefix("step-"))
            entries = dict(json.loads((path / MANIFEST).read_text(encoding="utf-8"))).items()
            if not entries or any(_size_and_hash(path / name) != entry for name, entry in entries):
                raise ValueError(f"it does not match its {MANIFEST}")
        found.append((step, path))
    return sorted(found)


def prune_checkpoints(run: Path, keep: Sequence[int | None]) -> None:
    """Remove the checkpoints of steps not in `keep`, and what a killed process left behind."""
    for path in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (run / "checkpoints").glob("step-*"):
        if path.name not in [f"step-{step}" for step in keep]:
            # Rename first: if the process dies while files are removed, no half checkpoint is left.
            doomed = path.with_name(f".{path.name}.removed")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Replace the directory `target` by a copy of the (small) files in `source`."""
    with disk.new_directory(target, replace=True) as directory:
        for path in filter(Path.is_file, source.iterdir()):
            (directory / path.name).write_bytes(path.read_bytes())


def _size_and_hash(path: Path) -> list:
    data = path.read_bytes()
    return [len(data), hashlib.sha256(data).hexdigest()]


def optimizer_bytes(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> bytes:
    """The state of an AdamW as safetensors: `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`.

    names: of the parameters, in the order in which the optimizer was given them.
    """
    tensors = {}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{names[i]}/{key}": value.cpu().contiguous() for key, value in state.items()}
    return save(tensors)


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], path: Path) -> None:
    """Load the state that `optimizer_bytes` wrote to `path`.

    Raises UserError if it is not the state of exactly these parameters.
    """
    tensors, _ = disk.read_safetensors(path, "an optimizer's state", "start a new run")
    keys = ("exp_avg", "exp_avg_sq", "step")
    if odd := sorted(tensors.keys() ^ {f"{name}/{key}" for name in names for key in keys}):
        raise UserError(f"{path}: {len(odd)} tensors missing or unknown ({odd[0]}); train again")
    state = {}
    for i, name in enumerate(names):  # copies, because an optimizer's step changes them
        state[i] = {key: tensors[f"{name}/{key}"].clone() for key in keys}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def trim_log(path: Path, step: int) -> None:
    """Prepare log.jsonl for the steps after `step`: drop later lines; step 0 empties the file."""
    lines = path.read_text(encoding="utf-8").split("\n") if step and path.exists() else []
    # The last line is incomplete if the process died while writing it.
    whole = [line for line in lines if line.startswith('{"step": ') and line.endswith("}")]
    kept = [line + "\n" for line in whole if json.loads(line)["step"] <= step]
    write_atomically(path, "".join(kept).encode())


def append_log(path: Path, **fields: object) -> None:
    """Append one line. It is handed to the system at once, so it survives a kill of the process."""
    with disk.one_line_error(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


class StopRequest:
    """Record Ctrl-C or SIGTERM in `signal`, so that the training loop can stop after its step.

    The first signal also restores the previous handlers: a second one ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {n: signal.signal(n, self._record) for n in (signal.SIGINT, signal.SIGTERM)}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.restore()

    def restore(self) -> None:
        """Restore the handlers that were set before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
