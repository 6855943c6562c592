"""
Speaks HTTP to engines, on Unix sockets and at URLs: many calls at once, each of which can be stopped.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from common.errors import EngineDied, EngineTimeout
from worker.engines.base import JobStopped, StopSignal

# 200 connections opened at once made vLLM's server drop some; 128 never. More calls wait for a free one.
MAX_CONNECTIONS = 128
# Shorter than the 5 s after which vLLM and llama.cpp close an idle connection: a request sent on a connection
# that the server is just closing would look like the engine's death.
KEEPALIVE_S = 2.0

CONNECT_S = 10.0  # to an endpoint at a URL; a socket answers at once or not at all

# httpx's pool looks at each of its connections at each request, so 128 in one pool cost more than the requests:
# against llama.cpp 37-79 jobs/s, in 16 pools of 8 217 (128 calls at once, 2 cores).
POOLS = 16


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the engine's server sent, not yet read."""

    status: int
    content: bytes
    streamed: bool = False  # it came as events, and each was given to `on_event`
    retry_after: str | None = None  # the header of that name: how long the server wants to be left alone


Address = Path | str  # a Unix socket, or the URL that paths are added to

_LAST_EVENT = b"[DONE]"


class _Spread(httpx.AsyncBaseTransport):
    """Several small pools of connections to one socket; a request goes to the one with the fewest answers to read."""

    def __init__(self, socket: Path) -> None:
        size = MAX_CONNECTIONS // POOLS
        limits = httpx.Limits(max_connections=size, max_keepalive_connections=size, keepalive_expiry=KEEPALIVE_S)
        plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used; else each pool reads every certificate there is
        self._pools = [httpx.AsyncHTTPTransport(uds=str(socket), limits=limits, verify=plain) for _ in range(POOLS)]
        self._busy = [0] * POOLS

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        chosen = self._busy.index(min(self._busy))
        self._busy[chosen] += 1
        try:
            response = await self._pools[chosen].handle_async_request(request)
        except BaseException:
            self._free(chosen)
            raise
        response.stream = _Body(response.stream, on_close=lambda: self._free(chosen))
        return response

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()

    def _free(self, chosen: int) -> None:
        self._busy[chosen] -= 1


class _Body(httpx.AsyncByteStream):
    """The body of an answer; tells when it is closed, which with a stream is long after its first byte."""

    def __init__(self, body: httpx.SyncByteStream | httpx.AsyncByteStream, *, on_close: Callable[[], object]) -> None:
        assert isinstance(body, httpx.AsyncByteStream)  # noqa: S101 - it is of an async transport
        self._body = body
        self._on_close = on_close

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._body.__aiter__()

    async def aclose(self) -> None:
        try:
            await self._body.aclose()
        finally:
            self._on_close()


class EngineHttp:
    """
    One event loop in a thread of its own, the connections of each address in a client of its own.

    A call that is stopped closes its connection; that is how the engine's server learns to abort it.
    """

    def __init__(self) -> None:
        self._clients: dict[Address, httpx.AsyncClient] = {}  # touched by the loop's thread only
        self._calls: set[asyncio.Task[Answer]] = set()  # likewise
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="engine-http", daemon=True)
        self._thread.start()

    def post(
        self,
        address: Address,
        path: str,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        stop: StopSignal,
        on_event: Callable[[bytes], object] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Answer:
        """
        Send *body* and wait for the whole answer; called from many threads at once.

        An answer that is a stream of server-sent events is given to *on_event*, the data of each as it comes, in
        the thread that reads for every call: it must not block. What it raises ends the call.

        Raises
        ------
        EngineDied
            Nobody listens at *address*, or the connection broke before the whole answer was here.
        EngineTimeout
            No whole answer within *timeout_s*.
        JobStopped
            *stop* was set first.
        """
        content = json.dumps(body).encode()
        call = asyncio.run_coroutine_threadsafe(
            self._post(address, path, content, headers, timeout_s=timeout_s, on_event=on_event), self._loop
        )
        stop.on_stop(call.cancel)
        try:
            return call.result()
        except CancelledError:
            if stop.reason is None:
                raise EngineDied("The worker closed its engines while the request ran.") from None
            raise JobStopped(stop.reason) from None
        except TimeoutError:
            raise EngineTimeout(
                f"The engine did not answer within {timeout_s:g} s. Ask for fewer tokens, or raise JOB_TIMEOUT_S."
            ) from None
        except httpx.RequestError as error:
            raise EngineDied(f"The connection to the engine broke: {type(error).__name__} {error}".rstrip()) from error

    def forget(self, address: Address) -> None:
        """Close the connections to *address*; its engine has ended."""
        asyncio.run_coroutine_threadsafe(self._forget(address), self._loop).result()

    def close(self) -> None:
        """End running calls (they raise EngineDied), close every connection, end the thread. Twice is once."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _post(
        self,
        address: Address,
        path: str,
        content: bytes,
        headers: Mapping[str, str],
        *,
        timeout_s: float,
        on_event: Callable[[bytes], object] | None,
    ) -> Answer:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that runs on a loop is a task
        self._calls.add(task)
        headers = {"Content-Type": "application/json", **headers}
        if on_event is not None:
            headers["Connection"] = "close"  # llama.cpp ends a connection some time after a stream, and does not say so
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._client(address).stream("POST", path, content=content, headers=headers) as response,
            ):
                if on_event is None or not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                    return Answer(
                        status=response.status_code,
                        content=await response.aread(),
                        retry_after=response.headers.get("Retry-After"),
                    )
                last = b""
                async for last in _events(response):
                    if last != _LAST_EVENT:
                        on_event(last)
        finally:
            self._calls.discard(task)
        if last != _LAST_EVENT:
            raise EngineDied("The engine's stream ended in the middle of the answer.")
        return Answer(status=response.status_code, content=b"", streamed=True)

    def _client(self, address: Address) -> httpx.AsyncClient:
        if address not in self._clients:
            self._clients[address] = _open(address)
        return self._clients[address]

    async def _forget(self, address: Address) -> None:
        if client := self._clients.pop(address, None):
            await client.aclose()

    async def _close(self) -> None:
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        for address in list(self._clients):
            await self._forget(address)


def _open(address: Address) -> httpx.AsyncClient:
    """Build the client for *address*; one deadline holds for a whole call, in `_post`. Redirects are not followed."""
    if isinstance(address, Path):
        # A proxy of the environment is not for a Unix socket.
        return httpx.AsyncClient(
            transport=_Spread(address),
            base_url="http://engine",
            timeout=None,  # noqa: S113 - see above
            trust_env=False,
        )
    limits = httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=KEEPALIVE_S)
    return httpx.AsyncClient(base_url=address, timeout=httpx.Timeout(None, connect=CONNECT_S), limits=limits)


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """
    Give the data of each server-sent event; OpenAI's are one line each.

    httpx's own lines also end at U+2028 and the like, which JSON may hold as they are.
    """
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()
