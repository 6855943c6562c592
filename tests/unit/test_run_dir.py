"""
The folder of the engines' sockets: whoever can open it can talk to the engines.
"""

from __future__ import annotations

import stat
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.errors import Misconfigured
from common.settings import Settings
from worker.wiring.run_dir import open_run_dir


def folder(run_dir: Path | None) -> Path:
    settings = Settings.from_env()
    worker = settings.worker.model_copy(update={"run_dir": run_dir})
    with ExitStack() as leaving:
        found = open_run_dir(settings.model_copy(update={"worker": worker}), leaving)
        assert stat.S_IMODE(found.stat().st_mode) == 0o700
        return found


def test_the_folder_of_the_sockets_is_ours_alone(tmp_path: Path) -> None:
    """One of this start, which goes with it, or the one of the settings."""
    assert not folder(None).exists()
    assert folder(tmp_path / "run") == tmp_path / "run"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    """It was there before; to close it may not be ours to do."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    with pytest.raises(Misconfigured, match="chmod 700"):
        folder(tmp_path / "run")
