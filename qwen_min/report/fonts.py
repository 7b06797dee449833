"""A font for the words of a picture (needs matplotlib), and what to do where there is none."""

import sys

import matplotlib
from matplotlib import font_manager


def find_font(words: str) -> tuple[str | None, frozenset[int]]:
    """(font to use beside DejaVu Sans, code points that the two can draw).

    The font is the installed one with most of the characters that DejaVu Sans lacks. It is None if
    DejaVu Sans lacks no character, or if no font has any of them.
    """
    base = charmap(font_manager.findfont("DejaVu Sans"))
    missing = frozenset(map(ord, words)) - base
    best, covered = None, frozenset()
    fonts = font_manager.fontManager.ttflist if missing else []
    for font in sorted(fonts, key=lambda f: (f.style != "normal", str(f.weight), f.name)):
        found = missing & charmap(font.fname)
        # Last Resort claims all characters, and draws each as a box.
        if len(found) > len(covered) and "lastresort" not in font.name.lower().replace(" ", ""):
            best, covered = font.name, found
    return best, base | covered


def charmap(file: str) -> frozenset[int]:
    """The code points for which a font file has a glyph; none if it cannot be read."""
    try:
        return frozenset(font_manager.get_font(file).get_charmap())
    except (OSError, RuntimeError):  # FreeType cannot read every file in a font directory
        return frozenset()


def readable(text: str, drawable: frozenset[int]) -> str:
    """`text` with code points in place of characters that cannot be drawn: 正 becomes \\u6b63."""
    hidden = [char for char in text if ord(char) not in drawable or not char.isprintable()]
    return text.translate({ord(char): char.encode("unicode_escape").decode() for char in hidden})


def warn_of_missing(words: str, drawable: frozenset[int]) -> None:
    """One line on stderr about the characters that no font has, if there are any."""
    if missing := "".join(dict.fromkeys(c for c in words if ord(c) not in drawable)):
        cjk = "fonts-noto-cjk (a package of Debian and Ubuntu), PingFang (part of macOS), Microsoft"
        cjk = f"Fonts with Chinese: {cjk} YaHei (part of Windows)."
        after = f"Afterwards remove {matplotlib.get_cachedir()}, its list of fonts"
        said = f"no installed font has {missing}; their code points are drawn"
        print(f"warning: {said}. {cjk} {after}", file=sys.stderr)
