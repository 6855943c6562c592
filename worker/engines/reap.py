"""
Collects the children that have ended, and ends what each has left behind in its process group.

Standard library only: it runs in the engine host.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress


def ended_children() -> Iterator[tuple[int, int]]:
    """
    Give the pid of each child that has ended, and its exit code as a shell would say it.

    The group is ended first: as long as nobody has collected its leader, the number is nobody else's.
    """
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(ended.si_pid, signal.SIGKILL)
        _, status = os.waitpid(ended.si_pid, 0)
        code = os.waitstatus_to_exitcode(status)
        yield ended.si_pid, code if code >= 0 else 128 - code
