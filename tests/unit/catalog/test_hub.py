"""
What can be had of the hub, and why not: the hub is asked once, and only if it must be.
"""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants

from common.errors import ModelMissing
from tests.factories import make_spec
from worker.catalog.catalogue import Catalogue
from worker.catalog.hub import fetch_files, in_cache, out_of_reach
from worker.catalog.spec import EngineKind, ModelSpec

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and an address where nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed_port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


def keep(cache: Path, spec: ModelSpec, file: str) -> None:
    """Put a file of *spec* into the cache, as the hub's client lays it out."""
    folder = cache / f"models--{(spec.repo or '').replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
    (folder / "snapshots" / COMMIT / file).write_bytes(b"weights")


def catalogue(*models: ModelSpec) -> Catalogue:
    return Catalogue(models=models)


LOCAL = make_spec("local", repo=None, file=None, path=Path("/somewhere"))
GGUF = make_spec("gguf")
VLLM = make_spec("vllm", engine=EngineKind.VLLM, file=None)


def test_without_the_hub_what_is_not_in_the_cache_is_out_of_reach(cache: Path) -> None:
    """Local files and cached ones are not; the reason has the address."""
    keep(cache, GGUF, "gguf.gguf")

    assert out_of_reach(catalogue(LOCAL, GGUF, VLLM)) == {
        "vllm": f"its files are not in the cache, and the hub at {constants.ENDPOINT} does not answer (ConnectError)"
    }


def test_offline_nobody_is_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE is the reason."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(httpx, "head", nobody_asks)

    assert out_of_reach(catalogue(LOCAL, GGUF)) == {"gguf": "its files are not in the cache, and HF_HUB_OFFLINE is set"}


def test_when_everything_is_here_nobody_is_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network at boot."""
    keep(cache, GGUF, "gguf.gguf")
    keep(cache, VLLM, "config.json")
    monkeypatch.setattr(httpx, "head", nobody_asks)

    assert out_of_reach(catalogue(LOCAL, GGUF, VLLM)) == {}


def test_a_hub_that_answers_has_everything(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once, whatever the number of models; what it has is seen when it is fetched."""
    asked: list[str] = []

    def head(url: str, *, timeout: float) -> httpx.Response:
        asked.append(url)
        return httpx.Response(200)

    monkeypatch.setattr(httpx, "head", head)

    assert out_of_reach(catalogue(GGUF, VLLM)) == {}
    assert asked == [constants.ENDPOINT]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:123456", "ftp://hub", "hub"])
def test_an_address_that_is_none_is_a_hub_that_does_not_answer(
    cache: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """A slip in HF_ENDPOINT must not keep the worker from its local models."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)

    assert f"the hub at {endpoint} does not answer" in out_of_reach(catalogue(GGUF))["gguf"]


def test_another_revision_is_another_file(cache: Path) -> None:
    """The cache has main; v2 must be fetched."""
    keep(cache, GGUF, "gguf.gguf")

    assert in_cache(GGUF)
    assert not in_cache(make_spec("gguf", revision="v2"))
    assert not in_cache(LOCAL)


def test_fetching_what_cannot_be_had_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local files are left to the engine; the rest is missing, by name."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch_files(LOCAL)
    for spec in (GGUF, VLLM):
        with pytest.raises(ModelMissing, match=f"example/{spec.id}.* cannot be fetched: HF_HUB_OFFLINE is set"):
            fetch_files(spec)


def nobody_asks(*_: object, **__: object) -> None:
    raise AssertionError("the hub was asked")
