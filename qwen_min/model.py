"""Qwen's forward pass, bottom up: norm, rotary positions, attention, MLP, layer, model.

A decoder alone: of the Transformer of the paper (Vaswani et al. 2017) there is no encoder and no
attention to one. Norms are RMSNorm and stand before attention and MLP, hence the one after the last
layer; position enters by rotating queries and keys, so that nothing is added to the embeddings;
several query heads share a key/value head; the MLP is gated; biases stand on q, k and v alone
(Qwen2) or nowhere (Qwen3); there is no dropout.

The module tree is the checkpoint's tensor tree, so that weights load without a map of names.
Norm, attention, MLP, layer and model stand here twice:

- `forward` is the definition. It takes a batch of equally long rows and spells everything out.
- `forward_packed`, right below it, is what a run uses. Texts of different lengths are laid end to
  end, so that the linear layers see one long matrix and compute nothing for padding; only attention
  looks at one text at a time (in training on a CPU at all of them, padded: see gradients.py). It
  can continue from keys and values computed earlier.

Neither calls the other, but for the norms of q and k, which are the definition in both. Both are
held to transformers' `modeling_qwen2.py` / `modeling_qwen3.py`, whose casts between dtypes they
repeat; those places are marked `# dtype:`.

Shapes:
    B batch    T tokens of one text    N tokens of several texts, end to end    D hidden_size
    H query heads    K key/value heads    Dh head_dim    V vocab_size
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwen_min.config import QwenConfig
from qwen_min.fast.kernels import RMSNormFunction, SwiGLUFunction, attention_side_by_side
from qwen_min.fast.layout import Cache, KeysValues, Layout, ask_for_last, lay_out

# Texts · queries · keys, padded, that attention in training takes at once: in a 0.5B model (14
# heads, 24 layers, bf16) 0.7 GB of weights are kept for the backward pass.
LARGEST_SEEN = 2**20


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019, arXiv:1910.07467).

    Unlike LayerNorm it neither subtracts the mean nor adds a bias: only the length of x is fixed.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # dtype: the mean of squares needs fp32; the cast back comes before the weight, not after.
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)

    def forward_packed(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.eps)


def rotary_cos_sin(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles (Su et al. 2021, arXiv:2104.09864).

    positions (T,) → two fp32 tensors (T, 1, Dh); the 1 stands where the heads will be. Pair i turns
    by position · theta^(-2i/Dh): the first pairs quickly, the last ones hardly at all.
    """
    # dtype: angles in fp32 even in a bf16 model; bf16 could not tell position 257 from 256.
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    inverse_frequency = 1.0 / theta ** (pair / head_dim)
    angles = positions.float()[:, None] * inverse_frequency  # (T, Dh/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]  # (T, 1, Dh)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of x (..., T, heads, Dh) by its angle.

    (a, b) → (a cos − b sin, b cos + a sin). Qwen pairs component i with i + Dh/2 (split halves),
    not 2i with 2i + 1 as in the paper. In q·k positions then count through their difference alone.
    """
    # dtype: cos and sin go to the activations' dtype and the rotation happens there.
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with fewer key/value heads than query heads, for a smaller cache.

    Grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        D, bias = config.hidden_size, config.attention_bias
        # Qwen2 has a bias on q, k and v and none on o; Qwen3 replaced it by q_norm and k_norm.
        # With attention_bias a Qwen3 has it on all four.
        o_bias = bias and config.has_qk_norm
        self.q_proj = nn.Linear(D, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, D, bias=o_bias)
        norms = config.has_qk_norm
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norms else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norms else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The definition: softmax(q kᵀ / sqrt(Dh)) v, with the future masked out."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim))
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        # Query heads 0 … H/K-1 read key/value head 0, the next H/K read head 1, and so on.
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

    def forward_packed(
        self, x: Tensor, layout: Layout, past: Sequence[KeysValues] | None
    ) -> tuple[Tensor, list[KeysValues]]:
        """Texts end to end, x (N, D): one product per weight, attention for each text alone.

        Returns (N, D), or a row for each of the last tokens that the layout asks for alone, and
        each text's keys and values, those of `past` included.
        """
        cos, sin, lengths, masks = layout.cos, layout.sin, layout.lengths, layout.masks
        k = self.k_norm(self.k_proj(x).view(-1, self.kv_heads, self.head_dim))
        v = self.v_proj(x).view(-1, self.kv_heads, self.head_dim)
        k = rotate(k, cos, sin)
        keys_values = list(zip(k.split(lengths), v.split(lengths), strict=True))
        if layout.shared_prefix:
            past = [(k[:0], v[:0]), *[keys_values[0]] * (len(lengths) - 1)]
        if past is not None:
            keys_values = [
                (torch.cat([old_k, new_k]), torch.cat([old_v, new_v]))
                for (old_k, old_v), (new_k, new_v) in zip(past, keys_values, strict=True)
            ]

        if layout.places is not None:
            x, cos, sin = x[layout.places], cos[layout.places], sin[layout.places]
            lengths = layout.last
        q = self.q_norm(self.q_proj(x).view(-1, self.heads, self.head_dim))
        q = rotate(q, cos, sin)

        # For training on a CPU, where the backward pass of the form below takes several times as
        # long. Where nothing is kept for a backward pass, or on a GPU, that one is faster; and with
        # long texts it is smaller, since it does not keep the weights of every pair of tokens.
        training = torch.is_grad_enabled() and q.device.type == "cpu"
        if training and layout.seen_size <= LARGEST_SEEN:
            keys, values = (torch.cat(part) for part in zip(*keys_values, strict=True))
            sizes = [len(k_text) for k_text, _ in keys_values]
            out = attention_side_by_side(q, keys, values, lengths, sizes, layout.seen)
            return self.o_proj(out.flatten(1)), keys_values
        outs = []
        for q_text, (k_text, v_text), mask in zip(
            q.split(lengths), keys_values, masks, strict=True
        ):
            out = F.scaled_dot_product_attention(
                q_text.transpose(0, 1)[None],  # (1, H, T, Dh)
                k_text.transpose(0, 1)[None],  # (1, K, T with past, Dh)
                v_text.transpose(0, 1)[None],
                attn_mask=mask,
                is_causal=mask is None and len(q_text) > 1,
                enable_gqa=self.heads != self.kv_heads,
            )
            outs.append(out[0].transpose(0, 1))  # (T, H, Dh)
        out = torch.cat(outs).reshape(-1, self.heads * self.head_dim)
        return self.o_proj(out), keys_values


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): a gate decides how much of each feature passes."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward_packed(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLUFunction.apply(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): each part adds to the residual stream.

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

    def forward_packed(
        self, x: Tensor, layout: Layout, past: Sequence[KeysValues] | None
    ) -> tuple[Tensor, list[KeysValues]]:
        h = self.input_layernorm.forward_packed(x)
        attended, keys_values = self.self_attn.forward_packed(h, layout, past)
        x = (x if layout.places is None else x[layout.places]) + attended
        h = self.post_attention_layernorm.forward_packed(x)
        return x + self.mlp.forward_packed(h), keys_values


class QwenModel(nn.Module):
    """Embedding, decoder layers, final norm: token ids to hidden states."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        # Without values: they come from a file. Drawing random ones first would, on the meta device
        # that loading builds on, import torch's whole compiler.
        vectors = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(vectors, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """The definition. ids (B, T) → hidden states after the final norm (B, T, D).

        Shorter rows are padded on the right with any token: no real position can see what comes
        after it, so padding needs no mask, only that its own states are not read.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        cos, sin = rotary_cos_sin(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(ids)  # (B, T, D)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def forward_packed(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        past: Cache | None = None,
        visible: Sequence[Tensor | None] | None = None,
        shared_prefix: bool = False,
        last: Sequence[int] | None = None,
        streams: list[Tensor] | None = None,
        checkpointing: bool = False,
    ) -> tuple[Tensor, Cache]:
        """Several texts end to end. ids (N,), N = sum(lengths) → hidden states (N, D) and cache.

        past: what came before each text, from an earlier call; `[layer][text]`.
        visible: for each text a boolean (T, T), row t marking those of the *new* tokens that token
            t sees; None, for all or for one: those before it and itself. Another pattern makes a
            tree, for the label words of scoring.py: several continuations of one prompt side by
            side. A token's position is the number of tokens it sees, less one.
        shared_prefix: the first text is what all others begin with; they come without it, and it
            is run once. States and gradients are as if each had brought its own, but that a LoRA's
            dropout draws once for all. Not together with past.
        last: for each text how many of its last tokens are asked for: their hidden states alone
            are returned (sum(last), D), and the last layer skips queries and MLP everywhere else.
        streams: a list that receives the residual stream (N, D) after the embedding and after each
            layer but the last, whose output the final norm turns into the returned states.
        checkpointing: recompute each layer in the backward pass instead of keeping activations.
        """
        if shared_prefix and past is not None:
            raise ValueError("texts continue either a past or the first text, not both")
        shape = {"head_dim": self.config.head_dim, "theta": self.config.rope_theta}
        angles = partial(rotary_cos_sin, **shape)
        layout = lay_out(angles, ids.device, lengths, past, visible, shared_prefix)
        x = self.embed_tokens(ids)  # (N, D)
        cache: Cache = []
        for i, layer in enumerate(self.layers):
            if streams is not None:
                streams.append(x)
            if last is not None and i == len(self.layers) - 1:
                layout = ask_for_last(layout, last)
            arguments = (x, layout, None if past is None else past[i])
            if checkpointing:
                x, keys_values = checkpoint(layer.forward_packed, *arguments, use_reentrant=False)
            else:
                x, keys_values = layer.forward_packed(*arguments)
            cache.append(keys_values)
        return self.norm.forward_packed(x), cache


class Qwen(nn.Module):
    """The checkpoint's root: `model.*` and, where it is not tied to the embedding, `lm_head`."""

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

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) → hidden states (B, T, D). `logits` turns those asked for into logits."""
        return self.model(ids)

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states (..., D) → logits over the whole vocabulary (..., V), in fp32.

        V is large (151,936): choose positions before calling this, not after.
        """
        # dtype: the product in h's dtype, as in the reference (a weight that --train-embeddings
        # keeps in fp32 is cast); the logits in fp32, for the log-sum-exp.
        return F.linear(h, self.lm_head_weight.to(h.dtype)).float()
