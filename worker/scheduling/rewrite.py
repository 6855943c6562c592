"""
What does the message of a routed job become when its route changes? Pure.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from common import keys
from common.errors import InvalidRequest
from common.schemas import JobRequest, Route


def rewrite(raw: str, change: Callable[[JobRequest, Route], tuple[Route, str] | None]) -> str | None:
    """
    Write the message anew, with the route and for the queue that *change* gives; None if it gives none.

    Whatever else Celery put into it stays. What is no message of ours is left alone: None.
    """
    try:
        message: dict[str, Any] = json.loads(raw)
        (request, route), kwargs, embed = json.loads(base64.b64decode(message["body"]))
        if message["headers"]["task"] != keys.GENERATE_TASK:
            return None
        changed = change(JobRequest.parse(request), Route.model_validate(route))
        if changed is None:
            return None
        new, queue = changed
        message["properties"]["delivery_info"]["routing_key"] = queue
    except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest):
        return None
    body = json.dumps([[request, new.model_dump(mode="json")], kwargs, embed]).encode()
    return json.dumps({**message, "body": base64.b64encode(body).decode()})
