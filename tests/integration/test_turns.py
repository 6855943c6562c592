"""
What workers tell each other of their turns, in a real Redis: of those that decide at the same moment, one claims.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from common import keys
from common.redis_client import RedisClient
from common.schemas import Offer, OfferedModel, utc_now
from worker.scheduling.redis_turns import RedisTurns


def live(client: RedisClient, *workers: str) -> None:
    """Let these be alive, and no others."""
    client.delete(*(keys.status(name) for name in ("a", "b", "c")))
    for worker in workers:
        client.set(keys.status(worker), "{}")


def test_each_worker_hears_what_the_others_that_are_alive_serve(redis_client: RedisClient) -> None:
    """Not its own; not of one whose status has run out; all models of one that serves several."""
    a, b, c = (RedisTurns(redis_client, name) for name in "abc")
    live(redis_client, "a", "b", "c")
    assert a.look(["red"]) == {}
    assert b.look(["green", "blue"]) == {"a": ["red"]}
    assert c.look([]) == {"a": ["red"], "b": ["blue", "green"]}

    live(redis_client, "a", "c")
    assert c.look([]) == {"a": ["red"]}
    a.goodbye()
    assert c.look([]) == {}


def test_each_worker_hears_what_the_others_can_serve(redis_client: RedisClient) -> None:
    """By their last offers."""
    for name, models in {"a": ("red",), "b": ("red", "green")}.items():
        offered = tuple(
            OfferedModel(id=model, tier=1, complexity_up_to=1.0, max_model_len=100, capabilities=()) for model in models
        )
        offer = Offer(worker=name, models=offered, at=utc_now())
        redis_client.hset(keys.FLEET, name, offer.model_dump_json())

    assert RedisTurns(redis_client, "c").offered() == {"a": {"red"}, "b": {"red", "green"}}


def test_a_claim_is_refused_after_another_turn_has_changed(redis_client: RedisClient) -> None:
    """Both looked before either claimed: the second looks again, sees the first, and may claim something else."""
    a, b = (RedisTurns(redis_client, name) for name in "ab")
    live(redis_client, "a", "b")
    a.look([])
    b.look([])
    a.look([])
    assert a.claim(["green"])
    assert not b.claim(["green"])

    assert b.look([]) == {"a": ["green"]}
    assert b.claim(["blue"])
    assert a.look(["green"]) == {"b": ["blue"]}


def test_what_stays_as_it_is_changes_nothing(redis_client: RedisClient) -> None:
    """A worker that looks a few times a second does not make the others' claims fail."""
    a, b = (RedisTurns(redis_client, name) for name in "ab")
    live(redis_client, "a", "b")
    a.look(["red"])
    b.look(["green"])
    for _ in range(3):
        a.look(["red"])
    assert b.claim(["blue"])


def test_of_many_that_claim_at_once_one_does(redis_client: RedisClient) -> None:
    """Twenty workers have seen the same; a thread each."""
    workers = [RedisTurns(redis_client, str(number)) for number in range(20)]
    for worker in workers:
        worker.look([])
    for worker in workers:
        worker.look([])
    with ThreadPoolExecutor(20) as pool:
        claimed = list(pool.map(lambda worker: worker.claim(["green"]), workers))
    assert sum(claimed) == 1


def test_turns_are_told_again_after_redis_has_lost_them(redis_client: RedisClient) -> None:
    """The next look writes what is not there."""
    a, b = (RedisTurns(redis_client, name) for name in "ab")
    live(redis_client, "a", "b")
    a.look(["red"])
    redis_client.delete(keys.TURNS)
    a.look(["red"])
    assert b.look([]) == {"a": ["red"]}
