"""
What vLLM is told of where it may fetch media from.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.factories import make_placement
from worker.engines import vllm_server

ENGINE_DOMAINS = ("a.example", "b.example")


@pytest.mark.parametrize("domains", [(), ("*",), ENGINE_DOMAINS])
def test_vllm_knows_the_hosts_that_media_may_come_from(tmp_path: Path, domains: tuple[str, ...]) -> None:
    """Its own look at the name comes later than the router's; a list of names is what a changed address cannot pass."""
    engine = vllm_server.VllmServerEngine(
        run_dir=tmp_path, files_of=lambda _spec: "org/name", python=Path("/python"), media_domains=domains
    )
    line = list(engine.launch(make_placement(), "org/name", Path("/s.sock")).command)
    assert ("--allowed-media-domains" in line) is (domains == ENGINE_DOMAINS)
    if domains == ENGINE_DOMAINS:
        assert line[line.index("--allowed-media-domains") + 1 :] == list(domains)


def test_vllm_follows_no_redirect() -> None:
    """Where a URL leads is looked at in the router; where it leads on to, by nobody."""
    env = vllm_server.environment({}, make_placement(), model="org/name", cpu_count=2)
    assert env["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
