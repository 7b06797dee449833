"""A few seeded cases of tests/fuzz.py for each kind of file, and what the fuzzer itself notices.

A case that fails here is shown by `python tests/fuzz.py --kind KIND --case NUMBER`.
"""

import encodings.aliases
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_min.errors import UserError
from qwen_min.files.data import read_examples
from tests import fuzz

CASES = 8  # of each kind: about a minute in all
RUST = (".safetensors", "tokenizer.json")  # opened by libraries, which no hook of Python's sees


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        fuzz.make_tree(Path(place))
        yield Path(place)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_damaged_file_is_accepted_or_refused_in_one_line(kind, tree):
    for number in range(CASES):
        case = fuzz.run_case(number, tree, [kind])
        assert case.verdict in ("accepted", "refused"), (case.where, case.done, case.output)


@pytest.mark.parametrize(
    "kind", [k for k, (place, _) in fuzz.KINDS.items() if not place.endswith(RUST)]
)
def test_a_file_that_may_not_be_read_is_named(kind, tree, monkeypatch):
    """Root may read everything, so the permission is refused by a hook, in the child alone."""
    pattern, commands = fuzz.KINDS[kind]

    def without_permission(command: list[str]) -> int:
        files = {str(path.resolve()) for path in Path().glob(pattern)}

        def refuse(event: str, about: tuple) -> None:
            if event == "open" and os.path.realpath(str(about[0])) in files:
                raise PermissionError(13, "Permission denied", about[0])

        sys.addaudithook(refuse)
        return fuzz.MAINS[command[0]](command[1:])

    monkeypatch.setitem(fuzz.MAINS, "closed", without_permission)
    with fuzz.copied(tree) as case:
        status, out, err = fuzz.forked(["closed", *commands[0]], case)
    assert (status, fuzz.verdict(status, out, err)[0]) == (2, "refused"), err
    assert "Permission denied" in err


def endless(argv: list[str]) -> None:
    while True:
        pass


NOTICED = {
    "traceback": lambda argv: {}["missing"],
    "crash": lambda argv: os.kill(os.getpid(), signal.SIGTERM),
    "hang": endless,
    "unprintable": lambda argv: print("\x1b[31m"),
    "too long": lambda argv: print("x" * 501, file=sys.stderr),
    "not one line": lambda argv: 2,
    "accepted": lambda argv: 0,
}


@pytest.mark.parametrize("verdict", NOTICED)
def test_the_fuzzer_notices(verdict, tmp_path, monkeypatch):
    monkeypatch.setitem(fuzz.MAINS, "bad", NOTICED[verdict])
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert fuzz.verdict(*fuzz.forked(["bad"], tmp_path))[0] == verdict


def test_the_fuzzer_limits_memory(tmp_path, monkeypatch):
    monkeypatch.setitem(fuzz.MAINS, "bad", lambda argv: bytearray(2 * fuzz.MEMORY))
    verdict, where = fuzz.verdict(*fuzz.forked(["bad"], tmp_path))
    assert verdict == "traceback" and where.startswith("MemoryError")


@pytest.mark.parametrize("output", [">/dev/full", ">&-"])
def test_a_training_is_finished_where_nothing_can_be_printed(output, tree):
    """The run is the result. A full standard output is a failure all the same, a closed one not."""
    with fuzz.copied(tree) as case:
        train = f"{sys.executable} {fuzz.REPO / 'train.py'} {' '.join(fuzz.TRAIN[0][1:])} {output}"
        found = subprocess.run(train, shell=True, cwd=case, stderr=subprocess.PIPE, text=True)
        evaluate = ["evaluate", "--run", "new", "--data", "test.tsv"]
        assert fuzz.forked(evaluate, case)[0] == 0
    if output == ">&-":
        assert (found.returncode, found.stderr) == (0, "")
    else:
        assert found.returncode == 2
        assert found.stderr.startswith("error: standard output") and found.stderr.count("\n") == 1


def test_a_size_that_no_memory_holds_is_named(tree, monkeypatch):
    """All rows in one forward. The first tensor of rank r is larger than all memory: where many
    small tensors fill it, it is chance what fails at last."""
    monkeypatch.setattr(fuzz, "MEMORY", 2**32)
    sizes = ["--batch-tokens", "100000000", "--batch-size", "100000", "--r", "65535"]
    with fuzz.copied(tree) as case:
        heads, rows = (case / "train.tsv").read_text(encoding="utf-8").split("\n", 1)
        (case / "many.tsv").write_text(f"{heads}\n{rows * 100}", encoding="utf-8")
        status, out, err = fuzz.forked([*fuzz.TRAIN[1], *sizes, "--data", "many.tsv"], case)
    assert status == 2 and fuzz.verdict(status, out, err)[0] == "refused", err
    assert "out of memory" in err and "--batch-tokens" in err


# Each codec by one of its names; some are for bytes alone, one always fails, some know few letters.
@pytest.mark.parametrize(
    "codec", sorted({*encodings.aliases.aliases.values(), "idna", "undefined"})
)
def test_every_codec_reads_or_is_refused_in_one_line(codec, tmp_path):
    file = tmp_path / "data.tsv"
    for text in ("label\ttext_a\n1\tabc\n0\tdef\n", "label\ttext_a\n1\t好\n"):
        for written in (codec, "utf-8", "utf-16", "gb18030"):
            try:
                file.write_bytes(text.encode(written))
            except (LookupError, UnicodeError):
                continue
            try:
                assert {example.label for example in read_examples(file, "ab", codec)} <= {0, 1}
            except UserError as error:
                assert "\n" not in str(error)
