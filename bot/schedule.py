"""Run iterations on a schedule with APScheduler: one at a time, missed runs once, stopping between two stages."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_MAX_INSTANCES, JobExecutionEvent
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from bot.config import Schedule
from hubfusion.errors import FusionError

log = logging.getLogger(__name__)
_stopping = threading.Event()


class Stopped(FusionError):
    """The run was asked to stop and did, at a step boundary; the next run goes on from there."""


def stop_on_signals() -> Callable[[], None]:
    """Turn SIGTERM into a request, and return the check that honors it between two steps.

    A second signal is not caught: the default action ends the process at once, which is safe too, only less tidy.
    """

    def request(number: int, frame: object) -> None:
        log.warning("%s: stopping at the next step boundary", signal.Signals(number).name)
        _stopping.set()
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, request)
    return check_stop


def check_stop() -> None:
    """Raise `Stopped` once a stop was requested."""
    if _stopping.is_set():
        raise Stopped("stopped by SIGTERM between two steps; the next run goes on from here")


def trigger(schedule: Schedule) -> Any:
    """The APScheduler trigger of a schedule: its cron line in UTC, else its interval."""
    if schedule.cron:
        try:
            return CronTrigger.from_crontab(schedule.cron, timezone=UTC)
        except ValueError as error:
            raise FusionError(f"schedule.cron: {schedule.cron!r} is not a cron line of five fields: {error}") from None
    if schedule.minutes < 1:
        raise FusionError(f"schedule.minutes must be at least 1, got {schedule.minutes}")
    return IntervalTrigger(minutes=schedule.minutes, timezone=UTC)


def serve(schedule: Schedule, iterate: Callable[[], object]) -> None:
    """Run ``iterate`` now and then on the schedule, until SIGTERM; an error ends that iteration, never the service.

    The process sleeps in the main thread, so signals arrive; the iteration runs in APScheduler's worker thread. Times
    that pass while one runs are coalesced into one.
    """
    scheduler = BackgroundScheduler(timezone=UTC)
    scheduler.add_listener(_report, EVENT_JOB_ERROR | EVENT_JOB_MAX_INSTANCES)
    scheduler.add_job(
        iterate,
        trigger(schedule),
        coalesce=True,
        max_instances=1,
        misfire_grace_time=None,
        next_run_time=datetime.now(UTC),
    )
    scheduler.start()
    log.info("serve: %s", f"cron {schedule.cron} UTC" if schedule.cron else f"every {schedule.minutes} minutes")
    while not _stopping.wait(1.0):
        pass
    scheduler.shutdown(wait=True)
    log.info("serve: stopped")


def _report(event: JobExecutionEvent) -> None:
    if event.code == EVENT_JOB_MAX_INSTANCES:
        log.warning("serve: the iteration before is still running; this time is left out")
    elif not isinstance(event.exception, Stopped):
        log.error("serve: iteration failed: %s", event.exception)
