"""What the predictions of an evaluation depend on, as `compare.Result` keeps it."""

from pathlib import Path

from qwen_min.prompt import parse_labels

# Arguments that change no prediction: names of outputs, and what is measured besides.
NEUTRAL = {"method", "seed", "run", "output", "predictions", "changed", "resume", "export"}
NEUTRAL |= {"merge", "feature_cache", "train_data", "calibrate", "explain", "label_sets"}
# And which rows are read: these have a hash.
NEUTRAL |= {"errors", "explain_row", "data", "limit", "encoding", "text_column", "label_column"}
# Arguments of the LoRA methods, which head_only records and ignores.
IGNORED = {"lora_targets", "train_embeddings", "r", "alpha", "rslora", "dropout", "epochs", "lr"}
IGNORED |= {"warmup", "batch_size", "clip", "eval_every", "save_every", "checkpointing"}


def identify(results: dict, training: dict) -> tuple[dict, dict, dict]:
    """(shown, hashes, identity): settings as arguments, hashes of some, and what makes a method.

    Results are seeds of one method only if their identity is equal. In it a file stands by the hash
    of its content or, if an older version recorded no hash, by its name, which never equals a hash.
    Of what was trained as it is evaluated it has the latter alone. training: the arguments of the
    run, if there is one.
    """
    arguments, method = results["arguments"], results["method"]
    # Label words as they were used, however they were typed; "name=word" scores another word.
    typed, own = str(arguments.get("labels")), training.get("labels")
    names = ",".join(row["name"] for row in results["per_class"])
    words = ",".join(parse_labels(typed)) if "=" in typed else names
    shown = {"examples": f"{results['n']} of {Path(str(arguments.get('data'))).name}"}
    shown |= {name: v for name, v in arguments.items() if name not in NEUTRAL}
    shown |= {"labels": words, "template": whole_template(results.get("template"), arguments)}
    # Found when it ran: dtype and device can be "auto" as arguments.
    found = ("dtype", "device", "tokenizer_hash", "stop_ids")
    shown |= {name: results[name] for name in found if results.get(name) is not None}

    # The model of an evaluation is always that of the training.
    unused = NEUTRAL | {"model", "device", "dtype"} | (IGNORED if method == "head_only" else set())
    settings = {name: v for name, v in training.items() if name not in unused}
    if own:
        settings["labels"] = words if own == typed else ",".join(parse_labels(str(own)))
    if training:
        settings["template"] = whole_template(results.get("training_template"), training)
        part = f", first {training['limit']} rows" if training.get("limit") else ""
        shown["train_data"] = f"{training.get('data')}{part}"
    trained_in = results.get("training_dtype") or training.get("dtype")
    if trained_in not in (None, "auto"):  # older runs recorded none
        settings["dtype"] = trained_in
    identity = dict(shown)
    for name, value in settings.items():
        key = f"train_{name}" if name in identity else name
        shown[key] = value
        if value != identity.get(name):
            identity[key] = value

    hashes = {"examples": results["examples_hash"], "model": results.get("base_fingerprint")}
    hashes |= dict.fromkeys(("adapter", "train_adapter"), results.get("adapter_hash"))
    hashes["train_data"] = results.get("training_data_hash")
    hashes = {name: value for name, value in hashes.items() if value and shown.get(name)}
    given = {name: v for name, v in identity.items() if v is not None and v is not False}
    identity = {name: hashes.get(name, v) for name, v in given.items()} | {"method": method}
    if "truncated_rows" in results:  # older versions counted neither
        shown["texts shortened"] = results["truncated_rows"]
    # What a base was made from is not known, unless it brings the hashes of these texts.
    clean, fed = results.get("clean") or {}, results.get("fed_rows") or None
    if (seen := results["n"] - clean["n"] if "n" in clean else fed) is not None:
        shown["rows seen in training"] = seen
    return shown, hashes, identity


def whole_template(known: str | None, arguments: dict) -> str | None:
    """The template with its chat markup; if an older version did not record it, as typed."""
    typed = arguments.get("template")
    return known or (typed and str(typed).replace("\\n", "\n"))
