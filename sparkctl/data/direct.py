"""A Qwen tokenizer read without transformers: the same one, without the seconds and the memory that its import takes.

Classes of transformers build a tokenizer's pipeline anew from its vocabulary. Where tokenizer.json holds that very
pipeline, and tokenizer_config.json nothing that would change it, reading the file gives the same ids. Whatever is not
known here to be so is left to transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AS_FILED = "TokenizersBackend"  # the class that builds nothing; PreTrainedTokenizerFast is its older name
CLASSES = {  # the class that transformers has for a type of model, and others that it takes from the file
    "qwen2": {"Qwen2Tokenizer"},
    "qwen3": {"Qwen2Tokenizer", AS_FILED},
    "qwen3_5": {"Qwen3_5Tokenizer", AS_FILED},
    "qwen3_5_text": {"Qwen3_5Tokenizer", AS_FILED},
}
LETTER = {"Qwen2Tokenizer": r"\p{L}", "Qwen3_5Tokenizer": r"[\p{L}\p{M}]"}  # with their marks, or without
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?LETTER+|\p{N}| ?[^\sLETTERS\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULTS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")  # of both classes
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
HARMLESS = {  # keys that change no id of a text to which no special token is added
    "add_bos_token", "add_eos_token", "added_tokens_decoder", "additional_special_tokens", "backend", "chat_template",
    "clean_up_tokenization_spaces", "errors", "extra_special_tokens", "is_local", "model_max_length", "padding_side",
    "processor_class", "tokenizer_class",
}  # fmt: skip
FALSE = {"add_prefix_space", "split_special_tokens"}  # keys that must not be true
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Direct:
    """What transformers would have made of the files."""

    backend: Tokenizer
    variables: dict[str, str]  # bos_token, eos_token, …
    chat_template: Any  # a text, named texts, or None
    name: str  # of the class


def load_directly(folder: Path) -> Direct | None:
    """The tokenizer in `folder`, or None where it takes transformers to know. Raises what tokenizers raises."""
    config, kind = read_table(folder / "tokenizer_config.json"), read_table(folder / "config.json").get("model_type")
    given = str(config.get("tokenizer_class"))
    name = AS_FILED if given == "PreTrainedTokenizerFast" else given.removesuffix("Fast")
    tokens = _tokens(config, {} if name == AS_FILED else DEFAULTS)
    if name not in CLASSES.get(str(kind), ()) or tokens is None or not _is_plain(config, folder):
        return None
    from tokenizers import Tokenizer

    variables, extra = tokens
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = {id: {flag: getattr(token, flag) for flag in FLAGS} for id, token in _added(backend).items()}
    special = {token["content"] for token in added.values() if token["special"]}
    filed = config.get("added_tokens_decoder")
    if filed is not None and {int(id): token for id, token in filed.items()} != added:
        return None
    if not {*variables.values(), *extra} <= special or not (name == AS_FILED or _is_built_as(backend, name)):
        return None
    return Direct(backend, variables, _template(config, folder), name)


def read_table(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_plain(config: dict[str, Any], folder: Path) -> bool:
    """Whether the files hold nothing that is not known here."""
    for key, value in config.items():
        token = key in NAMED or (key.endswith("_token") and isinstance(value, str))
        if not (key in HARMLESS or token or (key in FALSE and not value)):
            return False
    older = [name for name in ("special_tokens_map.json", "added_tokens.json") if (folder / name).exists()]
    return "added_tokens_decoder" in config or not older  # with it, transformers reads neither


def _tokens(config: dict[str, Any], defaults: dict[str, str]) -> tuple[dict[str, str], list[str]] | None:
    """The named special tokens and the others; None where they have a form that is not known here."""
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
    named = {key: value for key, value in {**defaults, **config}.items() if key in NAMED}
    named |= {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    if isinstance(extra, dict):
        named, extra = named | extra, []
    texts: dict[str, Any] = {
        key: token.get("content") if isinstance(token, dict) else token
        for key, token in named.items()
        if token is not None
    }
    if not all(isinstance(text, str) for text in (*texts.values(), *extra)):
        return None
    return texts, extra


def _added(backend: Tokenizer) -> dict[int, Any]:
    return backend.get_added_tokens_decoder()


def _is_built_as(backend: Tokenizer, name: str) -> bool:
    """Whether the file's pipeline is the one that this class builds, and its added tokens those that it appends."""
    letter = LETTER[name]
    split = SPLIT.replace("LETTERS", letter.strip("[]")).replace("LETTER", letter)
    model, first = backend.model, backend.get_vocab_size(with_added_tokens=False)
    steps = state_of(backend.pre_tokenizer).get("pretokenizers", [])
    cut = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return (
        state_of(backend.normalizer) == {"type": "NFC"}
        and len(steps) == 2
        and steps[0] == cut
        and {key: value for key, value in steps[1].items() if key != "trim_offsets"} == bytewise
        and state_of(backend.decoder).get("type") == "ByteLevel"
        and type(model).__name__ == "BPE"
        and not any((model.dropout, model.unk_token, model.continuing_subword_prefix, model.end_of_word_suffix))
        and not any((model.fuse_unk, model.byte_fallback, model.ignore_merges))
        and sorted(_added(backend)) == list(range(first, first + len(_added(backend))))
    )


def state_of(part: Any) -> dict[str, Any]:
    """A normalizer, a pre-tokenizer or a decoder as tokenizer.json has it; empty where there is none."""
    return json.loads(part.__getstate__()) if part is not None else {}


def _template(config: dict[str, Any], folder: Path) -> Any:
    """The chat template, as transformers looks for it: a file, files, or the config's."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if texts:
        return texts["default"] if set(texts) == {"default"} else texts
    filed = config.get("chat_template")
    return {entry["name"]: entry["template"] for entry in filed} if isinstance(filed, list) else filed
