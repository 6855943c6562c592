"""
The backlog of a model: its waiting jobs in the order in which they are served, in Redis.

What the order is, and how it lies there, stands in common/backlog_scripts.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common import backlog_scripts as scripts
from common import keys
from common.bounds import Bounds
from common.redis_client import RedisClient, run_for_each, run_script
from common.schemas import AUTO, JobRequest

PLACE_HEADER = "shiftworker_place"  # of a message: its Place, but for the priority, which is a property of its own

_AT_ONCE = 100  # messages a round trip
_MOST_TOKENS = 10**9  # of one job; their sums must stay below 2^48, see backlog_scripts
_FAR_OFF = 1e10  # Unix seconds: the year 2286; a member of the order has 16 digits of microseconds
_BYTES_PER_TOKEN = 4  # of English; what is asked of it is a share, not a count


class Place(BaseModel):
    """What the order of waiting jobs asks of one job; None = it does not say."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    queued_at: float = Field(ge=0, lt=_FAR_OFF, description="Unix seconds when the router sent it to its model")
    priority: int = Field(default=0, ge=0, le=9, description="a step of keys.PRIORITY_STEPS; 0 is served first")
    tenant: str = Field(default="default", max_length=100)
    prompt_tokens: int | None = Field(default=None, ge=0, le=_MOST_TOKENS)
    output_tokens: int | None = Field(default=None, ge=0, le=_MOST_TOKENS, description="the longest answer it allows")
    deadline_at: float | None = Field(default=None, ge=0, lt=_FAR_OFF, description="Unix seconds")
    max_wait_s: float | None = Field(default=None, ge=0, lt=1e9, description="the bound on its waiting")
    any_model: bool | None = Field(default=None, description="it names no model: another may take it")

    @classmethod
    def of(cls, message: Mapping[str, Any], *, now: float, bounds: Bounds | None = None) -> Self:
        """
        Read the place of a kombu *message*.

        One that says nothing, or nonsense, was queued *now* (Unix seconds); one that names no bound has that of its
        tenant and class in *bounds*.
        """
        priority = message["properties"].get("priority")
        step = max((s for s in keys.PRIORITY_STEPS if isinstance(priority, int) and s <= priority), default=0)
        said = (message.get("headers") or {}).get(PLACE_HEADER)
        try:
            place = cls.model_validate({"queued_at": now, **(said or {}), "priority": step})
        except (ValidationError, TypeError):
            place = cls(queued_at=now, priority=step)
        if place.max_wait_s is not None or bounds is None:
            return place
        return place.model_copy(update={"max_wait_s": bounds.of(place.tenant, step)})

    @classmethod
    def of_job(cls, request: JobRequest, *, now: float, earlier: object = None) -> Self:
        """
        Describe a job that is routed *now* (Unix seconds).

        One that is routed again goes on waiting: *earlier* is the header that it came with.
        """
        return cls(
            queued_at=cls.of({"headers": {PLACE_HEADER: earlier}, "properties": {}}, now=now).queued_at,
            priority=request.priority,
            tenant=request.tenant,
            prompt_tokens=_prompt_tokens(request),
            output_tokens=min(request.answer_tokens, _MOST_TOKENS) if request.answer_tokens else None,
            deadline_at=min(max(request.deadline.timestamp(), 0), _FAR_OFF - 1) if request.deadline else None,
            any_model=request.model.casefold() == AUTO or None,
        )

    def header(self) -> dict[str, Any]:
        """Write it for the header of a message."""
        return {PLACE_HEADER: self.model_dump(exclude={"priority"}, exclude_none=True)}


class RedisBacklog:
    """
    The backlogs of all queues that have one (keys.has_backlog); each change is one script.

    Parameters
    ----------
    client
        May be a pipeline where the answer is of no interest. `find`, `walk` and `read` need one that decodes.
    bounds
        On the waiting of jobs whose message names none; None = they have none.
    """

    def __init__(self, client: RedisClient, *, bounds: Bounds | None = None) -> None:
        self._redis = client
        self._bounds = bounds

    def put(self, queue: str, message: Mapping[str, Any], raw: str, *, now: float) -> Any:
        """
        Put a kombu *message*, *raw* as JSON, into the backlog of *queue*; wakes whoever waits for it.

        A job that waits there already keeps its place, and this message takes the older one's.
        """
        about = job_id_of(message), place_json(message, now=now, bounds=self._bounds)
        return self._redis.eval(scripts.PUT, 2, keys.backlog(queue), keys.WAKE, *about, raw)

    def adopt(self, queue: str, *, now: float) -> int:
        """
        Put into the backlog what a stock producer has pushed to the lists of *queue*; returns how many entries it took.

        One that is no message is set aside in `shiftworker:malformed`.
        """
        adopted = 0
        for name in keys.lists_of(queue):
            # As bytes: whatever somebody pushed, it must not stop who reads it.
            for raw in reversed(self._redis.execute_command("LRANGE", name, -_AT_ONCE, -1, NEVER_DECODE=True)):
                try:
                    message = json.loads(raw.decode())
                    place = place_json(message, now=now, bounds=self._bounds)
                    about = [job_id_of(message).encode(), place.encode()]
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    about = []
                adopted += self._redis.eval(scripts.ADOPT, 3, keys.backlog(queue), name, keys.MALFORMED, raw, *about)
        return adopted

    def count(self, queue: str) -> int:
        """How many jobs wait."""
        return int(self._redis.zcard(keys.backlog_order(queue)))

    def rank(self, queue: str, job_id: str, *, now: float | None = None) -> int | None:
        """
        How many jobs are served before this one, as things stand; None = it is not here.

        *now* is in Unix seconds; None = by Redis's clock, for a producer's may be wrong.
        """
        found = self._redis.eval(scripts.RANK, 1, keys.backlog(queue), job_id, *([] if now is None else [now]))
        return None if found is None else int(found)

    def rank_of_new(self, queue: str, place: Place) -> int:
        """How many jobs would be served before one with this *place* that came now."""
        step = max(step for step in keys.PRIORITY_STEPS if step <= place.priority)
        return int(self._redis.eval(scripts.RANK_OF_NEW, 1, keys.backlog(queue), step, place.tenant))

    def find(self, queue: str, job_id: str) -> str | None:
        """The message of a waiting job; None = it is not here."""
        found: str | None = self._redis.hget(keys.backlog_messages(queue), job_id)
        return found

    def remove(self, queue: str, job_id: str, raw: str) -> bool:
        """Take a job out for good, if its message is still *raw*; False = it waits there no longer."""
        return bool(self._redis.eval(scripts.REMOVE, 1, keys.backlog(queue), job_id, raw))

    def move(self, job_id: str, raw: str, new: str, *, queue: str, to: str) -> bool:
        """
        Move a job to the backlog of the queue *to*, in the same place; False = its message is no longer *raw*.

        There its message is *new*.
        """
        ends = keys.backlog(queue), keys.backlog(to)
        return bool(self._redis.eval(scripts.MOVE, 3, *ends, keys.WAKE, job_id, raw, new, to))

    def send(self, job_id: str, raw: str, new: str, *, queue: str, to_list: str) -> bool:
        """Send a job to the back of a list of kombu's, as the message *new*; False = its message is no longer *raw*."""
        return bool(self._redis.eval(scripts.MOVE, 3, keys.backlog(queue), to_list, keys.WAKE, job_id, raw, new))

    def take_over(self, job_id: str, raw: str, new: str, *, of: str, by: str, why: str) -> bool:
        """
        Move a job of the model *of* to the backlog of the model *by*, behind what its tenant has there.

        Its message becomes *new*; False = it is no longer *raw*. The job's view changes in the same step.
        """
        target = keys.model_queue(by)
        places = keys.backlog(keys.model_queue(of)), keys.backlog(target), keys.WAKE, keys.job(job_id)
        return bool(self._redis.eval(scripts.TAKE_OVER, 4, *places, job_id, raw, new, target, by, why))

    def overtake(
        self,
        queue: str,
        long_s: float,
        *,
        prompt_token_s: float,
        output_token_s: float,
        among: int,
        now: float | None = None,
    ) -> int:
        """
        Let the jobs that take *long_s* seconds or more be the first of their class; returns how many moved.

        A token of the prompt takes *prompt_token_s* seconds, one that the answer may have *output_token_s*. It looks at
        the first *among* jobs; those that are less urgent than the first one stay where they are. *now* is in Unix
        seconds; None = by Redis's clock.
        """
        about = long_s, prompt_token_s, output_token_s, among, *([] if now is None else [now])
        return int(run_script(self._redis, scripts.OVERTAKE, 1, keys.backlog(queue), *about))

    def walk(self, queue: str) -> Iterator[tuple[str, str]]:
        """Give each waiting job's id and message, in the order of now; those that leave meanwhile are left out."""
        job_ids = [member.partition(":")[2] for member in self._redis.zrange(keys.backlog_order(queue), 0, -1)]
        for start in range(0, len(job_ids), _AT_ONCE):
            some = job_ids[start : start + _AT_ONCE]
            messages = self._redis.hmget(keys.backlog_messages(queue), some)
            yield from ((job_id, raw) for job_id, raw in zip(some, messages, strict=True) if raw is not None)

    def read(self, *queues: str) -> list[Any]:
        """Each queue's sums, lane by lane, as `backlog_scripts.READ` gives them; it looks at no single job."""
        calls = [((keys.backlog(queue), *keys.lists_of(queue)), ()) for queue in queues]
        return run_for_each(self._redis, scripts.READ, calls)


def _prompt_tokens(request: JobRequest) -> int:
    given = request.prompt if request.prompt is not None else request.input
    items = given if isinstance(given, list) else []
    token_ids = sum(len(item) if isinstance(item, list) else isinstance(item, int) for item in items)
    return token_ids + len(request.text.encode()) // _BYTES_PER_TOKEN


def job_id_of(message: Mapping[str, Any]) -> str:
    """The job of a message: its task's id, or its delivery's where it is no task."""
    job_id = (message.get("headers") or {}).get("id")
    return job_id if isinstance(job_id, str) and job_id else str(message["properties"]["delivery_tag"])


def place_json(message: Mapping[str, Any], *, now: float, bounds: Bounds | None) -> str:
    """
    Write the message's place and where it goes, for the scripts; see Place.of.

    Raises
    ------
    KeyError, TypeError
        It is no message of kombu's.
    """
    properties = message["properties"]
    where = {name: properties["delivery_info"][name] for name in ("exchange", "routing_key")}
    where["delivery_tag"] = properties["delivery_tag"]
    if not all(isinstance(value, str) for value in where.values()):
        raise TypeError(f"not all strings: {where}")
    place = Place.of(message, now=now, bounds=bounds).model_dump(exclude_none=True)
    return json.dumps(place | where, ensure_ascii=False)
