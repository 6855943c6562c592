"""
What came of it? Counts what was lost, what was done twice and what is wrong, from what Redis has kept.

The witness is the append-only file: it has every write that Redis ever made, so an outcome that was overwritten would
show, even if both times the same was written.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from celery import states

from common import keys
from common.schemas import JobState, Outcome

_PROMISES = ("lost", "unanswered", "duplicates", "wrong", "unlike", "untold", "unheard", "left")  # none is broken
_CELERYS = {JobState.ANSWERED: states.SUCCESS, JobState.CANCELLED: states.REVOKED}


@dataclass(frozen=True, kw_only=True, order=True)
class Recovery:
    """How long nothing ended after the end of a fault."""

    seconds: float  # to the next outcome; later faults may lie in between
    fault: str

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s ({self.fault})"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of one run; every `Sequence` of ids should be empty."""

    seed: int
    jobs: int
    faults: Mapping[str, int]  # what happened -> how often
    lost: Sequence[str]  # accepted, and without an outcome
    unanswered: Mapping[str, str]  # ended otherwise than they might -> why
    duplicates: Sequence[str]  # whose outcome was written more than once
    wrong: Sequence[str]  # answered otherwise than in a quiet run
    unlike: Sequence[str]  # whose copy for Celery is not what is on record
    untold: Sequence[str]  # whose stream does not end exactly once, or does not give the answer
    unheard: Sequence[str] = ()  # whose webhook was never called
    ends: Mapping[str, int] = field(default_factory=dict)  # state -> how many jobs ended so
    called_again: int = 0  # webhooks that were called more than once
    took_s: float = 0.0  # from the first job to the last outcome
    left: Sequence[str] = ()  # what should be gone: processes, deliveries, messages, shares
    runs_again: int = 0  # attempts beyond the first of a job
    taken_back: int = 0  # deliveries that came back from the dead
    slowest_recovery: Recovery | None = None
    slowest_job_s: float = 0.0  # from submit to outcome

    @property
    def whole(self) -> bool:
        """Was every promise kept?"""
        return not any(getattr(self, name) for name in _PROMISES)

    def __str__(self) -> str:
        recovery = self.slowest_recovery or "none"
        hits = ", ".join(f"{what} {times}" for what, times in sorted(self.faults.items()))
        ends = ", ".join(f"{state} {count}" for state, count in sorted(self.ends.items()))
        return "\n".join(
            (
                f"seed {self.seed}: {self.jobs} jobs, {sum(self.faults.values())} faults, {self.took_s:.0f} s: {hits}",
                f"  lost {len(self.lost)}, duplicates {len(self.duplicates)}, wrong answers {len(self.wrong)}",
                f"  {ends}; webhooks called again {self.called_again}",
                f"  runs beyond the first {self.runs_again}, deliveries taken back {self.taken_back}",
                f"  slowest recovery {recovery}, slowest job {self.slowest_job_s:.1f} s",
                *(f"  {name}: {found}" for name in _PROMISES if (found := getattr(self, name))),
            )
        )


def as_table(reports: Iterable[Report]) -> str:
    """The runs as a table in Markdown, one line each."""
    columns: dict[str, Callable[[Report], object]] = {
        "seed": lambda r: r.seed,
        "jobs": lambda r: r.jobs,
        "faults": lambda r: sum(r.faults.values()),
        "lost": lambda r: len(r.lost),
        "duplicates": lambda r: len(r.duplicates),
        "wrong": lambda r: len(r.wrong),
        "cancelled": lambda r: r.ends.get("cancelled", 0),
        "expired": lambda r: r.ends.get("expired", 0),
        "webhooks unheard": lambda r: len(r.unheard),
        "runs again": lambda r: r.runs_again,
        "taken back": lambda r: r.taken_back,
        "slowest recovery": lambda r: r.slowest_recovery,
        "time": lambda r: f"{r.took_s:.0f} s",
    }
    rows = [columns.keys(), ["---:"] * len(columns), *([str(of(r)) for of in columns.values()] for r in reports)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_table(page: Path, table: str) -> None:
    """Put *table* in place of the one in *page*, between the lines that begin and end it."""
    before, begin, rest = page.read_text().partition("<!-- make chaos writes this -->\n")
    _, end, after = rest.partition("<!-- until here -->")
    page.write_text(f"{before}{begin}{table}\n{end}{after}")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What Redis has of one job at the end."""

    outcome: Outcome | None
    celery: Mapping[str, Any] | None
    attempts: int
    ended_at: float | None
    stream: Sequence[Mapping[str, str]] | None = None  # None = it did not stream
    told: str = ""  # what the stream's last attempt said
    may_end: frozenset[JobState] = frozenset({JobState.ANSWERED})
    calls: int | None = None  # of its webhook; None = it has none


def writes(aof: bytes) -> Iterator[list[bytes]]:
    """Give each command of an append-only file; one that was cut off at the end is left out."""
    at = 0

    def line() -> bytes:
        nonlocal at
        end = aof.index(b"\r\n", at)
        found, at = aof[at:end], end + 2
        return found

    try:
        while at < len(aof):
            command = []
            for _ in range(int(line().removeprefix(b"*"))):
                length = int(line().removeprefix(b"$"))
                command.append(aof[at : at + length])
                at += length + 2
            yield command
    except ValueError:
        return


def count_outcomes(folder: Path) -> Counter[str]:
    """How often the outcome of each job was written, by the append-only files in Redis's *folder*."""
    prefix = keys.outcome("").encode()
    return Counter(
        command[1].removeprefix(prefix).decode()
        for file in sorted(folder.glob("appendonlydir/*.aof"))
        for command in writes(file.read_bytes())
        if command[0].upper().startswith(b"SET") and command[1].startswith(prefix)
    )


def slowest_recovery(mended: Iterable[tuple[float, str]], ended: Iterable[float]) -> Recovery | None:
    """The longest wait from the end of a fault (when, which) to the next of the *ended*; None without any."""
    times = sorted(ended)
    waits = ((bisect_left(times, at), at, fault) for at, fault in mended)
    return max((Recovery(seconds=times[i] - at, fault=fault) for i, at, fault in waits if i < len(times)), default=None)


def judge(
    kept: Mapping[str, Kept],
    *,
    expected: Sequence[str | None] | None,
    written: Mapping[str, int],
    seed: int = 0,
    faults: Mapping[str, int] = MappingProxyType({}),
    **figures: Any,
) -> Report:
    """
    Hold what was *kept* of each job, in the order of *expected*, against every promise.

    *written* is how often each outcome was; *expected* may be longer, or None = nobody knows; the *figures* are the
    report's others.
    """
    right = dict(zip(kept, expected, strict=False)) if expected else {}
    return Report(
        seed=seed,
        jobs=len(kept),
        faults=faults,
        lost=[i for i, job in kept.items() if job.outcome is None],
        unanswered={
            i: str(job.outcome.error)
            for i, job in kept.items()
            if job.outcome is not None and job.outcome.state not in job.may_end
        },
        duplicates=[i for i in kept if written.get(i, 0) > 1],
        wrong=[i for i, job in kept.items() if right and is_wrong(job, right[i])],
        unlike=[i for i, job in kept.items() if is_unlike(job)],
        untold=[i for i, job in kept.items() if is_untold(job)],
        unheard=[i for i, job in kept.items() if job.calls == 0],
        called_again=sum((job.calls or 0) > 1 for job in kept.values()),
        ends=Counter(job.outcome.state.value for job in kept.values() if job.outcome is not None),
        runs_again=sum(max(0, job.attempts - 1) for job in kept.values()),
        **figures,
    )


def is_wrong(kept: Kept, expected: str | None) -> bool:
    """Is it answered otherwise than expected?"""
    if kept.outcome is None or kept.outcome.state is not JobState.ANSWERED:
        return False
    return kept.outcome.answer != expected


def is_unlike(kept: Kept) -> bool:
    """Does Celery's copy say something else than the record, or nothing at all?"""
    outcome, copy = kept.outcome, kept.celery
    if outcome is None:
        return False
    if copy is None or copy["status"] != _CELERYS.get(outcome.state, states.FAILURE):
        return True
    answered = outcome.state is JobState.ANSWERED
    return answered and copy["result"] != json.loads(json.dumps(outcome.result()))


def is_untold(kept: Kept) -> bool:
    """Does its stream not end exactly once, last of all, after exactly the answer?"""
    if kept.stream is None or kept.outcome is None:
        return False
    kinds, attempts = [event["kind"] for event in kept.stream], [event.get("attempt") for event in kept.stream[:-1]]
    if kinds.count("end") != 1 or kinds[-1] != "end" or len(set(attempts)) > 1:  # a reset drops what came before it
        return True
    return kept.outcome.state is JobState.ANSWERED and kept.told != kept.outcome.answer
