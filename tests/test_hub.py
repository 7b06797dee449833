"""`--model NAME`: local names touch no network; hub names against a small hub on 127.0.0.1.

huggingface_hub reads its environment when it is imported, so resolve_model runs in a new process
per environment, over many names at a time.
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from qwen_min.command.cli import run_command
from qwen_min.errors import UserError
from qwen_min.files import hub as hub_module
from qwen_min.files.hub import FILES, resolve_model

REPO = Path(__file__).resolve().parent.parent
# Prints one JSON line per name; anything but a UserError is a bug and ends it with a traceback.
DRIVER = """
import json, sys, time
time.sleep = lambda seconds: None  # huggingface_hub waits between its retries; tests do not
from qwen_min.errors import UserError
from qwen_min.files.hub import resolve_model
for name in sys.argv[1:]:
    try:
        outcome = {"path": str(resolve_model(name))}
    except UserError as error:
        outcome = {"error": str(error)}
    print(json.dumps({"name": name, "imported": "huggingface_hub" in sys.modules} | outcome))
"""
NO_SOCKETS = """
import socket
def refuse(*args): raise AssertionError("a local name reached for the network")
socket.socket.connect = socket.getaddrinfo = refuse
"""
# A write past 2 MB fails (EFBIG): the nearest thing to a full disk that needs no disk to fill.
SMALL_FILES_ONLY = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))"

# huggingface_hub writes in chunks of 10 MB: less than one chunk would leave nothing to resume.
CUT_AT, BIG = 11_000_000, bytes(range(256)) * 48_000
WANTED = {"config.json": b"{}", "tokenizer.json": b'{"model": {}}'}
OPTIONAL = {name.replace("*", "tool_use"): b"{}" for name in FILES} | WANTED
DECOYS = {
    "README.md": b"read me",
    "pytorch_model.bin": b"pickle",
    "model.pt": b"pickle",
    "consolidated.safetensors": b"again",
    "original/model.safetensors": b"again",
}
DECOYS |= {"additional_chat_templates/../../../x.jinja": b"outside", "x.jinja": b"{}"}
DECOYS |= {"additional_chat_templates/\x1b[31m.jinja": b"red"}
SINGLE = WANTED | {"model.safetensors": b"weights"}
SHARDS = WANTED | {
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}
    ).encode(),
    "m-1.safetensors": b"first",
    "m-2.safetensors": b"second",
}
VISUAL, MTP = {"model.visual.a": "m-3.safetensors"}, {"mtp.a": "m-4.safetensors"}
MIXED = {"mtp.b": "m-1.safetensors", "model.language_model.a": "m-1.safetensors"}
IMAGES = WANTED | {
    "model.safetensors.index.json": json.dumps({"weight_map": VISUAL | MIXED | MTP}).encode(),
    "m-1.safetensors": b"first",
}


def commit(digit: str) -> str:
    return digit * 40


def with_index(text: bytes) -> dict[str, bytes]:
    return WANTED | {"model.safetensors.index.json": text, "m.bin": b"pickle"}


# repository -> revision -> files; a revision that is not a commit is named by REFS.
REPOS = {
    "org/single": {commit("1"): SINGLE | DECOYS},
    "org/shards": {commit("2"): SHARDS | DECOYS | {"m-3.safetensors": b"not in the index"}},
    "org/images": {
        commit("f"): IMAGES
        | {"m-3.safetensors": b"images", "m-4.safetensors": b"ahead"}
        | {"preprocessor_config.json": b"{}", "video_preprocessor_config.json": b"{}"}
    },
    "org/revised": {
        commit("3"): SINGLE,
        commit("4"): SINGLE | {"model.safetensors": b"older"},
        commit("5"): SINGLE | {"model.safetensors": b"proposed"},
    },
    "org/moving": {
        commit("6"): dict.fromkeys(SINGLE, b"before"),
        commit("7"): dict.fromkeys(SINGLE, b"after"),
    },
    "org/cut": {commit("8"): WANTED | {"model.safetensors": BIG}},
    "org/broken": {commit("9"): SINGLE},
    "org/short": {commit("9"): SINGLE},
    "org/chat": {commit("9"): SINGLE | OPTIONAL},
    "org/gated": {commit("a"): SINGLE},
    "org/stranger": {commit("b"): SINGLE},
    "org/pickled": {commit("c"): WANTED | {"pytorch_model.bin": b"pickle"}},
    "org/files-down": {commit("d"): SINGLE},
    "org/no-tokenizer": {commit("d"): {"config.json": b"{}", "model.safetensors": b"weights"}},
    "org/index-pickles": {commit("e"): with_index(b'{"weight_map": {"a": "m.bin"}}')},
    "org/index-climbs": {commit("e"): with_index(b'{"weight_map": {"a": "../m.safetensors"}}')},
    "org/index-empty": {commit("e"): with_index(b'{"weight_map": {}}')},
    "org/index-cut": {commit("e"): with_index(b'{"weight_map": {"a": "m')},
    "org/index-list": {commit("e"): with_index(b"[1, 2]")},
}
REFS = {("org/revised", "v1.0"): commit("4"), ("org/revised", "refs/pr/1"): commit("5")}


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as a download takes; it keeps every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.refs = {(repo, "main"): next(iter(commits)) for repo, commits in REPOS.items()} | REFS
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.closing = threading.Event()

    def files_of(self, repo: str) -> set[str]:
        """Names of the files that were asked for, at whatever revision."""
        asked = [path for _, path, _ in self.requests if path.startswith(f"/{repo}/resolve/")]
        return {path.split("/", 5)[5] for path in asked}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, self.headers["Range"]))
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self.api("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif parts[2:3] == ["resolve"]:
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.answer(404)

    def answer(self, status: int, body: bytes = b"", cut_at: int | None = None, **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut_at])
        if cut_at is not None:
            self.close_connection = True

    def api(self, repo: str, revision: str):
        if repo == "org/private":  # what the hub says of a missing model to those it does not know
            return self.answer(401, X_Error_Message="Invalid username or password.")
        if repo == "org/bad-token":
            return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if repo == "org/forbidden":
            return self.answer(403, X_Error_Message="not from this address")
        if repo == "org/down":
            return self.answer(503)
        if repo == "org/portal":  # a login page of some network in between
            return self.answer(200, b"<html>log in</html>")
        if repo == "org/slow":
            self.server.closing.wait()
        if repo not in REPOS:
            return self.answer(404, X_Error_Code="RepoNotFound")
        found = self.server.refs.get((repo, revision))
        if found is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": name} for name in REPOS[repo][found]]
        body = {"id": repo, "modelId": repo, "sha": found, "siblings": siblings, "tags": []}
        return self.answer(200, json.dumps(body).encode())

    def resolve(self, repo: str, revision: str, name: str):
        if repo == "org/gated" and self.headers["Authorization"] != "Bearer hf_friend":
            return self.answer(401, X_Error_Code="GatedRepo")
        if repo == "org/files-down":  # the API answers, the storage behind it does not
            return self.answer(502)
        if repo == "org/stranger":
            return self.answer(403, X_Error_Code="GatedRepo")
        found = self.server.refs.get((repo, revision), revision)
        body = REPOS[repo][found].get(name)
        if body is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=found)
        if repo == "org/moving" and self.command == "GET" and name == "config.json":
            self.server.refs[repo, "main"] = commit("7")
        headers = {
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X_Repo_Commit": found,
            "Accept_Ranges": "bytes",
        }
        if repo == "org/short" and name == "model.safetensors":  # a mirror that lost the end
            headers["X_Linked_Size"] = str(len(body) + 1)
        cut_at = None
        if self.command == "GET" and name == "model.safetensors":
            if repo == "org/broken":
                cut_at = 3
            elif repo == "org/cut" and self.headers["Range"] is None:
                cut_at = CUT_AT
        if self.headers["Range"] is None:
            return self.answer(200, body, cut_at, **headers)
        start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.answer(206, body[start:], cut_at, **headers)


def run(names: list[str], prelude: str = "", **environment: str | Path) -> dict[str, dict]:
    """resolve_model on each name in a new process: name -> path or error, imported."""
    hidden = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(hidden) and not key.lower().endswith("_proxy")
    }
    env |= {"PYTHONPATH": str(REPO), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {key: str(value) for key, value in environment.items()}
    done = subprocess.run(
        [sys.executable, "-c", prelude + DRIVER, *names],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


DOWNLOADS = [
    "org/single",
    "org/chat",
    "org/shards",
    "org/images",
    "org/revised",
    "org/revised@v1.0",
    "org/revised@refs/pr/1",
    "org/moving",
    # Twice: older versions of huggingface_hub stop at the cut and resume in the next call.
    "org/cut",
    "org/cut",
]
# What each line must say beside name, revision, endpoint and the ways around.
HUB_ERRORS = {
    "org/private": "HTTP 401: access refused, check the name and HF_TOKEN",
    "org/absent": "no such model, or a private one",
    "org/revised@v9": "Revision Not Found",
    "org/gated": "gated: accept its terms",
    "org/stranger": "gated: accept its terms",
    "org/bad-token": "HTTP 401: access refused, check the name and HF_TOKEN",
    "org/forbidden": "HTTP 403: access refused, check the name and HF_TOKEN",
    "org/down": "503 Service Unavailable",
    "org/portal": "JSON",
    "org/slow": "time",
    "org/broken": "3 bytes",
    "org/short": "file should be of size 8 but has size 7",
    "org/files-down": "502 Bad Gateway",
    "org/pickled": "the model has none (only safetensors weights are read)",
    "org/no-tokenizer": "the model has none",
    "org/two--dashes": "Cannot have -- or ..",
}
BAD_INDEXES = [name for name in REPOS if name.startswith("org/index-")]


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home) -> dict[str, dict]:
    """Every scenario that one environment can hold; the cache stays for the tests after it."""
    return run(
        DOWNLOADS + list(HUB_ERRORS) + BAD_INDEXES,
        HF_ENDPOINT=hub.endpoint,
        HF_HOME=home,
        HF_HUB_ETAG_TIMEOUT="1",
    )


def contents(directory: str | Path) -> dict[str, bytes]:
    directory = Path(directory)
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def check_line(line: str, *said: str) -> None:
    assert "\n" not in line
    ways = ("local directory", "HF_ENDPOINT", "HF_HUB_OFFLINE=1", '"No model hub"')
    for part in (*said, *ways):
        assert part in line


# --- local names ---


def test_local_names_reach_for_no_network_and_no_hub_library(tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "file").touch()
    names = [
        "tiny",
        str(tmp_path),
        "~/org/model",
        "~/org/model/",
        "~/nothing",
        "~/file",
        "org model",
    ]
    found = run(names, NO_SOCKETS, HOME=tmp_path)
    assert not any(line["imported"] for line in found.values())
    assert Path(found["tiny"]["path"]) == REPO / "qwen_min" / "tiny"
    assert found[str(tmp_path)]["path"] == str(tmp_path)
    assert Path(found["~/org/model"]["path"]) == tmp_path / "org" / "model"
    assert Path(found["~/org/model/"]["path"]) == tmp_path / "org" / "model"
    assert all("error" in found[name] for name in names[-3:])


def test_a_directory_that_reads_like_a_hub_name_is_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "single").mkdir(parents=True)
    assert resolve_model("org/single") == Path("org/single")


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"taken for a hub name: {args}")

    monkeypatch.setattr(hub_module, "_download", refuse)


@pytest.mark.parametrize(
    "name", ["./no", "../no", "/no/such", "~/no/such", "a/b/c", "a/b/c/d", "a/b/", "org/", "a\\b"]
)
def test_a_path_that_does_not_exist(name, tmp_path, monkeypatch, no_download):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"^[^\n]*no such directory[^\n]*$") as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "qwen",
        "tinny",
        "org/name@",
        "org/na me",
        "org/name@a b",
        " org/name",
        "org/name\n",
        "@main",
        "name@main",
        "org/name@v1@v2",
        "org/n..e",
        "org/name@../../x",
        "组织/模型",
    ],
)
def test_a_name_that_is_neither_path_nor_hub_name(name, tmp_path, monkeypatch, no_download):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        resolve_model(name)
    line = str(caught.value)
    assert "\n" not in line and repr(name) in line and "owner/name" in line


def test_a_file_or_a_dangling_link_is_no_directory(tmp_path, monkeypatch, no_download):
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/file").touch()
    Path("org/link").symlink_to("nowhere")
    for name in ("org/file", "org/link"):
        with pytest.raises(UserError, match=f"'{name}': no such directory"):
            resolve_model(name)


# --- hub names ---


def test_a_download_draws_its_bar_on_the_terminal(tmp_path, monkeypatch, capsys):
    """A gigabyte takes minutes. A command's own stderr says that it is no terminal."""

    def download(repo: str, file: str, **_: object) -> str:
        print(f"\r{file}: 50%", end="", file=sys.stderr)
        return str(tmp_path / file)

    info = argparse.Namespace(siblings=None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.model_info", lambda *_, **__: info)
    run_command(lambda args: resolve_model("owner/name") and 0, argparse.Namespace())
    assert capsys.readouterr().err.startswith("\rconfig.json: 50%\r")


def test_only_what_is_needed_is_downloaded(online, hub):
    assert contents(online["org/single"]["path"]) == SINGLE
    assert hub.files_of("org/single") == set(SINGLE)


def test_the_chat_template_and_what_ends_an_answer_come_along(online):
    assert contents(online["org/chat"]["path"]) == SINGLE | OPTIONAL


def test_an_index_brings_exactly_the_shards_that_it_maps(online, hub):
    assert contents(online["org/shards"]["path"]) == SHARDS
    assert hub.files_of("org/shards") == set(SHARDS)


def test_what_is_for_images_alone_is_not_downloaded(online, hub):
    """Nor what guesses several tokens ahead; a shard that holds a part of both comes whole."""
    assert contents(online["org/images"]["path"]) == IMAGES
    assert hub.files_of("org/images") == set(IMAGES)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("org/revised", b"weights"),
        ("org/revised@v1.0", b"older"),
        ("org/revised@refs/pr/1", b"proposed"),
    ],
)
def test_revision(name, weights, online):
    assert contents(online[name]["path"])["model.safetensors"] == weights


def test_all_files_are_of_one_commit_though_the_branch_moves_meanwhile(online):
    assert contents(online["org/moving"]["path"]) == dict.fromkeys(SINGLE, b"before")


def test_a_cut_download_is_resumed(online, hub):
    ranges = [asked for _, path, asked in hub.requests if asked and path.startswith("/org/cut/")]
    assert len(ranges) == 1 and 0 < int(ranges[0].removeprefix("bytes=").rstrip("-")) <= CUT_AT
    assert contents(online["org/cut"]["path"])["model.safetensors"] == BIG


def test_a_token_is_sent(hub, home, online):
    found = run(["org/gated"], HF_ENDPOINT=hub.endpoint, HF_HOME=home, HF_TOKEN="hf_friend")
    assert contents(found["org/gated"]["path"]) == SINGLE


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "no network"]
)
def test_a_filled_cache_needs_no_hub(environment, home, online):
    names = ["org/single", "org/chat", "org/shards", "org/images", "org/revised@v1.0", "org/cut"]
    absent = ["org/never-asked", "org/broken"]
    with socket.socket() as taken:  # bound, but nobody listens: connections are refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        found = run(names + absent, HF_ENDPOINT=endpoint, HF_HOME=home, **environment)
    for name in names:
        assert found[name]["path"] == online[name]["path"]
    for name in absent:
        reason = "HF_HUB_OFFLINE is set" if environment else "Connect"
        check_line(found[name]["error"], name, "(revision main)", endpoint, reason)


@pytest.mark.parametrize("name", HUB_ERRORS)
def test_what_the_hub_refuses_is_one_line(name, online, hub):
    repo, _, revision = name.partition("@")
    check_line(
        online[name]["error"],
        f"{repo} (revision {revision or 'main'})",
        hub.endpoint,
        HUB_ERRORS[name],
    )


def test_the_line_names_the_missing_file(online):
    assert "model.safetensors of org/pickled" in online["org/pickled"]["error"]
    assert "tokenizer.json of org/no-tokenizer" in online["org/no-tokenizer"]["error"]


def test_a_silent_endpoint_is_asked_once(online, hub):
    """hf_hub_download would wait for it six times a minute, and more."""
    assert [path for _, path, _ in hub.requests if "org/slow" in path] == [
        "/api/models/org/slow/revision/main"
    ]


def test_a_download_that_keeps_breaking_leaves_no_weights(online, home):
    broken = contents(home / "hub" / "models--org--broken" / "snapshots" / commit("9"))
    assert broken == WANTED


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_an_index_may_name_safetensors_beside_it_alone(name, online, hub):
    line = online[name]["error"]
    assert "\n" not in line and "model.safetensors.index.json" in line and "weight_map" in line
    assert hub.files_of(name) == {"config.json", "model.safetensors.index.json"}


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").touch()
    for home, prelude, reason in [
        (tmp_path / "file" / "home", "", "Not a directory"),
        (tmp_path / "home", SMALL_FILES_ONLY, "File too large"),
    ]:
        found = run(["org/cut"], prelude, HF_ENDPOINT=hub.endpoint, HF_HOME=home)
        check_line(found["org/cut"]["error"], f"into {home}", reason)
