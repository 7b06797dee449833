"""Accuracies, confusion matrices, ROC, reliability and training curves as PNG files (needs
matplotlib). Rows are named as in the table; legends stand below the axes.

Curves differ in line style and marker, so they can be told apart without colour. Text is drawn in a
font that has its characters. A character that no installed font has is written as its code point,
as in \\u6b63; no empty boxes are drawn.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_min.files.disk import one_line_error, refuse_malformed, write_atomically
from qwen_min.files.output import Paths, open_outputs
from qwen_min.files.run import read_run
from qwen_min.metrics import expected_calibration_error, log_odds, softmax, wilson_interval
from qwen_min.report.compare import Method, Predictions, Result, read_columns
from qwen_min.report.fonts import find_font, readable, warn_of_missing
from qwen_min.report.intervals import accuracy_interval, majority

LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SMALL = {"fontsize": "small", "handlelength": 3.5}  # of a legend
DPI = 150
BINS = 15  # as in metrics.expected_calibration_error

Scored = Sequence[tuple[str, dict[int, Predictions]]]  # name and predictions by seed of each method
Logs = list[tuple[str, str, list[list], list[dict]]]  # as `training_logs` returns


def draw(methods: Sequence[Method], directory: str | Path, inputs: Paths = ()) -> list[Path]:
    """Draw all pictures for which there is data; return their files.

    ROC curves and reliability diagrams need scores, training curves a run with log.jsonl. The names
    of all other files have the examples' hash. stderr names characters that cannot be drawn.
    inputs: the files read, which no picture replaces.
    """
    directory, logs = Path(directory), training_logs(methods)
    words = [word for method in methods for word in (method.name, *method.classes)]
    font, drawable = find_font("".join(words))
    warn_of_missing("".join(words), drawable)
    style = {"font.family": ["DejaVu Sans", *filter(None, [font])]}
    style |= {"text.parse_math": False, "text.usetex": False}

    pictures: dict[str, Figure] = {}
    with matplotlib.rc_context(style):
        for examples in dict.fromkeys(m.first.results["examples_hash"] for m in methods):
            same = [m for m in methods if m.first.results["examples_hash"] == examples]
            names = [readable(m.name, drawable) for m in same]
            words = [[readable(word, drawable) for word in m.classes] for m in same]
            pictures[f"accuracy-{examples[:12]}.png"] = plot_accuracies(names, same, words[0])
            pictures[f"confusion-{examples[:12]}.png"] = plot_confusion(names, same, words)
            seeds = zip(names, map(scored_seeds, same), strict=True)
            if scored := [(name, found) for name, found in seeds if found]:
                pictures[f"roc-{examples[:12]}.png"] = plot_roc(scored, words[0])
                pictures[f"reliability-{examples[:12]}.png"] = plot_reliability(scored)
        if logs:
            logs = [(readable(name, drawable), *rest) for name, *rest in logs]
            pictures["training.png"] = plot_training(logs)
        with one_line_error(directory, "name a directory that you can write to"):
            directory.mkdir(parents=True, exist_ok=True)
        open_outputs([directory / name for name in pictures], inputs)
        for name, figure in pictures.items():
            figure.savefig(drawn := io.BytesIO(), dpi=DPI)
            write_atomically(directory / name, drawn.getvalue(), "make room or name another one")
    return [directory / name for name in pictures]


def scored_seeds(method: Method) -> dict[int, Predictions]:
    """The predictions of a method that have scores, by seed."""
    found = {seed: result.predictions for seed, result in method.seeds.items()}
    return {seed: p for seed, p in found.items() if p and p.scores is not None}


def training_logs(methods: Sequence[Method]) -> Logs:
    """(row, kind of loss, [steps, losses, learning rates], history) of each run with a log.

    history: the held-out losses. A run is named by its first row, preferably of a method that was
    trained in it; of several seeds also with its seed.
    """
    rows: dict[Path, str] = {}
    trained = [m for m in methods if m.first.results["method"] != "transplanted_head"]
    for method in [*trained, *methods]:
        for seed, result in method.seeds.items():
            if result.run:
                name = method.name + (f", seed {seed}" if len(method.seeds) > 1 else "")
                rows.setdefault(result.run, name)
    found = []
    for run, name in rows.items():
        path, record = run / "log.jsonl", read_run(run)
        if path.exists() and path.stat().st_size:  # head_only has no steps
            with refuse_malformed(path, "a log with step, loss, lr", "move it away to do without"):
                log = [list(map(float, c)) for c in read_columns(path, "step", "loss", "lr")]
            schema = {"history": [{"step": int, "held_out_log_loss": float}]}
            record = read_run(run, **schema if "history" in record else {})
            over = "vocabulary" if record.get("method") == "lora_label_scoring" else "classes"
            found.append((name, over, log, record.get("history", [])))  # unfinished: none
    return found


def curve_style(i: int) -> dict:
    """Colour, line style and marker of curve i; each curve has its markers at other places."""
    line = {"color": f"C{i % 10}", "linestyle": LINES[i % len(LINES)]}
    spacing = (0.02 + 0.03 * (i % 5), 0.15)
    return line | {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "markevery": spacing}


def finish(axes: Axes, **properties: object) -> None:
    """Set labels and limits, and draw a grid."""
    axes.set(**properties)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


def roc_curve(positive: np.ndarray, ranking: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """False and true positive rates, from (0, 0) to (1, 1), one point for each distinct ranking.

    positive: (n,) bool; the result is None unless both values occur. ranking: (n,), higher is
    likelier. Tied rows make one point, so the area is the rank-sum AUC with average ranks.
    """
    if positive.all() or not positive.any():
        return None
    _, place = np.unique(-ranking, return_inverse=True)  # tied rows have the same place
    hits, false = (np.cumsum(np.bincount(place, rows)) for rows in (positive, ~positive))
    return np.append(0, false) / false[-1], np.append(0, hits) / hits[-1]


def plot_roc(scored: Scored, classes: Sequence[str]) -> Figure:
    """A panel for class 1 of two classes, or for each class of more; a curve for each result.

    classes: the words to show. Seeds of one method share a style and one entry in the legend, with
    their mean AUC.
    """
    two = len(classes) == 2
    shown = [1] if two else range(len(classes))
    size = (5.6 * len(shown), 6.6 + 0.3 * len(scored))
    figure = Figure(figsize=size, layout="constrained")
    parts = figure.subfigures(1, len(shown), squeeze=False)[0]
    for c, part in zip(shown, parts, strict=True):
        axes = part.subplots()
        for i, (name, seeds) in enumerate(scored):
            found = [roc_curve(p.labels == c, log_odds(p.scores)[:, c]) for p in seeds.values()]
            curves = [curve for curve in found if curve]
            areas = [np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) for x, y in curves]
            several = f", mean of {len(areas)} seeds" if len(areas) > 1 else ""
            for j, (x, y) in enumerate(curves):
                label = "_" if j else fill(f"{name} (AUC {np.mean(areas):.4f}{several})", 48)
                axes.plot(x, y, label=label, **curve_style(i))
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, label="chance (AUC 0.5)")
        name, rest = classes[c], classes[0] if two else "the others"
        title = fill(f"ROC: {name} against {rest}", 44)
        x_label = fill(f"false positive rate: share of {rest} taken for {name}", 48)
        y_label = fill(f"true positive rate: share of {name} found", 48)
        finish(axes, title=title, xlabel=x_label, ylabel=y_label, aspect="equal")
        part.legend(loc="outside lower center", **SMALL)
    return figure


def plot_reliability(scored: Scored) -> Figure:
    """A reliability diagram for each result, above the number of rows in each bin."""
    panels = {}
    for name, seeds in scored:
        single = len(seeds) == 1
        panels |= {name if single else f"{name}, seed {s}": p for s, p in seeds.items()}
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(max(3.9 * across, 5), 4.9 * down + 0.3), layout="constrained")
    parts = figure.subfigures(down, across, squeeze=False).flat
    for part, (name, predictions) in zip(parts, panels.items(), strict=False):
        plot_bins(*part.subplots(2, 1, sharex=True, height_ratios=[3, 1]), name, predictions)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize="small")
    return figure


def plot_bins(upper: Axes, lower: Axes, name: str, predictions: Predictions) -> None:
    """Accuracy and its interval against confidence, for each bin; below, the rows in each bin."""
    labels, scores = predictions.labels, predictions.scores
    confidence = softmax(scores).max(axis=1)
    bin_of = np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left")
    bins, place = np.unique(bin_of, return_inverse=True)  # the bins that have rows
    weights = (None, scores.argmax(axis=1) == labels, confidence)
    n, hits, total = (np.bincount(place, weight) for weight in weights)
    y = hits / n
    intervals = [wilson_interval(int(h), int(m)) for h, m in zip(hits, n, strict=True)]
    errors = np.abs(np.transpose(intervals) - y)

    low = 1 / scores.shape[1]
    upper.plot([low, 1], [low, 1], color="0.5", linewidth=0.8, label="perfect calibration")
    measured = "measured, 95 % interval"
    upper.errorbar(total / n, y, errors, fmt="k.-", linewidth=1, capsize=2, label=measured)
    lower.bar((bins + 0.5) / BINS, n, 1 / BINS, facecolor="0.75", edgecolor="black")
    ece = expected_calibration_error(labels, scores)
    title = f"{fill(name, 34)}\nECE {ece:.4f}, n = {len(scores)}"
    finish(upper, title=title, ylabel="accuracy (share right)", ylim=(-0.02, 1.02))
    left = np.floor(low * BINS) / BINS - 0.02
    axis = "confidence (probability of the class taken)"
    finish(lower, xlabel=axis, ylabel="rows", xlim=(left, 1.02))


def plot_training(runs: Logs) -> Figure:
    """Training loss, held-out log-loss and learning rate of each run over its steps.

    Each kind of training loss has a panel: lora_label_scoring trains over the whole vocabulary,
    lora_head over the classes. The held-out log-loss is over the classes in both.
    """
    kinds = [kind for kind in ("classes", "vocabulary") if kind in [run[1] for run in runs]]
    heights = [3] * len(kinds) + [3, 1.5]
    figure = Figure(figsize=(8, sum(heights) + 1.5 + 0.2 * len(runs)), layout="constrained")
    *losses, held_out, rate = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for i, (name, kind, (steps, values, rates), history) in enumerate(runs):
        style, axes = curve_style(i), losses[kinds.index(kind)]
        if len(runs) == 1:
            axes.plot(steps, values, color="0.7", linewidth=0.7, label="single batches")
        # The loss of one batch is noisy: draw the mean over a twentieth of the run.
        width = max(1, len(steps) // 20)
        mean = np.convolve(values, np.full(width, 1 / width), "valid")
        several = f" (training loss: mean of {width} steps)" if width > 1 else ""
        axes.plot(steps[width - 1 :], mean, label=fill(name + several, 90), **style)
        if history:
            x, y = zip(*((h["step"], h["held_out_log_loss"]) for h in history), strict=True)
            held_out.plot(x, y, **style | {"markevery": None})
        rate.plot(steps, rates, **style | {"marker": ""})
    for axes, kind in zip(losses, kinds, strict=True):
        finish(axes, ylabel=f"training loss over the\n{kind} (nats per row)")
    finish(held_out, ylabel="held-out log-loss over\nthe classes (nats per row)")
    finish(rate, ylabel="learning rate (no unit)", xlabel="step (batches trained on)")
    figure.legend(loc="outside lower center", **SMALL)
    return figure


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


def plot_accuracies(names: Sequence[str], rows: Sequence[Method], words: Sequence[str]) -> Figure:
    """Accuracy of each row with its interval, and the majority baseline as a line."""
    figure = Figure(figsize=(7.5, 0.4 * len(rows) + 1.7), layout="constrained")
    axes, base = figure.subplots(), majority(rows[0].first)
    always = words[rows[0].classes.index(base["class"])]
    label = fill(f"majority baseline: always {always}", 60)
    axes.axvline(base["accuracy"], color="0.4", linestyle="--", label=label)
    groups = [list(row.seeds.values()) for row in rows]
    draw_accuracies(axes, groups, range(len(rows)), "", {"fmt": "o"})
    axes.set_yticks(range(len(rows)), [fill(name, 40) for name in names])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    finish(axes, xlabel=f"accuracy ({base['n']} examples)")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def plot_confusion(
    names: Sequence[str], rows: Sequence[Method], words: Sequence[Sequence[str]]
) -> Figure:
    """A confusion matrix for each row: counts, added over its seeds, and shares of the true class.

    The shade is the share. words: of each row, its classes.
    """
    across, C = min(3, len(rows)), len(words[0])
    side, down = max(3.6, 0.75 * C + 2), -(-len(rows) // across)
    figure = Figure(figsize=(side * across, side * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, name, row, own in zip(panels, names, rows, words, strict=False):
        counts = sum(np.array(r.results["confusion_matrix"]) for r in row.seeds.values())
        total = counts.sum(axis=1, keepdims=True)
        shares = counts / np.maximum(total, 1)
        axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
        for (i, j), share in np.ndenumerate(shares):
            color = "white" if share > 0.5 else "black"
            text = f"{counts[i, j]}\n{share:.1%}"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize="small")
        heads = [fill(word, 8) for word in own]
        more = ["off track"] * (counts.shape[1] > len(own))
        turned = 45 if C * max(map(len, heads)) > 20 else 0
        axes.set_xticks(range(counts.shape[1]), heads + more, rotation=turned)
        axes.set_yticks(range(len(own)), heads)
        several = f"\n{len(row.seeds)} seeds added" if len(row.seeds) > 1 else ""
        axes.set(title=fill(name, 30) + several, xlabel="predicted", ylabel="true")
    for axes in list(figure.axes)[len(rows) :]:
        axes.remove()
    return figure
