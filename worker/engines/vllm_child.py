"""
The engine: vLLM's own application over vLLM's own engine core, with a channel in place of HTTP.

It runs in vLLM's Python, forked from the engine host. vLLM's application (chat templates, tools, structured outputs,
every error) is called as the server would call it, so the answers are the server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Coroutine, MutableMapping
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import huggingface_hub.constants
import torch
import uvloop
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from worker.engines import vllm_sleep
from worker.engines.channel import Frame, Kind, Order, Unpacker, pack
from worker.engines.vllm_core import LOST, die_with, use_own_core
from worker.engines.vllm_routes import answer_directly

_PARSER = make_arg_parser(FlexibleArgumentParser())

Send = Callable[[Frame], None]


def become(connection: socket.socket, order: Order) -> NoReturn:
    """Turn this fresh fork of the host into the engine of *order*; returns to nobody."""
    code = 0
    try:
        _leave_home(order)
        connection.setblocking(True)
        connection.sendall(pack(Frame(Kind.STARTED, body=str(os.getpid()).encode())))
        uvloop.run(_serve(connection, order))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the worker must hear of it
        traceback.print_exc()
        code = LOST
        with contextlib.suppress(OSError):
            connection.setblocking(True)
            connection.sendall(pack(Frame(Kind.FAILED, body=f"{type(error).__name__}: {error}".encode())))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leave_home(order: Order) -> None:
    """Become a process of its own: its session, its environment, its folder, its log."""
    host = os.getppid()
    os.setsid()
    die_with(host)
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(order.folder)
    os.environ.update(order.env)
    os.environ["TMPDIR"] = order.folder
    tempfile.tempdir = None  # what the host found is not ours
    if threads := order.env.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # libgomp has read its environment long ago, in the host
    huggingface_hub.constants.HF_HUB_OFFLINE = order.env.get("HF_HUB_OFFLINE") == "1"  # likewise


async def _serve(connection: socket.socket, order: Order) -> None:
    """Load the model, say so, and answer until the worker goes."""
    args = _PARSER.parse_args(order.arguments)
    validate_parsed_serve_args(args)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    use_own_core(theirs=[connection])
    engine = AsyncLLM.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=True)
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    app.middleware_stack = None  # it was built with what is taken out here
    app.user_middleware.clear()  # cross-origin rules, metrics and keys are for HTTP; nobody but the worker is here
    await init_app_state(engine, app.state, args, tasks)
    gc.collect()
    gc.freeze()

    gone = asyncio.get_running_loop().create_future()
    connection.setblocking(False)
    _, requests = await asyncio.get_running_loop().create_connection(
        lambda: _Requests(app, engine, gone), sock=connection
    )
    await engine.is_sleeping()  # its loop answers
    requests.send(Frame(Kind.READY))
    await gone


class _Requests(asyncio.Protocol):
    """The worker's connection: each request is a call of the application; answers of one moment travel together."""

    def __init__(self, app: Any, engine: AsyncLLM, gone: asyncio.Future[None]) -> None:
        self._app = app
        self._engine = engine
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._unpacker = Unpacker()
        self._calls: dict[int, _HttpCall] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: WeakValueDictionary[int, asyncio.Task[None]] = WeakValueDictionary()
        self._waiting: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        if not self._gone.done():
            self._gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        for frame in self._unpacker.feed(data):
            if frame.kind == Kind.ASK:
                self._answers[frame.number] = self._begin(self._answer(frame))
            elif frame.kind == Kind.ABORT:
                if (call := self._calls.get(frame.number)) is not None:
                    call.hang_up()
                elif (task := self._answers.get(frame.number)) is not None:
                    task.cancel()
            elif frame.kind == Kind.PING:
                self._begin(self._pong(frame.number))
            elif frame.kind == Kind.SLEEP:
                self._begin(self._tell(frame.number, vllm_sleep.fall_asleep(self._engine, int(frame.body))))
            elif frame.kind == Kind.WAKE:
                self._begin(self._tell(frame.number, vllm_sleep.wake(self._engine, int(frame.body))))

    def send(self, frame: Frame) -> None:
        """Send *frame* together with all others of this turn of the event loop."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(pack(frame))

    def _begin(self, work: Any) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _flush(self) -> None:
        self._transport.write(b"".join(self._waiting))
        self._waiting.clear()

    async def _answer(self, frame: Frame) -> None:
        path, _, body = frame.body.partition(b"\n")
        answer = await answer_directly(self._app.state, path.decode(), body)
        if (task := asyncio.current_task()) is not None and task.cancelling():
            return  # vLLM's handlers turn the cancellation into an answer; asked again, they would begin anew
        if answer is not None:
            self.send(Frame(Kind.ANSWER, frame.number, b"%d\n%b" % answer))
            return
        call = self._calls[frame.number] = _HttpCall(
            path.decode(), body, on_event=lambda data: self.send(Frame(Kind.EVENT, frame.number, data))
        )
        try:
            await call.run(self._app)
        except Exception:  # noqa: BLE001 - Starlette answers 500 and raises again, for a server to log
            traceback.print_exc()
        finally:
            del self._calls[frame.number]
        self.send(Frame(Kind.ANSWER, frame.number, b"%d\n%b" % (call.status, call.content)))

    async def _pong(self, number: int) -> None:
        await self._engine.is_sleeping()
        self.send(Frame(Kind.ANSWER, number, b"200\n"))

    async def _tell(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        """Say how *work* ended."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 - whatever it is, the worker must hear of it
            traceback.print_exc()
            self.send(Frame(Kind.ANSWER, number, f"500\n{type(error).__name__}: {error}".encode()))
        else:
            self.send(Frame(Kind.ANSWER, number, b"200\n"))


class _HttpCall:
    """One request to an ASGI application, with a client that may hang up."""

    def __init__(self, path: str, body: bytes, *, on_event: Callable[[bytes], object]) -> None:
        self.status = 500
        self.content = b""
        self._on_event = on_event
        self._streams = False
        self._body: bytes | None = body
        self._path = path
        self._hung_up = asyncio.Event()

    async def run(self, app: Any) -> None:
        """Make the call and keep the answer."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": None,
            "server": None,
            "state": {},
        }
        await app(scope, self._receive, self._send)

    def hang_up(self) -> None:
        """Tell the application that nobody waits any more; it aborts the request in the engine."""
        self._hung_up.set()

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        elif self._streams:
            for line in message.get("body", b"").split(b"\n"):  # vLLM gives whole events, each one line of data
                if line.startswith(b"data:"):
                    self._on_event(line.removeprefix(b"data:").strip())
        else:
            self.content += message.get("body", b"")
