"""evaluate.py's looks inside, as commands: label sets, calibration, generation, chat, explain."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO

import evaluate
import train
from qwen_min.command.terminal import columns, visible
from qwen_min.files.data import read_examples
from qwen_min.files.weights import load_model
from qwen_min.lab.calibration import (
    CONTENT_FREE,
    fit_temperature,
    held_out_rows,
    log_mean_probability,
)
from qwen_min.lab.generation import MAX_NEW_TOKENS, first_label, greedy, stop_ids
from qwen_min.metrics import log_loss
from qwen_min.prompt import build_prompts
from qwen_min.report.compare import read_result
from qwen_min.scoring import score_label
from qwen_min.tokenizer import Tokenizer

SAMPLE = REPO / "qwen_min" / "sample"
TEMPLATE = "评论：{text}\n情感倾向：\n"  # the tests' tokenizer has a token `：负`
WORDS = ("负面", "正面")
N = 12


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of evaluate.py."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = evaluate.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def given(method: str, model: Path, *more: object) -> list[object]:
    fixed = ["--method", method, "--model", model, "--template", TEMPLATE, "--device", "cpu"]
    return [*fixed, "--max-text-tokens", 40, *more]


def shows(out: str, value: float) -> bool:
    """Whether a number is printed, to the last of its four digits: fp32 may round otherwise."""
    found = [float(x) for x in re.findall(r"-?\d+\.\d{4}(?!\d)", out)]
    return any(abs(x - value) < 1.6e-4 for x in found)


def results_of(directory: Path, *arguments: object) -> tuple[dict, list[dict], str]:
    """Results, predictions and stdout of a run that must succeed."""
    files = directory / "results.json", directory / "predictions.jsonl"
    status, out, err = command(*arguments, "--output", files[0], "--predictions", files[1])
    assert status == 0, err
    rows = [json.loads(x) for x in files[1].read_text(encoding="utf-8").split("\n")[:-1]]
    return json.loads(files[0].read_text(encoding="utf-8")), rows, out


def prompts_of(model: Path, texts: list[str], words=WORDS, template: str = TEMPLATE):
    return build_prompts(Tokenizer(model), texts, template, words, 40)


def by_definition(model: Path, texts: list[str], words=WORDS, template=TEMPLATE) -> np.ndarray:
    loaded = load_model(model)
    prompts = prompts_of(model, texts, words, template)
    return np.array([[score_label(loaded, p.ids, ids) for ids in p.labels] for p in prompts])


def tokens_of(model: Path, word: str) -> list[str]:
    """The pieces of a label word behind the template, as they are shown."""
    (prompt,) = prompts_of(model, ["a"], (word, "fox"))
    return [visible(Tokenizer(model).decode([token])) for token in prompt.labels[0]]


# Label sets


def test_label_sets_are_each_what_a_run_of_its_own_would_give(reference, tmp_path):
    sets = ["差评,好评", "负向,正向"]
    both = given("zero_shot", reference[0], "--limit", N, "--label-sets", ";".join(sets))
    results, rows, out = results_of(tmp_path, *both)
    plain, plain_rows, _ = results_of(tmp_path, *given("zero_shot", reference[0], "--limit", N))
    # fp32 rounding, since other candidates share the forwards.
    scores, own = (np.array([r["scores"] for r in found]) for found in (rows, plain_rows))
    np.testing.assert_allclose(scores, own, atol=1e-5)
    assert results["accuracy"] == plain["accuracy"] and results["label_ids"] == plain["label_ids"]
    assert [",".join(entry["labels"]) for entry in results["label_sets"]] == ["负面,正面", *sets]
    for entry in results["label_sets"]:
        alone, _, _ = results_of(
            tmp_path,
            *given("zero_shot", reference[0], "--limit", N, "--labels", ",".join(entry["labels"])),
        )
        for key in ("accuracy", "auc_roc", "label_mass", "log_loss"):
            assert entry[key] == pytest.approx(alone[key], abs=1e-5)
        assert entry["ids"] == alone["label_ids"]
        assert f"{entry['accuracy']:.4f}" in out and ",".join(entry["labels"]) in out
    assert "shared: " in out and "in one pass" in out
    assert "  ".join(["负向", " ".join(tokens_of(reference[0], "负向"))]) in out


# Calibration


def test_calibration_reports_every_correction_of_these_scores(reference, tmp_path):
    train_data = SAMPLE / "train.tsv"
    more = ("--limit", N, "--calibrate", "--train-data", train_data)
    results, rows, out = results_of(tmp_path, *given("zero_shot", reference[0], *more))
    scores = np.array([row["scores"] for row in rows])
    labels = np.array([row["label"] for row in rows])
    found = results["calibration"]
    free = by_definition(reference[0], [*CONTENT_FREE])
    premise = by_definition(reference[0], [""], template="{text}情感倾向：\n")[0]
    training = read_examples(train_data, ["0", "1"])
    held_out = held_out_rows(training, read_examples(SAMPLE / "test.tsv", ["0", "1"], limit=N), 0)
    of_held_out = by_definition(reference[0], [row.text for row in held_out])
    t = fit_temperature(np.array([row.label for row in held_out]), of_held_out)
    expected = {
        "raw": scores,
        "contextual": scores - log_mean_probability(free),
        "pmi_dc": scores - premise,
        "batch": scores - log_mean_probability(scores),
        "temperature": scores / t,
    }
    for name, corrected in expected.items():
        # fp32 scores by two roads, of up to twenty.
        assert found[name]["log_loss"] == pytest.approx(log_loss(labels, corrected), abs=1e-4)
        assert found[name]["accuracy"] == (corrected.argmax(axis=1) == labels).mean()
    assert found["temperature"]["temperature"] == pytest.approx(t, rel=1e-3)
    assert set(found) == {*expected, "length_normalised", "domain_context"}
    assert "PMI_DC" in out and "T = " in out
    # Nothing else of the results moves.
    assert results["log_loss"] == pytest.approx(found["raw"]["log_loss"])


def test_calibration_without_training_data_has_no_temperature(reference, tmp_path):
    more = ("--limit", N, "--calibrate")
    results, _, out = results_of(tmp_path, *given("zero_shot", reference[0], *more))
    assert "temperature" not in results["calibration"] and "--train-data FILE" in out


# Generation


def test_generation_is_greedy_and_its_first_label_word_the_class(reference, tmp_path):
    results, rows, out = results_of(
        tmp_path, *given("zero_shot_generate", reference[0], "--limit", N, "--labels", "评,书")
    )
    examples = read_examples(SAMPLE / "test.tsv", ["0", "1"], limit=N)
    tokenizer, model = Tokenizer(reference[0]), load_model(reference[0])
    prompts = prompts_of(reference[0], [e.text for e in examples], ("评", "书"))
    stop = stop_ids(reference[0], tokenizer.markup)
    for row, example, prompt in zip(rows, examples, prompts, strict=True):
        answer = tokenizer.decode(greedy(model, prompt.ids, MAX_NEW_TOKENS, stop))
        assert (row["answer"], row["label"], row["scores"]) == (answer, example.label, None)
        assert row["prediction"] == first_label(answer, ("评", "书"))
    astray = [row for row in rows if row["prediction"] == -1]
    assert {row["predicted_word"] for row in astray} == {None}
    assert {row["probability"] for row in rows} == {None}
    assert {row["predicted_word"] for row in rows} <= {None, "评", "书"}
    assert results["off_track"] == len(astray) > 0
    right = sum(row["prediction"] == row["label"] for row in rows)
    assert results["accuracy"] == right / N
    assert results["auc_roc"] is results["brier"] is results["ece"] is results["label_mass"] is None
    shown = results["off_track_examples"]
    assert [e["answer"] for e in shown] == [row["answer"] for row in astray][:5]
    assert f"off track     {len(astray) / N:.4f}" in out and "AUC" not in out
    first = re.escape(repr(shown[0]["answer"]))
    assert re.search(rf"^  line {shown[0]['line']} +{first}$", out, re.MULTILINE)
    # The report reads what generation leaves, classes that are none included, and answers with
    # what Python takes for the end of a line and JSON does not.
    odd = [json.dumps(row | {"answer": "\u2028\x85"}, ensure_ascii=False) for row in rows]
    (tmp_path / "predictions.jsonl").write_text("\n".join([*odd, ""]), encoding="utf-8")
    read = read_result(tmp_path / "results.json")
    assert read.predictions.scores is None and (read.predictions.predicted == -1).sum() == len(
        astray
    )


# Chat


def test_chat_reaches_the_model_and_a_run_brings_it_along(reference, tmp_path):
    chat = ["--chat", "--system", r"一个词。\n"]
    run = tmp_path / "run"
    args = ["--method", "lora_head", "--model", reference[0], "--limit", 24, "--output", run]
    args += ["--template", TEMPLATE, "--max-text-tokens", 20, "--epochs", 1, *chat]
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main([str(a) for a in args]) == 0
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["template"] == (
        "<|im_start|>system\n一个词。\n<|im_end|>\n<|im_start|>user\n"
        f"{TEMPLATE}<|im_end|>\n<|im_start|>assistant\n"
    )
    found, _, _ = results_of(tmp_path, "--run", run, "--limit", 4)
    assert (found["arguments"]["chat"], found["arguments"]["system"]) == (True, chat[-1])
    # The same prompts by hand, without a run.
    plain, rows, _ = results_of(tmp_path, *given("zero_shot", reference[0], "--limit", 4, *chat))
    texts = [e.text for e in read_examples(SAMPLE / "test.tsv", ["0", "1"], limit=4)]
    expected = by_definition(reference[0], texts, template=record["template"])
    np.testing.assert_allclose([row["scores"] for row in rows], expected, atol=1e-5)
    bare, _, _ = results_of(tmp_path, *given("zero_shot", reference[0], "--limit", 4))
    assert plain["tokens"] > bare["tokens"] and found["tokens"] > bare["tokens"] / 2
    shutil.rmtree(run / "checkpoints")


# Mistakes


def mistakes(out: str) -> tuple[str, list[list[str]]]:
    """The line above the table of mistakes, and its rows' cells without the heads."""
    title, heads, *rows = out.split("mistakes: ")[1].split("\n\n")[0].strip().split("\n")
    assert max(map(columns, [heads, *rows])) <= 80
    return title, [re.split(" {2,}", row, maxsplit=4) for row in rows]


def test_the_most_confident_mistakes_come_first(reference, tmp_path):
    data = tmp_path / "data.jsonl"
    texts = [e.text for e in read_examples(SAMPLE / "test.tsv", ["0", "1"], limit=N)]
    texts[0] += "\n第二行\t\u200b" + "很长" * 5000
    lines = [json.dumps({"label": i % 2, "text": text}) for i, text in enumerate(texts)]
    data.write_text("\n".join(lines), encoding="utf-8")
    arguments = given("zero_shot", reference[0], "--data", data)
    _, rows, out = results_of(tmp_path, *arguments, "--errors", N)
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    wrong.sort(key=lambda row: -row["probability"])
    title, shown = mistakes(out)
    assert 3 < len(wrong) < N and title == f"the most confident {len(wrong)} of {len(wrong)}"
    for (line, true, said, p, text), row in zip(shown, wrong, strict=True):
        assert (int(line), true, said) == (row["line"], row["label_word"], row["predicted_word"])
        assert float(p) == pytest.approx(row["probability"], abs=5.1e-5)
        begins = text.removesuffix("…")
        assert row["text"].startswith(begins) and (begins != text) == (row["text"] != begins)
    _, first = mistakes(results_of(tmp_path, *arguments, "--errors", 2)[2])
    assert first == shown[:2]
    # Nothing that was predicted moves.
    assert results_of(tmp_path, *arguments)[1] == rows
    # With the predicted labels there is no mistake.
    rows = [{"label": row["predicted_word"], "text": row["text"]} for row in rows]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = results_of(tmp_path, *arguments, "--errors", 2)[2]
    assert mistakes(out) == ("the most confident 0 of 0", [])


def test_mistakes_of_answers_are_the_first(reference, tmp_path):
    arguments = given("zero_shot_generate", reference[0], "--limit", N, "--labels", "评,书")
    _, rows, out = results_of(tmp_path, *arguments, "--errors", 3)
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    title, shown = mistakes(out)
    assert title == f"the first 3 of {len(wrong)}"
    for (line, true, said, answer, _), row in zip(shown, wrong, strict=False):
        assert (int(line), true) == (row["line"], row["label_word"])
        assert said == (row["predicted_word"] or "(none)")
        # How a table writes what is not printable is not this test's matter.
        begins = re.split(r"[\\…]", answer)[0].strip()
        assert row["answer"].strip().startswith(begins)


# Explain


@pytest.fixture(scope="module")
def runs(reference, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for method in train.METHODS:
        args = ["--method", method, "--model", reference[0], "--limit", 24]
        args += [] if method == "head_only" else ["--lr", 0.01, "--epochs", 1]
        args += ["--template", TEMPLATE, "--max-text-tokens", 20]
        with contextlib.redirect_stdout(io.StringIO()):
            assert train.main([str(a) for a in [*args, "--output", root / method]]) == 0
    return {method: root / method for method in train.METHODS}


@pytest.mark.parametrize("method", [*train.METHODS, "transplanted_head"])
def test_explain_shows_the_decision_that_an_evaluation_makes(method, runs, tmp_path):
    run = runs["lora_head" if method == "transplanted_head" else method]
    data = tmp_path / "one.tsv"
    data.write_text("label\ttext_a\n1\t房间很干净。\n", encoding="utf-8")
    common = ["--run", run, "--method", method]
    _, (row,), _ = results_of(tmp_path, *common, "--data", data)
    before = sorted(run.rglob("*"))
    status, out, err = command(*common, "--explain", "房间很干净。")
    assert (status, err) == (0, "") and sorted(run.rglob("*")) == before
    assert max(map(columns, out.split("\n")[1:])) <= 80  # the first line names the run
    assert all(shows(out, score) for score in row["scores"])
    several = method.startswith("lora")
    assert out.split("\nwhy ")[1].split("\n")[0].split() == (
        ["base", "adapted"] if several else ["the", "model"]
    )
    (decisions,) = re.findall(r"^decision +(.*)$", out, re.MULTILINE)
    assert decisions.split()[-1] == WORDS[row["prediction"]]
    assert len(decisions.split()) == 1 + several


def test_explain_needs_no_run_and_no_data(reference):
    status, out, _ = command(*given("zero_shot", reference[0], "--explain", "书不错"))
    scores = by_definition(reference[0], ["书不错"])[0]
    assert status == 0 and all(shows(out, score) for score in scores)


def test_explain_shows_trained_vectors_side_by_side(reference, tmp_path):
    args = ["--method", "lora_label_scoring", "--model", reference[0], "--limit", 24]
    args += ["--template", TEMPLATE, "--max-text-tokens", 20, "--epochs", 1, "--lr", 0.01]
    args += ["--train-embeddings", "--lora-targets", "none", "--output", tmp_path / "run"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main([str(a) for a in args]) == 0
    status, out, _ = command("--run", tmp_path / "run", "--explain", "书不错")
    assert status == 0 and re.search("^why +base +adapted$", out, re.MULTILINE)


def clause_table(out: str) -> dict[str, list[float]]:
    """Of each clause that is left out ("(none)": of the whole text), each model's margin."""
    table = out.split("\nmargin of ")[1].split("\n\n")[0].split("\n")
    assert max(map(columns, table)) <= 80
    found = [re.match(r"(.*?)((?: +[-+]\d+\.\d{4})+)$", row) for row in table[2:]]
    return {row[1]: [*map(float, row[2].split())] for row in found}


CLAUSES = ["房间小，", "但是很干净。", "早餐 3.5 分！！", "差"]
WITHOUT = ["".join(CLAUSES[:i] + CLAUSES[i + 1 :]) for i in range(4)]


@pytest.mark.parametrize("plain", [[], ["--plain"]])
def test_the_margins_without_each_clause_are_the_definitions(plain, reference):
    status, out, err = command(
        *given("zero_shot", reference[0], "--explain", "".join(CLAUSES), *plain)
    )
    assert (status, err) == (0, "")
    scores = by_definition(reference[0], ["".join(CLAUSES), *WITHOUT])
    best = scores[0].argmax()
    margins = scores[:, best] - scores[:, 1 - best]
    found = clause_table(out)
    expected = dict(zip(["(none)", *CLAUSES], margins, strict=True))
    for clause, margin in found.items():
        assert margin == pytest.approx([expected[clause]], abs=1e-4)  # of four printed digits
    order = sorted(CLAUSES, key=lambda clause: -abs(expected[clause] - margins[0]))
    assert list(found) == ["(none)", *order]
    assert "counterfactual, not a cause" in out and "float32 agrees" not in out


@pytest.mark.parametrize("method", ["head_only", "lora_head"])
def test_clauses_of_a_run_are_left_out_for_base_and_adapted(method, runs, tmp_path):
    text = "小，很好。还行！"
    data = tmp_path / "rows.jsonl"
    variants = [text, "很好。还行！", "小，还行！", "小，很好。"]
    rows = [{"label": i % 2, "text": x} for i, x in enumerate(variants)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = {}
    for model in ["transplanted_head", method] if method == "lora_head" else [method]:
        run = ["--run", runs[method], "--method", model, "--data", data]
        scores = np.array([row["scores"] for row in results_of(tmp_path, *run)[1]])
        found[model] = scores
    best = scores[0].argmax()  # for the base too: the decision of the adapted model
    found = {model: of[:, best] - of[:, 1 - best] for model, of in found.items()}
    shown = clause_table(command("--run", runs[method], "--explain", text)[1])
    for i, clause in enumerate(["(none)", "小，", "很好。", "还行！"]):
        assert shown[clause] == pytest.approx([m[i] for m in found.values()], abs=1.1e-4)


def test_the_clauses_are_shown_by_their_change(reference):
    text = "".join(f"第{i}句很好，" for i in range(12))
    more = ["--max-text-tokens", 400]
    _, out, _ = command(*given("zero_shot", reference[0], "--explain", text, *more))
    found = clause_table(out)
    assert "one of 12 clauses left out\n" in out
    (whole,) = found.pop("(none)")
    changes = [abs(margin - whole) for (margin,) in found.values()]
    assert len(changes) == 12 and changes == sorted(changes, reverse=True)


def test_one_clause_is_left_in(reference):
    _, out, _ = command(*given("zero_shot", reference[0], "--explain", "书不错。"))
    assert out.endswith("\n\nthe text is one clause: no clause can be left out\n")
    # Of a text that is cut, what the model does not read is no clause.
    cut = ["--max-text-tokens", 1]
    _, out, _ = command(*given("zero_shot", reference[0], "--explain", "书，不错。", *cut))
    assert out.endswith("\n\nthe model reads no text: no clause can be left out\n")


def test_without_a_text_no_clause_is_left_out(reference):
    _, out, _ = command(*given("zero_shot", reference[0], "--explain", ""))
    assert out.endswith("\n\nthe model reads no text: no clause can be left out\n")


def test_a_row_is_explained_as_its_text_would_be(reference, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text('label,text\n1,"很好，\n不错"\n0,差，很差\n1,好\n', encoding="utf-8")
    for line, text, word in ((2, "很好，\n不错", "正面"), (4, "差，很差", "负面")):
        row = given("zero_shot", reference[0], "--data", data, "--explain-row", line, "--limit", 2)
        status, out, err = command(*row)
        assert (status, err) == (0, "")
        first, said, rest = out.split("\n", 2)
        assert said == f"the row that starts in line {line}, true label {word}"
        alone = command(*given("zero_shot", reference[0], "--explain", text))[1]
        assert f"{first}\n{rest}" == alone
    for line, limit, last in ((3, [], 5), (5, ["--limit", 1], 2)):
        row = given("zero_shot", reference[0], "--data", data, "--explain-row", line, *limit)
        status, out, err = command(*row)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"starts in line {line}; expected one of lines 2 to {last}\n" in err


# One line for each mistake


HEADS = ["--run", "lora_head"]
MISTAKES = {
    "label sets of a head": ([*HEADS, "--label-sets", "差,好"], "--label-sets is about scores"),
    "calibration of a head": ([*HEADS, "--calibrate"], "--calibrate is about scores"),
    "label sets of generation": (
        ["--method", "zero_shot_generate", "--label-sets", "差,好"],
        "is about scores of label words",
    ),
    "generation explained": (["--method", "zero_shot_generate", "--explain", "x"], "zero_shot"),
    "data beside a text": (
        ["--method", "zero_shot", "--explain", "x", "--limit", "3", "--output", "r.json"],
        "leave out --limit, --output",
    ),
    "files beside a row": (
        ["--method", "zero_shot", "--explain-row", "3", "--limit", "3", "--errors", "1"],
        "leave out --errors",
    ),
    "a text and a row": (
        ["--method", "zero_shot", "--explain", "x", "--explain-row", "3"],
        "--explain-row: not allowed with argument --explain",
    ),
    "a set too long": (
        ["--method", "zero_shot", "--label-sets", "差,好,中"],
        "'差,好,中' has 3 words, expected 2",
    ),
    "system without chat": (["--method", "zero_shot", "--system", "x"], "give --chat too"),
    "chat twice": (
        ["--method", "zero_shot", "--chat", "--template", "<|im_start|>{text}"],
        "contains chat markup already",
    ),
    "the text in the system message": (
        ["--method", "zero_shot", "--chat", "--system", "{text}"],
        "belongs in the template",
    ),
    "no place for a generated answer": (
        ["--method", "zero_shot_generate", "--max-text-tokens", "2040"],
        "expected at most 2048",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, reference, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "qwen_min.command.classifier.load_model", None
    )  # seen before the model is loaded
    args, said = MISTAKES[case]
    args = [runs.get(a, a) for a in args]
    if "--run" not in args:
        args += ["--model", reference[0]]
    if case == "no place for a generated answer":
        Path("long.tsv").write_text("label\ttext\n1\t" + "好 a" * 1000 + "\n", encoding="utf-8")
        args += ["--data", "long.tsv", "--template", TEMPLATE]
    status, out, err = command(*args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert said in err, err


def test_a_broken_generation_config_is_seen_before_the_model_is_loaded(
    reference, tmp_path, monkeypatch
):
    shutil.copytree(reference[0], tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{")
    monkeypatch.setattr("qwen_min.command.classifier.load_model", None)
    status, out, err = command(*given("zero_shot_generate", tmp_path / "model"))
    assert (status, out) == (2, "") and "not a generation config" in err and err.count("\n") == 1


def test_answers_in_another_letter_case_count(reference, tmp_path, monkeypatch):
    """The model says `Negative`; the label word is `negative`."""
    data = tmp_path / "data.tsv"
    data.write_text("label\ttext\nnegative\t差\npositive\t好\n", encoding="utf-8")
    tokenizer = Tokenizer(reference[0])
    answers = [tokenizer.encode(text) for text in ("Negative", " POSITIVE.")]
    monkeypatch.setattr("qwen_min.fast.forms.generate_answers", lambda *_, **__: answers)
    arguments = given("zero_shot_generate", reference[0], "--data", data)
    results, rows, _ = results_of(tmp_path, *arguments, "--labels", "negative,positive")
    assert [row["prediction"] for row in rows] == [0, 1]
    assert results["accuracy"] == 1


def test_tokens_that_tokenizer_json_puts_around_texts_stand_in_the_template(reference, tmp_path):
    model = shutil.copytree(reference[0], tmp_path / "model")
    raw = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [501], "tokens": ["<|im_start|>"]}
        },
    }
    (model / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    status, out, err = command(*given("zero_shot", model, "--limit", 2))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "tokenizer.json puts <|im_start|> around every text" in err
    output = ["--output", tmp_path / "r.json", "--predictions", tmp_path / "p.jsonl"]
    given_ = given("zero_shot", model, "--limit", 2, *output)
    assert command(*given_, "--template", "<|im_start|>" + TEMPLATE)[0] == 0
