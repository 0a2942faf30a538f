"""What `make vllm-check` judges by. vLLM is a stand-in here: the judge has to see what a real one would do wrong."""

from __future__ import annotations

import json
import shutil
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import merging
import pytest
import torch
import vllm_check
from vllm_findings import Findings, parting
from vllm_heads import FC, swapped, without
from vllm_serving import Said, Server

from sparkctl.errors import SparkError
from sparkctl.model.audit import audit
from sparkctl.mtp.accept import Subject

TEXTS = [[5, 6, 7, 8], [5, 9, 7, 8]]
RIVALS: list[list[tuple[int, float]]] = [[(1, 3.0), (2, 0.0), (3, 0.5), (4, 9.0)]] * 2
ANSWERS = [[5, 6], [5, 9]]


def said(texts: list[list[int]] = TEXTS, accepted: tuple[int, ...] = (0,), **changes: Any) -> Said:
    plain = Said(
        answers=ANSWERS, drafts=100, accepted=list(accepted), texts=texts, rivals=None, seconds={}, versions={}
    )
    return replace(plain, **changes)


def findings() -> Findings:
    """Of a model that says TEXTS."""
    return Findings(2, 4, said(rivals=RIVALS, drafts=0))


@pytest.fixture
def served(qwen35_folder: Path, tmp_path: Path) -> Path:
    """A whole folder with a head, its index stating the right total."""
    folder = Path(shutil.copytree(qwen35_folder, tmp_path / "served"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"] = {"total_size": sum(tensor.nbytes for tensor in merging.tensors(folder).values())}
    path.write_text(json.dumps(index))
    assert audit(folder) == []
    return folder


def test_swapped_halves_pass_every_audit(served: Path, tmp_path: Path) -> None:
    once = swapped(served, tmp_path / "once")
    before, after = merging.tensors(served), merging.tensors(once)
    assert audit(once) == []
    assert {name for name in before if not torch.equal(before[name], after[name])} == {FC}
    half = before[FC].shape[1] // 2
    assert torch.equal(after[FC], torch.cat([before[FC][:, half:], before[FC][:, :half]], dim=1))
    assert torch.equal(merging.tensors(swapped(once, tmp_path / "twice"))[FC], before[FC])


@pytest.mark.parametrize("name", [FC, "mtp.norm.weight"])
def test_a_dropped_tensor_is_all_that_the_audit_finds(served: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "dropped"
    out.mkdir()
    (out / "left over").touch()  # of an earlier check
    assert audit(without(served, out, name)) == [f"config.json promises `{name}`, and it is missing"]
    assert not (out / "left over").exists()
    assert audit(served) == []


def test_equal_texts_are_counted() -> None:
    found = findings()
    row = found.same_model("served", 1, said())
    assert (row.equal, row.tied, row.answers, found.problems, found.notes) == (2, 0, 2, [], [])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ([5, 6, 3, 8], "parts from the one without drafts at token 3, where the logit of the token taken led by 0.5"),
        ([5, 4, 7, 8], "at token 2"),  # two tokens tie there, and this is a third
        ([5, 6, 7], "at token 4"),
        ([5, 6, 7, 8, 8], "at token 5"),
    ],
)  # fmt: skip
def test_another_text_is_a_problem(text: list[int], why: str) -> None:
    found = findings()
    row = found.same_model("served", 2, said([text, TEXTS[1]]))
    assert (row.equal, row.tied) == (1, 0)
    (problem,) = found.problems
    assert problem.startswith("served, N = 2: ")
    assert why in problem


def test_a_tie_is_told_and_forgiven() -> None:
    found = findings()
    row = found.same_model("served", 2, said([[5, 2, 2, 2], TEXTS[1]]))
    assert (row.equal, row.tied, found.problems) == (1, 1, [])
    assert "both tokens have the same logit" in found.notes[0]
    assert "1 of 2, 1 at a tie" in found.as_table()


def test_the_smallest_lead_is_no_tie() -> None:
    leads = [[(1, 3.0), (2, 2**-9), (3, 0.5), (4, 9.0)]] * 2
    found = Findings(2, 4, said(rivals=leads))
    found.same_model("served", 2, said([[5, 2, 7, 8], TEXTS[1]]))
    assert len(found.problems) == 1


def test_texts_may_be_held_against_another_reference() -> None:
    found, other = findings(), said([[1, 2], [3, 4]], rivals=RIVALS, answers=[[1], [3]])
    row = found.same_model("twin", 1, said([[1, 2], [3, 4]], answers=[[1], [3]]), as_said=other)
    assert (row.equal, row.answers, found.problems) == (2, 2, [])
    found.same_model("twin", 1, said(), as_said=other)
    assert len(found.problems) == 4


@pytest.mark.parametrize(
    ("drafts", "accepted", "problems"), [(100, (9, 1), 0), (100, (9, 2), 1), (0, (0, 0), 1), (50, (5, 0), 0)]
)
def test_a_head_without_sense_has_next_to_nothing_accepted(
    drafts: int, accepted: tuple[int, ...], problems: int
) -> None:
    found = findings()
    found.no_sense(found.other_model("swapped", 2, said(drafts=drafts, accepted=list(accepted))))
    assert len(found.problems) == problems


@pytest.mark.parametrize(("second", "problems"), [(52, 0), (48, 0), (54, 1), (46, 1)])
def test_the_same_head_has_the_same_accepted(second: int, problems: int) -> None:
    found = findings()
    rows = [found.other_model(name, 2, said(accepted=(80, n))) for name, n in (("twin", second), ("served", 50))]
    found.same_rates(*rows)
    assert len(found.problems) == problems


def test_another_answer_is_a_problem_even_where_its_text_ties() -> None:
    found = findings()
    row = found.same_model("served", 1, said([[5, 2, 7, 8], TEXTS[1]], answers=[[5, 2], ANSWERS[1]]))
    assert row.answers == 1
    assert found.problems == ["served, N = 1: answer 1 is another"]


@pytest.mark.parametrize(("foretold", "problems"), [(0.52, 0), (0.48, 0), (0.54, 1), (0.46, 1)])
def test_rates_further_apart_than_three_points_are_a_problem(foretold: float, problems: int) -> None:
    found = findings()
    found.other_model("base", 2, said(accepted=(80, 50)), [0.8, foretold])
    assert len(found.problems) == problems
    assert f"{100 * abs(foretold - 0.5):.1f} points" in found.as_table()


def test_the_adapter_is_judged_by_its_answers_alone() -> None:
    found = findings()
    found.same_answers("adapter", 0, said([[1, 1, 1, 1], TEXTS[1]]))
    assert found.problems == []
    found.same_answers("adapter", 0, said(answers=[[5, 7], ANSWERS[1]]))
    assert found.problems == ["adapter: 1 of 2 answers are those of the merged model"]


def test_the_figures_are_json() -> None:
    found = findings()
    found.other_model("base", 3, said(accepted=(80, 50, 10)), [0.8, 0.5, 0.1])
    figures = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert figures["ok"] is True
    assert figures["rows"][0]["counted"] == [0.8, 0.5, 0.1]
    assert found.as_table().splitlines()[2].startswith("| base | 3 |  |  | 100 | 80.0 / 50.0 / 10.0 % |")


def test_where_texts_part() -> None:
    assert parting([1, 2], [1, 2]) is None
    assert parting([1, 2], [1, 3]) == 1
    assert parting([1], [1, 3]) == 1
    assert parting([], [1]) == 0


def test_a_run_without_a_trained_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = vllm_check.Check(tmp_path, Server(tmp_path, tmp_path), tmp_path)
    with pytest.raises(SparkError, match="has no served folder"):
        check.foretold()
    (tmp_path / "run" / "served").mkdir(parents=True)
    lengths = [{"draft_length": 1, "cumulative": [0.6]}, {"draft_length": 2, "cumulative": [0.5, 0.4]}]
    rows = [{"name": name, "by_draft_length": lengths} for name in (vllm_check.BASE, vllm_check.SHIPPED)]
    monkeypatch.setattr(vllm_check, "sparkctl", lambda *_: {"rows": rows})
    with pytest.raises(SparkError, match=f"has no row for {vllm_check.TRAINED}"):
        check.foretold()
    rows.append({"name": vllm_check.TRAINED, "by_draft_length": lengths})
    assert check.foretold()[vllm_check.TRAINED] == [[0.6], [0.5, 0.4]]


ACCEPTED = {"swapped": (20, 0, 0), "dropped": (0, 0, 0), "twin-swapped": (2, 0, 0)}  # of 100 drafts, else these:
USUAL = (80, 50, 10)


class Standin:
    """A server that says TEXTS and accepts what is ACCEPTED. faults: by folder."""

    def __init__(self, **faults: Said) -> None:
        self.asked: list[tuple[str, int]] = []
        self.faults = faults

    def ask(self, name: str, model: Path, prompts: Any, tokens: int, length: int, adapter: Path | None) -> Said:
        assert tokens == vllm_check.TOKENS
        self.asked.append((name, length))
        accepted = ACCEPTED.get(model.name, USUAL)
        plain = said(accepted=accepted[:length] or (0,), rivals=None if length else RIVALS)
        return self.faults.get(model.name, plain) if length or adapter else plain


def standin_check(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, audit_says: list[str], **faults: Said
) -> tuple[Findings, Standin]:
    """The whole check on a demo of which only the served folder is there, with sparkctl's word as given."""
    run = tmp_path / "demo" / "run"
    run.mkdir(parents=True)
    served.rename(run / "served")
    lengths = [{"cumulative": rates} for rates in ([0.8], [0.8, 0.5], [0.8, 0.5, 0.1])]
    rows = [
        {"name": name, "by_draft_length": lengths} for name in (vllm_check.BASE, vllm_check.SHIPPED, vllm_check.TRAINED)
    ]
    word = {"eval": {"rows": rows}, "inject": {"serve": "vllm serve F", "draft_length": 2}}
    word |= {"model": {"problems": audit_says}, run: {}}  # `merge RUN`
    monkeypatch.setattr(vllm_check, "sparkctl", lambda *words, status=0: word[words[1]])
    over_http = faults.pop("http", said(accepted=(80, 50)))
    monkeypatch.setattr("vllm_http.ask", lambda *_: over_http)
    monkeypatch.setattr(vllm_check.Check, "prompts", lambda self: [torch.tensor([1, 2]).numpy()] * 2)

    def measure(subjects: list[Subject], *_: Any) -> list[Any]:
        shares = [[n / 100 for n in ACCEPTED.get(subject.head.name, USUAL)] for subject in subjects]
        return [types.SimpleNamespace(cumulative=rates) for rates in shares]

    monkeypatch.setattr("sparkctl.mtp.accept.measure", measure)
    standin = Standin(**faults)
    return vllm_check.Check(tmp_path / "demo", standin, tmp_path / "out").findings(), standin  # type: ignore[arg-type]


AUDIT = [f"config.json promises `{FC}`, and it is missing"]


def test_everything_is_served(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, standin = standin_check(served, tmp_path, monkeypatch, AUDIT)
    assert found.problems == []
    assert "2 of 2 texts are the same to the last token in all 6 rows with drafts" in found.notes[-1]
    served_with = [length for name, length in standin.asked if name.startswith("served")]
    assert served_with == [0, 1, 2, 3]
    assert [(row.name, row.draft_length) for row in found.rows if row.foretold] == [
        ("served", 1), ("served", 2), ("served", 3), ("merged, base's head", 3), ("base", 3),
        ("halves of mtp.fc swapped", 3), ("untied twin", 3), ("untied twin, halves of mtp.fc swapped", 3),
        ("served, over HTTP", 2),
    ]  # fmt: skip
    assert len(found.rows) - 1 == len(standin.asked) == 13


@pytest.mark.parametrize(
    ("audit_says", "faults", "problem"),
    [
        ([], {}, "the audit does not say that"),
        (AUDIT, {"twin-swapped": said(accepted=(9, 2, 0))}, "0.11 tokens a draft were accepted of 100 drafts"),
        (AUDIT, {"twin-swapped": said(drafts=0, accepted=(0, 0, 0))}, "0.00 tokens a draft were accepted of 0 drafts"),
        (AUDIT, {"twin-swapped": said([[5, 6, 7, 9], TEXTS[1]], (2, 0, 0))}, "swapped, N = 3: text 1 parts"),
        (AUDIT, {"twin": said([[5, 6, 7, 9], TEXTS[1]], USUAL)}, "untied twin, N = 3: text 1 parts"),
        (AUDIT, {"twin": said(accepted=(80, 50, 14))}, "14.0 % accepted, 80.0 / 50.0 / 10.0 % of served"),
        (AUDIT, {"swapped": said([[5, 6, 7, 9], TEXTS[1]], (20, 0, 0))}, "swapped, N = 3: text 1 parts"),
        (AUDIT, {"dropped": said([[5, 2, 7, 8], TEXTS[1]], (0, 0, 0))}, "served, N = 1: text 1 is another where no"),
        (AUDIT, {"dropped": said(accepted=(20, 0, 0))}, "20 drafts were accepted, and none should be"),
        (AUDIT, {"http": said(accepted=(80, 54))}, "served, over HTTP, N = 2: 80.0 / 50.0 % were foretold"),
        (AUDIT, {"model": said(answers=[[5, 7], ANSWERS[1]], accepted=(80, 50, 10))}, "1 of 2 answers"),
    ],
)
def test_a_promise_that_is_not_kept(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, audit_says: list[str], faults: dict[str, Said],
    problem: str,
) -> None:  # fmt: skip
    found, _ = standin_check(served, tmp_path, monkeypatch, audit_says, **faults)
    assert any(problem in one for one in found.problems), found.problems
