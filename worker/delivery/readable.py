"""
Can this Celery message be read at all? Pure: asked before Celery takes it up, which would stumble over some.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from common.errors import InvalidRequest

_ARGUMENTS, _NAMED, _EMBEDDED = range(3)
_SHAPE = "the body must be JSON: [[arguments], {named arguments}, {callbacks or null}]"

_Moment = Annotated[str, AfterValidator(datetime.fromisoformat)]
_Id = Annotated[str, Field(max_length=255)]


class _Headers(BaseModel):
    """What Celery reads of a message's headers (protocol 2), and what each may be."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: Annotated[_Id, Field(min_length=1)]
    task: _Id
    root_id: _Id | None = None
    parent_id: _Id | None = None
    group: _Id | None = None
    group_index: int | None = None
    retries: int | None = Field(default=None, ge=0, le=10**6)
    eta: _Moment | None = None
    expires: _Moment | None = None
    timelimit: Annotated[list[float | None], Field(min_length=2, max_length=2)] | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    shadow: str | None = None
    stamped_headers: list[str] | None = None
    stamps: dict[str, Any] | None = None


class _Embedded(BaseModel):
    """What may come with the arguments."""

    model_config = ConfigDict(strict=True, extra="ignore")

    callbacks: list[dict[str, Any]] | None = None
    errbacks: list[dict[str, Any]] | None = None
    chain: list[dict[str, Any]] | None = None
    chord: dict[str, Any] | None = None


def check_message(headers: object, body: str | bytes, *, content_type: object, encoding: object) -> None:
    """
    See that a message is one that Celery can read, in JSON.

    Raises
    ------
    InvalidRequest
        It is not; the message says what is wrong. Nothing but JSON is looked into.
    """
    try:
        _Headers.model_validate(headers)
        if content_type != "application/json" or str(encoding).lower() not in {"utf-8", "us-ascii", "binary"}:
            raise InvalidRequest(
                f"The message is {content_type!r:.60} in {encoding!r:.60}; only JSON in UTF-8 is read."
            )
        found = _JSON.decode(body if isinstance(body, str) else body.decode())
        if not isinstance(found, list) or len(found) != len((_ARGUMENTS, _NAMED, _EMBEDDED)):
            raise InvalidRequest(f"The message cannot be read: {_SHAPE}.")
        if not isinstance(found[_ARGUMENTS], list) or not isinstance(found[_NAMED], dict):
            raise InvalidRequest(f"The message cannot be read: {_SHAPE}.")
        if found[_EMBEDDED] is not None:
            _Embedded.model_validate(found[_EMBEDDED])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequest(f"The message cannot be read: {where:.100}: {first['msg']}.") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number too long, nested too deep
        raise InvalidRequest(f"The message cannot be read: {error!s:.200}; {_SHAPE}.") from None


def job_id_of(headers: object) -> str | None:
    """The id that the message gives its job; None if nobody could ask for it."""
    found = headers.get("id") if isinstance(headers, dict) else None
    try:
        good = isinstance(found, str) and 0 < len(found.encode()) <= 1020  # noqa: PLR2004 - 255 characters in UTF-8
    except UnicodeEncodeError:
        return None
    return found if good else None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


_JSON = json.JSONDecoder(parse_constant=_no_number)
