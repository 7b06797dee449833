"""The arguments of the two commands, and which of them fit together."""

import argparse
import hashlib
import os
from pathlib import Path

from qwen_min.command.cli import option, positive_int
from qwen_min.errors import UserError
from qwen_min.files.record import read_whole_run
from qwen_min.files.run import EVALUATED, WRITTEN
from qwen_min.files.weights import DTYPES
from qwen_min.head import POOLINGS
from qwen_min.prompt import DEFAULT_LABELS, DEFAULT_MAX_TEXT_TOKENS, DEFAULT_TEMPLATE

SAMPLE = Path(__file__).parent.parent / "sample"  # reviews written for this project
UNTRAINED = ("zero_shot", "zero_shot_generate")
SCORE_LABELS = ("zero_shot", "lora_label_scoring")
# The corrections of lab/calibration.py that can be applied. The last three need more than words.
CALIBRATIONS = ("length_normalised", "contextual", "pmi_dc", "domain_context", "batch")
CALIBRATIONS += ("temperature",)
# What an evaluation takes from a run, unless it is given on the command line.
RESTORED = ("model", "labels", "template", "max_text_tokens", "dtype", "chat", "system")


def add_trained_arguments(parser: argparse.ArgumentParser) -> None:
    """What was trained: a run, or an adapter alone."""
    parser.add_argument("--run", metavar="DIR", help="a directory that train.py made")
    adapter = "instead of --run: a LoRA in PEFT's format, for lora_head or lora_label_scoring"
    parser.add_argument("--adapter", metavar="DIR", help=adapter)


def add_model_arguments(parser: argparse.ArgumentParser, batch_tokens: int) -> None:
    """Which model, and how many tokens at once."""
    names = "tiny (comes with the project), a directory, or a hub name: Qwen/Qwen2.5-1.5B[@REV]"
    parser.add_argument("--model", default="tiny", help=names)
    most = {"type": positive_int, "metavar": "N", "default": batch_tokens}
    parser.add_argument("--batch-tokens", **most, help="at most this many in one forward pass")


def add_data_arguments(parser: argparse.ArgumentParser, sample: str) -> None:
    """Which texts: by default the sample's file `sample`."""
    add = parser.add_argument_group("data").add_argument
    kinds = ".tsv, .csv, .xlsx, .json or JSON lines; labels are the words of --labels, or 0, 1, …"
    add("--data", metavar="FILE", default=str(SAMPLE / sample), help=kinds)
    add("--text-column", metavar="NAME", help="default: text, sentence, content, 评论, 内容, …")
    add("--label-column", metavar="NAME", help="default: label, category, 类别 or 标签")
    add("--encoding", help="of the data file (default: UTF-8, or GB18030 where that fails)")
    add("--limit", type=positive_int, metavar="N", help="only the first N rows")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """What makes two methods comparable: the same prompt, truncation and label words."""
    add = parser.add_argument_group("prompt").add_argument
    words = "the word for each class, in class order (0 first); NAME=WORD scores WORD for the "
    words += f"file's NAME (default: {','.join(DEFAULT_LABELS)}, or else the file's own labels)"
    add("--labels", metavar="WORD,WORD", help=words)
    frame = "what surrounds a text; {text} is replaced by it, \\n means a newline"
    add("--template", default=DEFAULT_TEMPLATE.replace("\n", "\\n"), help=frame)
    cut = "longer texts are cut to their first N tokens; the template is never cut"
    most = DEFAULT_MAX_TEXT_TOKENS
    add("--max-text-tokens", type=positive_int, metavar="N", default=most, help=cut)
    add("--chat", action="store_true", help="the template as the user's message in Qwen's markup")
    system = "with --chat: the system message (default: the checkpoint's own, if it has one)"
    add("--system", metavar="TEXT", help=system)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Where, in what precision and in which form to compute."""
    add = parser.add_argument_group("machine").add_argument
    precision = "precision of the base weights; auto is the checkpoint's own"
    add("--dtype", choices=["auto", *DTYPES], default="auto", help=precision)
    first = "auto takes a CUDA GPU if there is one, and else the CPU"
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help=first)
    plain = "compute by the definitions (model.py, scoring.py, head.py): slow, for breakpoints"
    add("--plain", action="store_true", help=plain)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """How each method is trained. The defaults suit a few hundred to a few thousand rows."""
    add = parser.add_argument_group("head_only").add_argument
    add("--pooling", choices=POOLINGS, default="last", help="token(s) to read")
    layer = "last, best (chosen on the held-out part), or a number: 0 is the embedding"
    add("--layer", default="last", help=layer)
    add("--adapter", metavar="DIR", help="probe the base adapted by this LoRA")
    add("--feature-cache", metavar="DIR", help="default: features/ in the run")
    add = parser.add_argument_group("lora_head, lora_label_scoring").add_argument
    # Only attention, as in the paper: a quarter of the parameters of all seven in a 0.5B model.
    targets = "attention (q, k, v, o; in Qwen3.5 also in_proj_qkv, in_proj_z, out_proj), all (with"
    targets += " gate, up, down), none, or names: q_proj,v_proj"
    add("--lora-targets", metavar="NAMES", default="attention", help=targets)
    vectors = "train the token vectors too (and the tied LM head): an ablation"
    add("--train-embeddings", action="store_true", help=vectors)
    # A small rank is enough to move a decision; with alpha twice the rank, as is usual, 2e-4 is a
    # safe learning rate.
    add("--r", type=positive_int, default=8, help="rank of the LoRA")
    add("--alpha", type=float, default=16.0, help="scale: the update is alpha/r · BA")
    add("--rslora", action="store_true", help="scale by alpha/sqrt(r) instead")
    # Some regularisation: two passes over little data already fit it closely.
    add("--dropout", type=float, default=0.05, help="on the LoRA's input")
    # Usual for a few thousand rows, not tuned here; the held-out part chooses the best step.
    add("--epochs", type=positive_int, default=2, help="passes over the data")
    add("--lr", type=float, default=2e-4, help="peak learning rate")
    # Adam's second moments are poor estimates in the first steps, so these are small.
    add("--warmup", type=float, default=0.1, help="share of steps with a rising rate")
    # Few rows in a step: a few hundred rows would otherwise make only a handful of steps.
    add("--batch-size", type=positive_int, default=8, help="rows in one step")
    # One surprising row must not undo what the others taught.
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--eval-every", type=positive_int, metavar="STEPS", help="default: twice an epoch")
    add("--save-every", type=positive_int, metavar="STEPS", default=50, help="at least")
    recompute = "recompute activations in the backward pass: slower, less memory"
    add("--checkpointing", action="store_true", help=recompute)


def finished_run(directory: str | Path) -> dict:
    """The record of a run. Raises UserError for other directories and unfinished runs."""
    record = read_whole_run(directory)
    if not record.get("finished"):
        resume = f"python train.py --resume --output {directory}"
        raise UserError(f"{directory}: training has not finished; continue it with: {resume}")
    return record


def with_run(args: argparse.Namespace, given: dict) -> tuple[argparse.Namespace, dict | None]:
    """The arguments, with a run's own in place of defaults, and the run's record, if there is one.

    Raises UserError for methods, runs and adapters that do not fit together.
    """
    record, changed = None, []
    if args.run:
        record = finished_run(args.run)
        fits = [record["method"]] + ["transplanted_head"] * (record["method"] == "lora_head")
        args.method = args.method or record["method"]
        if args.method not in fits:
            expected = f"expected --method {' or '.join(fits)}"
            raise UserError(f"{args.run}: a run of {fits[0]}, not of {args.method}; {expected}")
        for name in RESTORED:
            own = record["arguments"].get(name, getattr(args, name))  # older runs lack some
            if name not in given:
                setattr(args, name, own)
            elif getattr(args, name) != own:
                changed.append(f"{name}={getattr(args, name)}")
    elif args.method is None:
        raise UserError("--method is missing; name one, or a trained run with --run")
    elif args.adapter and args.method not in ("lora_head", "lora_label_scoring"):
        raise UserError(f"--adapter is for lora_head and lora_label_scoring, not {args.method}")
    elif args.method not in UNTRAINED and not args.adapter:
        raise UserError(f"--method {args.method} needs --run, a directory that train.py made")
    if args.run and args.adapter:
        raise UserError("--run brings its own adapter; give --run or --adapter, not both")
    check_evaluation(args, given)
    # Settings other than the run's own: their results get a file of their own.
    if args.calibration:
        changed.append(f"calibration={args.calibration}")
    args.changed = changed + ["plain"] * args.plain
    return args, record


def check_evaluation(args: argparse.Namespace, given: dict) -> None:
    """Refuse options that the method, or --explain, has no use for."""
    for name in ("label_sets", "calibrate", "calibration"):
        if getattr(args, name, None) and args.method not in SCORE_LABELS:
            expected = f"expected --method {' or '.join(SCORE_LABELS)}"
            raise UserError(f"{option(name)} is about scores of label words; {expected}")
    text, row = (getattr(args, name, None) for name in ("explain", "explain_row"))
    if text is None and row is None:
        return
    if args.method == "zero_shot_generate":
        raise UserError("--explain shows scores, which zero_shot_generate has not; use zero_shot")
    unused = ["data", "limit"] * (row is None) + ["train_data", "output", "predictions"]
    unused += ["label_sets", "calibrate", "calibration", "errors"]
    if found := [option(name) for name in unused if name in given]:
        raise UserError(f"--explain looks at one text and prints; leave out {', '.join(found)}")


def name_outputs(args: argparse.Namespace, record: dict, data_hash: str) -> None:
    """Set --output and --predictions, where not given, to files in the run's directory.

    The name depends on the data, and on settings that differ from the run's (`args.changed`), so
    that different results never replace each other.
    """
    parts = [data_hash[:12]] if args.method == record["method"] else [args.method, data_hash[:12]]
    if args.changed:
        parts.append(hashlib.sha256(" ".join(args.changed).encode()).hexdigest()[:8])
    ending = "-".join(parts)
    args.output = args.output or os.path.join(args.run, f"results-{ending}.json")
    args.predictions = args.predictions or os.path.join(args.run, f"predictions-{ending}.jsonl")


def check_training(args: argparse.Namespace) -> dict | None:
    """Refuse what would fail only after the model is loaded, or would train nothing.

    Returns the record of the run that --resume continues.
    """
    before = read_whole_run(args.output) if args.resume else None
    method, nothing = args.method, args.lora_targets == "none" and not args.train_embeddings
    words, probe = method == "lora_label_scoring", method == "head_only"
    both, exists = args.plain and args.checkpointing, args.export and os.path.lexists(args.export)
    places = (os.path.realpath(place or "") for place in (args.feature_cache, args.output))
    part = os.path.relpath(*places).split(os.sep)[0].lower()  # of the run: where features would go
    taken = part in {*WRITTEN} - {"features"} or part.startswith(EVALUATED)
    taken &= bool(args.feature_cache)
    refusals = {
        f"--feature-cache {args.feature_cache}: a run writes there; leave it out": taken,
        "--export: head_only's head has a bias, transformers' classifier of Qwen has none; train "
        "lora_head, with --lora-targets none to keep the base as it is": probe and args.export,
        "--lora-targets none leaves nothing to train; choose attention or all": words and nothing,
        "--checkpointing is not part of the definitions; leave it or --plain out": both,
        f"--export {args.export} exists already; name a directory that does not": exists,
    }
    for message, refused in refusals.items():
        if refused:
            raise UserError(message)
    for name, end in {"lr": 1, "warmup": 1, "dropout": 1, "clip": 1e9}.items():
        value, start = getattr(args, name), "above 0" if name in ("lr", "clip") else "of at least 0"
        if not 0 <= value < end or (value == 0 and start == "above 0"):
            raise UserError(f"--{name} is {value}; expected a number {start} and below {end:g}")
    return before


def candidate_layers(argument: str, last: int) -> list[int]:
    """--layer: "last" → [L]; "best" → every layer from 0, the embedding, to L; a number → that."""
    if argument in ("last", "best"):
        return [last] if argument == "last" else list(range(last + 1))
    if not argument.isdecimal() or int(argument) > last:
        raise UserError(f"--layer {argument!r}: expected last, best or a number from 0 to {last}")
    return [int(argument)]
