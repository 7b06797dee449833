"""Text to token ids and back, by the `tokenizers` library and the checkpoint's tokenizer.json.

tokenizer.json holds a BPE and *added tokens*: strings that are one token each, wherever they occur.
There are two kinds:

- Markup: special tokens, and Qwen's control strings, some of which its files don't call special.
  They give a prompt its structure. In a user's text they are plain text: a review that contains
  `<|im_end|>` must not end the message.
- Vocabulary: all others, such as `[差评]`, added with `add_tokens` before a fine-tuning. They are
  words, in a text as elsewhere.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer as BaseTokenizer
from tokenizers import models

from qwen_min.errors import UserError

# <|im_start|>, <|fim_prefix|>, <｜User｜> (of DeepSeek's Qwen), <think>, </tool_call>, ...
CONTROL = re.compile(r"<[|｜].+[|｜]>|</?(think|tool_call|tool_response)>", re.DOTALL)


class Tokenizer:
    """The tokenizer of a model directory.

    `added` maps ids to the added tokens, in order. `markup` maps those that are markup, such as
    `<|im_start|>`, to their ids. All ids are below `size`.
    `required` are the tokens that tokenizer.json puts around every text (Qwen's files name none).
    They are not put there; a template has to contain them.
    `special` are special tokens that only another file names. They follow those of tokenizer.json.
    Raises UserError for another model than a BPE, and for one with dropout, which makes ids random.
    Use `load_tokenizer` of files/tokens.py for a file that may be missing or damaged.
    """

    def __init__(self, directory: str | Path, special: tuple[str, ...] = ()):
        path = Path(directory) / "tokenizer.json"
        whole = BaseTokenizer.from_file(str(path))
        if not isinstance(whole.model, models.BPE):
            kind = type(whole.model).__name__
            raise UserError(f"{path}: is a {kind} tokenizer, expected BPE; fetch the model's own")
        if whole.model.dropout:
            found = f"the BPE has dropout {whole.model.dropout}"
            raise UserError(f"{path}: {found}; set it to null: it makes ids random")
        whole.no_truncation()  # the file may ask for both, for other programs
        whole.no_padding()
        whole.add_special_tokens([t for t in special if whole.token_to_id(t) is None])
        self._path, self._whole = path, whole
        self.added = dict(sorted(whole.get_added_tokens_decoder().items()))
        added = [*self.added.values()]
        names = [t.content for t in added if t.special or CONTROL.fullmatch(t.content)]
        self.markup = {name: whole.token_to_id(name) for name in names}
        # The same parts without the post-processor. This one encodes texts.
        self._base = BaseTokenizer(whole.model)
        self._base.normalizer = whole.normalizer
        self._base.pre_tokenizer = whole.pre_tokenizer
        self._base.decoder = whole.decoder
        if len(added) > len(self.markup):
            # `encode_special_tokens` makes special tokens plain text, so markup, and nothing else,
            # is made special. Added in the same order, the tokens keep their ids.
            self._base.encode_special_tokens = True
            for token in added:
                token.special = token.content in self.markup
            self._base.add_tokens(added)
        # The model's vocab_size is larger: ids from `size` on have no text.
        self.size = 1 + max(whole.get_vocab().values())
        self.required = whole.encode("").tokens

    def to_json(self) -> str:
        """The content of tokenizer.json, equal for all files that mean the same."""
        return self._whole.to_str()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; markup in it is plain text."""
        return self._base.encode(text, add_special_tokens=False).ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """For each token of `text`, the characters [start, end) that it covers.

        If the bytes of one character are spread over several tokens, each token covers it.
        """
        return self._base.encode(text, add_special_tokens=False).offsets

    def split_markup(self, text: str) -> list[str]:
        """Cut `text` at markup: [literal, markup, literal, ...]; literals may be empty.

        Raises UserError for markup that changes with its neighbours: it can't be encoded apart.
        """
        whole = self._whole.encode(text, add_special_tokens=False)
        # A token ends where the next one starts: an accent that NFC joins is in no token's offsets.
        starts = [*(start for start, _ in whole.offsets), len(text)]
        pieces, done = [], 0
        for token, (start, end) in zip(whole.ids, pairwise(starts), strict=True):
            if (markup := self._whole.id_to_token(token)) in self.markup:
                self._check_alone(markup)
                pieces += [text[done:start], markup]
                done = end
        return [*pieces, text[done:]]

    def _check_alone(self, markup: str) -> None:
        """Raise UserError for markup with `lstrip`, `rstrip` or `single_word`."""
        for side in ("0", " "):
            whole = self._whole.encode(side + markup + side, add_special_tokens=False).ids
            if whole != [*self.encode(side), self.markup[markup], *self.encode(side)]:
                problem = "changes with its neighbours (lstrip, rstrip, single_word)"
                raise UserError(f"{self._path}: {markup} {problem}; leave it out of the prompt")

    def decode(self, ids: Sequence[int]) -> str:
        """Ids back to text, markup included; incomplete characters become U+FFFD."""
        return self._whole.decode(list(ids), skip_special_tokens=False)
