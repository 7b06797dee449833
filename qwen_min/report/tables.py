"""Results of several methods side by side, as tables for a person.

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

from qwen_min.command.cli import make_parser, run_command
from qwen_min.command.terminal import text_table
from qwen_min.errors import UserError
from qwen_min.files.output import commit_outputs, open_outputs
from qwen_min.report.compare import Method, compare_all, gather, read_all

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
            from qwen_min.report import plots
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
        p_value(p),
    ]


def p_value(p: float) -> str:
    """Four decimals, or one digit and the power of ten where these would say little."""
    return f"{p:.4f}" if p >= 1e-3 else f"{p:.0e}"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """The same as a table of GitHub's Markdown, where a | inside a cell is escaped."""
    rule = ["---" if i < words else "---:" for i in range(len(heads))]
    lines = [heads, rule, *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in lines)
