"""Files and directories that are complete or absent; JSON and safetensors checked when read.

A new file or directory is written under another name, synced and then renamed, so a process that
dies at any moment leaves the old content or the new one, never a part.
"""

import contextlib
import json
import math
import os
import re
import reprlib
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_min.errors import UserError

RESUME = "what was saved before is intact: make room, then continue with --resume"
WRITING = (OSError, SafetensorError)  # safetensors reports a full disk as its own error
READING = (*WRITING, LookupError, OverflowError, TypeError, ValueError, RuntimeError)
MAX_BYTES, MAX_JSON_BYTES = 2**32, 2**26  # a data file, a JSON file


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


def write_atomically(path: Path, data: bytes | Iterable[bytes], advice: str = RESUME) -> None:
    """Write a file so that readers see the old content or the new one. Raises UserError.

    data: whole, or in pieces that need not be in memory together. A link stays a link: the file
    that it points to is replaced. The new file has the permissions of the old one.
    """
    target = Path(os.path.realpath(path))
    aside = _unused_name(target)
    try:
        with one_line_error(path, advice):
            if target.exists() and not target.is_file():
                raise FileExistsError("it is not a regular file")
            with aside.open("xb") as file:  # x: never an existing file, nor through a link
                if target.exists():  # before anything is in it: the old one may be private
                    aside.chmod(stat.S_IMODE(target.stat().st_mode))
                file.writelines([data] if isinstance(data, bytes) else data)
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
    aside, old = _unused_name(target), _unused_name(target)
    try:
        with one_line_error(target, advice):
            if target.exists() and not replace:
                raise FileExistsError("it exists already")
            aside.mkdir(parents=True)
            yield aside
            for path in (*aside.rglob("*"), aside):
                _sync(path)
            if replace and target.exists():
                os.replace(target, old)
            os.replace(aside, target)
            _sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _unused_name(target: Path) -> Path:
    """A name beside `target` for its new content. Removes what killed processes left there."""
    with contextlib.suppress(OSError):  # a directory that is missing fails when it is written to
        for path in target.parent.iterdir():
            pattern = re.escape(f".{target.name}.") + r"(\d+)-[0-9a-f]{8}\.partial"
            left = re.fullmatch(pattern, path.name)
            if left and not _is_another(int(left[1])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def _is_another(process: int) -> bool:
    """Whether another process of this number runs. (Ours left nothing that it still needs.)"""
    try:
        os.kill(process, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, for somebody else
        pass
    return process != os.getpid()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON atomically; Chinese characters are not escaped."""
    write_atomically(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())


def read_regular(path: Path, kind: str, advice: str, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file; a directory, pipe or device, which may never end, is refused.

    Raises UserError as `refuse_malformed` does, also above `limit` bytes.
    """
    with refuse_malformed(path, kind, advice), open_regular(path) as file:
        # Not read(limit + 1): Python would reserve that much.
        if os.fstat(file.fileno()).st_size > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
        return file.read()


def open_regular(path: Path) -> BinaryIO:
    """A regular file's bytes; a directory, pipe or device raises ValueError or OSError."""
    # Without O_NONBLOCK, opening a pipe waits until another process writes to it.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("it is not a regular file")
    return file


def parse_json(source: bytes | str) -> object:
    """json.loads for JSON that every reader understands: UTF-8, finite numbers, whole characters.

    Raises ValueError; RecursionError for JSON that is nested too deeply.
    """
    text = source.decode("utf-8") if isinstance(source, bytes) else source
    if "\\ud" in text.lower():  # half of a surrogate pair is no character: raises ValueError
        json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8")
    return json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)


def _whole(digits: str) -> int:
    if digits == str(int(1e30)):  # model_max_length of tokenizers that transformers saved: no limit
        return 2**63 - 1
    if len(digits) > 20 or abs(value := int(digits)) >= 2**63:
        raise ValueError(f"found the integer {digits[:20]}…, expected 64 bits at most")
    return value


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"found the number {digits[:20]}, expected a finite one")
    return value


def read_json(path: Path, kind: str, advice: str, **fields: object) -> dict:
    """Read a JSON object.

    fields: the schema of each field that must be there: a type, a range of integers or a single
    value; a tuple of such; [schema] for a list; {name: schema} for an object with at least these
    fields. An integer fits float as well. Raises UserError as `refuse_malformed` does.
    """
    data = read_regular(path, kind, advice, MAX_JSON_BYTES)
    with refuse_malformed(path, kind, advice):
        content = parse_json(data)
        if not isinstance(content, dict):
            raise ValueError(f"found {reprlib.repr(content)}, expected an object")
        for name, schema in fields.items():
            _check(content.get(name), schema, name)
    return content


def _check(value: object, schema: object, name: str) -> None:
    """Raise ValueError unless `value`, called `name` in the error, fits the schema."""
    if isinstance(schema, dict):
        _check(value, dict, name)
        for key, part in schema.items():
            _check(value.get(key), part, f"{name}.{key}")
    elif isinstance(schema, list):
        _check(value, list, name)
        for i, item in enumerate(value):
            _check(item, schema[0], f"{name}[{i}]")
    else:
        options = schema if isinstance(schema, tuple) else (schema,)
        if not any(_fits(value, option) for option in options):
            expected = " or ".join(map(_described, options))
            raise ValueError(f"{name} is {reprlib.repr(value)}, expected {expected}")


def _fits(value: object, option: object) -> bool:
    if isinstance(option, range):
        return type(value) is int and value in option
    # Not isinstance: Python counts True as an int.
    return option in (value, type(value)) or (option, type(value)) == (float, int)


def _described(option: object) -> str:
    if isinstance(option, range):
        return f"an integer of at least {option.start}"
    if isinstance(option, type):
        return f"type {option.__name__}"
    return json.dumps(option, ensure_ascii=False)


def read_safetensors(path: Path, kind: str, advice: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file, mapped from it, and its metadata (strings by name).

    Raises UserError as `refuse_malformed` does.
    """
    with refuse_malformed(path, kind, advice):
        open_regular(path).close()  # a pipe is refused
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
