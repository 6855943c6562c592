"""
Keeps what the jobs of each model take on this worker: told by every answer, from any thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from common.schemas import JobRequest, ModelPace, utc_now
from worker.engines.base import Completion
from worker.state.backlog import Backlog
from worker.state.pace import Pace
from worker.state.residency import Level, Residency

_NEWEST = 0.05  # the least weight of the newest job in a mean: about the last twenty count
_FORGOTTEN = 400  # jobs, or twice as many as say something; of more, the older half counts half
_WARM = 0.9  # of a usual job's time: the first answers of a turn come then, and find all places taken
_TURNS = 2  # jobs for each place: fewer say little of how many end in a second


@dataclass(slots=True)
class _Mean:
    """A mean in which the newest values count most; None before the first."""

    value: float | None = None
    count: int = 0

    def add(self, value: float | None) -> None:
        if value is None:
            return
        self.count += 1
        before = value if self.value is None else self.value
        self.value = before + max(1 / self.count, _NEWEST) * (value - before)


class _AtWork:
    """
    Seconds and answers of the time in which jobs waited all along: what a job costs, with all that comes between.

    It is counted from an answer to an answer. Where all places end together, a time that ends between two bursts
    would hold one too many, or too few.
    """

    def __init__(self, job_s: float | None) -> None:
        self._seconds, self._jobs = (job_s * _FORGOTTEN / 2, _FORGOTTEN / 2) if job_s else (0.0, 0.0)
        self._enough = job_s is not None
        self._looked_at = -math.inf
        self._full_since: float | None = None
        self._last: tuple[float, int] | None = None  # the answer it is counted from: when, and how many there were

    def look(
        self, answered: int, last_at: float, *, full_since: float | None, warm_s: float, least: int, now: float
    ) -> None:
        """
        See at *now* that *answered* jobs were by *last_at*.

        *full_since*: since when jobs could have waited for the model all along, None = none waits; *warm_s*: so long
        after, its places are taken; *least*: so many jobs say something.
        """
        looked_at, self._looked_at = self._looked_at, now
        if full_since is None:
            self._full_since = self._last = None
            return
        if self._full_since is None:
            self._full_since = full_since if full_since > looked_at else now
        if last_at < self._full_since + warm_s:
            return
        if self._last is not None:
            self._seconds += last_at - self._last[0]
            self._jobs += answered - self._last[1]
            self._enough = self._enough or self._jobs >= least
            if self._jobs > max(_FORGOTTEN, 2 * least):
                self._seconds, self._jobs = self._seconds / 2, self._jobs / 2
        self._last = last_at, answered

    @property
    def job_s(self) -> float | None:
        return self._seconds / self._jobs if self._enough else None


class _Measured:
    """The means of one model."""

    def __init__(self, before: ModelPace | None) -> None:
        def mean(value: float | None) -> _Mean:
            return _Mean(value, before.count if before and value is not None else 0)

        def said(field: str) -> _Mean:
            return mean(getattr(before, field, None))

        self.count = self.saved = before.count if before else 0
        self.in_flight = said("in_flight")
        self.run_s = said("run_s")
        self.run_s_squared = mean(before.run_s**2 + before.deviation_s**2 if before else None)
        self.prompt_tokens, self.prefill_s = said("prompt_tokens"), said("prefill_s")
        self.output_tokens, self.decode_s = said("output_tokens"), said("decode_s")
        self.output_share = said("output_share")
        self.at_work = _AtWork(before.job_s if before else None)
        self.last_at = -math.inf  # when the newest answer left, in Unix seconds

    def add(self, request: JobRequest, completion: Completion, in_flight: int, now: float) -> None:
        self.count += 1
        self.last_at = now
        self.in_flight.add(in_flight)
        self.run_s.add(completion.run_s)
        self.run_s_squared.add(completion.run_s**2)
        self.prompt_tokens.add(completion.prompt_tokens)
        self.prefill_s.add(completion.prefill_s)
        self.output_tokens.add(completion.completion_tokens)
        self.decode_s.add(completion.decode_s)
        if request.answer_tokens and completion.completion_tokens is not None:
            self.output_share.add(completion.completion_tokens / request.answer_tokens)


class Paces:
    """
    The paces of this worker's models, and of other workers' for those that nothing was measured of here.

    Parameters
    ----------
    worker
        The name of this worker.
    at_once
        How many jobs of a model its engine works on side by side.
    in_flight
        How many jobs of a model are in its engine now.
    earlier
        What was measured before this start, here and elsewhere.
    """

    def __init__(
        self,
        worker: str,
        *,
        at_once: Callable[[str], int],
        in_flight: Callable[[str], int],
        earlier: Iterable[ModelPace] = (),
    ) -> None:
        known = tuple(earlier)
        self._worker = worker
        self._at_once = at_once
        self._in_flight = in_flight
        self._lock = threading.Lock()
        self._here = {found.model: _Measured(found) for found in known if found.worker == worker}
        self._elsewhere: Mapping[str, ModelPace] = {}
        self.learn(known)

    def answered(self, model_id: str, request: JobRequest, completion: Completion, *, now: float) -> None:
        """Note what a job took that has left its engine at *now* (Unix seconds)."""
        in_flight = self._in_flight(model_id) + 1
        with self._lock:
            self._here.setdefault(model_id, _Measured(None)).add(request, completion, in_flight, now)

    def look(self, residency: Residency, backlog: Backlog, *, now: float) -> None:
        """See at *now* (Unix seconds) which models are kept busy: jobs wait for them all along."""
        with self._lock:
            for model, found in self._here.items():
                resident = residency.resident(model)
                full = resident is not None and resident.level is Level.READY and backlog.count(model) > 0
                found.at_work.look(
                    found.count,
                    found.last_at,
                    full_since=resident.since if resident is not None and full else None,
                    warm_s=_WARM * (found.run_s.value or 0.0),
                    least=_TURNS * self._at_once(model) if full else 0,
                    now=now,
                )

    def learn(self, paces: Iterable[ModelPace]) -> None:
        """Hear what the workers have measured; of each model, the newest that is not ours counts."""
        others = sorted((found for found in paces if found.worker != self._worker), key=lambda found: found.at)
        self._elsewhere = {found.model: found for found in others}

    def unsaved(self) -> tuple[ModelPace, ...]:
        """Give what has changed here since the last call."""
        with self._lock:
            changed = [(model, found) for model, found in self._here.items() if found.count != found.saved]
            for _, found in changed:
                found.saved = found.count
            return tuple(self._pace(model, found) for model, found in changed)

    def known(self, models: Iterable[str]) -> Mapping[str, ModelPace]:
        """What is known of these *models*; what nobody has measured is absent."""
        with self._lock:
            here = {model: self._pace(model, self._here[model]) for model in models if model in self._here}
        return {**{model: self._elsewhere[model] for model in models if model in self._elsewhere}, **here}

    def _pace(self, model: str, found: _Measured) -> ModelPace:
        run_s = found.run_s.value or 0.0
        return ModelPace(
            worker=self._worker,
            model=model,
            count=found.count,
            at_once=self._at_once(model),
            in_flight=found.in_flight.value or 0.0,
            run_s=run_s,
            job_s=found.at_work.job_s,
            deviation_s=math.sqrt(max(0.0, (found.run_s_squared.value or 0.0) - run_s**2)),
            prompt_tokens=found.prompt_tokens.value,
            prefill_s=found.prefill_s.value,
            output_tokens=found.output_tokens.value,
            decode_s=found.decode_s.value,
            output_share=found.output_share.value,
            at=utc_now(),
        )


def pace_of(found: ModelPace) -> Pace:
    """
    Give the rates behind what was measured.

    What counts is how many were answered while others waited. Before that was seen, an engine works on so many at once
    that one ends every run_s / at_once; or it has more in hand, and run_s is longer by what they wait in it. Where the
    engine says how long it read and wrote, jobs are told apart by their tokens.
    """
    together = max(found.at_once, round(found.in_flight))
    job_s = found.job_s or found.run_s / together
    share = 1.0 if found.output_share is None else found.output_share
    pace = Pace(job_s=job_s, at_once=together, output_tokens=found.output_tokens, output_share=share)
    if not (found.prompt_tokens and found.prefill_s and found.output_tokens and found.decode_s):
        return pace
    slower = found.job_s * found.at_once / (found.prefill_s + found.decode_s) if found.job_s else 1.0
    return replace(
        pace,
        at_once=found.at_once,
        prefill_tokens_per_s=found.prompt_tokens / found.prefill_s / slower,
        decode_tokens_per_s=found.output_tokens / found.decode_s / slower,
    )
