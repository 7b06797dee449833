"""Read results of evaluate.py, group the seeds of each method, and test methods in pairs.

Two results are compared only if their example hashes agree. Results that differ in the seed alone
belong to one method (`settings.identify`).
"""

import json
import os
import reprlib
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwen_min.errors import UserError
from qwen_min.files.disk import parse_json, read_json, read_regular, refuse_malformed
from qwen_min.files.run import WRITTEN, read_run
from qwen_min.metrics import confusion_matrix, mcnemar_exact, paired_bootstrap, wilson_interval
from qwen_min.report.settings import identify

# Numbers of a row, and their headings. The recall of each class stands between the two.
HEADLINE = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}
OTHERS = {"auc_roc": "AUC", "brier": "Brier", "ece": "ECE", "trained_parameters": "trained"}
OTHERS |= {"training_seconds": "train s", "seconds": "eval s"}
PER_CLASS = dict.fromkeys(("precision", "recall", "f1"), float)
NEEDED = {"failed": None, "accuracy_interval": [float], "clean": (dict, None)}
NEEDED |= {"method": str, "examples_hash": str, "n": int, "per_class": [{"name": str} | PER_CLASS]}
NEEDED |= {"confusion_matrix": [[int]], "macro": PER_CLASS, "training_arguments": (dict, None)}
NEEDED |= dict.fromkeys((*HEADLINE, *OTHERS), (float, None)) | {"accuracy": float, "seconds": float}
NEEDED |= dict.fromkeys(("base_fingerprint", "tokenizer_hash", "training_dtype"), (str, None))
NEEDED["arguments"] = dict.fromkeys(("run", "predictions", "model", "template"), (str, None))
KIND = "results of evaluate.py"


class Predictions(NamedTuple):
    """Labels (n,), predicted classes (n,) and scores (n, C) of all rows; scores may be None."""

    labels: np.ndarray
    predicted: np.ndarray
    scores: np.ndarray | None


class Result(NamedTuple):
    """One evaluation: its results file, its predictions and its run."""

    path: Path
    results: dict  # the content of the file
    shown: dict  # settings as arguments; this and the next two: as `identify` returns them
    hashes: dict  # of some settings
    identity: dict  # what the predictions depend on besides the seed
    seed: int  # of training; of the evaluation if nothing was trained
    predictions: Predictions | None  # None if the file is missing
    run: Path | None

    @property
    def row(self) -> dict[str, float | list[float] | None]:
        """The numbers of one row of the table; None if undefined."""
        classes = self.results["per_class"]
        more = {"macro_f1": self.results["macro"]["f1"]}
        more |= {f"recall_{c}": row["recall"] for c, row in enumerate(classes)}
        values = self.results | more | (self.results["macro"] if len(classes) > 2 else {})
        return {key: values.get(key) for key in (*HEADLINE, *more, *OTHERS, "accuracy_interval")}

    def majority(self) -> tuple[int, float, float, float]:
        """The most frequent class; the accuracy of always predicting it, and its interval."""
        support = np.sum(self.results["confusion_matrix"], axis=1).tolist()
        most, n = max(support), sum(support)
        return support.index(most), most / n, *wilson_interval(most, n)


class Method(NamedTuple):
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

    @property
    def titled(self) -> dict[str, Result]:
        """The results, each by the method's name and, of several, its seed."""
        if len(self.seeds) == 1:
            return {self.name: self.first}
        return {f"{self.name}, seed {seed}": result for seed, result in self.seeds.items()}

    def summary(self) -> tuple[dict, dict]:
        """Mean and sample standard deviation of each number over the seeds; None if undefined."""
        mean, sd = {}, {}
        rows = [result.row for result in self.seeds.values()]
        for key in [key for key in rows[0] if key != "accuracy_interval"]:
            values = [row[key] for row in rows]
            defined = None not in values
            mean[key] = statistics.fmean(values) if defined else None
            sd[key] = statistics.stdev(values) if defined and len(values) > 1 else None
        return mean, sd


def read_columns(path: Path, *keys: str) -> list[list]:
    """The values of each key in all lines of a JSON Lines file."""
    # Not str.splitlines: JSON strings may contain U+2028.
    text = read_regular(path, "a file of JSON lines", "move it away").decode("utf-8")
    rows = [parse_json(line) for line in text.split("\n") if line]
    return [[row[key] for row in rows] for key in keys]


def read_all(arguments: Sequence[str]) -> list[Result]:
    """The results in files and run directories, in the order given; each file is read once."""
    paths: dict[str, Path] = {}
    skipped = []
    for argument in map(Path, arguments):
        found = sorted(argument.glob("results-*.json")) if argument.is_dir() else [argument]
        if not found:
            make = f"make one with: python evaluate.py --run {argument} --data FILE"
            skipped.append(f"{argument}: holds no results-*.json; {make}")
        paths |= {os.path.realpath(path): path for path in found}
    if not paths:
        raise UserError("; ".join(skipped))
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    return [read_result(path) for path in paths.values()]


def read_result(path: Path) -> Result:
    """Read a results file and its predictions. Raises UserError for any other file."""
    advice = "give the file that evaluate.py writes as --output, or a run directory"
    if failed := read_json(path, KIND, advice).get("failed"):
        with refuse_malformed(path, KIND, advice):
            why = failed if isinstance(failed, str) else failed["reason"]
        raise UserError(f"{path}: failed ({why}): evaluate again")
    results = read_json(path, KIND, advice, **NEEDED)
    arguments, training = results["arguments"], results.get("training_arguments")
    # The run directory may have been moved since, with the results in it.
    places = (path.parent, Path(arguments["run"])) if arguments.get("run") else ()
    run = next((place for place in places if (place / "run.json").exists()), None)
    if run and "base_fingerprint" not in results:  # an older version's: the run may tell
        record = read_run(run)
        training = training or record["arguments"]
        if training == record["arguments"]:
            known = {f"training_{name}": record.get(name) for name in ("data_hash", "template")}
            results |= known | {"base_fingerprint": str(record.get("base_fingerprint", ""))}
    seed = (training or arguments).get("seed", 0)
    with refuse_malformed(path, KIND, advice):
        # A field that may be null must still be there.
        if missing := [key for key in (*HEADLINE, "auc_roc", "brier", "ece") if key not in results]:
            raise ValueError(f"{missing[0]} is missing")
        if len(results["accuracy_interval"]) != 2 or len(results["per_class"]) < 2:
            raise ValueError("accuracy_interval has not two numbers, or per_class not two")
        if type(seed) is not int:
            raise ValueError(f"seed is {reprlib.repr(seed)}, expected a whole number")
    depends_on, predictions = identify(results, training or {}), read_predictions(path, results)
    return Result(path, results, *depends_on, seed, predictions, run)


def read_predictions(path: Path, results: dict) -> Predictions | None:
    """The predictions beside a results file; None if there is no such file.

    Raises UserError unless they give the confusion matrix of the results.
    """
    places, own = prediction_places(path, results), os.path.realpath(path)
    place = next((p for p in places if p.exists() and os.path.realpath(p) != own), None)
    if place is None:
        return None
    n, classes = results["n"], len(results["per_class"])
    advice = "evaluate again, or move it away to do without"
    columns = ("index", "label", "prediction", "scores")
    kind = f"the predictions of {path.name} with {', '.join(columns)}"
    with refuse_malformed(place, kind, advice):
        index, labels, predicted, scores = read_columns(place, *columns)
        if index != list(range(len(index))) or len(index) != n:
            raise ValueError(f"rows are not numbered 0 to {n - 1}")
        scores = None if None in scores else np.array(scores, dtype=np.float64)
        if scores is not None and not (scores.shape == (n, classes) and np.isfinite(scores).all()):
            raise ValueError(f"scores are not {classes} numbers for each row")
        if confusion_matrix(labels, predicted, classes).tolist() != results["confusion_matrix"]:
            raise ValueError(f"they make another confusion matrix than {path.name} has")
        return Predictions(np.array(labels), np.array(predicted), scores)


def prediction_places(path: Path, results: dict) -> tuple[Path, ...]:
    """Where the predictions of a results file may be."""
    named = Path(results["arguments"].get("predictions") or path)
    usual = path.with_name(path.name.replace("results", "predictions")).with_suffix(".jsonl")
    return usual, path.parent / named.name, named


def files_read(results: Sequence[Result]) -> list[Path]:
    """What a report on these results reads, and what else their runs hold."""
    places = [p for r in results for p in (r.path, *prediction_places(r.path, r.results))]
    places += [r.run / name for r in results if r.run for name in WRITTEN]
    return [place for place in places if place.exists()]


def gather(results: Sequence[Result]) -> list[Method]:
    """Group the seeds of each method, in the order given.

    A row's name is the method, with a number from the second row of the method on.
    """
    groups, seen, tokenizers = defaultdict(list), Counter(), defaultdict(set)
    for identity in (result.identity for result in results):
        tokenizers[identity.get("model")].add(identity.get("tokenizer_hash"))
    for result in results:
        # An older version recorded none: it is the only one that is known of the same weights.
        if len(only := tokenizers[result.identity.get("model")] - {None}) == 1:
            result.identity["tokenizer_hash"] = min(only)
        same = json.dumps(result.identity, sort_keys=True)
        # A method with a seed that occurs twice becomes two rows.
        seen[same, result.seed] += 1
        groups[same, seen[same, result.seed]].append(result)
    methods, nth = [], Counter()
    for group in groups.values():
        nth[method := group[0].results["method"]] += 1
        name = f"{method} {nth[method]}" if nth[method] > 1 else method
        methods.append(Method(name, dict(sorted((r.seed, r) for r in group))))
    return methods


def differences(methods: Sequence[Method]) -> dict[str, dict[str, str]]:
    """What differs between the rows besides the method: {setting: {name of the row: its value}}.

    A row that has no such setting, or whose older version did not record it, is left out. Values
    with hashes differ if these differ.
    """
    firsts = {method.name: method.first for method in methods}
    found = {}
    for key in dict.fromkeys(key for result in firsts.values() for key in result.shown):
        texts = {name: as_text(r.shown[key]) for name, r in firsts.items() if key in r.shown}
        hashes = {name: firsts[name].hashes[key] for name in texts if key in firsts[name].hashes}
        if known := len(hashes) == len(texts):
            texts = {name: f"{text} ({hashes[name][:8]})" for name, text in texts.items()}
        if len({*(hashes if known else texts).values()}) > 1:
            found[key] = texts
    names = [result.results["method"] for result in firsts.values()]
    several = {n: str(r.path) for n, r in firsts.items() if names.count(r.results["method"]) > 1}
    # Not of the identity, but a difference of one run each may be one of luck.
    seeds = {m.name: ", ".join(map(str, m.seeds)) for m in methods if "train_data" in m.first.shown}
    more = {"training seed": seeds, "file": several}
    return found | {key: texts for key, texts in more.items() if len({*texts.values()}) > 1}


def as_text(value: object) -> str:
    """The value of a setting; an option that was not given is "no"."""
    if value is None or isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("\n", "\\n")


def compare(a: Method, b: Method) -> dict:
    """A against B on the same examples: for each pair of seeds difference, interval and p.

    {"a", "b", "tests", "not_compared"}: the last is None, or says why there are no tests. Each test
    has seed_a, seed_b, difference (A's accuracy minus B's), interval (95 %, paired bootstrap),
    only_a and only_b (rows that only one has right) and p (exact McNemar).
    """
    first, other = a.first.results, b.first.results
    without = [r.path for m in (a, b) for r in m.seeds.values() if r.predictions is None]
    seeds, reason = paired_seeds(a, b), None
    if first["examples_hash"] != other["examples_hash"]:
        about = [f"{r['n']} examples with hash {r['examples_hash'][:8]}" for r in (first, other)]
        reason = f"evaluated on different examples: {' and '.join(about)}"
    elif without:
        reason = f"no predictions beside {without[0]}"
    elif not seeds:
        found = [", ".join(map(str, method.seeds)) for method in (a, b)]
        reason = f"no seed in common: {' and '.join(found)}"
    tests = [] if reason else [paired_test(a.seeds[i], b.seeds[j]) for i, j in seeds]
    return {"a": a.name, "b": b.name, "tests": tests, "not_compared": reason}


def paired_seeds(a: Method, b: Method) -> list[tuple[int, int]]:
    """Pairs (seed of A, seed of B) to test: equal seeds; every seed with an untrained method."""
    single = [method.first for method in (a, b) if len(method.seeds) == 1]
    if len(single) == 2 or not all("train_data" in result.shown for result in single):
        return list(product(a.seeds, b.seeds))
    return [(seed, seed) for seed in a.seeds if seed in b.seeds]


def paired_test(a: Result, b: Result) -> dict:
    """One paired test of two results on the same examples; its keys as in `compare`."""
    if not np.array_equal(a.predictions.labels, b.predictions.labels):
        others = f"its predictions have other labels than those of {a.path}"
        raise UserError(f"{b.path}: {others}, but the same examples_hash; evaluate both again")
    correct = [r.predictions.predicted == r.predictions.labels for r in (a, b)]
    difference, low, high = paired_bootstrap(*correct)
    test = {"seed_a": a.seed, "seed_b": b.seed, "difference": difference, "interval": [low, high]}
    return test | mcnemar_exact(*correct)
