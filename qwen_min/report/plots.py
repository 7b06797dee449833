"""ROC curves, reliability diagrams and training curves as PNG files (needs matplotlib).

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
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_min.files.disk import one_line_error, refuse_malformed, write_atomically
from qwen_min.files.output import Paths, open_outputs
from qwen_min.files.run import read_run
from qwen_min.metrics import expected_calibration_error, log_odds, softmax, wilson_interval
from qwen_min.report.compare import Method, Predictions, read_columns

LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 150
BINS = 15  # as in metrics.expected_calibration_error

Scored = Sequence[tuple[str, dict[int, Predictions]]]  # name and predictions by seed of each method
Logs = list[tuple[str, list[list], list[dict]]]  # as `training_logs` returns


def draw(methods: Sequence[Method], directory: str | Path, inputs: Paths = ()) -> list[Path]:
    """Draw all pictures for which there is data; return their files.

    ROC curves and reliability diagrams need scores; their file names have the examples' hash.
    Training curves need a run with log.jsonl. inputs: the files read, which no picture replaces.
    """
    directory, logs = Path(directory), training_logs(methods)
    words = [word for method in methods for word in (method.name, *method.classes)]
    font, drawable = find_font("".join([*words, *(name for name, *_ in logs)]))
    style = {"font.family": ["DejaVu Sans", *filter(None, [font])]}
    style |= {"text.parse_math": False, "text.usetex": False}

    pictures: dict[str, Figure] = {}
    with matplotlib.rc_context(style):
        for examples in dict.fromkeys(m.first.results["examples_hash"] for m in methods):
            same = [m for m in methods if m.first.results["examples_hash"] == examples]
            scored = [(readable(m.name, drawable), p) for m in same if (p := scored_seeds(m))]
            if scored:
                classes = [readable(word, drawable) for word in same[0].classes]
                pictures[f"roc-{examples[:12]}.png"] = plot_roc(scored, classes)
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
    """(name, [steps, losses, learning rates], history of the held-out loss) of each run with a log.

    A run is named by its path if two directories have the same name.
    """
    logs = {}
    for run in dict.fromkeys(r.run for m in methods for r in m.seeds.values() if r.run):
        path = run / "log.jsonl"
        if path.exists() and path.stat().st_size:  # head_only has no steps
            with refuse_malformed(path, "a log with step, loss, lr", "move it away to do without"):
                columns = read_columns(path, "step", "loss", "lr")
                logs[run] = [list(map(float, column)) for column in columns]
    names = [run.resolve().name for run in logs]
    names = names if len(set(names)) == len(names) else map(str, logs)
    schema = {"history": [{"step": int, "held_out_log_loss": float}]}
    found = [read_run(run, **schema if "history" in read_run(run) else {}) for run in logs]
    histories = [record.get("history", []) for record in found]  # an unfinished run has none
    return list(zip(names, logs.values(), histories, strict=True))


def find_font(words: str) -> tuple[str | None, frozenset[int]]:
    """(font to use beside DejaVu Sans, code points that the two can draw).

    The font is the installed one with most of the characters that DejaVu Sans lacks. It is None if
    DejaVu Sans lacks no character, or if no font has any of them.
    """
    base = charmap(font_manager.findfont("DejaVu Sans"))
    missing = frozenset(map(ord, words)) - base
    best, covered = None, frozenset()
    fonts = font_manager.fontManager.ttflist if missing else []
    for font in sorted(fonts, key=lambda f: (f.style != "normal", str(f.weight), f.name)):
        found = missing & charmap(font.fname)
        # Last Resort claims all characters, and draws each as a box.
        if len(found) > len(covered) and "lastresort" not in font.name.lower().replace(" ", ""):
            best, covered = font.name, found
    return best, base | covered


def charmap(file: str) -> frozenset[int]:
    """The code points for which a font file has a glyph; none if it cannot be read."""
    try:
        return frozenset(font_manager.get_font(file).get_charmap())
    except (OSError, RuntimeError):  # FreeType cannot read every file in a font directory
        return frozenset()


def readable(text: str, drawable: frozenset[int]) -> str:
    """`text` with code points in place of characters that cannot be drawn: 正 becomes \\u6b63."""
    hidden = [char for char in text if ord(char) not in drawable or not char.isprintable()]
    return text.translate({ord(char): char.encode("unicode_escape").decode() for char in hidden})


def curve_style(i: int) -> dict:
    """Colour, line style and marker of curve i; each curve has its markers at other places."""
    line = {"color": f"C{i % 10}", "linestyle": LINES[i % len(LINES)]}
    spacing = (0.02 + 0.03 * (i % 5), 0.15)
    return line | {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "markevery": spacing}


def finish(axes: Axes, legend: bool = True, **properties: object) -> None:
    """Set labels and limits, draw a grid, and a legend if there are named curves."""
    axes.set(**properties)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", handlelength=3.5)


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
    figure = Figure(figsize=(5.6 * len(shown), 5.6), layout="constrained")
    for c, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
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
        x_label = fill(f"false positive rate: share of {rest} taken for {name}", 66)
        y_label = fill(f"true positive rate: share of {name} found", 66)
        finish(axes, title=title, xlabel=x_label, ylabel=y_label, aspect="equal")
    return figure


def plot_reliability(scored: Scored) -> Figure:
    """A reliability diagram for each result, above the number of rows in each bin."""
    panels = {}
    for name, seeds in scored:
        single = len(seeds) == 1
        panels |= {name if single else f"{name}, seed {s}": p for s, p in seeds.items()}
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.9 * across, 4.9 * down), layout="constrained")
    parts = figure.subfigures(down, across, squeeze=False).flat
    for part, (name, predictions) in zip(parts, panels.items(), strict=False):
        plot_bins(*part.subplots(2, 1, sharex=True, height_ratios=[3, 1]), name, predictions)
    figure.axes[0].legend(fontsize="small")
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
    finish(upper, False, title=title, ylabel="accuracy (share right)", ylim=(-0.02, 1.02))
    left = np.floor(low * BINS) / BINS - 0.02
    axis = "confidence (probability of the class taken)"
    finish(lower, False, xlabel=axis, ylabel="rows", xlim=(left, 1.02))


def plot_training(runs: Logs) -> Figure:
    """Training loss, held-out log-loss and learning rate of each run over its steps.

    The two losses have a panel each: lora_label_scoring trains over the whole vocabulary, but its
    held-out log-loss is over the label words alone.
    """
    figure = Figure(figsize=(8, 9), layout="constrained")
    loss, held_out, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.5])
    for i, (name, (steps, losses, rates), history) in enumerate(runs):
        style = curve_style(i)
        if len(runs) == 1:
            loss.plot(steps, losses, color="0.7", linewidth=0.7, label="single batches")
        # The loss of one batch is noisy: draw the mean over a twentieth of the run.
        width = max(1, len(steps) // 20)
        mean = np.convolve(losses, np.full(width, 1 / width), "valid")
        loss.plot(steps[width - 1 :], mean, label=f"{name} (mean of {width} steps)", **style)
        if history:
            x, y = zip(*((h["step"], h["held_out_log_loss"]) for h in history), strict=True)
            held_out.plot(x, y, label=name, **style | {"markevery": None})
        rate.plot(steps, rates, **style | {"marker": ""})
    finish(loss, ylabel="training loss (nats per row)")
    finish(held_out, ylabel="held-out log-loss (nats per row)")
    finish(rate, ylabel="learning rate (no unit)", xlabel="step (batches trained on)")
    return figure
