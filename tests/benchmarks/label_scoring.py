#!/usr/bin/env python3
"""Compare label scoring with lm-evaluation-harness, a transformers loop, and the definition.

    python tests/benchmarks/label_scoring.py --model DIR --data FILE --output scoring.json
    python tests/benchmarks/label_scoring.py --model DIR --data FILE --rows 8 --dtype float32
    python tests/benchmarks/label_scoring.py --model DIR --data FILE --peers vllm,openvino

Every program gets the same prompts and labels and runs in its own process. The time from texts to
scores is measured. It includes tokenising, but not loading and a first forward. One run of this
project precedes each peer's run, --rounds times; the table has the medians, and of the ratios also
the least and the most. A peer must have the same tokens, and scores within rounding, before speed
is compared. Otherwise the exit status is 1.

zero_shot       `score_labels`, the default form of this project
definition      `score_label` of this project: one forward for each candidate
transformers    the same loop with AutoModelForCausalLM
lm-eval N       lm-evaluation-harness, model `hf`, a multiple-choice task, batches of N rows. `auto`
                first searches for a batch size that fits (five forwards of the 64 longest rows).
                This search is part of the time, because a user waits for it.

Two engines made for speed run only where --peers names them (Linux), with the same number of
threads. See engines.py. They and this project are loaded first and then run in turn. Without
--labels they score the first two sets.

vllm            vLLM, with prefix caching
openvino        OpenVINO, last hidden states; torch applies the LM head
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from common import (
    TEMPLATE,
    UNCUT,
    answer,
    disagreement,
    figures,
    gemm_rate,
    hf_dtype,
    in_process,
    make_parser,
    measure_floor,
    print_table,
    ratios,
    read_prompts,
    read_rows,
    write_json,
)
from engines import PACKAGES as ENGINES
from engines import compare

from qwen_min.command.cli import positive_int
from qwen_min.fast.label_scores import score_labels
from qwen_min.fast.memory import keep_freed_memory
from qwen_min.files.weights import load_model
from qwen_min.prompt import Prompt, build_prompts
from qwen_min.scoring import score_label
from qwen_min.tokenizer import Tokenizer

LABELS = (
    "负面,正面",
    "负向,正向",
    "非常满意,十分满意,相当满意,比较满意,基本满意,有点不满意,不太满意,很不满意,非常不满意,极其不满意",
)
# A program returns scores [row][label] and the tokens of each row: (prompt, labels).
Tokens = list[tuple[list[int], list[list[int]]]]
Score = Callable[[list[str]], tuple[list, Tokens]]


def tokens_of(prompts: list[Prompt]) -> Tokens:
    return [(list(p.ids), [list(label) for label in p.labels]) for p in prompts]


def zero_shot(args: argparse.Namespace, labels: list[str]) -> Score:
    keep_freed_memory()  # like the commands
    model, tokenizer = load_model(args.model, args.dtype), Tokenizer(args.model)

    def score(texts: list[str]) -> tuple[list, Tokens]:
        prompts = build_prompts(tokenizer, texts, TEMPLATE, labels, UNCUT)
        return score_labels(model, prompts).tolist(), tokens_of(prompts)

    score(["好"])
    return score


def definition(args: argparse.Namespace, labels: list[str]) -> Score:
    model, tokenizer = load_model(args.model, args.dtype), Tokenizer(args.model)

    def score(texts: list[str]) -> tuple[list, Tokens]:
        prompts = build_prompts(tokenizer, texts, TEMPLATE, labels, UNCUT)
        scores = [[score_label(model, p.ids, label) for label in p.labels] for p in prompts]
        return scores, tokens_of(prompts)

    score(["好"])
    return score


def transformers(args: argparse.Namespace, labels: list[str]) -> Score:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=hf_dtype(args)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    @torch.inference_mode()
    def score_one(prompt: list[int], label: list[int]) -> float:
        log_probs = model(torch.tensor([prompt + label])).logits[0].float().log_softmax(dim=-1)
        steps = range(len(prompt) - 1, len(prompt) + len(label) - 1)
        return sum(log_probs[at, token].item() for at, token in zip(steps, label, strict=True))

    def score(texts: list[str]) -> tuple[list, Tokens]:
        tokens = []
        for text in texts:
            prompt = TEMPLATE.replace("{text}", text)
            ids = tokenizer(prompt)["input_ids"]
            tokens.append((ids, [tokenizer(prompt + x)["input_ids"][len(ids) :] for x in labels]))
        return [[score_one(ids, label) for label in words] for ids, words in tokens], tokens

    score(["好"])
    return score


def lm_eval(args: argparse.Namespace, labels: list[str], batch_size: str) -> Score:
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=args.model, dtype=hf_dtype(args), batch_size=batch_size, device="cpu")
    lm._model_call(torch.ones(1, 32, dtype=torch.long))

    def score(texts: list[str]) -> tuple[list, Tokens]:
        docs = [
            {"prompt": TEMPLATE.replace("{text}", t), "labels": labels, "gold": 0} for t in texts
        ]
        task = ConfigurableTask(
            config={
                "task": "labels",
                "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": lambda doc: doc["prompt"],
                "doc_to_choice": lambda doc: doc["labels"],
                "doc_to_target": "gold",
                "target_delimiter": "",
            }
        )
        task.build_all_requests()
        found = [log_prob for log_prob, _ in lm.loglikelihood(task.instances, True)]
        pairs = [lm._encode_pair(*instance.arguments) for instance in task.instances]
        rows = range(0, len(pairs), len(labels))
        tokens = [(pairs[i][0], [pair[1] for pair in pairs[i : i + len(labels)]]) for i in rows]
        return [found[i : i + len(labels)] for i in rows], tokens

    return score


COLUMNS = {
    "program": "",
    "rows_per_s": ".2f",
    "floor_rows_per_s": ".2f",
    "share": ".0%",
    "ours_faster_by": ".2f",
    "least": ".2f",
    "most": ".2f",
    "peak_mib": ".0f",
}
PROGRAMS = {
    "zero_shot": zero_shot,
    "definition": definition,
    "transformers": transformers,
    "lm-eval 8": lambda args, labels: lm_eval(args, labels, "8"),
    "lm-eval auto": lambda args, labels: lm_eval(args, labels, "auto"),
}
PEERS = tuple(name for name in PROGRAMS if name != "zero_shot")


def run(args: argparse.Namespace) -> dict:
    """One program: load, then score all rows."""
    score = PROGRAMS[args.only](args, args.labels.split(","))
    texts = [row.text for row in read_rows(args)]
    started = time.perf_counter()
    scores, tokens = score(texts)
    return {"seconds": time.perf_counter() - started, "scores": scores, "tokens": tokens}


def main() -> None:
    parser = make_parser(__doc__, rows=100)
    parser.add_argument(
        "--labels", metavar="WORD,WORD", help="default: three sets, one after the other"
    )
    parser.add_argument(
        "--peers",
        metavar="NAME,NAME",
        help=f"some of {', '.join(PEERS)} (default: all), {', '.join(ENGINES)}",
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="default 3")
    args = parser.parse_args()
    if args.only:
        return answer(gemm_rate(args) if args.only == "gemm" else run(args))
    if args.quick:
        args.rows, args.rounds = min(args.rows, 2), 1
    peers = args.peers.split(",") if args.peers else list(PEERS)
    if unknown := set(peers) - {*PEERS, *ENGINES}:
        known = ", ".join([*PEERS, *ENGINES])
        parser.error(f"--peers: found {', '.join(unknown)}, expected some of {known}")
    if not args.peers and (args.quick or args.dtype == "float32"):
        peers.remove("lm-eval auto")  # its search takes minutes, and tens of GB in fp32
    floor, results, agreed = measure_floor(args), [], True
    sets = [args.labels] if args.labels else LABELS[1:2] if args.quick else LABELS
    in_turn = [peer for peer in peers if peer in ENGINES]
    peers = [peer for peer in peers if peer not in ENGINES]
    for labels in sets if peers else ():
        flags = ("--rows", str(args.rows), "--labels", labels, "--only")
        found: dict[str, list[dict]] = {name: [] for name in ("zero_shot", *peers)}
        beside: dict[str, list[float]] = {peer: [] for peer in peers}  # ours before each run of it
        for _ in range(args.rounds):
            for peer in peers:
                found["zero_shot"].append(in_process(*flags, "zero_shot"))
                beside[peer].append(found["zero_shot"][-1]["seconds"])
                found[peer].append(in_process(*flags, peer))
        _, prompts = read_prompts(args, labels.split(","))
        least = floor.scoring(prompts)
        print(f"{labels}: floor {least:.2f} s")
        table = []
        for name, runs in found.items():
            message, agrees = disagreement(found["zero_shot"][0], runs[0], floor.dtype)
            agreed &= agrees
            seconds = [run["seconds"] for run in runs]
            if name != "zero_shot":
                print(f"{name}: {message}")
            table.append(
                {
                    "labels": labels,
                    "program": name,
                    **figures(len(prompts), statistics.median(seconds), least),
                    **ratios(beside.get(name, seconds), seconds),
                    "peak_mib": max(r["peak_mib"] for r in runs),
                    "seconds": seconds,
                    "agreement": message,
                }
            )
        print_table(table, COLUMNS)
        results += table
    if in_turn:
        results += compare(args, in_turn, sets[:2], floor)
    write_json(args, floor, results)
    if not agreed:
        sys.exit("error: the scores do not agree, so the speeds cannot be compared")


if __name__ == "__main__":
    main()
