#!/usr/bin/env python3
"""LoRA training against transformers + PEFT: the same rows, weights, batches, initial A and B.

    python tests/benchmarks/training.py --model DIR --data train.tsv --steps 6

Both programs take the same steps on the same batches of 8 rows, one after the other in one
process each; losses must agree before speed is compared. Prints a table and, with --output, JSON.
The floor is the time that the products alone need: 4·N FLOPs a token (forward, and gradients of
the inputs; N the weights of the projections), at the rate that is measured for such products.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lora import ATTENTION, inject_lora, lora_parameters
from qwen_min.batching import shuffled_batches, token_budget_batches
from qwen_min.data import read_examples
from qwen_min.head import head_loss
from qwen_min.loading import DTYPES, load_model
from qwen_min.prompt import DEFAULT_LABELS, build_prompts
from qwen_min.scoring import label_loss
from qwen_min.tokenizer import Tokenizer

R, ALPHA, RATE, ROWS = 8, 16, 2e-4, 8


def batches(args: argparse.Namespace) -> list[list]:
    """The steps' rows: (prompt, class) pairs, the same for both programs."""
    examples = read_examples(args.data, DEFAULT_LABELS, limit=args.rows)
    prompts = build_prompts(Tokenizer(args.model), [e.text for e in examples])
    lengths = [len(prompt.ids) for prompt in prompts]
    steps = shuffled_batches(lengths, ROWS, seed=0, epoch=0)[: args.steps]
    return [[(prompts[i], examples[i].label) for i in rows] for rows in steps]


def initial(name: str, shape: torch.Size) -> torch.Tensor:
    """The same A for both, drawn from the parameter's name; B is zero."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator) / shape[1] ** 0.5


def ours(args: argparse.Namespace) -> dict:
    model = load_model(args.model, args.dtype)
    inject_lora(model, ATTENTION, R, ALPHA, 0.0)
    parameters = lora_parameters(model)
    for name, parameter in parameters.items():
        if name.endswith("lora_A"):
            parameter.data.copy_(initial(name, parameter.shape))
    head = None
    if args.method == "lora_head":
        head = torch.nn.Parameter(initial("score", torch.Size([2, model.config.hidden_size])))
    trained = [*parameters.values(), *([head] if head is not None else [])]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(rows: list) -> float:
        total = 0.0
        for part in token_budget_batches([len(p.ids) for p, _ in rows], args.batch_tokens):
            prompts, classes = [rows[i][0] for i in part], [rows[i][1] for i in part]
            if head is None:
                loss = label_loss(model, prompts, classes) / len(rows)
            else:
                loss = head_loss(model, head, prompts, classes) / len(rows)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return run(args, step)


def peft(args: argparse.Namespace) -> dict:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = "CAUSAL_LM" if args.method == "lora_label_scoring" else "SEQ_CLS"
    dtype = "auto" if args.dtype == "auto" else DTYPES[args.dtype]
    if kind == "CAUSAL_LM":
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model, dtype=dtype, num_labels=2, pad_token_id=0
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
        # PEFT keeps the head in the base's dtype; fp32 as here needs the cast of its input.
        head = model.base_model.model.score.modules_to_save["default"]
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(rows: list) -> float:
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
            # transformers looks for the last token that is not the pad id; 0 stands in no text.
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([y for _, y in rows]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run(args, step)


def run(args: argparse.Namespace, step) -> dict:
    """Take the steps; the first one warms up and is not timed."""
    rows = batches(args)
    losses, started, timed = [], 0.0, 0
    for number, batch in enumerate(rows):
        if number == 1:
            started = time.perf_counter()
        losses.append(step(batch))
        timed += sum(len(p.ids) for p, _ in batch) if number else 0
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    count = ROWS * (len(rows) - 1)
    return {
        "rows_per_s": count / seconds,
        "tokens_per_s": timed / seconds,
        "seconds": seconds,
        "peak_mib": peak,
        "losses": losses,
    }


def gemm_rate(args: argparse.Namespace) -> tuple[float, int]:
    """(FLOP/s of products at the model's own shapes, N): 2,048 tokens through one layer."""
    model = load_model(args.model, args.dtype)
    layer = model.model.layers[0]
    weights = [m.weight for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    total = sum(w.numel() for w in weights) * model.config.num_hidden_layers
    rate = 0.0
    with torch.inference_mode():
        inputs = [torch.randn(2048, w.shape[1], dtype=w.dtype) for w in weights]
        for _ in range(5):
            started = time.perf_counter()
            for x, w in zip(inputs, weights, strict=True):
                torch.nn.functional.linear(x, w)
            flops = sum(2 * 2048 * w.numel() for w in weights)
            rate = max(rate, flops / (time.perf_counter() - started))
    return rate, total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--method", default="lora_label_scoring")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--rows", type=int, default=400, help="rows of the file that are used")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--tolerance", type=float, default=None, help="of the losses")
    parser.add_argument("--output", help="JSON")
    parser.add_argument("--only", choices=["ours", "peft"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps((ours if args.only == "ours" else peft)(args)))
        return
    found = {}
    for name in ("ours", "peft"):  # a process each, so that peak memory is its own
        command = [sys.executable, *sys.argv, "--only", name]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(out.splitlines()[-1])
    rate, weights = gemm_rate(args)
    pairs = zip(found["ours"]["losses"], found["peft"]["losses"], strict=True)
    worst = max(abs(a - b) for a, b in pairs)
    # fp32: rounding, carried through the steps. bf16: 8 bits, so a few hundredths.
    tolerance = args.tolerance or (1e-3 if args.dtype == "float32" else 0.15)
    print(f"{args.method}: losses differ by at most {worst:.2e} (allowed {tolerance:g})")
    print(f"products alone: {rate / 1e9:.0f} GFLOP/s, N = {weights / 1e6:.0f} M")
    print("program               rows/s   tokens/s   share of floor   peak MiB")
    for name, row in found.items():
        row["share"] = row["tokens_per_s"] * 4 * weights / rate
        print(
            f"{name:18s} {row['rows_per_s']:9.2f} {row['tokens_per_s']:10.0f} "
            f"{row['share']:16.0%} {row['peak_mib']:10.0f}"
        )
    ratio = found["ours"]["rows_per_s"] / found["peft"]["rows_per_s"]
    memory = found["ours"]["peak_mib"] / found["peft"]["peak_mib"]
    print(f"ours / peft: {ratio:.2f} times the speed, {memory:.2f} of the memory")
    if args.output:
        Path(args.output).write_text(json.dumps({**found, "gemm_flops": rate}, indent=2) + "\n")
    if worst > tolerance:
        sys.exit("error: the losses do not agree; speed says nothing")


if __name__ == "__main__":
    main()
