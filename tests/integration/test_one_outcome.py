"""
Any interleaving of submit, route, cancel, deadline, pop, death and end leaves each job exactly one outcome.

The router's task, the lanes' steps, the client's cancel and the sweep of deadlines are the real ones, on a real Redis;
the test is Celery, and decides what happens next.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from common import JobClient, keys
from common.celery_app import create_app
from common.errors import DeadlineExceeded, JobCancelled, ShiftworkerError
from common.redis_client import connect
from common.redis_job_store import RedisJobStore
from common.schemas import JobRequest, JobState, OfferedModel, Outcome
from common.settings import EgressSettings, LimitSettings, Settings
from common.transport import give_back
from common.waiting_jobs import RedisWaitingJobs
from worker.delivery.redis_steps import Ended, RedisSteps
from worker.delivery.redis_twins import RedisTwins
from worker.jobs.deadlines import DeadlineSweep
from worker.jobs.failures import outcome_of
from worker.routing.gate import Gate
from worker.routing.router import Router
from worker.routing.rules_file import load_rules
from worker.tasks import add_submit_task, settle

OWNER = "here"
TTL_S = 1000
SMALL = OfferedModel(id="small", tier=1, complexity_up_to=1.0, max_model_len=1000, capabilities=("chat",))
ENDS = {JobState.ANSWERED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}


class Parts:
    """What all histories share."""

    def __init__(self, url: str) -> None:
        self.redis = connect(url)
        self.client = JobClient(url)
        self.app = create_app(Settings.from_env(), owner=OWNER)
        self.connection = self.app.connection_for_write()
        self.channel = self.connection.default_channel
        self.store = RedisJobStore(self.redis, ttl_s=TTL_S)
        gate = Gate(limits=LimitSettings(tenant_jobs=4), egress=EgressSettings(), webhooks=False)
        router = Router(store=self.store, offers=lambda: [SMALL], rules=load_rules(), gate=gate)
        add_submit_task(self.app, router, self.store, RedisTwins(self.redis, owner=OWNER, ttl_s=TTL_S))
        self.steps = RedisSteps(self.redis, self.app, owner=OWNER, ttl_s=TTL_S)
        self.waiting = RedisWaitingJobs(self.redis, ttl_s=TTL_S)

    def close(self) -> None:
        self.connection.close()
        self.client.close()
        self.app.close()


class Jobs(RuleBasedStateMachine):
    """A router, a worker, producers, and a clock that only the test moves."""

    parts: Parts

    def __init__(self) -> None:
        super().__init__()
        parts = self.parts
        self.redis, self.client, self.app, self.channel = parts.redis, parts.client, parts.app, parts.channel
        self.store, self.steps = parts.store, parts.steps
        self.redis.flushdb()
        self.now = datetime.now(UTC).timestamp()
        self.deadlines = DeadlineSweep(self.redis, self.store, parts.waiting, clock=lambda: self.now)
        self.sent: list[str] = []
        self.running: dict[str, Any] = {}  # job -> its message
        self.seen: dict[str, str] = {}  # job -> its outcome, as it was stored first

    # --- What producers do ---------------------------------------------------------------------------------

    @rule(
        key=st.sampled_from([None, None, "one", "two"]), due_in=st.sampled_from([None, 1.0, 3.0]), by_name=st.booleans()
    )
    def submit(self, key: str | None, due_in: float | None, by_name: bool) -> None:  # noqa: FBT001
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "idempotency_key": key}
        if due_in is not None:
            body["deadline"] = self.now + due_in
        if by_name:
            self.sent.append(self.app.send_task(keys.SUBMIT_TASK, args=[body], queue=keys.SUBMIT_QUEUE).id)
        else:
            self.sent.append(self.client.submit(body))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.sent:
            self.client.cancel(data.draw(st.sampled_from(self.sent)))

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 7.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.deadlines.sweep()

    # --- What the router does ------------------------------------------------------------------------------

    @rule()
    def the_router_takes_one(self) -> None:
        self.route()

    def route(self) -> bool:
        message = self.channel.basic_get(keys.SUBMIT_QUEUE)
        if message is None:
            return False
        task, job_id = self.app.tasks[keys.SUBMIT_TASK], message.headers["id"]
        (body,), _, _ = message.decode()
        task.push_request(
            id=job_id, args=[body], kwargs={}, called_directly=False, is_eager=False, properties=message.properties
        )
        try:
            self.app.backend.mark_as_done(job_id, task.run(body))
        except Reject:
            message.reject(requeue=True)
            return True
        except Ignore:
            pass
        except ShiftworkerError as error:
            self.app.backend.mark_as_failure(job_id, error)
        finally:
            task.pop_request()
        message.ack()
        return True

    # --- What a worker does --------------------------------------------------------------------------------

    @rule()
    def a_worker_takes_one(self) -> None:
        self.begin()

    def begin(self) -> bool:
        message = self.channel.basic_get(keys.model_queue("small"))
        if message is None:
            return False
        job_id, tag = message.headers["id"], message.delivery_tag
        deadline = JobRequest.parse(message.decode()[0][0]).deadline
        if deadline is not None and self.now >= deadline.timestamp():
            self.end_otherwise(message, DeadlineExceeded("Late."))
        elif self.steps.begin({job_id: tag}, hostname="here")[job_id] is None:
            self.end_otherwise(message, JobCancelled("Cancelled."))
        else:
            self.running[job_id] = message
        return True

    def end_otherwise(self, message: Any, error: ShiftworkerError) -> None:
        """As the ordinary way does: store it, unless there is an outcome, and tell Celery."""
        job_id = message.headers["id"]
        kept = self.store.finish(outcome_of(error, job_id, self.store.view(job_id).ledger))
        try:
            self.app.backend.mark_as_done(job_id, settle(self.app.tasks[keys.SUBMIT_TASK], kept))
        except Ignore:
            pass
        except ShiftworkerError as told:
            self.app.backend.mark_as_failure(job_id, told)
        message.ack()

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        if self.running:
            self.end(data.draw(st.sampled_from(sorted(self.running))))

    def end(self, job_id: str) -> None:
        message = self.running.pop(job_id)
        attempt = self.store.view(job_id).attempts
        ledger = self.store.view(job_id).ledger.model_copy(update={"attempt": attempt})
        outcome = Outcome(job_id=job_id, state=JobState.ANSWERED, response={"choices": []}, ledger=ledger)
        if self.steps.end([Ended(delivery=message.delivery_tag, outcome=outcome, parent_id=None)]) == [True]:
            message.ack()
        else:
            self.end_otherwise(message, JobCancelled("Cancelled."))

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """Whoever runs the job is gone, and its message goes back."""
        if self.running:
            message = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
            give_back(self.channel, message.delivery_tag, owner=OWNER)

    # --- What must hold ------------------------------------------------------------------------------------

    @invariant()
    def an_outcome_never_changes(self) -> None:
        for job_id in self.sent:
            stored = self.redis.get(keys.outcome(job_id))
            if stored is not None:
                assert self.seen.setdefault(job_id, stored) == stored
            else:
                assert job_id not in self.seen

    def teardown(self) -> None:
        """Let all that is left happen; then each job has ended once, and nothing remembers that it had not."""
        while self.route() or self.begin() or self.running:
            for job_id in list(self.running):
                self.end(job_id)
        self.an_outcome_never_changes()
        for job_id in self.sent:
            outcome = self.store.outcome(job_id)
            assert outcome is not None, job_id
            assert outcome.state in ENDS
            copy = self.app.AsyncResult(job_id)
            expected = {JobState.ANSWERED: "SUCCESS", JobState.CANCELLED: "REVOKED"}.get(outcome.state, "FAILURE")
            assert copy.state == expected
            if outcome.ledger.same_as is not None:
                first = self.store.outcome(outcome.ledger.same_as)
                assert first is not None
                assert outcome == first.for_twin(job_id)
        self.now += 100  # a client has noted the deadline of a job that was refused
        assert self.deadlines.sweep() == 0
        left = [
            key for key in self.redis.keys("*")
            if not key.startswith(("shiftworker:job:", "shiftworker:outcome:", "shiftworker:kept", "celery-task-meta-",
                                   "shiftworker:key:", "shiftworker:cancel:", "_kombu", "shiftworker:wake"))
        ]  # fmt: skip
        assert not left


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_each_job_has_one_outcome_whatever_happens(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Histories of thirty steps; one that fails is printed."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    Jobs.parts = Parts(redis_url)
    run_state_machine_as_test(
        Jobs,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    Jobs.parts.close()
