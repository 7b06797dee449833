"""The command train.py, and evaluate.py on what it made: small checkpoint, CPU, one thread."""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, make_reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.utils.class_weight import compute_class_weight
from tqdm import tqdm

import evaluate
import train
from lora import lora_parameters
from qwen_min import Classifier
from qwen_min.command import terminal
from qwen_min.errors import UserError
from qwen_min.fast import forms
from qwen_min.files.data import examples_hash, held_out_split, read_examples
from qwen_min.files.run import MANIFEST, WRITTEN, checkpoints
from qwen_min.files.weights import load_model

WORDS = "坏,好"  # of three tokens and of one: neither merges with the template's end
LORA = ["lora_head", "lora_label_scoring"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    make_reference(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The first 48 rows of the sample, cut short: seconds count here, not accuracy."""
    rows = (REPO / "qwen_min/sample/train.tsv").read_text(encoding="utf-8").split("\n")[:49]
    path = tmp_path_factory.mktemp("data") / "train.tsv"
    path.write_text("\n".join(row[:60] for row in rows) + "\n", encoding="utf-8")
    return path


def arguments(method: str, base: Path, data: Path, run: Path, *more: object) -> list[str]:
    given = ["--method", method, "--model", base, "--data", data, "--output", run]
    steps = [] if method == "head_only" else ["--lr", 0.01, "--epochs", 2]
    return [str(a) for a in (*given, "--labels", WORDS, *steps, *more)]


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory) -> dict[str, Path]:
    """One finished run of each method."""
    root = tmp_path_factory.mktemp("runs")
    for method in train.METHODS:
        assert train.main(arguments(method, base, data, root / method)) == 0
    return {method: root / method for method in train.METHODS}


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def write_record(run: Path, **changes: object) -> None:
    (run / "run.json").write_text(json.dumps(record(run) | changes), encoding="utf-8")


def scores_of(capsys, *args: object) -> np.ndarray:
    """Scores (n, C) that evaluate.py writes for the given arguments."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "predictions.jsonl"
        assert evaluate.main([*(str(a) for a in args), "--predictions", str(path)]) == 0
        lines = path.read_text(encoding="utf-8").splitlines()
    capsys.readouterr()
    return np.array([json.loads(line)["scores"] for line in lines])


def one_line(capsys, status: int, *args: object) -> str:
    """Run train.py with `args`, which must end with `status` and one line; returns the line."""
    assert train.main([str(a) for a in args]) == status
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("method", train.METHODS)
def test_a_run_is_complete_and_froze_its_base(method, runs, base):
    run, found = runs[method], record(runs[method])
    assert found["finished"]
    assert found["frozen_before"] == found["frozen_after"]
    assert found["training_rows"] + found["held_out_rows"] == 48
    assert not [path for path in run.rglob("*") if ".partial" in path.name]
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".pkl", ".bin", ".pth")]
    if method == "head_only":
        assert found["trained_parameters"] == 2 * 32 + 2
        return
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == list(range(1, found["steps"] + 1))
    assert {"loss", "lr", "tokens_per_s"} <= steps[0].keys()
    kept = [step for step, _ in checkpoints(run)]
    assert set(kept) == {found["best_step"], found["steps"]}
    best = run / "checkpoints" / f"step-{found['best_step']}" / "adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run / "adapter" / name).read_bytes() == (best / name).read_bytes()


@pytest.mark.parametrize("method", train.METHODS)
def test_evaluation_in_a_new_process_is_equal_to_the_bit(method, runs, data, capsys):
    here = scores_of(capsys, "--run", runs[method], "--data", data)
    again = scores_of(capsys, "--run", runs[method], "--data", data)
    assert np.array_equal(here, again)
    command = [sys.executable, "evaluate.py", "--run", runs[method], "--data", data]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    (path,) = runs[method].glob("predictions-[0-9a-f]*.jsonl")
    there = [json.loads(line)["scores"] for line in path.read_text().splitlines()]
    assert np.array_equal(here, np.array(there))
    (results,) = runs[method].glob("results-[0-9a-f]*.json")
    assert json.loads(results.read_text())["examples_hash"][:12] in results.name


def test_transplanted_head_is_the_same_head_on_the_bare_base(runs, base, data, capsys):
    from qwen_min.fast.features import pooled_features
    from qwen_min.prompt import build_prompts
    from qwen_min.tokenizer import Tokenizer

    run = runs["lora_head"]
    found = scores_of(capsys, "--method", "transplanted_head", "--run", run, "--data", data)
    weight = load_file(run / "adapter/adapter_model.safetensors")["base_model.model.score.weight"]
    words = WORDS.split(",")
    texts = [example.text for example in read_examples(data, words)]
    prompts = build_prompts(Tokenizer(base), texts, labels=words)
    features = pooled_features(load_model(base), prompts, "last", False, 2048)[:, 0]
    np.testing.assert_allclose(found, (features @ weight.T).numpy(), atol=1e-5)
    adapted = scores_of(capsys, "--run", run, "--data", data)
    assert np.abs(found - adapted).max() > 1e-2


def test_peft_gives_our_label_scores(runs, base, data, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qwen_min.prompt import build_prompts
    from qwen_min.tokenizer import Tokenizer

    run, words = runs["lora_label_scoring"], WORDS.split(",")
    ours = scores_of(capsys, "--run", run, "--data", data, "--limit", 5)
    reference = AutoModelForCausalLM.from_pretrained(base)
    reference = PeftModel.from_pretrained(reference, run / "adapter").eval()
    texts = [example.text for example in read_examples(data, words, limit=5)]
    for row, prompt in enumerate(build_prompts(Tokenizer(base), texts, labels=words)):
        for column, label in enumerate(prompt.labels):
            ids = torch.tensor([[*prompt.ids, *label]])
            with torch.no_grad():
                log_probs = reference(ids).logits[0].log_softmax(-1)
            places = range(len(prompt.ids) - 1, ids.shape[1] - 1)
            expected = sum(log_probs[p, t].item() for p, t in zip(places, label, strict=True))
            # fp32 rounding of log-probabilities of some tens.
            assert ours[row, column] == pytest.approx(expected, abs=1e-4)


def test_peft_gives_our_class_logits(runs, base, data, capsys):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from qwen_min.prompt import build_prompts
    from qwen_min.tokenizer import Tokenizer

    run, words = runs["lora_head"], WORDS.split(",")
    ours = scores_of(capsys, "--run", run, "--data", data, "--limit", 5)
    reference = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, pad_token_id=0
    )
    reference = PeftModel.from_pretrained(reference, run / "adapter").eval()
    texts = [example.text for example in read_examples(data, words, limit=5)]
    for row, prompt in enumerate(build_prompts(Tokenizer(base), texts, labels=words)):
        with torch.no_grad():
            expected = reference(torch.tensor([prompt.ids])).logits[0]
        np.testing.assert_allclose(ours[row], expected.numpy(), atol=1e-4)


def test_an_adapter_that_peft_wrote_evaluates_here(base, data, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(tmp_path / "peft")
    common = ["--model", base, "--data", data, "--labels", WORDS]
    ours = scores_of(
        capsys, "--method", "lora_label_scoring", "--adapter", tmp_path / "peft", *common
    )
    peft.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "merged" / name).write_bytes((base / name).read_bytes())
    common[1] = tmp_path / "merged"
    np.testing.assert_allclose(scores_of(capsys, "--method", "zero_shot", *common), ours, atol=1e-4)


def test_merge_is_loaded_by_transformers_and_by_us(runs, base, data, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    run, out = runs["lora_label_scoring"], tmp_path / "merged it's"
    assert train.main(["--resume", "--output", str(run), "--merge", str(out)]) == 0
    said = capsys.readouterr().out
    assert "rounded" not in said  # fp32
    typed = shlex.split(said.split("used with ")[1].split("; prompt.json")[0])
    assert typed[:4] == ["--model", str(out), "--labels", WORDS]
    ours = scores_of(capsys, "--run", run, "--data", data)
    merged = scores_of(capsys, "--method", "zero_shot", "--data", data, *typed)
    np.testing.assert_allclose(merged, ours, atol=1e-4)
    reference, plain = AutoModelForCausalLM.from_pretrained(out), load_model(out)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            plain.logits(plain(ids)), reference(ids).logits, atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("more", [("--layer", "best"), ("--pooling", "mean"), ("--layer", 1)])
def test_probe_settings(more, base, data, tmp_path, capsys):
    assert train.main(arguments("head_only", base, data, tmp_path / "run", *more)) == 0
    found = record(tmp_path / "run")
    if more[1] == "best":
        losses = {int(k): v["held_out_log_loss"] for k, v in found["layers"].items()}
        assert sorted(losses) == [0, 1, 2, 3]
        assert found["layer"] == min(losses, key=losses.get)
        assert capsys.readouterr().out.count("\n") >= 5  # each layer's accuracy is shown
    scores_of(capsys, "--run", tmp_path / "run", "--data", data)


def test_a_probe_on_adapted_features(runs, base, data, tmp_path, capsys):
    plain, adapted = runs["head_only"], tmp_path / "run"
    adapter = runs["lora_label_scoring"] / "adapter"
    args = arguments("head_only", base, data, adapted, "--adapter", adapter)
    assert train.main(args) == 0
    capsys.readouterr()
    a, b = (scores_of(capsys, "--run", run, "--data", data) for run in (plain, adapted))
    assert np.abs(a - b).max() > 1e-3


def test_features_are_computed_once(base, data, tmp_path, monkeypatch):
    first = arguments("head_only", base, data, tmp_path / "a")
    assert train.main(first) == 0
    monkeypatch.setattr(forms, "pooled_features", None)  # a forward would now raise
    cache = ["--feature-cache", tmp_path / "a" / "features"]
    assert train.main(arguments("head_only", base, data, tmp_path / "b", *cache)) == 0


def flipped(path: Path, tensors: dict) -> None:
    """One bit of the first number: its sign."""
    whole = bytearray(path.read_bytes())
    whole[8 + int.from_bytes(whole[:8], "little") + 3] ^= 0x80
    path.write_bytes(whole)


def rewritten(change) -> Callable[[Path, dict], None]:
    """The features changed, and all else as it was."""

    def rewrite(path: Path, tensors: dict) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file({"features": change(tensors["features"])}, path, metadata)

    return rewrite


DAMAGE = {
    "a flipped bit": flipped,
    "a row too few": rewritten(lambda features: features[:-1].clone()),
    "other rows": rewritten(lambda features: features.flip(0)),
    "another dtype": rewritten(lambda features: features.double()),
    "a number": rewritten(lambda features: features[0, 0, 0]),
    "no hash": lambda path, tensors: save_file(tensors, path),
    "a pipe": lambda path, tensors: path.unlink() or os.mkfifo(path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_kept_features_that_were_changed_are_computed_again(damage, runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs["head_only"], run)
    (run / "head.safetensors").unlink()
    write_record(run, finished=False)
    (path,) = (run / "features").iterdir()
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not the mapping
    DAMAGE[damage](path, whole)
    if damage == "a pipe":  # this is not replaced
        assert "not a regular file" in one_line(capsys, 2, "--resume", "--output", run)
        return
    assert train.main(["--resume", "--output", str(run)]) == 0
    expected = load_file(runs["head_only"] / "head.safetensors")
    found = load_file(run / "head.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(load_file(path)["features"], whole["features"])
    capsys.readouterr()


@pytest.mark.parametrize("method", LORA)
def test_bf16_base_trains_and_stays_frozen(method, base, data, tmp_path):
    args = arguments(method, base, data, tmp_path / "run", "--dtype", "bfloat16", "--epochs", 1)
    assert train.main(args) == 0
    found = record(tmp_path / "run")
    assert found["frozen_before"] == found["frozen_after"]
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    moved = [t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name]
    assert all(moved)


# --- faults that need a killed process -----------------------------------------------------------


def in_child(args: list[str], prepare=lambda: None) -> int:
    """Fork; the child runs train.py with `args` and exits. Returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:  # in the child: nothing of pytest's may run after this
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        # The default lock is shared by forked processes: one killed with it blocks all others.
        tqdm.set_lock(threading.RLock())
        prepare()
        os._exit(train.main(args))
    finally:
        os._exit(99)


def result_bytes(run: Path) -> dict[str, bytes]:
    """Weights and optimizer state at the end, and the best adapter."""
    _, last = checkpoints(run)[-1]
    paths = [*last.rglob("*.safetensors"), *(run / "adapter").iterdir()]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def wait_for_lines(log: Path, more: int) -> None:
    """Until the log has so many lines more than now: fast machines and slow ones get as far."""
    before = log.read_text().count("\n") if log.exists() else 0
    deadline = time.monotonic() + 30
    while more and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") >= before + more:
            return
        time.sleep(0.002)


@pytest.mark.parametrize("method", LORA)
def test_twenty_kills_change_no_byte(method, base, data, tmp_path):
    """SIGKILL at 20 random moments, every other one inside a save, and resumed each time."""
    more = ["--save-every", 1, "--eval-every", 4, "--epochs", 20]
    args = arguments(method, base, data, tmp_path / "whole", *more)
    assert os.waitpid(in_child(args), 0)[1] == 0
    rng, run, seen = random.Random(0), tmp_path / "killed", -1

    def die_in_a_save(countdown: int) -> None:
        """The process kills itself at its n-th rename or sync; saves are made of these."""
        replace, fsync = os.replace, os.fsync

        def counted(*args):
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return (replace if len(args) == 2 else fsync)(*args)

        os.replace = os.fsync = counted

    kills = 0
    while kills < 20:
        started = (run / "run.json").exists()
        args = arguments(method, base, data, run, *more, *["--resume"] * started)
        if kills % 2:
            child = in_child(args, lambda: die_in_a_save(rng.randint(2, 60)))
        else:
            child = in_child(args)
            wait_for_lines(run / "log.jsonl", rng.randint(0, 3))
            time.sleep(rng.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if (run / "run.json").exists():
            steps = [step for step, _ in checkpoints(run)]  # raises for one that is not whole
            assert max(steps, default=-1) >= seen  # none that was seen is lost
            seen = max(steps, default=-1)
            assert not record(run)["finished"], "the run is too short for so many kills"
        kills += os.WIFSIGNALED(status)
    args = arguments(method, base, data, run, *more, "--resume")
    assert os.waitpid(in_child(args), 0)[1] == 0
    assert result_bytes(run) == result_bytes(tmp_path / "whole")
    logs = [(path / "log.jsonl").read_text() for path in (run, tmp_path / "whole")]
    killed, whole = ([json.loads(line) for line in log.splitlines()] for log in logs)
    assert [(x["step"], x["loss"]) for x in killed] == [(x["step"], x["loss"]) for x in whole]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number, status, base, data, tmp_path):
    run = tmp_path / "run"
    args = arguments("lora_head", base, data, run, "--epochs", 50, "--save-every", 1000)
    args += ["--export", str(tmp_path / "my model")]
    command = [sys.executable, str(REPO / "train.py"), *args, "--eval-every", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    log = run / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status
    again = shlex.split(out.decode().split("continue with: ")[1])
    assert again[2:] == ["--resume", "--output", str(run), "--export", str(tmp_path / "my model")]
    ((step, _),) = checkpoints(run)
    assert len(log.read_text().splitlines()) == step >= 3
    assert not record(run)["finished"]


def start(*args: object) -> subprocess.Popen:
    """train.py in a process of its own, with its output in pipes."""
    command = [sys.executable, str(REPO / "train.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_trainings_in_one_new_directory_one_is_refused(base, data, tmp_path):
    run = tmp_path / "runs" / "new"
    both = [
        start(*arguments("lora_head", base, data, run, "--seed", seed, "--epochs", 4))
        for seed in (0, 1)
    ]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in both]
    assert sorted(status for _, status in ends) == [0, 2]
    for seed, (err, status) in enumerate(ends):
        if status == 0:
            assert record(run)["arguments"]["seed"] == seed and record(run)["finished"]
        else:
            assert (
                err.startswith(f"error: {run}: another training is running")
                and err[:-1].isprintable()
            )
    alone = arguments("lora_head", base, data, tmp_path / "alone", "--epochs", 4)
    seed = record(run)["arguments"]["seed"]
    assert train.main([*alone, "--seed", str(seed)]) == 0
    assert result_bytes(run) == result_bytes(tmp_path / "alone")


@pytest.mark.parametrize("again", ["new", "resume"])
def test_beside_a_running_training_nothing_starts_until_it_is_killed(
    again, base, data, tmp_path, capsys
):
    run = tmp_path / "run"
    args = arguments("lora_head", base, data, run, "--epochs", 500, "--save-every", 5)
    process = start(*args)
    wait_for_lines(run / "log.jsonl", 6)
    started = time.monotonic()
    line = one_line(capsys, 2, *args, *["--resume"] * (again == "resume"))
    assert time.monotonic() - started < 1
    assert f"{run}: another training is running in it; wait" in line
    assert process.poll() is None
    process.kill()
    process.communicate()
    if again == "new":
        assert "add --resume" in one_line(capsys, 2, *args)
        return
    steps = [step for step, _ in checkpoints(run)]
    assert steps and not record(run)["finished"]
    child = in_child([*args, "--resume"])
    wait_for_lines(run / "log.jsonl", 3)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert checkpoints(run)[-1][0] > max(steps)
    numbers = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert numbers == list(range(1, checkpoints(run)[-1][0] + 1))


# --- one line, and the status --------------------------------------------------------------------


def test_non_finite_loss_stops_before_the_step(base, data, tmp_path, capsys, monkeypatch):
    real, calls = forms.label_losses, []

    def poisoned(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(forms, "label_losses", poisoned)
    run = tmp_path / "run"
    args = arguments("lora_label_scoring", base, data, run, "--save-every", 2)
    line = one_line(capsys, 1, *args, "--batch-tokens", 4096)  # one forward a step
    assert "step 5" in line
    named = [int(row) for row in line.split("rows [")[1].split("]")[0].split(", ")]
    training, _ = held_out_split(read_examples(data, WORDS.split(",")))
    # Lines of the file, whose first is the header; the fifth step's eight rows.
    assert len(named) == 8
    assert set(named) <= {row + 2 for row in training}
    assert [step for step, _ in checkpoints(run)][-1] == 4
    assert not record(run)["finished"]


def test_other_base_is_refused(runs, data, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    model = make_reference(other)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for args in (
        ["--run", runs["lora_head"]],
        ["--method", "lora_label_scoring", "--adapter", runs["lora_label_scoring"] / "adapter"],
    ):
        args = [*args, "--model", other, "--labels", WORDS, "--data", data]
        assert evaluate.main([str(a) for a in args]) == 2
        assert "fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(sorted(t)[0]), "is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is unexpected"),
    ],
)
def test_an_adapter_with_other_keys_is_refused(change, said, runs, data, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs["lora_label_scoring"], run)
    path = run / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert evaluate.main(["--run", str(run), "--data", str(data)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "run"),
    [
        ("transplanted_head", "head_only"),
        ("transplanted_head", "lora_label_scoring"),
        ("lora_head", "lora_label_scoring"),
        ("zero_shot", "lora_head"),
    ],
)
def test_a_run_of_another_method_is_refused(method, run, runs, data, capsys):
    args = ["--method", method, "--run", str(runs[run]), "--data", str(data)]
    assert evaluate.main(args) == 2
    err = capsys.readouterr().err
    assert f"a run of {run}" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("run", "lost"),
    [
        ("lora_label_scoring", "adapter"),
        ("lora_head", "adapter"),
        ("head_only", "head.safetensors"),
    ],
)
def test_a_run_without_its_result_is_refused(run, lost, runs, data, tmp_path, capsys):
    """Never the bare base in its place."""
    shutil.copytree(runs[run], tmp_path / "run")
    (tmp_path / "run" / lost).rename(tmp_path / "elsewhere")
    assert evaluate.main(["--run", str(tmp_path / "run"), "--data", str(data)]) == 2
    err = capsys.readouterr().err
    assert lost in err and err.count("\n") == 1


def test_a_classifiers_adapter_scores_no_labels(runs, base, data, capsys):
    args = ["--method", "lora_label_scoring", "--adapter", runs["lora_head"] / "adapter"]
    args += ["--model", base, "--data", data, "--labels", WORDS]
    assert evaluate.main([str(a) for a in args]) == 2
    assert "head" in capsys.readouterr().err


def test_a_heads_classes_keep_their_names(runs, data, capsys):
    args = ["--run", runs["lora_head"], "--data", data, "--labels", "好,坏"]
    assert evaluate.main([str(a) for a in args]) == 2
    assert WORDS in capsys.readouterr().err


@pytest.fixture(scope="module")
def read(runs, base, data, tmp_path_factory) -> Path:
    """Copies of what evaluations read: run, probe, base; a hub's cache; links to parts of them."""
    root = tmp_path_factory.mktemp("read")
    for source, name in ((runs["lora_label_scoring"], "run"), (runs["head_only"], "probe")):
        shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("*-*.json*"))
    shutil.copytree(base, root / "base")
    shutil.copytree(base, root / "cache" / "blobs")
    (root / "cache" / "snapshot").mkdir()
    for path in (root / "cache" / "blobs").iterdir():
        (root / "cache" / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    for name in ("train.tsv", "test.tsv"):
        shutil.copy(data, root / name)
    for run in ("run", "probe"):
        own = record(root / run)["arguments"] | {"data": str(root / "train.tsv")}
        write_record(root / run, arguments=own)
    (root / "link.json").symlink_to("base/config.json")
    (root / "new.json").symlink_to("base/chat_template.jinja")  # absent, but would be read
    (root / "results.json").symlink_to("run/run.json")
    os.link(root / "run" / "run.json", root / "hard.json")
    (root / "other").symlink_to("run")
    (root / "run" / "parent").symlink_to("..")
    return root


RUN, PROBE = ["--run", "run"], ["--run", "probe", "--model", "base"]
ADAPTED = ["--method", "lora_label_scoring", "--adapter", "run/adapter", "--model", "base"]
CACHED = ["--method", "zero_shot", "--model", "cache/snapshot", "--train-data", "train.tsv"]
INPUTS = [
    *[(RUN, f"run/{name}") for name in WRITTEN],
    *[(RUN, f"run/adapter/adapter_{name}") for name in ("config.json", "model.safetensors")],
    *[(RUN, name) for name in ("results.json", "hard.json", "other/run.json", "run/notes.txt")],
    *[(RUN, name) for name in ("test.tsv", "train.tsv")],
    *[(PROBE, name) for name in ("probe/head.safetensors", "base/config.json", "link.json")],
    *[(ADAPTED, name) for name in ("run/adapter/adapter_config.json", "new.json")],
    *[(CACHED, f"cache/{name}/config.json") for name in ("snapshot", "blobs")],
    (CACHED, "train.tsv"),
]


@pytest.mark.parametrize(("args", "path"), INPUTS, ids=str)
@pytest.mark.parametrize("option", ["--output", "--predictions"])
def test_no_output_replaces_what_an_evaluation_reads(option, args, path, read, capsys, monkeypatch):
    monkeypatch.chdir(read)
    before = contents(read)
    status = evaluate.main([*args, "--data", "test.tsv", "--labels", WORDS, option, path])
    err = capsys.readouterr().err.strip().split("\n")
    assert (status, len(err)) == (2, 1)
    assert err[0].startswith(f"error: {path}: is already the data") and "elsewhere" in err[0]
    assert contents(read) == before


def test_results_have_their_names_in_a_directory_that_is_read(read, capsys, monkeypatch):
    monkeypatch.chdir(read)
    for _ in range(2):  # the second time they are replaced
        assert evaluate.main(["--run", "run", "--data", "test.tsv"]) == 0
        output = ["--output", "run/results.json", "--predictions", "run/predictions.jsonl"]
        assert evaluate.main(["--run", "run", "--data", "test.tsv", *output]) == 0
    made = {path.name for path in Path("run").iterdir()} - {*WRITTEN, "parent"}
    assert len(made) == 4 and {"results.json", "predictions.jsonl"} < made
    assert evaluate.main(["--run", "run", "--data", "test.tsv", "--output", "beside.json"]) == 0
    Path("beside.json").unlink()
    monkeypatch.chdir("base")
    method = ["--method", "zero_shot", "--model", ".", "--data", "../test.tsv", "--labels", WORDS]
    assert evaluate.main([*method, "--output", "results.json"]) == 0
    Path("results.json").unlink()
    capsys.readouterr()


def test_other_settings_are_another_file(runs, data, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs["lora_label_scoring"], run)
    for path in run.glob("*-*.json*"):
        path.unlink()
    for more in ([], ["--max-text-tokens", "3"], ["--template", "{text}\\n"]):
        assert evaluate.main(["--run", str(run), "--data", str(data), *more]) == 0
    assert len(list(run.glob("results-*.json"))) == 3
    capsys.readouterr()


@pytest.mark.parametrize("more", [("--alpha", 0), ("--layer", 99), ("--adapter", "nowhere")])
def test_a_mistake_leaves_no_run_behind(more, base, data, tmp_path, capsys):
    method = "lora_head" if more[0] == "--alpha" else "head_only"
    one_line(capsys, 2, *arguments(method, base, data, tmp_path / "run", *more))
    assert train.main(arguments(method, base, data, tmp_path / "run")) == 0
    capsys.readouterr()


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every file in a directory with its bytes, and every directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize("method", train.METHODS)
def test_output_that_holds_any_part_of_a_run_is_refused(method, runs, base, data, tmp_path, capsys):
    """Whatever a training and an evaluation of this method write: each part alone stops a run."""
    run = tmp_path / "run"
    shutil.copytree(runs[method], run)
    assert evaluate.main(["--run", str(run), "--data", str(data)]) == 0
    capsys.readouterr()
    parts = list(run.iterdir())
    assert len(parts) >= 5
    assert "--resume" in one_line(capsys, 2, *arguments(method, base, data, run))
    for part in parts:
        used = tmp_path / f"with {part.name}"
        used.mkdir()
        part.rename(used / part.name)
        (used / "notes").write_text("the user's")
        before = contents(used)
        line = one_line(capsys, 2, *arguments("lora_head", base, data, used))
        assert f"holds {part.name}, " in line and "another directory" in line
        assert contents(used) == before


@pytest.mark.parametrize(
    "place", ["run/merged", "run/adapter", "run", "base/merged", "base", "link"]
)
def test_merge_stays_out_of_what_is_read_and_of_the_run(place, base, data, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "link").symlink_to("base/new")
    before = contents(tmp_path)
    args = arguments("lora_label_scoring", tmp_path / "base", data, tmp_path / "run")
    line = one_line(capsys, 2, *args, "--merge", tmp_path / place)
    assert "lies in a directory" in line or "exists already" in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flag", ["--lr", "--r", "--seed", "--batch-size", "--max-text-tokens"])
def test_resume_with_another_argument_names_it(flag, runs, capsys):
    value = {"--lr": "0.5"}.get(flag, "77")
    line = one_line(capsys, 2, "--resume", "--output", runs["lora_head"], flag, value)
    assert flag in line and value in line


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("[]", "expected an object"),
        ('{"step": 4, "seconds": 1.0}', "history is None, expected type list"),
        ('{"step": "4", "seconds": 1.0, "history": []}', "step is '4', expected type int"),
        ('{"step": 4, "seconds": 1.0, "history": [{"step": 4}]}', "held_out_log_loss is None"),
        ("[" * 100_000, ""),
    ],
)
def test_a_state_that_is_none_is_refused(state, said, runs, tmp_path, capsys):
    """With a manifest that agrees: what is checked is the content."""
    run = tmp_path / "run"
    shutil.copytree(runs["lora_head"], run)
    write_record(run, finished=False)
    _, checkpoint = checkpoints(run)[-1]
    (checkpoint / "state.json").write_text(state)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["state.json"] = [len(state), hashlib.sha256(state.encode()).hexdigest()]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    before = contents(run)
    line = one_line(capsys, 2, "--resume", "--output", run)
    assert f"{checkpoint}/state.json: not a training's state (" in line
    assert "--resume" in line and said in line
    assert contents(run) == before


def test_a_directory_that_is_removed_in_training_is_one_line(
    base, data, tmp_path, capsys, monkeypatch
):
    run, real = tmp_path / "run", forms.head_losses

    def removing(*args):
        shutil.rmtree(run, ignore_errors=True)
        return real(*args)

    monkeypatch.setattr(forms, "head_losses", removing)
    line = one_line(capsys, 2, *arguments("lora_head", base, data, run))
    assert "log.jsonl: cannot be written (No such file or directory)" in line


def test_resume_with_other_data_is_refused(runs, base, data, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs["lora_head"], run)
    changed = tmp_path / "train.tsv"
    changed.write_text(data.read_text(encoding="utf-8") + "1\t多一行\n", encoding="utf-8")
    found = record(run)
    found["arguments"]["data"] = str(changed)
    (run / "run.json").write_text(json.dumps(found), encoding="utf-8")
    assert "data" in one_line(capsys, 2, "--resume", "--output", run)


def test_a_moved_model_and_a_copy_of_the_data_go_on(runs, base, data, tmp_path, capsys):
    shutil.copytree(runs["lora_head"], tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    shutil.copy(data, tmp_path / "copy.tsv")
    args = ["--resume", "--output", tmp_path / "run", "--model", tmp_path / "base"]
    assert train.main([str(a) for a in [*args, "--data", tmp_path / "copy.tsv"]]) == 0
    assert "finished" in capsys.readouterr().out


BAD = {
    "no method": ([], "--method is missing"),
    "nothing to train": (["--method", "lora_label_scoring", "--lora-targets", "none"], "none"),
    "export of a bias": (["--method", "head_only", "--export", "x"], "--export: head_only's head"),
    "system without chat": (["--method", "lora_head", "--system", "x"], "--chat"),
    "chat and its markup": (
        ["--method", "lora_head", "--chat", "--template", "<|im_start|>{text}"],
        "chat markup already",
    ),
    "adapter elsewhere": (["--method", "lora_head", "--adapter", "x"], "--adapter"),
    "no rate": (["--method", "lora_head", "--lr", "0"], "expected a number above 0 and below 1"),
    "dropout of one": (
        ["--method", "lora_head", "--dropout", "1"],
        "a number of at least 0 and below 1",
    ),
    "no such layer": (["--method", "head_only", "--layer", "4"], "--layer"),
    "no adapter there": (["--method", "head_only", "--adapter", "nowhere"], "nowhere"),
    "resume of nothing": (["--resume", "--output", "nowhere"], "nowhere"),
    "resume of no directory": (["--resume"], "--output"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, said = BAD[case]
    common = ["--model", base, "--data", data, "--labels", WORDS]
    line = one_line(capsys, 2, *args, *([] if "--resume" in args or case == "no model" else common))
    assert said in line


def test_a_class_without_training_rows_is_refused(base, tmp_path, capsys):
    path = tmp_path / "one.tsv"
    path.write_text("label\ttext\n" + "".join(f"1\t第{i}条\n" for i in range(20)), encoding="utf-8")
    line = one_line(capsys, 2, *arguments("lora_head", base, path, tmp_path / "run"))
    assert "坏" in line
    assert not (tmp_path / "run").exists()


def test_targets_by_name(base, data, tmp_path, capsys):
    args = arguments("lora_head", base, data, tmp_path / "run", "--lora-targets")
    assert "query_proj" in one_line(capsys, 2, *args, "q_proj,query_proj")
    assert train.main([*args, "q_proj,down_proj"]) == 0
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "down_proj"]
    capsys.readouterr()


def test_evaluation_leaves_train_mode_on_and_dropout_off(base, data, tmp_path, monkeypatch):
    """The held-out evaluation inside training must not disturb it, nor be disturbed."""
    modes = []
    features, step = forms.pooled_features, forms.head_losses

    def noted_features(model, *args):
        modes.append(("evaluation", model.training))
        first, second = features(model, *args), features(model, *args)
        assert torch.equal(first, second)
        return first

    def noted_step(model, *args):
        modes.append(("step", model.training))
        return step(model, *args)

    monkeypatch.setattr(forms, "pooled_features", noted_features)
    monkeypatch.setattr(forms, "head_losses", noted_step)
    args = arguments("lora_head", base, data, tmp_path / "run", "--dropout", 0.5, "--eval-every", 2)
    assert train.main(args) == 0
    assert set(modes) == {("evaluation", False), ("step", True)}
    assert modes.index(("evaluation", False)) < len(modes) - 2  # with steps after it


def test_only_lora_and_head_have_gradients(base, data, tmp_path, monkeypatch):
    seen = {}
    real = train.fit

    def noted(run, training, *args):
        found = real(run, training, *args)
        seen["parameters"] = training.parameters
        return found

    models = []
    load = train.load_model
    monkeypatch.setattr(train, "fit", noted)
    monkeypatch.setattr(train, "load_model", lambda *a: models.append(load(*a)) or models[-1])
    assert train.main(arguments("lora_head", base, data, tmp_path / "run")) == 0
    (model,) = models
    ours = {id(p) for p in lora_parameters(model).values()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in ours), name
        assert parameter.requires_grad or parameter.grad is None, name
    assert set(seen["parameters"]) == {*lora_parameters(model), "score"}


def test_a_best_checkpoint_that_was_removed_is_not_published(base, data, tmp_path, capsys):
    """The advice for a damaged checkpoint is to remove it and to resume."""
    run = tmp_path / "run"
    args = arguments("lora_head", base, data, run, "--eval-every", 2)
    assert train.main(args) == 0
    steps, log = record(run)["steps"], []
    path = run / "checkpoints" / f"step-{steps}" / "state.json"
    state = json.loads(path.read_text())
    for entry in state["history"]:  # step 4 is the best, then 2, then the last
        entry["held_out_log_loss"] = {2: 0.2, 4: 0.1, steps: 0.3}.get(entry["step"], 0.9)
    path.write_text(json.dumps(state))
    manifest = json.loads((path.parent / MANIFEST).read_text())
    text = path.read_bytes()
    manifest["state.json"] = [len(text), hashlib.sha256(text).hexdigest()]
    (path.parent / MANIFEST).write_text(json.dumps(manifest))
    for step, directory in checkpoints(run):
        if step != steps:
            shutil.rmtree(directory)
    write_record(run, finished=False)
    capsys.readouterr()
    assert train.main(["--resume", "--output", str(run)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {run}: no checkpoint of steps [2, 4]")
    found = record(run)
    assert found["best_step"] == steps
    log = [entry["step"] for entry in found["history"]]
    assert log == [e["step"] for e in state["history"] if e["step"] not in (2, 4)]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run / "adapter" / name).read_bytes() == (
            path.parent / "adapter" / name
        ).read_bytes()


def other_alpha(run: Path, other: Path) -> None:
    path = run / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 16.0', '"lora_alpha": 17.0'))


def other_seed(run: Path, other: Path) -> None:
    shutil.copy(other / "adapter/adapter_model.safetensors", run / "adapter")


def other_bit(name: str) -> Callable[[Path, Path], None]:
    def change(run: Path, other: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[-2] ^= 1  # little-endian fp32: the last tensor's last value, still finite
        (run / name).write_bytes(data)

    return change


VECTORS_RUN = ["--train-embeddings"]
RESULTS = [
    ("lora_label_scoring", [], other_alpha),
    ("lora_head", [], other_seed),
    ("lora_head", [], other_bit("adapter/adapter_model.safetensors")),
    ("head_only", [], other_bit("head.safetensors")),
    ("lora_label_scoring", VECTORS_RUN, other_bit("embeddings.safetensors")),
]


@pytest.mark.parametrize(("method", "more", "change"), RESULTS)
def test_a_result_that_is_not_the_runs_is_refused(
    method, more, change, base, data, tmp_path, capsys
):
    run, other = tmp_path / "run", tmp_path / "other"
    args = arguments(method, base, data, run, *more)
    assert train.main(args) == 0
    if change is other_seed:
        args = arguments(method, base, data, other, "--seed", 1)
        assert train.main(args) == 0
    evaluation = ["--run", str(run), "--data", str(data)]
    assert evaluate.main(evaluation) == 0
    change(run, other)
    capsys.readouterr()
    commands = [lambda: evaluate.main(evaluation)]
    if method == "lora_head":
        commands.append(lambda: evaluate.main([*evaluation, "--method", "transplanted_head"]))
    if method == "lora_label_scoring":
        merged = str(tmp_path / "merged")
        commands.append(lambda: train.main(["--resume", "--output", str(run), "--merge", merged]))
    for command in commands:
        assert command() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"error: {run}: " in line and "is not what its training wrote" in line
    with pytest.raises(UserError, match="is not what its training wrote"):
        Classifier.from_run(run, "cpu")
    write_record(run, result_hash=None)  # as of an older version: not known
    assert evaluate.main(evaluation) == 0


@pytest.mark.parametrize("name", ["head.safetensors", "adapter", "adapter/x", "run.json", "link"])
def test_features_stay_out_of_a_runs_own_files(name, base, data, tmp_path, capsys):
    (tmp_path / "link").symlink_to("run/adapter")
    cache = tmp_path / name if name == "link" else tmp_path / "run" / name
    args = arguments("head_only", base, data, tmp_path / "run", "--feature-cache", cache)
    assert "a run writes there" in one_line(capsys, 2, *args)
    assert not (tmp_path / "run").exists()
    args[-1] = str(tmp_path / "run" / "features-2")
    assert train.main(args) == 0


def test_features_stay_out_of_the_model(base, data, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "base")
    args = arguments("head_only", tmp_path / "base", data, tmp_path / "run")
    line = one_line(capsys, 2, *args, "--feature-cache", tmp_path / "base")
    assert "a directory that is read" in line
    assert contents(tmp_path / "base") == contents(base)


# --- class weights, and a held-out file of one's own ----------------------------------------------


def logged(run: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", LORA)
def test_class_weights_multiply_the_losses(method, base, data, tmp_path, capsys):
    """With twice the weight on each class, a step's loss doubles; --plain weighs the same."""
    losses, more = {}, ["--dropout", 0, "--epochs", 1, "--dtype", "float32", "--batch-size", 4]
    for name, given in {
        "none": [],
        "twice": ["--class-weights", "2,2"],
        "unequal": ["--class-weights", "1,3"],
        "plain": ["--class-weights", "1,3", "--plain"],
    }.items():
        assert train.main(arguments(method, base, data, tmp_path / name, *more, *given)) == 0
        losses[name] = logged(tmp_path / name, "loss")
    assert losses["twice"][0] == pytest.approx(2 * losses["none"][0], rel=1e-6)
    assert abs(losses["unequal"][0] - losses["none"][0]) > 0.1
    # fp32 sums in another order, in ten steps from the same start.
    np.testing.assert_allclose(losses["plain"], losses["unequal"], rtol=1e-4)
    assert record(tmp_path / "none")["class_weights"] is None
    assert record(tmp_path / "unequal")["class_weights"] == [1, 3]
    plain, fast = (record(tmp_path / name)["history"] for name in ("plain", "unequal"))
    for a, b in zip(plain, fast, strict=True):
        assert a["held_out_log_loss"] == pytest.approx(b["held_out_log_loss"], rel=1e-3)


def test_balanced_weights_are_of_the_rows_trained_on(base, data, tmp_path, capsys):
    lines = data.read_text(encoding="utf-8").splitlines()
    rare = [line for line in lines[1:] if line[0] == "1"][:7]
    lines = [lines[0], *rare, *(line for line in lines[1:] if line[0] == "0")]
    path = tmp_path / "rare.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = tmp_path / "run"
    args = arguments("head_only", base, path, run, "--class-weights", "balanced")
    assert train.main(args) == 0
    examples = read_examples(path, WORDS.split(","))
    classes = np.array([examples[i].label for i in held_out_split(examples)[0]])
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=classes)
    np.testing.assert_allclose(record(run)["class_weights"], expected, rtol=1e-12)
    assert np.mean(expected[classes]) == pytest.approx(1)
    capsys.readouterr()
    other = one_line(capsys, 2, "--resume", "--output", run, "--class-weights", "1,1")
    assert "--class-weights is '1,1' but the run has 'balanced'" in other


@pytest.mark.parametrize(
    "given", ["0,1", "-1,2", "nan,1", "inf,1", "1", "1,2,3", "even", "", "1e-320,1"]
)
def test_weights_that_are_none_are_one_line(given, base, data, tmp_path, capsys):
    args = arguments("head_only", base, data, tmp_path / "run", f"--class-weights={given}")
    line = one_line(capsys, 2, *args)
    assert (
        f"--class-weights {given!r}: expected balanced, or a number above 0 for each of 坏, 好"
        in line
    )
    assert not (tmp_path / "run").exists()


@pytest.fixture
def parts(data, tmp_path) -> tuple[Path, Path]:
    """The rows of `data` to train on and those that are held out, as two files."""
    lines = data.read_text(encoding="utf-8").splitlines()
    files = []
    for rows in held_out_split(read_examples(data, WORDS.split(","))):
        files.append(tmp_path / f"part{len(files)}.tsv")
        content = "\n".join([lines[0], *(lines[row + 1] for row in rows)])
        files[-1].write_text(content + "\n", encoding="utf-8")
    return tuple(files)


@pytest.mark.parametrize("method", train.METHODS)
def test_a_held_out_file_does_what_a_held_out_part_does(
    method, runs, base, parts, tmp_path, capsys
):
    training, dev = parts
    run, whole = tmp_path / "run", record(runs[method])
    assert train.main(arguments(method, base, training, run, "--dev", dev)) == 0
    assert capsys.readouterr().err == ""
    found = record(run)
    for name in ("training_rows", "held_out_rows"):
        assert found[name] == whole[name]
    hashes = [examples_hash(read_examples(path, WORDS.split(","))) for path in parts]
    assert [found["data_hash"], found["dev_hash"]] == hashes
    if method != "head_only":  # the same rows in the same steps: equal to the bit
        assert logged(run, "loss") == logged(runs[method], "loss")
        assert found["result_hash"] == whole["result_hash"]
    for entry, expected in zip(found.get("history", []), whole.get("history", []), strict=True):
        assert entry == pytest.approx(expected, abs=1e-5)
    if method == "head_only":  # features of other batches
        ours, theirs = (load_file(r / "head.safetensors")["weight"] for r in (run, runs[method]))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_the_held_out_part_is_described(base, data, tmp_path, capsys):
    dev = tmp_path / "dev.tsv"
    dev.write_text("label\ttext\n1\t一\n0\t二\n1\t三\n", encoding="utf-8")
    args = arguments("head_only", base, data, tmp_path / "a", "--dev", dev)
    assert train.main(args) == 0
    line, *table = capsys.readouterr().out.split("\n")
    assert line == "held out: 3 rows, 0.6667 of them 好" and table[0].startswith("layer ")
    dev.write_text("label\ttext\n0\t二\n", encoding="utf-8")
    args = arguments("lora_head", base, data, tmp_path / "b", "--dev", dev, "--epochs", 1)
    assert train.main(args) == 0
    line, *steps = capsys.readouterr().out.split("\n")
    assert line == "held out: 1 row, 1.0000 of them 坏; none of 好"
    assert steps[0].startswith("step ")


def test_what_a_held_out_file_repeats_is_said(base, data, parts, tmp_path, capsys):
    training, dev = parts
    lines = dev.read_text(encoding="utf-8").splitlines()
    repeated = training.read_text(encoding="utf-8").splitlines()[1:3]
    dev.write_text("\n".join([*lines, *repeated]) + "\n", encoding="utf-8")
    run = tmp_path / "run"
    assert train.main(arguments("lora_head", base, training, run, "--dev", dev)) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    said = f"warning: {dev}: 2 of its {len(lines) + 1} texts are in {training} too"
    assert warning.startswith(said)


def test_a_resumed_run_has_the_same_held_out_file(base, runs, parts, tmp_path, capsys):
    training, dev = parts
    run, moved = tmp_path / "run", tmp_path / "moved.tsv"
    assert train.main(arguments("lora_head", base, training, run, "--dev", dev)) == 0
    dev.rename(moved)
    resumed = ["--resume", "--output", run]
    capsys.readouterr()
    assert "part1.tsv" in one_line(capsys, 2, *resumed)
    assert train.main([*map(str, resumed), "--dev", str(moved)]) == 0
    capsys.readouterr()
    moved.write_text(moved.read_text(encoding="utf-8") + "1\t多一行\n", encoding="utf-8")
    line = one_line(capsys, 2, *resumed, "--dev", moved)
    assert "the held-out data (--dev) is not the one that was trained with (dev_hash" in line
    line = one_line(capsys, 2, "--resume", "--output", runs["lora_head"], "--dev", moved)
    assert "but the run has None" in line


@pytest.mark.parametrize("seed", range(4))
def test_a_class_keeps_its_only_row_in_training(seed, base, data, tmp_path, capsys):
    """Whatever is drawn: a class without a row to train on would be refused."""
    path, run = tmp_path / "one.tsv", tmp_path / "run"
    rows = ["label\ttext", *(f"{i % 2}\t第{i}条" for i in range(6)), "2\t唯一一条"]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    args = ["--method", "head_only", "--model", base, "--data", path, "--output", run]
    args += ["--labels", "坏,好,平", "--data-seed", seed, "--class-weights", "balanced"]
    assert train.main([*map(str, args)]) == 0
    found = record(run)
    assert found["held_out_rows"] == 1 and found["class_weights"][2] == pytest.approx(6 / 3)


# --- training's voice -----------------------------------------------------------------------------


def test_evaluations_are_printed_and_a_log_gets_lines(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "LOG_SECONDS", 1e-9)
    run = tmp_path / "run"
    assert train.main(arguments("lora_head", base, data, run, "--eval-every", 4)) == 0
    out, err = capsys.readouterr()
    printed = [line for line in out.splitlines() if line.startswith("step ")]
    history = record(run)["history"]
    assert len(history) > 2
    for line, entry in zip(printed, history, strict=True):
        assert line == (
            f"step {entry['step']} of {history[-1]['step']}"
            f"  held_out_log_loss {entry['held_out_log_loss']:.4f}"
            f"  held_out_accuracy {entry['held_out_accuracy']:.4f}"
        )
    # A line for each step and the last one again; they count the tokens of all epochs.
    lines, losses = err.splitlines(), logged(run, "loss")
    assert len(lines) == len(losses) + 1
    shape = (
        r"training: [\d.]+k? of [\d.]+k? tokens, .*tokens/s, [\d:?]+ left, step \d+/\d+, loss .*"
    )
    assert all(re.fullmatch(shape, line) for line in lines), lines
    for step, (line, loss) in enumerate(zip(lines, losses, strict=False), start=1):
        assert f"step {step}/{len(losses)}, loss {loss:.3f}" in line
    done, total = re.match(r"training: (\S+) of (\S+) tokens", lines[-1]).groups()
    assert done == total


def test_a_short_run_logs_no_progress(base, data, tmp_path, capsys):
    for method in train.METHODS:
        assert train.main(arguments(method, base, data, tmp_path / method)) == 0
        assert capsys.readouterr().err == ""
