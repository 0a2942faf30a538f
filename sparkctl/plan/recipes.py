"""Recipes: choices in a TOML file that people write, checked key by key. Those that are shipped go by name."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from sparkctl.errors import UsageError
from sparkctl.manifest.schema import Choices
from sparkctl.manifest.store import describe

SUFFIX = ".toml"


class Recipe(Choices):
    """A recipe's file: any of the choices, and two keys that say what it is for."""

    description: str | None = Field(None, description="one sentence about the recipe")
    model: str | None = Field(None, description="hub id that it was written for")

    def choices(self) -> Choices:
        """What it sets."""
        return Choices(**{name: getattr(self, name) for name in Choices.model_fields})


def names() -> list[str]:
    """The recipes that are shipped."""
    shipped = (entry.name for entry in files("sparkctl.recipes").iterdir())
    return sorted(name.removesuffix(SUFFIX) for name in shipped if name.endswith(SUFFIX))


def load_recipe(name: str, base: Path | None = None) -> Recipe:
    """The recipe of that name or in that file; a relative file counts from `base`, else from here.

    Raises UsageError where there is none, or a key or a value is wrong.
    """
    file = (base or Path()) / name
    if not name.endswith(SUFFIX) and name in names():
        return parse(files("sparkctl.recipes").joinpath(name + SUFFIX).read_bytes(), name)
    if file.is_file():
        return parse(file.read_bytes(), str(file))
    near = get_close_matches(name.removesuffix(SUFFIX), names(), n=1)
    raise UsageError(
        f"no recipe `{name}`, neither by name nor as a file",
        f"`--recipe {near[0]}`" if near else f"one of {', '.join(names())}, or a file",
    )


def parse(content: bytes, where: str) -> Recipe:
    """A recipe's text, checked. Raises UsageError naming `where` and every key that is wrong."""
    try:
        values = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe `{where}` is broken: {error}", "mend the line by hand") from None
    _refuse_unknown(values, where)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(
            f"the recipe `{where}` does not hold:\n{describe(error)}", "mend the keys named above"
        ) from None


def _refuse_unknown(values: dict[str, Any], where: str) -> None:
    known = list(Recipe.model_fields)
    unknown = [key for key in values if key not in known]
    if not unknown:
        return
    near = get_close_matches(unknown[0], known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"a recipe may set {', '.join(known)}"
    named = ", ".join(f"`{key}`" for key in unknown)
    raise UsageError(f"the recipe `{where}` has the unknown key{'s' if len(unknown) > 1 else ''} {named}", hint)
