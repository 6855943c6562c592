"""
The error tree: every error survives its storage, and says whether a retry helps.
"""

from __future__ import annotations

import json
import pickle

import pytest

import common
import common.errors
from common.errors import Misconfigured, Refused, ShiftworkerError, Stopped, Unavailable, error_for
from common.schemas import ErrorBody

TREE = [found for found in vars(common.errors).values() if isinstance(found, type) and issubclass(found, Exception)]


@pytest.mark.parametrize("cls", TREE)
def test_an_error_comes_back_as_what_it_was(cls: type[ShiftworkerError]) -> None:
    """Through the outcome of record, through Celery (class name and arguments), and through pickle."""
    error = cls("It broke. Mend it.")
    stored = ErrorBody.model_validate_json(ErrorBody.of(error).model_dump_json())
    celery_args = json.loads(json.dumps(error.args))

    for back in (
        stored.as_exception(),
        error_for(error.kind, error.message),
        cls(*celery_args),
        pickle.loads(pickle.dumps(error)),
    ):
        assert type(back) is cls
        assert (back.message, str(back)) == ("It broke. Mend it.", "It broke. Mend it.")


@pytest.mark.parametrize("cls", TREE)
def test_a_retry_helps_only_where_something_is_away(cls: type[ShiftworkerError]) -> None:
    """The class says so, and it is stored."""
    assert ErrorBody.of(cls("x")).retry_helps is issubclass(cls, Unavailable)
    assert not (issubclass(cls, Unavailable) and issubclass(cls, Refused | Stopped | Misconfigured))


def test_an_error_of_a_newer_worker_is_still_ours() -> None:
    """Unknown names become the root, with the message."""
    back = error_for("BrandNew", "What happened.")

    assert type(back) is ShiftworkerError
    assert back.message == "What happened."


def test_the_tree_is_drawn_as_it_is() -> None:
    """The picture on top of the file has every class, and no other."""
    assert common.errors.__doc__ is not None
    drawn = {
        word for line in common.errors.__doc__.splitlines() for word in line.split() if word in vars(common.errors)
    }

    assert drawn == {cls.__name__ for cls in TREE}


def test_a_producer_can_import_what_it_must_catch() -> None:
    """Everything in the front door is there."""
    assert all(hasattr(common, name) for name in common.__all__)
