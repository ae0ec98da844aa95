"""Run a job in a worker process with a deadline, without the Hub token, and reuse finished results.

The worker reads weights from untrusted repositories, so its environment has no Hub token. A job is identified by the
hash of its JSON. Its folder contains ``outcome.json`` once it is done, so a later run reads the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bot.job import OUTCOME, CandidateJob, Outcome
from hubfusion.codec import dumps, loads
from hubfusion.errors import FusionError

log = logging.getLogger(__name__)

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HF_TOKEN_PATH", "GITHUB_TOKEN",
    "HUBFUSION_SIGNING_KEY", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL", "SIGSTORE_ID_TOKEN",
)  # fmt: skip
GRACE_SECONDS = 10.0
WORKER = (sys.executable, "-m", "bot.worker")


def dispatch(
    job: CandidateJob, work: Path, deadline_minutes: float, poll: Callable[[], None] = lambda: None
) -> Outcome:
    """Run ``job`` in a child process and return its outcome.

    ``poll`` is called twice a second and may raise to stop: the worker is then ended, and what it had finished is
    found again by the next run. Raises `FusionError` when the worker fails or the deadline passes.
    """
    text = dumps(job)
    folder = work / "jobs" / hashlib.sha256(text.encode()).hexdigest()[:16]
    done = folder / OUTCOME
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, poll):
        if not done.exists():
            (folder / "job.json").write_text(text)
            _run(folder, deadline_minutes, poll)
    if not done.exists():
        raise FusionError(f"worker: ended without {done}")
    return loads(Outcome, done.read_bytes(), str(done))


@contextmanager
def _alone(folder: Path, poll: Callable[[], None]) -> Iterator[None]:
    """Let one run at a time do a job; another one with the same work folder waits, and finds it done."""
    with open(folder / "lock", "w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                poll()
                time.sleep(0.5)
        yield


def _run(folder: Path, deadline_minutes: float, poll: Callable[[], None]) -> None:
    command = [*WORKER, str(folder / "job.json"), str(folder)]
    worker = subprocess.Popen(command, env=worker_environment(), stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 60 * deadline_minutes
    try:
        while worker.poll() is None:
            poll()
            if time.monotonic() > deadline:
                raise FusionError(f"worker: not done after {deadline_minutes:g} minutes (deadline_minutes), stopped")
            try:
                worker.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
    finally:
        _end(worker)
    if worker.returncode != 0:
        raise FusionError(f"worker: exit code {worker.returncode}; its messages are above, its job in {folder}")


def _end(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is None:
        worker.terminate()
        try:
            worker.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def worker_environment() -> dict[str, str]:
    """Our environment without tokens, and with every way closed in which a client would find or send one."""
    kept = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return kept | {
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that wait for one another sleep: spinning makes torch three times slower when the cores are shared.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
