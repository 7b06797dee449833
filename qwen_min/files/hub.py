"""`--model NAME` to a local directory: the embedded checkpoint, a given one, or one of the hub."""

import contextlib
import os
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from qwen_min.errors import UserError
from qwen_min.files.disk import read_json

TINY = Path(__file__).parent.parent / "tiny"  # the checkpoint that comes with the project
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What released files of Qwen3.5 hold beside the text model: a model of images, and one that guesses
# several tokens ahead. Neither is used here.
NOT_TEXT = ("model.visual.", "mtp.")
# The files of a checkpoint's directory beside its weights (few have all; * is any name). They are
# downloaded together, and copied together into a merged checkpoint. The value is the key of a hash,
# or of a content, that changes with the file: in run.json and in results.
FILES = {"config.json": "base_fingerprint", "tokenizer.json": "tokenizer_hash"}
# The chat template; transformers 4 writes it to tokenizer_config.json.
FILES |= dict.fromkeys(("chat_template.jinja", "tokenizer_config.json"), "template")
FILES |= {"generation_config.json": "stop_ids"}  # the tokens that end an answer
# Hashes of known texts, which change no prediction, and what other programs read: transformers
# (also for tokens that a chat template names) and converters.
FILES |= dict.fromkeys(("fed.safetensors", "special_tokens_map.json", "added_tokens.json"))
FILES |= dict.fromkeys(("additional_chat_templates/*.jinja", "vocab.json", "merges.txt"))
# ".." is in no hub name and no git ref; inside the cache it would lead to another directory.
HUB_NAME = re.compile(r"(?!.*\.\.)\w[\w.-]*/[\w.-]+(@[^\s@]+)?", re.ASCII)


def resolve_model(name: str) -> Path:
    """The directory of the model that `--model` names: safetensors, config.json, tokenizer.json,
    and what the model has of the other FILES.

    `tiny` is the embedded checkpoint (`./tiny` is a directory of that name). For an existing
    directory there is no network access, and huggingface_hub is not imported.
    `owner/name` and `owner/name@revision` are hub names: huggingface_hub downloads the files above,
    all from one commit, and no others. It reads HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE.
    Raises UserError if the name is neither, or if a file cannot be downloaded.
    """
    if name == "tiny":
        return TINY
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.lexists(path) or not HUB_NAME.fullmatch(name):
        expected = "expected a directory that exists, or a hub name, owner/name[@revision]"
        raise UserError(f"--model {name!r}: no such directory; {expected}")
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
            found = f"weight_map names {shard!r}, expected a plain file name NAME.safetensors"
            raise UserError(f"{path}: {found}; {advice}")
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
        try:
            # On the terminal itself, because a command's stderr draws no bars.
            with contextlib.redirect_stderr(getattr(sys.stderr, "stream", sys.stderr)):
                path = hf_hub_download(repo, file, revision=at, local_files_only=bool(failure))
            return Path(path)
        except Exception as error:
            what = f"{file} of {repo} (revision {revision}) from {constants.ENDPOINT}"
            found = f"cannot get {what} into {constants.HF_HUB_CACHE}: {_reason(failure or error)}"
            advice = "HF_ENDPOINT=MIRROR, HF_HUB_OFFLINE=1 with a full cache, or a local directory"
            raise UserError(f'{found}; try {advice}: see "No model hub" in README.md') from error

    config = fetch("config.json", revision)
    commit = config.parent.name  # the cache's layout: snapshots/COMMIT/config.json
    names = os.listdir(config.parent) if failure else [f.rfilename for f in info.siblings or ()]
    shards = [SINGLE]
    if INDEX in names:
        listed = read_index(fetch(INDEX, commit)).items()
        shards = [file for name, file in listed if not name.startswith(NOT_TEXT)]
    # Names come from outside: none may lead to another directory, or act on the terminal.
    names = [name for name in names if ".." not in name and name.isprintable()]
    others = [name for name in names if any(fnmatch(name, pattern) for pattern in FILES)]
    for file in dict.fromkeys(("tokenizer.json", *others, *shards)):
        fetch(file, commit)
    return config.parent


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # the wrapper only says that something failed
    known = {  # a subclass stands above its parent class
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, and the cache lacks it",
        errors.GatedRepoError: "gated: accept its terms on its page there, then set HF_TOKEN",
        errors.RepositoryNotFoundError: "no such model, or a private one that needs HF_TOKEN",
        errors.EntryNotFoundError: "the model has none (only safetensors weights are read)",
    }
    for kind, reason in known.items():
        if isinstance(error, kind):
            return reason
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"HTTP {status}: access refused, check the name and HF_TOKEN"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
