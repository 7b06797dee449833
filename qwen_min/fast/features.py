"""Pooled hidden states of many prompts at once, and the loss of a head on them; see head.py."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_min.fast import ranks
from qwen_min.fast.batching import token_budget_batches
from qwen_min.fast.label_scores import ALL, filler, last_states
from qwen_min.fast.layout import Text, pack
from qwen_min.fast.memory import store_by_columns
from qwen_min.fast.packed import forward_packed
from qwen_min.model import Qwen
from qwen_min.prompt import Prompts


@torch.inference_mode()
def pooled_features(
    model: Qwen,
    prompts: Prompts,
    pooling: str,
    all_layers: bool,
    batch_tokens: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Tensor:
    """`pooled_state` of many prompts: fp32 (n, S, D) on the CPU.

    S = 1: of the last layer only. With all_layers S = L + 1: the embedding and every layer, from
    one pass. `progress` is called with the prompts' tokens that are finished.
    """
    layers = model.config.num_hidden_layers + 1 if all_layers else 1
    features = torch.zeros(len(prompts), layers, model.config.hidden_size)
    queries = 1 if pooling == "last" else None
    lengths = [len(prompt.ids) for prompt in prompts]
    store_by_columns(model, sum(lengths))
    batches = token_budget_batches(lengths, batch_tokens)
    for rows, together in ranks.own_batches(batches, prompts):
        texts = [Text(prompts[row].ids, queries=queries) for row in rows]
        batch = pack(model, [*texts, *filler(model, texts)])
        streams: list[Tensor] | None = [] if all_layers else None
        h, _ = forward_packed(model, batch, streams)
        pooled = [pool(stream, batch.lengths, pooling) for stream in streams or []]
        pooled.append(pool(h, batch.asked, pooling))
        features[rows] = torch.stack(pooled, dim=1)[: len(rows)].cpu()
        progress(sum(len(prompts[row].ids) for row in together))
    return ranks.gathered(features)


def pool(x: Tensor, lengths: Sequence[int], pooling: str) -> Tensor:
    """States of texts laid end to end (N, D) → one fp32 vector per text (n, D)."""
    if pooling == "last":
        return x[torch.tensor(lengths, device=x.device).cumsum(0) - 1].float()
    return torch.stack([text.float().mean(dim=0) for text in x.split(list(lengths))])


def head_losses(
    model: Qwen,
    weight: Tensor,
    prompts: Prompts,
    classes: Sequence[int],
    checkpointing: bool,
    class_weights: Sequence[float] | None = None,
    own: slice = ALL,
) -> Tensor:
    """Sum over the rows `own` of `head_loss`, times the class's weight, with gradient.

    weight (C, D), of the head, in fp32; class_weights (C,).
    """
    texts = [prompt.ids for prompt in prompts]
    h = last_states(model, texts, [1] * len(texts), checkpointing, own)  # (rows, D)
    targets = torch.tensor(classes[own], device=weight.device)
    w = None if class_weights is None else weight.new_tensor(class_weights)
    return F.cross_entropy(F.linear(h.float(), weight), targets, w, reduction="sum")
