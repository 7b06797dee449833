"""The Python interface: what `import qwen_min` hands out. A user's mistake raises UserError."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_min.command import arguments
from qwen_min.command.classifier import Progress, Scorer, Source, forms
from qwen_min.command.cli import choose_device
from qwen_min.command.inside import correction_of
from qwen_min.command.task import read_task
from qwen_min.errors import UserError
from qwen_min.files.hub import resolve_model
from qwen_min.files.record import METHODS
from qwen_min.files.tokens import read_tokenizer
from qwen_min.files.weights import load_model
from qwen_min.metrics import evaluate_predictions, softmax
from qwen_min.model import Qwen
from qwen_min.prompt import DEFAULT_LABELS, DEFAULT_TEMPLATE, Prompt, build_prompts
from qwen_min.tokenizer import Tokenizer


def load(model: str, dtype: str = "auto", device: str = "auto") -> tuple[Qwen, Tokenizer]:
    """A frozen model and its tokenizer: "tiny", a directory, or a hub name (owner/name[@revision]).

    dtype: auto (the checkpoint's own), float32, bfloat16 or float16. device: auto, cpu or cuda.
    """
    directory = resolve_model(model)
    return load_model(directory, dtype, choose_device(device)), read_tokenizer(directory)


def score_labels(model: Qwen, prompts: Sequence[Prompt], batch_tokens: int = 2048) -> np.ndarray:
    """Scores of each prompt's labels: (n, C), float64. batch_tokens limits one forward's tokens."""
    return Scorer(model, "label words", None, forms(False), batch_tokens).scores(prompts)


@dataclass(frozen=True)
class Classifier:
    """A method, loaded, that classifies texts by its scores.

    `from_run` and `zero_shot` make one; their `others` are predict's options, such as dtype,
    batch_tokens, calibration and max_text_tokens. Every method below takes n texts in a list and
    returns n rows in the same order. Each raises UserError if a text cannot become a prompt, and
    NotFinite if scores are not finite.
    """

    source: Source
    scorer: Scorer
    correct: Callable[..., np.ndarray] | None = None  # what `correction_of` makes

    @classmethod
    def from_run(
        cls, directory: str | Path, device: str = "auto", **others: object
    ) -> "Classifier":
        """The method, model, prompt and labels of a directory that train.py made.

        method="transplanted_head" is for a run of lora_head.
        """
        return cls._of(run=str(directory), device=device, **others)

    @classmethod
    def zero_shot(
        cls,
        model: str = "tiny",
        labels: Sequence[str] = DEFAULT_LABELS,
        template: str = DEFAULT_TEMPLATE,
        **others: object,
    ) -> "Classifier":
        """The log-probabilities of label words, one for each class, after the prompt.

        model: as in `load`. template: {text} stands for a text.
        """
        if isinstance(labels, str) or any("," in word or "\uff0c" in word for word in labels):
            raise UserError(f"labels {labels!r}: expected a list of words without commas")
        return cls._of(model=model, labels=",".join(labels), template=template, **others)

    @classmethod
    def _of(cls, **given: object) -> "Classifier":
        parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
        add_classifier_arguments(parser)
        if unknown := given.keys() - vars(parser.parse_args([])).keys():
            raise TypeError(f"Classifier: unknown argument {min(unknown)!r}")
        typed = [(arguments.option(name), v) for name, v in given.items() if v is not None]
        typed = [name if v is True else f"{name}={v}" for name, v in typed if v is not False]
        try:  # checked as on a command line
            args = parser.parse_args(typed)
        except argparse.ArgumentError as error:
            raise UserError(str(error)) from None
        return cls.load(read_source(args, given))

    @classmethod
    def load(cls, source: Source) -> "Classifier":
        """The classifier of a command's arguments. Its weights are loaded here."""
        args, head = source.args, None
        correct = correction_of(source) if args.calibration else None
        model = source.base()
        if args.method != "zero_shot":
            head = source.add_trained(model)
        if args.method == "transplanted_head":
            model = source.base()
        scorer = source.scorer(model, "label words" if head is None else "head", head)
        return cls(source, scorer, correct and correct(scorer).apply)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, in class order."""
        return self.source.task.labels

    def score_prompts(
        self, prompts: Sequence[Prompt], progress: Progress = lambda tokens: None
    ) -> np.ndarray:
        """Class scores (n, C), float64, corrected if the classifier has a calibration."""
        if not prompts:
            return np.zeros((0, len(self.labels)))
        scores = self.scorer.scores(prompts, progress)
        return self.correct(scores, [p.labels for p in prompts]) if self.correct else scores

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Class scores (n, C), float64; their softmax over C gives probabilities."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("texts: expected a list of str")
        places = [f"text {i + 1}" for i in range(len(texts))]
        return self.score_prompts(self.source.task.prompts(list(texts), places))

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Class probabilities (n, C), float64, in the order of `labels`."""
        scores = self.scores(texts)
        return softmax(scores) if len(scores) else scores

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The label of each text: of the class with the highest score."""
        return [self.labels[y] for y in self.scores(texts).argmax(axis=1)]


def add_classifier_arguments(parser: argparse.ArgumentParser) -> None:
    """What a classifier is made of: a method, its weights, the prompt, and how to compute."""
    add = parser.add_argument
    methods = ("zero_shot", *METHODS, "transplanted_head")
    add("--method", choices=methods, help="default: the method of --run, or zero_shot")
    arguments.add_trained_arguments(parser)
    arguments.add_model_arguments(parser, batch_tokens=2048)
    names = ", ".join(arguments.CALIBRATIONS[:3])
    corrected = f"correct the scores of label words: {names}, or results of evaluate.py "
    add("--calibration", metavar="NAME", help=corrected + "--calibration, whose prior is taken")
    arguments.add_prompt_arguments(parser)
    arguments.add_machine_arguments(parser)


def read_source(args: argparse.Namespace, given: dict) -> Source:
    """Where the classifier of these arguments comes from; reads no weights."""
    if not (args.run or args.adapter or args.method):
        args.method = "zero_shot"
    args, record = arguments.with_run(args, given)
    return Source(args, read_task(args, record), choose_device(args.device), record)
