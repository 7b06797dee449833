"""Compare results of several methods: one table, paired tests and, with --plots, pictures.

    python -m qwen_min.report runs/head_only runs/lora_head
    python -m qwen_min.report zero_shot.json runs/lora-seed* --format markdown --output table.md
    python -m qwen_min.report runs/* --plots plots

Each argument is a results file of evaluate.py, with its predictions beside it (`predictions` for
`results` in the name), or a run directory with such files. Methods on the same examples are tested
in pairs. Runs that differ only in --seed form one row; runs without results are skipped. Below the
table stand the majority baseline, and everything besides the method in which the rows differ.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import chain, combinations, zip_longest

from qwen_min.command.cli import make_parser, run_command
from qwen_min.command.terminal import WIDTH, columns, text_table
from qwen_min.errors import UserError
from qwen_min.files.output import commit_outputs, open_outputs
from qwen_min.report import compare
from qwen_min.report.compare import HEADLINE, OTHERS, Method

DECIMALS = {"trained_parameters": 0, "training_seconds": 1, "seconds": 1}  # others: 4
PAIRS = "Pairs on the same examples (A - B: accuracy of A minus that of B, with a paired "
PAIRS += "bootstrap interval; McNemar p: exact, two-sided):"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("results", nargs="+", metavar="RESULTS", help="a results file or a run directory")
    add("--format", choices=("text", "markdown", "json"), default="text", help="of the report")
    add("--output", metavar="FILE", help="write the report to FILE instead of the terminal")
    drawn = "accuracies, confusion matrices, ROC, reliability and training curves"
    add("--plots", metavar="DIR", help=f"also draw {drawn} (needs matplotlib)")
    return run_command(report, parser.parse_args(argv))


def report(args: argparse.Namespace) -> int:
    """Read and compare the results, print or write the report, then draw the pictures."""
    if args.plots and find_spec("matplotlib") is None:
        raise UserError("--plots needs matplotlib, which is not installed: pip install matplotlib")
    results = compare.read_all(args.results)
    (output,) = open_outputs([args.output], compare.files_read(results))
    methods = compare.gather(results)
    pairs = [compare.compare(a, b) for a, b in combinations(methods, 2)]
    if args.format == "json":
        text = json.dumps(as_json(methods, pairs), ensure_ascii=False, indent=2)
    else:
        text = format_report(methods, pairs, args.format == "markdown")
    commit_outputs([(output, text + "\n")])
    if not args.output:
        print(text)
    if args.plots:
        from qwen_min.report.plots import draw  # here, because it imports matplotlib

        for path in draw(methods, args.plots, compare.files_read(results)):
            print(path, file=sys.stderr)
    return 0


def as_json(methods: Sequence[Method], pairs: Sequence[dict]) -> dict:
    """The report for a program: all numbers, not rounded."""
    rows = []
    for method in methods:
        mean, sd = method.summary()
        shared = {key: method.first.results[key] for key in ("n", "examples_hash")}
        seeds = [{"seed": seed, "file": str(r.path), **r.row} for seed, r in method.seeds.items()]
        numbers = {"mean": mean, "standard_deviation": sd, "seeds": seeds}
        rows.append({"name": method.name} | shared | numbers)
    return {"methods": rows, "pairs": list(pairs), "differences": compare.differences(methods)}


def format_report(methods: Sequence[Method], pairs: Sequence[dict], markdown: bool) -> str:
    """The report for a person: a table of methods, of their seeds, and of the paired tests.

    As text it is at most WIDTH columns wide; Markdown has one table of each kind.
    """
    draw, bullet = (markdown_table, "- ") if markdown else (text_blocks, "")
    measures = table_columns(methods)
    rows, seed_rows = [], []
    for method in methods:
        values = method.first.row
        if len(method.seeds) > 1:
            mean, sd = method.summary()
            interval = f"sd {sd['accuracy']:.4f}, {len(method.seeds)} seeds"
            values = mean | {"accuracy_interval": interval}
            named = {title: result.row for title, result in method.titled.items()}
            named[f"{method.name}, sd"] = sd
            seed_rows += [[name, *cells(row, measures)] for name, row in named.items()]
        rows.append([method.name, str(method.first.results["n"]), *cells(values, measures)])
    parts = [draw(["method", "n", *measures.values()], rows), "\n".join(notes(methods))]
    if apart := compare.differences(methods):
        parts.append("What differs besides the method, among the rows for which it is known:")
        parts.append("\n".join(bullet + difference(*item) for item in apart.items()))
    if seed_rows:
        seed_table = draw(["method", *measures.values()], seed_rows)
        parts += ["Seeds (sd: sample standard deviation):", seed_table]

    titles = {(m.name, r.seed): title for m in methods for title, r in m.titled.items()}
    tests = [pair_row(pair, test, titles) for pair in pairs for test in pair["tests"]]
    if tests:
        heads = ["A", "B", "A - B", "95 % interval", "McNemar p", "only A right", "only B right"]
        parts += [PAIRS, draw(heads, tests, words=2)]
    if (n := len(tests)) > 1:
        chance = f"{n} tests: where nothing differs, one in twenty has p < 0.05 by chance."
        parts.append(f"{chance} p < {0.05 / n:.2g} (0.05 / {n}) stands up to that.")
    refused = [(f"{pair['a']} and {pair['b']}", pair["not_compared"]) for pair in pairs]
    refused = [f"{bullet}{names}: not compared, {why}" for names, why in refused if why]
    text = "\n\n".join(filter(None, [*parts, "\n".join(refused)]))
    return text if markdown else "\n".join(chain.from_iterable(map(wrapped, text.split("\n"))))


def difference(what: str, said: dict[str, str]) -> str:
    """One line: each value, and the rows that have it."""
    values = [f"{text} ({', '.join(n for n in said if said[n] == text)})" for text in said.values()]
    return f"{what}: {' | '.join(dict.fromkeys(values))}"


def table_columns(methods: Sequence[Method]) -> dict[str, str]:
    """Measure → heading, in the order of the columns."""
    found = {"accuracy": "accuracy", "accuracy_interval": "95 % interval"} | HEADLINE
    if any(len(method.classes) == 2 for method in methods):  # of more classes F1 itself is macro
        found["macro_f1"] = "macro F1"
    for c, words in enumerate(zip_longest(*(method.classes for method in methods))):
        word, *others = {*words} - {None}
        found[f"recall_{c}"] = f"recall of class {c}" if others else f"recall {word}"
    return found | OTHERS


def notes(methods: Sequence[Method]) -> list[str]:
    """What the columns mean: this depends on the number of classes."""
    lines = []
    if positive := dict.fromkeys(m.classes[1] for m in methods if len(m.classes) == 2):
        lines.append(f"Two classes: precision, recall and F1 of class 1 ({', '.join(positive)}).")
    if any(len(method.classes) > 2 for method in methods):
        more = "precision, recall, F1 and AUC are means over the classes; Brier is summed over them"
        lines.append(f"More than two classes: {more}.")
    for examples, method in {m.first.results["examples_hash"]: m for m in methods}.items():
        c, accuracy, low, high = method.first.majority()
        which = f"{method.first.results['n']} examples with hash {examples[:8]}"
        said = f"always {method.classes[c]} has accuracy {accuracy:.4f} ({low:.4f} to {high:.4f})"
        lines.append(f"Majority baseline ({which}): {said}.")
    return lines


def cells(values: dict, measures: dict[str, str]) -> list[str]:
    """The values of a row as text; "-" for one that is undefined or does not exist."""

    def cell(measure: str, value: float | list[float] | str | None) -> str:
        if value is None:
            return "-"
        if isinstance(value, list):
            return "{:.4f} to {:.4f}".format(*value)
        return value if isinstance(value, str) else f"{value:.{DECIMALS.get(measure, 4)}f}"

    return [cell(measure, values.get(measure)) for measure in measures]


def pair_row(pair: dict, test: dict, titles: dict[tuple[str, int], str]) -> list[str]:
    """One test as a row of the table of pairs. titles: by the method's name and the seed."""
    names = [titles[pair[side], test[f"seed_{side}"]] for side in "ab"]
    interval = "{:+.4f} to {:+.4f}".format(*test["interval"])
    counts = [str(test["only_a"]), str(test["only_b"])]
    return [*names, f"{test['difference']:+.4f}", interval, p_value(test["p"]), *counts]


def p_value(p: float) -> str:
    """Four decimals; below 0.001 one digit and the power of ten."""
    return f"{p:.4f}" if p >= 1e-3 else f"{p:.0e}"


def wrapped(text: str, width: int = WIDTH) -> list[str]:
    """Lines of at most `width` columns. They break at a space if there is one, and are indented."""
    found, rest = [], text.replace("\n", "\\n")
    while columns(rest) > width:
        end = next(i for i in range(len(rest), 0, -1) if columns(rest[:i]) <= width)
        space = rest.rfind(" ", end // 2, end + 1)
        end = space if space > 0 else end
        found.append(rest[:end].rstrip())
        rest = "  " + rest[end:].lstrip()
    return [*found, rest]


def text_blocks(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """As `terminal.text_table`, in blocks of at most WIDTH columns that repeat the first words."""
    most = 30 if words == 1 else 19  # so that an interval and a p fit beside two names
    lines = []
    for row in [heads, *rows]:
        lines += zip_longest(*(wrapped(cell, most) for cell in row), fillvalue="")
    table = list(zip(*lines, strict=True))  # by column
    blocks = [table[:words]]
    for column in table[words:]:
        if sum(max(map(columns, part)) + 2 for part in [*blocks[-1], column]) - 2 > WIDTH:
            blocks.append(table[:words])
        blocks[-1].append(column)
    shown = [list(zip(*block, strict=True)) for block in blocks]
    return "\n\n".join(text_table(head, body, words) for head, *body in shown)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """As `terminal.text_table`, in GitHub's Markdown; a | inside a cell is escaped."""
    rule = ["---" if i < words else "---:" for i in range(len(heads))]
    lines = [heads, rule, *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in lines)
