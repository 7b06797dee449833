"""Norm, SwiGLU and attention with hand-written gradients, for packed.py.

Autograd can differentiate the definitions in model.py as they are. It then keeps every intermediate
result for the backward pass, several of them in fp32, and a CPU spends more time on writing and
reading those than on arithmetic. Here norm and SwiGLU keep little more than their inputs, and the
attention of several texts is a few large products instead of many small ones.

Notation of the gradients: L is the loss, and dx stands for ∂L/∂x. Shapes as in layout.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNormFunction(torch.autograd.Function):
    """y = w·n with n = r·x and r = (mean(x²) + eps)^(-1/2), over the last dimension of x (..., D).

    r depends on every x_j: ∂r/∂x_j = −r³·x_j/D. With g = w·dy that gives

        dx = r·(g − n·mean(g·n)),    dw = Σ dy·n over tokens.

    The second term removes the part of g that only changes the length of x: the norm undoes it.
    With `zero_centered`, w stands for 1 + w, and all is in fp32, as in that definition.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
        h = x.float()
        r = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        ctx.zero_centered = zero_centered
        if zero_centered:
            return (h * r).mul_(1 + weight.float()).to(x.dtype)
        return weight * (h * r).to(x.dtype)  # dtype: as in the definition

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        n = x.float() * r
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy * (n if ctx.zero_centered else n.to(x.dtype))).flatten(0, -2).sum(0)
            dw = dw.to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = (1 + weight.float()) * dy if ctx.zero_centered else (weight * dy).float()
            mean = (g * n).mean(-1, keepdim=True)
            dx = g.addcmul_(n, mean, value=-1).mul_(r).to(x.dtype)
        return dx, dw, None, None


class SwiGLUFunction(torch.autograd.Function):
    """y = silu(gate)·up, all (N, intermediate_size), with silu(g) = g·σ(g) and σ the sigmoid.

        d_gate = dy·up·silu'(gate),    silu'(g) = σ(g)·(1 + g·(1 − σ(g))),    d_up = dy·silu(gate)

    The backward pass computes silu(gate) again instead of keeping it.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        # dtype: the operator that autograd calls, which forms silu' in fp32.
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)


def pad(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """x (N, H, Dh), texts of these lengths end to end → (B, T, H, Dh), padded with 0."""
    T = max(lengths)
    return torch.stack([F.pad(text, (0, 0, 0, 0, 0, T - len(text))) for text in x.split(lengths)])


def unpad(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The inverse of `pad`: x (B, T, H, Dh) → (N, H, Dh)."""
    # unbind first: the gradient of a slice is a zero tensor as large as what was sliced.
    return torch.cat([text[:n] for text, n in zip(x.unbind(), lengths, strict=True)])


def padded_attention(
    q: Tensor, keys_values: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int], mask: Tensor
) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v for all texts at once, padded to the longest; for training.

    With `attention_by_text` instead, a training step of 8 reviews takes 1.1 to 1.2 times as long
    (0.5B, bf16, two cores): many small products, and their gradients.

    q (N, H, Dh), texts of `lengths` end to end; keys and values of each text (S, K, Dh); mask
    (B, T, S) for the longest T and S: 0 for the keys that a query sees, at least one each, −∞ for
    the others. Returns (N, H, Dh).
    """
    B, T, S = mask.shape
    H, Dh = q.shape[1:]
    K, sizes = keys_values[0][0].shape[1], [len(k) for k, _ in keys_values]
    k, v = (pad(torch.cat(part), sizes) for part in zip(*keys_values, strict=True))
    # dtype: q is scaled, which has fewer elements than the scores that the definition scales. In
    # bf16 that rounds once more, unless sqrt(Dh) is a power of two (8 for Dh = 64).
    q = pad(q * Dh**-0.5, lengths)  # (B, T, H, Dh)
    # The H/K query heads that read one key/value head are stacked along T: one product per KV head.
    q = q.view(B, T, K, H // K, Dh).permute(0, 2, 3, 1, 4).reshape(B * K, -1, Dh)
    k, v = k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)  # (B·K, S, Dh)
    scores = (q @ k.transpose(1, 2)).view(B, H, T, S)
    with torch.no_grad():  # adding a constant does not change the gradient: nothing to record
        scores += mask[:, None]
    # dtype: softmax of bf16 numbers sums in fp32 and rounds its result, as the definition does.
    weights = scores.softmax(dim=-1).view(B * K, -1, S)
    out = (weights @ v).view(B, K, H // K, T, Dh).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return unpad(out, lengths)
