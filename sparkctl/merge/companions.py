"""The files of a base checkpoint that come along byte for byte: configs, tokenizer, template, processors, licence."""

from __future__ import annotations

import json
from pathlib import Path

from sparkctl.files import naming

TEMPLATE = "chat_template.jinja"
ENDINGS = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
# of a training, of an adapter that transformers would load on top, of an earlier merge
LEFT_BEHIND = {
    "trainer_state.json", "training_args.json", "all_results.json", "train_results.json", "eval_results.json",
    "adapter_config.json", "sparkctl.json", "digests.json",
}  # fmt: skip
# other templates that would win over, or stand beside, a chat_template.jinja of ours
RIVAL_TEMPLATES = ("chat_template.json", "additional_chat_templates")


def companions(base: Path) -> list[str]:
    """Names in `base` that a merged folder needs beside its weights, sorted; links count as what they lead to."""
    names = [path.name for path in base.iterdir() if path.is_file() and _wanted(path.name)]
    extra = base / "additional_chat_templates"
    if extra.is_dir():
        names += [f"{extra.name}/{path.name}" for path in extra.glob("*.jinja") if not path.name.startswith(".")]
    return sorted(names)


def _wanted(name: str) -> bool:
    if name.startswith(".") or name in LEFT_BEHIND or name.endswith(".index.json"):
        return False
    return Path(name).suffix in ENDINGS or name.startswith(TERMS)


def copy_companions(base: Path, out: Path, template: str | None) -> None:
    """Copy them; where `template` is another one than the base's, it becomes the folder's chat_template.jinja."""
    own = template is not None and template != base_template(base)
    for name in companions(base):
        if own and name.split("/")[0] in RIVAL_TEMPLATES:
            continue
        (out / name).parent.mkdir(exist_ok=True)
        with naming(base / name):
            data = (base / name).read_bytes()
        (out / name).write_bytes(data)  # not shutil's copy, which blames a full disk on what it reads
    if own and template is not None:
        (out / TEMPLATE).write_bytes(template.encode())


def base_template(base: Path) -> str | None:
    """The chat template that transformers takes from this folder: the file's, else the tokenizer's."""
    if (base / TEMPLATE).is_file():
        return (base / TEMPLATE).read_bytes().decode()
    path = base / "tokenizer_config.json"
    template = json.loads(path.read_bytes()).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None
