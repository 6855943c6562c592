"""
A worker in small: owns one EngineProcess, prints its pids, and waits to be killed.

    engine_owner.py RUN_DIR FLAG...    (flags of fake_engine.py)
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from worker.engines.process import EngineProcess, Launch

FAKE = Path(__file__).with_name("fake_engine.py")


def main() -> None:
    def launch(socket: Path) -> Launch:
        return Launch(command=[sys.executable, str(FAKE), "--uds", str(socket), *sys.argv[2:]], env=os.environ)

    engine = EngineProcess(name="fake", run_dir=Path(sys.argv[1]), launch=launch)
    engine.wait_ready(timeout_s=20)
    print(*engine.pids(), flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
