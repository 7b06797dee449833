"""tests/parity.py: sound checkpoints pass, each fault is found and named, mistakes get one line."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_reference, with_images
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qwen_min.model as model_module
from lora import ATTENTION, LoRAConfig, inject_lora, lora_parameters, save_adapter
from qwen_min.files.hub import TINY
from qwen_min.files.weights import load_model
from tests import parity

FORMS = ("definition", "fast")
IDS = [5, 300, 17, 44, 9]
UP = "model.layers.1.mlp.up_proj"


def copy_of_tiny(directory: Path) -> Path:
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return directory


def change_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_one_number(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{UP}.weight"][3, 5] += 0.01
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def run(capsys, *args: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    capsys.readouterr()
    status = parity.main([*map(str, args)])
    return status, *capsys.readouterr()


def verdicts(out: str) -> dict[str, str]:
    """By program and dtype: the first module beyond the bound, or "good"."""
    found = re.findall(r"^(\w+ \w+): (?:beyond from )?(\S+?)(?: on)?$", out, re.MULTILINE)
    assert len(found) > 1
    return dict(found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tiny.safetensors"
    assert parity.main(["--model", "tiny", "--save", str(path)]) == 0
    return path


def test_tiny_is_at_parity(capsys):
    status, out, _ = run(capsys, "--model", "tiny", "--text", "房间小。")
    assert status == 0 and "beyond" not in out
    programs = [f"{form} {dtype}" for dtype in ("float32", "bfloat16") for form in FORMS]
    assert verdicts(out) == dict.fromkeys(programs, "good")
    rows = [line.split()[0] for line in out.splitlines()[2:] if line][: -len(programs) - 1]
    order = ["model.rotary_emb", "model.embed_tokens", "model.layers.0.input_layernorm"]
    assert rows[:3] == order and rows[-3:] == ["logits", "label_scores", "greedy_tokens"]
    modules = {name for name, _ in load_model(TINY).named_modules() if "_norm" not in name}
    assert {*rows} == (modules - {"", "model", "model.layers"}) | {*rows[-3:], rows[0]}
    # What the fast form calls no module for. It has the other layers' outputs, but not the last's.
    without = {line.split()[0] for line in out.splitlines() if " - " in line}
    inside = {name for name in modules if name.endswith(("layernorm", "self_attn", "mlp"))}
    assert without == inside | {"model.layers.2"}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_5", "released"])
def test_each_architecture_is_at_parity(kind, tmp_path, capsys):
    make_reference(tmp_path, kind.replace("released", "qwen3_5"), tied=kind == "released")
    if kind == "released":
        with_images(tmp_path)
    status, out, err = run(capsys, "--model", tmp_path, "--text", "房间小。")
    assert status == 0 and {*verdicts(out).values()} == {"good"}
    assert len(verdicts(out)) == (4 if kind == "released" else 2)
    # Both programs have A_log in float32: else this is 0.7.
    assert ("A_log" in err) == (kind == "released")
    if kind == "released":
        assert float(re.search(r"^logits .* (\S+) +\S+ \S+ +\S+$", out, re.MULTILINE)[1]) < 0.2
    assert ("linear_attn.norm " in out) == (kind in ("qwen3_5", "released"))


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "one number": (change_one_number, UP, UP),
    "rope_theta": (lambda d: change_config(d, rope_theta=1e6), *["model.rotary_emb"] * 2),
    # The norm itself is no module of the fast form: the first one that reads its output.
    "eps": (
        lambda d: change_config(d, rms_norm_eps=1e-5),
        *("model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_copy_is_named(fault, saved, tmp_path, capsys):
    change, definition, fast = FAULTS[fault]
    directory = copy_of_tiny(tmp_path / "copy")
    arguments = ("--model", directory, "--reference", saved)
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and {*verdicts(out).values()} == {"good"}
    change(directory)
    status, out, _ = run(capsys, *arguments)
    assert status == 1
    assert verdicts(out) == {"definition float32": definition, "fast float32": fast}
    (marked,) = (line for line in out.splitlines() if line.endswith("<- first beyond the bound"))
    assert marked.split()[0] == definition


def test_a_fault_of_this_program_is_named(monkeypatch, capsys):
    """In the definition alone: the fast form has imported the sound function."""
    monkeypatch.setattr(model_module, "rotate", lambda x, cos, sin: x)
    status, out, _ = run(capsys, "--model", "tiny", "--text", "房间小。")
    assert status == 1
    after = "model.layers.0.self_attn.o_proj"
    expected = {"definition float32": after, "definition bfloat16": after}
    assert verdicts(out) == dict.fromkeys(("fast float32", "fast bfloat16"), "good") | expected


@pytest.mark.parametrize("times, beyond", [(0.0, False), (1.9, False), (2.1, True)])
def test_the_bound_in_bfloat16(times, beyond):
    """The mean may be twice the reference's own distance from float32."""
    exact = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    expected = {"logits": exact.bfloat16()}
    distance = expected["logits"].float() - exact
    found = {"logits": expected["logits"].float() + times * distance}
    rows = parity.differences(found, expected, (expected, {"logits": exact}), 1)
    assert rows["logits"].beyond == beyond and rows["logits"].numbers[2] == f"{times:.2f}"


def test_the_bounds_in_float32():
    expected = {"logits": torch.full((5, 8), 10.0), "label_scores": torch.full((2, 2), -1.0)}
    expected["greedy_tokens"] = torch.arange(parity.NEW_TOKENS)
    for logit, score, token, beyond in (
        (10.00049, -1.0019, 3, []),  # a score of two tokens: 2 · 2 · 5e-4
        (10.00051, -1.0021, 4, [*expected]),
        (math.nan, math.nan, 4, [*expected]),
    ):
        found = {name: tensor.clone() for name, tensor in expected.items()}
        found["logits"][4, 7], found["label_scores"][1, 0] = logit, score
        found["greedy_tokens"][3] = token
        rows = parity.differences(found, expected, None, 2)
        assert [name for name in expected if rows[name].beyond] == beyond
    assert rows["greedy_tokens"].numbers == ("3 of 20",)
    # In another dtype a token may differ.
    rows = parity.differences(found, expected, (expected, expected), 2)
    assert not rows["greedy_tokens"].beyond


def test_saved_outputs_are_this_program_s(saved, capsys):
    tensors, model = load_file(saved), load_model(TINY, "float32")
    (first, *_), ids = tensors["lengths"].tolist(), tensors["input_ids"]
    assert tensors["lengths"].sum() == len(ids) == len(tensors["logits"])
    h = model(ids[None, :first])
    assert torch.equal(tensors["model.norm"][:first], h[0])
    assert torch.equal(tensors["logits"][:first], model.logits(h)[0])


def test_scores_of_other_texts_are_not_compared(saved, capsys):
    arguments = ("--model", "tiny", "--reference", saved, "--text")
    status, out, _ = run(capsys, *arguments, "房间小。")
    assert status == 0 and "\nlogits " in out and "label_scores" not in out


def test_a_file_in_another_dtype_is_compared_in_float32(saved, tmp_path, capsys):
    tensors = load_file(saved)
    tensors["logits"] = tensors["logits"].double()
    tensors["greedy_tokens"] = tensors["greedy_tokens"][:3]
    save_file(tensors, tmp_path / "f")
    status, out, err = run(capsys, "--model", "tiny", "--reference", tmp_path / "f")
    assert status == 2 and "greedy_tokens: [20] here, [3] in the reference" in err
    del tensors["greedy_tokens"]
    save_file(tensors, tmp_path / "f")
    status, out, _ = run(capsys, "--model", "tiny", "--reference", tmp_path / "f")
    assert (status, verdicts(out)) == (0, {f"{form} float32": "good" for form in FORMS})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_somebody_else(dtype, tmp_path, capsys):
    """Two texts of one length, and nothing but ids and logits: no transformers is needed."""
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=getattr(torch, dtype))
    ids = torch.tensor([IDS, IDS[::-1]])
    with torch.no_grad():
        logits = reference(ids).logits
    arguments = ("--model", "tiny", "--reference", tmp_path / "logits.safetensors")
    save_file({"input_ids": ids, "logits": logits}, arguments[-1])
    status, out, _ = run(capsys, *arguments)
    assert (status, verdicts(out)) == (0, {f"{form} {dtype}": "good" for form in FORMS})
    save_file({"input_ids": ids, "logits": logits.flip(0)}, arguments[-1])
    status, out, _ = run(capsys, *arguments)
    assert (status, verdicts(out)) == (1, {f"{form} {dtype}": "logits" for form in FORMS})


def test_an_adapter(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(parity.PINNED, "tiny", [9.0] * len(IDS))  # not with an adapter
    monkeypatch.setattr(parity, "PINNED_IDS", IDS)
    model = load_model(TINY)
    inject_lora(model, ATTENTION, 4, 6.0, 0.0)
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    head = torch.ones(2, model.config.hidden_size)
    config = LoRAConfig(4, 6.0, 0.0, ATTENTION, False, "SEQ_CLS", "tiny")
    save_adapter(tmp_path, model, config, head)
    status, out, _ = run(capsys, "--model", "tiny", "--adapter", tmp_path, "--text", "房间小。")
    assert status == 0 and {*verdicts(out).values()} == {"good"}
    status, out, _ = run(capsys, "--model", "tiny", "--adapter", tmp_path, "--reference", saved)
    assert status == 1
    assert {*verdicts(out).values()} == {"model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("name", ["Qwen2-Test", "models--Qwen--Qwen2-Test"])
def test_pinned_logits(name, saved, tmp_path, monkeypatch, capsys):
    directory, model = copy_of_tiny(tmp_path / name), load_model(TINY, "float32")
    monkeypatch.setattr(parity, "PINNED_IDS", IDS)
    means = model.logits(model(torch.tensor([parity.PINNED_IDS])))[0].mean(dim=-1).tolist()
    for shift, expected in ((0.009, 0), (0.011, 1)):
        monkeypatch.setitem(parity.PINNED, "Qwen2-Test", [*means[:-1], means[-1] + shift])
        status, out, _ = run(capsys, "--model", directory, "--reference", saved)
        assert status == expected and "pinned logits of Qwen2-Test" in out
        assert {*verdicts(out).values()} == {"good"}
    assert "pinned" not in run(capsys, "--model", "tiny", "--reference", saved)[1]


def test_greedy_tokens_whatever_the_checkpoint_asks_for(tmp_path, capsys):
    """No end, no penalty, no sampling: the tokens that follow from the logits."""
    directory, prompt = copy_of_tiny(tmp_path / "copy"), ("--text", "房间小。")
    run(capsys, "--model", directory, *prompt, "--save", tmp_path / "s")
    end = load_file(tmp_path / "s")["greedy_tokens"][2].item()
    change_config(directory, eos_token_id=end)
    generation = {"eos_token_id": end, "repetition_penalty": 3.0, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    status, out, _ = run(capsys, "--model", directory, *prompt)
    assert status == 0
    assert re.search(r"^greedy_tokens( +20 of 20){4}$", out, re.MULTILINE)


def test_without_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = ("--model", "tiny", "--text", "房间小。")
    status, _, err = run(capsys, *arguments, "--save", tmp_path / "saved")
    assert status == 2 and "error: transformers is not installed" in err
    status, out, _ = run(capsys, *arguments, "--reference", tmp_path / "saved")
    assert status == 0 and re.search(r"^greedy_tokens( +20 of 20){2}$", out, re.MULTILINE)


def reference(rows: int = 5, ids: list[int] = IDS, **others: torch.Tensor) -> Callable:
    """The arguments that name a file of logits, made in a directory."""

    def write(directory: Path) -> list:
        tensors = {"input_ids": torch.tensor(ids).long(), "logits": torch.zeros(rows, 4096)}
        save_file(tensors | others, directory / "file")
        return ["--reference", directory / "file"]

    return write


MISTAKES: dict[str, tuple[Callable[[Path], list], str]] = {
    "no such model": (lambda d: ["--model", d / "none"], "no such directory"),
    "no such file": (lambda d: ["--reference", d / "none"], "none: not a file of input_ids"),
    "a file of something else": (
        lambda d: ["--reference", TINY / "model.safetensors"],
        "input_ids",
    ),
    "fewer logits": (reference(4), "logits are [4, 4096], expected [5, 4096]"),
    "an id that does not exist": (reference(1, [4096]), "an id is not in the vocabulary"),
    "ids that are no integers": (reference(input_ids=torch.ones(5)), "an id is not in"),
    "no tokens": (reference(0, []), "not a file of input_ids"),
    "other lengths": (reference(lengths=torch.tensor([2, 2])), "split"),
    "an empty text": (reference(lengths=torch.tensor([5, 0])), "a text is empty"),
    "a wider module": (
        reference(**{UP: torch.zeros(5, 513)}),
        f"{UP}: [5, 512] here, [5, 513] in the reference",
    ),
    "over an input": (lambda d: ["--save", TINY / "model.safetensors"], "lies in a directory"),
    "no adapter": (lambda d: ["--adapter", d / "none"], "adapter_config.json"),
    "a text too long": (lambda d: ["--text", "好" * 2000], "text 1: prompt and label have"),
    "half a character": (lambda d: ["--text", "\udcff"], "is not valid UTF-8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path, capsys):
    arguments, words = MISTAKES[mistake]
    status, out, err = run(capsys, "--model", "tiny", *arguments(tmp_path))
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert status == 2 and words in line and not out
