"""What the two commands share: one-line errors, exit statuses, files that appear whole or not."""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import REPO
from tqdm import tqdm

import train
from qwen_min.command.arguments import add_machine_arguments, add_prompt_arguments
from qwen_min.command.cli import (
    CommandParser,
    choose_device,
    make_parser,
    parse_with_given,
    positive_int,
    run_command,
)
from qwen_min.errors import UserError
from qwen_min.files.output import Output, commit_outputs, open_outputs
from qwen_min.prompt import DEFAULT_TEMPLATE, parse_template

FULL = OSError(28, "No space left on device")


def fails(*_: object, **__: object) -> None:
    raise FULL


def parser() -> CommandParser:
    made = make_parser("What it is for:\n\n    command --limit 3")
    made.add_argument("--limit", type=positive_int)
    add_prompt_arguments(made)
    add_machine_arguments(made)
    return made


# Arguments


def test_the_defaults_are_those_of_the_prompt():
    args = parser().parse_args([])
    assert args.labels is None  # which means the default's where the file has them
    assert parse_template(args.template) == DEFAULT_TEMPLATE


def test_help_shows_every_argument_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "\n\nWhat it is for:\n\n    command --limit 3\n\n" in out
    shown = " ".join(out.split())
    for argument, default in {
        "--labels": "负面,正面",
        "--template": r"评论：{text}\n情感倾向：",
        "--max-text-tokens": "256",
        "--dtype": "auto",
        "--device": "auto",
    }.items():
        told = shown.partition(f" {argument} ")[2]
        assert f"(default: {default})" in told or f"(default: {default}, or" in told


@pytest.mark.parametrize("text", ["1", " 7 ", "100000"])
def test_positive_int(text):
    assert positive_int(text) == int(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "0"], ("--limit", "'0'", "at least 1")),
        (["--limit", "-3"], ("--limit", "'-3'", "at least 1")),
        (["--limit", "1.5"], ("--limit", "'1.5'", "whole number")),
        (["--limit", ""], ("--limit", "''", "whole number")),
        (["--max-text-tokens", "0"], ("--max-text-tokens", "'0'", "at least 1")),
        (["--dtype", "int8"], ("--dtype", "'int8'", "bfloat16")),
        (["--device", "tpu"], ("--device", "'tpu'", "cuda")),
        (["--labels"], ("--labels", "expected one argument")),
        (["--bogus", "two\nlines"], ("unknown option --bogus;",)),
        (["two\nlines"], (r"two\nlines",)),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.endswith("; --help shows the arguments\n")
    assert err.count("\n") == 1
    assert all(word in err for word in words)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["--epoch=3"], "unknown option --epoch; did you mean --epochs?"),
        (["--metod", "x"], "unknown option --metod; did you mean --method?"),
        (["-dtype", "x"], "unknown option -dtype; did you mean --dtype?"),
        (["--zzz"], "unknown option --zzz; --help shows the arguments"),
    ],
)
def test_a_misspelt_option_is_answered_with_the_nearest(typed, said, capsys):
    """Abbreviations too: --epoch would be taken, as long as no other option began with it."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora_head", *typed])
    assert (stop.value.code, *capsys.readouterr()) == (2, "", f"error: {said}\n")


@pytest.mark.parametrize(
    ("method", "typed", "said"),
    [
        (
            "head_only",
            ["--lr", "1e-3"],
            "--lr: for lora_head and lora_label_scoring, not for head_only; leave it out",
        ),
        ("head_only", ["--epochs", "2", "--r", "4"], "--r, --epochs: for lora_head and"),
        ("head_only", ["--train-embeddings"], "--train-embeddings: for lora_head and"),
        (
            "lora_head",
            ["--layer", "best"],
            "--layer: for head_only, not for lora_head; leave it out",
        ),
        (
            "lora_label_scoring",
            ["--adapter", "x", "--pooling", "mean"],
            "--pooling, --adapter: for head_only",
        ),
    ],
)
def test_options_that_a_method_ignores_are_refused(method, typed, said, tmp_path, capsys):
    """Also those that have their default's value."""
    run = tmp_path / "run"
    assert train.main(["--method", method, "--output", str(run), *typed]) == 2
    assert said in capsys.readouterr().err and not run.exists()


def test_a_device_that_is_there_is_taken_and_another_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # not offered
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: .* auto or cpu"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == "cuda"
    assert choose_device("cpu") == "cpu"


def test_what_was_typed_is_told_from_the_defaults():
    """Also where the typed value is the default's."""
    args, given = parse_with_given(parser(), ["--dtype", "auto", "--limit", "3"])
    assert (args.dtype, args.limit, args.max_text_tokens) == ("auto", 3, 256)
    assert given == {"dtype": "auto", "limit": 3}
    assert parse_with_given(parser(), [])[1] == {}


# Exit statuses


def status_of(command) -> int:
    return run_command(command, argparse.Namespace())


def test_the_commands_own_status_is_passed_on(capsys):
    assert [status_of(lambda args: 0), status_of(lambda args: 3)] == [0, 3]
    assert capsys.readouterr() == ("", "")


def test_a_users_mistake_is_one_line_whatever_it_quotes(capsys):
    def command(args: argparse.Namespace) -> int:
        raise UserError("a\nfile\r.tsv: no such file; check the path")

    assert status_of(command) == 2
    assert capsys.readouterr() == ("", "error: a\\nfile\\r.tsv: no such file; check the path\n")


def test_ctrl_c(capsys):
    assert status_of(lambda args: signal.raise_signal(signal.SIGINT)) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        status_of(lambda args: 1 // 0)


def test_a_terminal_that_cannot_show_a_label_shows_its_code(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    parser()  # as every command begins
    assert status_of(lambda args: print("F1 of 负面") or 0) == 0
    assert written.getvalue() == rb"F1 of \u8d1f\u9762" + b"\n"


def test_help_on_a_terminal_that_cannot_show_chinese(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    sys.stdout.flush()
    assert stop.value.code == 0 and rb"\u8d1f\u9762" in written.getvalue()


def test_a_reader_that_has_left_gets_no_traceback(monkeypatch):
    """As with `| head`: neither at once nor when Python flushes and closes stdout at its end."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    stdout = os.fdopen(write_end, "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert status_of(lambda args: print("F1") or 0) == 141
    stdout.close()


# What is printed


ODD = "\x1b[31m\x07\r\x9b\u202e\u200b\ud800\U000e0001\u3000\x7f"
ESCAPED = r"\u001b[31m\u0007\r\u009b\u202e\u200b\ud800\udb40\udc01\u3000\u007f"


def test_what_could_act_on_the_terminal_is_printed_as_an_escape(capsys):
    def command(args: argparse.Namespace) -> int:
        print(f"负面 😀 {ODD}\nnext")
        print(json.dumps({"a": ODD}, ensure_ascii=False))
        print(f"note: {ODD}\nnext", file=sys.stderr)
        raise UserError(f"{ODD}\nnext")

    assert status_of(command) == 2
    out, err = capsys.readouterr()
    first, second, third = out.splitlines()
    assert (first, second) == (f"负面 😀 {ESCAPED}", "next")
    assert json.loads(third) == {"a": ODD}  # printed JSON keeps its value
    assert err == f"note: {ESCAPED}\\nnext\nerror: {ESCAPED}\\nnext\n"


def test_a_line_of_stderr_has_at_most_500_characters(capsys):
    def command(args: argparse.Namespace) -> int:
        raise UserError("begin " + "x" * 10_000 + " do this")

    assert status_of(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) == 500 and line.startswith("error: begin x") and line.endswith("x do this")
    with pytest.raises(SystemExit):
        parser().parse_args(["--dtype", "\x1b" + "x" * 10_000])
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 600 and line.isprintable()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device, others do not")
def test_a_full_standard_output_does_not_stop_the_work(monkeypatch, capsys):
    done = []
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert status_of(lambda args: print("a") or print("b") or done.append(1) or 0) == 2
    assert done == [1]
    err = capsys.readouterr().err
    assert err == "error: standard output: cannot be written (No space left on device); make room\n"


def test_a_closed_standard_output_does_not_stop_the_work(monkeypatch):
    """As with `>&-`: Python then has no sys.stdout at all."""
    monkeypatch.setattr(sys, "stdout", None)
    assert status_of(lambda args: print("a") or 0) == 0


def without_room(words: str) -> None:
    """What is raised where little memory is left, which a test can't bring about reliably."""
    raise RuntimeError(words)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(2**50),
        lambda: torch.empty(2**62, 2**62),
        lambda: bytearray(2**62),
        partial(without_room, "can't start new thread"),  # Python: for the thread's stack
        partial(without_room, "could not create a primitive"),  # oneDNN: for a product's code
    ],
)
def test_out_of_memory_names_the_sizes_to_lower(make, capsys):
    args = argparse.Namespace(batch_tokens=10**15, r=8, max_text_tokens=256)
    assert run_command(lambda args: make() and 0, args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory (") and err.count("\n") == 1
    assert err.endswith("; lower --batch-tokens, --max-text-tokens, --r\n")


def test_bars_of_other_libraries_are_not_escaped_but_left_out(monkeypatch):
    """As of huggingface_hub in a download: tqdm draws on a terminal only."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run_command(lambda args: len([*tqdm(range(3), disable=None)]), argparse.Namespace()) == 3
    assert terminal.getvalue() == ""


# Output files


def test_an_output_appears_whole_and_only_at_its_end(tmp_path):
    path = tmp_path / "r.json"
    output = Output(path)
    assert not path.exists()
    output.commit('{"词": "正面\\n"}\n')
    assert path.read_bytes() == '{"词": "正面\\n"}\n'.encode()
    assert [*tmp_path.iterdir()] == [path]


def test_without_commit_nothing_changes(tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text("earlier")
    open_outputs([str(kept), None, str(tmp_path / "new.json")], [])
    assert [*tmp_path.iterdir()] == [kept] and kept.read_text() == "earlier"


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("earlier and longer")
    output = Output(path)
    assert path.read_text() == "earlier and longer"
    output.commit("new")
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "new"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "r.json", tmp_path / "link.json"
    link.symlink_to(target)
    for text in ("created", "replaced"):
        output = Output(link)
        output.commit(text)
        assert link.is_symlink() and not target.is_symlink() and target.read_text() == text
    assert [*target.parent.iterdir()] == [target]


def test_a_name_that_is_not_utf8_stays_json(tmp_path):
    output = Output(tmp_path / "r.json")
    output.commit(json.dumps({"data": "\udcff评论.tsv"}, ensure_ascii=False))
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"data": "\udcff评论.tsv"} and "评论" in text


@pytest.mark.parametrize(
    "path", ["missing/r.json", "directory", "", ".", "/", "file/r.json", "x" * 300]
)
def test_what_cannot_be_written_is_known_at_once(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("directory").mkdir()
    Path("file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*; name a file in a directory"):
        Output(path)
    assert sorted(os.listdir()) == ["directory", "file"] and not os.listdir("directory")


def test_a_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("kept")
    path.chmod(0o444)
    if os.access(path, os.W_OK):  # root may write all the same
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match="Permission denied"):
        Output(path)
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "kept"


@pytest.mark.parametrize("one", ["b.json", "./b.json", "link.json", "../{}/b.json"])
def test_no_output_replaces_another_or_the_data(one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link.json").symlink_to("b.json")
    one = one.format(tmp_path.name)
    for paths, inputs in (([one, "b.json"], []), ([None, one], ["b.json"])):
        with pytest.raises(UserError, match="already the data or another output"):
            open_outputs(paths, inputs)
    assert os.listdir() == ["link.json"]
    assert open_outputs([None, "c.json"], ["b.json"])[0] is None


def test_stdout_that_the_shell_sends_to_a_file_is_continued(capfd):
    os.write(1, b"before\n")  # capfd puts a file where the shell would
    output = Output("/dev/stdout")
    output.commit("between\n")
    os.write(1, b"after\n")
    assert capfd.readouterr() == ("before\nbetween\nafter\n", "")


def test_a_pipe_is_written_through(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    output = Output(pipe)
    output.commit("through\n")
    assert os.read(reader, 100) == b"through\n"
    os.close(reader)
    assert [*tmp_path.iterdir()] == [pipe] and pipe.is_fifo()


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The temporary directory of a test that fills a disk."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def test_a_write_that_fails_at_the_end_is_rescued(temporary, tmp_path, monkeypatch):
    path, other = tmp_path / "r.json", tmp_path / "p.jsonl"
    path.write_text("earlier")
    monkeypatch.setattr(os, "replace", fails)
    outputs = open_outputs([str(path), None, str(other)], [])
    with pytest.raises(UserError) as error:
        commit_outputs([*zip(outputs, ["词\udcff", "none", "lines"], strict=True)])
    assert path.read_text() == "earlier"
    assert {*tmp_path.iterdir()} == {path, temporary}
    rescued = {file.suffix: file for file in temporary.iterdir()}
    assert len(rescued) == 2
    assert rescued[".json"].read_bytes() == "词\\udcff".encode()
    assert rescued[".jsonl"].read_bytes() == b"lines"
    message = str(error.value)
    assert message.count("cannot be written (No space left on device)") == 2
    assert all(str(name) in message for name in (path, other, *rescued.values()))


def test_one_output_that_fails_does_not_cost_the_other(temporary, tmp_path):
    (tmp_path / "removed").mkdir()
    broken, whole = Output(tmp_path / "removed" / "a.json"), Output(tmp_path / "b.json")
    (tmp_path / "removed").rmdir()  # while the run goes on
    with pytest.raises(UserError, match=r"a\.json: cannot be written"):
        commit_outputs([(broken, "first"), (whole, "second")])
    assert (tmp_path / "b.json").read_text() == "second"
    assert [file.read_text() for file in temporary.iterdir()] == ["first"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device, others do not")
def test_a_full_device(temporary):
    output = Output("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full: .*No space.*its content is in"):
        output.commit("all of it")
    assert [file.read_text() for file in temporary.iterdir()] == ["all of it"]


def test_where_even_the_rescue_fails_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", fails)
    monkeypatch.setattr(tempfile, "mkstemp", fails)
    output = Output(tmp_path / "r.json")
    with pytest.raises(UserError, match=r"nor can a temporary file .*run again"):
        output.commit("lost")
    assert not [*tmp_path.iterdir()]


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("private")
    path.chmod(0o600)
    output = Output(path)
    output.commit("new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/stderr", "/dev/fd/1", "/proc/self/fd/2"])
def test_a_closed_stream_is_known_at_once(name, monkeypatch):
    monkeypatch.setattr(sys, "__stdout__", None)  # so Python starts with `>&-` and `2>&-`
    monkeypatch.setattr(sys, "__stderr__", None)
    with pytest.raises(UserError, match=r"it is closed\); name a file"):
        Output(name)


def test_a_stream_that_closes_does_not_cost_the_other_output(temporary, tmp_path, monkeypatch):
    outputs = [Output("/dev/stdout"), Output(tmp_path / "b.json")]
    monkeypatch.setattr(os, "dup", fails)
    with pytest.raises(UserError, match=r"/dev/stdout: cannot be written .*its content is in"):
        commit_outputs([*zip(outputs, ["first", "second"], strict=True)])
    assert (tmp_path / "b.json").read_text() == "second"
    assert [file.read_text() for file in temporary.iterdir()] == ["first"]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_the_file_that_a_stream_goes_to_is_not_replaced(name, tmp_path):
    """What is printed would go to the file that was replaced, and be lost."""
    path, code = tmp_path / "same.json", "from qwen_min.files.output import Output; "
    with path.open("w") as file:
        code += f"Output({str(path)!r})"
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, name: file}
        done = subprocess.run([sys.executable, "-c", code], cwd=REPO, text=True, **streams)
    said = done.stderr or path.read_text()
    assert done.returncode == 1 and "standard output or standard error goes to it" in said


@pytest.mark.parametrize("name", ["/dev/fd/1", "/proc/self/fd/1"])
def test_a_descriptor_is_continued_as_a_stream(name, capfd):
    os.write(1, b"before\n")
    Output(name).commit("between\n")
    os.write(1, b"after\n")
    assert capfd.readouterr() == ("before\nbetween\nafter\n", "")
