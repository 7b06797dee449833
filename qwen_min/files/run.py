"""A run directory: the arguments of a training run, its log, its checkpoints and its result.

    run.json             every argument, versions, hashes, history
    log.jsonl            one line for each step
    checkpoints/step-N/  as `save_checkpoint` writes them
    adapter/, head.safetensors, embeddings.safetensors: the result, as far as its method has them

Every file except log.jsonl, and every checkpoint as a whole, is complete or absent whenever the
process dies (see disk.py). One training at a time uses it (`lock_run`).
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import save

from qwen_min.errors import UserError
from qwen_min.files import disk
from qwen_min.files.disk import write_atomically, write_json
from qwen_min.files.hub import FILES

MANIFEST = "manifest.json"
ADAPTER, HEAD, VECTORS = "adapter", "head.safetensors", "embeddings.safetensors"
# Everything that a training writes into its directory, and how an evaluation's files begin.
WRITTEN = ("run.json", "log.jsonl", "checkpoints", "features", ADAPTER, HEAD, VECTORS)
EVALUATED = ("results-", "predictions-")


def read_run(directory: str | Path, **fields: object) -> dict:
    """Read run.json of a run directory. fields: as in `read_json`.

    Raises UserError if it is missing or not a run's record.
    """
    path, advice = Path(directory) / "run.json", "give a directory that train.py made"
    fields = {"method": str, "arguments": dict} | fields
    return disk.read_json(path, "a run's record", advice, **fields)


# What may differ when a run is resumed: paths, because what they name is compared by `check_same`;
# the device, because the first may be gone (dropout draws other numbers on another); and, without
# dropout, --batch-tokens, which then changes only the rounding of sums.
FREE = ("output", "resume", "export", "model", "data", "dev", "encoding", "feature_cache")
FREE += ("text_column", "label_column", "device", "batch_tokens")
# What a run depends on beside its arguments, by key of run.json, and what an error calls it. The
# template is the whole one, with the chat template's markup.
DEPENDS_ON = dict.fromkeys(("base_fingerprint", "frozen_before"), "model")
DEPENDS_ON |= {"tokenizer_hash": "tokenizer", "template": "chat template"}
DEPENDS_ON |= {"adapter_hash": "adapter", "data_hash": "data", "dev_hash": "held-out data (--dev)"}


@contextlib.contextmanager
def lock_run(args: argparse.Namespace) -> Iterator[None]:
    """Lock --output (default: runs/METHOD) for this process during the block.

    The system releases the lock when the process ends, even if it is killed. The directory of a new
    run is made, and removed again if it stays empty. Raises UserError if another training has the
    lock, or if a new run would replace something in the directory.
    """
    import fcntl  # not on Windows, where the report, which imports this module, can be made

    if not args.method and not (args.resume and args.output):
        advice = "name the method to train, or with --resume the directory of the run by --output"
        raise UserError(f"--method is missing; {advice}")
    args.output = f"runs/{args.method}" if args.output is None else args.output
    run, advice = Path(args.output), "name another directory with --output"
    with contextlib.ExitStack() as at_end:
        with disk.one_line_error(run, advice, "cannot be opened"):
            if made := not args.resume and not run.exists():
                run.mkdir(parents=True, exist_ok=True)  # another process may have just made it
            descriptor = os.open(args.output, os.O_RDONLY | os.O_DIRECTORY)
            at_end.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A process that failed may have removed the directory before we had its lock.
                if not os.path.samestat(os.fstat(descriptor), run.stat()):
                    raise BlockingIOError
            except BlockingIOError:
                found = "another training is running in it"
                raise UserError(f"{run}: {found}; wait for its end, or {advice}") from None
            names = [] if args.resume else sorted(os.listdir(run))
        if held := [n for n in names if n.lower() in WRITTEN or n.startswith(EVALUATED)]:
            found = f"--output {run} holds {', '.join(held)}, which a run writes"
            raise UserError(f"{found}: add --resume to continue a run, or {advice}")
        if made:
            at_end.callback(_remove_if_empty, run)
        yield


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def run_arguments(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The arguments of a training run: `args`, or with --resume the ones that the run began with.

    given: those of `args` that the user typed. Raises UserError if --resume finds no run in
    --output, or if a typed argument differs from the resumed run's.
    """
    if not args.resume:
        return args
    before = read_run(args.output, arguments={"method": str})["arguments"]
    dropout = before["method"] != "head_only" and before.get("dropout")
    fixed = {"batch_tokens": dropout, "dev": not before.get("dev")}
    free = [name for name in FREE if not fixed.get(name)]
    for name, value in given.items():
        if name not in free and before.get(name) != value:
            found = f"--{name.replace('_', '-')} is {value!r} but the run has {before.get(name)!r}"
            raise UserError(f"--resume: {found}; leave it out, or start another run")
    # --export applies to one command only. --output is where the run was found: it may have moved.
    before |= {"export": None} | {name: vars(args)[name] for name in free if name in given}
    before["output"] = args.output
    return argparse.Namespace(**(vars(args) | before))


def start_record(run: Path, record: dict, resume: bool) -> dict:
    """Write run.json; with --resume compare `record` with the existing one, and return that.

    Raises UserError if the file cannot be written, or if something that the run depends on has
    changed since.
    """
    if not resume:
        write_json(run / "run.json", record)
        return record
    before = read_run(run)
    check_same(before, record, f"--resume of {run}", "give the same, or start another run")
    return before


def discard_unused(run: Path, features: bool) -> None:
    """Remove what a new run wrote if it trained nothing, so that the directory can be used again.

    features: whether kept features are of no use either; otherwise they are a reason to keep all.
    """
    wrote = {path.name for path in run.glob("*")} & {*WRITTEN}
    if wrote <= {"run.json", "features", ADAPTER} and (features or not any(run.glob("features/*"))):
        for name in wrote - {"run.json"}:
            shutil.rmtree(run / name, ignore_errors=True)
        (run / "run.json").unlink(missing_ok=True)


def check_same(before: Mapping, now: Mapping, place: object, advice: str) -> None:
    """Raise UserError if one of DEPENDS_ON has changed between two records.

    A key that one of them lacks is not compared: older versions recorded less.
    """
    for key, what in DEPENDS_ON.items():
        if before.get(key) and now.get(key) and before[key] != now[key]:
            files = [name for name, changes in FILES.items() if changes == key]
            files += ["the weights"] * (key == "base_fingerprint")
            differs = f"{key} differs" + f": {' or '.join(files)}" * bool(files)
            found = f"the {what} is not the one that was trained with ({differs})"
            raise UserError(f"{place}: {found}; {advice}")


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
    kind, advice = "a whole checkpoint", "remove this checkpoint, then use --resume"
    for path in _entries(run / "checkpoints", "step-"):
        entries = disk.read_json(path / MANIFEST, kind, advice).items()
        with disk.refuse_malformed(path, kind, advice):
            step = int(path.name.removeprefix("step-"))
            if not entries or any(_size_and_hash(path / name) != entry for name, entry in entries):
                raise ValueError(f"it does not match its {MANIFEST}")
        found.append((step, path))
    return sorted(found)


def _entries(directory: Path, prefix: str) -> list[Path]:
    """The paths in `directory` whose names begin with `prefix`; [] if there is no such directory.

    Raises UserError if the directory cannot be read. (Path.glob would find nothing.)
    """
    with disk.one_line_error(directory, "make it readable, then use --resume", "cannot be read"):
        names = os.listdir(directory) if directory.name in os.listdir(directory.parent) else []
        return [directory / name for name in names if name.startswith(prefix)]


def prune_checkpoints(run: Path, keep: Sequence[int | None]) -> None:
    """Remove the checkpoints of steps not in `keep`, and what a killed process left behind."""
    for path in _entries(run / "checkpoints", ".step-"):
        shutil.rmtree(path, ignore_errors=True)
    for path in _entries(run / "checkpoints", "step-"):
        if path.name not in [f"step-{step}" for step in keep]:
            # Rename first: if the process dies while files are removed, no half checkpoint is left.
            doomed = path.with_name(f".{path.name}.removed")
            with disk.one_line_error(path):
                path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Replace the directory `target` by a copy of the (small) files in `source`."""
    with disk.new_directory(target, replace=True) as directory:
        for path in filter(Path.is_file, source.iterdir()):
            (directory / path.name).write_bytes(path.read_bytes())


def _size_and_hash(path: Path) -> list:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing, or not a file")
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
    """Prepare log.jsonl for the steps after `step`: drop later lines; step 0 empties the file.

    Damaged lines are dropped as well: incomplete ones, which a killed process left, and changed
    ones. If there are any, stderr gets a warning.
    """
    kept, damaged, exists = [], 0, path in _entries(path.parent, path.name)
    log = disk.read_regular(path, "a log", "move it away") if step and exists else b""
    for line in filter(None, log.split(b"\n")):
        try:
            if disk.parse_json(line)["step"] <= step:
                kept.append(line + b"\n")
        except (KeyError, TypeError, ValueError, RecursionError):
            damaged += 1
    if damaged:
        print(f"warning: {path}: damaged lines dropped: {damaged}", file=sys.stderr)
    write_atomically(path, b"".join(kept))


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
        self.agreed: int | None = None  # of several processes: a signal to any of them
        self._before = {n: signal.signal(n, self._record) for n in (signal.SIGINT, signal.SIGTERM)}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.restore()

    def restore(self) -> None:
        """Restore the handlers that were set before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
