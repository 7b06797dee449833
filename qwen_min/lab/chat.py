"""Qwen's chat markup, written by hand: the template is the user's message, the label the answer.

    <|im_start|>system
    SYSTEM<|im_end|>
    <|im_start|>user
    TEMPLATE<|im_end|>
    <|im_start|>assistant
    <think>

    </think>


    LABEL

Without a given system message, Qwen2.5 adds a default one and Qwen3 adds none. Only Qwen3 has the
empty thinking block: without it the model would start to think (`enable_thinking=False`).
"""

import ast
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from qwen_min.errors import UserError
from qwen_min.files.disk import read_json
from qwen_min.prompt import FIELD

START, END = "<|im_start|>", "<|im_end|>"
EMPTY_THOUGHTS = "<think>\n\n</think>\n\n"
# A string literal in a Jinja template that holds the system message: its quote, the message.
SYSTEM = r"""(['"])<\|im_start\|>system(?:\\n|\n)((?:\\.|(?!\1)[^\\])+?)<\|im_end\|>"""
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class ChatFormat(NamedTuple):
    """The two points in which the checkpoints' own templates differ."""

    system: str | None  # the default system message, if there is one
    empty_thoughts: bool  # whether the answer starts with an empty thinking block


def read_chat_format(directory: str | Path, model_type: str) -> ChatFormat:
    """The format of the checkpoint in `directory`; model_type is its config's.

    Its own template (Jinja, in tokenizer_config.json or chat_template.jinja) is searched, not run.
    The default system message is a literal in it (Qwen1.5 and Qwen2 have another one than Qwen2.5).
    A template that can leave the thinking block empty contains the name of the switch (Qwen3's
    releases of July 2025 have none). Without a template, the format is Qwen2.5's or Qwen3's.
    Raises UserError if the template cannot be read, or if every answer starts with thoughts.
    """
    alone, config = (Path(directory) / n for n in ("chat_template.jinja", "tokenizer_config.json"))
    template = None
    if alone.exists():
        # The parts that are searched for are ASCII: a wrong byte elsewhere does no harm.
        template = alone.read_text(encoding="utf-8", errors="replace")
    elif config.exists():
        advice = "fetch it again, or leave out --chat"
        template = read_json(config, "a tokenizer config", advice).get("chat_template")
    if isinstance(template, list):  # several templates, with names
        template = {t.get("name"): t.get("template") for t in template}.get("default")
    if template is None:
        qwen3 = model_type == "qwen3"
        return ChatFormat(None if qwen3 else QWEN25_SYSTEM, qwen3)
    switch = "enable_thinking" in template
    if not switch and re.search(r"assistant(\\n|\n)<think>", template):
        advice = "use a checkpoint that can answer directly, or leave out --chat"
        raise UserError(f"{directory}: its template starts every answer with thoughts; {advice}")
    if not (found := re.search(SYSTEM, template)):
        return ChatFormat(None, switch)
    quote, text = found.groups()
    # Jinja's string literals are Python's.
    return ChatFormat(ast.literal_eval(quote + text.replace("\n", "\\n") + quote), switch)


def wrap_template(
    template: str, chat: ChatFormat, markup: Collection[str], system: str | None = None
) -> str:
    """`template` as the user's message, up to the start of the assistant's answer.

    markup: the tokenizer's control strings. system: replaces the default system message ("" is an
    empty message). Raises UserError if the tokenizer has no chat markup, if the template already
    has some, or if the system message contains the text field.
    """
    if missing := sorted({START, END} - set(markup)):
        advice = "use a checkpoint that was tuned for chat, or leave out --chat"
        raise UserError(f"--chat: the tokenizer has no {', '.join(missing)}; {advice}")
    if START in template or END in template:
        raise UserError(f"--chat: {template!r} contains chat markup already; leave out one of them")
    if system is not None and FIELD in system:
        raise UserError(f"--system {system!r}: {FIELD} belongs in the template; leave it out here")
    system = chat.system if system is None else system
    first = "" if system is None else f"{START}system\n{system}{END}\n"
    answer = EMPTY_THOUGHTS if chat.empty_thoughts else ""
    return f"{first}{START}user\n{template}{END}\n{START}assistant\n{answer}"
