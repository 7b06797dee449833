"""Changes to files for tests/fuzz.py: of structure (JSON, safetensors, tables), of bytes, of place.

Each function draws from a `random.Random` and gives the changed content and what was done.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

ESCAPE = "\x1b[31m"
ODD_TEXT = [ESCAPE, "\u202e\u2066", "\0", "", " ", "x" * 50_000, "a\nb\rc", "{text}", "/"]
HALF = "\ud800"  # of a surrogate pair: JSON can name it, UTF-8 cannot
# What takes the place of a JSON value, as source: no Python value would be written as the last.
ODD_JSON = ["null", "true", "false", "-1", "0", "1", "2.5", "1e400", "NaN", "-Infinity", "1e-30"]
ODD_JSON += [str(10**30), str(2**31), str(2**63), "9" * 5000, "[]", "{}", "[[]]", "[1]", '{"a": 1}']
ODD_JSON += [json.dumps(text) for text in (*ODD_TEXT, HALF, "tiny", "none", "float16", ".")]
ODD_JSON += ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000, "x", ""]
ODD_FIELDS = [*ODD_TEXT, '"', '""', "\t", ",", "\u2028", "\x85", "<|im_end|>", "2", "1.0", "差"]
ODD_JINJA = ["{{", "{% if %}", "{{ ''.__class__.__mro__ }}", "{{ undefined.x }}", ESCAPE, HALF]
ODD_JINJA += ["{{ raise_exception('\x1b[31m' * 200) }}", "{{ 1 / 0 }}", "{% include 'x' %}"]
ODD_JINJA += ["{{ 'a' * 10000000000 }}", "{{ messages[9]['content'] }}", "{{ messages | tojson }}"]
ODD_JINJA += ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ strftime_now('%Y') }}"]
ODD_JINJA += ["{{ range(10 ** 10) | list }}", "<|im_start|>system\n\x1b[31m<|im_end|>", "<think>"]
ODD_JINJA += ["{{ '%d' % 'x' }}", "{{ " + "(" * 9999, "{{ messages.append(1) }}"]
PLACES = ["nothing", "directory", "nowhere", "fifo", "/dev/zero", "/dev/stdin", "/proc/self/mem"]
PLACES += ["loop", "huge"]


def change_json(source: str, rng: Random) -> tuple[str, str]:
    """One to three changes at random places."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            root = [json.loads(source)]
        except (ValueError, RecursionError):
            break
        holder, key, trail = root, 0, ""  # the value to change is holder[key]
        while isinstance(child := holder[key], dict | list) and child and rng.random() < 0.85:
            holder = child
            key = rng.choice(list(child)) if isinstance(child, dict) else rng.randrange(len(child))
            trail += f"/{key}"
        old, names = json.dumps(holder[key]), isinstance(holder, dict)
        new = near(holder[key], rng) if rng.random() < 0.25 else rng.choice(ODD_JSON)
        what = rng.choice(["replace"] * 5 + ["delete", "twice", "swap", *["rename", "add"] * names])
        mark = "@mark@"  # stands for `new`, which may be no JSON
        if what == "delete" and holder is not root:
            del holder[key]
        elif what == "swap":
            other = rng.choice(list(holder) if names else range(len(holder)))
            holder[key], holder[other] = holder[other], holder[key]
        elif what == "rename":
            holder[rng.choice([*ODD_TEXT, HALF, f"{key}{ESCAPE}", f"{key}s"])] = holder.pop(key)
        elif what == "add":
            holder[rng.choice([*ODD_TEXT, HALF, "finished", "sliding_window", "bias"])] = mark
        else:
            holder[key] = mark
        if what == "twice":
            new = f"{old}, {json.dumps(key) + ':' if names else ''} {new}"
        source = json.dumps(root[0]).replace(f'"{mark}"', new)
        done.append(f"{what} {trail[:80]} {new[:60]}")
    return source, "; ".join(done)


def near(value: object, rng: Random) -> str:
    """JSON of a value of the same type that is nearly `value`."""
    if isinstance(value, bool) or value is None:
        return json.dumps(not value)
    if isinstance(value, int | float):
        return json.dumps(rng.choice([value + 1, value - 1, -value, value * 1000, float(value)]))
    if isinstance(value, str):
        return json.dumps(
            rng.choice([value + ESCAPE, value[:-1], value * 2, value.upper(), "../x"])
        )
    return json.dumps(list(value) * 2 if isinstance(value, list) else {})


def change_safetensors(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Another header, or another body behind it."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], bytearray(data[8 + size :])
    what = rng.choice(["header"] * 5 + ["size", "shorter", "longer", "values", "values"])
    at = rng.randrange(len(body)) & ~1
    if what == "header":
        text, what = change_json(header.decode(), rng)
        header = text.encode()
        size = len(header)
    elif what == "size":
        size = rng.choice([0, 1, 2**63, 2**64 - 1, size + 1, size - 1, 10**9, len(data)])
    elif what == "shorter":
        del body[at:]
    elif what == "longer":
        body += rng.randbytes(rng.choice((1, 1000)))
    else:  # NaN, infinity, the largest, 0 or any number, in one place or from there on
        new = rng.choice([b"\xff\xff", b"\x80\x7f", b"\x7f\x7f", b"\0\0", rng.randbytes(2)])
        count = rng.choice((1, 2, (len(body) - at) // 2))
        body[at : at + 2 * count] = (new * count)[: len(body) - at]
    return struct.pack("<Q", size) + header + body, f"{what} (body at {at})"


def change_lines(text: str, ending: str, rng: Random) -> tuple[str, str]:
    """One line or field of a table, or of a file of JSON lines."""
    lines = text.split("\n")
    at = rng.randrange(max(1, len(lines) - 1))
    if ending == ".jsonl" and rng.random() < 0.8:
        lines[at], what = change_json(lines[at], rng)
        return "\n".join(lines), f"line {at + 1}: {what}"
    cut = "\t" if ending == ".tsv" else ","
    fields, new = lines[at].split(cut), rng.choice(ODD_FIELDS)
    what = rng.choice(("field", "field", "one more", "reversed", "line", "twice", "dropped"))
    if what == "field":
        fields[rng.randrange(len(fields))] = new
    elif what == "one more":
        fields.append(new)
    elif what == "reversed":
        fields.reverse()
    whole = {"line": [new], "twice": [lines[at]] * 2, "dropped": []}
    lines[at : at + 1] = whole.get(what, [cut.join(fields)])
    return "\n".join(lines), f"line {at + 1}: {what} {new[:20]!r}"


def change_template(text: str, rng: Random) -> tuple[str, str]:
    """Something odd within a Jinja template."""
    at, new = rng.randrange(len(text) + 1), rng.choice(ODD_JINJA)
    return text[:at] + new + text[at:], f"{new[:40]!r} at {at}"


def change_structure(data: bytes, ending: str, rng: Random) -> tuple[bytes, str]:
    """A change that knows the format of files with this ending."""
    if ending == ".safetensors":
        return change_safetensors(data, rng)
    text = data.decode()
    if ending == ".json":
        text, what = change_json(text, rng)
    elif ending == ".jinja":
        text, what = change_template(text, rng)
    else:
        text, what = change_lines(text, ending, rng)
    return text.encode("utf-8", "surrogatepass"), what


def change_bytes(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Damage without regard to the format."""
    at = rng.randrange(len(data))
    changes: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "truncated": lambda: data[:at],
        "flipped": lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        "inserted": lambda: data[:at] + rng.randbytes(rng.choice((1, 4, 300))) + data[at:],
        "NUL": lambda: data[:at] + b"\0" + data[at:],
        "escape": lambda: data[:at] + ESCAPE.encode() + data[at:],
        "mark": lambda: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda: data.decode("utf-8", "replace").encode("utf-16"),
        "twice": lambda: data * 2,
    }
    what = rng.choice(list(changes))
    return changes[what](), f"{what} at {at}"


def change_place(path: Path, rng: Random) -> str:
    """Put something else in the place of a file."""
    what = rng.choice(PLACES)
    path.unlink()
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "huge":
        path.touch()
        os.truncate(path, 2**40)
    elif what != "nothing":
        path.symlink_to(path.name if what == "loop" else what)
    return what
