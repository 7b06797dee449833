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
CLOCKS = {"seconds", "examples_per_second", "training_seconds", "arguments"}
CLOCKS |= {"training_arguments"}  # paths
METHODS = ("zero_shot", "zero_shot_generate", "head_only", "lora_head", "lora_label_scoring")
METHODS += ("transplanted_head",)

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
        pid = os.fork()
        if pid == 0:
            for number, end in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{out}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(environment)
            status = 70
            try:
                exec(before)
                status = sys.modules[script].main(argv)
            except SystemExit as end:
                status = end.code
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(ended), flush=True)
"""


NOTHING: dict = {}


class Server:
    """Starts commands in W processes."""

    def __init__(self, directory: Path):
        environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], **pipes, env=environment, cwd=directory, text=True
        )
        self.directory = directory

    def start(self, size: int, script: str, *argv: object, before: dict = NOTHING) -> list[int]:
        """The process ids. before: by rank, Python that the process executes first."""
        # torchrun's own process has the store.
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost"}
        common |= {"MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.size, processes = size, []
        for rank in range(size):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append((environment, str(self.directory / f"o{rank}"), before.get(rank, "")))
        self.process.stdin.write(json.dumps((script, [str(a) for a in argv], processes)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> tuple[list[int], str, str]:
        """Exit codes, and what all processes wrote to standard output and error."""
        codes = json.loads(self.process.stdout.readline())
        files = [[self.directory / f"o{r}.{s}" for r in range(self.size)] for s in ("out", "err")]
        return codes, *("".join(file.read_text() for file in part) for part in files)

    def run(self, size: int, script: str, *argv: object, before: dict = NOTHING) -> tuple:
        self.start(size, script, *argv, before=before)
        return self.end()

    def good(self, size: int, script: str, *argv: object) -> str:
        """Standard output of a command that succeeds."""
        codes, out, err = self.run(size, script, *argv)
        assert codes == [0] * size, err
        return out


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.stdin.close()
    server.process.wait()


TRAIN = ("--dtype", "float32", "--limit", "40", "--epochs", "5", "--batch-size", "9")
TRAIN += ("--batch-tokens", "300", "--save-every", "4", "--eval-every", "10")  # 20 steps


def trained(server: Server, size: int, run: Path, method: str = "lora_label_scoring", *more) -> str:
    return server.good(size, "train", "--method", method, "--output", run, *more)


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory) -> dict[str, Path]:
    """By method, a run of a single process."""
    directory = tmp_path_factory.mktemp("runs")
    for method in METHODS[2:5]:
        trained(server, 1, directory / method, method, *(() if method == "head_only" else TRAIN))
    runs = {method: directory / method for method in METHODS[2:5]}
    return runs | {"transplanted_head": runs["lora_head"]}


def weights(run: Path, file: str = "adapter/adapter_model.safetensors") -> torch.Tensor:
    return torch.cat([part.flatten() for _, part in sorted(load_file(run / file).items())])


def differ(run: Path, other: Path, **file) -> float:
    return (
        (weights(run, **file) - weights(other, **file)).norm() / weights(run, **file).norm()
    ).item()


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def results(path: Path) -> str:
    found = json.loads(path.read_text())
    return json.dumps({key: value for key, value in found.items() if key not in CLOCKS})


# Evaluation


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_bytes(method, server, runs, tmp_path):
    more = ["--run", runs[method]] if method in runs else []
    if method == "zero_shot":
        more = ["--label-sets", "消极,积极;差,好", "--calibrate", "--calibration", "domain_context"]
        more += ["--train-data", SAMPLE / "train.tsv"]
    found, printed = [], []
    for size in (1, 2, 3):
        files = [tmp_path / f"{size}.json", tmp_path / f"{size}.jsonl"]
        argv = ("--method", method, *more, "--batch-tokens", "400")
        out = server.good(size, "evaluate", *argv, "--output", files[0], "--predictions", files[1])
        found.append((results(files[0]), files[1].read_bytes()))
        printed.append(re.sub(r"speed .*|/\S*\.json", "", out))
    assert found[1] == found[0] and found[2] == found[0]
    assert printed[1] == printed[0] and printed[2] == printed[0]


def test_explanations_and_predictions_are_the_same(server, runs, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("房间很干净，服务也好。\n等了两个小时，菜还是凉的。\n不推荐！\n" * 20)
    run, found = runs["lora_head"], []
    for size in (1, 3):
        explained = server.good(size, "evaluate", "--run", run, "--explain", "房间小，但是很干净。")
        argv = (texts, "--run", run, "--batch-tokens", "64", "--output", tmp_path / "p.csv")
        server.good(size, "qwen_min.predict", *argv)
        found.append((explained, (tmp_path / "p.csv").read_bytes()))
    assert found[0] == found[1]


CHECK = """
import torch
from qwen_min.fast import group, ranks
group.join("cpu")
x = torch.tensor([-0.0, float("nan"), float("-inf"), 1e-310, -1 / 3, 0.0], dtype=torch.float64)
for kind in (torch.float64, torch.float32):
    one = x.to(kind).view({8: torch.int64, 4: torch.int32}[x.to(kind).element_size()])
    own = torch.zeros(6, dtype=kind)
    own[ranks.rank :: 3] = x.to(kind)[ranks.rank :: 3]
    assert torch.equal(ranks.gathered(own).view(one.dtype), one)
rows = [[], []]
for own, together in ranks.mine([[4, 5], [6], [7], [0, 1], [2]], ()):
    rows[0] += own
    rows[1] += together
assert rows == [[[4, 5, 0, 1], [4, 5, 6, 7, 0, 1, 2]], [[6, 2], [4, 5, 6, 7, 0, 1, 2]],
                [[7], [4, 5, 6, 7]]][ranks.rank]
kept = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
assert torch.equal(ranks.from_first(kept if ranks.rank == 0 else None), kept)
assert ranks.from_first(kept if ranks.rank else None) is None
from collections import Counter
for parts in ([list(range(7))], [[0, 1], [2]], [[0]] * 3, [[0, 1]] * 4):
    own = torch.zeros(99, dtype=torch.int64)
    for number, (part, piece) in enumerate(ranks.pieces(parts)):
        for row in range(len(part))[piece]:
            own[number * 9 + row] += 1
    assert ranks.gathered(own).tolist().count(1) == sum(map(len, parts)) == own.sum()
sys.exit(55)
"""


def test_exchanged_numbers_arrive_to_the_bit(server):
    codes, _, err = server.run(3, "evaluate", before=dict.fromkeys(range(3), CHECK))
    assert codes == [55] * 3, err


# Training


@pytest.fixture(scope="module")
def whole(server, reference, tmp_path_factory) -> Path:
    """A training in a single process."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trained(server, 1, run, "lora_head", *TRAIN, "--model", reference[0])
    return run


@pytest.mark.parametrize(("size", "more"), [(2, ()), (3, ("--checkpointing",))])
def test_training_agrees(size, more, server, whole, reference, tmp_path):
    """With dropout. Sums are added in another order: fp32 keeps 24 bits, and 20 steps add up."""
    run = tmp_path / "run"
    trained(server, size, run, "lora_head", *TRAIN, "--model", reference[0], *more)
    assert len((run / "log.jsonl").read_text().splitlines()) == 20
    assert differ(whole, run) < 1e-6


def test_a_probe_is_the_same_also_on_features_that_only_the_first_has(server, tmp_path):
    common = ("--limit", "300", "--layer", "best")
    for size in (1, 2):
        trained(server, size, tmp_path / str(size), "head_only", *common)
    cache = ("--feature-cache", tmp_path / "1" / "features")
    next((tmp_path / "1" / "features").iterdir()).unlink()  # one of two files
    trained(server, 2, tmp_path / "again", "head_only", *common, *cache)
    heads = [(tmp_path / n / "head.safetensors").read_bytes() for n in ("1", "2", "again")]
    assert heads[0] == heads[1] == heads[2]


# One end for all

SLOWLY = """
import time, qwen_min.fast.features as m
fast = m.last_states
m.last_states = lambda *a: time.sleep(0.05) or fast(*a)
"""


def test_a_killed_training_goes_on_with_any_number(server, whole, reference, tmp_path):
    rng, run, first = random.Random(0), tmp_path / "run", ()
    log = run / "log.jsonl"  # begins anew with each process
    how = ("--method", "lora_head", *TRAIN, "--model", reference[0], "--output", run)
    for size, victim in ((2, 1), (3, 0), (1, 0), (3, 2)):
        begun = log.exists() and log.stat().st_ino
        pids = server.start(size, "train", *how, *first, before=dict.fromkeys(range(size), SLOWLY))
        wait_for(lambda: log.exists() and log.stat().st_ino != begun)  # noqa: B023
        time.sleep(rng.uniform(0, 0.8))
        os.kill(pids[victim], signal.SIGKILL)
        started = time.monotonic()
        codes, _, err = server.end()
        assert time.monotonic() - started < 60
        assert codes[victim] == -signal.SIGKILL and codes.count(1) == size - 1, err
        assert len(re.findall("error: .*another process ended without", err)) == min(1, size - 1)
        how, first = ("--output", run), ("--resume",)
    server.good(2, "train", "--output", run, "--resume")
    assert differ(whole, run) < 1e-6
    assert [json.loads(line)["step"] for line in log.open()] == list(range(1, 21))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_all_after_the_same_step(number, server, reference, whole, tmp_path):
    run = tmp_path / "run"
    how = ("--method", "lora_head", *TRAIN, "--model", reference[0], "--output", run)
    pids = server.start(3, "train", *how)
    wait_for(lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text())
    os.kill(pids[1], number)
    codes, out, err = server.end()
    assert codes == [128 + number] * 3 and err == ""
    stopped = int(re.search(r"stopped after step (\d+), saved", out)[1])
    assert stopped < 20 and (run / "checkpoints" / f"step-{stopped}").exists()
    server.good(2, "train", "--output", run, "--resume")
    assert differ(whole, run) < 1e-6


BUG = "import qwen_min.fast.label_scores as m; m.score_batch = lambda *a: 1 / 0"
MEMORY = BUG.replace("1 / 0", "exec('raise MemoryError(12)')")
SLOW = "import time, qwen_min.fast.label_scores as m; m.score_batch = lambda *a: time.sleep(500)"


@pytest.mark.parametrize(
    ("before", "code", "line"),
    [
        (MEMORY, 2, r"error: process 1: out of memory \(12\); lower --batch-tokens, .*\n"),
        (BUG, 1, r"Traceback (.|\n)*ZeroDivisionError: division by zero\n"),
    ],
)
def test_an_error_in_one_ends_all(before, code, line, server):
    """Also those that compute for long."""
    more = ("--calibrate", "--train-data", SAMPLE / "train.tsv")
    before = {0: SLOW, 1: before, 2: SLOW}
    codes, _, err = server.run(3, "evaluate", "--method", "zero_shot", *more, before=before)
    assert codes == [code] * 3 and re.fullmatch(line, err), err


@pytest.mark.parametrize(
    ("script", "name", "old", "new"),
    [
        ("evaluate", "rows.tsv", "好", "坏"),
        ("evaluate", "model/config.json", '"rope_theta": 1', '"rope_theta": 2'),
        ("evaluate", "run/run.json", '"seed": 0', '"seed": 1'),
        ("train", "rows.tsv", "好", "坏"),
        ("train", "model/config.json", '"rope_theta": 1', '"rope_theta": 2'),
        ("train", "run/checkpoints/step-20/manifest.json", "\n", " "),
        ("qwen_min.predict", "rows.tsv", "好", "坏"),
    ],
)
def test_processes_that_see_other_files_are_refused(
    script, name, old, new, server, reference, whole, tmp_path
):
    for rank in "01":
        shutil.copytree(reference[0], tmp_path / rank / "model")
        shutil.copytree(whole, tmp_path / rank / "run")
        shutil.copy(SAMPLE / "test.tsv", tmp_path / rank / "rows.tsv")
    file = tmp_path / "1" / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    argv = {
        "evaluate": ["--model", "model", "--data", "rows.tsv", "--run", "run"],
        "train": ["--method", "lora_head", "--model", "model", "--data", "rows.tsv"],
        "qwen_min.predict": ["rows.tsv"],
    }[script]
    argv = ["--resume", "--output", "run"] if "checkpoints" in name else argv
    before = {rank: f"os.chdir({str(tmp_path / str(rank))!r})" for rank in (0, 1)}
    codes, _, err = server.run(2, script, *argv, before=before)
    differ = "texts" if script == "qwen_min.predict" else "model, run or data"
    found = f"error: processes 0 and 1 (of 0 to 1) differ in their {differ}; give all the same\n"
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


# torchrun itself


def torchrun(size: int, *command: object, **how) -> subprocess.Popen:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, [*run, *command])], env=environment, text=True, **pipes)


def test_torchrun_evaluates(server, tmp_path):
    files = [tmp_path / name for name in ("1.json", "1.jsonl", "2.json", "2.jsonl")]
    how = ("--method", "zero_shot", "--output")
    server.good(1, "evaluate", *how, files[0], "--predictions", files[1])
    process = torchrun(2, REPO / "evaluate.py", *how, files[2], "--predictions", files[3])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.count("accuracy") == 1, err
    assert results(files[2]) == results(files[0])
    assert files[3].read_bytes() == files[1].read_bytes()


def test_torchrun_ends_when_one_is_killed(whole, reference, tmp_path):
    run = tmp_path / "run"
    how = ("--method", "lora_head", *TRAIN, "--epochs", "900", "--model", reference[0])
    process = torchrun(2, REPO / "train.py", *how, "--output", run)
    wait_for(lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = [c for c in children if b"\0RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes()]
    os.kill(int(victim), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert len(re.findall("^error: .*", err, re.MULTILINE)) == 1, err
    assert process.returncode == 1
