"""Qwen3.5 in its fast form, 64 tokens at a time over packed texts, against its definition."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_reference
from torch import Tensor

from qwen_min.config import FULL, LINEAR
from qwen_min.fast.features import pooled_features
from qwen_min.fast.generation import generate_answers
from qwen_min.fast.label_scores import label_losses, score_labels
from qwen_min.fast.layout import Text, pack
from qwen_min.fast.packed import forward_packed
from qwen_min.files.weights import load_model
from qwen_min.lab.generation import greedy
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.scoring import label_loss, score_label

# States up to 4, losses up to 80. After 8 layers both forms are about 5e-5 from float64, and up to
# 5e-5 from each other.
FP32 = {"atol": 1e-4, "rtol": 0}
VARIANTS = {
    "two value heads a key head": {},
    # The last layer computes outputs for the tokens asked for only.
    "linear last": {"layer_types": [FULL, LINEAR, FULL, LINEAR], "linear_num_key_heads": 4},
    "all linear, two taps": {"layer_types": [LINEAR] * 4, "linear_conv_kernel_dim": 2},
}
LABELS = ((7,), (8, 9), (8, 10, 11, 12, 13), (8,), (8, 10, 14))


def random_ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 500, (length,), generator=torch.Generator().manual_seed(seed))


def random_prompts(lengths: tuple[int, ...], shared: int) -> list[Prompt]:
    """Prompts of a common prefix of `shared` tokens and lengths[i] more."""
    prefix = random_ids(shared, seed=99).tolist()
    return [
        Prompt((*prefix, *random_ids(n, seed=i).tolist()), LABELS, False)
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def model(request, tmp_path_factory) -> Qwen:
    directory, changes = tmp_path_factory.mktemp("model"), VARIANTS[request.param]
    layers = len(changes.get("layer_types", [0] * 8))
    make_reference(directory, "qwen3_5", num_hidden_layers=layers, **changes)
    return load_model(directory)


@torch.no_grad()
def test_packed_texts_equal_the_definition(model):
    texts = [random_ids(n, seed=n) for n in (1, 63, 64, 2, 65, 130, 3)]
    for queries in (None, 1):
        h, _ = forward_packed(model, pack(model, [Text(ids, queries=queries) for ids in texts]))
        expected = [model(ids[None])[0, -(queries or len(ids)) :] for ids in texts]
        torch.testing.assert_close(h, torch.cat(expected), **FP32)


@pytest.mark.parametrize("T", [3, 64, 100])
def test_no_text_reaches_another(model, T):
    """Changing one text leaves the other unchanged to the bit, and no gradient goes there."""
    text, other, changed = random_ids(70), random_ids(T, seed=1), random_ids(T, seed=2)
    with torch.no_grad():
        for order in (1, -1):
            packed = [pack(model, [Text(text), Text(x)][::order]) for x in (other, changed)]
            a, b = (forward_packed(model, batch)[0] for batch in packed)
            kept = slice(70) if order == 1 else slice(T, None)
            rest = slice(70, None) if order == 1 else slice(T)
            assert torch.equal(a[kept], b[kept]) and not torch.allclose(a[rest], b[rest])
    weight = model.model.embed_tokens.weight.requires_grad_()
    h, _ = forward_packed(model, pack(model, [Text(other), Text(text), Text(changed)]))
    (slope,) = torch.autograd.grad(h[T : T + 70].square().sum(), weight)
    weight.requires_grad_(False)
    assert set(slope.any(dim=1).nonzero()[:, 0].tolist()) == set(text.tolist())


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, 2, 3, 63, 64, 70])
def test_a_cached_prefix_equals_the_whole(model, prefix):
    """Also where a text behind it is continued once more, and from one prefix many times."""
    start = random_ids(prefix)
    _, (past,) = forward_packed(model, pack(model, [Text(start, queries=1)], keep=True))
    before = [t.clone() for kept in past.layers for t in kept]
    suffixes = [random_ids(n, seed=n) for n in (1, 2, 5, 64, 65)]
    batch = pack(model, [Text(ids) for ids in suffixes], [past] * 5, keep=True)
    h, pasts = forward_packed(model, batch)
    wholes = [torch.cat([start, ids]) for ids in suffixes]
    expected = torch.cat([model(ids[None])[0, prefix:] for ids in wholes])
    torch.testing.assert_close(h, expected, **FP32)
    assert torch.equal(forward_packed(model, batch)[0], h)
    assert all(map(torch.equal, before, [t for kept in past.layers for t in kept]))
    for more in (1, 3):
        ends = [random_ids(more, seed=50 + i) for i in range(5)]
        h, _ = forward_packed(model, pack(model, [Text(ids) for ids in ends], pasts))
        wholes_now = [torch.cat(pair) for pair in zip(wholes, ends, strict=True)]
        expected = torch.cat([model(ids[None])[0, -more:] for ids in wholes_now])
        torch.testing.assert_close(h, expected, **FP32)


@pytest.mark.parametrize("shared", [0, 1, 2, 3, 70])
def test_label_scores_equal_each_label_alone(model, shared):
    prompts = random_prompts((1, 2, 3, 64, 70), shared)
    expected = [[score_label(model, p.ids, label) for label in p.labels] for p in prompts]
    for budget in (1, 10_000):
        found = score_labels(model, prompts, budget)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shared", [0, 1, 2, 3, 70])
def test_gradients_behind_a_shared_prefix_are_the_definition_s(model, shared):
    """Rounding is largest in the gradients of the decay's parameters, which are sums of numbers of
    both signs: 1e-4 of their size, as far as the definition's are from float64; in all 2e-5."""
    prompts, classes = random_prompts((1, 2, 60, 70), shared), (0, 1, 4, 2)
    model.requires_grad_(True)
    parameters, pairs = dict(model.named_parameters()), zip(prompts, classes, strict=True)
    expected = sum(label_loss(model, p.ids, p.labels[y]) for p, y in pairs)
    wanted = torch.autograd.grad(expected, parameters.values())
    for checkpointing in (False, True):
        loss = label_losses(model, prompts, classes, checkpointing)
        torch.testing.assert_close(loss, expected, **FP32)
        found = torch.autograd.grad(loss, parameters.values())
        for name, a, b in zip(parameters, found, wanted, strict=True):
            assert (a - b).norm() <= 3e-4 * b.norm(), name
        whole, all_wanted = (torch.cat([x.flatten() for x in y]) for y in (found, wanted))
        assert (whole - all_wanted).norm() < 1e-4 * all_wanted.norm()
    model.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_features_of_all_layers(model, pooling):
    prompts, layers = random_prompts((1, 63, 65, 130), 0), len(model.model.layers)
    features = pooled_features(model, prompts, pooling, True, batch_tokens=200)
    for prompt, of_text in zip(prompts, features, strict=True):
        ids = torch.tensor([prompt.ids])
        streams = [model.model.residual_stream(ids, i)[0] for i in range(layers)]
        states = torch.stack([*streams, model(ids)[0]])  # (L + 1, T, D)
        expected = states[:, -1] if pooling == "last" else states.mean(dim=1)
        torch.testing.assert_close(of_text, expected, **FP32)


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_generation_equals_greedy(model, batch_tokens):
    prompts = random_prompts((1, 2, 64, 70), 0)
    whole = [greedy(model, prompt.ids, 7) for prompt in prompts]
    assert generate_answers(model, prompts, 7, (), batch_tokens) == whole
    stop = {whole[1][2], whole[3][4]}  # two texts leave the batch early
    expected = [greedy(model, prompt.ids, 7, stop) for prompt in prompts]
    assert generate_answers(model, prompts, 7, stop, batch_tokens) == expected
    assert len(set(map(len, expected))) > 1


@pytest.mark.parametrize("A_log, dt_bias", [(4.0, 5.0), (-20.0, 0.0), (0.0, -20.0), (1.5, 1.0)])
@pytest.mark.parametrize("b", [-30.0, 30.0])
def test_extreme_gates_and_one_key_again_and_again(model, A_log, dt_bias, b, monkeypatch):
    """States that fade at once or never; values that are written whole or not at all.

    Rounding grows there, in the definition as well: both are compared with float64.
    """
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            parameter.data.fill_(A_log if name.endswith("A_log") else dt_bias)
        elif name.endswith("in_proj_b.weight"):
            parameter.data.mul_(b)
    model.requires_grad_(True)
    texts = [torch.full((130,), 7), random_ids(130)]
    found, _ = forward_packed(model, pack(model, [Text(ids) for ids in texts]))
    definition = torch.cat([model(ids[None])[0] for ids in texts])
    slopes = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    assert all(slope.isfinite().all() for slope in slopes)
    found, definition = found.detach(), definition.detach()
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # no cast to fp32 is left
    exact = torch.cat([model.double()(ids[None])[0] for ids in texts])
    error, own = ((h.double() - exact).square().mean().sqrt() for h in (found, definition))
    assert error < 3 * own  # measured: at most 1.8 times


@pytest.mark.parametrize("scale", [10, 100])
def test_weak_decays_beside_strong_ones(model, scale):
    """Sums of decays reach thousands in a chunk; the small differences between them count.

    transformers' chunked form is off by 1e-3 to 2e-2 there.
    """
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(2.77)
        elif name.endswith("in_proj_a.weight"):
            parameter.data.mul_(scale)
        elif name.endswith("dt_bias"):
            parameter.data.zero_()
    model.requires_grad_(True)
    ids = random_ids(130)
    trained = [p for name, p in model.named_parameters() if "in_proj" in name]
    forms = [forward_packed(model, pack(model, [Text(ids)]))[0], model(ids[None])[0]]
    slopes = [torch.autograd.grad(h.square().sum(), trained) for h in forms]
    assert (forms[0] - forms[1]).abs().max() < 1e-4  # measured: 4e-5
    for found, expected in zip(*slopes, strict=True):
        assert (found - expected).norm() < 3e-4 * expected.norm()  # measured: 1e-4
