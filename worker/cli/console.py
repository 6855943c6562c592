"""
What every command of the terminal shares: where it writes, its settings, its Redis, its exit codes.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from common import logs
from common.errors import Misconfigured
from common.redis_client import RedisClient, connect, ping
from common.settings import Settings

# Exit codes of sysexits.h, so that a supervisor can tell "fix me" from "try again".
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

out = Console()
err = Console(stderr=True)


def print_json(value: object) -> None:
    """Write *value* as one line, as it is: no colours, no wrapping."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + os.linesep)


def read_settings() -> Settings:
    """Read the settings, and log as they say."""
    settings = Settings.from_env()
    logs.configure(settings.log.level, settings.log.format)
    return settings


def reach_redis(settings: Settings) -> RedisClient:
    """
    Connect to Redis.

    Raises
    ------
    Unavailable
        It does not answer.
    """
    client = connect(settings.redis.url)
    ping(client, settings.redis.url)
    return client


def wiring() -> Any:
    """
    Give what builds the processes.

    Raises
    ------
    Misconfigured
        A producer's light install does not have what it needs.
    """
    try:
        from worker import wiring as found  # noqa: PLC0415
    except ImportError as error:
        raise Misconfigured(
            f"{error.name} is not installed: this is the light package of a producer. "
            "Run `pip install 'shiftworker[worker]'` on a machine that should work."
        ) from error
    return found
