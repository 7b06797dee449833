"""Results as tables for a person: one evaluation, or several methods side by side.

    python -m qwen_min.report runs/head_only runs/lora_head
    python -m qwen_min.report zero_shot.json runs/lora-seed* --format markdown --output table.md
    python -m qwen_min.report runs/* --plots plots

Each argument is a results file of evaluate.py, with its predictions beside it (`predictions` for
`results` in the name), or a run directory with such files. Methods on the same examples are tested
in pairs; runs that differ in --seed alone are one row.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from unicodedata import east_asian_width

import numpy as np

from qwen_min.cli import make_parser, run_command
from qwen_min.compare import Method, compare_all, gather, read_all
from qwen_min.data import Example
from qwen_min.errors import UserError
from qwen_min.output import commit_outputs, open_outputs

FORMATS = ("text", "markdown", "json")


def build_parser() -> argparse.ArgumentParser:
    """The command line, grouped as `--help` shows it."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="a results file or a run directory"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the report")
    parser.add_argument("--output", metavar="FILE", help="where it goes instead of the terminal")
    parser.add_argument(
        "--plots",
        metavar="DIR",
        help="also draw ROC curves, reliability diagrams and training curves (needs matplotlib)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(report, build_parser().parse_args(argv))


def report(args: argparse.Namespace) -> int:
    """Read, compare, print or write; then the pictures."""
    if args.plots:
        try:
            from qwen_min import plots
        except ModuleNotFoundError as error:
            if not error.name.startswith("matplotlib"):
                raise
            raise UserError(
                "--plots needs matplotlib, which is not installed: pip install matplotlib, or "
                "leave --plots out"
            ) from None
    with ExitStack() as stack:
        outputs = open_outputs([args.output], stack, args.results)
        methods = gather(read_all(args.results))
        pairs = compare_all(methods)
        if args.format == "json":
            text = json.dumps(as_json(methods, pairs), ensure_ascii=False, indent=2)
        else:
            text = format_report(methods, pairs, args.format == "markdown")
        commit_outputs([(outputs[0], text + "\n")])
    if not args.output:
        print(text)
    if args.plots:
        for path in plots.draw(methods, args.plots):
            print(path, file=sys.stderr)
    return 0


def as_json(methods: Sequence[Method], pairs: Sequence[dict]) -> dict:
    """The report for a program: every number unrounded."""
    rows = []
    for method in methods:
        mean, sd = method.summary()
        rows.append(
            {
                "name": method.name,
                "n": method.first.results["n"],
                "examples_hash": method.first.results["examples_hash"],
                "mean": mean,
                "standard_deviation": sd,
                "seeds": [
                    {
                        "seed": seed,
                        "file": str(result.path),
                        **result.measures,
                        "accuracy_interval": result.results["accuracy_interval"],
                    }
                    for seed, result in method.seeds.items()
                ],
            }
        )
    return {"methods": rows, "pairs": list(pairs)}


def format_report(methods: Sequence[Method], pairs: Sequence[dict], markdown: bool) -> str:
    """The report for a person: the methods, their seeds, and the tests of each pair."""
    draw = markdown_table if markdown else text_table
    classes = max((m.first.results["per_class"] for m in methods), key=len)
    measures = ["accuracy", "interval", "precision", "recall", "f1"]
    measures += [f"recall_{c}" for c in range(len(classes))]
    measures += ["auc_roc", "brier", "ece", "trained_parameters", "training_seconds", "seconds"]
    heads = ["accuracy", "95 % interval", "precision", "recall", "F1"]
    for c, entry in enumerate(classes):
        names = {m.first.results["per_class"][c]["name"] for m in methods if has_class(m, c)}
        heads.append(f"recall {entry['name'] if len(names) == 1 else f'of class {c}'}")
    heads += ["AUC", "Brier", "ECE", "trained", "train s", "eval s"]

    rows, seed_rows = [], []
    for method in methods:
        mean, sd = method.summary()
        interval = "{:.4f} to {:.4f}".format(*method.first.results["accuracy_interval"])
        if len(method.seeds) > 1:
            interval = f"sd {sd['accuracy']:.4f}, {len(method.seeds)} seeds"
            seed_rows.append([f"{method.name}, sd", *cells(sd | {"interval": ""}, measures)])
            for seed, result in method.seeds.items():
                own = "{:.4f} to {:.4f}".format(*result.results["accuracy_interval"])
                values = cells(result.measures | {"interval": own}, measures)
                seed_rows.append([f"{method.name}, seed {seed}", *values])
        n = str(method.first.results["n"])
        rows.append([method.name, n, *cells(mean | {"interval": interval}, measures)])
    parts = [draw(["method", "n", *heads], rows), "\n".join(notes(methods))]
    if seed_rows:
        parts.append("Seeds (sd: sample standard deviation):")
        parts.append(draw(["method", *heads], seed_rows))
    several = {method.name for method in methods if len(method.seeds) > 1}
    tests = [pair_row(pair, test, several) for pair in pairs for test in pair["tests"]]
    if tests:
        parts.append(
            "Pairs on the same examples (A - B: accuracy of A minus that of B, with a paired "
            "bootstrap interval;\nMcNemar p: exact, two-sided):"
        )
        heads = ["A", "B", "A - B", "95 % interval", "only A right", "only B right", "McNemar p"]
        parts.append(draw(heads, tests, words=2))
    if len(tests) > 1:
        parts.append(
            f"{len(tests)} tests: where nothing differs, one in twenty has p < 0.05 by chance. "
            f"p < {0.05 / len(tests):.2g}\n(0.05 / {len(tests)}) stands up to that."
        )
    refused = [
        f"{pair['a']} and {pair['b']}: not compared, {pair['not_compared']}"
        for pair in pairs
        if pair["not_compared"]
    ]
    if refused:
        parts.append("\n".join(f"- {line}" if markdown else line for line in refused))
    return "\n\n".join(part for part in parts if part)


def has_class(method: Method, c: int) -> bool:
    """Whether the method's examples have a class of this number."""
    return c < len(method.first.results["per_class"])


def notes(methods: Sequence[Method]) -> list[str]:
    """What the columns mean where it depends on the number of classes."""
    lines = []
    sizes = {len(m.first.results["per_class"]) for m in methods}
    if 2 in sizes:
        words = {m.first.results["per_class"][1]["name"] for m in methods if not has_class(m, 2)}
        word = f" ({words.pop()})" if len(words) == 1 else ""
        lines.append(f"Two classes: precision, recall and F1 of class 1{word}.")
    if sizes - {2}:
        lines.append(
            "More than two classes: precision, recall, F1 and AUC are means over the classes; "
            "Brier is summed over them."
        )
    return lines


def cells(values: dict, measures: Sequence[str]) -> list[str]:
    """The values of a row as text; - for what is undefined or does not exist."""
    texts = []
    for measure in measures:
        value = values.get(measure)
        if value is None:
            texts.append("-")
        elif isinstance(value, str):
            texts.append(value)
        elif measure == "trained_parameters":
            texts.append(f"{value:.0f}")
        else:
            texts.append(f"{value:.1f}" if measure.endswith("seconds") else f"{value:.4f}")
    return texts


def pair_row(pair: dict, test: dict, several: set[str]) -> list[str]:
    """One test as a row of the table of pairs; the methods named in `several` with their seed."""
    names = [
        f"{pair[side]}, seed {test[f'seed_{side}']}" if pair[side] in several else pair[side]
        for side in "ab"
    ]
    low, high = test["interval"]
    p = test["p"]
    return [
        *names,
        f"{test['difference']:+.4f}",
        f"{low:+.4f} to {high:+.4f}",
        str(test["only_a"]),
        str(test["only_b"]),
        f"{p:.4f}" if p >= 1e-4 else f"{p:.0e}",
    ]


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Columns for a terminal: the first `words` to the left, numbers to the right."""
    table = [list(heads), *rows]
    widths = [max(columns(row[i]) for row in table) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            pad(cell, width, left=i >= words)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """The same as a table of GitHub's Markdown, where a | inside a cell is escaped."""
    rule = ["---" if i < words else "---:" for i in range(len(heads))]
    lines = [heads, rule, *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in lines)


def format_results(results: dict) -> str:
    """The results as a table for a person."""

    def number(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.4f}"

    low, high = results["accuracy_interval"]
    mass = []
    if results["label_mass"] is not None:
        share = number(results["label_mass"])
        mass = [f"label mass    {share}   probability that the label words hold"]
    shortened = f"{results['truncated_rows']} of {results['n']} texts shortened"
    lines = [
        f"method        {results['method']}",
        f"examples      {results['n']}   ({shortened})",
        f"accuracy      {number(results['accuracy'])}   95 % interval {low:.4f} to {high:.4f}",
        *clean_line(results.get("clean")),
        f"AUC-ROC       {number(results['auc_roc'])}",
        f"Brier         {number(results['brier'])}   {results['brier_kind']}",
        f"ECE           {number(results['ece'])}   15 bins",
        *mass,
        f"speed         {results['examples_per_second']:.1f} examples/s, "
        f"{results['seconds']:.1f} s, {results['dtype']} on {results['device']}",
        "",
        "class          precision   recall       F1   examples",
    ]
    rows = [*results["per_class"], {"name": "macro", **results["macro"], "support": results["n"]}]
    lines += [
        f"{pad(row['name'], 14)} {row['precision']:9.4f} {row['recall']:8.4f} {row['f1']:8.4f} "
        f"{row['support']:10d}"
        for row in rows
    ]
    names = [row["name"] for row in results["per_class"]]
    heads = names + ["off track"] * bool(results["off_track"])
    lines += ["", "true \\ predicted" + "".join("  " + pad(name, 8, left=True) for name in heads)]
    lines += [
        pad(name, 16) + "".join(f"  {count:8d}" for count in counts)
        for name, counts in zip(names, results["confusion_matrix"], strict=True)
    ]
    return "\n".join(lines)


def clean_line(clean: dict | None) -> list[str]:
    """The line on the rows that are not in the training data; none where these are unknown."""
    if clean is None:
        return []
    if not clean["n"]:
        return [f"  clean part  undefined   every text stands in {clean['train_data']}"]
    low, high = clean["accuracy_interval"]
    return [
        f"  clean part  {clean['accuracy']:.4f}   95 % interval {low:.4f} to {high:.4f}   "
        f"{clean['n']} texts that are not in {clean['train_data']}"
    ]


def columns(text: str) -> int:
    """Width in a terminal, where a Chinese character takes two columns."""
    return sum(2 if east_asian_width(char) in "WF" else 1 for char in text)


def pad(text: str, width: int, left: bool = False) -> str:
    """Fill with spaces to a width in terminal columns."""
    space = " " * max(0, width - columns(text))
    return space + text if left else text + space


def prediction_lines(examples: Sequence[Example], scores: np.ndarray) -> str:
    """JSON lines: index (from 0), label, prediction, scores in class order."""
    return "".join(
        json.dumps(
            {
                "index": index,
                "label": example.label,
                "prediction": int(row.argmax()),
                "scores": row.tolist(),
            }
        )
        + "\n"
        for index, (example, row) in enumerate(zip(examples, scores, strict=True))
    )


if __name__ == "__main__":
    sys.exit(main())
