"""ROC curves, reliability diagrams and training curves as PNG files (needs matplotlib).

Curves differ in line style and marker, so they can be told apart without colour. Text is drawn in a
font that has its characters. A character that no installed font has is written as its code point,
as in \\u6b63; no empty boxes are drawn.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_min.errors import UserError
from qwen_min.files.run import read_run
from qwen_min.metrics import expected_calibration_error, log_odds, softmax, wilson_interval
from qwen_min.report.compare import Method, Predictions, read_lines, reading

LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 150
BINS = 15  # as in metrics.expected_calibration_error

Seeds = dict[int, Predictions]  # the predictions of one method, by seed


def draw(methods: Sequence[Method], directory: str | Path) -> list[Path]:
    """Draw all pictures for which there is data; return their files.

    ROC curves and reliability diagrams need scores; their file names have the examples' hash.
    Training curves need a run with log.jsonl.
    """
    directory = Path(directory)
    logs = training_logs(methods)
    words = [name for name, *_ in logs]
    words += [word for method in methods for word in (method.name, *method.classes)]
    font, drawable = find_font("".join(words))

    pictures: dict[str, Figure] = {}
    families = ["DejaVu Sans", font] if font else ["DejaVu Sans"]
    style = {"font.family": families, "text.parse_math": False, "text.usetex": False}
    with matplotlib.rc_context(style):
        for examples in dict.fromkeys(m.first.results["examples_hash"] for m in methods):
            same = [m for m in methods if m.first.results["examples_hash"] == examples]
            scored = [(readable(m.name, drawable), scored_seeds(m)) for m in same]
            scored = [(name, seeds) for name, seeds in scored if seeds]
            if scored:
                classes = [class_name(c, word, drawable) for c, word in enumerate(same[0].classes)]
                pictures[f"roc-{examples[:12]}.png"] = plot_roc(scored, classes)
                pictures[f"reliability-{examples[:12]}.png"] = plot_reliability(scored)
        if logs:
            named = [(readable(name, drawable), *rest) for name, *rest in logs]
            pictures["training.png"] = plot_training(named)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, figure in pictures.items():
                figure.savefig(directory / name, dpi=DPI)
        except OSError as error:
            raise UserError(
                f"--plots {directory}: cannot be written ({error.strerror}); name a directory that "
                "you can write to"
            ) from None
    return [directory / name for name in pictures]


def scored_seeds(method: Method) -> Seeds:
    """The predictions of a method that have scores."""
    found = {seed: result.predictions for seed, result in method.seeds.items()}
    return {seed: p for seed, p in found.items() if p is not None and p.scores is not None}


def training_logs(methods: Sequence[Method]) -> list[tuple[str, list[dict], list[dict]]]:
    """(name, lines of log.jsonl, history of the held-out loss) of each run that has a log."""
    found = {}
    for run in dict.fromkeys(r.run for m in methods for r in m.seeds.values() if r.run):
        path = run / "log.jsonl"
        if not path.exists():
            continue  # head_only has no steps
        with reading(path, "the log of a run", "move it away to do without its curve"):
            keys = ("step", "loss", "lr")
            log = [{key: entry[key] for key in keys} for entry in read_lines(path)]
        if log:
            found[run] = (log, read_run(run).get("history", []))
    unique = len({run.resolve().name for run in found}) == len(found)
    return [(run.resolve().name if unique else str(run), *rest) for run, rest in found.items()]


def find_font(words: str) -> tuple[str | None, frozenset[int]]:
    """(font to use beside DejaVu Sans, code points that the two can draw).

    The font is the installed one with most of the characters that DejaVu Sans lacks. It is None if
    DejaVu Sans lacks no character, or if no font has any of them.
    """
    base = charmap(font_manager.findfont("DejaVu Sans"))
    missing = frozenset(map(ord, words)) - base
    if not missing:
        return None, base
    fonts = sorted(
        font_manager.fontManager.ttflist,
        key=lambda font: (font.style != "normal", str(font.weight), font.name),
    )
    candidates = [
        (font.name, missing & charmap(font.fname))
        for font in fonts
        # Last Resort claims all characters, and draws each as a box.
        if "lastresort" not in font.name.lower().replace(" ", "")
    ]
    name, covered = max(candidates, key=lambda candidate: len(candidate[1]))
    return name if covered else None, base | covered


def charmap(file: str) -> frozenset[int]:
    """The code points for which a font file has a glyph; none if it cannot be read."""
    try:
        return frozenset(font_manager.get_font(file).get_charmap())
    except (OSError, RuntimeError):  # FreeType cannot read every file in a font directory
        return frozenset()


def readable(text: str, drawable: frozenset[int]) -> str:
    """`text` with code points in place of characters that cannot be drawn: 正 becomes \\u6b63."""
    return "".join(
        char
        if ord(char) in drawable and char.isprintable()
        else char.encode("unicode_escape").decode()
        for char in text
    )


def class_name(c: int, word: str, drawable: frozenset[int]) -> tuple[str, str]:
    """Names of class c for a title and for an axis: its word if drawable, else with its number."""
    shown = readable(word, drawable)
    return (shown, shown) if shown == word else (f"class {c} ({shown})", f"class {c}")


def curve_style(i: int) -> dict:
    """Colour, line style and marker of curve i."""
    line = {"color": f"C{i % 10}", "linestyle": LINES[i % len(LINES)]}
    return line | {"marker": MARKERS[i % len(MARKERS)], "markersize": 5}


def roc_curve(positive: np.ndarray, ranking: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """False and true positive rates, from (0, 0) to (1, 1), one point for each distinct ranking.

    positive: (n,) bool; the result is None unless both values occur. ranking: (n,), higher is
    likelier. Tied rows make one point, so the area is the rank-sum AUC with average ranks.
    """
    if positive.all() or not positive.any():
        return None
    order = np.argsort(-ranking)
    last_of_tie = np.append(np.diff(ranking[order]) != 0, True)
    hits = np.cumsum(positive[order])[last_of_tie]
    false = np.cumsum(~positive[order])[last_of_tie]
    return np.append(0, false) / false[-1], np.append(0, hits) / hits[-1]


def plot_roc(scored: Sequence[tuple[str, Seeds]], classes: Sequence[tuple[str, str]]) -> Figure:
    """A panel for class 1 of two classes, or for each class of more; a curve for each result.

    scored: (name, predictions by seed). Seeds of one method share a style and one entry in the
    legend, with their mean AUC. classes: the names that `class_name` gives.
    """
    two = len(classes) == 2
    shown = [1] if two else range(len(classes))
    figure = Figure(figsize=(5.6 * len(shown), 5.6), layout="constrained")
    for c, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        for i, (name, seeds) in enumerate(scored):
            curves = [roc_curve(p.labels == c, log_odds(p.scores, c)) for p in seeds.values()]
            curves = [curve for curve in curves if curve]
            areas = [np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) for x, y in curves]
            several = f", mean of {len(areas)} seeds" if len(areas) > 1 else ""
            label = fill(f"{name} (AUC {np.mean(areas):.4f}{several})", 48) if areas else ""
            spacing = (0.02 + 0.03 * (i % 5), 0.15)  # each curve has its markers elsewhere
            for x, y in curves:
                axes.plot(x, y, label=label, markevery=spacing, **curve_style(i))
                label = "_"  # one entry in the legend for all seeds
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, label="chance (AUC 0.5)")
        name, short = classes[c]
        rest, short_rest = classes[0] if two else ("the others", "the others")
        between = "\n" if len(name + rest) > 30 else " "
        axes.set(
            title=f"ROC: {name}{between}against {rest}",
            xlabel=f"false positive rate: share of {short_rest} taken for {short}",
            ylabel=f"true positive rate: share of {short} found",
            xlim=(-0.01, 1.01),
            ylim=(-0.01, 1.01),
            aspect="equal",
        )
        axes.grid(color="0.9")
        axes.legend(loc="lower right", fontsize="small", handlelength=3.5)
    return figure


def plot_reliability(scored: Sequence[tuple[str, Seeds]]) -> Figure:
    """A reliability diagram for each result, above the number of rows in each bin."""
    panels = [
        (f"{name}, seed {seed}" if len(seeds) > 1 else name, predictions)
        for name, seeds in scored
        for seed, predictions in seeds.items()
    ]
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.9 * across, 4.9 * down), layout="constrained")
    grid = figure.add_gridspec(2 * down, across, height_ratios=[3, 1] * down)
    for i, (name, predictions) in enumerate(panels):
        row, column = divmod(i, across)
        upper = figure.add_subplot(grid[2 * row, column])
        lower = figure.add_subplot(grid[2 * row + 1, column])
        plot_bins(upper, lower, name, predictions)
    figure.axes[0].legend(loc="lower right", fontsize="small")
    return figure


def plot_bins(upper: Axes, lower: Axes, name: str, predictions: Predictions) -> None:
    """Accuracy and its interval against confidence, for each bin; below, the rows in each bin."""
    scores = predictions.scores
    confidence = softmax(scores).max(axis=1)
    correct = scores.argmax(axis=1) == predictions.labels
    bin_of = np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left")
    counts = np.bincount(bin_of, minlength=BINS)
    filled = counts > 0
    n = counts[filled]
    hits = np.bincount(bin_of, weights=correct, minlength=BINS)[filled]
    x = np.bincount(bin_of, weights=confidence, minlength=BINS)[filled] / n
    y = hits / n
    intervals = np.array([wilson_interval(int(h), int(m)) for h, m in zip(hits, n, strict=True)])
    # max: rounding can put the end of an interval on the wrong side of y.
    errors = np.maximum(np.abs(intervals.T - y), 0)

    low = 1 / scores.shape[1]
    ece = expected_calibration_error(predictions.labels, scores)
    upper.plot([low, 1], [low, 1], color="0.5", linewidth=0.8, label="perfect calibration")
    upper.errorbar(
        x, y, yerr=errors, fmt="o-", color="black", markersize=4, linewidth=1, elinewidth=0.8,
        capsize=2, label="measured, 95 % interval",
    )  # fmt: skip
    upper.set(
        title=f"{fill(name, 34)}\nECE {ece:.4f}, n = {len(scores)}",
        ylabel="accuracy (share right)",
        xlim=(np.floor(low * BINS) / BINS - 0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    upper.tick_params(labelbottom=False)
    lower.bar((np.arange(BINS) + 0.5) / BINS, counts, 1 / BINS, facecolor="0.75", edgecolor="black")
    lower.set(
        xlabel="confidence (probability of the class taken)", ylabel="rows", xlim=upper.get_xlim()
    )
    for axes in (upper, lower):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)


def plot_training(runs: Sequence[tuple[str, list[dict], list[dict]]]) -> Figure:
    """Training loss, held-out log-loss and learning rate of each run over its steps.

    The two losses have a panel each: lora_label_scoring trains over the whole vocabulary, but its
    held-out log-loss is over the label words alone.
    """
    figure = Figure(figsize=(8, 9), layout="constrained")
    loss, held_out, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.5])
    for i, (name, log, history) in enumerate(runs):
        steps = [entry["step"] for entry in log]
        losses = np.array([entry["loss"] for entry in log])
        # The loss of one batch is noisy: draw the mean over a twentieth of the run.
        width = max(1, len(log) // 20)
        sums = np.cumsum(np.append(0, losses))
        mean = (sums[width:] - sums[:-width]) / width
        if len(runs) == 1:
            loss.plot(steps, losses, color="0.7", linewidth=0.7, label="single batches")
        label = f"{name} (mean of {width} steps)"
        spacing = (i * len(mean) // 40, max(1, len(mean) // 8))
        loss.plot(steps[width - 1 :], mean, label=label, markevery=spacing, **curve_style(i))
        if history:
            x, y = zip(*((h["step"], h["held_out_log_loss"]) for h in history), strict=True)
            held_out.plot(x, y, label=name, **curve_style(i))
        rate.plot(steps, [entry["lr"] for entry in log], **curve_style(i) | {"marker": ""})
    loss.set(ylabel="training loss (nats per row)")
    held_out.set(ylabel="held-out log-loss (nats per row)")
    rate.set(ylabel="learning rate (no unit)", xlabel="step (batches trained on)")
    for axes in (loss, held_out, rate):
        axes.grid(color="0.9")
    for axes in (loss, held_out):
        if axes.lines:
            axes.legend(fontsize="small", handlelength=3.5)
    return figure
