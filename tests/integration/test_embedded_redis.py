"""
The embedded Redis: one server to a folder, and what it accepted is there after a restart.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import Misconfigured
from common.redis_client import connect
from worker.embedded_redis import EmbeddedRedis


def test_a_second_server_in_the_folder_is_refused_and_told_of_the_first(
    own_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    """Two servers would append to one file; the message names the first one, and the folder is free once it ends."""
    folder = tmp_path / "redis"
    first, second = own_redis, EmbeddedRedis(folder)
    with pytest.raises(Misconfigured, match=rf"{folder} belongs to .* process \d+ at {first.url}.*REDIS_URL.*--data"):
        second.start()
    assert not second.running

    client = connect(first.url)
    client.rpush("list", *range(301))
    client.close()
    first.kill()
    second.start()
    client = connect(second.url)
    assert client.llen("list") == 301
    client.close()
    second.stop()
