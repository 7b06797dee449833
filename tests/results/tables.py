#!/usr/bin/env python3
"""Make the tables and pictures of three files from the kept results: the README.md of the project,
and README.md and README.zh.md in this directory.

    python tests/results/tables.py            # print the tables
    python tests/results/tables.py --write    # write them into the files, and draw the pictures

A table is written between the marks <!-- results: NAME --> and <!-- end -->. Rows without kept
results are left out.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from answers import CHINESE, ENGLISH
from experiment import (
    ALL_ROWS,
    CURVE,
    KEPT,
    MODELS,
    PART,
    REPO,
    SEEDS,
    SETS,
    TRAINING_ROWS,
    all_rows,
    commands,
)
from kept import (
    LABELS_KEPT,
    METHODS,
    OTHERS_KEPT,
    TRAINED,
    accuracy_interval,
    auc_components,
    auc_interval,
    auc_mean,
    compared,
    find,
    first,
    mean,
    ranking,
    title,
    with_rows,
)

from qwen_min.lab.calibration import NAMES
from qwen_min.metrics import wilson_interval
from qwen_min.report.compare import Method, Result
from qwen_min.report.tables import markdown_table, p_value

ENGLISH_HEADS = ["method", "accuracy", "95 % interval", "precision", "F1", "recall 负面"]
ENGLISH_HEADS += ["recall 正面", "AUC", "ECE", "clean part", "trained", "train s"]
CHINESE_HEADS = ["方法", "准确率", "95% 区间", "精确率", "F1", "负面召回", "正面召回"]
CHINESE_HEADS += ["AUC", "ECE", "去重后准确率", "训练参数量", "训练秒数"]
BASELINE_HEADS = ["", "accuracy", "training rows"]
BASELINE_CHINESE_HEADS = ["", "准确率", "训练条数"]
DIARY_HEADS = ["method", "diary, 1.5B", "here, 1.5B", "here, 0.5B"]
DIARY_CHINESE_HEADS = ["方法", "日记（1.5B）", "这里，1.5B", "这里，0.5B"]
# The comparisons behind the answers: A against B.
PAIRS = (
    ("head_only", "zero_shot"),
    ("head_only-best", "head_only"),
    ("head_only-mean", "head_only"),
    ("head_only-mean-best", "head_only"),
    ("lora_head", "head_only"),
    ("lora_label_scoring", "zero_shot"),
    ("lora_label_scoring", "head_only"),
    ("lora_label_scoring", "lora_head"),
    ("lora_label_scoring-xiang", "lora_label_scoring"),
    ("transplanted_head", "lora_head"),
    ("transplanted_head", "head_only"),
    ("transplanted_head", "zero_shot"),
    ("probe-of-lora_head", "lora_head"),
    ("probe-of-lora_head", "head_only"),
    ("probe-of-lora_label_scoring", "lora_label_scoring"),
    ("probe-of-lora_label_scoring", "head_only"),
    *((f"head_only-n{n}", f"lora_head-n{n}") for n in CURVE),
    *((f"lora_label_scoring-n{n}", f"lora_head-n{n}") for n in CURVE),
    *((f"lora_label_scoring-n{n}", f"head_only-n{n}") for n in CURVE),
    *((f"lora_label_scoring-n{n}", "zero_shot") for n in CURVE),
    ("zero_shot-xiaoji", "zero_shot"),
    ("zero_shot-chahao", "zero_shot"),
    ("zero_shot-xiang", "zero_shot"),
    ("embeddings-head", "head_only"),
    ("embeddings-head", "transplanted_head"),
    ("embeddings-words", "lora_label_scoring"),
    ("embeddings-words-labels", "zero_shot"),
    ("embeddings-words-labels", "embeddings-words"),
    ("embeddings-words-others", "zero_shot"),
    ("embeddings-words-others", "embeddings-words"),
    ("embeddings-lora-words", "lora_label_scoring"),
    ("zero_shot-chat", "zero_shot"),
    ("zero_shot_generate-chat", "zero_shot-chat"),
    ("1.5b/zero_shot", "zero_shot"),
    ("1.5b/head_only", "1.5b/zero_shot"),
    ("1.5b/head_only", "head_only"),
    ("1.5b/zero_shot-xiang", "1.5b/zero_shot"),
    ("1.5b/lora_head", "1.5b/head_only"),
    ("1.5b/lora_head", "lora_head"),
    ("1.5b/lora_label_scoring", "1.5b/zero_shot"),
    ("1.5b/lora_label_scoring", "1.5b/head_only"),
    ("1.5b/lora_label_scoring", "1.5b/lora_head"),
    ("1.5b/lora_label_scoring", "lora_label_scoring"),
    ("1.5b/lora_label_scoring-xiang", "1.5b/lora_label_scoring"),
    ("1.5b/transplanted_head", "1.5b/lora_head"),
    ("1.5b/transplanted_head", "1.5b/head_only"),
    ("1.5b/probe-of-lora_head", "1.5b/lora_head"),
    ("1.5b/probe-of-lora_head", "1.5b/head_only"),
    ("1.5b/probe-of-lora_label_scoring", "1.5b/head_only"),
    ("head_only-all", "head_only"),
    ("lora_head-all", "lora_head"),
    ("lora_head-all", "head_only-all"),
    ("lora_label_scoring-all", "lora_label_scoring"),
    ("lora_label_scoring-all", "head_only-all"),
    ("lora_label_scoring-all", "lora_head-all"),
    ("1.5b/lora_label_scoring-all", "1.5b/lora_label_scoring"),
    ("1.5b/lora_label_scoring-all", "lora_label_scoring-all"),
)
# The diary's accuracies with Qwen2.5-1.5B. By its own files, its "head-only" row was measured with
# the transplanted head.
DIARY = {
    "zero_shot": 0.880,
    "head_only": None,
    "transplanted_head": 0.512,
    "lora_head": 0.938,
    "lora_label_scoring": 0.958,
}
# Accuracy on dev after fine-tuning on all of train.tsv, in percent: the mean of ten runs, and the
# best one. From the README of github.com/ymcui/Chinese-BERT-wwm (arXiv:1906.08101).
PUBLISHED = {
    "BERT": (94.3, 94.7),
    "BERT-wwm-ext": (94.6, 95.4),
    "RoBERTa-wwm-ext": (94.6, 95.0),
    "RoBERTa-wwm-ext-large": (94.9, 95.8),
}
# Temperature scaling is left out: it changes no decision.
CALIBRATIONS = ("raw", "contextual", "domain_context", "pmi_dc", "batch")


def number(value: float | None, digits: int = 4) -> str:
    """A value as text; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_sd(mean: float | None, sd: float | None, digits: int) -> str:
    """A mean as text, with ± the standard deviation over seeds if there are several."""
    return number(mean, digits) + ("" if sd is None else f" ± {sd:.{digits}f}")


def signed(value: float) -> str:
    """A difference as text."""
    return f"{value:+.3f}"


def between(interval: Sequence[float], show: Callable[[float], str] = "{:.3f}".format) -> str:
    """An interval as text."""
    return " to ".join(map(show, interval))


def accuracy_cell(results: Sequence[Result], digits: int = 3) -> str:
    """Accuracy (mean over seeds) with its interval; "-" without results."""
    if not results:
        return "-"
    accuracy = mean([result.results["accuracy"] for result in results])
    return f"{accuracy:.{digits}f} ({between(accuracy_interval(results))})"


def share(part: int, whole: int) -> str:
    """A share with its interval."""
    return f"{part / whole:.3f} ({between(wilson_interval(part, whole))})"


def methods(size: str, heads: list[str] = ENGLISH_HEADS) -> str:
    """The main table."""
    rows = []
    for name in METHODS:
        if not (seeds := find(f"{size}/{name}")):
            continue
        found, (means, sd) = list(seeds.values()), Method(name, seeds).summary()
        clean = [result.results["clean"]["accuracy"] for result in found]
        rows.append(
            [
                METHODS[name],
                with_sd(means["accuracy"], sd["accuracy"], 4),
                between(accuracy_interval(found)),
                *(number(means[key], 3) for key in ("precision", "f1", "recall_0", "recall_1")),
                with_sd(means["auc_roc"], sd["auc_roc"], 3),
                number(means["ece"], 3),
                number(mean(clean)),
                f"{means['trained_parameters']:,.0f}",
                number(means["training_seconds"], 0),
            ]
        )
    return markdown_table(heads, rows)


def diary(heads: list[str] = DIARY_HEADS) -> str:
    """The diary's accuracies beside the ones measured here."""
    rows = []
    for name, reported in DIARY.items():
        here = [accuracy_cell([*find(f"{size}/{name}").values()]) for size in reversed(MODELS)]
        rows.append([METHODS[name], number(reported, 3), *here])
    return markdown_table(heads, rows)


def baselines(most: str = "most frequent class", heads: Sequence[str] = BASELINE_HEADS) -> str:
    """The accuracy of always answering one class, of methods here, and of the BERT family."""
    labels = first("zero_shot").predictions.labels
    rows = [[most, number(np.bincount(labels).max() / len(labels)), "0"]]
    trained = ("head_only", "lora_head", "lora_label_scoring", "probe-of-lora_head")
    for name in (*trained, *(f"{name}-all" for name in trained)):
        for size in reversed(MODELS):
            if found := [*find(f"{size}/{name}").values()]:
                used = found[0].results["training_arguments"]["data"]
                used = TRAINING_ROWS if used.endswith(PART) else ALL_ROWS
                heading = f"{size.upper()}: {METHODS[name].removesuffix(', all rows')}"
                rows.append([heading, accuracy_cell(found), f"{used:,}"])
    for name, (average, best) in PUBLISHED.items():
        rows.append([name, f"{average / 100:.3f} ({best / 100:.3f})", "9,600"])
    return markdown_table(list(heads), rows)


def training() -> str:
    """Speed and peak memory of the runs that recorded both."""
    rows = []
    for size in reversed(MODELS):
        for name in METHODS:
            for result in find(f"{size}/{name}").values():
                r = result.results
                if "peak_memory_mib" in r and "steps" in r:
                    taken = r["steps"] * r["training_arguments"]["batch_size"]
                    seed = f", seed {r['training_arguments']['seed']}"
                    cells = [f"{taken:,}", number(taken / r["training_seconds"], 2)]
                    cells.append(f"{r['peak_memory_mib'] / 1024:.1f} GiB")
                    rows.append([f"{size.upper()}: {METHODS[name]}{seed}", *cells])
    return markdown_table(["", "rows", "rows/s", "peak memory"], rows)


def seeds() -> str:
    """Accuracy and interval of each seed."""
    rows = []
    for name in METHODS:
        found = find(name)
        if len(found) == len(SEEDS):
            rows.append([METHODS[name], *(accuracy_cell([found[seed]], 4) for seed in SEEDS)])
    return markdown_table(["method", *(f"seed {seed}" for seed in SEEDS)], rows)


def bound() -> tuple[int, float]:
    """The number of tests, and the largest p that is significant with so many (Bonferroni)."""
    count = sum(len(test.p) for a, b in PAIRS if (test := compared(a, b)))
    return count, 0.05 / max(count, 1)


def pairs() -> str:
    """The paired tests, and which of them are significant with so many tests."""
    rows = []
    count, limit = bound()
    for a, b in PAIRS:
        if not (test := compared(a, b)):
            continue
        below = sum(p < limit for p in test.p)
        some = f"{below} of {len(test.p)} seeds"
        rows.append(
            [
                title(a),
                title(b),
                signed(test.difference),
                between(test.interval, signed),
                ", ".join(f"{t['only_a']} : {t['only_b']}" for t in test.tests),
                ", ".join(map(p_value, test.p)),
                {0: "no", len(test.p): "yes"}.get(below, some),
                f"{signed(test.auc[0])} ({between(test.auc[1:], signed)})" if test.auc else "-",
            ]
        )
    heads = ["A", "B", "A − B", "95 % interval", "only A : only B correct", "McNemar p"]
    heads += ["significant", "AUC: A − B"]
    note = f"{count} tests; significant: p < 0.05 / {count} = {limit:.2g}."
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
                *(number(calibrated.get(k, {}).get("ece"), 3) for k in ("raw", "temperature")),
                number(entry["predicted"][1], 3),
                number(entry["auc_roc"]),
                number(entry["first_token"]["accuracy"]),
            ]
        )
    heads = ["label words", "mass", *(NAMES[key] for key in CALIBRATIONS), "best threshold"]
    heads += ["ECE raw", "ECE temperature", "predicted positive", "AUC", "first token"]
    return markdown_table(heads, rows)


def curve() -> str:
    """Accuracy against training rows, one epoch each, and the steps of the evaluated checkpoint."""
    sizes = (*CURVE, TRAINING_ROWS)
    rows, steps = [], []
    for name in TRAINED:
        found = [first(with_rows(name, n)) for n in sizes]
        rows.append([METHODS[name], *(accuracy_cell([r] if r else [], 4) for r in found)])
        if name != "head_only":
            taken = [
                f"{r.results['best_step']} of {r.results['steps']}" if r else "-" for r in found
            ]
            steps.append([f"steps of {METHODS[name]}", *taken])
    return markdown_table(["rows", *map(str, sizes)], [*rows, *steps])


def embeddings() -> str:
    """How far the trained token vectors moved, and results with other label words."""
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
            off, n = result.results["off_track"], result.results["n"]
            rows.append(
                [
                    METHODS[name],
                    number(result.results["accuracy"]),
                    f"{off} of {n}",
                    between(wilson_interval(off, n)),
                    str(result.results["off_track_words"][SETS["-xiaoji"]]),
                ]
            )
    return markdown_table(["", "accuracy", "off track", "95 % interval", "with 消极 or 积极"], rows)


def command_lines() -> str:
    """The commands of every kept row."""
    lines = []
    for size in MODELS:
        for row in all_rows(size):
            if (KEPT / size / f"{row.name}.json").exists():
                lines += commands(row, size)
    return "```\n" + "\n".join(lines) + "\n```"


def figure(kind: str, a: str, b: str = "") -> str:
    """One figure of an answer (see answers.py); "-" if its results are not kept."""
    found = list(find(a).values())
    test = compared(a, b) if kind in ("diff", "aucdiff") and find(b) else None
    if not found or (kind in ("diff", "aucdiff") and not test):
        return "-"
    results = found[0].results
    match kind:
        case "acc":
            return accuracy_cell(found)
        case "each":
            return ", ".join(number(result.results["accuracy"], 3) for result in found)
        case "auc" if not b:
            labels = found[0].predictions.labels
            auc, *interval = auc_mean([auc_components(labels, ranking(r)) for r in found])
            return f"{auc:.3f} ({between(interval)})"
        case "auc":  # The scores of other label words are not kept, only their AUC.
            auc = next(e["auc_roc"] for e in results["label_sets"] if ",".join(e["labels"]) == b)
            negative, positive = (entry["support"] for entry in results["per_class"])
            return f"{auc:.3f} ({between(auc_interval(auc, positive, negative))})"
        case "diff":
            p = ", ".join(map(p_value, test.p))
            return f"{signed(test.difference)} ({between(test.interval, signed)}; p = {p})"
        case "aucdiff":
            difference, *interval = test.auc
            return f"{signed(difference)} ({between(interval, signed)})"
        case "off":
            return share(results["off_track"], results["n"])
        case "said":
            return share(results["off_track_words"][b], results["off_track"])
        case "steps":
            return str(results["best_step"])
        case "moved":
            (groups,) = results["embedding_movement"].values()
            return number(next(g["change"] for g in groups if b in g["vectors"]), 3)
    raise ValueError(f"answers.py: found figure {kind!r}, expected one listed at the top")


def claims(answers: Iterable[tuple[str, str]]) -> str:
    """The claims, each with its answer."""

    def filled(text: str) -> str:
        return re.sub(r"\{([^}]+)\}", lambda m: figure(*m[1].split()), text)

    return "\n".join(f"{i}. *{claim}* {filled(text)}" for i, (claim, text) in enumerate(answers, 1))


def chinese(text: str) -> str:
    """Write intervals, lists and row titles in the Chinese way."""
    text = re.sub(r"(?<=\d) to (?=[+-]?\d)", "～", text)
    text = re.sub(r"(?<=\d), (?=\d)", "、", text).replace("; p = ", "；p = ")
    text = text.replace(LABELS_KEPT, "，只保留“负面/正面”训练后的向量")
    text = text.replace(", all rows", "，全部数据")
    return text.replace(OTHERS_KEPT, "，只还原“负面/正面”的向量").replace("`, ", "`，")


TABLES: dict[str, Callable[[], str]] = {
    "methods": lambda: methods("0.5b"),
    "methods zh": lambda: chinese(methods("0.5b", CHINESE_HEADS)),
    "methods 1.5b": lambda: methods("1.5b"),
    "methods 1.5b zh": lambda: chinese(methods("1.5b", CHINESE_HEADS)),
    "diary": diary,
    "diary zh": lambda: chinese(diary(DIARY_CHINESE_HEADS)),
    "baselines": baselines,
    "baselines zh": lambda: baselines("总是回答最多的一类", BASELINE_CHINESE_HEADS),
    "training": training,
    "seeds": seeds,
    "pairs": pairs,
    "label sets": label_sets,
    "curve": curve,
    "embeddings": embeddings,
    "generation": generation,
    "commands": command_lines,
    "claims": lambda: claims((claim, full) for claim, _, full in ENGLISH),
    "claims short": lambda: claims((claim, short) for claim, short, _ in ENGLISH),
    "claims zh": lambda: chinese(claims(CHINESE)),
}
MARK = re.compile(r"(<!-- results: ([\w. ]+) -->).*?(<!-- end -->)", re.DOTALL)
FILES = (REPO / "README.md", KEPT / "README.md", KEPT / "README.zh.md")


def written(text: str) -> str:
    """The text of one of FILES, with every table made again."""
    return MARK.sub(lambda m: f"{m[1]}\n\n{TABLES[m[2]]()}\n\n{m[3]}", text)


def main() -> None:
    """The command: print the tables, or write them and draw the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the files and the pictures")
    if not parser.parse_args().write:
        return print("\n".join(f"{name}\n\n{make()}\n" for name, make in TABLES.items()))
    import pictures  # here, because only this needs matplotlib

    for path in FILES:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
    pictures.draw()


if __name__ == "__main__":
    main()
