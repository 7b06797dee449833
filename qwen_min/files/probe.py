"""What a linear probe keeps on disk: its head, and the features that it was solved on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from qwen_min.errors import UserError
from qwen_min.files.run import write_atomically
from qwen_min.head import POOLINGS, LinearHead
from qwen_min.prompt import Prompt

CACHE_ROWS = 256  # rows in one file of cached features: the most that a killed run can lose


def save_head(path: Path, head: LinearHead) -> None:
    """Write a head; layer and pooling are in the file's metadata, as JSON under one key.

    (Several keys would be written in changing order: equal heads would give unequal files.)
    """
    tensors = {"weight": head.weight.cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.cpu().contiguous()
    metadata = json.dumps({"layer": head.layer, "pooling": head.pooling})
    write_atomically(path, save(tensors, {"head": metadata}))


def load_head(path: Path) -> LinearHead:
    """Read what `save_head` wrote. Raises UserError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in names}
        weight, bias = tensors.pop("weight"), tensors.pop("bias", None)
        head = LinearHead(weight, bias, **json.loads(metadata["head"]))
        whole = (
            weight.ndim == 2
            and weight.dtype == torch.float32
            and (bias is None or bias.shape == weight.shape[:1])
        )
        if tensors or not whole or type(head.layer) is not int or head.pooling not in POOLINGS:
            raise ValueError(f"tensors {sorted(names)}, {metadata}")
        return head
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a head that train.py wrote ({reason}); train again") from None


def cached_features(
    directory: Path,
    setting: str,
    prompts: Sequence[Prompt],
    compute: Callable[[Sequence[Prompt]], Tensor],
    progress: Callable[[int], object] = lambda rows: None,
) -> Tensor:
    """compute(prompts) (n, S, D), kept in `directory` by files of CACHE_ROWS rows.

    A file is named by the hash of `setting` (weights, dtype, pooling, layers) and of the prompts'
    ids, which follow from tokenizer, template, truncation and texts. `progress` is called with the
    number of rows that were there already. Raises UserError if a feature is not finite, or if
    nothing can be kept.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory}: {error.strerror}; name a directory for features by --feature-cache"
        ) from None
    parts = []
    for start in range(0, len(prompts), CACHE_ROWS):
        chunk = prompts[start : start + CACHE_ROWS]
        key = hashlib.sha256(f"{setting} {[prompt.ids for prompt in chunk]}".encode()).hexdigest()
        path = directory / f"{key}.safetensors"
        try:
            part = load(path.read_bytes())["features"]
            progress(len(chunk))
        except (OSError, SafetensorError, KeyError):  # absent, or damaged
            part = compute(chunk)
            if not part.isfinite().all():
                raise UserError(
                    "a hidden state is not finite; fetch the weights again, or try --dtype float32"
                ) from None
            write_atomically(path, save({"features": part}))
        parts.append(part)
    return torch.cat(parts)
