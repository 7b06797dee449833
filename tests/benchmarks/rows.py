#!/usr/bin/env python3
"""Memory of 100,000 rows with 300 labels: what each stage keeps of a row.

    python tests/benchmarks/rows.py --model qwen_min/tiny --data FILE --output rows.json

Prompts are built, scored and written as evaluate.py does it, in a new process for a quarter of the
rows and for all of them. The growth of the peak, divided by the rows between, is what a row costs:
its prompt, and 8 bytes for each score. Texts are rows of the file, cut to 8 characters, and
repeated until there are enough. Exit status 1 if a stage keeps more than that. Nearly all of the
time goes into encoding each prompt with each label behind it.
"""

import argparse
import itertools
import json
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from common import answer, in_process, make_parser, print_table, read_rows

from qwen_min.command.classifier import Outcome
from qwen_min.command.outcome import prediction_lines
from qwen_min.fast.label_scores import score_labels
from qwen_min.files.data import Example
from qwen_min.files.output import Output
from qwen_min.files.weights import load_model
from qwen_min.prompt import DEFAULT_TEMPLATE, build_prompts
from qwen_min.tokenizer import Tokenizer

PARTS = ("很不非太最", "好差快慢新旧", "的了呢吧啊吗呀哦啦哇")
WORDS = ["".join(word) for word in itertools.product(*PARTS)]  # 300
# Bytes of a row: text, example, place, prompt, ids; then also its scores, and twice while they are
# written. Once for all rows: what the allocator keeps sooner or later.
MOST = {"prompts": 1500, "scores": 1500 + 8 * len(WORDS), "written": 1500 + 2 * 8 * len(WORDS)}
ONCE = 64 * 2**20


def stages(args: argparse.Namespace) -> dict:
    """Seconds up to the end of each stage, and the peak of memory, in bytes."""
    rows = read_rows(argparse.Namespace(data=args.data, rows=1000))
    examples = [Example(f"{rows[i % len(rows)].text[:8]}{i}", i % 2, i) for i in range(args.rows)]
    model, found, started = load_model(args.model, args.dtype), {}, time.perf_counter()

    def finish(stage: str) -> None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        found[stage] = {"seconds": time.perf_counter() - started, "peak": peak}

    places = [f"{args.data}, line {example.line}" for example in examples]
    texts = [example.text for example in examples]
    prompts = build_prompts(Tokenizer(args.model), texts, DEFAULT_TEMPLATE, WORDS, places=places)
    finish("prompts")
    scores = score_labels(model, prompts)
    finish("scores")
    with tempfile.TemporaryDirectory() as directory:
        outcome = Outcome(scores.argmax(axis=1), scores, None, None, 0.0, None)
        lines = partial(prediction_lines, examples, WORDS, outcome)
        Output(Path(directory) / "rows.jsonl").commit(lines)
    finish("written")
    return found


def main() -> int:
    args = make_parser(__doc__, rows=100_000).parse_args()
    if args.only:
        answer(stages(args))
        return 0
    args.rows = 800 if args.quick else args.rows
    numbers = (args.rows // 4, args.rows)
    part, whole = (in_process("--rows", str(rows), "--only", "all") for rows in numbers)
    more, table, kept = numbers[1] - numbers[0], [], True
    for stage, most in MOST.items():
        grown = whole[stage]["peak"] - part[stage]["peak"]
        kept &= grown <= most * more + ONCE
        row = {"seconds": whole[stage]["seconds"], "peak_mib": whole[stage]["peak"] / 2**20}
        table.append({"stage": stage, **row, "bytes_per_row": grown / more, "at_most": most})
    print(f"{args.rows} rows, {len(WORDS)} labels")
    formats = {"seconds": ".0f", "peak_mib": ".0f", "bytes_per_row": ".0f", "at_most": "d"}
    print_table(table, {"stage": "", **formats})
    if args.output:
        Path(args.output).write_text(json.dumps(table, indent=2) + "\n")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
