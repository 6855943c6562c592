"""
The producer of a storm: sends each job until it is accepted, and cancels those that it has thought better of.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import redis
from kombu.exceptions import OperationalError

from common.client import JobClient
from common.errors import Unavailable
from common.schemas import utc_now
from tests.chaos.wishes import Wish

AGAIN_S = 0.2  # after Redis did not answer


@dataclass(frozen=True, kw_only=True)
class Order:
    """One job, and what is wanted of it."""

    body: Mapping[str, object]
    wish: Wish


class Feeder(threading.Thread):
    """Sends *orders* (by job id) spread over *over_s* seconds; webhooks go to *hears*."""

    def __init__(self, url: str, orders: Mapping[str, Order], *, over_s: float, hears: str) -> None:
        super().__init__(name="feeder", daemon=True)
        self._url = url
        self._orders = orders
        self._gap_s = over_s / len(orders)
        self._hears = hears
        self.sent_at: dict[str, float] = {}

    def run(self) -> None:
        """Do what is due, until nothing is left to do."""
        client = JobClient(self._url)
        began = time.time()
        due = [(began + number * self._gap_s, number, job_id, "send") for number, job_id in enumerate(self._orders)]
        while due:
            at, number, job_id, what = heapq.heappop(due)
            time.sleep(max(0.0, at - time.time()))
            order = self._orders[job_id]
            if what == "send":
                self.sent_at.setdefault(job_id, time.time())
                deed = partial(client.submit, self._body(order), job_id=job_id)
            else:
                deed = partial(client.cancel, job_id)
            if not _done(deed):
                heapq.heappush(due, (time.time() + AGAIN_S, number, job_id, what))
            elif what == "send" and order.wish.cancel_after_s is not None:
                heapq.heappush(due, (time.time() + order.wish.cancel_after_s, number, job_id, "cancel"))
        client.close()

    def _body(self, order: Order) -> dict[str, object]:
        body = dict(order.body)
        if order.wish.deadline_s is not None:
            body["deadline"] = (utc_now() + timedelta(seconds=order.wish.deadline_s)).isoformat()
        if order.wish.webhook:
            body["webhook"] = self._hears
        return body


def _done(deed: partial[object]) -> bool:
    try:
        deed()
    except (Unavailable, redis.RedisError, OperationalError, OSError):
        return False
    return True
