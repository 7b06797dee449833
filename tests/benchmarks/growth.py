#!/usr/bin/env python3
"""How zero_shot scales with text length, number of labels and batch budget; memory with rows.

    python tests/benchmarks/growth.py --model DIR --data FILE --output growth.json

Each line measures this project alone, from prompts to scores, after one warm-up. Texts of a given
length are rows of the file, joined and cut to that many tokens. Peak memory is measured in a new
process for each number of rows. It should not grow with the number of rows.
"""

import argparse
import time

from common import (
    TEMPLATE,
    UNCUT,
    Floor,
    answer,
    figures,
    gemm_rate,
    in_process,
    make_parser,
    measure_floor,
    print_table,
    read_prompts,
    read_rows,
    write_json,
)

from qwen_min.fast.batching import DEFAULT_BATCH_TOKENS
from qwen_min.fast.label_scores import score_labels
from qwen_min.fast.memory import keep_freed_memory
from qwen_min.files.weights import load_model
from qwen_min.model import Qwen
from qwen_min.prompt import DEFAULT_LABELS, Prompt, build_prompts
from qwen_min.tokenizer import Tokenizer

LENGTHS = (32, 64, 128, 256, 512, 1024)  # tokens of a text
NUMBERS = (2, 5, 10, 20, 50)  # of labels
BUDGETS = (256, 512, 1024, 2048, 4096, 8192)  # tokens in one forward
ROWS = (50, 200, 800)
DEGREES = ("很", "非常", "十分", "相当", "比较", "有点", "特别", "极其", "稍微", "不太")
FEELINGS = ("满意", "失望", "喜欢", "讨厌", "开心")
WORDS = tuple(degree + feeling for degree in DEGREES for feeling in FEELINGS)
COLUMNS = {"value": "", "rows_per_s": ".2f", "floor_rows_per_s": ".2f", "share": ".0%"}


def long_prompts(args: argparse.Namespace, tokens: int, rows: int) -> list[Prompt]:
    """Prompts whose texts have `tokens` tokens each: text i joins the rows from row i on."""
    texts = [row.text for row in read_rows(args)]
    count = min(rows, len(texts))
    while sum(map(len, texts)) < 4 * tokens:  # a token is rarely more than two characters
        texts += texts
    turned = ["".join(texts[i:] + texts[:i]) for i in range(count)]
    cut = [text[: 8 * tokens] for text in turned]
    return build_prompts(Tokenizer(args.model), cut, TEMPLATE, DEFAULT_LABELS, tokens)


def measure(
    model: Qwen, floor: Floor, prompts: list[Prompt], budget: int = DEFAULT_BATCH_TOKENS
) -> dict:
    started = time.perf_counter()
    score_labels(model, prompts, budget)
    seconds = time.perf_counter() - started
    return {"rows": len(prompts), **figures(len(prompts), seconds, floor.scoring(prompts))}


def speeds(args: argparse.Namespace, floor: Floor) -> dict[str, list[dict]]:
    """For each quantity that grows, one line for each value."""
    model = load_model(args.model, args.dtype)
    rows, prompts = read_prompts(args)
    score_labels(model, prompts[:2])
    results: dict[str, list[dict]] = {"text tokens": [], "labels": [], "batch budget": []}

    def add(grows: str, value: int, prompts: list[Prompt], *budget: int) -> None:
        results[grows].append({"value": str(value), **measure(model, floor, prompts, *budget)})

    for tokens in LENGTHS[:2] if args.quick else LENGTHS:
        # Fewer rows for longer texts, so that each length takes about the same time.
        add("text tokens", tokens, long_prompts(args, tokens, max(4, args.rows * 128 // tokens)))
    for number in NUMBERS[:2] if args.quick else NUMBERS:
        texts = [row.text for row in rows]
        labels = WORDS[:number]
        add("labels", number, build_prompts(Tokenizer(args.model), texts, TEMPLATE, labels, UNCUT))
    for budget in BUDGETS[:2] if args.quick else BUDGETS:
        add("batch budget", budget, prompts, budget)
    return results


def memory(args: argparse.Namespace) -> dict:
    """Score all rows; `answer` adds the peak memory."""
    _, prompts = read_prompts(args)
    score_labels(load_model(args.model, args.dtype), prompts)
    return {"rows": len(prompts), "text_tokens": max(len(prompt.ids) for prompt in prompts)}


def main() -> None:
    args = make_parser(__doc__, rows=100).parse_args()
    keep_freed_memory()  # like the commands
    if args.only:
        return answer(gemm_rate(args) if args.only == "gemm" else memory(args))
    if args.quick:
        args.rows = 4
    floor = measure_floor(args)
    numbers = [str(rows) for rows in ((2, 8) if args.quick else ROWS)]
    peaks = [in_process("--rows", rows, "--only", "memory") for rows in numbers]
    results = speeds(args, floor)
    for name, rows in results.items():
        print(name)
        print_table(rows, COLUMNS)
    print("memory")
    print_table(peaks, {"rows": "d", "peak_mib": ".0f"})
    write_json(args, floor, {**results, "memory": peaks})


if __name__ == "__main__":
    main()
