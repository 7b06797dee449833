"""The Python interface: what `import qwen_min` hands out. A user's mistake raises UserError."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_min.command.arguments import finished_run
from qwen_min.command.classifier import Scorer, Source, forms
from qwen_min.command.cli import choose_device
from qwen_min.command.task import Task, read_task
from qwen_min.fast.batching import DEFAULT_BATCH_TOKENS
from qwen_min.files.hub import resolve_model
from qwen_min.files.tokens import read_tokenizer
from qwen_min.files.weights import load_model
from qwen_min.metrics import evaluate_predictions, softmax
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt, build_prompts
from qwen_min.tokenizer import Tokenizer


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
class TrainedRun:
    """A finished run, ready for new texts."""

    task: Task
    scorer: Scorer

    @property
    def labels(self) -> tuple[str, ...]:
        """The label words, in class order."""
        return self.task.labels

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Class scores (n, C), float64; their softmax over C gives probabilities."""
        prompts = self.task.prompts(texts, [f"text {i + 1}" for i in range(len(texts))])
        return self.scorer.scores(prompts).reshape(len(texts), len(self.labels))

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Class numbers (n,)."""
        return self.scores(texts).argmax(axis=1)


def load_run(directory: str | Path, device: str = "auto") -> TrainedRun:
    """The method, model, prompt and labels of a directory that train.py made."""
    record = finished_run(directory)
    given = {"run": str(directory), "method": record["method"], "plain": False}
    given["batch_tokens"] = DEFAULT_BATCH_TOKENS
    older = {"chat": False, "system": None}  # runs made before these arguments existed
    args = argparse.Namespace(**(older | record["arguments"] | given))
    task = read_task(args, record)
    source = Source(args, task, choose_device(device), record)
    model = source.base()
    head = source.add_trained(model)
    by = "label words" if head is None else "head"
    return TrainedRun(task, source.scorer(model, by, head))
