"""The embedded reviews are what they claim: 400 different texts, balanced, train and test apart.

A test of this kind must be able to fail. A near-duplicate measure that never fires would pass on
any data, so the measure is first held to real rows that were lightly edited, quoted inside another
text or merely punctuated anew, and to pairs of different texts, before its verdict counts.
"""

import csv
import io
import unicodedata
from itertools import combinations
from pathlib import Path

import pytest

SAMPLE = Path(__file__).resolve().parent.parent / "qwen_min" / "sample"
SPLITS = ("train", "test")
# One character changed in a text of n breaks 5 of its n - 4 five-grams: a long copy keeps most
# (Jaccard 0.6 at one change in twenty); independent texts on one subject stay below 0.1.
MAX_JACCARD = 0.3
# Share of the smaller text's five-grams found in the other: sees a quoted passage, which Jaccard
# dilutes. A stock phrase such as 挑不出毛病 in a text of eight characters reaches 1/4.
MAX_CONTAINMENT = 0.5
# Up to this length one changed character can break most five-grams, while it breaks only two
# bigrams, so bigrams are compared as well. Different short reviews stay below 0.2.
SHORT = 30
MAX_BIGRAM_JACCARD = 0.35


def read(split: str) -> list[tuple[str, str]]:
    """(label, text) of every row, with nothing cleverer than two calls of split."""
    content = (SAMPLE / f"{split}.tsv").read_bytes().decode("utf-8")
    assert content.endswith("\n") and "\r" not in content and not content.startswith("\ufeff")
    header, *lines = content[:-1].split("\n")
    assert header == "label\ttext_a"
    rows = [line.split("\t") for line in lines]
    assert all(len(row) == 2 for row in rows)
    return [(label, text) for label, text in rows]


def normalise(text: str) -> str:
    """NFKC, lower case, letters and digits only: what is left when typography is ignored."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if character.isalnum())


def grams(text: str, n: int) -> set[str]:
    """The character n-grams of a normalised text; a text shorter than n is its own only gram."""
    return {text[i : i + n] for i in range(max(1, len(text) - n + 1))}


def near_duplicates(texts: list[str]) -> list[tuple[int, int, str, float]]:
    """(i, j, measure, value) of every pair of `texts` that one of the three measures rejects."""
    plain = [normalise(text) for text in texts]
    fives = [grams(text, 5) for text in plain]
    twos = [grams(text, 2) for text in plain]
    found = []
    for i, j in combinations(range(len(texts)), 2):
        shared = len(fives[i] & fives[j])
        if shared:
            jaccard = shared / len(fives[i] | fives[j])
            containment = shared / min(len(fives[i]), len(fives[j]))
            if jaccard >= MAX_JACCARD:
                found.append((i, j, "jaccard", jaccard))
            if containment >= MAX_CONTAINMENT:
                found.append((i, j, "containment", containment))
        if max(len(plain[i]), len(plain[j])) <= SHORT:
            bigrams = len(twos[i] & twos[j]) / len(twos[i] | twos[j])
            if bigrams >= MAX_BIGRAM_JACCARD:
                found.append((i, j, "bigrams", bigrams))
    return found


def edited(text: str) -> str:
    """`text` with every twentieth character replaced, the middle one where it has fewer."""
    at = set(range(10, len(text), 20)) or {len(text) // 2}
    return "".join("囗" if i in at else character for i, character in enumerate(text))


@pytest.mark.parametrize("split", SPLITS)
def test_rows_balance_and_lengths(split: str) -> None:
    rows = read(split)
    assert len(rows) == 200
    assert sum(label == "1" for label, _ in rows) == 100
    assert sum(label == "0" for label, _ in rows) == 100
    assert all(text == text.strip() and normalise(text) for _, text in rows)
    lengths = [len(text) for _, text in rows]
    assert sum(length < 20 for length in lengths) >= 40
    assert sum(length > 120 for length in lengths) >= 30


@pytest.mark.parametrize("split", SPLITS)
def test_length_does_not_give_the_label_away(split: str) -> None:
    """Within a tenth of each other: otherwise counting characters would be a classifier."""
    mean = {}
    for wanted in "01":
        lengths = [len(text) for label, text in read(split) if label == wanted]
        mean[wanted] = sum(lengths) / len(lengths)
    assert abs(mean["0"] - mean["1"]) <= 0.1 * max(mean.values())


@pytest.mark.parametrize("split", SPLITS)
def test_first_rows_hold_both_classes(split: str) -> None:
    """`--limit N` takes the first N rows, so the order has to be mixed from the start."""
    labels = [label for label, _ in read(split)]
    for n in (20, 40, 80):
        # Nine random orders in ten stay inside for all three n; a file sorted by label does not.
        assert 0.35 * n <= labels[:n].count("1") <= 0.65 * n


@pytest.mark.parametrize("split", SPLITS)
def test_label_words_do_not_occur(split: str) -> None:
    """Also across punctuation, and as part of another word such as 反正面条."""
    for _, text in read(split):
        assert "负面" not in normalise(text) and "正面" not in normalise(text), text


@pytest.mark.parametrize("split", SPLITS)
def test_quoting_readers_see_the_same_rows(split: str) -> None:
    """A spreadsheet that honours quotes reads what a plain split reads: no `"` to merge rows."""
    content = (SAMPLE / f"{split}.tsv").read_text(encoding="utf-8")
    quoted = list(csv.reader(io.StringIO(content), delimiter="\t"))
    assert [tuple(row) for row in quoted[1:]] == read(split)


def test_no_exact_or_near_duplicates_within_or_across_the_splits() -> None:
    texts = [text for split in SPLITS for _, text in read(split)]
    assert len({normalise(text) for text in texts}) == len(texts) == 400
    assert [(texts[i], texts[j], what) for i, j, what, _ in near_duplicates(texts)] == []


def test_the_measure_finds_every_lightly_edited_row() -> None:
    """One character in twenty changed, for each of the 400 rows; no row of five or fewer
    characters, where one character is the whole difference between two reviews."""
    for split in SPLITS:
        for _, text in read(split):
            if len(normalise(text)) > 5:
                assert near_duplicates([text, edited(text)]), text


def test_the_measure_sees_typography_and_quotation_but_not_a_shared_subject() -> None:
    rows = [text for _, text in read("train")]
    longest, other = sorted(rows, key=len)[-2:]
    spaced = " ".join(other).replace("，", "！")
    assert normalise(spaced) == normalise(other)
    quoted = other[:20] + longest + other[20:40]
    kinds = {what for _, _, what, _ in near_duplicates([longest, quoted])}
    assert "containment" in kinds
    # A passage of a few clauses: too little for Jaccard, enough for containment.
    passage = {what for _, _, what, _ in near_duplicates([longest[50:90], longest])}
    assert passage == {"containment"}
    assert near_duplicates(["房间很暖和，早餐好吃。", "房间漏风，早饭冰凉！"]) == []
