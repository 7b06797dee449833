"""Damage every kind of file that the program reads, and see that it answers in a line, not a crash.

    python tests/fuzz.py --cases 500            # cases 0 to 499, then a table of counts
    python tests/fuzz.py --cases 10000          # about an hour
    python tests/fuzz.py --case 123             # one case: what was done, and the whole output
    python tests/fuzz.py --cases 500 --kind run.json

A case is a number: it seeds the choice of a file, of a change to it, and of a command that reads
it. The command runs in a forked process on a copy of the files, with limits on memory and time. It
must exit with 0, 1 or 2 (a kept or refused input), print only printable characters, and on 2
exactly one line of at most 500 characters. Exit status 1: at least one case did not.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import category

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch
from safetensors.torch import load_file, save_file

import evaluate
import train
from qwen_min.command.cli import run_command
from qwen_min.command.interface import load_run
from qwen_min.lab import calibration, chat, explain, generation, label_sets, token_vectors  # noqa: F401
from qwen_min.report import audit, tables

# A process that has computed with several threads cannot be forked safely.
torch.set_num_threads(1)
SECONDS = 20  # of one case; the slowest valid one takes about one
MEMORY = 2**30  # beyond what the process has when it starts
LONGEST = 500  # characters of an error line
ESCAPE = "\x1b[31m"
ODD_TEXT = [ESCAPE, "\u202e\u2066", "\ud800", "", " ", "x" * 50_000, "\0", "a\nb\rc", "{text}", "/"]
# What stands in a JSON file in place of a value: as source, because no value gives the last ones.
ODD_JSON = ["null", "true", "false", "-1", "0", "1", "2.5", "1e400", "NaN", "-Infinity", "1e-30"]
ODD_JSON += [str(10**30), str(2**31), str(2**63), "9" * 5000, "[]", "{}", "[[]]", "[1]", '{"a": 1}']
ODD_JSON += [json.dumps(text) for text in ODD_TEXT] + ['"tiny"', '"none"', '"float16"', '"."']
ODD_JSON += ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000, "x", ""]
LABELS = ["--labels", "差,好"]
SMALL = [*LABELS, "--model", "model", "--data", "train.tsv", "--epochs", "1"]
LORA = ["--r", "2", "--lora-targets", "q_proj", "--eval-every", "3", "--save-every", "2"]


# ------------------------------------------------------------------------------------- commands
def load(argv: Sequence[str]) -> int:
    """The Python interface, with a mistake reported as a command reports it."""

    def predict(args: argparse.Namespace) -> int:
        print(load_run(argv[0], "cpu").predict(["房间小，但是很干净。"]))
        return 0

    return run_command(predict, argparse.Namespace(plain=True))


MAINS = {"evaluate": evaluate.main, "train": train.main, "report": tables.main}
MAINS |= {"audit": audit.main, "load_run": load}
DATA = [*LABELS, "--data", "test.tsv", "--output", "out.json", "--predictions", "out.jsonl"]
ZERO = ["evaluate", "--method", "zero_shot", "--model", "model", *DATA]
ONE_TEXT = [*LABELS, "--model", "model", "--explain", "房间小，但是很干净。"]
EXPLAIN = ["evaluate", "--method", "zero_shot", *ONE_TEXT]
GENERATE = ["evaluate", "--method", "zero_shot_generate", "--model", "model", *DATA]
LAB = [*ZERO, "--calibrate", "--label-sets", "坏,好;差,棒"]
AUDIT = ["audit", "train.tsv", "test.tsv", "--list", "--model", "model", *LABELS]
NEW = [["train", "--method", m, *SMALL, *LORA, "--output", "new"] for m in train.METHODS]
REPORT = [["report", "runs/probe", "runs/head", "runs/words", "zero.json", "--format", "json"]]
REPORT += [["report", "runs/words", "zero.json", "--output", "table.md"]]


def evaluated(run: str, *more: str) -> list[list[str]]:
    """The commands that read a finished run."""
    own = ["evaluate", "--run", f"runs/{run}", *more]
    text = [*own, "--explain", "房间小，但是很干净。"]
    return [[*own, "--data", "test.tsv"], text, ["load_run", f"runs/{run}"]]


def resumed(run: str) -> list[list[str]]:
    """The commands that continue an unfinished run."""
    return [["train", "--resume", "--output", f"stopped/{run}"]]


MERGE = ["train", "--resume", "--output", "runs/words", "--merge", "merged"]
TRANSPLANT = ["evaluate", "--method", "transplanted_head", "--run", "runs/head", *DATA]
ADAPTED = ["evaluate", "--method", "lora_head", "--adapter", "runs/head/adapter"]
ADAPTED += ["--model", "model", *DATA]
PROBED = ["train", "--method", "head_only", "--adapter", "runs/head/adapter", *SMALL]
SHARDED = [["evaluate", "--method", "zero_shot", "--model", "sharded", *DATA]]


class Kind(NamedTuple):
    """A kind of file: where the tree has it, and the commands that read it."""

    path: str  # a pattern
    commands: list[list[str]]


CHAT = [[*command, "--chat"] for command in (ZERO, EXPLAIN)]
MODEL = [ZERO, GENERATE, EXPLAIN, LAB, *NEW]
HEAD = [*evaluated("head"), TRANSPLANT, ADAPTED, PROBED]
WORDS = [*evaluated("words"), MERGE]
KINDS = {
    "config.json": Kind("model/config.json", MODEL),
    "tokenizer.json": Kind("model/tokenizer.json", [*MODEL, AUDIT]),
    "tokenizer_config.json": Kind("model/tokenizer_config.json", [*CHAT, ZERO, MERGE]),
    "chat_template.jinja": Kind("model/chat_template.jinja", CHAT),
    "generation_config.json": Kind("model/generation_config.json", [GENERATE, MERGE]),
    "model.safetensors": Kind("model/model.safetensors", MODEL),
    "fed.safetensors": Kind("model/fed.safetensors", [ZERO, NEW[0], MERGE]),
    "index.json": Kind("sharded/model.safetensors.index.json", SHARDED),
    "shard": Kind("sharded/model-1.safetensors", SHARDED),
    "adapter_config.json": Kind("runs/head/adapter/adapter_config.json", HEAD),
    "adapter_model.safetensors": Kind("runs/head/adapter/adapter_model.safetensors", HEAD),
    "data .tsv": Kind("test.tsv", [ZERO, GENERATE, LAB, AUDIT]),
    "data .csv": Kind("test.csv", [[*ZERO, "--data", "test.csv"], ["audit", "test.csv", *LABELS]]),
    "data .jsonl": Kind("test.jsonl", [[*ZERO, "--data", "test.jsonl"]]),
    "training data": Kind("train.tsv", [[*ZERO, "--train-data", "train.tsv"], AUDIT, *NEW]),
    "run.json": Kind("runs/*/run.json", [*evaluated("probe"), *HEAD, *WORDS, *REPORT]),
    "head.safetensors": Kind("runs/probe/head.safetensors", evaluated("probe")),
    "embeddings.safetensors": Kind("runs/words/embeddings.safetensors", WORDS),
    "results .json": Kind("runs/*/results-*.json", REPORT),
    "predictions .jsonl": Kind("runs/*/predictions-*.jsonl", REPORT),
    "unfinished run.json": Kind(
        "stopped/head/run.json", [*resumed("head"), *evaluated("../stopped/head")]
    ),
    "cached features": Kind("stopped/probe/features/*.safetensors", resumed("probe")),
    "log.jsonl": Kind("stopped/words/log.jsonl", resumed("words")),
}
for name in ("manifest.json", "state.json", "optimizer.safetensors", "embeddings.safetensors"):
    KINDS[f"checkpoint {name}"] = Kind(f"stopped/words/checkpoints/*/{name}", resumed("words"))
for name in ("adapter_config.json", "adapter_model.safetensors"):
    KINDS[f"checkpoint {name}"] = Kind(
        f"stopped/head/checkpoints/*/adapter/{name}", resumed("head")
    )


# ------------------------------------------------------------------------------------------ tree
def make_tree(tree: Path) -> None:
    """A model, data, finished and unfinished runs, results: every kind of file, valid and small."""
    compat = REPO / "tests" / "compat"
    shutil.copytree(compat / "base", tree / "model")
    model = tree / "model"
    source = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    source += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (model / "chat_template.jinja").write_text(source)
    config = {"chat_template": source, "eos_token": "<|im_end|>", "model_max_length": 512}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    texts = load_file(REPO / "qwen_min" / "tiny" / "fed.safetensors")["texts"][:20].clone()
    save_file({"texts": texts}, model / "fed.safetensors")
    shutil.copytree(model, tree / "sharded", ignore=lambda *_: ["model.safetensors"])
    tensors = sorted(load_file(model / "model.safetensors").items())
    shards = {f"model-{i}.safetensors": dict(tensors[i::2]) for i in (0, 1)}
    for file, part in shards.items():
        save_file(part, tree / "sharded" / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tree / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = [line.split("\t") for line in (compat / "test.tsv").read_text().splitlines()[1:21]]
    for name, part in (("train", rows[:12]), ("test", rows[12:])):
        lines = {"tsv": ["label\ttext_a"], "csv": ["label,text"], "jsonl": []}
        for label, text in part:
            lines["tsv"].append(f"{label}\t{text}")
            lines["csv"].append(f'{label},"{text}"')
            lines["jsonl"].append(json.dumps({"label": int(label), "text": text}))
        for ending, content in lines.items():
            (tree / f"{name}.{ending}").write_text("\n".join(content) + "\n")
    vectors = {"words": ["--train-embeddings"]}
    for name, command in zip(("probe", "head", "words"), NEW, strict=True):
        command = [*command[:-1], f"runs/{name}", *vectors.get(name, [])]
        for argv in (command, ["evaluate", "--run", f"runs/{name}", "--data", "test.tsv"]):
            must_work(argv, tree)
        shutil.copytree(tree / "runs" / name, tree / "stopped" / name)
        # A run of twice as many epochs that was stopped in the middle.
        path = tree / "stopped" / name / "run.json"
        record = json.loads(path.read_text())
        record |= {"finished": False}
        record["arguments"] |= {"epochs": 2, "output": f"stopped/{name}"}
        path.write_text(json.dumps(record))
        for old in (path.parent / "head.safetensors", *path.parent.glob("*-*.json*")):
            old.unlink(missing_ok=True)
    zero = [*ZERO[:-4], "--output", "zero.json", "--predictions", "zero.jsonl"]
    must_work(zero, tree)


def must_work(argv: list[str], tree: Path) -> None:
    """Run a command of which the tree is made."""
    status, out, err = forked(argv, tree)
    if status != 0:
        raise RuntimeError(f"{argv}: status {status}\n{out}\n{err}")


# ------------------------------------------------------------------------------------- mutations
def change_json(source: str, rng: random.Random) -> tuple[str, str]:
    """JSON with one to three changes at random places, and a description of them."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            value = json.loads(source)
        except (ValueError, RecursionError):
            break
        holder, key = [value], 0  # a root that can be replaced too
        root, trail = holder, []
        while isinstance(child := holder[key], dict | list) and child and rng.random() < 0.85:
            holder = child
            key = rng.choice(list(child)) if isinstance(child, dict) else rng.randrange(len(child))
            trail.append(str(key))
        mark, old = "@mark@", json.dumps(holder[key])
        raw = near(holder[key], rng) if rng.random() < 0.25 else rng.choice(ODD_JSON)
        what = rng.choice(["replace"] * 5 + ["delete", "twice", "swap", "rename", "add"])
        if isinstance(holder, list) and what in ("twice", "rename", "add"):
            what, raw = "twice", f"{old}, {raw}"
        elif what == "twice":
            raw = f"{old}, {json.dumps(key)}: {raw}"
        if what == "delete" and holder is not root:
            del holder[key]
        elif what == "swap":
            other = rng.choice(list(holder)) if isinstance(holder, dict) else 0
            holder[key], holder[other] = holder[other], holder[key]
        elif what == "rename":
            holder[rng.choice([*ODD_TEXT, f"{key}{ESCAPE}", f"{key}s"])] = holder.pop(key)
        elif what == "add":
            holder[rng.choice([*ODD_TEXT, "finished", "sliding_window", "bias"])] = mark
        else:
            holder[key] = mark
        source = json.dumps(root[0]).replace(f'"{mark}"', raw)
        done.append(f"{what} {'/'.join(trail)[:80]} {raw[:60] if len(raw) < 200 else raw[:20]}")
    return source, "; ".join(done)


def near(value: object, rng: random.Random) -> str:
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


def change_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with another header, or with another body behind its header."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    what = rng.choice(["header"] * 5 + ["size", "shorter", "longer", "values"])
    if what == "header":
        text, what = change_json(header.decode(), rng)
        header = text.encode("utf-8", "surrogatepass")
        size = len(header)
    elif what == "size":
        size = rng.choice([0, 1, 2**63, 2**64 - 1, size + 1, size - 1, 10**9, len(data)])
    elif what == "shorter":
        body = body[: rng.randrange(len(body))]
    elif what == "longer":
        body += rng.randbytes(rng.choice((1, 1000)))
    else:  # NaN, infinity, huge or other numbers
        pattern = rng.choice([b"\xff\xff", b"\x80\x7f", b"\x7f\x7f", b"\x00\x00", rng.randbytes(2)])
        start = rng.randrange(len(body)) & ~1
        body = (body[:start] + pattern * rng.choice((1, 2, 4, len(body) // 2)))[: len(body)] + body[
            start + 8 :
        ]
        body = body[: len(data) - 8 - size]
        what = f"values from {start}: {pattern}"
    return struct.pack("<Q", size) + header + body, what


def change_table(text: str, ending: str, rng: random.Random) -> tuple[str, str]:
    """A table or a file of JSON lines with one line or field changed."""
    lines = text.split("\n")
    at = rng.randrange(max(1, len(lines) - 1))
    if ending == ".jsonl" and rng.random() < 0.8:
        lines[at], what = change_json(lines[at], rng)
        return "\n".join(lines), f"line {at + 1}: {what}"
    cut = "\t" if ending == ".tsv" else ","
    fields = lines[at].split(cut)
    odd = [
        *ODD_TEXT[:2],
        *ODD_TEXT[3:],
        '"',
        '""',
        "\t",
        ",",
        "\u2028",
        "\x85",
        "<|im_end|>",
        "2",
        "1.0",
        "差",
    ]
    what, new = (
        rng.choice(("field", "field", "line", "twice", "drop", "join", "swap")),
        rng.choice(odd),
    )
    if what == "field":
        fields[rng.randrange(len(fields))] = new
    elif what == "join":
        fields.append(new)
    elif what == "swap":
        fields.reverse()
    lines[at : at + 1] = {"line": [new], "twice": [lines[at]] * 2, "drop": []}.get(
        what, [cut.join(fields)]
    )
    return "\n".join(lines), f"line {at + 1}: {what} {new[:20]!r}"


ODD_JINJA = ["{{", "{% if %}", "{{ ''.__class__.__mro__ }}", "{{ undefined.x }}", ESCAPE, "\ud800"]
ODD_JINJA += [
    "{{ raise_exception('\x1b[31m' * 200) }}",
    "{{ 1 / 0 }}",
    "{% include 'x' %}",
    "<think>",
]
ODD_JINJA += ["{{ 'a' * 10000000000 }}", "{{ messages[9]['content'] }}", "{{ messages | tojson }}"]
ODD_JINJA += [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ strftime_now('%Y') }}",
    "(" * 9999,
]
ODD_JINJA += [
    "{{ range(10 ** 10) | list }}",
    "<|im_start|>system\n\x1b[31m<|im_end|>",
    "{{ '%d' % 'x' }}",
]


def change_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Content damaged without regard to its structure."""
    at = rng.randrange(len(data) + 1)
    changes: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "truncated": lambda: data[:at],
        "flipped": lambda: (
            data[:at] + bytes([data[at - 1] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        ),
        "inserted": lambda: data[:at] + rng.randbytes(rng.choice((1, 4, 300))) + data[at:],
        "NUL": lambda: data[:at] + b"\0" + data[at:],
        "escape": lambda: data[:at] + ESCAPE.encode() + data[at:],
        "mark": lambda: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda: data.decode("utf-8", "replace").encode("utf-16"),
        "twice": lambda: data * 2,
    }
    what = rng.choice(list(changes))
    return changes[what](), f"{what} at {at}"


def change_place(path: Path, rng: random.Random) -> str:
    """Something else in the place of a file."""
    what = rng.choice(
        ["nothing", "directory", "dangling", "loop", "fifo", "/dev/zero", "/dev/stdin", "huge"]
    )
    path.unlink()
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "huge":
        path.touch()
        os.truncate(path, 2**40)
    elif what != "nothing":
        path.symlink_to({"dangling": "nowhere", "loop": path.name}.get(what, what))
    return what


def change(path: Path, argv: list[str], case: Path, rng: random.Random) -> tuple[list[str], str]:
    """Damage one file; the arguments (which change with a file's name) and what was done."""
    how = rng.random()
    if how < 0.1:
        return argv, change_place(path, rng)
    named = [
        i for i, arg in enumerate(argv) if (case / arg).exists() and path.is_relative_to(case / arg)
    ]
    if how < 0.13 and named:
        name = f"{argv[named[0]]}{rng.choice([ESCAPE, chr(10), chr(0x202E), chr(0xDCFF)])}"
        name += path.suffix if path == case / argv[named[0]] else ""
        (case / argv[named[0]]).rename(case / name)
        return [name if i in named else arg for i, arg in enumerate(argv)], f"name {name!r}"
    data = path.read_bytes()
    if how < 0.35:
        data, what = change_bytes(data, rng)
    elif path.suffix == ".safetensors":
        data, what = change_safetensors(data, rng)
    else:
        text = data.decode()
        if path.suffix == ".json":
            text, what = change_json(text, rng)
        elif path.suffix == ".jinja":
            at, new = rng.randrange(len(text) + 1), rng.choice(ODD_JINJA)
            text, what = text[:at] + new + text[at:], f"insert {new[:40]!r} at {at}"
        else:
            text, what = change_table(text, path.suffix, rng)
        data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    return argv, what


# ------------------------------------------------------------------------------------------- run
def forked(argv: list[str], directory: Path) -> tuple[int, str, str]:
    """Run a command in a child process, in `directory`: (status, stdout, stderr).

    The status is -SIGKILL after SECONDS, and 70 after a traceback.
    """
    files = [directory / ".out", directory / ".err"]
    if (child := os.fork()) == 0:
        status = 70
        try:
            os.chdir(directory)
            for number, file in ((1, files[0]), (2, files[1])):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + MEMORY] * 2)
            for name in ("stdout", "stderr"):
                setattr(
                    sys,
                    name,
                    open(
                        ("stdout", "stderr").index(name) + 1,
                        "w",
                        closefd=False,
                        encoding="utf-8",
                        errors="backslashreplace",
                    ),
                )
            status = MAINS[argv[0]](argv[1:])
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    until, ended = time.monotonic() + SECONDS, 0
    while not ended and time.monotonic() < until:
        time.sleep(0.005)
        ended, state = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, state = os.waitpid(child, 0)
    return (
        os.waitstatus_to_exitcode(state),
        *(f.read_bytes().decode("utf-8", "replace") for f in files),
    )


def verdict(status: int, out: str, err: str) -> tuple[str, str]:
    """accepted, refused, or the kind of a finding; and where a finding shows."""
    if status == -signal.SIGKILL:
        return "hang", ""
    if status < 0:
        return "crash", signal.Signals(-status).name
    if "Traceback" in err or status not in (0, 1, 2):
        ours = re.findall(r'File "' + re.escape(str(REPO)) + r'/(?!tests/)(.*?)", line (\d+)', err)
        return (
            "traceback",
            f"{':'.join(ours[-1]) if ours else '?'} {err.strip().splitlines()[-1][:100]}",
        )
    for line in (out + err).split("\n"):
        if odd := [char for char in line if category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]:
            return "unprintable", f"{odd[0]!r} in {line[:80]!r}"
    errors = [line for line in err.split("\n") if line.startswith("error:")]
    if any(len(line) > LONGEST for line in err.split("\n")):
        return "long", f"{max(map(len, err.split(chr(10))))} characters: {err[:80]!r}"
    if status == 2 and len(errors) != 1:
        return "lines", f"{len(errors)} error lines"
    return ("refused" if status else "accepted"), ""


def run_case(number: int, tree: Path, kinds: Sequence[str]) -> tuple[str, str, str, str, str]:
    """(kind of file, verdict, where, what was done, the output) of a case."""
    rng = random.Random(number)
    name = rng.choice(kinds)
    with tempfile.TemporaryDirectory() as place:
        case = Path(place, "case")
        shutil.copytree(tree, case)
        argv = rng.choice(KINDS[name].commands)
        found = sorted(case.glob(KINDS[name].path))
        # Of several files one that the command reads, if it names their directory.
        named = [path for path in found if any(f"/{arg}/" in f"{path}/" for arg in argv)]
        path = rng.choice(named or found)
        argv, what = change(path, argv, case, rng)
        status, out, err = forked(argv, case)
        verdict_, where = verdict(status, out, err)
        done = f"{path.relative_to(case)}: {what}\n$ {' '.join(argv)}"
        return name, verdict_, where, done, f"{out}{err}status {status}"


def fuzz(numbers: Sequence[int], kinds: Sequence[str] = tuple(KINDS)) -> Iterator[tuple]:
    """The outcome of each case: its number and what `run_case` gives."""
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place, "tree")
        tree.mkdir()
        make_tree(tree)
        for number in numbers:
            yield number, *run_case(number, tree, kinds)


def main() -> int:
    """Run the cases; print the findings and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--case", type=int)
    parser.add_argument("--kind", choices=KINDS)
    args = parser.parse_args()
    numbers = range(args.start, args.start + args.cases) if args.case is None else [args.case]
    kinds = [args.kind] if args.kind else list(KINDS)
    counts, findings = Counter(), {}
    for number, kind, found, where, done, output in fuzz(numbers, kinds):
        counts[kind, found] += 1
        if args.case is not None:
            print(
                f"{done}\n{output[:20_000]}\n{found} {where}".encode("unicode_escape")
                .decode()
                .replace("\\n", "\n")
            )
        elif found not in ("accepted", "refused"):
            findings.setdefault((found, where), []).append(number)
            if len(findings[found, where]) == 1:
                print(ascii(f"case {number}: {kind}: {found} {where}: {done}"), flush=True)
    columns = ["refused", "accepted", *sorted({c for _, c in counts} - {"refused", "accepted"})]
    print(f"{'':28}" + "".join(f"{column:>12}" for column in columns))
    for kind in [*kinds, "all"]:
        row = [
            sum(n for (k, c), n in counts.items() if c == column and kind in (k, "all"))
            for column in columns
        ]
        print(f"{kind:28}" + "".join(f"{n:12}" for n in row))
    for (found, where), cases in sorted(findings.items(), key=lambda item: -len(item[1])):
        print(ascii(f"{len(cases)} x {found} {where}: cases {cases[:5]}"))
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
