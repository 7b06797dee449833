"""Find the evaluated texts that are also in training data.

A trained method may have memorised such a text. "Normalised" texts are compared without
punctuation, white space and differences in character width.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from unicodedata import category, normalize

import numpy as np

from qwen_min.errors import UserError
from qwen_min.files.data import Example, examples_hash, read_examples
from qwen_min.files.disk import read_safetensors, refuse_malformed
from qwen_min.metrics import wilson_interval

Training = tuple[str, list[Example]] | None  # the name of a file and its examples; None: no file
FED = "fed.safetensors"  # in a model's directory: `text_hashes` of its own training texts


def normalised(text: str) -> str:
    """The form in which two texts are compared: NFKC, without white space and punctuation.

    A text of punctuation alone ("？！") keeps it; otherwise all such texts would be equal.
    """
    whole = normalize("NFKC", text)
    # Unicode's categories P, Z and C; tabs and newlines are Cc, a zero-width space is Cf.
    kept = "".join(char for char in whole if category(char)[0] not in "PZC")
    return kept or "".join(whole.split())


def stand_in(texts: Iterable[str], known: Iterable[str]) -> list[int]:
    """Indices of the texts that are among the known ones."""
    known = set(known)
    return [i for i, text in enumerate(texts) if text in known]


def training_examples(
    args: argparse.Namespace, labels: Sequence[str], record: dict | None, read_as: str | None = None
) -> Training:
    """The name of the training file, and its examples; None if there is none.

    args: where --train-data is not given, it is the file in `record`, the run.json of the evaluated
    run, and its --dev file, whose rows chose step, layer or penalty. If one is missing or has
    changed, stderr gets a note and the result is None. read_as: what the labels of the evaluated
    data are read as.
    """
    if (file := args.train_data) is not None:
        how = (args.encoding, None, read_as, args.text_column, args.label_column, True)
        return file, read_examples(file, labels, *how)
    if record is None:
        return None
    own, examples = record["arguments"], []
    columns = own.get("text_column"), own.get("label_column")  # older runs lack these, and dev
    files = [(own["data"], own["limit"], record["data_hash"])]
    if own.get("dev"):
        files.append((own["dev"], None, record["dev_hash"]))
    try:
        for file, limit, kept in files:
            how = (own["encoding"], limit, record.get("labels_read_as"), *columns)
            found = read_examples(file, record["labels"], *how)
            if examples_hash(found) != kept:
                raise UserError(f"{file}: has changed since the run was trained on it")
            examples += found
        return " or ".join(file for file, _, _ in files), examples
    except UserError as error:
        skipped = "accuracy on texts outside the training data is not computed"
        print(f"note: {skipped}: {error} (or give --train-data FILE)", file=sys.stderr)
    return None


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """The hashes of distinct texts, normalised: (distinct texts,) int64, ascending."""
    return np.unique(_hashes(texts))


def _hashes(texts: Iterable[str]) -> np.ndarray:
    """Eight bytes of SHA-256 of each normalised text: (n,) int64.

    Enough to recognise a text, but not to reconstruct it.
    """
    digests = (hashlib.sha256(normalised(text).encode()).digest()[:8] for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<i8")


def fed_rows(directory: Path, examples: Sequence[Example]) -> list[int]:
    """Indices of the examples that are in the training data of the model in `directory` itself.

    The model's file FED has their hashes; without this file the result is empty. If any example is
    found, stderr gets a warning. Raises UserError for a file that has no such hashes.
    """
    if not os.path.lexists(path := directory / FED):
        return []
    kind, advice = "the hashes of a model's training texts", "copy the model again"
    with refuse_malformed(path, kind, advice):
        known = read_safetensors(path, kind, advice)[0]["texts"].numpy()
        if known.dtype != np.int64:
            raise ValueError(f"texts are {known.dtype}, expected int64")
    hashes = _hashes(example.text for example in examples)
    if fed := np.flatnonzero(np.isin(hashes, known)).tolist():
        found = f"{len(fed)} of these {len(examples)} texts are in the training data of {directory}"
        print(f"warning: {found}; metrics on them say nothing about new texts", file=sys.stderr)
    return fed


def clean_part(
    training: Training, examples: Sequence[Example], predictions: Sequence[int], fed: Sequence[int]
) -> dict | None:
    """Accuracy on the examples that are in no training data.

    training: from `training_examples`; its texts are compared normalised. predictions: (n,), class
    numbers. fed: from `fed_rows`. The result is None if both are empty. Accuracy and interval are
    None if no example is left.
    """
    if not training and not fed:
        return None
    file, known = training or (None, [])
    sources = filter(None, [file, "what the model itself was made from" if fed else None])
    # Texts that are equal are also equal when normalised.
    texts, known = ((normalised(row.text) for row in rows) for rows in (examples, known))
    seen = {*stand_in(texts, known), *fed}
    correct = [e.label == y for e, y in zip(examples, predictions, strict=True)]
    clean = [hit for i, hit in enumerate(correct) if i not in seen]
    n, hits = len(clean), int(sum(clean))
    return {
        "train_data": " or ".join(sources),
        "n": n,
        "accuracy": hits / n if n else None,
        "accuracy_interval": list(wilson_interval(hits, n)) if n else None,
    }
