"""Greedy decoding: the likeliest token again and again, until one that ends the text.

First as its definition, which runs the whole text anew for each token; below it with the key/value
cache, where each step costs one token a text. At the end what makes a class of the text.
"""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from qwen_min.errors import UserError
from qwen_min.fast.batching import token_budget_batches
from qwen_min.metrics import OFF_TRACK
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt

# A label word has a few tokens; behind "答案是：" or the like it still has room.
MAX_NEW_TOKENS = 16


@torch.inference_mode()
def greedy(
    model: Qwen, prompt: Sequence[int], max_new_tokens: int, stop: Collection[int] = ()
) -> list[int]:
    """The definition. Returns the new ids, without the one of `stop` that ended them."""
    new: list[int] = []
    while len(new) < max_new_tokens:
        ids = torch.tensor([[*prompt, *new]], device=model.lm_head_weight.device)  # (1, T)
        token = int(model.logits(model(ids)[0, -1]).argmax())
        if token in stop:
            break
        new.append(token)
    return new


@torch.inference_mode()
def greedy_cached(
    model: Qwen, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int] = ()
) -> list[list[int]]:
    """`greedy` for several prompts at once; a text that has ended leaves the batch."""
    device = model.lm_head_weight.device
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


def generate_answers(
    model: Qwen,
    prompts: Sequence[Prompt],
    stop: Collection[int],
    batch_tokens: int,
    progress: Callable[[int], object] = lambda rows: None,
) -> list[list[int]]:
    """The ids that `greedy_cached` puts behind each prompt, MAX_NEW_TOKENS at most, in order."""
    answers: list[list[int]] = [[] for _ in prompts]
    # What an answer will take in the cache counts too.
    lengths = [len(prompt.ids) + MAX_NEW_TOKENS for prompt in prompts]
    for rows in token_budget_batches(lengths, batch_tokens):
        batch = [prompts[row].ids for row in rows]
        found = greedy_cached(model, batch, MAX_NEW_TOKENS, stop)
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
        progress(len(rows))
    return answers


def stop_ids(directory: str | Path, markup: dict[str, int]) -> set[int]:
    """The tokens that end an answer: those that generation_config.json names, and Qwen's markup.

    A base model's file names <|endoftext|> alone, although after a chat prompt <|im_end|> ends it.
    """
    stop = {markup[token] for token in ("<|im_end|>", "<|endoftext|>") if token in markup}
    path = Path(directory) / "generation_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
        found = found if isinstance(found, list) else [found]
        if any(type(token) is not int for token in found):
            raise ValueError(f"eos_token_id is {found}")
    except FileNotFoundError:
        return stop
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a generation config ({reason}); fetch it again") from None
    return stop | set(found)


def first_label(answer: str, words: Sequence[str]) -> int:
    """The class whose word stands first in `answer`; OFF_TRACK where there is none.

    Of words that start at one place the longest counts: 不好 says more than 不.
    """
    places = [(answer.find(word), -len(word), y) for y, word in enumerate(words)]
    return min((place for place in places if place[0] >= 0), default=(0, 0, OFF_TRACK))[2]
