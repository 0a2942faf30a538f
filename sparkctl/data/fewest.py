"""The fewest tokens that a text can become, told from its bytes: tokenising it takes 220 times its size in memory.

A token covers its own bytes and no others. Let longest(b) be the bytes of the longest token that holds the byte b, and
let each byte of a text count 1 / longest(b). The bytes of one token, n of them, count at most n / n together. So a text
is at least as many tokens as its bytes count for, however it is cut.

That holds where every byte of the text ends up in some token: for byte-level BPE, and for BPE that falls back on bytes.
Of other tokenizers nothing is told.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkctl.data.direct import state_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE = 1 << 20  # characters whose bytes are counted at a time
SPACE = "\u2581"  # how pieces write a blank
ALTERED = re.compile(r"[\x00-\x7f]?[^\x00-\x7f]+")  # NFC leaves what is ASCII, and followed by ASCII
KEEPING = {"Split", "Punctuation", "Digits"}  # steps that cut a text and keep all of it, unless they are told not to
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that byte-level BPE writes as they are
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]  # the others it writes as U+0100 and on, in their order
ALPHABET = {**{byte: chr(byte) for byte in VISIBLE}, **{byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}}
BYTES = {ord(letter): byte for byte, letter in ALPHABET.items()}


class Fewest:
    """Asked for a text, the fewest tokens it can be; 0 where this tokenizer is not known to keep every byte."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._steps = list(_parts(backend.pre_tokenizer))
        self._normalizers = list(_parts(backend.normalizer))
        self._bytewise = any(step["type"] == "ByteLevel" for step in self._steps)

    def __call__(self, text: str) -> int:
        """At least so many tokens, special ones included."""
        if not self._counts.any():
            return 0
        if self._normalizers and self._bytewise and not unicodedata.is_normalized("NFC", text):
            text = ALTERED.sub("", text)
        seen = np.zeros(256, dtype=np.int64)
        for at in range(0, len(text), PIECE):
            piece = text[at : at + PIECE]
            data = (piece if self._bytewise else piece.replace(SPACE, " ")).encode()
            seen += np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
        return int(seen @ self._counts)

    @cached_property
    def _counts(self) -> np.ndarray:
        """float64 [256]: what each byte counts; 0 for one that may be lost on the way. Half a second, so made late."""
        longest = np.full(256, np.inf)
        if not self._keeps_every_byte():
            return 1 / longest
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        added = (token.content for token in self._backend.get_added_tokens_decoder().values())
        texts = [*(self._as_bytes(token) for token in vocabulary), *(self._said(text).encode() for text in added)]
        reach = [0] * 256
        for text in sorted(texts, key=len):
            for byte in text:
                reach[byte] = len(text)
        for byte in range(256):
            if self._letter(byte) in vocabulary:
                longest[byte] = reach[byte]
        return 1 / longest

    def _keeps_every_byte(self) -> bool:
        model: Any = self._backend.model
        added = self._backend.get_added_tokens_decoder().values()
        if (
            type(model).__name__ != "BPE"
            or any(token.lstrip or token.rstrip for token in added)  # such a token takes all the blanks beside it
            or model.continuing_subword_prefix
            or model.end_of_word_suffix
        ):
            return False
        if self._bytewise:
            steps, normalizers = {*KEEPING, "ByteLevel"}, {"NFC"}
        else:
            vocabulary = self._backend.get_vocab(with_added_tokens=False)
            if not model.byte_fallback or any(self._letter(byte) not in vocabulary for byte in range(256)):
                return False
            steps, normalizers = {*KEEPING, "Metaspace"}, {"Prepend", "Replace"}
        return all(step["type"] in steps and _keeps(step) for step in self._steps) and all(
            step["type"] in normalizers and _keeps(step) for step in self._normalizers
        )

    def _letter(self, byte: int) -> str:
        """The token that is this byte alone."""
        return ALPHABET[byte] if self._bytewise else f"<0x{byte:02X}>"

    def _as_bytes(self, token: str) -> bytes:
        """What a token of the vocabulary covers of a text."""
        if self._bytewise:
            return token.translate(BYTES).encode("latin-1", "replace")
        return bytes([int(token[3:5], 16)]) if token in self._fallbacks else self._said(token).encode()

    @cached_property
    def _fallbacks(self) -> frozenset[str]:
        return frozenset(map(self._letter, range(256)))

    def _said(self, text: str) -> str:
        return text if self._bytewise else text.replace(SPACE, " ")


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, as tokenizer.json has them."""
    state = state_of(part)
    if state.get("type") == "Sequence":
        yield from (state.get("pretokenizers") or state.get("normalizers") or [])
    elif state:
        yield state


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a step removes nothing, and replaces a blank by its sign alone."""
    if step["type"] == "Replace":
        return (step["pattern"], step["content"]) == ({"String": " "}, SPACE)
    return step.get("behavior") != "Removed" and step.get("replacement", SPACE) == SPACE
