#!/usr/bin/env python3
"""Copy a run with trained token vectors, and set some of the vectors back to the base's.

    python tests/results/set_back.py runs/0.5b/embeddings-words --keep labels --output DIR

--keep labels keeps the trained vectors of the label words and sets all others back. --keep others
does the opposite. Evaluating both copies shows what the label words' own vectors contribute.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qwen_min.command.trained import VECTORS
from qwen_min.files.hub import resolve_model
from qwen_min.files.run import write_json
from qwen_min.files.weights import load_model
from qwen_min.lab import token_vectors
from qwen_min.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """The command: write the copy to --output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the run")
    parser.add_argument("--keep", choices=("labels", "others"), required=True)
    parser.add_argument("--output", type=Path, metavar="DIR", required=True)
    args = parser.parse_args(argv)
    record = json.loads((args.run / "run.json").read_text(encoding="utf-8"))
    if record["method"] != "lora_label_scoring" or record["arguments"]["lora_targets"] != "none":
        parser.error(f"{args.run}: expected a run of lora_label_scoring with --lora-targets none")
    model = resolve_model(record["arguments"]["model"])
    base = token_vectors.token_vectors(load_model(model, "float32"), scores_words=True)
    trained = load_file(args.run / VECTORS)  # (V, D) by name

    tokenizer = Tokenizer(model)
    labels = sorted({token for word in record["labels"] for token in tokenizer.encode(word)})
    vocabulary, width = next(iter(trained.values())).shape
    set_back = torch.ones(vocabulary, dtype=torch.bool)
    set_back[labels] = False
    if args.keep == "others":
        set_back = ~set_back
    for name, vectors in trained.items():
        vectors[set_back] = base[name].detach()[set_back]

    args.output.mkdir(parents=True, exist_ok=True)
    token_vectors.write(args.output / VECTORS, trained, record["base_fingerprint"])
    record |= {"embedding_movement": None, "result_hash": None}  # another result than the run's
    record["trained_parameters"] = int((~set_back).sum()) * width * len(trained)
    write_json(args.output / "run.json", record)


if __name__ == "__main__":
    main()
