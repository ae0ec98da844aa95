"""Jobs as local processes: started, logged, timed, cancelled. Off unless the Hub is told to run them.

A job runs as the user that runs the Hub, without a container: the image it names is not used, `python` is this
environment's. It finds HF_ENDPOINT, its own environment and its secrets (HF_TOKEN among them) in its environment.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apscheduler.triggers.cron import CronTrigger

from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.store.database import Database

Job = dict[str, Any]
TERMINAL = ("COMPLETED", "ERROR", "CANCELED")
DEFAULT_SECONDS = 1800
_AT_ONCE = 16
_LOG_MAX = 64 << 20
_LINE_MAX = 64 << 10
_ALIASES = {
    "@annually": "0 0 1 1 *",
    "@yearly": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * sun",
    "@daily": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_NOT_SERVED = ("volumes", "expose", "ssh", "network", "spaceId", "attempts", "resourceGroupId")


def checked_spec(body: dict[str, Any]) -> dict[str, Any]:
    """What a job is to do; refuses with 400 what this Hub cannot honor."""
    for name in _NOT_SERVED:
        if body.get(name):
            raise Refusal(400, f'"{name}": jobs of this Hub are local processes and do not have it')
    command, arguments = body.get("command"), body.get("arguments") or []
    for name, value in (("command", command), ("arguments", arguments)):
        if not isinstance(value, list) or not all(isinstance(x, str) and "\0" not in x for x in value):
            raise Refusal(400, f'"{name}" must be a list of texts')
    if not command:
        raise Refusal(400, '"command" must not be empty')
    seconds = body.get("timeoutSeconds") or DEFAULT_SECONDS
    if not isinstance(seconds, int) or not 1 <= seconds <= 7 * 86400:
        raise Refusal(400, f'"timeoutSeconds" must be from 1 to 604800, got {str(seconds)[:40]}')
    return {
        "dockerImage": body.get("dockerImage"),
        "command": command,
        "arguments": arguments,
        "environment": _environment(body, "environment"),
        "secrets": _environment(body, "secrets"),
        "flavor": str(body.get("flavor") or "cpu-basic"),
        "timeout": seconds,
        "labels": _environment(body, "labels"),
    }


def _environment(body: dict[str, Any], name: str) -> dict[str, str]:
    given = body.get(name) or {}
    if not isinstance(given, dict) or any("\0" in f"{k}{v}" or "=" in k or not k for k, v in given.items()):
        raise Refusal(400, f'"{name}" must be an object of texts')
    return {key: str(value) for key, value in given.items()}


def next_run(schedule: str, after: float) -> float:
    """When a cron schedule (or @hourly and the like) is due next, in UTC; 400 when it is not one."""
    try:
        trigger = CronTrigger.from_crontab(_ALIASES.get(schedule, schedule), timezone=UTC)
        due = trigger.get_next_fire_time(None, datetime.fromtimestamp(after, UTC))
    except (ValueError, TypeError) as error:
        raise Refusal(400, f'"schedule" must be a cron expression or one of {", ".join(_ALIASES)}: {error}') from None
    if due is None:
        raise Refusal(400, f'"schedule" {schedule[:60]!r} is never due')
    return float(due.timestamp())


class Jobs:
    """The processes of this Hub, and the thread that starts what is scheduled."""

    def __init__(self, directory: Path, db: Database, allowed: bool) -> None:
        self._directory, self._db, self._allowed, self._endpoint = directory, db, allowed, ""
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="localhub-schedule", daemon=True)

    def start(self, endpoint: str) -> None:
        """Begin, with the Hub's own address for its jobs; what a killed Hub left running is marked as failed."""
        self._endpoint = endpoint
        for job in self._db.documents("job"):
            if job["stage"] not in TERMINAL:
                self._save(job | {"stage": "ERROR", "message": "the Hub was stopped", "finished": time.time()})
        if self._allowed:
            self._thread.start()

    def stop(self) -> None:
        """Cancel everything that runs."""
        self._stop.set()
        with self._lock:
            running = list(self._running)
        for key in running:
            self.cancel(key, "the Hub was stopped")
        deadline = time.monotonic() + 10
        while self._running and time.monotonic() < deadline:
            time.sleep(0.02)

    def _save(self, job: Job) -> Job:
        self._db.put_document("job", job["id"], job["owner"], job)
        return job

    def running(self) -> frozenset[str]:
        """The ids of the jobs whose processes are not over."""
        with self._lock:
            return frozenset(self._running)

    def log_path(self, key: str) -> Path:
        """The log of a job: one JSON object {timestamp, data} a line."""
        return self._directory / "jobs" / key / "log.jsonl"

    def run(self, owner: str, spec: dict[str, Any], initiator: dict[str, str], extra: dict[str, str]) -> Job:
        """Start a job with these extra environment variables."""
        if not self._allowed:
            raise Refusal(403, "jobs are off: this Hub runs commands only when started with --allow-jobs")
        with self._lock:
            if len(self._running) >= _AT_ONCE:
                raise Refusal(429, f"at most {_AT_ONCE} jobs run at once", headers={"Retry-After": "5"})
            key, now = secrets.token_hex(12), time.time()
            folder = self.log_path(key).parent
            (folder / "work").mkdir(parents=True, mode=0o700)
            job: Job = {
                "id": key,
                "owner": owner,
                "spec": spec,
                "initiator": initiator,
                "created": now,
                "message": None,
            }
            environment = {
                **self._own_environment(folder / "work"),
                "JOB_ID": key,
                **extra,
                **spec["environment"],
                **spec["secrets"],
            }
            try:
                process = subprocess.Popen(
                    [*spec["command"], *spec["arguments"]],
                    cwd=folder / "work",
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                failed = {"stage": "ERROR", "message": str(error), "started": None, "finished": time.time()}
                return self._save(job | failed)
            self._running[key] = process
            self._save(job | {"stage": "RUNNING", "started": now, "finished": None})
        threading.Thread(target=_reap, args=(process,), daemon=True).start()
        threading.Thread(target=self._follow, args=(key, process, spec["timeout"]), daemon=True).start()
        return job | {"stage": "RUNNING", "started": now, "finished": None}

    def _own_environment(self, home: Path) -> dict[str, str]:
        """What every job finds; of the Hub's own environment only PATH, behind this Python's programs."""
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "HF_HOME": str(home / ".cache"),
            "HF_ENDPOINT": self._endpoint,
        }

    def _follow(self, key: str, process: subprocess.Popen[bytes], seconds: float) -> None:
        timer = threading.Timer(seconds, self.cancel, (key, f"timeout after {seconds} s", "ERROR"))
        timer.daemon = True
        timer.start()
        assert process.stdout is not None  # it is a pipe
        written = 0
        with self.log_path(key).open("w") as log:
            while line := process.stdout.readline(_LINE_MAX):
                if written < _LOG_MAX:
                    text = line.decode(errors="replace").rstrip("\n")
                    stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
                    written += log.write(json.dumps({"timestamp": stamp, "data": text}) + "\n")
                    log.flush()
        code = process.wait()
        timer.cancel()
        job = self._db.document("job", key)
        if job is not None and job["stage"] not in TERMINAL:
            message = None if code == 0 else f"exit code {code}"
            self._save(job | {"stage": "ERROR" if code else "COMPLETED", "message": message, "finished": time.time()})
        with self._lock:
            self._running.pop(key, None)

    def cancel(self, key: str, message: str, stage: str = "CANCELED") -> None:
        """Kill a job with all its processes; one that is over stays as it is."""
        with self._lock:
            process = self._running.get(key)
        job = self._db.document("job", key)
        if process is None or job is None or job["stage"] in TERMINAL:
            return
        self._save(job | {"stage": stage, "message": message, "finished": time.time()})
        _kill(process)

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            for plan in self._db.documents("scheduled-job"):
                if not plan["suspend"] and plan["next"] <= time.time():
                    try:
                        self.run_scheduled(plan)
                    except Refusal:
                        continue  # too many jobs at once: due again in a second

    def run_scheduled(self, plan: dict[str, Any]) -> Job | None:
        """Run what a schedule says, now; None when its last job still runs and it allows only one."""
        job = None
        last = self._db.document("job", plan["last"]["id"]) if plan["last"] else None
        if plan["concurrency"] or last is None or last["stage"] in TERMINAL:
            job = self.run(plan["owner"], plan["spec"], {"type": "scheduled-job", "id": plan["id"]}, {})
            plan["last"] = {"id": job["id"], "at": job["created"]}
        plan["next"] = next_run(plan["schedule"], time.time())
        with self._db.write():  # deleted meanwhile: stays deleted
            if current := self._db.document("scheduled-job", plan["id"]):
                changed = current | {"last": plan["last"], "next": plan["next"]}
                self._db.put_document("scheduled-job", plan["id"], plan["owner"], changed)
        return job

    def run_webhook(self, hook: dict[str, Any], payload: dict[str, Any]) -> None:
        """Run the job of a webhook with the event in its environment."""
        extra = {
            "WEBHOOK_PAYLOAD": json.dumps(payload),
            "WEBHOOK_REPO_ID": payload["repo"]["name"],
            "WEBHOOK_REPO_TYPE": payload["repo"]["type"],
            "WEBHOOK_SECRET": hook["secret"] or "",
        }
        self.run(hook["owner"], hook["job"], {"type": "webhook", "id": hook["id"]}, extra)


def _reap(process: subprocess.Popen[bytes]) -> None:
    """A job is over when its first process is: what that left behind ends with it, as in a container."""
    process.wait()
    _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
