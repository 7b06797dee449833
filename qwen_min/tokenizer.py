"""tokenizer.json through the `tokenizers` library; markup tokens by hand.

The library would turn `<|im_end|>` into its control token wherever it finds it, also inside a
review that somebody wrote. Here text is only ever text: the added tokens are taken out of the
tokenizer and kept in a table, `markup`, for those who compose a prompt and mean them.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as BaseTokenizer
from tokenizers import models

from qwen_min.errors import UserError


class Tokenizer:
    """Text to ids and back. `markup` maps control strings such as `<|im_start|>` to their ids."""

    def __init__(self, directory: str | Path):
        path = Path(directory) / "tokenizer.json"
        if not path.exists():
            raise UserError(
                f"{path}: no such file; a model directory holds tokenizer.json beside the weights"
            )
        try:
            whole = BaseTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a malformed file
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path}: not a usable tokenizer ({type(error).__name__}: {reason}); fetch it again"
            ) from None
        if not isinstance(whole.model, models.BPE):
            raise UserError(
                f"{path}: a {type(whole.model).__name__} tokenizer, where Qwen's is BPE; take the "
                "file that came with the weights"
            )
        self.markup = {t.content: id_ for id_, t in whole.get_added_tokens_decoder().items()}
        # The same parts, put together without added tokens, truncation and padding.
        self._base = BaseTokenizer(whole.model)
        self._base.normalizer = whole.normalizer
        self._base.pre_tokenizer = whole.pre_tokenizer
        self._base.decoder = whole.decoder
        ids = [*self._base.get_vocab().values(), *self.markup.values()]
        self.size = max(ids) + 1  # ids below this exist; the model's V is larger
        self._markup_pattern = "|".join(
            re.escape(token) for token in sorted(self.markup, key=len, reverse=True)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all of it taken literally."""
        return self._base.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        return [e.ids for e in self._base.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """For each token of `text` the characters [start, end) that it covers.

        A character of several bytes may be spread over several tokens; each of them then covers it.
        """
        return self._base.encode(text, add_special_tokens=False).offsets

    def split_markup(self, text: str) -> list[str]:
        """Cut at markup: literal pieces at even places (maybe empty), markup tokens at odd ones."""
        return re.split(f"({self._markup_pattern})", text) if self.markup else [text]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids back to text, markup included; incomplete characters become U+FFFD."""
        names = {id_: token for token, id_ in self.markup.items()}
        out, run = [], []
        for id_ in ids:
            if id_ in names:
                out += [self._base.decode(run, skip_special_tokens=False), names[id_]]
                run = []
            else:
                run.append(id_)
        return "".join([*out, self._base.decode(run, skip_special_tokens=False)])
