"""
kombu's Redis transport with an atomic pop: no moment at which a message is in nobody's hands.

Stock kombu pops with BRPOP and writes the message to `unacked` in a second round trip; a `kill -9` of the
worker or of Redis between the two loses it (kombu #305, celery #4354, #7950). Invariants kept here:

1. A message is in exactly one place: its queue (a list, or a backlog: common/backlog.py) or `unacked`. Every move is
   one script.
2. Everything in `unacked` names its owner in `unacked_owner`, so that the lease can tell whose it is.
3. Only the owner of a delivery can acknowledge it or give it back; a late call of a former owner does nothing.
4. An entry that is no message at all is set aside in `shiftworker:malformed` and never blocks its queue.
5. A lost connection is no shutdown: the jobs still run here, so their messages are not handed out again.

Waiting does not pop: an idle consumer blocks on a tiny wake stream that every push writes to. Stock
producers do not write to it; their messages are found when the wait ends, `WAIT_S` later at most.

Used through Celery's `broker_transport = "common.transport:Transport"`, so that the broker's URL stays a
plain redis:// for Flower and everybody else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from queue import Empty
from time import monotonic, time
from typing import Any
from weakref import WeakSet

from kombu.transport import redis as stock
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis.exceptions import NoScriptError

from common import delivery_scripts as scripts
from common import keys
from common.backlog import RedisBacklog, job_id_of, place_json
from common.bounds import Bounds
from common.logs import get_logger
from common.redis_client import digest, run_script

logger = get_logger(__name__)

WAIT_S = 0.25  # seconds an idle consumer waits before it looks again: the delay a stock producer may see

_WAKE_LENGTH = 8  # entries kept; only the newest id matters
_POP_MOST = 64  # messages in one round trip

_DELIVERIES = (keys.UNACKED, keys.UNACKED_INDEX, keys.UNACKED_OWNER)

# What reading one raises, as kombu and we read it.
_NO_MESSAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)

_open_channels: WeakSet[Channel] = WeakSet()
_acknowledged: set[str] = set()  # tags that a script has taken off the books, and kombu has not yet been told of


def deliveries_in_flight() -> set[str]:
    """
    Every delivery tag that an open channel of this process holds: prefetched, scheduled or running.

    For the lease's thread, so the channels' own threads may change them meanwhile.
    """
    while True:
        try:
            return {
                tag for channel in list(_open_channels) if not channel.closed for tag in list(channel.qos._delivered)
            }
        except RuntimeError:  # changed while we looked
            continue


def acknowledged_already(tag: str) -> None:
    """Note that a script of ours has taken *tag* off the books: the `ack` that follows needs no round trip."""
    _acknowledged.add(tag)


class QoS(stock.QoS):
    """Deliveries in flight; the scripts have written them to Redis already."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Remember the delivery here; the pop has stored it."""
        super(stock.QoS, self).append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Take the delivery off the books, if it is still ours."""
        self._forget(delivery_tag)
        super(stock.QoS, self).ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's signature
        """Give the delivery back to the head of its queue, or take it off the books."""
        if requeue:
            self.restore_by_tag(delivery_tag)
        else:
            self._forget(delivery_tag)
        super(stock.QoS, self).ack(delivery_tag)

    def _forget(self, tag: str) -> None:
        if tag in _acknowledged:
            _acknowledged.discard(tag)
            return
        with self.channel.conn_or_acquire() as client:
            client.eval(scripts.ACK, 3, *_DELIVERIES, tag, self.channel.owner)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's signature
        """Put our delivery *tag* back on its queue: at the head, or at the back with *leftmost*."""
        give_back(self.channel, tag, owner=self.channel.owner, client=client, side="back" if leftmost else "head")

    def restore_visible(self, start: int = 0, num: int = 10, interval: int = 10) -> None:
        """Do nothing: the lease gives back what its owner cannot; see worker/delivery/lease.py."""


def give_back(channel: Any, tag: str, *, owner: str, client: Any = None, side: str = "head") -> bool:
    """
    Move one delivery from `unacked` to its queue, marked as redelivered; True if this call moved it.

    *owner* is whose it must still be; "" stands for a delivery without owner, popped by a stock transport.
    """
    with channel.conn_or_acquire(client) as redis:
        entry = redis.hget(keys.UNACKED, tag)
        if entry is None:
            return False
        try:
            message, exchange, routing_key = _as_redelivered(entry)
            job_id = job_id_of(message).encode()
            place = place_json(message, now=time(), bounds=channel.bounds).encode()
            priority, raw = channel._get_message_priority(message, reverse=False), dumps(message)
        except _NO_MESSAGE as error:
            logger.warning("delivery.malformed", error=f"{type(error).__name__}: {error}")
            redis.eval(scripts.SET_ASIDE, 4, *_DELIVERIES, keys.MALFORMED, tag, entry)
            return False
        queue = next(iter(channel._lookup(exchange, routing_key)), routing_key)
        if keys.has_backlog(queue):
            target, how = keys.backlog(queue), [job_id, place]
        else:
            target, how = channel._q_for_pri(queue, priority), [side.encode()]
        moved = redis.eval(scripts.GIVE_BACK, 5, *_DELIVERIES, keys.WAKE, target, tag, owner, entry, raw, *how)
        return bool(moved)


def _as_redelivered(entry: bytes) -> tuple[dict[str, Any], str, str]:
    """Read a delivery: its message marked as redelivered, its exchange and its routing key."""
    message, exchange, routing_key = loads(bytes_to_str(entry))
    if not exchange and not routing_key:
        raise ValueError("it names no queue")
    message.setdefault("headers", {})["redelivered"] = True
    message["properties"]["delivery_info"]["redelivered"] = True
    return message, exchange, routing_key


class Channel(stock.Channel):
    """A channel whose pop is one script, and whose idle wait takes nothing."""

    QoS = QoS
    from_transport_options = (*stock.Channel.from_transport_options, "owner", "max_wait_s", "max_waits")
    owner = "nobody"  # whose deliveries these are: one start of one process; set by broker_transport_options
    max_wait_s: float | None = None  # of jobs that go into a backlog, see Bounds; likewise
    max_waits: Sequence[str] = ()
    supports_batch_publish = False  # a batch would pass by `_put`, and nobody would be woken

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._held: list[tuple[str, str, str]] | None = None  # what is to be pushed together; None = each at once
        self._waiting = False  # is the outstanding command the wait, or the pop?
        self._wake_id = "0"
        self._short_client: Any = None
        self._no_ack_queues: set[str] = set()
        self._connection_params: dict[bool, dict[str, Any]] = {}
        super().__init__(*args, **kwargs)
        _open_channels.add(self)

    @cached_property
    def bounds(self) -> Bounds | None:
        """How long jobs may wait in a backlog; None = nobody said."""
        return None if self.max_wait_s is None else Bounds.parse(self.max_wait_s, self.max_waits)

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:  # noqa: FBT001 - kombu's signature
        """Consume *queue*; what a no-ack consumer gets is not kept in `unacked`, for nobody would take it off."""
        (self._no_ack_queues.add if no_ack else self._no_ack_queues.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _brpop_start(self, timeout: float | None = None) -> None:
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        if self._waiting:
            block_ms = int((timeout or WAIT_S) * 1000)
            connection.send_command("XREAD", "BLOCK", block_ms, "STREAMS", keys.WAKE, self._wake_id)
            return
        script, *rest = self._pop(queues, most=self._room(len(queues)), no_ack=self._no_ack_queues)
        connection.send_command("EVALSHA", digest(script), *rest)

    def _pop(self, queues: Sequence[str], *, most: int, no_ack: Collection[str] = ()) -> list[Any]:
        """The pop's script with its arguments."""
        lists = [(self._q_for_pri(queue, step), queue) for step in self.priority_steps for queue in queues]
        backlogs = [(keys.backlog(queue), queue) for queue in queues if keys.has_backlog(queue)]
        names = [name for name, _ in (*lists, *backlogs)]
        acknowledged = ["0" if queue in no_ack else "1" for _, queue in (*lists, *backlogs)]
        return [
            scripts.POP, len(names) + 5, *names, *_DELIVERIES, keys.WAKE, keys.MALFORMED,
            self.owner, most, len(lists), *acknowledged,
        ]  # fmt: skip

    def _create_client(self, asynchronous: bool = False) -> Any:  # noqa: FBT001, FBT002 - kombu's signature
        """Give one client for all short commands of a connection: to make one takes as long as a command."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._short_client is None or self._short_client.connection_pool is not self.pool:
            self._short_client = super()._create_client()
        return self._short_client

    def _room(self, queues: int) -> int:
        """How many messages one queue may give now: no more than is free, and a share of that beside others."""
        free = self.qos.can_consume_max_estimate()
        return _POP_MOST if free is None else max(1, min(_POP_MOST, free // queues))

    def _brpop_read(self, **_options: Any) -> bool:
        waited, self._waiting = self._waiting, False
        connection = self.client.connection
        try:
            try:
                reply = connection.read_response()
            except self.connection_errors:
                connection.disconnect()
                raise
            except NoScriptError:  # Redis has started anew: nothing was popped
                with self.conn_or_acquire() as client:
                    client.script_load(scripts.POP)
                raise Empty from None
            except self.ResponseError as error:
                # Redis is there and says no (full, read only): nothing was popped. Wait, then ask again.
                logger.warning("delivery.pop_refused", error=str(error))
                self._waiting = not waited
                raise Empty from None
            if waited:
                raise Empty
            name, *items = reply
            if not name:
                self._waiting, self._wake_id = True, bytes_to_str(items[0])
                raise Empty
        finally:
            self._in_poll = None
        queue = keys.queue_of(bytes_to_str(name))
        self._queue_cycle.rotate(queue)
        messages = [message for item in items if (message := self._readable(item)) is not None]
        if queue not in self.connection._callbacks:  # cancelled meanwhile: each goes back to the head, the first last
            messages.reverse()
        for message in messages:
            self.connection._deliver(message, queue)
        if not messages:
            raise Empty
        return True

    def _readable(self, item: Any) -> Any:
        """
        Give the popped entry as kombu delivers it; None if it was set aside because it cannot be one.

        A body in an unknown encoding, headers that are a list: kombu would raise in the consumer's loop, the
        worker would end, and the next one would get the same message.
        """
        raw = bytes_to_str(item)
        try:
            message = json.loads(raw)
            self.Message(message, channel=self)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it is no message
            logger.warning("delivery.malformed", error=f"{type(error).__name__}: {error}")
            tag = json.loads(raw)["properties"]["delivery_tag"]  # the pop has seen it
            with self.conn_or_acquire() as client:
                client.eval(scripts.SET_ASIDE, 4, *_DELIVERIES, keys.MALFORMED, tag, raw)
            return None
        return message

    def _get(self, queue: str) -> Any:
        with self.conn_or_acquire() as client:
            name, item = run_script(client, *self._pop([queue], most=1))
        if not name:
            raise Empty
        return loads(bytes_to_str(item))

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:  # noqa: FBT001, FBT002 - kombu's signature
        """Get one message without waiting; with *no_ack* it is acknowledged before it is returned."""
        message = super().basic_get(queue, no_ack=False, **kwargs)
        if message is not None and no_ack:
            self.basic_ack(message.delivery_tag)
        return message

    def _put(self, queue: str, message: Any, **_kwargs: Any) -> None:
        if keys.has_backlog(queue):
            with self.conn_or_acquire() as client:
                RedisBacklog(client, bounds=self.bounds).put(queue, message, dumps(message), now=time())
            return
        entry = queue, self._q_for_pri(queue, self._get_message_priority(message, reverse=False)), dumps(message)
        if self._held is None:
            self._push([entry])
        else:
            self._held.append(entry)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Push what is published to lists within this context in one round trip at its end; nothing if it raises."""
        self._held = []
        try:
            yield
            held = self._held
        finally:
            self._held = None
        self._push(held)

    def _push(self, entries: Sequence[tuple[str, str, str]]) -> None:
        """Push messages to the lists of queues: (queue, list, message)."""
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for queue, name, raw in entries:
                pipe.lpush(name, raw)
                if lifetime_ms := (self._expires or {}).get(queue):  # reply queues of Celery's remote control
                    for step in self.priority_steps:
                        pipe.pexpire(self._q_for_pri(queue, step), lifetime_ms)
            for queue in {queue for queue, _, _ in entries}:
                pipe.xadd(keys.WAKE, {"q": queue}, maxlen=_WAKE_LENGTH, approximate=False)
            pipe.execute()

    def _size(self, queue: str) -> int:
        in_lists = int(super()._size(queue))
        if not keys.has_backlog(queue):
            return in_lists
        with self.conn_or_acquire() as client:
            return in_lists + RedisBacklog(client).count(queue)

    def close(self) -> None:
        """
        Close without losing or repeating anything.

        kombu 5.7.0 reads the outstanding reply first; on a dead socket that raises, the rest is skipped,
        and Celery's second close ends the worker ('NoneType' object has no attribute 'hostname').
        """
        if self._in_poll:
            try:
                self._brpop_read()
            except (Empty, *self.connection_errors):
                pass
            finally:
                self._in_poll = None
        if not _shutting_down():
            self.do_restore = False
        super().close()

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002 - kombu's signature
        """Connection parameters; the last known once the transport is gone, for jobs that outlive it."""
        if self.connection is not None and self.connection.client is not None:
            self._connection_params[asynchronous] = super()._connparams(asynchronous)
        return dict(self._connection_params[asynchronous])


def _shutting_down() -> bool:
    """Is this process a Celery worker that was told to stop? Only then are its messages given back."""
    from celery.worker import state  # noqa: PLC0415 - a producer never gets here, and need not import the worker

    return state.should_stop is not None or state.should_terminate is not None


class Transport(stock.Transport):
    """kombu's Redis transport over `Channel`."""

    Channel = Channel
    brpop_timeout = WAIT_S
