"""
The map of Redis agrees with the libraries that share it.
"""

from __future__ import annotations

from typing import Any

import pytest
from kombu.transport.redis import Channel

from common import keys


class StockChannel(Channel):
    """kombu's naming of lists, without a connection."""

    def __init__(self) -> None: ...

    def __del__(self, *_: Any) -> None: ...


@pytest.mark.parametrize("queue", [keys.SUBMIT_QUEUE, keys.model_queue("qwen3-8b")])
def test_the_lists_of_a_queue_are_those_that_stock_producers_push_to(queue: str) -> None:
    """Every priority of a stock kombu producer lands in one of our lists, in order of service, and none is left."""
    channel = StockChannel()
    pushed = [channel._q_for_pri(queue, priority) for priority in range(10)]

    assert tuple(dict.fromkeys(pushed)) == keys.lists_of(queue)
    assert {keys.queue_of(name) for name in pushed} == {queue}
