"""The project's own sources as syntax trees, for the tests of its structure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "sparkctl", ROOT / "kernels" / "sparkctl_kernels"


def files(*folders: str) -> list[Path]:
    """Every Python file in those folders of the project."""
    found = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def module(file: Path) -> str:
    """`sparkctl/data/pack.py` → "sparkctl.data.pack", a package's `__init__.py` → the package."""
    base = ROOT / "kernels" if file.is_relative_to(ROOT / "kernels") else ROOT
    parts = file.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree(file: Path) -> ast.Module:
    """Parsed."""
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in `node`; `from a import b` gives "a.b", which may be a name in a."""
    for child in ast.walk(node):
        yield from _named(child)


def imports_at_start(node: ast.AST) -> Iterator[str]:
    """Those imported when the module itself is: outside functions and `if TYPE_CHECKING`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.orelse:
            yield from imports_at_start(child)
        return
    yield from _named(node)
    for child in ast.iter_child_nodes(node):
        yield from imports_at_start(child)


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.module, f"line {node.lineno}: a relative import"
        assert node.level == 0, f"line {node.lineno}: a relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
