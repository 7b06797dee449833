"""The gated delta rule, which most layers of Qwen3.5 have in place of attention.

Read `Attention` in model.py first. There each token compares its query with the keys of all tokens
before it: the work for T tokens grows with T². Here each head has one matrix of a fixed size, the
state S (dk, dv), a memory that answers a key with a value. Each token does the same work, so the
work for T tokens grows with T. A token with query q, key k and value v does four things:

    1. decay   S ← e^g S                 all that is stored fades, 0 < e^g < 1
    2. read    old = Sᵀk                 the value that S has for this key
    3. write   S ← S + k (β (v − old))ᵀ  a share β of old is erased, the same share of v written
    4. answer  o = Sᵀq                   the value that S has for the query

Why step 3 replaces a value: k has length 1, so reading again gives Sᵀk = old + β (v − old). With
β = 0 step 3 changes nothing, with β = 1 the answer to k is now v. Keys at a right angle to k keep
their answers.
Without "− old" this would be plain linear attention, S ← S + k vᵀ: what is written twice under the
same key would add up. Step 3 is also one step of gradient descent on ½ |Sᵀk − v|² with the learning
rate β. That is the delta rule (Widrow & Hoff 1960); the decay in front of it is its gate (Yang et
al. 2024, "Gated Delta Networks", arXiv:2412.06464). g and β are computed from the token itself.

The price of a state of fixed size: what has faded or been overwritten is lost. So some layers of
Qwen3.5 are still attention: every fourth one, or as `layer_types` says. There are no rotary
positions here: the order is in the recurrence.

This file is the definition, token by token. fast/delta.py computes 64 tokens at a time. The numbers
equal those of transformers' `modeling_qwen3_5.py`, including its casts, marked `# dtype:`; only
A_log and norm.weight stay in fp32 here in every dtype.

Shapes, with the sizes of Qwen3.5-0.8B; B, T, D as in model.py:
    Hk key heads 16     dk size of a key 128      C = 2·Hk·dk + Hv·dv channels, q | k | v: 6144
    Hv value heads 16   dv size of a value 128
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_min.config import Qwen3_5Config


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The answers o (B, T, Hv, dv) to the queries, one token after the other, from an empty state.

    q and k (B, T, Hv, dk), v (B, T, Hv, dv), g and beta (B, T, Hv), all in fp32. Every value head
    has a state of its own.
    """
    B, T, Hv, dk = k.shape
    S = v.new_zeros(B, Hv, dk, v.shape[-1])
    answers = []
    for t in range(T):
        S, o = one_token(S, q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t])
        answers.append(o)
    return torch.stack(answers, dim=1)


def one_token(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The four steps for one token of each text.

    S (B, Hv, dk, dv), q and k (B, Hv, dk), v (B, Hv, dv), g and beta (B, Hv) → the new S, and
    o (B, Hv, dv).
    """
    S = g.exp()[..., None, None] * S  # decay
    old = read(S, k)
    change = beta[..., None] * (v - old)
    S = S + k[..., :, None] * change[..., None, :]  # write: k changeᵀ
    return S, read(S, q)


def read(S: Tensor, k: Tensor) -> Tensor:
    """Sᵀk for each head: S (..., dk, dv) and k (..., dk) → (..., dv)."""
    return (S * k[..., None]).sum(dim=-2)


def causal_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel's weighted sum over the last four tokens: x (B, T, C) → (B, T, C).

    y_t = w_0 x_{t-3} + w_1 x_{t-2} + w_2 x_{t-1} + w_3 x_t, with zeros before the first token, and
    w of each channel in weight (C, 1, 4). So a key depends on the tokens just before it, too, even
    in the first layer.
    """
    before = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))  # (B, C, 3 + T)
    return F.conv1d(before, weight, groups=len(weight)).transpose(1, 2)


def to_unit_length(x: Tensor) -> Tensor:
    """x / |x| over the last dimension. 1e-6 avoids a division by 0; a very short x stays so."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class GatedRMSNorm(nn.Module):
    """RMSNorm of the answers, times silu of the output gate z. Its weight is used as it is."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, o: Tensor, z: Tensor) -> Tensor:
        """o and z (..., dv) → (..., dv)."""
        h = o.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        # dtype: cast before the weight, which is in fp32; the gate in fp32; the product is cast.
        return (self.weight * h.to(o.dtype) * F.silu(z.float())).to(o.dtype)


class GatedDeltaNet(nn.Module):
    """The layer around the rule: projections, convolution, decay and β, the rule, gate, output."""

    def __init__(self, config: Qwen3_5Config):
        super().__init__()
        self.key_heads = config.linear_num_key_heads
        self.key_dim = config.linear_key_head_dim
        self.value_heads = config.linear_num_value_heads
        self.value_dim = config.linear_value_head_dim
        D, C, kernel = config.hidden_size, config.conv_channels, config.linear_conv_kernel_dim
        self.in_proj_qkv = nn.Linear(D, C, bias=False)
        self.in_proj_z = nn.Linear(D, self.value_heads * self.value_dim, bias=False)  # output gate
        self.in_proj_b = nn.Linear(D, self.value_heads, bias=False)  # β
        self.in_proj_a = nn.Linear(D, self.value_heads, bias=False)  # decay
        self.conv1d = nn.Conv1d(C, C, kernel, groups=C, bias=False)
        # dtype: A_log and norm.weight stay in fp32, even if all other weights are in bf16.
        self.A_log = nn.Parameter(torch.zeros(self.value_heads))
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.norm = GatedRMSNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_heads * self.value_dim, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        q, k, v = self.split_heads(causal_convolution(self.in_proj_qkv(x), self.conv1d.weight))
        g, beta = self.gates(x)
        o = gated_delta_rule(q, k, v, g, beta)  # (B, T, Hv, dv)
        return self.output(o, x)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After the convolution: qkv (..., C) → q, k (..., Hv, dk) and v (..., Hv, dv), in fp32."""
        keys = self.key_heads * self.key_dim
        q, k, v = F.silu(qkv).split([keys, keys, self.value_heads * self.value_dim], dim=-1)
        # dtype: from here to the answers all is in fp32.
        q, k = (x.unflatten(-1, (self.key_heads, self.key_dim)).float() for x in (q, k))
        # The factor: o is linear in q, so the norm of o removes it again, up to its eps.
        q, k = to_unit_length(q) * self.key_dim**-0.5, to_unit_length(k)
        # Consecutive value heads share a key head, as query heads share one in attention.
        q, k = (x.repeat_interleave(self.value_heads // self.key_heads, dim=-2) for x in (q, k))
        return q, k, v.unflatten(-1, (self.value_heads, self.value_dim)).float()

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D) → g < 0, the logarithm of the decay, and β in (0, 1); fp32 (..., Hv).

        g = −exp(A_log)·softplus(a + dt_bias): A_log sets how fast a head forgets on the whole, a
        how fast at this token.
        """
        # dtype: a and β are computed in x's dtype; everything after them in fp32.
        beta = self.in_proj_b(x).sigmoid().float()
        g = -self.A_log.float().exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        return g, beta

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Answers o (..., Hv, dv) and the layer's input x (..., D) → (..., D)."""
        z = self.in_proj_z(x).unflatten(-1, (self.value_heads, self.value_dim))
        return self.out_proj(self.norm(o.to(x.dtype), z).flatten(-2))
