"""
What a decision costs with ever more waiting jobs: its time, and the commands that Redis carries out for its reading.

    python bench/decision_time.py [--jobs 100 10000 100000]

It starts a Redis of its own, and fills the backlogs of six models, each with three classes and five tenants.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from common import backlog_scripts as scripts
from common import keys
from common.redis_client import RedisClient, connect
from worker.embedded_redis import EmbeddedRedis
from worker.scheduling.overtake import choose_overtaking
from worker.scheduling.pick import Knowledge, pick_turn
from worker.scheduling.redis_queues import RedisQueues
from worker.scheduling.substitute import choose_substitute
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident

MODELS = tuple(f"model{n}" for n in range(6))
LARGER = {model: MODELS[n + 1 :] for n, model in enumerate(MODELS)}
_A_CALL = 5_000  # jobs that one script puts in
_LOOKS = 50

_MESSAGE = json.dumps(
    {
        "body": "",
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"id": "job NUMBER", "task": keys.GENERATE_TASK},
        "properties": {"delivery_tag": "tag NUMBER", "delivery_info": {"exchange": "", "routing_key": "x"}},
    }
)

# KEYS: a backlog. ARGV: from which number, how many, now, its queue, what each message looks like.
_FILL = f"""{scripts.LIBRARY}
for i = tonumber(ARGV[1]), ARGV[1] + ARGV[2] - 1 do
  put(KEYS[1], 'job ' .. i, {{
    priority = 3 * (i % 3), tenant = 'tenant ' .. i % 5, queued_at = ARGV[3] - 100 + i / 1e6, prompt_tokens = 100,
    output_tokens = 50, max_wait_s = 1e6, delivery_tag = 'tag ' .. i, exchange = '', routing_key = ARGV[4],
    any_model = i % 5 < 3,
  }}, (string.gsub(ARGV[5], 'NUMBER', i)))
end
"""


def fill(client: RedisClient, jobs: int, *, now: float) -> None:
    """Put *jobs* into the backlogs, evenly."""
    for number, model in enumerate(MODELS):
        queue = keys.model_queue(model)
        mine = jobs // len(MODELS) + (number < jobs % len(MODELS))
        for first in range(0, mine, _A_CALL):
            some = min(_A_CALL, mine - first)
            client.eval(_FILL, 1, keys.backlog(queue), first, some, now, queue, _MESSAGE)


def decide(client: RedisClient, *, now: float) -> tuple[float, float]:
    """Look and decide as the heart does; seconds to read, and to decide."""
    resident = Resident(model_id=MODELS[0], level=Level.READY, bytes=1, since=now - 60, in_flight=8)
    residency = Residency(capacity=1, max_residents=1, residents=(resident,), switch_s=dict.fromkeys(MODELS, 10.0))
    paces = {model: Pace(prefill_tokens_per_s=8000, decode_tokens_per_s=50, job_s=0.1, at_once=16) for model in MODELS}
    known = Knowledge(paces=paces, elsewhere={MODELS[1]: 1})
    began = time.perf_counter()
    backlog = RedisQueues(client, MODELS).backlog()
    read = time.perf_counter()
    pick_turn(backlog, residency, MODELS, now=now, max_wait_s=600, min_turn_s=30, known=known)
    choose_substitute(backlog, residency, LARGER, known=known, now=now)
    choose_overtaking(backlog, residency, known=known, look_s=0.5, now=now)
    return read - began, time.perf_counter() - read


def cpu_s(client: RedisClient) -> float:
    """Seconds of CPU that this process and Redis have taken: what waiting for a busy machine does not change."""
    used = client.info("cpu")
    return time.process_time() + used["used_cpu_user"] + used["used_cpu_sys"]


def commands(client: RedisClient) -> int:
    """How many commands Redis has carried out, those inside scripts counted."""
    return sum(stats["calls"] for stats in client.info("commandstats").values())


def main() -> None:
    """Print a row for each number of jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[100, 10_000, 100_000])
    counts = parser.parse_args().jobs
    print("| waiting jobs | read ms | decide ms | CPU ms, Redis too | commands in Redis |")  # noqa: T201
    print("| ---: | ---: | ---: | ---: | ---: |")  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedRedis(Path(folder))
        server.start()
        client = connect(server.url)
        try:
            for jobs in counts:
                client.flushall()
                now = time.time()
                fill(client, jobs, now=now)
                before, cpu = commands(client), cpu_s(client)
                looks = [decide(client, now=now) for _ in range(_LOOKS)]
                calls, cpu = (commands(client) - before) // _LOOKS, (cpu_s(client) - cpu) / _LOOKS
                read, decided = (1000 * median(column) for column in zip(*looks, strict=True))
                print(f"| {jobs:,} | {read:.2f} | {decided:.2f} | {1000 * cpu:.2f} | {calls} |")  # noqa: T201
        finally:
            client.close()
            server.stop()


if __name__ == "__main__":
    main()
