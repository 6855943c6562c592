"""
Keeps a few jobs on their way to the cloud endpoint while their models cannot be made ready, and no longer than that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from common.schemas import JobRequest, Route
from worker.engines.remote import RemoteEngine
from worker.residency.may_leave import Cloud, may_leave
from worker.scheduling.redis_cloud import Grant, RedisCloud
from worker.state.backlog import Backlog
from worker.state.residency import Residency

LOOK_EVERY_S = 1.0
# The router is asked first, and answers within a second or two: another model here costs nothing.
SETTLE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """The endpoint as the operator has set it."""

    engine: RemoteEngine
    cloud: Cloud
    parallel: int  # jobs that are there at once


class CloudLane:
    """
    A few jobs at a time: the rest stays where it can be answered as soon as its model is back.

    Parameters
    ----------
    queues
        Of every model of this worker.
    stand_in
        None = no job leaves; those that an earlier start sent away come home.
    served_elsewhere
        Which models another worker can serve now.
    """

    def __init__(
        self, *, queues: RedisCloud, stand_in: StandIn | None, served_elsewhere: Callable[[], Collection[str]]
    ) -> None:
        self._queues = queues
        self._stand_in = stand_in
        self._served_elsewhere = served_elsewhere
        self._looked_at = float("-inf")
        self._stay: dict[str, tuple[object, ...]] = {}  # model -> how things were when none of its jobs could leave
        self.open: tuple[str, ...] = ()  # models whose jobs on their way are to be taken

    @property
    def alerts(self) -> tuple[str, ...]:
        """What an operator should know: whose jobs leave, and why the endpoint is left alone."""
        leaving = (f"jobs of {model} that may leave the machine are answered by the cloud" for model in self.open)
        resting = self._stand_in.engine.resting if self._stand_in else None
        return (*leaving, *([f"no job leaves for the cloud for now: {resting}"] if resting else []))

    def waits(self, model_id: str) -> bool:
        """Does a job wait for *model_id*, with no other model ready, that the endpoint would be asked to answer now?"""
        stand_in = self._stand_in
        if stand_in is None or stand_in.engine.resting is not None:
            return False
        return self._queues.waits(model_id, _granting(stand_in.cloud, others_ready=False))

    def look(self, residency: Residency, backlog: Backlog, *, now: float) -> None:
        """
        Send jobs away or bring them home; does nothing within a second of the last time.

        The questions, in order:

        1. Which models cannot be made ready?      Those in quarantine, tried again or not, for longer than the
                                                   router needs; not while another worker can serve them.
        2. Is there an endpoint, and does it       If not, jobs on their way come home: to wait here for their model,
           not rest?                               or for the endpoint.
        3. Whose jobs are on their way, though     They come home: to be answered by the model itself.
           their model is not one of these?
        4. Is there room at the endpoint?          Then the next jobs leave.
        """
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now

        # (1) Broken.
        broken = [m for m, q in sorted(residency.quarantined.items()) if not residency.ready(m)]
        settled = [model for model in broken if now - residency.quarantined[model].since > SETTLE_S]
        if settled:
            elsewhere = self._served_elsewhere()
            settled = [model for model in settled if model not in elsewhere]

        # (2) Open.
        stand_in = self._stand_in
        self.open = tuple(settled) if stand_in is not None and stand_in.engine.resting is None else ()

        # (3) Home.
        on_their_way = self._queues.on_their_way()
        # Without an endpoint of its own, a worker leaves what is broken to those who have one.
        kept = self.open if stand_in is not None else broken
        for model_id in (model for model, count in on_their_way.items() if count and model not in kept):
            self._queues.bring_home(model_id)

        # (4) Away.
        if stand_in is None or not self.open:
            return
        room = stand_in.parallel - stand_in.engine.in_flight - sum(on_their_way[model] for model in self.open)
        others_ready = bool(residency.ready_models)
        for model_id in self.open:
            count, failed = backlog.count(model_id), residency.quarantined[model_id].since
            if room <= 0 or not count or self._stay.get(model_id) == (count, others_ready, failed):
                continue
            sent = self._queues.send(model_id, _granting(stand_in.cloud, others_ready=others_ready), most=room)
            if sent < room:  # all were looked at: as long as nothing changes, nobody can leave
                self._stay[model_id] = (count - sent, others_ready, failed)
            room -= sent


def _granting(cloud: Cloud, *, others_ready: bool) -> Grant:
    def grant(request: JobRequest, route: Route) -> str | None:
        leave = may_leave(request, route, cloud, others_ready=others_ready)
        return leave.reason if leave.granted else None

    return grant
