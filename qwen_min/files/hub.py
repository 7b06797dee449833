"""`--model NAME` to a local directory: the embedded checkpoint, a given one, or one of the hub."""

import os
import re
from pathlib import Path

from qwen_min.errors import UserError
from qwen_min.files.disk import read_json

TINY = Path(__file__).parent.parent / "tiny"  # the checkpoint that comes with the project
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Optional files: the chat template, and the tokens that end an answer.
OPTIONAL = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
# Starts like a path, holds a backslash, ends in a slash, or has more slashes than a hub name.
PATH_LIKE = re.compile(r"^[./~]|\\|/$|^[^@]*/[^@]*/")
# ".." is in no hub name and no git ref; inside the cache it would lead to another directory.
HUB_NAME = re.compile(r"(?!.*\.\.)[\w.-]+/[\w.-]+(@[^\s@]+)?", re.ASCII)
WAYS_AROUND = (
    "ways around it: a local directory as --model, HF_ENDPOINT=URL of a mirror, HF_HUB_OFFLINE=1 "
    'with a filled cache, or no hub at all (see "No model hub" in README.md)'
)


def resolve_model(name: str) -> Path:
    """The directory of the model that `--model` names: config.json, tokenizer.json, safetensors,
    and those of the files in OPTIONAL that the model has.

    `tiny` is the embedded checkpoint (`./tiny` is a directory of that name). For an existing
    directory there is no network access, and huggingface_hub is not imported.
    `owner/name` and `owner/name@revision` are hub names: huggingface_hub downloads the files above,
    all from one commit, and no others. It reads HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE.
    Raises UserError if the name is neither, or a file cannot be had.
    """
    if name == "tiny":
        return TINY
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.lexists(path):
        found = "a file" if os.path.exists(path) else "a dangling link"
        raise UserError(f"--model {name!r} is {found}; give the directory that holds the model")
    if PATH_LIKE.search(name):
        raise UserError(f"--model {name!r}: no such directory; a hub name is owner/name[@revision]")
    if not HUB_NAME.fullmatch(name):
        raise UserError(
            f"--model {name!r}: neither a directory nor a hub name, owner/name[@revision]"
        )
    repo, _, revision = name.partition("@")
    return _download(repo, revision or "main")


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of a sharded checkpoint: the file that holds each tensor.

    Raises UserError if there is none, or if it names anything but safetensors files beside it.
    """
    advice = "delete it and fetch it again"
    index = read_json(path, "an index with a weight_map", advice, weight_map=dict)
    # The index comes from outside, so a shard may not be a path to somewhere else.
    for shard in index["weight_map"].values() or [None]:  # an empty map is refused as well
        if not (isinstance(shard, str) and re.fullmatch(r"[\w.-]+\.safetensors", shard)):
            raise UserError(
                f"{path}: its weight_map names {shard!r}, expected a plain file name "
                f"(NAME.safetensors); {advice}"
            )
    return index["weight_map"]


def _download(repo: str, revision: str) -> Path:
    # Imported here: it is slow, and a local directory does not need it.
    from huggingface_hub import constants, hf_hub_download, model_info

    # `except Exception`, twice: depending on its version huggingface_hub raises errors of requests,
    # httpx, httpx2 or hf_xet, which have no narrower class in common.
    failure = None
    try:
        # Ask once, with a short timeout: hf_hub_download retries a silent endpoint for minutes.
        info = model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        failure = error  # the cache may hold all files that are needed

    def fetch(file: str, at: str) -> Path:
        cached_only = failure is not None
        try:
            return Path(hf_hub_download(repo, file, revision=at, local_files_only=cached_only))
        except Exception as error:
            raise UserError(
                f"cannot get {file} of {repo} (revision {revision}) from {constants.ENDPOINT}: "
                f"{_reason(failure or error)}; {WAYS_AROUND}"
            ) from error

    config = fetch("config.json", revision)
    commit = config.parent.name  # the cache's layout: snapshots/COMMIT/config.json
    if failure is None:
        available = {sibling.rfilename for sibling in info.siblings or ()}
    else:
        available = set(os.listdir(config.parent))
    for file in ("tokenizer.json", *sorted(available.intersection(OPTIONAL))):
        fetch(file, commit)
    sharded = INDEX in available
    for file in set(read_index(fetch(INDEX, commit)).values()) if sharded else [SINGLE]:
        fetch(file, commit)
    return config.parent


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # the wrapper only says that something failed
    cache = constants.HF_HUB_CACHE
    known = (  # a subclass stands above its parent class
        (errors.OfflineModeIsEnabled, f"HF_HUB_OFFLINE is set, and the cache {cache} lacks it"),
        (errors.GatedRepoError, "gated: accept its terms on its page there, then set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no such model, or a private one that needs HF_TOKEN"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.EntryNotFoundError, "the model has none (weights are read from safetensors alone)"),
    )
    for kind, reason in known:
        if isinstance(error, kind):
            return reason
    if status := getattr(getattr(error, "response", None), "status_code", None):
        hint = ": access refused, check the name and HF_TOKEN" if status in (401, 403) else ""
        return f"the answer is HTTP {status}{hint}"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"cannot write to the cache {cache}: {error.strerror}"
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}"
