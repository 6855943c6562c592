"""
What is here, what is missing, and what would be chosen? The work behind `shiftworker doctor`; nothing is started.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from common.errors import Misconfigured, ShiftworkerError
from common.redis_client import connect, ping, without_password
from common.settings import Settings
from worker.catalog.hub import in_cache
from worker.embedded_redis import given_url
from worker.memory.measured import Measurement
from worker.selection.choose import Choice
from worker.selection.placement import Placement
from worker.wiring import Survey, survey

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at; good is None for what is worth knowing and no fault."""

    what: str
    good: bool | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings, and what they were made of."""

    findings: tuple[Finding, ...]
    found: Survey | None  # None where no choice could be made

    @property
    def choice(self) -> Choice | None:
        """What would be served."""
        return self.found.choice if self.found else None

    def measured(self, placement: Placement) -> Measurement | None:
        """What the last load of *placement* took."""
        return self.found.measured(placement) if self.found else None

    @property
    def healthy(self) -> bool:
        """Can a worker run here?"""
        return all(finding.good is not False for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report for programs."""
        starting = self.choice.starting if self.choice else None
        return {
            "healthy": self.healthy,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "starting": starting.model_id if starting else None,
            "reason": self.choice.reason if self.choice else None,
            "served": [placement.model_id for placement in self.choice.placements] if self.choice else [],
            "left_out": {left.model_id: left.reason for left in self.choice.left_out} if self.choice else {},
        }


def examine(settings: Settings) -> Report:
    """Look at Redis, the cards, the engines and the models; whatever is wrong is a finding, not an error."""
    redis = _redis(settings)
    try:
        found = survey(settings)
    except Misconfigured as error:
        return Report(findings=(redis, Finding(what=error.kind, good=False, detail=error.message)), found=None)
    return Report(findings=(redis, *_findings(found)), found=found)


def _redis(settings: Settings) -> Finding:
    url = settings.redis.url
    try:
        ping(connect(url), url)
    except (ShiftworkerError, RedisError, OSError) as error:
        if given_url() is None:
            return Finding(what="Redis", good=None, detail="none runs here: `shiftworker up` starts one of its own")
        return Finding(what="Redis", good=False, detail=str(error))
    return Finding(what="Redis", good=True, detail=f"{without_password(url)} answers")


def _findings(found: Survey) -> Iterator[Finding]:
    machine, choice = found.machine, found.choice
    for gpu in machine.gpus:
        free = gpu.total_bytes if gpu.free_bytes is None else gpu.free_bytes
        others = (
            f", {(gpu.total_bytes - free) / _GIB:.1f} GiB taken by other programs" if free < gpu.total_bytes else ""
        )
        yield Finding(
            what=f"card {gpu.index}", good=True, detail=f"{gpu.name}, {gpu.total_bytes / _GIB:.1f} GiB{others}"
        )
    if not machine.gpus:
        passed_over = "; ".join(found.detected.passed_over)
        yield Finding(what="cards", good=None, detail=f"none: models run on the CPU ({passed_over or machine.source})")
    yield Finding(
        what="RAM",
        good=True,
        detail=f"{machine.ram_available_bytes / _GIB:.1f} of {machine.ram_total_bytes / _GIB:.1f} GiB free, "
        f"{machine.cpu_count} cores",
    )
    engines = {kind: why for kind, why in found.engines.items() if why is not None}
    for kind in found.engines:
        # One engine is enough; only a machine without any is in trouble.
        good = True if kind not in engines else (False if len(engines) == len(found.engines) else None)
        yield Finding(what=kind.value, good=good, detail=engines.get(kind, "installed"))
    here = [p.model_id for p in choice.placements if p.spec.path is not None or in_cache(p.spec)]
    if missing := [p.model_id for p in choice.placements if p.model_id not in here and p.spec.repo is not None]:
        yield Finding(
            what="model files", good=None, detail=f"to be fetched at their first switch: {', '.join(missing)}"
        )
    disk = shutil.disk_usage(Path.home())
    yield Finding(what="disk", good=True, detail=f"{disk.free / _GIB:.0f} GiB free for model files")
    served = f"{len(choice.placements)} of {len(found.catalogue)} models can be served here; starts with "
    yield Finding(
        what="choice",
        good=choice.starting is not None,
        detail=f"{served}{choice.starting.model_id if choice.starting else 'nothing'}: {choice.reason}",
    )
