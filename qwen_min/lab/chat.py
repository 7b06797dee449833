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
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from qwen_min.errors import UserError
from qwen_min.prompt import FIELD

START, END = "<|im_start|>", "<|im_end|>"
EMPTY_THOUGHTS = "<think>\n\n</think>\n\n"
# A string literal in a Jinja template that holds the system message: its quote, the message.
SYSTEM_LITERAL = re.compile(
    r"""(['"])<\|im_start\|>system(?:\\n|\n)((?:\\.|(?!\1)[^\\])+?)<\|im_end\|>"""
)
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@dataclass(frozen=True)
class ChatFormat:
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
    template = _template(Path(directory))
    if template is None:
        qwen3 = model_type == "qwen3"
        return ChatFormat(None if qwen3 else QWEN25_SYSTEM, qwen3)
    switch = "enable_thinking" in template
    if not switch and re.search(r"assistant(\\n|\n)<think>", template):
        raise UserError(
            f"{directory}: its chat template starts every answer with thoughts, so no label can "
            "follow the prompt; use a checkpoint that can answer directly, or leave out --chat"
        )
    system = SYSTEM_LITERAL.search(template)
    if system is not None:
        quote, text = system.groups()
        # Jinja's string literals are Python's.
        system = ast.literal_eval(quote + text.replace("\n", "\\n") + quote)
    return ChatFormat(system, switch)


def _template(directory: Path) -> str | None:
    """The Jinja template of the checkpoint, if it has one."""
    alone, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    try:
        if alone.exists():
            return alone.read_text(encoding="utf-8")
        found = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{config}: no chat template can be read from it ({reason}); fetch it again, or leave "
            "out --chat"
        ) from None
    if isinstance(found, list):  # several templates, with names
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    return found


def wrap_template(
    template: str, chat: ChatFormat, markup: Collection[str], system: str | None = None
) -> str:
    """`template` as the user's message, up to the start of the assistant's answer.

    markup: the tokenizer's control strings. system: replaces the default system message ("" is an
    empty message). Raises UserError if the tokenizer has no chat markup, if the template already
    has some, or if the system message contains the text field.
    """
    if missing := sorted({START, END} - set(markup)):
        raise UserError(
            f"--chat: the tokenizer has no {', '.join(missing)}, which Qwen's markup needs; use a "
            "checkpoint that was tuned for chat, or leave out --chat"
        )
    if START in template or END in template:
        raise UserError(
            f"--chat: the template {template!r} contains chat markup already; leave out one of them"
        )
    if system is not None and FIELD in system:
        raise UserError(
            f"--system {system!r}: contains {FIELD}, which belongs in the template; write the "
            "system message without it"
        )
    system = chat.system if system is None else system
    first = "" if system is None else f"{START}system\n{system}{END}\n"
    answer = EMPTY_THOUGHTS if chat.empty_thoughts else ""
    return f"{first}{START}user\n{template}{END}\n{START}assistant\n{answer}"
