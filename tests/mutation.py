"""Does a test notice when a rule is taken out? Each refusal in the trust modules is removed in turn.

    python -m tests.mutation [MODULE …]

A mutant is a module with one statement replaced by `pass`: a `raise`, a `refuse(…)`, a returned objection, an
assigned objection. Every mutant runs the trust tests in a forked process until the first failure; a mutant that
survives is a rule that nothing holds in place. Prints each rule with the test that misses it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "checkpoint.headers", "checkpoint.backbone", "checkpoint.adapters", "screen.remote", "screen.rules",
    "screen.soundness", "screen.task_vectors", "release.provenance", "release.signature", "release.triggers",
)  # fmt: skip
TESTS = (
    "tests/checkpoint/test_headers.py", "tests/checkpoint/test_backbone.py", "tests/checkpoint/test_adapters.py",
    "tests/screen/test_rules.py", "tests/screen/test_soundness.py", "tests/hostile",
)  # fmt: skip
TESTS_OF = {
    "release.provenance": ("tests/release/test_provenance.py",),
    "release.signature": ("tests/release/test_signature.py", "tests/release/test_provenance.py"),
    "release.triggers": ("tests/release/test_triggers.py",),
}
SKIPPED = (
    "not transformers and not roberta and not largest and not whatever and not random_and_mutated and not mutation"
)


@dataclass(frozen=True)
class Mutant:
    """One statement of one module, taken out."""

    module: str
    line: int
    source: str
    text: str


def mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of a module of hubfusion, named without the package."""
    path = ROOT / "hubfusion" / f"{module.replace('.', '/')}.py"
    source = path.read_text()
    tree = ast.parse(source)
    lines = source.splitlines()
    for node in ast.walk(tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            for statement in body if isinstance(body, list) else []:
                if _is_rule(statement):
                    text = " ".join(line.strip() for line in lines[statement.lineno - 1 : statement.end_lineno])
                    yield Mutant(module, statement.lineno, _without(lines, statement), text)


def _is_rule(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise):
        return statement.exc is not None
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return ast.unparse(statement.value.func) in ("refuse", "differences.append")
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield):
        return True
    if isinstance(statement, ast.AugAssign):
        return ast.unparse(statement.target) == "differences"
    if isinstance(statement, ast.Return):
        spoken = ("return (Reason.", "return 'is ", "return 'has ", "return 'points ", "return f'{SIGNATURE} does not")
        return ast.unparse(statement).startswith(spoken)
    if isinstance(statement, ast.Assign):
        return ast.unparse(statement.targets[0]).startswith(("objections[", "vector.bad"))
    return False


def _without(lines: Sequence[str], statement: ast.stmt) -> str:
    kept = list(lines)
    indent = " " * statement.col_offset
    kept[statement.lineno - 1 : statement.end_lineno] = [f"{indent}pass"] + [""] * (
        (statement.end_lineno or statement.lineno) - statement.lineno
    )
    return "\n".join(kept) + "\n"


class Swap(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == f"hubfusion.{self.mutant.module}" else None

    def create_module(self, spec: Any) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source, f"{self.mutant.module} (mutant)", "exec"), module.__dict__)


class FirstFailure:
    """A pytest plugin that remembers which test failed first."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = f"{report.nodeid} (import)"


def run(mutant: Mutant | None) -> str:
    """Run the tests on a mutant in a forked process; the name of the first test that fails, empty when none does."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with open(reader) as pipe:
            name = pipe.read()
        os.waitpid(child, 0)
        return name
    os.close(reader)
    result = "crashed"
    try:
        import pytest

        if mutant:
            sys.meta_path.insert(0, Swap(mutant))
        seen = FirstFailure()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            options = [
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:doctest",
                "-k",
                SKIPPED,
                "-o",
                "addopts=-m 'not slow'",
            ]
            own = f"test_{mutant.module.rpartition('.')[2]}.py" if mutant else ""  # first: most mutants end there
            every = [*TESTS, *(test for more in TESTS_OF.values() for test in more)]
            tests = TESTS_OF.get(mutant.module, sorted(TESTS, key=lambda t: not t.endswith(own))) if mutant else every
            code = pytest.main([*options, *tests], plugins=[seen])
        result = seen.name or ("" if code == 0 else f"pytest ended with {code}")
    finally:
        with open(writer, "w") as pipe:
            pipe.write(result)
        os._exit(0)


def main(modules: Sequence[str]) -> int:
    """Run all mutants of ``modules``; the number of survivors."""
    import hypothesis  # noqa: F401  # loaded once, before forking
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.numpy  # noqa: F401

    os.chdir(ROOT)
    if broken := run(None):
        print(f"the tests fail without any mutation: {broken}")
        return 1
    signing = importlib.util.find_spec("model_signing") is not None
    tried = survivors = 0
    for module in modules or MODULES:
        for mutant in mutants(module):
            if not signing and (module == "release.signature" or "problem" in mutant.text):
                continue  # only tests that need the package would notice
            missed, tried = run(mutant), tried + 1
            survivors += not missed
            verdict = missed.split("::")[-1] if missed else "SURVIVED"
            print(f"{mutant.module}:{mutant.line}: {mutant.text[:90]}\n    {verdict}", flush=True)
    print(f"{survivors} survivors of {tried}")
    return survivors


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
