"""`--plain` computes by the definitions, and gives what the default gives.

All six methods, on the embedded checkpoint and all its 200 test rows, in float32. In bfloat16 the
two forms round at other places, so that only float32 shows that they compute the same thing.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import evaluate
import train
from lora.layer import LoRALinear
from tests.conftest import REPO

SAMPLE = REPO / "qwen_min" / "sample"
FP32 = ["--dtype", "float32"]
# Sums of up to 512 products in another order, through three layers; scores are up to 20 in size.
TOLERANCE = 1e-4
# 72 training rows and 8 held-out rows; 9 rows in a step make 8 steps. Without dropout, since each
# form draws for its own forwards. q, v and up: a linear layer with a bias and one without.
LORA = ["--limit", "80", "--epochs", "1", "--batch-size", "9", "--dropout", "0", "--lr", "1e-3"]
LORA += ["--lora-targets", "q_proj,v_proj,up_proj", "--eval-every", "4"]
# Adam divides a gradient by its size, so a rounding error in a small gradient is enlarged: by at
# most 2e-5, measured. 8 steps change every B by at least 4.5e-3.
TENSOR_TOLERANCE = 5e-5
# B starts as zero, so B is what training changed. Measured: the difference of two B has at most
# 2.4e-4 of B's norm, on real weights 4.8e-3.
B_TOLERANCE = 2e-3
REAL_B_TOLERANCE = 2e-2
METHODS = {
    "zero_shot": None,
    "zero_shot_generate": None,
    "head_only": "head_only",
    "lora_head": "lora_head",
    "lora_label_scoring": "lora_label_scoring",
    "transplanted_head": "lora_head",
}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def train_twice(directory: Path, method: str, *args: object) -> dict[str, Path]:
    """A run by default and a run with --plain, trained on the embedded reviews or as `args` say."""
    runs = {}
    for form, more in (("default", []), ("plain", ["--plain"])):
        runs[form] = directory / f"{method}-{form}"
        command = ["--method", method, *FP32, "--output", runs[form], *args, *more]
        assert train.main([str(a) for a in command]) == 0
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """For each trained method its two runs, by form."""
    directory = tmp_path_factory.mktemp("plain")
    data = ["--data", SAMPLE / "train.tsv"]
    return {
        "head_only": train_twice(directory, "head_only", *data, "--limit", "80", "--layer", "best"),
        **{m: train_twice(directory, m, *data, *LORA) for m in ("lora_head", "lora_label_scoring")},
    }


def predictions(path: Path, *args: object) -> list[dict]:
    """Each row of an evaluation in float32."""
    command = [*FP32, *args, "--output", path.with_suffix(".json"), "--predictions", path]
    assert evaluate.main([str(a) for a in command]) == 0
    return read_lines(path)


def assert_same_predictions(plain: list[dict], default: list[dict], tolerance: float) -> None:
    """Equal labels, predictions and answers; scores within the tolerance."""
    assert len(plain) == len(default)
    for one, other in zip(plain, default, strict=True):
        for key in ("index", "label", "prediction", "answer"):
            assert one.get(key) == other.get(key), one["index"]
        if other["scores"] is None:
            assert one["scores"] is None and other["answer"] is not None
        else:
            assert one["scores"] == pytest.approx(other["scores"], abs=tolerance, rel=0)


def assert_same_training(runs: dict[str, Path], loss: float, tensors: float, b: float) -> None:
    """Both runs have 8 steps, losses within `loss`, trained numbers within `tensors`, and each B
    within `b` of its norm."""
    plain, default = (read_lines(runs[form] / "log.jsonl") for form in ("plain", "default"))
    assert [line["step"] for line in plain] == list(range(1, 9))
    for key in ("step", "loss", "lr"):
        expected = [line[key] for line in default]
        assert [line[key] for line in plain] == pytest.approx(expected, abs=loss, rel=0), key
    name = "checkpoints/step-8/adapter/adapter_model.safetensors"
    assert_same_tensors(runs, name, tensors, b)
    plain, default = (
        json.loads((runs[form] / "run.json").read_text(encoding="utf-8"))
        for form in ("plain", "default")
    )
    assert plain["best_step"] == default["best_step"]
    for one, other in zip(plain["history"], default["history"], strict=True):
        assert one == pytest.approx(other, abs=TOLERANCE, rel=0)


def assert_same_tensors(runs: dict[str, Path], name: str, tolerance: float, b: float = 1) -> None:
    plain, default = (load_file(runs[form] / name) for form in ("plain", "default"))
    assert plain.keys() == default.keys()
    for key, tensor in default.items():
        assert (plain[key] - tensor).abs().max() <= tolerance, key
        if "lora_B" in key:
            assert (plain[key] - tensor).norm() <= b * tensor.norm(), key


@pytest.mark.parametrize("method", METHODS)
def test_plain_gives_the_same_scores(method, runs, tmp_path, capsys):
    args = ["--method", method, "--data", SAMPLE / "test.tsv"]
    if METHODS[method]:
        args += ["--run", runs[METHODS[method]]["default"]]
    default = predictions(tmp_path / "default.jsonl", *args)
    plain = predictions(tmp_path / "plain.jsonl", *args, "--plain")
    assert len(default) == 200
    assert_same_predictions(plain, default, TOLERANCE)
    results = [json.loads((tmp_path / f"{f}.json").read_text()) for f in ("default", "plain")]
    assert [r["arguments"]["plain"] for r in results] == [False, True]
    for key in ("accuracy", "auc_roc", "brier", "ece", "label_mass"):
        one, other = (result[key] for result in results)
        assert one == (other and pytest.approx(other, abs=TOLERANCE, rel=0)), key
    capsys.readouterr()


@pytest.mark.parametrize("method", ["lora_head", "lora_label_scoring"])
def test_plain_trains_by_the_definition_of_lora_in_bfloat16_too(method, tmp_path, monkeypatch):
    """So a breakpoint there takes effect with the embedded checkpoint, which is in bfloat16."""
    used = []
    for name in ("definition", "_bf16_training_forward"):
        real = getattr(LoRALinear, name)

        def noted(layer, x, name=name, real=real):
            used.append(name)
            return real(layer, x)

        monkeypatch.setattr(LoRALinear, name, noted)
    for form, expected in (([], "_bf16_training_forward"), (["--plain"], "definition")):
        used.clear()
        args = ["--method", method, "--limit", "40", "--epochs", "1", "--batch-size", "32", *form]
        assert train.main([*args, "--output", str(tmp_path / expected)]) == 0
        assert used and used[0] == expected
        assert form == [] or set(used) == {"definition"}


def test_plain_scores_words_of_several_tokens_the_same(tmp_path, capsys):
    """Three classes, words that begin alike, other label sets, and the calibration's inputs."""
    rows = (SAMPLE / "test.tsv").read_text(encoding="utf-8").splitlines()[:41]
    rows[1] = "2\t" + rows[1].split("\t")[1]
    (tmp_path / "three.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    args = ["--method", "zero_shot", "--data", tmp_path / "three.tsv", "--max-text-tokens", "12"]
    args += ["--labels", "不太满意,不满意,好", "--label-sets", "差,好,一般", "--calibrate"]
    default = predictions(tmp_path / "default.jsonl", *args)
    plain = predictions(tmp_path / "plain.jsonl", *args, "--plain")
    assert_same_predictions(plain, default, TOLERANCE)
    tables = [
        json.loads((tmp_path / f"{form}.json").read_text(encoding="utf-8"))
        for form in ("plain", "default")
    ]
    for key in ("label_sets", "calibration"):
        one, other = (numbers(table[key]) for table in tables)
        assert one == pytest.approx(other, abs=TOLERANCE, rel=0), key
    capsys.readouterr()


def numbers(content: object) -> list[float]:
    """All numbers inside, in order."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [number for entry in content for number in numbers(entry)]
    return [content] if isinstance(content, (int, float)) else []


@pytest.mark.parametrize("method", ["lora_head", "lora_label_scoring"])
def test_plain_trains_the_same_lora(method, runs):
    assert_same_training(runs[method], 1e-5, TENSOR_TOLERANCE, B_TOLERANCE)


def test_plain_trains_the_same_probe(runs):
    """The features differ by rounding; the solver stops at a gradient of 1e-7. Measured: 1e-7."""
    assert_same_tensors(runs["head_only"], "head.safetensors", 1e-5)
    plain, default = (
        json.loads((runs["head_only"][form] / "run.json").read_text(encoding="utf-8"))
        for form in ("plain", "default")
    )
    assert plain["layer"] == default["layer"]


def test_a_plain_run_is_evaluated_by_default(runs, tmp_path, capsys):
    """--plain is a way to compute, and no part of what was trained: a run does not restore it."""
    args = ["--data", SAMPLE / "test.tsv", "--limit", "20", "--run"]
    both = [
        predictions(tmp_path / f"{form}.jsonl", *args, runs["lora_head"][form])
        for form in ("plain", "default")
    ]
    assert_same_predictions(*both, TOLERANCE)
    results = json.loads((tmp_path / "plain.json").read_text(encoding="utf-8"))
    assert results["arguments"]["plain"] is False
    capsys.readouterr()


def imported(commands: list[tuple[str, list]]) -> list[set[str]]:
    """The project's modules that one process has imported after each command."""
    code = (
        "import json, sys\n"
        "for script, args in json.loads(sys.argv[1]):\n"
        "    assert __import__(script).main(args) == 0\n"
        "    print('MODULES', *(m for m in sys.modules if m.startswith('qwen_min.')))"
    )
    words = json.dumps([[script, [str(a) for a in args]] for script, args in commands])
    process = [sys.executable, "-c", code, words]
    done = subprocess.run(process, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("MODULES")]
    assert len(lines) == len(commands) and all("qwen_min.model" in line for line in lines)
    return [set(line[1:]) for line in lines]


def of_room(modules: set[str], room: str) -> list[str]:
    return sorted(m for m in modules if f"{m}.".startswith(f"qwen_min.{room}."))


def test_plain_imports_nothing_fast(runs, tmp_path):
    commands = []
    for method, trained in METHODS.items():
        args = ["--method", method, "--data", SAMPLE / "test.tsv", "--limit", "2", "--plain"]
        commands.append(
            ("evaluate", args + (["--run", runs[trained]["default"]] if trained else []))
        )
    for method in ("head_only", "lora_head", "lora_label_scoring"):
        args = ["--method", method, "--limit", "24", "--plain"]
        args += [] if method == "head_only" else ["--epochs", "1"]
        commands.append(("train", [*args, "--output", tmp_path / method]))
    for (script, args), modules in zip(commands, imported(commands), strict=True):
        assert of_room(modules, "fast") == [], (script, args[1])


def test_zero_shot_imports_nothing_of_lab():
    (modules,) = imported([("evaluate", ["--method", "zero_shot", "--limit", "2"])])
    assert of_room(modules, "lab") == []
    assert of_room(modules, "fast")  # the names of the rooms are right


# --- real weights --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviews() -> Path:
    from tests.real.make_reviews import ensure_reviews

    return ensure_reviews()


@pytest.mark.real
def test_plain_scores_real_reviews_the_same(checkpoint, reviews, tmp_path, capsys):
    """24 layers of sums of up to 4,864 products, in another order."""
    args = ["--method", "zero_shot", "--model", checkpoint, "--labels", "负向,正向"]
    args += ["--data", reviews / "dev.tsv", "--limit", "40"]
    default = predictions(tmp_path / "default.jsonl", *args)
    plain = predictions(tmp_path / "plain.jsonl", *args, "--plain")
    assert len(default) == 40
    assert_same_predictions(plain, default, 1e-4)
    capsys.readouterr()


@pytest.mark.real
@pytest.mark.parametrize("method", ["lora_head", "lora_label_scoring"])
def test_plain_trains_on_real_weights_the_same(method, checkpoint, reviews, tmp_path, capsys):
    """8 steps of 4 rows at a rate of up to 2e-4. Measured: losses differ by at most 1.7e-5. Of a
    million trained numbers 12 differ by more than 1e-4 and none by more than 3.1e-4: where a
    gradient is nearly zero, Adam turns its rounding error into a whole step."""
    args = ["--model", checkpoint, "--data", reviews / "dev.tsv", "--limit", "36"]
    args += ["--epochs", "1", "--batch-size", "4", "--dropout", "0", "--max-text-tokens", "24"]
    assert_same_training(train_twice(tmp_path, method, *args), 1e-4, 1e-3, REAL_B_TOLERANCE)
    capsys.readouterr()
