#!/usr/bin/env python3
"""Compare LoRA training with transformers + PEFT: same rows, weights, batches, initial A and head.

    python tests/benchmarks/training.py --model DIR --data FILE --output training.json
    python tests/benchmarks/training.py --model DIR --data FILE --dtype float32 --rows 32

Both programs take the same steps on the same batches of 8 rows, without dropout, each in its own
process. First, the losses of ten steps in fp32 must agree; otherwise the exit status is 1. Then
speed is measured in --dtype, --rounds times in turn, and the largest difference of the losses is
printed. The first step is a warm-up and is not timed. There are two orders of the rows:

sorted  as in train.py: the texts of a batch have similar lengths, so PEFT needs little padding
random  as in transformers' Trainer by default: any eight rows

PEFT is used as in its documentation: the batch is padded to its longest row, with an attention
mask. transformers computes the loss from the logits at every position (lora_label_scoring), or from
the state of the last token that is not padding (lora_head, AutoModelForSequenceClassification). The
labels 负面 and 正面 have one token each, so transformers' mean over tokens is the mean over rows.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
from common import (
    Floor,
    answer,
    figures,
    gemm_rate,
    hf_dtype,
    in_process,
    make_parser,
    measure_floor,
    print_table,
    ratios,
    read_prompts,
    write_json,
)

from lora import ATTENTION, inject_lora, lora_parameters
from qwen_min.command.cli import positive_int
from qwen_min.fast.batching import token_budget_batches
from qwen_min.fast.features import head_losses
from qwen_min.fast.label_scores import label_losses
from qwen_min.fast.memory import keep_freed_memory
from qwen_min.files.weights import load_model
from qwen_min.prompt import Prompt
from qwen_min.training import shuffled_batches

R, ALPHA, RATE, BATCH = 8, 16, 2e-4, 8
METHODS, ORDERS = ("lora_label_scoring", "lora_head"), ("sorted", "random")
BATCH_TOKENS = 1024  # in one forward; the default of train.py
COMPARED = (
    10  # steps whose fp32 losses must agree; only rounding may differ, and it adds up over steps
)
BOUND = 1e-3

COLUMNS = {
    "method": "",
    "order": "",
    "program": "",
    "rows_per_s": ".2f",
    "floor_rows_per_s": ".2f",
    "share": ".0%",
    "ours_faster_by": ".2f",
    "least": ".2f",
    "most": ".2f",
    "peak_mib": ".0f",
    "ours_of_memory": ".2f",
}

Step = Callable[[list[tuple[Prompt, int]]], float]


def batches(args: argparse.Namespace, order: str) -> list[list[tuple[Prompt, int]]]:
    """The steps' rows: (prompt, class) pairs, the same for both programs."""
    rows, prompts = read_prompts(args)
    if order == "sorted":
        steps = shuffled_batches([len(prompt.ids) for prompt in prompts], BATCH, seed=0, epoch=0)
    else:
        drawn = random.Random(0).sample(range(len(rows)), len(rows))
        steps = [drawn[i : i + BATCH] for i in range(0, len(drawn), BATCH)]
    return [[(prompts[i], rows[i].label) for i in step] for step in steps if len(step) == BATCH]


def initial(name: str, shape: torch.Size) -> torch.Tensor:
    """Initial A or head, equal in both programs: the seed comes from the name. B is zero."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator) / shape[1] ** 0.5


def ours(args: argparse.Namespace) -> Step:
    keep_freed_memory()  # like the commands
    model = load_model(args.model, args.dtype)
    inject_lora(model, ATTENTION, R, ALPHA, 0.0)
    model.train()
    parameters = lora_parameters(model)
    for name, parameter in parameters.items():
        if name.endswith("lora_A"):
            parameter.data.copy_(initial(name, parameter.shape))
    head = None
    if args.method == "lora_head":
        head = torch.nn.Parameter(initial("score", torch.Size([2, model.config.hidden_size])))
    trained = [*parameters.values(), *([head] if head is not None else [])]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(rows: list[tuple[Prompt, int]]) -> float:
        total = 0.0
        for part in token_budget_batches([len(p.ids) for p, _ in rows], BATCH_TOKENS):
            prompts, classes = [rows[i][0] for i in part], [rows[i][1] for i in part]
            if head is None:
                loss = label_losses(model, prompts, classes) / len(rows)
            else:
                loss = head_losses(model, head, prompts, classes, False) / len(rows)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def peft(args: argparse.Namespace) -> Step:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = "CAUSAL_LM" if args.method == "lora_label_scoring" else "SEQ_CLS"
    if kind == "CAUSAL_LM":
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=hf_dtype(args))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model, dtype=hf_dtype(args), num_labels=2, pad_token_id=0
        )
    config = LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=list(ATTENTION), lora_dropout=0.0, task_type=kind
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            ours = name.removeprefix("base_model.model.").replace(".default.weight", "")
            parameter.data.copy_(initial(ours, parameter.shape))
        if "modules_to_save" in name:
            parameter.data = initial("score", parameter.shape)
    if kind == "SEQ_CLS":
        # PEFT would run the head in the base's dtype. In fp32, as here, its input must be cast.
        head = model.base_model.model.score.modules_to_save["default"]
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(rows: list[tuple[Prompt, int]]) -> float:
        texts = [[*p.ids, *(p.labels[y] if kind == "CAUSAL_LM" else ())] for p, y in rows]
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        if kind == "CAUSAL_LM":
            labels = torch.full_like(ids, -100)
            for row, (prompt, y) in enumerate(rows):
                labels[row, len(prompt.ids) : len(texts[row])] = torch.tensor(prompt.labels[y])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        else:
            # transformers searches for the last token that is not the pad id; no prompt ends in 0.
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([y for _, y in rows]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def run(args: argparse.Namespace) -> dict:
    """One program: load, then take all steps."""
    step = {"ours": ours, "peft": peft}[args.only](args)
    steps = batches(args, args.order)
    losses = [step(steps[0])]
    started = time.perf_counter()
    losses += [step(rows) for rows in steps[1:]]
    return {"seconds": time.perf_counter() - started, "losses": losses}


def both(args: argparse.Namespace, method: str, order: str, rows: int, dtype: str) -> dict:
    """The results of both programs, and the largest difference of their losses."""
    flags = ["--rows", str(rows), "--method", method, "--order", order, "--dtype", dtype, "--only"]
    found = {name: in_process(*flags, name) for name in ("ours", "peft")}
    pairs = zip(found["ours"]["losses"], found["peft"]["losses"], strict=True)
    worst = max(abs(a - b) for a, b in pairs)
    print(
        f"{method}, {order}, {dtype}, {rows} rows: losses differ by at most {worst:.1e}", flush=True
    )
    return {**found, "worst": worst}


def compare(args: argparse.Namespace, floor: Floor, method: str, order: str) -> list[dict]:
    """A row for each program."""
    found = both(args, method, order, args.rows, args.dtype)
    more = [both(args, method, order, args.rows, args.dtype) for _ in range(args.rounds - 1)]
    worst = found.pop("worst")
    steps = batches(args, order)[1:]
    least = sum(floor.training([prompt.ids for prompt, _ in step]) for step in steps)
    seconds = {name: [run[name]["seconds"] for run in (found, *more)] for name in found}
    rows = [
        {
            "method": method,
            "order": order,
            "program": name,
            **figures(len(steps) * BATCH, statistics.median(seconds[name]), least),
            **ratios(seconds["ours"], seconds[name]),
            "seconds": seconds[name],
            "peak_mib": row["peak_mib"],
            "ours_of_memory": found["ours"]["peak_mib"] / row["peak_mib"],
            "losses": row["losses"],
            "losses_differ_by": worst,
        }
        for name, row in found.items()
    ]
    return rows


def main() -> None:
    parser = make_parser(__doc__, rows=88)
    parser.add_argument("--method", choices=METHODS, help="default: both")
    parser.add_argument("--order", choices=ORDERS, help="default: both")
    parser.add_argument("--rounds", type=positive_int, default=3, help="default 3")
    args = parser.parse_args()
    if args.only:
        return answer(gemm_rate(args) if args.only == "gemm" else run(args))
    methods = [args.method] if args.method else METHODS
    orders = [args.order] if args.order else ORDERS
    if args.quick:
        args.rows, args.rounds, orders = 2 * BATCH, 1, orders[:1]
    floor, results = measure_floor(args), []
    for method in methods:
        steps = 2 if args.quick else COMPARED
        if both(args, method, orders[0], steps * BATCH, "float32")["worst"] > BOUND:
            sys.exit(
                f"error: losses differ by more than {BOUND:g}, so the speeds cannot be compared"
            )
        for order in orders:
            results += compare(args, floor, method, order)
    print_table(results, COLUMNS)
    write_json(args, floor, results)


if __name__ == "__main__":
    main()
