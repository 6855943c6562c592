"""
Reads a trace: the jobs of a file, in the order of their arrival.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InvalidRequest
from worker.state.backlog import USUAL_PRIORITY

_SHOWN = 20  # bad lines that an error names; the rest are counted


class TracedJob(NamedTuple):
    """One job of a trace; a tuple, for a trace may have a million. Moments are seconds on the trace's clock."""

    id: str
    arrival_s: float
    model: str
    prompt_tokens: int
    output_tokens: int
    priority: int = USUAL_PRIORITY  # 0 is served first, as in JobRequest
    deadline_s: float | None = None  # a moment, as arrival_s is
    tenant: str = "default"
    max_wait_s: float | None = None  # its own bound; None = that of the run


def read_trace(file: Path, models: Iterable[str]) -> list[TracedJob]:
    """
    Read the jobs of *file*, a JSON object on each line, sorted by arrival; equal arrivals keep the file's order.

    Raises
    ------
    InvalidRequest
        The file cannot be read, has no jobs, or has bad lines: each by number, field and what is allowed there.
    """
    known = frozenset(models)
    jobs: list[TracedJob] = []
    problems: list[str] = []
    ids: set[str] = set()
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                found = _read_line(line, known)
                if isinstance(found, str):
                    problems.append(f"line {number}: {found}")
                elif found.id in ids:
                    problems.append(f"line {number}: id {found.id!r} was there before")
                else:
                    ids.add(found.id)
                    jobs.append(found)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The trace {file} cannot be read: {error}. Give a UTF-8 file of JSON lines.") from None
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InvalidRequest(f"The trace {file} has bad lines:\n  " + "\n  ".join(problems[:_SHOWN]) + more)
    if not jobs:
        raise InvalidRequest(f"The trace {file} has no jobs. Write one JSON object on each line.")
    jobs.sort(key=lambda job: job.arrival_s)
    return jobs


def _read_line(line: str, models: frozenset[str]) -> TracedJob | str:
    """Read the job of a line, or say what is wrong with it."""
    try:
        found = json.loads(line)
    except ValueError as error:
        return f"is not JSON ({error})"
    if not isinstance(found, dict):
        return f"is {type(found).__name__}, not an object"
    get: Callable[[str], Any] = found.get
    number = get("id")
    priority, tenant = get("priority"), get("tenant")
    job = TracedJob(
        id=str(number) if type(number) is int else number,
        arrival_s=get("arrival_s"),
        model=get("model"),
        prompt_tokens=get("prompt_tokens"),
        output_tokens=get("output_tokens"),
        priority=USUAL_PRIORITY if priority is None else priority,
        deadline_s=get("deadline_s"),
        tenant="default" if tenant is None else tenant,
    )
    return _problem(job, models) or job


def _problem(job: TracedJob, models: frozenset[str]) -> str | None:
    """What is wrong with the first bad field; None = nothing."""
    if not isinstance(job.id, str) or not job.id:
        return "id must be a text that is not empty"
    if not _is_moment(job.arrival_s):
        return f"arrival_s must be a number of seconds, 0 or more, not {job.arrival_s!r}"
    if not isinstance(job.model, str) or job.model not in models:
        return f"model {job.model!r} is not in the costs, which have {', '.join(sorted(models))}"
    for field, tokens in (("prompt_tokens", job.prompt_tokens), ("output_tokens", job.output_tokens)):
        if type(tokens) is not int or tokens < 0:
            return f"{field} must be a whole number, 0 or more, not {tokens!r}"
    if type(job.priority) is not int or not 0 <= job.priority <= 9:  # noqa: PLR2004 - as in JobRequest
        return f"priority must be a whole number from 0 (first) to 9, not {job.priority!r}"
    if job.deadline_s is not None and not _is_moment(job.deadline_s):
        return f"deadline_s must be a moment like arrival_s, not {job.deadline_s!r}"
    if not isinstance(job.tenant, str):
        return f"tenant must be a text, not {job.tenant!r}"
    return None


def _is_moment(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
