"""import-linter's contracts hold, and what they cannot say: who reads the environment, and what a CPU run imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("hubfusion/**/*.py"), *ROOT.glob("bot/**/*.py")])


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_keep_the_contracts_of_pyproject() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_only_configuration_and_commands_read_the_environment(path: Path) -> None:
    allowed = ("bot/config.py", "bot/dispatch.py", "hubfusion/cli/", "hubfusion/localhub/")
    reads = [
        n
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")
    ]
    assert module_of(path).startswith(allowed) or not reads


LIGHT = [
    "hubfusion.screen.crawl", "hubfusion.screen",
    "hubfusion.release.gate", "hubfusion.release.card", "hubfusion.release.ranking", "hubfusion.release.publish",
    "hubfusion.evaluate.scores", "hubfusion.data.suite", "hubfusion.fuse", "hubfusion.cli", "bot.iteration",
    "hubfusion.evaluate.results", "hubfusion.evaluate.engines.jobs", "hubfusion.evaluate.engines.ray",
]  # fmt: skip


@pytest.mark.parametrize("module", LIGHT)
def test_a_cpu_run_imports_no_deep_learning_framework(module: str) -> None:
    heavy = "('torch', 'transformers', 'datasets', 'sklearn')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
