"""
JobStore, the protocol: what is remembered of a job, and a store in memory for tests and stand-ins.

One outcome per job: `finish` keeps the first and gives back the one that was kept, whoever asks and
whatever attempt it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Protocol

from common.may_enter import Entry, Held, Taken
from common.retell import retell
from common.schemas import DeadLetter, Fault, JobState, JobView, Outcome, Route, StreamEvent, utc_now


class JobStore(Protocol):
    """What Redis remembers of jobs. Every method may raise redis.RedisError when it cannot be reached."""

    def note_queued(self, job_id: str) -> None:
        """The router has seen the job; the first time counts as the time it was queued."""
        ...

    def note_deadline(self, job_id: str, deadline: datetime) -> None:
        """The job, which need not have been seen yet, ends at *deadline* if it has not ended by then."""
        ...

    def note_streams(self, job_id: str) -> None:
        """The job streams: from now on each attempt and the end are events of its stream."""
        ...

    def note_routed(self, job_id: str, route: Route, entry: Entry | None = None) -> Held | Taken | None:
        """
        The job is on its way to a model's queue, and holds what *entry* says until it ends.

        Where its tenant has no room for that, or its idempotency key is another job's, nothing is noted, and what the
        tenant holds, or who has the key, is given back.
        """
        ...

    def begin(self, job_id: str, *, delivery: str) -> int | None:
        """
        Start an attempt for the message with the tag *delivery*; give its number, from 1.

        None: the job has ended, or another message with it is in flight, so this one is a copy and may be dropped. (A
        router that dies between publishing and acknowledging leaves such copies.)
        """
        ...

    def add_chunks(self, chunks: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
        """
        Add to each job's stream what one of its attempts has said: (job id, attempt) -> OpenAI's chunk.

        An attempt that is not the newest, or whose job has ended, adds nothing.
        """
        ...

    def hand_back(self, job_id: str, *, attempt: int) -> bool:
        """
        The attempt ended without an outcome; the job waits in a queue again, and any message of it may begin it.

        False: another attempt has begun since (this process was paused, say), and nothing has changed.
        """
        ...

    def running(self, deliveries: Mapping[str, str]) -> dict[str, int]:
        """Which of these jobs (id -> tag of a message) run by that message, and at which attempt they are."""
        ...

    def lose(self, job_id: str, fault: Fault) -> bool:
        """
        `hand_back` for a process that has died: once for each attempt, with the *fault* that this is.

        False: the attempt had ended, been handed back, or been lost already, and nothing has changed.
        """
        ...

    def add_fault(self, job_id: str, fault: Fault) -> tuple[Fault, ...] | None:
        """
        Something failed under an attempt of the job; give all its faults by now.

        None: another attempt has begun since, and nothing has changed.
        """
        ...

    def finish(self, outcome: Outcome, *, webhook: str | None = None) -> Outcome:
        """
        Store *outcome* unless there is one; give the outcome of record.

        Whatever attempt it comes from: where the stream has the words of another one, the answer is told anew.
        The job's webhook, or that of a job that was never routed, *webhook*, falls due: once.
        """
        ...

    def set_aside(self, outcome: Outcome, letter: DeadLetter) -> Outcome:
        """`finish`, and keep the *letter* where an operator finds it, unless there was another outcome before."""
        ...

    def outcome(self, job_id: str) -> Outcome | None:
        """The outcome of record, if the job has ended and is not forgotten yet."""
        ...

    def view(self, job_id: str) -> JobView:
        """What is known of the job now; the state of a job that has ended never changes again."""
        ...

    def ask_cancel(self, job_id: str) -> None:
        """Remember that the job should stop."""
        ...

    def asked_to_cancel(self, job_ids: Iterable[str]) -> frozenset[str]:
        """Which of these jobs should stop."""
        ...


class MemoryJobStore:
    """A JobStore in this process; *in_flight* tells whether a delivery tag is still being worked on."""

    def __init__(self, in_flight: Callable[[str], bool] = lambda _tag: True) -> None:
        self._in_flight = in_flight
        self._lock = threading.Lock()
        self._views: dict[str, JobView] = {}
        self._claims: dict[str, str] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._cancels: set[str] = set()
        self._held: dict[str, Entry] = {}
        self._keys: dict[tuple[str, str | None], tuple[str, str]] = {}  # tenant, key -> job, its body's digest
        self.webhooks: dict[str, str] = {}  # those that are owed
        self.dead: dict[str, DeadLetter] = {}
        self._streams: dict[str, list[StreamEvent]] = {}
        self._positions = 0  # of all streams' events: the number of the last

    def note_queued(self, job_id: str) -> None:
        """See JobStore."""
        with self._lock:
            queued = JobView(job_id=job_id, state=JobState.QUEUED, queued_at=utc_now())
            self._views.setdefault(job_id, queued)

    def note_deadline(self, job_id: str, deadline: datetime) -> None:
        """See JobStore; nobody looks at them here."""

    def note_streams(self, job_id: str) -> None:
        """See JobStore."""
        self._streams.setdefault(job_id, [])

    def stream(self, job_id: str) -> tuple[StreamEvent, ...]:
        """Give the events of the job's stream."""
        return tuple(self._streams.get(job_id, ()))

    def note_routed(self, job_id: str, route: Route, entry: Entry | None = None) -> Held | Taken | None:
        """See JobStore."""
        with self._lock:
            if entry is not None and job_id not in self._outcomes:
                first, body = self._keys.get((entry.tenant, entry.key), (job_id, entry.body))
                if first != job_id:
                    return Taken(job_id=first, same_body=body == entry.body)
            if entry is not None and job_id not in self._held and job_id not in self._outcomes:
                others = [other.bytes for other in self._held.values() if other.tenant == entry.tenant]
                if len(others) + 1 > entry.max_jobs or sum(others) + entry.bytes > entry.max_bytes:
                    return Held(jobs=len(others), bytes=sum(others))
                self._held[job_id] = entry
                if entry.key is not None:
                    self._keys[entry.tenant, entry.key] = job_id, entry.body
        self._change(job_id, state=JobState.ROUTED, model=route.model, complexity=route.complexity, why=route.why)
        return None

    def begin(self, job_id: str, *, delivery: str) -> int | None:
        """See JobStore."""
        with self._lock:
            claim = self._claims.get(job_id)
            if job_id in self._outcomes or (claim is not None and claim != delivery and self._in_flight(claim)):
                return None
            self._claims[job_id] = delivery
            attempts = self._view(job_id).attempts + 1
            if job_id in self._streams:
                self._streams[job_id].clear()
                self._add(job_id, kind="reset", attempt=attempts)
        self._change(job_id, state=JobState.RUNNING, attempts=attempts)
        return attempts

    def add_chunks(self, chunks: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
        """See JobStore."""
        with self._lock:
            for (job_id, attempt), chunk in chunks.items():
                if self._view(job_id).attempts == attempt and job_id not in self._outcomes:
                    self._add(job_id, kind="chunk", attempt=attempt, chunk=dict(chunk))

    def hand_back(self, job_id: str, *, attempt: int) -> bool:
        """See JobStore."""
        with self._lock:
            if self._view(job_id).attempts != attempt:
                return False
            self._claims.pop(job_id, None)
        self._change(job_id, state=JobState.ROUTED)
        return True

    def running(self, deliveries: Mapping[str, str]) -> dict[str, int]:
        """See JobStore."""
        with self._lock:
            return {
                job_id: self._view(job_id).attempts
                for job_id, tag in deliveries.items()
                if self._claims.get(job_id) == tag and job_id not in self._outcomes
            }

    def lose(self, job_id: str, fault: Fault) -> bool:
        """See JobStore."""
        with self._lock:
            view = self._view(job_id)
            if view.attempts != fault.attempt or job_id not in self._claims or job_id in self._outcomes:
                return False
            del self._claims[job_id]
            self._views[job_id] = view.model_copy(update={"faults": (*view.faults, fault), "state": JobState.ROUTED})
            return True

    def add_fault(self, job_id: str, fault: Fault) -> tuple[Fault, ...] | None:
        """See JobStore."""
        with self._lock:
            view = self._view(job_id)
            if view.attempts != fault.attempt:
                return None
            self._views[job_id] = view.model_copy(update={"faults": (*view.faults, fault)})
            return self._views[job_id].faults

    def finish(self, outcome: Outcome, *, webhook: str | None = None) -> Outcome:
        """See JobStore."""
        with self._lock:
            entry = self._held.pop(outcome.job_id, None)
            if (url := (entry and entry.webhook) or webhook) is not None:
                self.webhooks.setdefault(outcome.job_id, url)
            if outcome.job_id in self._streams and outcome.job_id not in self._outcomes:
                attempt = outcome.ledger.attempt
                if outcome.state is JobState.ANSWERED and self._view(outcome.job_id).attempts != attempt:
                    self._streams[outcome.job_id].clear()
                    self._add(outcome.job_id, kind="reset", attempt=attempt)
                    self._add(outcome.job_id, kind="chunk", attempt=attempt, chunk=retell(outcome.response or {}))
                self._add(outcome.job_id, kind="end", state=outcome.state)
            return self._outcomes.setdefault(outcome.job_id, outcome)

    def set_aside(self, outcome: Outcome, letter: DeadLetter) -> Outcome:
        """See JobStore."""
        kept = self.finish(outcome)
        if kept == outcome:
            self.dead[outcome.job_id] = letter
        return kept

    def outcome(self, job_id: str) -> Outcome | None:
        """See JobStore."""
        return self._outcomes.get(job_id)

    def view(self, job_id: str) -> JobView:
        """See JobStore."""
        with self._lock:
            return self._view(job_id)

    def ask_cancel(self, job_id: str) -> None:
        """See JobStore."""
        self._cancels.add(job_id)

    def asked_to_cancel(self, job_ids: Iterable[str]) -> frozenset[str]:
        """See JobStore."""
        return frozenset(self._cancels.intersection(job_ids))

    def _view(self, job_id: str) -> JobView:
        view = self._views.get(job_id, JobView(job_id=job_id, state=JobState.UNKNOWN))
        ended = self._outcomes.get(job_id)
        webhook = "due" if job_id in self.webhooks else None
        return view.model_copy(update={"state": ended.state if ended else view.state, "webhook": webhook})

    def _add(self, job_id: str, **fields: Any) -> None:
        self._positions += 1
        self._streams.setdefault(job_id, []).append(StreamEvent(position=str(self._positions), **fields))

    def _change(self, job_id: str, **fields: object) -> None:
        with self._lock:
            self._views[job_id] = self._view(job_id).model_copy(update=fields)
