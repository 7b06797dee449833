"""What a linear probe keeps on disk: its head, and the features that it was solved on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from qwen_min.errors import UserError
from qwen_min.files import disk
from qwen_min.files.weights import fingerprint
from qwen_min.head import POOLINGS, LinearHead
from qwen_min.prompt import Prompt

CACHE_ROWS = 256  # rows in one file of cached features: the most that a killed run can lose


def save_head(path: Path, head: LinearHead) -> None:
    """Write a head; layer and pooling are in the file's metadata, as JSON under one key.

    (Several keys would be written in changing order: equal heads would give unequal files.)
    """
    parts = {"weight": head.weight, "bias": head.bias}
    tensors = {name: part.cpu().contiguous() for name, part in parts.items() if part is not None}
    metadata = json.dumps({"layer": head.layer, "pooling": head.pooling})
    disk.write_atomically(path, save(tensors, {"head": metadata}))


def load_head(path: Path) -> LinearHead:
    """Read what `save_head` wrote. Raises UserError for anything else."""
    kind, advice = "a head that train.py wrote", "train again"
    mapped, metadata = disk.read_safetensors(path, kind, advice)
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    with disk.refuse_malformed(path, kind, advice):
        head = LinearHead(tensors["weight"], tensors.get("bias"), **json.loads(metadata["head"]))
        whole = head.weight.ndim == 2 and head.weight.dtype == torch.float32
        shapes = {"weight": head.weight.shape, "bias": head.weight.shape[:1]}
        whole &= all(tensor.shape == shapes.get(name) for name, tensor in tensors.items())
        whole &= all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        if not whole or type(head.layer) is not int or head.pooling not in POOLINGS:
            raise ValueError(f"tensors {sorted(tensors)}, {metadata}")
    return head


def cached_features(
    directory: Path,
    setting: str,
    prompts: Sequence[Prompt],
    compute: Callable[[Sequence[Prompt]], Tensor],
    progress: Callable[[int], object] = lambda tokens: None,
    agree: Callable[[Tensor | None], Tensor | None] = lambda part: part,
    keep: bool = True,
) -> Tensor:
    """compute(prompts) (n, S, D), kept in `directory` by files of CACHE_ROWS rows.

    A file is named by the hash of `setting` (weights, dtype, pooling, layers) and of the prompts'
    ids, which follow from tokenizer, template, truncation and texts. It has a hash of its features:
    those of a file that was changed, or has no hash, are computed again. `progress` is called with
    the tokens of the rows that were there already. Raises UserError if nothing can be kept.

    Of several processes, agree gives all what the first has kept, so that all compute the same
    rows, and keep is False for the others.
    """
    with disk.one_line_error(directory, "name a directory for features by --feature-cache"):
        directory.mkdir(parents=True, exist_ok=True)
    parts, how = [], ("kept features", "compute them again")
    for start in range(0, len(prompts), CACHE_ROWS):
        chunk = prompts[start : start + CACHE_ROWS]
        key = hashlib.sha256(f"{setting} {[prompt.ids for prompt in chunk]}".encode()).hexdigest()
        path = directory / f"{key}.safetensors"
        try:
            with disk.refuse_malformed(path, *how):
                tensors, metadata = disk.read_safetensors(path, *how)
                part = tensors["features"]
                if len(part) != len(chunk) or metadata["hash"] != fingerprint([(key, part)]):
                    raise ValueError("they were changed")
        except UserError:  # absent, or damaged
            part = None
        if (part := agree(part)) is not None:
            progress(sum(len(prompt.ids) for prompt in chunk))
        else:
            part = compute(chunk)
            metadata = {"hash": fingerprint([(key, part)])}
            if keep:
                disk.write_atomically(path, save({"features": part}, metadata))
        parts.append(part)
    return torch.cat(parts)
