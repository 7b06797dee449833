"""Qwen's chat markup by hand: a template becomes the user's message, the label the answer's start.

    <|im_start|>system
    SYSTEM<|im_end|>
    <|im_start|>user
    TEMPLATE<|im_end|>
    <|im_start|>assistant
    <think>

    </think>


    LABEL

Where somebody gives no system message, Qwen2.5 puts one of its own in, Qwen3 none. The empty block
of thoughts is Qwen3's, which would otherwise begin to think aloud (`enable_thinking=False`).
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
# The message with its markup as one string of a Jinja template: its quote, the text.
SYSTEM_LITERAL = re.compile(
    r"""(['"])<\|im_start\|>system(?:\\n|\n)((?:\\.|(?!\1)[^\\])+?)<\|im_end\|>"""
)
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@dataclass(frozen=True)
class ChatFormat:
    """What the checkpoints' own templates differ in, for one question and the answer's start."""

    system: str | None  # the message where none is given; None: there is none
    empty_thoughts: bool  # whether the answer starts with the empty block of thoughts


def read_chat_format(directory: str | Path, model_type: str) -> ChatFormat:
    """The format of the checkpoint in `directory`, whose config says `model_type`.

    Its template, Jinja in tokenizer_config.json or chat_template.jinja, is not run but looked at,
    for the two things that differ: the system message stands in it as a literal (Qwen1.5 and Qwen2
    have another one than Qwen2.5), and one that can leave the thoughts empty names the switch
    (Qwen3's releases of July 2025 have none). Without a template: Qwen2.5's and Qwen3's.
    """
    template = _template(Path(directory))
    if template is None:
        qwen3 = model_type == "qwen3"
        return ChatFormat(None if qwen3 else QWEN25_SYSTEM, qwen3)
    switch = "enable_thinking" in template
    if not switch and re.search(r"assistant(\\n|\n)<think>", template):
        raise UserError(
            f"{directory}: its chat template lets every answer begin with thoughts, so no label "
            "can follow the prompt; take a checkpoint that can do without, or leave --chat out"
        )
    system = SYSTEM_LITERAL.search(template)
    if system is not None:
        quote, text = system.groups()
        # Jinja writes strings as Python does.
        system = ast.literal_eval(quote + text.replace("\n", "\\n") + quote)
    return ChatFormat(system, switch)


def _template(directory: Path) -> str | None:
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
            "--chat out"
        ) from None
    if isinstance(found, list):  # several by name, one of them the usual one
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    return found


def wrap_template(
    template: str, chat: ChatFormat, markup: Collection[str], system: str | None = None
) -> str:
    """`template` as the user's message, up to where the assistant's answer begins.

    markup: the tokenizer's control strings. `system` takes the place of the format's own message
    ("" is a message, of no words). Raises UserError where the markup is not to be had, or is there
    already, or where the system message has a place for the text.
    """
    if missing := sorted({START, END} - set(markup)):
        raise UserError(
            f"--chat: the tokenizer has no {', '.join(missing)}, which Qwen's markup needs; take a "
            "checkpoint that has been tuned for chat, or leave --chat out"
        )
    if START in template or END in template:
        raise UserError(
            f"--chat: the template {template!r} holds chat markup already; leave out one of them"
        )
    if system is not None and FIELD in system:
        raise UserError(
            f"--system {system!r}: {FIELD} stands in it, and its place is the template; write the "
            "system message without it"
        )
    system = chat.system if system is None else system
    first = "" if system is None else f"{START}system\n{system}{END}\n"
    answer = EMPTY_THOUGHTS if chat.empty_thoughts else ""
    return f"{first}{START}user\n{template}{END}\n{START}assistant\n{answer}"
