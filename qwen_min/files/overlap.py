"""Find the evaluated texts that are also in training data.

A trained method may have memorised such a text. "Normalised" texts are compared without
punctuation, white space and differences in character width.
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

FED = "fed.safetensors"  # in a model's directory: `text_hashes` of its own training texts


class _Dropped(dict):
    """A table for str.translate that removes punctuation, white space and invisible characters."""

    def __missing__(self, code: int) -> int | None:
        # Unicode's categories P, Z and C; tabs and newlines are Cc, a zero-width space is Cf.
        self[code] = None if category(chr(code))[0] in "PZC" else code
        return self[code]


_DROPPED = _Dropped()


def normalised(text: str) -> str:
    """The form in which two texts are compared: NFKC, without white space and punctuation.

    A text of punctuation alone ("？！") keeps it; otherwise all such texts would be equal.
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
    """The name of the training file, and its examples; None if there is none.

    file: named by the user; None: the file in `record`, the run.json of the evaluated run. If that
    file is missing or has changed, stderr gets a note and the result is None.
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
            f"note: accuracy on texts outside the training data is not computed: {error} "
            "(name the training data with --train-data FILE)",
            file=sys.stderr,
        )
        return None
    return file, examples


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """Eight bytes of SHA-256 of each normalised text: (distinct texts,) int64, ascending.

    Enough to recognise a text, but not to reconstruct it.
    """
    digests = (hashlib.sha256(normalised(text).encode()).digest()[:8] for text in texts)
    return np.unique(np.frombuffer(b"".join(digests), dtype="<i8"))


def fed_rows(directory: Path, examples: Sequence[Example]) -> list[int]:
    """Indices of the examples that are in the training data of the model in `directory` itself.

    The model's file FED has their hashes; without this file the result is empty. If any example is
    found, stderr gets a warning.
    """
    if not (path := directory / FED).exists():
        return []
    known = load_file(path)["texts"]
    fed = [i for i, e in enumerate(examples) if np.isin(text_hashes([e.text]), known).all()]
    if fed:
        print(
            f"warning: {len(fed)} of these {len(examples)} texts are in the training data of the "
            f"model in {directory} itself; metrics on them say nothing about new texts",
            file=sys.stderr,
        )
    return fed


def clean_part(
    training: tuple[str, list[Example]] | None,
    examples: Sequence[Example],
    predictions: Sequence[int],
    fed: Sequence[int] = (),
) -> dict | None:
    """Accuracy on the examples that are in no training data.

    training: from `training_examples`; its texts are compared normalised. predictions: (n,), class
    numbers. fed: from `fed_rows`. The result is None if both are empty. Accuracy and interval are
    None if no example is left.
    """
    sources = [] if training is None else [training[0]]
    sources += ["what the model itself was made from"] * bool(fed)
    if not sources:
        return None
    # Texts that are equal are also equal when normalised.
    known = {normalised(row.text) for row in training[1]} if training else set()
    fed = set(fed)
    correct = [
        example.label == prediction
        for i, (example, prediction) in enumerate(zip(examples, predictions, strict=True))
        if i not in fed and normalised(example.text) not in known
    ]
    n, hits = len(correct), sum(map(int, correct))
    return {
        "train_data": " or ".join(sources),
        "n": n,
        "accuracy": hits / n if n else None,
        "accuracy_interval": list(wilson_interval(hits, n)) if n else None,
    }
