"""Fonts for the words of a picture (needs matplotlib), and what to do where there is none."""

from matplotlib import font_manager

# With Chinese characters: of Linux, macOS, Windows, and such as people install.
CHINESE = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Serif CJK JP", "WenQuanYi Micro Hei")
CHINESE += ("PingFang SC", "Hiragino Sans GB", "Arial Unicode MS", "Microsoft YaHei", "SimHei")
NO_FONT = """warning: no known font has {}; code points are drawn. Fonts with Chinese: \
fonts-noto-cjk (a package of Debian and Ubuntu), PingFang (macOS), Microsoft YaHei (Windows). \
Afterwards remove {}, which lists the fonts"""


def find_fonts() -> tuple[list[str], frozenset[int]]:
    """(DejaVu Sans and an installed Chinese font, code points that they can draw)."""
    installed = font_manager.get_font_names()
    fonts = ["DejaVu Sans", *[name for name in CHINESE if name in installed][:1]]
    files = [font_manager.get_font(font_manager.findfont(name)) for name in fonts]
    return fonts, frozenset().union(*(file.get_charmap() for file in files))


def readable(text: str, drawable: frozenset[int]) -> str:
    """`text` with code points in place of characters that cannot be drawn: 正 becomes \\u6b63."""
    hidden = [char for char in text if ord(char) not in drawable or not char.isprintable()]
    return text.translate({ord(char): char.encode("unicode_escape").decode() for char in hidden})
