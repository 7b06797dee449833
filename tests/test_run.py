"""The run directory: whatever fails, and whenever it dies, what has its proper name is whole."""

import argparse
import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import save_file

from qwen_min.errors import UserError
from qwen_min.files.disk import (
    new_directory,
    read_json,
    read_regular,
    read_safetensors,
    write_atomically,
)
from qwen_min.files.run import (
    MANIFEST,
    WRITTEN,
    StopRequest,
    append_log,
    checkpoints,
    lock_run,
    optimizer_bytes,
    prune_checkpoints,
    publish,
    read_run,
    restore_optimizer,
    run_arguments,
    save_checkpoint,
    start_record,
    trim_log,
    write_json,
)

# Every way in which the module under test changes the disk.
OPERATIONS = [(io, "open")] + [
    (os, name) for name in ("open", "mkdir", "fsync", "replace", "rename", "unlink", "rmdir")
]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Syncing guards against power cuts, which no test here makes; it costs most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """Stands for kill -9: no `except OSError` sees it."""


def fail(patch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """The `at`-th file operation from now on raises `error` instead of being done.

    After a kill every later one does so too: a dead process does not clean up. Opening a file to
    write it leaves it empty, and an fsync that fails loses half of what was written.
    """
    count = itertools.count(1)

    def failing(name: str, real: Callable) -> Callable:
        def operation(*args, **kwargs):
            number = next(count)
            if number == at and args[1:2] == ("wb",):
                real(*args, **kwargs).close()
            if number == at and name == "fsync":
                with contextlib.suppress(OSError):  # a descriptor that only reads
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            if number == at or (number > at and isinstance(error, Killed)):
                raise error
            return real(*args, **kwargs)

        return operation

    for module, name in OPERATIONS:
        patch.setattr(module, name, failing(name, getattr(module, name)))


def content(step: int) -> dict[str, bytes]:
    return {"state.json": f"[{step:03}]".encode(), "adapter/tensors": bytes([step % 251]) * 5000}


def writer(step: int) -> Callable[[Path], None]:
    """Writes as a training run does: some files atomically, some into a directory of their own."""

    def write(directory: Path) -> None:
        (directory / "adapter").mkdir()
        (directory / "adapter" / "tensors").write_bytes(content(step)["adapter/tensors"])
        write_atomically(directory / "state.json", content(step)["state.json"])

    return write


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def steps(run: Path) -> list[int]:
    """The steps of the run's checkpoints, each of which must hold what belongs to its step."""
    found = checkpoints(run)
    for step, path in found:
        assert files(path) == content(step)
    return [step for step, _ in found]


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


# One file


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_aside(function, tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_atomically(path, b"old")

    def full(*_args):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(UserError, match=r"No space left.*--resume") as error:
            write_atomically(path, b"new")
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["run.json"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_write_that_stops_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the system cuts the write short
    try:
        with pytest.raises(UserError, match="File too large"):
            write_atomically(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["run.json"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in (("absent/run.json", "No such file"), ("file/run.json", "Not a directory")):
        with pytest.raises(UserError, match=reason) as error:
            write_atomically(tmp_path / path, b"new")
        assert "\n" not in str(error.value)


def test_a_read_only_file_system_is_one_line(tmp_path, monkeypatch):
    """There even removing a file that was never made is refused."""

    def refuse(*_args, **_kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for function in ("unlink", "replace"):
        monkeypatch.setattr(os, function, refuse)
    with pytest.raises(UserError, match="Read-only file system"):
        write_atomically(tmp_path / "run.json", b"new")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_aside(tmp_path, monkeypatch):
    write_atomically(tmp_path / "run.json", b"old")

    def interrupt(*_args):
        raise KeyboardInterrupt  # a second Ctrl-C

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "run.json", b"new")
    assert files(tmp_path) == {"run.json": b"old"}


def test_a_kill_at_any_moment_of_a_write_leaves_old_or_new(tmp_path, monkeypatch):
    path, seen = tmp_path / "run.json", set()
    for at in itertools.count(1):
        path.write_bytes(b"old")
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            fail(patch, at, Killed())
            write_atomically(path, b"new!")
            break
        seen.add(path.read_bytes())
    assert at > 3  # open, fsync and replace were each killed once
    assert path.read_bytes() == b"new!"
    assert seen <= {b"old", b"new!"}


# Checkpoints


def test_a_checkpoint_is_what_was_written_with_a_manifest(tmp_path):
    path = save_checkpoint(tmp_path, 12, writer(12))
    assert path == tmp_path / "checkpoints" / "step-12"
    assert json.loads((path / MANIFEST).read_text())["state.json"][0] == 5  # bytes
    save_checkpoint(tmp_path, 9, writer(9))
    assert steps(tmp_path) == [9, 12]  # by number, not by name
    assert names(tmp_path / "checkpoints") == ["step-12", "step-9"]
    (tmp_path / "new").mkdir()
    assert checkpoints(tmp_path / "new") == []


def test_a_checkpoint_that_is_there_stays(tmp_path):
    save_checkpoint(tmp_path, 3, writer(3))
    save_checkpoint(tmp_path, 3, writer(4))  # would be seen: the content belongs to step 4
    assert steps(tmp_path) == [3]


def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints(tmp_path, monkeypatch):
    ends = []
    for at in itertools.count(1):
        run, killed = tmp_path / str(at), True
        save_checkpoint(run, 1, writer(1))
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            fail(patch, at, Killed())
            save_checkpoint(run, 2, writer(2))
            killed = False
        ends.append(steps(run))
        # The next process saves the same step, and clears up.
        save_checkpoint(run, 2, writer(2))
        assert steps(run) == [1, 2]
        prune_checkpoints(run, [2])
        assert names(run / "checkpoints") == ["step-2"]
        if not killed:
            break
    assert len(ends) > 15
    # First every kill loses the new one, then none does.
    first = ends.index([1, 2])
    assert ends == [[1]] * first + [[1, 2]] * (len(ends) - first)


def test_a_full_disk_at_any_moment_of_a_save_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    failures = 0
    for at in range(1, 40):
        run = tmp_path / str(at)
        save_checkpoint(run, 1, writer(1))
        with monkeypatch.context() as patch:
            fail(patch, at, FULL)
            try:
                save_checkpoint(run, 2, writer(2))
            except UserError as error:
                failures += 1
                assert "No space left" in str(error) and "\n" not in str(error)
        assert steps(run) in ([1], [1, 2])
        assert {"step-1"} <= set(names(run / "checkpoints")) <= {"step-1", "step-2"}
    assert failures > 10


def test_a_kill_at_any_moment_of_pruning_leaves_whole_checkpoints(tmp_path, monkeypatch):
    for at in itertools.count(1):
        run, killed = tmp_path / str(at), True
        for step in (1, 2, 3):
            save_checkpoint(run, step, writer(step))
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            fail(patch, at, Killed())
            prune_checkpoints(run, [3])
            killed = False
        assert steps(run)[-1] == 3
        prune_checkpoints(run, [3])
        assert names(run / "checkpoints") == ["step-3"]
        if not killed:
            break
    assert at > 6


def test_pruning_touches_only_what_a_run_leaves_there(tmp_path):
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, writer(step))
    folder = tmp_path / "checkpoints"
    (folder / ".step-4.partial" / "adapter").mkdir(parents=True)
    (folder / ".DS_Store").write_bytes(b"a file manager's")
    for _ in range(2):
        prune_checkpoints(tmp_path, [2, 30])
        assert names(folder) == [".DS_Store", "step-2", "step-30"]
    prune_checkpoints(tmp_path, [30, None])  # no best step yet
    assert steps(tmp_path) == [30]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def alter(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])


@pytest.mark.parametrize("change", [cut, alter, Path.unlink])
@pytest.mark.parametrize("name", ["state.json", "adapter/tensors", MANIFEST])
def test_a_changed_checkpoint_is_refused(name, change, tmp_path):
    save_checkpoint(tmp_path, 1, writer(1))
    save_checkpoint(tmp_path, 2, writer(2))
    change(tmp_path / "checkpoints" / "step-2" / name)
    with pytest.raises(
        UserError, match=r"step-2(/manifest.json)?: not a whole checkpoint .*remove .*--resume"
    ) as error:
        checkpoints(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("manifest", ["[]", "{}", "null", '{"state.json": 3}', '{"../x": [0, ""]}'])
def test_another_manifest_is_refused(manifest, tmp_path):
    (save_checkpoint(tmp_path, 2, writer(2)) / MANIFEST).write_text(manifest)
    with pytest.raises(UserError, match=r"step-2(/manifest.json)?: not a whole checkpoint"):
        checkpoints(tmp_path)


def replaced_by_a_file(folder: Path, patch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.touch()


def replaced_by_a_link_to_nowhere(folder: Path, patch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("unmounted")


def unreadable(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """As without permission, or on a disk that fails; root, who may run this, has permission."""
    for name in ("listdir", "scandir"):
        real = getattr(os, name)

        def refuse(path, real=real):
            if Path(path) == folder:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return real(path)

        patch.setattr(os, name, refuse)


@pytest.mark.parametrize("damage", [replaced_by_a_file, replaced_by_a_link_to_nowhere, unreadable])
def test_checkpoints_that_cannot_be_read_are_not_none(damage, tmp_path, monkeypatch):
    """Taken for none, a resume would start at step 0, and empty the log."""
    save_checkpoint(tmp_path, 2, writer(2))
    damage(tmp_path / "checkpoints", monkeypatch)
    for act in (checkpoints, lambda run: prune_checkpoints(run, [])):
        with pytest.raises(UserError, match=r"checkpoints: cannot be read \(.*--resume") as error:
            act(tmp_path)
        assert "\n" not in str(error.value)


def test_only_regular_files_are_in_a_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path, 2, writer(2)) / "state.json"
    path.unlink()
    os.mkfifo(path)  # reading it would wait for a writer
    with pytest.raises(UserError, match=r"step-2: not a whole checkpoint .*state.json is missing"):
        checkpoints(tmp_path)


def test_a_copy_under_another_name_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 2, writer(2))
    path.rename(path.with_name("step-2 copy"))
    with pytest.raises(UserError, match="step-2 copy"):
        checkpoints(tmp_path)


# kill -9

# The script is started once, since importing torch takes seconds, and forks a process for each line
# that it is given: one that saves checkpoints until it is killed. With a number n it waits at the
# n-th file operation after its first save, to be killed there.
SAVER = """
import io, itertools, os, sys, time
from pathlib import Path
from qwen_min.files.run import checkpoints, prune_checkpoints, save_checkpoint, write_atomically

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def wait_at(number):
    count = itertools.count(1)
    def waiting(real):
        def operation(*args, **kwargs):
            if next(count) == number:
                say("waiting")
                time.sleep(20)
            return real(*args, **kwargs)
        return operation
    io.open = waiting(io.open)
    for name in ("open", "mkdir", "fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, waiting(getattr(os, name)))

def write_step(step, directory):
    (directory / "adapter").mkdir()
    (directory / "adapter" / "tensors").write_bytes(bytes([step % 251]) * 5000)
    write_atomically(directory / "state.json", f"[{step:03}]".encode())

def save_forever(run, wait):
    say("pid", os.getpid())
    step = max([step for step, _ in checkpoints(run)], default=0)
    while True:
        step += 1
        save_checkpoint(run, step, lambda directory: write_step(step, directory))
        say("saved", step)
        prune_checkpoints(run, [step, step - 1])
        if wait:
            wait_at(wait)
            wait = 0

os.fsync = lambda descriptor: None  # a kill, unlike a power cut, loses nothing that was written
run = Path(sys.argv[1])
for line in sys.stdin:
    if os.fork() == 0:
        try:
            save_forever(run, int(line))
        finally:
            os._exit(1)
    say("dead", os.WTERMSIG(os.wait()[1]))
"""


def test_twenty_real_kills_lose_no_checkpoint(tmp_path):
    """Half of them inside a save (or the pruning after it), half at random moments."""
    rng = random.Random(0)
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        text=True,
        bufsize=1,
    )
    newest, inside = 0, 0
    with process:
        for trial in range(20):
            forced = trial % 2 == 1
            # A save makes about 30 file operations, pruning one checkpoint about 10.
            process.stdin.write(f"{rng.randint(1, 30) if forced else 0}\n")
            pid, alive = 0, True
            while alive:
                word, number = [*process.stdout.readline().split(), 0][:2]
                if word == "pid":
                    pid = int(number)
                elif word == "saved":
                    newest = int(number)
                    if not forced and pid:
                        time.sleep(rng.uniform(0, 0.03))
                        os.kill(pid, signal.SIGKILL)
                        pid = 0
                elif word == "waiting":
                    os.kill(pid, signal.SIGKILL)
                    inside += 1
                else:
                    assert (word, int(number)) == ("dead", signal.SIGKILL)
                    alive = False
            found = steps(tmp_path)  # all that have a name are whole
            assert newest in found  # and what was announced is among them
        process.stdin.close()
    assert process.returncode == 0
    assert inside == 10
    assert newest >= 20


# The optimizer's state


def stepped(names: list[str], count: int = 2) -> tuple[torch.optim.AdamW, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(3, i + 2, generator=generator).requires_grad_() for i in range(count)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum((p**2).sum() for p in parameters).backward()
        optimizer.step()
    return optimizer, parameters


def test_optimizer_state_round_trip(tmp_path):
    names = ["model.layers.0.q_proj.lora_A", "score"]
    optimizer, parameters = stepped(names)
    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(optimizer_bytes(optimizer, names))
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    restored = torch.optim.AdamW(copies, lr=0.1)
    restore_optimizer(restored, names, path)
    assert optimizer_bytes(restored, names) == path.read_bytes()
    for each, group in ((optimizer, parameters), (restored, copies)):
        each.zero_grad()
        sum((p**3).sum() for p in group).backward()
        each.step()
    assert all(map(torch.equal, parameters, copies))


def test_another_optimizer_state_is_refused(tmp_path):
    names, path = ["a", "b"], tmp_path / "optimizer.safetensors"
    optimizer, _ = stepped(names)
    whole = optimizer_bytes(optimizer, names)
    other = optimizer_bytes(optimizer, ["a", "c"])
    part = optimizer_bytes(stepped(["a"], 1)[0], ["a"])
    for data, reason in (
        (other, "6 tensors missing or unknown"),
        (part, r"3 tensors missing .*b/exp_avg\)"),
        (whole[:-1], "not an optimizer's state"),
        (b"", "not an optimizer's state"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=reason) as error:
            restore_optimizer(optimizer, names, path)
        assert "\n" not in str(error.value)
        assert optimizer_bytes(optimizer, names) == whole
    with pytest.raises(UserError, match="No such file"):
        restore_optimizer(optimizer, names, tmp_path / "absent")
    save_file({f"{n}/{k}": torch.zeros(7) for n in names for k in ("exp_avg", "step")}, path)
    with pytest.raises(UserError, match="exp_avg_sq"):
        restore_optimizer(optimizer, names, path)


# log.jsonl


def logged(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_log_drops_what_comes_after_the_resumed_step(tmp_path):
    path = tmp_path / "log.jsonl"
    trim_log(path, 0)
    for step in range(1, 6):
        append_log(path, step=step, loss=0.5)
    assert logged(path) == [1, 2, 3, 4, 5]
    trim_log(path, 3)
    append_log(path, step=4, loss=0.25)
    assert logged(path) == [1, 2, 3, 4]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 4, "loss": 0.25}
    trim_log(path, 0)  # a run that starts anew
    assert path.read_bytes() == b""


def test_log_drops_a_cut_last_line(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2)]
    for length in range(len(lines[1]) + 1):
        path.write_text(lines[0] + lines[1][:length])
        trim_log(path, 2)
        append_log(path, step=3, loss=0.25)
        # With its last brace, a line is whole even without its end.
        whole = length >= len(lines[1]) - 1
        assert logged(path) == ([1, 2, 3] if whole else [1, 3])


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "l\xffss": 0.5}',
        b'{"step": 2, "loss": 0.5',
        b'{"step": 2, "loss": 0.5}{"step": 2, "loss": 0.5}',
        b'{"step": "2", "loss": 0.5}',
        b'{"step": null}',
        b'{"loss": 0.5}',
        b"[2]",
        b"\x00" * 100,
        b"[" * 100_000,
        b'{"step": ' + b"9" * 10_000 + b"}",
    ],
)
def test_a_damaged_line_of_the_log_costs_only_itself(line, tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    whole = [json.dumps({"step": step, "loss": 0.5}).encode() for step in (1, 3, 4, 5)]
    path.write_bytes(b"\n".join([whole[0], line, *whole[1:]]) + b"\n")
    trim_log(path, 4)
    assert path.read_bytes() == b"\n".join(whole[:3]) + b"\n"
    assert capsys.readouterr().err == f"warning: {path}: damaged lines dropped: 1\n"
    trim_log(path, 4)
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_read_is_not_empty(tmp_path):
    path = tmp_path / "log.jsonl"
    path.mkdir()
    with pytest.raises(UserError, match=r"log.jsonl: not a log \("):
        trim_log(path, 2)
    path.rmdir()
    trim_log(path, 2)  # absent
    assert path.read_bytes() == b""


def test_a_full_disk_under_the_log_is_one_line(tmp_path):
    path = tmp_path / "log.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (90, limits[1]))  # three lines and a part
    try:
        with pytest.raises(UserError, match=r"log.jsonl: .*File too large.*--resume") as error:
            for step in range(1, 20):
                append_log(path, step=step, loss=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert path.stat().st_size == 90
    trim_log(path, 9)
    assert logged(path) == [1, 2, 3]


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_is_not_caught(number):
    seen = []
    before = {n: signal.signal(n, lambda n, _: seen.append(n)) for n in {signal.SIGINT, number}}
    try:
        stop = StopRequest()
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert (stop.signal, seen) == (number, [])
        os.kill(os.getpid(), number)
        assert (stop.signal, seen) == (number, [number])
        StopRequest().restore()
        os.kill(os.getpid(), number)
        assert seen == [number] * 2
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


# What a run is started with


FREE = {"output": "runs/x", "resume": False, "device": "auto", "batch_tokens": 2048, "export": None}


def arguments(**changes: object) -> argparse.Namespace:
    defaults = {**FREE, "method": "lora_head", "lr": 2e-4, "seed": 0, "feature_cache": None}
    return argparse.Namespace(**{**defaults, **changes})


def recorded(run: Path, **changes: object) -> None:
    record = {"method": "lora_head", "arguments": vars(arguments(output=str(run), **changes))}
    run.mkdir(parents=True, exist_ok=True)
    start_record(run, {**record, "base_fingerprint": "b", "data_hash": "d"}, resume=False)


def started(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The arguments of a run, as train.py gets them."""
    with lock_run(args):
        return run_arguments(args, given)


def refused(args: argparse.Namespace, given: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        started(args, given)
    assert "\n" not in str(error.value)


def test_arguments_of_a_new_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = arguments(output=str(tmp_path / "new"))
    assert started(args, {}) == args
    assert started(arguments(output=None), {}).output == "runs/lora_head"
    refused(arguments(method=None), {}, "--method is missing")
    refused(arguments(output=""), {}, "No such file or directory.*--output")


@pytest.mark.parametrize("name", [*WRITTEN, "results-0a.json", "predictions-0a.jsonl", "ADAPTER"])
@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_new_run_replaces_nothing_that_is_there(make, name, tmp_path):
    """Without run.json old checkpoints would even be continued, with whatever other arguments."""
    (tmp_path / "notes").write_text("the user's")
    make(tmp_path / name)
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    refused(
        arguments(output=str(tmp_path)), {}, f"holds {name}, which.*--resume.*another directory"
    )
    assert {path: path.lstat() for path in tmp_path.rglob("*")} == before


def test_a_new_run_leaves_other_files_alone(tmp_path):
    for name in ("notes", "adapter.old", "results.txt", ".run.json"):
        (tmp_path / name).write_text("the user's")
    args = arguments(output=str(tmp_path))
    with lock_run(args):
        save_checkpoint(tmp_path, 1, writer(1))
    assert names(tmp_path) == [".run.json", "adapter.old", "checkpoints", "notes", "results.txt"]


def test_a_run_that_writes_nothing_leaves_no_directory(tmp_path):
    new, own, used = (tmp_path / name for name in ("new", "own", "used"))
    own.mkdir()
    for run in (new, own, used):
        with pytest.raises(KeyError), lock_run(arguments(output=str(run))):
            if run == used:
                (run / "run.json").touch()
            raise KeyError
    assert names(tmp_path) == ["own", "used"]  # an empty directory of the user's stays


@pytest.mark.parametrize("again", [False, True], ids=["new", "resume"])
def test_one_directory_has_one_training(again, tmp_path):
    run, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(run)
    with lock_run(arguments(output=str(run))):
        for name in (run, link):
            args = arguments(output=str(name), resume=again)
            refused(args, {}, "another training is running in it; wait.*--output")
        assert run.is_dir()  # a process that was refused removes nothing
    recorded(run)
    assert started(arguments(output=str(link), resume=True), {}).output == str(link)


def test_the_lock_of_a_directory_that_was_removed_is_none(tmp_path, monkeypatch):
    """The first process fails, and removes its directory, while the second waits to lock it."""
    run, flock = tmp_path / "run", fcntl.flock

    def late(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        run.rename(tmp_path / "removed")
        run.mkdir()  # by a third process

    monkeypatch.setattr(fcntl, "flock", late)
    refused(arguments(output=str(run)), {}, "another training is running in it")


def test_a_pipe_is_no_run_directory(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for resume in (False, True):
        args = arguments(output=str(tmp_path / "pipe"), resume=resume)
        refused(args, {}, "pipe: cannot be opened .*--output")


def test_resume_takes_the_arguments_the_run_began_with(tmp_path):
    run = tmp_path / "run"
    recorded(run, lr=1e-3, seed=7, device="cuda")
    typed = {"resume": True, "output": str(run)}
    args = run_arguments(arguments(method=None, **typed), typed)
    assert (args.method, args.lr, args.seed, args.device) == ("lora_head", 1e-3, 7, "cuda")
    assert (args.resume, args.output) == (True, str(run))
    # What changes nothing of what is learned may differ; what is repeated must be the same.
    typed |= {"device": "cpu", "batch_tokens": 64, "export": "m", "feature_cache": "f", "lr": 1e-3}
    args = run_arguments(arguments(**typed), typed)
    assert (args.device, args.batch_tokens, args.export, args.feature_cache) == (
        "cpu",
        64,
        "m",
        "f",
    )
    assert args.lr == 1e-3
    # A directory may have been moved since.
    moved = str(run.rename(tmp_path / "moved"))
    typed = {"resume": True, "output": moved}
    assert run_arguments(arguments(**typed), typed).output == moved


def test_resume_by_the_name_of_the_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded(tmp_path / "runs" / "lora_head")
    typed = {"resume": True, "method": "lora_head"}
    args = started(arguments(output=None, **typed), typed)
    assert args.output == "runs/lora_head"


def test_resume_refusals(tmp_path):
    refused(
        arguments(output=None, method=None, resume=True),
        {},
        "--method is missing; .* with --resume",
    )
    typed = {"resume": True, "output": str(tmp_path / "run")}
    refused(arguments(**typed), typed, r"run: cannot be opened \(No such file.*--output")
    (tmp_path / "run").mkdir()
    refused(arguments(**typed), typed, r"run.json: not a run's record \(No such file.*train.py")
    recorded(tmp_path / "run", method=None)
    refused(arguments(**typed), typed, "run.json: .*arguments.method is None, expected type str")
    recorded(tmp_path / "run")
    for change in ({"lr": 0.5}, {"seed": 1}, {"method": "head_only"}):
        (name,) = change
        message = f"--{name} is {change[name]!r} but the run has"
        refused(arguments(**typed, **change), typed | change, message)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"method": "lora_head"}', '{"arguments": {}}', "\xff"]
)
def test_a_record_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"run.json: not a run's record") as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)


def test_start_record(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record = {"method": "m", "arguments": {}, "base_fingerprint": "b", "data_hash": "d", "词": "好"}
    assert start_record(run, record, resume=False) == record
    assert read_run(run) == record
    assert "好" in (run / "run.json").read_text(encoding="utf-8")
    # What is recorded counts, not what this process would have written.
    assert start_record(run, record | {"method": "other"}, resume=True) == record
    for key, what in (("base_fingerprint", "model"), ("data_hash", "data")):
        with pytest.raises(UserError, match=f"the {what} is not the one") as error:
            start_record(run, record | {key: "other"}, resume=True)
        assert "\n" not in str(error.value)
    assert read_run(run) == record
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        refused(arguments(output=str(tmp_path / place)), {}, f"{place}: .*another directory with")


def test_write_json_is_indented_and_keeps_chinese(tmp_path):
    write_json(tmp_path / "x.json", {"词": ["负面"]})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "词": [\n    "负面"\n  ]\n}\n'


# The result


def test_publish_replaces_the_whole_directory(tmp_path):
    save_checkpoint(tmp_path, 1, writer(1))
    source, target = tmp_path / "checkpoints" / "step-1" / "adapter", tmp_path / "adapter"
    publish(source, target)
    (target / "stale").touch()
    publish(source, target)
    assert files(target) == files(source)
    assert names(tmp_path) == ["adapter", "checkpoints"]


@pytest.mark.parametrize("error", [Killed(), FULL], ids=["kill", "full disk"])
def test_a_failure_at_any_moment_of_publishing_leaves_no_part(error, tmp_path, monkeypatch):
    """A reader finds the old directory, the new one or, between two renames, none."""
    states, failures = [], 0
    for at in range(1, 30):
        root = tmp_path / str(at)
        for name in ("old", "new"):
            (root / name).mkdir(parents=True)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                (root / name / file).write_text(name)
        publish(root / "old", root / "adapter")
        with monkeypatch.context() as patch:
            fail(patch, at, error)
            try:
                publish(root / "new", root / "adapter")
            except Killed:
                failures += 1
            except UserError as line:
                failures += 1
                assert "No space left" in str(line) and "\n" not in str(line)
        states.append(files(root / "adapter"))
        assert states[-1] in ({}, files(root / "old"), files(root / "new"))
        publish(root / "new", root / "adapter")
        assert files(root / "adapter") == files(root / "new")
        assert names(root) == ["adapter", "new", "old"]
    assert 8 < failures < len(states)  # the last ones went through
    assert states.count({}) <= 1


# Reading JSON


def test_read_json_returns_an_object_with_the_fields_asked_for(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"词": ["负面"], "n": 1})
    assert read_json(path, "a record", "write it", 词=list, n=int) == {"词": ["负面"], "n": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a record (Expecting value"),
        (b'{"n": 1', "not a record (Expecting"),
        (b'{"\xff": 1}', "not a record ('utf-8' codec"),
        (b"[1]", "not a record (found [1], expected an object)"),
        (b"{}", "not a record (n is None, expected type int)"),
        (b'{"n": "a\\nb"}', r"not a record (n is 'a\nb', expected type int)"),
        (b"[" * 200_000, "not a record ("),
        (b'{"n": 9223372036854775808}', "not a record (found the integer 9223372036854775808"),
        (b'{"n": ' + b"9" * 100_000 + b"}", "not a record (found the integer 999"),
        (b'{"n": NaN}', "not a record (found the number NaN"),
        (b'{"n": 1, "m": 1e999}', "not a record (found the number 1e999"),
        (rb'{"n": 1, "m": "\ud800"}', "not a record ('utf-8' codec can't encode"),
        (b'{"n": true}', "not a record (n is True, expected type int)"),
        (None, "not a record (No such file or directory)"),
    ],
)
def test_other_json_is_refused_in_one_line(content, reason, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path, "a record", "write it", n=int)
    assert str(error.value).startswith(f"{path}: {reason}")
    assert str(error.value).endswith("write it") and "\n" not in str(error.value)


def test_a_directory_takes_its_name_only_when_its_block_ends_well(tmp_path):
    with pytest.raises(KeyError), new_directory(tmp_path / "a" / "new") as directory:
        (directory / "file").write_bytes(b"half")
        raise KeyError
    assert names(tmp_path / "a") == []
    with new_directory(tmp_path / "new", "try another") as directory:
        (directory / "file").write_bytes(b"whole")
        assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"cannot be written .*; try another"):  # noqa: SIM117
        with new_directory(tmp_path / "new", "try another") as directory:
            (directory / "file").write_bytes(b"not asked to replace")
    assert files(tmp_path) == {"new/file": b"whole"}


def test_everything_in_a_new_directory_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor: int) -> None:
        assert (tmp_path / "new").exists() == (len(synced) >= 4)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    with new_directory(tmp_path / "new") as directory:
        (directory / "adapter").mkdir()
        for name in ("adapter/tensors", "state.json"):
            (directory / name).write_bytes(b"whole")
    new = tmp_path / "new"
    expected = (new / "adapter", new / "adapter/tensors", new / "state.json", new)
    assert sorted(synced[:4]) == sorted(path.stat().st_ino for path in expected)
    assert synced[4:] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize(
    ("value", "schema", "problem"),
    [
        ({"a": [1, 2.5]}, {"a": [float]}, None),
        ({"a": [1, None]}, {"a": [float]}, r"v.a\[1\] is None, expected type float"),
        ({"a": [1, None]}, {"a": [(float, None)]}, None),
        ({"a": "1"}, {"a": (float, None)}, "v.a is '1', expected type float or null"),
        ({"b": 1}, {"a": int}, "v.a is None, expected type int"),
        ([], {"a": int}, r"v is \[\], expected type dict"),
        ({}, [int], "v is {}, expected type list"),
        (True, float, "v is True, expected type float"),
    ],
)
def test_a_schema_is_checked_in_depth(value, schema, problem, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"v": value}))
    if problem is None:
        assert read_json(path, "a record", "write it", v=schema) == {"v": value}
    else:
        with pytest.raises(UserError, match=problem):
            read_json(path, "a record", "write it", v=schema)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "directory"])
def test_only_regular_files_are_read(kind, tmp_path):
    """A pipe would block, a device may never end."""
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(kind)
    for read in (read_regular, read_json, read_safetensors):
        with pytest.raises(UserError, match=r"not a record \(.*(regular file|directory)"):
            read(path, "a record", "write it")


def test_a_file_that_is_too_large_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", "a record", "write it", 5) == b"12345"
    with pytest.raises(UserError, match="it has more than 4 bytes"):
        read_regular(tmp_path / "file", "a record", "write it", 4)


def test_what_killed_processes_left_is_cleared_and_nothing_else(tmp_path):
    """Never through a link, and never what another process is writing or the user has."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [f".x.json.{gone.pid}-0123abcd.partial", f".x.json.{os.getpid()}-0123abcd.partial"]
    kept = [f".x.json.{os.getppid()}-0123abcd.partial", ".y.json.1-0123abcd.partial", ".x.json.old"]
    for name in (*left, *kept):
        (tmp_path / name).write_text(name)
    (tmp_path / left[0]).unlink()
    (tmp_path / left[0]).symlink_to(tmp_path / "kept")
    (tmp_path / "kept").write_text("kept")
    write_atomically(tmp_path / "x.json", b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "kept", "x.json"])
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_only_a_regular_file_is_replaced(make, tmp_path):
    """Behind a link there may be a device, which root could replace by a file."""
    make(tmp_path / "odd")
    (tmp_path / "link").symlink_to("odd")
    for name in ("odd", "link"):
        with pytest.raises(UserError, match=r"cannot be written \(it is not a regular file\)"):
            write_atomically(tmp_path / name, b"new")
    assert names(tmp_path) == ["link", "odd"]
