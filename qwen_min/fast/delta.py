"""The gated delta rule, 64 tokens at a time, for texts laid end to end; delta_rule.py defines it.

Within a chunk the recurrence is written as products of matrices (Yang et al. 2024, "Gated Delta
Networks", arXiv:2412.06464, section 3.3). With G_i = g_1 + … + g_i, row i of Γ_ij = e^(G_i − G_j)
for i ≥ j, and S the state before the chunk, the values that the tokens write are V' = U − W S:

    A = I + (the part of (β k) kᵀ ⊙ Γ below the diagonal)
    A U = β v         what each token writes, less what the chunk's earlier tokens left for its key
    A W = β k e^G     the same for what S has

    o = (q e^G) S + (q kᵀ ⊙ Γ, its lower part) V'
    S ← e^(G_64) S + (k e^(G_64 − G))ᵀ V'

Only what involves S runs chunk after chunk. Row i of A U = β v is the recurrence itself:
U_i = β_i (v_i − Σ_{j<i} Γ_ij (k_i·k_j) U_j). Where a chunk is filled up, β = 0 and g = 0: nothing
is written and nothing fades. Shapes as in delta_rule.py, and M: chunks of all texts; c: 64.
"""

import torch
from torch import Tensor

from qwen_min.delta_rule import GatedDeltaNet, one_token
from qwen_min.fast.chunks import CHUNK, Group
from qwen_min.fast.layout import Batch, Kept


def gated_delta_net(
    net: GatedDeltaNet, x: Tensor, batch: Batch, prefix: list[Kept] | None
) -> tuple[Tensor, list[Kept]]:
    """`GatedDeltaNet.forward` of each text: x (N, D) → (Σ query_counts, D); and what is kept."""
    chunks, past = batch.chunks, None
    inputs = net.in_proj_qkv(x)  # (N, C)
    rows = [inputs, inputs.new_zeros(1, inputs.shape[1])]
    if prefix is not None:
        past = torch.stack([state for state, _ in prefix])  # (texts, Hv, dk, dv)
        rows += [last for _, last in prefix]
    rows, gates = torch.cat(rows), torch.stack(net.gates(x))  # (rows, C), (2, N, Hv)
    answers, states = [], past
    if len(chunks.windows):
        q, k, v = net.heads(convolve(rows, chunks.windows, net.conv1d.weight))  # (M, c, Hv, ...)
        filled = torch.cat([gates, gates.new_zeros(2, 1, gates.shape[2])], dim=1)
        tokens = chunks.windows[:, net.conv1d.kernel_size[0] - 1 :]
        filled = filled[:, tokens.clamp(max=len(x))]  # (2, M, c, Hv)
        q, k, v, g, beta = (t.transpose(1, 2).contiguous() for t in (q, k, v, *filled))
        keep = batch.keep or len(chunks.levels) > 0
        o, states = chunked_delta_rule(q, k, v, g, beta, chunks.groups, past, keep)
        answers.append(o.to(x.dtype).transpose(1, 2).flatten(0, 1))  # (M·c, Hv, dv)
    S = states
    for level in chunks.levels:
        q, k, v = net.heads(convolve(rows, level.windows, net.conv1d.weight)[:, 0])
        S, o = one_token(S[level.parents], q, k, v, *gates[:, level.rows])
        answers.append(o.to(x.dtype))
        if batch.keep:
            states = states.index_copy(0, level.parents, S)
    kept = list(zip(states, rows[chunks.ends], strict=True)) if batch.keep else []
    places = chunks.places
    if batch.query_index is not None:
        places, x = places[batch.query_index], x[batch.query_index]
    return net.output(torch.cat(answers)[places], x), kept


def convolve(rows: Tensor, windows: Tensor, weight: Tensor) -> Tensor:
    """The causal convolution: rows (…, C), windows (n, kernel − 1 + T) → (n, T, C)."""
    kernel = weight.shape[-1]
    T = windows.shape[1] - kernel + 1
    x, w = rows[windows], weight[:, 0].T  # (n, kernel − 1 + T, C), (kernel, C)
    return sum(x[:, i : i + T] * w[i] for i in range(kernel))


def chunked_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    groups: list[Group],
    past: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Answers (M, Hv, c, dv) and, with `keep`, the state after each text.

    q, k (M, Hv, c, dk), v (M, Hv, c, dv), g, beta (M, Hv, c), in fp32. past: the states before the
    texts (texts, Hv, dk, dv).
    """
    G = g.cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    # Masked before the exponential: G falls, so above the diagonal it would overflow.
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(later, -torch.inf).exp()  # Γ
    k_beta = k * beta[..., None]
    A = k_beta @ k.mT * decay  # solve_triangular takes its diagonal as 1
    U = solve(A, v * beta[..., None])
    within = q @ k.mT * decay
    # The first chunks of texts that continue nothing have an empty state before them.
    new = 0 if past is not None else groups[0].counts[0]
    grown = G[new:].exp()[..., None]
    W, q_grown = solve(A[new:], k_beta[new:] * grown), q[new:] * grown
    k_end, end = k * (G[..., -1:] - G).exp()[..., None], G[..., -1:].exp()[..., None]

    counts = [count for group in groups for count in group.counts]
    own = zip(*(t.split(counts) for t in (U, within, k_end, end)), strict=True)
    behind = counts if past is not None else counts[1:]
    from_state = zip(W.split(behind), q_grown.split(behind), strict=True)
    answers, states, S = [], past, None
    for number, group in enumerate(groups):
        if past is not None:
            S = past[group.texts]
        elif number:  # continues the first group's only text
            S = S.expand(len(group.texts), -1, -1, -1)
        ended = []
        for step, count in enumerate(group.counts):
            V, weights, k_step, end_step = next(own)
            o = None
            if S is not None:
                W_step, q_step = next(from_state)
                S = S[:count]
                V = V - W_step @ S
                o = q_step @ S
            answers.append(weights @ V if o is None else o + weights @ V)
            going = [*group.counts, 0][step + 1]
            if going or keep or number < len(groups) - 1:
                written = k_step.mT @ V
                S = written if S is None else end_step * S + written
                ended.append(S[going:])
        if keep:
            if states is None:
                texts = sum(len(group.texts) for group in groups)
                states = S.new_zeros(texts, *S.shape[1:]) if past is None else past.clone()
            states[group.texts] = torch.cat(ended[::-1])
    return torch.cat(answers), states


def solve(A: Tensor, x: Tensor) -> Tensor:
    """A⁻¹ x for lower triangular A with a diagonal of 1."""
    return torch.linalg.solve_triangular(A, x, upper=False, unitriangular=True)
