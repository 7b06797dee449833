"""Token ids against transformers; markup counts in a template and is plain text in a text."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
from conftest import CORPUS, make_tokenizer
from tokenizers import Tokenizer as BaseTokenizer
from tokenizers import models
from transformers import AutoTokenizer

from qwen_min.errors import UserError
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


def test_a_batch_equals_one_by_one(both):
    ours, _ = both
    texts = TEXTS + random_texts(1, 100)
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]
    assert ours.encode_batch([]) == []


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
            assert ours.encode_batch([text]) == [ids]
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
    assert changed.encode_batch(CORPUS) == tokenizer.encode_batch(CORPUS)
    assert changed.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    assert changed.offsets(CORPUS[0]) == tokenizer.offsets(CORPUS[0])


def refusal(directory: Path) -> str:
    """The one-line error for this directory."""
    with pytest.raises(UserError) as caught:
        Tokenizer(directory)
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
