"""
When is the next forecast due? So seldom that all of them together take a small share of one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SHARE: Final = 0.03  # of one core that forecasts take: what one took is paid back by rest
AHEAD_S: Final = 15.0  # of rest that may be owed where there are news: 0.45 s of work, two to ten forecasts in a row
_NEWS_S = 0.2  # of rest at least, then
_REST_S = 1.0  # of rest at least, while jobs wait
_IDLE_S = 5.0  # likewise, while none does


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What the forecasts so far ask for; moments are seconds on one clock that only goes forward."""

    due_at: float = 0.0  # from when on the next one is due ...
    news_at: float = 0.0  # ... or if much is not as it was in the last one
    paid_at: float = 0.0  # when rest has paid for all of them

    def after(self, *, began: float, ended: float, cost_s: float, waits: bool) -> Rest:
        """Say what to do after one more forecast, which took *cost_s* of a processor; *waits*: jobs wait."""
        paid_at = max(self.paid_at, began) + cost_s / SHARE
        return Rest(
            due_at=max(ended + (_REST_S if waits else _IDLE_S), paid_at),
            news_at=max(ended + _NEWS_S, paid_at - AHEAD_S),
            paid_at=paid_at,
        )
