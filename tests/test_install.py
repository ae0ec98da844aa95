"""Cards, errors and docs give one command to install hubfusion, and it works today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hubfusion
from hubfusion.release.card import render

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
OWN = re.compile(r"pip install '?((?:hubfusion|\.)(?:\[\w+\])?)(?=['`\s])")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_docs_give_the_command_of_today(path: Path) -> None:
    for named in OWN.findall(path.read_text(encoding="utf-8")):
        assert named.partition("[")[0] == hubfusion.PACKAGE, f"{path.name}: pip install {named}"


def test_the_readme_says_how_to_install() -> None:
    assert OWN.search((ROOT / "README.md").read_text(encoding="utf-8"))


def test_a_card_gives_the_command_of_today() -> None:
    card = render("v0.md.j2", repo="ibm/b", code_repo="ibm/b", origin=None)
    assert f"\n{hubfusion.install_command()}" in card
    assert ("in a clone" in card) == (hubfusion.PACKAGE == ".")
