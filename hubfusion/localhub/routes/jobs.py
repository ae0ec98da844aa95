"""Jobs and scheduled jobs."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.responses import Response, StreamingResponse

from hubfusion.localhub.access import require_owner
from hubfusion.localhub.facts import when
from hubfusion.localhub.info import page_of
from hubfusion.localhub.jobs import TERMINAL, Job, checked_spec, next_run
from hubfusion.localhub.refusal import Refusal
from hubfusion.localhub.web import Call, Routes, answer

routes = Routes()
_JOBS = "/api/jobs/{ns}"
_JOB = _JOBS + "/{job}"
_PLANS = "/api/scheduled-jobs/{ns}"
_PLAN = _PLANS + "/{plan}"
_POLL_SECONDS, _KEEP_ALIVE_SECONDS = 0.1, 15.0


def _show_spec(spec: dict[str, Any]) -> dict[str, Any]:
    return spec | {"secrets": dict.fromkeys(spec["secrets"], "")}


def _show(call: Call, job: Job) -> dict[str, Any]:
    shown = _show_spec(job["spec"]) | {
        "id": job["id"],
        "createdAt": when(job["created"]),
        "owner": call.hub.accounts.avatar(job["owner"], call.base) | {"id": job["owner"]},
        "status": {"stage": job["stage"], "message": job["message"]},
        "initiator": job["initiator"],
    }
    for key, name in (("started", "startedAt"), ("finished", "finishedAt")):
        if job[key] is not None:
            shown[name] = when(job[key])
    return shown


def _find(call: Call) -> Job:
    require_owner(call, call.params["ns"])
    job = call.hub.db.document("job", call.params["job"])
    if job is None or job["owner"] != call.params["ns"]:
        raise Refusal(404, f"Job {call.params['job'][:60]} not found")
    return job


@routes.add("GET", "/api/jobs/hardware")
def hardware(call: Call) -> Response:
    """The one machine there is: this one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    machine = {
        "name": "cpu-basic",
        "prettyName": "This machine",
        "cpu": f"{os.cpu_count()} vCPU",
        "ram": f"{memory} GB",
        "unitCostMicroUSD": 0,
        "unitCostUSD": 0.0,
        "unitLabel": "minute",
    }
    return answer([machine])


@routes.add("GET", _JOBS)
def list_jobs(call: Call) -> Response:
    """The jobs of a namespace, newest first, by stage and label."""
    require_owner(call, call.params["ns"])
    stages = call.query.getlist("stage")
    labels = [label.partition("=")[::2] for label in call.query.getlist("label")]
    found = [
        job
        for job in reversed(call.hub.db.documents("job", call.params["ns"]))
        if (not stages or job["stage"] in stages) and all(job["spec"]["labels"].get(k) == v for k, v in labels)
    ]
    page, link = page_of(call, found, 100)
    return answer([_show(call, job) for job in page], headers=link)


@routes.add("POST", _JOBS)
def run(call: Call) -> Response:
    """Run a job now."""
    user = require_owner(call, call.params["ns"])
    initiator = {"type": "user", "id": user, "name": user}
    return answer(_show(call, call.hub.jobs.run(call.params["ns"], checked_spec(call.json()), initiator, {})))


@routes.add("GET", _JOB)
def inspect(call: Call) -> Response:
    """One job."""
    return answer(_show(call, _find(call)))


@routes.add("POST", _JOB + "/cancel")
def cancel(call: Call) -> Response:
    """Kill a job."""
    job = _find(call)
    call.hub.jobs.cancel(job["id"], "canceled")
    return answer(_show(call, _find(call)))


@routes.add("POST", _JOB + "/duplicate")
def duplicate(call: Call) -> Response:
    """Run a job once more, with the same secrets."""
    user = require_owner(call, call.params["ns"])
    initiator = {"type": "user", "id": user, "name": user}
    return answer(_show(call, call.hub.jobs.run(call.params["ns"], _find(call)["spec"], initiator, {})))


@routes.add("GET", _JOB + "/logs")
def logs(call: Call) -> Response:
    """The log as server-sent events, until the job is over."""
    job = _find(call)
    tail = call.number("tail", 0, 1_000_000) if "tail" in call.query else None
    return StreamingResponse(_events(call, job["id"], tail), 200, media_type="text/event-stream")


async def _events(call: Call, key: str, tail: int | None) -> AsyncIterator[str]:
    at, quiet = 0, 0.0
    while True:
        over, lines, at = await asyncio.to_thread(_progress, call, key, at)
        for line in lines[-tail:] if tail else lines if tail is None else []:
            yield f"data: {line}\n\n"
        tail = None
        if over:
            return
        quiet = 0.0 if lines else quiet + _POLL_SECONDS
        if quiet >= _KEEP_ALIVE_SECONDS:
            quiet = 0.0
            yield ": keep-alive\n\n"
        await asyncio.sleep(_POLL_SECONDS)


def _progress(call: Call, key: str, at: int) -> tuple[bool, list[str], int]:
    """Whether a job is over, the lines after `at`, and where they end; asked in this order, so that none is missed."""
    job = call.hub.db.document("job", key)
    over = (job is None or job["stage"] in TERMINAL) and key not in call.hub.jobs.running()
    return over, *_new_lines(call.hub.jobs.log_path(key), at)


def _new_lines(path: Path, at: int) -> tuple[list[str], int]:
    try:
        with path.open("rb") as file:
            file.seek(at)
            whole = file.read(8 << 20).rpartition(b"\n")[0]
    except FileNotFoundError:
        return [], at
    lines = whole.decode(errors="replace").split("\n") if whole else []
    return lines, at + len(whole) + 1 if whole else at


# Scheduled jobs


def _show_plan(call: Call, plan: dict[str, Any]) -> dict[str, Any]:
    status: dict[str, Any] = {"nextJobRunAt": when(plan["next"])} if not plan["suspend"] else {}
    if plan["last"]:
        status["lastJob"] = {"id": plan["last"]["id"], "at": when(plan["last"]["at"])}
    return {
        "id": plan["id"],
        "createdAt": when(plan["created"]),
        "schedule": plan["schedule"],
        "suspend": plan["suspend"],
        "concurrency": plan["concurrency"],
        "jobSpec": _show_spec(plan["spec"]),
        "status": status,
        "owner": call.hub.accounts.avatar(plan["owner"], call.base) | {"id": plan["owner"]},
    }


def _find_plan(call: Call) -> dict[str, Any]:
    require_owner(call, call.params["ns"])
    plan = call.hub.db.document("scheduled-job", call.params["plan"])
    if plan is None or plan["owner"] != call.params["ns"]:
        raise Refusal(404, f"Scheduled job {call.params['plan'][:60]} not found")
    return plan


@routes.add("GET", _PLANS)
def list_plans(call: Call) -> Response:
    """The scheduled jobs of a namespace."""
    require_owner(call, call.params["ns"])
    return answer([_show_plan(call, plan) for plan in call.hub.db.documents("scheduled-job", call.params["ns"])])


@routes.add("POST", _PLANS)
def create_plan(call: Call) -> Response:
    """Run a job on a schedule."""
    owner, body = call.params["ns"], call.json()
    require_owner(call, owner)
    if not call.hub.rules.allow_jobs:
        raise Refusal(403, "jobs are off: this Hub runs commands only when started with --allow-jobs")
    schedule, spec = str(body.get("schedule")), checked_spec(body.get("jobSpec") or {})
    plan = {
        "id": secrets.token_hex(12),
        "owner": owner,
        "created": time.time(),
        "schedule": schedule,
        "next": next_run(schedule, time.time()),
        "suspend": bool(body.get("suspend")),
        "concurrency": bool(body.get("concurrency")),
        "spec": spec,
        "last": None,
    }
    call.hub.db.put_document("scheduled-job", str(plan["id"]), owner, plan)
    return answer(_show_plan(call, plan))


@routes.add("GET", _PLAN)
def inspect_plan(call: Call) -> Response:
    """One scheduled job."""
    return answer(_show_plan(call, _find_plan(call)))


@routes.add("DELETE", _PLAN)
def delete_plan(call: Call) -> Response:
    """Forget a scheduled job; what runs goes on."""
    call.hub.db.delete_document("scheduled-job", _find_plan(call)["id"])
    return answer({"success": True})


@routes.add("POST|PUT|PATCH", _PLAN + "/{what:suspend|resume|schedule}")
def change_plan(call: Call) -> Response:
    """Suspend, resume, or give another schedule."""
    with call.hub.db.write():
        plan, what = _find_plan(call), call.params["what"]
        if what == "schedule":
            plan["schedule"] = str(call.json().get("schedule"))
        else:
            plan["suspend"] = what == "suspend"
        plan["next"] = next_run(plan["schedule"], time.time())
        call.hub.db.put_document("scheduled-job", plan["id"], plan["owner"], plan)
    return answer(_show_plan(call, plan))


@routes.add("POST", _PLAN + "/run")
def run_plan(call: Call) -> Response:
    """Run a scheduled job now."""
    job = call.hub.jobs.run_scheduled(_find_plan(call))
    if job is None:
        raise Refusal(409, "the last job of this schedule still runs, and it allows only one")
    return answer(_show(call, job))
