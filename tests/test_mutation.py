from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_rule_can_be_taken_out_without_a_test_that_fails() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.mutation"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-40:])
    assert done.stdout.count("\n    test_") > 100
