"""Code that all benchmarks use: rows, the floor, one process per program, tables and JSON.

The floor is a lower bound on the time of a task: the time of the necessary matrix products alone,
at the rate that this machine reaches for products of the model's shapes and dtype. It counts

- reading: 2·N FLOPs for each token, where N is the number of weights outside embedding and LM head.
  A prefix that several sequences share counts once;
- scoring: 2·V·D FLOPs for each position whose next token is predicted;
- training LoRA: 4·N FLOPs for each token of a step (forward, and gradients of the inputs). A prefix
  that the rows of a step share counts once.

The products inside attention, the norms and everything else are not counted. So no program reaches
100 %.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qwen_min.command.cli import positive_int
from qwen_min.config import QwenConfig
from qwen_min.fast.memory import keep_freed_memory
from qwen_min.files.data import Example, read_examples
from qwen_min.files.weights import DTYPES, load_model
from qwen_min.model import Qwen
from qwen_min.prompt import DEFAULT_LABELS, Prompt, build_prompts
from qwen_min.tokenizer import Tokenizer

TEMPLATE = "以下是一条中文评论，请判断它的情感倾向。\n评论：{text}\n情感倾向："
CHARACTERS = 256  # of a text; every program gets the text after this cut
UNCUT = 100_000  # tokens of a text: no text is cut again


def make_parser(doc: str, rows: int) -> argparse.ArgumentParser:
    """A parser with the arguments of every benchmark."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument(
        "--rows",
        type=positive_int,
        default=rows,
        help=f"use the first N rows of the file (default {rows})",
    )
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    parser.add_argument(
        "--quick", action="store_true", help="a short run that only checks that the benchmark works"
    )
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the program that this process runs
    return parser


def read_rows(args: argparse.Namespace) -> list[Example]:
    """The first rows of the file, with their texts cut."""
    examples = read_examples(args.data, DEFAULT_LABELS, limit=args.rows)
    return [Example(e.text[:CHARACTERS], e.label, e.line) for e in examples]


def read_prompts(
    args: argparse.Namespace, labels: Sequence[str] = DEFAULT_LABELS
) -> tuple[list[Example], list[Prompt]]:
    """The rows and their prompts."""
    rows = read_rows(args)
    tokenizer = Tokenizer(args.model)
    return rows, build_prompts(tokenizer, [row.text for row in rows], TEMPLATE, labels, UNCUT)


def score_bound(dtype: str, tokens: int = 1) -> float:
    """Largest allowed difference between two programs' scores of a label with `tokens` tokens.

    fp32: rounding in 24 layers. bf16 has 8 significant bits, so a logit from 16 to 32 is a multiple
    of 1/8. Two programs may round it to neighbouring values, and lm-eval rounds the log-probability
    once more: two steps of 1/8 for each token. For comparison: this project's scores in bf16 and in
    fp32 differ by up to 0.07 for one token and 0.13 for two (0.5B model, 16 reviews).
    """
    return 1e-4 if dtype == "float32" else 0.25 * tokens


def disagreement(ours: dict, peer: dict, dtype: str) -> tuple[str, bool]:
    """A message about how a peer's scores differ from ours, and whether the bound is kept."""
    if ours["tokens"] != peer["tokens"]:
        pairs = zip(ours["tokens"], peer["tokens"], strict=True)
        row = next(i for i, (a, b) in enumerate(pairs) if a != b)
        return f"different tokens; the first difference is in row {row + 1}", False
    a, b = np.array(ours["scores"]), np.array(peer["scores"])
    bounds = [[score_bound(dtype, len(x)) for x in labels] for _, labels in ours["tokens"]]
    flips = int((a.argmax(axis=1) != b.argmax(axis=1)).sum())
    message = (
        f"scores differ by at most {abs(a - b).max():.1e}; {flips} of {len(a)} decisions differ"
    )
    return message, bool((abs(a - b) <= np.array(bounds)).all())


def hf_dtype(args: argparse.Namespace) -> str | torch.dtype:
    """--dtype as transformers expects it."""
    return "auto" if args.dtype == "auto" else DTYPES[args.dtype]


def in_process(*flags: str) -> dict:
    """Run this script again with `flags` added, in a new process with its own peak memory."""
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    out = subprocess.run(
        [sys.executable, *sys.argv, *flags],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **quiet},
    )
    if out.returncode:
        sys.exit(f"error: {' '.join(flags)} ended with exit status {out.returncode}")
    return json.loads(out.stdout.splitlines()[-1])


def answer(found: dict) -> None:
    """Print the result of a process that `in_process` started, with its peak memory."""
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    print(json.dumps({**found, "peak_mib": peak}))


@dataclass(frozen=True)
class Floor:
    """The seconds that a task's matrix products take at `rate`."""

    rate: float  # FLOP/s
    dtype: str
    weights: int  # N
    head: int  # V·D

    def reading(self, sequences: Sequence[tuple[int, ...]]) -> float:
        return 2 * self.weights * distinct_tokens(sequences) / self.rate

    def scoring(self, prompts: Sequence[Prompt]) -> float:
        """All labels of all prompts: read each context once, and predict its next token."""
        contexts = {
            (*p.ids, *label[:t]) for p in prompts for label in p.labels for t in range(len(label))
        }
        return self.reading(list(contexts)) + 2 * self.head * len(contexts) / self.rate

    def training(self, sequences: Sequence[tuple[int, ...]]) -> float:
        """One step on these rows."""
        return 2 * self.reading(sequences)


def measure_floor(args: argparse.Namespace) -> Floor:
    """N and V·D from the config, and the rate measured now in a new process."""
    config = QwenConfig.from_json(Path(args.model) / "config.json")
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Qwen(config).named_parameters()}
    head = config.vocab_size * config.hidden_size
    weights = sum(n for name, n in sizes.items() if "embed_tokens" not in name and name[:2] != "lm")
    gemm = in_process("--only", "gemm")
    floor = Floor(gemm["rate"], gemm["dtype"], weights, head)
    print(
        f"products: {floor.rate / 1e9:.0f} GFLOP/s in {floor.dtype}, N = {weights / 1e6:.0f} M, "
        f"V·D = {head / 1e6:.0f} M, {torch.get_num_threads()} threads",
        flush=True,
    )
    return floor


def gemm_rate(args: argparse.Namespace) -> dict:
    """The best rate of x Wᵀ over several numbers of tokens, with all matrices of four layers.

    One layer alone could stay in a large cache; a whole model does not. Freed memory is kept, so
    that page faults are not measured.
    """
    keep_freed_memory()
    model = load_model(args.model, args.dtype)
    weights = [
        module.weight
        for layer in model.model.layers[:4]
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    rate = 0.0
    with torch.inference_mode():
        for tokens in (512, 1024, 2048, 4096):
            inputs = [torch.randn(tokens, w.shape[1]).to(w.dtype) for w in weights]
            flops = sum(2 * tokens * w.numel() for w in weights)
            for _ in range(2 if args.quick else 5):
                started = time.perf_counter()
                for x, w in zip(inputs, weights, strict=True):
                    torch.nn.functional.linear(x, w)
                rate = max(rate, flops / (time.perf_counter() - started))
    return {"rate": rate, "dtype": str(model.lm_head_weight.dtype).removeprefix("torch.")}


def distinct_tokens(sequences: Sequence[tuple[int, ...]]) -> int:
    """Tokens of all sequences, where a shared prefix counts once: the nodes of their trie."""
    count, before = 0, ()
    for sequence in sorted(sequences):
        # In sorted order, the previous sequence shares the longest prefix.
        pairs = zip(sequence, before, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        count += len(sequence) - (min(len(sequence), len(before)) if shared is None else shared)
        before = sequence
    return count


def figures(rows: int, seconds: float, least: float) -> dict[str, float]:
    """A program's speed and the floor's; the floor takes `least` seconds."""
    return {
        "rows_per_s": rows / seconds,
        "floor_rows_per_s": rows / least,
        "share": least / seconds,
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times as long a peer's runs took as the run of ours before each: the median, the
    least and the most."""
    found = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"ours_faster_by": statistics.median(found), "least": min(found), "most": max(found)}


def print_table(rows: Sequence[dict], columns: dict[str, str]) -> None:
    """Print the fields in `columns`, each with its format; text aligned left, numbers right."""
    cells = [[key.replace("_", " ") for key in columns]]
    cells += [[format(row[key], how) for key, how in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        aligned = zip(row, widths, columns.values(), strict=True)
        print("  ".join(c.rjust(w) if how else c.ljust(w) for c, w, how in aligned))
    print(flush=True)


def write_json(args: argparse.Namespace, floor: Floor, results: object) -> None:
    """Write --output: results, floor, machine and arguments."""
    if not args.output:
        return
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    whole = {"machine": machine, "arguments": vars(args), "floor": vars(floor), "results": results}
    Path(args.output).write_text(json.dumps(whole, ensure_ascii=False, indent=2) + "\n")
