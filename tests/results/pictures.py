"""Draw the pictures of README.md in this directory from the kept files (needs matplotlib).

`python tests/results/tables.py --write` draws them. Each PNG stores a hash of the kept files and of
the drawing code, so a test sees when a picture is out of date.
"""

import hashlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from experiment import CURVE, KEPT, REPO, TRAINING_ROWS
from kept import METHODS, TRAINED, accuracy_interval, find, first, with_rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_min.report.compare import Result
from qwen_min.report.fonts import find_fonts, readable
from qwen_min.report.plots import LINES, MARKERS, plot_reliability, plot_roc

DRAWING = ("plots.py", "fonts.py")  # of qwen_min.report
RANKED = ("zero_shot", "head_only", "transplanted_head", "lora_head", "lora_label_scoring")
CALIBRATED = ("zero_shot", "head_only", "lora_head", "lora_label_scoring")
CALIBRATED += ("probe-of-lora_head", "probe-of-lora_label_scoring")
FONTS, DRAWABLE = find_fonts()


def plain(name: str) -> str:
    """Title of a method without Markdown, in characters that the font has."""
    return readable(METHODS[name].replace("`", ""), DRAWABLE)


def draw_accuracies(
    axes: Axes, rows: Sequence[Sequence[Result]], y: Sequence[float], name: str, style: dict
) -> None:
    """A dot with the 95 % interval for each row's seeds, at the heights y; below it, each seed."""
    mean = np.array([np.mean([r.results["accuracy"] for r in row]) for row in rows])
    low, high = np.transpose([accuracy_interval(row) for row in rows])
    bars, black = [mean - low, high - mean], {"color": "black", "markersize": 4.5, "capsize": 2}
    axes.errorbar(mean, y, xerr=bars, label=f"{name}95 % interval", **black | style)
    seeds = [
        (result.results["accuracy"], place + 0.25)
        for row, place in zip(rows, y, strict=True)
        for result in row
        if len(row) > 1
    ]
    if seeds:
        axes.plot(*np.transpose(seeds), "|", color="0.4", label=f"{name}single seeds")


def accuracies() -> Figure:
    """Accuracy of every method with its interval: on the whole scale, and enlarged at the top."""
    names = [name for name in METHODS if find(name)]
    figure = Figure(figsize=(12, 0.34 * len(names) + 1.5), layout="constrained")
    whole, part = figure.subplots(1, 2, sharey=True, width_ratios=[1.2, 1.4])
    for size, marker, fill, shift in (("0.5b", "o", "black", -0.24), ("1.5b", "s", "white", 0.26)):
        groups = [list(find(f"{size}/{name}").values()) for name in names]
        y = np.flatnonzero([len(group) > 0 for group in groups])
        if not len(y):
            continue
        style = {"fmt": marker, "markerfacecolor": fill}
        for axes in (whole, part):
            draw_accuracies(axes, [groups[i] for i in y], y + shift, f"{size.upper()}, ", style)
    whole.set_yticks(range(len(names)), map(plain, names))
    whole.invert_yaxis()
    rows = first("zero_shot").results["n"]
    whole.set(xlim=(0, 1), xlabel=f"accuracy on dev ({rows:,} rows)")
    part.set(xlim=(0.8, 0.96), xlabel="the same, 0.80 to 0.96")
    part.set_xticks(np.arange(0.8, 0.97, 0.04))
    handles = whole.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize="small")
    for axes in (whole, part):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    return figure


def curve() -> Figure:
    """Accuracy against the number of training rows: one epoch, seed 0."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    untrained = first("zero_shot").results
    axes.axhspan(*untrained["accuracy_interval"], color="0.93")
    axes.axhline(untrained["accuracy"], color="0.4", linewidth=1, label="zero_shot (untrained)")
    sizes = (*CURVE, TRAINING_ROWS)
    for i, name in enumerate(TRAINED):
        results = [first(with_rows(name, n)) for n in sizes]
        # Shift the points a little, so that the bars do not overlap.
        x = [n * 1.04 ** (i - 1) for n, result in zip(sizes, results, strict=True) if result]
        found = [result.results for result in results if result]
        y = np.array([result["accuracy"] for result in found])
        bars = np.abs(np.transpose([result["accuracy_interval"] for result in found]) - y)
        axes.errorbar(
            x, y, yerr=bars, label=name, color=f"C{i}",
            marker=MARKERS[i], linestyle=LINES[i], markersize=5, elinewidth=0.8, capsize=2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(sizes, map("{:,}".format, sizes))
    axes.minorticks_off()
    axes.set(xlabel="training rows (a tenth held out), one epoch", ylabel="accuracy on dev")
    axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    return figure


def roc() -> Figure:
    """ROC curves of the main methods, every seed."""
    scored = {name: [result.predictions for result in find(name).values()] for name in RANKED}
    words = [readable(e["name"], DRAWABLE) for e in first("zero_shot").results["per_class"]]
    return plot_roc(scored, words)


def reliability() -> Figure:
    """Reliability of the main methods, seed 0."""
    return plot_reliability({plain(name): first(name).predictions for name in CALIBRATED})


PICTURES = {"accuracies": accuracies, "curve": curve, "roc": roc, "reliability": reliability}


def digest() -> str:
    """SHA-256 over every kept file, its name, and the drawing code."""
    whole = hashlib.sha256()
    code = [KEPT / "pictures.py", KEPT / "kept.py"]
    code += [REPO / "qwen_min" / "report" / name for name in DRAWING]
    for path in [*sorted(KEPT.glob("*/*.json*")), *code]:
        whole.update(f"{path.relative_to(REPO).as_posix()} {path.stat().st_size}\n".encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()


def draw() -> None:
    """Write all pictures to this directory."""
    metadata = {"Description": digest(), "Software": None}
    with matplotlib.rc_context({"font.family": FONTS}):
        for name, make in PICTURES.items():
            make().savefig(KEPT / f"{name}.png", dpi=90, metadata=metadata)
