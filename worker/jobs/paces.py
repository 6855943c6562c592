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
from worker.state.pace import Pace

_NEWEST = 0.05  # the least weight of the newest job in a mean: about the last twenty count


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

    def add(self, request: JobRequest, completion: Completion, in_flight: int) -> None:
        self.count += 1
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

    def answered(self, model_id: str, request: JobRequest, completion: Completion) -> None:
        """Note what a job took that has just left its engine."""
        in_flight = self._in_flight(model_id) + 1
        with self._lock:
            self._here.setdefault(model_id, _Measured(None)).add(request, completion, in_flight)

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

    Where an engine does not say how long it read and wrote, the time of a whole job counts: it works on so many at
    once that one ends every run_s / at_once, or has more in hand, and then run_s is longer by what they wait in it.
    """
    together = max(found.at_once, round(found.in_flight))
    pace = Pace(job_s=found.run_s / together, at_once=together, output_tokens=found.output_tokens)
    if found.output_share is not None:
        pace = replace(pace, output_share=found.output_share)
    if not (found.prompt_tokens and found.prefill_s and found.output_tokens and found.decode_s):
        return pace
    return replace(
        pace,
        at_once=found.at_once,
        prefill_tokens_per_s=found.prompt_tokens / found.prefill_s,
        decode_tokens_per_s=found.output_tokens / found.decode_s,
    )
