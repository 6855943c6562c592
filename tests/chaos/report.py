"""
What came of it? Counts what was lost, what was done twice and what is wrong, from what Redis has kept.

The witness is the append-only file: it has every write that Redis ever made, so an outcome that was overwritten would
show, even if both times the same was written.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common import keys
from common.schemas import JobState, Outcome


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
    unanswered: Mapping[str, str]  # ended otherwise -> why
    duplicates: Sequence[str]  # whose outcome was written more than once
    wrong: Sequence[str]  # answered otherwise than in a quiet run
    unlike: Sequence[str]  # whose copy for Celery is not what is on record
    untold: Sequence[str]  # whose stream does not end exactly once, or does not give the answer
    took_s: float = 0.0  # from the first job to the last outcome
    left: Sequence[str] = ()  # what should be gone: processes, deliveries, messages, shares
    runs: int = 0  # attempts of all jobs together
    taken_back: int = 0  # deliveries that came back from the dead
    slowest_recovery: Recovery | None = None
    slowest_job_s: float = 0.0  # from submit to outcome

    @property
    def whole(self) -> bool:
        """Was every promise kept?"""
        return not any((self.lost, self.unanswered, self.duplicates, self.wrong, self.unlike, self.untold, self.left))

    def __str__(self) -> str:
        recovery = self.slowest_recovery or "none"
        hits = ", ".join(f"{what} {times}" for what, times in sorted(self.faults.items()))
        named = ("lost", "unanswered", "duplicates", "wrong", "unlike", "untold", "left")
        return "\n".join(
            (
                f"seed {self.seed}: {self.jobs} jobs, {sum(self.faults.values())} faults, {self.took_s:.0f} s: {hits}",
                f"  lost {len(self.lost)}, duplicates {len(self.duplicates)}, wrong answers {len(self.wrong)}",
                f"  runs beyond the first {self.runs - self.jobs}, deliveries taken back {self.taken_back}",
                f"  slowest recovery {recovery}, slowest job {self.slowest_job_s:.1f} s",
                *(f"  {name}: {found}" for name in named if (found := getattr(self, name))),
            )
        )


def as_table(reports: Iterable[Report]) -> str:
    """The runs as a table in Markdown, one line each."""
    return "\n".join(
        (
            "| seed | jobs | faults | lost | duplicates | wrong | runs again | taken back | slowest recovery | time |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
            *(
                f"| {r.seed} | {r.jobs} | {sum(r.faults.values())} | {len(r.lost)} | {len(r.duplicates)} "
                f"| {len(r.wrong)} | {r.runs - r.jobs} | {r.taken_back} | {r.slowest_recovery} | {r.took_s:.0f} s |"
                for r in reports
            ),
        )
    )


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
            if job.outcome is not None and job.outcome.state is not JobState.ANSWERED
        },
        duplicates=[i for i in kept if written.get(i, 0) > 1],
        wrong=[i for i, job in kept.items() if right and is_wrong(job, right[i])],
        unlike=[i for i, job in kept.items() if is_unlike(job)],
        untold=[i for i, job in kept.items() if is_untold(job)],
        runs=sum(job.attempts for job in kept.values()),
        **figures,
    )


def is_wrong(kept: Kept, expected: str | None) -> bool:
    """Is it answered otherwise than expected?"""
    if kept.outcome is None or kept.outcome.state is not JobState.ANSWERED:
        return False
    return kept.outcome.answer != expected


def is_unlike(kept: Kept) -> bool:
    """Does Celery's copy say something else than the record?"""
    outcome, copy = kept.outcome, kept.celery
    if outcome is None or outcome.state is not JobState.ANSWERED:
        return False
    return copy is None or copy["status"] != "SUCCESS" or copy["result"] != json.loads(json.dumps(outcome.result()))


def is_untold(kept: Kept) -> bool:
    """Does its stream not end exactly once, last of all, after exactly the answer?"""
    if kept.stream is None or kept.outcome is None:
        return False
    kinds, attempts = [event["kind"] for event in kept.stream], [event.get("attempt") for event in kept.stream[:-1]]
    if kinds.count("end") != 1 or kinds[-1] != "end" or len(set(attempts)) > 1:  # a reset drops what came before it
        return True
    return kept.outcome.state is JobState.ANSWERED and kept.told != kept.outcome.answer
