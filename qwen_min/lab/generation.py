"""Greedy decoding by its definition: append the most likely token until a stop token.

Then the class that an answer names. `qwen_min.fast.generation` has the batched form.
"""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from qwen_min.errors import UserError
from qwen_min.files.disk import read_json
from qwen_min.metrics import OFF_TRACK
from qwen_min.model import Qwen

# Digits, and Latin, Greek and Cyrillic letters.
LETTER = "[0-9A-Za-zÀ-\u052f]"
# Enough for a label word of a few tokens, also after a phrase such as "答案是：".
MAX_NEW_TOKENS = 16


@torch.inference_mode()
def greedy(
    model: Qwen, prompt: Sequence[int], max_new_tokens: int, stop: Collection[int] = ()
) -> list[int] | None:
    """The new token ids, without the token of `stop` that ended them: one full forward each.

    None if the largest logit is not finite: then no token is the most likely one.
    """
    new: list[int] = []
    while len(new) < max_new_tokens:
        ids = torch.tensor([[*prompt, *new]], device=model.device)  # (1, T)
        logits = model.logits(model(ids)[0, -1])  # (V,)
        if not logits.max().isfinite():  # NaN is the maximum of all numbers
            return None
        if (token := int(logits.argmax())) in stop:
            break
        new.append(token)
    return new


def stop_ids(directory: str | Path, markup: dict[str, int]) -> set[int]:
    """The tokens that end an answer: those in generation_config.json, and Qwen's end markup.

    A base model's file names only <|endoftext|>, but <|im_end|> ends the answer to a chat prompt.
    Raises UserError for a file that cannot be read.
    """
    stop = {markup[token] for token in ("<|im_end|>", "<|endoftext|>") if token in markup}
    path = Path(directory) / "generation_config.json"
    if not os.path.lexists(path):  # a link to nothing is no absent file
        return stop
    found = read_json(path, "a generation config", "fetch it again").get("eos_token_id") or []
    found = found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in found):
        raise UserError(f"{path}: not a generation config: eos_token_id is {found}; fetch it again")
    return stop | set(found)


def first_label(answer: str, words: Sequence[str]) -> int:
    """The class whose word comes first in `answer`; OFF_TRACK if it contains no label word.

    Letter case and white space around a word don't count: `Negative` is `negative`. In scripts that
    write spaces, and of digits, only whole words count (`no` is not in `cannot`). A single letter
    counts as it is written, or if it is the whole answer: `a` can be an article.
    Of words that start at the same place the longest counts (不好 rather than 不), and then the one
    that stands there as it is written (`US` rather than `us`).
    """
    places = []
    for y, word in enumerate(words):
        bare = word.strip()
        before = rf"(?<!{LETTER})" * bool(re.match(LETTER, bare))
        after = rf"(?!{LETTER})" * bool(re.match(LETTER, bare[-1]))
        alone = re.sub(r"\W", "", answer).lower() == bare.lower()
        case = re.IGNORECASE if len(bare) > 1 or alone else 0
        if found := re.search(before + re.escape(bare) + after, answer, case):
            start = found.start() - word.index(bare)
            written = start >= 0 and answer.startswith(word, start)
            places.append((found.start(), -len(bare), -len(word) * written, y))
    return min(places)[-1] if places else OFF_TRACK
