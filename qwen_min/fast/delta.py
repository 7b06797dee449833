"""The gated delta rule, 64 tokens at a time, for texts laid end to end; delta_rule.py defines it.

Within a chunk the recurrence is a few products of matrices (Yang et al. 2024, "Gated Delta
Networks", arXiv:2412.06464, section 3.3). With G_i = g_1 + … + g_i, Γ_ij = e^(G_i − G_j) for i ≥ j
and else 0, and S the state before the chunk, the changes V' that the tokens write are

    A = I + β Γ ⊙ k kᵀ below the diagonal,    V' = A⁻¹ (β v) − A⁻¹ (β e^G k) S

Row i of it is the recurrence: V'_i = β_i (v_i − what S and the changes before i answer to k_i).
With them, the answers and the state after the chunk are

    o = e^G q S + (Γ ⊙ q kᵀ) V',    S ← e^(G_64) S + (e^(G_64 − G) k)ᵀ V'

Only what involves S runs chunk after chunk; all else is done for all chunks at once. Where a chunk
is padded, β = 0 and g = 0: nothing is written and nothing fades. Shapes as in delta_rule.py, and
M: chunks of all texts; c: 64 tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm

from qwen_min.delta_rule import GatedDeltaNet, one_token
from qwen_min.fast.chunks import Group
from qwen_min.fast.layout import Batch, Kept

FADED = -40.0


def gated_delta_net(
    net: GatedDeltaNet, x: Tensor, batch: Batch, prefix: list[Kept] | None
) -> tuple[Tensor, list[Kept]]:
    """`GatedDeltaNet.forward` of each text: x (N, D) → (Σ query_counts, D); and what is kept."""
    chunks, weight = batch.chunks, net.conv1d.weight
    inputs, gates = net.in_proj_qkv(x), torch.stack(net.gates(x))  # (N, C), (2, N, Hv)
    zeros = inputs.new_zeros(1, inputs.shape[1])
    rows = torch.cat([inputs, zeros, *(last for _, last in prefix or [])])
    states, answers = None if prefix is None else stack([state for state, _ in prefix]), []
    if len(chunks.windows):
        qkv = ConvolutionFunction.apply(rows, weight, chunks.windows)  # (M, c, C)
        of_chunks = F.pad(gates, (0, 0, 0, 1))[:, chunks.tokens]  # (2, M, c, Hv)
        stateless = chunks.groups[0].counts[0] if states is None else 0
        prepared = prepare(net, qkv, *of_chunks, stateless)
        keep = batch.keep or len(chunks.levels) > 0
        o, states = recurrence(prepared, chunks.groups, states, keep)
        answers.append(o.to(x.dtype).transpose(1, 2).flatten(0, 1))  # (M·c, Hv, dv)
    S = states
    for level in chunks.levels:
        q, k, v = net.split_heads(ConvolutionFunction.apply(rows, weight, level.windows)[:, 0])
        S, o = one_token(S[level.parents], q, k, v, *gates[:, level.rows])
        answers.append(o.to(x.dtype))
        if batch.keep:  # single tokens then, whose parents are texts
            states = states.index_copy(0, level.parents, S)
    kept = list(zip(states, rows[chunks.ends], strict=True)) if batch.keep else []
    places = chunks.places
    if batch.query_index is not None:
        places, x = places[batch.query_index], x[batch.query_index]
    return net.output(torch.cat(answers)[places], x), kept


def stack(states: list[Tensor]) -> Tensor:
    """(n, Hv, dk, dv); without a copy where all texts continue the same one."""
    same = all(state is states[0] for state in states)
    return states[0].expand(len(states), -1, -1, -1) if same else torch.stack(states)


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
        # dtype: in bf16 this rounds after each term; the definition rounds once.
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


class Prepared(NamedTuple):
    """Of each chunk, what does not involve S: (M, Hv, ...) in the notation above."""

    U: Tensor  # A⁻¹ (β v)
    within: Tensor  # Γ ⊙ q kᵀ
    k_end: Tensor  # e^(G_64 − G) k
    end: Tensor  # e^(G_64)
    W: Tensor  # A⁻¹ (β e^G k); this and the next one only of chunks that have a state before them
    q_grown: Tensor  # e^G q


def prepare(net: GatedDeltaNet, qkv: Tensor, g: Tensor, beta: Tensor, stateless: int) -> Prepared:
    """qkv (M, c, C), after the convolution, and g, beta (M, c, Hv).

    stateless: how many chunks, those in front, have no state before them.
    """
    # As GatedDeltaNet.split_heads, but each head's matrix is contiguous, and k kᵀ and q kᵀ are
    # computed before key heads are repeated.
    keys, share = net.key_heads * net.key_dim, net.value_heads // net.key_heads
    parts = F.silu(qkv).split([keys, keys, net.value_heads * net.value_dim], dim=-1)
    sizes = (net.key_dim, net.key_dim, net.value_dim)
    q, k, v = (by_head(part, size) for part, size in zip(parts, sizes, strict=True))
    q_length, k_length = ((vector_norm(x, dim=-1).square() + 1e-6).sqrt() for x in (q, k))
    q, k = q / (q_length * net.key_dim**0.5)[..., None], k / k_length[..., None]
    kk, qk = k @ k.mT, q @ k.mT  # (M, Hk, c, c)
    if share > 1:
        q, k, kk, qk = (t.repeat_interleave(share, dim=1) for t in (q, k, kk, qk))
    g, beta = g.transpose(1, 2), beta.transpose(1, 2)  # (M, Hv, c)
    # dtype: in fp64, as differences of large sums: a strong decay would round the weak ones away.
    G = g.double().clamp(min=FADED).cumsum(-1)
    gamma, grown = fade(G[..., :, None] - G[..., None, :]), fade(G)
    # solve_triangular takes the diagonal of A as 1, and reads nothing above it.
    A, one = kk * gamma * beta[..., None], torch.eye(kk.shape[-1], device=kk.device)
    inverse = torch.linalg.solve_triangular(A, one, upper=False, unitriangular=True)
    return Prepared(
        U=(inverse * beta[..., None, :]) @ v,
        within=(qk * gamma).tril(),
        k_end=k * fade(G[..., -1:] - G)[..., None],
        end=grown[..., -1:, None],
        W=(inverse * (beta * grown)[..., None, :])[stateless:] @ k[stateless:],
        q_grown=(q * grown[..., None])[stateless:],
    )


def recurrence(
    prepared: Prepared, groups: list[Group], past: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Answers (M, Hv, c, dv) and, with `keep`, the states after the texts (texts, Hv, dk, dv).

    past: the states before the texts; None: empty ones.
    """
    U, within, k_end, end, W, q_grown = prepared
    counts = [count for group in groups for count in group.counts]
    own = zip(*(t.split(counts) for t in (U, within, k_end, end)), strict=True)
    counts = counts[1:] if past is None else counts  # the chunks in front have no state
    from_state = zip(W.split(counts), q_grown.split(counts), strict=True)
    answers, states, S = [], past, None
    for number, group in enumerate(groups):
        if past is not None:
            S = past[group.texts]
        elif number:  # these texts continue the first group's only one
            S = S.expand(len(group.texts), -1, -1, -1)
        ended = []
        for count, going in zip(group.counts, [*group.counts[1:], 0], strict=True):
            V, weights, k, fading = next(own)
            if S is None:
                answers.append(weights @ V)
            else:
                w, q = next(from_state)
                S = S[:count]
                V = V - w @ S
                answers.append(q @ S + weights @ V)
            if going or keep or number < len(groups) - 1:
                S = k.mT @ V if S is None else fading * S + k.mT @ V
                ended.append(S[going:])  # the shortest texts end first
        if keep:
            if states is None:
                states = S.new_zeros(sum(len(g.texts) for g in groups), *S.shape[1:])
            index = torch.tensor(group.texts, device=S.device)
            states = states.index_copy(0, index, torch.cat(ended[::-1]))
    return torch.cat(answers), states


def by_head(x: Tensor, size: int) -> Tensor:
    """(M, c, heads · size) → (M, heads, c, size) in fp32."""
    # dtype: here the definition goes to fp32, too.
    x = x.unflatten(-1, (-1, size)).transpose(1, 2)
    return x.to(torch.float32, memory_format=torch.contiguous_format)


def fade(log: Tensor) -> Tensor:
    """e^log for log ≤ 0, in fp32; 1 above, and never below e^-40.

    e^-40 (4e-18) is lost beside numbers around 1. Without this bound there would be denormal
    numbers, with which a CPU computes up to a hundred times slower.
    """
    return log.clamp(FADED, 0.0).float().exp()
