"""The images, without an engine that builds them: they say what the locks say, and their scripts do their work."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import constraints
import pins
import pytest
import smoke
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sources import ROOT

DOCKER = ROOT / "docker"
SPARK = (DOCKER / "Dockerfile.spark").read_text(encoding="utf-8")
BASELINE = (DOCKER / "Dockerfile.baseline").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
LOCK = pins.read("unsloth", "3.12", "aarch64")
BASE = {  # what nvcr.io/nvidia/pytorch:26.03-py3 has in builds of its own
    "torch": "2.11.0a0+a6c236b9fd.nv26.3.46836102",
    "torchvision": "0.25.0a0+b7d91027.nv26.3.46836102",
    "torchao": "0.17.0+gitd9881220",
    "triton": "3.6.0+git5d72932fc5.nv26.3",
}


def versions(text: str) -> list[str]:
    """What looks like a package's version: the base image's tag and Python's are none."""
    return re.findall(r"(?<![\w.:/])\d+\.\d+\.\d+\w*|==\S+", text)


@pytest.mark.parametrize("text", [SPARK, BASELINE])
def test_dockerfiles_state_no_version(text: str) -> None:
    assert versions(text) == []
    assert versions("RUN pip install transformers==5.17.0") == ["==5.17.0"]
    assert versions("ENV VERSION 5.17.0") == ["5.17.0"]


LOCKED = {f"/opt/sparkctl/image/{name}.txt" for name in ("requirements", "constraints")}  # of docker/constraints.py
TAKEN = {"--requirement": "-r", "--constraint": "-c", "--find-links": "-f", "--no-binary": "", "--wheel-dir": "-w"}


def installs(text: str) -> list[list[str]]:
    """The arguments of each `pip install`, `pip wheel` and `pip download` that a Dockerfile runs."""
    found: list[list[str]] = []
    for line in re.findall(r"^RUN (.+)$", re.sub(r"\\\n", " ", text), re.MULTILINE):
        for command in re.split(r"&&|\|\||[;|]", line):
            words = shlex.split(command)
            where = [i for i, word in enumerate(words[:-1]) if re.fullmatch(r"(.*/)?pip[\d.]*", word)]
            found += [words[i + 2 :] for i in where[:1] if words[i + 1] in ("install", "wheel", "download")]
    return found


def unpinned(arguments: list[str]) -> list[str]:
    """What such a command takes that the lock does not decide: no name without its constraint, no version, no URL."""
    options = {short: name for name, short in TAKEN.items() if short} | {name: name for name in TAKEN}
    given: dict[str, str] = {}
    named: list[str] = []
    words = iter(
        word for argument in arguments for word in (argument.split("=", 1) if argument[:2] == "--" else [argument])
    )
    for word in words:
        if word in options:
            given[options[word]] = next(words, "")
        elif not word.startswith("-"):
            named.append(word)
    wrong = [file for name, file in given.items() if name in ("--requirement", "--constraint") and file not in LOCKED]
    bound = given.get("--constraint") in LOCKED
    wrong += ["no constraint"] if "--requirement" in given and not bound else []
    for name in named:
        locked = re.fullmatch(r"[\w.-]+", name) and canonicalize_name(name) in LOCK and bound
        if not locked and not (name == "." and (bound or "--no-deps" in arguments)):
            wrong.append(name)
    return wrong


def test_dockerfiles_install_what_the_lock_has() -> None:
    commands = installs(SPARK)
    assert len(commands) == 3
    assert [unpinned(command) for command in commands] == [[], [], []]
    assert installs(BASELINE) == []


CONSTRAINED = "--constraint /opt/sparkctl/image/constraints.txt"


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("pip install transformers~=5.16", ["transformers~=5.16"]),
        (f"python -m pip install {CONSTRAINED} transformers~=5.16", ["transformers~=5.16"]),
        (f"pip install {CONSTRAINED} 'transformers>=5.16,<5.17'", ["transformers>=5.16,<5.17"]),
        (f"pip3 install {CONSTRAINED} git+https://github.com/huggingface/transformers@v5.16.0",
         ["git+https://github.com/huggingface/transformers@v5.16.0"]),
        (f"pip install {CONSTRAINED} 'transformers @ https://example.org/t.whl'",
         ["transformers @ https://example.org/t.whl"]),
        ("pip install torch", ["torch"]),
        ("true && /opt/sparkctl/bin/pip install \\\n    --no-deps torch", ["torch"]),
        ("pip install --constraint=/tmp/mine.txt torch", ["/tmp/mine.txt", "torch"]),
        ("pip install -r /tmp/mine.txt -c /opt/sparkctl/image/constraints.txt", ["/tmp/mine.txt"]),
        ("pip install --requirement /opt/sparkctl/image/requirements.txt", ["no constraint"]),
        (f"pip wheel {CONSTRAINED} not-in-the-lock", ["not-in-the-lock"]),
        ("pip install .", ["."]),
        (f"pip install {CONSTRAINED} torch Flash_Linear_Attention", []),
        ("pip install --no-deps .", []),
    ],
)  # fmt: skip
def test_an_install_that_the_lock_does_not_decide_is_seen(line: str, wrong: list[str]) -> None:
    (command,) = installs(f"FROM x\nRUN {line}\n")
    assert unpinned(command) == wrong
    assert [unpinned(one) for one in installs(f"{SPARK}\nRUN {line}\n") if unpinned(one)] == ([wrong] if wrong else [])


def test_the_base_image_is_stated_once() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", SPARK, re.MULTILINE)
    assert base in PAGE
    assert re.findall(r"\S*nvidia/pytorch:\S*", SPARK) == [f"BASE={base}"]
    assert set(re.findall(r"^FROM (\S+)", SPARK, re.MULTILINE)) == {"${BASE}", "environment"}
    assert re.findall(r"^FROM (\S+)", BASELINE, re.MULTILINE) == ["${IMAGE}"]
    assert set(re.findall(r"nvcr\.io/nvidia/pytorch:[\w.-]+", PAGE)) == {base}


def stated() -> dict[str, str]:
    """Package → version in the page's table."""
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| (?:`locks/|the base)", PAGE, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in rows}


def test_the_page_has_the_lock_s_versions() -> None:
    table = stated()
    assert {"torch", "triton", "transformers", "flash-linear-attention", "causal-conv1d", "unsloth"} <= set(table)
    for name, version in table.items():
        if name != "python":
            assert LOCK[name].specifier.contains(f"{version}.0" if name == "torch" else version), name
    assert not LOCK["transformers"].specifier.contains("5.16.0")


def test_the_page_names_the_lock_s_file() -> None:
    for name, file in re.findall(r"^\| ([\w-]+) \| [\d.]+ \| `(locks/\w+\.txt)`", PAGE, re.MULTILINE):
        own = [line for line in (ROOT / file).read_text().splitlines() if re.match(r"\w", line)]
        assert canonicalize_name(name) in {canonicalize_name(Requirement(line).name) for line in own}


def test_everything_that_is_asked_for_is_pinned() -> None:
    (profile, extras) = re.search(r"constraints\.py (\S+) (\S+)", SPARK).groups()
    asked = constraints.requirements(extras.split(","))
    named = {canonicalize_name(Requirement(line).name) for line in asked}
    assert named - set(pins.read(profile, "3.12", "aarch64")) == set()
    assert {"flash-linear-attention", "causal-conv1d", "unsloth", "setuptools"} <= named


def test_nothing_of_the_base_is_replaced() -> None:
    assert constraints.unfit(LOCK, BASE) == []
    made = constraints.constraints(LOCK, BASE)
    assert f"torchvision=={BASE['torchvision']}" in made  # the lock's wants another torch
    assert [line for line in made if line.startswith("torch==")] == [f"torch=={BASE['torch']}"]
    assert f"transformers{LOCK['transformers'].specifier}" in made
    assert len(made) == len(LOCK)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({**BASE, "torch": "2.12.0a0+0291f960b6.nv26.4"}, "the base image has torch 2.12.0a0"),
        ({**BASE, "triton": "3.7.1+git1"}, "the base image has triton 3.7.1"),
        ({"torch": BASE["torch"]}, "no triton of its own"),
    ],
)
def test_another_base_image_is_refused(base: dict[str, str], message: str) -> None:
    (problem,) = constraints.unfit(LOCK, base)
    assert message in problem


def copied(text: str) -> list[str]:
    """What a Dockerfile takes out of the checkout."""
    found: list[str] = []
    for options, paths in re.findall(r"^COPY ((?:--\S+ )*)(.+)$", text, re.MULTILINE):
        found += [] if "--from" in options else paths.split()[:-1]
    return found


def sent(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that fits it, or a folder above it, decides."""
    through = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!").removeprefix("**/")
        parts = path.split("/")
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        tried = parts if line.startswith("**/") else above
        if line and not line.startswith("#") and any(fnmatch.fnmatchcase(one, pattern) for one in tried):
            through = line.startswith("!")
    return through


def test_what_is_copied_is_there_and_sent_and_nothing_else_is() -> None:
    wanted = copied(SPARK) + copied(BASELINE)
    assert {"pyproject.toml", "locks", "sparkctl", "kernels", "recipes"} <= set(wanted)
    for path in wanted:
        assert (ROOT / path).exists(), path
        assert sent(path), path
    assert sent("sparkctl/cli/app.py")
    for path in ("runs/r1/run.toml", ".venv/bin/python", ".git/HEAD", "tests/unit/test_docker.py", "demo/model/x",
                 "sparkctl/__pycache__/a.pyc", "data.jsonl", "tools/environment.py"):  # fmt: skip
        assert not sent(path), path


def test_both_run_as_somebody_else_than_root_with_volumes() -> None:
    for text in (SPARK, BASELINE):
        last = re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1]
        assert last == "1001"
        assert re.search(r"smoke\.py \w+", text.split(f"USER {last}")[-1])
    volumes = json.loads(re.search(r"^VOLUME (.+)$", SPARK, re.MULTILINE)[1])
    assert volumes == list(smoke.VOLUMES)
    assert SPARK.index("smoke.py spark") < SPARK.index("VOLUME")  # what is written to a volume later is lost
    for name in re.findall(r"^    (\w+)=/cache/", SPARK, re.MULTILINE):
        assert name in {"HF_HOME", "SPARKCTL_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR",
                        "UNSLOTH_COMPILE_LOCATION"}  # fmt: skip


def test_the_entrypoint_keeps_stdout_for_the_command(tmp_path: Path) -> None:
    nvidia = tmp_path / "nvidia_entrypoint.sh"
    nvidia.write_text('#!/bin/sh\necho "== PyTorch =="\nexport COMPAT=yes\nexec "$@"\n')
    nvidia.chmod(0o755)
    ours = tmp_path / "entrypoint.sh"
    ours.write_text((DOCKER / "entrypoint.sh").read_text().replace("/opt/nvidia/nvidia_entrypoint.sh", str(nvidia)))
    program = 'import os, sys; print(sys.argv[1:], os.environ["COMPAT"]); sys.exit(3)'
    done = subprocess.run(
        ["sh", str(ours), sys.executable, "-c", program, "a b", "*"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.stdout, done.stderr) == ("['a b', '*'] yes\n", "== PyTorch ==\n")
    assert done.returncode == 3
    assert os.access(DOCKER / "entrypoint.sh", os.X_OK)


def test_smoke_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.11.0a0+nv", "rich": "15.0.0", "fla-core": "0.6.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise smoke.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(smoke, "version", version)
    right = ["torch==2.11.0a0+nv", "rich==15.*", "fla-core==0.6.0", "pytest==9.2.0"]
    assert smoke.pinned(right) == "3 packages as in the lock"
    with pytest.raises(RuntimeError, match=r"rich 15\.0\.0, the lock has 14\.0\.0"):
        smoke.pinned(["rich==14.0.0", *right])
    with pytest.raises(RuntimeError, match="nothing of the lock"):
        smoke.pinned(["pytest==9.2.0"])


def test_smoke_sees_a_base_that_was_replaced() -> None:
    import torch

    with pytest.raises(RuntimeError, match=r"replaced: .*2\.11\.0a0"):
        smoke.base({"torch": BASE["torch"]})
    with pytest.raises(RuntimeError, match="another torch was installed"):  # it lies in this environment here
        smoke.base({"torch": torch.__version__.split("+")[0]} if "+" not in torch.__version__ else {})


def test_smoke_numpy_writable_and_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.passes("numpy", smoke.numpy_and_torch)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    assert not smoke.passes("volumes", lambda: smoke.writable([closed]))
    closed.chmod(0o1777)
    assert smoke.passes("volumes", lambda: smoke.writable([closed]))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ok     numpy: numpy ")
    assert said[1].startswith("FAILED volumes: RuntimeError: ")


def test_smoke_asks_the_doctor_of_the_spark(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"\d+ features of sm_121a as expected", smoke.chip())
    said = smoke.doctor()
    for feature in said["features"]:
        if feature["name"] == "tcgen05.alloc":
            feature["found"] = True
    monkeypatch.setattr(smoke, "doctor", lambda *options: said)
    with pytest.raises(RuntimeError, match=r"not as expected: tcgen05\.alloc$"):
        smoke.chip()
    said["features"] = []
    with pytest.raises(RuntimeError, match="nothing could be assembled"):
        smoke.chip()
    said.update(ok=False, kernels=[{}], faults=["rms_norm.forward: 120,000 bytes"])
    with pytest.raises(RuntimeError, match="120,000 bytes"):
        smoke.kernels()
    said.update(ok=True)
    assert smoke.kernels() == "1 for sm_121a"


def test_smoke_tells_of_a_doctor_that_cannot_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "TARGET", "sm_0")
    with pytest.raises(RuntimeError, match="sm_0"):
        smoke.chip()


def test_smoke_tells_stock_from_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"fla": object()}
    monkeypatch.setattr(smoke, "find_spec", there.get)
    with pytest.raises(RuntimeError, match="installed: fla"):
        smoke.without_fast_path()
    there.clear()
    assert "transformers" in smoke.without_fast_path()


def test_the_page_states_the_guard_s_floor() -> None:
    from sparkctl.train import watch

    share, least = re.search(r"Under a floor, (\d+) % of what the plan may use and at least (\d+) GiB", PAGE).groups()
    assert (int(share) / 100, int(least) << 30) == (watch.SHARE, watch.UNIFIED)
    assert re.search("Under half of that it stops at once", PAGE)
    assert watch.AT_ONCE == 0.5
