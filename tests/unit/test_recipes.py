"""Recipes: those that are shipped hold, and what is wrong in one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkctl.errors import UsageError
from sparkctl.manifest.schema import Choices
from sparkctl.plan.recipes import load_recipe, names

SIZES = ("0.8b", "2b", "4b", "9b", "27b")


def test_one_for_each_size_and_mode_and_the_demo() -> None:
    assert set(names()) == {f"qwen3.5-{size}-{mode}" for size in SIZES for mode in ("lora", "full")} | {"demo"}


@pytest.mark.parametrize("name", names())
def test_what_is_shipped_holds(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    assert recipe.mode in ("lora", "full")
    assert recipe.choices().model_dump(exclude_none=True).keys() <= Choices.model_fields.keys()
    if name != "demo":
        _, size, mode = name.rsplit("-", 2)
        assert recipe.mode == mode
        assert recipe.model
        assert recipe.model.lower() == f"qwen/qwen3.5-{size}"
        assert (recipe.lora_r == 128) == (mode == "lora")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("epochs = 7\n")
    assert load_recipe(str(tmp_path / "mine.toml")).epochs == 7
    assert load_recipe("mine.toml", base=tmp_path).choices() == Choices(epochs=7)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("epoch = 3\n", "unknown key `epoch`", "`epochs`"),
        ("zzz = 1\nyyy = 2\n", "unknown keys `zzz`, `yyy`", "tokens_per_step"),
        ("epochs = 0\n", "epochs: ", "mend"),
        ('epochs = "three"\nlora_r = -1\n', "lora_r: ", "mend"),
        ("epochs = = 3\n", "is broken", "mend"),
        ("[plan]\nepochs = 3\n", "unknown key `plan`", ""),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str, hint: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        load_recipe(str(path))
    assert message in raised.value.message
    assert "mine.toml" in raised.value.message
    assert hint in (raised.value.hint or "")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"epochs = 3 # \xff\n")
    with pytest.raises(UsageError, match="is broken"):
        load_recipe(str(tmp_path / "mine.toml"))


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UsageError) as near:
        load_recipe("qwen3.5-2b-lor")
    assert "qwen3.5-2b-lora" in (near.value.hint or "")
    with pytest.raises(UsageError) as far:
        load_recipe("zzzz")
    assert all(name in (far.value.hint or "") for name in names())
