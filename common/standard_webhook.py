"""
Signs webhooks, and checks what others have signed, as standardwebhooks.com says (symmetric, v1).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

_PREFIX = "whsec_"
_TOLERANCE_S = 300.0  # the standard's: an older call, or one from the future, may be a replay


def key_of(secret: str) -> bytes:
    """
    Read a secret in the standard's form: whsec_ and base64.

    Raises
    ------
    ValueError
        It is not.
    """
    if not secret.startswith(_PREFIX):
        raise ValueError(f"must start with {_PREFIX}")
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError(f"is no base64 after {_PREFIX}: {error}") from None


def signed_headers(secret: str, *, message_id: str, at: int, body: bytes) -> dict[str, str]:
    """Give the headers that go with *body*, sent *at* this Unix second; a repeated call keeps its *message_id*."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at),
        "webhook-signature": _signature(key_of(secret), message_id, at, body),
    }


def is_signed(secret: str, headers: Mapping[str, str], body: bytes, *, now: float) -> bool:
    """
    Say whether *body* was signed with *secret* not long before *now*: for those who receive our webhooks.

    *headers* are read by their names in lower case.
    """
    try:
        at = int(headers["webhook-timestamp"])
        signature = _signature(key_of(secret), headers["webhook-id"], at, body)
    except (KeyError, ValueError):
        return False
    given = headers.get("webhook-signature", "").split(" ")
    matches = [hmac.compare_digest(signature.encode(), one.encode()) for one in given]
    return abs(now - at) <= _TOLERANCE_S and any(matches)


def _signature(key: bytes, message_id: str, at: int, body: bytes) -> str:
    digest = hmac.digest(key, f"{message_id}.{at}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"
