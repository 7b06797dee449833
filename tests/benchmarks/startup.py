#!/usr/bin/env python3
"""Compare the time to load, and from process start to first score, with transformers.

    python tests/benchmarks/startup.py --model DIR --data FILE --output startup.json

Two programs have the least code that scores two labels for one text; a third program only imports
torch. They run in turn, several times. Medians are printed without the first round, which may read
files from disk that later rounds find in memory. The scores must agree; otherwise the exit status
is 1. The floor is the time to import torch plus the matrix products for one text.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import (
    TEMPLATE,
    UNCUT,
    answer,
    gemm_rate,
    make_parser,
    measure_floor,
    print_table,
    read_prompts,
    score_bound,
    write_json,
)

from qwen_min.prompt import DEFAULT_LABELS

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    "program": "",
    "load_s": ".2f",
    "first_score_s": ".2f",
    "floor_s": ".2f",
    "share": ".0%",
    "ours_of_it": ".2f",
}
# Arguments: directory, dtype, template, text and two labels. Output: seconds of loading, clock time
# at the first score, and the scores.
OURS = f"""
import json, sys, time
from qwen_min.files.weights import load_model
from qwen_min.fast.memory import keep_freed_memory
from qwen_min.fast.label_scores import score_labels
from qwen_min.prompt import build_prompts
from qwen_min.tokenizer import Tokenizer

directory, dtype, template, text, *labels = sys.argv[1:]
started = time.monotonic()
keep_freed_memory()
model, tokenizer = load_model(directory, dtype), Tokenizer(directory)
loaded = time.monotonic() - started
scores = score_labels(model, build_prompts(tokenizer, [text], template, labels, {UNCUT}))[0]
print(json.dumps([loaded, time.monotonic(), scores.tolist()]))
"""
TRANSFORMERS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, dtype, template, text, *labels = sys.argv[1:]
started = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
tokenizer = AutoTokenizer.from_pretrained(directory)
loaded = time.monotonic() - started
prompt = template.replace("{text}", text)
size = len(tokenizer(prompt)["input_ids"])
scores = []
with torch.inference_mode():
    for label in labels:
        ids = tokenizer(prompt + label, return_tensors="pt")["input_ids"]
        log_probs = model(ids).logits[0, size - 1 : -1].float().log_softmax(dim=-1)
        scores.append(log_probs.gather(1, ids[0, size:, None]).sum().item())
print(json.dumps([loaded, time.monotonic(), scores]))
"""
IMPORT = """
import json, time
import torch
print(json.dumps([0.0, time.monotonic(), None]))
"""
PROGRAMS = {"zero_shot": OURS, "transformers": TRANSFORMERS, "import torch": IMPORT}


def run(program: str, arguments: list[str]) -> dict:
    """Start a process; measure until it reports its first score."""
    started = time.monotonic()  # this clock is the same in all processes
    command = [sys.executable, "-c", PROGRAMS[program], *arguments]
    out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    load, at, scores = json.loads(out)
    return {"load": load, "first_score": at - started, "scores": scores}


def main() -> None:
    parser = make_parser(__doc__, rows=1)
    parser.add_argument("--rounds", type=int, default=6, help="default 6")
    args = parser.parse_args()
    if args.only:
        return answer(gemm_rate(args))
    args.rows, rounds = 1, 2 if args.quick else args.rounds
    floor = measure_floor(args)
    rows, prompts = read_prompts(args)
    directory = str(Path(args.model).resolve())
    arguments = [directory, args.dtype, TEMPLATE, rows[0].text, *DEFAULT_LABELS]
    found = {name: [] for name in PROGRAMS}
    for _ in range(rounds):
        for name, runs in found.items():
            runs.append(run(name, arguments))
    first = {name: statistics.median(r["first_score"] for r in f[1:]) for name, f in found.items()}
    least = first["import torch"] + floor.scoring(prompts)
    results = [
        {
            "program": name,
            "load_s": statistics.median(r["load"] for r in runs[1:]),
            "first_score_s": first[name],
            "floor_s": least,
            "share": least / first[name],
            "ours_of_it": first["zero_shot"] / first[name],
            "runs": runs,
        }
        for name, runs in found.items()
    ]
    ours, theirs = (found[name][0]["scores"] for name in ("zero_shot", "transformers"))
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"scores differ by at most {worst:.1e}")
    print_table([row for row in results if row["program"] != "import torch"], COLUMNS)
    print(f"import torch alone: {first['import torch']:.2f} s")
    write_json(args, floor, results)
    if worst > score_bound(floor.dtype):
        sys.exit("error: the scores do not agree, so the speeds cannot be compared")


if __name__ == "__main__":
    main()
