"""Token ids against transformers; words added to a vocabulary count, markup in a text doesn't."""

import json
import random
import unicodedata
from itertools import chain
from pathlib import Path

import pytest
from conftest import CORPUS, QWEN2_SPLIT, make_tokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BaseTokenizer
from transformers import AutoTokenizer

from qwen_min.errors import UserError
from qwen_min.files.tokens import load_tokenizer, read_tokenizer
from qwen_min.tokenizer import Tokenizer

TEXTS = [
    *CORPUS,
    "",
    " ",
    "\n",
    "  两个空格  and  tabs\t\there \r\n\r\n  \n end ",
    "全角　空格，“引号”……——《书名》！？～",
    "It's 3.14159 or 2,718 — we'll see; I'VE no idea, they'd've said so.",
    "def f(x):\n    return x ** 2  # 平方\n\n\n",
    "好评👍👍🏽，一家人👨‍👩‍👧‍👦🇨🇳❤️ 🙂🙃",
    "e\u0301 é \u212b Å o\u0323\u0302 가 \u1100\u1161 ﬁ ２０２４ ①",  # NFC changes some of these
    "العربية עברית हिन्दी ไทย ру́сский 𠮷野家 𝔘𝔫𝔦",
    "\x00\x07\x1b[0m\u200b\u200d\u2028\u2029\ufeff\ufffd\ue000\U0010ffff",
    "长" * 300 + "!" * 100 + " " * 50,
]
# Characters where tokenizers go wrong: several bytes, joiners, accents, every kind of space.
ODD = (
    "好评正负面。，！　\n\r\t  aeB'st19.…"
    "😀👨\u200d👩🏽é\u0301\u0323กि가ㄱ\u1100\u1161\ufeff\x00\u2028ﷺ"
)


def edit(directory: Path, **changes) -> None:
    """Replace top-level fields of tokenizer.json."""
    path = directory / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(raw | changes), encoding="utf-8")


@pytest.fixture(scope="module", params=["plain", "nfc"])
def both(request, tmp_path_factory) -> tuple[Tokenizer, AutoTokenizer]:
    """Ours and transformers', without a normaliser and with Qwen's."""
    directory = tmp_path_factory.mktemp(request.param)
    make_tokenizer(directory)
    if request.param == "nfc":
        byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        edit(
            directory,
            normalizer={"type": "NFC"},
            post_processor={"type": "ByteLevel", **byte_level},
        )
    return Tokenizer(directory), AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return Tokenizer(directory)


def random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ODD, k=rng.randrange(30))) for _ in range(count)]


def test_ids_equal_transformers(both):
    ours, theirs = both
    for text in TEXTS + random_texts(0, 500):
        assert ours.encode(text) == theirs(text)["input_ids"], ascii(text)


def test_nfc_is_applied_where_the_file_asks_for_it(both):
    ours, theirs = both
    same = ours.encode("cafe\u0301") == ours.encode("caf\u00e9")
    assert same == (theirs.backend_tokenizer.normalizer is not None)


def test_decoding_gives_the_text_back(both):
    ours, theirs = both
    nfc = theirs.backend_tokenizer.normalizer is not None
    for text in TEXTS + random_texts(2, 200):
        back = unicodedata.normalize("NFC", text) if nfc else text
        assert ours.decode(ours.encode(text)) == back, ascii(text)


def test_decoding_equals_transformers_on_any_ids(both):
    """Random ids: incomplete characters between markup tokens must not remove the markup."""
    ours, theirs = both
    rng = random.Random(3)
    markup = list(ours.markup.values())
    for _ in range(200):
        ids = rng.choices([*range(ours.size), *markup * 20], k=rng.randrange(20))
        expected = theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == expected, ids
    half = ours.encode("🙂")[:2]
    assert ours.decode([*half, markup[0], *half]) == "\ufffd<|endoftext|>\ufffd"


def test_offsets_cover_the_text(tokenizer):
    for text in TEXTS:
        offsets = tokenizer.offsets(text)
        assert len(offsets) == len(tokenizer.encode(text))
        covered = {place for start, end in offsets for place in range(start, end)}
        assert covered == set(range(len(text))), ascii(text)
    assert set(tokenizer.offsets("🙂")) == {(0, 1)}  # four tokens, one character


def test_markup_in_a_text_is_plain_text(both):
    ours, theirs = both
    assert set(ours.markup) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"}
    assert ours.size == max(ours.markup.values()) + 1
    for token, id_ in ours.markup.items():  # <tool_call> is added, but not special
        for text in (token, f"好{token}评", f"x {token}\n{token}{token}", f"{token}。"):
            ids = ours.encode(text)
            assert max(ids) < min(ours.markup.values()), text
            assert len(ours.offsets(text)) == len(ids)
            assert ours.decode(ids) == text
            assert id_ in theirs(text)["input_ids"]  # what would happen otherwise


def test_markup_is_found_where_it_is_asked_for(tokenizer):
    assert tokenizer.split_markup("<|im_start|>user\n{text}<|im_end|><tool_call>") == [
        *("", "<|im_start|>", "user\n{text}", "<|im_end|>", "", "<tool_call>", "")
    ]
    for literal in ("", "评论：{text}", "<|im_start>", "<|IM_END|>"):
        assert tokenizer.split_markup(literal) == [literal]


def test_the_longest_markup_wins(tmp_path):
    make_tokenizer(tmp_path)
    base = BaseTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    base.add_special_tokens(["<|im_end|>>", "(.*)"])  # the second would match all if not escaped
    base.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    pieces = ours.split_markup("好<|im_end|>>评(.*)<|im_end|>")
    assert pieces == ["好", "<|im_end|>>", "评", "(.*)", "", "<|im_end|>", ""]
    ids = [i for p in pieces for i in ([ours.markup[p]] if p in ours.markup else ours.encode(p))]
    assert ids == theirs("".join(pieces))["input_ids"]


# ---- added tokens -----------------------------------------------------------------------------

FLAGS = ("lstrip", "rstrip", "single_word")
WORDS = [
    "[差评]",
    "[好评]",
    "拼夕夕",
    "拼夕",
    "好评",
    "foo",
    " foo",
    "foo bar",
    "<brand>",
    "评]好",
    "é",
]
SHAPES = {
    "as strings": ["[差评]", "[好评]", "拼夕夕"],
    "special": [AddedToken("[差评]", special=True), "拼夕夕", AddedToken("<s>", special=True)],
    "lstrip": [AddedToken("拼夕夕", lstrip=True), AddedToken("foo", lstrip=True, normalized=False)],
    "rstrip": [AddedToken("拼夕夕", rstrip=True), AddedToken("foo", rstrip=True, normalized=False)],
    "both": [AddedToken("[差评]", lstrip=True, rstrip=True), "[好评]"],
    "single_word": [AddedToken("foo", single_word=True), AddedToken("好评", single_word=True)],
    "NFC": ["caf\u00e9", AddedToken("e\u0301", normalized=False)],
    "one in another": WORDS,
    "already in the BPE": ["e", "th", "\n", " "],
}


def add(directory: Path, tokens: list, nfc: bool = True) -> AutoTokenizer:
    """A tokenizer to which transformers has added `tokens`, saved and read again."""
    make_tokenizer(directory)
    if nfc:
        edit(directory, normalizer={"type": "NFC"})
    theirs = AutoTokenizer.from_pretrained(directory)
    theirs.add_tokens(tokens)
    theirs.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def texts_of(tokens: list, seed: int) -> list[str]:
    """Random texts in which the tokens occur often, next to each other, cut, and beside space."""
    rng, names = random.Random(seed), [str(token) for token in tokens]
    pool = [*names, *names, *(n[:-1] for n in names), *(n[1:] for n in names), *ODD, " ", "  ", "x"]
    return ["".join(rng.choices(pool, k=rng.randrange(12))) for _ in range(300)]


@pytest.mark.parametrize("shape", SHAPES)
def test_added_tokens_are_those_of_transformers(shape, tmp_path):
    tokens = SHAPES[shape]
    theirs, ours = add(tmp_path, tokens), Tokenizer(tmp_path)
    special = [str(t) for t in tokens if getattr(t, "special", False)]
    assert {*ours.markup} == {
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<tool_call>",
        *special,
    }
    assert ours.size == len(theirs)
    assert not any(name in ours.split_markup(f"a{name}b") for name in WORDS if name not in special)
    assert read_tokenizer(tmp_path).markup == ours.markup
    for text in texts_of(tokens, 7) + TEXTS:
        expected = theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == expected, ascii(text)
        assert ours.decode(expected) == theirs.decode(expected)
        offsets = theirs(text, split_special_tokens=True, return_offsets_mapping=True)
        assert ours.offsets(text) == offsets["offset_mapping"]


def test_random_added_tokens_are_those_of_transformers(tmp_path):
    rng = random.Random(8)
    for number in range(15):
        directory = tmp_path / str(number)
        directory.mkdir()
        tokens = [
            AddedToken(
                word, normalized=rng.random() < 0.5, **dict.fromkeys(rng.sample(FLAGS, 1), True)
            )
            for word in rng.sample([w for w in WORDS if not w[0].isspace()], 6)
        ]
        theirs, ours = add(directory, tokens, nfc=number % 2 == 0), Tokenizer(directory)
        for text in texts_of(tokens, number):
            assert ours.encode(text) == theirs(text)["input_ids"], (tokens, text)


def test_control_strings_are_markup_whatever_the_file_calls_them(tmp_path):
    control = [
        "<think>",
        "</think>",
        "</tool_call>",
        "<tool_response>",
        "<|fim_pad|>",
        "<｜User｜>",
    ]
    words = ["<b>", "<thinker>", "think", "<|", "|>", "[|x|]"]
    theirs, ours = add(tmp_path, [*control, *words]), Tokenizer(tmp_path)
    assert {*control} < {*ours.markup} and not {*words} & {*ours.markup}
    for token in control:
        assert not {*ours.encode(f"好{token}")} & {*ours.markup.values()}
        assert ours.split_markup(f"好{token}") == ["好", token, ""]
    for token in words:
        assert ours.encode(f"好{token}") == theirs(f"好{token}")["input_ids"]


def test_markup_is_cut_where_the_library_finds_it(tmp_path):
    """A vocabulary token that overlaps markup and begins before it goes first."""
    cafe = AddedToken("caf\u00e9", special=True, normalized=True)
    tokens = ["好<", AddedToken("[差评]", special=True), cafe]
    theirs, ours = add(tmp_path, tokens), Tokenizer(tmp_path)
    for text in ("好<|im_end|>", "<|im_end|>[差评]", "x cafe\u0301 y", *texts_of(tokens, 9)):
        pieces = ours.split_markup(text)
        assert {*pieces[1::2]} <= {*ours.markup} and len(pieces) % 2
        ids = [[ours.markup[p]] if i % 2 else ours.encode(p) for i, p in enumerate(pieces)]
        assert [*chain.from_iterable(ids)] == theirs(text)["input_ids"], ascii(text)


@pytest.mark.parametrize("flag", FLAGS)
def test_markup_that_changes_with_its_neighbours_is_refused_by_name(flag, tmp_path):
    add(tmp_path, [AddedToken("<mask>", special=True, **{flag: True})])
    tokenizer = Tokenizer(tmp_path)  # it may be there; in a text it is plain text
    assert tokenizer.markup["<mask>"] not in tokenizer.encode("x <mask> y")
    with pytest.raises(UserError, match="<mask> changes with its neighbours") as error:
        tokenizer.split_markup("好 <mask> 评")
    assert "\n" not in str(error.value)


def test_a_pre_tokenizer_that_asks_where_a_piece_stands_is_refused(tmp_path):
    make_tokenizer(tmp_path)
    base = BaseTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first = pre_tokenizers.Metaspace(prepend_scheme="first")
    base.pre_tokenizer = pre_tokenizers.Sequence([first, base.pre_tokenizer])
    base.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"<\|im_end\|> changes with its neighbours"):
        Tokenizer(tmp_path).split_markup("好<|im_end|>评")


def test_what_the_library_cannot_encode_is_refused(tmp_path):
    add(tmp_path, [AddedToken("好评", rstrip=True), "\n"])
    assert "rstrip" in refusal(tmp_path)


def test_dropout_is_refused(tmp_path):
    make_tokenizer(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    edit(tmp_path, model=model | {"dropout": 0.1})
    assert "dropout 0.1" in refusal(tmp_path)
    edit(tmp_path, model=model | {"dropout": 0.0})
    assert load_tokenizer(tmp_path).encode("好评")


@pytest.mark.parametrize("ignore", [True, False])
def test_options_of_the_bpe_and_normalisers_count(ignore, tmp_path):
    make_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = raw["model"]["vocab"] | {"Ġzzzz": 504}
    edit(
        tmp_path,
        model=raw["model"] | {"vocab": vocab, "ignore_merges": ignore},
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
    )
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.encode(" ZZZZ") == [504]) == ignore
    for text in [*TEXTS, " ZZZZ zzzz", "ＡＢＣ", "ﬁ"]:
        assert ours.encode(text) == theirs(text)["input_ids"]


def config(directory: Path, **fields) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flags(name: str, **changes) -> dict:
    return {"content": name, "normalized": False, **dict.fromkeys(FLAGS, False), **changes}


MARKUP = {"500": flags("<|endoftext|>"), "501": flags("<|im_start|>"), "502": flags("<|im_end|>")}
SAME = MARKUP | {"503": flags("<tool_call>")}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"added_tokens_decoder": SAME}, None),
        ({"added_tokens_decoder": SAME | {"504": flags("[差评]")}}, "[差评]"),
        ({"added_tokens_decoder": MARKUP}, "<tool_call>"),
        (
            {"added_tokens_decoder": SAME | {"503": flags("<tool_call>", lstrip=True)}},
            "<tool_call>",
        ),
        ({"extra_special_tokens": ["<|im_start|>", {"content": "<s>"}]}, "<s>"),
        ({"extra_special_tokens": {"a_token": "<s>"}}, "<s>"),
        ({"additional_special_tokens": ["<s>"]}, "<s>"),
        ({"additional_special_tokens": ["<|im_start|>"]}, None),
        ({"pad_token": "<pad>"}, "<pad>"),
        ({"pad_token": {"content": "<pad>"}}, "<pad>"),
        ({"pad_token": None, "unk_token": "<|endoftext|>"}, None),
        ({"add_prefix_space": True}, "add_prefix_space is not supported"),
        ({"add_prefix_space": False, "add_bos_token": True}, None),
        ({"split_special_tokens": True}, "split_special_tokens is not supported"),
        ({"added_tokens_decoder": [1]}, "not a tokenizer config"),
        ({"added_tokens_decoder": {"1": 1}}, "not a tokenizer config"),
        ({"added_tokens_decoder": {"1": {"content": 1}}}, "not those of tokenizer.json (1, "),
        ({"extra_special_tokens": [[]]}, "not a tokenizer config"),
    ],
)
def test_tokens_that_other_files_add_are_refused_by_name(fields, said, tmp_path):
    """transformers adds them, or takes them instead of those in tokenizer.json."""
    make_tokenizer(tmp_path)
    config(tmp_path, **fields)
    if said is None:
        assert read_tokenizer(tmp_path).encode("好评")
        return
    with pytest.raises(UserError) as error:
        read_tokenizer(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_ids_of_added_tokens_are_those_of_the_files_or_refused_by_name(tmp_path):
    make_tokenizer(tmp_path)
    config(tmp_path, added_tokens_decoder=SAME | {"502": SAME["501"], "501": SAME["502"]})
    with pytest.raises(UserError, match=r"not those of tokenizer.json .*im_end.*im_start"):
        read_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    edit(tmp_path, added_tokens=raw["added_tokens"][::-1])  # transformers takes the ids
    with pytest.raises(UserError, match="has the id 503 but comes as 500; sort added_tokens"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("extra", [{"mine": "<s>"}, {"my_token": "<s>"}, ["<s>"]])
def test_an_extra_token_that_tokenizer_json_lacks_is_refused(extra, tmp_path):
    make_tokenizer(tmp_path)
    config(tmp_path, extra_special_tokens=extra)
    assert "<s>" in AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    with pytest.raises(UserError, match="<s>"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("added_tokens.json", {"<s>": 504}), ("special_tokens_map.json", {"unk_token": "<s>"})],
)
def test_older_files_count_as_for_transformers(name, content, tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert "<s>" in AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    with pytest.raises(UserError, match="<s>"):
        read_tokenizer(tmp_path)
    config(tmp_path, added_tokens_decoder=SAME)
    assert "<s>" not in AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    read_tokenizer(tmp_path)


# ---- Qwen3.5 ----------------------------------------------------------------------------------

# Marks, such as vowel signs and accents, belong to words; in QWEN2_SPLIT they end them.
QWEN3_5_SPLIT = QWEN2_SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
WITH_MARKS = [
    *("हिन्दी में समीक्षा बहुत अच्छी है", "ไทยไม่ดี ห้องสกปรกมาก", "tiếng Việt rất tốt, không tệ"),
    *("تَقْيِيمٌ جَيِّدٌ", "שָׁלוֹם עֲלֵיכֶם", "ру́сский отзы́в", "বাংলা রিভিউ", "தமிழ் விமர்சனம்", "မြန်မာ"),
    *(
        "o\u0323\u0302 x\u0323\u0301y \u0301 1\u0301 !\u0301",
        "が か\u3099 は\u309a",
        "❤\ufe0f 1\ufe0f\u20e3",
    ),
    *("好\u0301评 \u20dd好", "a\u0301\u0302\u0303b", "\u0e33\u0e4d\u0e32"),
]
# In tokenizer.json: special or not, as the release has them.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"]
OTHERS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim_prefix|>"]
# Only in tokenizer_config.json.
LATE = ["<|audio_start|>", "<tts_pad>", "<tts_text_bos_single>"]


def make_qwen3_5_tokenizer(directory: Path, model_type: str, kind: str | None) -> None:
    """A small tokenizer with Qwen3.5's pre-tokenizer, and the files beside it like a release's."""
    base = BaseTokenizer(models.BPE())
    base.normalizer = normalizers.NFC()
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN3_5_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    base.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=alphabet)
    base.train_from_iterator((CORPUS + WITH_MARKS) * 3, trainer)
    base.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    base.add_tokens([AddedToken(t, special=False, normalized=False) for t in OTHERS])
    base.save(str(directory / "tokenizer.json"))
    decoder = {}
    for name in [*SPECIAL, *OTHERS, *LATE]:
        i = base.token_to_id(name) or base.get_vocab_size() + LATE.index(name)
        decoder[str(i)] = flags(name, special=name not in OTHERS)
    beside = {
        "tokenizer_class": kind,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": SPECIAL[1:],
        "extra_special_tokens": {"audio_bos_token": LATE[0]},
        "add_bos_token": False,
        "bos_token": None,
        "image_token": "<|image_pad|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    beside = {name: value for name, value in beside.items() if name != "tokenizer_class" or value}
    (directory / "tokenizer_config.json").write_text(json.dumps(beside))
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))


QWEN3_5_CLASSES = [
    ("qwen3_5", "Qwen2Tokenizer"),
    ("qwen3_5", "TokenizersBackend"),
    ("qwen3_5_text", "Qwen3_5Tokenizer"),
    ("qwen3_5_text", "TokenizersBackend"),
    ("qwen3_5_text", None),
]


@pytest.mark.parametrize(("model_type", "kind"), QWEN3_5_CLASSES)
def test_qwen3_5s_tokenizer_is_that_of_transformers(model_type, kind, tmp_path):
    make_qwen3_5_tokenizer(tmp_path, model_type, kind)
    ours, theirs = read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.size == len(theirs)
    for name in [*SPECIAL, *OTHERS, *LATE]:
        assert ours.markup[name] == theirs.convert_tokens_to_ids(name)
        assert ours.split_markup(f"好{name}") == ["好", name, ""]
        assert ours.markup[name] not in ours.encode(f"好{name}")  # a user's text
    pool = [*WITH_MARKS, *TEXTS]
    rng = random.Random(9)
    marks = [*ODD, *"ิ่ํ्ंᩛ\u0301\u0323\u20dd\ufe0f\u3099aกक1 "]
    pool += ["".join(rng.choices(marks, k=rng.randrange(30))) for _ in range(300)]
    for text in pool:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text) == expected, ascii(text)
        assert ours.decode(expected) == theirs.decode(expected)


def test_marks_tell_qwen3_5s_pre_tokenizer_from_qwen2s(tmp_path):
    """What the test above compares does depend on it."""
    make_qwen3_5_tokenizer(tmp_path, "qwen3_5_text", None)
    ours = read_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": QWEN2_SPLIT}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    other = read_tokenizer(tmp_path)
    assert sum(ours.encode(text) != other.encode(text) for text in WITH_MARKS) > 5


def test_special_tokens_beside_the_file_are_refused_where_their_ids_would_differ(tmp_path):
    make_qwen3_5_tokenizer(tmp_path, "qwen3_5", "Qwen2Tokenizer")
    path = tmp_path / "tokenizer_config.json"
    found = json.loads(path.read_text())
    last = max(found["added_tokens_decoder"], key=int)
    found["added_tokens_decoder"][str(int(last) + 1)] = found["added_tokens_decoder"].pop(last)
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"not those of tokenizer.json \(<tts_text_bos_single>\)"):
        read_tokenizer(tmp_path)


# ---- the file ---------------------------------------------------------------------------------


def test_without_added_tokens(tmp_path):
    make_tokenizer(tmp_path)
    edit(tmp_path, added_tokens=[])
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.markup == {}
    assert tokenizer.split_markup("好<|im_end|>") == ["好<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("好<|im_end|>")) == "好<|im_end|>"


def test_the_files_truncation_padding_and_special_tokens_are_not_applied(tmp_path, tokenizer):
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    base = BaseTokenizer.from_file(str(path))
    base.enable_truncation(max_length=3)
    base.enable_padding(length=50)
    base.save(str(path))
    end = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
    template = [{"Sequence": {"id": "A", "type_id": 0}}, end]
    edit(
        tmp_path,
        post_processor={
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|im_end|>": {"id": "<|im_end|>", "ids": [502], "tokens": ["<|im_end|>"]}
            },
        },
    )
    assert len(BaseTokenizer.from_file(str(path)).encode(CORPUS[0])) == 50
    changed = Tokenizer(tmp_path)
    assert list(map(changed.encode, CORPUS)) == list(map(tokenizer.encode, CORPUS))
    assert changed.offsets(CORPUS[0]) == tokenizer.offsets(CORPUS[0])
    assert changed.required == ["<|im_end|>"]  # a template has to contain it
    assert tokenizer.required == []


def refusal(directory: Path) -> str:
    """The one-line error for this directory."""
    with pytest.raises(UserError) as caught:
        load_tokenizer(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(directory / "tokenizer.json") + ": ")
    return message


def test_a_missing_file_is_one_line(tmp_path):
    assert "no such file" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "nowhere")


def test_a_directory_of_that_name_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 7031645\n",
        b'{"added_tokens": [], "model": {"type": "BPE", "vocab": {"\xff": 0}, "merges": []}}',
        b"[]",
        b"null",
        b"{}",
        b'{"added_tokens": [], "model": null}',
        b'{"added_tokens": [{"id": 0}], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}',
        b'{"model_type": "qwen2", "hidden_size": 896, "vocab_size": 151936}',  # a config.json
        b'{"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {}}',  # tokenizer_config
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert "not a usable tokenizer" in refusal(tmp_path)


def test_a_file_cut_short_is_one_line(tmp_path):
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_bytes()
    for size in (1, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:size])
        assert "not a usable tokenizer" in refusal(tmp_path)


@pytest.mark.parametrize("prefix", [" ", "<|im_end|>", "éé"])
def test_what_crashes_the_library_is_refused_before(prefix, tmp_path):
    """Without a check the process is aborted, or a panic ends it."""
    make_tokenizer(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    edit(tmp_path, model=model | {"continuing_subword_prefix": prefix})
    assert "continuing_subword_prefix" in refusal(tmp_path)
    edit(tmp_path, model=model | {"continuing_subword_prefix": ""})
    assert load_tokenizer(tmp_path).encode("好评")


def test_a_panic_of_the_library_is_one_line(tmp_path):
    """A merge that makes a token which is not in the vocabulary."""
    make_tokenizer(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    del model["vocab"]["".join(model["merges"][-1])]
    edit(tmp_path, model=model)
    refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("WordPiece", models.WordPiece({"[UNK]": 0, "好": 1}, unk_token="[UNK]")),
        ("WordLevel", models.WordLevel({"[UNK]": 0, "好": 1}, unk_token="[UNK]")),
        ("Unigram", models.Unigram([("<unk>", 0.0), ("好", -1.0)], unk_id=0)),
    ],
)
def test_another_kind_of_tokenizer_is_one_line(tmp_path, name, model):
    BaseTokenizer(model).save(str(tmp_path / "tokenizer.json"))
    message = refusal(tmp_path)
    assert name in message
    assert "BPE" in message
