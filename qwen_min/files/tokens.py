"""tokenizer.json, checked, and what the files beside it say about special and added tokens."""

import json
import os
import re
from pathlib import Path

from qwen_min.errors import UserError
from qwen_min.files.disk import read_json, refuse_malformed
from qwen_min.tokenizer import Tokenizer

CONFIG, KIND, ADVICE = "tokenizer_config.json", "a tokenizer config", "fetch it again"
# Special tokens that Qwen's tokenizer class in transformers has where the files name none.
DEFAULT = "<|endoftext|>"
DEFAULTS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), DEFAULT)


def read_tokenizer_config(directory: Path) -> dict:
    """tokenizer_config.json, with what older versions of transformers wrote into other files.

    Raises UserError for a malformed file. Without these files the dict is empty.
    """
    config, older, added = (
        read_json(path, KIND, ADVICE) if os.path.lexists(path := directory / name) else {}
        for name in (CONFIG, "special_tokens_map.json", "added_tokens.json")
    )
    # With the field added_tokens_decoder, the older files don't count.
    return config if "added_tokens_decoder" in config else config | older | {"older": list(added)}


def special_tokens(config: dict, model_type: str = "qwen2") -> dict[str, str]:
    """The special tokens by name, such as eos_token; config is that of `read_tokenizer_config`.

    model_type is config.json's. For two of them transformers ignores the class that the file names.
    """
    kind = str(config.get("tokenizer_class") or "Qwen2Tokenizer")
    qwen = model_type in ("qwen2", "qwen3_5") or re.match("Qwen(2|3_5)Tokenizer", kind)
    extra = extra if isinstance(extra := config.get("extra_special_tokens"), dict) else {}
    named = (DEFAULTS if qwen else {}) | {n: config[n] for n in config if n.endswith("_token")}
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in (named | extra).items()}
    return {n: t for n, t in texts.items() if isinstance(t, str)}


def load_tokenizer(directory: str | Path, special: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer of tokenizer.json, and of special tokens that another file names.

    Raises UserError if the file is missing, or if the `tokenizers` library cannot use it.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():  # a pipe would block
        raise UserError(f"{path}: no such file; give a model directory, which has one")
    try:
        data = path.read_bytes()
        prefix = re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', data)
        if prefix and b'"WordPiece"' not in data:  # the library would end the process
            raise ValueError("its BPE has a continuing_subword_prefix")
        tokenizer = Tokenizer(directory, special)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    # The library raises bare Exception, or a panic, which is no Exception.
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a usable tokenizer ({reason}); fetch it again") from None
    # The library numbers added tokens as they come, whatever their ids in the file.
    ids = {token.content: i for i, token in tokenizer.added.items()}
    for token in json.loads(data).get("added_tokens") or []:
        if (i := ids.get(token["content"])) != token["id"]:
            found = f"its added token {token['content']} has the id {token['id']} but comes as {i}"
            raise UserError(f"{path}: {found}; sort added_tokens by id, without gaps")
    added = tokenizer.added.values()
    if any(t.rstrip for t in added) and any(t.content[:1].isspace() for t in added):
        problem = "an added token has rstrip and another begins with white space"
        raise UserError(f"{path}: {problem}: the library fails there; set rstrip to false")
    return tokenizer


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of tokenizer.json, after a look at the files beside it.

    transformers takes added tokens from all of them; which one counts depends on its version and
    on the tokenizer's class. Raises UserError where they differ. Only special tokens may be in
    tokenizer_config.json alone, as in Qwen3.5's releases.
    """
    config, path = read_tokenizer_config(directory), directory / CONFIG
    with refuse_malformed(path, KIND, ADVICE):
        decoder = dict(config.get("added_tokens_decoder") or {})
        decoder = sorted((int(i), t) for i, t in decoder.items())
        special = [t["content"] for _, t in decoder if t["content"] and t.get("special")]
    tokenizer = load_tokenizer(directory, tuple(special))
    for name in ("add_prefix_space", "split_special_tokens"):
        if config.get(name):
            raise UserError(f"{path}: {name} is not supported; set it to false")
    added = tokenizer.added.items()
    here = {(i, t.content, t.lstrip, t.rstrip, t.single_word) for i, t in added}
    with refuse_malformed(path, KIND, ADVICE):
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = [*([] if isinstance(extra, dict) else extra), *config.get("older", [])]
        odd = {token if isinstance(token, str) else token["content"] for token in named}
        odd |= {*special_tokens(config).values()}
        odd -= {"", DEFAULT, *(token.content for _, token in added)}  # "" means none
        if decoder:
            flags = ("lstrip", "rstrip", "single_word")
            there = {(i, t["content"], *(bool(t.get(f)) for f in flags)) for i, t in decoder}
            odd |= {content for _, content, *_ in here ^ there}
    if odd:
        names = ", ".join(sorted(map(str, odd))[:5])
        found = f"its added tokens are not those of tokenizer.json ({names})"
        raise UserError(f"{path}: {found}; save the tokenizer again, with transformers")
    return tokenizer
