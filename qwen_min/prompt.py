"""From a text, a template and label words to token ids.

A prompt is the template with the text in the place of `{text}`; the model then scores each label
word as its continuation. Two rules decide the ids:

1. The prompt is encoded as one whole string (between markup). Encoding the template's parts and
   the text apart would give other ids, since a token can cross their border: `。` at the end of a
   review and the newline after it are one token, `。\\n`.
2. For the same reason a label is never encoded alone. Its tokens are those that
   encode(prompt + label) has after encode(prompt), which must be a prefix of it.

An added token of the vocabulary, such as `[差评]`, is one token everywhere. Markup, such as
`<|im_end|>`, is one token in the template and in label words, which the user of the command writes.
In a text, and where text and template only together form it, it is plain text.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_min.errors import UserError
from qwen_min.tokenizer import Tokenizer

DEFAULT_TEMPLATE = "评论：{text}\n情感倾向："
DEFAULT_LABELS = ("负面", "正面")
DEFAULT_MAX_TEXT_TOKENS = 256
FIELD = "{text}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids of one text in its template, and of each label word after it."""

    ids: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]  # of each label word that is scored, in class order
    truncated: bool  # whether the text was shortened


Prompts = Sequence[Prompt]


def parse_labels(
    argument: str, option: str = "--labels", say: Callable[[str], object] | None = None
) -> tuple[str, ...]:
    """ "负面,正面" → ("负面", "正面"): one word for each class, in class order.

    Chinese commas work too, and `、` where there is no comma. White space around a word is dropped.
    Only if every word begins with a space, as in " bad, good", it stays: " bad" is a token of its
    own, and what a model expects in the middle of an English text.

    `option` is the name that an error shows; `say` gets a line if space is dropped. Raises
    UserError for an empty word, a repeated word and a single word.
    """
    typed = re.split("[,，]" if re.search("[,，]", argument) else "、", argument)
    spaced = all(word.startswith(" ") for word in typed)
    words = tuple((" " if spaced else "") + word.strip() for word in typed)
    if any(not word.strip() for word in words):
        raise UserError(f"{option} {argument!r}: a word is empty; give one word for each class")
    if repeated := sorted({word for word in words if words.count(word) > 1}):
        raise UserError(f"{option} {argument!r}: {', '.join(repeated)} repeats; words must differ")
    if len(words) < 2:
        raise UserError(f"{option} {argument!r}: one word; at least two classes are needed")
    if say and len(",".join(words)) < len(argument):
        advice = "to score words with a space before them, begin every word with one"
        say(f"note: {option} {argument!r}: white space around words is dropped; {advice}")
    return words


def parse_template(argument: str) -> str:
    """The template as typed in a shell, where `\\n` means a newline.

    Raises UserError unless {text} occurs in it exactly once.
    """
    template = argument.replace("\\n", "\n")
    if (times := template.count(FIELD)) != 1:
        raise UserError(f"--template {argument!r}: {FIELD} occurs {times} times; write it once")
    return template


def shorten(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    """The beginning of `text`, up to where a token ends, that has at most max_tokens tokens.

    If the bytes of a character are spread over several tokens, it is kept whole or dropped whole.
    """
    # Cut at the first character of the first token that is too many. The shorter text can have
    # other tokens at its end, sometimes more (white space is split in another way): hence a loop.
    # Each round removes at least one character.
    while len(offsets := tokenizer.offsets(text)) > max_tokens:
        text = text[: offsets[max_tokens][0]]
    return text


def build_prompts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    template: str = DEFAULT_TEMPLATE,
    labels: Sequence[str] = DEFAULT_LABELS,
    max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    places: Sequence[str] | None = None,
    trim: Callable[[str], str] = str,
) -> list[Prompt]:
    """One prompt for each text: its ids, and the ids of each label word after it.

    A text of more than `max_text_tokens` tokens is shortened; the template around it stays whole.
    `places` says where each text comes from, for errors (default: "row 1", "row 2", ...).
    `trim` is what chat markup does to the shortened text, such as str.strip (default: nothing).

    Raises UserError if the end of a prompt and the start of a label merge into one token (the label
    then has no tokens of its own), if two labels have the same tokens, if a prompt is empty, or for
    half of a surrogate pair, which is no character.
    """
    before, after = template.split(FIELD)
    for word in (template, *labels, *texts):
        if word != word.encode("utf-8", "replace").decode():  # no UTF-8, so no tokens
            raise UserError(f"{word[:40]!r} holds half of a surrogate pair; remove it")

    def ids_of(pieces: Sequence[str]) -> list[int]:
        """Ids of pieces of `split_markup`, each encoded alone."""
        markup = tokenizer.markup
        encoded = ([markup[p]] if p in markup else tokenizer.encode(p) for p in pieces)
        return [token for ids in encoded for token in ids]

    def frame(ending: str) -> tuple[list[int], str, str, list[int]]:
        """Before the text: ids, then a string. After it, with `ending`: a string, then ids."""
        # Markup cuts the template into pieces (without markup there is one). No token crosses a
        # cut, so only the piece that contains the text has to be encoded with the text.
        *start, left = tokenizer.split_markup(before)
        right, *end = tokenizer.split_markup(after + ending)
        return ids_of(start), left, right, ids_of(end)

    frames = [frame(ending) for ending in ("", *labels)]  # of the prompt, and of prompt + label
    prompts, known = [], {}  # equal ids, and equal rows of label ids, are one object: less memory
    for row, text in enumerate(texts):
        place = places[row] if places else f"row {row + 1}"
        short = shorten(tokenizer, text, max_text_tokens)
        ids, *with_labels = (
            (*start, *tokenizer.encode(left + trim(short) + right), *end)
            for start, left, right, end in frames
        )
        if not ids:
            raise UserError(f"{place}: the prompt has no tokens; write words around {FIELD}")
        for label, whole in zip(labels, with_labels, strict=True):
            if whole[: len(ids)] != ids or whole == ids:
                last = f"the end of the prompt, {tokenizer.decode(ids[-3:])!r},"
                problem = f"{last} and the label {label!r} merge into one token"
                advice = "end the template with `：`, say"
                if label.strip()[:1].isascii():
                    advice = "begin each label with a space and end the template without one"
                raise UserError(f"{place}: {problem}; {advice}")
        label_ids = tuple(whole[len(ids) :] for whole in with_labels)
        if len(set(label_ids)) < len(labels):
            same = f"two of the labels {', '.join(labels)} are the same tokens"
            raise UserError(f"{place}: {same}; choose others")
        ids = tuple(known.setdefault(token, token) for token in ids)
        label_ids = known.setdefault(label_ids, label_ids)
        prompts.append(Prompt(ids, label_ids, truncated=short != text))
    return prompts


def check_lengths(
    prompts: Sequence[Prompt], max_positions: int, places: Sequence[str], new_tokens: int = 0
) -> None:
    """Raise UserError if a prompt and its longest label, if any, have over max_positions tokens.

    `places` says where each prompt comes from. `new_tokens`: how many tokens may be generated after
    each prompt; the larger of this and the longest label counts.
    """
    for prompt, place in zip(prompts, places, strict=True):
        tokens = len(prompt.ids) + max([new_tokens, *map(len, prompt.labels)])
        if tokens > max_positions:
            found = f"prompt and label have {tokens} tokens, expected at most {max_positions}"
            advice = "lower --max-text-tokens or shorten the template"
            raise UserError(f"{place}: {found} (the model's limit); {advice}")
