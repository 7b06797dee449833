"""Everything besides the method in which the rows of a report differ."""

from collections.abc import Sequence

from qwen_min.report.compare import Method


def differences(methods: Sequence[Method]) -> dict[str, dict[str, str]]:
    """What differs between the rows besides the method: {setting: {name of the row: its value}}.

    A row that has no such setting, or whose older version did not record it, is left out. Values
    with hashes differ if these differ.
    """
    firsts = {method.name: method.first for method in methods}
    found = {}
    for key in dict.fromkeys(key for result in firsts.values() for key in result.shown):
        having = {name: r for name, r in firsts.items() if key in r.shown}
        texts = {name: as_text(r.shown[key]) for name, r in having.items()}
        hashes = {name: r.hashes[key] for name, r in having.items() if key in r.hashes}
        if len(hashes) == len(texts):
            texts = {name: f"{text} ({hashes[name][:8]})" for name, text in texts.items()}
        else:
            hashes = texts
        if len({*hashes.values()}) > 1:
            found[key] = texts
    names = [result.results["method"] for result in firsts.values()]
    several = {n: str(r.path) for n, r in firsts.items() if names.count(r.results["method"]) > 1}
    return found | ({"file": several} if several else {})


def as_text(value: object) -> str:
    """The value of a setting; an option that was not given is "no"."""
    if value is None or isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("\n", "\\n")
