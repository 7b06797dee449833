"""Qwen's forward pass, bottom up: norm, rotary positions, attention, MLP, layer, model, logits.

To follow one call, start at class `Qwen` below and go up:

    logits = model.logits(model(ids)[:, -1])  # ids (B, T) → scores of every next token (B, V)

Qwen is a decoder-only Transformer: the Transformer of Vaswani et al. 2017 without encoder. Each
token sees itself and the tokens before it. The main differences from that paper:

- RMSNorm instead of LayerNorm, and before attention and MLP, not after: attention and MLP read a
  normalised copy of x and add their results to x. A last norm follows the last layer.
- Positions enter by rotating queries and keys. Nothing is added to the embeddings.
- Several query heads share one key/value head.
- The MLP has a gate.
- No dropout. Qwen2 has biases on q, k and v only; Qwen3 normally has none, but normalises q and k.

Qwen3.5 has other layers: the last section of this file, "Qwen3.5". Most of them use the gated delta
rule (delta_rule.py) instead of attention. Readers of Qwen2 and Qwen3 need neither.

This file is the definition, each computation once. If you change it, run the commands with
`--plain`: by default they run `qwen_min/fast/`, a faster form. From here it takes the weights, the
rotation and `Qwen.logits`.

Attribute names are the tensor names in the checkpoint (`model.layers.0.self_attn.q_proj.weight`),
so loading needs no map of names. The numbers equal those of transformers' `modeling_qwen2.py`,
`modeling_qwen3.py` and `modeling_qwen3_5.py` with eager attention, including the casts between
dtypes, marked `# dtype:`. (In bf16 one difference in Qwen3.5: two weights stay in fp32 here.)

Shapes, with the sizes of Qwen2.5-0.5B (24 layers):
    B batch                   T tokens of one text              D hidden_size 896
    H query heads 14          K key/value heads 2               Dh head_dim 64
    I intermediate_size 4864  V vocab_size 151936
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_min.config import LINEAR, Qwen3_5Config, QwenConfig
from qwen_min.delta_rule import GatedDeltaNet


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019, arXiv:1910.07467).

    It scales x to mean square 1, then each component by a learned weight. Unlike LayerNorm it
    subtracts no mean and adds no bias.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # dtype: the mean in fp32; cast back before the weight (the reference's order: in bf16 the
        # other one rounds differently).
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rotary_cos_sin(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles (Su et al. 2021, arXiv:2104.09864).

    positions (T,) → two fp32 tensors (T, 1, R); the 1 broadcasts over the heads. R, rotary_dim, is
    Dh, except in Qwen3.5. Pair i turns by position · theta^(-2i/R): the first pairs turn fast, the
    last ones very slowly.
    """
    # dtype: angles in fp32 even in a bf16 model, since bf16 cannot tell position 257 from 256.
    # Their cos and sin are at most 1 and may be rounded afterwards.
    two_i = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (two_i / rotary_dim)  # (R/2,), radians per position
    angles = positions.float()[:, None] * frequency  # (T, R/2)
    # Twice: components i and i + R/2 form pair i and turn by the same angle.
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]  # (T, 1, R)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of x (..., T, heads, R) by its angle: (a cos − b sin, b cos + a sin).

    Qwen pairs component i with i + R/2 (split halves), where the paper pairs 2i with 2i + 1.
    Turning q and k by the same additional angle does not change q·k. So after rotation it depends
    only on the difference of the two positions.
    """
    # dtype: cos and sin are cast to the activations' dtype; the rotation happens in that dtype.
    a, b = x.chunk(2, dim=-1)  # pair i is (a[i], b[i])
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v: q (B, T, H, Dh), k and v (B, T, K, Dh) → (B, T, H·Dh)."""
    T, H, Dh = q.shape[1:]
    # With H = 14 and K = 2: query heads 0 … 6 read key/value head 0, heads 7 … 13 head 1.
    group = H // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)  # (B, T, H, Dh)
    # Heads before tokens, so that @ multiplies (T, Dh) matrices, one per head.
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, Dh)

    # Row: query; column: key. Dividing by sqrt(Dh) keeps scores of order 1 whatever Dh is.
    scores = q @ k.transpose(2, 3) * Dh**-0.5  # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)  # later keys: True
    scores = scores.masked_fill(future, -torch.inf)
    # dtype: softmax in fp32, its result in the activations' dtype.
    weights = scores.float().softmax(dim=-1).to(q.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)  # (B, T, H·Dh)


class Attention(nn.Module):
    """Causal self-attention: softmax(q kᵀ / sqrt(Dh)) v, where each token sees itself and the past.

    Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): H query heads share K key/value
    heads. Programs that keep the keys and values of past tokens then keep H/K times less.
    """

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim  # not always D / H
        qk_norm = config.has_qk_norm
        D, bias, eps = config.hidden_size, config.attention_bias, config.rms_norm_eps
        # Qwen2: bias on q, k and v, never on o. Qwen3: on all four or, normally, on none.
        self.q_proj = nn.Linear(D, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, D, bias=bias and qk_norm)
        # Qwen3 normalises each query and key over Dh, before the rotation.
        self.q_norm = RMSNorm(self.head_dim, eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, D), cos and sin of the positions (T, 1, Dh) → (B, T, D)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(attend(q, k, v))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) · up(x)).

    silu(z) = z · sigmoid(z). The gate weighs each of the I features that `up` computes.
    """

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, I) → (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    x is never replaced, only added to, from the embedding to the last layer: the residual stream.
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
        # Empty until a checkpoint is loaded. (To train from nothing, draw all weights first.)
        vectors = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(vectors, freeze=False)
        if isinstance(config, Qwen3_5Config):
            layers = [Qwen3_5Layer(config, layer_type) for layer_type in config.layer_types]
            self.norm = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)
        else:
            layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(layers)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) → hidden states (B, T, D).

        Pad shorter rows on the right, with any token: no real position sees what comes after it, so
        padding needs no mask. Do not read the states of the padding.
        """
        return self.norm(self.residual_stream(ids, len(self.layers)))

    def residual_stream(self, ids: Tensor, layers: int) -> Tensor:
        """ids (B, T) → x (B, T, D) after the first `layers` layers; 0: the embedding."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        cos, sin = rotary_cos_sin(positions, self.config.rotary_dim, self.config.rope_theta)
        x = self.embed_tokens(ids)  # (B, T, D)
        for layer in self.layers[:layers]:
            x = layer(x, cos, sin)
        return x


class Qwen(nn.Module):
    """The checkpoint's root: `model.*` and, unless it is tied to the embedding, `lm_head`.

    A call gives hidden states; `logits` projects only the states that you pass to it. At all
    positions the logits of Qwen2.5-0.5B would cost as much as 9 of its 24 layers.
    """

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
    def dtype(self) -> torch.dtype:
        """Of the hidden states. Trained token vectors and LoRA are in fp32, whatever it is."""
        return self.model.norm.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) → hidden states (B, T, D)."""
        return self.model(ids)

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states (..., D) → fp32 logits over the whole vocabulary (..., V)."""
        # dtype: the product in h's dtype, as in the reference; then fp32, because a softmax over V
        # terms needs the precision.
        return F.linear(h, self.lm_head_weight.to(h.dtype)).float()


def next_token_loss(model: Qwen, ids: Tensor) -> Tensor:
    """The loss that a language model is trained by: mean of −log p(token | tokens before), in nats.

    ids (B, T), rows of equal length, T ≥ 2. The state at position t predicts the token at t + 1.
    """
    logits = model.logits(model(ids)[:, :-1])  # (B, T-1, V)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


# Qwen3.5. Its layers have the parts above with small changes, and most have no attention.


class ZeroCenteredRMSNorm(RMSNorm):
    """x / sqrt(mean(x²) + eps) · (1 + weight): a weight of 0 leaves x normalised.

    The weight comes from the checkpoint; the initial 1 of RMSNorm is only a placeholder.
    """

    def forward(self, x: Tensor) -> Tensor:
        # dtype: all in fp32, cast after the weight.
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * (1 + self.weight.float())).to(x.dtype)


class GatedAttention(Attention):
    """Attention whose output has a gate, and whose queries and keys are rotated in part.

    `q_proj` computes a query and a gate for each head, side by side. Of each head only the first
    rotary_dim components are rotated: the others compare content without position.
    """

    def __init__(self, config: Qwen3_5Config):
        super().__init__(config)
        # These three replace those of Attention.
        H, Dh = self.heads, self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, H * 2 * Dh, bias=config.attention_bias)
        self.q_norm = ZeroCenteredRMSNorm(Dh, config.rms_norm_eps)
        self.k_norm = ZeroCenteredRMSNorm(Dh, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, D), cos and sin of the positions (T, 1, rotary_dim) → (B, T, D)."""
        B, T, _ = x.shape
        q, gate = self.q_proj(x).view(B, T, self.heads, 2 * self.head_dim).chunk(2, dim=-1)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        q, k = rotate_part(self.q_norm(q), cos, sin), rotate_part(self.k_norm(k), cos, sin)
        return self.o_proj(attend(q, k, v) * gate.flatten(2).sigmoid())


def rotate_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` for the first components of each head, as many as cos has; the rest stays."""
    part = cos.shape[-1]
    return torch.cat([rotate(x[..., :part], cos, sin), x[..., part:]], dim=-1)


class Qwen3_5Layer(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)). The mixer is attention or the gated delta rule."""

    def __init__(self, config: Qwen3_5Config, layer_type: str):
        super().__init__()
        self.input_layernorm = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_linear = layer_type == LINEAR
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.post_attention_layernorm = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.input_layernorm(x)
        x = x + (self.linear_attn(h) if self.is_linear else self.self_attn(h, cos, sin))
        return x + self.mlp(self.post_attention_layernorm(x))
