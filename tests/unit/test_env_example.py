"""
.env.example and common/settings.py say the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from common.settings import Settings

EXAMPLE = Path(__file__).parents[2] / ".env.example"


def documented() -> list[tuple[str, str]]:
    """Every `# NAME=default` line, in order."""
    return re.findall(r"^# ([A-Z][A-Z0-9_]*)=(.*)$", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE)


def defined() -> dict[str, FieldInfo]:
    """Every variable that is read, in the order of the file, with its field."""
    groups: list[Any] = [info.annotation for info in Settings.model_fields.values()]
    return {
        f"{group.model_config['env_prefix']}{name}".upper(): field
        for group in groups
        for name, field in group.model_fields.items()
    }


def test_every_setting_is_described_once_and_in_order() -> None:
    """
    No variable is missing, made up or told twice, and the groups follow the code.
    """
    assert [name for name, _ in documented()] == list(defined())


def test_every_default_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Uncommenting a line changes nothing: setting every default by hand gives the settings without any.
    """
    for name in defined():
        monkeypatch.delenv(name, raising=False)
    untouched = Settings.from_env()

    for name, default in documented():
        monkeypatch.setenv(name, default)

    assert Settings.from_env() == untouched


@pytest.mark.parametrize(("name", "default"), documented())
def test_an_empty_line_means_not_set(name: str, default: str) -> None:
    """
    Only a setting whose default is nothing may be shown without a value.
    """
    assert (default == "") == (defined()[name].default in (None, "", ()))
