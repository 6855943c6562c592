"""
The heartbeat: `step` looks, decides, acts. `World` is all it can touch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from common.logs import get_logger
from common.schemas import HardwareStatus
from worker.hardware.gpu import Machine
from worker.scheduling.overtake import Overtaking, choose_overtaking
from worker.scheduling.pick import Knowledge, Turn, pick_turn
from worker.scheduling.substitute import Substitution, choose_substitute
from worker.state.backlog import Backlog
from worker.state.residency import Quarantine, Residency

logger = get_logger(__name__)

_ASKED_IN_VAIN_S = 10.0  # a switch that was asked for and has not begun by then is asked for again
_NEXT_LOOK_S = 0.5  # by then the next step has been made, and what it moves has been moved
_OFFERS_KNOWN_S = 2.0  # by then every router knows that a model has failed, and routes its jobs elsewhere


class World(Protocol):
    """Everything the heartbeat may look at and do."""

    def machine(self) -> Machine:
        """The cards and the host, now."""
        ...

    def backlog(self) -> Backlog:
        """The jobs that wait, now."""
        ...

    def residency(self) -> Residency:
        """What is loaded, now; engines that died by themselves are off it."""
        ...

    def knowledge(self, residency: Residency, *, now: float) -> Knowledge:
        """What was measured of the models, and what the other workers serve; they are told what this one does."""
        ...

    def ask_for_switch(self, turn: Turn, residency: Residency) -> None:
        """Send the switch task for *turn*, unless another worker has changed its own turn meanwhile."""
        ...

    def substitute(self, model_id: str, by: str, reason: str) -> int:
        """Give *by* the jobs that wait for *model_id*, as far as it may take them; returns how many."""
        ...

    def overtake(self, some: Overtaking) -> None:
        """Let *some* waiting jobs begin before the others of their class."""
        ...

    def use_cloud(self, residency: Residency, backlog: Backlog, *, now: float) -> None:
        """Send jobs whose models cannot be made ready to the cloud endpoint, as far as they may leave."""
        ...

    def serve(self, models: Iterable[str]) -> None:
        """Take jobs for exactly these models, and those on their way to the cloud endpoint."""
        ...

    def stop_cancelled_jobs(self) -> None:
        """Tell running jobs that somebody cancelled."""
        ...

    def route_again(self, model_id: str) -> None:
        """Send the jobs that wait for *model_id* back to the router, as far as any model may answer them."""
        ...

    def prefetch(self, residency: Residency, backlog: Backlog, *, now: float) -> None:
        """Bring the files of the model that is needed next closer, in the background."""
        ...

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
        """Tell producers when the waiting jobs will end, in the background."""
        ...

    def publish(
        self, machine: Machine, residency: Residency, backlog: Backlog, *, turn: Turn, now: float
    ) -> HardwareStatus:
        """Tell the outside how things are."""
        ...


class Runtime:
    """Decides, a few times a second, which model should be ready; the deeds are the world's."""

    def __init__(
        self,
        world: World,
        *,
        models: Iterable[str],
        larger: Mapping[str, Sequence[str]],
        starting: str | None,
        max_wait_s: float,
        min_turn_s: float,
        status_every_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._world = world
        self._models = tuple(models)
        self._larger = larger
        self._starting = starting
        self._max_wait_s = max_wait_s
        self._min_turn_s = min_turn_s
        self._status_every_s = status_every_s
        self._clock = clock
        self._published: tuple[Residency, float] | None = None
        self._routed_again: dict[str, Quarantine] = {}

    def step(self) -> Turn:
        """Look, decide, act."""
        now = self._clock()
        residency = self._world.residency()
        backlog = self._world.backlog()
        known = self._world.knowledge(residency, now=now)

        turn = pick_turn(
            backlog,
            residency,
            self._models,
            now=now,
            max_wait_s=self._max_wait_s,
            min_turn_s=self._min_turn_s,
            starting=self._starting,
            known=known,
        )
        taken = choose_substitute(backlog, residency, self._larger, known=known, now=now)
        if not self._take_over(taken, turn) and self._needs_switch(turn, residency, now):
            self._world.ask_for_switch(turn, residency)
        for some in choose_overtaking(backlog, residency, known=known, look_s=_NEXT_LOOK_S, now=now):
            self._world.overtake(some)
        self._world.use_cloud(residency, backlog, now=now)
        self._world.serve(residency.ready_models)
        self._world.stop_cancelled_jobs()
        for model_id in self._stranded(residency, backlog, now):
            self._world.route_again(model_id)
        self._world.prefetch(residency, backlog, now=now)
        self._world.foretell(
            residency, backlog, known, max_wait_s=self._max_wait_s, min_turn_s=self._min_turn_s, now=now
        )

        if self._status_is_due(residency, now):
            self._world.publish(self._world.machine(), residency, backlog, turn=turn, now=now)
            self._published = (residency, now)
        return turn

    def _take_over(self, taken: Substitution, turn: Turn) -> bool:
        """Give jobs to a larger model, if it stays ready or would leave for the model of these very jobs."""
        if taken.model_id is None or taken.by is None or turn.model_id not in (taken.model_id, taken.by):
            return False
        return self._world.substitute(taken.model_id, taken.by, taken.reason) > 0

    @staticmethod
    def _needs_switch(turn: Turn, residency: Residency, now: float) -> bool:
        """Is the model of the turn not ready, and nothing under way that would change it?"""
        if turn.model_id is None or residency.ready(turn.model_id):
            return False
        asked = residency.switching
        return asked is None or (not asked.begun and now - asked.since > _ASKED_IN_VAIN_S)

    def _stranded(self, residency: Residency, backlog: Backlog, now: float) -> list[str]:
        """
        The models whose jobs should be routed again: they failed to load, and another model could answer.

        Once for each failure: what the router sends here again, nobody else can take.
        """
        broken = {model: q for model, q in residency.quarantined.items() if now < q.until}
        if not set(self._models) - set(broken):
            return []
        found = [
            model
            for model, quarantine in sorted(broken.items())
            if backlog.count(model)
            and now - quarantine.since > _OFFERS_KNOWN_S
            and self._routed_again.get(model) != quarantine
        ]
        self._routed_again |= {model: broken[model] for model in found}
        return found

    def _status_is_due(self, residency: Residency, now: float) -> bool:
        if self._published is None:
            return True
        before, at = self._published
        return now - at >= self._status_every_s or _shape(residency) != _shape(before)


def _shape(residency: Residency) -> tuple[object, ...]:
    """What of the residency is worth telling at once."""
    levels = tuple(sorted((r.model_id, r.level) for r in residency.residents))
    return levels, residency.switching, tuple(sorted(residency.quarantined))


class Heart(threading.Thread):
    """
    Beats: a step every *interval_s*, or at once when woken, until stopped.

    A step that fails is told and does not stop the heart.
    """

    def __init__(self, runtime: Runtime, *, interval_s: float = 0.2) -> None:
        super().__init__(name="runtime", daemon=True)
        self._runtime = runtime
        self._interval_s = interval_s
        self._awake = threading.Event()
        self._ending = False

    def wake(self) -> None:
        """Step now: something has changed."""
        self._awake.set()

    def run(self) -> None:
        """Step until `end` is called."""
        last: Turn | None = None
        while not self._ending:
            self._awake.clear()
            try:
                turn = self._runtime.step()
            except Exception as error:  # noqa: BLE001 - Redis away, a driver gone: the next beat tries again
                logger.warning("runtime.step_failed", error=f"{type(error).__name__}: {error}")
            else:
                if last is None or turn.model_id != last.model_id:
                    logger.info("scheduling.turn", model_id=turn.model_id, reason=turn.reason)
                last = turn
            self._awake.wait(self._interval_s)

    def end(self) -> None:
        """Stop after the step under way."""
        self._ending = True
        self._awake.set()
        if self.is_alive():
            self.join()
