"""
Which programs make up one box: router, worker and Flower, in the order they start.
"""

from __future__ import annotations

import sys

from common.settings import Settings
from worker.supervisor import Program

_LEAVING_S = 40.0  # beyond the running jobs' time: for engines to end and Redis to hear goodbye


def programs(settings: Settings, *, redis_url: str, flower_port: int) -> list[Program]:
    """The processes of one box, in the order they start."""
    env = {"REDIS_URL": redis_url}
    return [
        Program(name="router", command=_ours("router"), env=env),
        Program(name="worker", command=_ours("worker"), env=env, stop_s=settings.worker.soft_shutdown_s + _LEAVING_S),
        flower_program(settings, redis_url=redis_url, port=flower_port),
    ]


def flower_program(settings: Settings, *, redis_url: str, port: int) -> Program:
    """Flower on the loopback, or behind a password where one is set."""
    password = settings.flower.password
    env = {"REDIS_URL": redis_url, "FLOWER_UNAUTHENTICATED_API": "false" if password else "true"}
    if password is not None:
        env["FLOWER_BASIC_AUTH"] = f"{settings.flower.user}:{password.get_secret_value()}"
    address = "0.0.0.0" if password else "127.0.0.1"  # noqa: S104 - only behind the password
    command = [
        sys.executable, "-m", "celery", "-A", "worker.flower_app", "flower",
        f"--address={address}", f"--port={port}", "--logging=warning",
    ]  # fmt: skip
    return Program(name="flower", command=command, env=env, stop_s=10)


def _ours(*arguments: str) -> list[str]:
    """The command line of one of our own programs, in this Python."""
    return [sys.executable, "-m", "worker", *arguments]
