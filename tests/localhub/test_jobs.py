"""Jobs: local processes, only when the Hub is told to run them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, JobInfo
from huggingface_hub.errors import HfHubHTTPError

from hubfusion.localhub import LocalHub, Rules
from hubfusion.localhub.jobs import next_run
from hubfusion.localhub.refusal import Refusal
from tests.localhub.conftest import ORGS, USERS, World, clients


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with LocalHub(tmp_path_factory.mktemp("hub"), USERS, ORGS, rules=Rules(allow_jobs=True)) as hub:
        yield clients(hub)


def run(api: HfApi, code: str, **options) -> JobInfo:
    return api.run_job(image="python:3.12", command=[sys.executable, "-c", code], **options)


def finish(api: HfApi, job: JobInfo) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        stage = str(api.inspect_job(job_id=job.id, namespace=job.owner.name).status.stage)
        if stage in ("COMPLETED", "ERROR", "CANCELED"):
            return stage
        time.sleep(0.05)
    raise AssertionError("the job did not end")


def test_a_hub_runs_nothing_unless_told_to(world: World) -> None:
    for attempt in (
        lambda: run(world.ann, "print(1)"),
        lambda: world.ann.create_scheduled_job(image="x", command=["true"], schedule="@daily"),
    ):
        with pytest.raises(HfHubHTTPError, match="--allow-jobs"):
            attempt()
    assert list(world.ann.list_jobs(namespace="ann")) == []


def test_a_job_finds_the_hub_its_variables_and_its_secrets(running: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_HUB", "hush")
    code = "import os; print(*[os.environ.get(k) for k in ('HF_ENDPOINT','HF_TOKEN','A','SECRET_OF_THE_HUB')])"
    job = run(running.ann, code, env={"A": "1"}, secrets={"HF_TOKEN": "hf_ann"}, labels={"kind": "test"})
    assert finish(running.ann, job) == "COMPLETED"
    assert list(running.ann.fetch_job_logs(job_id=job.id)) == [f"{running.endpoint} hf_ann 1 None"]
    assert [found.id for found in running.ann.list_jobs(namespace="ann", labels={"kind": "test"})] == [job.id]
    assert list(running.ann.list_jobs(namespace="ann", labels={"kind": "other"})) == []
    assert "hf_ann" not in str(vars(running.ann.inspect_job(job_id=job.id)))


def test_a_job_that_fails_says_so_and_one_that_takes_too_long_is_ended(running: World) -> None:
    failed = run(running.ann, "import sys; print('oh'); sys.exit(3)")
    late = run(running.ann, "import time; time.sleep(60)", timeout=1)
    missing = running.ann.run_job(image="x", command=["/no/such/program"])
    assert finish(running.ann, failed) == finish(running.ann, late) == finish(running.ann, missing) == "ERROR"
    assert running.ann.inspect_job(job_id=failed.id).status.message == "exit code 3"
    assert "timeout" in running.ann.inspect_job(job_id=late.id).status.message
    assert list(running.ann.fetch_job_logs(job_id=failed.id)) == ["oh"]


def test_cancelling_ends_the_job_and_its_children(running: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    job = run(running.ann, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    time.sleep(0.5)
    running.ann.cancel_job(job_id=job.id)
    assert finish(running.ann, job) == "CANCELED"
    time.sleep(2)
    assert not mark.exists()


def test_a_job_is_over_with_its_first_process(running: World) -> None:
    job = running.ann.run_job(image="x", command=["sh", "-c", "sleep 60 & echo left one behind"])
    assert finish(running.ann, job) == "COMPLETED"
    assert list(running.ann.fetch_job_logs(job_id=job.id)) == ["left one behind"]


def test_logs_are_followed_while_the_job_runs(running: World) -> None:
    job = run(running.ann, "import time\nfor n in range(3): print(n, flush=True); time.sleep(0.3)")
    assert list(running.ann.fetch_job_logs(job_id=job.id, follow=True)) == ["0", "1", "2"]
    assert list(running.ann.fetch_job_logs(job_id=job.id, tail=1)) == ["2"]


def test_jobs_of_a_namespace_are_its_owners_alone(running: World) -> None:
    job = run(running.bot, "print(1)", namespace="ibm")
    assert finish(running.bot, job) == "COMPLETED"
    for attempt in (
        lambda: run(running.ann, "print(1)", namespace="ibm"),
        lambda: running.ann.inspect_job(job_id=job.id, namespace="ibm"),
        lambda: list(running.ann.list_jobs(namespace="ibm")),
        lambda: running.anon.inspect_job(job_id=job.id, namespace="ibm"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            attempt()
        assert error.value.response.status_code in (401, 403)


def test_what_this_hub_cannot_honour_is_refused_not_ignored(running: World) -> None:
    with pytest.raises(HfHubHTTPError, match="do not have it"):
        running.ann.run_job(image="x", command=["true"], attempts=3)
    with pytest.raises(HfHubHTTPError, match="do not have it"):
        running.ann.run_job(image="hf.co/spaces/ann/x", command=["true"])


def test_a_schedule_runs_a_job_and_can_be_suspended(running: World) -> None:
    plan = running.ann.create_scheduled_job(image="x", command=["echo", "due"], schedule="@hourly")
    assert plan.status.next_job_run_at.minute == 0
    hub = running.hub.hub
    due = hub.db.document("scheduled-job", plan.id)
    assert due is not None
    hub.db.put_document("scheduled-job", plan.id, "ann", due | {"next": time.time() - 1})
    deadline = time.monotonic() + 10
    while (last := running.ann.inspect_scheduled_job(scheduled_job_id=plan.id).status.last_job) is None:
        assert time.monotonic() < deadline, "the schedule did not run"
        time.sleep(0.1)
    job = running.ann.inspect_job(job_id=last.id)
    assert finish(running.ann, job) == "COMPLETED" and job.initiator.type == "scheduled-job"
    running.ann.suspend_scheduled_job(scheduled_job_id=plan.id)
    assert running.ann.inspect_scheduled_job(scheduled_job_id=plan.id).suspend
    running.ann.resume_scheduled_job(scheduled_job_id=plan.id)
    running.ann.trigger_scheduled_job(scheduled_job_id=plan.id)
    running.ann.delete_scheduled_job(scheduled_job_id=plan.id)
    assert list(running.ann.list_scheduled_jobs()) == []


def test_a_webhook_can_run_a_job_with_the_event(running: World) -> None:
    source = running.ann.run_job(image="x", command=["sh", "-c", "echo got $WEBHOOK_REPO_TYPE $WEBHOOK_REPO_ID"])
    finish(running.ann, source)
    running.ann.create_repo("ann/event", repo_type="dataset")
    hook = running.ann.create_webhook(job_id=source.id, watched=[{"type": "dataset", "name": "ann/event"}])
    running.ann.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="ann/event", repo_type="dataset")
    deadline = time.monotonic() + 10
    while not (jobs := [j for j in running.ann.list_jobs(namespace="ann") if j.initiator.type == "webhook"]):
        assert time.monotonic() < deadline, "the webhook ran no job"
        time.sleep(0.05)
    finish(running.ann, jobs[0])
    assert list(running.ann.fetch_job_logs(job_id=jobs[0].id)) == ["got dataset ann/event"]
    running.ann.delete_webhook(hook.id)


def test_a_stopped_hub_leaves_no_job_behind(directory: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with LocalHub(directory, USERS, rules=Rules(allow_jobs=True)) as hub:
        job = run(clients(hub).ann, f"import time; time.sleep(2); open({str(mark)!r}, 'w')")
    with LocalHub(directory, USERS) as hub:
        assert str(clients(hub).ann.inspect_job(job_id=job.id).status.stage) == "CANCELED"
    time.sleep(2)
    assert not mark.exists()


def test_schedules_are_cron_in_utc() -> None:
    noon = 1_700_000_000.0 - 1_700_000_000 % 86400 + 12 * 3600
    assert next_run("@daily", noon) - noon == 12 * 3600
    assert next_run("*/15 * * * *", noon + 1) - noon == 900
    for wrong in ("every day", "61 * * * *", ""):
        with pytest.raises(Refusal):
            next_run(wrong, noon)
