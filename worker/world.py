"""
The real world of one worker: Redis, the cards, the switch task, Celery's consumer.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from common import keys
from common.logs import get_logger
from common.schemas import HardwareStatus, Offer, OfferedModel, utc_now
from worker.hardware.gpu import Machine, MachineReader
from worker.hardware.stub import NoGpuReader
from worker.jobs.capacities import Capacities
from worker.jobs.cloud_lane import CloudLane
from worker.jobs.paces import Paces, pace_of
from worker.jobs.runner import JobRunner
from worker.residency.board import ResidencyBoard
from worker.residency.history import SwitchHistory
from worker.residency.page_cache import PageCache
from worker.residency.plan import fitting_beside, see_others
from worker.residency.prefetch import choose_prefetch
from worker.residency.run import needs_of
from worker.residency.switcher import Switcher
from worker.scheduling.admit import admit_jobs
from worker.scheduling.celery_consumer import CeleryConsumer
from worker.scheduling.overtake import Overtaking
from worker.scheduling.pick import Knowledge, Turn
from worker.scheduling.redis_queues import RedisQueues
from worker.scheduling.redis_reroute import RedisReroute
from worker.scheduling.redis_substitute import RedisSubstitute
from worker.scheduling.redis_turns import RedisTurns
from worker.selection.placement import Placement
from worker.selection.places import host_place
from worker.simulate.forecast import Snapshot
from worker.simulate.price import expect_traffic, price_backlog, see_workers
from worker.state.backlog import Backlog
from worker.state.residency import Residency
from worker.telemetry.arrivals import Arrivals
from worker.telemetry.forecaster import Forecaster
from worker.telemetry.redis_paces import RedisPaces
from worker.telemetry.redis_status import RedisStatus
from worker.telemetry.summarize import summarize

logger = get_logger(__name__)

_SWITCHES_SHOWN = 10
_SELDOM_BUSY_ERROR = 0.2  # of the pace of a model that was never seen with all its places taken, for a while
_FEW = 4  # jobs that may come without being news
_HEARS_EVERY_S = 5.0  # what other workers measure, and tells what this one does


class WorkerWorld:
    """What the heartbeat of a real worker looks at and does."""

    def __init__(
        self,
        *,
        name: str,
        placements: Iterable[Placement],
        reader: MachineReader,
        board: ResidencyBoard,
        switcher: Switcher,
        history: SwitchHistory,
        queues: RedisQueues,
        reroute: RedisReroute,
        page_cache: PageCache,
        consumer: CeleryConsumer,
        cloud_lane: CloudLane,
        runner: JobRunner,
        capacities: Capacities,
        threads: int,
        status: RedisStatus,
        send_switch: Callable[[str, int, str], None],
        max_temperature_c: float,
        turns: RedisTurns,
        paces: Paces,
        kept_paces: RedisPaces,
        substitutes: RedisSubstitute,
        forecaster: Forecaster,
    ) -> None:
        self._name = name
        self._placements = tuple(placements)
        self._needs = {placement.model_id: needs_of(placement) for placement in self._placements}
        self._reader = reader
        self._machine = reader.read()  # as last seen, for what is looked at at every beat
        self._board = board
        self._switcher = switcher
        self._history = history
        self._queues = queues
        self._reroute = reroute
        self._page_cache = page_cache
        self._consumer = consumer
        self._cloud_lane = cloud_lane
        self._runner = runner
        self._capacities = capacities
        self._threads = threads
        self._status = status
        self._send_switch = send_switch
        self._max_temperature_c = max_temperature_c
        self._turns = turns
        self._paces = paces
        self._kept_paces = kept_paces
        self._substitutes = substitutes
        self._forecaster = forecaster
        self._arrivals = Arrivals()
        self._others: Mapping[str, Sequence[str]] = {}  # worker -> what it serves or loads ...
        self._offered: Mapping[str, frozenset[str]] = {}  # ... and what it could
        self._heard_at = 0.0
        self._foretold: Mapping[str, int] = {}  # model -> jobs that waited at the last forecast ...
        self._scene: object = None  # ... and who served what
        self._turn: Turn | None = None  # the heart's last one; publish_now tells it again
        self._one_publisher = threading.Lock()  # the heart publishes, and so does the switch lane at each stage
        self.stopping = False

    def machine(self) -> Machine:
        """See World."""
        self._machine = self._reader.read()
        return self._machine

    def backlog(self) -> Backlog:
        """See World."""
        return self._queues.backlog()

    def residency(self) -> Residency:
        """See World."""
        self._switcher.note_deaths()
        residency = self._board.read()
        now_ready = next(iter(residency.ready_models), None)
        expected = {
            model_id: self._history.expected_switch_s(now_ready, model_id, level=self._switcher.level(model_id))
            for model_id in self._needs
        }
        return replace(
            residency,
            switch_s={model: seconds for model, seconds in expected.items() if seconds is not None},
            beside=fitting_beside(see_others(residency, self._machine), self._needs),
        )

    def knowledge(self, residency: Residency, *, now: float) -> Knowledge:
        """See World."""
        switching = residency.switching
        mine = {*residency.ready_models, *([switching.to_model] if switching else [])}
        self._others = self._turns.look(() if self.stopping else mine)
        if now - self._heard_at >= _HEARS_EVERY_S:
            self._kept_paces.save(self._paces.unsaved())
            self._paces.learn(self._kept_paces.read())
            self._offered = self._turns.offered()
            self._heard_at = now
        measured = self._paces.known(self._needs)
        return Knowledge(
            paces={model: pace_of(found) for model, found in measured.items()},
            elsewhere=Counter(model for models in self._others.values() for model in models),
        )

    def ask_for_switch(self, turn: Turn, residency: Residency) -> None:
        """See World."""
        if turn.model_id is None or self.stopping:
            return
        stay = residency.ready_models if turn.model_id in residency.beside else ()
        if not self._turns.claim({turn.model_id, *stay}):
            logger.info("scheduling.look_again", model_id=turn.model_id, reason="another worker's turn has changed")
            return
        epoch = self._status.next_epoch(self._name)
        self._switcher.ask(turn.model_id, epoch)
        logger.info("scheduling.switch_asked", model_id=turn.model_id, epoch=epoch, reason=turn.reason)
        self._send_switch(turn.model_id, epoch, turn.reason)

    def overtake(self, some: Overtaking) -> None:
        """See World."""
        self._queues.overtake(some)

    def use_cloud(self, residency: Residency, backlog: Backlog, *, now: float) -> None:
        """See World."""
        self._cloud_lane.look(residency, backlog, now=now)

    def serve(self, models: Iterable[str]) -> None:
        """See World."""
        models = tuple(models)
        queues = [*map(keys.model_queue, models), *map(keys.cloud_queue, self._cloud_lane.open)]
        admission = admit_jobs([self._capacities.of(model) for model in models], otherwise=self._threads)
        self._consumer.serve(() if self.stopping else queues, at_once=admission.jobs)

    def substitute(self, model_id: str, by: str, reason: str) -> int:
        """See World."""
        placement = next(p for p in self._placements if p.model_id == by)
        return self._substitutes.take_over(model_id, offered(placement, self._board.read(), now=time.time()), reason)

    def foretell(
        self,
        residency: Residency,
        backlog: Backlog,
        known: Knowledge,
        *,
        max_wait_s: float,
        min_turn_s: float,
        now: float,
    ) -> None:
        """See World."""
        self._paces.look(residency, backlog, now=now)
        measured = self._paces.known(self._needs)
        ever = {model: found.count for model, found in measured.items()}
        for resident in residency.residents:
            ever[resident.model_id] = ever.get(resident.model_id, 0) + resident.in_flight
        self._arrivals.look({m: backlog.count(m) + ever.get(m, 0) for m in self._needs}, now=now)
        counts = {model: backlog.count(model) for model in self._needs}
        scene = residency.ready_models, self._others
        grown = any(count > 2 * self._foretold.get(model, 0) + _FEW for model, count in counts.items())
        if not self._forecaster.is_due(news=grown or scene != self._scene):
            return
        priced = price_backlog(backlog, known.paces, residency)
        if not priced.costs:
            return
        snapshot = Snapshot(
            now=now,
            backlog=priced.backlog,
            costs=priced.costs,
            max_wait_s=max_wait_s,
            min_turn_s=min_turn_s,
            usual_s=priced.usual_s,
            workers=see_workers(residency, self._others, self._offered, priced, now=now),
            traffic=expect_traffic(self._arrivals.per_s(), priced),
            pace_error={m: _SELDOM_BUSY_ERROR for m, found in measured.items() if found.job_s is None},
            spread={m: found.deviation_s / found.run_s for m, found in measured.items() if found.run_s},
        )
        ours = [m for m in priced.costs if residency.ready(m) or not known.elsewhere.get(m)]
        self._forecaster.want(snapshot, ours)
        self._foretold, self._scene = counts, scene

    def stop_cancelled_jobs(self) -> None:
        """See World."""
        self._runner.stop_cancelled()

    def route_again(self, model_id: str) -> None:
        """See World."""
        self._reroute.route_again(model_id)

    def prefetch(self, residency: Residency, backlog: Backlog, *, now: float) -> None:
        """See World."""
        models = () if self.stopping else self._needs
        spare = host_place(NoGpuReader().read()).budget  # at every beat, so without asking the cards
        self._page_cache.want(choose_prefetch(backlog, residency, models, spare_bytes=spare, now=now))

    def publish(
        self, machine: Machine, residency: Residency, backlog: Backlog, *, turn: Turn, now: float
    ) -> HardwareStatus:
        """See World."""
        self._turn = turn
        return self._publish(machine, residency, backlog, now=now)

    def publish_now(self) -> HardwareStatus:
        """Look and publish: for the stages of a switch, and for whoever asks."""
        return self._publish(self.machine(), self._board.read(), self.backlog(), now=time.time())

    def _publish(self, machine: Machine, residency: Residency, backlog: Backlog, *, now: float) -> HardwareStatus:
        with self._one_publisher:
            status = summarize(
                worker=self._name,
                machine=machine,
                residency=residency,
                backlog=backlog,
                turn=self._turn,
                switches=self._history.last(_SWITCHES_SHOWN),
                max_temperature_c=self._max_temperature_c,
                stopping=self.stopping,
                now=now,
                switch_times=self._history.times(),
                cloud_alerts=self._cloud_lane.alerts,
            )
            models = tuple(offered(placement, residency, now=now) for placement in self._placements)
            self._status.offer(Offer(worker=self._name, models=models, at=utc_now()))
            self._status.publish(status)
        return status


def offered(placement: Placement, residency: Residency, *, now: float) -> OfferedModel:
    """
    What the router needs to know of a placement.

    The length is the one in force, if it was loaded with less; away is what failed to load a short while ago.
    """
    spec = placement.spec
    resident = residency.resident(spec.id)
    return OfferedModel(
        id=spec.id,
        aliases=spec.aliases,
        tier=spec.tier,
        complexity_up_to=spec.complexity_up_to,
        max_model_len=(resident.max_model_len if resident else None) or placement.max_model_len,
        capabilities=tuple(sorted(spec.capabilities)),
        auto=placement.auto,
        away=residency.is_quarantined(spec.id, now),
    )
