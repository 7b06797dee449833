"""The training loop: its arithmetic on a toy, what it is made for on a small Qwen with LoRA."""

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import qwen_min.command.fit as fit_module
from lora import (
    ATTENTION,
    MLP,
    LoRAConfig,
    inject_lora,
    load_adapter,
    lora_parameters,
    save_adapter,
)
from qwen_min.command.fit import Stopped, Training, fit
from qwen_min.fast.batching import token_budget_batches
from qwen_min.fast.features import head_losses, pooled_features
from qwen_min.fast.label_scores import label_losses, score_labels
from qwen_min.files.probe import load_head, save_head
from qwen_min.files.run import checkpoints
from qwen_min.files.weights import fingerprint, load_model
from qwen_min.head import LinearHead
from qwen_min.metrics import log_loss
from qwen_min.prompt import Prompt
from qwen_min.training import Plan, TrainingFailed, best_step, learning_rate


@dataclass(frozen=True)
class Settings(Plan):
    """A plan, with what else the tests change: tokens of a forward, when to evaluate and save."""

    batch_tokens: int
    eval_every: int | None
    save_every: int


PLAN = Settings(
    epochs=2,
    batch_size=4,
    batch_tokens=10_000,
    lr=0.01,
    warmup=0.25,
    clip=1.0,
    eval_every=None,
    save_every=50,
    seed=3,
)
HUGE = 1e9


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Syncing guards against power cuts, which no test here makes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def before_step() -> Iterator[Callable[[Callable], None]]:
    """Call something with the optimizer's parameters right before each of its steps."""
    hooks = []

    def add(look: Callable[[list[Tensor]], None]) -> None:
        def hook(optimizer, *_):
            look([p for group in optimizer.param_groups for p in group["params"]])

        hooks.append(register_optimizer_step_pre_hook(hook))

    yield add
    for hook in hooks:
        hook.remove()


# The schedule


@pytest.mark.parametrize(
    ("steps", "warmup", "rates"),
    [
        # Two steps rise; then (1 + cos(π k/8)) / 2 for k = 0 … 7. It would be zero at the eleventh.
        (10, 0.2, [0.5, 1, 1, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806, 0]),
        (4, 0.0, [1, 0.85355, 0.5, 0.14645, 0]),
        (4, 0.3, [0.5, 1, 1, 0.5, 0]),  # a share of 1.2 steps is two of them
        (3, 0.9, [1 / 3, 2 / 3, 1]),
        (1, 0.1, [1]),
        (1, 0.0, [1, 0]),
    ],
)
def test_learning_rate_by_hand(steps, warmup, rates):
    found = [learning_rate(step, steps, 4.0, warmup) for step in range(len(rates))]
    np.testing.assert_allclose(found, [4 * rate for rate in rates], atol=4e-5)  # five digits above


# The loop, on a toy


def make_training(settings: Settings, parameters: dict, lengths: list[int], process) -> Training:
    """`process` brings loss, evaluate and write."""

    def parts(rows: list[int]) -> list[list[int]]:
        batches = token_budget_batches([lengths[row] for row in rows], settings.batch_tokens)
        return [[rows[i] for i in batch] for batch in batches]

    return Training(
        parameters,
        lengths,
        process.loss,
        parts,
        process.evaluate,
        process.write,
        settings.eval_every,
        settings.save_every,
    )


class Toy:
    """Linear regression, one weight vector; a row's loss is a sum over its "tokens"."""

    def __init__(self, run: Path, rows: int = 11, plan: Plan = PLAN):
        generator = torch.Generator().manual_seed(0)
        self.lengths = [13 + row for row in range(rows)]
        self.x = [torch.randn(n, 3, generator=generator).double() for n in self.lengths]
        self.weight = nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64))
        self.run, self.plan = run, plan
        run.mkdir(exist_ok=True)
        self.forwards: list[list[int]] = []
        self.held_out_losses = iter(np.linspace(1, 0.5, 1000))

    def row_loss(self, row: int) -> Tensor:
        return (self.x[row] @ self.weight - row).square().sum()

    def loss(self, rows: list[int]) -> Tensor:
        self.forwards.append(rows)
        return sum(self.row_loss(row) for row in rows)

    def evaluate(self) -> dict:
        return {"held_out_log_loss": next(self.held_out_losses)}

    def write(self, directory: Path) -> None:
        (directory / "weight").write_bytes(self.weight.detach().numpy().tobytes())

    def fit(self, checkpoint: Path | None = None) -> dict:
        if checkpoint:
            data = np.frombuffer((checkpoint / "weight").read_bytes())
            self.weight.data = torch.tensor(data)
        training = make_training(self.plan, {"weight": self.weight}, self.lengths, self)
        return fit(self.run, training, self.plan, checkpoint)

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "log.jsonl").read_text().splitlines()]

    def saved(self) -> list[int]:
        return [step for step, _ in checkpoints(self.run)]


def test_of_several_processes_one_stops_when_all_know_of_its_signal(tmp_path):
    """A signal between the exchanges of two steps: the others begin the second, so this one too."""
    toy, exchanges = Toy(tmp_path), []

    def combine(stop, loss):
        exchanges.append(loss)
        stop.agreed = stop.signal
        if len(exchanges) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    training = make_training(toy.plan, {"weight": toy.weight}, toy.lengths, toy)
    with pytest.raises(Stopped) as stopped:
        fit(tmp_path, replace(training, combine=combine), toy.plan)
    assert len(exchanges) == 2 and (stopped.value.signal, toy.saved()[-1]) == (signal.SIGTERM, 2)


def test_every_epoch_takes_every_row_once(tmp_path):
    toy = Toy(tmp_path)
    state = toy.fit()
    assert state["step"] == 6  # 11 rows by 4 are 3 steps, twice
    assert [len(rows) for rows in toy.forwards] == [4, 4, 3] * 2
    for epoch in (toy.forwards[:3], toy.forwards[3:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(11))
    assert toy.forwards[0] != toy.forwards[3]  # in another order each time


def test_log_has_a_line_for_each_step(tmp_path):
    toy = Toy(tmp_path)
    with torch.no_grad():
        losses = torch.stack([toy.row_loss(row) for row in range(11)])
    toy.fit()
    assert [line["step"] for line in toy.log()] == [1, 2, 3, 4, 5, 6]
    rates = [learning_rate(step, 6, 0.01, 0.25) for step in range(6)]
    assert [line["lr"] for line in toy.log()] == rates
    first = toy.log()[0]
    # The mean over the step's rows, each one's loss being a sum over its tokens.
    assert first["loss"] == pytest.approx(losses[toy.forwards[0]].mean().item(), rel=1e-12)
    assert first["tokens_per_s"] > 0


def test_steps_are_adamw_without_decay(tmp_path):
    """The loop against one written out: rate, mean over rows, clipping, AdamW, and nothing else."""
    toy = Toy(tmp_path)
    weight = nn.Parameter(toy.weight.detach().clone())
    toy.fit()
    optimizer = torch.optim.AdamW([weight], weight_decay=0.0)
    for step, rows in enumerate(toy.forwards):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 6, 0.01, 0.25)
        losses = [(toy.x[row] @ weight - row).square().sum() for row in rows]
        (weight.grad,) = torch.autograd.grad(sum(losses) / len(rows), weight)
        weight.grad *= min(1.0, 1.0 / weight.grad.norm().item())
        optimizer.step()
    # float64; the loop's own clipping divides by the norm plus 1e-6.
    torch.testing.assert_close(toy.weight, weight, rtol=0, atol=1e-6)
    assert not torch.allclose(weight, torch.full_like(weight, 0.1), atol=1e-3)


@pytest.mark.parametrize(("tokens", "sizes"), [(HUGE, [8]), (80, [4, 4]), (1, [1] * 8)])
def test_accumulation_changes_nothing(tokens, sizes, tmp_path):
    """1×8 = 2×4 = 8×1, with 13 to 20 tokens a row: a mean of means would weigh rows unequally."""
    whole = Toy(tmp_path / "whole", 8, replace(PLAN, batch_size=8, epochs=5))
    parts = Toy(tmp_path / "parts", 8, replace(whole.plan, batch_tokens=tokens))
    whole.fit(), parts.fit()
    assert [len(rows) for rows in parts.forwards] == sizes * 5
    # float64 sums of 132 terms in another order, and five steps of Adam.
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-12)
    for a, b in zip(whole.log(), parts.log(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-12)


def test_accumulation_over_a_smaller_last_batch(tmp_path):
    toys = [
        Toy(tmp_path / str(tokens), plan=replace(PLAN, batch_tokens=tokens)) for tokens in (1, HUGE)
    ]
    for toy in toys:
        toy.fit()
    torch.testing.assert_close(toys[0].weight, toys[1].weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [0.5, HUGE])
def test_the_whole_gradient_is_clipped(clip, tmp_path, before_step):
    norms = []
    before_step(lambda params: norms.append(params[0].grad.norm().item()))
    toy = Toy(tmp_path, plan=replace(PLAN, clip=clip))
    toy.fit()
    logged = [line["grad_norm"] for line in toy.log()]  # as it was before clipping
    assert min(logged) > 1
    np.testing.assert_allclose(norms, [min(norm, clip) for norm in logged], rtol=1e-5)


@pytest.mark.parametrize(
    ("eval_every", "save_every", "evaluated", "saved"),
    [
        (None, 50, [2, 4, 6], [2, 4, 6]),  # 3 steps an epoch: every two of them
        (4, 50, [4, 6], [4, 6]),  # always at the end
        (50, 50, [6], [6]),
        (4, 1, [4, 6], [1, 2, 3, 4, 5, 6]),
        (4, 3, [4, 6], [3, 4, 6]),
    ],
)
def test_when_it_evaluates_and_saves(eval_every, save_every, evaluated, saved, tmp_path):
    toy = Toy(tmp_path, plan=replace(PLAN, eval_every=eval_every, save_every=save_every))
    times, write = [], toy.write
    toy.write = lambda directory: (times.append(len(toy.log())), write(directory))
    state = toy.fit()
    assert [entry["step"] for entry in state["history"]] == evaluated
    assert times == saved


def test_only_the_best_and_the_last_checkpoint_stay(tmp_path):
    toy = Toy(tmp_path, plan=replace(PLAN, eval_every=1))
    toy.held_out_losses = iter([0.9, 0.4, 0.7, 0.4, 0.3, 0.8])
    seen, evaluate = [], toy.evaluate
    toy.evaluate = lambda: (seen.append(toy.saved()), evaluate())[1]
    state = toy.fit()
    seen.append(toy.saved())
    assert seen == [[], [1], [2], [2, 3], [2, 4], [5], [5, 6]]
    assert state["best_step"] == 5
    assert [entry["held_out_log_loss"] for entry in state["history"]] == [
        *(0.9, 0.4, 0.7, 0.4, 0.3, 0.8)
    ]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-5", "step-6"]


def test_best_step():
    history = [{"step": s, "held_out_log_loss": x} for s, x in ((2, 0.5), (4, 0.3), (6, 0.3))]
    assert best_step(history) == 4  # the first of equals
    assert best_step(history[:1]) == 2
    assert best_step([]) is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda loss, weight: loss * math.nan,
        lambda loss, weight: loss + math.inf,
        lambda loss, weight: loss + (weight - weight.detach()).sum().sqrt(),  # gradient alone
    ],
    ids=["nan", "infinite", "gradient"],
)
@pytest.mark.parametrize("tokens", [1, HUGE])
def test_what_is_not_finite_stops_before_the_step(wrong, tokens, tmp_path, before_step):
    plan = replace(PLAN, save_every=1, eval_every=50, batch_tokens=tokens)
    toy = Toy(tmp_path, plan=plan)
    right, made = toy.loss, []
    before_step(lambda params: made.append(1))

    def loss(rows: list[int]) -> Tensor:
        return wrong(right(rows), toy.weight) if len(made) == 2 else right(rows)

    toy.loss = loss
    with pytest.raises(TrainingFailed, match=r"^step 3: loss .* gradient norm") as error:
        toy.fit()
    assert "\n" not in str(error.value)
    assert len(made) == 2
    assert toy.saved() == [2]
    weight = toy.weight.detach().numpy().tobytes()
    assert (tmp_path / "checkpoints" / "step-2" / "weight").read_bytes() == weight
    assert [line["step"] for line in toy.log()] == [1, 2]
    # It names the rows of the step.
    rows = [row for forward in toy.forwards for row in forward][8:]
    assert set(rows) <= set(error.value.rows)
    assert tokens == 1 or sorted(rows) == sorted(error.value.rows)
    # The same run, gone on with from there, is as good as one that never failed.
    toy.loss, other = right, Toy(tmp_path / "other", plan=plan)
    toy.fit(tmp_path / "checkpoints" / "step-2"), other.fit()
    assert torch.equal(toy.weight, other.weight)


def test_handlers_are_put_back(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    Toy(tmp_path / "whole").fit()
    assert [signal.getsignal(number) for number in numbers] == before
    toy = Toy(tmp_path / "broken")
    toy.loss = lambda rows: 1 / 0
    with pytest.raises(ZeroDivisionError):
        toy.fit()
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_at_any_look_stops_after_a_checkpoint(tmp_path, monkeypatch):
    """Stopped says "saved": whenever the signal comes, the step it names must have been."""

    class Late:
        looks = late = 0

        @property
        def signal(self) -> int | None:
            self.looks += 1
            return signal.SIGTERM if self.looks > self.late else None

        def restore(self) -> None:
            pass

    monkeypatch.setattr(fit_module.run_files, "StopRequest", Late)
    stops = []
    for Late.late in range(30):
        toy = Toy(tmp_path / str(Late.late))
        try:
            toy.fit()
            break
        except Stopped as stopped:
            assert stopped.signal == signal.SIGTERM
            assert str(stopped) == f"stopped after step {toy.log()[-1]['step']}, saved"
            stops.append(toy.saved()[-1])
            assert toy.log()[-1]["step"] == stops[-1]
    assert set(stops) == {1, 2, 3, 4, 5}
    assert toy.saved() == [6]  # and in the last step there is nothing left to stop


# The loop, on a small Qwen


def prompts(rows: int, seed: int) -> tuple[list[Prompt], list[int]]:
    """Random rows of 3 to 30 tokens, with labels of one and of two tokens; and their classes."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 500, rng.integers(3, 30)).tolist() for _ in range(rows)]
    found = [Prompt(tuple(ids), ((7,), (8, 9)), False) for ids in texts]
    return found, [row % 2 for row in range(rows)]


class Run:
    """One training process: a model, its LoRA and maybe a head, as train.py puts them together."""

    def __init__(
        self, base: Path, run: Path, method: str, dtype: str = "auto", dropout: float = 0.1
    ):
        run.mkdir(exist_ok=True)
        whole = checkpoints(run)
        self.run, self.start = run, whole[-1][1] if whole else None
        self.model = load_model(base, dtype)
        self.frozen = dict(self.model.named_parameters())
        self.config = LoRAConfig(4, 8.0, dropout, (*ATTENTION, *MLP), False, "CAUSAL_LM", "tiny")
        torch.manual_seed(0)
        if self.start:
            load_adapter(self.start / "adapter", self.model)
        else:
            inject_lora(self.model, self.config.targets, 4, 8.0, dropout)
        self.parameters = lora_parameters(self.model)
        self.head = None
        if method == "head":
            self.head = nn.Parameter(torch.randn(2, 32) * 0.02)
            if self.start:
                self.head.data = load_head(self.start / "head.safetensors").weight
            self.parameters["score"] = self.head
        self.rows, self.classes = prompts(11, seed=0)
        self.held_out, self.held_out_classes = prompts(6, seed=1)
        self.seen: list[list[int]] = []
        self.at_loss = self.at_evaluation = self.at_save = lambda: None

    def loss(self, rows: list[int]) -> Tensor:
        self.seen.append(rows)
        self.at_loss()
        batch, classes = [self.rows[row] for row in rows], [self.classes[row] for row in rows]
        if self.head is None:
            return label_losses(self.model, batch, classes)
        return head_losses(self.model, self.head, batch, classes, False)

    def evaluate(self) -> dict:
        self.at_evaluation()
        self.model.eval()
        if self.head is None:
            scores = score_labels(self.model, self.held_out)
        else:
            features = pooled_features(self.model, self.held_out, "last", False, 2048)[:, 0]
            scores = F.linear(features, self.head.detach()).double().numpy()
        self.model.train()
        return {"held_out_log_loss": log_loss(self.held_out_classes, scores)}

    def write(self, directory: Path) -> None:
        save_adapter(directory / "adapter", self.model, self.config)
        if self.head is not None:
            head = LinearHead(self.head.detach(), None, 3, "last")
            save_head(directory / "head.safetensors", head)
        self.at_save()

    def fit(self, plan: Settings = PLAN) -> dict:
        self.model.train()
        lengths = [len(prompt.ids) for prompt in self.rows]
        training = make_training(plan, self.parameters, lengths, self)
        return fit(self.run, training, plan, self.start)


def outcome(run: Path) -> tuple[dict[str, bytes], list[dict], list[dict]]:
    """What must be equal: bytes of the last checkpoint, the log, the history; times left out."""
    last = checkpoints(run)[-1][1]
    timed = ("state.json", "manifest.json")
    files = {str(path.relative_to(last)): path for path in last.rglob("*") if path.is_file()}
    assert {"optimizer.safetensors", "adapter/adapter_model.safetensors"} <= files.keys()
    contents = {name: path.read_bytes() for name, path in files.items() if name not in timed}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in log:
        del line["tokens_per_s"]
    return contents, log, json.loads((last / "state.json").read_text())["history"]


@pytest.fixture(scope="module", params=["head", "labels"])
def straight(request, reference, tmp_path_factory):
    """A run that is never stopped: method, outcome, rows in their order."""
    run = tmp_path_factory.mktemp("straight")
    process = Run(reference[0], run, request.param)
    process.fit()
    return request.param, outcome(run), process.seen


def raise_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def on_call(number: int, action: Callable[[], object]) -> Callable[[], None]:
    """A function that does `action` on its number-th call."""
    calls = iter(range(1, 1000))
    return lambda: action() if next(calls) == number else None


@pytest.mark.parametrize(
    ("place", "call", "step"),
    [
        ("at_loss", 1, 1),  # before any evaluation
        ("at_loss", 2, 2),  # in a step that is evaluated after it
        ("at_loss", 3, 3),  # at the end of an epoch
        ("at_loss", 5, 5),  # inside the second
        ("at_evaluation", 2, 4),
        ("at_save", 1, 2),
    ],
)
def test_a_stopped_run_ends_as_one_never_stopped(place, call, step, straight, reference, tmp_path):
    method, expected, rows = straight
    first = Run(reference[0], tmp_path, method)
    setattr(first, place, on_call(call, raise_signal))
    with pytest.raises(Stopped) as stopped:
        first.fit()
    assert (stopped.value.signal, checkpoints(tmp_path)[-1][0]) == (signal.SIGTERM, step)
    assert outcome(tmp_path)[0] != expected[0]
    second = Run(reference[0], tmp_path, method)
    seconds = json.loads((second.start / "state.json").read_text())["seconds"]
    state = second.fit()
    assert first.seen + second.seen == rows  # none repeated, none skipped
    assert outcome(tmp_path) == expected
    assert state["seconds"] > seconds


def test_a_crashed_run_ends_as_one_never_stopped(straight, reference, tmp_path):
    """It dies in step 6; the last checkpoint is of step 4, the log has a line more."""
    method, expected, _ = straight
    first = Run(reference[0], tmp_path, method)
    first.at_loss = on_call(6, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.fit()
    assert checkpoints(tmp_path)[-1][0] == 4
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5
    Run(reference[0], tmp_path, method).fit()
    assert outcome(tmp_path) == expected


def test_a_finished_run_has_nothing_to_go_on_with(straight, reference, tmp_path):
    method, expected, _ = straight
    state = Run(reference[0], tmp_path, method).fit()
    again = Run(reference[0], tmp_path, method)
    assert again.fit() == state
    assert again.seen == []
    assert outcome(tmp_path) == expected


def test_another_seed_is_another_run(straight, reference, tmp_path):
    """The equality above is no accident: order and dropout come from the seed."""
    method, expected, rows = straight
    other = Run(reference[0], tmp_path, method)
    other.fit(replace(PLAN, seed=4))
    assert other.seen != rows
    assert outcome(tmp_path)[0] != expected[0]


@pytest.mark.parametrize("method", ["head", "labels"])
def test_accumulation_of_a_real_loss(method, reference, tmp_path, before_step):
    """Rows of 3 to 30 tokens, one forward or eleven. Without dropout, drawn for each forward."""
    gradients = []
    for tokens in (HUGE, 1):
        process = Run(reference[0], tmp_path / str(tokens), method, dropout=0.0)
        for parameter in process.parameters.values():
            if not parameter.any():  # B begins at zero, which would leave A without a gradient
                nn.init.normal_(parameter, std=0.1)
        found: dict[str, Tensor] = {}

        def keep(_params, parameters=process.parameters, found=found):
            # The first process's hook is called again, after zero_grad.
            found |= {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

        before_step(keep)
        process.fit(replace(PLAN, batch_size=11, epochs=1, batch_tokens=tokens, clip=HUGE))
        gradients.append(found)
        assert len(process.seen) == (1 if tokens == HUGE else 11)
    assert gradients[0].keys() == process.parameters.keys()
    for name, whole in gradients[0].items():
        # fp32 sums over rows in another order, relative to the tensor's largest entry.
        assert (whole - gradients[1][name]).abs().max() < 1e-5 * whole.abs().max(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["head", "labels"])
def test_only_what_is_trained_moves(method, dtype, reference, tmp_path, before_step):
    """Three steps at the default rate. In bf16 most of A would not move: they round away."""
    process = Run(reference[0], tmp_path, method, dtype)
    assert process.model.lm_head_weight.dtype == getattr(torch, dtype)
    frozen = fingerprint(process.frozen.items())
    begin = {name: p.detach().clone() for name, p in process.parameters.items()}
    after_one: dict[str, Tensor] = {}

    def look(params: list[Tensor]) -> None:
        assert all(p.grad is None for p in process.frozen.values())
        if len(process.seen) == 2:
            after_one.update((name, p.detach().clone()) for name, p in process.parameters.items())

    before_step(look)
    process.fit(replace(PLAN, epochs=1, lr=2e-4, warmup=0.0))
    assert len(process.seen) == 3
    for name, parameter in process.parameters.items():
        assert parameter.dtype == torch.float32
        # AdamW moves every entry that has a gradient.
        assert (parameter != begin[name]).float().mean() > 0.95, name
        # In the first step A stays, since B is zero; B and the head move.
        moved = not torch.equal(after_one[name], begin[name])
        assert moved == (not name.endswith("lora_A")), name
    assert ("score" in process.parameters) == (method == "head")
    assert fingerprint(process.frozen.items()) == frozen
    assert process.model.lm_head_weight is process.frozen["model.embed_tokens.weight"]
    assert all(p.grad is None and not p.requires_grad for p in process.frozen.values())
