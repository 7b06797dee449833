"""A run's record and a result that were damaged: the field is named, in one line."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

import evaluate
import train
from qwen_min.command.arguments import finished_run
from qwen_min.command.cli import positive_int, run_command
from qwen_min.errors import UserError
from qwen_min.files.record import ARGUMENTS, FINISHED, RECORD, read_whole_run
from qwen_min.report.compare import NEEDED, read_all

COMPAT = Path(__file__).parent / "compat"
WRONG = [[], {"a": 1}, "\x1b[31m", -1, 2.5, True, None]  # each is wrong for most fields


def changed(source: Path, directory: Path, *keys: str, value: object = None) -> Path:
    """A copy of a JSON file with another value in the place `keys`; None: without the last key."""
    record = json.loads(source.read_text(encoding="utf-8"))
    holder = record
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    if value is None:
        del holder[keys[-1]]
    (directory / source.name).write_text(json.dumps(record), encoding="utf-8")
    return directory / source.name


def refusals(read, source: Path, directory: Path, *keys: str) -> int:
    """How many of the wrong values are refused. Each refusal is one line with the field's name."""
    count = 0
    for value in WRONG:
        path = changed(source, directory, *keys, value=value)
        try:
            read(path)
        except UserError as error:
            message = str(error).replace("confusion matrix", "confusion_matrix")
            assert keys[-1] in message and "\n" not in message
            count += 1
    return count


@pytest.mark.parametrize("path", sorted(COMPAT.glob("**/run.json")), ids=str)
def test_records_of_older_versions_are_whole(path):
    assert read_whole_run(path.parent)["method"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_another_type_is_named(name, tmp_path):
    source = COMPAT / "runs" / "lora_head" / "run.json"
    found = refusals(lambda path: finished_run(path.parent), source, tmp_path, "arguments", name)
    # A text fits where one is expected, null and a missing field where there may be none.
    assert found >= len(WRONG) - 2


# Without a field `finished`, the run is not finished, and that is said.
@pytest.mark.parametrize("name", sorted({*RECORD, *FINISHED, "method"} - {"finished"}))
def test_a_field_of_a_run_of_another_type_is_named(name, tmp_path):
    source = COMPAT / "runs" / "lora_head" / "run.json"
    found = refusals(lambda path: finished_run(path.parent), source, tmp_path, name)
    assert found >= len(WRONG) - 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_text_tokens", 0), ("epochs", 0), ("seed", -1), ("dtype", "int8"), ("pooling", "first")],
)
def test_an_argument_that_could_not_be_typed_is_named(name, value, tmp_path):
    source = COMPAT / "runs" / "lora_head" / "run.json"
    path = changed(source, tmp_path, "arguments", name, value=value)
    with pytest.raises(UserError, match=rf"arguments\.{name} is {value!r}, expected"):
        finished_run(path.parent)


@pytest.mark.parametrize("name", [name for name in NEEDED if name != "failed"])
def test_a_field_of_a_result_of_another_type_is_named(name, tmp_path):
    predictions = COMPAT / "zero_shot.predictions.jsonl"
    shutil.copyfile(predictions, tmp_path / predictions.name)
    found = refusals(lambda path: read_all([str(path)]), COMPAT / "zero_shot.json", tmp_path, name)
    assert found >= 2


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(2, "No such file", "a"), PermissionError(13, "Permission denied", "a")],
)
def test_a_file_that_cannot_be_looked_at_is_one_line(error, capsys):
    def command(args: argparse.Namespace) -> int:
        raise error

    assert run_command(command, argparse.Namespace()) == 2
    found = f"error: a: {error.strerror}; check the path and its permissions\n"
    assert capsys.readouterr().err == found


def test_a_number_that_no_record_can_hold_cannot_be_typed():
    assert positive_int(str(2**63 - 1)) == 2**63 - 1
    with pytest.raises(argparse.ArgumentTypeError):
        positive_int(str(2**63))


@pytest.mark.parametrize("name", ["data", "model", "adapter", "feature_cache", "encoding"])
def test_a_nul_in_an_argument_is_one_line(name, tmp_path, capsys):
    source = COMPAT / "runs" / "head_only" / "run.json"
    path = changed(source, tmp_path, "arguments", name, value="a\0b.tsv")
    test = str(COMPAT / "test.tsv")
    assert evaluate.main(["--run", str(tmp_path), "--data", test]) == 2
    assert train.main(["--resume", "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and err.count(f"{path}: {name} holds a NUL") == 2
