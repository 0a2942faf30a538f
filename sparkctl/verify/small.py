"""Small models for leak tests, made on the spot: an architecture's own head sizes and kinds of layers, everything else
as small as can be.

A leak shows best where nothing else can leak: one model has attention alone, one the convolution of GatedDeltaNet
alone (its recurrence forgets at once), one the recurrence alone (the convolution reads its own token only), and one
has all of it. What forgets slowly has A = 0.05: with a fast decay a state that is not reset would be gone before it
is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparkctl.errors import UsageError
from sparkctl.hardware.machine import this_machine
from sparkctl.hardware.shape import head_dim
from sparkctl.manifest.schema import Estimates, Lora, Machine, MemoryTerms, PlanTable
from sparkctl.manifest.table import EngineName, Mode
from sparkctl.model.inspect import text_part
from sparkctl.model.load import silence

PARTS = ("attention", "convolution", "recurrence", "whole model")
SLOW, AT_ONCE = -3.0, 6.0  # A_log: A = 0.05; A = 400, whose decay is zero in fp32
WINDOW = 16
FULL, LINEAR, SLIDING = "full_attention", "linear_attention", "sliding_attention"  # transformers' names
SIZES: dict[str, Any] = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1,
    linear_num_key_heads=1, linear_num_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    bos_token_id=None, eos_token_id=None, pad_token_id=None, mtp_num_hidden_layers=0,
)  # fmt: skip


def parts_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Which parts a model of this config.json has."""
    return PARTS if has_rule(whole_config(config)) else PARTS[:1]


def whole_config(config: dict[str, Any]) -> Any:
    """transformers' configuration of the language model, with what config.json leaves to its type's defaults.

    Raises UsageError where transformers makes none.
    """
    with _by_transformers(_kind(config)):
        return _made(_kind(config), _stated(config))


def windows(real: Any) -> list[int | None]:
    """Each form of attention that its layers use, in a small model: WINDOW with a sliding window, None without."""
    declared = hasattr(type(real), "sliding_window")  # what config.json says beside its type's fields no layer reads
    window = WINDOW if declared and real.sliding_window else None
    kinds = getattr(real, "layer_types", None) or [SLIDING]  # a type without kinds of layers has its window in each
    return list(dict.fromkeys(window if kind == SLIDING else None for kind in kinds if kind != LINEAR))


def write_model(folder: Path, config: dict[str, Any], part: str) -> Path:
    """A checkpoint of the architecture in config.json, random weights, in which only `part` could leak.

    Raises UsageError where transformers makes no such model from it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    real = whole_config(config)
    torch.manual_seed(0)
    with _by_transformers(_kind(config)):
        settings = _stated(config) | {name: size for name, size in SIZES.items() if hasattr(real, name)}
        settings |= _heads(real, settings) | _layers(real, part)
        if WINDOW in windows(real):
            settings["sliding_window"] = WINDOW
        model: Any = AutoModelForCausalLM.from_config(_made(_kind(config), settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name.split(".")[-2:], parameter, part)
    with silence():
        model.to(torch.bfloat16).save_pretrained(folder)
        _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A word for each id: Unsloth loads no model without a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(id): id for id in range(SIZES["vocab_size"])}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1", pad_token="2").save_pretrained(folder)


def _fill(name: list[str], parameter: Any, part: str) -> None:
    if name[-1] == "A_log":
        parameter.fill_(AT_ONCE if part == "convolution" else SLOW)
    elif name[-1] == "dt_bias":
        parameter.fill_(1.0)
    elif name[0] == "conv1d" and part == "recurrence":
        parameter.zero_()
        parameter[..., -1] = 1.0
    elif name[0] == "conv1d":
        parameter.normal_(std=0.5)
    elif parameter.ndim > 1:
        parameter.normal_(std=1.0 if "embed" in name[0] else parameter.shape[-1] ** -0.5)


def _kind(config: dict[str, Any]) -> str:
    return str(text_part(config).get("model_type", config.get("model_type")))


def _stated(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in text_part(config).items() if k not in ("model_type", "dtype", "torch_dtype")}


def _made(kind: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **settings)


@contextmanager
def _by_transformers(kind: str) -> Iterator[None]:
    """A class that we know nothing of may fail in any way on sizes that are not its own."""
    try:
        with silence():
            yield
    except Exception as error:
        raise UsageError(
            f"no small model of type `{kind}` can be made to look for leaks ({error})",
            "`sparkctl verify leaks`, without a run, looks at Qwen3.5's architecture",
        ) from error


def has_rule(real: Any) -> bool:
    """Whether it is a hybrid, with GatedDeltaNet."""
    return hasattr(real, "linear_key_head_dim")


def _heads(real: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The head dim where config.json leaves it to its type; as D / heads too, which some types take in any case."""
    if settings.get("head_dim"):
        return {}
    dim = head_dim(real.to_dict())
    return {"head_dim": dim, "hidden_size": SIZES["num_attention_heads"] * dim}


def _layers(real: Any, part: str) -> dict[str, Any]:
    """Two layers or more, of the kinds that the part needs; without a delta rule one of each kind that there is."""
    if not has_rule(real):
        kinds = list(dict.fromkeys(getattr(real, "layer_types", None) or []))
        kinds = 2 * kinds if len(kinds) == 1 else kinds
        return {"num_hidden_layers": len(kinds), "layer_types": kinds} if kinds else {"num_hidden_layers": 2}
    kinds = {"attention": [FULL, FULL], "whole model": [LINEAR, LINEAR, FULL]}.get(part, [LINEAR, LINEAR])
    return {"num_hidden_layers": len(kinds), "layer_types": kinds}


def plan_for(engine: EngineName, mode: Mode, machine: Machine | None = None) -> PlanTable:
    """A plan for such a model: what an engine reads of one, the rest without meaning."""
    zero = dict.fromkeys(MemoryTerms.model_fields, 0)
    estimates = Estimates(
        steps=1, seconds=0, tokens_per_second=1, throughput_from="none", peak_memory=0, memory=MemoryTerms(**zero),
        disk=0, trainable_parameters=0,
    )  # fmt: skip
    return PlanTable(
        mode=mode, engine=engine, lora=Lora(r=8, alpha=8) if mode == "lora" else None, tokens_per_step=512,
        pack_length=512, gradient_accumulation=1, epochs=1, steps=1, learning_rate=1e-4, schedule="cosine",
        warmup_steps=0, min_lr_fraction=0, weight_decay=0, max_grad_norm=1, checkpointing=False, save_every=1, keep=1,
        seed=0, estimates=estimates, machine=machine or this_machine(), made_from="verify",
    )  # fmt: skip
