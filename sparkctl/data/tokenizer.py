"""The model's tokenizer and chat template as a server loads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.data.direct import HARMLESS, NAMED, Direct, load_directly, read_table
from sparkctl.errors import SparkError, memory_ended
from sparkctl.files import sha256_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer


FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip
CACHED_WORDS = 1000  # by default 10,000, which fill 20 MB as a file is read and make nothing quicker


@dataclass(frozen=True)
class Vocabulary:
    """The texts of tokens that are no ordinary text."""

    variables: dict[str, str]  # bos_token, eos_token, …, as the template knows them
    stops: frozenset[str]  # where a server stops
    special: frozenset[str]  # special tokens, with the stops
    added: frozenset[str]  # added ones, special or not: `<think>`


@dataclass(frozen=True)
class Loaded:
    """A fast tokenizer and its model's chat template."""

    backend: Tokenizer
    vocabulary: Vocabulary
    chat_template: str | None
    sha256: str
    vocab_size: int  # highest id + 1


def load_tokenizer(folder: Path) -> Loaded:
    """The tokenizer in `folder`. Raises SparkError where there is none that is fast."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise SparkError(
            f"`{folder}` has no `tokenizer.json`",
            "save the model's fast tokenizer there: `AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER)`",
        )
    try:
        found = load_directly(folder) or _load_with_transformers(folder)
    except Exception as error:  # the libraries raise their own, the standard and bare exceptions of Rust
        if memory_ended(error):
            raise
        raise _unloadable(folder, error) from None
    backend = found.backend
    backend.no_truncation()
    backend.no_padding()
    if resize := getattr(backend.model, "_resize_cache", None):
        resize(CACHED_WORDS)
    backend.post_processor = None  # it adds special tokens, which a rendered chat has, and trims spaces off offsets
    vocabulary = _vocabulary(folder, backend, found.variables)
    return Loaded(
        backend=backend,
        vocabulary=vocabulary,
        chat_template=_one_template(found.chat_template or _template_of_processor(folder), folder),
        sha256=_digest(file, found.name, vocabulary),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
    )


def file_digests(folder: Path) -> dict[str, str]:
    """Of the files that a tokenizer and its stop tokens are read from, without config.json: equal ones tell, without
    loading it, that it is the same. Others need not be another tokenizer's."""
    return {name: sha256_file(folder / name) for name in FILES if (folder / name).is_file()}


def _unloadable(folder: Path, error: Exception) -> SparkError:
    """What keeps the tokenizer from being loaded: its own files or config.json, which transformers reads first."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    if str(error) == _refusal_of_config(folder):  # of a strict class the validator's name, then what it says
        why = said[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ").rstrip(".")
        return SparkError(
            f"`{folder / 'config.json'}` is not one that transformers takes: {why[:1].lower()}{why[1:]}",
            "take the config.json that was published with the weights",
        )
    return SparkError(
        f"the tokenizer in `{folder}` cannot be loaded: {said[0]}",
        "take the tokenizer files from the model's publisher again",
    )


def _refusal_of_config(folder: Path) -> str | None:
    """What transformers says of a config.json that it does not take; None of one that it takes, or where none is."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        return None
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as refusal:  # its classes stumble in whatever way a value leads to
        return str(refusal)
    return None


def _load_with_transformers(folder: Path) -> Direct:
    """As a server loads it: a class of transformers may build something else than tokenizer.json says."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = tokenizer.split_special_tokens
    variables = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return Direct(backend, variables, tokenizer.chat_template, type(tokenizer).__name__)


def _digest(file: Path, name: str, vocabulary: Vocabulary) -> str:
    """Of all that ids and mask depend on beside the template.

    That is the file, the class that reads it, the special and added tokens, which may come from other files, those at
    which a server stops, and whatever else the tokenizer's config sets.
    """
    digest = hashlib.sha256(file.read_bytes())
    sets = [sorted(tokens) for tokens in (vocabulary.stops, vocabulary.special, vocabulary.added)]
    config = read_table(file.parent / "tokenizer_config.json")
    other = {key: value for key, value in config.items() if key not in HARMLESS and key not in NAMED}
    digest.update(json.dumps([name, vocabulary.variables, *sets, other], sort_keys=True).encode())
    return digest.hexdigest()


def _vocabulary(folder: Path, backend: Tokenizer, variables: dict[str, str]) -> Vocabulary:
    stops = {variables["eos_token"]} if "eos_token" in variables else set()
    for id in _stop_ids(folder):
        token = backend.id_to_token(id)
        stops |= {token} if token else set()
    added = backend.get_added_tokens_decoder().values()
    special = stops | {token.content for token in added if token.special}
    return Vocabulary(variables, frozenset(stops), frozenset(special), frozenset(token.content for token in added))


def _stop_ids(folder: Path) -> Iterator[int]:
    """The ids at which a server stops beside the tokenizer's end token."""
    for name in ("generation_config.json", "config.json"):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for table in (config, config.get("text_config") or {}):
            ids = table.get("eos_token_id")
            yield from (id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int) and id >= 0)


def _template_of_processor(folder: Path) -> Any:
    """The template that older multimodal models keep with their processor; a server falls back on it."""
    try:
        return json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _one_template(template: Any, folder: Path) -> str | None:
    """The model's template; of several named ones those that transformers chooses from, as one text."""
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        names = ", ".join(f"`{name}`" for name in sorted(template))
        raise SparkError(
            f"`{folder}` has the chat templates {names}, and none is the default",
            "choose one with `--chat-template FILE`",
        )
    default, tools = template["default"], template.get("tool_use")
    if tools is None or tools == default:
        return default
    # `+` keeps the white space around a tag; Jinja drops one newline at a template's end
    tools, default = tools.removesuffix("\n"), default.removesuffix("\n")
    return f"{{% if tools is not none +%}}{tools}{{%+ else +%}}{default}{{%+ endif +%}}"
