"""Certificates as docs/ shows them: python tests/real/certificate_page.py certificate-lora.json … > PAGE

The files are what `gpu_0_8b.py` leaves beside its logs: answers of `sparkctl verify lossless --json`, a row a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DIGITS = 8  # that are kept of a number: losses differ in the fifth
SHOWN = 8  # tensors of the page
LEFT_OUT = ("run", "hint")  # of the machine, not of the proof
ROWS = ("tensors", "course")


def as_json(answer: dict[str, Any]) -> str:
    """The answer, a line for each tensor and step."""
    short = {name: _rounded(value) for name, value in answer.items() if name not in LEFT_OUT}
    lines = {name: ",\n".join(map(json.dumps, value)) for name, value in short.items() if name in ROWS}
    parts = {name: f"[\n{lines[name]}\n]" if name in lines else json.dumps(value) for name, value in short.items()}
    return "{" + ",\n".join(f'"{name}": {part}' for name, part in parts.items()) + "}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def page(files: list[Path]) -> Iterator[str]:
    """The lines of a page about these certificates."""
    yield "# Certificates of Qwen3.5-0.8B's shape\n"
    yield (
        "`sparkctl verify lossless` at the whole size with random weights (embeddings of std .04, so that the loss can"
        " move), packs of real chats; made by `tests/real/gpu_0_8b.py`. What is asked and why the limits are what they"
        " are stands in [verify.md](verify.md); every tensor and step in the JSON files beside this page."
    )
    for file in files:
        yield from _certificate(json.loads(file.read_text()), file.name)


def _certificate(answer: dict[str, Any], name: str) -> Iterator[str]:
    table = answer["lossless"]
    versions = ", ".join(f"{library} {version}" for library, version in table["versions"].items())
    formula = table["fp32_skipped"]
    if table["worst_fp32_distance"] is not None:
        formula = f"at most {table['worst_fp32_distance']:.1e} from the truth"
    verdict = "passed" if answer["ok"] else "**" + "; ".join(answer["problems"]) + "**"
    yield f"\n## {table['engine']}, {table['mode']}: {verdict}\n"
    yield f"{table['device']}, {table['created'][:10]}; {versions}. {table['seconds']:.0f} s. [{name}]({name})\n"
    yield "| | |\n|---|---|"
    yield f"| data | {table['packs']} |"
    yield (
        f"| gradients of {table['tensors']} tensors | {table['worst_gradient_ratio']:.2f} times the reference's error"
        f" at worst, {table['median_gradient_ratio']:.2f} in the median; limit 2 |"
    )
    yield f"| in fp32 | {formula} |"
    yield f"| loss of single documents | {table['document_loss_ratio']:.2f} times the reference's error; limit 2 |"
    yield (
        f"| course of {table['steps']} steps | loss {table['course_loss']:.1e} from fp32 (reference"
        f" {table['course_loss_reference']:.1e}), gradient norm {table['course_norm']:.1e} (reference"
        f" {table['course_norm_reference']:.1e}) |\n"
    )
    yield "| gradient of | engine | reference | ratio |\n|---|---|---|---|"
    for row in answer["tensors"][:SHOWN]:
        yield f"| {row['name']} | {row['ours']:.2%} | {row['theirs']:.2%} | {row['ratio']:.2f} |"
    yield "\n| step | loss in fp32 | reference | engine | norm in fp32 | reference | engine |"
    yield "|---|---|---|---|---|---|---|"
    steps = answer["course"]
    for number in sorted({0, len(steps) // 3, 2 * len(steps) // 3, len(steps) - 1}):
        truth, theirs, ours = steps[number].values()
        cells = [
            cell
            for what in ("loss", "norm")
            for cell in (f"{truth[what]:.4f}", *(f"{one[what] - truth[what]:+.1e}" for one in (theirs, ours)))
        ]
        yield f"| {number + 1} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(page([Path(name) for name in sys.argv[1:]])))
