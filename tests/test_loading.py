"""Safetensors into the model: strictly, unchanged, and every malformed file in one line."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_reference, with_images
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5Tokenizer

from qwen_min.errors import UserError
from qwen_min.files import disk
from qwen_min.files import weights as loading
from qwen_min.files.weights import (
    INDEX,
    SINGLE,
    checkpoint_fingerprint,
    fingerprint,
    load_model,
    read_tensors,
    save_model,
)

IDS = torch.arange(7, 71)[None]  # (1, 64)
NORM = "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ONE, TWO = torch.ones(2), torch.full((3,), 2.0)


def refused(read: Callable, directory: Path, *words: object) -> None:
    """`read(directory)` raises one line that holds every one of `words`."""
    with pytest.raises(UserError) as caught:
        read(directory)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert str(word) in message


def logits(directory: Path) -> Tensor:
    model = load_model(directory)
    return model.logits(model(IDS))


@pytest.fixture(scope="module")
def tied(reference) -> tuple[dict, dict[str, Tensor]]:
    """A tied Qwen2: its config and its tensors, for tests to change and write out."""
    directory, _ = reference
    return json.loads((directory / "config.json").read_text()), load_file(directory / SINGLE)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """An untied Qwen2 in several shards: its directory and the reference model."""
    directory = tmp_path_factory.mktemp("untied")
    return directory, make_reference(directory, tied=False, shard="30KB")


def write(directory: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / SINGLE)
    return directory


def write_shards(directory: Path, shards: list[dict[str, Tensor]], **changes) -> Path:
    """Shards a, b, … and their index; changes: entries of the weight_map."""
    weight_map = {}
    for letter, tensors in zip("abc", shards, strict=False):
        save_file(tensors, directory / f"{letter}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{letter}.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | changes}))
    return directory


# ---- what is loaded ------------------------------------------------------------------------------


def test_every_tensor_is_the_files(reference):
    directory, model = reference
    loaded = load_model(directory).state_dict()
    expected = model.state_dict()
    expected.pop(HEAD)  # transformers lists the embedding a second time under this name
    assert loaded.keys() == expected.keys()
    for name in expected:
        assert torch.equal(loaded[name], expected[name]), name


def test_frozen_and_in_eval_mode(untied):
    model = load_model(untied[0])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_tied_head_is_the_embedding(reference):
    directory, model = reference
    loaded = load_model(directory)
    assert not hasattr(loaded, "lm_head")
    assert loaded.lm_head_weight is loaded.model.embed_tokens.weight
    # Logits lie between -10 and 10; fp32 sums in another order differ by a few 1e-6.
    assert (logits(directory) - model(IDS).logits).abs().max() < 5e-5


@pytest.mark.parametrize("shards", [False, True])
def test_a_copy_of_the_embedding_as_head_changes_nothing(tmp_path, reference, tied, shards):
    config, tensors = tied
    head = {HEAD: tensors[EMBEDDING].clone()}
    if shards:
        (tmp_path / "config.json").write_text(json.dumps(config))
        write_shards(tmp_path, [tensors, head])
    else:
        write(tmp_path, config, tensors | head)
    assert torch.equal(logits(tmp_path), logits(reference[0]))


@pytest.mark.parametrize("shards", [False, True])
def test_another_head_in_a_tied_checkpoint_is_refused(tmp_path, tied, shards):
    """The reference uses such a head: it was trained, and config.json still says tied."""
    config, tensors = tied
    head = tensors[EMBEDDING].clone()
    head.view(-1)[-1] += 1
    if shards:
        (tmp_path / "config.json").write_text(json.dumps(config))
        write_shards(tmp_path, [tensors, {HEAD: head}])
    else:
        write(tmp_path, config, tensors | {HEAD: head})
    refused(load_model, tmp_path, tmp_path, HEAD, "differs", "tie_word_embeddings", "config.json")
    # What the line advises gives the reference's numbers of the file as it was.
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert (logits(tmp_path) - expected).abs().max() < 5e-5  # as above
    assert not torch.equal(load_model(tmp_path).lm_head_weight, tensors[EMBEDDING])


def test_a_tied_head_is_compared_in_the_dtype_that_is_computed_in(tmp_path, tied):
    config, tensors = tied
    head = tensors[EMBEDDING].bfloat16()
    write(tmp_path, config, tensors | {HEAD: head})
    refused(load_model, tmp_path, HEAD, "differs")
    assert load_model(tmp_path, dtype="bfloat16").lm_head_weight.dtype == torch.bfloat16
    write(tmp_path, config, tensors | {HEAD: head[:-1]})
    refused(load_model, tmp_path, HEAD, "differs")


def test_untied_head_is_its_own(untied):
    directory, model = untied
    loaded = load_model(directory)
    assert torch.equal(loaded.lm_head_weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head_weight, loaded.model.embed_tokens.weight)
    # As above: fp32 sums in another order.
    assert (logits(directory) - model(IDS).logits).abs().max() < 5e-5


def test_untied_without_head_is_refused(tmp_path, tied):
    config, tensors = tied
    write(tmp_path, config | {"tie_word_embeddings": False}, tensors)
    refused(load_model, tmp_path, tmp_path, "1 tensor", "missing", HEAD)
    # The field's default is untied.
    bare = {key: config[key] for key in config.keys() - {"tie_word_embeddings"}}
    write(tmp_path, bare, tensors)
    refused(load_model, tmp_path, HEAD)


def test_shards_equal_the_single_file(tmp_path, untied):
    directory, model = untied
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    config = json.loads((directory / "config.json").read_text())
    write(tmp_path, config, {k: v.contiguous() for k, v in model.state_dict().items()})
    single, sharded = load_model(tmp_path), load_model(directory)
    assert fingerprint(single.state_dict().items()) == fingerprint(sharded.state_dict().items())
    assert checkpoint_fingerprint(tmp_path) == checkpoint_fingerprint(directory)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_conversion(reference, untied, dtype):
    for directory, model in (reference, untied):  # a single file; shards
        expected = model.state_dict()
        for name, tensor in load_model(directory, dtype=dtype).state_dict().items():
            assert torch.equal(tensor, expected[name].to(getattr(torch, dtype))), name


def test_dtype_auto(tmp_path, tied):
    config, tensors = tied
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}

    def dtypes(config: dict, tensors: dict[str, Tensor], **arguments) -> set[torch.dtype]:
        model = load_model(write(tmp_path, config, tensors), **arguments)
        return {parameter.dtype for parameter in model.parameters()}

    bare = {key: config[key] for key in config.keys() - {"dtype", "torch_dtype"}}
    assert dtypes(bare, tensors) == {torch.float32}
    assert dtypes(bare, half) == {torch.bfloat16}
    # As in the reference: what config.json says goes before what the tensors are.
    assert dtypes(bare | {"dtype": "float32"}, half) == {torch.float32}
    assert dtypes(bare | {"torch_dtype": "bfloat16"}, tensors) == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert dtypes(bare | {"dtype": "float32"}, half, dtype="bfloat16") == {torch.bfloat16}
    # Tensors that differ: config.json decides, in either style, and without it nothing is lost.
    mixed = half | {NORM: tensors[NORM]}
    assert dtypes(bare | {"dtype": "bfloat16"}, mixed) == {torch.bfloat16}
    assert dtypes(bare | {"torch_dtype": "bfloat16"}, mixed) == {torch.bfloat16}
    assert dtypes(bare, mixed) == {torch.float32}


def test_the_single_file_goes_before_an_index(tmp_path, tied):
    """As in the reference: an index beside a whole file is left over."""
    config, tensors = tied
    write_shards(tmp_path, [{NORM: tensors[NORM] + 1}])
    write(tmp_path, config, tensors)
    assert torch.equal(load_model(tmp_path).model.norm.weight, tensors[NORM])


def test_links_are_followed(tmp_path, untied):
    """The hub's cache consists of links into another directory."""
    for path in untied[0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert torch.equal(logits(tmp_path), logits(untied[0]))
    assert checkpoint_fingerprint(tmp_path) == checkpoint_fingerprint(untied[0])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_nothing_is_written_beside_the_weights(reference, untied, dtype):
    for directory, _ in (reference, untied):

        def state(directory: Path = directory) -> dict:
            stats = {path.name: path.stat() for path in directory.iterdir()}
            stats["."] = directory.stat()
            return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

        before = state()
        model = load_model(directory, dtype=dtype)
        model.logits(model(IDS))
        assert state() == before


# ---- strictness ----------------------------------------------------------------------------------


def test_missing_tensors(tmp_path, tied):
    config, tensors = tied
    biases = sorted(name for name in tensors if name.endswith("bias"))
    assert len(biases) == 9
    one = {name: tensor for name, tensor in tensors.items() if name != biases[0]}
    refused(load_model, write(tmp_path, config, one), tmp_path, "1 tensor", "missing", biases[0])
    none = {name: tensor for name, tensor in tensors.items() if name not in biases}
    refused(load_model, write(tmp_path, config, none), tmp_path, "9 tensor", "missing", biases[0])


def test_left_over_tensors(tmp_path, tied):
    config, tensors = tied
    extra = "model.layers.0.self_attn.q_norm.weight"  # a Qwen3's
    write(tmp_path, config, tensors | {extra: torch.ones(8)})
    refused(load_model, tmp_path, tmp_path, "1 tensor", "unknown", extra)
    write(tmp_path, config | {"num_hidden_layers": 2, "layer_types": None}, tensors)
    refused(load_model, tmp_path, tmp_path, "12 tensor", "unknown", "model.layers.2.")


def test_misshapen_tensors(tmp_path, tied):
    config, tensors = tied
    write(tmp_path, config, tensors | {NORM: torch.ones(31)})
    refused(load_model, tmp_path, tmp_path, "1 tensor", NORM, "[31]", "[32]")
    # As many numbers, in another shape.
    down = "model.layers.1.mlp.down_proj.weight"
    write(tmp_path, config, tensors | {down: tensors[down].T.contiguous()})
    refused(load_model, tmp_path, tmp_path, "1 tensor", down, "[48, 32]", "[32, 48]")
    write(tmp_path, config | {"intermediate_size": 64}, tensors)
    refused(load_model, tmp_path, tmp_path, "9 tensor", "mlp.down_proj", "[32, 48]", "[32, 64]")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_whole_numbers_and_quantised_ones_are_no_weights(tmp_path, tied, dtype):
    config, tensors = tied
    write(tmp_path, config, tensors | {NORM: torch.ones(32).to(dtype)})
    refused(load_model, tmp_path, tmp_path, "1 tensor", NORM, "float32, bfloat16")


@pytest.mark.parametrize("layers", [4, 10**6, 2**31 - 1])
def test_more_layers_than_the_weights_have(tmp_path, tied, layers):
    """Refused before anything is built: ten million layers of no memory take minutes."""
    config, tensors = tied
    write(tmp_path, config | {"num_hidden_layers": layers, "layer_types": None}, tensors)
    started = time.perf_counter()
    refused(load_model, tmp_path, tmp_path / "config.json", layers, "the weights have 3")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "vocab_size", "head_dim"])
def test_other_sizes_than_the_weights_have(tmp_path, tied, field):
    config, tensors = tied
    write(tmp_path, config | {field: 2**20}, tensors)
    started = time.perf_counter()
    refused(load_model, tmp_path, tmp_path, "of the wrong shape")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("name", [SINGLE, INDEX, "a.safetensors"])
def test_pipes_and_devices(tmp_path, tied, name):
    (tmp_path / "config.json").write_text(json.dumps(tied[0]))
    if name == "a.safetensors":
        (tmp_path / INDEX).write_text('{"weight_map": {"a": "a.safetensors"}}')
    os.mkfifo(tmp_path / name)
    refused(load_model, tmp_path, tmp_path / name, "not a regular file")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    refused(load_model, tmp_path, tmp_path / name, "not a regular file")


def test_directory(tmp_path, tied):
    refused(load_model, tmp_path / "absent", tmp_path / "absent", "no such file; expected")
    refused(load_model, tmp_path, tmp_path / "config.json", "no such file")
    (tmp_path / "config.json").write_text(json.dumps(tied[0]))
    refused(load_model, tmp_path, tmp_path / SINGLE, "no such file", INDEX)
    refused(load_model, tmp_path / "config.json", tmp_path / "config.json", "no such file")
    (tmp_path / SINGLE).symlink_to(tmp_path / "gone")
    refused(load_model, tmp_path, tmp_path / SINGLE, "no such file")


# ---- malformed safetensors, byte by byte ---------------------------------------------------------
# The format: the header's length (8 bytes, little-endian), the header (JSON: for each tensor dtype,
# shape and the first and last byte of its data), the data.

DATA = struct.pack("<6f", 1, 2, 3, 4, 5, 6)
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 24]}


def stored(header: object, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


WHOLE = stored({"a": A, "b": B})
MALFORMED = {
    "empty file": b"",
    "7 bytes": WHOLE[:7],
    "no header": struct.pack("<Q", 0),
    "header length past the end": struct.pack("<Q", len(WHOLE) - 7) + WHOLE[8:],
    "header length of 2^64 - 1": b"\xff" * 8 + WHOLE[8:],
    "not UTF-8": stored(json.dumps({"a": A, "b": B}).encode().replace(b'"a"', b'"\xff"')),
    "not JSON": stored(b"{" + b" " * 20),
    "JSON, but a list": stored([A, B]),
    "a web page": b"<!DOCTYPE html><html><head><title>Not Found</title></head></html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 24\n",
    "unknown dtype": stored({"a": A | {"dtype": "F31"}, "b": B}),
    "a field missing": stored({"a": A, "b": {"dtype": "F32", "shape": [2, 2]}}),
    "negative size": stored({"a": A, "b": B | {"shape": [-2, -2]}}),
    "hole at the start": stored({"b": B}),
    "hole between": stored({"a": A, "b": B | {"data_offsets": [12, 28]}}, DATA + DATA[:4]),
    "overlap": stored({"a": A, "b": B | {"data_offsets": [4, 20]}}, DATA[:20]),
    "the same bytes twice": stored({"a": A, "b": A}, DATA[:8]),
    "offsets reversed": stored({"a": A, "b": B | {"data_offsets": [24, 8]}}),
    "shape too small for its bytes": stored({"a": A, "b": B | {"shape": [2, 1]}}),
    "shape too large for its bytes": stored({"a": A, "b": B | {"shape": [2, 3]}}),
    "dtype too small for its bytes": stored({"a": A, "b": B | {"dtype": "BF16"}}),
    "shape beyond 64 bits": stored({"a": A, "b": B | {"shape": [2**62, 2**62]}}),
    "truncated": WHOLE[:-1],
    "truncated by a tensor": WHOLE[:-16],
    "a trailing byte": WHOLE + b"\0",
}


def test_the_form_that_the_malformed_ones_depart_from(tmp_path):
    (tmp_path / SINGLE).write_bytes(WHOLE)
    tensors = read_tensors(tmp_path)
    assert tensors.keys() == {"a", "b"}
    assert tensors["a"].tolist() == [1, 2]
    assert tensors["b"].tolist() == [[3, 4], [5, 6]]


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_safetensors(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    refused(read_tensors, tmp_path, tmp_path / SINGLE, "safetensors", "fetch it again")
    # The same file as the shard of an index.
    (tmp_path / SINGLE).rename(tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}')
    refused(read_tensors, tmp_path, tmp_path / "a.safetensors", "safetensors", "fetch it again")


def test_unreadable_file(tmp_path, monkeypatch):
    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / SINGLE).write_bytes(WHOLE)
    monkeypatch.setattr(disk, "safe_open", denied)  # root may read every file
    refused(read_tensors, tmp_path, tmp_path / SINGLE, "Permission denied")


def test_header_over_100_mb(tmp_path):
    """Declared and there, as a hole in a sparse file, so that its size alone is what is wrong."""
    size = 100_000_001
    with open(tmp_path / SINGLE, "wb") as file:
        file.write(struct.pack("<Q", size))
        file.truncate(8 + size + len(DATA))
    refused(read_tensors, tmp_path, tmp_path / SINGLE, "large")


def test_truncated_anywhere(tmp_path):
    for length in range(len(WHOLE)):
        (tmp_path / SINGLE).write_bytes(WHOLE[:length])
        refused(read_tensors, tmp_path, tmp_path / SINGLE)


def test_any_byte_of_the_header_may_be_wrong(tmp_path):
    """Either the file still reads, as under another name, or it is one line: no traceback."""
    for position in range(len(WHOLE) - len(DATA)):
        content = bytearray(WHOLE)
        content[position] ^= 1 << position % 8
        (tmp_path / SINGLE).write_bytes(content)
        try:
            tensors = read_tensors(tmp_path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert sorted(tensor.numel() for tensor in tensors.values()) == [2, 4]


def test_names_with_line_breaks_stay_on_one_line(tmp_path, tied):
    config, tensors = tied
    write(tmp_path, config, tensors | {"a\nb": torch.ones(2)})
    refused(load_model, tmp_path, "1 tensor", repr("a\nb"))
    write_shards(tmp_path, [{"a\nb": ONE, "c": TWO}, {"a\nb": ONE}])
    (tmp_path / SINGLE).unlink()
    refused(read_tensors, tmp_path, tmp_path / INDEX, repr("a\nb"))
    write_shards(tmp_path, [{"a": ONE}], b="x\ny.safetensors")
    refused(read_tensors, tmp_path, tmp_path / INDEX, repr("x\ny.safetensors"))


# ---- malformed shard index -----------------------------------------------------------------------


def test_the_index_that_the_malformed_ones_depart_from(tmp_path):
    write_shards(tmp_path, [{"a": ONE}, {"b": TWO}])
    tensors = read_tensors(tmp_path)
    assert tensors.keys() == {"a", "b"}
    assert torch.equal(tensors["a"], ONE) and torch.equal(tensors["b"], TWO)


def test_shards_outside_the_directory(tmp_path):
    """The files are there: what stops them is that an index names nothing but its neighbours."""
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for where in (tmp_path, directory / "sub"):
        save_file({"b": TWO}, where / "b.safetensors")
    outside = ["sub/b.safetensors", "../b.safetensors", str(tmp_path / "b.safetensors")]
    outside += ["./a.safetensors", "sub/../a.safetensors", "..\\b.safetensors", "..", ".", ""]
    outside += ["a.safetensors/", "/etc/passwd", "a.bin", "\0.safetensors"]
    for shard in outside:
        write_shards(directory, [{"a": ONE}], b=shard)
        refused(read_tensors, directory, directory / INDEX, repr(shard), "a plain file name")


@pytest.mark.parametrize("shard", [None, 1, True, ["a.safetensors"], {"a": "a.safetensors"}])
def test_a_shard_that_is_no_string(tmp_path, shard):
    write_shards(tmp_path, [{"a": ONE}], b=shard)
    refused(read_tensors, tmp_path, tmp_path / INDEX)


def test_mapped_tensor_missing(tmp_path):
    write_shards(tmp_path, [{"a": ONE}, {"b": TWO}], c="b.safetensors")
    refused(read_tensors, tmp_path, tmp_path / INDEX, "'c' is in b.safetensors or listed")
    # It is there, but in a shard that the index does not name.
    write_shards(tmp_path, [{"a": ONE}, {"b": TWO}], b="a.safetensors")
    save_file({"b": TWO, "c": ONE}, tmp_path / "b.safetensors")
    refused(read_tensors, tmp_path, tmp_path / INDEX, "'b' is in a.safetensors or listed")


def test_tensor_in_two_shards(tmp_path):
    shards = [{"a": ONE, "c": TWO}, {"a": ONE + 1, "b": TWO}]
    for mapped in ("a.safetensors", "b.safetensors"):
        write_shards(tmp_path, shards, a=mapped)
        refused(read_tensors, tmp_path, tmp_path / INDEX, "'a' is in", "not both")
    # In both files, though the index has it in neither.
    (tmp_path / INDEX).write_text('{"weight_map": {"b": "b.safetensors", "c": "a.safetensors"}}')
    refused(read_tensors, tmp_path, tmp_path / INDEX, "'a' is in a.safetensors", "not both")


def test_tensor_in_another_shard_than_mapped(tmp_path):
    write_shards(tmp_path, [{"a": ONE, "c": TWO}, {"b": TWO}], c="b.safetensors")
    refused(read_tensors, tmp_path, tmp_path / INDEX, "'c' is in a.safetensors")


def test_shard_missing(tmp_path):
    write_shards(tmp_path, [{"a": ONE}, {"b": TWO}])
    (tmp_path / "b.safetensors").unlink()
    refused(read_tensors, tmp_path, tmp_path / "b.safetensors", "no such file")
    (tmp_path / "b.safetensors").mkdir()
    refused(read_tensors, tmp_path, tmp_path / "b.safetensors", "Is a directory")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"\xff": 1}',
        b"[]",
        b'"weight_map"',
        b"null",
        b"{}",
        b'{"weight_map": null}',
        b'{"weight_map": ["a.safetensors"]}',
        b'{"weight_map": "a.safetensors"}',
    ],
)
def test_no_weight_map(tmp_path, content):
    write_shards(tmp_path, [{"a": ONE}])
    (tmp_path / INDEX).write_bytes(content)
    refused(read_tensors, tmp_path, tmp_path / INDEX, "weight_map", "fetch it again")


def test_a_directory_in_the_indexs_place(tmp_path):
    (tmp_path / INDEX).mkdir()
    refused(read_tensors, tmp_path, tmp_path / INDEX)


def test_an_empty_weight_map(tmp_path, tied):
    (tmp_path / "config.json").write_text(json.dumps(tied[0]))
    write_shards(tmp_path, [])
    refused(load_model, tmp_path, tmp_path / INDEX, "weight_map", "fetch it again")


# ---- hashes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.self_attn.k_proj.bias", NORM]
)
def test_one_bit_changes_the_fingerprint(tmp_path, tied, name):
    config, tensors = tied
    changed = tensors[name].clone()
    changed.view(torch.int32).view(-1)[-1] ^= 1  # the last number's last bit
    whole = fingerprint(tensors.items())
    assert fingerprint((tensors | {name: changed}).items()) != whole
    checkpoint = checkpoint_fingerprint(write(tmp_path, config, tensors))
    assert checkpoint_fingerprint(tmp_path) == checkpoint
    write(tmp_path, config, tensors | {name: changed})
    assert checkpoint_fingerprint(tmp_path) != checkpoint


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
def test_the_checkpoints_fingerprint_is_of_its_config_too(tmp_path, tied, field):
    """The same tensors under another theta are another model."""
    config, tensors = tied
    before = checkpoint_fingerprint(write(tmp_path, config, tensors))
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.get("rope_parameters") if field == "rope_theta" else None
    (raw if rope is None else rope)[field] = 1e-3 if field == "rms_norm_eps" else 5e5
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert checkpoint_fingerprint(tmp_path) != before


def test_fingerprint_is_of_names_too_and_of_no_order(tied):
    tensors = tied[1]
    whole = fingerprint(tensors.items())
    assert fingerprint(reversed(tensors.items())) == whole
    # Two norms that change places: the same tensors, another model.
    norms = [f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")]
    swapped = dict(zip(norms, (tensors[name] for name in reversed(norms)), strict=True))
    assert fingerprint((tensors | swapped).items()) != whole
    less = {name: tensor for name, tensor in tensors.items() if name != NORM}
    assert fingerprint(less.items()) != whole
    assert fingerprint((less | {NORM + "s": tensors[NORM]}).items()) != whole


def test_hash_is_of_dtype_shape_and_bytes():
    def digest(tensor: Tensor) -> str:
        return fingerprint([("x", tensor)])

    x = torch.arange(6.0).view(2, 3)
    assert digest(x) == digest(x.clone())
    assert digest(x.T.contiguous().T) == digest(x)  # its layout in memory is no part of it
    others = [x.view(3, 2), x.view(6), x.bfloat16(), x.view(torch.int32), -x, x.T]
    assert len({digest(y) for y in (x, *others)}) == 1 + len(others)
    zero = torch.zeros(1)
    assert digest(zero) != digest(-zero)  # equal as numbers, not as bytes
    nan = torch.full((1,), torch.nan)
    assert digest(nan) == digest(nan.clone())  # the other way round


# ---- saving --------------------------------------------------------------------------------------


def test_saved_model_is_the_same_model(tmp_path, reference, untied):
    for number, (directory, _) in enumerate((reference, untied)):
        model = load_model(directory)
        save_model(model, directory, tmp_path / f"out{number}")
        again = load_model(tmp_path / f"out{number}")
        assert fingerprint(again.state_dict().items()) == fingerprint(model.state_dict().items())
        assert again.config == model.config
        assert torch.equal(again.logits(again(IDS)), model.logits(model(IDS)))
        tokenizer = (directory / "tokenizer.json").read_bytes()
        assert (tmp_path / f"out{number}" / "tokenizer.json").read_bytes() == tokenizer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out0", "out1"]


def test_saved_dtype_is_declared(tmp_path, reference):
    save_model(load_model(reference[0], dtype="bfloat16"), reference[0], tmp_path / "out")
    assert load_model(tmp_path / "out").config.torch_dtype == "bfloat16"
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert reread.dtype == torch.bfloat16


def test_saving_leaves_all_or_nothing(tmp_path, reference, monkeypatch):
    directory, _ = reference
    model = load_model(directory)

    def save(out: Path) -> None:
        save_model(model, directory, out)

    (tmp_path / "there").mkdir()
    refused(save, tmp_path / "there", tmp_path / "there", "exists")
    (tmp_path / "file").touch()
    refused(save, tmp_path / "file" / "out", tmp_path / "file" / "out", "cannot be written")

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(loading, "save_file", full)
    refused(save, tmp_path / "out", tmp_path / "out", "No space left")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


# ---- Qwen3.5: as it is released, with a model of images ------------------------------------------

VISUAL, MTP = "model.visual.blocks.0.norm1.weight", "mtp.norm.weight"


@pytest.fixture(scope="module", params=["tied", "untied"])
def released(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("released")
    make_reference(directory, "qwen3_5", tied=request.param == "tied")
    with_images(directory, tied_outside=request.param == "tied")
    return directory


def copy_of(directory: Path, out: Path, change: Callable[[dict], object]) -> Path:
    """The checkpoint with `change` made to its tensors."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    return write(out, json.loads((directory / "config.json").read_text()), tensors)


def test_the_text_model_of_a_released_checkpoint(released):
    lines = []
    model = load_model(released, note=lines.append)
    stored = load_file(released / SINGLE)
    state = model.state_dict()
    assert {name.replace("model.", "model.language_model.", 1) for name in state} == {
        *stored.keys() - {VISUAL, MTP}
    }
    for name, tensor in state.items():  # in bf16, and two kinds in fp32 to the bit
        assert torch.equal(tensor, stored[name.replace("model.", "model.language_model.", 1)])
        fp32 = name.endswith((".A_log", ".linear_attn.norm.weight"))
        assert tensor.dtype == (torch.float32 if fp32 else torch.bfloat16), name
        assert not fp32 or not torch.equal(tensor, tensor.bfloat16().float())
    (line,) = lines
    assert line.startswith(f"note: {released}: 2 tensors") and "model.visual.*, mtp.*" in line
    assert load_model(released, note=None).config == model.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_two_kinds_of_tensors_are_in_fp32_in_every_dtype(released, dtype):
    model = load_model(released, dtype)
    found = {p.dtype for name, p in model.named_parameters() if name.endswith(loading.FLOAT32)}
    assert found == {torch.float32}
    assert model.lm_head_weight.dtype == model.model.norm.weight.dtype == getattr(torch, dtype)
    with torch.no_grad():
        assert model.logits(model(IDS)).isfinite().all()


def test_the_files_own_dtype_is_not_that_of_the_two(released, tmp_path):
    config = json.loads((released / "config.json").read_text())
    del config["text_config"]["dtype"]
    write(tmp_path, config, load_file(released / SINGLE))
    assert load_model(tmp_path).lm_head_weight.dtype == torch.bfloat16


def test_logits_of_a_released_checkpoint(released, tmp_path):
    model = load_model(released, "float32")
    ours = model.logits(model(IDS))
    reference, info = AutoModelForCausalLM.from_pretrained(
        released, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    # The reference's text model does not see that the head is tied where only the outside says so.
    tied = model.config.tie_word_embeddings
    assert info["missing_keys"] == ({HEAD} if tied else set())
    with torch.no_grad():
        h = reference.model(IDS).last_hidden_state
        head = reference.model.embed_tokens.weight if tied else reference.lm_head.weight
        # Logits of size 3; fp32 sums in another order.
        torch.testing.assert_close(ours, h @ head.T, rtol=0, atol=5e-5)


def test_a_released_checkpoint_and_its_text_have_one_fingerprint(released, tmp_path):
    whole = checkpoint_fingerprint(released)
    save_model(load_model(released), released, tmp_path / "text")
    assert checkpoint_fingerprint(tmp_path / "text") == whole

    def one_bit(name: str) -> Callable[[dict], object]:
        return lambda tensors: tensors[name].view(-1)[:1].add_(1)

    (tmp_path / "visual").mkdir()
    (tmp_path / "layer").mkdir()
    assert checkpoint_fingerprint(copy_of(released, tmp_path / "visual", one_bit(VISUAL))) == whole
    name = "model.language_model.layers.0.linear_attn.A_log"
    assert checkpoint_fingerprint(copy_of(released, tmp_path / "layer", one_bit(name))) != whole


def shards_of(released: Path, directory: Path, **changes) -> Path:
    tensors = load_file(released / SINGLE)
    (directory / "config.json").write_text((released / "config.json").read_text())
    visual = {VISUAL: tensors.pop(VISUAL)}
    names = sorted(tensors)
    text = [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]
    return write_shards(directory, [*text, visual], **changes)


def test_a_shard_without_text_may_be_missing(released, tmp_path):
    """And is not opened. Shards with text stay strict, also in what is dropped from them."""
    shards_of(released, tmp_path)
    (tmp_path / "c.safetensors").write_bytes(b"not opened")
    lines, whole = [], load_model(released)
    found = load_model(tmp_path, note=lines.append)
    assert fingerprint(found.state_dict().items()) == fingerprint(whole.state_dict().items())
    assert "2 tensors" in lines[0]
    assert checkpoint_fingerprint(tmp_path) == checkpoint_fingerprint(released)
    (tmp_path / "c.safetensors").unlink()
    load_model(tmp_path)
    shards_of(released, tmp_path, **{"mtp.other": "a.safetensors"})
    refused(load_model, tmp_path, tmp_path / INDEX, "'mtp.other' is in a.safetensors or listed")
    shards_of(released, tmp_path)
    (tmp_path / "b.safetensors").unlink()
    refused(load_model, tmp_path, tmp_path / "b.safetensors", "no such file")


def test_what_else_a_released_checkpoint_may_not_have(released, tmp_path):
    def changed(change: Callable[[dict], object]) -> Path:
        return copy_of(released, tmp_path, change)

    name = "model.language_model.layers.0.linear_attn.A_log"
    short = name.replace("language_model.", "")
    two = changed(lambda tensors: tensors.update({short: tensors[name].clone()}))
    refused(load_model, two, "1 tensor(s) unknown to this architecture", repr(name))
    refused(load_model, changed(lambda tensors: tensors.pop(name)), "1 tensor(s) missing", short)
    for other in ("visual.norm.weight", "model.visual_norm", "model.mtp.norm.weight"):
        more = changed(lambda tensors, other=other: tensors.update({other: ONE}))
        refused(load_model, more, "unknown to this architecture", repr(other))
    whole = changed(lambda tensors: None)
    config = json.loads((whole / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 5, "layer_types": None}
    (whole / "config.json").write_text(json.dumps(config))
    refused(load_model, whole, "num_hidden_layers is 5, the weights have 4")


def test_other_architectures_have_no_tensors_for_images(tmp_path, tied):
    config, tensors = tied
    refused(load_model, write(tmp_path, config, tensors | {VISUAL: ONE}), "unknown", VISUAL)
    renamed = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()}
    refused(load_model, write(tmp_path, config, renamed), "num_hidden_layers")


def test_a_checkpoint_of_text_alone(released, tmp_path):
    """Saved, the text of a released checkpoint is a checkpoint of its own, for transformers too."""
    for dtype in ("float32", "bfloat16"):
        model, out = load_model(released, dtype), tmp_path / dtype
        save_model(model, released, out)
        config = json.loads((out / "config.json").read_text())
        assert config["model_type"] == "qwen3_5_text" and "text_config" not in config
        assert config["architectures"] == ["Qwen3_5ForCausalLM"]
        assert config["tie_word_embeddings"] is model.config.tie_word_embeddings
        for name, tensor in load_file(out / SINGLE).items():
            fp32 = name.endswith(loading.FLOAT32)
            assert tensor.dtype == (torch.float32 if fp32 else getattr(torch, dtype)), name
        lines = []
        again = load_model(out, note=lines.append)
        assert again.config == model.config or dtype == "float32"  # the dtype is declared anew
        assert not lines
        assert fingerprint(again.state_dict().items()) == fingerprint(model.state_dict().items())
        save_model(again, out, tmp_path / f"{dtype} again")
        for file in ("config.json", SINGLE):
            assert (tmp_path / f"{dtype} again" / file).read_bytes() == (out / file).read_bytes()
    reference, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float32", attn_implementation="eager", output_loading_info=True
    )
    assert type(reference).__name__ == "Qwen3_5ForCausalLM" and not any(info.values()), info
    model = load_model(tmp_path / "float32")
    with torch.no_grad():
        expected = reference(IDS).logits
        torch.testing.assert_close(model.logits(model(IDS)), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "PreTrainedTokenizerFast", None])
def test_transformers_splits_words_as_the_released_tokenizer_does(released, tmp_path, kind):
    """With images it ignores the class that the file names; in a text-only checkpoint it obeys."""
    own, out = tmp_path / "own", tmp_path / "out"
    shutil.copytree(released, own)
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    config = json.loads((own / "tokenizer_config.json").read_text()) | {"tokenizer_class": kind}
    expected = json.loads(Qwen3_5Tokenizer().backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer"):  # accents and vowel signs belong to words
        tokenizer[part] = expected[part]
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    save_model(load_model(own), own, out)
    for directory in (own, out):
        found = AutoTokenizer.from_pretrained(directory)
        backend = json.loads(found.backend_tokenizer.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            assert backend[part] == tokenizer[part], directory
        assert (found.pad_token, found.eos_token) == ("<|endoftext|>", "<|im_end|>")
