"""README's "Results": tables made from the kept files, and those by the commands that it shows."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from qwen_min.cli import parse_with_given
from qwen_min.compare import read_result
from qwen_min.metrics import auc_roc

RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(RESULTS))
import experiment  # noqa: E402
import tables  # noqa: E402

KEPT = sorted(RESULTS.glob("*/*.json"))
ROWS = {(size, row.name): row for size in experiment.MODELS for row in experiment.all_rows(size)}


def test_the_tables_in_the_readme_are_those_of_the_kept_files():
    readme = (experiment.REPO / "README.md").read_text(encoding="utf-8")
    marked = tables.MARK.findall(readme)
    assert marked and {name for _, name, _ in marked} <= set(tables.TABLES)
    assert tables.written(readme) == readme, "run: python tests/results/tables.py --write"
    # And a figure that was changed by hand would be seen.
    accuracy = f"{read_result(RESULTS / '0.5b' / 'zero_shot.json').results['accuracy']:.4f}"
    forged = readme.replace(accuracy, "0.9999")
    assert tables.written(forged) != forged


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_kept_file_was_made_by_its_command(path):
    """What the command says is what was recorded, and so are its defaults where it says nothing."""
    size = path.parent.name
    *training, measuring = experiment.commands(ROWS[size, path.stem], size)
    results = json.loads(path.read_text())
    _, given = parse_with_given(evaluate.build_parser(), shlex.split(measuring)[2:])
    assert given
    assert {name: results["arguments"][name] for name in given} == given
    for line in training:
        expected = vars(train.build_parser().parse_args(shlex.split(line)[2:]))
        recorded = results["training_arguments"]
        assert {name: recorded[name] for name in expected if name != "resume"} == {
            name: value for name, value in expected.items() if name != "resume"
        }
    assert results["n"] == 1200 and "dirty" not in results["commit"]
    for arguments in filter(None, (results["arguments"], results["training_arguments"])):
        assert not [value for value in arguments.values() if str(value).startswith("/")]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_kept_file_fits_its_predictions(path):
    result = read_result(path)
    right = result.predictions.predicted == result.predictions.labels
    assert right.mean() == pytest.approx(result.results["accuracy"], abs=1e-12)
    if (scores := result.predictions.scores) is not None:
        chosen = scores[np.arange(len(scores)), result.predictions.predicted]
        assert not chosen.any()  # they are kept less the largest
        found = auc_roc(result.predictions.labels, scores)
        assert found == pytest.approx(result.results["auc_roc"], abs=1e-5)


def test_every_kept_file_is_about_the_same_rows():
    results = [json.loads(path.read_text()) for path in KEPT]
    assert len({r["examples_hash"] for r in results}) == 1
    masks = {tables.clean(path).tobytes() for path in KEPT}
    assert len(masks) == 1
    # What a method trained on all 3,000 calls clean is what the tests take as clean.
    found = {r["clean"]["n"] for r in results if not (r["training_arguments"] or {}).get("limit")}
    assert found == {int(tables.clean(KEPT[0]).sum())}
