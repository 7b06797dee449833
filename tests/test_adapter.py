"""`lora.adapter`: PEFT's files are read here, ours by PEFT, and other content is refused."""

import copy
import dataclasses
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from conftest import make_reference, with_images
from safetensors import safe_open
from test_lora import IDS, carrier, logits, redraw_lora
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5ForSequenceClassification,
)

import evaluate
from lora.adapter import LoRAConfig, load_adapter, read_adapter_config, save_adapter
from lora.inject import ATTENTION, DELTA_RULE, MLP, inject_lora, lora_modules, lora_parameters
from lora.layer import LoRAError
from qwen_min.command.trained import attach_adapter
from qwen_min.errors import UserError
from qwen_min.files.hub import TINY
from qwen_min.files.weights import checkpoint_fingerprint, load_model

TASKS = ["CAUSAL_LM", "SEQ_CLS"]
HEAD_KEY = "base_model.model.score.weight"


def config_for(task: str, **changes: object) -> LoRAConfig:
    config = LoRAConfig(4, 6.0, 0.1, ATTENTION, True, task, "models/tiny")
    return dataclasses.replace(config, **changes)


def adapted(task: str, config: LoRAConfig | None = None) -> tuple[nn.Module, Tensor | None]:
    """A carrier with a LoRA and a head that are not its initial ones."""
    config = config or config_for(task)
    model = carrier(task == "SEQ_CLS")
    inject_lora(model, config.targets, config.r, config.alpha, config.dropout, config.use_rslora)
    redraw_lora(model)
    if task == "CAUSAL_LM":
        return model, None
    head = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
    set_head(model, head)
    return model, head


def set_head(model: nn.Module, head: Tensor | None) -> None:
    if head is not None:
        model.score.weight = nn.Parameter(head.clone())


def saved(directory: Path, task: str, **changes: object) -> nn.Module:
    config = config_for(task, **changes)
    model, head = adapted(task, config)
    save_adapter(directory, model, config, head)
    return model


def from_peft(directory: Path, task: str, **settings: object) -> Tensor:
    """Write an adapter by PEFT itself; returns its model's logits."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": [*ATTENTION]} | settings
    config = peft.LoraConfig(task_type=task, **settings)
    model = peft.get_peft_model(carrier(task == "SEQ_CLS"), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # A, B and, under SEQ_CLS, the head
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its model card's missing base
        model.save_pretrained(directory)
    return logits(model)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))


def refusal(directory: Path, task: str = "CAUSAL_LM") -> str:
    """The one-line error of a refused adapter; the model must be unchanged."""
    model = carrier(task == "SEQ_CLS")
    with pytest.raises(LoRAError) as error:
        load_adapter(directory, model)
    assert not lora_modules(model) and all(p.requires_grad for p in model.parameters())
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(directory))
    return message


# Round trips


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": [*ATTENTION]},
        {"target_modules": ["v_proj", "down_proj"], "use_rslora": True},
        {"target_modules": "all-linear", "init_lora_weights": "gaussian"},  # saved as full names
        {"target_modules": ["q_proj"], "init_lora_weights": False, "lora_dropout": 0.5},
    ],
)
def test_an_adapter_of_peft_gives_its_logits(tmp_path: Path, task: str, settings: dict) -> None:
    theirs = from_peft(tmp_path, task, **settings)
    model = carrier(task == "SEQ_CLS")
    config, head, metadata = load_adapter(tmp_path, model)
    set_head(model, head)
    # The same fp32 operations, perhaps in another order, on logits of size 1 to 10.
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-5)
    assert (logits(carrier(task == "SEQ_CLS")) - theirs).abs().max() > 0.1
    assert (config.r, config.alpha, config.task_type) == (4, 6, task)
    assert config.use_rslora == settings.get("use_rslora", False)
    assert config.dropout == settings.get("lora_dropout", 0.0)
    assert metadata == {} and (head is not None) == (task == "SEQ_CLS")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"targets": ATTENTION + MLP, "use_rslora": False}, {"targets": ("k_proj",), "alpha": 2.5}],
)
def test_peft_reads_ours(tmp_path: Path, task: str, changes: dict) -> None:
    model = saved(tmp_path / "adapter", task, **changes)
    carrier(task == "SEQ_CLS").save_pretrained(tmp_path / "base")
    auto = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    base = auto.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        # PEFT warns of a missing key, and leaves what it would hold as it was drawn.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)  # as above


@pytest.mark.parametrize("task", TASKS)
def test_files_are_those_of_peft(tmp_path: Path, task: str) -> None:
    """The same keys, shapes and dtypes, and in the config only fields and values that PEFT has."""
    from_peft(tmp_path / "theirs", task, lora_alpha=6.0, lora_dropout=0.1, use_rslora=True)
    saved(tmp_path / "ours", task, base_model="")
    described = {}
    for side in ("ours", "theirs"):
        with safe_open(tmp_path / side / "adapter_model.safetensors", "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            described[side] = {k: (s.get_shape(), s.get_dtype()) for k, s in slices.items()}
    assert described["ours"] == described["theirs"]
    assert len(described["ours"]) == 16 + (task == "SEQ_CLS")
    assert (HEAD_KEY in described["ours"]) == (task == "SEQ_CLS")
    ours, theirs = (
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("ours", "theirs")
    )
    assert sorted(ours.pop("target_modules")) == sorted(theirs.pop("target_modules"))
    assert ours == {name: theirs[name] for name in ours}
    # What PEFT takes for the fields that we leave out is what it wrote itself.
    loaded = peft.PeftConfig.from_pretrained(tmp_path / "ours").to_dict()
    assert {name: loaded[name] for name in theirs} == theirs


@pytest.mark.parametrize("task", TASKS)
def test_own_round_trip_is_exact(tmp_path: Path, task: str) -> None:
    config = config_for(task, targets=ATTENTION + MLP)
    model, head = adapted(task, config)
    metadata = {"base_fingerprint": "sha256:正面", "step": "3"}
    save_adapter(tmp_path, model, config, head, metadata)
    other = carrier(task == "SEQ_CLS")
    read, read_head, read_metadata = load_adapter(tmp_path, other)
    assert (read, read_metadata) == (config, metadata)
    assert read == read_adapter_config(tmp_path)
    set_head(other, read_head)
    assert torch.equal(logits(other), logits(model))
    trainable = {n for n, p in other.named_parameters() if p.requires_grad} - {"score.weight"}
    assert trainable == set(lora_parameters(other))
    assert not any(module.training for module in other.modules())
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_dropout_is_the_one_in_the_config(tmp_path: Path) -> None:
    saved(tmp_path, "CAUSAL_LM")
    for dropout in (0.1, 0.0, 0.3):
        edit_config(tmp_path, lora_dropout=dropout)
        model = carrier()
        config, _, _ = load_adapter(tmp_path, model)
        assert {m.dropout for m in lora_modules(model).values()} == {config.dropout} == {dropout}


def test_an_adapter_in_bf16_is_read_into_fp32(tmp_path: Path) -> None:
    saved(tmp_path, "SEQ_CLS")
    edit_tensors(tmp_path, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    model = carrier(classifier=True)
    _, head, _ = load_adapter(tmp_path, model)
    assert {t.dtype for t in (head, *lora_parameters(model).values())} == {torch.float32}


def test_all_linear_means_the_seven(tmp_path: Path) -> None:
    saved(tmp_path, "CAUSAL_LM")
    edit_config(tmp_path, target_modules="all-linear")
    assert read_adapter_config(tmp_path).targets == ATTENTION + MLP


# Qwen3.5: other modules, and two forms of keys

LONG, SHORT = "base_model.model.model.language_model.", "base_model.model.model."
NARROW = ("in_proj_a", "in_proj_b")


@pytest.fixture(scope="module")
def qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only checkpoint."""
    directory = tmp_path_factory.mktemp("qwen3_5")
    make_reference(directory, "qwen3_5", pad_token_id=0)
    return directory


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a model of images, all in fp32 so that scores can be compared."""
    directory = tmp_path_factory.mktemp("released")
    make_reference(directory, "qwen3_5", pad_token_id=0)
    with_images(directory, torch.float32)
    return directory


@torch.no_grad()
def scores(model: nn.Module, head: Tensor | None) -> Tensor:
    """Of our model: logits, or the head's scores at the last token."""
    h = model(IDS)
    return model.logits(h) if head is None else h[:, -1] @ head.T


def by_peft(base: nn.Module, directory: Path, task: str, targets: object, **more: object) -> Tensor:
    """Write an adapter that PEFT made of the base; returns the logits of text."""
    config = peft.LoraConfig(task_type=task, r=4, lora_alpha=6, target_modules=targets, **more)
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return logits(model)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("base", ["qwen3_5", "released"])
@pytest.mark.parametrize(
    "targets",
    [[*ATTENTION, *DELTA_RULE], [*NARROW, "down_proj"], "all-linear", ["layers.2.mlp.up_proj"]],
)
def test_an_adapter_of_peft_on_qwen3_5(base, task, targets, tmp_path, request):
    """PEFT on transformers' text model, and on its model of images and text: two forms of keys."""
    directory = request.getfixturevalue(base)
    if base == "qwen3_5":
        kind = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    else:
        kind = Qwen3_5ForConditionalGeneration
        kind = kind if task == "CAUSAL_LM" else Qwen3_5ForSequenceClassification
        targets = [*ATTENTION, *DELTA_RULE, *MLP, *NARROW] if targets == "all-linear" else targets
    head = {} if task == "CAUSAL_LM" else {"num_labels": 2}
    theirs = by_peft(kind.from_pretrained(directory, **head), tmp_path, task, targets)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all(key.startswith(LONG) == (base == "released") for key in keys - {HEAD_KEY})
    model = load_model(directory)
    plain = scores(model, None)
    _, head, _ = load_adapter(tmp_path, model)
    # The same fp32 operations in another order, 4 layers, on logits of size 1 to 10.
    torch.testing.assert_close(scores(model, head), theirs, rtol=0, atol=1e-4)
    if task == "CAUSAL_LM":
        assert (theirs - plain).abs().max() > 0.01
    other = load_model(request.getfixturevalue({"qwen3_5": "released"}.get(base, "qwen3_5")))
    load_adapter(tmp_path, other)  # either form fits either checkpoint, whose text is the same
    assert torch.equal(scores(other, head), scores(model, head))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("targets", [ATTENTION + DELTA_RULE, DELTA_RULE + MLP, NARROW])
def test_peft_reads_ours_on_qwen3_5(qwen3_5, task, targets, tmp_path):
    model = load_model(qwen3_5)
    plain = scores(model, None)
    inject_lora(model, targets, 4, 6.0, 0.1, True)
    redraw_lora(model)
    head = None
    if task == "SEQ_CLS":
        head = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    save_adapter(tmp_path, model, config_for(task, targets=targets), head)
    auto = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    base = auto.from_pretrained(qwen3_5, **({} if head is None else {"num_labels": 2}))
    theirs = logits(peft.PeftModel.from_pretrained(base, tmp_path).eval())
    # As above.
    torch.testing.assert_close(scores(model, head), theirs, rtol=0, atol=1e-4)
    assert head is not None or (theirs - plain).abs().max() > 0.01


def test_all_linear_is_what_the_model_has(qwen3_5, tmp_path):
    by_peft(AutoModelForCausalLM.from_pretrained(qwen3_5), tmp_path, "CAUSAL_LM", "all-linear")
    edit_config(tmp_path, target_modules="all-linear")
    config, _, _ = load_adapter(tmp_path, load_model(qwen3_5))
    assert {*config.targets} == {*ATTENTION, *DELTA_RULE, *MLP, *NARROW}


def test_full_names_of_the_longer_form(released, tmp_path):
    name = "model.language_model.layers.1.linear_attn.out_proj"
    base = Qwen3_5ForConditionalGeneration.from_pretrained(released)
    theirs = by_peft(base, tmp_path, "CAUSAL_LM", [name])
    edit_config(tmp_path, target_modules=[name])
    model = load_model(released)
    config, _, _ = load_adapter(tmp_path, model)
    assert config.targets == ("model.layers.1.linear_attn.out_proj",) == (*lora_modules(model),)
    torch.testing.assert_close(scores(model, None), theirs, rtol=0, atol=1e-4)


def rename(start: str, other: str, count: int | None = None) -> Callable[[dict], None]:
    """A change of the first `count` keys that begin with `start`; None: of all."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in sorted(key for key in tensors if key.startswith(start))[:count]:
            tensors[other + key.removeprefix(start)] = tensors.pop(key)

    return change


@pytest.mark.parametrize(
    "change",
    {
        "one of the other form": rename(SHORT, LONG, 1),
        "all but one of the other form": lambda t: (
            rename(SHORT, LONG)(t),
            rename(LONG, SHORT, 1)(t),
        ),
        "both forms of one": lambda t: t.update(
            {LONG + key.removeprefix(SHORT): t[key].clone() for key in sorted(t)[:1]}
        ),
        "both forms of all": lambda t: t.update(
            {LONG + key.removeprefix(SHORT): t[key].clone() for key in sorted(t)}
        ),
        "on images": lambda t: (
            rename(SHORT, LONG)(t),
            t.update({SHORT + "visual.blocks.0.attn.qkv.lora_A.weight": torch.ones(4, 16)}),
        ),
        "nothing that matches": rename(SHORT, "base_model.model.language_model.model."),
        "nothing": lambda t: t.clear(),
    }.items(),
    ids=lambda item: item[0],
)
def test_keys_of_both_forms_or_of_none(qwen3_5, change, tmp_path):
    targets = [*ATTENTION, *DELTA_RULE]
    by_peft(AutoModelForCausalLM.from_pretrained(qwen3_5), tmp_path, "CAUSAL_LM", targets)
    edit_tensors(tmp_path, change[1])
    model = load_model(qwen3_5)
    with pytest.raises(LoRAError) as error:
        load_adapter(tmp_path, model)
    line = str(error.value)
    assert "\n" not in line and ("missing" in line or "unexpected" in line)
    assert not lora_modules(model)


def test_a_convolution_is_no_target(qwen3_5):
    for target in ("conv1d", "linear_attn", "A_log"):
        with pytest.raises(LoRAError, match=f"{target}.*names no linear layer.*in_proj_qkv"):
            inject_lora(load_model(qwen3_5), ["q_proj", target], 4, 6.0, 0.0)


def test_qwen2_has_no_gated_delta_rule():
    with pytest.raises(LoRAError, match="in_proj_qkv"):
        inject_lora(load_model(TINY), DELTA_RULE, 4, 6.0, 0.0)


# Writing


def test_a_save_that_fails_leaves_the_earlier_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "SEQ_CLS")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, "SEQ_CLS", r=2)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    monkeypatch.undo()
    saved(tmp_path, "SEQ_CLS", r=2)
    assert read_adapter_config(tmp_path).r == 2
    assert sorted(os.listdir(tmp_path)) == sorted(before)


def test_both_files_are_synced_before_either_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    saved(tmp_path, "CAUSAL_LM")
    assert calls == ["fsync", "fsync", "replace", "replace"]


def test_what_was_loaded_outlives_its_file(tmp_path: Path) -> None:
    saved(tmp_path, "SEQ_CLS")
    model = carrier(classifier=True)
    _, head, _ = load_adapter(tmp_path, model)
    kept, before = head.clone(), logits(model)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # the same file, not a new one renamed over it
    assert torch.equal(head, kept) and torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 8},
        {"alpha": 7.0},
        {"use_rslora": False},
        {"targets": ("q_proj",)},
        {"targets": (*ATTENTION, *MLP)},
    ],
)
def test_a_config_that_is_not_the_models_is_not_saved(tmp_path: Path, changes: dict) -> None:
    model, _ = adapted("CAUSAL_LM")
    with pytest.raises(ValueError, match="does not have the LoRA"):
        save_adapter(tmp_path / "adapter", model, config_for("CAUSAL_LM", **changes))
    with pytest.raises(ValueError, match="does not have the LoRA"):
        save_adapter(tmp_path / "adapter", carrier(), config_for("CAUSAL_LM"))
    assert not (tmp_path / "adapter").exists()


def test_a_head_goes_with_seq_cls_alone(tmp_path: Path) -> None:
    model, head = adapted("SEQ_CLS")
    with pytest.raises(ValueError, match="SEQ_CLS"):
        save_adapter(tmp_path, model, config_for("SEQ_CLS"))
    with pytest.raises(ValueError, match="SEQ_CLS"):
        save_adapter(tmp_path, model, config_for("CAUSAL_LM"), head)


# Refusals: the config

NOT_PLAIN = {
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "lora_bias": True,
    "fan_in_fan_out": True,
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "layer_replication": [[0, 1]],
    "target_parameters": ["mlp.experts.weight"],
    "trainable_token_indices": [1],
    "exclude_modules": ["layers.0.self_attn.q_proj"],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 2.0},
    "lora_ga_config": {"direction": "ArB2r"},
    "arrow_config": {"top_k": 2},
    "alora_invocation_tokens": [1, 2],
    "ensure_weight_tying": True,
}
READ = {
    "peft_type": ["IA3", "ADALORA", None],
    "task_type": ["TOKEN_CLS", "SEQ_2_SEQ_LM", None],
    "bias": ["all", "lora_only"],
    "init_lora_weights": ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "mica", "new", 2],
    "modules_to_save": [["embed_tokens"], ["score"], ["lm_head", "score"], "score", {"a": 1}],
    "target_modules": [r".*\.q_proj$", [], None, ["q_proj", 3], [""], {"q_proj": 1}],
    "use_rslora": ["yes", None, 1],
}
NUMBERS = {
    "r": [0, -1, 4.0, "4", None, True, 2**16, 10**30],
    "lora_alpha": [0, -1, "6", None, float("nan"), float("inf"), 10**30],
    "lora_dropout": [1.0, -0.5, "0.1", None],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *NOT_PLAIN.items(),
        ("layers_to_transform", 0),  # the first layer alone, though false in Python
        ("a_field_of_the_future", "on"),
        *((field, value) for field, values in READ.items() for value in values),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path: Path, field: str, value: object) -> None:
    saved(tmp_path, "CAUSAL_LM")
    edit_config(tmp_path, **{field: value})
    message = refusal(tmp_path)
    assert f"adapter_config.json: {field} is {value!r}; expected " in message
    if field in NOT_PLAIN:
        # The name is PEFT's own, so that the refusal meets the files that it is for.
        assert field in {f.name for f in dataclasses.fields(peft.LoraConfig)}
        assert "only plain LoRA is read" in message


@pytest.mark.parametrize(
    ("field", "value"), [(f, value) for f, values in NUMBERS.items() for value in values]
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, field: str, value: object) -> None:
    saved(tmp_path, "CAUSAL_LM")
    edit_config(tmp_path, **{field: value})
    assert f"{field.removeprefix('lora_')} is {value!r}" in refusal(tmp_path)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "lora_dropout"])
def test_numbers_beyond_floats_are_refused(tmp_path: Path, field: str) -> None:
    saved(tmp_path, "CAUSAL_LM")
    edit_config(tmp_path, **{field: 10**400})
    assert len(refusal(tmp_path)) < 500


def test_a_rank_that_is_not_the_tensors_is_refused_before_it_is_built(tmp_path: Path) -> None:
    saved(tmp_path, "CAUSAL_LM")
    edit_config(tmp_path, r=2**16 - 1)
    started = time.perf_counter()
    assert f"expected ({2**16 - 1}, 16)" in refusal(tmp_path)
    assert time.perf_counter() - started < 1


def test_a_target_named_often_is_looked_for_once(tmp_path: Path) -> None:
    saved(tmp_path, "CAUSAL_LM")
    edit_config(tmp_path, target_modules=[*ATTENTION] * 25_000)
    started = time.perf_counter()
    config, _, _ = load_adapter(tmp_path, carrier())
    assert config.targets == ATTENTION
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("modules", [["embed_tokens"], ["score", "lm_head"]])
def test_a_classifier_saves_its_head_alone(tmp_path: Path, modules: list[str]) -> None:
    saved(tmp_path, "SEQ_CLS")
    edit_config(tmp_path, modules_to_save=modules)
    assert "modules_to_save is" in refusal(tmp_path, "SEQ_CLS")


@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(NOT_PLAIN),
        dict.fromkeys(NOT_PLAIN, False) | {"a_field_of_the_future": {}, "another": ""},
        {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}, "revision": "main"},
        {"inference_mode": False, "peft_version": "9.9", "runtime_config": {"a": 1}},
    ],
)
def test_what_changes_nothing_is_read(tmp_path: Path, fields: dict) -> None:
    saved(tmp_path, "CAUSAL_LM")
    edit_config(tmp_path, **fields)
    assert read_adapter_config(tmp_path) == config_for("CAUSAL_LM")


def test_an_old_config_without_optional_fields_is_read(tmp_path: Path) -> None:
    saved(tmp_path, "CAUSAL_LM", dropout=0.0, use_rslora=False, base_model="")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    needed = ("peft_type", "task_type", "r", "lora_alpha", "target_modules")
    (tmp_path / "adapter_config.json").write_text(json.dumps({n: fields[n] for n in needed}))
    expected = config_for("CAUSAL_LM", dropout=0.0, use_rslora=False, base_model="")
    assert read_adapter_config(tmp_path) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, "No such file"),
        (b"", "cannot be read as JSON"),
        (b'{"r": 4', "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[4]", "found a list"),
        (b"{}", "peft_type is None"),
    ],
)
def test_an_unreadable_config_is_refused(tmp_path: Path, data: bytes | None, expected: str) -> None:
    saved(tmp_path, "CAUSAL_LM")
    path = tmp_path / "adapter_config.json"
    path.unlink() if data is None else path.write_bytes(data)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pipes_and_devices_are_refused(tmp_path: Path, name: str) -> None:
    """Nobody writes into the pipe, and the device never ends."""
    saved(tmp_path, "CAUSAL_LM")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert re.search(f"{name}: .*not a regular file", refusal(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert re.search(f"{name}: .*not a regular file", refusal(tmp_path))


def test_a_config_without_end_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "CAUSAL_LM")
    os.truncate(tmp_path / "adapter_config.json", 2**40)  # sparse: it takes no room on the disk
    assert "(not a regular file of at most" in refusal(tmp_path)


def test_metadata_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "CAUSAL_LM")
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    nested = '{"a":' * 100_000 + "1" + "}" * 100_000
    path.write_bytes(safetensors.torch.save(tensors, {"metadata": nested}))
    assert "expected an adapter's safetensors file" in refusal(tmp_path)


# Refusals: the tensors


def test_a_missing_tensor_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "CAUSAL_LM")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "No such file" in refusal(tmp_path)
    (tmp_path / "adapter_model.safetensors").mkdir()
    assert "expected an adapter's safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_tensor_file_is_refused(tmp_path: Path, keep: float) -> None:
    saved(tmp_path, "CAUSAL_LM")
    path = tmp_path / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    assert "adapter_model.safetensors: " in refusal(tmp_path)


KEY = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"  # (8, 4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(KEY), f"expected 16 tensors, 1 wrong ({KEY} is missing)"),
        (lambda t: [t.pop(k) for k in sorted(t)[:3]], "3 wrong ("),
        (lambda t: t.update(extra=torch.ones(1)), "1 wrong (extra is unexpected)"),
        (lambda t: t.update({HEAD_KEY: torch.ones(2, 16)}), f"1 wrong ({HEAD_KEY} is unexpected)"),
        (
            lambda t: t.update({KEY.replace("k_proj", "z_proj"): t.pop(KEY)}),
            f"2 wrong ({KEY} is missing; {KEY.replace('k_proj', 'z_proj')} is unexpected)",
        ),
        (
            lambda t: t.update({KEY: torch.ones(8, 5)}),
            f"1 wrong ({KEY} has shape (8, 5), expected (8, 4))",
        ),
        (lambda t: t.update({KEY: t[KEY].T.contiguous()}), "shape (4, 8), expected (8, 4)"),
        (
            lambda t: t[KEY].view(-1)[3].fill_(float("nan")),
            f"{KEY} has other values than finite floats of 16 to 64 bits",
        ),
        (
            lambda t: t[KEY].view(-1)[3].fill_(float("-inf")),
            f"{KEY} has other values than finite floats of 16 to 64 bits",
        ),
        (
            lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}),
            f"{KEY} has other values than finite floats of 16 to 64 bits",
        ),
        (  # finite, but not in fp32, which it is copied into
            lambda t: t.update({KEY: t[KEY].double() + 1e300}),
            f"{KEY} has other values than finite floats of 16 to 64 bits",
        ),
        (
            lambda t: t.update({KEY: t[KEY].int()}),
            f"{KEY} has other values than finite floats of 16 to 64 bits",
        ),
        (lambda t: t.update({"two\nlines": torch.ones(1)}), "1 wrong (two lines is unexpected)"),
    ],
)
def test_other_tensors_than_expected_are_refused(
    tmp_path: Path, change: Callable, expected: str
) -> None:
    saved(tmp_path, "CAUSAL_LM")
    edit_tensors(tmp_path, change)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(HEAD_KEY), f"expected 17 tensors, 1 wrong ({HEAD_KEY} is missing)"),
        (
            lambda t: t.update({HEAD_KEY: torch.ones(16)}),
            f"1 wrong ({HEAD_KEY} has shape (16,), expected",
        ),
        (
            lambda t: t[HEAD_KEY].fill_(float("nan")),
            f"{HEAD_KEY} has other values than finite floats of 16 to 64 bits",
        ),
        (
            lambda t: t.update({"base_model.model.score.bias": torch.ones(2)}),
            "1 wrong (base_model.model.score.bias is unexpected)",
        ),
    ],
)
def test_other_heads_than_expected_are_refused(
    tmp_path: Path, change: Callable, expected: str
) -> None:
    saved(tmp_path, "SEQ_CLS")
    edit_tensors(tmp_path, change)
    assert expected in refusal(tmp_path, "SEQ_CLS")


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "CAUSAL_LM")
    other = carrier()
    del other.model.layers[1]
    # The name is the config's.
    with pytest.raises(LoRAError, match=r"expected 8 tensors, 8 wrong \(.* on, models/tiny"):
        load_adapter(tmp_path, other)
    with pytest.raises(LoRAError, match="'q_proj' names no linear layer; the model has "):
        load_adapter(tmp_path, nn.Sequential(nn.Linear(4, 4)))
    twice = copy.deepcopy(saved(tmp_path, "CAUSAL_LM"))
    with pytest.raises(LoRAError, match="already has LoRA"):
        load_adapter(tmp_path, twice)


# On the command line: the base that the config names


@pytest.mark.parametrize(
    ("name", "is_another"),
    [
        ("Qwen/Qwen2.5-7B", True),
        ("/somewhere/else/qwen2.5-7b", True),
        ("/cache/hub/models--owner--other/snapshots/tiny", True),
        ("tiny", False),
        ("owner/Tiny@main", False),
        ("/somewhere/else/tiny/", False),
        ("/cache/hub/models--owner--tiny/snapshots/0123abc", False),
        (None, False),
    ],
)
def test_another_base_by_name_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str | None, is_another: bool
) -> None:
    """The tensors fit, and nothing says on which weights they were trained."""
    shutil.copytree(Path(__file__).parent / "compat/peft_adapter", tmp_path / "adapter")
    edit_config(tmp_path / "adapter", base_model_name_or_path=name)
    method = ["--method", "lora_label_scoring", "--adapter", str(tmp_path / "adapter")]
    data = str(Path(__file__).parent / "compat/test.tsv")
    assert not evaluate.main([*method, "--model", "tiny", "--data", data, "--limit", "2"])
    error = capsys.readouterr().err
    line = f"warning: {tmp_path / 'adapter'} was trained on {name}, by its adapter_config.json"
    assert (f"{line}; it is put on tiny\n" in error) == is_another
    assert ("was trained on" in error) == is_another


def test_the_name_counts_for_nothing_where_the_fingerprint_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = load_model(TINY)
    inject_lora(model, ATTENTION, 2, 4.0, 0.0)
    config = LoRAConfig(2, 4.0, 0.0, ATTENTION, False, "CAUSAL_LM", "Qwen/Qwen2.5-7B")
    metadata = {"base_fingerprint": checkpoint_fingerprint(TINY)}
    save_adapter(tmp_path, model, config, None, metadata)
    attach_adapter(
        load_model(TINY), tmp_path, {"base_fingerprint": checkpoint_fingerprint(TINY)}, base="tiny"
    )
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="the model is not the one that was trained with"):
        attach_adapter(load_model(TINY), tmp_path, {"base_fingerprint": "another"}, base="tiny")
