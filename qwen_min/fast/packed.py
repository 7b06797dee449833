"""The forward pass over texts laid end to end, as functions over the modules of model.py.

It computes what `Qwen.forward` defines, and differs from it mainly in three ways: the texts share
every matrix product, without padding; a prefix that texts have in common is computed once; and the
last layer computes outputs only where they are read. Shapes as in layout.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwen_min.fast.delta import gated_delta_net
from qwen_min.fast.kernels import RMSNormFunction, SwiGLUFunction, padded_attention
from qwen_min.fast.layout import Batch, Kept, Past, select_queries
from qwen_min.model import (
    Attention,
    DecoderLayer,
    GatedAttention,
    Qwen,
    Qwen3_5Layer,
    RMSNorm,
    ZeroCenteredRMSNorm,
    rotate,
    rotate_part,
)

# Texts · queries · keys, padded, up to which training uses `padded_attention`. It keeps the
# attention weights for the backward pass: 0.7 GB at this size in a 0.5B model in bf16.
LARGEST_PADDED = 2**20


def forward_packed(
    model: Qwen, batch: Batch, streams: list[Tensor] | None = None, checkpointing: bool = False
) -> tuple[Tensor, list[Past]]:
    """Hidden states after the final norm of the tokens asked for, end to end: (Σ asked, D).

    With `keep` in the batch, also one Past per text: what a later forward needs to continue it.
    streams: a list that receives the residual stream (N, D) after the embedding and after each
    layer but the last. checkpointing: recompute each layer in the backward pass instead of keeping
    its activations.
    """
    decoder, lengths = model.model, batch.lengths
    x = decoder.embed_tokens(batch.ids)  # (N, D)
    kept: list[list[Kept]] = []  # [layer][text]
    for i, layer in enumerate(decoder.layers):
        if streams is not None:
            streams.append(x)
        if i == len(decoder.layers) - 1 and batch.asked != batch.lengths:
            batch = select_queries(batch)
        prefix = batch.prefix and [past.layers[i] for past in batch.prefix]
        arguments = (layer, x, batch, prefix)
        if checkpointing:
            x, of_layer = checkpoint(decoder_layer, *arguments, use_reentrant=False)
        else:
            x, of_layer = decoder_layer(*arguments)
        if batch.keep:
            kept.append(of_layer)
    h = rms_norm(decoder.norm, x)
    if not batch.keep:
        return h, []
    before = [past.length for past in batch.prefix or []] or [0] * len(lengths)
    texts = zip(before, lengths, zip(*kept, strict=True), strict=True)
    return h, [Past(start + T, list(layers)) for start, T, layers in texts]


def decoder_layer(
    layer: DecoderLayer | Qwen3_5Layer, x: Tensor, batch: Batch, prefix: list[Kept] | None
) -> tuple[Tensor, list[Kept]]:
    """One layer: x (N, D) → (Σ query_counts, D), which is (N, D) before the last layer."""
    h = rms_norm(layer.input_layernorm, x)
    if isinstance(layer, Qwen3_5Layer) and layer.is_linear:
        h, kept = gated_delta_net(layer.linear_attn, h, batch, prefix)
    else:
        h, kept = attention(layer.self_attn, h, batch, prefix)
    x = (x if batch.query_index is None else x[batch.query_index]) + h
    h, mlp = rms_norm(layer.post_attention_layernorm, x), layer.mlp
    return x + mlp.down_proj(SwiGLUFunction.apply(mlp.gate_proj(h), mlp.up_proj(h))), kept


def attention(
    attn: Attention, x: Tensor, batch: Batch, prefix: list[Kept] | None
) -> tuple[Tensor, list[Kept]]:
    """Attention of each text by itself, one product per weight for all; also keys and values."""
    cos, sin, gated = batch.cos, batch.sin, isinstance(attn, GatedAttention)
    turn = rotate_part if gated else rotate
    k = rms_norm(attn.k_norm, attn.k_proj(x).view(-1, attn.kv_heads, attn.head_dim))
    k, v = turn(k, cos, sin), attn.v_proj(x).view(-1, attn.kv_heads, attn.head_dim)
    keys_values = list(zip(k.split(batch.lengths), v.split(batch.lengths), strict=True))
    if batch.first_is_prefix:
        first = keys_values[0]
        prefix = [(k[:0], v[:0]), *[first] * (len(batch.lengths) - 1)]
    if prefix is not None:
        keys_values = [
            (torch.cat([prefix_k, own_k]), torch.cat([prefix_v, own_v]))
            for (prefix_k, prefix_v), (own_k, own_v) in zip(prefix, keys_values, strict=True)
        ]
    if batch.query_index is not None:
        x, cos, sin = (t[batch.query_index] for t in (x, cos, sin))
    q = attn.q_proj(x).view(len(x), attn.heads, -1)  # (N, H, Dh), with a gate (N, H, 2·Dh)
    q, gate = q.chunk(2, dim=-1) if gated else (q, None)
    q = turn(rms_norm(attn.q_norm, q), cos, sin)
    # Only with gradients, only on a CPU: see `padded_attention`.
    size = len(keys_values) * max(batch.query_counts) * max(len(k) for k, _ in keys_values)
    if torch.is_grad_enabled() and q.device.type == "cpu" and size <= LARGEST_PADDED:
        out = padded_attention(q, keys_values, batch.query_counts, batch.padded_mask)
    else:
        out = attention_by_text(q, keys_values, batch.query_counts, batch.masks)
    out = out * gate.sigmoid() if gated else out
    return attn.o_proj(out.flatten(1)), keys_values


def attention_by_text(
    q: Tensor, keys_values: list[Kept], query_counts: list[int], masks: list[Tensor | None]
) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v for one text after the other; q (N, H, Dh) → (N, H, Dh).

    scaled_dot_product_attention never stores the (T, S) weights, so memory does not grow with T·S,
    and nothing is padded. Scoring 24 reviews takes as long with `padded_attention`, within 10 %.
    """
    outs = []
    for q_text, (k, v), mask in zip(q.split(query_counts), keys_values, masks, strict=True):
        out = F.scaled_dot_product_attention(
            q_text.transpose(0, 1)[None],  # (1, H, T, Dh)
            k.transpose(0, 1)[None],  # (1, K, S, Dh)
            v.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None and len(q_text) > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(out[0].transpose(0, 1))  # (T, H, Dh)
    return torch.cat(outs)


def rms_norm(norm: RMSNorm | nn.Identity, x: Tensor) -> Tensor:
    """The norm's `forward`, with a hand-written gradient."""
    if not isinstance(norm, RMSNorm):
        return x
    zero_centered = isinstance(norm, ZeroCenteredRMSNorm)
    return RMSNormFunction.apply(x, norm.weight, norm.eps, zero_centered)
