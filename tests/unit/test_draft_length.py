"""c by the bytes that a step reads, and the number of drafts that pays most."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest

from sparkctl.model import catalog, mtp
from sparkctl.model.inspect import ModelInfo, inspect
from sparkctl.mtp.draft_length import Cost, choose, cost, serve_drafting

EVAL = "sparkctl mtp eval r1"


def published(name: str, folder: Path) -> ModelInfo:
    """A published shape."""
    (folder / "config.json").write_text(json.dumps(catalog.config(name)))
    return inspect(folder)


@pytest.mark.parametrize(
    ("name", "ratio"),  # counted by hand: (head + lm_head) / (layers + lm_head), all in one dtype
    [
        ("qwen3.5-2b", (60.8e6 + 508.6e6) / (1373e6 + 508.6e6)),
        ("qwen3.5-27b", (425e6 + 1271e6) / (24355e6 + 1271e6)),
    ],
)
def test_the_cost_at_published_sizes(name: str, ratio: float, tmp_path: Path) -> None:
    made = cost(published(name, tmp_path))
    assert made.ratio == pytest.approx(ratio, rel=0.01)


def test_the_issues_two_figures(tmp_path: Path) -> None:
    assert round(cost(published("qwen3.5-2b", tmp_path)).ratio, 1) == 0.3
    assert round(cost(published("qwen3.5-27b", tmp_path)).ratio, 2) == 0.07


def test_what_a_step_reads_is_what_the_checkpoint_holds(qwen35_folder: Path) -> None:
    """Of the tiny model, tensor by tensor: all but the vision tower; its embedding is its lm_head."""
    import merging

    info, tensors = inspect(qwen35_folder), merging.tensors(qwen35_folder)
    made = cost(info)
    own = sum(t.numel() for name, t in tensors.items() if name.startswith("mtp."))
    assert own == sum(math.prod(shape) for shape in mtp.shapes(info.config["text_config"]).values())
    assert made.model == sum(t.numel() for n, t in tensors.items() if not n.startswith(("mtp.", "model.visual.")))
    assert made.head == own + info.vocab_size * 32
    untied = {**info.config, "text_config": {**info.config["text_config"], "tie_word_embeddings": False}}
    larger = ModelInfo(**{**vars(info), "config": untied, "text_parameters": info.text_parameters + made.lm_head})
    assert cost(larger) == made  # one of its two matrices is read


def rounds(accepted: list[float], c: float) -> int:
    """By trying every number."""
    return max(range(len(accepted) + 1), key=lambda n: (1 + (accepted[n - 1] if n else 0)) / (1 + n * c))


@pytest.mark.parametrize("c", [0.01, 0.07, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("accepted", [[0.93, 1.76, 2.45], [0.9, 0.9, 0.9], [0.5, 0.7, 0.8], [0.02, 0.03, 0.03]])
def test_the_best_of_all(accepted: list[float], c: float) -> None:
    made = choose(Cost(1000, round(1000 * c), 100), accepted, EVAL)
    assert made.tokens == rounds(accepted, c)
    value = 1 + (accepted[made.tokens - 1] if made.tokens else 0)
    assert made.gain == pytest.approx(value / (1 + made.tokens * c))
    assert "as measured" in made.reason
    assert ("no drafts" in made.reason) == (made.tokens == 0)
    assert (f"`{EVAL} --draft-length 5` tries longer ones" in made.reason) == (made.tokens == 3)


def test_what_is_assumed_is_said() -> None:
    """FACTS: .93, .89, .84 of those accepted before; so 0.93, 1.76 and 2.45 tokens in all."""
    made = choose(Cost(1000, 300, 100), None, EVAL)
    assert made.tokens == rounds([0.93, 0.93 + 0.93 * 0.89, 0.93 + 0.93 * 0.89 + 0.93 * 0.89 * 0.84], 0.3) == 3
    assert made.gain == pytest.approx((1 + 2.4530) / 1.9, rel=1e-3)
    assert "acceptance is assumed (.93/.89/.84" in made.reason
    assert f"`{EVAL}` measures it" in made.reason
    assert "0.30" in made.reason
    assert "(300 of 1,000 parameters, lm_head in both)" in made.reason
    large = choose(Cost(1_881_825_088, 569_387_520, 508_559_360), None, EVAL)
    assert "reads 0.30 of what one of the model does (569 M of 1.88 B parameters, lm_head in both)" in large.reason


def test_the_command() -> None:
    plain = serve_drafting("r1/served", "r1", 8192, 0)
    drafting = shlex.split(serve_drafting("r1/served", "r1", 8192, 2))
    assert drafting[: len(shlex.split(plain))] == shlex.split(plain)
    assert drafting[-2] == "--speculative-config"
    assert json.loads(drafting[-1]) == {"method": "mtp", "num_speculative_tokens": 2}
    assert "speculative" not in plain
