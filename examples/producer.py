"""
A producer that has only Celery: sends one job by name and waits for its answer.

    REDIS_URL=redis://127.0.0.1:6379/0 python examples/producer.py "Why is the sky blue?"
"""

from __future__ import annotations

import os
import sys

from celery import Celery

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
TIMEOUT_S = 600


def main(question: str) -> None:
    """Ask *question* of whichever model the router trusts with it."""
    app = Celery("producer", broker=REDIS_URL, backend=REDIS_URL)
    job = {"model": "auto", "messages": [{"role": "user", "content": question}], "max_tokens": 96}

    # argsrepr: without it the prompt stands in Celery's events, for everyone who can open Flower.
    result = app.send_task("shiftworker.submit", args=[job], queue="shiftworker", argsrepr="(job)")
    print("job     ", result.id)

    # A failed job raises its error here, by class name: InvalidRequest, PromptTooLong, JobCancelled, ...
    response = result.get(timeout=TIMEOUT_S)
    print("answer  ", response["choices"][0]["message"]["content"])
    for name, value in response["ledger"].items():
        print(f"{name:18}", value)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "Name three uses of a spare hour.")
