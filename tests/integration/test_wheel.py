"""What is built holds everything, and works without the project beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sources import ROOT, files

COPIED = ("sparkctl", "kernels", "recipes", "setup.py", "pyproject.toml", "README.md", "LICENSE")
ASSETS = {"sparkctl/demo/base.safetensors", "sparkctl/demo/tokenizer.json", "sparkctl/demo/chat_template.jinja"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, with the setuptools that is installed: no registry is asked."""
    source = tmp_path_factory.mktemp("source")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = (source / "dist").glob("dgx_sparkctl-*.whl")
    return made


def test_it_holds_every_module_and_asset(wheel: Path) -> None:
    modules = {str(file.relative_to(ROOT)) for file in files("sparkctl", "kernels", "recipes")}
    modules = {name.removeprefix("kernels/") for name in modules}
    recipes = {f"recipes/{file.name}" for file in (ROOT / "recipes").glob("*.toml")}
    wanted = {name.replace("recipes/", "sparkctl/recipes/", 1) if name.startswith("recipes/") else name
              for name in modules | recipes | ASSETS}  # fmt: skip
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert wanted - held == set()
    assert held - wanted == {"sparkctl/py.typed", "sparkctl_kernels/py.typed"}


def test_it_works_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import sys, sparkctl, sparkctl_kernels.rms_norm\n"
        "from pathlib import Path\n"
        "from sparkctl.cli.app import run\n"
        "from sparkctl.demo.model import write_model\n"
        "from sparkctl.plan.recipes import load_recipe\n"
        "assert run(['--help']) == 0\n"
        "assert load_recipe('demo').model is None\n"
        "write_model(Path('model'))\n"
        "print(sparkctl.__file__, sparkctl_kernels.__file__)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(place.startswith(str(tmp_path)) for place in done.stdout.splitlines()[-1].split())
    assert list((tmp_path / "model").glob("*.safetensors"))
