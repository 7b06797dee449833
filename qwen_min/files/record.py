"""What run.json must hold so that a run can be continued, evaluated or exported."""

from pathlib import Path

from qwen_min.errors import UserError
from qwen_min.files.data import READINGS
from qwen_min.files.run import read_run
from qwen_min.files.weights import DTYPES
from qwen_min.head import POOLINGS

METHODS = ("head_only", "lora_head", "lora_label_scoring")
COUNT, SEED = range(1, 2**63), range(2**63)
# The arguments of a run by their schema (see `read_json`). Those that may be null may be missing:
# older runs lack some.
SCHEMAS = {
    str: "model data labels template device output layer lora_targets",
    (str, None): "encoding text_column label_column system adapter feature_cache export dev "
    "class_weights",
    COUNT: "max_text_tokens batch_tokens batch_size epochs r save_every",
    (COUNT, None): "limit eval_every",
    SEED: "seed data_seed",
    float: "alpha dropout lr warmup clip",
    bool: "rslora checkpointing",
    (bool, None): "chat train_embeddings plain",
    ("auto", *DTYPES): "dtype",
    POOLINGS: "pooling",
    METHODS: "method",
}
ARGUMENTS = {name: schema for schema, names in SCHEMAS.items() for name in names.split()}
RECORD = {"method": METHODS, "arguments": ARGUMENTS, "labels": [str], "finished": bool}
RECORD |= dict.fromkeys(("base_fingerprint", "data_hash", "frozen_before"), str)
RECORD |= {"labels_read_as": (*READINGS, None), "dtype": (*DTYPES, None)}  # older runs lack them
# A file whose rows the adapter of a probe has seen.
SEEN = {"path": str, "hash": str, "labels": [str], "limit": (COUNT, None)}
SEEN |= dict.fromkeys(("encoding", "text_column", "label_column"), (str, None))
SEEN |= {"read_as": (*READINGS, None)}
FINISHED = {"trained_parameters": int, "seconds": float, "result_hash": (str, None)}


def read_whole_run(directory: str | Path) -> dict:
    """`read_run`, with each field checked that a command uses."""
    found = read_run(directory)
    more = FINISHED if found.get("finished") else {}
    if found.get("adapter_files"):  # older runs and most others have none
        more = more | {"adapter_files": [SEEN]}
    record = read_run(directory, **RECORD, **more)
    for name, value in record["arguments"].items():
        if "\0" in str(value):  # no command line holds it, and a path with it names no file
            raise UserError(f"{directory}/run.json: {name} holds a NUL; train again")
    return record
