"""Marks in a rendering: whose text is where, written by the template itself, and taken out again.

The template's syntax tree is changed, not its text: each `for` loop tells, at the start of every turn and at its end,
which of the messages it is at: the loop's item, or what a loop over numbers takes by its number, `messages[i]`. What it
tells are two characters in the output. So the text is that of the template, and a message's words cannot move a border,
whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes

BEGIN, END, SPEAK, SILENCE = "sparkctl_begin", "sparkctl_end", "sparkctl_speak", "sparkctl_silence"  # filters
RECORDER = "sparkctl_recorder"  # the variable that holds a rendering's Recorder
NUMBERS, MOST = 0xF0000, 0xFFFE  # private use: a mark's number, modulo MOST
CAPTURES = (nodes.Macro, nodes.FilterBlock, nodes.AssignBlock, nodes.Block)  # their output becomes a value


@dataclass(frozen=True)
class Rendering:
    """The text, its segments (start, end, message number or None), and what `{% generation %}` encloses."""

    text: str
    segments: list[tuple[int, int, int | None]]
    spoken: list[tuple[int, int]]

    def regions(self) -> dict[int, list[tuple[int, int]]]:
        """Each message's text: one region, or more where a template renders it in pieces."""
        found: dict[int, list[tuple[int, int]]] = {}
        for start, end, owner in self.segments:
            if owner is None or start == end:
                continue
            pieces = found.setdefault(owner, [])
            if pieces and pieces[-1][1] == start:
                pieces[-1] = (pieces[-1][0], end)
            else:
                pieces.append((start, end))
        return found


class Recorder:
    """Writes numbered marks into one rendering, and reads them again."""

    def __init__(self, messages: list[Any], mark: str) -> None:
        self._numbers = {id(message): number for number, message in enumerate(messages)}
        self._mark = mark
        self._events: list[tuple[str, int, int]] = []  # kind, loop, message number
        self._looping: set[int] = set()
        self.captured = False  # whether a mark was written into output that the template can change

    def begin(self, item: Any, loop: int, captured: bool) -> str:
        number = self._numbers.get(id(item))
        if number is None:
            return ""
        self._looping.add(loop)
        return self.tell(BEGIN, loop, number, captured)

    def end(self, loop: int) -> str:
        if loop not in self._looping:
            return ""
        self._looping.discard(loop)
        return self.tell(END, loop, 0, False)

    def tell(self, kind: str, loop: int, number: int, captured: bool) -> str:
        self.captured |= captured
        self._events.append((kind, loop, number))
        return self._mark + chr(NUMBERS + (len(self._events) - 1) % MOST)

    def read(self, marked: str) -> Rendering | None:
        """The rendering, or None where the marks are not all there, once, in their order."""
        pieces = marked.split(self._mark)
        if len(pieces) != len(self._events) + 1:
            return None
        at = len(pieces[0])
        segments: list[tuple[int, int, int | None]] = []
        spoken: list[tuple[int, int]] = []
        opened: list[int] = []
        stack: list[tuple[int, int]] = []  # (loop, message number)
        for i, (kind, loop, number) in enumerate(self._events, start=1):
            piece = pieces[i]
            if not piece or ord(piece[0]) != NUMBERS + (i - 1) % MOST:
                return None
            pieces[i] = piece = piece[1:]
            if kind == SPEAK:
                opened.append(at)
            elif kind == SILENCE:
                spoken.append((opened.pop(), at))
            else:
                while stack and any(entry[0] == loop for entry in stack):
                    stack.pop()
                if kind == BEGIN:
                    stack.append((loop, number))
            if stack and piece:
                segments.append((at, at + len(piece), stack[-1][1]))
            at += len(piece)
        return Rendering("".join(pieces), segments, spoken)


def _begin(item: Any, recorder: Recorder | None, loop: int, captured: bool) -> str:
    return recorder.begin(item, loop, captured) if recorder else ""


def _end(loop: int, recorder: Recorder | None) -> str:
    return recorder.end(loop) if recorder else ""


def _speak(captured: bool, recorder: Recorder | None) -> str:
    return recorder.tell(SPEAK, 0, 0, captured) if recorder else ""


def _silence(captured: bool, recorder: Recorder | None) -> str:
    return recorder.tell(SILENCE, 0, 0, captured) if recorder else ""


FILTERS = {BEGIN: _begin, END: _end, SPEAK: _speak, SILENCE: _silence}


class Instrument:
    """Adds the telling calls to a tree. Each says whether its output is captured: in a macro, say, the template could
    change what the marks enclose, so that a rendering with such marks is compared with the plain one."""

    def __init__(self, tree: nodes.Template) -> None:
        self._loops = 0
        tree.body = self._body(tree.body, captured=False)

    def _body(self, body: list[nodes.Node], captured: bool) -> list[nodes.Node]:
        return list(chain.from_iterable(self._statement(node, captured) for node in body))

    def _statement(self, node: nodes.Node, captured: bool) -> Iterator[nodes.Node]:
        inside = captured or isinstance(node, CAPTURES) or (isinstance(node, nodes.CallBlock) and not speaks(node))
        if isinstance(node, nodes.CallBlock) and speaks(node):
            node.body[0] = _tell(SPEAK, nodes.Const(captured), [], node.lineno)
        for name in ("body", "else_"):
            if isinstance(getattr(node, name, None), list):
                setattr(node, name, self._body(getattr(node, name), inside))
        for branch in getattr(node, "elif_", ()):
            branch.body = self._body(branch.body, inside)
        yield node
        if isinstance(node, nodes.For) and isinstance(node.target, nodes.Name) and _prints(node):
            self._loops += 1
            loop = nodes.Const(self._loops)
            node.body[:0] = [_tell(BEGIN, item, [loop, nodes.Const(captured)], node.lineno) for item in _items(node)]
            yield _tell(END, loop, [], node.lineno)


def _items(node: nodes.For) -> Iterator[nodes.Expr]:
    """What may be a message at each turn of a loop."""
    assert isinstance(node.target, nodes.Name)
    name = node.target.name
    yield nodes.Name(name, "load")
    if not (
        isinstance(node.iter, nodes.Call) and isinstance(node.iter.node, nodes.Name) and node.iter.node.name == "range"
    ):
        return
    own = {n.name for n in node.find_all(nodes.Name) if n.ctx == "store"}
    lists = {
        n.node.name
        for n in node.find_all(nodes.Getitem)
        if isinstance(n.node, nodes.Name) and isinstance(n.arg, nodes.Name) and n.arg.name == name
    }
    for taken in sorted(lists - own):  # a list that the loop makes itself is none yet
        known = nodes.Test(nodes.Name(taken, "load"), "defined", [], [], None, None)
        at = nodes.Getitem(nodes.Name(taken, "load"), nodes.Name(name, "load"), "load")
        yield nodes.CondExpr(known, at, nodes.Const(None))


def _tell(filter: str, value: nodes.Expr, arguments: list[nodes.Expr], line: int) -> nodes.Output:
    recorder = nodes.Name(RECORDER, "load")  # a filter, since the sandbox looks at every call: 3 µs
    return nodes.Output([nodes.Filter(value, filter, [recorder, *arguments], [], None, None)], lineno=line)


def _prints(node: nodes.Node) -> bool:
    return next(node.find_all((nodes.Output, nodes.CallBlock)), None) is not None


def speaks(node: nodes.CallBlock) -> bool:
    """Whether the node is a `{% generation %}` block."""
    first = node.body[0] if node.body else None
    told = first.nodes[0] if isinstance(first, nodes.Output) else None
    return isinstance(told, nodes.Filter) and told.name == SPEAK


class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: a scope of its own, as in transformers, whose output is spoken."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        body = [_tell(SPEAK, nodes.Const(False), [], line), *body, _tell(SILENCE, nodes.Const(False), [], line)]
        return nodes.CallBlock(self.call_method("_said"), [], [], body, lineno=line)

    def _said(self, caller: Any) -> str:
        return caller()
