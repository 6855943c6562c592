"""
Foresees in the background when the waiting jobs will end, and tells producers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable

from common import keys
from common.logs import get_logger
from common.redis_client import RedisClient
from common.schemas import Forecast
from worker.simulate.forecast import Snapshot, forecast_backlog
from worker.simulate.tell import tell_forecast
from worker.telemetry.rest import Rest

logger = get_logger(__name__)

_MARGIN_S = 10.0  # how much longer than until the next one a forecast is good for


class Forecaster(threading.Thread):
    """
    Runs one forecast after the other, with rests between; the newest snapshot is the one that counts.

    Parameters
    ----------
    worker
        Who tells.
    publish
        Where the forecasts go.
    """

    def __init__(self, worker: str, publish: Callable[[Iterable[Forecast]], object]) -> None:
        super().__init__(name="forecaster", daemon=True)
        self._worker = worker
        self._publish = publish
        self._wanted: tuple[Snapshot, Collection[str]] | None = None
        self._changed = threading.Condition()
        self._rest = Rest()
        self._busy = False
        self._ending = False

    def is_due(self, *, news: bool) -> bool:
        """Is it time for the next forecast? Sooner, if there are *news*: much is not as it was in the last one."""
        return not self._busy and time.monotonic() >= (self._rest.news_at if news else self._rest.due_at)

    def want(self, snapshot: Snapshot, models: Collection[str]) -> None:
        """Foresee this, and tell what concerns *models*."""
        with self._changed:
            self._wanted = snapshot, models
            self._changed.notify()

    def run(self) -> None:
        """Work until `end` is called."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted is not None or self._ending)
                if self._ending or self._wanted is None:
                    return
                (snapshot, models), self._wanted, self._busy = self._wanted, None, True
            try:
                self._tell(snapshot, models)
            except Exception as error:  # noqa: BLE001 - Redis away: producers hear of the next one
                logger.warning("telemetry.no_forecast", error=f"{type(error).__name__}: {error}")
            self._busy = False

    def _tell(self, snapshot: Snapshot, models: Collection[str]) -> None:
        began, cost_s = time.monotonic(), -time.thread_time()  # others may run meanwhile: that is no cost of ours
        found = forecast_backlog(snapshot)
        cost_s += time.thread_time()
        waits = any(waiting.count for waiting in snapshot.backlog.by_model.values())
        self._rest = self._rest.after(began=began, ended=time.monotonic(), cost_s=cost_s, waits=waits)
        told = {model: finishes for model, finishes in found.items() if model in models}
        valid_s = self._rest.due_at - began + _MARGIN_S
        self._publish(tell_forecast(told, snapshot, worker=self._worker, valid_s=valid_s))

    def end(self) -> None:
        """Stop after the forecast under way."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self.is_alive():
            self.join()


def publish_to(client: RedisClient) -> Callable[[Iterable[Forecast]], object]:
    """Give what writes forecasts to keys.FORECASTS, in the place of earlier ones."""

    def publish(forecasts: Iterable[Forecast]) -> None:
        fields = {forecast.model: forecast.model_dump_json() for forecast in forecasts}
        if fields:
            client.hset(keys.FORECASTS, mapping=fields)

    return publish
