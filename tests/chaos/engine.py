"""
Stands in for vLLM: the real engine host, whose forks answer from a digest of the body instead of a model.

    python engine.py SOCKET

The same body has the same answer and takes the same time, so that two runs can be compared; and each fork is a process
that can be killed and paused. One that is asked what the file $CHAOS_POISON says kills itself, or with
$CHAOS_POISON_KILLS=worker the worker.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import psutil

from worker.engines.channel import Frame, Kind, Order, Unpacker, pack

PATH = "/v1/chat/completions"
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>: a fork ends with its host, as vLLM's does


def answer_to(body: dict[str, Any]) -> tuple[str, float]:
    """The text that answers *body*, and the seconds that takes: $CHAOS_RUN_S at most, or what the prompt asks for."""
    digest = hashlib.sha256(json.dumps([body["model"], body["messages"], body.get("max_tokens")]).encode()).hexdigest()
    text = " ".join(digest[i : i + 4] for i in range(0, 32, 4))
    if asked := re.search(r"Take (\d+) seconds", str(body["messages"])):
        return text, float(asked[1])
    return text, float(os.environ["CHAOS_RUN_S"]) * int(digest[:4], 16) / 0xFFFF


def become(connection: socket.socket, order: Order) -> NoReturn:
    """Turn this fork of the host into an engine; returns to nobody."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir(order.folder)
    connection.sendall(pack(Frame(Kind.STARTED, body=str(os.getpid()).encode())))
    try:
        asyncio.run(_serve(connection))
    finally:
        os._exit(0)


async def _serve(connection: socket.socket) -> None:
    connection.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=connection)
    tasks: dict[int, asyncio.Task[None]] = {}
    unpacker = Unpacker()

    def send(kind: Kind, number: int = 0, body: bytes = b"") -> None:
        writer.write(pack(Frame(kind, number, body)))

    send(Kind.READY)
    while data := await reader.read(65536):
        for frame in unpacker.feed(data):
            if frame.kind == Kind.ASK:
                tasks[frame.number] = asyncio.create_task(_answer(frame, send))
            elif frame.kind == Kind.ABORT and (task := tasks.get(frame.number)):
                task.cancel()
            elif frame.kind == Kind.PING:
                send(Kind.ANSWER, frame.number, b"200\n")
        tasks = {number: task for number, task in tasks.items() if not task.done()}


async def _answer(frame: Frame, send: Any) -> None:
    body = json.loads(frame.body.partition(b"\n")[2])
    _die_of_poison(body)
    text, takes_s = answer_to(body)
    words = text.split(" ")
    usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
    common = {"id": "chaos", "created": 0, "model": body["model"]}
    if not body.get("stream"):
        await asyncio.sleep(takes_s)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        whole = {**common, "object": "chat.completion", "choices": [choice], "usage": usage}
        send(Kind.ANSWER, frame.number, b"200\n" + json.dumps(whole).encode())
        return

    def tell(choices: list[dict[str, Any]], **more: Any) -> None:
        chunk = {**common, "object": "chat.completion.chunk", "choices": choices, **more}
        send(Kind.EVENT, frame.number, json.dumps(chunk).encode())

    for number, word in enumerate(words):
        await asyncio.sleep(takes_s / len(words))
        tell([{"index": 0, "delta": {"content": f" {word}" if number else word}, "finish_reason": None}])
    tell([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    tell([], usage=usage)
    send(Kind.EVENT, frame.number, b"[DONE]")
    send(Kind.ANSWER, frame.number, b"200\n")


def _die_of_poison(body: dict[str, Any]) -> None:
    poison = Path(os.environ.get("CHAOS_POISON", "none"))
    if poison.exists() and poison.read_text() in body["messages"][-1]["content"]:
        of_worker = os.environ.get("CHAOS_POISON_KILLS") == "worker"
        os.kill(_worker() if of_worker else os.getpid(), signal.SIGKILL)


def _worker() -> int:
    """The process at the top of the tree that this one is a part of."""
    return next(above.pid for above in psutil.Process().parents() if above.cmdline()[1:4] == ["-m", "worker", "worker"])


def main(path: str) -> None:
    """Be the engine host on the socket *path*, with these engines in place of vLLM's."""
    child = sys.modules["worker.engines.vllm_child"] = ModuleType("worker.engines.vllm_child")
    child.become = become  # type: ignore[attr-defined]
    # `from package import module` looks at the package first.
    import worker.engines

    worker.engines.vllm_child = child  # type: ignore[attr-defined]
    from worker.engines import vllm_host_main

    vllm_host_main.main(path)


if __name__ == "__main__":
    main(sys.argv[1])
