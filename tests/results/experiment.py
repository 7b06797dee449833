#!/usr/bin/env python3
"""Run the experiment of README.md in this directory: every command in order, and keep its results.

    python tests/real/prepare.py 0.5b          # prints the directory of the weights
    python tests/results/experiment.py 0.5b --model DIR --train train.tsv --dev dev.tsv
    python tests/results/experiment.py 0.5b --list

--train and --dev are ChnSentiCorp's train.tsv and dev.tsv (label, text_a) as the Chinese-BERT-wwm
project publishes them (data/chnsenticorp in github.com/ymcui/Chinese-BERT-wwm). Methods train on
the first 3,000 rows of train.tsv, those named -all on its 9,600 rows without the ones whose text
also stands in dev.tsv (word for word, or normalised). A tenth of the training rows is held out, and
settings are chosen on this tenth alone. All rows of dev.tsv are scored once for each row of the
table.

The script works in runs/ and continues where it was stopped. For each row, tests/results/0.5b/
keeps two files: NAME.json has the results and the commits that trained and evaluated it. NAME.jsonl
has the scores (minus the largest one of the row, five decimals) and "clean": true where the text is
not among the 3,000 rows. A kept row is not computed again. To compute it again, delete both files,
and NAME and NAME.* in runs/0.5b/.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qwen_min.files.data import read_examples
from qwen_min.files.overlap import normalised, stand_in
from qwen_min.prompt import DEFAULT_LABELS

REPO = Path(__file__).resolve().parents[2]
KEPT = Path(__file__).resolve().parent
MODELS = {"0.5b": "Qwen2.5-Coder-0.5B-Instruct", "1.5b": "Qwen2.5-Coder-1.5B-Instruct"}
TRAINING_ROWS, ALL_ROWS = 3000, 9241
PART, ALL = f"train-{TRAINING_ROWS}.tsv", "train-all.tsv"
# SHA-256 of the training and evaluation data: other reviews would give other numbers.
FILES = {
    PART: "a04201f178cb868017e6217133a8cff4e853226524fd6e0f6d281f41064a65bd",
    ALL: "16a337b3ce8f211cea58410ee54fd4f9cf9eecae41f8fd3d5439d7fc61659a9d",
    "dev.tsv": "d129e443eac08ce7643013dad496a8edf282be39cac1a4f2ad080818b296b331",
}
CURVE = (50, 200, 800)  # training rows; the curve also has all 3,000
SEEDS = (0, 1, 2)
SETS = {"": "负面,正面", "-xiaoji": "消极,积极", "-chahao": "差,好", "-xiang": "负向,正向"}
# With the chat markup, the template asks a question, and the model's answer follows the markup.
CHAT = "--chat --template '{text}\\n这条评论的情感倾向是正面还是负面？只回答“正面”或“负面”。'"
WORDS, HEAD = "--method lora_label_scoring --epochs 1", "--method lora_head --epochs 1"
PROBE = "--method head_only"


@dataclass(frozen=True)
class Row:
    """One row of the table: how it is trained (if at all) and evaluated."""

    name: str  # -all: trained on ALL, not on PART
    evaluate: str  # arguments of evaluate.py, except data and output
    train: str | None = None  # arguments of train.py, except model, data and output
    set_back: str | None = None  # instead of train: arguments of set_back.py, except output


def trained(name: str, train: str, run: str | None = None, evaluate: str = "") -> Row:
    """A row that evaluates its own run, or the run of another row."""
    return Row(name, f"--run {{runs}}/{run or name}{evaluate}", train if run is None else None)


def rows_of_seed(seed: int, probes: bool = True) -> list[Row]:
    """The methods that depend on the seed, and the rows that use their runs."""
    rows = []
    for name, train in (("lora_head", HEAD), ("lora_label_scoring", WORDS)):
        run = f"{name}-s{seed}"
        rows.append(trained(run, f"{train} --seed {seed}"))
        if name == "lora_head":
            transplanted = " --method transplanted_head"
            rows.append(trained(f"transplanted_head-s{seed}", "", run, transplanted))
        if probes:
            rows.append(trained(f"probe-of-{run}", f"{PROBE} --adapter {{runs}}/{run}/adapter"))
    return rows


def all_rows(size: str) -> list[Row]:
    """All rows, in the order in which they run: seed 0 of everything first."""
    untrained = "--model {model} --train-data {train}"
    zero_shot = f"--method zero_shot {untrained}"
    sets = f" --label-sets '{';'.join(SETS.values())}'"
    rows = [
        Row("zero_shot", f"{zero_shot} --calibrate{sets}"),
        trained("head_only", PROBE),
        trained("head_only-best", f"{PROBE} --layer best"),
    ]
    xiang = trained("lora_label_scoring-xiang", f"{WORDS} --seed 0 --labels 负向,正向")
    every = [trained("head_only-all", PROBE)]
    for train in (WORDS, HEAD):
        name = train.split()[1]
        every.append(trained(f"{name}-all", f"{train.replace('epochs 1', 'epochs 2')} --seed 0"))
    if size == "1.5b":
        words = Row("zero_shot-xiang", f"{zero_shot} --calibrate --labels {SETS['-xiang']}")
        rows = [rows[0], words, rows[1], *rows_of_seed(0), xiang, *rows_of_seed(1, probes=False)]
        return [*rows, every[1]]
    rows += [
        Row(f"zero_shot{ending}", f"{zero_shot} --calibrate --labels {words}")
        for ending, words in SETS.items()
        if ending
    ]
    rows += [
        Row("zero_shot_generate", f"--method zero_shot_generate {untrained}"),
        Row("zero_shot_generate-chat", f"--method zero_shot_generate {untrained} {CHAT}"),
        Row("zero_shot-chat", f"{zero_shot} {CHAT}"),
        *rows_of_seed(0),
        xiang,
        trained("embeddings-head", f"{HEAD} --seed 0 --train-embeddings --lora-targets none"),
        # Also score label words that were not used in training: was the task learnt, or the words?
        trained(
            "embeddings-words",
            f"{WORDS} --seed 0 --train-embeddings --lora-targets none",
            None,
            sets,
        ),
        # Separate the effect of the two label words' vectors from the effect of all the others.
        *(
            Row(
                f"embeddings-words-{kept}",
                f"--run {{runs}}/embeddings-words-{kept}",
                set_back=f"{{runs}}/embeddings-words --keep {kept}",
            )
            for kept in ("labels", "others")
        ),
        trained("embeddings-lora-words", f"{WORDS} --seed 0 --train-embeddings"),
        trained("head_only-mean", f"{PROBE} --pooling mean"),
        trained("head_only-mean-best", f"{PROBE} --pooling mean --layer best"),
    ]
    for n in CURVE:
        rows.append(trained(f"head_only-n{n}", f"{PROBE} --limit {n}"))
        rows.append(trained(f"lora_head-n{n}", f"{HEAD} --seed 0 --limit {n}"))
        rows.append(trained(f"lora_label_scoring-n{n}", f"{WORDS} --seed 0 --limit {n}"))
    for seed in SEEDS[1:]:
        rows += rows_of_seed(seed)
    return rows + every


def commands(row: Row, size: str) -> list[str]:
    """The commands that make the row, to run in the repository root."""
    places = {"runs": f"runs/{size}", "model": f"runs/{MODELS[size]}"}
    places["train"] = f"runs/{ALL if row.name.endswith('-all') else PART}"
    lines = []
    if row.train is not None:
        lines.append(
            f"python train.py {row.train} --model {places['model']} --data {places['train']} "
            f"--output {places['runs']}/{row.name}"
        )
    if row.set_back is not None:
        lines.append(
            f"python tests/results/set_back.py {row.set_back} --output {places['runs']}/{row.name}"
        )
    out = f"{places['runs']}/{row.name}"
    lines.append(
        f"python evaluate.py {row.evaluate} --data runs/dev.tsv --output {out}.json "
        f"--predictions {out}.jsonl"
    )
    # Not str.format: a template contains braces too.
    for name, place in places.items():
        lines = [line.replace(f"{{{name}}}", place) for line in lines]
    return lines


def prepare(args: argparse.Namespace) -> None:
    """Link the inputs into runs/, so that no command or result contains a path of this machine."""
    runs = REPO / "runs"
    (runs / args.size).mkdir(parents=True, exist_ok=True)
    for name, target in ((MODELS[args.size], args.model), ("dev.tsv", args.dev)):
        link = runs / name
        if target is not None:
            link.unlink(missing_ok=True)
            link.symlink_to(Path(target).resolve())
        if not link.exists():
            sys.exit(f"error: {link} is missing; give its file or directory, see --help")
    if args.train is not None:
        examples = read_examples(args.train, DEFAULT_LABELS)
        # Only \n ends a line, as in qwen_min.files.data.
        header, *lines = Path(args.train).read_bytes().rstrip(b"\n").split(b"\n")
        inside = stand_in(texts_of(args.train), texts_of(runs / "dev.tsv"))
        seen = {examples[i].line for i in inside}
        rest = [line for number, line in enumerate(lines, start=2) if number not in seen]
        for name, rows in ((PART, lines[:TRAINING_ROWS]), (ALL, rest)):
            (runs / name).write_bytes(b"\n".join([header, *rows, b""]))
    for name, expected in FILES.items():
        if not (runs / name).exists():
            sys.exit(f"error: runs/{name} is missing; give the whole train.tsv with --train")
        if (found := hashlib.sha256((runs / name).read_bytes()).hexdigest()) != expected:
            sys.exit(
                f"error: runs/{name}: SHA-256 {found}, expected {expected}; give ChnSentiCorp's "
                "train.tsv and dev.tsv, see --help"
            )


def commit() -> str:
    """The commit of the code that runs; `-dirty` if a .py file has changed since."""

    def git(*words: str) -> str:
        line = ["git", *words]
        return subprocess.run(line, cwd=REPO, capture_output=True, text=True, check=True).stdout

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return git("rev-parse", "--short=12", "HEAD").strip() + "-dirty" * bool(changed)


def run(row: Row, size: str) -> None:
    """Train (unless finished), evaluate and keep one row."""
    directory = REPO / "runs" / size / row.name
    *before, evaluate = commands(row, size)
    started = (directory / "run.json").exists()
    if started and row.train is None:
        before = []
    elif started:
        # An interrupted probe starts again: its time would leave out the cached features.
        finished = json.loads((directory / "run.json").read_text(encoding="utf-8"))["finished"]
        if PROBE in row.train and not finished:
            shutil.rmtree(directory)
            started = False
        else:
            began = directory.with_suffix(".trained").read_text(encoding="utf-8")
            if not finished and began != commit():
                sys.exit(
                    f"error: {row.name} began at {began}; continue there, or delete {directory}"
                )
            before = [f"{before[0]} --resume"]  # fails if the arguments differ
    if before and not started:
        directory.with_suffix(".trained").write_text(commit(), encoding="utf-8")
    for line in [*before, evaluate]:
        if line is evaluate:
            directory.with_suffix(".evaluated").write_text(commit(), encoding="utf-8")
        print(f"$ {line}", flush=True)
        words = [sys.executable, *shlex.split(line)[1:]]
        with open(directory.with_suffix(".log"), "a") as log:
            process = subprocess.Popen(words, cwd=REPO, stdout=log, stderr=log)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C also reached the command: let it save
            raise
        if status:
            sys.exit(f"error: exit status {status}; see {directory.with_suffix('.log')}")
    keep(row, size)


def texts_of(path: str | Path) -> list[str]:
    """The texts of a file of reviews, normalised: equal ones stand for the same review."""
    return [normalised(example.text) for example in read_examples(path, DEFAULT_LABELS)]


@cache
def contaminated() -> set[int]:
    """Rows of dev whose text is also in the 3,000 training rows, exactly or after normalisation."""
    return set(stand_in(*(texts_of(REPO / "runs" / name) for name in ("dev.tsv", PART))))


def keep(row: Row, size: str) -> None:
    """Keep the results, the commits, and the score differences that decisions and ranks need.

    Differences are rounded, not the scores: equal bf16 differences must stay equal. Texts and
    generated text are left out, because the reviews do not belong to this project.
    """
    made, kept = REPO / "runs" / size / f"{row.name}.json", KEPT / size / f"{row.name}.json"
    kept.parent.mkdir(exist_ok=True)
    results = json.loads(made.read_text(encoding="utf-8"))
    if results.pop("off_track_examples", None) is not None:
        results["off_track_words"] = dict.fromkeys(SETS.values(), 0)
    with (
        open(made.with_suffix(".jsonl"), encoding="utf-8") as lines,
        open(kept.with_suffix(".jsonl"), "w", encoding="utf-8") as out,
    ):
        for line in lines:
            names = ("index", "label", "prediction", "scores", "answer")
            prediction = {k: value for k, value in json.loads(line).items() if k in names}
            if (scores := prediction["scores"]) is not None:
                prediction["scores"] = [round(score - max(scores), 6) for score in scores]
            answer = prediction.pop("answer", None)
            if answer is not None and prediction["prediction"] == -1:
                # No label word in the answer: does it contain other sentiment words?
                for words in SETS.values():
                    said = any(word in answer for word in words.split(","))
                    results["off_track_words"][words] += said
            prediction["clean"] = prediction["index"] not in contaminated()
            out.write(json.dumps(prediction, ensure_ascii=False) + "\n")
    run = REPO / "runs" / size / row.name / "run.json"
    if run.exists():
        record = json.loads(run.read_text(encoding="utf-8"))
        learnt = ("embedding_movement", "steps", "best_step", "layer", "peak_memory_mib")
        results |= {key: record[key] for key in learnt if record.get(key) is not None}
    results["commits"] = {
        what: made.with_suffix(f".{what}").read_text(encoding="utf-8")
        for what in ("trained", "evaluated")
        if made.with_suffix(f".{what}").exists()
    }
    # Written last: a row with this file is complete.
    kept.write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(f"{row.name}: accuracy {results['accuracy']:.4f}", flush=True)


def main() -> None:
    """The command: run the selected rows that are not kept yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=MODELS)
    parser.add_argument("--model", metavar="DIR", help="directory of the weights")
    parser.add_argument("--train", metavar="FILE")
    parser.add_argument("--dev", metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these rows, in this order")
    parser.add_argument("--list", action="store_true", help="print the commands and exit")
    args = parser.parse_args()
    rows = {row.name: row for row in all_rows(args.size)}
    if unknown := set(args.only or ()) - set(rows):
        parser.error(f"--only: unknown row {', '.join(sorted(unknown))}; see --list")
    chosen = [rows[name] for name in args.only or rows]
    if args.list:
        for row in chosen:
            print(f"# {row.name}", *commands(row, args.size), sep="\n")
        return
    prepare(args)
    for row in chosen:
        if not (KEPT / args.size / f"{row.name}.json").exists():
            run(row, args.size)


if __name__ == "__main__":
    main()
