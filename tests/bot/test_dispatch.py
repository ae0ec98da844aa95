from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from bot import dispatch as module
from bot.config import Fusing
from bot.dispatch import dispatch, worker_environment
from bot.job import CandidateJob, Outcome
from hubfusion.data.suite import Dataset, Suite
from hubfusion.errors import FusionError
from hubfusion.lineage import Revision

SUITE = Suite("tiny", (Dataset("one", "texts/one"),))
JOB = CandidateJob(Revision("ibm/base", "a" * 40), "v0", "/nowhere", (), Fusing(), SUITE, (), (0,), "/nowhere")
DONE = 'open(sys.argv[2] + "/outcome.json", "w").write(\'{"contributions": [], "rejected": [], "candidate": null}\')'


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Replace the worker by a script; returns a function that sets its code."""

    def use(code: str) -> None:
        script = tmp_path / "worker.py"
        script.write_text(f"import os, signal, sys, time\nopen({str(tmp_path / 'calls')!r}, 'a').write('x')\n{code}\n")
        monkeypatch.setattr(module, "WORKER", (sys.executable, str(script)))

    return use


def test_a_job_is_done_once_and_found_again(tmp_path: Path, worker) -> None:  # type: ignore[no-untyped-def]
    worker(DONE)
    assert dispatch(JOB, tmp_path, 1) == Outcome((), ()) == dispatch(JOB, tmp_path, 1)
    assert (tmp_path / "calls").read_text() == "x"


def test_the_worker_gets_no_token(tmp_path: Path, worker, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    ours = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "HUBFUSION_SIGNING_KEY")
    for name in (*ours, "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL", "SIGSTORE_ID_TOKEN"):
        monkeypatch.setenv(name, "hf_canary")
    check = "assert 'hf_canary' not in os.environ.values()\nassert os.environ['HF_HUB_DISABLE_IMPLICIT_TOKEN'] == '1'"
    worker(f"{check}\n{DONE}")
    dispatch(JOB, tmp_path, 1)
    assert "hf_canary" not in worker_environment().values()


def test_a_worker_that_fails_is_an_error_with_its_exit_code(tmp_path: Path, worker) -> None:  # type: ignore[no-untyped-def]
    worker("sys.exit(3)")
    with pytest.raises(FusionError, match="exit code 3"):
        dispatch(JOB, tmp_path, 1)


def test_a_worker_that_says_it_is_done_and_wrote_nothing_is_an_error(tmp_path: Path, worker) -> None:  # type: ignore[no-untyped-def]
    worker("")
    with pytest.raises(FusionError, match=r"ended without .*outcome\.json"):
        dispatch(JOB, tmp_path, 1)


def test_a_worker_that_hangs_and_ignores_sigterm_is_killed_at_the_deadline(
    tmp_path: Path,
    worker,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    worker("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)")
    started = time.monotonic()
    with pytest.raises(FusionError, match=r"not done after 0\.01 minutes"):
        dispatch(JOB, tmp_path, 0.01)
    assert time.monotonic() - started < 30


def test_a_stop_ends_the_worker_and_the_next_run_does_the_job(tmp_path: Path, worker) -> None:  # type: ignore[no-untyped-def]
    class Stop(FusionError):
        pass

    def stop() -> None:
        raise Stop("stopped")

    worker("time.sleep(600)")
    with pytest.raises(Stop):
        dispatch(JOB, tmp_path, 1, stop)
    worker(DONE)
    assert dispatch(JOB, tmp_path, 1) == Outcome((), ())


def test_two_runs_with_one_work_folder_do_a_job_once(tmp_path: Path, worker) -> None:  # type: ignore[no-untyped-def]
    worker(f"time.sleep(1)\n{DONE}")
    outcomes: list[Outcome] = []
    runs = [threading.Thread(target=lambda: outcomes.append(dispatch(JOB, tmp_path, 1))) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert outcomes == [Outcome((), ())] * 3
    assert (tmp_path / "calls").read_text() == "x"
