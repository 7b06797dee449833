"""The gated delta rule, 64 tokens at a time, for texts laid end to end; delta_rule.py defines it.

Within a chunk the recurrence is a few products of matrices (Yang et al. 2024, "Gated Delta
Networks", arXiv:2412.06464, section 3.3). With G_i = g_1 + … + g_i, Γ_ij = e^(G_i − G_j) for i ≥ j
and else 0, and S the state before the chunk, the changes V' that the tokens write are

    A = I + β Γ ⊙ k kᵀ below the diagonal,    V' = A⁻¹ (β v) − A⁻¹ (β e^G k) S

Row i of it is the recurrence: V'_i = β_i (v_i − what S and the changes before i answer to k_i).
With them, the answers and the state after the chunk are

    o = e^G q S + (Γ ⊙ q kᵀ) V',    S ← e^(G_64) S + (e^(G_64 − G) k)ᵀ V'

Only what involves S runs chunk after chunk; all else is done for all chunks at once. Where a chunk
is filled up, β = 0 and g = 0: nothing is written and nothing fades. Shapes as in delta_rule.py, and
M: chunks of all texts; c: 64 tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen_min.delta_rule import GatedDeltaNet, one_token
from qwen_min.fast.chunks import Group
from qwen_min.fast.layout import Batch, Kept

# e^-60 is nothing beside the numbers around 1 that it would be added to. Below it, products would
# become denormal numbers, with which a CPU computes up to a hundred times slower.
FADED = -60.0


def gated_delta_net(
    net: GatedDeltaNet, x: Tensor, batch: Batch, prefix: list[Kept] | None
) -> tuple[Tensor, list[Kept]]:
    """`GatedDeltaNet.forward` of each text: x (N, D) → (Σ query_counts, D); and what is kept."""
    chunks, weight = batch.chunks, net.conv1d.weight
    inputs, gates = net.in_proj_qkv(x), torch.stack(net.gates(x))  # (N, C), (2, N, Hv)
    rows = torch.cat(
        [inputs, inputs.new_zeros(1, inputs.shape[1]), *(last for _, last in prefix or [])]
    )
    states = None if prefix is None else torch.stack([state for state, _ in prefix])
    answers = []
    if len(chunks.windows):
        keep = batch.keep or len(chunks.levels) > 0
        qkv = F.silu(ConvolutionFunction.apply(rows, weight, chunks.windows))  # (M, c, C)
        of_chunks = F.pad(gates, (0, 0, 0, 1))[:, chunks.tokens]  # (2, M, c, Hv)
        o, states = chunked_delta_rule(net, qkv, *of_chunks, chunks.groups, states, keep)
        answers.append(o.to(x.dtype).transpose(1, 2).flatten(0, 1))  # (M·c, Hv, dv)
    S = states
    for level in chunks.levels:
        q, k, v = net.heads(ConvolutionFunction.apply(rows, weight, level.windows)[:, 0])
        S, o = one_token(S[level.parents], q, k, v, *gates[:, level.rows])
        answers.append(o.to(x.dtype))
        if batch.keep:
            states = states.index_copy(0, level.parents, S)
    kept = list(zip(states, rows[chunks.ends], strict=True)) if batch.keep else []
    places = chunks.places
    if batch.query_index is not None:
        places, x = places[batch.query_index], x[batch.query_index]
    return net.output(torch.cat(answers)[places], x), kept


class ConvolutionFunction(torch.autograd.Function):
    """The causal convolution: rows (rows, C), windows (n, kernel − 1 + T) → y (n, T, C).

    y_t = Σ_i w_i x_(t+i), with x the rows that a window names. dx_(t+i) = Σ_i w_i dy_t, summed over
    all windows that name the row; dw_i = Σ_t x_(t+i) dy_t. Torch's own convolution of separate
    channels takes six times as long here (bf16, 6,144 channels).
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, windows: Tensor) -> Tensor:
        w = weight[:, 0].T.contiguous()  # (kernel, C)
        x, T = rows[windows], windows.shape[1] - len(w) + 1
        y = x[:, :T] * w[0]
        for i in range(1, len(w)):
            y.addcmul_(x[:, i : i + T], w[i])
        ctx.save_for_backward(rows if weight.requires_grad else None, weight, windows)
        ctx.rows = len(rows)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, windows = ctx.saved_tensors
        n, T, C = dy.shape
        w = weight[:, 0].T.contiguous()
        dx, dw = dy.new_zeros(n, windows.shape[1], C), None
        for i in range(len(w)):
            dx[:, i : i + T].addcmul_(dy, w[i])
        d_rows = dy.new_zeros(ctx.rows, C).index_add_(0, windows.flatten(), dx.flatten(0, 1))
        if ctx.needs_input_grad[1]:
            x = rows[windows]
            dw = [(x[:, i : i + T] * dy).sum((0, 1)) for i in range(len(w))]
            dw = torch.stack(dw, dim=-1)[:, None]
        return d_rows, dw, None


def chunked_delta_rule(
    net: GatedDeltaNet,
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    groups: list[Group],
    past: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Answers (M, Hv, c, dv) in fp32 and, with `keep`, the states after the texts.

    qkv (M, c, C) after the convolution and its SiLU; g, beta (M, c, Hv). past: the states before
    the texts (texts, Hv, dk, dv); None: empty ones.
    """
    keys, share = net.key_heads * net.key_dim, net.value_heads // net.key_heads
    parts = qkv.split([keys, keys, net.value_heads * net.value_dim], dim=-1)
    sizes = (net.key_dim, net.key_dim, net.value_dim)
    q, k, v = (by_head(part, size) for part, size in zip(parts, sizes, strict=True))
    # The lengths of q and k are divided out of the products, which are smaller than q and k.
    q_scale = (q.square().sum(-1) + 1e-6).rsqrt() * net.key_dim**-0.5
    k_scale = (k.square().sum(-1) + 1e-6).rsqrt()
    kk, qk = k @ k.mT * k_scale[..., None, :], q @ k.mT * k_scale[..., None, :]  # (M, Hk, c, c)
    q, k, q_scale, k_scale, kk, qk = (
        t.repeat_interleave(share, dim=1) for t in (q, k, q_scale, k_scale, kk, qk)
    )
    g, beta = g.transpose(1, 2), beta.transpose(1, 2)  # (M, Hv, c)
    G = g.cumsum(-1)
    later = torch.ones(kk.shape[-2:], dtype=torch.bool, device=kk.device).triu(1)
    decay = fade((G[..., :, None] - G[..., None, :]).masked_fill(later, -torch.inf))  # Γ
    # solve_triangular takes the diagonal as 1, and reads nothing above it.
    A = kk * decay * (beta * k_scale)[..., None]
    one = torch.eye(A.shape[-1], device=A.device)
    inverse = torch.linalg.solve_triangular(A, one, upper=False, unitriangular=True)
    within = qk * decay * q_scale[..., None]
    U = inverse * beta[..., None, :] @ v  # A⁻¹ (β v)
    # The first chunks of texts that continue nothing have an empty state before them.
    new = 0 if past is not None else groups[0].counts[0]
    grown = fade(G[new:])
    W = inverse[new:] * (beta[new:] * grown * k_scale[new:])[..., None, :] @ k[new:]
    q_grown = q[new:] * (grown * q_scale[new:])[..., None]
    k_end = k * (fade(G[..., -1:] - G) * k_scale)[..., None]
    end = fade(G[..., -1])[..., None, None]

    counts = [count for group in groups for count in group.counts]
    own = zip(*(t.split(counts) for t in (U, within, k_end, end)), strict=True)
    from_state = (t.split(counts if new == 0 else counts[1:]) for t in (W, q_grown))
    from_state = zip(*from_state, strict=True)
    answers, states, S = [], past, None
    for number, group in enumerate(groups):
        if past is not None:
            S = past[group.texts]
        elif number:  # these texts continue the first group's only one
            S = S.expand(len(group.texts), -1, -1, -1)
        ended = []
        for count, going in zip(group.counts, [*group.counts[1:], 0], strict=True):
            changes, weights, k_step, end_step = next(own)
            if S is None:
                answers.append(weights @ changes)
            else:
                W_step, q_step = next(from_state)
                S = S[:count]
                changes = changes - W_step @ S
                answers.append(q_step @ S + weights @ changes)
            if going or keep or number < len(groups) - 1:
                written = k_step.mT @ changes
                S = written if S is None else end_step * S + written
                ended.append(S[going:])
        if keep:
            if past is None and not number:
                states = S.new_zeros(sum(len(g.texts) for g in groups), *S.shape[1:])
            states = states.index_copy(
                0, torch.tensor(group.texts, device=S.device), torch.cat(ended[::-1])
            )
    return torch.cat(answers), states


def by_head(x: Tensor, size: int) -> Tensor:
    """(M, c, heads · size) → (M, heads, c, size) in fp32."""
    # dtype: here the definition goes to fp32, too.
    x = x.unflatten(-1, (-1, size)).transpose(1, 2)
    return x.to(torch.float32, memory_format=torch.contiguous_format)


def fade(log: Tensor) -> Tensor:
    """e^log, but 0 from e^-60 on."""
    return F.threshold(log, FADED, -torch.inf).exp()
