"""Results of evaluate.py put side by side: read, seeds gathered, methods tested in pairs.

Two results are compared only where they are about the same examples, by hash. Seeds of one method
are one method: same arguments, other random numbers.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from qwen_min.errors import UserError
from qwen_min.files.run import FREE, read_run
from qwen_min.metrics import confusion_matrix, mcnemar_exact, paired_bootstrap

NEEDED = ("method", "n", "accuracy", "accuracy_interval", "per_class", "macro", "auc_roc", "brier")
NEEDED += ("ece", "confusion_matrix", "examples_hash", "seconds", "arguments")
# What may differ between two seeds of one method. The examples are told apart by their hash.
ASIDE = {*FREE, "method", "seed", "run", "predictions", "train_data", "data", "limit", "encoding"}
ASIDE |= {"label_sets", "calibrate", "explain"}


@dataclass(frozen=True)
class Predictions:
    """What a method said of each row: classes (n,), scores (n, C), None where it gives none."""

    labels: np.ndarray
    predicted: np.ndarray
    scores: np.ndarray | None


@dataclass(frozen=True)
class Result:
    """One evaluation: its file, what is in it, its rows, and the run that it is of."""

    path: Path
    results: dict
    settings: dict  # every argument, of training too, that makes the method what it is
    seed: int  # of training; of the evaluation where nothing was trained
    trained: bool
    predictions: Predictions | None  # None where the file is missing
    run: Path | None

    @property
    def measures(self) -> dict[str, float | None]:
        """The numbers of one row of the table; None where one is undefined."""
        results = self.results
        two = len(results["per_class"]) == 2
        headline = results if two else results["macro"]
        return {
            "accuracy": results["accuracy"],
            **{key: headline[key] for key in ("precision", "recall", "f1")},
            **{f"recall_{c}": row["recall"] for c, row in enumerate(results["per_class"])},
            **{key: results[key] for key in ("auc_roc", "brier", "ece")},
            **{key: results.get(key) for key in ("trained_parameters", "training_seconds")},
            "seconds": results["seconds"],
        }


@dataclass(frozen=True)
class Method:
    """One row of the table: the results of one method, one for each seed, seeds ascending."""

    name: str
    seeds: dict[int, Result]

    @property
    def first(self) -> Result:
        return next(iter(self.seeds.values()))

    def summary(self) -> tuple[dict, dict]:
        """Mean and sample standard deviation over the seeds, by measure; None where undefined."""
        columns = {
            key: [r.measures[key] for r in self.seeds.values()] for key in self.first.measures
        }
        whole = {key: None not in values for key, values in columns.items()}
        mean = {k: statistics.fmean(v) if whole[k] else None for k, v in columns.items()}
        several = len(self.seeds) > 1
        sd = {k: statistics.stdev(v) if whole[k] and several else None for k, v in columns.items()}
        return mean, sd


def read_all(arguments: Sequence[str]) -> list[Result]:
    """The results in files and run directories, in the order given, each file once."""
    paths: dict[Path, Path] = {}
    for argument in map(Path, arguments):
        found = [argument]
        if argument.is_dir():
            found = sorted(argument.glob("results-*.json"))
            if not found:
                raise UserError(
                    f"{argument}: holds no results-*.json; make one with: "
                    f"python evaluate.py --run {argument} --data FILE"
                )
        for path in found:
            paths.setdefault(path.resolve(), path)
    return [read_result(path) for path in paths.values()]


def read_result(path: Path) -> Result:
    """One results file with its predictions. Raises UserError for what is none of evaluate.py."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in NEEDED if key not in results]
        if missing:
            raise ValueError(f"without {', '.join(missing)}")
        arguments = dict(results["arguments"])
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; expected the results of evaluate.py or a "
            "run directory"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not results of evaluate.py ({reason}); expected the file that it writes as "
            "--output"
        ) from None
    run = find_run(path, arguments)
    training = results.get("training_arguments")
    if training is None and arguments.get("run") and run:
        training = read_run(run)["arguments"]
    settings = {k: v for k, v in arguments.items() if k not in ASIDE}
    for name, value in (training or {}).items():
        # What both have, and alike, is said once. The rows trained on are no seed's affair.
        if name in ASIDE - {"data", "limit"} or (name in settings and settings[name] == value):
            continue
        settings[f"train_{name}" if name in arguments else name] = value
    return Result(
        path=path,
        results=results,
        settings={k: v for k, v in settings.items() if v is not None and v is not False},
        seed=(training or arguments).get("seed", 0),
        trained=training is not None,
        predictions=read_predictions(path, results),
        run=run,
    )


def find_run(path: Path, arguments: dict) -> Path | None:
    """The run directory that a results file belongs to: where it stands, or where it was then."""
    if arguments.get("run") is None:
        return None
    places = (path.parent, Path(arguments["run"]))
    return next((place for place in places if (place / "run.json").exists()), None)


def read_predictions(path: Path, results: dict) -> Predictions | None:
    """The predictions beside a results file; None where there are none.

    Raises UserError for a file that is not of these results: their counts must come out of it.
    """
    named = Path(results["arguments"].get("predictions") or path)
    ending = path.name.replace("results", "predictions")
    places = (path.with_name(ending).with_suffix(".jsonl"), path.parent / named.name, named)
    place = next((p for p in places if p.exists() and p.resolve() != path.resolve()), None)
    if place is None:
        return None
    classes = len(results["per_class"])
    try:
        # Not splitlines: an answer may hold U+2028, which JSON leaves as it is.
        lines = place.read_text(encoding="utf-8").rstrip("\n").split("\n")
        rows = [json.loads(line) for line in lines]
        if [row["index"] for row in rows] != list(range(results["n"])):
            raise ValueError(f"rows are not numbered 0 to {results['n'] - 1}")
        labels = np.array([row["label"] for row in rows])
        predicted = np.array([row["prediction"] for row in rows])
        scores = None
        if all(row["scores"] is not None for row in rows):
            scores = np.array([row["scores"] for row in rows], dtype=np.float64)
            if scores.shape != (len(rows), classes) or not np.isfinite(scores).all():
                raise ValueError(f"scores are not {classes} numbers for each row")
        matrix = confusion_matrix(labels, predicted, classes).tolist()
        if matrix != results["confusion_matrix"]:
            raise ValueError(f"they make another confusion matrix than {path.name} has")
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror}; check the file") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{place}: not the predictions of {path.name} ({error}); evaluate again, or move it "
            "away to do without"
        ) from None
    return Predictions(labels, predicted, scores)


def gather(results: Sequence[Result]) -> list[Method]:
    """Seeds of one method together, in the order of their first; names that tell methods apart."""
    groups: list[dict[int, Result]] = []
    for result in results:
        for group in groups:
            if same_method(result, next(iter(group.values()))) and result.seed not in group:
                group[result.seed] = result
                break
        else:
            groups.append({result.seed: result})
    firsts = [next(iter(group.values())) for group in groups]
    names = [method_name(first, firsts) for first in firsts]
    # The same evaluation twice, or values that look alike once shortened.
    names = [
        f"{name} ({first.path})" if names.count(name) > 1 else name
        for name, first in zip(names, firsts, strict=True)
    ]
    return [
        Method(name, dict(sorted(group.items()))) for name, group in zip(names, groups, strict=True)
    ]


def same_method(a: Result, b: Result) -> bool:
    """Whether two results differ in their seed alone."""
    return identity(a) == identity(b)


def identity(result: Result) -> dict:
    """What is the same for every seed of a method."""
    results = result.results
    return {
        "examples": results["examples_hash"][:8],
        **result.settings,
        "method": results["method"],
    }


def method_name(result: Result, among: Sequence[Result]) -> str:
    """The method, and those arguments in which it differs from others of the same method."""
    own = identity(result)
    others = [identity(r) for r in among if identity(r)["method"] == own["method"]]
    keys = [key for key in own if any(other.get(key) != own[key] for other in others)]
    # What another has and this one has not.
    keys += sorted({key for other in others for key in other} - own.keys())
    return " ".join([own["method"], *(f"{key}={short(own.get(key))}" for key in keys)])


def short(value: object, characters: int = 24) -> str:
    """A value in a name: of a long one the end, where paths and templates differ."""
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= characters else "…" + text[1 - characters :]


def compare_all(methods: Sequence[Method]) -> list[dict]:
    """`compare` for each pair of methods, in the order of the table."""
    return [compare(a, b) for a, b in combinations(methods, 2)]


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
    bare = [r for m in (a, b) for r in m.seeds.values() if r.predictions is None]
    if bare:
        return pair | {"not_compared": f"no predictions beside {bare[0].path}"}
    seeds = paired_seeds(a, b)
    if not seeds:
        found = " and ".join(", ".join(map(str, m.seeds)) for m in (a, b))
        return pair | {"not_compared": f"no seed in common: {found}"}
    return pair | {"tests": [paired_test(a.seeds[i], b.seeds[j]) for i, j in seeds]}


def paired_seeds(a: Method, b: Method) -> list[tuple[int, int]]:
    """Which seed of A goes with which of B: the same one; what has no seed goes with each."""
    if len(a.seeds) == len(b.seeds) == 1:
        return [(a.first.seed, b.first.seed)]
    for one, many, turn in ((a, b, 1), (b, a, -1)):
        if len(one.seeds) == 1 and not one.first.trained:
            return [(one.first.seed, seed)[::turn] for seed in many.seeds]
    return [(seed, seed) for seed in a.seeds if seed in b.seeds]


def paired_test(a: Result, b: Result) -> dict:
    """One paired test of two results on the same examples."""
    if not np.array_equal(a.predictions.labels, b.predictions.labels):
        raise UserError(
            f"{b.path}: its predictions have other labels than those of {a.path}, although both "
            "name the same examples; evaluate both again"
        )
    correct = [r.predictions.predicted == r.predictions.labels for r in (a, b)]
    difference, low, high = paired_bootstrap(*correct)
    return {
        "seed_a": a.seed,
        "seed_b": b.seed,
        "difference": difference,
        "interval": [low, high],
        **mcnemar_exact(*correct),
    }
