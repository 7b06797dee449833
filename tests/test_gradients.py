"""The forms that training runs, values and gradients, against the definitions and PyTorch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_min.fast.delta import ConvolutionFunction
from qwen_min.fast.kernels import RMSNormFunction, SwiGLUFunction, pad, padded_attention, unpad
from qwen_min.fast.label_scores import last_states
from qwen_min.fast.layout import Text, pack, select_queries
from qwen_min.fast.packed import forward_packed, rms_norm
from qwen_min.files.weights import load_model
from qwen_min.model import RMSNorm, ZeroCenteredRMSNorm

# fp32 sums of some ten products, in another order, on values of size 1.
FP32 = {"atol": 2e-6, "rtol": 1e-5}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 8), (0, 8)])
@pytest.mark.parametrize("trained", ["x", "weight", "both"])
@pytest.mark.parametrize("kind", [RMSNorm, ZeroCenteredRMSNorm])
def test_norm_equals_its_definition(kind, shape, trained):
    # An eps as large as the mean square itself: a gradient that left it out would show.
    norm, x, dy = kind(8, 0.5), draw(*shape), draw(*shape, seed=1).detach()
    norm.weight.data = draw(8, seed=2).detach()
    inputs = {"x": [x], "weight": [norm.weight], "both": [x, norm.weight]}[trained]
    x.requires_grad_(trained != "weight")
    norm.weight.requires_grad_(trained != "x")
    y = rms_norm(norm, x)
    assert torch.equal(y, norm(x))
    found, expected = (torch.autograd.grad(out, inputs, dy) for out in (y, norm(x)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **FP32)


@pytest.mark.parametrize("kind", [RMSNorm, ZeroCenteredRMSNorm])
def test_norm_in_bf16(kind):
    norm, x = kind(64, 1e-6).bfloat16(), draw(32, 64, dtype=torch.bfloat16)
    norm.weight.data = draw(64, seed=2, dtype=torch.bfloat16).detach()
    dy = draw(32, 64, seed=1, dtype=torch.bfloat16).detach()
    y = rms_norm(norm, x)
    assert torch.equal(y, norm(x))
    found = torch.autograd.grad(y, (x, norm.weight), dy)
    inputs = [t.detach().float().requires_grad_() for t in (x, norm.weight)]
    exact = RMSNormFunction.apply(*inputs, 1e-6, kind is ZeroCenteredRMSNorm)
    expected = torch.autograd.grad(exact, inputs, dy.float())
    # dx is rounded twice, each time by up to 2^-8: w·dy, and the result. dw is a sum of 32 products
    # of one sign or the other, whose factors, products and sum are rounded.
    for a, b, bound in zip(found, expected, (2 * 2**-8, 4 * 2**-8), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).abs().max() < bound * b.abs().max()


@pytest.mark.parametrize("trained", ["rows", "weight", "both"])
def test_convolution_and_its_gradient(trained):
    """Windows that overlap: rows 2 and 3 are in both, row 0 twice in one."""
    rows, weight = draw(6, 5, dtype=torch.float64), draw(5, 1, 3, seed=1, dtype=torch.float64)
    rows.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "rows")
    windows = torch.tensor([[0, 0, 1, 2, 3], [2, 3, 4, 5, 1]])
    y = ConvolutionFunction.apply(rows, weight, windows)
    for window, found in zip(windows, y, strict=True):
        expected = F.conv1d(rows[window].T[None], weight, groups=5)[0].T
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(ConvolutionFunction.apply, (rows, weight, windows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_equals_its_definition_to_the_bit(dtype):
    gate, up, dy = (draw(5, 12, seed=seed, dtype=dtype) for seed in range(3))
    y, definition = SwiGLUFunction.apply(gate, up), F.silu(gate) * up
    assert torch.equal(y, definition)
    found, expected = (torch.autograd.grad(out, (gate, up), dy) for out in (y, definition))
    assert all(map(torch.equal, found, expected))


def test_padding_and_back():
    lengths, x = [2, 4, 1], draw(7, 3, 2)
    padded = pad(x, lengths)
    assert padded.shape == (3, 4, 3, 2) and torch.equal(padded[1], x[2:6])
    assert not padded[0, 2:].any() and not padded[2, 1:].any()
    assert torch.equal(unpad(padded, lengths), x)
    # The gradient of a real place is its own, that of padding goes nowhere.
    dy = draw(3, 4, 3, 2, seed=1).detach()
    (dx,) = torch.autograd.grad(padded, x, dy)
    assert torch.equal(dx, torch.cat([dy[0, :2], dy[1], dy[2, :1]]))
    (back,) = torch.autograd.grad(unpad(dy.requires_grad_(), lengths), dy, x)
    assert torch.equal(back, padded)


@pytest.mark.parametrize("first_is_prefix", [False, True])
@pytest.mark.parametrize("counts", [(None, None, None), (1, 2, 3)])
def test_the_padded_mask_holds_every_mask(first_is_prefix, counts, reference):
    texts = [Text(range(n), queries=count) for n, count in zip((5, 2, 4), counts, strict=True)]
    batch = pack(load_model(reference[0]), texts, first_is_prefix=first_is_prefix)
    batch = batch if batch.asked == batch.lengths else select_queries(batch)
    starts = (0, 5, 5) if first_is_prefix else (0, 0, 0)
    queries = 5 if counts[0] is None else 3
    assert batch.padded_mask.shape == (3, queries, 9 if first_is_prefix else 5)
    for found, start, T, count in zip(batch.padded_mask, starts, (5, 2, 4), counts, strict=True):
        whole = torch.ones(T, start + T).tril(start).log()  # the prefix, itself, those before
        expected = whole if count is None else whole[-count:]
        rows, keys = expected.shape
        assert torch.equal(found[:rows, :keys], expected)
        assert (found[:, keys:] == -math.inf).all() and not found[:, 0].any()


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 1), (3, 3), (14, 2)])
def test_padded_attention_equals_text_by_text(heads, kv_heads):
    """Texts of unequal lengths, some behind keys of their own past, one with a tree's mask."""
    lengths, before = [3, 1, 6, 2], [0, 4, 0, 5]
    sizes = [n + m for n, m in zip(lengths, before, strict=True)]
    q = draw(sum(lengths), heads, 8)
    k, v = (draw(sum(sizes), kv_heads, 8, seed=seed) for seed in (1, 2))
    masks = [torch.ones(n, m).tril(m - n).bool() for n, m in zip(lengths, sizes, strict=True)]
    masks[2][5, 3] = False  # the sixth token does not see the fourth
    seen = torch.zeros(4, 6, 7, dtype=torch.bool)
    seen[:, :, 0] = True
    for mask, into in zip(masks, seen, strict=True):
        into[: mask.shape[0], : mask.shape[1]] = mask
    keys_values = list(zip(k.split(sizes), v.split(sizes), strict=True))
    found = padded_attention(q, keys_values, lengths, seen.float().log())
    group = heads // kv_heads
    outs = []
    for q_i, k_i, v_i, mask in zip(
        q.split(lengths), k.split(sizes), v.split(sizes), masks, strict=True
    ):
        k_i, v_i = k_i.repeat_interleave(group, dim=1), v_i.repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,shd->hts", q_i, k_i) / math.sqrt(8)
        weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
        outs.append(torch.einsum("hts,shd->thd", weights, v_i))
    expected, dy = torch.cat(outs), draw(sum(lengths), heads, 8, seed=3).detach()
    torch.testing.assert_close(found, expected, **FP32)
    pairs = (torch.autograd.grad(out, (q, k, v), dy) for out in (found, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, **FP32)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_gradients_of_a_packed_pass_equal_those_of_the_definition(kind, tmp_path):
    """Of every weight of the model: autograd on the definition, text by text."""
    from conftest import make_reference

    make_reference(tmp_path, kind)
    model = load_model(tmp_path)
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 500, (n,), generator=generator) for n in (9, 3, 14)]
    wanted, gradients = draw(sum(map(len, rows)), 32).detach(), []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            h, _ = forward_packed(model, pack(model, [Text(row) for row in rows]))
        else:
            h = torch.cat([model(row[None])[0] for row in rows])
        (h * wanted).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        assert expected.abs().max() > 0, name
        difference = (gradients[0][name] - expected).abs().max()
        # fp32 through three layers and back, each sum in another order.
        assert difference < 1e-4 * expected.abs().max(), name


def test_bf16_training_errs_no_more_than_the_definition(reference):
    """States and gradients of the two forms in bf16, each against the definition in fp32."""
    texts = [(3, 1, 4, 1, *range(20, 20 + n)) for n in (9, 3, 14, 30)]
    wanted = draw(len(texts), 32).detach()

    def run(dtype: str, fast: bool) -> dict[str, Tensor]:
        model = load_model(reference[0], dtype)
        model.requires_grad_(True)
        if fast:
            h = last_states(model, texts, [1] * len(texts), False)
        else:
            h = torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])
        (h.float() * wanted).sum().backward()
        found = {name: p.grad.float() for name, p in model.named_parameters()}
        return {"states": h.detach().float(), **found}

    exact, definition, fast = (
        run(*how) for how in (("float32", False), ("bfloat16", False), ("bfloat16", True))
    )

    def error(found: dict[str, Tensor]) -> Tensor:
        """Root mean square, in parts of each tensor's own size; one number for each tensor."""
        return torch.stack([(found[n] - t).norm() / t.norm() for n, t in exact.items()])

    # Two draws of the same rounding noise differ by chance; over all tensors by little.
    assert error(fast)[0] < 1.5 * error(definition)[0]
    assert error(fast).mean() < 1.2 * error(definition).mean()
    assert 1e-3 < error(definition).mean() < 0.1
