"""
A small real engine: an HTTP program on a Unix socket, with a flag for each way to misbehave.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import socket
import socketserver
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

# A grandchild that leaves the session and ignores SIGTERM, as badly as a process can behave.
STUBBORN = "import os, signal, time; os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def main() -> None:
    options = _parser().parse_args()
    if options.only_first is not None:
        if options.only_first.exists():
            options = _parser().parse_args(["--uds", options.uds])  # behaves from the second start on
        else:
            options.only_first.touch()
    kept = take(options)  # noqa: F841 - held until the end
    die(options)
    time.sleep(600 if options.hang_on_load else options.load_seconds)
    if options.half_open:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(options.uds)
            listener.listen()  # the kernel accepts, and nobody reads
            time.sleep(600)
    with Server(options.uds, handler(options)) as server:
        server.serve_forever()


def take(options: argparse.Namespace) -> mmap.mmap | None:
    """Be what is hard to end, and take what is hard to give back."""
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.spawn_child:
        subprocess.Popen([sys.executable, "-I", "-S", "-c", STUBBORN])
    if options.memory_not_freed is not None:
        with options.memory_not_freed.open("a") as card:
            card.write(f"{os.getpid()}\n")
    return None if options.shared_memory is None else share(options.shared_memory)


def die(options: argparse.Namespace) -> None:
    """End while loading, in one of three ways."""
    if options.killed_on_load:
        os.kill(os.getpid(), signal.SIGKILL)
    if options.out_of_memory:
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", flush=True)
        sys.exit(1)
    if options.die_on_load:
        print("ValueError: the weights are not here", flush=True)
        sys.exit(3)


def share(file: Path) -> mmap.mmap:
    """Hold a page of shared memory, as vLLM does to talk to its workers; nothing here removes it at the end."""
    with file.open("wb+") as shared:
        shared.truncate(mmap.PAGESIZE)
        return mmap.mmap(shared.fileno(), mmap.PAGESIZE)


class Server(socketserver.ThreadingUnixStreamServer):
    """One thread per connection, as an engine that works on many requests at once."""

    daemon_threads = True
    request_queue_size = 256


def handler(options: argparse.Namespace) -> type[BaseHTTPRequestHandler]:
    broken = broken_answer(options)
    wakes = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self, 200, b"{}")

        def do_POST(self) -> None:
            nonlocal wakes
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            wakes += self.path == "/wake_up"
            if body.get("hold"):
                Path(body["hold"]).touch()  # says that the request is here
            if options.mute or body.get("hold"):
                time.sleep(600)
            elif body.get("events"):
                stream(self, body["events"])
            elif body.get("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            elif broken is not None:
                answer(self, *broken)
            else:
                answer(self, 200, whole_answer(body, day=wakes, spoilt=bool(wakes and options.wrong_after_wake)))

        def log_message(self, *_: object) -> None: ...

        def address_string(self) -> str:
            return "unix"

    return Handler


def broken_answer(options: argparse.Namespace) -> tuple[int, bytes] | None:
    """The status and the body of every answer that is not streamed; None = as it should be."""
    if options.wrong_canary:
        return 200, b'{"choices": []}'
    if options.wrong_answer:
        return 200, b"<html>busy</html>"
    if options.fail:
        return 500, json.dumps({"error": {"message": "out of luck"}}).encode()
    return None


def whole_answer(body: dict[str, Any], *, day: int, spoilt: bool) -> bytes:
    """As vLLM tells its tokens: they follow from the weights and the prompt, into which a chat puts the *day*."""
    prompt = body.get("prompt", [7, day])
    tokens = [token + (200 if spoilt else 100) for token in prompt]
    choice = {"message": {"content": "ok"}, "token_ids": tokens}
    return json.dumps({"choices": [choice], "prompt_token_ids": prompt, "usage": {}}).encode()


def answer(handler: BaseHTTPRequestHandler, status: int, content: bytes) -> None:
    """Send one whole answer."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def stream(handler: BaseHTTPRequestHandler, events: list[str]) -> None:
    """Send *events* as they are, half of each and then the other half; "hold" keeps the stream open."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
    handler.send_header("Connection", "close")
    handler.end_headers()
    for event in events:
        if event == "hold":
            time.sleep(600)
        content = event.encode()
        for half in (content[: len(content) // 2], content[len(content) // 2 :]):
            handler.wfile.write(half)
            handler.wfile.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds", required=True)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--only-first", type=Path, help="misbehave at the first start only; this file remembers it")
    parser.add_argument("--shared-memory", type=Path, help="a file in /dev/shm to hold")
    parser.add_argument("--memory-not-freed", type=Path, help="a card, as a file: its pid stays there after its end")
    loads = ("hang-on-load", "die-on-load", "out-of-memory", "killed-on-load")
    answers = ("half-open", "mute", "wrong-canary", "wrong-answer", "fail", "wrong-after-wake")
    for flag in (*loads, *answers, "ignore-sigterm", "spawn-child"):
        parser.add_argument(f"--{flag}", action="store_true")
    return parser


if __name__ == "__main__":
    main()
