"""Read results of evaluate.py, group the seeds of each method, and test methods in pairs.

Two results are compared only if their example hashes agree. Results that differ in the seed alone
belong to one method.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_min.errors import UserError
from qwen_min.files.run import FREE, read_run
from qwen_min.metrics import confusion_matrix, mcnemar_exact, paired_bootstrap

NEEDED = ("method", "n", "accuracy", "accuracy_interval", "per_class", "macro", "auc_roc", "brier")
NEEDED += ("ece", "confusion_matrix", "examples_hash", "seconds", "arguments")
# Arguments that do not make another method. The examples are identified by their hash instead.
IGNORED = {*FREE, "method", "seed", "run", "predictions", "train_data", "data", "limit", "encoding"}
IGNORED |= {"label_sets", "calibrate", "explain"}


@dataclass(frozen=True)
class Predictions:
    """Labels (n,), predicted classes (n,) and scores (n, C) of all rows; scores may be None."""

    labels: np.ndarray
    predicted: np.ndarray
    scores: np.ndarray | None


@dataclass(frozen=True)
class Result:
    """One evaluation: its results file, its predictions and its run."""

    path: Path
    results: dict  # the content of the file
    identity: dict  # examples, method and arguments, also of training: equal for all its seeds
    seed: int  # of training; of the evaluation if nothing was trained
    trained: bool
    predictions: Predictions | None  # None if the file is missing
    run: Path | None

    @property
    def measures(self) -> dict[str, float | None]:
        """The numbers of one row of the table; None if undefined."""
        results = self.results
        headline = results if len(results["per_class"]) == 2 else results["macro"]
        return {
            "accuracy": results["accuracy"],
            **{key: headline[key] for key in ("precision", "recall", "f1")},
            **{f"recall_{c}": row["recall"] for c, row in enumerate(results["per_class"])},
            **{key: results[key] for key in ("auc_roc", "brier", "ece")},
            **{key: results.get(key) for key in ("trained_parameters", "training_seconds")},
            "seconds": results["seconds"],
        }

    @property
    def row(self) -> dict[str, float | list[float] | None]:
        """The measures and the 95 % interval of the accuracy."""
        return {**self.measures, "accuracy_interval": self.results["accuracy_interval"]}


@dataclass(frozen=True)
class Method:
    """One row of the table: the results of one method by seed, in ascending order."""

    name: str
    seeds: dict[int, Result]

    @property
    def first(self) -> Result:
        """The result with the smallest seed."""
        return next(iter(self.seeds.values()))

    @property
    def classes(self) -> list[str]:
        """The word for each class."""
        return [row["name"] for row in self.first.results["per_class"]]

    def summary(self) -> tuple[dict, dict]:
        """Mean and sample standard deviation of each measure over the seeds; None if undefined."""
        mean, sd = {}, {}
        for key in self.first.measures:
            values = [result.measures[key] for result in self.seeds.values()]
            defined = None not in values
            mean[key] = statistics.fmean(values) if defined else None
            sd[key] = statistics.stdev(values) if defined and len(values) > 1 else None
        return mean, sd


@contextmanager
def reading(path: Path, what: str, advice: str) -> Iterator[None]:
    """Turn an error of the block into one line: `path` cannot be read, or is not `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {advice}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"without {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{path}: not {what} ({reason}); {advice}") from None


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON Lines file. Not str.splitlines: JSON strings may contain U+2028."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def read_all(arguments: Sequence[str]) -> list[Result]:
    """The results in files and run directories, in the order given; each file is read once."""
    paths: dict[Path, Path] = {}
    for argument in map(Path, arguments):
        found = sorted(argument.glob("results-*.json")) if argument.is_dir() else [argument]
        if not found:
            raise UserError(
                f"{argument}: holds no results-*.json; make one with: "
                f"python evaluate.py --run {argument} --data FILE"
            )
        for path in found:
            paths.setdefault(path.resolve(), path)
    return [read_result(path) for path in paths.values()]


def read_result(path: Path) -> Result:
    """Read a results file and its predictions. Raises UserError for any other file."""
    advice = "expected the file that evaluate.py writes as --output, or a run directory"
    with reading(path, "results of evaluate.py", advice):
        results = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in NEEDED if key not in results]:
            raise ValueError(f"without {', '.join(missing)}")
        arguments = dict(results["arguments"])
    run = None
    if arguments.get("run") is not None:
        # The run directory may have been moved since, with the results in it.
        places = (path.parent, Path(arguments["run"]))
        run = next((place for place in places if (place / "run.json").exists()), None)
    training = results.get("training_arguments")
    if training is None and run:
        training = read_run(run)["arguments"]
    settings = {name: value for name, value in arguments.items() if name not in IGNORED}
    for name, value in (training or {}).items():
        # data and limit stay: training rows must match between seeds. Equal values: listed once.
        if name in IGNORED - {"data", "limit"} or (name, value) in settings.items():
            continue
        settings[f"train_{name}" if name in arguments else name] = value
    return Result(
        path=path,
        results=results,
        identity={
            "examples": results["examples_hash"][:8],
            **{k: v for k, v in settings.items() if v is not None and v is not False},
            "method": results["method"],
        },
        seed=(training or arguments).get("seed", 0),
        trained=training is not None,
        predictions=read_predictions(path, results),
        run=run,
    )


def read_predictions(path: Path, results: dict) -> Predictions | None:
    """The predictions beside a results file; None if there is no such file.

    Raises UserError unless they give the confusion matrix of the results.
    """
    named = Path(results["arguments"].get("predictions") or path)
    usual = path.with_name(path.name.replace("results", "predictions")).with_suffix(".jsonl")
    places = (usual, path.parent / named.name, named)
    place = next((p for p in places if p.exists() and p.resolve() != path.resolve()), None)
    if place is None:
        return None
    n, classes = results["n"], len(results["per_class"])
    advice = "evaluate again, or move it away to do without"
    with reading(place, f"the predictions of {path.name}", advice):
        rows = read_lines(place)
        if [row["index"] for row in rows] != list(range(n)):
            raise ValueError(f"rows are not numbered 0 to {n - 1}")
        labels = np.array([row["label"] for row in rows])
        predicted = np.array([row["prediction"] for row in rows])
        scores = None
        if all(row["scores"] is not None for row in rows):
            scores = np.array([row["scores"] for row in rows], dtype=np.float64)
            if scores.shape != (n, classes) or not np.isfinite(scores).all():
                raise ValueError(f"scores are not {classes} numbers for each row")
        matrix = confusion_matrix(labels, predicted, classes).tolist()
        if matrix != results["confusion_matrix"]:
            raise ValueError(f"they make another confusion matrix than {path.name} has")
    return Predictions(labels, predicted, scores)


def gather(results: Sequence[Result]) -> list[Method]:
    """Group the seeds of each method, in the order given, and give each method a unique name."""
    groups: list[list[Result]] = []
    for result in results:
        for group in groups:
            seeds = [other.seed for other in group]
            if group[0].identity == result.identity and result.seed not in seeds:
                group.append(result)
                break
        else:
            groups.append([result])
    firsts = [group[0] for group in groups]
    names = [method_name(first, firsts) for first in firsts]
    methods = []
    for name, group in zip(names, groups, strict=True):
        # The same evaluation twice, or values that look alike once shortened.
        path = f" ({group[0].path})" if names.count(name) > 1 else ""
        seeds = {result.seed: result for result in sorted(group, key=lambda result: result.seed)}
        methods.append(Method(name + path, seeds))
    return methods


def method_name(result: Result, among: Sequence[Result]) -> str:
    """The method, and the arguments in which it differs from results of the same method."""
    own = result.identity
    others = [r.identity for r in among if r.identity["method"] == own["method"]]
    keys = dict.fromkeys([*own, *sorted(key for other in others for key in other)])
    differing = [key for key in keys if any(o.get(key) != own.get(key) for o in others)]
    return " ".join([own["method"], *(f"{key}={short(own.get(key))}" for key in differing)])


def short(value: object, characters: int = 24) -> str:
    """A value as part of a name. A long value keeps its end, where paths and templates differ."""
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= characters else "…" + text[1 - characters :]


def compare(a: Method, b: Method) -> dict:
    """A against B on the same examples: for each pair of seeds difference, interval and p.

    {"a", "b", "tests", "not_compared"}: the last is None, or says why there are no tests. Each test
    has seed_a, seed_b, difference (A's accuracy minus B's), interval (95 %, paired bootstrap),
    only_a and only_b (rows that only one has right) and p (exact McNemar).
    """
    pair = {"a": a.name, "b": b.name, "tests": [], "not_compared": None}
    if a.first.results["examples_hash"] != b.first.results["examples_hash"]:
        about = " and ".join(
            f"{m.first.results['n']} examples with hash {m.first.results['examples_hash'][:8]}"
            for m in (a, b)
        )
        return pair | {"not_compared": f"evaluated on different examples: {about}"}
    for result in [*a.seeds.values(), *b.seeds.values()]:
        if result.predictions is None:
            return pair | {"not_compared": f"no predictions beside {result.path}"}
    seeds = paired_seeds(a, b)
    if not seeds:
        found = " and ".join(", ".join(map(str, m.seeds)) for m in (a, b))
        return pair | {"not_compared": f"no seed in common: {found}"}
    return pair | {"tests": [paired_test(a.seeds[i], b.seeds[j]) for i, j in seeds]}


def paired_seeds(a: Method, b: Method) -> list[tuple[int, int]]:
    """Pairs (seed of A, seed of B) to test: equal seeds; every seed with an untrained method."""
    if len(a.seeds) == len(b.seeds) == 1:
        return [(a.first.seed, b.first.seed)]
    if len(a.seeds) == 1 and not a.first.trained:
        return [(a.first.seed, seed) for seed in b.seeds]
    if len(b.seeds) == 1 and not b.first.trained:
        return [(seed, b.first.seed) for seed in a.seeds]
    return [(seed, seed) for seed in a.seeds if seed in b.seeds]


def paired_test(a: Result, b: Result) -> dict:
    """One paired test of two results on the same examples; its keys as in `compare`."""
    if not np.array_equal(a.predictions.labels, b.predictions.labels):
        raise UserError(
            f"{b.path}: its predictions have other labels than those of {a.path}, although both "
            "name the same examples; evaluate both again"
        )
    correct = [r.predictions.predicted == r.predictions.labels for r in (a, b)]
    difference, low, high = paired_bootstrap(*correct)
    test = {"seed_a": a.seed, "seed_b": b.seed, "difference": difference, "interval": [low, high]}
    return test | mcnemar_exact(*correct)
