"""What results depend on: recorded, compared, copied; results that differ in it are no seeds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import evaluate
import qwen_min
import train
from qwen_min.command import trained as trained_parts
from qwen_min.errors import UserError
from qwen_min.files.hub import TINY
from qwen_min.report.__main__ import main as report

SAMPLE = Path(qwen_min.__file__).parent / "sample"
# Qwen2.5's, in short: says a sentence of its own where no system message is given.
CHAT = """{%- set first = messages[0] %}{% if first['role'] == 'system' %}
{{- '<|im_start|>system\n' + first['content'] + '<|im_end|>\n' }}{% else %}
{{- '<|im_start|>system\nSAID<|im_end|>\n' }}{% endif %}{% for m in messages %}
{%- if m['role'] != 'system' %}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] }}
{{- '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def copy_of_tiny(directory: str) -> Path:
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return Path(directory)


def add_noise(directory: Path) -> None:
    """Other weights of the same shapes."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=generator).bfloat16()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def swap_two_tokens(directory: Path) -> None:
    """Another tokenizer with the same number of tokens in every text: two ids change places."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def rewrite_tokenizer(directory: Path) -> None:
    """The same tokenizer, as another program may write it."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["truncation"] = None
    content["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    merges = content["model"]["merges"]
    content["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def say(sentence: str) -> Callable[[Path], None]:
    """Change the chat template: the sentence without a system message."""
    return lambda directory: (
        (directory / "chat_template.jinja").write_text(CHAT.replace("SAID", sentence)) and None
    )


def trained(output: str, *args: object, seed: int = 0, limit: int = 40) -> list[str]:
    """A training on few rows; returns the arguments that evaluate its run."""
    args = ["--limit", limit, "--seed", seed, "--output", output, *args]
    args += [] if "head_only" in args else ["--epochs", 1, "--r", 2, "--lr", 0.01]
    if "--method" not in args:
        args += ["--method", "lora_label_scoring"]
    if "--data" not in args:
        args += ["--data", SAMPLE / "train.tsv"]
    assert train.main([*map(str, args)]) == 0
    return ["--run", output]


def evaluated(name: str, *args: object) -> str:
    """Evaluate on 30 rows; returns the results file, with its predictions beside it."""
    files = ["--output", f"{name}.json", "--predictions", f"{name}.jsonl", "--limit", 30]
    assert evaluate.main([str(arg) for arg in [*args, *files]]) == 0
    return f"{name}.json"


def rows_of(capsys, *results: str) -> list[dict]:
    capsys.readouterr()
    assert report([*results, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)["methods"]


def error_of(capsys, command: Callable, *args: object) -> str:
    """The one line of a command that refuses."""
    capsys.readouterr()
    assert command([str(arg) for arg in args]) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in err
    return errors[0]


def two_models(change: Callable[[Path], None]) -> list[list]:
    """A checkpoint and a changed copy, in directories of one name; --model for each."""
    for place in "ab":
        copy_of_tiny(f"{place}/m")
    change(Path("b/m"))
    return [["--model", f"{place}/m"] for place in "ab"]


def more_stops(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 6, 7]}')


ZERO_SHOT, GENERATE = ["--method", "zero_shot"], ["--method", "zero_shot_generate"]
TWO = {  # two models that differ; the arguments; and whether predictions can differ
    "weights": (add_noise, ZERO_SHOT, True),
    "tokenizer": (swap_two_tokens, ZERO_SHOT, True),
    "chat template": (say("B"), [*ZERO_SHOT, "--chat"], True),
    "chat template, unused": (say("B"), ZERO_SHOT, False),
    "stop tokens": (more_stops, GENERATE, True),
    "stop tokens, unused": (more_stops, ZERO_SHOT, False),
    "path": (lambda directory: None, ZERO_SHOT, False),
    "form of the tokenizer": (rewrite_tokenizer, ZERO_SHOT, False),
}


@pytest.mark.parametrize("case", TWO)
def test_results_of_two_models_are_seeds_only_if_nothing_differs(case, capsys):
    change, args, differ = TWO[case]
    models = two_models(change)
    if "template" in case:
        say("A")(Path("a/m"))
    files = [evaluated(f"z{i}", *args, *model, "--seed", i) for i, model in enumerate(models)]
    rows = rows_of(capsys, *files)
    assert [len(row["seeds"]) for row in rows] == ([1, 1] if differ else [2])
    assert len({row["name"] for row in rows}) == len(rows)


def test_a_row_names_its_model_where_models_differ(capsys, monkeypatch):
    two_models(add_noise)
    files = []
    for i, place in enumerate("ab"):  # given by the same name
        monkeypatch.chdir(place)
        evaluated("../" + f"z{i}", *ZERO_SHOT, "--model", "m", "--seed", i)
        monkeypatch.chdir("..")
        files.append(f"z{i}.json")
    hashes = [json.loads(Path(file).read_text())["base_fingerprint"][:8] for file in files]
    names = ["zero_shot", "zero_shot 2"]
    assert [row["name"] for row in rows_of(capsys, *files)] == names
    assert report(files) == 0
    shown = capsys.readouterr().out
    assert f"model: m ({hashes[0]}) (zero_shot) | m ({hashes[1]}) (zero_shot 2)" in shown
    assert [line.split("  ")[0] for line in shown.splitlines()[1:3]] == names


SETTINGS = {  # two evaluations of one model, and whether predictions can differ
    "dtype": (["--dtype", "float32"], ["--dtype", "bfloat16"], True),
    "dtype in other words": ([], ["--dtype", "bfloat16"], False),
    "tokens at once": ([], ["--batch-tokens", "64"], True),
    "device in other words": ([], ["--device", "cpu"], False),
    "system message": (["--chat"], ["--chat", "--system", "x"], True),
    "also calibrated": ([], ["--calibrate"], False),
    "training data looked at": ([], ["--train-data", SAMPLE / "train.tsv"], False),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_change_predictions_are_no_seeds(case, capsys):
    one, other, differ = SETTINGS[case]
    files = [evaluated("z0", *ZERO_SHOT, *one), evaluated("z1", *ZERO_SHOT, *other, "--seed", 1)]
    rows = rows_of(capsys, *files)
    assert [len(row["seeds"]) for row in rows] == ([1, 1] if differ else [2])


def test_two_adapters_of_one_name_are_two_rows(capsys):
    files = []
    for i in (0, 1):
        trained(f"run{i}", seed=i)
        args = ["--method", "lora_label_scoring", "--adapter", f"run{i}/adapter", "--seed", i]
        files.append(evaluated(f"z{i}", *args))
    copied = shutil.copytree("run1/adapter", "elsewhere")
    again = evaluated("z2", "--method", "lora_label_scoring", "--adapter", copied, "--seed", 2)
    rows = rows_of(capsys, *files, again)
    assert [len(row["seeds"]) for row in rows] == [1, 2]
    hashes = [json.loads(Path(file).read_text())["adapter_hash"] for file in [*files, again]]
    assert hashes[0] != hashes[1] == hashes[2]


@pytest.mark.parametrize("same", [True, False])
def test_seeds_of_a_training_have_the_same_rows_whatever_their_file(same, capsys):
    """The second run reads the same rows from another file, or other rows from the same file."""
    lines = (SAMPLE / "train.tsv").read_text(encoding="utf-8").splitlines()[:41]
    names, files = ["train.tsv", "copy.tsv" if same else "train.tsv"], []
    for i, rows in enumerate((lines, lines if same else lines[:40])):
        Path(names[i]).write_text("\n".join(rows) + "\n", encoding="utf-8")
        trained(f"run{i}", "--data", names[i], seed=i, limit=100)
        files.append(evaluated(f"z{i}", "--run", f"run{i}"))
    Path("run1").rename("moved")
    evaluated("z1", "--run", "moved")
    assert [len(row["seeds"]) for row in rows_of(capsys, *files)] == ([2] if same else [1, 1])


HASHES = ("base_fingerprint", "tokenizer_hash", "template", "adapter_hash", "training_data_hash")


def test_results_of_older_versions_are_told_apart_by_their_model_argument(capsys):
    two_models(add_noise)
    new = [
        evaluated(f"z{i}", *ZERO_SHOT, "--model", f"{p}/m", "--seed", i)
        for i, p in ((0, "a"), (1, "b"))
    ]
    older = []
    for i, (file, model) in enumerate([(new[0], "a/m"), (new[0], "a/m"), (new[1], "b/m")], 5):
        content = json.loads(Path(file).read_text())
        for key in HASHES:
            del content[key]
        content["arguments"] |= {"seed": i, "model": model}
        older.append(f"old{i}.json")
        Path(older[-1]).write_text(json.dumps(content))
    rows = rows_of(capsys, *new, *older)
    assert [[seed["seed"] for seed in row["seeds"]] for row in rows] == [[0], [1], [5, 6], [7]]


@pytest.mark.parametrize("key", ["auc_roc", "brier", "ece"])
def test_results_without_a_number_are_refused(key, capsys):
    file = evaluated("z0", *ZERO_SHOT)
    content = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps(content | {key: None}))
    assert report([file]) == 0
    del content[key]
    Path(file).write_text(json.dumps(content))
    assert f"{key} is missing" in error_of(capsys, report, file)


# A run and its checkpoint


@pytest.mark.parametrize("markup", [[], ["--chat"]])
@pytest.mark.parametrize("change", [add_noise, swap_two_tokens, say("B")])
def test_what_a_run_depends_on_is_compared(change, markup, capsys):
    say("A")(copy_of_tiny("m"))
    run = trained("run", "--model", "m", *markup)
    change(Path("m"))
    resume = ["--resume", "--output", "run", "--merge", "merged"]
    if change not in (add_noise, swap_two_tokens) and not markup:  # a template that is not used
        evaluated("z", *run)
        assert train.main(resume) == 0
        return
    files = {add_noise: "weights", swap_two_tokens: "tokenizer.json"}
    file = files.get(change, "chat_template.jinja")
    assert file in error_of(capsys, evaluate.main, *run)
    assert file in error_of(capsys, evaluate.main, *run, "--explain", "好")
    assert file in error_of(capsys, train.main, *resume)
    assert not Path("merged").exists()
    with pytest.raises(UserError, match=file):
        qwen_min.Classifier.from_run("run")
    adapter = ["--method", "lora_label_scoring", "--adapter", "run/adapter", "--model", "m"]
    if change in files:
        assert file in error_of(capsys, evaluate.main, *adapter)
    else:
        # Knowingly another prompt. The template inside of the same markup is not enough for that.
        evaluated("z", *run, "--system", "x")
        assert file in error_of(capsys, evaluate.main, *run, "--template", "{text}：")


def test_the_same_tokenizer_in_another_form_is_the_same(capsys):
    trained("run", "--model", copy_of_tiny("m"))
    before = evaluated("before", "--run", "run")
    rewrite_tokenizer(Path("m"))
    after = evaluated("after", "--run", "run")
    accuracies = [json.loads(Path(file).read_text())["accuracy"] for file in (before, after)]
    assert accuracies[0] == accuracies[1]
    assert train.main(["--resume", "--output", "run"]) == 0


def test_a_run_of_an_older_version_lacks_hashes_and_is_used(capsys):
    trained("run", "--model", copy_of_tiny("m"))
    record = json.loads(Path("run/run.json").read_text())
    del record["tokenizer_hash"], record["adapter_hash"]
    Path("run/run.json").write_text(json.dumps(record))
    capsys.readouterr()
    evaluated("z", "--run", "run")
    assert "tokenizer" not in capsys.readouterr().err
    assert train.main(["--resume", "--output", "run"]) == 0


def test_tokens_at_once_are_part_of_a_training_with_dropout(capsys):
    """They decide which numbers dropout draws."""
    common = ["--resume", "--output", "run", "--batch-tokens", "512"]
    for more, refused in ((["--method", "lora_head"], True), (["--dropout", "0"], False)):
        shutil.rmtree("run", ignore_errors=True)
        trained("run", *more)
        if refused:
            assert "--batch-tokens is 512" in error_of(capsys, train.main, *common)
            assert train.main([*common[:-1], "1024"]) == 0  # the run's own
        else:
            assert train.main(common) == 0
    trained("probe", "--method", "head_only")
    assert train.main(["--resume", "--output", "probe", "--batch-tokens", "512"]) == 0


def set_alpha(adapter: Path, alpha: float) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha}))


def test_a_probe_depends_on_its_adapter(capsys):
    trained("lora")
    probe = ["--method", "head_only", "--adapter", "lora/adapter", "--feature-cache", "cache"]
    trained("one", *probe)
    set_alpha(Path("lora/adapter"), 160.0)
    assert "adapter" in error_of(capsys, train.main, "--resume", "--output", "one")
    trained("two", *probe)  # the same A and B: features of the first must not be taken
    heads = [load_file(f"{run}/head.safetensors")["weight"] for run in ("one", "two")]
    assert (heads[0] - heads[1]).abs().max() > 1e-3
    files = [evaluated(run, "--run", run) for run in ("one", "two")]
    content = [json.loads(Path(file).read_text()) for file in files]
    content[1]["training_arguments"]["seed"] = 1
    Path(files[1]).write_text(json.dumps(content[1]))
    assert [len(row["seeds"]) for row in rows_of(capsys, *files)] == [1, 1]


# A merged checkpoint


def test_a_merged_checkpoint_has_the_prompts_of_its_base(reference, capsys):
    """transformers 5 writes the template to chat_template.jinja, others of its own beside it."""
    base = Path(shutil.copytree(reference[0], "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": CHAT.replace("SAID", "好"), "tool_use": "{{ 'tools' }}"}
    tokenizer.save_pretrained(base)
    assert (base / "chat_template.jinja").exists()
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (base / name).write_text("{}")
    common = ["--model", base, "--labels", "坏,好", "--template", "{text}\\n", "--chat"]
    run = trained("run", *common, "--max-text-tokens", 20, "--merge", "merged")
    one = evaluated("one", *run)
    args = ["--model", "merged", *common[2:], "--max-text-tokens", 20]
    other = evaluated("other", *ZERO_SHOT, *args)
    found = [json.loads(Path(file).read_text()) for file in (one, other)]
    for key in ("template", "tokenizer_hash", "tokens", "label_ids"):
        assert found[0][key] == found[1][key], key
    scores = [
        [json.loads(line)["scores"] for line in Path(f"{name}.jsonl").read_text().splitlines()]
        for name in ("one", "other")
    ]
    np.testing.assert_allclose(*scores, atol=1e-3)  # fp32; the sum of LoRA in another order

    theirs = [AutoTokenizer.from_pretrained(directory) for directory in (base, "merged")]
    assert theirs[0].chat_template == theirs[1].chat_template
    messages = [{"role": "user", "content": "不错"}]
    texts = [
        t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in theirs
    ]
    assert texts[0] == texts[1] and "好" in texts[0]
    names = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    copied = {p.relative_to("merged").as_posix() for p in Path("merged").rglob("*") if p.is_file()}
    assert copied == names | {"prompt.json"}


@pytest.mark.parametrize(("more", "times"), [([], 0), (["--output", "results.json"], 1)])
def test_weights_are_hashed_only_for_results_that_are_written(more, times, monkeypatch):
    """Hashing 15 GB takes longer than scoring a row."""
    calls, hashed = [], trained_parts.checkpoint_fingerprint
    monkeypatch.setattr(
        trained_parts, "checkpoint_fingerprint", lambda path: calls.append(path) or hashed(path)
    )
    assert evaluate.main(["--method", "zero_shot", "--limit", "4", *more]) == 0
    assert len(calls) == times
