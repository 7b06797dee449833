#!/usr/bin/env python3
"""Compare head_only with training a linear head for three epochs on a frozen base, in transformers.

    python tests/benchmarks/probe.py --model DIR --data FILE --output probe.json

This project runs the base once over all rows and solves a logistic regression on the hidden states.
The penalty is chosen on the held-out tenth. The peer works like transformers' Trainer. In each of
three epochs it runs the frozen base again, without gradients, on shuffled batches of 8 rows padded
to the longest row. It trains the head with AdamW, and runs the held-out rows once at the end.

The two heads therefore differ: one is solved numerically with a penalty, the other takes a few
hundred steps. Held-out accuracy is printed for both. The hidden states of the held-out rows (last
token) must agree before speed is compared. Otherwise the exit status is 1. The floor is the time to
read each row once.
"""

import argparse
import random
import sys
import time

import numpy as np
import torch
from common import (
    answer,
    figures,
    gemm_rate,
    hf_dtype,
    in_process,
    make_parser,
    measure_floor,
    print_table,
    read_prompts,
    write_json,
)

from qwen_min.fast.batching import DEFAULT_BATCH_TOKENS
from qwen_min.fast.features import pooled_features
from qwen_min.fast.memory import keep_freed_memory
from qwen_min.files.data import held_out_split
from qwen_min.files.weights import load_model
from qwen_min.head import fit_layers

HELD_OUT, EPOCHS, BATCH, CLASSES = 0.1, 3, 8, 2
RATE = 1e-3  # Trainer's default of 5e-5 is for whole models; a head would hardly move
# Largest allowed difference of states, relative to their length. fp32: rounding in 24 layers (6e-7
# measured). bf16: a step of 1/128 at each of 24 additions to the residual (1.2e-2 measured).
FP32_BOUND, BF16_BOUND = 1e-5, 0.05
COLUMNS = {
    "program": "",
    "seconds": ".2f",
    "rows_per_s": ".2f",
    "floor_rows_per_s": ".2f",
    "share": ".0%",
    "ours_faster_by": ".2f",
    "peak_mib": ".0f",
    "held_out_accuracy": ".3f",
}


def ours(args: argparse.Namespace) -> dict:
    keep_freed_memory()  # like the commands
    model = load_model(args.model, args.dtype)
    rows, prompts = read_prompts(args)
    training, held_out = held_out_split(rows, HELD_OUT, seed=0)
    pooled_features(model, prompts[:1], "last", False, DEFAULT_BATCH_TOKENS)
    started = time.perf_counter()
    features = pooled_features(model, prompts, "last", False, DEFAULT_BATCH_TOKENS)
    last = model.config.num_hidden_layers
    labels = np.array([row.label for row in rows])
    found, _ = fit_layers(features, [last], labels, training, held_out, CLASSES, "last")
    return {
        "seconds": time.perf_counter() - started,
        "held_out_accuracy": found[last]["held_out_accuracy"],
        "states": features[held_out, 0].tolist(),
    }


def transformers(args: argparse.Namespace) -> dict:
    from transformers import AutoModel

    base = AutoModel.from_pretrained(args.model, dtype=hf_dtype(args)).eval()
    rows, prompts = read_prompts(args)
    training, held_out = held_out_split(rows, HELD_OUT, seed=0)
    labels = torch.tensor([row.label for row in rows])

    @torch.no_grad()
    def states(batch: list[int]) -> torch.Tensor:
        texts = [list(prompts[row].ids) for row in batch]
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        h = base(input_ids=ids, attention_mask=mask).last_hidden_state
        return h[torch.arange(len(batch)), mask.sum(dim=1) - 1].float()

    torch.manual_seed(0)
    head = torch.nn.Linear(base.config.hidden_size, CLASSES)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE)
    states([0])
    started = time.perf_counter()
    for epoch in range(EPOCHS):
        order = random.Random(epoch).sample(list(training), len(training))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            torch.nn.functional.cross_entropy(head(states(batch)), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    found = [states(held_out[start : start + BATCH]) for start in range(0, len(held_out), BATCH)]
    held_out_states = torch.cat(found)
    predicted = head(held_out_states).argmax(dim=1)
    return {
        "seconds": time.perf_counter() - started,
        "held_out_accuracy": (predicted == labels[held_out]).float().mean().item(),
        "states": held_out_states.tolist(),
    }


PROGRAMS = {"head_only": ours, "transformers": transformers, "gemm": gemm_rate}


def main() -> None:
    args = make_parser(__doc__, rows=400).parse_args()
    if args.only:
        return answer(PROGRAMS[args.only](args))
    if args.quick:
        args.rows = min(args.rows, 20)
    floor = measure_floor(args)
    flags = ("--rows", str(args.rows), "--only")
    found = {name: in_process(*flags, name) for name in ("head_only", "transformers")}
    a, b = (np.array(row.pop("states")) for row in found.values())
    worst = float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)).max())
    print(f"states of {len(a)} held-out rows differ by at most {worst:.1e} of their length")
    _, prompts = read_prompts(args)
    least = floor.reading([prompt.ids for prompt in prompts])
    results = [
        {
            "program": name,
            **row,
            **figures(len(prompts), row["seconds"], least),
            "ours_faster_by": row["seconds"] / found["head_only"]["seconds"],
        }
        for name, row in found.items()
    ]
    print_table(results, COLUMNS)
    write_json(args, floor, results)
    if worst > (FP32_BOUND if floor.dtype == "float32" else BF16_BOUND):
        sys.exit("error: the states do not agree, so the speeds cannot be compared")


if __name__ == "__main__":
    main()
