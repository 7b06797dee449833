"""Safetensors into the model, strictly: a tensor missing, left over or misshapen is an error."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen_min.config import QwenConfig
from qwen_min.errors import UserError
from qwen_min.model import Qwen

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a merged checkpoint takes over from its base; the last says what that was made from.
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "fed.safetensors")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(directory: str | Path, dtype: str = "auto", device: str = "cpu") -> Qwen:
    """Build the model of `directory` in eval mode, all parameters frozen.

    dtype: "auto" (the checkpoint's own) or a name in DTYPES. On the CPU and in the checkpoint's own
    dtype the weights stay mapped from the file: nothing is copied, pages are read when first used.
    Raises UserError for anything in the directory that does not fit together.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; --model expects a model directory")
    config = QwenConfig.from_json(directory / "config.json")
    with torch.device("meta"):  # shapes without memory: every tensor comes from the file
        model = Qwen(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    tensors = read_tensors(directory)
    if config.tie_word_embeddings:
        # Some tied checkpoints list the head as well; the embedding is the one that counts.
        tensors.pop("lm_head.weight", None)
    _check_names_and_shapes(tensors, shapes, directory)
    wanted = checkpoint_dtype(config, tensors) if dtype == "auto" else DTYPES[dtype]
    model.load_state_dict(
        {name: tensor.to(device=device, dtype=wanted) for name, tensor in tensors.items()},
        assign=True,
    )
    return model.requires_grad_(False).eval()


def checkpoint_dtype(config: QwenConfig, tensors: dict[str, Tensor]) -> torch.dtype:
    """The dtype that the checkpoint was saved in: its tensors' if they agree, else config's."""
    found = {tensor.dtype for tensor in tensors.values()}
    return found.pop() if len(found) == 1 else DTYPES.get(config.torch_dtype, torch.float32)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or, without it, of the shards in the index; mapped."""
    if (directory / SINGLE).is_file() or not (directory / INDEX).exists():
        return _read_file(directory / SINGLE)
    weight_map = _read_index(directory / INDEX)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in _read_file(directory / shard).items():
            if name in tensors or weight_map.get(name, shard) != shard:
                raise UserError(
                    f"{directory / INDEX}: {name!r} is in {shard}, where the index does not have "
                    "it, or in two shards; fetch the checkpoint again"
                )
            tensors[name] = tensor
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise UserError(
            f"{directory / INDEX}: {_some(absent)} not in the shard that it names; fetch it again"
        )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: no usable weight_map ({type(error).__name__}: {error}); fetch it again"
        ) from None
    for shard in shards:
        # An index comes from outside: it may name files beside itself, nothing else.
        if not (isinstance(shard, str) and re.fullmatch(r"[\w.-]+\.safetensors", shard)):
            raise UserError(f"{path}: shard {shard!r} is not a plain file name (NAME.safetensors)")
    return weight_map


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {SINGLE}, or {INDEX} and its shards")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a whole safetensors file ({reason}); fetch it again"
        ) from None


def _check_names_and_shapes(
    tensors: dict[str, Tensor], shapes: dict[str, torch.Size], directory: Path
) -> None:
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(
            f"{directory}: the weights lack {_some(missing)} that config.json calls for"
        )
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise UserError(
            f"{directory}: the weights hold {_some(extra)} unknown to this architecture"
        )
    if wrong := sorted(name for name in shapes if tensors[name].shape != shapes[name]):
        name = wrong[0]
        raise UserError(
            f"{directory}: {len(wrong)} tensor(s) of the wrong shape: {name} is "
            f"{list(tensors[name].shape)}, config.json makes it {list(shapes[name])}"
        )
    if odd := sorted(name for name in tensors if tensors[name].dtype not in DTYPES.values()):
        raise UserError(
            f"{directory}: {_some(odd)} of dtype {tensors[odd[0]].dtype}, expected one of "
            f"{', '.join(DTYPES)}; use unquantised weights"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
    return f"{len(names)} tensor(s) ({shown})"


def save_model(model: Qwen, source: str | Path, out: str | Path) -> None:
    """Write `model` as a plain checkpoint, with config and tokenizer copied from `source`.

    `out` must not exist; it appears whole. Raises UserError where it cannot be written.
    """
    source, out = Path(source), Path(out)
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        if out.exists():
            raise FileExistsError(17, "it exists already")
        aside.mkdir(parents=True)
        for name in COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, aside / name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["torch_dtype"] = str(model.lm_head_weight.dtype).removeprefix("torch.")
        config.pop("dtype", None)
        (aside / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, aside / SINGLE, metadata={"format": "pt"})
        os.replace(aside, out)
    except (OSError, SafetensorError) as error:  # a full disk is either, by who notices it
        shutil.rmtree(aside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{out}: cannot be written ({reason}); name another") from None


def tensor_hashes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """SHA-256 of each tensor: dtype, shape and bytes. Equal hashes: the tensor is untouched."""
    hashes = {}
    for name, tensor in tensors:
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        hashes[name] = digest.hexdigest()
    return hashes


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One SHA-256 over the names and hashes of tensors, in any order: which weights are these?"""
    hashes = sorted(tensor_hashes(tensors).items())
    lines = [f"{name} {digest}\n" for name, digest in hashes]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def checkpoint_fingerprint(directory: str | Path) -> str:
    """A checkpoint's fingerprint: its tensors as they are in the files, whatever dtype runs, and
    those fields of config.json that the forward pass depends on."""
    config = asdict(QwenConfig.from_json(Path(directory) / "config.json"))
    for field in ("torch_dtype", "max_position_embeddings"):
        del config[field]
    whole = f"{sorted(config.items())} {fingerprint(read_tensors(Path(directory)).items())}"
    return hashlib.sha256(whole.encode()).hexdigest()
