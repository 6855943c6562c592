"""
A network that can be cut or slow: forwards TCP connections to one port of the loopback, as it is told.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress


class Proxy:
    """
    Listens on a port of its own and forwards to *port*; runs in a thread from the constructor on.

    While it is cut, bytes and ends of connections are held, as by a cable that is out: nobody gets an error, and
    nothing is lost that TCP would not lose.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._whole.set()
        self._delay_s = 0.0
        self._pumps: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True).start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop)
        self._server = server.result()
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Hold everything."""
        self._loop.call_soon_threadsafe(self._whole.clear)

    def mend(self) -> None:
        """Forward what was held, and all that comes."""
        self._loop.call_soon_threadsafe(self._whole.set)

    def slow(self, seconds: float) -> None:
        """Forward everything *seconds* later, from now on."""
        self._delay_s = seconds

    def close(self) -> None:
        """Drop every connection and stop listening."""

        async def end() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _accept(self, near: asyncio.StreamReader, near_end: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        try:
            far, far_end = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            near_end.close()
            return
        for reader, writer in ((near, far_end), (far, near_end)):
            pump = asyncio.ensure_future(self._pump(reader, writer))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                while data := await reader.read(65536):
                    await asyncio.sleep(self._delay_s)
                    await self._whole.wait()
                    writer.write(data)
                    await writer.drain()
                await self._whole.wait()
        finally:
            writer.close()
