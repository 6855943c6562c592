"""
Frames arrive whole and in order, however the stream cuts them.
"""

from __future__ import annotations

import pytest

from worker.engines.channel import Frame, Kind, Order, Unpacker, pack

FRAMES = [
    Frame(Kind.READY),
    Frame(Kind.ASK, 1, b"/v1/completions\n{}"),
    Frame(Kind.ABORT, 2**40),
    Frame(Kind.ANSWER, 7, bytes(range(256)) * 3),
]


@pytest.mark.parametrize("size", [1, 2, 12, 13, 14, 100, 10_000])
def test_frames_survive_any_cut(size: int) -> None:
    """A piece may hold half a header, or three frames and a bit."""
    stream = b"".join(map(pack, FRAMES))
    unpacker = Unpacker()

    found = [frame for i in range(0, len(stream), size) for frame in unpacker.feed(stream[i : i + size])]

    assert found == FRAMES


def test_half_a_frame_is_kept_back() -> None:
    """Nothing is given away before its last byte is here."""
    whole = pack(FRAMES[1])
    unpacker = Unpacker()

    assert list(unpacker.feed(whole[:-1])) == []
    assert list(unpacker.feed(whole[-1:])) == [FRAMES[1]]


def test_an_order_comes_back_as_it_was_sent() -> None:
    """Also with spaces and letters that are not ASCII."""
    order = Order(arguments=["--model", "/models/a b"], env={"NAME": "ü"}, folder="/tmp/x", log="/tmp/x.log")

    assert Order.unpack(order.pack()) == order
