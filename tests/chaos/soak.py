"""
Does anything grow? Sends many short jobs through the stub engine: python -m tests.chaos.soak --jobs 20000
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common import keys
from common.client import JobClient
from common.redis_client import RedisClient, connect
from tests.chaos.faults import Target
from tests.chaos.run import make_jobs
from tests.chaos.world import World, texts
from tests.waiting import eventually

GROWTH_MAX = 0.05  # of memory, over the last half
SLACK = 5  # descriptors or threads that may be opened late, once; a leak with each switch would be a hundred
IN_FLIGHT = 100  # jobs that have not ended, at most
PARTS = 20  # after each, everything ends and expires, and memory is looked at
_END_S = 60.0

_SETTINGS = {
    "WORKER_STUB_ENGINE": "1",
    "WORKER_STUB_RUN_S": "0.01",
    "WORKER_STUB_LOAD_S": "0.05",
    "JOB_RESULT_TTL_S": "6",  # longer than a job waits here
    "STATUS_STREAM_LENGTH": "20",
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one process had at one moment; Redis's is what it says that it has allocated."""

    bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Soak:
    """What came of it."""

    jobs: int
    ended: int
    switches: int
    took_s: float
    samples: dict[str, Sequence[Sample]]  # by process, one after each part

    @property
    def whole(self) -> bool:
        """Did every job end, and did nothing grow?"""
        return self.ended == self.jobs and all(
            growth(samples) < GROWTH_MAX and not leaks(samples) for samples in self.samples.values()
        )

    def __str__(self) -> str:
        lines = [f"{self.ended} of {self.jobs} jobs ended, {self.switches} switches, {self.took_s:.0f} s"]
        for name, samples in self.samples.items():
            first, last = _edges(samples)
            lines.append(
                f"  {name}: {_median(first, 'bytes') / 2**20:.1f} MiB after the first half, "
                f"{_median(last, 'bytes') / 2**20:.1f} MiB at the end ({growth(samples):+.1%}); descriptors "
                f"{_median(first, 'descriptors'):.0f} and {_median(last, 'descriptors'):.0f}; "
                f"threads {_median(first, 'threads'):.0f} and {_median(last, 'threads'):.0f}"
            )
        return "\n".join(lines)


def growth(samples: Sequence[Sample]) -> float:
    """How much the memory grew over the last half, as a share of what it was."""
    first, last = _edges(samples)
    return _median(last, "bytes") / _median(first, "bytes") - 1


def leaks(samples: Sequence[Sample]) -> bool:
    """Are there more descriptors or threads at the end than half-way, by more than `SLACK`?"""
    first, last = _edges(samples)
    return any(min(_all(last, what)) > max(_all(first, what)) + SLACK for what in ("descriptors", "threads"))


def _edges(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The first third of the last half, and the last."""
    half = samples[len(samples) // 2 :]
    third = max(1, len(half) // 3)
    return half[:third], half[-third:]


def _all(samples: Sequence[Sample], what: str) -> list[int]:
    return [getattr(sample, what) for sample in samples]


def _median(samples: Sequence[Sample], what: str) -> float:
    return statistics.median(_all(samples, what))


def run_soak(count: int) -> Soak:
    """Send *count* jobs for three models in turn, and look at the router, the worker and Redis meanwhile."""
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as name:
        world = World(Path(name), env=_SETTINGS, programs=(Target.ROUTER, Target.WORKER))
        try:
            world.start()
            return _soak(world, count)
        finally:
            world.close()


def _soak(world: World, count: int) -> Soak:
    producer, client = JobClient(world.redis.url), connect(world.redis.url)
    samples: dict[str, list[Sample]] = {}
    began = time.monotonic()
    ids = set()
    for part in _parts(make_jobs(count)):
        for body in part:
            ids.add(producer.submit(body, job_id=str(uuid.uuid4())))
            if len(ids) % 20 == 0:
                eventually(lambda: _under_way(client) < IN_FLIGHT, within_s=_END_S, what="jobs end")
        eventually(lambda: not _under_way(client) and not _kept(client), within_s=_END_S, what="all end and expire")
        for name, sample in _look(world, client).items():
            samples.setdefault(name, []).append(sample)
    took_s = time.monotonic() - began
    world.stop()
    producer.close()
    client.close()
    lines = list(texts(world.folder.glob("*.log")))
    ended = {line.split('"job_id": "', 1)[1][:36] for line in lines if '"event": "jobs.ended"' in line}
    switches = sum('"event": "residency.switched"' in line for line in lines)
    return Soak(jobs=count, ended=len(ended & ids), switches=switches, took_s=took_s, samples=samples)


def _look(world: World, client: RedisClient) -> dict[str, Sample]:
    processes = {program.name: psutil.Process(program.process.pid) for program in world.programs.values()}
    server = psutil.Process(world.redis._process.pid)
    return {
        **{name: _sample(process, process.memory_info().rss) for name, process in processes.items()},
        "redis": _sample(server, client.info("memory")["used_memory"]),
    }


def _parts(jobs: Sequence[Any]) -> Iterator[Sequence[Any]]:
    size = max(1, len(jobs) // PARTS)
    return (jobs[i : i + size] for i in range(0, len(jobs), size))


def _kept(client: RedisClient) -> bool:
    """Is anything left of a job that has ended?"""
    return any(True for prefix in (keys.job, keys.outcome) for _ in client.scan_iter(prefix("*"), count=1000))


def _under_way(client: RedisClient) -> int:
    """Jobs that wait for the router, or that it has routed and that have not ended."""
    return int(client.llen(keys.SUBMIT_QUEUE) + client.hlen(keys.UNACKED) + client.hlen(keys.HELD))


def _sample(process: psutil.Process, size: int) -> Sample:
    return Sample(bytes=size, descriptors=process.num_fds(), threads=process.num_threads())


def main() -> int:
    """Run the soak; returns 1 if something grew or a job did not end."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--jobs", type=int, default=20_000)
    soak = run_soak(parser.parse_args().jobs)
    print(soak)
    return 0 if soak.whole else 1


if __name__ == "__main__":
    sys.exit(main())
