"""`--model NAME` to a local directory: the embedded one, one that is there, or the hub's."""

import json
import os
import re
from pathlib import Path

from qwen_min.errors import UserError

TINY = Path(__file__).parent.parent / "tiny"  # the checkpoint that comes with the project
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Where a checkpoint has them: its chat template, and the tokens that end its answers.
SMALL = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
# A path's beginning, a backslash, a closing slash, or more slashes than a hub name has.
PATH_LIKE = re.compile(r"^[./~]|\\|/$|^[^@]*/[^@]*/")
# No hub name and no git ref holds "..", and in a path of the cache it would climb out.
HUB_NAME = re.compile(r"(?!.*\.\.)[\w.-]+/[\w.-]+(@[^\s@]+)?", re.ASCII)
WAYS_AROUND = (
    "ways around it: a local directory as --model, HF_ENDPOINT=URL of a mirror, HF_HUB_OFFLINE=1 "
    'with a filled cache, or no hub at all (see "No model hub" in README.md)'
)


def resolve_model(name: str) -> Path:
    """Directory with config.json, tokenizer.json and safetensors for what `--model` names; beside
    them, where the model has any, the files in SMALL.

    `tiny` is the embedded checkpoint (`./tiny` is a directory of that name).
    An existing directory is itself: no network, and huggingface_hub is not even imported.
    `owner/name` and `owner/name@revision` are hub names: only the files above are downloaded, all
    from one commit, by huggingface_hub, which itself reads HF_ENDPOINT, HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE. Raises UserError for whatever stands in the way.
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
            f"--model {name!r} is neither a directory nor a hub name; "
            "expected a local directory or owner/name[@revision]"
        )
    repo, _, revision = name.partition("@")
    return _download(repo, revision or "main")


def _download(repo: str, revision: str) -> Path:
    # Imported here: slow, and of no use to a local directory.
    from huggingface_hub import constants, hf_hub_download, model_info, try_to_load_from_cache

    # Both `except Exception`: depending on its version huggingface_hub passes on what requests,
    # httpx, httpx2 or hf_xet raise, and these have no narrower class in common.
    failure = None
    try:
        # One question with a short timeout: hf_hub_download retries a silent endpoint for minutes.
        info = model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        failure = error  # the cache may hold all that is needed

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
    fetch("tokenizer.json", commit)
    if failure is None:
        there = {sibling.rfilename for sibling in info.siblings or ()}
    else:
        optional = (INDEX, *SMALL)
        cached = {name: try_to_load_from_cache(repo, name, revision=commit) for name in optional}
        there = {name for name, path in cached.items() if isinstance(path, str)}
    for file in SMALL:
        if file in there:
            fetch(file, commit)
    for file in _shards(fetch(INDEX, commit)) if INDEX in there else [SINGLE]:
        fetch(file, commit)
    return config.parent


def _shards(index: Path) -> list[str]:
    """The shards that an index maps; each must be a safetensors file beside it."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        usable = shards and all(re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise UserError(
            f"{index}: its weight_map names no *.safetensors files, or others as well; "
            "delete it to download it again, or take another model"
        )
    return shards


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # the wrapper says only that something went wrong
    cache = constants.HF_HUB_CACHE
    known = (  # a class before its parents
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
