"""
Reads a rules file (TOML) into Rules; the shipped one is rules.toml beside this module.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from common.errors import BadSetting
from worker.routing.rules import Indicator, LengthStep, Rules

SHIPPED = Path(__file__).with_name("rules.toml")

_Weight = Annotated[float, Field(ge=0, le=1)]
_Phrase = Annotated[str, StringConstraints(pattern=r"^\w+( \w+)*$")]
_OTHER = "other"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Step(_Entry):
    over: int = Field(ge=0)
    add: _Weight


class _Indicator(_Entry):
    name: str = Field(min_length=1, max_length=100)
    add: _Weight
    any_of: list[_Phrase] = []
    all_of: list[_Phrase] = []
    tables_over: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _asks_something(self) -> _Indicator:
        if not self.any_of and not self.all_of and self.tables_over is None:
            raise ValueError("needs any_of, all_of or tables_over")
        return self


class _File(_Entry):
    task_types: dict[str, _Weight]
    length: list[_Step] = []
    indicators: list[_Indicator] = []

    @model_validator(mode="after")
    def _has_other(self) -> _File:
        if _OTHER not in self.task_types:
            raise ValueError(f'task_types needs an entry "{_OTHER}" for jobs of any other type')
        return self


def load_rules(path: Path | None = None) -> Rules:
    """
    Read the rules of *path*; None reads the shipped ones.

    Raises
    ------
    BadSetting
        The file cannot be read, is no TOML, or has entries that are not allowed; names each of them.
    """
    path = path or SHIPPED
    try:
        file = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        problems = "; ".join(
            f"{_place(found['loc'])}: {found['msg'].removeprefix('Value error, ')}"
            for found in error.errors(include_url=False, include_input=False)
        )
        raise BadSetting(f"ROUTING_RULES_FILE={path}: {problems}. {_HELP}") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no TOML
        raise BadSetting(f"ROUTING_RULES_FILE={path}: {error}. {_HELP}") from None
    return Rules(
        task_types={name.strip().lower(): weight for name, weight in file.task_types.items()},
        other=file.task_types[_OTHER],
        length=tuple(LengthStep(over=step.over, add=step.add) for step in file.length),
        indicators=tuple(
            Indicator(
                name=found.name,
                add=found.add,
                any_of=tuple(found.any_of),
                all_of=tuple(found.all_of),
                tables_over=found.tables_over,
            )
            for found in file.indicators
        ),
    )


_HELP = "The shipped rules, worker/routing/rules.toml, show the form; unset the variable to use them."


def _place(location: tuple[int | str, ...]) -> str:
    """Name an entry for people, who count from 1: indicators 2, any_of 1."""
    steps = (f" {step + 1}" if isinstance(step, int) else f".{step}" for step in location)
    return "".join(steps).removeprefix(".") or "the file"
