"""Texts that an evaluation shares with the data that a model was trained on.

A text that is also in the training data is one that a trained method may have memorised.
"Normalised" texts are equal up to the width of characters, white space and punctuation.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from unicodedata import category, normalize

import numpy as np
from safetensors.numpy import load_file

from qwen_min.errors import UserError
from qwen_min.files.data import Example, examples_hash, read_examples
from qwen_min.metrics import wilson_interval
from qwen_min.prompt import parse_labels

FED = "fed.safetensors"  # in a model's directory: `text_hashes` of what it was made from


class _Dropped(dict):
    """For str.translate: None (to be removed) for punctuation, white space and the invisible."""

    def __missing__(self, code: int) -> int | None:
        # Unicode's categories P, Z and C; tabs and newlines are Cc, a zero-width space is Cf.
        self[code] = None if category(chr(code))[0] in "PZC" else code
        return self[code]


_DROPPED = _Dropped()


def normalised(text: str) -> str:
    """The key by which two texts count as one: NFKC, without white space and punctuation.

    A text that has nothing else ("？！") keeps its punctuation: it is not every such text's copy.
    """
    whole = normalize("NFKC", text)
    return whole.translate(_DROPPED) or "".join(whole.split())


def stand_in(texts: Iterable[str], known: Iterable[str]) -> list[int]:
    """Indices of the texts that are among the known ones."""
    known = set(known)
    return [i for i, text in enumerate(texts) if text in known]


def training_examples(
    file: str | None, encoding: str, labels: Sequence[str], record: dict | None
) -> tuple[str, list[Example]] | None:
    """The file that holds the training data, and its rows; None where there is none to read.

    file: as the user names it; without it the one that a run, `record`, says it was trained on. If
    that is gone or has changed, stderr says so: the evaluation goes on without.
    """
    if file is not None:
        return file, read_examples(file, labels, encoding)
    if record is None:
        return None
    arguments = record["arguments"]
    file = arguments["data"]
    try:
        own = parse_labels(arguments["labels"])
        examples = read_examples(file, own, arguments["encoding"], arguments["limit"])
        if examples_hash(examples) != record["data_hash"]:
            raise UserError(f"{file}: has changed since the run was trained on it")
    except UserError as error:
        print(
            f"note: no accuracy on the part that is not in the training data: {error} "
            "(--train-data FILE names it)",
            file=sys.stderr,
        )
        return None
    return file, examples


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """Eight bytes of SHA-256 of each normalised text, (distinct texts,) int64, in ascending order.

    Enough to recognise a text, and nothing that it could be read from.
    """
    digests = (hashlib.sha256(normalised(text).encode()).digest()[:8] for text in texts)
    return np.unique(np.frombuffer(b"".join(digests), dtype="<i8"))


def fed_rows(directory: Path, examples: Sequence[Example]) -> list[int]:
    """Indices of the examples that the model in `directory` was itself made from.

    By the hashes in its file FED: a model without the file does not say, and none are found. If
    there are any, stderr says how many.
    """
    if not (path := directory / FED).exists():
        return []
    known = load_file(path)["texts"]
    fed = [i for i, e in enumerate(examples) if np.isin(text_hashes([e.text]), known).all()]
    if fed:
        print(
            f"warning: {len(fed)} of these {len(examples)} texts are among those that the model "
            f"in {directory} was itself made from; figures on them say nothing about new texts",
            file=sys.stderr,
        )
    return fed


def clean_part(
    training: tuple[str, list[Example]] | None,
    examples: Sequence[Example],
    predictions: Sequence[int],
    fed: Sequence[int] = (),
) -> dict | None:
    """Accuracy on the examples that neither training nor the model's own making has seen.

    training: see `training_examples`; a text counts as seen exact or normalised. fed: as `fed_rows`
    finds them. None without either. predictions: (n,), class numbers. Accuracy and interval are
    None where no row is clean.
    """
    sources, seen = [], set(fed)
    if training is not None:
        sources.append(training[0])
        # Texts that are equal are equal normalised.
        known = (normalised(row.text) for row in training[1])
        seen.update(stand_in((normalised(e.text) for e in examples), known))
    if fed:
        sources.append("what the model itself was made from")
    if not sources:
        return None
    right = [e.label == p for e, p in zip(examples, predictions, strict=True)]
    clean = [hit for i, hit in enumerate(right) if i not in seen]
    correct, n = sum(map(int, clean)), len(clean)
    return {
        "train_data": " or ".join(sources),
        "n": n,
        "accuracy": correct / n if n else None,
        "accuracy_interval": list(wilson_interval(correct, n)) if n else None,
    }
