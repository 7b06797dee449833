"""The Python interface: what `import qwen_min` hands out. A user's mistake raises UserError."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen_min.command.arguments import SCORE_LABELS, with_run
from qwen_min.command.classifier import Progress, Scorer, Source, forms
from qwen_min.command.cli import choose_device
from qwen_min.command.finite import NotFinite
from qwen_min.command.task import read_task
from qwen_min.errors import UserError
from qwen_min.fast.batching import DEFAULT_BATCH_TOKENS
from qwen_min.files.hub import resolve_model
from qwen_min.files.tokens import read_tokenizer
from qwen_min.files.weights import load_model
from qwen_min.metrics import evaluate_predictions, softmax
from qwen_min.model import Qwen
from qwen_min.prompt import (
    DEFAULT_LABELS,
    DEFAULT_MAX_TEXT_TOKENS,
    DEFAULT_TEMPLATE,
    Prompt,
    build_prompts,
)
from qwen_min.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen_min.lab.calibration import Correction


def load(model: str, dtype: str = "auto", device: str = "auto") -> tuple[Qwen, Tokenizer]:
    """A frozen model and its tokenizer: "tiny", a directory, or a hub name (owner/name[@revision]).

    dtype: auto (the checkpoint's own), float32, bfloat16 or float16. device: auto, cpu, cuda, mps.
    """
    directory = resolve_model(model)
    return load_model(directory, dtype, choose_device(device)), read_tokenizer(directory)


def score_labels(
    model: Qwen, prompts: Sequence[Prompt], batch_tokens: int = DEFAULT_BATCH_TOKENS
) -> np.ndarray:
    """Scores of each prompt's labels: (n, C), float64. batch_tokens limits one forward's tokens."""
    return Scorer(model, "label words", None, forms(False), batch_tokens).scores(prompts)


@dataclass(frozen=True)
class Classifier:
    """A method, loaded, that classifies texts by its scores.

    `from_run` and `zero_shot` make one; calibration in them is as predict's --calibration. Every
    method below takes n texts in a list and returns n rows in the same order. Each raises
    UserError if a text cannot become a prompt, and NotFinite if scores are not finite.
    """

    source: Source
    scorer: Scorer
    correction: "Correction | None" = None

    @classmethod
    def from_run(
        cls,
        directory: str | Path,
        device: str = "auto",
        method: str | None = None,
        calibration: str | None = None,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
    ) -> "Classifier":
        """The method, model, prompt and labels of a directory that train.py made.

        method: the run's own, or transplanted_head for a run of lora_head.
        """
        how = {"method": method, "calibration": calibration, "device": device}
        return cls._of(run=str(directory), batch_tokens=batch_tokens, **how)

    @classmethod
    def zero_shot(
        cls,
        model: str = "tiny",
        labels: Sequence[str] = DEFAULT_LABELS,
        template: str = DEFAULT_TEMPLATE,
        **others: object,
    ) -> "Classifier":
        """The log-probabilities of label words, one for each class, after the prompt.

        model: as in `load`. template: {text} stands for a text. others: max_text_tokens, chat,
        system, dtype, device, batch_tokens and calibration, as on the command line.
        """
        if isinstance(labels, str) or any("," in word or "\uff0c" in word for word in labels):
            raise UserError(f"labels {labels!r}: expected a list of words without commas")
        labels = ",".join(labels)
        return cls._of(method="zero_shot", model=model, labels=labels, template=template, **others)

    @classmethod
    def _of(cls, **given: object) -> "Classifier":
        none = dict.fromkeys(("run", "method", "adapter", "system", "calibration"))
        prompt = {"model": "tiny", "labels": None, "template": DEFAULT_TEMPLATE, "chat": False}
        prompt |= {"max_text_tokens": DEFAULT_MAX_TEXT_TOKENS}
        how = {"batch_tokens": DEFAULT_BATCH_TOKENS, "dtype": "auto", "device": "auto"}
        how |= none | prompt | {"plain": False}
        if unknown := given.keys() - how.keys():
            raise TypeError(f"Classifier: unknown argument {sorted(unknown)[0]!r}")
        return cls.load(read_source(argparse.Namespace(**(how | given)), given))

    @classmethod
    def load(cls, source: Source) -> "Classifier":
        """The classifier of a command's arguments. Its weights are loaded here."""
        args, correct = source.args, None
        if args.calibration:
            from qwen_min.command.inside import correction_of

            correct = correction_of(source)
        model, head = source.base(), None
        by = "label words" if args.method in SCORE_LABELS else "head"
        if args.method != "zero_shot":
            head = source.add_trained(model)
        if args.method == "transplanted_head":
            model = source.base()
        scorer = source.scorer(model, by, head)
        return cls(source, scorer, correct and correct(scorer))

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, in class order."""
        return self.source.task.labels

    def prompts(self, texts: Sequence[str], places: Sequence[str] | None = None) -> list[Prompt]:
        """The prompt of each text. places: what an error calls each text."""
        if isinstance(texts, str):
            raise TypeError("found one str, expected a list of texts: put it into a list")
        texts = list(texts)
        places = places or [f"text {i + 1}" for i in range(len(texts))]
        return self.source.task.prompts(texts, places)

    def score_prompts(
        self, prompts: Sequence[Prompt], progress: Progress = lambda rows: None
    ) -> np.ndarray:
        """Class scores (n, C), float64, corrected if the classifier has a calibration."""
        if not prompts:
            return np.zeros((0, len(self.labels)))
        try:
            return self._corrected(prompts, self.scorer.scores(prompts, progress))
        except NotFinite as failure:
            failure.found = self._corrected(prompts, failure.found)
            raise

    def _corrected(self, prompts: Sequence[Prompt], scores: np.ndarray) -> np.ndarray:
        if self.correction is None:
            return scores
        from qwen_min.lab.calibration import token_counts

        return self.correction.apply(scores, token_counts([p.labels for p in prompts]))

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Class scores (n, C), float64; their softmax over C gives probabilities."""
        return self.score_prompts(self.prompts(texts))

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Class probabilities (n, C), float64, in the order of `labels`."""
        scores = self.scores(texts)
        return softmax(scores) if len(scores) else scores

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The label of each text: of the class with the highest score."""
        return [self.labels[y] for y in self.scores(texts).argmax(axis=1)]


def read_source(args: argparse.Namespace, given: dict) -> Source:
    """Where the classifier of these arguments comes from; reads no weights."""
    args, record = with_run(args, given)
    args.labels = args.labels or ",".join(DEFAULT_LABELS)  # not those in the file of texts
    return Source(args, read_task(args, record), choose_device(args.device), record)
