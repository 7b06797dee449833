"""Damage each kind of file that the program reads: it must accept or refuse it, and never crash.

    python tests/fuzz.py --cases 500            # cases 0 to 499, then a table of counts
    python tests/fuzz.py --cases 10000          # about an hour
    python tests/fuzz.py --case 123             # one case: what was done, and the whole output
    python tests/fuzz.py --cases 500 --kind run.json

A case is a number. It seeds the choice of a file, of a change to it (tests/damage.py), and of a
command that reads it. The command runs in a forked process on a copy of the files, with limits on
memory and time. It must exit with 0, 1 or 2, print only printable characters and no line on stderr
above 500 characters, and with 2 exactly one line of error. Otherwise the case is a finding, and
the fuzzer exits with 1.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unicodedata import category

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import train
from qwen_min.command.cli import run_command
from qwen_min.command.interface import Classifier
from qwen_min.report import audit, tables
from tests.damage import ESCAPE, change_bytes, change_place, change_structure

REPO = Path(__file__).resolve().parents[1]
SECONDS = 20  # of computing in one case; the slowest valid one takes about one
WAITING = 60  # seconds until a case that computes nothing counts as hanging
MEMORY = 2**30  # bytes beyond what the process has at its start
LONGEST = 500  # characters of a line on stderr

Command = list[str]  # the name of a program, and its arguments


def load(argv: Sequence[str]) -> int:
    """The Python interface, whose UserError is reported as a command reports it."""

    def predict(args: argparse.Namespace) -> int:
        print(Classifier.from_run(argv[0], "cpu").predict(["房间小，但是很干净。"]))
        return 0

    return run_command(predict, argparse.Namespace(plain=True))


MAINS = {"evaluate": evaluate.main, "train": train.main, "report": tables.main}
MAINS |= {"audit": audit.main, "from_run": load}
LABELS = ["--labels", "差,好"]
FILES = [*LABELS, "--output", "out.json", "--predictions", "out.jsonl", "--data", "test.tsv"]
EXPLAIN = ["--explain", "房间小，但是很干净。"]
ZERO = ["evaluate", "--method", "zero_shot", "--model", "model", *FILES]
GENERATE = [*ZERO, "--method", "zero_shot_generate"]  # the last of two values counts
SHARDED = [*ZERO, "--model", "sharded"]
LOOK = [*ZERO[:5], *LABELS, *EXPLAIN]
LAB = [*ZERO, "--calibrate", "--label-sets", "坏,好;差,棒"]
AUDIT = ["audit", "train.tsv", "test.tsv", "--list", "--model", "model", *LABELS]
NEW = ["--model", "model", *LABELS, "--data", "train.tsv", "--output", "new"]
STEPS = ["--epochs", "1", "--r", "2", "--lora-targets", "q_proj", "--eval-every", "3"]
STEPS += ["--save-every", "2"]
TRAIN = [["train", "--method", "head_only", *NEW]]
TRAIN += [["train", "--method", m, *NEW, *STEPS] for m in ("lora_head", "lora_label_scoring")]
PROBED = ["train", "--method", "head_only", "--adapter", "runs/head/adapter", *NEW]
ADAPTED = ["evaluate", "--method", "lora_head", "--adapter", "runs/head/adapter", *ZERO[3:]]
TRANSPLANTED = ["evaluate", "--method", "transplanted_head", "--run", "runs/head", *FILES]
MERGE = ["train", "--resume", "--output", "runs/words", "--merge", "merged"]
REPORT = [["report", "runs/probe", "runs/head", "runs/words", "zero.json", "--format", "json"]]
REPORT += [["report", "runs/words", "zero.json", "--output", "table.md"], ["report", "runs/head"]]
MODEL, CHAT = [ZERO, GENERATE, LOOK, LAB, *TRAIN], [[*ZERO, "--chat"], [*LOOK, "--chat"]]


def evaluated(run: str) -> list[Command]:
    """What reads a finished run."""
    own = ["evaluate", "--run", f"runs/{run}"]
    return [[*own, "--data", "test.tsv"], [*own, *EXPLAIN], ["from_run", f"runs/{run}"]]


def resumed(run: str) -> list[Command]:
    """What reads an unfinished run."""
    return [["train", "--resume", "--output", f"stopped/{run}"]]


class Kind(NamedTuple):
    """A kind of file: a pattern of its places, and the commands that read it."""

    pattern: str
    commands: list[Command]


HEAD = [*evaluated("head"), TRANSPLANTED, ADAPTED, PROBED]
WORDS = [*evaluated("words"), MERGE]
RUNS = [*evaluated("probe"), *HEAD, *WORDS, *REPORT]
KINDS = {
    "config.json": Kind("model/config.json", MODEL),
    "tokenizer.json": Kind("model/tokenizer.json", [*MODEL, AUDIT]),
    "tokenizer_config.json": Kind("model/tokenizer_config.json", [*CHAT, ZERO, MERGE]),
    "special_tokens_map.json": Kind("model/special_tokens_map.json", [*CHAT, ZERO, MERGE]),
    "added_tokens.json": Kind("model/added_tokens.json", [ZERO, TRAIN[0], MERGE]),
    "chat_template.jinja": Kind("model/chat_template.jinja", CHAT),
    "generation_config.json": Kind("model/generation_config.json", [GENERATE, MERGE]),
    "model.safetensors": Kind("model/model.safetensors", MODEL),
    "fed.safetensors": Kind("model/fed.safetensors", [ZERO, TRAIN[0], MERGE]),
    "index": Kind("sharded/model.safetensors.index.json", [SHARDED]),
    "shard": Kind("sharded/model-1.safetensors", [SHARDED]),
    "data, .tsv": Kind("test.tsv", [ZERO, GENERATE, LAB, AUDIT]),
    "data, .csv": Kind("test.csv", [[*ZERO[:-1], "test.csv"], ["audit", "test.csv", *LABELS]]),
    "data, .jsonl": Kind("test.jsonl", [[*ZERO[:-1], "test.jsonl"]]),
    "training data": Kind("train.tsv", [[*LAB, "--train-data", "train.tsv"], AUDIT, *TRAIN]),
    "run.json": Kind("runs/*/run.json", RUNS),
    "head.safetensors": Kind("runs/probe/head.safetensors", evaluated("probe")),
    "embeddings.safetensors": Kind("runs/words/embeddings.safetensors", WORDS),
    "results": Kind("runs/*/results-*.json", REPORT),
    "predictions": Kind("runs/*/predictions-*.jsonl", REPORT),
    "unfinished run.json": Kind("stopped/*/run.json", [*resumed("probe"), *resumed("words")]),
    "cached features": Kind("stopped/probe/features/*.safetensors", resumed("probe")),
    "log.jsonl": Kind("stopped/words/log.jsonl", resumed("words")),
}
for file in ("adapter_config.json", "adapter_model.safetensors"):
    KINDS[file] = Kind(f"runs/head/adapter/{file}", HEAD)
    KINDS[f"saved {file}"] = Kind(f"stopped/head/checkpoints/*/adapter/{file}", resumed("head"))
for file in ("manifest.json", "state.json", "optimizer.safetensors", "embeddings.safetensors"):
    KINDS[f"saved {file}"] = Kind(f"stopped/words/checkpoints/*/{file}", resumed("words"))


def make_tree(tree: Path) -> None:
    """A model, data, finished and unfinished runs, results: each kind of file, valid and small."""
    compat, model, sharded = REPO / "tests" / "compat", tree / "model", tree / "sharded"
    shutil.copytree(compat / "base", model)
    source = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    source += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (model / "chat_template.jinja").write_text(source)
    config = {"chat_template": source, "eos_token": "<|im_end|>", "model_max_length": 512}
    special = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    added = {"<|endoftext|>": 300, "<|im_start|>": 301, "<|im_end|>": 302}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "special_tokens_map.json").write_text(json.dumps(special))
    (model / "added_tokens.json").write_text(json.dumps(added))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    hashes = load_file(REPO / "qwen_min" / "tiny" / "fed.safetensors")["texts"][:20]
    save_file({"texts": hashes.clone()}, model / "fed.safetensors")
    shutil.copytree(model, sharded, ignore=lambda *_: ["model.safetensors"])
    tensors = sorted(load_file(model / "model.safetensors").items())
    shards = {f"model-{i}.safetensors": dict(tensors[i::2]) for i in (0, 1)}
    for name, part in shards.items():
        save_file(part, sharded / name)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = [row.split("\t") for row in (compat / "test.tsv").read_text("utf-8").split("\n")[1:21]]
    for name, part in (("train", rows[:12]), ("test", rows[12:])):
        lines = {
            "tsv": ["label\ttext_a", *("\t".join(row) for row in part)],
            "csv": ["label,text", *(f'{label},"{text}"' for label, text in part)],
            "jsonl": [json.dumps({"label": int(label), "text": text}) for label, text in part],
        }
        for ending, content in lines.items():
            (tree / f"{name}.{ending}").write_text("\n".join(content) + "\n", "utf-8")
    made = [[*ZERO, "--output", "zero.json", "--predictions", "zero.jsonl"]]
    for run, command in zip(("probe", "head", "words"), TRAIN, strict=True):
        vectors = ["--train-embeddings"] * (run == "words")
        made += [[*command, "--output", f"runs/{run}", *vectors], evaluated(run)[0]]
    for command in made:
        if (status := forked(command, tree)[0]) != 0:
            raise RuntimeError(f"status {status} of {command}: the undamaged files must work")
    shutil.copytree(tree / "runs", tree / "stopped")
    for path in (tree / "stopped").glob("*/run.json"):
        # A run of twice as many epochs that was stopped in the middle.
        record = json.loads(path.read_text("utf-8")) | {"finished": False}
        record["arguments"] |= {"epochs": 2, "output": str(path.parent.relative_to(tree))}
        path.write_text(json.dumps(record), "utf-8")


def change(path: Path, command: Command, case: Path, rng: random.Random) -> tuple[Command, str]:
    """Damage one file. The command, which may need another name for it, and what was done."""
    named = [arg for arg in command if (case / arg).exists() and path.is_relative_to(case / arg)]
    how = rng.random()
    if how < 0.1:
        return command, change_place(path, rng)
    if how < 0.13 and named:
        old = case / named[0]
        new = f"{old.stem}{rng.choice([ESCAPE, chr(10), chr(0x202E), chr(0xDCFF)])}{old.suffix}"
        old.rename(old.with_name(new))
        name = str(old.with_name(new).relative_to(case))
        return [name if arg == named[0] else arg for arg in command], f"renamed {new!r}"
    data = path.read_bytes()
    if how < 0.35:
        data, what = change_bytes(data, rng)
    else:
        data, what = change_structure(data, path.suffix, rng)
    path.write_bytes(data)
    return command, what


def forked(command: Command, directory: Path) -> tuple[int, str, str]:
    """Run a command in a child process, in `directory`: its exit status, stdout, stderr.

    The status is 70 after an exception, and minus the signal's number if one ended the process.
    """
    torch.set_num_threads(1)  # with several threads, computing after a fork may wait for ever
    files = [directory / ".out", directory / ".err"]
    if (child := os.fork()) == 0:
        status = 70
        try:
            os.chdir(directory)
            os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
            for number, place in enumerate((os.devnull, *files)):
                os.dup2(os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            status = MAINS[command[0]](command[1:]) or 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    until, ended = time.monotonic() + WAITING, 0
    while not ended and time.monotonic() < until:
        time.sleep(0.005)
        ended, state = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, state = os.waitpid(child, 0)
    texts = [file.read_bytes().decode("utf-8", "replace") for file in files]
    return os.waitstatus_to_exitcode(state), *texts


def verdict(status: int, out: str, err: str) -> tuple[str, str]:
    """accepted, refused or the name of a finding, and where a finding shows."""
    if status < 0:
        late = -status in (signal.SIGKILL, signal.SIGXCPU)
        return "hang" if late else "crash", signal.Signals(-status).name
    if "Traceback" in err or status not in (0, 1, 2):
        ours = re.findall(rf'File "{re.escape(str(REPO))}/(?!tests/)(.*?)", line (\d+)', err)
        name = err.strip().split("\n")[-1].partition(":")[0]
        return "traceback", f"{name} in {':'.join(ours[-1]) if ours else '?'}"
    for line in (out + err).split("\n"):
        if odd := [char for char in line if category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]:
            return "unprintable", f"{odd[0]!r} in {line[:60]!r}"
    lines = err.split("\n")
    if max(map(len, lines)) > LONGEST:
        return "too long", repr(max(lines, key=len)[:60])
    if status == 2 and len([line for line in lines if line.startswith("error:")]) != 1:
        return "not one line", repr(err[:60])
    return ("refused" if status else "accepted"), ""


class Outcome(NamedTuple):
    """What became of one case."""

    number: int
    kind: str
    verdict: str
    where: str
    done: str  # to which file, and the command
    output: str


@contextmanager
def copied(tree: Path) -> Iterator[Path]:
    """A copy of the tree, for one command."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(tree, Path(place, "case")))


def run_case(number: int, tree: Path, kinds: Sequence[str]) -> Outcome:
    """Damage a file in a copy of the tree, and run a command that reads it."""
    rng = random.Random(number)
    kind = rng.choice(kinds)
    with copied(tree) as case:
        command = rng.choice(KINDS[kind].commands)
        found = sorted(case.glob(KINDS[kind].pattern))
        # Of several files one whose directory the command names, if there is one.
        read = [path for path in found if any(f"/{arg}/" in f"{path}" for arg in command)]
        path = rng.choice(read or found)
        command, what = change(path, command, case, rng)
        status, out, err = forked(command, case)
        done = f"{path.relative_to(case)}: {what}\n$ {' '.join(command)}"
        return Outcome(number, kind, *verdict(status, out, err), done, f"{out}{err}exit {status}")


def until_stopped(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """The outcomes, up to Ctrl-C: the table then counts what was run."""
    try:
        yield from outcomes
    except KeyboardInterrupt:
        print("stopped", flush=True)


def main() -> int:
    """Run the cases; print the first case of each finding, and the counts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--start", type=int, default=0, help="the number of the first case")
    parser.add_argument("--case", type=int, help="run this case alone, and print everything")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of file, not all kinds")
    args = parser.parse_args()
    numbers = range(args.start, args.start + args.cases) if args.case is None else [args.case]
    kinds, counts, findings = args.kind or list(KINDS), Counter(), {}
    tree = tempfile.TemporaryDirectory()
    make_tree(Path(tree.name))
    for case in until_stopped(run_case(number, Path(tree.name), kinds) for number in numbers):
        counts[case.kind, case.verdict] += 1
        counts["all", case.verdict] += 1
        what = f"{case.verdict} {case.where}"
        if args.case is not None:
            for line in [*case.done.split("\n"), *case.output.split("\n"), what]:
                print(ascii(line)[1:-1])
        elif case.verdict not in ("accepted", "refused"):
            if what not in findings:
                print(ascii(f"case {case.number}, {case.kind}: {what}: {case.done}"), flush=True)
            findings.setdefault(what, []).append(case.number)
    columns = ["refused", "accepted", *sorted({c for _, c in counts} - {"refused", "accepted"})]
    print(" " * 33 + "".join(f"{column:>13}" for column in columns))
    for kind in [*kinds, "all"]:
        print(f"{kind:33}" + "".join(f"{counts[kind, column]:13}" for column in columns))
    for what, cases in sorted(findings.items(), key=lambda item: -len(item[1])):
        print(ascii(f"{len(cases)} x {what}: cases {', '.join(map(str, cases[:8]))}"))
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
