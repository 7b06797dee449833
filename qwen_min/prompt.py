"""Template and label words to token ids.

A prompt is rendered as one string and encoded whole, since tokens cross the borders of a template's
parts (`。` at the end of a review and the newline behind it are one token, `。\\n`). For the same
reason a label's tokens are found, not assumed: they are what the ids of prompt + label have beyond
the ids of the prompt.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_min.errors import UserError
from qwen_min.tokenizer import Tokenizer

DEFAULT_TEMPLATE = "评论：{text}\n情感倾向："
DEFAULT_LABELS = ("负面", "正面")
DEFAULT_MAX_TEXT_TOKENS = 256
FIELD = "{text}"


@dataclass(frozen=True)
class Prompt:
    """One text in its template, as ids, with each class's label as it continues this prompt."""

    ids: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]  # in class order
    truncated: bool  # whether the text was shortened


def parse_labels(argument: str, option: str = "--labels") -> tuple[str, ...]:
    """ "负面,正面" → ("负面", "正面"): one word for each class, in class order."""
    words = tuple(argument.split(","))
    if any(not word.strip() for word in words):
        raise UserError(f"{option} {argument!r}: a word is empty; give one word for each class")
    if repeated := sorted({word for word in words if words.count(word) > 1}):
        raise UserError(f"{option} {argument!r}: {', '.join(repeated)} repeats; words must differ")
    if len(words) < 2:
        raise UserError(f"{option} {argument!r}: one word; at least two classes are needed")
    return words


def parse_template(argument: str) -> str:
    """The template as typed in a shell, where `\\n` stands for a newline."""
    template = argument.replace("\\n", "\n")
    if template.count(FIELD) != 1:
        raise UserError(
            f"--template {argument!r}: {FIELD} stands in it {template.count(FIELD)} times; "
            "write it once, where the text goes"
        )
    return template


def shorten(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    """The longest beginning of `text` that ends at a token's border and has ≤ max_tokens tokens.

    A character whose bytes are spread over several tokens is kept whole or left out whole.
    """
    # Cut where the first token too many starts: its character, if spread, goes whole, and an accent
    # that NFC joins to the letter before stays. Encoding the shorter text anew can cut whitespace
    # in another way, into more tokens, hence the loop; each round takes a character at least.
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
) -> list[Prompt]:
    """Render and encode every text, alone and followed by each label word.

    Only the text field is ever shortened; the frame around it stays whole. Markup such as
    `<|im_end|>` counts as markup in the template and as plain text in the texts.

    Raises UserError, naming the row's place (without `places` its number, from 1), where a label's
    first characters merge with the end of the prompt into one token: the prompt's ids would not be
    a prefix of prompt + label's, and there would be no label to score.
    """
    # Markup cuts the template into pieces that are encoded apart, as every tokenizer cuts there.
    pieces = tokenizer.split_markup(template)
    at = next(i for i, piece in enumerate(pieces) if FIELD in piece)
    before = _encode_frame(tokenizer, pieces[:at])
    between = _encode_frame(tokenizer, pieces[at + 1 : -1])
    tail_is_text = at == len(pieces) - 1

    kept = [shorten(tokenizer, text, max_text_tokens) for text in texts]
    filled = [pieces[at].replace(FIELD, text) for text in kept]
    encoded = tokenizer.encode_batch(filled)
    # continued[class][row]: the last piece of the prompt, with the label behind it.
    if tail_is_text:
        stems = encoded
        continued = [tokenizer.encode_batch([f + label for f in filled]) for label in labels]
    else:
        stem = tokenizer.encode(pieces[-1])
        stems = [stem] * len(texts)
        continued = [[tokenizer.encode(pieces[-1] + label)] * len(texts) for label in labels]

    prompts = []
    for row, (text, short, stem) in enumerate(zip(texts, kept, stems, strict=True)):
        place = places[row] if places else f"row {row + 1}"
        words = []
        for word, rows in zip(labels, continued, strict=True):
            whole = rows[row]
            if whole[: len(stem)] != stem or len(whole) == len(stem):
                tail = tokenizer.decode(stem[-3:])
                raise UserError(
                    f"{place}: the end of the prompt, {tail!r}, and the label {word!r} merge "
                    "into one token; end the template with a character that does not, such as `：`"
                )
            words.append(tuple(whole[len(stem) :]))
        if len(set(words)) < len(words):
            raise UserError(
                f"{place}: two of the labels {', '.join(labels)} are the same tokens, so their "
                "scores would always be equal; choose words that differ"
            )
        head = before if tail_is_text else [*before, *encoded[row], *between]
        if not head and not stem:
            raise UserError(
                f"{place}: no token is left of the prompt, so nothing could predict a label; "
                f"write words around {FIELD} in the template, or allow more text tokens"
            )
        prompts.append(Prompt((*head, *stem), tuple(words), short != text))
    return prompts


def check_lengths(
    prompts: Sequence[Prompt], max_positions: int, places: Sequence[str], new_tokens: int = 0
) -> None:
    """Raise UserError where prompt and longest label have more tokens than the model has places.

    new_tokens: how many may be generated behind each prompt; the label is as long at least.
    """
    for prompt, place in zip(prompts, places, strict=True):
        tokens = len(prompt.ids) + max(new_tokens, *(len(ids) for ids in prompt.labels))
        if tokens > max_positions:
            raise UserError(
                f"{place}: prompt and label have {tokens} tokens, expected at most {max_positions} "
                "(max_position_embeddings in config.json); lower --max-text-tokens or shorten "
                "the template"
            )


def _encode_frame(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[int]:
    """Ids of pieces as `split_markup` cuts them, none of which holds the text."""
    ids: list[int] = []
    for piece in pieces:
        markup = tokenizer.markup.get(piece)
        ids += tokenizer.encode(piece) if markup is None else [markup]
    return ids


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows share, short of any row's last one.

    A row keeps at least one token of its own: the one whose hidden state is read.
    """
    # The smallest and the largest row, in lexical order, differ first where any two rows do.
    low, high = min(rows), max(rows)
    limit = min(len(row) for row in rows) - 1
    shared = 0
    while shared < limit and low[shared] == high[shared]:
        shared += 1
    return shared


def warn_about_labels(prompt: Prompt, labels: Sequence[str]) -> None:
    """Say on stderr what makes label words hard to compare: lengths, and one inside another."""
    lengths = [len(ids) for ids in prompt.labels]
    if len(set(lengths)) > 1:
        counts = ", ".join(f"{w} {n}" for w, n in zip(labels, lengths, strict=True))
        print(
            f"warning: label words differ in tokens ({counts}); each is scored whole, and longer "
            "ones tend to score lower",
            file=sys.stderr,
        )
    for word, ids in zip(labels, prompt.labels, strict=True):
        for other, longer in zip(labels, prompt.labels, strict=True):
            if len(ids) < len(longer) and longer[: len(ids)] == ids:
                print(
                    f"warning: {word} is how {other} begins, so it can never score lower",
                    file=sys.stderr,
                )
