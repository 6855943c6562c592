"""
How soon can the jobs of a trace have ended at the least, whatever the schedule knows?
"""

from __future__ import annotations

import math
from bisect import insort
from itertools import accumulate

from tests.traces import World
from worker.simulate.costs import ModelCosts
from worker.simulate.trace import TracedJob


class Work:
    """The jobs of one model, and the least time that its engine needs for them, in however many turns."""

    def __init__(self, cost: ModelCosts) -> None:
        self._cost = cost
        self._reading, self._whole, self._longest = 0.0, 0.0, 0.0
        self._first_readings: list[float] = []  # the shortest, as many as there are places but one
        self._long_ones: list[float] = []  # the longest jobs, one more than there are places

    def add(self, job: TracedJob) -> None:
        places = self._cost.max_num_seqs
        reading = job.prompt_tokens / self._cost.prefill_tokens_per_s
        takes = reading + job.output_tokens / self._cost.decode_tokens_per_s
        self._reading += reading
        self._whole += takes
        self._longest = max(self._longest, takes)
        insort(self._first_readings, reading)
        del self._first_readings[places - 1 :]
        insort(self._long_ones, takes)
        del self._long_ones[: -places - 1]

    def least_s(self) -> float:
        """
        The largest of four bounds: all prompts are read one after the other; the longest job; of one job more than
        there are places, the two shortest share one; all places work from the start, the next one beginning when one
        prompt more has been read, until the end.
        """
        places = self._cost.max_num_seqs
        begun_late = sum(accumulate(self._first_readings)) if len(self._long_ones) > places else 0.0
        shared = sum(self._long_ones[:2]) if len(self._long_ones) > places else 0.0
        return max(self._reading, self._longest, shared, (self._whole + begun_late) / places)


_LOOKS = 2000  # moments from which is counted, lest a long trace takes long


def lower_bound_s(world: World) -> float:
    """
    No schedule ends sooner, whatever it knows; seconds from the first arrival.

    One model is ready at a time and a switch waits for the jobs in flight: put together, all turns of a model are one
    run of its jobs on its places, and the times of several models add up. So do their switches: the first load of each
    for all jobs together; for the jobs that come at or after a moment, that moment, their time, and a wake of all
    their models but one.
    """
    work = {model: Work(cost) for model, cost in world.costs.items()}
    seen: set[str] = set()
    latest = 0.0

    def total_s() -> float:
        return sum(work[model].least_s() for model in seen)

    for number, job in enumerate(reversed(world.jobs)):
        work[job.model].add(job)
        seen.add(job.model)
        if number % math.ceil(len(world.jobs) / _LOOKS):
            continue
        wakes = sorted(min(world.costs[model].wake_s, world.costs[model].load_s) for model in seen)
        latest = max(latest, job.arrival_s + sum(wakes[:-1]) + total_s())
    return max(latest - world.jobs[0].arrival_s, total_s() + sum(world.costs[model].load_s for model in seen))
