"""
What the engine host does when an engine ends: collects it, and ends what it has left behind.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.integration.test_engine_process import REPOSITORY, running
from tests.waiting import eventually

# A host in small. Of its two engines one leads a session, leaves a child there, and ends as it is told to.
HOST = """
import json, os, signal, subprocess, sys, time
from worker.engines.reap import ended_children
nobody = list(ended_children())
if not (engine := os.fork()):
    os.setsid()
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(left.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "killed" else os._exit(7)
if not (other := os.fork()):
    time.sleep(600)
while not (ended := list(ended_children())):
    time.sleep(0.01)
print(json.dumps({"nobody": nobody, "engine": engine, "other": other, "ended": ended}), flush=True)
sys.stdin.read()
os.kill(other, signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "code"), [("exits", 7), ("killed", 137)])
def test_what_an_engine_leaves_behind_ends_with_it(end: str, code: int) -> None:
    """Its group, whatever ended it; the host's other engine runs on."""
    with subprocess.Popen(
        [sys.executable, "-c", HOST, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as host:
        assert host.stdout is not None
        left, said = int(host.stdout.readline()), json.loads(host.stdout.readline())

        assert said["nobody"] == []
        assert said["ended"] == [[said["engine"], code]]
        eventually(lambda: not running((said["engine"], left)))
        assert running((said["other"],)) == [said["other"]]
        host.communicate()
