"""Which part of a rendered conversation the model has to say.

A message's region is known from the rendering (`template.py`). In an assistant's region the model begins to speak
where the generation prompt ends, and stops after its end-of-turn token. Both are constants of the template, learnt
from small conversations of known words (`probes.py`), once for each set of template arguments:

    header    what the generation prompt adds: `<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n`. A region that does
              not begin with all of it (Qwen drops earlier thinking, and the empty block with it) begins as some
              answer to the known words did: `<|im_start|>assistant\\n`.
    ending    the end-of-turn token and what follows it in the region: `<|im_end|>` and `\\n`.

No text is searched for markers: headers and endings are compared at a region's two ends.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from sparkctl.data.probes import FIRST, Frame, learn
from sparkctl.data.template import Rendering, Template
from sparkctl.data.tokenizer import Vocabulary

FRAMES = 1000  # sets of template arguments whose constants are kept


class NotFound(Exception):
    """Where the model's words begin or end cannot be told."""


class Speech:
    """Finds the trained spans of renderings of one template. Raises SparkError where it renders no small chat."""

    def __init__(self, template: Template, vocabulary: Vocabulary) -> None:
        self._template, self._vocabulary = template, vocabulary
        self._frames: dict[str, Frame] = {}
        self.usual = self.frame({})

    def frame(self, kwargs: dict[str, Any]) -> Frame:
        """What the template's constants are under these arguments."""
        used = {name: value for name, value in kwargs.items() if name in self._template.names}
        key = json.dumps(used, sort_keys=True)
        if key not in self._frames:
            if len(self._frames) >= FRAMES:
                self._frames = {}
            self._frames[key] = learn(self._template, used, self._vocabulary)
        return self._frames[key]

    def spans(
        self,
        rendering: Rendering,
        messages: list[Any],
        kwargs: dict[str, Any],
        untrained: Collection[int] = (),
    ) -> list[tuple[int, int]]:
        """The trained spans of the text, as characters; of messages `untrained` (from 0), and of those of which the
        template prints nothing, none. Raises NotFound."""
        frame, regions = self.frame(kwargs) if kwargs else self.usual, rendering.regions()
        if frame.mixed and not self._template.speaks:
            self._check_unmixed(frame, messages)
        found: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number not in regions or number in untrained:
                continue
            if not says_something(message):
                continue
            if len(regions[number]) > 1:
                raise NotFound(f"the template renders message {number + 1} in pieces")
            start, end = regions[number][0]
            for call in message.get("tool_calls", ()):
                if rendering.text.find(call["function"]["name"], start, end) < 0:
                    raise NotFound(f"the template leaves out the tool call of message {number + 1}")
            before = messages[number - 1]["role"] if number else FIRST
            begin = start + _header(rendering.text[start:end], frame, before, number)
            bare, stop = self._stop(rendering.text, start, end, frame, number)
            if not rendering.text[begin:bare].strip():  # of reasoning alone, say, a template may print nothing
                continue
            stop = max(begin, stop)
            found += self._spoken(rendering, begin, stop) if self._template.speaks else [(begin, stop)]
        return found

    def _check_unmixed(self, frame: Frame, messages: list[Any]) -> None:
        for number, message in enumerate(messages):
            if message["role"] in frame.mixed:
                raise NotFound(f"the template renders message {number + 1} ({message['role']}) inside an answer")

    def _stop(self, text: str, start: int, end: int, frame: Frame, number: int) -> tuple[int, int]:
        """(where its words end, where what it has to say ends)."""
        for ending in frame.endings:
            if text.endswith(ending.said + ending.after, start, end):
                stop = end - len(ending.after)
                if not ending.said and not ending.after:  # a template that ends a turn where the next begins
                    stop += max(
                        (len(token) for token in self._vocabulary.stops if text.startswith(token, end)), default=0
                    )
                return end - len(ending.said + ending.after), stop
        raise NotFound(f"message {number + 1} does not end as answers do")

    def _spoken(self, rendering: Rendering, begin: int, stop: int) -> Iterator[tuple[int, int]]:
        """What `{% generation %}` encloses of a span, with the end-of-turn token where it is left just outside."""
        for start, end in rendering.spoken:
            start, end = max(start, begin), min(end, stop)
            if start < end:
                yield start, stop if rendering.text[end:stop].strip() in self._vocabulary.special else end


def says_something(message: dict[str, Any]) -> bool:
    """Whether a turn has text, reasoning or a tool call."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return bool(text.strip() or str(message.get("reasoning_content") or "").strip() or message.get("tool_calls"))


def _header(region: str, frame: Frame, before: str, number: int) -> int:
    """The length of what the model was given of an answer's region."""
    for header in frame.headers.get(before, frame.headers["user"]):
        if region.startswith(header):
            return len(header)
    raise NotFound(f"message {number + 1} does not begin as answers do")
