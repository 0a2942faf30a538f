"""The unsloth engine around a stand-in for Unsloth: transformers and peft, with Unsloth's habits.

The real one does not import without a GPU; what it computes there `verify lossless` and `verify leaks` judge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ready
import torch

from sparkctl import env
from sparkctl.data.batches import Document, Pack
from sparkctl.data.tokens import label_count
from sparkctl.errors import SparkError, UsageError
from sparkctl.manifest import schema
from sparkctl.progress import silent
from sparkctl.steps.record import carry_out
from sparkctl.train.engines import make_engine, reference, unsloth
from sparkctl.train.engines.hopper import allow_on_hopper
from sparkctl.train.ranks import Ranks

LOSS, GRADIENT = 2e-3, 3e-2  # relative, bf16 against the reference's bf16, whose head works on label tokens alone;
# observed 2e-4, and 9e-3 with adapters, 1.8e-2 without

STAND_IN = """
import torch
from peft import LoraConfig, get_peft_model as adapt
from pathlib import Path
from sparkctl.model.load import load_text_model

print("Unsloth: Will patch your computer")
calls, adapted = [], None

class FastLanguageModel:
    @staticmethod
    def from_pretrained(name, **options):
        print("Unsloth: Fast patching")
        calls.append(options)
        model = load_text_model(Path(name), dtype=torch.bfloat16, device=torch.device("cpu")).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if options["full_finetuning"] or "norm" in name:
                parameter.data = parameter.data.float()  # after it was rounded
        model.name_or_path = ""
        forward = model.forward
        def loud(*arguments, **named):
            print("Unsloth: Will smartly offload gradients")
            return forward(*arguments, **named)
        model.forward = loud
        return model, None

    @staticmethod
    def get_peft_model(model, *, r, lora_alpha, lora_dropout, bias, target_modules, use_gradient_checkpointing,
                       random_state):
        calls.append(dict(r=r, lora_alpha=lora_alpha, use_gradient_checkpointing=use_gradient_checkpointing,
                          lora_dropout=lora_dropout, bias=bias, random_state=random_state))
        targets = adapted or target_modules
        made = adapt(model, LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, bias=bias,
                                       target_modules=targets, task_type="CAUSAL_LM"))
        for name, parameter in made.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        return made
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Install the stand-in with these requirements; gives its module."""

    def install(*requirements: str, code: str = STAND_IN, zoo: tuple[str, ...] = ()) -> Any:
        site = tmp_path / "site"
        site.mkdir(exist_ok=True)
        (site / "unsloth.py").write_text(code)
        for name, wants in (("unsloth", requirements), ("unsloth_zoo", zoo)):
            info = site / f"{name}-2026.10.9.dist-info"
            info.mkdir(exist_ok=True)
            lines = [f"Requires-Dist: {wanted}\n" for wanted in wants]
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2026.10.9\n{''.join(lines)}")
        monkeypatch.syspath_prepend(site)
        monkeypatch.setattr(unsloth, "require_gpu", lambda *_: None)
        return sys.modules

    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    yield install
    sys.modules.pop("unsloth", None)


def pack(*documents: tuple[np.ndarray, np.ndarray]) -> Pack:
    made = [Document(i, ids, trained) for i, (ids, trained) in enumerate(documents)]
    return Pack(made, sum(len(d.ids) for d in made), sum(label_count(d.trained) for d in made))


def filled(made: Any) -> Any:
    """Adapters that are not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.parameters().items():
            if "lora" in name:
                parameter.normal_(std=0.1, generator=generator)
    return made


def gradients(made: Any, one: Pack) -> tuple[float, dict[str, torch.Tensor]]:
    for parameter in made.parameters().values():
        parameter.grad = None
    loss = float(made.micro_step(one, 1 / one.labels)) / one.labels
    return loss, {name: p.grad.clone() for name, p in made.parameters().items() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_computes_what_the_reference_computes(
    installed: Callable[..., Any], qwen35_folder: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    installed()
    plan, one = ready.plan(engine="unsloth", mode=mode), pack(*ready.documents(5))
    ours, theirs = make_engine(plan, qwen35_folder), reference.load(plan, qwen35_folder, {})
    assert list(ours.parameters()) == list(theirs.parameters())
    assert all(torch.equal(p, theirs.parameters()[name]) for name, p in ours.parameters().items())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in ours.parameters().values())
    (loss, found), (truth, wanted) = gradients(filled(ours), one), gradients(filled(theirs), one)
    assert loss == pytest.approx(truth, rel=LOSS)
    assert found.keys() == wanted.keys()
    errors = {name: relative(found[name], wanted[name]) for name in wanted}
    assert max(errors.values()) < GRADIENT, errors
    worst = {name: relative(1.1 * found[name], wanted[name]) for name in wanted}
    assert min(worst.values()) > GRADIENT  # the comparison can fail
    assert float(ours.eval_sum(one)) == pytest.approx(float(theirs.eval_sum(one)), rel=LOSS)
    said = capsys.readouterr()
    assert said.out == ""
    assert "Fast patching" in said.err
    assert "offload gradients" in said.err


def test_gradients_add_up_and_what_has_no_label_adds_nothing(
    installed: Callable[..., Any], qwen35_folder: Path
) -> None:
    installed()
    made = filled(make_engine(ready.plan(engine="unsloth"), qwen35_folder))
    first, second = ready.documents(2, seed=4)
    together = gradients(made, pack(first, second))
    silent = (first[0], np.zeros(len(first[0]), dtype=bool))
    alone = [gradients(made, pack(one)) for one in (first, second)]
    labels = [pack(one).labels for one in (first, second)]
    for name, gradient in together[1].items():
        parts = sum(n * one[1][name] for n, one in zip(labels, alone, strict=True)) / sum(labels)
        assert relative(gradient, parts) < GRADIENT, name
    assert float(made.micro_step(pack(silent), 1.0)) == 0
    assert float(made.eval_sum(pack(silent))) == 0
    assert float(made.eval_sum(Pack([], 0, 0))) == 0


def test_what_unsloth_is_asked_for(installed: Callable[..., Any], qwen35_folder: Path) -> None:
    modules = installed()
    for checkpointing, word in ((False, False), (True, "unsloth")):
        plan = ready.plan(engine="unsloth", checkpointing=checkpointing)
        make_engine(plan, qwen35_folder)
        base, adapters = modules["unsloth"].calls[-2:]
        assert base["use_gradient_checkpointing"] == adapters["use_gradient_checkpointing"] == word
        assert (base["load_in_4bit"], base["full_finetuning"], base["text_only"]) == (False, False, True)
        assert (base["dtype"], base["float32_mixed_precision"]) == (torch.bfloat16, True)  # what is trained is fp32
        assert (base["max_seq_length"], base["random_state"]) == (plan.pack_length, plan.seed)
        assert (adapters["r"], adapters["lora_alpha"], adapters["random_state"]) == (4, 6, plan.seed)
        assert (adapters["lora_dropout"], adapters["bias"]) == (0, "none")
    made = make_engine(ready.plan(engine="unsloth", mode="full"), qwen35_folder)
    assert modules["unsloth"].calls[-1]["full_finetuning"] is True
    assert made.describe()[0] == ("engine", "unsloth 2026.10.9: its model and patches, one document a row")
    assert made.choices() == {"device": "cpu"}


def test_projections_that_unsloth_leaves_out_are_counted(installed: Callable[..., Any], qwen35_folder: Path) -> None:
    installed(code=STAND_IN.replace("adapted = [], None", 'adapted = [], ["q_proj", "down_proj"]'))
    with pytest.raises(SparkError, match=r"gives 5 of the model's \d+ projections an adapter") as caught:
        make_engine(ready.plan(engine="unsloth"), qwen35_folder, name="runs/r1")
    assert caught.value.hint == "sparkctl recommend runs/r1 --engine native"


def test_pins_are_read_from_the_package_itself(installed: Callable[..., Any], qwen35_folder: Path) -> None:
    installed(
        "torch<2.0,>=1.9", "numpy", "no-such-package>=3", 'datasets<1; extra == "studio"', "packaging>=1",
        zoo=("transformers!=5.17.0,<=5.16",),
    )  # fmt: skip
    why = unsloth.misfit() or ""
    assert why.startswith("unsloth 2026.10.9 does not fit: it asks for torch<2.0,>=1.9, here is ")
    assert f"transformers!=5.17.0,<=5.16, here is {version('transformers')}" in why
    assert "datasets" not in why
    assert "no-such-package" not in why
    with pytest.raises(UsageError, match="does not fit") as caught:
        make_engine(ready.plan(engine="unsloth"), qwen35_folder)
    assert caught.value.hint == "pip install 'dgx-sparkctl[unsloth]'"


def test_a_missing_package_and_one_that_does_not_import(
    installed: Callable[..., Any], qwen35_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(unsloth, "PACKAGES", ("no_such_unsloth", "no_such_zoo"))
        assert unsloth.misfit() == "unsloth is not installed"
    installed("torch>=2", code="raise NotImplementedError('Unsloth needs a GPU\\nbuy one')")
    assert unsloth.misfit() is None
    with pytest.raises(UsageError, match=r"unsloth 2026.10.9 does not import: Unsloth needs a GPU$"):
        make_engine(ready.plan(engine="unsloth"), qwen35_folder)


def test_it_reports_to_nobody_and_compiles_into_the_user_s_cache(
    installed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("UNSLOTH_COMPILE_LOCATION", "UNSLOTH_DISABLE_STATISTICS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    installed("torch>=2", code="import os\nseen = dict(os.environ)\nFastLanguageModel = None\n")
    unsloth.language_model()
    seen = sys.modules["unsloth"].seen
    assert seen["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert seen["UNSLOTH_COMPILE_LOCATION"] == str(env.user_cache_folder() / "unsloth")


@pytest.mark.parametrize(("planned", "there"), [("cpu", False), ("cpu", True), ("cuda", False)])
def test_a_plan_without_a_gpu_that_is_there_is_refused(
    planned: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    machine = schema.Machine(name="test", device=planned, memory=1 << 33, cores=1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs a GPU") as caught:
        unsloth.require_gpu(ready.plan(engine="unsloth", machine=machine), "runs/r1")
    assert caught.value.hint == "sparkctl recommend runs/r1 --engine native"


def test_f32_tensors_stay_so_under_adapters(installed: Callable[..., Any], qwen35_folder: Path) -> None:
    """Unsloth rounds them, and makes norms F32 again; they are read from the file."""
    installed()
    plan = ready.plan(engine="unsloth")
    ours, theirs = make_engine(plan, qwen35_folder), reference.load(plan, qwen35_folder, {})
    wanted = dict(theirs._model.named_parameters())
    published = ("A_log", "linear_attn.norm.weight")
    found = {n.removeprefix("base_model.model."): p for n, p in ours._model.named_parameters() if n.endswith(published)}
    assert found
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in found.values())
    assert all(torch.equal(p, wanted[name]) for name, p in found.items())


@pytest.mark.parametrize(
    ("key_dim", "major", "allowed"),
    [(128, 9, True), (64, 9, False), (None, 9, False), (128, 8, False), (128, 12, False)],
)
def test_fla_is_let_run_on_hopper_alone_and_where_it_is_right(
    key_dim: int | None, major: int, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk_o = SimpleNamespace(TRITON_ABOVE_3_7_1=False)
    for name in ("fla", "fla.ops", "fla.ops.common"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(chunk_o=chunk_o))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    config = SimpleNamespace(linear_key_head_dim=key_dim)
    allow_on_hopper(config)
    assert chunk_o.TRITON_ABOVE_3_7_1 is allowed
    monkeypatch.setitem(sys.modules, "fla.ops.common", None)
    allow_on_hopper(config)  # where fla is not installed, plain torch computes


def test_it_is_imported_before_the_base_is_looked_at(installed: Callable[..., Any]) -> None:
    """The audit of the base imports transformers, which Unsloth patches as it is imported."""
    installed()
    seen = []

    class Job:
        def estimates(self) -> tuple[str, float, int]:
            return "unsloth", 0.0, 0

        def base(self, checkpoint: object, progress: object) -> None:
            seen.append("unsloth" in sys.modules)
            raise SparkError("far enough")

    with pytest.raises(SparkError, match="far enough"):
        carry_out(Job(), None, Ranks(), silent)  # type: ignore[arg-type]
    assert seen == [True]
