"""The fewest tokens of a text: never more than it has, and exactly as many where the longest tokens fill it."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest
from chatting import encode, example, say
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from sparkctl.data.chat import CHARACTERS, ChatFormat, TooLong
from sparkctl.data.fewest import ALPHABET, SPACE, Fewest
from sparkctl.data.messages import BadLine

KINDS = ("qwen35", "mistral")
PARTS = (
    *"aeiout\n \t.01", "the ", " and", "    ", "\n\n\n", "<|im_end|>", "<|im_start|>", "<|im_end|≯", "é", "e\u0301",
    "\u1100\u1161\u11a8", "Å", "A\u030a", SPACE, SPACE * 9, "漢字", "😀", "\u0338", "\u00a0", "<0x41>", "[INST]",
)  # fmt: skip


def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def count(backend: Tokenizer, text: str) -> int:
    return len(backend.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_never_more_than_there_are(chat_folders: dict[str, Path], kind: str, seed: int) -> None:
    backend, chosen = tokenizer(chat_folders[kind]), random.Random(seed)
    fewest = Fewest(backend)
    for _ in range(500):
        parts = chosen.sample(PARTS, chosen.randint(1, 4))
        text = "".join(chosen.choices(parts, k=chosen.randint(1, 60)))
        assert fewest(text) <= count(backend, text), repr(text)
        text = unicodedata.normalize(chosen.choice(["NFC", "NFD"]), text)
        assert fewest(text) <= count(backend, text), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_as_many_where_a_token_fills_the_text(chat_folders: dict[str, Path], kind: str) -> None:
    """An added token that is longer than all others, again and again: no byte of it counts too little or too much."""
    backend, token = tokenizer(chat_folders[kind]), "<|the longest token of them all|>"
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    for times in (1, 7, 5000):
        assert Fewest(backend)(token * times) == count(backend, token * times) == times


def test_a_text_that_a_normalizer_composes_counts_by_what_stays(chat_folders: dict[str, Path]) -> None:
    fewest = Fewest(tokenizer(chat_folders["qwen35"]))
    assert fewest("x" * 1000) > 0
    assert fewest("x" * 1000 + "e\u0301" * 1000) == fewest("x" * 1000)


def bytewise(**options: object) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in ALPHABET.items()}, merges=[], **options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return backend


def test_bytes_alone_are_a_token_each() -> None:
    text = bytes(range(128)).decode() + "é漢😀"
    assert Fewest(bytewise())(text) == count(bytewise(), text) == len(text.encode())


def _byte_gone() -> Tokenizer:
    vocab = {letter: byte for byte, letter in ALPHABET.items() if byte != ord("x")}
    backend = bytewise()
    backend.model = models.BPE(vocab=vocab, merges=[])
    return backend


def _removing() -> Tokenizer:
    backend = bytewise()
    cut = pre_tokenizers.Split(Regex("x"), "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(use_regex=False)])
    return backend


def _stripping() -> Tokenizer:
    backend = bytewise()
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "")])
    return backend


def _eating_blanks() -> Tokenizer:
    backend = bytewise()
    backend.add_tokens([AddedToken("x", rstrip=True)])
    return backend


def _unknown() -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab={"?": 0, "y": 1}, merges=[], unk_token="?", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    return backend


def _words() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(vocab={"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


@pytest.mark.parametrize("make", [_byte_gone, _removing, _stripping, _eating_blanks, _unknown, _words])
def test_nothing_is_told_of_what_may_lose_text(make: object) -> None:
    assert callable(make)
    backend = make()
    text = "x" + ("x" if make is not _eating_blanks else " ") * 99
    assert count(backend, text) < len(text)
    assert Fewest(backend)(text) == 0


@pytest.fixture
def format(chat_folders: dict[str, Path]) -> ChatFormat:
    return ChatFormat.load(chat_folders["qwen35"])


def test_what_is_sure_to_be_too_long_is_not_tokenised(format: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = (example(("user", "why? " * times), say("so")) for times in (CHARACTERS, 3))
    asked: list[int] = []
    tokenized = format._tokenized
    monkeypatch.setattr(format, "_tokenized", lambda texts: asked.append(len(texts)) or tokenized(texts))
    first, dropped, last = format.encode([short, long, short], most=1000)
    assert asked == [2]
    assert isinstance(dropped, TooLong)
    assert 1000 < dropped.tokens <= len(encode(format, long).input_ids)
    assert not isinstance(first, BadLine | TooLong)
    assert not isinstance(last, BadLine | TooLong)
    assert first.input_ids.tolist() == last.input_ids.tolist() == encode(format, short).input_ids.tolist()


def test_what_may_fit_is_tokenised(format: ChatFormat) -> None:
    chat = example(("user", "why? " * CHARACTERS), say("so"))
    exact = encode(format, chat)
    (found,) = format.encode([chat], most=len(exact.input_ids))
    assert not isinstance(found, BadLine | TooLong)
    assert found.input_ids.tolist() == exact.input_ids.tolist()
