"""What `sparkctl verify leaks` found: a row a part, and what that comes to for the user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape

from sparkctl.cli import console
from sparkctl.cli.verdicts import columns

if TYPE_CHECKING:
    from sparkctl.verify.leaks import Finding


def as_text(found: list[Finding]) -> Group:
    """What was looked at, whether it leaks, whether a leak would have been seen; then what that comes to."""
    table = columns("what", "part", "leak", "planted leak")
    for one in found:
        table.add_row(escape(one.subject), one.part, _leak(one), _planted(one))
    pairs = [("sparkctl", _engines(found))] + ([("transformers", _stack(found))] if leaking_calls(found)[1] else [])
    return Group(table, "", console.rows("verdict", *pairs))


def leaking_calls(found: list[Finding]) -> tuple[list[str], list[str]]:
    """Ways to call the installed transformers: (those that leak somewhere, all that were computed)."""
    stack = [one for one in found if not one.judged and one.refused is None]
    calls = list(dict.fromkeys(one.subject for one in stack))
    return [call for call in calls if any(one.leaks for one in stack if one.subject == call)], calls


def _engines(found: list[Finding]) -> str:
    failed = list(dict.fromkeys(one.subject for one in found if one.failed))
    if failed:
        return f"FAILS: {', '.join(failed)}; do not train on it here"
    names = list(dict.fromkeys(f.subject for f in found if f.judged and f.refused is None and f.subject != "operator"))
    tried = any(one.subject == "operator" and one.refused is None for one in found)
    return f"holds: in its {'operators and in its ' * tried}{' and '.join(names)} no document of a pack sees another"


def _stack(found: list[Finding]) -> str:
    leaking, calls = leaking_calls(found)
    if not leaking:
        return "holds, called in any of these ways"
    which = "whichever way it is called" if leaking == calls else f"called with {_ways(leaking)}"
    safe = [call for call in calls if call not in leaking]
    instead = f"call it with {_ways(safe)}" if safe else "give it one document a row, padded on the right"
    version = calls[0].partition(", ")[0].removeprefix("transformers ")
    return (
        f"{version} LEAKS between packed documents on this machine, {which}. "
        f"Trainings here are not concerned: no engine packs through it. In a script of your own that packs, {instead}"
    )


def _ways(calls: list[str]) -> str:
    return " or ".join(call.partition(", ")[2] for call in calls)


def _leak(one: Finding) -> str:
    if one.refused is not None:
        return f"not computed: {escape(one.refused)}"
    if one.leaks:
        return f"[{'red' if one.judged else 'yellow'}]leaks {one.leak:.1e}[/]"
    return "none, to the bit" if one.leak == 0 else f"none beyond its own {one.noise:.1e}"


def _planted(one: Finding) -> str:
    if one.planted is None:
        return ""
    return "[red]not seen[/]" if one.blind else f"seen ({one.planted:.1e})"
