"""The results of an evaluation, and of the layers that a probe tried, as text for a terminal."""

from collections import Counter
from collections.abc import Mapping, Sequence

from qwen_min.command.terminal import clipped, text_table


def format_results(results: Mapping) -> str:
    """The results as tables for a person."""
    n, rows = results["n"], [*results["per_class"]]
    shortened = f"{n}   ({results['truncated_rows']} of {n} texts shortened)"
    facts = {"method": results["method"], "examples": shortened, "accuracy": accuracy(results)}
    if (clean := results.get("clean")) and "failed" not in clean:
        facts["  clean part"] = f"undefined   every text is in {clean['train_data']}"
        if clean["n"]:
            others = f"{clean['n']} texts that are not in {clean['train_data']}"
            facts["  clean part"] = f"{accuracy(clean)}   {others}"
    share = number(results["majority_share"])
    facts["majority"] = f"{share}   share of the most frequent class, {results['majority_class']}"
    predicted = map(sum, zip(*results["confusion_matrix"], strict=True))
    # Not strict: answers off track have one more column.
    if never := [row["name"] for row, n in zip(rows, predicted, strict=False) if not n]:
        facts["predictions"] = f"never predicts {clipped(', '.join(never), 50)}"
    if absent := [row["name"] for row in rows if not row["support"]]:
        facts["classes"] = f"no examples of {clipped(', '.join(absent), 28)} (0 in the macro mean)"
    if results["brier"] is None:  # generated text: there are no scores
        count, answers = results["off_track"], results["off_track_examples"]
        facts["off track"] = f"{count / n:.4f}   {count} of {n} answers hold no label word"
        facts |= {f"  line {answer['line']}": repr(answer["answer"]) for answer in answers}
    else:
        facts["AUC-ROC"] = number(results["auc_roc"])
        facts["Brier"] = f"{number(results['brier'])}   {results['brier_kind']}"
        facts["ECE"] = f"{number(results['ece'])}   15 bins"
    if applied := results.get("applied_calibration"):
        facts["calibration"] = f"{applied['applied']}   decisions are by corrected scores"
    if results["label_mass"] is not None:
        mass = number(results["label_mass"])
        facts["label mass"] = f"{mass}   probability that the answer begins with a label word"
    speed = f"{results['examples_per_second']:.1f} examples/s, {results['seconds']:.1f} s"
    facts["speed"] = f"{speed}, {results['dtype']} on {results['device']}"

    keys, names = ("precision", "recall", "f1"), [row["name"] for row in rows]
    rows.append({"name": "macro", **results["macro"], "support": n})
    table = [[row["name"], *(number(row[k]) for k in keys), str(row["support"])] for row in rows]
    heads = names + ["off track"] * bool(results["off_track"])
    by_class = zip(names, results["confusion_matrix"], strict=True)
    counts = [[word, *map(str, row)] for word, row in by_class]
    lines = "\n".join(f"{name:12}  {value}" for name, value in facts.items())
    classes = text_table(["class", "precision", "recall", "F1", "examples"], table)
    return f"{lines}\n\n{classes}\n\n" + text_table(["true \\ predicted", *heads], counts)


def accuracy(measured: Mapping) -> str:
    """Accuracy with its interval."""
    low, high = measured["accuracy_interval"]
    return f"{number(measured['accuracy'])}   95 % interval {low:.4f} to {high:.4f}"


def majority(per_class: Sequence[Mapping]) -> dict:
    """The most frequent class, of equal ones the first, and its share of the examples.

    The share is the accuracy of a method that always says this class.
    """
    top, n = max(per_class, key=lambda r: r["support"]), sum(row["support"] for row in per_class)
    return {"majority_class": top["name"], "majority_share": top["support"] / n}


def format_held_out(labels: Sequence[str], true: Sequence[int]) -> str:
    """The held-out part, of these true classes: what its accuracy is to be compared with."""
    counts = Counter(true)
    rows = [{"name": word, "support": counts[y]} for y, word in enumerate(labels)]
    top, absent = majority(rows), [row["name"] for row in rows if not row["support"]]
    which = f"{number(top['majority_share'])} of them {clipped(top['majority_class'], 20)}"
    none = f"; none of {clipped(', '.join(absent), 20)}" * bool(absent)
    return f"held out: {len(true)} row{'s' * (len(true) > 1)}, {which}{none}"


def number(value: float | None) -> str:
    """Four decimals."""
    return "undefined" if value is None else f"{value:.4f}"


def format_layers(found: dict[int, dict], chosen: int) -> str:
    """A line for each layer: its accuracy and log-loss on the held-out part, its penalty."""
    keys = ("held_out_accuracy", "held_out_log_loss", "l2")
    cells = {layer: [number(row[key]) for key in keys] for layer, row in found.items()}
    rows = [[str(layer), *cells[layer], "chosen" * (layer == chosen)] for layer in cells]
    return text_table(["layer", "held-out accuracy", "log-loss", "L2", ""], rows)
