"""
How many jobs a worker holds: it follows the engine's places and its KV pool, and leaves the rest in the queue.
"""

from __future__ import annotations

from itertools import product

import pytest

from worker.scheduling.admit import Capacity, admit_jobs


def engine(max_num_seqs: int = 64, model_id: str = "a", **changes: object) -> Capacity:
    return Capacity(model_id=model_id, max_num_seqs=max_num_seqs, **changes)  # type: ignore[arg-type] # its own fields


@pytest.mark.parametrize(
    ("capacity", "jobs", "why"),
    [
        (engine(64), 80, "its places"),
        (engine(64, kv_tokens=16_000), 80, "its places"),  # no job was measured yet
        (engine(64, kv_tokens=16_000, tokens_per_job=100.0), 80, "its places"),
        (engine(64, kv_tokens=16_000, tokens_per_job=1000.0), 20, "16,000 tokens of KV at 1000 a job"),
        (engine(64, kv_tokens=16_000, tokens_per_job=50_000.0), 2, "16,000 tokens of KV"),  # one, and the next
        (engine(8, threads=32), 10, "its places"),
        (engine(64, threads=32), 32, "a thread for each"),
        (engine(1), 2, "its places"),
        (engine(64, job_s=0.2), 256, "its places"),  # all 64 may end at once, and more again in no time
        (engine(64, job_s=0.5), 192, "its places"),
        (engine(64, job_s=2.0), 96, "its places"),
        (engine(64, job_s=60.0), 80, "its places"),
        (engine(64, job_s=0.0), 256, "its places"),
        (engine(64, job_s=0.2, kv_tokens=16_000, tokens_per_job=1000.0), 64, "16,000 tokens of KV"),
        (engine(64, job_s=0.2, threads=32), 32, "a thread for each"),
    ],
)
def test_the_narrowest_limit_counts(capacity: Capacity, jobs: int, why: str) -> None:
    """Places, KV room by the length of jobs, or threads; a quarter more stand behind an engine, of short jobs more."""
    found = admit_jobs([capacity], otherwise=7)
    assert found.jobs == jobs
    assert why in found.reason


def test_nothing_ready_has_an_answer_too() -> None:
    """The queues of no model are served then; others (the cloud's) may be."""
    assert admit_jobs([], otherwise=7).jobs == 7


SMALL_WORLD = [
    engine(seqs, kv_tokens=kv, tokens_per_job=tokens, threads=threads, job_s=seconds)
    for seqs, kv, tokens, threads, seconds in product(
        (1, 3, 64), (None, 1, 500, 10**6), (None, 1.0, 90.0), (None, 1, 16), (None, 0.1, 1.5, 30.0)
    )
]


def test_no_engine_runs_dry_and_none_is_given_more_than_it_works_on_soon() -> None:
    """In every small world: at least one job, more behind it unless threads are short, and a bound."""
    for capacity in SMALL_WORLD:
        jobs = admit_jobs([capacity], otherwise=7).jobs
        short = capacity.job_s is not None and capacity.job_s < 4
        assert 1 <= jobs <= capacity.max_num_seqs * (4 if short else 1.25) + 1
        if capacity.threads is None:
            assert jobs >= 2


def test_engines_side_by_side_add_up() -> None:
    """Each has its own room."""
    for one, other in product(SMALL_WORLD[::17], repeat=2):
        alone = [admit_jobs([each], otherwise=7).jobs for each in (one, other)]
        assert admit_jobs([one, other], otherwise=7).jobs == sum(alone)


def test_longer_jobs_never_admit_more() -> None:
    """The more tokens a job takes, the fewer fit."""
    jobs = [
        admit_jobs([engine(kv_tokens=10_000, tokens_per_job=float(tokens))], otherwise=7).jobs
        for tokens in range(1, 12_000, 13)
    ]
    assert jobs == sorted(jobs, reverse=True)


def test_longer_runs_never_admit_more() -> None:
    """The longer a job takes, the fewer stand behind, and the sooner an urgent one has its turn."""
    jobs = [admit_jobs([engine(job_s=tenths / 10)], otherwise=7).jobs for tenths in range(100)]
    assert jobs == sorted(jobs, reverse=True)
