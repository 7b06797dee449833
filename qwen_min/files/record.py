"""What run.json must hold so that a run can be continued, evaluated or merged."""

from pathlib import Path

from qwen_min.files.disk import refuse_malformed
from qwen_min.files.run import read_run
from qwen_min.files.weights import DTYPES
from qwen_min.head import POOLINGS

# The arguments of a run, with their types; those that older runs lack may be missing.
TYPES = {
    str: "model data encoding labels template dtype device output pooling layer lora_targets",
    (str, None): "system adapter feature_cache merge",
    int: "max_text_tokens batch_tokens batch_size epochs r save_every seed data_seed",
    (int, None): "limit eval_every",
    float: "alpha dropout lr warmup clip",
    bool: "rslora checkpointing",
    (bool, None): "chat train_embeddings plain",
}
ARGUMENTS = {name: type_ for type_, names in TYPES.items() for name in names.split()}
RECORD = {"arguments": ARGUMENTS, "labels": [str], "finished": bool}
RECORD |= dict.fromkeys(("base_fingerprint", "data_hash", "frozen_before"), str)
FINISHED = {"trained_parameters": int, "seconds": float}
TRAINED = ("head_only", "lora_head", "lora_label_scoring")
CHOICES = {"dtype": ("auto", *DTYPES), "pooling": POOLINGS}


def read_whole_run(directory: str | Path) -> dict:
    """`read_run`, with each field checked that a command uses, as if it were typed."""
    more = FINISHED if read_run(directory).get("finished") else {}
    record = read_run(directory, **RECORD, **more)
    arguments, path = record["arguments"], Path(directory) / "run.json"
    with refuse_malformed(path, "a run's record", "give a directory that train.py made"):
        if record["method"] not in TRAINED:
            raise ValueError(f"method is {record['method']!r}, expected {' or '.join(TRAINED)}")
        for name, choices in CHOICES.items():
            if arguments[name] not in choices:
                found = f"arguments.{name} is {arguments[name]!r}"
                raise ValueError(f"{found}, expected {' or '.join(choices)}")
        for name in f"{TYPES[int]} {TYPES[int, None]}".split():
            least, value = 0 if name.endswith("seed") else 1, arguments.get(name)
            if value is not None and value < least:
                raise ValueError(f"arguments.{name} is {value}, expected at least {least}")
    return record
