from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hubfusion.errors import FusionError

SERVE = """
import logging, sys, time
logging.basicConfig(level="INFO")
from bot import schedule
from bot.config import Schedule
from pathlib import Path
log = Path(sys.argv[1])

def iterate():
    poll = schedule.check_stop
    with log.open("a") as out: print("start", file=out, flush=True)
    for step in range(100):
        poll()
        time.sleep(0.05)
    with log.open("a") as out: print("whole", file=out, flush=True)

def failing():
    with log.open("a") as out: print("start", file=out, flush=True)
    raise OSError("boom")

schedule.stop_on_signals()
schedule.serve(Schedule(minutes=1), {"iterate": iterate, "failing": failing}[sys.argv[2]])
print("stopped cleanly")
"""
ROOT = Path(__file__).resolve().parents[2]


def serve(tmp_path: Path, job: str) -> tuple[subprocess.Popen[str], Path]:
    log = tmp_path / "log"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SERVE, str(log), job]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return process, log


def test_a_sigterm_ends_the_service_at_a_step_boundary_with_exit_code_0(tmp_path: Path) -> None:
    process, log = serve(tmp_path, "iterate")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "stopped cleanly" in out
    assert "stopping at the next step boundary" in err
    assert log.read_text() == "start\n"  # the iteration began at once, and was not run to its end


def test_an_iteration_that_fails_is_logged_in_one_line_and_the_service_lives(tmp_path: Path) -> None:
    process, _ = serve(tmp_path, "failing")
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "iteration failed: boom" in err


@pytest.mark.parametrize(
    ("cron", "minutes", "message"), [("every day", 60, "five fields"), ("", 0, "at least 1, got 0")]
)
def test_a_schedule_that_never_runs_is_refused(cron: str, minutes: int, message: str) -> None:
    from bot.config import Schedule
    from bot.schedule import trigger

    with pytest.raises(FusionError, match=message):
        trigger(Schedule(cron, minutes))


def test_a_cron_line_is_read_in_utc() -> None:
    from bot.config import Schedule
    from bot.schedule import trigger

    assert str(trigger(Schedule("17 */6 * * *")).timezone) == "UTC"
