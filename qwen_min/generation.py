"""Greedy decoding: the likeliest token again and again, until one that ends the text.

First as its definition, which runs the whole text anew for each token; below it with the key/value
cache, where each step costs one token a text.
"""

from collections.abc import Collection, Sequence

import torch

from qwen_min.model import Qwen


@torch.inference_mode()
def greedy(
    model: Qwen, prompt: Sequence[int], max_new_tokens: int, stop: Collection[int] = ()
) -> list[int]:
    """The definition. Returns the new ids, without the one of `stop` that ended them."""
    new: list[int] = []
    while len(new) < max_new_tokens:
        ids = torch.tensor([[*prompt, *new]], device=model.head_weight.device)  # (1, T)
        token = int(model.logits(model(ids)[0, -1]).argmax())
        if token in stop:
            break
        new.append(token)
    return new


@torch.inference_mode()
def greedy_cached(
    model: Qwen,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """`greedy` for several prompts at once; a text that has ended leaves the batch."""
    device = model.head_weight.device
    new: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # texts still growing, in the cache's order
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    lengths, cache = [len(prompt) for prompt in prompts], None
    for _ in range(max_new_tokens):
        h, cache = model.model.forward_packed(ids, lengths, past=cache, last=[1] * len(lengths))
        tokens = model.logits(h).argmax(dim=-1).tolist()  # one for each active text
        going = [i for i, token in enumerate(tokens) if token not in stop]
        for i in going:
            new[active[i]].append(tokens[i])
        if not going:
            break
        active = [active[i] for i in going]
        cache = [[layer[i] for i in going] for layer in cache]
        ids = torch.tensor([tokens[i] for i in going], device=device)
        lengths = [1] * len(going)
    return new
