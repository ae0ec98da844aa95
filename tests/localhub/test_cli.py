"""`hubfusion hub serve`: what it refuses, in one line. Serving itself is tested in test_durability."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubfusion.cli import main


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--user", "ann"], "--user ann: must be NAME:TOKEN"),
        (["--user", "ann:hf_a", "--user", "ann:hf_b"], "--user ann: given twice"),
        (["--user", "ann:hf_a", "--org", "ibm"], "--org ibm: must be ORG:USER"),
        (["--user", "ann:hf_a", "--org", "ibm:bob"], "organization ibm: no user bob"),
        (["--user", "ann:hf_a", "--host", "0.0.0.0"], "host 0.0.0.0: only loopback"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["hub", "serve", "--dir", str(tmp_path), "--port", "0", *options])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 1 and said.startswith(f"error: {says}") and "\n" not in said
    assert "hf_a" not in said


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["hub", "serve", "--help"])
    assert "HF_ENDPOINT" in capsys.readouterr().out
