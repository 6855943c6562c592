"""
The physics of a simulated worker: one model ready at a time, its places, its switches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from worker.simulate.costs import ModelCosts
from worker.simulate.trace import TracedJob


class Machine:
    """One worker: its engine's places, the prompt that is read, the switch under way."""

    def __init__(self, name: str, costs: Mapping[str, ModelCosts]) -> None:
        self.name = name
        self._costs = costs
        self.switch_s = {model: cost.load_s for model, cost in costs.items()}  # what the next switch to each takes
        self.serves: Collection[str] | None = None  # the models that it can serve; None = all
        self.ready: str | None = None
        self.since = 0.0
        self.target: str | None = None  # of the switch that is asked for or under way
        self.loading = False  # jobs in flight have ended, the switch itself runs
        self.running = 0
        self._ends_s = 0.0  # when the jobs in flight end, summed up
        self.reading_until = 0.0  # a prompt is read; the next one waits for it

    def begin_with(
        self, started: Collection[str], ready: str | None, since: float, *, ends_s: Collection[float]
    ) -> None:
        """Begin in the middle: some models have been loaded, one may be ready and have jobs in flight."""
        self.switch_s |= {model: self._costs[model].wake_s for model in started}
        self.ready, self.since = ready, since
        self.running, self._ends_s = len(ends_s), sum(ends_s)

    @property
    def places(self) -> int:
        """How many jobs of the ready model run at once."""
        return self._costs[self.ready].max_num_seqs if self.ready else 0

    def left_s(self, now: float) -> float:
        """Seconds that the jobs in flight still take, one after the other."""
        return self._ends_s - self.running * now

    def has_room(self) -> bool:
        """Is a place free?"""
        return self.running < self.places

    def begin(self, now: float) -> float:
        """Begin the switch that was asked for; returns when it ends."""
        assert self.target is not None  # noqa: S101
        self.loading = True
        ends = now + self.switch_s[self.target]
        self.switch_s[self.target] = self._costs[self.target].wake_s
        self.ready = None
        return ends

    def end(self, now: float) -> None:
        """The switch is done."""
        self.ready, self.target, self.loading = self.target, None, False
        self.since = self.reading_until = now

    def start(self, job: TracedJob, now: float) -> float:
        """Start a job of the ready model; returns when it ends."""
        costs = self._costs[job.model]
        self.running += 1
        reading_s, whole_s = costs.alone_s(job.prompt_tokens, job.output_tokens)
        self.reading_until = now + reading_s
        self._ends_s += now + whole_s
        return now + whole_s

    def finish(self, now: float) -> None:
        """A job ends."""
        self.running -= 1
        self._ends_s = self._ends_s - now if self.running else 0.0
