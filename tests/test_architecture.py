"""The walls of the house, held by reading imports out of the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("hubfusion/**/*.py"), *ROOT.glob("bot/**/*.py")])
NETWORK = {"socket", "httpx", "httpx2", "requests", "urllib3", "aiohttp", "huggingface_hub", "http", "uvicorn"}
DOORS = (
    "hubfusion/hub/",
    "hubfusion/data/loading.py",
    "hubfusion/localhub/",
    "hubfusion/cli/hub.py",
)


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", [p for p in SOURCES if module_of(p).startswith("hubfusion")], ids=module_of)
def test_hubfusion_does_not_know_the_bot(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] in ("bot", "demo", "tests")]


@pytest.mark.parametrize("path", [p for p in SOURCES if not module_of(p).startswith(DOORS)], ids=module_of)
def test_only_the_doors_open_sockets(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] in NETWORK]


@pytest.mark.parametrize("path", [p for p in SOURCES if module_of(p).startswith("bot")], ids=module_of)
def test_the_bot_touches_no_tensor(path: Path) -> None:
    assert not [
        name for name in imports(path) if name.split(".")[0] in ("torch", "numpy", "transformers", "safetensors")
    ]


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
