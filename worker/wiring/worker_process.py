"""
The worker process, built from the settings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from common import keys
from common.celery_app import create_app
from common.errors import Misconfigured
from common.logs import get_logger
from common.redis_job_store import RedisJobStore
from common.schemas import JobRequest
from common.settings import Settings
from worker.alive import TOUCH_EVERY_S, alive_file
from worker.app import ConsumerProcess, show_in_flower
from worker.catalog.hub import fetch_files
from worker.catalog.weight_files import weight_files
from worker.delivery.redis_steps import RedisSteps
from worker.engines.base import Completion
from worker.engines.orphans import end_orphans
from worker.jobs.capacities import Capacities
from worker.jobs.cloud_lane import CloudLane
from worker.jobs.failures import JobLimits
from worker.jobs.job_lane import JobLane
from worker.jobs.paces import Paces
from worker.jobs.runner import JobRunner
from worker.memory.measured import Measured
from worker.residency.page_cache import PageCache
from worker.residency.switcher import Switcher
from worker.runtime import Heart, Runtime
from worker.scheduling.celery_consumer import CeleryConsumer, control_lane, every
from worker.scheduling.redis_cloud import RedisCloud
from worker.scheduling.redis_queues import RedisQueues
from worker.scheduling.redis_reroute import RedisReroute
from worker.scheduling.redis_substitute import RedisSubstitute
from worker.scheduling.redis_turns import RedisTurns
from worker.scheduling.substitute import find_larger
from worker.selection.describe import describe_choice
from worker.selection.placement import Placement
from worker.tasks import add_generate_task, add_switch_task
from worker.telemetry.forecaster import Forecaster, publish_to
from worker.telemetry.redis_paces import RedisPaces
from worker.telemetry.redis_status import RedisStatus
from worker.wiring.cloud import served_elsewhere, stand_in_of
from worker.wiring.engines import build_engines
from worker.wiring.here import Survey, survey
from worker.wiring.parts import (
    lease_of,
    open_redis,
    owner_of,
    process_name,
    refuse,
    watch_the_waiting,
    worker_name,
)
from worker.wiring.run_dir import open_run_dir
from worker.wiring.switching import board_of, history_of, keeper_of_measurements, limits_of, sleeps_of
from worker.world import WorkerWorld

logger = get_logger(__name__)

_SWITCH_EXPIRES_S = 60.0  # a switch task that nobody took by then is worthless: the heart has asked again


def run_worker(settings: Settings) -> int:
    """
    Run the worker until it is told to stop; returns the exit code.

    Raises
    ------
    Misconfigured
        Nothing can be served here; the message has the reason for every model.
    """
    found = survey(settings)
    for line in found.detected.passed_over:
        logger.info("hardware.passed_over", reason=line)
    for line in describe_choice(found.choice):
        logger.info("selection.choice", line=line)
    if not found.choice.placements:
        reasons = "\n  ".join(describe_choice(found.choice)[1:])
        raise Misconfigured(f"No model can be served here:\n  {reasons}\nName another catalogue in MODELS_FILE.")

    with ExitStack() as leaving:
        run_dir = open_run_dir(settings, leaving)
        end_orphans(run_dir)
        return _Worker(settings, found, run_dir).run()


class _Worker:
    """The parts of one worker process, wired together."""

    def __init__(self, settings: Settings, found: Survey, run_dir: Path) -> None:
        self._name = worker_name(settings)
        owner = owner_of(self._name)
        client, patient = open_redis(settings)
        self._app = create_app(settings, owner=owner)
        self._status = RedisStatus(client, ttl_s=settings.status.ttl_s, stream_length=settings.status.stream_length)

        choice = found.choice
        placements = {placement.model_id: placement for placement in choice.placements}
        engines = build_engines(settings, {p.spec.engine for p in choice.placements}, run_dir)
        sleeps = sleeps_of(client, self._name)
        board = board_of(settings, found.machine, sleeps)
        history = history_of(client, self._name, self._status)
        reroute = RedisReroute(client)
        self._page_cache = PageCache(lambda model_id: weight_files(placements[model_id].spec))
        store = RedisJobStore(patient, ttl_s=settings.job.result_ttl_s, max_bytes=settings.job.result_max_bytes)
        self._stand_in = stand_in_of(settings.cloud)
        cloud_lane = CloudLane(
            queues=RedisCloud(client, tuple(placements)),
            stand_in=self._stand_in,
            served_elsewhere=lambda: served_elsewhere(client, self._name),
        )
        capacities = Capacities(placements, engines, threads=settings.worker.concurrency)
        kept_paces = RedisPaces(client)
        paces = Paces(
            self._name,
            at_once=lambda model_id: capacities.of(model_id).at_once,
            in_flight=lambda model_id: r.in_flight if (r := board.read().resident(model_id)) else 0,
            earlier=kept_paces.read(),
        )
        runner = JobRunner(
            worker=self._name,
            store=store,
            board=board,
            placements=placements,
            engines=engines,
            limits=JobLimits(
                timeout_s=settings.job.timeout_s,
                max_attempts=settings.job.max_attempts,
                max_deaths=settings.job.max_deaths,
                max_worker_deaths=settings.job.max_worker_deaths,
            ),
            switch_seconds=history.seconds_between,
            stand_in=self._stand_in,
            on_answer=_both_hear(capacities, paces),
        )
        queues = RedisQueues(client, list(placements), bounds=settings.switch.bounds)
        self._switcher = Switcher(
            board=board,
            placements=placements,
            engines=engines,
            machine=found.detected.reader,
            limits=limits_of(settings),
            fetch=fetch_files,
            hand_back=runner.hand_back,
            record=history.add,
            measured=_both_told(capacities.loaded, keeper_of_measurements(client, settings, found.machine)),
            load_speed=history.load_speed,
            times=history.times,
            backlog=queues.backlog,
            substitutable=reroute.waits,
            cloud=cloud_lane.waits,
            sleeps=sleeps,
            epoch=self._status.next_epoch(self._name),
        )
        consumer = CeleryConsumer()
        self._turns = RedisTurns(client, self._name)
        self._forecaster = Forecaster(self._name, publish_to(client))
        self._world = WorkerWorld(
            name=self._name,
            placements=choice.placements,
            reader=found.detected.reader,
            board=board,
            switcher=self._switcher,
            history=history,
            queues=queues,
            reroute=reroute,
            page_cache=self._page_cache,
            consumer=consumer,
            cloud_lane=cloud_lane,
            runner=runner,
            capacities=capacities,
            threads=settings.worker.concurrency,
            status=self._status,
            send_switch=self._send_switch,
            max_temperature_c=settings.switch.max_temperature_c,
            turns=self._turns,
            paces=paces,
            kept_paces=kept_paces,
            substitutes=RedisSubstitute(client),
            forecaster=self._forecaster,
        )
        self._heart = Heart(
            Runtime(
                self._world,
                models=placements,
                larger=find_larger(choice.placements),
                starting=choice.starting.model_id if choice.starting else None,
                max_wait_s=settings.switch.max_wait_s,
                min_turn_s=settings.switch.min_turn_s,
                status_every_s=settings.status.interval_s,
                clock=time.time,
            )
        )
        add_generate_task(self._app, runner, store)
        add_switch_task(self._app, self._switcher, self._stage_changed)
        redis_steps = RedisSteps(
            patient, self._app, owner=owner, ttl_s=settings.job.result_ttl_s, max_bytes=settings.job.result_max_bytes
        )
        self._deadlines = watch_the_waiting(settings, store)
        name = process_name("worker", settings)
        self._process = ConsumerProcess(
            app=self._app,
            name=name,
            lease=lease_of(self._app, settings, owner),
            concurrency=settings.worker.concurrency,
            grace_s=settings.worker.soft_shutdown_s,
            lanes={keys.GENERATE_TASK: JobLane(runner, redis_steps, hostname=name).lane},
            refuse=lambda job_id, error: refuse(self._app, store, job_id, error),
            steps=[
                consumer.step(),
                control_lane(keys.control_queue(self._name)),
                every(TOUCH_EVERY_S, alive_file("worker").touch),
                show_in_flower(self._about, [keys.model_queue(model) for model in placements]),
            ],
            on_leaving=self._leave,
        )

    def run(self) -> int:
        """Beat and consume; at the end: no more turns, jobs end, engines end, goodbye in Redis."""
        self._forecaster.start()
        self._heart.start()
        try:
            with self._deadlines:
                return self._process.run()
        finally:
            self._heart.end()
            self._forecaster.end()
            self._page_cache.close()
            self._switcher.close()
            if self._stand_in is not None:
                self._stand_in.engine.close()
            with suppress(RedisError, OSError):  # Redis is away: the status runs out by itself
                self._turns.goodbye()
                self._status.goodbye(self._name)

    def _leave(self) -> None:
        """Ending the switch under way takes a moment, so on a thread of its own."""
        self._world.stopping = True
        threading.Thread(target=self._abandon, name="abandon-switch", daemon=True).start()

    def _abandon(self) -> None:
        self._switcher.abandon()
        with suppress(RedisError, OSError):  # nobody can be told
            self._world.publish_now()

    def _stage_changed(self) -> None:
        self._heart.wake()
        self._world.publish_now()

    def _send_switch(self, model_id: str, epoch: int, reason: str) -> None:
        self._app.send_task(
            keys.SWITCH_TASK,
            kwargs={"model": model_id, "epoch": epoch, "reason": reason},
            queue=keys.control_queue(self._name),
            expires=_SWITCH_EXPIRES_S,
            ignore_result=False,
        )

    def _about(self) -> dict[str, Any]:
        """What Flower shows of this worker."""
        status = self._world.publish_now()
        return {"shiftworker": status.model_dump(mode="json", exclude={"version", "worker"})}


def _both_hear(capacities: Capacities, paces: Paces) -> Callable[[str, JobRequest, Completion], None]:
    """Tell both of an answer."""

    def hear(model_id: str, request: JobRequest, completion: Completion) -> None:
        capacities.answered(model_id, completion)
        paces.answered(model_id, request, completion, now=time.time())

    return hear


def _both_told(
    first: Callable[[Placement, Measured], object], second: Callable[[Placement, Measured], object]
) -> Callable[[Placement, Measured], None]:
    """Tell two of a load."""

    def tell(placement: Placement, measured: Measured) -> None:
        first(placement, measured)
        second(placement, measured)

    return tell
