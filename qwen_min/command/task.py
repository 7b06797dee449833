"""What a command line asks for, before any model is loaded: the words, the frame, the prompts."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_min.config import QwenConfig
from qwen_min.errors import UserError
from qwen_min.files.data import Example, read_examples
from qwen_min.files.hub import resolve_model
from qwen_min.lab.chat import ChatFormat, read_chat_format, wrap_template
from qwen_min.prompt import Prompt, build_prompts, check_lengths, parse_labels, parse_template
from qwen_min.tokenizer import Tokenizer


@dataclass(frozen=True)
class Task:
    """How texts become prompts: the same for every method and for every input of one command."""

    directory: Path  # of the model
    config: QwenConfig
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    template: str  # as typed, without chat markup
    chat: ChatFormat | None
    system: str | None
    max_text_tokens: int


def read_task(args: argparse.Namespace) -> Task:
    """The task of these arguments. Raises UserError for those that do not go together."""
    labels, template = parse_labels(args.labels), parse_template(args.template)
    if args.system is not None and not args.chat:
        raise UserError("--system is a message of Qwen's chat markup; give --chat too")
    directory = resolve_model(args.model)
    config = QwenConfig.from_json(directory / "config.json")
    tokenizer = Tokenizer(directory)
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"{directory}: tokenizer.json has {tokenizer.size} tokens, expected at most "
            f"config.json's vocab_size, {config.vocab_size}; take both from one checkpoint"
        )
    chat = read_chat_format(directory, config.model_type) if args.chat else None
    # A newline in the system message is typed as one in the template is.
    system = args.system and args.system.replace("\\n", "\n")
    task = Task(directory, config, tokenizer, labels, template, chat, system, args.max_text_tokens)
    whole_template(task)  # its mistakes are seen here
    return task


def whole_template(task: Task, template: str | None = None) -> str:
    """The task's template, or another in its place, with chat markup where it was asked for."""
    template = task.template if template is None else template
    if task.chat is None:
        return template
    return wrap_template(template, task.chat, task.tokenizer.markup, task.system)


def task_prompts(
    task: Task,
    texts: Sequence[str],
    places: Sequence[str],
    words: Sequence[str] | None = None,
    template: str | None = None,
    new_tokens: int = 0,
) -> list[Prompt]:
    """The texts' prompts, with the task's labels or others, checked against the model's limits.

    places: what an error calls each text. new_tokens: how many may be generated behind a prompt.
    """
    prompts = build_prompts(
        task.tokenizer,
        texts,
        whole_template(task, template),
        task.labels if words is None else words,
        task.max_text_tokens,
        places,
    )
    check_lengths(prompts, task.config.max_position_embeddings, places, new_tokens)
    return prompts


def blank_prompt(task: Task) -> Prompt | None:
    """The prompt of no text at all; None where the template leaves nothing, or its ends merge."""
    try:
        return task_prompts(task, [""], ["no text"])[0]
    except UserError:
        return None


def read_rows(
    args: argparse.Namespace, task: Task, words: Sequence[str] | None = None, new_tokens: int = 0
) -> tuple[list[Example], list[Prompt]]:
    """The examples of --data and their prompts; the last two arguments as in `task_prompts`."""
    examples = read_examples(args.data, task.labels, args.encoding, args.limit)
    places = [f"{args.data}, line {example.line}" for example in examples]
    texts = [example.text for example in examples]
    return examples, task_prompts(task, texts, places, words, new_tokens=new_tokens)


@dataclass(frozen=True)
class Split:
    """The rows of a training file, and which of them are trained on or held out."""

    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    labels: Sequence[int]
    lines: Sequence[int]  # of the file
    training: Sequence[int]
    held_out: Sequence[int]


def warn_about_labels(prompt: Prompt, labels: Sequence[str]) -> None:
    """Print a warning to stderr if label words differ in length or one is the start of another."""
    lengths = [len(ids) for ids in prompt.labels]
    if len(set(lengths)) > 1:
        counts = ", ".join(f"{w} {n}" for w, n in zip(labels, lengths, strict=True))
        print(
            f"warning: label words differ in tokens ({counts}); all tokens of a word count, so "
            "longer words tend to score lower",
            file=sys.stderr,
        )
    for word, ids in zip(labels, prompt.labels, strict=True):
        for other, longer in zip(labels, prompt.labels, strict=True):
            if len(ids) < len(longer) and longer[: len(ids)] == ids:
                print(
                    f"warning: {other} begins with {word}, so {word} can never score lower",
                    file=sys.stderr,
                )
