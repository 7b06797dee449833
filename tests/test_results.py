"""The three READMEs: tables come from the kept files, kept files from the commands shown there."""

import ast
import inspect
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image
from safetensors.torch import load_file

import evaluate
import train
from qwen_min import scoring
from qwen_min.command.cli import parse_with_given
from qwen_min.files.hub import resolve_model
from qwen_min.files.weights import load_model
from qwen_min.metrics import auc_roc, paired_bootstrap
from qwen_min.report.compare import read_result
from qwen_min.tokenizer import Tokenizer

RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(RESULTS))
import answers as answered  # noqa: E402
import experiment  # noqa: E402
import kept  # noqa: E402
import pictures  # noqa: E402
import set_back  # noqa: E402
import tables  # noqa: E402

KEPT = sorted(RESULTS.glob("*/*.json"))
ROWS = {(size, row.name): row for size in experiment.MODELS for row in experiment.all_rows(size)}


README, ENGLISH, CHINESE = (path.read_text(encoding="utf-8") for path in tables.FILES)
WRITE = "run: python tests/results/tables.py --write"


def test_the_tables_in_the_readmes_are_those_of_the_kept_files():
    marked = []
    for readme in (README, ENGLISH, CHINESE):
        names = [name for _, name, _ in tables.MARK.findall(readme)]
        assert names and readme.count("<!-- results:") == len(names)
        assert tables.written(readme) == readme, WRITE
        marked += names
    assert set(marked) == set(tables.TABLES)


def test_the_readme_is_short():
    assert len(README.encode()) <= 16_000


def test_the_links_in_the_readmes_lead_to_files():
    for readme, path in zip((README, ENGLISH, CHINESE), tables.FILES, strict=True):
        links = re.findall(r"\]\(([^)#]+)\)", readme)
        assert links and all((path.parent / link).is_file() for link in links)


def test_the_code_in_the_readme_is_that_of_scoring():
    block = README[README.index("    def label_log_probs") :]
    block = re.match(r"(?: {4}.*\n|\n(?= {4}))+", block)[0]
    printed = ast.parse(textwrap.dedent(block)).body
    assert [function.name for function in printed] == ["label_log_probs", "score_label"]
    for function in printed:
        (defined,) = ast.parse(inspect.getsource(getattr(scoring, function.name))).body
        defined.body.pop(0)  # the docstring
        assert ast.dump(function) == ast.dump(defined)


def test_the_python_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """As they stand there, beside the run that the five commands make."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--method", "lora_head", "--limit", "40", "--epochs", "1"]) == 0
    capsys.readouterr()
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.strip().split("\n")) <= 12
    names: dict = {}
    exec(block, names)  # what a reader would paste
    assert names["scores"].shape == (2, 2)
    assert {*names["classifier"].predict(names["texts"])} <= {"负面", "正面"}
    assert "('负面', '正面')" in capsys.readouterr().out


def test_the_first_command_prints_what_the_readme_shows(capsys):
    """Words and layout exactly; numbers within 0.02, since bf16 rounds otherwise elsewhere."""
    block = README[README.index("    method        zero_shot") :]
    shown = textwrap.dedent(block[: block.index("\nThe second line")]).split()
    assert evaluate.main(["--method", "zero_shot"]) == 0
    printed = capsys.readouterr().out.split()
    at = shown.index("speed")  # its two figures depend on the machine
    for words in (shown, printed):
        words[at + 1] = words[at + 3] = "-"
    assert len(shown) == len(printed)
    for ours, theirs in zip(printed, shown, strict=True):
        if re.fullmatch(r"0\.\d+", theirs):
            assert float(ours) == pytest.approx(float(theirs), abs=0.02)
        elif not re.fullmatch(r"\d+", theirs):
            assert ours == theirs


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_kept_file_was_made_by_its_command(path):
    """The recorded arguments are those of the command, and the defaults of all others."""
    size = path.parent.name
    *before, measuring = experiment.commands(ROWS[size, path.stem], size)
    results = json.loads(path.read_text(encoding="utf-8"))
    _, given = parse_with_given(evaluate.build_parser(), shlex.split(measuring)[2:])
    assert given
    assert {name: results["arguments"][name] for name in given} == given
    for line in before if ROWS[size, path.stem].train else ():
        expected = vars(train.build_parser().parse_args(shlex.split(line)[2:]))
        recorded = results["training_arguments"]
        known = recorded.keys() - {"resume"}  # it lacks the options younger than the kept files
        assert len(known) > 20
        expected = {name: value for name, value in expected.items() if name in known}
        # Both were defaults; left out, they are found in the file now.
        older = {"encoding": "utf-8", "labels": "负面,正面"}
        for name, value in older.items():
            if expected[name] is None and recorded[name] == value:
                expected[name] = value
        assert {name: recorded[name] for name in expected} == expected
    assert results["n"] == 1200
    assert set(results["commits"]) == {*(["trained"] if before else []), "evaluated"}
    assert all(re.fullmatch("[0-9a-f]{12}", commit) for commit in results["commits"].values())
    for arguments in filter(None, (results["arguments"], results["training_arguments"])):
        assert not [value for value in arguments.values() if str(value).startswith("/")]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_kept_file_fits_its_predictions(path):
    result = read_result(path)
    right = result.predictions.predicted == result.predictions.labels
    assert right.mean() == pytest.approx(result.results["accuracy"], abs=1e-12)
    if (scores := result.predictions.scores) is not None:
        chosen = scores[np.arange(len(scores)), result.predictions.predicted]
        assert not chosen.any()  # scores are kept minus the largest of the row
        found = auc_roc(result.predictions.labels, scores)
        assert found == pytest.approx(result.results["auc_roc"], abs=1e-5)


def test_what_is_kept_of_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "REPO", tmp_path)
    monkeypatch.setattr(experiment, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(experiment, "contaminated", lambda: {1})
    runs = tmp_path / "runs" / "0.5b"
    (runs / "name").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    predictions = [
        {"index": 0, "text": "好", "label": 1, "prediction": 1, "scores": [-3.0, -1.0]},
        {"index": 1, "text": "差", "label": 0, "prediction": -1, "scores": None, "answer": "消极"},
    ]
    lines = [json.dumps(prediction) + "\n" for prediction in predictions]
    (runs / "name.jsonl").write_text("".join(lines), encoding="utf-8")
    (runs / "name.json").write_text('{"accuracy": 0.5, "off_track_examples": ["差"]}')
    (runs / "name" / "run.json").write_text('{"steps": 9, "best_step": null, "seconds": 1}')
    (runs / "name.trained").write_text("0" * 12)
    experiment.keep(experiment.trained("name", "--seed 0"), "0.5b")
    kept_lines = (tmp_path / "kept" / "0.5b" / "name.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept_lines] == [
        {"index": 0, "label": 1, "prediction": 1, "scores": [-2.0, 0.0], "clean": True},
        {"index": 1, "label": 0, "prediction": -1, "scores": None, "clean": False},
    ]
    found = json.loads((tmp_path / "kept" / "0.5b" / "name.json").read_text(encoding="utf-8"))
    words = dict.fromkeys(experiment.SETS.values(), 0) | {"消极,积极": 1}
    assert found.pop("off_track_words") == words
    assert found == {"accuracy": 0.5, "steps": 9, "commits": {"trained": "0" * 12}}


def test_every_kept_file_is_about_the_same_rows():
    results = [json.loads(path.read_text(encoding="utf-8")) for path in KEPT]
    assert len({r["examples_hash"] for r in results}) == 1
    masks = {kept.clean(path).tobytes() for path in KEPT}
    assert len(masks) == 1
    # The clean rows here are those that a method trained on the 3,000 rows reports.
    whole = [r for r in results if not (r["training_arguments"] or {}).get("limit")]
    found = {r["clean"]["n"] for r in whole if r["clean"]["train_data"].endswith(experiment.PART)}
    assert found == {int(kept.clean(KEPT[0]).sum())}
    # Of all rows, none is in dev.
    every = [r for r in whole if r["clean"]["train_data"].endswith(experiment.ALL)]
    assert all(r["clean"]["n"] == r["n"] for r in every)


def test_the_pictures_were_drawn_from_the_kept_files():
    for name in pictures.PICTURES:
        with Image.open(RESULTS / f"{name}.png") as picture:
            found = picture.text["Description"]
        assert found == pictures.digest(), WRITE


def test_every_picture_is_shown():
    assert all(f"({name}.png)" in ENGLISH for name in pictures.PICTURES)


def test_every_character_that_is_drawn_has_a_font():
    figures = [make() for make in pictures.PICTURES.values()]
    drawn = {c for figure in figures for text in figure.findobj(Text) for c in text.get_text()}
    assert {*map(ord, drawn - {"\n"})} <= pictures.DRAWABLE


def test_the_pictures_show_the_kept_accuracies():
    def accuracy(path):
        return json.loads((RESULTS / path).read_text(encoding="utf-8"))["accuracy"]

    _, part = pictures.accuracies().axes
    points, *_ = part.containers[0].lines  # 0.5B
    names = [name for name in kept.METHODS if kept.find(name)]
    drawn = dict(zip(names, points.get_xdata(), strict=True))
    assert drawn["head_only"] == accuracy("0.5b/head_only.json")
    seeds = [accuracy(f"0.5b/lora_head-s{seed}.json") for seed in kept.find("lora_head")]
    assert drawn["lora_head"] == pytest.approx(np.mean(seeds))
    (axes,) = pictures.curve().axes
    for container, name in zip(axes.containers, kept.TRAINED, strict=True):
        points, *_ = container.lines
        assert points.get_ydata()[0] == accuracy(f"0.5b/{name}-n50.json")


def test_the_interval_of_one_seed_is_that_of_the_paired_bootstrap():
    a, b = (kept.correct(kept.find(name)[None]) for name in ("head_only", "zero_shot"))
    difference, *interval = paired_bootstrap(a, b)
    assert kept.mean_interval(a.astype(int) - b) == pytest.approx(interval, abs=1e-12)
    assert difference == np.mean(a.astype(int) - b)


def test_several_seeds_are_compared_by_their_mean_on_the_clean_rows():
    one, other = kept.find("lora_label_scoring"), kept.find("lora_head")
    seeds = sorted(set(one) & set(other))
    rows = kept.clean(KEPT[0])
    gains = [kept.correct(one[s])[rows].mean() - kept.correct(other[s])[rows].mean() for s in seeds]
    test = kept.compared("lora_label_scoring", "lora_head")
    assert test.difference == pytest.approx(np.mean(gains))
    assert test.interval[0] < test.difference < test.interval[1]
    assert [(t["only_a"] - t["only_b"]) / rows.sum() for t in test.tests] == pytest.approx(gains)
    # A method without seeds is paired with every seed.
    assert len(kept.compared("lora_head", "head_only").tests) == len(other)


def bootstrapped(labels, statistic):
    """95 % percentile interval of statistic(rows) over a thousand resamples."""
    rng = np.random.default_rng(0)
    draws = [statistic(rng.integers(len(labels), size=len(labels))) for _ in range(1000)]
    return np.quantile(draws, [0.025, 0.975])


def test_the_interval_of_an_auc_is_about_that_of_a_bootstrap():
    """Hanley and McNeil's interval assumes exponential scores: within a fifth of its length."""
    predictions = kept.find("zero_shot")[None].predictions
    labels, scores = predictions.labels, predictions.scores
    counts = int(labels.sum()), int((1 - labels).sum())
    low, high = kept.auc_interval(auc_roc(labels, scores), *counts)
    expected = bootstrapped(labels, lambda rows: auc_roc(labels[rows], scores[rows]))
    assert [low, high] == pytest.approx(expected, abs=(high - low) / 5)
    # By hand: A = 0.75 with 2 and 2 rows, Q1 = 0.6, Q2 = 1.125 / 1.75.
    assert kept.auc_interval(0.75, 2, 2)[0] == pytest.approx(0.75 - 1.96 * (0.305357 / 4) ** 0.5)


def test_the_interval_of_a_difference_of_aucs_is_about_that_of_a_bootstrap():
    """DeLong's interval only assumes many rows: within a tenth of its length."""
    a, b = (kept.find(name)[None] for name in ("head_only", "zero_shot"))
    labels, rankings = a.predictions.labels, [kept.ranking(r) for r in (a, b)]
    difference, low, high = kept.auc_difference(labels, [rankings])
    aucs = [auc_roc(labels, r.predictions.scores) for r in (a, b)]
    assert difference == pytest.approx(aucs[0] - aucs[1], abs=1e-12)

    def drawn(rows):
        one, other = (auc_roc(labels[rows], r.predictions.scores[rows]) for r in (a, b))
        return one - other

    assert [low, high] == pytest.approx(bootstrapped(labels, drawn), abs=(high - low) / 10)
    # A tie counts 1/2: one of the four pairs of (0, 1) and (1, 2) is tied.
    parts = kept.auc_components(np.array([0, 0, 1, 1]), np.array([0.0, 1.0, 1.0, 2.0]))
    assert [part.tolist() for part in parts] == [[1.0, 0.75], [0.75, 1.0]]


PLACEHOLDER = re.compile(r"\{([^}]+)\}")


def test_answers_name_rows_and_pairs_that_exist():
    """A dash means that a row is not computed yet. It must not hide a wrong name."""
    rows = {(size, re.sub(r"-s\d$", "", name)) for size, name in ROWS}
    pairs = set(tables.PAIRS)
    for answers in (answered.ENGLISH, answered.CHINESE):
        texts = [text for _, *texts in answers for text in texts]
        for kind, *names in (m.split() for text in texts for m in PLACEHOLDER.findall(text)):
            of_pair = kind in ("diff", "aucdiff")
            for name in names if of_pair else names[:1]:
                size, _, bare = name.rpartition("/")
                assert (size or "0.5b", bare) in rows, name
            assert not of_pair or tuple(names) in pairs, names
    for pair in pairs:
        assert all(kept.title(name) for name in pair)
    with pytest.raises(ValueError, match="found figure"):
        tables.figure("bogus", "zero_shot")


def test_both_languages_tell_the_same_figures():
    for (_, short, english), (_, chinese) in zip(answered.ENGLISH, answered.CHINESE, strict=True):
        assert sorted(PLACEHOLDER.findall(english)) == sorted(PLACEHOLDER.findall(chinese))
        assert set(PLACEHOLDER.findall(short)) <= set(PLACEHOLDER.findall(english))


def test_no_figure_of_the_results_is_typed_by_hand():
    results = README[README.index("## Results") : README.index("## Limits")]
    for told in (results, ENGLISH[: ENGLISH.index("## Speed")], CHINESE):
        assert not re.findall(r"\b0\.\d{2,}", tables.MARK.sub("", told))


def test_the_verdicts_of_the_answers_hold():
    """The words around the figures in answers.py. If one fails, reword its answer."""
    _, limit = tables.bound()

    def significant(a, b):
        return all(p < limit for p in kept.compared(a, b).p)

    def gain(a, b):
        return kept.compared(a, b).difference

    # 1. A probe does not fail; a transplanted head loses accuracy; a head with few steps fails.
    assert gain("head_only", "zero_shot") > 0 and significant("head_only", "zero_shot")
    assert gain("transplanted_head", "lora_head") < 0 and significant(
        "transplanted_head", "lora_head"
    )
    moved = [result.results for result in kept.find("transplanted_head").values()]
    assert moved[0]["accuracy"] > 0.8 and 0.5 < moved[2]["accuracy_interval"][0] < 0.52
    assert min(results["auc_roc"] for results in moved) > 0.8
    assert (
        significant("head_only-n50", "lora_head-n50")
        and gain("head_only-n50", "lora_head-n50") > 0.2
    )
    assert gain("1.5b/transplanted_head", "1.5b/lora_head") < 0
    moved = [result.results for result in kept.find("1.5b/transplanted_head").values()]
    assert all(results["accuracy_interval"][0] > 0.8 for results in moved)
    # 2. The head does not fit; a new probe is as good as it, and ranks better than the base's.
    assert gain("transplanted_head", "head_only") < 0 and significant(
        "transplanted_head", "head_only"
    )
    assert kept.compared("probe-of-lora_head", "lora_head").interval[1] > 0
    for base in ("lora_head", "lora_label_scoring"):
        assert kept.compared(f"probe-of-{base}", "head_only").auc[1] > 0
    assert gain("1.5b/probe-of-lora_head", "1.5b/lora_head") > 0
    # 3. Two points are outside the interval; with few rows label scoring stays near zero-shot.
    for size, rows in (("", ""), ("1.5b/", ""), ("", "-all")):
        names = (f"{size}lora_label_scoring{rows}", f"{size}lora_head{rows}")
        assert kept.compared(*names).interval[1] < 0.02
    for name in ("lora_head", "lora_label_scoring"):
        assert kept.compared(f"{name}-all", name).interval[0] > 0
    for n in (50, 200):
        assert gain(f"lora_label_scoring-n{n}", f"lora_head-n{n}") > 0.2
        low, high = kept.compared(f"lora_label_scoring-n{n}", "zero_shot").interval
        assert low < 0 < high
    assert significant("lora_label_scoring-n200", "head_only-n200")
    assert gain("lora_label_scoring-n200", "head_only-n200") < 0
    # 4. One pair of words moves only the threshold; the others also rank worse.
    low, high = kept.compared("zero_shot-xiaoji", "zero_shot").auc[1:]
    assert significant("zero_shot-xiaoji", "zero_shot") and -0.01 < low < 0 < high < 0.01
    for words in ("chahao", "xiang"):
        assert kept.compared(f"zero_shot-{words}", "zero_shot").auc[2] < 0
    assert gain("1.5b/zero_shot-xiang", "1.5b/zero_shot") < -0.1
    for size in ("", "1.5b/"):
        names = (f"{size}lora_label_scoring-xiang", f"{size}lora_label_scoring")
        assert not significant(*names)
    # 5. Nothing to repair; most of the gain does not depend on the label words' vectors.
    assert not significant("embeddings-head", "head_only")
    assert not significant("embeddings-words", "lora_label_scoring")
    assert gain("embeddings-words-others", "zero_shot") > 2 * gain(
        "embeddings-words-labels", "zero_shot"
    )
    assert not significant("embeddings-words-others", "embeddings-words")
    # 6. Most answers off track use other sentiment words; the question costs accuracy.
    generated = kept.find("zero_shot_generate")[None].results
    assert generated["off_track"] > 0.9 * generated["n"]
    assert generated["off_track_words"]["消极,积极"] > 0.75 * generated["off_track"]
    assert not significant("zero_shot_generate-chat", "zero_shot-chat")
    assert significant("zero_shot-chat", "zero_shot") and gain("zero_shot-chat", "zero_shot") < 0


def test_probes_on_adapted_bases_are_better_calibrated():
    """What the README of results says above the picture of reliability, for every seed."""
    for base in ("lora_head", "lora_label_scoring"):
        probes, bases = kept.find(f"probe-of-{base}"), kept.find(base)
        for seed in probes:
            assert probes[seed].results["ece"] < bases[seed].results["ece"]


def test_token_vectors_are_set_back(tmp_path):
    """One part of the vectors stays as trained, to the bit; the other part is the base's."""
    run = tmp_path / "run"
    line = "--method lora_label_scoring --train-embeddings --lora-targets none --model tiny"
    assert train.main([*line.split(), "--limit", "20", "--output", str(run)]) == 0
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    for keep in ("labels", "others"):
        set_back.main([str(run), "--keep", keep, "--output", str(tmp_path / keep)])
    after, labels, others = (
        next(iter(load_file(place / "embeddings.safetensors").values()))
        for place in (run, tmp_path / "labels", tmp_path / "others")
    )
    base = load_model(resolve_model("tiny"), "float32").model.embed_tokens.weight
    tokenizer = Tokenizer(resolve_model("tiny"))
    ids = [token for word in record["labels"] for token in tokenizer.encode(word)]
    rest = [token for token in range(len(base)) if token not in ids]
    moved = ~(after == base).all(dim=1)
    assert moved[ids].all() and moved[rest].any()
    assert labels[ids].equal(after[ids]) and labels[rest].equal(base[rest])
    assert others[rest].equal(after[rest]) and others[ids].equal(base[ids])
    # evaluate.py accepts the copy as a run.
    assert evaluate.main(["--run", str(tmp_path / "labels"), "--limit", "10"]) == 0
    kept_parameters = json.loads((tmp_path / "labels" / "run.json").read_text(encoding="utf-8"))
    assert kept_parameters["trained_parameters"] == len(ids) * base.shape[1]
