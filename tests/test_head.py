"""Pooled states, the probe that is solved on them, and the losses that LoRA is trained by."""

import copy
import os

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import make_reference
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sk_log_loss
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

import qwen_min.fast.features as features_module
import qwen_min.fast.label_scores as label_scores_module
import qwen_min.files.probe as probe_module
import qwen_min.head as head_mechanics
from lora import ATTENTION, MLP, inject_lora, lora_parameters
from qwen_min.command import plain as plain_forms
from qwen_min.command.arguments import candidate_layers
from qwen_min.command.fit import parse_class_weights
from qwen_min.command.summary import format_layers
from qwen_min.errors import UserError
from qwen_min.fast.features import head_losses, pooled_features
from qwen_min.fast.label_scores import label_losses, last_states
from qwen_min.files.probe import cached_features, load_head, save_head
from qwen_min.files.weights import load_model
from qwen_min.head import (
    L2_GRID,
    POOLINGS,
    LinearHead,
    fit_head,
    fit_layers,
    pooled_state,
    solve_logistic,
)
from qwen_min.metrics import log_loss
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt, build_prompts
from qwen_min.scoring import label_loss, score_label
from qwen_min.tokenizer import Tokenizer

# fp32, small checkpoints, states of size 1 to 10: sums in another order.
FP32 = {"atol": 1e-5, "rtol": 1e-5}
HUGE = 10**9
ONE_TOKEN = ((7,), (8,))
SEVERAL = ((7, 8, 9), (10, 11))
MIXED = ((7,), (8, 9))
PREFIX = (3, 1, 4, 1, 5)  # what prompts begin with
# The definition; the fast form, keeping activations or recomputing them.
FORMS = [(True, False), (False, False), (False, True)]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Syncing guards against power cuts, which no test here makes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def pair(request, tmp_path_factory) -> tuple[Qwen, nn.Module]:
    directory = tmp_path_factory.mktemp(request.param)
    reference = make_reference(directory, request.param)
    return load_model(directory), reference


@pytest.fixture(scope="module")
def model(reference) -> Qwen:
    return load_model(reference[0])


def random_prompts(
    count: int, labels=ONE_TOKEN, seed: int = 0, prefix: tuple[int, ...] = ()
) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 500, rng.integers(1, 40)).tolist() for _ in range(count)]
    return [Prompt((*prefix, *ids), labels, False) for ids in texts]


def pool(states: Tensor, pooling: str) -> Tensor:
    """States of one text (T, D), by what the words say."""
    return states[-1] if pooling == "last" else states.sum(dim=0) / len(states)


# Pooled states


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("budget", [1, 60, HUGE])
def test_features_equal_definition_and_transformers(pooling, budget, pair):
    ours, theirs = pair
    prompts = random_prompts(9)
    with torch.no_grad():
        states = [
            theirs(torch.tensor([p.ids]), output_hidden_states=True).hidden_states for p in prompts
        ]
    # (n, L + 1, D): the embedding, each layer, the last after the final norm.
    expected = torch.stack(
        [torch.stack([pool(layer[0], pooling) for layer in text]) for text in states]
    )
    every = pooled_features(ours, prompts, pooling, True, budget)
    torch.testing.assert_close(every, expected, **FP32)
    last = pooled_features(ours, prompts, pooling, False, budget)
    assert last.shape == (9, 1, 32) and last.dtype == torch.float32
    torch.testing.assert_close(last[:, 0], expected[:, -1], **FP32)
    definition = torch.stack([pooled_state(ours, p.ids, pooling) for p in prompts])
    torch.testing.assert_close(definition, expected[:, -1], **FP32)
    for layer in range(expected.shape[1]):
        found = torch.stack([pooled_state(ours, p.ids, pooling, layer) for p in prompts])
        torch.testing.assert_close(found, expected[:, layer], **FP32)


def test_features_of_a_bf16_model_are_fp32(reference):
    rounded = load_model(reference[0], "bfloat16")
    prompts = random_prompts(3)
    for pooling in POOLINGS:
        # The mean is taken in fp32 of states in bf16: of 30 tokens' sum bf16 would lose five bits.
        found = pooled_features(rounded, prompts, pooling, True, HUGE)
        assert found.dtype == torch.float32
        with torch.no_grad():
            states = rounded(torch.tensor([prompts[0].ids]))[0]
        # One rounding of bf16, 2^-8 relative, on each state through three layers.
        expected = pool(states.float(), pooling)
        assert (found[0, -1] - expected).abs().max() < 0.05 * expected.abs().max()
        assert not torch.equal(found[0, -1], found[0, -1].bfloat16().float()) or pooling == "last"


def test_endoftext_in_a_text_does_not_move_pooling(reference):
    """transformers' classifier looks for the pad id to find the last token; here lengths count."""
    directory, theirs = reference
    ours, tokenizer = load_model(directory), Tokenizer(directory)
    pad = tokenizer.markup["<|endoftext|>"]
    texts = ["很好<|endoftext|>", "<|endoftext|>差评，不推荐", "好<|endoftext|>坏<|endoftext|>好"]
    written = build_prompts(tokenizer, texts, "{text}\n→", ("好评", "差评"))
    assert not any(pad in prompt.ids for prompt in written)
    # Even the control token itself, which a template may hold, is a token like others.
    control = [Prompt((5, pad, 9), (), False), Prompt((5, 9, pad, pad), (), False)]
    prompts = [*written, *random_prompts(2), *control]
    for pooling in POOLINGS:
        features = pooled_features(ours, prompts, pooling, False, HUGE)[:, 0]
        for prompt, found in zip(prompts, features, strict=True):
            with torch.no_grad():
                states = theirs.model(torch.tensor([prompt.ids])).last_hidden_state[0]
            torch.testing.assert_close(found, pool(states, pooling), **FP32)


def tokens_of(prompts) -> int:
    return sum(len(prompt.ids) for prompt in prompts)


def test_progress_counts_every_token(model):
    prompts, seen = random_prompts(9), []
    pooled_features(model, prompts, "last", False, 60, seen.append)
    assert sum(seen) == tokens_of(prompts) and len(seen) > 1


# Kept features


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Texts in each forward that is run."""
    counted, real = [], features_module.forward_packed

    def counting(model, batch, *args, **kwargs):
        counted.append(len(batch.lengths))
        return real(model, batch, *args, **kwargs)

    monkeypatch.setattr(features_module, "forward_packed", counting)
    return counted


def kept_features(
    directory,
    weights,
    model,
    prompts,
    pooling,
    all_layers,
    batch_tokens,
    progress=lambda tokens: None,
) -> Tensor:
    """`cached_features`, as train.py calls it."""

    def compute(rows):
        return pooled_features(model, rows, pooling, all_layers, batch_tokens, progress)

    setting = f"{weights} {model.lm_head_weight.dtype} {pooling} {all_layers}"
    return cached_features(directory, setting, prompts, compute, progress)


def test_kept_features_are_not_run_again(model, forwards, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_module, "CACHE_ROWS", 4)
    prompts, directory, seen = random_prompts(10), tmp_path / "a" / "features", []
    arguments = (directory, "weights", model, prompts, "last", True, 60)
    first = kept_features(*arguments, seen.append)
    assert (sum(forwards), sum(seen)) == (10, tokens_of(prompts))
    expected = pooled_features(model, prompts, "last", True, HUGE)
    torch.testing.assert_close(first, expected, **FP32)
    forwards.clear(), seen.clear()
    assert torch.equal(kept_features(*arguments, seen.append), first)
    assert (sum(forwards), sum(seen)) == (0, tokens_of(prompts))
    assert len(os.listdir(directory)) == 3  # ten rows by four
    # How many tokens a forward takes changes no state, and so not the key.
    assert torch.equal(kept_features(*arguments[:-1], HUGE), first)
    assert forwards == []


def test_another_setting_is_another_key(model, reference, forwards, tmp_path):
    prompts = random_prompts(3)
    usual = {
        "weights": "weights",
        "model": model,
        "prompts": prompts,
        "pooling": "last",
        "all_layers": False,
    }
    changed_text = [*prompts[:2], Prompt((*prompts[2].ids[:-1], 499), ONE_TOKEN, False)]
    # The same tokens in the same order, but another border between two texts.
    moved = [Prompt((*prompts[0].ids, prompts[1].ids[0]), ONE_TOKEN, False)]
    moved += [Prompt(prompts[1].ids[1:], ONE_TOKEN, False), prompts[2]]
    changes = [
        {},
        {"weights": "other weights"},
        {"model": load_model(reference[0], "bfloat16")},
        {"pooling": "mean"},
        {"all_layers": True},
        {"prompts": changed_text},
        {"prompts": prompts[::-1]},
        {"prompts": moved},
    ]
    for change in changes:
        forwards.clear()
        settings = usual | change
        found = kept_features(tmp_path, **settings, batch_tokens=HUGE)
        # In bf16 on a CPU a text that is ignored fills up the batch.
        assert sum(forwards) == 3 + ("model" in change), change
        del settings["weights"]
        assert torch.equal(found, pooled_features(**settings, batch_tokens=HUGE))
    assert len(os.listdir(tmp_path)) == len(changes)
    forwards.clear()
    for change in changes:
        kept_features(tmp_path, **(usual | change), batch_tokens=HUGE)
    assert forwards == []


def test_a_killed_run_loses_only_what_it_had_not_finished(model, forwards, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_module, "CACHE_ROWS", 4)
    prompts, calls = random_prompts(10), []

    def killed(model, rows, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, rows, *args)

    real = pooled_features
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(globals(), "pooled_features", killed)
        kept_features(tmp_path, "w", model, prompts, "last", False, HUGE)
    assert sum(forwards) == 8
    forwards.clear()
    found = kept_features(tmp_path, "w", model, prompts, "last", False, HUGE)
    assert sum(forwards) == 2
    expected = pooled_features(model, prompts, "last", False, HUGE)
    torch.testing.assert_close(found, expected, **FP32)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: b"\xff" * len(data),
        lambda data: save({"other": torch.zeros(3, 1, 32)}),
    ],
    ids=["empty", "cut", "half", "longer", "noise", "another name"],
)
def test_a_damaged_file_is_computed_again(damage, model, tmp_path):
    arguments = (tmp_path, "w", model, random_prompts(3), "last", False, HUGE)
    first, seen = kept_features(*arguments), []
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert torch.equal(kept_features(*arguments, seen.append), first)
    assert sum(seen) == tokens_of(arguments[3])
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_made_is_one_line(model, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/features"):
        with pytest.raises(UserError, match=f"{place}: .*--feature-cache") as error:
            kept_features(tmp_path / place, "w", model, random_prompts(2), "last", False, HUGE)
        assert "\n" not in str(error.value)


# The logistic regression


def blobs(rows: int, classes: int, features: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussian classes, float64."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=generator)
    y = torch.arange(rows) % classes
    noise = torch.randn(rows, features, generator=generator)
    return (centres[y] + 1.5 * noise).double(), y


def gradient(x: Tensor, y: Tensor, solution: Tensor, l2: float) -> Tensor:
    """Of the objective, by hand: (P − Y)ᵀ x / n + l2 · W, and for the bias the first term alone."""
    weight, bias = solution[:, :-1], solution[:, -1]
    p = (x @ weight.T + bias).softmax(dim=1)
    residual = (p - F.one_hot(y, len(solution))) / len(x)  # (n, C)
    return torch.cat([residual.T @ x + l2 * weight, residual.sum(dim=0)[:, None]], dim=1)


@pytest.mark.parametrize("l2", [10.0, 0.1, 1e-3])
@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_equals_scikit_learn(classes, l2):
    x, y = blobs(60, classes)
    solution = solve_logistic(x, y, classes, l2)
    assert gradient(x, y, solution, l2).norm() < 1e-6
    # scikit-learn minimises C · Σ loss + |W|²/2, so that C = 1/(n · l2). For two classes it has one
    # vector, w = W₁ − W₀. Our optimum is W₁ = −W₀ = w/2, and |W|² = |w|²/2: hence twice that C.
    c = (2 if classes == 2 else 1) / (len(x) * l2)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
    weight, bias = solution[:, :-1].numpy(), solution[:, -1].numpy()
    if classes == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    # A constant on all biases changes nothing.
    expected_bias = theirs.intercept_ - theirs.intercept_.mean() * (classes > 2)
    bias = bias - bias.mean() * (classes > 2)
    # Two solvers, each with a gradient below 1e-6, on a curvature of 1e-3 or more.
    np.testing.assert_allclose(weight, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(bias, expected_bias, atol=1e-4)


@pytest.mark.parametrize(("classes", "given"), [(2, "balanced"), (3, "balanced"), (3, [1, 9, 0.2])])
def test_class_weights_equal_scikit_learn(classes, given):
    """Classes of unequal sizes: the whole probe, penalty chosen, on standardised features."""
    x, y = blobs(120, classes)
    kept = torch.arange(120)[(y != 1) | (torch.arange(120) % 4 == 1)]  # of class 1 every few rows
    x, y = x[kept], y[kept]
    train, held_out = (x[:-20], y[:-20]), (x[-20:], y[-20:].numpy())
    names, theirs = [str(i) for i in range(classes)], given
    argument = given if given == "balanced" else ",".join(map(str, given))
    weights = parse_class_weights(argument, names, train[1].tolist())
    expected = compute_class_weight(
        given if given == "balanced" else dict(enumerate(given)),
        classes=np.arange(classes),
        y=train[1].numpy(),
    )
    np.testing.assert_allclose(weights, expected, rtol=1e-12)

    by_class, labels = torch.tensor(weights, dtype=torch.float64), train[1].numpy()
    arguments = (train[0], labels, *held_out, classes)
    (weight, bias), found = fit_head(*arguments, by_class)
    # As above; and the mean divides by the sum of the rows' weights.
    c = (2 if classes == 2 else 1) / (found["l2"] * by_class[train[1]].sum().item())
    scale = StandardScaler().fit(train[0])
    scale.scale_ = train[0].std(dim=0).numpy()  # with n - 1, as the probe's
    options = {"C": c, "tol": 1e-10, "max_iter": 10_000}
    theirs = LogisticRegression(class_weight=dict(enumerate(weights)), **options)
    theirs.fit(scale.transform(train[0]), labels)
    p = theirs.predict_proba(scale.transform(held_out[0]))
    ours = F.linear(held_out[0].float(), weight, bias).softmax(dim=1)
    np.testing.assert_allclose(ours, p, atol=1e-4)  # two solvers, and W in fp32
    loss = sk_log_loss(held_out[1], p, sample_weight=expected[held_out[1]], labels=range(classes))
    assert found["held_out_log_loss"] == pytest.approx(loss, abs=1e-4)
    (other, _), _ = fit_head(*arguments)
    assert (other - weight).abs().max() > 1e-2


@pytest.mark.parametrize("l2", [L2_GRID[0], L2_GRID[-1]])
def test_logistic_regression_converges_where_it_is_hard(l2):
    """More features than rows, one a thousand times as large as others; then a start far off."""
    x, y = blobs(40, 2, features=120)
    for scaled in (x, x * torch.logspace(0, -3, 120, dtype=torch.float64)):
        solution = solve_logistic(scaled, y, 2, l2)
        assert gradient(scaled, y, solution, l2).norm() < 1e-6
        again = solve_logistic(scaled, y, 2, l2, start=torch.full((2, 121), 3.0))
        torch.testing.assert_close(again[:, :-1], solution[:, :-1], rtol=0, atol=1e-3)


def test_bias_is_not_penalised():
    """With features that tell nothing and a heavy penalty, the bias alone gives the class rates."""
    y = torch.tensor([0] * 30 + [1] * 10)
    solution = solve_logistic(torch.zeros(40, 2), y, 2, 10.0)
    np.testing.assert_allclose(solution[:, -1].softmax(dim=0), [0.75, 0.25], atol=1e-6)
    assert not solution[:, :-1].any()


# The probe


def split_blobs(classes: int = 2, seed: int = 0) -> tuple[Tensor, np.ndarray, Tensor, np.ndarray]:
    """Training and held-out part, fp32, features of unequal mean and size."""
    x, y = blobs(90, classes, seed=seed)
    x = (x * torch.tensor([1, 10, 0.1, 1, 1, 100]) + torch.arange(6)).float()
    return x[:60], y[:60].numpy(), x[60:], y[60:].numpy()


def only(monkeypatch: pytest.MonkeyPatch, *l2: float) -> None:
    monkeypatch.setattr(head_mechanics, "L2_GRID", l2)


@pytest.mark.parametrize("classes", [2, 3])
def test_standardised_and_folded_back(classes, monkeypatch):
    """W h + b on states as they are equals the solution on standardised ones."""
    only(monkeypatch, 0.1)
    train, y, held_out, z = split_blobs(classes)
    (weight, bias), found = fit_head(train, y, held_out, z, classes)
    assert weight.shape == (classes, 6) and bias.shape == (classes,)
    assert weight.dtype == bias.dtype == torch.float32
    x = train.double()
    mean = x.sum(dim=0) / 60
    deviation = ((x - mean).square().sum(dim=0) / 59).sqrt()
    solution = solve_logistic((x - mean) / deviation, torch.from_numpy(y), classes, 0.1)
    for part in (train, held_out):
        standardised = (part.double() - mean) / deviation
        expected = standardised @ solution[:, :-1].T + solution[:, -1]
        scores = LinearHead(weight, bias, 3, "last").scores(part)
        assert scores.dtype == np.float64
        # fp32 sums of products of size up to 10.
        np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert found["l2"] == 0.1
    assert found["held_out_log_loss"] == pytest.approx(log_loss(z, scores), abs=1e-5)
    assert found["held_out_accuracy"] == (scores.argmax(axis=1) == z).mean()


def test_held_out_rows_choose_the_penalty_and_nothing_else(monkeypatch):
    train, y, held_out, z = split_blobs()
    others = ((held_out, 1 - z), (held_out[:5] * 50 + 9, z[:5]))
    only(monkeypatch, 0.1)
    (weight, bias), _ = fit_head(train, y, held_out, z, 2)
    for rows, labels in others:
        (same, same_bias), _ = fit_head(train, y, rows, labels, 2)
        assert torch.equal(same, weight) and torch.equal(same_bias, bias)
    only(monkeypatch, 10.0, 0.1, 1e-3)
    chosen = [fit_head(train, y, rows, labels, 2)[1]["l2"] for rows, labels in others]
    assert chosen[0] == 10.0  # where all labels are wrong, the weakest head is the best
    usual = fit_head(train, y, held_out, z, 2)
    assert usual[1]["l2"] == 0.1
    # The same minimum from another start: see the convergence test.
    torch.testing.assert_close(usual[0], (weight, bias), rtol=1e-4, atol=1e-5)


def test_the_penalty_with_the_lowest_held_out_log_loss_is_chosen(monkeypatch):
    train, y, held_out, z = split_blobs()
    losses = {}
    for l2 in L2_GRID:
        only(monkeypatch, l2)
        losses[l2] = fit_head(train, y, held_out, z, 2)[1]["held_out_log_loss"]
    only(monkeypatch, *L2_GRID)
    found = fit_head(train, y, held_out, z, 2)[1]
    assert found["l2"] == min(losses, key=losses.get) not in (L2_GRID[0], L2_GRID[-1])
    assert found["held_out_log_loss"] == pytest.approx(min(losses.values()), abs=1e-6)


@pytest.mark.parametrize("value", [0.0, -1234.567])
def test_a_constant_feature_is_harmless(value):
    train, y, held_out, z = split_blobs()
    train[:, 3] = held_out[:, 3] = value
    train_without, held_out_without = (t[:, [0, 1, 2, 4, 5]] for t in (train, held_out))
    (expected, bias), _ = fit_head(train_without, y, held_out_without, z, 2)
    held_out[0, 3] += 1  # and where it is not constant after all
    (weight, found_bias), found = fit_head(train, y, held_out, z, 2)
    assert weight.isfinite().all() and np.isfinite(found["held_out_log_loss"])
    assert weight[:, 3].abs().max() < 1e-4
    torch.testing.assert_close(weight[:, [0, 1, 2, 4, 5]], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found_bias, bias, rtol=1e-3, atol=1e-3)


def test_features_that_are_all_constant_give_the_class_rates():
    """The embedding of the last token, where every prompt ends with the same one."""
    labels = np.array([0] * 30 + [1] * 10)
    (weight, bias), found = fit_head(torch.ones(40, 3), labels, torch.ones(4, 3), labels[28:32], 2)
    scores = LinearHead(weight, bias, 0, "last").scores(torch.ones(1, 3))
    np.testing.assert_allclose(np.exp(scores) / np.exp(scores).sum(), [[0.75, 0.25]], atol=1e-5)
    assert found["held_out_accuracy"] == 0.5


def test_the_layer_is_chosen_on_the_held_out_part():
    labels = np.arange(40) % 2
    sign = torch.from_numpy(labels * 2.0 - 1)
    features = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0))
    features[:, 1, 0] += 2 * sign  # layer 1 tells the classes
    features[:30, 2, 0] += 8 * sign[:30]  # layer 2 more clearly, but only in the first rows
    training, held_out = list(range(30)), list(range(30, 40))
    found, head = fit_layers(features, [0, 1, 2], labels, training, held_out, 2, "mean")
    assert (head.layer, head.pooling) == (1, "mean")
    assert list(found) == [0, 1, 2]
    assert found[1]["held_out_accuracy"] > 0.85 > found[2]["held_out_accuracy"]
    (weight, bias), alone = fit_head(
        features[:30, 1], labels[:30], features[30:, 1], labels[30:], 2
    )
    assert torch.equal(head.weight, weight) and torch.equal(head.bias, bias)
    assert found[1] == alone
    # With the parts exchanged it is layer 2 that tells most about the rows held out.
    found, head = fit_layers(features, [0, 2], labels, list(range(10, 40)), list(range(10)), 2, "x")
    assert head.layer == 2
    # Rows are named by number, in any order.
    order = np.random.default_rng(0).permutation(40)
    where = np.argsort(order)
    _, turned = fit_layers(
        features[order], [1], labels[order], where[:30].tolist(), where[30:].tolist(), 2, "mean"
    )
    assert torch.equal(turned.weight, weight)


def test_one_layer_alone_may_have_any_number():
    """Features of the last layer only have one column, whatever its number is."""
    features = torch.randn(20, 1, 3, generator=torch.Generator().manual_seed(0))
    rows = np.arange(20)
    _, head = fit_layers(features, [28], rows % 2, list(rows[:12]), list(rows[12:]), 2, "last")
    assert head.layer == 28


def test_candidate_layers():
    assert candidate_layers("last", 3) == [3]
    assert candidate_layers("best", 3) == [0, 1, 2, 3]
    assert candidate_layers("0", 3) == [0]
    for wrong in ("4", "-1", "first", "", "1.0"):
        with pytest.raises(UserError, match="expected last, best or a number from 0 to 3"):
            candidate_layers(wrong, 3)


def test_format_layers_marks_the_chosen_one():
    row = {"held_out_accuracy": 0.5, "held_out_log_loss": 0.6931, "l2": 0.01}
    lines = format_layers({0: row, 3: row | {"held_out_accuracy": 0.9}}, 3).split("\n")
    assert len(lines) == 3
    assert lines[1].split() == ["0", "0.5000", "0.6931", "0.0100"]
    assert lines[2].split() == ["3", "0.9000", "0.6931", "0.0100", "chosen"]


# The file


@pytest.mark.parametrize("bias", [None, torch.tensor([0.25, -1.0, 3.0])])
def test_head_round_trip(bias, tmp_path):
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).T  # not contiguous
    head = LinearHead(weight, bias, 12, "mean")
    save_head(tmp_path / "head.safetensors", head)
    found = load_head(tmp_path / "head.safetensors")
    assert torch.equal(found.weight, weight) and found.weight.dtype == torch.float32
    assert found.bias is None if bias is None else torch.equal(found.bias, bias)
    assert (found.layer, found.pooling) == (12, "mean")
    features = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    # Stored by columns and by rows, fp32 products are summed in another order.
    np.testing.assert_allclose(found.scores(features), head.scores(features), atol=1e-5)
    # Equal heads are equal files: a run that is stopped and resumed is compared by its bytes.
    written = {(save_head(tmp_path / "b", head), (tmp_path / "b").read_bytes())[1] for _ in "12345"}
    assert written == {(tmp_path / "head.safetensors").read_bytes()}


def test_scores_are_w_h_plus_b():
    head = LinearHead(torch.tensor([[1.0, 2], [0, -1]]), torch.tensor([0.5, 0]), 3, "last")
    np.testing.assert_array_equal(head.scores(torch.tensor([[3.0, 4]])), [[11.5, -4]])
    bare = LinearHead(head.weight, None, 3, "last")
    np.testing.assert_array_equal(bare.scores(torch.tensor([[3.0, 4]])), [[11, -4]])


def test_other_files_are_no_head(tmp_path):
    path = tmp_path / "head.safetensors"
    weight = torch.zeros(2, 4)
    save_head(path, LinearHead(weight, None, 3, "last"))
    whole = path.read_bytes()
    good = {"head": '{"layer": 3, "pooling": "last"}'}
    written = [
        save({"weight": weight}),  # no metadata
        save({"weight": weight}, {"head": "{"}),
        save({"weight": weight}, {"head": "[]"}),
        save({"weight": weight}, {"head": '{"layer": 3}'}),
        save({"weight": weight}, {"head": '{"layer": "3", "pooling": "last"}'}),
        save({"weight": weight}, {"head": '{"layer": 3, "pooling": "max"}'}),
        save({"other": weight}, good),
        save({"weight": weight, "more": weight.clone()}, good),
        save({"weight": torch.zeros(4)}, good),
        save({"weight": weight, "bias": torch.zeros(3)}, good),
        save({}, good),
        whole[:-1],
        b"",
    ]
    for data in written:
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"not a head that train.py .*again") as error:
            load_head(path)
        assert "\n" not in str(error.value)
    for place in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="not a head"):
            load_head(place)
    path.write_bytes(save({"weight": weight}, good))
    assert load_head(path).layer == 3


# The losses


def adapted(pair: tuple[Qwen, nn.Module]) -> tuple[Qwen, nn.Module, dict[str, nn.Parameter]]:
    """Our model and transformers' with the same LoRA, ours by hand, the other by PEFT; and A and B
    of the latter under our names."""
    ours, theirs = copy.deepcopy(pair)
    inject_lora(ours, (*ATTENTION, *MLP), 4, 6.0, 0.0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, *MLP])
    theirs = peft.get_peft_model(theirs, config)
    modules = dict(theirs.named_modules())
    generator, parameters = torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        for name, parameter in lora_parameters(ours).items():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            parameters[name] = modules[f"base_model.model.{name}.default"].weight
            parameters[name].copy_(parameter)
    return ours, theirs, parameters


def padded(texts: list[tuple[int, ...]]) -> Tensor:
    """(B, T), filled up on the right, where no real position looks."""
    return nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)


def compare_gradients(
    ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter], tolerance: float = 1e-5
) -> None:
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        expected = theirs[name].grad
        assert expected.abs().max() > 0, name
        # Relative to the tensor's largest entry: fp32 sums over rows and tokens in another order.
        difference = (parameter.grad - expected).abs().max()
        assert difference < tolerance * expected.abs().max(), name


@pytest.mark.parametrize("prefix", [(), PREFIX])
@pytest.mark.parametrize(("plain", "checkpointing"), FORMS)
@pytest.mark.parametrize("labels", [ONE_TOKEN, SEVERAL, MIXED])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 3.0]])
def test_label_loss_equals_transformers(weights, labels, plain, checkpointing, prefix, pair):
    """Against full logits (B, T, V) of a padded batch, the label words' tokens picked out."""
    ours, theirs, their_parameters = adapted(pair)
    prompts, classes = random_prompts(5, labels, prefix=prefix), [0, 1, 1, 0, 1]
    losses = plain_forms.label_losses if plain else label_losses
    loss = losses(ours, prompts, classes, checkpointing, weights)
    loss.backward()

    words = [labels[y] for y in classes]
    texts = [(*p.ids, *word) for p, word in zip(prompts, words, strict=True)]
    log_probs = theirs(input_ids=padded(texts)).logits.log_softmax(dim=-1)  # (B, T, V)
    expected = torch.zeros(())
    for row, (prompt, word) in enumerate(zip(prompts, words, strict=True)):
        for t, token in enumerate(word):
            log_p = log_probs[row, len(prompt.ids) + t - 1, token]
            expected = expected - log_p * (weights[classes[row]] if weights else 1)
    expected.backward()
    # A sum of 5 to 13 negative log-probabilities of up to a few tens.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    compare_gradients(lora_parameters(ours), their_parameters)
    frozen = [p for name, p in ours.named_parameters() if "lora_" not in name]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("prefix", [(), PREFIX])
@pytest.mark.parametrize(("plain", "checkpointing"), FORMS)
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 3.0]])
def test_head_loss_equals_transformers(weights, plain, checkpointing, prefix, pair):
    ours, theirs, their_parameters = adapted(pair)
    prompts, classes = random_prompts(5, prefix=prefix), [0, 2, 1, 0, 1]
    start = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    weight, their_weight = nn.Parameter(0.1 * start), nn.Parameter(0.1 * start)
    losses = plain_forms.head_losses if plain else head_losses
    loss = losses(ours, weight, prompts, classes, checkpointing, weights)
    loss.backward()

    states = theirs.base_model.model.model(padded([p.ids for p in prompts])).last_hidden_state
    expected = torch.zeros(())
    for row, (prompt, y) in enumerate(zip(prompts, classes, strict=True)):
        scores = their_weight @ states[row, len(prompt.ids) - 1]
        log_p = scores[y] - scores.exp().sum().log()
        expected = expected - log_p * (weights[classes[row]] if weights else 1)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    compare_gradients(
        {**lora_parameters(ours), "score": weight}, {**their_parameters, "score": their_weight}
    )


@pytest.mark.parametrize("labels", [ONE_TOKEN, SEVERAL, MIXED])
def test_label_loss_is_minus_the_score(labels, model):
    prompts, classes = random_prompts(6, labels), [0, 1, 0, 1, 1, 0]
    pairs = list(zip(prompts, classes, strict=True))
    scores = [score_label(model, prompt.ids, prompt.labels[y]) for prompt, y in pairs]
    assert label_losses(model, prompts, classes).item() == pytest.approx(-sum(scores), rel=1e-5)
    for (prompt, y), score in zip(pairs, scores, strict=True):
        assert label_loss(model, prompt.ids, prompt.labels[y]).item() == -score


@pytest.mark.parametrize("kind", ["head", "one token", "mixed"])
def test_losses_are_sums_over_rows(kind, pair):
    """All rows in one forward or each in its own: the same value, the same gradient."""
    ours, _, _ = adapted(pair)
    prompts = random_prompts(6, MIXED if kind == "mixed" else ONE_TOKEN, prefix=PREFIX)
    classes = [0, 1, 1, 0, 1, 0]
    weight = nn.Parameter(0.1 * torch.randn(2, 32, generator=torch.Generator().manual_seed(2)))
    parameters = lora_parameters(ours) | ({"score": weight} if kind == "head" else {})

    def loss(rows: list[int]) -> Tensor:
        arguments = [prompts[row] for row in rows], [classes[row] for row in rows]
        if kind == "head":
            return head_losses(ours, weight, *arguments, False)
        return label_losses(ours, *arguments)

    whole = loss([0, 1, 2, 3, 4, 5])
    whole.backward()
    together = {name: nn.Parameter(p.detach()) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        together[name].grad, parameter.grad = parameter.grad, None
    total = 0.0
    for row in (3, 0, 5, 1, 2, 4):
        part = loss([row])
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)
    compare_gradients(parameters, together)


def test_vocabulary_projection_only_where_a_label_is_predicted(model, monkeypatch, tmp_path):
    """(B, T, V) would be 151,936 numbers for every token of a text."""
    shapes, real = [], Qwen.logits

    def recording(self, h):
        shapes.append(tuple(h.shape))
        return real(self, h)

    monkeypatch.setattr(Qwen, "logits", recording)
    classes = [0, 1, 1, 0, 1]
    for labels, rows in ((ONE_TOKEN, 5), (SEVERAL, 2 * 3 + 3 * 2), (MIXED, 2 * 1 + 3 * 2)):
        shapes.clear()
        label_losses(model, random_prompts(5, labels), classes)
        assert shapes == [(rows, 32)]
    shapes.clear()
    head_losses(model, torch.zeros(2, 32), random_prompts(5), classes, False)
    kept_features(tmp_path, "w", model, random_prompts(5), "mean", True, HUGE)
    assert shapes == []


def test_texts_that_begin_alike_share_that_beginning(model, monkeypatch):
    """As much as all of them share, short of what is asked of any; a text alone shares nothing."""
    counted, real = [], label_scores_module.forward_packed

    def counting(model, batch, *arguments, **keywords):
        counted.append(len(batch.ids))
        return real(model, batch, *arguments, **keywords)

    monkeypatch.setattr(label_scores_module, "forward_packed", counting)
    texts = [(*PREFIX, 9, 9, 8), (*PREFIX, 9), (*PREFIX, 7, 6)]
    for asked, tokens in (([1, 1, 1], 5 + 3 + 1 + 2), ([3, 2, 2], 4 + 4 + 2 + 3)):
        h = last_states(model, texts, asked, False)
        assert counted.pop() == tokens
        alone = torch.cat(
            [last_states(model, [t], [n], False) for t, n in zip(texts, asked, strict=True)]
        )
        assert [counted.pop() for _ in texts] == [7, 6, 8]
        torch.testing.assert_close(h, alone, **FP32)
    last_states(model, [texts[0]] * 2, [1, 1], False)  # twice the same: all but the last token
    assert counted == [7 + 1 + 1]


def test_head_loss_of_a_bf16_base_is_fp32(reference):
    """A head in bf16 would lose its small steps; the loss is formed in fp32."""
    rounded = load_model(reference[0], "bfloat16")
    weight = nn.Parameter(0.1 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    loss = head_losses(rounded, weight, random_prompts(3), [0, 1, 1], False)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    h = last_states(rounded, [prompt.ids for prompt in random_prompts(3)], [1, 1, 1], False)
    assert h.dtype == torch.bfloat16
    scores = h.detach().float() @ weight.detach().T
    expected = F.cross_entropy(scores, torch.tensor([0, 1, 1]), reduction="sum")
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-6)
