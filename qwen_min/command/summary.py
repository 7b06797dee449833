"""The results of one evaluation as text for a terminal."""

from qwen_min.command.terminal import pad


def format_results(results: dict) -> str:
    """The results as a table for a person."""
    low, high = results["accuracy_interval"]
    shortened = f"{results['truncated_rows']} of {results['n']} texts shortened"
    lines = [
        f"method        {results['method']}",
        f"examples      {results['n']}   ({shortened})",
        f"accuracy      {_number(results['accuracy'])}   95 % interval {low:.4f} to {high:.4f}",
        *clean_line(results.get("clean")),
    ]
    if results["brier"] is None:  # generated text: there are no scores
        lines += off_track_lines(results)
    else:
        lines += [
            f"AUC-ROC       {_number(results['auc_roc'])}",
            f"Brier         {_number(results['brier'])}   {results['brier_kind']}",
            f"ECE           {_number(results['ece'])}   15 bins",
        ]
    if results["label_mass"] is not None:
        mass = _number(results["label_mass"])
        lines.append(f"label mass    {mass}   probability that the label words hold")
    lines += [
        f"speed         {results['examples_per_second']:.1f} examples/s, "
        f"{results['seconds']:.1f} s, {results['dtype']} on {results['device']}",
        "",
        "class          precision   recall       F1   examples",
    ]
    rows = [*results["per_class"], {"name": "macro", **results["macro"], "support": results["n"]}]
    lines += [
        f"{pad(row['name'], 14)} {row['precision']:9.4f} {row['recall']:8.4f} {row['f1']:8.4f} "
        f"{row['support']:10d}"
        for row in rows
    ]
    names = [row["name"] for row in results["per_class"]]
    heads = names + ["off track"] * bool(results["off_track"])
    lines += ["", "true \\ predicted" + "".join("  " + pad(name, 8, left=True) for name in heads)]
    lines += [
        pad(name, 16) + "".join(f"  {count:8d}" for count in counts)
        for name, counts in zip(names, results["confusion_matrix"], strict=True)
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def off_track_lines(results: dict) -> list[str]:
    """How many answers hold no label word, and the text of some of them."""
    count, n = results["off_track"], results["n"]
    lines = [f"off track     {count / n:.4f}   {count} of {n} answers hold no label word"]
    for example in results["off_track_examples"]:
        lines.append(f"              line {example['line']}: {example['answer']!r}")
    return lines


def clean_line(clean: dict | None) -> list[str]:
    """The line on the texts that are not in the training data; [] if that data is unknown."""
    if clean is None:
        return []
    if not clean["n"]:
        return [f"  clean part  undefined   every text is in {clean['train_data']}"]
    low, high = clean["accuracy_interval"]
    return [
        f"  clean part  {clean['accuracy']:.4f}   95 % interval {low:.4f} to {high:.4f}   "
        f"{clean['n']} texts that are not in {clean['train_data']}"
    ]
