"""Results as tables for a person."""

from unicodedata import east_asian_width


def format_results(results: dict) -> str:
    """The results as a table for a person."""

    def number(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.4f}"

    low, high = results["accuracy_interval"]
    shortened = f"{results['truncated_rows']} of {results['n']} texts shortened"
    lines = [
        f"method        {results['method']}",
        f"examples      {results['n']}   ({shortened})",
        f"accuracy      {number(results['accuracy'])}   95 % interval {low:.4f} to {high:.4f}",
        f"AUC-ROC       {number(results['auc_roc'])}",
        f"Brier         {number(results['brier'])}   {results['brier_kind']}",
        f"ECE           {number(results['ece'])}   15 bins",
        f"speed         {results['examples_per_second']:.1f} examples/s, "
        f"{results['seconds']:.1f} s, {results['dtype']} on {results['device']}",
        "",
        "class          precision   recall       F1   examples",
    ]
    if results["label_mass"] is not None:
        mass = number(results["label_mass"])
        lines.insert(6, f"label mass    {mass}   probability that the label words hold")
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


def pad(text: str, width: int, left: bool = False) -> str:
    """Fill with spaces to a width in terminal columns, where a Chinese character takes two."""
    columns = sum(2 if east_asian_width(char) in "WF" else 1 for char in text)
    space = " " * max(0, width - columns)
    return space + text if left else text + space
