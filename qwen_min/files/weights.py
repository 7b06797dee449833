"""Safetensors into the model, strictly: a tensor that is missing, unexpected or of another shape is
an error. Two things are dropped: an lm_head in a tied checkpoint, which is a copy of the embedding,
and what released files of Qwen3.5 hold beside the text model.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_min.config import Qwen3_5Config, QwenConfig, text_fields
from qwen_min.errors import UserError
from qwen_min.files.disk import new_directory, read_json, read_regular, read_safetensors, write_json
from qwen_min.files.hub import FILES, INDEX, NOT_TEXT, SINGLE, read_index
from qwen_min.model import Qwen

AGAIN, TOKENIZER = "fetch it again", "tokenizer_config.json"
FIT = "take config.json and unquantised weights from one checkpoint"
EMBEDDING, HEAD, CLASSIFIER = "model.embed_tokens.weight", "lm_head.weight", "score.weight"
# Released files of Qwen3.5 have these two in fp32 and all else in bf16: rounding them would change
# how fast a head forgets. They stay in fp32 in every dtype.
FLOAT32 = (".linear_attn.A_log", ".linear_attn.norm.weight")
TEXT = "model.language_model."  # what `model.` is called where a model of images stands beside it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    directory: str | Path,
    dtype: str = "auto",
    device: str = "cpu",
    note: Callable[[str], None] | None = None,
) -> Qwen:
    """Build the model of `directory` in eval mode, all parameters frozen.

    dtype: a name in DTYPES, or "auto": config.json's, else the tensors' own. On the CPU weights of
    that dtype stay mapped from the file: nothing is copied, pages are read when first used. note is
    called with a line that says what is not loaded, if anything is not.
    Raises UserError if config.json or the weights are missing, malformed or do not fit together.
    """
    directory = Path(directory)
    config = QwenConfig.from_json(directory / "config.json")
    tensors = read_tensors(directory, config, note)
    if CLASSIFIER in tensors:
        found = f"holds {CLASSIFIER}: it is a classifier for transformers, not a base"
        raise UserError(f"{directory}: {found}; to use it here, give its run by --run")
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    if config.num_hidden_layers > len(layers):  # before anything of that size is built
        found = f"num_hidden_layers is {config.num_hidden_layers}, the weights have {len(layers)}"
        raise UserError(f"{directory / 'config.json'}: {found}; {FIT}")
    with torch.device("meta"):  # shapes without memory: every tensor comes from the file
        model = Qwen(config)
    head = tensors.pop(HEAD, None) if config.tie_word_embeddings else None
    _check(tensors, model.state_dict(), directory)
    own, *others = {t.dtype for name, t in tensors.items() if not name.endswith(FLOAT32)}
    own = torch.float32 if others else own
    wanted = DTYPES.get(config.torch_dtype, own) if dtype == "auto" else DTYPES[dtype]
    # As in the reference: some tied checkpoints store the head as well, but another one counts.
    if head is not None and not torch.equal(head.to(wanted), tensors[EMBEDDING].to(wanted)):
        problem = f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}"
        advice = "if a head was trained or merged, make it false in config.json"
        raise UserError(f"{directory}: {problem}; {advice}")
    weights = {
        name: tensor.to(device, torch.float32 if name.endswith(FLOAT32) else wanted)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def read_tensors(
    directory: Path, config: QwenConfig | None = None, note: Callable[[str], None] | None = None
) -> dict[str, Tensor]:
    """All tensors of model.safetensors or, if it is missing, of the index's shards; mapped.

    The index must name exactly the tensors of each shard. With the config of a Qwen3.5, only the
    tensors of its text model, under the names of a text-only checkpoint: note is told how many
    others there are, and a shard of nothing else is not opened.
    """
    not_text = NOT_TEXT if isinstance(config, Qwen3_5Config) else ()
    index, weight_map = directory / INDEX, {}
    if index.exists() and not (directory / SINGLE).is_file():
        weight_map = read_index(index)
    tensors: dict[str, Tensor] = {}
    shards = {file for name, file in weight_map.items() if not name.startswith(not_text)}
    for file in sorted(shards) or [SINGLE]:
        path = directory / file
        if not path.exists():
            raise UserError(f"{path}: no such file; expected {SINGLE}, or {INDEX} and its shards")
        part, _ = read_safetensors(path, "a whole safetensors file", AGAIN)
        listed = {name for name, shard in weight_map.items() if shard == file}
        if weight_map and (odd := listed ^ part.keys()):
            problem = f"{min(odd)!r} is in {file} or listed for it, but not both"
            raise UserError(f"{index}: {problem}; {AGAIN}")
        tensors |= part
    dropped = {name for name in weight_map.keys() | tensors if name.startswith(not_text)}
    if dropped and note:
        found = f"{len(dropped)} tensors for images and for guessing several tokens ahead"
        note(f"note: {directory}: {found} are not loaded ({'*, '.join(not_text)}*)")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    for name in [name for name in tensors if not_text and name.startswith(TEXT)]:
        if (short := name.replace(TEXT, "model.", 1)) not in tensors:
            tensors[short] = tensors.pop(name)
    return tensors


def _check(tensors: dict[str, Tensor], expected: dict[str, Tensor], directory: Path) -> None:
    both = tensors.keys() & expected.keys()
    problems = {
        "missing": expected.keys() - tensors.keys(),
        "unknown to this architecture": tensors.keys() - expected.keys(),
        "of the wrong shape": [n for n in both if tensors[n].shape != expected[n].shape],
        f"not {', '.join(DTYPES)}": [n for n in both if tensors[n].dtype not in DTYPES.values()],
    }
    found = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    for problem, names in problems.items():
        if names:
            name = min(names)
            first = f"first {name!r}: found {found.get(name)}, expected {shapes.get(name)}"
            raise UserError(f"{directory}: {len(names)} tensor(s) {problem} ({first}); {FIT}")


def save_model(
    model: Qwen, source: Path, out: str | Path, changes: Mapping = {}, head: Tensor | None = None
) -> None:
    """Write `model` as a checkpoint; what else the directory `source` has is copied.

    changes: by name of a JSON file, the fields to set in it. head: the weight (C, D) of a
    classifier, which takes the LM head's place. `out` must not exist; it appears complete or not at
    all. Raises UserError if it cannot be written.
    """
    out = Path(out)
    with new_directory(out, "name another, or make room") as directory:
        found = (source.glob(name) if "*" in name else [source / name] for name in FILES)
        for path in filter(os.path.lexists, chain.from_iterable(found)):
            copy = directory / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(read_regular(path, "a file of a checkpoint", AGAIN))
        dtype = str(model.dtype).removeprefix("torch.")
        # The older name and the newer one.
        config = {"torch_dtype": dtype, "dtype": dtype} | changes.get("config.json", {})
        if isinstance(model.config, Qwen3_5Config):
            # Released files name Qwen2's class, which splits words at accents. transformers knows
            # better where there is a model of images, but not in a text-only checkpoint.
            kind = {"tokenizer_class": "Qwen3_5Tokenizer"}
            changes = changes | {TOKENIZER: changes.get(TOKENIZER, {}) | kind}
        for name, fields in (changes | {"config.json": config}).items():
            path = directory / name
            found = read_json(path, "a file of a checkpoint", AGAIN) if path.exists() else {}
            write_json(path, text_fields(found) | fields)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if head is not None:
            tensors.pop(HEAD, None)
            tensors[CLASSIFIER] = head
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One SHA-256 over every tensor's name, dtype, shape and bytes, independent of their order."""

    def line(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return f"{name} {digest.hexdigest()}\n"

    with ThreadPoolExecutor() as pool:  # hashlib lets threads run while it hashes
        lines = sorted(pool.map(line, tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def checkpoint_fingerprint(directory: str | Path) -> str:
    """One SHA-256 that identifies a checkpoint, whatever dtype it is loaded in: over its tensors as
    stored, and the fields of config.json that the forward pass depends on."""
    config = QwenConfig.from_json(Path(directory) / "config.json")
    tensors = read_tensors(Path(directory), config)
    fields = asdict(config)
    for field in ("torch_dtype", "max_position_embeddings"):
        del fields[field]
    whole = f"{sorted(fields.items())} {fingerprint(tensors.items())}"
    return hashlib.sha256(whole.encode()).hexdigest()
