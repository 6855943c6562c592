"""
vLLM's engine core in a process of its own: it tells what somebody waits for, and neither side outlives the other.

It shares no interpreter with the application that renders and answers: each operation of a step gives Python's lock
away, and would have to wait for it again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from multiprocessing import connection, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutputs, core
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.request import Request

from worker.engines.whole_answers import WholeAnswers

LOST = 70  # exit code: the engine failed, its log says why (EX_SOFTWARE)

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_TOLD_STEP_BY_STEP = ("logprobs", "prompt_logprobs", "logprob_token_ids", "prompt_logprob_token_ids")


def use_own_core(theirs: Collection[socket.socket]) -> None:
    """Have `AsyncLLM` fork its core as this module says; *theirs* is not the core's to keep open."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # nothing is imported anew
    os.environ["VLLM_RPC_BASE_PATH"] = "."  # of their sockets: our folder's name may be longer than one may be
    Core.theirs = theirs
    core.EngineCoreProc = Core
    EngineCoreClient.make_async_mp_client = staticmethod(_Client)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when *parent* ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(LOST)  # it went before we could ask to go with it


class _Client(AsyncMPClient):
    """The application's end: the engine's death is its own, at once, and no request is answered with it."""

    def start_engine_core_monitor(self) -> None:
        """See MPClient."""
        processes = self.resources.engine_manager.processes
        threading.Thread(target=_end_with, args=(processes,), name="engine-core-monitor", daemon=True).start()


def _end_with(processes: Iterable[BaseProcess]) -> None:
    connection.wait([process.sentinel for process in processes])
    os._exit(LOST)


class Core(core.EngineCoreProc):
    """The engine's end."""

    theirs: Collection[socket.socket] = ()
    step_fn: Callable[[], tuple[Mapping[int, EngineCoreOutputs] | None, bool]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._whole = WholeAnswers()
        super().__init__(*args, **kwargs)
        self._step, self.step_fn = self.step_fn, self._step_and_join

    @staticmethod
    def run_engine_core(*args: Any, **kwargs: Any) -> None:
        """See EngineCoreProc."""
        if (parent := parent_process()) is not None and parent.pid is not None:
            die_with(parent.pid)
        signal.set_wakeup_fd(-1)  # the event loop's
        for mine in Core.theirs:
            mine.close()
        core.EngineCoreProc = Core  # under WSL vLLM does not fork: this is a fresh process then
        super(Core, Core).run_engine_core(*args, **kwargs)

    def add_request(self, request: Request, request_wave: int = 0) -> None:
        """See EngineCore."""
        if _wants_only_the_end(request):
            self._whole.expect(request.request_id)
        super().add_request(request, request_wave)

    def abort_requests(self, request_ids: list[str]) -> None:
        """See EngineCore."""
        self._whole.forget(request_ids)
        super().abort_requests(request_ids)

    def _step_and_join(self) -> tuple[Mapping[int, EngineCoreOutputs], bool]:
        outputs, executed = self._step()
        told = {}
        for client, step in (outputs or {}).items():
            step.outputs = self._whole.join(step.outputs)
            if step.outputs or step.scheduler_stats:  # else nobody is woken
                told[client] = step
        return told, executed

    def _send_engine_dead(self) -> None:
        """End: nothing of this engine can be trusted any more, and its application ends with it."""
        sys.stderr.flush()
        os._exit(LOST)


def _wants_only_the_end(request: Request) -> bool:
    """Is nothing to be said, looked at or decided before this request has its last token?"""
    params = request.sampling_params
    return (
        params is not None
        and params.output_kind == RequestOutputKind.FINAL_ONLY
        and not params.stop
        and all(getattr(params, name, None) is None for name in _TOLD_STEP_BY_STEP)
    )
