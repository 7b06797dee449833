"""What a command line asks for, before any model is loaded: label words, template, prompts."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_min.command.arguments import SCORE_LABELS
from qwen_min.config import QwenConfig
from qwen_min.errors import UserError
from qwen_min.files.data import Example, find_labels, parse_names, read_examples
from qwen_min.files.hub import resolve_model
from qwen_min.files.tokens import read_tokenizer
from qwen_min.files.weights import load_model
from qwen_min.prompt import (
    DEFAULT_TEMPLATE,
    Prompt,
    build_prompts,
    check_lengths,
    parse_template,
    shorten,
)
from qwen_min.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen_min.lab.chat import Chat

# A label that answers the question of the default template.
SENTIMENT = re.compile("(?i)[正负積积极消差好坏优劣喜赞满]|中性|pos|neg|neutral|good|bad|mixed")


@dataclass(frozen=True)
class Task:
    """How texts become prompts: the same for every method and for every text of one command."""

    directory: Path  # of the model
    config: QwenConfig
    tokenizer: Tokenizer
    labels: tuple[str, ...]  # the classes' names, as in the file and in results
    words: tuple[str, ...]  # what stands for each class in an answer
    scored: tuple[str, ...]  # the words that prompts need tokens of: none where a head scores
    template: str  # as typed, without chat markup
    chat: "Chat | None"
    system: str | None
    max_text_tokens: int

    def whole_template(self, template: str | None = None) -> str:
        """The task's template, or another instead, with chat markup if --chat asks for it.

        Raises UserError as `wrap_template` does, and for a template without the tokens that
        tokenizer.json puts around every text (we add none that the template doesn't show).
        """
        template = self.template if template is None else template
        if self.chat is not None:
            from qwen_min.lab.chat import wrap_template

            template = wrap_template(template, self.chat, self.tokenizer.markup, self.system)
        if missing := [token for token in self.tokenizer.required if token not in template]:
            found = f"tokenizer.json puts {' '.join(missing)} around every text"
            raise UserError(f"--template {template!r}: {found}; write it where it belongs")
        return template

    def trim(self, template: str, texts: Sequence[str], places: Sequence[str]) -> Callable:
        """What chat markup does to a text, once cut: nothing (`str`), or `str.strip`, say.

        Raises UserError for one of `texts` that the checkpoint's template treats in another way.
        """
        if self.chat is None:
            return str
        from qwen_min.lab.chat import check_texts

        short = [shorten(self.tokenizer, text, self.max_text_tokens) for text in texts]
        return check_texts(short, template, self.chat, self.system, places)

    def prompts(
        self,
        texts: Sequence[str],
        places: Sequence[str],
        labels: Sequence[str] | None = None,
        template: str | None = None,
        new_tokens: int = 0,
    ) -> list[Prompt]:
        """The prompts of texts, with the task's scored labels and template or others.

        places: what an error calls each text. new_tokens: how many may be generated after a
        prompt. Raises UserError where a prompt cannot be built or exceeds the model's positions.
        """
        labels = self.scored if labels is None else labels
        template = self.template if template is None else template
        whole = self.whole_template(template)
        how = (self.max_text_tokens, places, self.trim(template, texts, places))
        prompts = build_prompts(self.tokenizer, texts, whole, labels, *how)
        check_lengths(prompts, self.config.max_position_embeddings, places, new_tokens)
        return prompts

    def empty_prompt(self) -> Prompt | None:
        """The prompt without a text; None where the template alone makes none."""
        try:
            return self.prompts([""], ["no text"])[0]
        except UserError:
            return None


def read_task(args: argparse.Namespace, record: dict | None = None) -> Task:
    """The task of these arguments, and of a run's record, if there is one.

    Raises UserError for arguments that do not fit together.
    """
    if args.labels is None:  # recorded as if typed; of texts without labels, the default's
        how = [vars(args).get(name) for name in ("encoding", "text_column", "label_column")]
        args.labels = find_labels(vars(args).get("data"), *how)
    # As older versions read them, with their white space.
    labels = words = tuple(args.labels.split(","))
    own = record and (record["arguments"]["labels"], tuple(record["labels"]))
    if own != (args.labels, labels):
        labels, words = parse_names(args.labels, partial(print, file=sys.stderr))
    template = parse_template(args.template)
    if not record and template == DEFAULT_TEMPLATE and not any(map(SENTIMENT.search, words)):
        asked = "the default template asks for 情感倾向, the sentiment of a review (评论)"
        advice = f"if {', '.join(words[:2])} … answer another question, give --template"
        print(f"warning: {asked}; {advice}", file=sys.stderr)
    if args.system is not None and not args.chat:
        raise UserError("--system is a message of Qwen's chat markup; give --chat too")
    directory = resolve_model(args.model)
    config = QwenConfig.from_json(directory / "config.json")
    tokenizer = read_tokenizer(directory)
    if tokenizer.size > config.vocab_size:
        most = f"expected at most config.json's vocab_size, {config.vocab_size}"
        found = f"tokenizer.json has {tokenizer.size} tokens, {most}"
        raise UserError(f"{directory}: {found}; take both from one checkpoint")
    chat = None
    if args.chat:
        from qwen_min.lab.chat import read_chat_format

        file = (directory / "config.json").read_text(encoding="utf-8")
        chat = read_chat_format(directory, json.loads(file)["model_type"])
    # In the system message, as in the template, \n means a newline.
    system = args.system and args.system.replace("\\n", "\n")
    scored = words if args.method in SCORE_LABELS else ()
    names, frame = (labels, words, scored), (template, chat, system)
    task = Task(directory, config, tokenizer, *names, *frame, args.max_text_tokens)
    task.whole_template()  # an unusable template fails here
    note = partial(print, file=sys.stderr)
    load_model(directory, device="meta", note=note)  # reads no numbers: a malformed file fails here
    return task


def read_rows(
    args: argparse.Namespace, task: Task, record: dict | None, empty_texts: bool = False
) -> list[Example]:
    """The examples of --data, with labels read as those of the run of `record`, if there is one."""
    read_as = record and record.get("labels_read_as")  # older runs lack it
    how = (args.encoding, args.limit, read_as, args.text_column, args.label_column, empty_texts)
    return read_examples(args.data, task.labels, *how)


def row_prompts(file: str, task: Task, examples: Sequence[Example], **others) -> list[Prompt]:
    """The prompts of a file's examples; `others` as in `Task.prompts`."""
    places = [f"{file}, line {example.line}" for example in examples]
    return task.prompts([example.text for example in examples], places, **others)


def check_classes(
    args: argparse.Namespace, task: Task, examples: Sequence[Example], training: Sequence[int]
) -> None:
    """Raise UserError if a class has no example among the rows `training`."""
    trained, known = {examples[i].label for i in training}, {e.label for e in examples}
    for y, word in enumerate(task.labels):
        where = f"in the first {args.limit} (--limit)" if args.limit else "in the file"
        reason = f"no row {where}: add rows, or leave its word out of --labels"
        if y in known:
            reason = "its only text is held out, and every other text is a class's only one too: "
            reason += "add another text of each class"
        if y not in trained:
            raise UserError(f"{args.data}: class {word!r} cannot be trained: {reason}")


def warn_about_labels(label_ids: Sequence[tuple[int, ...]], labels: Sequence[str]) -> None:
    """Say on stderr what makes label words hard to compare: their lengths, a common beginning."""
    word_of = dict(zip(label_ids, labels, strict=True))
    if len({len(ids) for ids in label_ids}) > 1:
        counts = ", ".join(f"{word} {len(ids)}" for ids, word in word_of.items())
        advice = "each is scored whole, and longer ones tend to score lower"
        print(f"warning: label words differ in tokens ({counts}); {advice}", file=sys.stderr)
    # All beginnings of a word, so that 1,000 words need no million comparisons.
    beginnings = [(ids[:n], ids) for ids in label_ids for n in range(1, len(ids))]
    pairs = [(word_of[a], word_of[b]) for a, b in beginnings if a in word_of]
    if pairs:
        shown = ", ".join(f"{other} begins with {word}" for word, other in pairs[:3])
        shown += f", … {len(pairs)} in all" * (len(pairs) > 3)
        print(f"warning: {shown}: the shorter one can never score lower", file=sys.stderr)
