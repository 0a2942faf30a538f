"""Conversations to ids and loss mask: one rendering of the model's chat template, tokenised as a server would.

Trained is what the model has to say (`speech.py`). A token is trained where it starts inside a trained span: one that
begins before the span holds text that was given to the model, which could never produce it.

Where an answer's own text holds a stop token (`bar <|im_end|> baz`), the ids are still what a server makes of it, and
the answer is trained up to that token: what follows could never be reached, and the token itself would teach the model
to stop half-way. Such an answer has no trained end; its example is counted (`markers.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparkctl.data.fewest import Fewest
from sparkctl.data.markers import Markers
from sparkctl.data.messages import BadLine, Example
from sparkctl.data.speech import NotFound, Speech
from sparkctl.data.template import FAILURES, Rendering, Template, Unsound
from sparkctl.data.tokenizer import Loaded, load_tokenizer
from sparkctl.errors import SparkError
from sparkctl.files import sha256_bytes

CHARACTERS = 1 << 16  # tokenised at a time: enough for many cores, and 10 MB of encodings where a byte is a token


class Encoded(NamedTuple):
    """One conversation as the model sees it."""

    input_ids: np.ndarray  # int32 [L]
    trained: np.ndarray  # bool [L]
    holds_markers: bool  # a text, another's or the model's, holds the template's own markers
    assistant_turns: int


class TooLong(NamedTuple):
    """A conversation of more tokens than are wanted, which was not tokenised: of this many at least."""

    tokens: int


Rendered = tuple[Rendering, list[tuple[int, int]]]  # with its trained spans


class ChatFormat:
    """A tokenizer and a chat template."""

    def __init__(self, loaded: Loaded, template: str) -> None:
        self._tokenizer, vocabulary = loaded.backend, loaded.vocabulary
        self._stops = [self._tokenizer.token_to_id(token) for token in sorted(vocabulary.stops)]
        self._fewest = Fewest(self._tokenizer)
        self._template = Template(template, vocabulary.variables)
        self._speech = Speech(self._template, vocabulary)
        self._markers = Markers(self._template.literals, self._speech.usual.given(), vocabulary)
        self.template = template
        self.template_sha256 = sha256_bytes(template.encode())
        self.tokenizer_sha256 = loaded.sha256
        self.vocab_size = loaded.vocab_size  # highest id + 1

    @classmethod
    def load(cls, folder: Path, template_text: str | None = None) -> ChatFormat:
        """The format of the model in `folder`, with another template where one is given. Raises SparkError."""
        loaded = load_tokenizer(Path(folder))
        template = loaded.chat_template if template_text is None else template_text
        if not template:
            raise SparkError(f"the model in `{folder}` has no chat template", "give one: `--chat-template FILE`")
        return cls(loaded, template)

    def encode(self, examples: Sequence[Example], most: int | None = None) -> list[Encoded | BadLine | TooLong]:
        """Each example's ids and mask, or why it has none. All cores are used for a long list.

        most: tokens that are wanted. What is sure to have more is not tokenised; the others may still have more.
        """
        rendered = [self._measured(self._render(example), most) for example in examples]
        encodings = self._tokenized([r[0].text for r in rendered if not isinstance(r, BadLine | TooLong)])
        return [
            r if isinstance(r, BadLine | TooLong) else self._encoded(example, *r, next(encodings))
            for example, r in zip(examples, rendered, strict=True)
        ]

    def _measured(self, rendered: Rendered | BadLine, most: int | None) -> Rendered | BadLine | TooLong:
        """What was rendered, unless it is so long that to tokenise it would be in vain."""
        if most is None or isinstance(rendered, BadLine) or len(rendered[0].text) < CHARACTERS:
            return rendered
        fewest = self._fewest(rendered[0].text)
        return TooLong(fewest) if fewest > most else rendered

    def _tokenized(self, texts: list[str]) -> Iterator[Any]:
        """The encoding of each text; those of a piece of the texts exist at a time."""
        for piece in _pieces(texts):
            encodings = self._tokenizer.encode_batch(piece, add_special_tokens=False)[::-1]
            while encodings:
                yield encodings.pop()

    def tokens_as_text(self, ids: Iterable[int]) -> list[str]:
        """The text of each token; of a character that is spread over several, the last one has it."""
        from tokenizers.decoders import DecodeStream

        ids = [int(id) for id in ids]
        stream = DecodeStream(skip_special_tokens=False)
        texts = [stream.step(self._tokenizer, id) or "" for id in ids]
        whole = self._tokenizer.decode(ids, skip_special_tokens=False)
        said = "".join(texts)
        if texts and whole.startswith(said):  # bytes that never became a character
            texts[-1] += whole[len(said) :]
        return texts

    def _render(self, example: Example) -> Rendered | BadLine:
        messages, kwargs = example.messages, example.template_kwargs
        try:
            rendering = self._template.render(messages, example.tools, kwargs)
            return rendering, self._speech.spans(rendering, messages, kwargs, example.untrained)
        except SparkError as error:
            why, hint = error.message, "mend its `chat_template_kwargs`, or leave it out: `--skip-bad`"
        except FAILURES as error:
            why, hint = f"the chat template refuses it: {_said(error)}", "mend the chat, or leave it out: `--skip-bad`"
        except (NotFound, Unsound) as error:
            said = str(error) or "the template changes its own output"
            why, hint = f"what the model says in it cannot be told apart: {said}", "leave it out: `--skip-bad`"
        return BadLine(f"{example.named}: {why}", hint, example.place)

    def _encoded(self, example: Example, rendering: Rendering, spans: list[tuple[int, int]], encoding: Any) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int32)
        trained = np.zeros(len(ids), dtype=bool)
        stops = [i for id in self._stops for i in np.flatnonzero(ids == id).tolist()]
        for span in spans:
            first, end = (_first_token(encoding, at, len(rendering.text)) for at in span)
            # a stop token before the last one is in the answer's text: it and what follows are not trained
            trained[first : min((i for i in stops if first <= i < end - 1), default=end)] = True
        turns = sum(message["role"] == "assistant" for message in example.messages)
        return Encoded(ids, trained, self._markers.held_by(example), turns)


def _pieces(texts: list[str]) -> Iterator[list[str]]:
    """The texts in lists of about CHARACTERS."""
    piece: list[str] = []
    length = 0
    for text in texts:
        piece.append(text)
        length += len(text)
        if length >= CHARACTERS:
            yield piece
            piece, length = [], 0
    if piece:
        yield piece


def _first_token(encoding: Any, at: int, length: int) -> int:
    """The first token that starts at or after character `at` of a text of `length`.

    Asked of the encoding border by border: a list of every token's offsets costs as much as a tenth of tokenising.
    """
    i = next((i for i in map(encoding.char_to_token, range(at, length)) if i is not None), len(encoding))
    while i < len(encoding) and encoding.token_to_chars(i)[0] < at:
        i += 1
    return i


def _said(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
