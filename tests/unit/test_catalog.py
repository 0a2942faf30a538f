"""The published shapes: full enough for transformers, and the table that is known of them."""

from __future__ import annotations

import json

import pytest

from sparkctl.errors import UsageError
from sparkctl.hardware.shape import Shape
from sparkctl.model import catalog

# layers of attention, of GatedDeltaNet, queries, keys, values of GatedDeltaNet, tied
KNOWN = {
    "qwen3.5-0.8b": (6, 18, 2048, 512, 2048, True),
    "qwen3.5-2b": (6, 18, 2048, 512, 2048, True),
    "qwen3.5-4b": (8, 24, 4096, 1024, 4096, True),
    "qwen3.5-9b": (8, 24, 4096, 1024, 4096, False),
    "qwen3.5-27b": (16, 48, 6144, 1024, 6144, False),
}


def test_names() -> None:
    assert set(catalog.NAMES) == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_shapes(name: str) -> None:
    shape = Shape.from_config(catalog.config(name), 0)
    assert KNOWN[name] == (
        shape.attention_layers, shape.rule_layers, shape.queries, shape.keys, shape.rule_values, shape.tied,
    )  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_transformers_takes_every_key(name: str) -> None:
    """What it writes back holds all that went in; `full_attention_interval` it turns into layer_types."""
    from transformers import Qwen3_5Config

    given = catalog.config(name)
    layers = given["text_config"].pop("layer_types")
    written = Qwen3_5Config(**given).to_dict()
    assert written["text_config"]["layer_types"] == layers
    given["text_config"].pop("full_attention_interval")
    for part in ("text_config", "vision_config"):
        mine = given.pop(part)
        assert {key: written[part].get(key) for key in mine} == mine
    assert {key: written.get(key) for key in given} == given


def test_a_copy_of_the_callers_own() -> None:
    before = json.dumps(catalog.config("qwen3.5-2b"))
    catalog.config("qwen3.5-2b")["text_config"]["rope_parameters"]["rope_theta"] = 1
    assert json.dumps(catalog.config("qwen3.5-2b")) == before


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError, match=r"qwen3.5-3b") as raised:
        catalog.config("qwen3.5-3b")
    assert "qwen3.5-4b" in raised.value.message
    assert raised.value.hint == "give `--shape qwen3.5-2b`"
