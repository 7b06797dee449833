#!/usr/bin/env python3
"""The tables of README's "Results", made from the files that are kept in this directory.

    python tests/results/tables.py            # prints them
    python tests/results/tables.py --write    # puts them between the marks in README.md

A table stands in README between <!-- results: NAME --> and <!-- end -->. Rows that have not been
computed yet are left out.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from answers import CHINESE, ENGLISH
from experiment import CURVE, KEPT, REPO, SEEDS, SETS, TRAINING_ROWS, all_rows, commands

sys.path.insert(0, str(REPO))
from qwen_min.compare import Result, read_result
from qwen_min.metrics import mcnemar_exact, paired_bootstrap, wilson_interval
from qwen_min.report import markdown_table, p_value

# Rows of the main table: name of the kept file without its seed, and what the reader sees.
METHODS = {
    "zero_shot": "`zero_shot`",
    "zero_shot-xiaoji": "`zero_shot`, 消极/积极",
    "zero_shot-chahao": "`zero_shot`, 差/好",
    "zero_shot-xiang": "`zero_shot`, 负向/正向",
    "zero_shot-chat": "`zero_shot --chat`",
    "zero_shot_generate": "`zero_shot_generate`",
    "zero_shot_generate-chat": "`zero_shot_generate --chat`",
    "head_only": "`head_only`",
    "head_only-best": "`head_only --layer best`",
    "head_only-mean": "`head_only --pooling mean`",
    "head_only-mean-best": "`head_only --pooling mean --layer best`",
    "lora_head": "`lora_head`",
    "lora_label_scoring": "`lora_label_scoring`",
    "lora_label_scoring-xiang": "`lora_label_scoring`, 负向/正向",
    "transplanted_head": "`transplanted_head`",
    "probe-of-lora_head": "`head_only --adapter` (`lora_head`)",
    "probe-of-lora_label_scoring": "`head_only --adapter` (`lora_label_scoring`)",
    "embeddings-head": "`lora_head --train-embeddings --lora-targets none`",
    "embeddings-words": "`lora_label_scoring --train-embeddings --lora-targets none`",
    "embeddings-lora-words": "`lora_label_scoring --train-embeddings`",
}
ENGLISH_HEADS = ["method", "accuracy", "95 % interval", "precision", "F1", "recall 负面"]
ENGLISH_HEADS += ["recall 正面", "AUC", "ECE", "clean part", "trained", "train s"]
CHINESE_HEADS = ["方法", "准确率", "95 % 区间", "精确率", "F1", "负面召回", "正面召回"]
CHINESE_HEADS += ["AUC", "ECE", "去重后准确率", "训练参数", "训练秒数"]
# What the claims rest on: A against B.
PAIRS = (
    ("head_only", "zero_shot"),
    ("head_only-best", "head_only"),
    ("head_only-mean", "head_only"),
    ("lora_head", "head_only"),
    ("transplanted_head", "lora_head"),
    ("transplanted_head", "zero_shot"),
    ("probe-of-lora_head", "lora_head"),
    ("probe-of-lora_head", "head_only"),
    ("probe-of-lora_label_scoring", "lora_label_scoring"),
    ("lora_label_scoring", "lora_head"),
    ("lora_label_scoring-xiang", "lora_label_scoring"),
    ("lora_label_scoring", "zero_shot"),
    ("zero_shot-xiaoji", "zero_shot"),
    ("zero_shot-chahao", "zero_shot"),
    ("zero_shot-xiang", "zero_shot"),
    ("embeddings-head", "head_only"),
    ("embeddings-head", "transplanted_head"),
    ("embeddings-words", "lora_label_scoring"),
    ("embeddings-lora-words", "lora_label_scoring"),
    ("zero_shot_generate-chat", "zero_shot-chat"),
)
CALIBRATIONS = {
    "raw": "raw",
    "contextual": "contextual",
    "domain_context": "domain-context",
    "pmi_dc": "PMI_DC",
    "batch": "batch",
    "temperature": "temperature",
}


@cache
def find(name: str, size: str = "0.5b") -> dict[int | None, Result]:
    """The kept results of a row by seed; None for what draws nothing at random."""
    named = [(seed, KEPT / size / f"{name}-s{seed}.json") for seed in SEEDS]
    found = {seed: read_result(path) for seed, path in named if path.exists()}
    if (path := KEPT / size / f"{name}.json").exists():
        result = read_result(path)
        training = result.results["training_arguments"]
        # A probe is solved, not drawn; the others that have no seed in their name were given 0.
        solved = training is None or training["method"] == "head_only"
        found[None if solved else training["seed"]] = result
    return found


@cache
def clean(path: Path) -> np.ndarray:
    """Which rows of dev are not among the training rows: (n,) of true and false."""
    lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return np.array([json.loads(line)["clean"] for line in lines])


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def over_seeds(values: list[float | None], digits: int = 4) -> str:
    """A value; of several seeds their mean ± sample standard deviation."""
    if None in values or len(values) == 1:
        return number(values[0], digits)
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def between(interval: tuple[float, float]) -> str:
    return "{:.3f} to {:.3f}".format(*interval)


def methods(size: str, heads: list[str] = ENGLISH_HEADS) -> str:
    """The main table."""
    rows = []
    for name, shown in METHODS.items():
        if not (found := list(find(name, size).values())):
            continue
        measures = [result.measures for result in found]
        keys = ("precision", "f1", "recall_0", "recall_1", "auc_roc", "ece")
        clean = [result.results["clean"]["accuracy"] for result in found]
        interval = between(found[0].results["accuracy_interval"])
        rows.append(
            [
                shown,
                over_seeds([m["accuracy"] for m in measures]),
                interval if len(found) == 1 else f"{len(found)} seeds",
                *(over_seeds([m[key] for m in measures], 3) for key in keys),
                over_seeds(clean),
                f"{measures[0]['trained_parameters']:,}",
                over_seeds([m["training_seconds"] for m in measures], 0),
            ]
        )
    return markdown_table(heads, rows)


def seeds() -> str:
    """Accuracy and interval of each seed."""
    rows = []
    for name, shown in METHODS.items():
        found = find(name)
        if len(found) == len(SEEDS):
            cells = [
                f"{r.results['accuracy']:.4f} ({between(r.results['accuracy_interval'])})"
                for r in (found[seed] for seed in SEEDS if seed in found)
            ]
            rows.append([shown, *cells])
    return markdown_table(["method", *(f"seed {seed}" for seed in SEEDS)], rows)


def pairs() -> str:
    """The paired tests."""
    rows = []
    for a, b in PAIRS:
        for seed, test in tests_of(a, b):
            low, high = test["interval"]
            rows.append(
                [
                    METHODS[a],
                    METHODS[b],
                    "" if seed is None else str(seed),
                    f"{test['difference']:+.4f}",
                    f"{low:+.4f} to {high:+.4f}",
                    f"{test['only_a']} : {test['only_b']}",
                    p_value(test["p"]),
                ]
            )
    heads = ["A", "B", "seed", "A − B", "95 % interval", "only A : only B right", "McNemar p"]
    note = (
        f"{len(rows)} tests: p < {0.05 / max(len(rows), 1):.2g} stands up to that number of them."
    )
    return f"{markdown_table(heads, rows, words=2)}\n\n{note}"


def label_sets() -> str:
    """Zero-shot with four sets of label words, raw and calibrated."""
    if not (whole := find("zero_shot")):
        return ""
    rows = []
    for entry in whole[None].results["label_sets"]:
        words = ",".join(entry["labels"])
        ending = next(ending for ending, labels in SETS.items() if labels == words)
        own = find(f"zero_shot{ending}")
        calibrated = own[None].results["calibration"] if own else {}
        rows.append(
            [
                "/".join(entry["labels"]),
                number(entry["label_mass"]),
                *(number(calibrated.get(key, {}).get("accuracy")) for key in CALIBRATIONS),
                number(entry["oracle_accuracy"]),
                number(entry["predicted"][1], 3),
                number(entry["auc_roc"]),
                number(entry["first_token"]["accuracy"]),
            ]
        )
    heads = ["label words", "mass", *CALIBRATIONS.values(), "best threshold", "predicted 正"]
    return markdown_table([*heads, "AUC", "first token"], rows)


def curve() -> str:
    """Accuracy against the number of training rows, one epoch of each."""
    names = ("head_only", "lora_head", "lora_label_scoring")
    sizes = (*CURVE, TRAINING_ROWS)
    rows = []
    for name in names:
        columns = [find(f"{name}-n{n}") if n in CURVE else find(name) for n in sizes]
        cells = [
            f"{c.results['accuracy']:.4f} ({between(c.results['accuracy_interval'])})" if c else "-"
            for c in (next(iter(column.values()), None) for column in columns)
        ]
        rows.append([METHODS[name].split(",")[0], *cells])
    # A tenth is held out; eight rows are a step.
    steps = [f"{math.ceil((n - n // 10) / 8)}" for n in sizes]
    rows.append(["steps of LoRA", *steps])
    return markdown_table(["rows", *map(str, sizes)], rows)


def embeddings() -> str:
    """How far token vectors moved that were trained, and what other label words make of it."""
    rows = []
    for name in ("embeddings-head", "embeddings-words", "embeddings-lora-words"):
        for result in find(name).values():
            for groups in result.results["embedding_movement"].values():
                for group in groups:
                    cells = [
                        f"{group['tokens']:,}",
                        number(group["cosine"]),
                        number(group["change"]),
                    ]
                    rows.append([METHODS[name], group["vectors"], *cells])
    parts = [markdown_table(["", "vectors", "tokens", "cosine", "change"], rows, words=2)]
    before, after = find("zero_shot"), find("embeddings-words")
    if before and after:
        sets = [r.results["label_sets"] for found in (before, after) for r in found.values()]
        rows = [
            [
                "/".join(a["labels"]),
                *(number(entry[key]) for key in ("auc_roc", "accuracy") for entry in (a, b)),
                *(f"{entry['label_mass']:.1e}" for entry in (a, b)),
            ]
            for a, b in zip(*sets, strict=True)
        ]
        heads = [f"{what} {when}" for what in ("AUC", "accuracy") for when in ("before", "after")]
        parts.append(markdown_table(["label words", *heads, "mass before", "mass after"], rows))
    return "\n\n".join(parts)


def generation() -> str:
    """How often generated text holds no label word."""
    rows = []
    for name in ("zero_shot_generate", "zero_shot_generate-chat"):
        for result in find(name).values():
            astray, n = result.results["off_track"], result.results["n"]
            rows.append(
                [
                    METHODS[name],
                    number(result.results["accuracy"]),
                    f"{astray} of {n}",
                    between(wilson_interval(astray, n)),
                ]
            )
    return markdown_table(["", "accuracy", "off track", "95 % interval"], rows)


def typed() -> str:
    """The commands of each kept row."""
    lines = []
    for size in ("0.5b", "1.5b"):
        for row in all_rows(size):
            if (KEPT / size / f"{row.name}.json").exists():
                lines += commands(row, size)
    return "```\n" + "\n".join(lines) + "\n```"


def tests_of(a: str, b: str) -> list[tuple[int | None, dict]]:
    """A against B on the clean rows, for each seed that both have; no seed goes with every one."""
    found_a, found_b = find(a), find(b)
    tests = []
    for seed in sorted({*found_a, *found_b} - {None}) or [None]:
        one, other = (found.get(seed, found.get(None)) for found in (found_a, found_b))
        if one is None or other is None:
            continue
        if one.results["examples_hash"] != other.results["examples_hash"]:
            sys.exit(f"error: {one.path} and {other.path} are about different rows")
        # What is clean is so for every method, whatever it was trained on.
        rows = clean(one.path)
        right = [(r.predictions.predicted == r.predictions.labels)[rows] for r in (one, other)]
        difference, *interval = paired_bootstrap(*right)
        test = {"difference": difference, "interval": interval, **mcnemar_exact(*right)}
        tests.append((seed, test))
    return tests


def figure(kind: str, a: str, b: str = "") -> str:
    """One figure of an answer (see answers.py); a dash for what has not been computed."""
    found = list(find(a).values())
    if not found or (kind == "diff" and not find(b)):
        return "–"
    first = found[0].results
    if kind == "set":
        return number(
            next(e["auc_roc"] for e in first["label_sets"] if "/".join(e["labels"]) == b), 3
        )
    if kind == "diff":
        return "; ".join(
            f"{test['difference']:+.3f} ({test['interval'][0]:+.3f} to {test['interval'][1]:+.3f}, "
            f"p = {p_value(test['p'])})"
            for _, test in tests_of(a, b)
        )
    if kind == "off":
        astray, n = first["off_track"], first["n"]
        return f"{astray / n:.3f} ({between(wilson_interval(astray, n))})"
    key = {"acc": "accuracy", "auc": "auc_roc"}[kind]
    value = over_seeds([result.results[key] for result in found], 3)
    if kind == "acc" and len(found) == 1:
        value += f" ({between(first['accuracy_interval'])})"
    return value


def claims(answers: tuple[tuple[str, str], ...]) -> str:
    """The six claims, each with its answer."""

    def filled(text: str) -> str:
        return re.sub(r"\{([^}]+)\}", lambda m: figure(*m[1].split()), text)

    return "\n".join(f"{i}. *{claim}* {filled(text)}" for i, (claim, text) in enumerate(answers, 1))


TABLES: dict[str, Callable[[], str]] = {
    "methods": lambda: methods("0.5b"),
    "methods zh": lambda: methods("0.5b", CHINESE_HEADS),
    "methods 1.5b": lambda: methods("1.5b"),
    "seeds": seeds,
    "pairs": pairs,
    "label sets": label_sets,
    "curve": curve,
    "embeddings": embeddings,
    "generation": generation,
    "commands": typed,
    "claims": lambda: claims(ENGLISH),
    "claims zh": lambda: claims(CHINESE),
}
MARK = re.compile(r"(<!-- results: ([\w. ]+) -->).*?(<!-- end -->)", re.DOTALL)


def written(readme: str) -> str:
    """README's text with every table made anew."""
    return MARK.sub(lambda m: f"{m[1]}\n\n{TABLES[m[2]]()}\n\n{m[3]}", readme)


def all_tables() -> Iterator[str]:
    for name, make in TABLES.items():
        yield f"{name}\n\n{make()}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into README.md")
    args = parser.parse_args()
    if not args.write:
        return print("\n".join(all_tables()))
    path = REPO / "README.md"
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
