"""
The engine host: a process with vLLM imported that forks an engine per order, so that a start costs no imports.

    python -m worker.engines.vllm_host_main SOCKET

It runs in vLLM's Python, under a guard. It has one thread and never touches CUDA: both are what makes a fork
safe. A connection to SOCKET brings one order and then belongs to the engine that is forked for it; the host
keeps a copy, on which it tells how the engine ended. An engine dies with the host.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
from pathlib import Path

from worker.engines import vllm_child
from worker.engines.channel import Frame, Kind, Order, Unpacker, pack
from worker.engines.reap import ended_children

_BACKLOG = 8
_ORDER_TIMEOUT_S = 5.0  # the worker sends it with the connection


def main(path: str) -> None:
    """Serve orders on the socket *path* until somebody ends the process."""
    if Path("/proc/self/fd").is_dir() and any(_links_to("nvidia-uvm")):
        sys.exit("Error: importing vLLM has touched CUDA, so no engine may be forked here. Set VLLM_CHANNEL=server.")
    woken = _wake_on_sigchld()
    gc.collect()
    gc.freeze()  # a collection in an engine would copy every page that it shares with us
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(_BACKLOG)
    engines: dict[int, socket.socket] = {}
    while True:
        readable, _, _ = select.select([listener.fileno(), woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            _tell_who_ended(engines)
        if listener.fileno() in readable:
            connection, _ = listener.accept()
            order = _read_order(connection)
            if order is None:
                connection.close()
                continue
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for mine in (listener, *engines.values()):
                    mine.close()
                os.close(woken)
                vllm_child.become(connection, order)
            engines[pid] = connection


def _wake_on_sigchld() -> int:
    """Give a descriptor that becomes readable when an engine ends."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler of ours makes the pipe readable
    return wake_read


def _tell_who_ended(engines: dict[int, socket.socket]) -> None:
    for pid, code in ended_children():
        if (connection := engines.pop(pid, None)) is not None:
            connection.setblocking(False)  # a worker that does not read is no reason to wait
            with contextlib.suppress(OSError):
                connection.send(pack(Frame(Kind.ENDED, body=str(code).encode())))
            connection.close()


def _read_order(connection: socket.socket) -> Order | None:
    """Read the first frame; None if nothing sensible comes."""
    connection.settimeout(_ORDER_TIMEOUT_S)
    unpacker = Unpacker()
    try:
        while data := connection.recv(65536):
            for frame in unpacker.feed(data):
                return Order.unpack(frame.body) if frame.kind == Kind.START else None
    except OSError:
        pass
    return None


def _links_to(name: str) -> list[Path]:
    return [fd for fd in Path("/proc/self/fd").iterdir() if name in os.path.realpath(fd)]


if __name__ == "__main__":
    main(sys.argv[1])
