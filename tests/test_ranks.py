"""Several processes: the numbers of a single one, and one end for all.

Most tests start the processes themselves, as torchrun does: forked from one that has imported
everything, they begin in a tenth of a second.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file
from torch.distributed import TCPStore

SAMPLE = REPO / "qwen_min" / "sample"
MEASURED = ("seconds", "examples_per_second", "arguments")  # paths are among the arguments
METHODS = ("zero_shot", "zero_shot_generate", "head_only", "lora_head", "lora_label_scoring")
TRAIN = ("--dtype", "float32", "--limit", "40", "--epochs", "5", "--batch-size", "9")
TRAIN += ("--batch-tokens", "300", "--save-every", "4", "--eval-every", "10")  # 20 steps
FRAME = ("--template", "评论：{text}。")  # the small tokenizer merges another end with the labels
TRAIN += FRAME
# Each line: a script, its arguments, and for each process its environment, the file for its output
# and Python to execute before. Answers the process ids, and when all have ended their exit codes.
SERVER = """
import json, os, sys
import torch._dynamo  # takes seconds; the optimizer imports it
import evaluate, train, qwen_min.predict
import qwen_min.fast.group, qwen_min.fast.forms, qwen_min.lab.label_sets, qwen_min.lab.calibration
os.fsync = lambda descriptor: None  # no power cuts here
for line in sys.stdin:
    script, argv, processes = json.loads(line)
    pids = []
    for environment, out, before in processes:
        pids.append(os.fork())
        if pids[-1] == 0:
            for number, end in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{out}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(environment)
            status = 70
            try:
                exec(before)
                status = sys.modules[script].main(argv)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
    print(json.dumps(pids), flush=True)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(ended), flush=True)
"""
NOTHING: dict = {}


class Server:
    """Starts commands in `size` processes. before: by rank, Python to be executed first."""

    def __init__(self, directory: Path):
        # A killed process leaves its temporary directory.
        environment = {**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(directory)}
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], **how, text=True)
        self.directory = directory

    def start(self, size: int, script: str, *argv: object, before: dict = NOTHING) -> list[int]:
        """The process ids."""
        # In torchrun's own process too is the store.
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost"}
        common |= {"MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.outputs, processes = [self.directory / f"o{rank}" for rank in range(size)], []
        for rank, out in enumerate(self.outputs):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append((environment, str(out), before.get(rank, "")))
        self.process.stdin.write(json.dumps((script, [str(a) for a in argv], processes)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> tuple[list[int], str, str]:
        """Exit codes, and what all processes wrote to standard output and error."""
        codes = json.loads(self.process.stdout.readline())
        files = [[o.with_suffix(end) for o in self.outputs] for end in (".out", ".err")]
        return codes, *("".join(file.read_text() for file in part) for part in files)

    def run(self, size: int, script: str, *argv: object, before: dict = NOTHING) -> tuple:
        self.start(size, script, *argv, before=before)
        return self.end()

    def good(self, size: int, script: str, *argv: object) -> str:
        codes, out, err = self.run(size, script, *argv)
        assert codes == [0] * size, err
        return out


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="module")
def runs(server, reference, tmp_path_factory) -> dict[str, Path]:
    """By method, a run of a single process."""
    runs = {method: tmp_path_factory.mktemp("runs") / method for method in METHODS[2:]}
    for method, run in runs.items():
        more = (*FRAME, "--layer", "best") if method == "head_only" else TRAIN
        argv = ("--method", method, "--model", reference[0], "--output", run)
        server.good(1, "train", *argv, *more)
    return runs | {"transplanted_head": runs["lora_head"]}


def differ(run: Path, other: Path) -> float:
    files = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, other)]
    a, b = (torch.cat([part.flatten() for _, part in sorted(f.items())]) for f in files)
    return ((a - b).norm() / a.norm()).item()


def results(path: Path) -> str:
    found = json.loads(path.read_text())
    return json.dumps({key: value for key, value in found.items() if key not in MEASURED})


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("method", [*METHODS, "transplanted_head"])
def test_every_method_gives_the_same_bytes(method, server, runs, reference, tmp_path):
    more, found = ["--batch-tokens", "400", "--limit", "60", "--model", reference[0], *FRAME], []
    more += ["--run", runs[method]] if method in runs else []
    if method == "zero_shot":
        more += [
            "--label-sets",
            "消极,积极;差,好",
            "--calibrate",
            "--calibration",
            "domain_context",
        ]
        more += ["--train-data", SAMPLE / "train.tsv"]
    for size in (1, 2, 3):
        files = [tmp_path / f"{size}.json", tmp_path / f"{size}.jsonl"]
        argv = ("--method", method, *more, "--output", files[0], "--predictions", files[1])
        out = re.sub(r"speed .*|/\S*\.json", "", server.good(size, "evaluate", *argv))
        found.append((out, results(files[0]), files[1].read_bytes()))
    assert found[1] == found[0] and found[2] == found[0]


def test_explanations_and_predictions_are_the_same(server, runs, tmp_path):
    texts, found = tmp_path / "texts.txt", []
    texts.write_text("房间很干净，服务也好。\n等了两个小时，菜还是凉的。\n不推荐！\n" * 20)
    how = ("--run", runs["lora_head"], "--batch-tokens", "64")
    for size in (1, 3):
        explained = server.good(size, "evaluate", *how, "--explain", "房间小，但是很干净。")
        server.good(size, "qwen_min.predict", texts, *how, "--output", tmp_path / "p.csv")
        found.append((explained, (tmp_path / "p.csv").read_bytes()))
    assert found[0] == found[1]


CHECK = """
import torch
from lora import LoRALinear
from qwen_min.fast import group, ranks
from qwen_min.fast.layout import Text
group.join()
x = torch.tensor([-0.0, float("nan"), float("-inf"), 1e-310, -1 / 3, 0.0], dtype=torch.float64)
for kind, bits in ((torch.float64, torch.int64), (torch.float32, torch.int32)):
    own = torch.zeros(6, dtype=kind)
    own[ranks.rank :: 3] = x.to(kind)[ranks.rank :: 3]
    assert torch.equal(ranks.gathered(own).view(bits), x.to(kind).view(bits))
for rows in range(1, 8):  # each row counts once
    own, factor = ranks.share(rows)
    counts = torch.zeros(rows, dtype=torch.int64)
    counts[own] += int(factor)
    assert ranks.gathered(counts).tolist() == [1] * rows
texts = [Text(range(n), queries=1) for n in (3, 2, 4)]
ranks.share_dropout(texts, [0, 2])
draw = LoRALinear(torch.nn.Linear(5, 5), 1, 1, dropout=0.5).mask
for tokens, own in ((9, [0, 1, 2, 5, 6, 7, 8]), (3, [0, 2])):  # the last layer: the queries
    torch.manual_seed(3)
    whole = draw(torch.empty(tokens, 5))
    torch.manual_seed(3)
    assert torch.equal(ranks.own_mask(draw, torch.empty(len(own), 5)), whole[own])
status = 55
sys.exit()
"""


def test_exchanged_numbers_arrive_to_the_bit(server):
    codes, _, err = server.run(3, "evaluate", before=dict.fromkeys(range(3), CHECK))
    assert codes == [55] * 3, err


@pytest.mark.parametrize(("size", "more"), [(2, ()), (3, ("--checkpointing",))])
def test_training_agrees(size, more, server, runs, reference, tmp_path):
    """With dropout. Sums are added in another order: fp32 keeps 24 bits, and 20 steps add up."""
    how = ("--method", "lora_head", *TRAIN, "--model", reference[0], "--output", tmp_path / "run")
    server.good(size, "train", *how, *more)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 20
    assert differ(runs["lora_head"], tmp_path / "run") < 1e-6


def test_a_probe_is_the_same_also_on_features_that_only_the_first_has(
    server, runs, reference, tmp_path
):
    features = shutil.copytree(runs["head_only"] / "features", tmp_path / "kept")
    how = ("--method", "head_only", *FRAME, "--layer", "best", "--model", reference[0], "--output")
    server.good(2, "train", *how, tmp_path / "new")
    next(features.iterdir()).unlink()
    server.good(2, "train", *how, tmp_path / "again", "--feature-cache", features)
    heads = [runs["head_only"], tmp_path / "new", tmp_path / "again"]
    assert len({(run / "head.safetensors").read_bytes() for run in heads}) == 1


SLOWLY = """
import time, qwen_min.fast.features as m
fast = m.last_states
m.last_states = lambda *a: time.sleep(0.05) or fast(*a)
"""


def test_a_killed_training_goes_on_with_any_number(server, runs, reference, tmp_path):
    rng, run, log = random.Random(0), tmp_path / "run", tmp_path / "run" / "log.jsonl"
    how = ("--method", "lora_head", *TRAIN, "--model", reference[0], "--output", run)
    for size, victim in ((2, 1), (3, 0), (1, 0)):
        begun = log.exists() and log.stat().st_ino  # each process begins the file anew
        pids = server.start(size, "train", *how, before=dict.fromkeys(range(size), SLOWLY))
        wait_for(lambda: log.exists() and log.stat().st_ino != begun)  # noqa: B023
        time.sleep(rng.uniform(0, 0.8))
        os.kill(pids[victim], signal.SIGKILL)
        codes, _, err = server.end()
        assert codes[victim] == -signal.SIGKILL and codes.count(1) == size - 1, err
        assert err.count("was another process killed?") == min(1, size - 1), err
        how = ("--output", run, "--resume")
    server.good(2, "train", *how)
    assert differ(runs["lora_head"], run) < 1e-6
    assert [json.loads(line)["step"] for line in log.open()] == list(range(1, 21))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_all_after_the_same_step(number, server, runs, reference, tmp_path):
    run = tmp_path / "run"
    how = ("--method", "lora_head", *TRAIN, "--model", reference[0], "--output", run)
    pids = server.start(3, "train", *how, before=dict.fromkeys(range(3), SLOWLY))
    wait_for(lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text())
    os.kill(pids[1], number)
    codes, out, err = server.end()
    assert codes == [128 + number] * 3 and err == ""
    assert f"step-{re.search('after step (.*), saved', out)[1]}" in os.listdir(run / "checkpoints")
    server.good(2, "train", "--output", run, "--resume")
    assert differ(runs["lora_head"], run) < 1e-6


BATCH = "import time, qwen_min.fast.label_scores as m; m.score_batch = lambda *a: "


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        ("exec('raise MemoryError(12)')", 2, r"error: process 1: out of memory \(12\); lower .*\n"),
        ("1 / 0", 1, r"Traceback (.|\n)*ZeroDivisionError: division by zero\n"),
    ],
)
def test_an_error_in_one_ends_all(failure, code, line, server):
    before = dict.fromkeys((0, 2), BATCH + "time.sleep(500)") | {1: BATCH + failure}
    codes, _, err = server.run(3, "evaluate", "--method", "zero_shot", before=before)
    assert codes == [code] * 3 and re.fullmatch(line, err), err


NAN = """
import qwen_min.fast.features as m
fast = m.last_states
m.last_states = lambda *a: fast(*a) * float("nan")
"""


def test_a_step_that_fails_is_one_line(server, reference, tmp_path):
    """The line names the rows, which are looked at through the definition, without dropout."""
    how = ("--method", "lora_head", *TRAIN, "--model", reference[0], "--output", tmp_path / "run")
    codes, _, err = server.run(3, "train", *how, before=dict.fromkeys(range(3), NAN))
    assert codes == [1] * 3 and re.fullmatch(r"error: step 1: loss nan, .*, in rows .*\n", err), err


@pytest.mark.parametrize(
    ("script", "name", "old", "new"),
    [
        ("evaluate", "rows.tsv", "好", "坏"),
        ("evaluate", "model/config.json", '"rope_theta": 1', '"rope_theta": 2'),
        ("evaluate", "run/run.json", '"seed": 0', '"seed": 1'),
        ("train", "rows.tsv", "好", "坏"),
        ("train", "model/config.json", '"rope_theta": 1', '"rope_theta": 2'),
        ("train", "run/checkpoints/step-20/manifest.json", "\n", " "),
        ("train", "run/run.json", '"lr": 0.0002', '"lr": 0.0003'),
        ("qwen_min.predict", "rows.tsv", "好", "坏"),
    ],
)
def test_processes_that_see_other_files_are_refused(
    script, name, old, new, server, reference, runs, tmp_path
):
    for rank in "01":
        shutil.copytree(reference[0], tmp_path / rank / "model")
        shutil.copytree(runs["lora_head"], tmp_path / rank / "run")
        shutil.copy(SAMPLE / "test.tsv", tmp_path / rank / "rows.tsv")
    file = tmp_path / "1" / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    argv = {
        "evaluate": ["--model", "model", "--data", "rows.tsv", "--run", "run"],
        "train": ["--method", "lora_head", "--model", "model", "--data", "rows.tsv"],
        "qwen_min.predict": ["rows.tsv"],
    }[script]
    argv = ["--resume", "--output", "run"] if (script, name[:3]) == ("train", "run") else argv
    before = {rank: f"os.chdir({str(tmp_path / str(rank))!r})" for rank in (0, 1)}
    codes, _, err = server.run(2, script, *argv, before=before)
    what = "texts" if script == "qwen_min.predict" else "model, run, data or device"
    found = f"error: processes 0 and 1 (of 0 to 1) differ in their {what}; use the same for all\n"
    assert (codes, err) == ([2, 2], found)


@pytest.mark.parametrize(
    ("argv", "environment", "line"),
    [
        ((), {"MASTER_PORT": ""}, "WORLD_SIZE is 2, but the processes do not find each other"),
        (("--plain",), {}, "--plain computes in a single process"),
        (("--device", "cuda"), {}, "--device cuda: "),
        (("--data", "absent"), {}, "absent: "),
    ],
)
def test_what_cannot_be_shared_is_one_line(argv, environment, line, server):
    before = dict.fromkeys(range(2), f"os.environ.update({environment})")
    codes, out, err = server.run(2, "evaluate", "--method", "zero_shot", *argv, before=before)
    assert (codes, out) == ([2, 2], "") and re.fullmatch(f"(error: {line}.*\n)+", err)
    assert err.count("error") == 1 + bool(environment)


def torchrun(directory: Path, size: int, script: str, *argv: object) -> subprocess.Popen:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "TMPDIR": str(directory)}
    return subprocess.Popen([*map(str, [*run, REPO / f"{script}.py", *argv])], **pipes)


def test_torchrun_evaluates(server, tmp_path):
    for size in (1, 2):
        files = (tmp_path / f"{size}.json", "--predictions", tmp_path / f"{size}.jsonl")
        process = torchrun(tmp_path, size, "evaluate", "--method", "zero_shot", "--output", *files)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out.count("accuracy") == 1, err
    assert results(tmp_path / "2.json") == results(tmp_path / "1.json")
    assert (tmp_path / "2.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()


def test_torchrun_ends_when_one_is_killed(reference, tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    how = ("--method", "lora_head", *TRAIN, "--epochs", "900", "--model", reference[0])
    process = torchrun(tmp_path, 2, "train", *how, "--output", tmp_path / "run")
    wait_for(lambda: log.exists() and log.read_text())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = [c for c in children if b"\0RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes()]
    os.kill(int(victim), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and len(re.findall("^error: .*", err, re.MULTILINE)) == 1, err
