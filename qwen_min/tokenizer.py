"""Text to token ids and back, by the `tokenizers` library and the checkpoint's tokenizer.json.

The library turns `<|im_end|>` into its control token wherever it occurs, also inside a review that
somebody wrote. This class treats every text as plain text. The added tokens of tokenizer.json are
kept in a table, `markup`, for code that composes a prompt and needs the control tokens.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as BaseTokenizer
from tokenizers import models

from qwen_min.errors import UserError


class Tokenizer:
    """The tokenizer of a model directory.

    `markup` maps control strings such as `<|im_start|>` to their ids. All ids are below `size`.
    Raises UserError if tokenizer.json is missing, malformed or not a BPE.
    """

    def __init__(self, directory: str | Path):
        path = Path(directory) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{path}: no such file; give a model directory, which has one")
        try:
            whole = BaseTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a malformed file
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: not a usable tokenizer ({reason}); fetch it again") from None
        if not isinstance(whole.model, models.BPE):
            kind = type(whole.model).__name__
            raise UserError(f"{path}: is a {kind} tokenizer, expected BPE; fetch the model's own")
        self.markup = {t.content: id_ for id_, t in whole.get_added_tokens_decoder().items()}
        self._whole = whole  # decodes the added tokens too
        # The same parts without added tokens, truncation, padding and post-processor.
        self._base = BaseTokenizer(whole.model)
        self._base.normalizer = whole.normalizer
        self._base.pre_tokenizer = whole.pre_tokenizer
        self._base.decoder = whole.decoder
        # The model's vocab_size is larger: ids from `size` on have no text.
        self.size = 1 + max([*self._base.get_vocab().values(), *self.markup.values()])
        # The longest first: a regular expression takes the first alternative that matches.
        names = sorted(self.markup, key=len, reverse=True)
        self._markup_pattern = f"({'|'.join(map(re.escape, names))})"

    def to_json(self) -> str:
        """The content of tokenizer.json, equal for all files that mean the same."""
        self._whole.no_truncation()  # of other programs: not used here
        self._whole.no_padding()
        return self._whole.to_str()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; markup in it is plain text."""
        return self._base.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        return [e.ids for e in self._base.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """For each token of `text`, the characters [start, end) that it covers.

        If the bytes of one character are spread over several tokens, each token covers it.
        """
        return self._base.encode(text, add_special_tokens=False).offsets

    def split_markup(self, text: str) -> list[str]:
        """Cut `text` at markup: [literal, markup, literal, ...]; literals may be empty."""
        return re.split(self._markup_pattern, text) if self.markup else [text]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids back to text, markup included; incomplete characters become U+FFFD."""
        return self._whole.decode(list(ids), skip_special_tokens=False)
