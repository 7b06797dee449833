"""Files and directories that are complete or absent; JSON and safetensors checked when read.

A new file or directory is written under another name, synced and then renamed, so a process that
dies at any moment leaves the old content or the new one, never a part.
"""

import contextlib
import json
import os
import reprlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_min.errors import UserError

RESUME = "what was saved before is intact: make room, then continue with --resume"
WRITING = (OSError, SafetensorError)  # safetensors reports a full disk as its own error
READING = (*WRITING, KeyError, TypeError, ValueError, RuntimeError)


@contextlib.contextmanager
def one_line_error(
    place: object, advice: str = RESUME, problem: str = "cannot be written", errors: tuple = WRITING
) -> Iterator[None]:
    """Turn a failure into a UserError of one line: `place`, `problem`, the reason, `advice`.

    place: a path, or a path with a line number.
    """
    try:
        yield
    except errors as error:
        # str(JSONDecodeError) adds "line 1" even where the JSON is one line of a longer file.
        reason = getattr(error, "strerror", None) or getattr(error, "msg", None) or error
        reason = " ".join(str(reason).split())
        raise UserError(f"{place}: {problem} ({reason}); {advice}") from None


def refuse_malformed(path: Path, kind: str, advice: str) -> contextlib.AbstractContextManager:
    """Turn a failure to read `path`, or a wrong value in it, into a UserError of one line.

    kind: what the file should be, such as "a run's record". advice: what the user should do.
    """
    return one_line_error(path, advice, f"not {kind}", READING)


def write_atomically(path: Path, data: bytes, advice: str = RESUME) -> None:
    """Write a file so that readers see the old content or the new one. Raises UserError.

    A link stays a link: the file that it points to is replaced.
    """
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with one_line_error(path, advice):
            aside.write_bytes(data)
            _sync(aside)
            os.replace(aside, target)
    finally:
        # After the rename nothing is left to remove. A read-only file system refuses even this.
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def new_directory(target: Path, advice: str = RESUME, replace: bool = False) -> Iterator[Path]:
    """An empty directory to write into; at the end of the block it is synced and named `target`.

    If the block raises, the directory is removed. An existing `target` is an error; with `replace`
    it is replaced. That takes two renames: a process that dies between them leaves no `target`.
    Raises UserError with `advice` if something cannot be written.
    """
    aside, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with one_line_error(target, advice):
            if target.exists() and not replace:
                raise FileExistsError("it exists already")
            aside.mkdir(parents=True)
            yield aside
            for path in (*aside.rglob("*"), aside):
                _sync(path)
            if replace and target.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(target, old)
            os.replace(aside, target)
            _sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON atomically; Chinese characters are not escaped."""
    write_atomically(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())


def read_json(path: Path, kind: str, advice: str, **fields: type) -> dict:
    """Read a JSON object. fields: the fields that must be there, and the type of each.

    Raises UserError as `refuse_malformed` does.
    """
    with refuse_malformed(path, kind, advice):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"found {reprlib.repr(content)}, expected an object")
        for name, type_ in fields.items():
            if not isinstance(content.get(name), type_):
                value = reprlib.repr(content.get(name))
                raise ValueError(f"{name} is {value}, expected type {type_.__name__}")
    return content


def read_safetensors(path: Path, kind: str, advice: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file, mapped from it, and its metadata (strings by name).

    Raises UserError as `refuse_malformed` does.
    """
    with refuse_malformed(path, kind, advice), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}
