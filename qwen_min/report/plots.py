"""ROC curves, reliability diagrams and training curves as PNG files (needs matplotlib).

Line styles and markers tell the curves apart, so they do without colour. Words are drawn with a
font that has their characters; where no font on the machine has one, it is written as its code
point, as in \\u6b63, and never as an empty box.
"""

import json
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
from qwen_min.report.compare import Method, Predictions

LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 150
BINS = 15  # as in metrics.expected_calibration_error


def draw(methods: Sequence[Method], directory: str | Path) -> list[Path]:
    """Every picture that the methods allow; returns the files, named after the examples' hash.

    Methods without predictions or scores have no curve, runs without log.jsonl no training curve.
    """
    directory = Path(directory)
    words = [m.name for m in methods]
    words += [entry["name"] for m in methods for entry in m.first.results["per_class"]]
    words += [str(r.run) for m in methods for r in m.seeds.values()]
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
                entries = same[0].first.results["per_class"]
                classes = [
                    class_name(c, entry["name"], drawable) for c, entry in enumerate(entries)
                ]
                pictures[f"roc-{examples[:12]}.png"] = plot_roc(scored, classes)
                pictures[f"reliability-{examples[:12]}.png"] = plot_reliability(scored)
        runs = training_logs(methods)
        if runs:
            named = [(readable(name, drawable), *rest) for name, *rest in runs]
            pictures["training.png"] = plot_training(named)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, figure in pictures.items():
                figure.savefig(directory / name, dpi=DPI)
        except OSError as error:
            raise UserError(
                f"--plots {directory}: cannot be written ({error.strerror}); name a directory that "
                "is yours"
            ) from None
    return [directory / name for name in pictures]


def scored_seeds(method: Method) -> dict[int, Predictions]:
    """Those results of a method that have scores."""
    found = {seed: result.predictions for seed, result in method.seeds.items()}
    return {seed: p for seed, p in found.items() if p is not None and p.scores is not None}


def training_logs(methods: Sequence[Method]) -> list[tuple[str, list[dict], list[dict]]]:
    """(name, log.jsonl's lines, held-out history) of each run that has a log, once."""
    runs = dict.fromkeys(r.run for m in methods for r in m.seeds.values() if r.run)
    found = []
    for run in runs:
        path = run / "log.jsonl"
        if not path.exists():
            continue  # head_only has no steps
        try:
            log = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            log = [{key: entry[key] for key in ("step", "loss", "lr")} for entry in log]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not the log of a run ({error!r}); move it away to do without its curve"
            ) from None
        if log:
            found.append((run, log, read_run(run).get("history", [])))
    short = [run.resolve().name for run, *_ in found]
    unique = len(set(short)) == len(short)
    return [(run.resolve().name if unique else str(run), *rest) for run, *rest in found]


def find_font(words: str) -> tuple[str | None, frozenset[int]]:
    """The installed font that adds most of the characters DejaVu Sans lacks; all that both have.

    None where no other font is needed, or none has any of them.
    """
    base = frozenset(charmap(font_manager.findfont("DejaVu Sans")))
    missing = set(map(ord, words)) - base
    best, covered = None, frozenset()
    fonts = font_manager.fontManager.ttflist if missing else ()
    for font in sorted(
        fonts, key=lambda font: (font.style != "normal", str(font.weight), font.name)
    ):
        # Last Resort "has" every character: as a box that shows its block.
        found = (
            missing & charmap(font.fname)
            if "lastresort" not in font.name.lower().replace(" ", "")
            else set()
        )
        if len(found) > len(covered):
            best, covered = font.name, frozenset(found)
    return best, base | covered


def charmap(file: str) -> set[int]:
    """The code points for which a font file has a glyph; none where it cannot be read."""
    try:
        return set(font_manager.get_font(file).get_charmap())
    except (OSError, RuntimeError):  # FreeType refuses some of what lies in font directories
        return set()


def readable(text: str, drawable: frozenset[int]) -> str:
    """`text` with what cannot be drawn written as its code point: 正 becomes \\u6b63."""
    return "".join(
        char
        if ord(char) in drawable and char.isprintable()
        else char.encode("ascii", "backslashreplace").decode()
        if ord(char) > 127
        else repr(char)[1:-1]
        for char in text
    )


def class_name(c: int, word: str, drawable: frozenset[int]) -> tuple[str, str]:
    """A class's name for a title and, shorter, for an axis: its word, where that can be drawn."""
    shown = readable(word, drawable)
    return (shown, shown) if shown == word else (f"class {c} ({shown})", f"class {c}")


def roc_curve(positive: np.ndarray, ranking: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """False and true positive rates, from (0, 0) to (1, 1), one point for each distinct value.

    positive: (n,) of true/false; None unless there are both. ranking: (n,), higher is likelier.
    There are no points between tied rows, so the area below is the rank-sum with average ranks.
    """
    if positive.all() or not positive.any():
        return None
    order = np.argsort(-ranking)
    last_of_tie = np.append(np.diff(ranking[order]) != 0, True)
    hits = np.cumsum(positive[order])[last_of_tie]
    false = np.cumsum(~positive[order])[last_of_tie]
    return np.append(0, false) / false[-1], np.append(0, hits) / hits[-1]


def plot_roc(scored: Sequence[tuple[str, dict]], classes: Sequence[tuple[str, str]]) -> Figure:
    """A panel for class 1 of two, or for each of more classes; a curve for each method.

    scored: (name, seed → Predictions). Several seeds are drawn alike, the legend has their mean.
    classes: each one's name, as `class_name` has it.
    """
    shown = [1] if len(classes) == 2 else [*range(len(classes))]
    figure = Figure(figsize=(5.6 * len(shown), 5.6), layout="constrained")
    for c, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        for i, (name, seeds) in enumerate(scored):
            curves = [roc_curve(p.labels == c, log_odds(p.scores, c)) for p in seeds.values()]
            curves = [curve for curve in curves if curve]
            areas = [np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) for x, y in curves]
            several = f", mean of {len(areas)} seeds" if len(areas) > 1 else ""
            label = fill(f"{name} (AUC {np.mean(areas):.4f}{several})", 48) if areas else ""
            # A marker every so often, at other places on each curve.
            style = {"markevery": (0.02 + 0.03 * (i % 5), 0.15), "markersize": 5}
            style |= {"marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[i % len(LINES)]}
            for x, y in curves:
                axes.plot(x, y, label=label, color=f"C{i % 10}", **style)
                label = "_"  # one entry in the legend for all seeds
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, label="chance (AUC 0.5)")
        rest = classes[0] if len(classes) == 2 else ("the others", "the others")
        between = "\n" if len(classes[c][0] + rest[0]) > 30 else " "
        axes.set(
            title=f"ROC: {classes[c][0]}{between}against {rest[0]}",
            xlabel=f"false positive rate: share of {rest[1]} taken for {classes[c][1]}",
            ylabel=f"true positive rate: share of {classes[c][1]} found",
            xlim=(-0.01, 1.01),
            ylim=(-0.01, 1.01),
            aspect="equal",
        )
        axes.grid(color="0.9")
        axes.legend(loc="lower right", fontsize="small", handlelength=3.5)
    return figure


def plot_reliability(scored: Sequence[tuple[str, dict]]) -> Figure:
    """For each result how often it is right against how sure it is, above its count of rows."""
    panels = [
        (f"{name}, seed {seed}" if len(seeds) > 1 else name, predictions)
        for name, seeds in scored
        for seed, predictions in seeds.items()
    ]
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.9 * across, 4.9 * down), layout="constrained")
    grid = figure.subplots(2 * down, across, squeeze=False, height_ratios=[3, 1] * down)
    for i in range(across * down):
        upper, lower = (grid[2 * (i // across) + k, i % across] for k in (0, 1))
        if i < len(panels):
            plot_bins(upper, lower, *panels[i])
            if i == 0:
                upper.legend(loc="lower right", fontsize="small")
        else:
            upper.remove()
            lower.remove()
    return figure


def plot_bins(upper: Axes, lower: Axes, name: str, predictions: Predictions) -> None:
    """One reliability diagram: accuracy of each bin of confidence with its interval, and its n."""
    scores = predictions.scores
    confidence = softmax(scores).max(axis=1)
    correct = scores.argmax(axis=1) == predictions.labels
    bin_of = np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left")
    counts = np.bincount(bin_of, minlength=BINS)
    filled = np.flatnonzero(counts)
    hits = np.bincount(bin_of, weights=correct, minlength=BINS)[filled]
    x = np.bincount(bin_of, weights=confidence, minlength=BINS)[filled] / counts[filled]
    y = hits / counts[filled]
    intervals = [wilson_interval(int(h), int(n)) for h, n in zip(hits, counts[filled], strict=True)]
    # max: rounding may put the end of an interval past the share that it is around.
    errors = np.maximum(np.abs(np.array(intervals).T - y), 0)

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

    Two panels for the two losses: lora_label_scoring is trained on the whole vocabulary, and
    measured on the held-out rows among the label words alone.
    """
    figure = Figure(figsize=(8, 9), layout="constrained")
    loss, held_out, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.5])
    for i, (name, log, history) in enumerate(runs):
        style = {"color": f"C{i % 10}", "linestyle": LINES[i % len(LINES)]}
        marker = {"marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        steps = [entry["step"] for entry in log]
        # One batch is noise: a running mean over a twentieth of the run, and the batches faintly.
        width = max(1, len(log) // 20)
        values = np.array([entry["loss"] for entry in log])
        sums = np.cumsum(np.append(0, values))
        mean = (sums[width:] - sums[:-width]) / width
        if len(runs) == 1:
            loss.plot(steps, values, color="0.7", linewidth=0.7, label="single batches")
        every = {"markevery": (i * len(mean) // 40, max(1, len(mean) // 8))}
        loss.plot(
            steps[width - 1 :],
            mean,
            label=f"{name} (mean of {width} steps)",
            **style,
            **marker,
            **every,
        )
        if history:
            x, y = zip(*((h["step"], h["held_out_log_loss"]) for h in history), strict=True)
            held_out.plot(x, y, label=name, **style, **marker)
        rate.plot(steps, [entry["lr"] for entry in log], label=name, **style)
    loss.set(ylabel="training loss (nats per row)")
    held_out.set(ylabel="held-out log-loss (nats per row)")
    rate.set(ylabel="learning rate (no unit)", xlabel="step (batches trained on)")
    for axes in (loss, held_out, rate):
        axes.grid(color="0.9")
        if axes is not rate and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", handlelength=3.5)
    return figure
