"""A run directory: what was asked for, what happened, and checkpoints that are whole or absent.

    run.json             every argument, versions, hashes, history
    log.jsonl            one line for each step
    checkpoints/step-N/  as `save_checkpoint` writes them
    adapter/, head.safetensors: the result

Every file is written aside, synced and renamed; a checkpoint directory as a whole, its manifest
last. Whenever a process dies, what carries its proper name is complete. No pickle anywhere.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from qwen_min.errors import UserError

MANIFEST = "manifest.json"


def write_atomically(path: Path, data: bytes) -> None:
    """Write aside in the same directory, sync, rename: readers see the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); what was saved before is intact: make "
            "room, then go on with --resume"
        ) from None
    finally:
        # Gone where it was renamed. On a read-only file system even this is refused.
        with contextlib.suppress(OSError):
            aside.unlink()


def write_json(path: Path, content: dict) -> None:
    """JSON, indented, Chinese as it is."""
    write_atomically(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())


def read_run(directory: str | Path) -> dict:
    """run.json of a run directory. Raises UserError where there is none."""
    path = Path(directory) / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in (("method", str), ("arguments", dict)):
            if not isinstance(run[key], kind):
                raise TypeError(f"{key} is {run[key]!r}")
        if run.get("finished") and not isinstance(run["labels"], list):
            raise TypeError(f"labels are {run['labels']!r}")
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected a directory that train.py made"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a run's record ({error!r}); train again") from None
    return run


# What a resumed run may be given anew: where things are (model and data are known by their hashes)
# and how the work is cut up, which changes the rounding of sums and nothing else.
FREE = ("output", "resume", "merge", "model", "data", "encoding", "feature_cache")
FREE += ("device", "batch_tokens")


def run_arguments(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The arguments of a training run: as they are, or with --resume those that it began with.

    given: those of `args` that were typed and not left at their default. Raises UserError for a
    directory that holds a run (or, with --resume, holds none), and, with --resume, for an argument
    that is given and differs.
    """
    if args.output is None and args.method:
        args.output = f"runs/{args.method}"
    if not args.resume:
        if not args.method:
            raise UserError("--method is missing; name the method to train")
        # Checkpoints without their run.json would be gone on with, as if they were this run's.
        if any((Path(args.output) / name).exists() for name in ("run.json", "checkpoints")):
            raise UserError(
                f"--output {args.output} holds a run already; go on with it by --resume, or name "
                "another directory"
            )
        return args
    if args.output is None:
        raise UserError("--resume needs --output, the run directory to go on with")
    before = read_run(args.output)["arguments"]
    for name, value in given.items():
        if name not in FREE and before.get(name) != value:
            raise UserError(
                f"--resume: --{name.replace('_', '-')} is {value!r} but the run has "
                f"{before.get(name)!r}; leave it out, or start another run"
            )
    free = {name: given[name] for name in FREE if name in given}
    # The directory may have been moved since: it is the one that was read.
    before = {**before, "merge": None}  # asked for each time
    return argparse.Namespace(**(vars(args) | before | free | {"output": args.output}))


def start_record(run: Path, record: dict, resume: bool) -> dict:
    """Write run.json; with --resume compare `record` with the one that is there, and return that.

    Raises UserError where the directory cannot be made, or where model or data are not those that
    the run began with.
    """
    if not resume:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {run}: {error.strerror}; name another directory") from None
        write_json(run / "run.json", record)
        return record
    before = read_run(run)
    for key, what in (("base_fingerprint", "model"), ("data_hash", "data")):
        if before[key] != record[key]:
            raise UserError(
                f"--resume: the {what} is not the one that the run in {run} began with ({key} "
                f"differs); give it the same {what}, or start another run"
            )
    return before


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Make checkpoints/step-N from the files that `write` puts into a directory of its own.

    The manifest, with each file's size and SHA-256, is written after them, then everything is
    synced, then the directory gets its name. One that has the name already is whole, and stays.
    """
    target = run / "checkpoints" / f"step-{step}"
    if target.exists():
        return target
    aside = run / "checkpoints" / f".step-{step}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(aside)): _size_and_hash(path) for path in files}
        write_json(aside / MANIFEST, manifest)
        for path in [*files, *{path.parent for path in files}, aside]:
            _sync(path)
        os.replace(aside, target)
        _sync(target.parent)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); earlier checkpoints are intact: make "
            "room, then go on with --resume"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone where it was renamed
    return target


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every whole checkpoint, oldest first.

    Raises UserError for one that carries a name and does not match its manifest: it was changed.
    """
    found = []
    for path in (run / "checkpoints").glob("step-*"):
        try:
            step = int(path.name.removeprefix("step-"))
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            matches = [_size_and_hash(path / name) == entry for name, entry in manifest.items()]
            whole = bool(matches) and all(matches)
        except (OSError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise UserError(
                f"{path}: does not match its {MANIFEST}; remove this directory and go on from the "
                "checkpoint before it with --resume"
            )
        found.append((step, path))
    return sorted(found)


def prune_checkpoints(run: Path, keep: Sequence[int]) -> None:
    """Remove the checkpoints of other steps than `keep`, and what a killed process left behind."""
    for path in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (run / "checkpoints").glob("step-*"):
        if path.name not in [f"step-{step}" for step in keep]:
            # It loses its name before its files: a kill in between leaves no half checkpoint.
            doomed = path.with_name(f".{path.name}.removed")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Copy a directory's files, small ones, to `target`, which then holds nothing else.

    Readers find all old files or all new ones. A directory cannot replace another in one step: a
    kill between the two renames leaves none, until it is published again, but never a part.
    """
    aside, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for path in source.iterdir():
            if path.is_file():
                write_atomically(aside / path.name, path.read_bytes())
        _sync(aside)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); checkpoints are intact: make room, "
            "then go on with --resume"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _size_and_hash(path: Path) -> list:
    data = path.read_bytes()
    return [len(data), hashlib.sha256(data).hexdigest()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def optimizer_bytes(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> bytes:
    """The optimizer's state as safetensors: `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`.

    names: of the parameters, in the order in which the optimizer was given them.
    """
    states = optimizer.state_dict()["state"]
    return save(
        {
            f"{name}/{key}": tensor.cpu().contiguous()
            for i, name in enumerate(names)
            for key, tensor in states.get(i, {}).items()
        }
    )


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], path: Path) -> None:
    """Give an optimizer the state that `optimizer_bytes` wrote into the file `path`.

    Raises UserError if it is not that of exactly these parameters.
    """
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not an optimizer's state ({error}); start a new run") from None
    keys = ("exp_avg", "exp_avg_sq", "step")
    if odd := sorted(tensors.keys() ^ {f"{name}/{key}" for name in names for key in keys}):
        raise UserError(
            f"{path}: {len(odd)} tensors missing or not of this run (first: {odd[0]}); start a new "
            "run"
        )
    state = {i: {key: tensors[f"{name}/{key}"] for key in keys} for i, name in enumerate(names)}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def trim_log(path: Path, step: int) -> None:
    """Make log.jsonl ready to go on after `step`: later lines are dropped; step 0 empties it."""
    kept = []
    if step and path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")
        # The last line may be cut: the process died while it was written.
        whole = [line for line in lines if line.startswith('{"step": ') and line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
    write_atomically(path, "".join(line + "\n" for line in kept).encode())


def append_log(path: Path, **fields: object) -> None:
    """One line more, out of this process before the call returns: it survives a kill."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); checkpoints are intact: make room, "
            "then go on with --resume"
        ) from None


class StopRequest:
    """Ctrl-C and SIGTERM as a wish: the loop looks at `signal` between two steps.

    A second signal is no longer caught and ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.restore()

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
