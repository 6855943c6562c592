"""
A producer with the light package: submits every job of a batch file, then collects the answers.

    REDIS_URL=redis://127.0.0.1:6379/0 python examples/producer_client.py examples/jobs.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from common import JobClient
from common.errors import ShiftworkerError

TIMEOUT_S = 600


def main(path: Path) -> None:
    """Send the jobs of the JSON lines in *path* and print each answer's model and beginning."""
    client = JobClient()  # REDIS_URL, or the default address
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    job_ids = client.submit_many(line["body"] for line in lines)

    for line, job_id in zip(lines, job_ids, strict=True):
        name = line["custom_id"]
        try:
            outcome = client.wait(job_id, timeout=TIMEOUT_S)
        except ShiftworkerError as error:
            print(f"{name:24} {error.kind}: {error}" + (" (a retry may help)" if error.retry_helps else ""))
        else:
            print(f"{name:24} {outcome.ledger.model:16} {(outcome.answer or '')[:60]!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples/jobs.jsonl"))
