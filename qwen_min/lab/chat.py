"""Qwen's chat markup, written by hand: the template is the user's message, the label the answer.

    <|im_start|>system
    SYSTEM<|im_end|>
    <|im_start|>user
    TEMPLATE<|im_end|>
    <|im_start|>assistant
    <think>

    </think>


    LABEL

Without a given system message, Qwen2.5 adds a default one; Qwen3 and Qwen3.5 add none. Only these
two have the empty thinking block: without it the model would start to think
(`enable_thinking=False`). Qwen3.5 also removes white space around each message.

A checkpoint's own template, a program in the language Jinja, takes precedence. It is rendered as
`apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)` of transformers
renders it. For Qwen's releases that gives the markup above: tests hold the two equal. The markup is
that of two renderings; as a template can look at the text, each text is then rendered and compared.
If the template trims messages, a text at the start or end of the user's message is trimmed too.
"""

import json
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from qwen_min.errors import UserError
from qwen_min.files.disk import read_regular, refuse_malformed
from qwen_min.files.tokens import CONFIG, read_tokenizer_config, special_tokens
from qwen_min.prompt import FIELD

START, END = "<|im_start|>", "<|im_end|>"
EMPTY_THOUGHTS = "<think>\n\n</think>\n\n"
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# Qwen3.5's format, where a checkpoint has no template of its own.
QWEN3_5_TURN = START + "{{ message.role }}\n{{ message.content | trim }}" + END + "\n"
QWEN3_5_SOURCE = "{% for message in messages %}" + QWEN3_5_TURN + "{% endfor %}"
QWEN3_5_SOURCE += f"{START}assistant\n{EMPTY_THOUGHTS}\n"  # Jinja drops the last newline
KIND, ADVICE = "a chat template", "fetch it again, or leave out --chat"
# What a template gets beside the messages and the special tokens, as from transformers.
GIVEN = {"add_generation_prompt": True, "enable_thinking": False, "tools": None, "documents": None}
# Limits of a rendering; Qwen's take milliseconds and return a few hundred characters.
SECONDS, MAX_BYTES, MAX_LENGTH = 5, 2**28, 1_000_000
# Two texts in the place of the user's. The second has whatever a template might change.
PROBES = ("\ue000", f" \n\ue000 Aé </think> {END} <b>&'\"\\n{{{{ 1 }}}} {'x' * 5000}。\n ")
# What a template may do to a text: leave it as it is, or trim it where it begins or ends a message.
TRIMS = (str, str.strip, str.lstrip, str.rstrip)


class ChatFormat(NamedTuple):
    """The two points in which the markup of Qwen's releases differs."""

    system: str | None  # the default system message, if there is one
    empty_thoughts: bool  # whether the answer starts with an empty thinking block


class ChatTemplate(NamedTuple):
    """A checkpoint's own template."""

    path: Path  # where it was read
    source: str  # in Jinja
    tokens: dict[str, str]  # the special tokens by name, such as eos_token, which it may use


Chat, Trim = ChatFormat | ChatTemplate, Callable[[str], str]


def read_chat_format(directory: str | Path, model_type: str) -> Chat:
    """The template of the checkpoint in `directory`; without one, the format of its model type.

    model_type is that in config.json. A file of its own takes precedence over
    tokenizer_config.json; of several templates with names, the default one counts (both as in
    transformers). Raises UserError if the template cannot be read.
    """
    directory = Path(directory)
    config = read_tokenizer_config(directory)
    places = ("additional_chat_templates/default.jinja", "chat_template.jinja", CONFIG)
    files = [directory / place for place in places]
    # A link to nothing is not skipped: it fails when it is read, and no other template is taken.
    path = next(filter(os.path.lexists, files), files[-1])
    with refuse_malformed(path, KIND, ADVICE):
        if path.suffix == ".jinja":
            found = read_regular(path, KIND, ADVICE).decode()
        elif isinstance(found := config.get("chat_template"), list):
            found = {template["name"]: template["template"] for template in found}
        if isinstance(found, dict):
            found = found["default"]
        if not isinstance(found, str | None):
            raise ValueError(f"found {type(found).__name__}, expected text")
    if found is not None:
        return ChatTemplate(path, found, special_tokens(config, model_type))
    if model_type.startswith("qwen3_5"):
        return ChatTemplate(Path(__file__), QWEN3_5_SOURCE, {})
    qwen3 = model_type == "qwen3"
    return ChatFormat(None if qwen3 else QWEN25_SYSTEM, qwen3)


def wrap_template(
    template: str, chat: Chat, markup: Collection[str], system: str | None = None
) -> str:
    """`template` as the user's message, up to the start of the assistant's answer.

    markup: the tokenizer's control strings. system: replaces the default system message ("" is an
    empty message). Raises UserError if the tokenizer has no chat markup, if the template already
    has some, if the system message contains the text field, and as `render_template` does.
    """
    if START in template or END in template:
        raise UserError(f"--chat: {template!r} contains chat markup already; leave out one of them")
    if system is not None and FIELD in system:
        raise UserError(f"--system {system!r}: {FIELD} belongs in the template; leave it out here")
    own = isinstance(chat, ChatFormat) or chat.source == QWEN3_5_SOURCE
    if own and (missing := sorted({START, END} - set(markup))):
        advice = "use a checkpoint that was tuned for chat, or leave out --chat"
        raise UserError(f"--chat: the tokenizer has no {', '.join(missing)}; {advice}")
    if isinstance(chat, ChatTemplate):
        return render_template(template, chat, system)[0]
    system = chat.system if system is None else system
    first = "" if system is None else f"{START}system\n{system}{END}\n"
    answer = EMPTY_THOUGHTS * chat.empty_thoughts
    return f"{first}{START}user\n{template}{END}\n{START}assistant\n{answer}"


def render_template(template: str, chat: ChatTemplate, system: str | None) -> tuple[str, Trim]:
    """`wrap_template` by the checkpoint's own template, and what it does to a text: see TRIMS.

    Raises UserError as `render` does, if the template changes what the user says or says it more
    than once, if it contains the text field, or if every answer starts with thoughts.
    """
    first, second = render(PROBES, template, chat, system)
    trims = [trim for trim in TRIMS if second == first.replace(PROBES[0], trim(PROBES[1]))]
    frame, once = first.replace(PROBES[0], FIELD), first.count(PROBES[0]) == 1
    if not (once and trims and frame.count(FIELD) == 1):
        problem = "changes the user's message, repeats it or leaves it out"
        if once and trims:
            problem = f"says {FIELD} itself, which marks the place of the text"
        raise UserError(f"{chat.path}: its chat template {problem}; leave out --chat")
    if frame.rstrip().endswith("<think>"):
        advice = "use a checkpoint that can answer directly, or leave out --chat"
        raise UserError(f"{chat.path}: its template starts every answer with thoughts; {advice}")
    return frame, trims[0]


def check_texts(
    texts: Sequence[str], template: str, chat: Chat, system: str | None, places: Sequence[str]
) -> Trim:
    """What the markup does to each text, as in TRIMS.

    texts: as cut for the prompt. places: what an error calls each. Raises UserError for a text for
    which the checkpoint's template gives another prompt.
    """
    if not isinstance(chat, ChatTemplate):
        return str
    whole, trim = render_template(template, chat, system)
    prompts = render(texts, template, chat, system)
    for place, text, prompt in zip(places, texts, prompts, strict=True):
        if prompt != whole.replace(FIELD, trim(text)):
            problem = f"the chat template of {chat.path} gives this text another prompt than others"
            raise UserError(f"{place}: {problem}; leave out --chat")
    return trim


def render(
    texts: Iterable[str], template: str, chat: ChatTemplate, system: str | None
) -> Iterator[str]:
    """The whole prompt of each text in `template`, as the checkpoint's own template renders it.

    A template can look at the text, so the markup may differ from that of `wrap_template`.
    Raises UserError if it fails, exceeds a limit, or would give other prompts another day.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    try:
        with limits():
            # {% generation %} marks an answer for training; on the text it has no effect.
            source = re.sub(r"(\{%[-+]?\s*(end)?)generation\b", r"\1with", chat.source)
            jinja = sandbox().from_string(source)
        for text in texts:
            user = {"role": "user", "content": template.replace(FIELD, text)}
            with limits():
                rendered = jinja.render(GIVEN | chat.tokens, messages=[*first, user])
            if len(rendered) > MAX_LENGTH:
                raise ValueError(f"it has more than {MAX_LENGTH:,} characters")
            yield rendered
    except Exception as error:  # a program of others can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        problem = f"its chat template cannot be rendered ({reason})"
        raise UserError(f"{chat.path}: {problem}; {ADVICE}") from None


def sandbox() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up: no files, and none of Python's own names.

    In addition, no powers and no large products, which no signal ends, and nothing that would give
    other prompts later.
    """

    def multiply(left: object, right: object) -> object:
        left_size, right_size = (len(x) if hasattr(x, "__len__") else x for x in (left, right))
        return left * right if abs(left_size * right_size) < MAX_LENGTH else refuse()

    def refuse(*_: object) -> None:
        raise SecurityError("it computes a power or a large product")

    def vary(*_: object, **__: object) -> None:
        raise SecurityError("it asks for the date, time or chance: prompts would not stay equal")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **options: object) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's is for HTML

    loops = ["jinja2.ext.loopcontrols"]  # break and continue
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    jinja.intercepted_binops = frozenset({"*", "**"})
    jinja.binop_table |= {"*": multiply, "**": refuse}
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = jinja.globals["lipsum"] = jinja.filters["random"] = vary
    return jinja


@contextmanager
def limits() -> Iterator[None]:
    """Raise TimeoutError in the block after SECONDS, MemoryError where it needs over MAX_BYTES.

    The seconds are processor time: a good template must not fail on a busy machine. Only the main
    thread can stop in time, and only Linux tells the memory in use.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s of processor time")

    main = threading.current_thread() is threading.main_thread()
    if main:
        handler = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if (pages := Path("/proc/self/statm")).exists():
        most = int(pages.read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(soft, most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if main:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, handler)
