"""The structure that DESIGN.md draws: who may import whom, what is imported when, and what is never done."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from sources import KERNELS, PACKAGE, ROOT, files, imports, imports_at_start, module, tree

# Folders and modules of sparkctl by row: each imports from rows above its own, and from itself.
ROWS = (
    ("__version__", "child", "env", "errors", "files", "progress", "recipes", "words"),
    ("telling",),
    ("manifest",),
    ("hardware",),
    ("data",),
    ("model",),
    ("plan",),
    ("train",),
    ("merge",),
    ("mtp",),
    ("demo",),
    ("verify",),
    ("bench",),
    ("doctor",),
    ("steps",),
    ("cli",),
    ("__main__",),
)
ROW = {name: number for number, row in enumerate(ROWS) for name in row}
USE_KERNELS = ROW["model"]  # the first row that may import sparkctl_kernels
HEAVY = {"torch", "transformers", "peft", "datasets", "triton", "fla", "unsloth", "accelerate", "pandas"}
# imported by those that need torch anyway, as kernels/ is
NEED_TORCH = [
    PACKAGE / "train" / "engines" / "native",
    *(PACKAGE / "mtp" / f"{name}.py" for name in ("head", "products", "drafter", "engine")),
]
LINES, KERNEL_LINES, COMMAND_LINES = 400, 600, 120
SOURCES = ("sparkctl", "kernels", "recipes", "tools", "docker")


def per_file(problems: Callable[[Path], Iterable[object]], *folders: str) -> dict[str, list[object]]:
    """What `problems` finds in each file of those folders; files without any are left out."""
    found = {str(file.relative_to(ROOT)): list(problems(file)) for file in files(*folders)}
    return {name: these for name, these in found.items() if these}


def downward(name: str, source: ast.AST) -> Iterator[str]:
    """What a module `name` of sparkctl imports that is not above it in the table."""
    own = name.split(".")[1] if "." in name else "__version__"
    for imported in imports(source):
        root, *rest = imported.split(".")
        if root == "sparkctl_kernels":
            above = ROW[own] >= USE_KERNELS
        else:
            above = root != "sparkctl" or rest[0] == own or ROW[rest[0]] < ROW[own]
        if not above:
            yield imported


def test_imports_go_up() -> None:
    assert per_file(lambda file: downward(module(file), tree(file)), "sparkctl") == {}


def test_an_import_that_goes_down_is_seen() -> None:
    source = ast.parse("def f():\n    from sparkctl.steps.train import train\n    import sparkctl.errors\n")
    assert list(downward("sparkctl.model.names", source)) == ["sparkctl.steps.train.train"]
    assert list(downward("sparkctl.data.pack", ast.parse("from sparkctl_kernels import gemm"))) != []


def operators(file: Path, source: ast.AST) -> set[str]:
    """The operators' folders that a kernel file imports from, beside its own."""
    named = [name.split(".")[1] for name in imports(source) if name.startswith("sparkctl_kernels.")]
    return {name for name in named if (KERNELS / name).is_dir() and file.parent != KERNELS / name}


def strangers(file: Path, source: ast.AST) -> list[str]:
    """What an operator imports of the project beside its own folder and the files that all share.

    A file that itself imports operators (a list of them all) is not shared, but above them.
    """
    found = [name for name in imports(source) if name.split(".")[0] == "sparkctl"]
    if file.parent == KERNELS:
        return found
    above = {path.stem for path in KERNELS.glob("*.py") if operators(path, tree(path))}
    from_above = [
        name for name in imports(source) if name.startswith("sparkctl_kernels.") and name.split(".")[1] in above
    ]
    return found + from_above + sorted(operators(file, source))


def test_each_operator_stands_alone() -> None:
    assert per_file(lambda file: strangers(file, tree(file)), "kernels") == {}


def test_an_operator_that_leans_on_another_is_seen() -> None:
    source = ast.parse("from sparkctl_kernels.rms_norm.op import rms_norm\nfrom sparkctl.errors import SparkError\n")
    assert strangers(KERNELS / "silu_mul" / "op.py", source) == ["sparkctl.errors.SparkError", "rms_norm"]
    assert strangers(KERNELS / "rms_norm" / "op.py", source) == ["sparkctl.errors.SparkError"]


def heavy(source: ast.AST) -> set[str]:
    """The slow libraries that come with the module's own import."""
    return {name for name in imports_at_start(source) if name.split(".")[0] in HEAVY}


def test_slow_libraries_are_imported_in_functions() -> None:
    found = per_file(lambda file: [] if any(map(file.is_relative_to, NEED_TORCH)) else heavy(tree(file)), "sparkctl")
    assert found == {}


def test_a_slow_import_is_seen() -> None:
    assert heavy(ast.parse("class A:\n    import torch.nn\n")) == {"torch.nn"}
    assert heavy(ast.parse("if TYPE_CHECKING:\n    import torch\ndef f():\n    import peft\n")) == set()


def test_help_is_quick_and_loads_nothing_slow() -> None:
    """CPU seconds of a whole process, the best of three: 0.3 seen, on any load of the machine."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "sparkctl", "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "analyze" in done.stdout
    assert min(seconds) < 0.5, seconds


def test_no_help_page_loads_anything_slow() -> None:
    program = (
        "import json, sys\n"
        "from sparkctl.cli.app import COMMANDS, run\n"
        "status = [run([*words, '--help']) for words in ([], *([name] for name in COMMANDS))]\n"
        "print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    status, loaded = json.loads(done.stderr)
    assert set(status) == {0}
    assert HEAVY & set(loaded) == set()


def length(file: Path) -> int:
    """Lines of a file."""
    return len(file.read_text(encoding="utf-8").splitlines())


def limit(file: Path) -> int:
    """Lines that it may have."""
    if file.parent == PACKAGE / "cli" and file.stem not in ("__init__", "app", "console", "options"):
        return COMMAND_LINES
    return KERNEL_LINES if file.is_relative_to(KERNELS) and file.name == "kernel.py" else LINES


def test_files_are_short() -> None:
    too_long = per_file(lambda file: [length(file)] if length(file) > limit(file) else [], *SOURCES, "tests")
    assert too_long == {}


def test_every_module_says_what_it_is() -> None:
    assert per_file(lambda file: [] if ast.get_docstring(tree(file)) else ["no docstring"], *SOURCES) == {}


PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}


def forbidden(source: ast.AST) -> list[str]:
    """What reads code or objects out of files, or lets a model bring its own code."""
    found = [name for name in imports(source) if name.split(".")[0] in PICKLES]
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save", "torch.hub"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "use_kernels"):
            found += [] if ast.unparse(node.value) == "False" else [f"{node.arg}={ast.unparse(node.value)}"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec"):
            found.append(ast.unparse(node.func))
    return found


def test_no_pickle_and_no_remote_code() -> None:
    assert per_file(lambda file: forbidden(tree(file)), *SOURCES) == {}


@pytest.mark.parametrize(
    "line",
    ["import pickle", "torch.load(f)", "load(trust_remote_code=yes)", "np.load(f, allow_pickle=True)", "eval(x)"],
)
def test_a_forbidden_call_is_seen(line: str) -> None:
    assert len(forbidden(ast.parse(line))) == 1


def environment(source: ast.AST) -> list[str]:
    """Where the environment is read or written."""
    named = [ast.unparse(node) for node in ast.walk(source) if isinstance(node, ast.Attribute)]
    return [name for name in [*named, *imports(source)] if name in ENVIRONMENT]


def test_the_environment_is_read_in_one_module() -> None:
    found = per_file(lambda file: environment(tree(file)), "sparkctl", "kernels")
    assert list(found) == ["sparkctl/env.py"]


def test_reading_the_environment_is_seen() -> None:
    assert environment(ast.parse("from os import environ")) == ["os.environ"]
    assert environment(ast.parse("x = {**os.environ, 'A': '1'}")) == ["os.environ"]


def told() -> set[str]:
    """SparkError and every class that derives from it: what a user meets as `error:` and `hint:`."""
    bases = {
        node.name: {ast.unparse(base).split(".")[-1] for base in node.bases}
        for file in files("sparkctl")
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ClassDef)
    }
    found = {"SparkError"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def unhinted(source: ast.AST, names: set[str]) -> list[str]:
    """Errors of these classes that are made without a hint, or with an empty one; options are one of `OtherOptions`."""
    found = []
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func).split(".")[-1]) in names:
            hints = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "hint")]
            hints += node.keywords if name == "OtherOptions" else []
            if not any(not isinstance(hint, ast.Constant) or hint.value for hint in hints):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


# nobody meets these as errors: what they say becomes a row of a table
ROWS_OF_A_TABLE = {"sparkctl/bench/step.py"}


def test_every_error_has_a_hint() -> None:
    names = told()
    found = per_file(lambda file: unhinted(tree(file), names), "sparkctl")
    assert {name: errors for name, errors in found.items() if name not in ROWS_OF_A_TABLE} == {}


@pytest.mark.parametrize(
    "line",
    [
        "SparkError('x')",
        "errors.UsageError(f'{x}')",
        "SparkError('x', None)",
        "SparkError('x', hint='')",
        "NoHead(x)",
        "OtherOptions('x')",
    ],
)
def test_an_error_without_a_hint_is_seen(line: str) -> None:
    assert told() >= {"SparkError", "UsageError", "Interrupted", "BadLine", "CheckpointDamaged", "NoHead"}
    assert len(unhinted(ast.parse(f"raise {line} from None"), told())) == 1


@pytest.mark.parametrize("line", ["SparkError('x', 'y')", "UsageError('x', hint=y)", "ValueError('x')", "Other('x')"])
def test_an_error_with_a_hint_is_right(line: str) -> None:
    assert unhinted(ast.parse(f"raise {line}"), told()) == []
