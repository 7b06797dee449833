"""The forward pass against transformers, and the mutations that this comparison must catch."""

from collections.abc import Callable

import pytest
import torch
from conftest import make_reference
from torch import nn

import qwen_min.fast.packed as packed_module
import qwen_min.model as model_module
from qwen_min.fast.layout import Text, pack
from qwen_min.fast.packed import attention, forward_packed
from qwen_min.files.weights import load_model
from qwen_min.model import Attention, Qwen, RMSNorm, next_token_loss, rotary_cos_sin

# fp32 sums of a few hundred products, in another order: a few units in the last place of values
# up to 10 (2^-20 each).
FP32 = {"atol": 2e-5, "rtol": 1e-5}
VARIANTS = {
    "qwen2-tied": {"kind": "qwen2"},
    "qwen2-untied-shards": {"kind": "qwen2", "tied": False, "shard": "20KB"},
    "qwen2-one-kv-head": {"kind": "qwen2", "num_key_value_heads": 1},
    "qwen2-all-kv-heads": {"kind": "qwen2", "num_key_value_heads": 4},
    "qwen3-tied": {"kind": "qwen3"},
    "qwen3-untied": {"kind": "qwen3", "tied": False},
    "qwen3-bias": {"kind": "qwen3", "attention_bias": True},
    "qwen3.5-tied": {"kind": "qwen3_5"},
    "qwen3.5-linear-last": {
        "kind": "qwen3_5",
        "tied": False,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "num_hidden_layers": 3,
    },
}


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 500, (rows, length), generator=torch.Generator().manual_seed(seed))


def first_divergence(ours: Qwen, reference: nn.Module, ids: torch.Tensor) -> str | None:
    """The first module, in the order of computation, whose output differs from the reference's.

    Both module trees have the same names, so outputs are compared name by name.
    """
    outputs: list[dict[str, torch.Tensor]] = [{}, {}]
    hooks = []
    for found, root in zip(outputs, (ours, reference), strict=True):
        for name, module in root.named_modules():

            def keep(_module, _inputs, output, name=name, found=found):
                tensor = output[0] if isinstance(output, tuple) else output
                if isinstance(tensor, torch.Tensor):
                    found[name] = tensor

            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        ours(ids), reference(ids)
    for hook in hooks:
        hook.remove()
    ours_by_name, reference_by_name = outputs
    for name, expected in reference_by_name.items():  # insertion order: when each finished
        found = ours_by_name.get(name)
        if not name or found is None or found.shape != expected.shape:
            continue
        # Relative to the module's largest output: an MLP's may be in the hundreds.
        if (found - expected).abs().max() > 2e-5 * expected.abs().max():
            return name
    return None


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def pair(request, tmp_path_factory) -> tuple[Qwen, nn.Module]:
    directory = tmp_path_factory.mktemp(request.param)
    reference = make_reference(directory, **VARIANTS[request.param])
    return load_model(directory), reference


@torch.no_grad()
def test_logits_equal_transformers(pair):
    ours, reference = pair
    ids = random_ids(2, 40)
    assert first_divergence(ours, reference, ids) is None
    torch.testing.assert_close(ours.logits(ours(ids)), reference(ids).logits, **FP32)


@torch.no_grad()
def test_packed_equals_definition(pair):
    ours, _ = pair
    rows = [random_ids(1, n, seed=n)[0] for n in (1, 7, 23, 2)]
    packed, _ = forward_packed(ours, pack(ours, [Text(row) for row in rows]))
    for row, h in zip(rows, packed.split([len(row) for row in rows]), strict=True):
        torch.testing.assert_close(h, ours(row[None])[0], **FP32)


@torch.no_grad()
@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (1, 7, 4, 2), (1, 2, 1, 1)])
def test_asking_for_last_tokens_alone_gives_the_same(pair, counts):
    ours, _ = pair
    rows = [random_ids(1, n, seed=n)[0] for n in (1, 7, 23, 2)]
    expected = torch.cat([ours(r[None])[0, -n:] for r, n in zip(rows, counts, strict=True)])
    texts = [Text(row, queries=n) for row, n in zip(rows, counts, strict=True)]
    h, _ = forward_packed(ours, pack(ours, texts))
    torch.testing.assert_close(h, expected, **FP32)
    # The same behind a cache, where masks take the place of causality.
    _, cache = forward_packed(ours, pack(ours, [Text(random_ids(1, 5)[0])], keep=True))
    prefix = cache * len(rows)
    whole, _ = forward_packed(ours, pack(ours, [Text(row) for row in rows], prefix))
    h, _ = forward_packed(ours, pack(ours, texts, prefix))
    asked = [s[-n:] for s, n in zip(whole.split([len(r) for r in rows]), counts, strict=True)]
    torch.testing.assert_close(h, torch.cat(asked), **FP32)


@torch.no_grad()
@pytest.mark.parametrize("suffix", [1, 5])
def test_continuing_a_cache_equals_the_whole(pair, suffix):
    ours, _ = pair
    rows = [random_ids(1, n, seed=n)[0] for n in (9, 14)]
    _, cache = forward_packed(ours, pack(ours, [Text(row[:-suffix]) for row in rows], keep=True))
    before = [tensor.clone() for past in cache for kept in past.layers for tensor in kept]
    new = pack(ours, [Text(row[-suffix:]) for row in rows], cache)
    h, _ = forward_packed(ours, new)
    for row, states in zip(rows, h.split(suffix), strict=True):
        torch.testing.assert_close(states, ours(row[None])[0, -suffix:], **FP32)
    # Continuing left the cache as it was: a second time gives the same to the bit.
    after = [tensor for past in cache for kept in past.layers for tensor in kept]
    assert all(map(torch.equal, before, after))
    again, _ = forward_packed(ours, new)
    assert torch.equal(h, again)


@torch.no_grad()
def test_tree_equals_each_branch_alone(pair):
    ours, _ = pair
    prompt = random_ids(1, 6)[0]
    # Two branches: a → b, and c.
    a, b, c = 17, 301, 44
    _, cache = forward_packed(ours, pack(ours, [Text(prompt)], keep=True))
    h, _ = forward_packed(ours, pack(ours, [Text([a, b, c], (-1, 0, -1))], cache))
    torch.testing.assert_close(h[:2], ours(torch.tensor([[*prompt, a, b]]))[0, -2:], **FP32)
    torch.testing.assert_close(h[2], ours(torch.tensor([[*prompt, c]]))[0, -1], **FP32)
    # The same in one pass, the tree behind its prompt, beside a text without one.
    texts = [Text([*prompt, a, b, c], (5, 6, 5), queries=3), Text(prompt[:4], queries=1)]
    both, _ = forward_packed(ours, pack(ours, texts))
    torch.testing.assert_close(both[:3], h, **FP32)
    torch.testing.assert_close(both[3], ours(prompt[None, :4])[0, -1], **FP32)


@torch.no_grad()
def test_padding_does_not_reach_real_positions(reference):
    ours = load_model(reference[0])
    ids = random_ids(1, 11)
    alone = ours(ids)
    for pads in (1, 5, 64):
        padded = torch.cat([ids, random_ids(1, pads, seed=1)], dim=1)
        torch.testing.assert_close(ours(padded)[:, :11], alone, **FP32)


@torch.no_grad()
def test_packed_texts_do_not_leak_into_each_other(reference):
    ours = load_model(reference[0])
    a, other, b = (random_ids(1, 12, seed=s)[0] for s in (1, 2, 3))
    first, _ = forward_packed(ours, pack(ours, [Text(a), Text(b)]))
    second, _ = forward_packed(ours, pack(ours, [Text(other), Text(b)]))
    assert torch.equal(first[12:], second[12:])
    assert not torch.allclose(first[:12], second[:12])


@torch.no_grad()
def test_bf16_equals_transformers(tmp_path):
    """In bf16 the casts must stand where the reference has them, not only the formulas."""
    make_reference(tmp_path)
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    ours = load_model(tmp_path, dtype="bfloat16")
    ids = random_ids(1, 30)
    assert torch.equal(ours.logits(ours(ids)), reference(ids).logits.float())


def test_norm_casts_before_the_weight():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, reference = RMSNorm(128, 1e-6).bfloat16(), Qwen2RMSNorm(128, 1e-6).bfloat16()
    weight = 1 + 0.3 * torch.randn(128, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours.weight.data, reference.weight.data = weight, weight
    assert torch.equal(ours(x), reference(x))
    # The other order is another function: about a quarter of the elements differ.
    h = x.float()
    late = (weight.float() * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert 0.1 < (late != reference(x)).float().mean() < 0.5


def test_large_bf16_attention_is_finite(reference):
    ours = load_model(reference[0], dtype="bfloat16")
    module: Attention = ours.model.layers[0].self_attn
    x = 1e4 * torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rotary_cos_sin(torch.arange(20), 8, 1e4)
    definition = module(x, cos, sin)
    packed, _ = attention(module, x[0], pack(ours, [Text(range(20))]), None)
    assert definition.isfinite().all()
    assert packed.isfinite().all()


def test_rotary_angles_at_32k():
    """fp32 angles at position 32k: within 2e-3 of float64 (the reference errs as much)."""
    positions = torch.tensor([0, 1, 255, 256, 257, 4095, 32767])
    cos, sin = rotary_cos_sin(positions, 64, 1e6)
    exact = positions.double()[:, None] / 1e6 ** (torch.arange(0, 64, 2).double() / 64)
    exact = torch.cat([exact, exact], dim=-1)[:, None]
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos.double(), exact.cos(), atol=2e-3, rtol=0)
    torch.testing.assert_close(sin.double(), exact.sin(), atol=2e-3, rtol=0)

    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    # Not cast: the reference keeps its frequencies in a buffer, which .bfloat16() would ruin.
    module = Qwen2RotaryEmbedding(
        Qwen2Config(num_attention_heads=4, hidden_size=256, rope_theta=1e6)
    )
    expected_cos, expected_sin = module(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos[:, 0], expected_cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[:, 0], expected_sin[0], atol=1e-6, rtol=0)


def drop_bias(name: str) -> Callable[[Qwen], None]:
    def mutate(model: Qwen) -> None:
        for layer in model.model.layers:
            getattr(layer.self_attn, name).bias = None

    return mutate


def drop_norm(name: str) -> Callable[[Qwen], None]:
    def mutate(model: Qwen) -> None:
        for layer in model.model.layers:
            setattr(layer.self_attn, name, nn.Identity())

    return mutate


def group_wrongly(model: Qwen) -> None:
    """Key/value heads in the order 0 1 0 1 where 0 0 1 1 is right."""
    for layer in model.model.layers:
        q = layer.self_attn.q_proj
        heads = layer.self_attn.heads
        order = torch.arange(heads).view(2, -1).T.reshape(-1)
        q.weight.data = q.weight.data.view(heads, -1, q.in_features)[order].reshape(q.weight.shape)
        o = layer.self_attn.o_proj
        o.weight.data = o.weight.data.view(o.out_features, heads, -1)[:, order].reshape(
            o.weight.shape
        )
        if q.bias is not None:
            q.bias.data = q.bias.data.view(heads, -1)[order].reshape(-1)


MUTATIONS = {
    "no q bias": ("qwen2", drop_bias("q_proj"), "model.layers.0.self_attn.q_proj"),
    "no k bias": ("qwen2", drop_bias("k_proj"), "model.layers.0.self_attn.k_proj"),
    "no v bias": ("qwen2", drop_bias("v_proj"), "model.layers.0.self_attn.v_proj"),
    "no q norm": ("qwen3", drop_norm("q_norm"), "model.layers.0.self_attn.q_norm"),
    "no k norm": ("qwen3", drop_norm("k_norm"), "model.layers.0.self_attn.k_norm"),
    "heads mis-grouped": ("qwen2", group_wrongly, "model.layers.0.self_attn.q_proj"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_seen_and_named(mutation, tmp_path):
    kind, mutate, culprit = MUTATIONS[mutation]
    reference = make_reference(tmp_path, kind)
    ours = load_model(tmp_path)
    ids = random_ids(1, 20)
    assert first_divergence(ours, reference, ids) is None
    mutate(ours)
    found = first_divergence(ours, reference, ids)
    assert found == culprit
    with torch.no_grad():
        difference = (ours.logits(ours(ids)) - reference(ids).logits).abs().max()
    assert difference > 1e-2


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The paper's pairing, 2i with 2i + 1, where Qwen pairs i with i + Dh/2."""
    half = x.shape[-1] // 2
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


ROTARY = {"none": lambda x, cos, sin: x, "interleaved": rotate_interleaved}


@pytest.mark.parametrize("wrong", ROTARY)
def test_wrong_rotation_is_seen_and_named(wrong, reference, monkeypatch):
    directory, theirs = reference
    ours = load_model(directory)
    monkeypatch.setattr(model_module, "rotate", ROTARY[wrong])
    assert first_divergence(ours, theirs, random_ids(1, 20)) == "model.layers.0.self_attn.o_proj"
    # At position 0 every angle is 0: a test of a single token would have seen nothing.
    assert first_divergence(ours, theirs, random_ids(1, 1)) is None


def test_checkpointing_changes_no_gradient(reference):
    ours = load_model(reference[0])
    ours.requires_grad_(True)
    ids, gradients = random_ids(1, 12)[0], []
    for checkpointing in (False, True):
        ours.zero_grad()
        batch = pack(ours, [Text(ids[:5]), Text(ids[5:])])
        h, _ = forward_packed(ours, batch, checkpointing=checkpointing)
        h.square().sum().backward()
        gradients.append([p.grad.clone() for p in ours.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_prefix_run_once_equals_each_text_with_its_own(pair, checkpointing):
    """States and gradients; in no_grad mode too, where attention takes the other form."""
    ours, _ = pair
    ours.requires_grad_(True)
    prefix, own = random_ids(1, 6)[0], [random_ids(1, n, seed=n)[0] for n in (3, 1, 8)]
    counts = [1, 2, 1, 5]
    texts = [Text(ids, queries=n) for ids, n in zip([prefix, *own], counts, strict=True)]
    wanted, gradients = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), []
    for shared in (True, False):
        ours.zero_grad()
        if shared:
            batch = pack(ours, texts, first_is_prefix=True)
            h, cache = forward_packed(ours, batch, checkpointing=checkpointing)
            h = h[1:]  # without the prefix's own last state
        else:
            whole = [ours(torch.cat([prefix, text])[None])[0] for text in own]
            h = torch.cat([states[-n:] for states, n in zip(whole, counts[1:], strict=True)])
        (h * wanted).sum().backward()
        gradients.append([p.grad.clone() for p in ours.model.parameters()])
        if shared:
            found = h.detach()
    torch.testing.assert_close(found, h.detach(), **FP32)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()
    assert cache == []  # nothing is kept where nothing continues
    with torch.no_grad():
        h, _ = forward_packed(ours, pack(ours, texts, first_is_prefix=True))
    torch.testing.assert_close(h[1:], found, **FP32)
    ours.requires_grad_(False)


def test_long_texts_take_the_form_that_keeps_no_weights(pair, monkeypatch):
    ours, _ = pair
    ids, calls = random_ids(1, 30)[0], []
    real = packed_module.padded_attention
    monkeypatch.setattr(packed_module, "padded_attention", lambda *a: calls.append(1) or real(*a))
    texts = [Text(ids[:10]), Text(ids[10:])]
    whole, _ = forward_packed(ours, pack(ours, texts))
    layers = sum(isinstance(module, Attention) for module in ours.modules())
    assert len(calls) == layers
    monkeypatch.setattr(packed_module, "LARGEST_PADDED", 2 * 20 * 20 - 1)
    h, _ = forward_packed(ours, pack(ours, texts))
    assert len(calls) == layers
    torch.testing.assert_close(h, whole, **FP32)


def test_streams_are_the_reference_hidden_states(reference):
    directory, theirs = reference
    ours, ids = load_model(directory), random_ids(1, 15)
    streams: list[torch.Tensor] = []
    with torch.no_grad():
        h, _ = forward_packed(ours, pack(ours, [Text(ids[0])]), streams)
        expected = theirs(ids, output_hidden_states=True).hidden_states
    for found, wanted in zip([*streams, h], expected, strict=True):
        torch.testing.assert_close(found, wanted[0], **FP32)


@torch.no_grad()
def test_the_definition_stops_at_a_layer(reference):
    """0 is the embedding; the last state has passed the final norm as well."""
    directory, theirs = reference
    ours, ids = load_model(directory), random_ids(2, 15)
    expected = theirs(ids, output_hidden_states=True).hidden_states
    for layer, wanted in enumerate(expected[:-1]):
        torch.testing.assert_close(ours.model.residual_stream(ids, layer), wanted, **FP32)
    torch.testing.assert_close(ours(ids), expected[-1], **FP32)


@torch.no_grad()
def test_next_token_loss_equals_transformers(pair):
    ours, reference = pair
    ids = random_ids(3, 17)
    torch.testing.assert_close(next_token_loss(ours, ids), reference(ids, labels=ids).loss, **FP32)
