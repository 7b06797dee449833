"""Find the evaluated texts that are also in training data.

A trained method may have memorised such a text. "Normalised" texts are compared without
punctuation, white space and differences in character width.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from unicodedata import category, normalize

import numpy as np

from qwen_min.errors import UserError
from qwen_min.files.data import Example, examples_hash, read_examples
from qwen_min.files.disk import read_safetensors, refuse_malformed
from qwen_min.files.record import read_whole_run
from qwen_min.metrics import wilson_interval

Training = list[tuple[str, list[Example]]]  # names of files, and their examples
READ_BY = ("labels", "encoding", "limit", "read_as", "text_column", "label_column")
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


def training_files(record: dict) -> list[dict]:
    """What is known of the files whose rows a run has seen: its data, its --dev, whose rows chose
    the step or the penalty, and those of the run that its --adapter came from."""
    own = record["arguments"]
    how = {"encoding": own["encoding"], "labels": record["labels"]}
    how["read_as"] = record.get("labels_read_as")  # older runs lack what is read by `get`
    how |= {name: own.get(name) for name in ("text_column", "label_column")}
    files = [{"path": own["data"], "limit": own["limit"], "hash": record["data_hash"], **how}]
    if own.get("dev"):
        files.append({"path": own["dev"], "limit": None, "hash": record.get("dev_hash"), **how})
    return files + (record.get("adapter_files") or [])


def adapter_files(adapter: str | None) -> list[dict]:
    """`training_files` of the run that an adapter lies in. Where it lies in none, stderr gets a
    note: the texts that it was trained on are not known."""
    if adapter is None or not os.path.isdir(adapter):
        return []
    try:
        return training_files(read_whole_run(Path(os.path.realpath(adapter)).parent))
    except UserError:
        print(f"note: {adapter} is in no run: texts that it has seen count as new", file=sys.stderr)
        return []


def training_examples(
    args: argparse.Namespace, labels: Sequence[str], record: dict | None, read_as: str | None = None
) -> Training:
    """What was trained on: the names of files, and the examples of each.

    args: --train-data stands for the data of `record`, the run.json of the evaluated run, or of the
    run of --adapter. If a file of the run is missing or has changed, stderr gets a note; without
    --train-data the result is then empty. read_as: what the labels of the evaluated data are read
    as.
    """
    files, found = training_files(record) if record else adapter_files(args.adapter), []
    if (file := args.train_data) is not None:
        how = (args.encoding, None, read_as, args.text_column, args.label_column, True)
        files, found = files[1:], [(file, read_examples(file, labels, *how))]
    for known in files:
        try:
            path, how = known["path"], [known.get(name) for name in READ_BY]
            examples = read_examples(path, *how)
            if examples_hash(examples) != known["hash"]:
                raise UserError(f"{path}: has changed since the run was trained on it")
            found.append((path, examples))
        except UserError as error:
            if file is not None:
                print(f"note: its texts count as new: {error}", file=sys.stderr)
                continue
            skipped = "accuracy on texts outside the training data is not computed"
            print(f"note: {skipped}: {error} (or give --train-data FILE)", file=sys.stderr)
            return []
    return found


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
    sources = [*dict(training), *["what the model itself was made from"] * bool(fed)]
    # Texts that are equal are also equal when normalised.
    known = chain.from_iterable(rows for _, rows in training)
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
