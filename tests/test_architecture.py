"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src" / "adaptax").rglob("*.py"))
JAX_FREE = ("config", "cli", "models", "models.gemma3_weights", "models.hub", "data.feed", "preview")


def test_imports_only_go_down_and_only_the_command_line_knows_hydra() -> None:
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", JAX_FREE)
def test_what_answers_before_a_run_does_not_import_jax(module: str) -> None:
    command = f"import sys, adaptax.{module}; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT / "src", check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    assert path.stem not in ("utils", "common", "helpers")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_and_no_code_from_data(path: Path) -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        assert not forbidden & set(names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec")
        if isinstance(node, ast.keyword):
            assert node.arg not in ("trust_remote_code", "allow_pickle")
