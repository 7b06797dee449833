"""Where a method's weights come from, and how the loaded method classifies.

`Source` loads the base and puts on it what was trained; `Scorer` computes scores with the
result. evaluate.py combines the two, in one function for each method. `Evaluation` and `Outcome`
are what goes into a classification and what comes out.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np

from qwen_min.command import cli
from qwen_min.command.finite import NotFinite, check_finite
from qwen_min.command.task import Task
from qwen_min.command.trained import ADAPTER, GIVE_BASE, Parts, identity, load_parts, parts_of
from qwen_min.errors import UserError
from qwen_min.files.data import Example
from qwen_min.files.run import check_same
from qwen_min.files.weights import load_model
from qwen_min.head import LinearHead
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt, parse_template

Progress = Callable[[int], object]  # called with the prompts' tokens that are finished


def forms(plain: bool) -> ModuleType:
    """The module that computes: by the definitions (--plain), or fast."""
    if plain:
        from qwen_min.command import plain as module
    else:
        from qwen_min.fast import forms as module
    return module


@dataclass(frozen=True)
class Scorer:
    """A model, and what gives the scores of the classes."""

    model: Qwen
    by: Literal["label words", "head", "answers"]
    head: LinearHead | None
    forms: ModuleType
    batch_tokens: int  # at most so many tokens in one fast forward

    def scores(
        self, prompts: Sequence[Prompt], progress: Progress = lambda tokens: None
    ) -> np.ndarray:
        """Scores of each prompt's label words, or of the head: (n, C), float64.

        Raises NotFinite, which holds them, if some are not finite.
        """
        if not prompts:  # C is not known
            return np.zeros((0, 0))
        model, budget, head = self.model, self.batch_tokens, self.head
        if self.by == "label words":
            scores = self.forms.score_labels(model, prompts, budget, progress)
            finite = np.isfinite(scores).all(axis=1)
        else:
            every = head.layer != model.config.num_hidden_layers
            features = self.forms.pooled_features(
                model, prompts, head.pooling, every, budget, progress
            )
            features = features[:, head.layer if every else 0]  # (n, L + 1 or 1, D) → (n, D)
            scores, finite = head.scores(features), features.isfinite().all(dim=1)
        check_finite(model, prompts, finite, scores)
        if not (finite := np.isfinite(scores).all(axis=1)).all():  # only W h + b overflows
            advice = "its weights are too large or damaged: train again, with a lower --lr"
            rows = np.flatnonzero(~finite).tolist()
            raise NotFinite(f"found scores of the head that are not finite; {advice}", rows, scores)
        return scores

    def answers(
        self, prompts: Sequence[Prompt], stop: Collection[int], progress: Progress
    ) -> list[list[int]]:
        """The token ids that the model writes after each prompt. Raises NotFinite as `scores`."""
        from qwen_min.lab.generation import MAX_NEW_TOKENS

        answers = self.forms.generate_answers(
            self.model, prompts, MAX_NEW_TOKENS, stop, self.batch_tokens, progress
        )
        check_finite(self.model, prompts, [answer is not None for answer in answers], answers)
        return answers


@dataclass(frozen=True)
class Source:
    """Where the weights of a command come from: a checkpoint, and what is trained on it."""

    args: argparse.Namespace
    task: Task
    device: str
    record: dict | None  # of the run, if there is one

    def base(self) -> Qwen:
        """The checkpoint's model, frozen, in eval mode."""
        return load_model(self.task.directory, self.args.dtype, self.device)

    @property
    def parts(self) -> Parts:
        """What is trained: by the run's record, or in the directory of --adapter."""
        if self.record:
            return parts_of(self.record["method"], self.record["arguments"])
        return Parts(True, "adapter" if self.args.method == "lora_head" else None)

    @property
    def adapter(self) -> str | Path | None:
        """The directory of the LoRA, if there is one: in the run's, or of --adapter."""
        inside = self.args.run and self.parts.lora
        return Path(self.args.run) / ADAPTER if inside else self.args.adapter

    @cached_property
    def identity(self) -> dict:
        """What predictions depend on beside arguments and examples, as results record it."""
        record, found = self.record or {}, identity(self.task, self.adapter)
        kept = ("data_hash", "template", "dtype")
        found |= {f"training_{name}": record.get(name) for name in kept}
        if self.args.method == "zero_shot_generate":
            from qwen_min.lab.generation import stop_ids

            found["stop_ids"] = sorted(stop_ids(self.task.directory, self.task.tokenizer.markup))
        return found

    def compare(self, data: str | None = None) -> None:
        """Of several processes: raise UserError unless all have the same of what it depends on."""
        if many := cli.ranks():
            found = [self.identity, self.record, self.device, data]
            many.check_same("model, run, data or device", found)

    def scorer(self, model: Qwen, by: str, head: LinearHead | None = None) -> Scorer:
        """The model with what gives the scores, computing as the arguments say."""
        return Scorer(model, by, head, forms(self.args.plain), self.args.batch_tokens)

    def add_trained(self, model: Qwen) -> LinearHead | None:
        """Put what was trained on a base, in place; returns the head, if there is one.

        Raises UserError if something is missing, or does not fit this base or these labels.
        """
        args, labels, own = self.args, self.task.labels, {**self.identity}
        if self.record:
            # Other markup or another template may be asked for; the run's own must be unchanged.
            before = vars(args) | self.record["arguments"]  # older runs have fewer arguments
            same = (before["chat"], before["system"]) == (args.chat, args.system)
            own["template"] = same and self.task.whole_template(
                parse_template(str(before["template"]))
            )
            check_same(self.record, own, args.run, GIVE_BASE)
            own["result_hash"] = self.record.get("result_hash")
        directory = Path(args.run or args.adapter)
        head = load_parts(model, directory, self.adapter, self.parts, own, args.model)
        if head is None:
            return None
        D, L = model.config.hidden_size, model.config.num_hidden_layers
        if head.weight.shape[1] != D or not 0 <= head.layer <= L:
            raise UserError(
                f"the head is for layer {head.layer} of {head.weight.shape[1]} numbers, the model "
                f"in {args.model} has {L} layers of {D}; give the model that it was trained on"
            )
        trained = self.record["labels"] if self.record else labels
        if list(labels) != list(trained) or len(labels) != len(head.weight):
            known = f"the head was trained for {','.join(trained)}; leave --labels out"
            if not self.record:
                known = f"the head has {len(head.weight)} classes; give as many words"
            raise UserError(f"--labels {args.labels}: {known}")
        return head


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: a loaded method, and the rows that it is to classify."""

    source: Source
    scorer: Scorer
    examples: Sequence[Example]  # each with its class number, an index into the label words
    prompts: Sequence[Prompt]  # with the words of --labels, then those of other label sets
    neutral: tuple | None  # the prompts that --calibrate asks for

    @cached_property
    def label_ids(self) -> list[tuple[tuple[int, ...], ...]]:
        """Of each row, the token ids of the words of --labels."""
        words = len(self.source.task.labels)
        return [prompt.labels[:words] for prompt in self.prompts]

    def place(self, rows: Sequence[int]) -> str:
        """Where the first of these rows is in the data, and how many they are."""
        line, n = self.examples[rows[0]].line, len(self.examples)
        return f"{self.source.args.data}, line {line} ({len(rows)} of {n} rows)"

    @property
    def true_classes(self) -> np.ndarray:
        """The class number of each example (n,)."""
        return np.array([example.label for example in self.examples])


@dataclass(frozen=True)
class Outcome:
    """What a method said of each row."""

    predictions: np.ndarray  # (n,), class numbers
    scores: np.ndarray | None  # (n, C); None: the predictions were read from answers
    all_scores: np.ndarray | None  # (n, all words of the prompts), without --calibration
    answers: list[str | None] | None
    seconds: float
    error: NotFinite | None  # if some rows have numbers that are not finite

    @property
    def raw_scores(self) -> np.ndarray:
        """`scores` (n, C) without the correction of --calibration."""
        return self.all_scores[:, : self.scores.shape[1]]
