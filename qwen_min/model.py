"""Qwen's forward pass, bottom up: norm, rotary positions, attention, MLP, layer, model, logits.

Qwen is a decoder-only Transformer: Vaswani et al. 2017 without the encoder. It differs from that
paper in five ways. RMSNorm replaces LayerNorm and is placed before attention and MLP, so one more
norm follows the last layer. Positions enter by rotating queries and keys; nothing is added to the
embeddings. Several query heads share one key/value head. The MLP has a gate. There is no dropout.
Biases exist on q, k and v (Qwen2), or normally nowhere (Qwen3).

This file is the definition: each computation once, in its plainest form. `--plain` runs it. By
default the commands run `qwen_min/fast/`, which computes the same with the same modules.

The module tree is the checkpoint's tensor tree, so loading needs no map of names. The numbers equal
those of transformers' `modeling_qwen2.py` and `modeling_qwen3.py`, including the casts between
dtypes; each cast is marked `# dtype:`.

Shapes:
    B batch    T tokens of one text    D hidden_size    F intermediate_size    V vocab_size
    H query heads    K key/value heads    Dh head_dim
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_min.config import QwenConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019, arXiv:1910.07467).

    Unlike LayerNorm it subtracts no mean and adds no bias: it only fixes the length of x.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # dtype: the mean of squares in fp32; cast back before multiplying by the weight, not after.
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rotary_cos_sin(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles (Su et al. 2021, arXiv:2104.09864).

    positions (T,) → two fp32 tensors (T, 1, Dh); the 1 broadcasts over the heads. Pair i turns by
    position · theta^(-2i/Dh): the first pairs turn fast, the last ones very slowly.
    """
    # dtype: fp32 even in a bf16 model; bf16 cannot tell position 257 from 256.
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    inverse_frequency = 1.0 / theta ** (pair / head_dim)
    angles = positions.float()[:, None] * inverse_frequency  # (T, Dh/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]  # (T, 1, Dh)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of x (..., T, heads, Dh) by its angle: (a cos − b sin, b cos + a sin).

    Qwen pairs component i with i + Dh/2 (split halves), where the paper pairs 2i with 2i + 1.
    After rotation, q·k depends on the positions only through their difference.
    """
    # dtype: cos and sin are cast to the activations' dtype; the rotation happens in that dtype.
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention: softmax(q kᵀ / sqrt(Dh)) v, where each token sees itself and the past.

    Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): H query heads share K
    key/value heads, which makes the cache of keys and values H/K times smaller.
    """

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        D, bias = config.hidden_size, config.attention_bias
        # Qwen2: bias on q, k, v, none on o. Qwen3: none, but with attention_bias on all four.
        o_bias = bias and config.has_qk_norm
        self.q_proj = nn.Linear(D, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, D, bias=o_bias)
        # Qwen3 normalises each query and key over Dh before the rotation.
        qk_norm, eps = config.has_qk_norm, config.rms_norm_eps
        self.q_norm = RMSNorm(self.head_dim, eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, D), cos and sin of the positions (T, 1, Dh) → (B, T, D)."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim))
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        # Query heads 0 … H/K-1 read key/value head 0, the next H/K heads read head 1, and so on.
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, Dh)

        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)  # (B, H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
        # dtype: softmax in fp32, its result in the activations' dtype.
        weights = scores.float().softmax(dim=-1).to(q.dtype)
        out = (weights @ v).transpose(1, 2)  # (B, T, H, Dh)
        return self.o_proj(out.reshape(B, T, self.heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): a gate decides how much of each feature passes."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): both add to the residual stream x.

    `post_attention_layernorm` is the checkpoint's name for the RMSNorm before the MLP.
    """

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class QwenModel(nn.Module):
    """Embedding, decoder layers, final norm: from token ids to hidden states."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        # Uninitialised: the values come from a file. (Drawing random ones on the meta device, on
        # which loading builds the model, would import torch's whole compiler.)
        vectors = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(vectors, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, layer: int | None = None) -> Tensor:
        """ids (B, T) → hidden states (B, T, D) after the last layer and the final norm.

        layer: return the output of this layer instead (0: the embedding); the final norm belongs to
        the last layer. Pad shorter rows on the right with any token: no real position sees what
        comes after it, so padding needs no mask. Do not read the states of the padding.
        """
        layer = len(self.layers) if layer is None else layer
        positions = torch.arange(ids.shape[1], device=ids.device)
        cos, sin = rotary_cos_sin(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(ids)  # (B, T, D)
        for decoder_layer in self.layers[:layer]:
            x = decoder_layer(x, cos, sin)
        return self.norm(x) if layer == len(self.layers) else x


class Qwen(nn.Module):
    """The checkpoint's root: `model.*` and, unless it is tied to the embedding, `lm_head`."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.model = QwenModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def lm_head_weight(self) -> Tensor:
        """The vocabulary projection (V, D): the embedding itself in a tied checkpoint."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head_weight.device

    @property
    def dtype_name(self) -> str:
        """The weights' dtype, as in config.json: "bfloat16"."""
        return str(self.lm_head_weight.dtype).removeprefix("torch.")

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) → hidden states (B, T, D); `logits` turns the ones you need into logits."""
        return self.model(ids)

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states (..., D) → fp32 logits over the whole vocabulary (..., V).

        V is large (151,936 in Qwen2.5): select positions before this call, not after.
        """
        # dtype: the product in h's dtype, as in the reference (--train-embeddings keeps the weight
        # in fp32: it is cast); logits in fp32, for the log-sum-exp.
        return F.linear(h, self.lm_head_weight.to(h.dtype)).float()


def next_token_loss(model: Qwen, ids: Tensor) -> Tensor:
    """What a language model is trained by: mean of −log p(token | tokens before it), in nats.

    ids (B, T), rows of equal length, T ≥ 2. The state at position t predicts the token at t + 1.
    """
    logits = model.logits(model(ids)[:, :-1])  # (B, T-1, V)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
