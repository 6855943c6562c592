"""
How a consuming process reads the bodies of messages: as kombu does, only faster.
"""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from kombu.utils import json as kombu_json

from worker.app import read_json

BODIES = [
    [[{"messages": [{"role": "user", "content": "hi"}]}], {}, {"callbacks": None}],
    [[{"deadline": datetime(2030, 1, 1, tzinfo=UTC)}], {}, {}],
    [["the text of a job may say __type__ too"], {}, {}],
    [["ünïcödé"], {"n": 1.5}, {"chain": None}],
]


@pytest.mark.parametrize("body", BODIES)
def test_a_body_is_read_as_kombu_reads_it(body: object) -> None:
    """From text and from bytes, with the types that kombu writes by name."""
    text = kombu_json.dumps(body)
    assert read_json(text) == body
    assert read_json(text.encode()) == kombu_json.loads(text)
