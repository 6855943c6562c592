"""
Reading parts of files: one contract for the disk and a real server, and what is said when a server does otherwise.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from huggingface_hub import constants

from common.errors import ModelMissing
from tests.fakes.hub import Hub
from worker.catalog.byte_source import ByteSource, FileBytes, HttpBytes, hub_bytes, hub_client

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with hub_client() as client:
        yield client


@pytest.fixture(params=["disk", "server"])
def source(request: pytest.FixtureRequest, tmp_path: Path, client: httpx.Client) -> Iterator[ByteSource]:
    """The same bytes, in a file and behind a server."""
    if request.param == "disk":
        (tmp_path / "file").write_bytes(CONTENT)
        yield FileBytes(tmp_path / "file")
    else:
        with Hub({"/file": CONTENT}) as hub:
            yield HttpBytes(client, f"{hub.url}/file")


@pytest.mark.parametrize("start", [0, 1, 255_999, 256_000, 10**15])
@pytest.mark.parametrize("length", [1, 8, 256_000, 10**15])
def test_a_read_gives_what_is_there(source: ByteSource, start: int, length: int) -> None:
    """
    All of the range, or as much of it as the file has.
    """
    assert source.read(start, length) == CONTENT[start : start + length]


def test_the_size_is_known_before_any_read(source: ByteSource) -> None:
    """
    Whoever asks first.
    """
    assert source.size == len(CONTENT)


@pytest.mark.parametrize("name", ["nothing", ".", "a\0b"])
def test_what_is_no_file_is_named(tmp_path: Path, name: str) -> None:
    """
    Nothing, a folder, and a name that no file can have.
    """
    with pytest.raises(ModelMissing, match=r"cannot be read: .*\. Fetch the model again, or correct its path"):
        FileBytes(tmp_path / name).read(0, 8)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """
    Opening one would wait for somebody to write into it.
    """
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelMissing, match="it is no file"):
        FileBytes(tmp_path / "pipe").read(0, 8)


# Path -> status, body and headers: each does not give the first ten bytes in a way of its own.
MISBEHAVIOUR: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "/whole": (200, CONTENT, {}),
    "/cut-off": (206, CONTENT[:5], {"Content-Range": "bytes 0-9/256000", "Content-Length": "10"}),
    "/short": (206, CONTENT[:5], {"Content-Range": "bytes 0-4/256000"}),
    "/other-range": (206, CONTENT[:10], {"Content-Range": "bytes 100-109/256000"}),
    "/no-total": (206, CONTENT[:10], {"Content-Range": "bytes 0-9/*"}),
    "/too-much": (206, CONTENT, {"Content-Range": "bytes 0-255999/256000"}),
    "/loop": (302, b"", {"Location": "/loop"}),
    "/nowhere": (302, b"", {"Location": "http://[::bad"}),
    "/gated": (403, b"", {}),
    "/ill": (503, b"", {}),
}


class _Misbehaving(BaseHTTPRequestHandler):
    """Does to a request what its path says."""

    def do_GET(self) -> None:
        """Answer from the table."""
        status, body, headers = MISBEHAVIOUR.get(self.path, (404, b"", {}))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def bad_server() -> Iterator[str]:
    yield from serve(_Misbehaving)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("whole", "the server gives whole files only, no ranges. Fetch the whole file"),
        ("cut-off", "RemoteProtocolError"),
        ("short", "the server gave 5 of 10 bytes. Try again"),
        ("other-range", "the server does not say which bytes it gives. Fetch the whole file"),
        ("no-total", "the server does not say which bytes it gives. Fetch the whole file"),
        ("loop", "TooManyRedirects"),
        ("nowhere", "RemoteProtocolError"),
        ("gated", "the server refuses (403). Accept the terms on the model's page, and set HF_TOKEN"),
        ("ill", "the server answers 503. Try again later"),
        ("missing", "there is no such file. Check the repository, the revision and the file's name"),
    ],
)
def test_a_server_that_does_otherwise_is_named(bad_server: str, client: httpx.Client, path: str, says: str) -> None:
    """
    Each way not to give a range has its message, with the address.
    """
    with pytest.raises(ModelMissing) as caught:
        HttpBytes(client, f"{bad_server}/{path}").read(0, 10)

    assert f"{bad_server}/{path} cannot be read: " in caught.value.message
    assert says in caught.value.message


def test_a_server_cannot_give_more_than_was_asked(bad_server: str, client: httpx.Client) -> None:
    """
    The rest of a longer answer is left on the wire.
    """
    assert HttpBytes(client, f"{bad_server}/too-much").read(0, 10) == CONTENT[:10]


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/x", "http://", "nonsense", "http://[::bad"])
def test_an_address_where_nobody_answers_is_named(closed_port: int, client: httpx.Client, url: str) -> None:
    """
    Nobody there, or an address that cannot be one (HF_ENDPOINT).
    """
    address = url.format(port=closed_port)
    with pytest.raises(ModelMissing, match=r"cannot be read: .* Check the network \(or HF_ENDPOINT\)") as caught:
        HttpBytes(client, address).read(0, 10)

    assert caught.value.message.startswith(address)


class TestHub:
    """Files of the hub, by repository and name."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return tmp_path

    @pytest.fixture
    def use_hub(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        def use(url: str) -> None:
            monkeypatch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
            )

        return use

    def test_a_file_is_read_at_its_revision(self, use_hub: Callable[[str], None], client: httpx.Client) -> None:
        """
        The address is the one that the hub's own library makes.
        """
        with Hub({"/org/m/resolve/v2/m.gguf": CONTENT}) as hub:
            use_hub(hub.url)
            assert hub_bytes(client, "org/m", "m.gguf", revision="v2").read(3, 4) == CONTENT[3:7]

    def test_a_cached_file_is_not_asked_for(self, cache: Path, client: httpx.Client) -> None:
        """
        Whether the hub can be reached does not matter then.
        """
        snapshot = cache / "models--org--m" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "m.gguf").write_bytes(b"weights")

        assert hub_bytes(client, "org/m", "m.gguf", revision="0" * 40) == FileBytes(snapshot / "m.gguf")

    def test_offline_nobody_is_asked(self, cache: Path, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        HF_HUB_OFFLINE is the reason.
        """
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

        with pytest.raises(ModelMissing, match=r"org/m/m\.gguf is not in the cache, and HF_HUB_OFFLINE is set"):
            hub_bytes(client, "org/m", "m.gguf")

    def test_what_no_repository_can_be_called_is_named(self, cache: Path, client: httpx.Client) -> None:
        """
        The hub's own rules for names.
        """
        with pytest.raises(ModelMissing, match=r"org--m/m is no name of a repository: .* Correct repo"):
            hub_bytes(client, "org--m/m", "m.gguf")

    def test_the_token_goes_to_the_hub_alone(
        self, use_hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        The hub answers with the address of another server, which must not learn HF_TOKEN.
        """
        seen: dict[str, str | None] = {}

        class Storage(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen["storage"] = self.headers.get("Authorization")
                self.send_response(206)
                self.send_header("Content-Range", "bytes 0-3/4")
                self.send_header("Content-Length", "4")
                self.end_headers()
                self.wfile.write(b"GGUF")

            def log_message(self, *_: object) -> None:
                """Stay silent."""

        class Redirecting(Storage):
            def do_GET(self) -> None:
                seen["hub"] = self.headers.get("Authorization")
                self.send_response(302)
                self.send_header("Location", next(storage))
                self.send_header("Content-Length", "0")
                self.end_headers()

        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        storage, hub = serve(Storage), serve(Redirecting)
        use_hub(next(hub))
        with hub_client() as client:
            assert hub_bytes(client, "org/m", "m.gguf").read(0, 4) == b"GGUF"
        assert [next(server, None) for server in (hub, storage)] == [None, None]

        assert seen == {"hub": "Bearer hf_secret", "storage": None}
