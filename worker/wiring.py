"""
Builds the processes from the settings: the one place that picks products.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from socket import gethostname
from typing import Any

from celery import Celery
from redis.exceptions import RedisError

from common import keys
from common.celery_app import create_app
from common.errors import EngineMissing, Misconfigured, ShiftworkerError
from common.fleet import read_alive, read_offers
from common.logs import get_logger
from common.may_reach import Allowed
from common.redis_client import RedisClient, connect, wait_until_there
from common.redis_job_store import RedisJobStore
from common.schemas import Ledger, OfferedModel, utc_now
from common.settings import CloudSettings, Settings, WorkerSettings
from worker.alive import TOUCH_EVERY_S, alive_file
from worker.app import ConsumerProcess, show_in_flower
from worker.catalog.catalogue import Catalogue
from worker.catalog.download import resolve_files
from worker.catalog.hub import fetch_files, out_of_reach
from worker.catalog.local import read_all_facts, spec_from_path
from worker.catalog.spec import EngineKind, ModelSpec
from worker.catalog.toml_file import load_catalogue
from worker.catalog.weight_files import weight_files
from worker.delivery.lease import Lease
from worker.delivery.redis_steps import RedisSteps
from worker.engines.base import Engine
from worker.engines.llamacpp_server import LlamaCppEngine, find_server
from worker.engines.llamacpp_server import find_version as find_llamacpp_version
from worker.engines.orphans import claim, end_abandoned, end_orphans
from worker.engines.remote import RemoteEngine
from worker.engines.stub import StubEngine
from worker.engines.vllm_host import VllmHostEngine
from worker.engines.vllm_server import VllmServerEngine, find_python, find_version
from worker.hardware.detect import Detected, open_reader
from worker.hardware.gpu import Machine
from worker.jobs.capacities import Capacities
from worker.jobs.cloud_lane import CloudLane, StandIn
from worker.jobs.failures import JobLimits, outcome_of
from worker.jobs.job_lane import JobLane
from worker.jobs.runner import JobRunner
from worker.jobs.submit_lane import SubmitLane
from worker.memory.measured import LoadKey, Measured, Measurement, device_name, engine_name
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits
from worker.residency.history import SwitchHistory
from worker.residency.may_leave import Cloud
from worker.residency.page_cache import PageCache
from worker.residency.parts import SwitchLimits
from worker.residency.switcher import Switcher
from worker.routing.gate import Gate
from worker.routing.merge import merge_offers
from worker.routing.router import Router
from worker.routing.rules_file import load_rules
from worker.runtime import Heart, Runtime
from worker.scheduling.celery_consumer import CeleryConsumer, control_lane, every
from worker.scheduling.redis_cloud import RedisCloud
from worker.scheduling.redis_queues import RedisQueues
from worker.scheduling.redis_reroute import RedisReroute
from worker.selection.choose import Choice, choose_models
from worker.selection.describe import describe_choice
from worker.selection.lessons import Lessons
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.state.residency import Level
from worker.tasks import add_generate_task, add_submit_task, add_switch_task
from worker.telemetry.redis_measured import RedisMeasurements
from worker.telemetry.redis_status import RedisStatus
from worker.telemetry.redis_switch_times import RedisSwitchTimes
from worker.webhooks.sender import WebhookSender
from worker.world import WorkerWorld

logger = get_logger(__name__)

_SWITCH_EXPIRES_S = 60.0  # a switch task that nobody took by then is worthless: the heart has asked again
_ROUTER_THREADS = 4
_ROUTER_TAKES = 64  # jobs in hand: its lane routes them together
_RUN_DIR_PREFIX = "sw-"


# --- What is here, and what can it serve? -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The machine, the catalogue and the choice: all that is known before anything is started."""

    detected: Detected
    machine: Machine
    catalogue: Catalogue
    engines: Mapping[EngineKind, str | None]  # why an engine is not available; None = it is
    choice: Choice
    lessons: Lessons

    def measured(self, placement: Placement) -> Measurement | None:
        """What the last load of this very *placement* took; None if nobody has loaded it yet."""
        engine = self.lessons.engines[placement.spec.engine]
        key = placement.load_key(engine=engine, device=device_name(self.machine, placement.gpus))
        return self.lessons.measurements.get(key)


def survey(settings: Settings) -> Survey:
    """
    Look at the machine and choose the models; nothing is started, nothing is written.

    What earlier loads measured counts if Redis is there to say it.

    Raises
    ------
    Misconfigured
        A setting, the catalogue, or VLLM_MODEL is wrong; the message says what to do.
    """
    detected = open_reader(settings.worker)
    machine = detected.reader.read()
    catalogue = load_catalogue(settings.models.file, base_dir=settings.models.dir)
    model = _asked_model(settings, catalogue)
    if settings.worker.stub_engine:
        catalogue = Catalogue(
            models=tuple(replace(spec, engine=EngineKind.STUB, path=None, repo=None) for spec in catalogue)
        )
    catalogue, missing = read_all_facts(catalogue)
    engines = _engines_here(settings)
    lessons = Lessons(measurements=_measurements(settings), engines=engine_names(settings))
    choice = choose_models(
        machine,
        catalogue,
        engines=engines,
        overrides=_overrides(settings, model),
        missing={**missing, **out_of_reach(catalogue)},
        lessons=lessons,
    )
    return Survey(
        detected=detected, machine=machine, catalogue=catalogue, engines=engines, choice=choice, lessons=lessons
    )


def _measurements(settings: Settings) -> Mapping[LoadKey, Measurement]:
    """What earlier loads of this fleet measured; nothing where no Redis answers."""
    client = connect(settings.redis.url)
    try:
        client.ping()
    except (RedisError, OSError):
        return {}
    return RedisMeasurements(client).read()


def _asked_model(settings: Settings, catalogue: Catalogue) -> str | ModelSpec | None:
    """VLLM_MODEL as the choice wants it: a name that the catalogue knows, or an entry made for it."""
    name = settings.vllm.model
    if name is None or catalogue.find(name) is not None:
        return name
    return spec_from_path(name, base_dir=settings.models.dir)


def _engines_here(settings: Settings) -> dict[EngineKind, str | None]:
    if settings.worker.stub_engine:
        return {EngineKind.STUB: None}

    def why_not(find: Callable[[], object]) -> str | None:
        try:
            find()
        except EngineMissing as error:
            return error.message
        return None

    return {
        EngineKind.VLLM: why_not(lambda: find_python(settings.vllm)),
        EngineKind.LLAMACPP: why_not(lambda: find_server(settings.llamacpp)),
    }


def _overrides(settings: Settings, model: str | ModelSpec | None) -> Overrides:
    return Overrides(
        model=model,
        only=settings.models.only,
        force=settings.vllm.force,
        quantization=settings.vllm.quantization,
        max_model_len=settings.vllm.max_model_len,
        gpu_memory_utilization=settings.vllm.gpu_memory_utilization,
        tensor_parallel_size=settings.vllm.tensor_parallel_size,
        max_num_seqs=settings.vllm.max_num_seqs,
        llamacpp_parallel=settings.llamacpp.parallel,
        n_gpu_layers=_gpu_layers(settings),
        vllm_version=_vllm_version(settings),
        residents=settings.switch.max_residents,
        asleep=_asleep(settings),
    )


def _asleep(settings: Settings) -> int:
    """How many models of vLLM may sleep; its own server puts none to sleep."""
    return settings.switch.max_asleep if settings.vllm.channel == "host" else 0


def _vllm_version(settings: Settings) -> str | None:
    try:
        return find_version(find_python(settings.vllm))
    except EngineMissing:
        return None


def _gpu_layers(settings: Settings) -> int | None:
    """The operator's number of layers, or none on the card for xllamacpp: its build on PyPI knows no card."""
    asked = settings.llamacpp.n_gpu_layers
    if asked is not None:
        return asked
    try:
        program = Path(find_server(settings.llamacpp)[0])
    except EngineMissing:
        return None
    return 0 if program == Path(sys.executable) else None


# --- The router process -----------------------------------------------------------------------------------


def run_router(settings: Settings) -> int:
    """Run the router until it is told to stop; returns the exit code."""
    rules = load_rules(settings.routing.rules_file)
    name = process_name("router", settings)
    owner = _owner(name)
    client, patient = _redis(settings)
    app = create_app(settings, owner=owner)
    app.conf.worker_prefetch_multiplier = _ROUTER_TAKES // _ROUTER_THREADS
    store = RedisJobStore(patient, ttl_s=settings.job.result_ttl_s, max_bytes=settings.job.result_max_bytes)
    gate = Gate(limits=settings.limit, egress=settings.egress, webhooks=settings.webhook.secret is not None)
    router = Router(store=store, offers=lambda: _offered(client), rules=rules, gate=gate)
    add_submit_task(app, router, store)
    steps = RedisSteps(
        patient, app, owner=owner, ttl_s=settings.job.result_ttl_s, max_bytes=settings.job.result_max_bytes
    )
    process = ConsumerProcess(
        app=app,
        name=name,
        lease=_lease(app, settings, owner),
        concurrency=_ROUTER_THREADS,
        lanes={keys.SUBMIT_TASK: SubmitLane(router, steps).lane},
        refuse=lambda job_id, error: _refuse(app, store, job_id, error),
        grace_s=settings.worker.soft_shutdown_s,
        own_queues=[keys.SUBMIT_QUEUE],
        steps=[every(TOUCH_EVERY_S, alive_file("router").touch)],
    )
    with _webhooks(settings):
        return process.run()


def _refuse(app: Celery, store: RedisJobStore, job_id: str, error: ShiftworkerError) -> None:
    """End a job whose message nobody can read: its producer hears of it."""
    kept = store.finish(outcome_of(error, job_id, Ledger()))
    if kept.error is not None:
        app.backend.mark_as_failure(job_id, kept.error.as_exception())


def _webhooks(settings: Settings) -> AbstractContextManager[object]:
    """What sends webhooks; nothing without a secret to sign them with."""
    if settings.webhook.secret is None:
        return nullcontext()
    return WebhookSender(settings.redis.url, settings.webhook, Allowed.parse(settings.egress.allow))


def _offered(client: RedisClient) -> tuple[OfferedModel, ...]:
    offers = read_offers(client)
    return merge_offers(offers, alive=read_alive(client, (offer.worker for offer in offers)))


# --- The worker process -----------------------------------------------------------------------------------


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
        run_dir = _run_dir(settings, leaving)
        end_orphans(run_dir)
        return _Worker(settings, found, run_dir).run()


class _Worker:
    """The parts of one worker process, wired together."""

    def __init__(self, settings: Settings, found: Survey, run_dir: Path) -> None:
        self._name = worker_name(settings)
        owner = _owner(self._name)
        client, patient = _redis(settings)
        self._app = create_app(settings, owner=owner)
        self._status = RedisStatus(client, ttl_s=settings.status.ttl_s, stream_length=settings.status.stream_length)

        choice = found.choice
        placements = {placement.model_id: placement for placement in choice.placements}
        engines = build_engines(settings, {p.spec.engine for p in choice.placements}, run_dir)
        board = ResidencyBoard(
            capacity=found.machine.ram_total_bytes,
            cards={gpu.index: gpu.total_bytes for gpu in found.machine.gpus},
            max_residents=settings.switch.max_residents,
        )
        reroute = RedisReroute(client)
        self._page_cache = PageCache(lambda model_id: weight_files(placements[model_id].spec))
        switch_times = RedisSwitchTimes(client, self._name)
        history = SwitchHistory(
            lambda record: self._status.record(self._name, record),
            times=switch_times.read(),
            keep_time=switch_times.save,
        )
        store = RedisJobStore(patient, ttl_s=settings.job.result_ttl_s, max_bytes=settings.job.result_max_bytes)
        self._stand_in = _stand_in(settings.cloud)
        cloud_lane = CloudLane(
            queues=RedisCloud(client, tuple(placements)),
            stand_in=self._stand_in,
            served_elsewhere=lambda: _served_elsewhere(client, self._name),
        )
        capacities = Capacities(placements, engines, threads=settings.worker.concurrency)
        runner = JobRunner(
            worker=self._name,
            store=store,
            board=board,
            placements=placements,
            engines=engines,
            limits=JobLimits(timeout_s=settings.job.timeout_s, max_attempts=settings.job.max_attempts),
            switch_seconds=history.seconds_between,
            stand_in=self._stand_in,
        )
        queues = RedisQueues(client, list(placements), max_wait_s=settings.switch.max_wait_s)
        self._switcher = Switcher(
            board=board,
            placements=placements,
            engines=engines,
            machine=found.detected.reader,
            limits=_switch_limits(settings),
            fetch=fetch_files,
            hand_back=runner.hand_back,
            record=history.add,
            measured=_both(capacities.loaded, _keeper_of_measurements(client, settings, found.machine)),
            load_speed=history.load_speed,
            times=history.times,
            backlog=queues.backlog,
            substitutable=reroute.waits,
            cloud=cloud_lane.waits,
            epoch=self._status.next_epoch(self._name),
        )
        consumer = CeleryConsumer()
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
        )
        self._heart = Heart(
            Runtime(
                self._world,
                models=placements,
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
        name = process_name("worker", settings)
        self._process = ConsumerProcess(
            app=self._app,
            name=name,
            lease=_lease(self._app, settings, owner),
            concurrency=settings.worker.concurrency,
            grace_s=settings.worker.soft_shutdown_s,
            lanes={keys.GENERATE_TASK: JobLane(runner, redis_steps, hostname=name).lane},
            refuse=lambda job_id, error: _refuse(self._app, store, job_id, error),
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
        self._heart.start()
        try:
            return self._process.run()
        finally:
            self._heart.end()
            self._page_cache.close()
            self._switcher.close()
            if self._stand_in is not None:
                self._stand_in.engine.close()
            self._status.goodbye(self._name)

    def _leave(self) -> None:
        """Called from a signal handler: ending the switch under way takes a moment, so on a thread of its own."""
        self._world.stopping = True
        threading.Thread(target=self._switcher.abandon, name="abandon-switch", daemon=True).start()

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


def build_engines(settings: Settings, kinds: set[EngineKind], run_dir: Path) -> dict[EngineKind, Engine]:
    """Build the engines of these *kinds*, each with its sockets and logs in *run_dir*."""
    build: dict[EngineKind, Callable[[], Engine]] = {
        EngineKind.VLLM: lambda: _vllm(settings, run_dir),
        EngineKind.LLAMACPP: lambda: LlamaCppEngine(
            run_dir=run_dir, files_of=resolve_files, server=find_server(settings.llamacpp)
        ),
        EngineKind.STUB: lambda: _stub(settings.worker),
    }
    return {kind: build[kind]() for kind in kinds}


def _vllm(settings: Settings, run_dir: Path) -> Engine:
    python, media = find_python(settings.vllm), settings.egress.media_domains
    server = VllmServerEngine(run_dir=run_dir, files_of=resolve_files, python=python, media_domains=media)
    if settings.vllm.channel == "server":
        return server
    return VllmHostEngine(
        run_dir=run_dir,
        files_of=resolve_files,
        python=python,
        several_cards=server,
        media_domains=media,
        sleeps=_asleep(settings) > 0,
    )


def _stub(worker: WorkerSettings) -> Engine:
    wake_s = worker.stub_wake_s
    levels = () if wake_s is None else (Level.ASLEEP_1, Level.ASLEEP_2)
    return StubEngine(load_s=worker.stub_load_s, run_s=worker.stub_run_s, wake_s=dict.fromkeys(levels, wake_s or 0.0))


def _stand_in(settings: CloudSettings) -> StandIn | None:
    """The cloud endpoint of the settings; None = there is none."""
    if settings.url is None or settings.model is None:
        return None
    return StandIn(
        engine=RemoteEngine(url=settings.url, api_key=settings.api_key, model=settings.model),
        cloud=Cloud(
            model=settings.model,
            for_models=frozenset(settings.for_models),
            capabilities=frozenset(settings.capabilities),
        ),
        parallel=settings.parallel,
    )


def _served_elsewhere(client: RedisClient, name: str) -> frozenset[str]:
    """The models that a worker other than *name* can serve now."""
    others = [offer for offer in read_offers(client) if offer.worker != name]
    alive = read_alive(client, [offer.worker for offer in others])
    return frozenset(model.id for offer in others if offer.worker in alive for model in offer.models if not model.away)


def _keeper_of_measurements(
    client: RedisClient, settings: Settings, machine: Machine
) -> Callable[[Placement, Measured], None]:
    """What a load measured goes to Redis, beside what was predicted."""
    measurements, names = RedisMeasurements(client), engine_names(settings)

    def keep(placement: Placement, measured: Measured) -> None:
        key = placement.load_key(engine=names[placement.spec.engine], device=device_name(machine, placement.gpus))
        measurements.save(Measurement(key=key, predicted=placement.memory, measured=measured, at=utc_now()))

    return keep


def _both(
    first: Callable[[Placement, Measured], object], second: Callable[[Placement, Measured], object]
) -> Callable[[Placement, Measured], None]:
    """Tell two of a load."""

    def tell(placement: Placement, measured: Measured) -> None:
        first(placement, measured)
        second(placement, measured)

    return tell


def engine_names(settings: Settings) -> Mapping[EngineKind, str]:
    """Name each engine with the version that is here, as measurements are kept by."""

    def llamacpp_version() -> str | None:
        try:
            return find_llamacpp_version(find_server(settings.llamacpp))
        except EngineMissing:
            return None

    versions = {EngineKind.VLLM: _vllm_version(settings), EngineKind.LLAMACPP: llamacpp_version()}
    return {kind: engine_name(kind, versions.get(kind)) for kind in EngineKind}


def _switch_limits(settings: Settings) -> SwitchLimits:
    switch = settings.switch
    return SwitchLimits(
        attempt_s=switch.timeout_s,
        attempts=switch.attempts,
        drain_s=switch.drain_s,
        quarantine_s=switch.quarantine_s,
        asleep=switch.max_asleep,
        load=LoadLimits(max_temperature_c=switch.max_temperature_c, max_power_share=switch.max_power_share),
    )


# --- Names, folders, connections --------------------------------------------------------------------------


def worker_name(settings: Settings) -> str:
    """What this worker is called in Redis and in `shiftworker status`."""
    return settings.worker.name or gethostname().split(".")[0]


def process_name(role: str, settings: Settings) -> str:
    """What Celery and Flower call a process of ours."""
    return f"{role}@{worker_name(settings)}"


def _owner(name: str) -> str:
    """A name for this one start of this process: deliveries of an earlier start are another owner's."""
    return f"{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def _run_dir(settings: Settings, leaving: ExitStack) -> Path:
    """The folder of the settings, or one of this start alone; those of killed workers go."""
    if settings.worker.run_dir is None:
        end_abandoned(Path(tempfile.gettempdir()).glob(f"{_RUN_DIR_PREFIX}*"))
        folder = tempfile.TemporaryDirectory(prefix=_RUN_DIR_PREFIX, ignore_cleanup_errors=True)
        run_dir = Path(leaving.enter_context(folder))
        leaving.enter_context(claim(run_dir))
        return run_dir
    settings.worker.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if settings.worker.run_dir.stat().st_mode & 0o077:
        raise Misconfigured(
            f"WORKER_RUN_DIR={settings.worker.run_dir} can be opened by others, and the engines' sockets lie there: "
            "`chmod 700` it, or name another folder."
        )
    return settings.worker.run_dir


def _redis(settings: Settings) -> tuple[RedisClient, RedisClient]:
    """A client for what may be missed, and a patient one for what must not; waits until Redis is there."""
    client = connect(settings.redis.url)
    wait_until_there(client, settings.redis.url)
    return client, connect(settings.redis.url, patient=True)


def _lease(app: Celery, settings: Settings, owner: str) -> Lease:
    return Lease(
        app=app,
        client=connect(settings.redis.url),
        owner=owner,
        lease_s=settings.delivery.lease_s,
        visibility_timeout_s=settings.delivery.visibility_timeout_s,
    )
