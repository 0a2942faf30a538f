"""What a config.json promises of the weights beside it: transformers' own class on the meta device, and the MTP head.

The class is built in .05 s; importing it takes 4.6 s (torch .9 s, transformers' and fla's own modules the rest), which
a long copy need not wait for: `promising` lets a process of its own do so meanwhile. Counting by formula
(`families.py`) would be no proof: what transformers will ask the weights for, its class alone knows.

`python -m sparkctl.model.promise FOLDER` is that process.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparkctl import telling
from sparkctl.errors import AGAIN, SparkError
from sparkctl.files import sha256_bytes
from sparkctl.model import mtp
from sparkctl.model.anew import file_anew
from sparkctl.model.load import silence

INVERSE_FREQUENCIES = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Promise:
    """Of the config.json with the digest `config`: tensors with their shapes, and those of them that may be left out.

    ignored: patterns of names that may be there besides. problems: what is wrong with the promise itself. wrong: why
    it is none at all, else empty.
    """

    config: str
    shapes: mtp.Shapes
    optional: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    wrong: str = ""

    def ignores(self, name: str) -> bool:
        """Whether a tensor of that name may be there. The MTP head's may not: config.json has to promise it."""
        return not name.startswith(mtp.PREFIX) and any(re.search(pattern, name) for pattern in self.ignored)

    def as_json(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self) | {"optional": sorted(self.optional)}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Promise:
        """What `as_json` gave."""
        shapes = {name: tuple(shape) for name, shape in said["shapes"].items()}
        return cls(
            said["config"], shapes, frozenset(said["optional"]), tuple(said["ignored"]), tuple(said["problems"]),
            said["wrong"],
        )  # fmt: skip


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """config.json and the digest of its bytes. Raises SparkError where it cannot be read."""
    path = folder / "config.json"
    try:
        data = path.read_bytes()
        return dict(json.loads(data)), sha256_bytes(data)
    except (OSError, ValueError, TypeError) as error:
        raise SparkError(f"`{path}` cannot be read ({error})", file_anew(path)) from error


def promise(folder: Path) -> Promise:
    """What the config.json in `folder` promises. Raises SparkError where that cannot be read."""
    config, digest = read_config(folder)
    try:
        model = _build(folder)
        head, problems = _head(config, model)
    except SparkError as error:
        return Promise(digest, {}, wrong=error.message)
    except (ValueError, TypeError) as error:
        return Promise(digest, {}, wrong=f"`{folder / 'config.json'}` cannot be read ({error})")
    return Promise(
        digest,
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} | head,
        frozenset(model.all_tied_weights_keys),  # shared with another tensor, so that one copy is enough
        _ignored(model),
        problems,
    )


@contextmanager
def promising(folder: Path) -> Iterator[Callable[[], Promise]]:
    """The promise of `folder`, made while the block does other work; what is given waits for it.

    It raises SparkError where the process that makes it dies. That ends with the block at the latest. Where
    transformers is imported already, the promise is made when it is asked for.
    """
    if imported():
        yield lambda: promise(folder)
        return
    what, hint = f"reading what `{folder / 'config.json'}` promises", f"end what takes the memory, then {AGAIN}"
    with telling.beside(__name__, str(folder), what=what, hint=hint) as answer:
        yield lambda: Promise.from_json(answer())


def imported() -> bool:
    """Whether this process has transformers, which is what takes the time."""
    return "transformers" in sys.modules


def _head(config: dict[str, Any], model: Any) -> tuple[mtp.Shapes, tuple[str, ...]]:
    """The head's tensors, which transformers' class leaves out, and what is wrong with it."""
    text = config.get("text_config") or config
    if unknown := mtp.unknown(text):
        return {}, (f"config.json promises {unknown}, which is unknown here",)
    return mtp.shapes(model.config.get_text_config().to_dict()) if mtp.layers(text) else {}, ()


def _ignored(model: Any) -> tuple[str, ...]:
    """Names that transformers' class passes over, as of the inverse frequencies that old Llama checkpoints store."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    if any(name.endswith(INVERSE_FREQUENCIES) for name, _ in model.named_buffers()):
        patterns.add(re.escape(INVERSE_FREQUENCIES))  # transformers adds it while it loads
    return tuple(sorted(patterns))


def _build(folder: Path) -> Any:
    """The class that config.json names, or that transformers takes for its type; without weights."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with silence(), torch.device("meta"):
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            named = [getattr(transformers, name, None) for name in config.architectures or ()]
            if named and named[0] is not None:
                return named[0](config)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever transformers stumbles over in a config, it means the same here
        raise SparkError(
            f"config.json describes no model that transformers can build ({error})",
            f"{file_anew(folder / 'config.json')}; of a newer model, `pip install --upgrade transformers`",
        ) from error


if __name__ == "__main__":
    with telling.telling() as teller:
        teller.answer(promise(Path(sys.argv[1])).as_json())
    os._exit(0)  # all is told; taking the libraries down would be waited for, .6 s
