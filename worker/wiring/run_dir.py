"""
Where do the sockets and logs of this start lie? In a folder of its own, which nobody else may open.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from common.errors import Misconfigured
from common.settings import Settings
from worker.engines.orphans import claim, end_abandoned

_RUN_DIR_PREFIX = "sw-"


def open_run_dir(settings: Settings, leaving: ExitStack) -> Path:
    """The folder of the settings, or one of this start alone; those of killed workers go."""
    if settings.worker.run_dir is None:
        end_abandoned(Path(tempfile.gettempdir()).glob(f"{_RUN_DIR_PREFIX}*"))
        folder = tempfile.TemporaryDirectory(prefix=_RUN_DIR_PREFIX, ignore_cleanup_errors=True)
        run_dir = Path(leaving.enter_context(folder))
        leaving.enter_context(claim(run_dir))
        return run_dir
    settings.worker.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if settings.worker.run_dir.stat().st_mode & 0o077:
        raise Misconfigured(
            f"WORKER_RUN_DIR={settings.worker.run_dir} can be opened by others, and the engines' sockets lie there: "
            "`chmod 700` it, or name another folder."
        )
    return settings.worker.run_dir
