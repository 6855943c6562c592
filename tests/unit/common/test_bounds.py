"""
The bound of a tenant and class: what is read, what counts first, and what is refused.
"""

from __future__ import annotations

import pytest

from common.bounds import Bounds
from common.settings import Settings


@pytest.mark.parametrize(
    ("tenant", "step", "seconds"),
    [
        ("acme", 0, 10),  # both are named
        ("acme", 3, 60),  # the tenant
        ("acme", 9, 60),  # the tenant before the class
        ("zeta", 9, 3600),  # the class
        ("zeta", 0, 600),  # neither
        ("a:b", 6, 7),  # a colon of its own
        ("*", 3, 600),  # a name like another
    ],
)
def test_who_is_named_most_closely_counts(tenant: str, step: int, seconds: float) -> None:
    """Tenant and class, then the tenant, then the class, then everybody; a priority stands for its class."""
    assert Bounds.parse(600, ["acme=60", "*:9=3600", "acme:2=10", "a:b:7=7"]).of(tenant, step) == seconds


def test_everybody_can_be_named_too() -> None:
    """A star without a priority is everybody."""
    assert Bounds.parse(600, ["*=5"]).of("acme", 0) == 5


@pytest.mark.parametrize(
    "text", ["", "acme", "=5", ":3=5", "acme=", "acme=0", "acme=-1", "acme=inf", "acme=nan", "a:10=5"]
)
def test_what_is_no_bound_is_refused_by_name(text: str) -> None:
    """No bound of nought, without end or for nobody, and no priority that there is none of."""
    with pytest.raises(ValueError, match="is not TENANT=SECONDS"):
        Bounds.parse(600, [text])


def test_it_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comma separated, beside the bound of everybody else."""
    monkeypatch.setenv("SWITCH_MAX_WAIT_S", "300")
    monkeypatch.setenv("SWITCH_MAX_WAITS", "acme:0=10, *:9=3600")
    bounds = Settings.from_env().switch.bounds
    assert [bounds.of("acme", 0), bounds.of("acme", 3), bounds.of("acme", 9)] == [10, 300, 3600]
