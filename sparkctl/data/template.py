"""A chat template in transformers' Jinja environment: the text that a server makes, and whose text is where in it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sparkctl.data.marks import FILTERS, RECORDER, Generation, Instrument, Recorder, Rendering, speaks
from sparkctl.errors import SparkError

MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters of Unicode: no text means anything by them
OF_EVERY_DICT = frozenset(dir(dict))
# what the code of a template raises on data that it was not written for
FAILURES = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


class Unsound(Exception):
    """The borders in a rendering cannot be trusted: marked and unmarked rendering differ."""


class Template:
    """A compiled chat template. Raises SparkError where its syntax is wrong.

    `literals` are the strings written in it, `names` the variables that it mentions; it `speaks` where it has
    `{% generation %}` blocks.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self.source, self._special_tokens = source, special_tokens
        try:
            self._plain = _environment().from_string(source)
            environment = _environment()
            tree = environment.parse(source)
            self.literals = [n.data for n in tree.find_all(nodes.TemplateData)]
            self.literals += [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
            self.names = {n.name for n in tree.find_all(nodes.Name)}
            self.speaks = any(map(speaks, tree.find_all(nodes.CallBlock)))
            Instrument(tree)
            self._marked = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise SparkError(
                f"the chat template does not compile: line {error.lineno}: {error.message}",
                "mend it, or give another with `--chat-template FILE`",
            ) from None
        self._form = self._content_form()

    def _content_form(self) -> str:
        """How the template takes content: "both" (as it is), "strings" or "parts" alone."""
        words = ("qxone", "qxtwo")
        parts = [{"type": "text", "text": word} for word in words]
        takes = []
        for content in (" ".join(words), parts):
            try:
                text = self._plain.render(self._variables([{"role": "user", "content": content}], None, {}, False))
            except FAILURES:
                text = ""
            takes.append(all(word in text for word in words) and "'text'" not in text and '"text"' not in text)
        return "both" if all(takes) else "parts" if takes[1] else "strings"

    def _fitted(self, messages: list[Any]) -> list[Any]:
        """The messages, each an object of its own, with content in a form that the template takes, as vLLM gives it."""
        return [self._fitted_message(message) for message in messages]

    def _fitted_message(self, message: Any) -> Any:
        content = message.get("content")
        if self._form == "strings" and isinstance(content, list):
            return message | {"content": "\n".join(part["text"] for part in content)}
        if self._form == "parts" and isinstance(content, str):
            return message | {"content": [{"type": "text", "text": content}]}
        return dict(message)

    def plain(self, messages: list[Any], tools: Any, kwargs: dict[str, Any], *, prompt: bool = False) -> str:
        """The text as transformers renders it, with the generation prompt where `prompt`."""
        return self._plain.render(self._variables(self._fitted(messages), tools, kwargs, prompt))

    def render(self, messages: list[Any], tools: Any, kwargs: dict[str, Any], *, prompt: bool = False) -> Rendering:
        """The same text with its borders. Raises what the template raises, and Unsound."""
        messages = self._fitted(messages)
        variables = self._variables(messages, tools, kwargs, prompt)
        rendering, captured = self._try(variables, messages, MARKS[0])
        if rendering and not captured:
            return rendering
        plain = self._plain.render(variables)
        if rendering is None:  # the data holds the mark
            mark = next((mark for mark in MARKS if mark not in plain), None)
            rendering = self._try(variables, messages, mark)[0] if mark else None
        if rendering is None or rendering.text != plain:
            raise Unsound
        return rendering

    def _variables(self, messages: list[Any], tools: Any, kwargs: dict[str, Any], prompt: bool) -> dict[str, Any]:
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        return {**self._special_tokens, **kwargs, **given, RECORDER: None}

    def _try(self, variables: dict[str, Any], messages: list[Any], mark: str) -> tuple[Rendering | None, bool]:
        """The rendering, if its marks are whole, and whether the template could change text between them."""
        recorder = Recorder(messages, mark)
        return recorder.read(self._marked.render(variables | {RECORDER: recorder})), recorder.captured


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, but quicker where templates spend their time: `message.role` of a message, which is a dict."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in OF_EVERY_DICT:  # Jinja raises and catches an AttributeError: 1 µs
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment of transformers' apply_chat_template."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters |= FILTERS | {"tojson": _tojson}
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
