"""
The three tasks: submit (the router), switch and generate.

Each stores the outcome of record first; what Celery keeps is a copy for `AsyncResult`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import redis
import structlog
from celery import Celery, Task
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError

from common import keys
from common.backlog import PLACE_HEADER, Place
from common.errors import EngineNotReady, InternalError, InvalidRequest, ShiftworkerError
from common.job_store import JobStore
from common.logs import get_logger
from common.may_enter import Held
from common.schemas import JobRequest, JobState, Ledger, Outcome, Route, SwitchStage
from worker.delivery.pool import signal_of
from worker.delivery.redis_twins import RedisTwins
from worker.jobs.failures import DuplicateDelivery, HandBack, RouteAgain, StaysHere, outcome_of
from worker.jobs.runner import JobRunner
from worker.jobs.submit_lane import shown
from worker.residency.switcher import Switcher
from worker.routing.gate import SameKey
from worker.routing.router import Router

logger = get_logger(__name__)

REDIS_AWAY = (redis.RedisError, OperationalError, ConnectionError)
_REDIS_AWAY_PAUSE_S = 1.0  # before the message goes back: no busy loop while Redis says no
_NO_OFFERS_PAUSE_S = 0.5  # before a job that nobody can route yet goes back to its queue


def add_submit_task(app: Celery, router: Router, store: JobStore, twins: RedisTwins | None = None) -> None:
    """
    Give *app* the router task: validate, score, choose, and hand the job on under the same id.

    A job whose idempotency key is another one's waits in *twins*; a router without a gate needs none.
    """

    @app.task(bind=True, shared=False, name=keys.SUBMIT_TASK, throws=(ShiftworkerError,))
    def submit(task: Task, *args: Any, **fields: Any) -> Any:
        job_id: str = task.request.id
        with structlog.contextvars.bound_contextvars(job_id=job_id), given_back_without_redis(job_id):
            webhook = router.gate.webhook_of(args[0] if args else fields) if router.gate else None
            ended = store.outcome(job_id)
            if ended is not None:
                return settle(task, store.finish(ended, webhook=webhook) if webhook else ended)
            try:
                request, route = router.route(job_id, body_of(args, fields), **_limits_of(task))
            except EngineNotReady as error:
                logger.warning("routing.no_offers", detail=error.message)
                signal_of(job_id).wait(_NO_OFFERS_PAUSE_S)
                raise Reject(requeue=True) from None
            except SameKey as same:
                return settle(task, store.finish(_outcome_as(same, task, store, twins), webhook=webhook))
            except ShiftworkerError as error:
                refused = outcome_of(error, job_id, _ledger(store, job_id))
                return settle(task, store.finish(refused, webhook=webhook))
            except REDIS_AWAY:
                raise
            except Exception as error:
                logger.exception("jobs.internal_error")
                failed = _internal(error, job_id, _ledger(store, job_id))
                return settle(task, store.finish(failed, webhook=webhook))
            logger.info("routing.routed", model_id=route.model, complexity=route.complexity, why=route.why)
            # Should Redis go away between publishing and acknowledging, a second copy is published later; the first
            # of the two that runs claims the job, the other one is dropped.
            raise task.replace(_generate_signature(app, request, route, earlier=task.request.get(PLACE_HEADER)))


def add_generate_task(app: Celery, runner: JobRunner, store: JobStore) -> None:
    """Give *app* the task that runs one routed job on its model's engine."""

    @app.task(bind=True, shared=False, name=keys.GENERATE_TASK, throws=(ShiftworkerError,))
    def generate(task: Task, *args: Any, **fields: Any) -> Any:
        job_id: str = task.request.id
        with structlog.contextvars.bound_contextvars(job_id=job_id), given_back_without_redis(job_id):
            try:
                request, route = routed_of(args, fields)
            except InvalidRequest as error:
                return settle(task, store.finish(outcome_of(error, job_id, _ledger(store, job_id))))
            with structlog.contextvars.bound_contextvars(model_id=route.model):
                return settle(task, run(task, job_id, request, route))

    def run(task: Task, job_id: str, request: JobRequest, route: Route) -> Outcome:
        delivery = (task.request.properties or {}).get("delivery_tag", job_id)
        try:
            return runner.run(job_id, request, route, delivery=delivery, stop=signal_of(job_id))
        except HandBack:
            raise Reject(requeue=True) from None
        except RouteAgain:
            raise task.replace(_submit_signature(app, request)) from None
        except StaysHere:
            stays = route.model_copy(update={"cloud": None, "stays": True})
            signature = _generate_signature(app, request, stays, earlier=task.request.get(PLACE_HEADER))
            raise task.replace(signature) from None
        except DuplicateDelivery:
            raise Ignore from None
        except REDIS_AWAY:
            raise
        except Exception as error:
            logger.exception("jobs.internal_error")
            return store.finish(_internal(error, job_id, store.view(job_id).ledger))


def add_switch_task(app: Celery, switcher: Switcher, publish: Callable[[], object]) -> None:
    """Give *app* the task that changes the model; acknowledged early, since a repeated switch helps nobody."""

    @app.task(bind=True, shared=False, name=keys.SWITCH_TASK, acks_late=False, throws=(ShiftworkerError,))
    def switch(
        task: Task, model: str, *, epoch: int | None = None, reason: str = "asked for by hand", force: bool = False
    ) -> dict[str, Any]:
        def tell(stage: SwitchStage, detail: str) -> None:
            publish()
            task.send_event(f"task-{stage}", model=model, detail=detail)  # Flower shows the stage as the task's state

        record = switcher.switch(model, epoch=epoch, reason=reason, force=force, on_stage=tell)
        return record.model_dump(mode="json")


def _limits_of(task: Task) -> dict[str, Any]:
    """What the producer has limited in Celery's way: it means the work, and not this task."""
    expires = task.request.expires
    return {
        "time_limits": task.request.timelimit or (),
        "expires": datetime.fromisoformat(expires) if isinstance(expires, str) else expires,
    }


def _outcome_as(same: SameKey, task: Task, store: JobStore, twins: RedisTwins | None) -> Outcome:
    """
    Give the job that has another's idempotency key the outcome of that one; QueueFull if it cannot wait for it.

    Raises
    ------
    Ignore, Reject
        There is none yet: the job waits, or looks again.
    """
    job_id: str = task.request.id
    ended = store.outcome(same.first)
    if ended is not None:
        return ended.for_twin(job_id)
    assert twins is not None  # noqa: S101 - a router whose gate looks at keys has them
    parked = twins.park(job_id, same.first, delivery=task.request.properties["delivery_tag"], entry=same.entry)
    if isinstance(parked, Held):
        return outcome_of(same.no_room(parked), job_id, _ledger(store, job_id))
    if not parked:  # that one has ended in this moment
        raise Reject(requeue=True)
    logger.info("routing.twin", first=same.first)
    raise Ignore


@contextmanager
def given_back_without_redis(job_id: str) -> Iterator[None]:
    """Give the message back when Redis was away in the middle: the job has not ended, whatever was done of it."""
    try:
        yield
    except REDIS_AWAY as error:
        logger.warning("delivery.given_back", error=f"{type(error).__name__}: {error}")
        signal_of(job_id).wait(_REDIS_AWAY_PAUSE_S)
        raise Reject(requeue=True) from None


def body_of(args: tuple[Any, ...], fields: dict[str, Any]) -> object:
    """
    The job's body, as producers send it: one object as the only argument, or its fields by name.

    In a chain or a chord Celery puts before it what the jobs before it gave; nothing is done with that.

    Raises
    ------
    InvalidRequest
        It is neither.
    """
    if len(args) == bool(not fields) + 1 and _is_of_jobs(args[0]):
        args = args[1:]
    if len(args) == 1 and not fields:
        return args[0]
    if fields and not args:
        return fields
    raise InvalidRequest(
        f"{keys.SUBMIT_TASK} takes the body as its one argument, args=[body], or its fields by name, kwargs=body; "
        f"got {len(args)} arguments and {len(fields)} named ones. In a chain, behind a task that is no job, make it "
        "immutable (signature.si)."
    )


def _is_of_jobs(result: object) -> bool:
    """Is it what a job gives (see `settle`), or a list of that?"""
    return all(isinstance(one, dict) and "ledger" in one for one in (result if isinstance(result, list) else [result]))


def routed_of(args: tuple[Any, ...], fields: dict[str, Any]) -> tuple[JobRequest, Route]:
    """
    The job and its route, as the router sends them on.

    Raises
    ------
    InvalidRequest
        Somebody else has sent this.
    """
    try:
        body, route = args
        if not fields:
            return JobRequest.parse(body), Route.model_validate(route)
    except ValueError:  # too many arguments or too few, or (pydantic's error is one) no route
        pass
    raise InvalidRequest(
        f"{keys.GENERATE_TASK} takes what the router sends, a job and its route. Send the job to {keys.SUBMIT_TASK}."
    )


def settle(task: Task, outcome: Outcome) -> dict[str, Any]:
    """Give Celery its copy of *outcome*: a result, an exception with the error's name, or REVOKED."""
    if outcome.state is JobState.ANSWERED and outcome.error is None:
        return outcome.result()
    error = outcome.error.as_exception() if outcome.error else InternalError(f"Job {outcome.job_id} has no answer.")
    if outcome.state is JobState.CANCELLED:
        task.backend.mark_as_revoked(outcome.job_id, error.message, request=task.request)
        raise Ignore from None
    raise error


def _generate_signature(app: Celery, request: JobRequest, route: Route, *, earlier: object = None) -> Any:
    """The task that answers the job, on its way to its model's queue; Flower sees no prompt."""
    body = request.model_dump(mode="json", exclude_none=True)
    return app.signature(
        keys.GENERATE_TASK,
        args=(body, route.model_dump(mode="json")),
        immutable=True,
        queue=keys.model_queue(route.model),
        priority=request.priority,
        headers=Place.of_job(request, now=time.time(), earlier=earlier).header(),
        argsrepr=shown(request, route),
        kwargsrepr="{}",
    )


def _submit_signature(app: Celery, request: JobRequest) -> Any:
    """The router task, for a job that must be routed again."""
    return app.signature(
        keys.SUBMIT_TASK,
        args=(request.model_dump(mode="json", exclude_none=True),),
        immutable=True,
        queue=keys.SUBMIT_QUEUE,
        argsrepr="(again)",
        kwargsrepr="{}",
    )


def _ledger(store: JobStore, job_id: str) -> Ledger:
    return Ledger(queued_at=store.view(job_id).queued_at)


def _internal(error: Exception, job_id: str, ledger: Ledger) -> Outcome:
    """The outcome of a job that met a fault of ours."""
    return outcome_of(InternalError(f"{type(error).__name__}: {error}"), job_id, ledger)
