"""Parts of a layer as a run computes them: norm, SwiGLU and, in training, attention.

model.py has their definitions, which autograd can differentiate as they stand. But it then keeps
every intermediate result for the backward pass, several in fp32, and a processor spends longer on
writing and reading those than on the arithmetic. Here norm and SwiGLU keep little more than their
inputs and bring their own gradients, and the attention of several texts is a few large products
instead of many small ones.

Notation of the gradients: L is the loss, and dx stands for ∂L/∂x. Shapes as in model.py.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence


class RMSNormFunction(torch.autograd.Function):
    """y = w·n with n = r·x and r = (mean(x²) + eps)^(-1/2), over the last dimension of x (..., D).

    r depends on every x_j: ∂r/∂x_j = −r³·x_j/D. With g = w·dy that gives

        dx = r·(g − n·mean(g·n)),    dw = Σ dy·n over tokens.

    The second term takes out of g what only changes the length of x, which the norm undoes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = x.float()
        r = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return weight * (h * r).to(x.dtype)  # dtype: as in the definition

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        n = x.float() * r
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy * n.to(x.dtype)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            g = (weight * dy).float()
            mean = (g * n).mean(-1, keepdim=True)
            dx = g.addcmul_(n, mean, value=-1).mul_(r).to(x.dtype)
        return dx, dw, None


class SwiGLUFunction(torch.autograd.Function):
    """y = silu(gate)·up, all (N, intermediate_size), with silu(g) = g·σ(g) and σ the sigmoid.

        d_gate = dy·up·silu'(gate),    silu'(g) = σ(g)·(1 + g·(1 − σ(g))),    d_up = dy·silu(gate)

    silu(gate) is computed again for the backward pass.
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


class PadFunction(torch.autograd.Function):
    """x (N, ...), texts of these lengths end to end → (B, T, ...), shorter ones filled with 0."""

    @staticmethod
    def forward(ctx, x: Tensor, lengths: Sequence[int]) -> Tensor:
        ctx.lengths = lengths
        return pad_sequence(x.split(lengths), batch_first=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return UnpadFunction.apply(dy, ctx.lengths), None


class UnpadFunction(torch.autograd.Function):
    """The way back: x (B, T, ...) → (N, ...). Each is the other's gradient.

    Autograd would make a whole zero tensor for each text's slice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, lengths: Sequence[int]) -> Tensor:
        ctx.lengths = lengths
        return torch.cat([text[:length] for text, length in zip(x, lengths, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return PadFunction.apply(dy, ctx.lengths), None


def attention_side_by_side(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    seen: Tensor,
) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v of texts that lie end to end, for all of them at once.

    q (N, H, Dh), k and v (M, K, Dh): N and M are the sums of `lengths` and `key_lengths`, of B
    texts. seen (B, T, S), for the longest T and S: which keys each query sees; none of them may be
    blind. Returns (N, H, Dh). Padding costs little: attention is the smallest part of a layer.
    """
    B, T, S = seen.shape
    H, K, Dh = q.shape[1], k.shape[1], q.shape[2]
    # dtype: q is divided, which is smaller than the scores that the definition divides. In bf16
    # that rounds once more, unless sqrt(Dh) is a power of two: 8 for Dh = 64, but not for 128.
    q = PadFunction.apply(q / math.sqrt(Dh), lengths)  # (B, T, H, Dh)
    k, v = PadFunction.apply(k, key_lengths), PadFunction.apply(v, key_lengths)  # (B, S, K, Dh)
    # The H/K query heads that read one key/value head lie below each other: one product for all.
    q = q.view(B, T, K, H // K, Dh).permute(0, 2, 3, 1, 4).reshape(B * K, -1, Dh)
    k, v = k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)  # (B·K, S, Dh)
    scores = (q @ k.transpose(1, 2)).view(B, H, T, S)
    with torch.no_grad():  # adding a constant leaves the gradient as it is: nothing to record
        scores += torch.where(seen, 0.0, -math.inf).to(q.dtype)[:, None]
    # dtype: softmax of bf16 numbers sums in fp32 and rounds its result, as the definition does.
    weights = scores.softmax(dim=-1).view(B * K, -1, S)
    out = (weights @ v).view(B, K, H // K, T, Dh).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return UnpadFunction.apply(out, lengths)
