"""
Signatures of webhooks: the standard's own example, and nothing else than what was signed.
"""

from __future__ import annotations

import pytest

from common.standard_webhook import is_signed, key_of, signed_headers

# The example that the standard's libraries test themselves with.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
AT = 1614265330
BODY = b'{"test": 2432232314}'
HEADERS = {
    "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp": "1614265330",
    "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}


def test_the_standards_example_is_signed_alike() -> None:
    """Any library of the standard can check what we sign."""
    assert signed_headers(SECRET, message_id=HEADERS["webhook-id"], at=AT, body=BODY) == HEADERS


@pytest.mark.parametrize("late_s", [-300, 0, 300])
def test_what_was_signed_a_moment_ago_is_taken(late_s: int) -> None:
    """Also beside the signature of another secret, while one is replaced by the next."""
    assert is_signed(SECRET, HEADERS, BODY, now=AT + late_s)
    both = {**HEADERS, "webhook-signature": f"v1,other {HEADERS['webhook-signature']}"}
    assert is_signed(SECRET, both, BODY, now=AT)


@pytest.mark.parametrize(
    ("headers", "body", "now"),
    [
        ({}, BODY + b" ", AT),
        ({"webhook-id": "msg_other"}, BODY, AT),
        ({"webhook-timestamp": str(AT + 1)}, BODY, AT),
        ({"webhook-timestamp": "soon"}, BODY, AT),
        ({"webhook-signature": "v1,"}, BODY, AT),
        ({"webhook-signature": "ü"}, BODY, AT),
        ({}, BODY, AT + 301),
        ({}, BODY, AT - 301),
    ],
)
def test_what_was_changed_or_kept_is_not_taken(headers: dict[str, str], body: bytes, now: float) -> None:
    """The body, the id, the time, the signature; and a call that somebody plays again later."""
    assert not is_signed(SECRET, {**HEADERS, **headers}, body, now=now)
    assert not is_signed(SECRET, {}, body, now=now)
    assert not is_signed("whsec_" + "A" * 32, HEADERS, BODY, now=AT)


@pytest.mark.parametrize("secret", ["", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_?", "whsec_abc"])
def test_a_secret_in_another_form_is_none(secret: str) -> None:
    """Rather than a key that nobody else derives from it."""
    with pytest.raises(ValueError, match="whsec_"):
        key_of(secret)
