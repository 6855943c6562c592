"""
What is remembered of how models sleep.
"""

from __future__ import annotations

from worker.residency.sleep_notes import SleepNote, SleepNotes
from worker.state.residency import Level

ONE, TWO = Level.ASLEEP_1, Level.ASLEEP_2


def test_the_last_figures_of_each_model_and_level_are_known() -> None:
    """Each for itself; nothing is known of what never slept."""
    notes = SleepNotes()
    notes.slept("a", ONE, weights=7, sleep_s=9, host_bytes=90)
    notes.slept("a", ONE, weights=7, sleep_s=1, host_bytes=10)
    notes.slept("a", TWO, weights=7, sleep_s=2, host_bytes=20)

    assert notes.seconds("a", weights=7) == {ONE: 1, TWO: 2}
    assert notes.host_bytes("a", weights=7) == {ONE: 10, TWO: 20}
    assert notes.seconds("b", weights=7) == notes.host_bytes("b", weights=7) == {}


def test_figures_of_other_weights_say_nothing_and_a_ban_stays() -> None:
    """The model was quantized, say: what it takes must be measured again, but what was wrong is not tried again."""
    notes = SleepNotes()
    notes.slept("a", ONE, weights=7, sleep_s=1, host_bytes=10)
    notes.ban("a", ONE, "other tokens")

    assert notes.seconds("a", weights=4) == notes.host_bytes("a", weights=4) == {}
    assert notes.banned() == {("a", ONE): "other tokens"}
    notes.slept("a", ONE, weights=4, sleep_s=2, host_bytes=20)
    assert notes.seconds("a", weights=4) == {ONE: 2}
    assert notes.banned() == {("a", ONE): "other tokens"}


def test_each_change_is_given_away_whole() -> None:
    """What is kept of a model and level is one value, and the next start begins with it."""
    kept: list[SleepNote] = []
    notes = SleepNotes(keep=kept.append)
    notes.ban("a", ONE, "other tokens")
    notes.slept("a", TWO, weights=7, sleep_s=2, host_bytes=20)
    notes.slept("a", ONE, weights=7, sleep_s=1, host_bytes=10)

    assert [(note.level, note.sleep_s, note.banned) for note in kept] == [
        (ONE, None, "other tokens"), (TWO, 2, None), (ONE, 1, "other tokens"),
    ]  # fmt: skip
    again = SleepNotes(kept[1:])
    assert again.banned() == notes.banned()
    assert again.host_bytes("a", weights=7) == notes.host_bytes("a", weights=7)
