"""
Every schema takes what is good and refuses the rest, whatever comes: nothing else is ever raised.
"""

from __future__ import annotations

import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from common import schemas
from common.errors import InvalidRequest
from common.schemas import JobRequest
from worker.delivery.readable import check_message

SCHEMAS = [
    found
    for _, found in inspect.getmembers(schemas, inspect.isclass)
    if issubclass(found, BaseModel) and found.__module__ == schemas.__name__ and not found.__name__.startswith("_")
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=10), inner, max_size=4)
    ),
    max_leaves=20,
)


@pytest.mark.parametrize("schema", SCHEMAS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_schema_reads_or_refuses(schema: type[BaseModel], data: st.DataObject) -> None:
    """Any JSON in any of its fields; what it takes, it can write and read again."""
    fields = data.draw(st.dictionaries(st.sampled_from(sorted(schema.model_fields)), ANYTHING, max_size=6))
    try:
        found = schema.model_validate(fields)
        text = found.model_dump_json()
    except (ValidationError, ValueError):
        return
    schema.model_validate_json(text)


@settings(max_examples=100, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(sorted(JobRequest.model_fields)) | st.text(max_size=5), ANYTHING, max_size=6)
)
def test_a_body_is_a_request_or_refused(fields: dict[str, object]) -> None:
    """And every question about a request that was taken has an answer."""
    try:
        request = JobRequest.parse(fields)
    except InvalidRequest:
        return
    assert request.size_bytes > 0
    assert request.answers >= 1
    assert isinstance(request.text, str)
    json.dumps(request.engine_body("m"))


@settings(max_examples=100, deadline=None)
@given(headers=ANYTHING, body=st.binary(max_size=50) | st.text(max_size=50), kind=ANYTHING)
def test_a_message_is_readable_or_refused(headers: object, body: bytes | str, kind: object) -> None:
    """Whatever its parts are."""
    with pytest.raises(InvalidRequest):
        check_message(headers, body, content_type=kind, encoding=kind)
