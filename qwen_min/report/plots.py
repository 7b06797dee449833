"""Accuracies, confusion matrices, ROC, reliability and training curves as PNG files (needs
matplotlib). Rows are named as in the table; legends stand below the axes.

Curves differ in line style and marker, so they can be told apart without colour. Text is drawn in a
font that has its characters. A character that no installed font has is written as its code point,
as in \\u6b63; no empty boxes are drawn.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from qwen_min.files.disk import one_line_error, refuse_malformed, write_atomically
from qwen_min.files.output import Paths, open_outputs
from qwen_min.files.run import read_run
from qwen_min.metrics import expected_calibration_error, log_odds, softmax, wilson_interval
from qwen_min.report.compare import Method, Predictions, Result, read_columns
from qwen_min.report.fonts import NO_FONT, find_fonts, readable

LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 150
BINS = 15  # as in metrics.expected_calibration_error


def draw(methods: Sequence[Method], directory: str | Path, inputs: Paths = ()) -> list[Path]:
    """Draw all pictures for which there is data; return their files.

    ROC curves and reliability diagrams need scores, training curves a run with log.jsonl. The names
    of all other files have the examples' hash. stderr names characters that cannot be drawn.
    inputs: the files read, which no picture replaces.
    """
    directory, (fonts, drawable) = Path(directory), find_fonts()
    words = "".join(word for method in methods for word in (method.name, *method.classes))
    missing = "".join(dict.fromkeys(char for char in words if ord(char) not in drawable))
    methods = [method._replace(name=readable(method.name, drawable)) for method in methods]

    pictures: dict[str, Figure] = {}
    style = {"font.family": fonts, "text.parse_math": False, "text.usetex": False}
    with matplotlib.rc_context(style):
        for examples in dict.fromkeys(m.first.results["examples_hash"] for m in methods):
            same = [m for m in methods if m.first.results["examples_hash"] == examples]
            own = {t: [readable(w, drawable) for w in m.classes] for m in same for t in m.titled}
            words = next(iter(own.values()))
            rows = {name: result for m in same for name, result in m.titled.items()}
            kinds = {"accuracy": plot_accuracies(rows, words)}
            kinds["confusion"] = plot_confusion(rows, own)
            found = {name: row.predictions for name, row in rows.items() if row.predictions}
            if scored := {name: p for name, p in found.items() if p.scores is not None}:
                seeds = {m.name: [scored[t] for t in m.titled if t in scored] for m in same}
                kinds["roc"] = plot_roc(seeds, words)
                kinds["reliability"] = plot_reliability(scored)
            pictures |= {f"{kind}-{examples[:12]}.png": kinds[kind] for kind in kinds}
        if logs := training_logs(methods):
            pictures["training.png"] = plot_training(logs)
        with one_line_error(directory, "name a directory that you can write to"):
            directory.mkdir(parents=True, exist_ok=True)
        open_outputs([directory / name for name in pictures], inputs)
        for name, figure in pictures.items():
            figure.savefig(drawn := io.BytesIO(), dpi=DPI)
            write_atomically(directory / name, drawn.getvalue(), "make room or name another one")
    if missing:  # said last: an error is one line
        print(NO_FONT.format(missing, matplotlib.get_cachedir()), file=sys.stderr)
    return [directory / name for name in pictures]


def training_logs(methods: Sequence[Method]) -> list[tuple]:
    """(row, kind of loss, [steps, losses, learning rates], history) of each run with a log.

    history: the held-out losses. A run is named by its first row; of several seeds with its seed.
    """
    found = {}
    named = [item for method in methods for item in method.titled.items()]
    for name, run in ((name, result.run) for name, result in named if result.run):
        path = run / "log.jsonl"
        if run not in found and path.exists() and path.stat().st_size:  # head_only has no steps
            with refuse_malformed(path, "a log with step, loss, lr", "move it away to do without"):
                log = [list(map(float, c)) for c in read_columns(path, "step", "loss", "lr")]
            schema = {"history": [{"step": int, "held_out_log_loss": float}]}
            record = read_run(run, **schema if "history" in read_run(run) else {})
            over = "vocabulary" if record.get("method") == "lora_label_scoring" else "classes"
            found[run] = (name, over, log, record.get("history", []))  # unfinished: none
    return list(found.values())


def grid(panels: int, width: float, height: float) -> tuple[Figure, list[SubFigure]]:
    """A figure, and a part of it for each panel, at most three in a row."""
    across = min(3, panels)
    down = -(-panels // across)
    figure = Figure(figsize=(max(width * across, 5), height * down), layout="constrained")
    return figure, list(figure.subfigures(down, across, squeeze=False).flat)[:panels]


def legend_below(figure: Figure | SubFigure, columns: int = 1) -> None:
    """One legend for all axes, outside of them."""
    found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {label: handle for entries in found for handle, label in entries}
    style = {"loc": "outside lower center", "fontsize": "small", "handlelength": 3.5}
    figure.legend(handles.values(), handles.keys(), ncols=columns, **style)


def curve_style(i: int) -> dict:
    """Colour, line style and marker of curve i; each curve has its markers at other places."""
    line = {"color": f"C{i % 10}", "linestyle": LINES[i % len(LINES)]}
    spacing = (0.02 + 0.03 * (i % 5), 0.15)
    return line | {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "markevery": spacing}


def finish(axes: Axes, **properties: object) -> None:
    """Set labels and limits, and draw a grid."""
    axes.set(axisbelow=True, **properties)
    axes.grid(color="0.9")


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


def plot_roc(scored: Mapping[str, Sequence[Predictions]], classes: Sequence[str]) -> Figure:
    """A panel for class 1 of two classes, or for each class of more; a curve for each result.

    scored: the predictions of each method, by seed. They share a style and one entry in the legend,
    with their mean AUC. classes: the words to show.
    """
    two = len(classes) == 2
    shown = [1] if two else range(len(classes))
    figure, parts = grid(len(shown), 5.6, 6.6 + 0.3 * len(scored))
    for c, part in zip(shown, parts, strict=True):
        axes = part.subplots()
        for i, (name, seeds) in enumerate(scored.items()):
            found = [roc_curve(p.labels == c, log_odds(p.scores)[:, c]) for p in seeds]
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
        legend_below(part)
    return figure


def plot_reliability(scored: Mapping[str, Predictions]) -> Figure:
    """A reliability diagram for each result, above the number of rows in each bin."""
    figure, parts = grid(len(scored), 3.9, 5)
    for part, (name, predictions) in zip(parts, scored.items(), strict=True):
        plot_bins(*part.subplots(2, 1, sharex=True, height_ratios=[3, 1]), name, predictions)
    legend_below(figure, 2)
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


def plot_training(runs: Sequence[tuple]) -> Figure:
    """Training loss, held-out log-loss and learning rate of each run, as in `training_logs`.

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
    legend_below(figure)
    return figure


def plot_accuracies(rows: Mapping[str, Result], words: Sequence[str]) -> Figure:
    """Accuracy of each result with its interval, and the majority baseline as a line.

    words: the classes, to show.
    """
    figure = Figure(figsize=(7.5, 0.4 * len(rows) + 1.7), layout="constrained")
    axes, first = figure.subplots(), next(iter(rows.values()))
    c, share, *_ = first.majority()
    label = fill(f"majority baseline: always {words[c]}", 60)
    axes.axvline(share, color="0.4", linestyle="--", label=label)
    accuracies = np.array([row.results["accuracy"] for row in rows.values()])
    ends = np.transpose([row.results["accuracy_interval"] for row in rows.values()])
    style = {"fmt": "ko", "markersize": 4.5, "capsize": 2, "label": "95 % interval"}
    axes.errorbar(accuracies, range(len(rows)), xerr=np.abs(ends - accuracies), **style)
    axes.set_yticks(range(len(rows)), [fill(name, 40) for name in rows])
    about = f"accuracy ({first.results['n']} examples)"
    finish(axes, xlabel=about, ylim=(len(rows) - 0.4, -0.6))
    legend_below(figure, 2)
    return figure


def plot_confusion(rows: Mapping[str, Result], words: Mapping[str, Sequence[str]]) -> Figure:
    """A confusion matrix for each result: counts, and shares of the true class, which shade it.

    words: the classes of each result, to show.
    """
    side = max(3.6, 0.75 * max(map(len, words.values())) + 2)
    figure, parts = grid(len(rows), side, side)
    for part, (name, row) in zip(parts, rows.items(), strict=True):
        axes, counts = part.subplots(), np.array(row.results["confusion_matrix"])
        heads = [fill(word, 8) for word in words[name]]
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
        for (i, j), share in np.ndenumerate(shares):
            style = {"color": "white" if share > 0.5 else "black", "fontsize": "small"}
            axes.text(j, i, f"{counts[i, j]}\n{share:.1%}", ha="center", va="center", **style)
        predicted = [*heads, "off track"][: counts.shape[1]]
        turned = 45 if len(heads) * max(map(len, heads)) > 20 else 0
        axes.set_xticks(range(len(predicted)), predicted, rotation=turned)
        axes.set_yticks(range(len(heads)), heads)
        axes.set(title=fill(name, 30), xlabel="predicted", ylabel="true")
    return figure
